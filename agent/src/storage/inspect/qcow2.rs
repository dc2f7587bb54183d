// SPDX-License-Identifier: Apache-2.0
//! qcow2, versions 2 and 3, after QEMU's `docs/interop/qcow2.txt`.
//!
//! Numbers are big-endian. Limits that the format leaves open are QEMU's own, so that what passes
//! here does not fail there for its size.

use super::source::{Source, field};
use super::{Container, Limits, Unsafe, magic};
use crate::core::{
    backing::{LONGEST_NAME, References},
    facts::DiskLook,
    image::ImageFormat,
};

/// Header lengths: version 2 is fixed, version 3 says its own.
const V2_HEADER: u32 = 72;
const V3_HEADER: u32 = 104;

/// Incompatible features.
const DIRTY: u64 = 1 << 0;
const CORRUPT: u64 = 1 << 1;
const DATA_FILE: u64 = 1 << 2;
const COMPRESSION: u64 = 1 << 3;
const EXTENDED_L2: u64 = 1 << 4;
const KNOWN: u64 = DIRTY | CORRUPT | DATA_FILE | COMPRESSION | EXTENDED_L2;
/// Autoclear feature: the external data file can be read as raw.
const RAW_DATA_FILE: u64 = 1 << 1;

/// Header extensions that decide something. All others are skipped, as the format wants it.
const EXTENSION_END: u32 = 0;
const EXTENSION_DATA_FILE: u32 = 0x4441_5441;
const EXTENSION_CRYPT: u32 = 0x0537_be77;
const EXTENSION_BACKING_FORMAT: u32 = 0xe279_2aca;

/// Host offsets in L1 and L2 entries.
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
const COMPRESSED: u64 = 1 << 62;

/// QEMU's limits: an L1 table of 32 MiB, a refcount table of 8 MiB.
const MOST_L1_ENTRIES: u64 = (32 << 20) / 8;
const MOST_REFCOUNT_TABLE: u64 = 8 << 20;
/// The fixed part of an entry in the snapshot table.
const SNAPSHOT_ENTRY: u64 = 40;

/// The fields of a header that matter here.
struct Header {
    version: u32,
    backing_file_offset: u64,
    backing_file_size: u32,
    cluster_bits: u32,
    size: u64,
    crypt_method: u32,
    l1_size: u32,
    l1_table_offset: u64,
    refcount_table_offset: u64,
    refcount_table_clusters: u32,
    snapshots: u32,
    snapshots_offset: u64,
    incompatible: u64,
    autoclear: u64,
    refcount_order: u32,
    header_length: u32,
    compression: u8,
}

/// Checks the image and returns its virtual size.
pub(super) fn inspect(source: &Source<'_>, limits: &Limits) -> Result<u64, Unsafe> {
    let header = Header::read(source)?;
    header.check_references()?;
    header.check_fields(limits)?;
    header.check_extensions(source)?;
    header.check_tables(source, limits)?;
    header.check_clusters(source, limits)?;
    Ok(header.size)
}

/// Reads what the header of a disk says that a guest uses.
pub(super) fn disk(source: &Source<'_>) -> Result<DiskLook, Unsafe> {
    if magic::container(source)? != Some(Container::Qcow) {
        let declared = ImageFormat::Qcow2;
        return Err(Unsafe::NotAsDeclared { declared });
    }
    let header = Header::read(source)?;
    header.check_usable()?;
    header.check_shape()?;
    Ok(DiskLook {
        size: header.size,
        references: header.references(source)?,
    })
}

fn invalid(what: &'static str, value: impl Into<u64>) -> Unsafe {
    Unsafe::QcowHeader {
        what,
        value: value.into(),
    }
}

impl Header {
    fn read(source: &Source<'_>) -> Result<Self, Unsafe> {
        const WHAT: &str = "the qcow2 header";
        let bytes = source.read(WHAT, 0, 8)?;
        let version = u32_at(&bytes, 4);
        let length = match version {
            2 => V2_HEADER,
            3 => V3_HEADER,
            version => return Err(Unsafe::QcowVersion { version }),
        };
        let bytes = source.read(WHAT, 0, length as usize)?;
        let v3 = version == 3;
        let header_length = if v3 { u32_at(&bytes, 100) } else { V2_HEADER };
        Ok(Self {
            version,
            backing_file_offset: u64_at(&bytes, 8),
            backing_file_size: u32_at(&bytes, 16),
            cluster_bits: u32_at(&bytes, 20),
            size: u64_at(&bytes, 24),
            crypt_method: u32_at(&bytes, 32),
            l1_size: u32_at(&bytes, 36),
            l1_table_offset: u64_at(&bytes, 40),
            refcount_table_offset: u64_at(&bytes, 48),
            refcount_table_clusters: u32_at(&bytes, 56),
            snapshots: u32_at(&bytes, 60),
            snapshots_offset: u64_at(&bytes, 64),
            incompatible: if v3 { u64_at(&bytes, 72) } else { 0 },
            autoclear: if v3 { u64_at(&bytes, 88) } else { 0 },
            refcount_order: if v3 { u32_at(&bytes, 96) } else { 4 },
            header_length,
            compression: if v3 && header_length > V3_HEADER {
                let byte = source.read(WHAT, V3_HEADER.into(), 1)?;
                byte.first().copied().unwrap_or(0)
            } else {
                0
            },
        })
    }

    /// Nothing outside the file, and nothing that cannot be read.
    fn check_references(&self) -> Result<(), Unsafe> {
        if self.backing_file_offset != 0 {
            return Err(Unsafe::BackingFile);
        }
        if self.incompatible & DATA_FILE != 0 || self.autoclear & RAW_DATA_FILE != 0 {
            return Err(Unsafe::DataFile);
        }
        self.check_usable()?;
        // A base image is opened read-only and so never repaired: its reference counts would stay
        // wrong for as long as it lives.
        if self.incompatible & DIRTY != 0 {
            return Err(Unsafe::Dirty);
        }
        Ok(())
    }

    /// Nothing that cannot be read without knowing more.
    fn check_usable(&self) -> Result<(), Unsafe> {
        let unknown = self.incompatible & !KNOWN;
        if unknown != 0 {
            return Err(Unsafe::UnknownFeatures { bits: unknown });
        }
        if self.crypt_method != 0 {
            return Err(Unsafe::Encrypted);
        }
        if self.incompatible & CORRUPT != 0 {
            return Err(Unsafe::Corrupt);
        }
        Ok(())
    }

    /// The sizes that everything else is found by.
    fn check_shape(&self) -> Result<(), Unsafe> {
        if !(9..=21).contains(&self.cluster_bits) {
            return Err(invalid("cluster_bits", self.cluster_bits));
        }
        let length = self.header_length;
        let aligned = length == V3_HEADER || length.is_multiple_of(8);
        if self.version == 3
            && (length < V3_HEADER || u64::from(length) > self.cluster() || !aligned)
        {
            return Err(invalid("header_length", length));
        }
        Ok(())
    }

    /// The other files that it names.
    fn references(&self, source: &Source<'_>) -> Result<References, Unsafe> {
        let mut references = References::default();
        if self.incompatible & DATA_FILE != 0 || self.autoclear & RAW_DATA_FILE != 0 {
            references.data_file = Some(String::new());
        }
        self.extensions(source, |kind, offset, length| {
            let place = match kind {
                EXTENSION_DATA_FILE => &mut references.data_file,
                EXTENSION_BACKING_FORMAT => &mut references.backing_format,
                _ => return Ok(()),
            };
            *place = Some(name(source, offset, length)?);
            Ok(())
        })?;
        if self.backing_file_offset != 0 {
            let length = self.backing_file_size;
            references.backing = Some(name(source, self.backing_file_offset, length)?);
        }
        Ok(references)
    }

    fn check_fields(&self, limits: &Limits) -> Result<(), Unsafe> {
        self.check_shape()?;
        if self.incompatible & EXTENDED_L2 != 0 && self.cluster_bits < 14 {
            return Err(invalid(
                "cluster_bits with extended L2 entries",
                self.cluster_bits,
            ));
        }
        if self.refcount_order > 6 {
            return Err(invalid("refcount_order", self.refcount_order));
        }
        if self.compression > 1 {
            return Err(Unsafe::Compression {
                kind: self.compression,
            });
        }
        if (self.incompatible & COMPRESSION != 0) != (self.compression != 0) {
            return Err(invalid(
                "compression_type against its feature bit",
                self.compression,
            ));
        }
        if self.size == 0 {
            return Err(Unsafe::VirtualEmpty);
        }
        if self.size > limits.virtual_size {
            return Err(Unsafe::VirtualTooLarge {
                size: self.size,
                limit: limits.virtual_size,
            });
        }
        if self.snapshots > limits.snapshots {
            return Err(Unsafe::Snapshots {
                count: self.snapshots,
                limit: limits.snapshots,
            });
        }
        Ok(())
    }

    fn check_extensions(&self, source: &Source<'_>) -> Result<(), Unsafe> {
        self.extensions(source, |kind, _, _| match kind {
            EXTENSION_DATA_FILE => Err(Unsafe::DataFile),
            EXTENSION_CRYPT => Err(Unsafe::Encrypted),
            _ => Ok(()),
        })
    }

    /// Walks the extensions, which end with an end marker or with the first cluster, and shows each: its
    /// type, where its data begins, and its length.
    fn extensions(
        &self,
        source: &Source<'_>,
        mut show: impl FnMut(u32, u64, u32) -> Result<(), Unsafe>,
    ) -> Result<(), Unsafe> {
        // QEMU writes the first cluster out in full only when something follows it.
        let end = self.cluster().min(source.size());
        let mut offset = u64::from(self.header_length);
        while offset.saturating_add(8) <= end {
            let head = source.read("a qcow2 header extension", offset, 8)?;
            let (kind, length) = (u32_at(&head, 0), u32_at(&head, 4));
            offset = offset.saturating_add(8);
            if kind == EXTENSION_END {
                return Ok(());
            }
            if u64::from(length) > end.saturating_sub(offset) {
                return Err(Unsafe::QcowExtension { kind, length });
            }
            show(kind, offset, length)?;
            offset = offset.saturating_add(u64::from(length).next_multiple_of(8));
        }
        Ok(())
    }

    /// The tables that the header points to lie within the file and have sensible sizes.
    fn check_tables(&self, source: &Source<'_>, limits: &Limits) -> Result<(), Unsafe> {
        let reach = self.cluster().saturating_mul(self.l2_entries());
        let least = self.size.div_ceil(reach);
        let entries = u64::from(self.l1_size);
        // More than needed is legal: the state of a running guest is stored past the disk's end.
        if entries < least || entries > MOST_L1_ENTRIES {
            return Err(Unsafe::L1Size {
                entries: self.l1_size,
                least,
                most: MOST_L1_ENTRIES,
            });
        }
        self.check_place("the L1 table", self.l1_table_offset)?;
        source.need("the L1 table", self.l1_table_offset, entries * 8)?;

        let refcounts = u64::from(self.refcount_table_clusters).saturating_mul(self.cluster());
        if refcounts == 0 || refcounts > MOST_REFCOUNT_TABLE.max(self.cluster()) {
            return Err(invalid(
                "refcount_table_clusters",
                self.refcount_table_clusters,
            ));
        }
        self.check_place("the refcount table", self.refcount_table_offset)?;
        source.need("the refcount table", self.refcount_table_offset, refcounts)?;

        if self.snapshots > 0 {
            self.check_place("the snapshot table", self.snapshots_offset)?;
            let length = u64::from(self.snapshots.min(limits.snapshots)) * SNAPSHOT_ENTRY;
            source.need("the snapshot table", self.snapshots_offset, length)?;
        }
        Ok(())
    }

    /// Every cluster that the active tables name begins within the file: a download that stopped
    /// half-way is found here and not by the guest.
    fn check_clusters(&self, source: &Source<'_>, limits: &Limits) -> Result<(), Unsafe> {
        let l1_bytes = usize::try_from(u64::from(self.l1_size) * 8).unwrap_or(usize::MAX);
        let l2_bytes = usize::try_from(self.cluster()).unwrap_or(usize::MAX);
        let mut budget = limits.l2_bytes;
        let l1 = source.read("the L1 table", self.l1_table_offset, l1_bytes)?;
        for entry in l1.chunks_exact(8) {
            let l2_offset = u64_at(entry, 0) & OFFSET_MASK;
            if l2_offset == 0 {
                continue;
            }
            self.check_place("an L2 table", l2_offset)?;
            source.need("an L2 table", l2_offset, self.cluster())?;
            let Some(left) = budget.checked_sub(self.cluster()) else {
                continue;
            };
            budget = left;
            let l2 = source.read("an L2 table", l2_offset, l2_bytes)?;
            for entry in l2.chunks_exact(self.l2_entry_size()) {
                self.check_cluster(source, u64_at(entry, 0))?;
            }
        }
        Ok(())
    }

    fn check_cluster(&self, source: &Source<'_>, entry: u64) -> Result<(), Unsafe> {
        let offset = if entry & COMPRESSED != 0 {
            // The low 62 - (cluster_bits - 8) bits are the offset, the rest counts sectors.
            let bits = 62 - (self.cluster_bits - 8);
            entry & ((1 << bits) - 1)
        } else {
            let offset = entry & OFFSET_MASK;
            if offset == 0 {
                return Ok(());
            }
            self.check_place("a data cluster", offset)?;
            offset
        };
        // The last cluster of a file may be shorter than the others.
        source.need("a data cluster", offset, 1)
    }

    /// Clusters are aligned, and the first one is the header's.
    fn check_place(&self, what: &'static str, offset: u64) -> Result<(), Unsafe> {
        if offset == 0 || !offset.is_multiple_of(self.cluster()) {
            return Err(Unsafe::Misplaced { what, offset });
        }
        Ok(())
    }

    /// The cluster size in bytes; meaningful once `cluster_bits` was checked.
    fn cluster(&self) -> u64 {
        1u64.checked_shl(self.cluster_bits).unwrap_or(0)
    }

    fn l2_entry_size(&self) -> usize {
        if self.incompatible & EXTENDED_L2 != 0 {
            16
        } else {
            8
        }
    }

    fn l2_entries(&self) -> u64 {
        self.cluster() / self.l2_entry_size() as u64
    }
}

/// A name in the header, with what is no plain ASCII escaped.
fn name(source: &Source<'_>, offset: u64, length: u32) -> Result<String, Unsafe> {
    let bytes = length as usize;
    if bytes > LONGEST_NAME {
        return Err(invalid("the length of a name", length));
    }
    let bytes = source.read("a name in the qcow2 header", offset, bytes)?;
    Ok(bytes.escape_ascii().to_string())
}

/// Reads past the end give 0; the callers check lengths first.
fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    field(bytes, offset).map_or(0, u32::from_be_bytes)
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    field(bytes, offset).map_or(0, u64::from_be_bytes)
}
