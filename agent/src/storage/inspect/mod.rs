// SPDX-License-Identifier: Apache-2.0
//! Looks into a foreign image before any other program does.
//!
//! An image is bytes from a stranger. QEMU's tools follow what a header tells them: a backing file,
//! an external data file, a VMDK extent list. Each of these once handed files of the host to a guest
//! (CVE-2022-47951, CVE-2024-32498, CVE-2024-40767). So the header is read here first, by code that
//! follows nothing, allocates bounded amounts, and refuses what it does not know.
//!
//! ```text
//!   declared qcow2 ──> qcow2.rs   header, extensions, table bounds, every L1 entry, L2 within a budget
//!   declared iso ────> iso.rs     volume descriptor, size
//!   declared raw ────> magic.rs   must not look like any container
//! ```
//!
//! **What is declared must be what is there.** Raw content that begins with a qcow2 header could
//! safely be used as raw, as long as every tool for all time is told so; one that is not would open
//! a hole. Nobody makes such an image by intention, so it is refused with the advice to import it as
//! what it is. The only overlap that is accepted is an ISO declared raw: hybrid ISOs are disk images.
//!
//! This module does not know where files are kept, nor any tool. It reads with `pread` from an open
//! file, so what was inspected is what the caller holds open, whatever happens to the name.

#[cfg(test)]
mod corpus;
mod iso;
mod magic;
mod qcow2;
mod source;

use std::fs::File;

pub use crate::core::image::ImageFormat as Format;
pub use magic::Container;
use source::Source;

use crate::core::facts::DiskLook;

const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;

/// How large an image may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// The largest file, in bytes. A sparse file counts in full: a copy of it may not stay sparse.
    pub file_size: u64,
    /// The largest disk that a guest would see, in bytes.
    pub virtual_size: u64,
    /// How many internal snapshots a qcow2 image may carry.
    pub snapshots: u32,
    /// How many bytes of L2 tables are checked, at most, for pointing into the file. Tables beyond
    /// it are left to QEMU, which fails reads outside the file with an I/O error.
    pub l2_bytes: u64,
}

/// 2 TiB of file and of disk: the largest that an MBR can address and more than any cloud image, yet
/// small enough that an absurd size is seen at once. A 2 TiB disk with default clusters has 256 MiB
/// of L2 tables, which the budget just covers.
impl Default for Limits {
    fn default() -> Self {
        Self {
            file_size: 2 * TIB,
            virtual_size: 2 * TIB,
            snapshots: 128,
            l2_bytes: GIB / 4,
        }
    }
}

/// What was found in an image that may be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inspection {
    /// The format; always the declared one.
    pub format: Format,
    /// The size of the disk that a guest sees, in bytes.
    pub virtual_size: u64,
    /// The size of the file, in bytes.
    pub file_size: u64,
    /// What the disk seems to hold. Empty for qcow2, whose content is not read.
    pub content: Content,
}

/// What a disk seems to hold. Hints for people, never a reason to treat it differently.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Content {
    /// It ends its first sector like a boot sector.
    pub mbr: bool,
    /// A GUID partition table follows the first sector (of 512 or 4096 bytes).
    pub gpt: bool,
    /// The volume id of an ISO 9660 file system, printable ASCII only.
    pub iso9660_volume: Option<String>,
}

/// Why an image is refused. Every reason has a variant, a stable name and a text that says what to do.
#[derive(Debug, thiserror::Error)]
pub enum Unsafe {
    /// Reading failed.
    #[error("the image cannot be read at byte {offset}")]
    Unreadable {
        /// Where.
        offset: u64,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A device, folder, pipe or socket.
    #[error("the image is not a regular file")]
    NotRegular,
    /// No bytes.
    #[error("the image is empty: zero bytes")]
    Empty,
    /// The file is too large.
    #[error("the file is {size} bytes long; the limit is {limit}")]
    FileTooLarge {
        /// Its length.
        size: u64,
        /// The most that is taken.
        limit: u64,
    },
    /// The disk is too large.
    #[error("the disk in the image has {size} bytes; the limit is {limit}")]
    VirtualTooLarge {
        /// Its size.
        size: u64,
        /// The most that is taken.
        limit: u64,
    },
    /// The disk has no bytes.
    #[error("the disk in the image has zero bytes")]
    VirtualEmpty,
    /// A container that is not taken, whatever it was declared to be.
    #[error("the image is {found}; only qcow2, raw and iso are taken: convert it first")]
    UnsupportedContainer {
        /// What it is.
        found: Container,
    },
    /// qcow2 content that was declared to be something else.
    #[error(
        "the image is declared {declared} but begins with a qcow2 header: import it as qcow2 if \
         that is what it is"
    )]
    QcowInDisguise {
        /// What it was declared to be.
        declared: Format,
    },
    /// It is not what it was declared to be, and nothing else that is known.
    #[error("the image is declared {declared} but does not begin like one")]
    NotAsDeclared {
        /// What it was declared to be.
        declared: Format,
    },
    /// No format was declared and none is recognised.
    #[error("the format cannot be told from the content: declare it (a plain disk is raw)")]
    Unrecognised,
    /// The file ends before something that its header promises.
    #[error("the image is truncated: {what} ends at byte {needs}, the file at byte {size}")]
    Truncated {
        /// What is missing, or part of it.
        what: &'static str,
        /// Where it would end.
        needs: u64,
        /// Where the file ends.
        size: u64,
    },
    /// A qcow version that is not taken.
    #[error("qcow version {version} is not taken, only 2 and 3: convert it first")]
    QcowVersion {
        /// The version.
        version: u32,
    },
    /// A qcow2 header that contradicts itself.
    #[error("the qcow2 header is invalid: {what} is {value}")]
    QcowHeader {
        /// Which field.
        what: &'static str,
        /// Its value.
        value: u64,
    },
    /// A qcow2 header extension that does not fit.
    #[error("the qcow2 header extension {kind:#010x} of {length} bytes does not fit its place")]
    QcowExtension {
        /// Its type.
        kind: u32,
        /// The length it claims.
        length: u32,
    },
    /// The image names another file that holds part of its content.
    #[error("the image has a backing file: flatten it first (qemu-img convert)")]
    BackingFile,
    /// The image keeps its content in another file.
    #[error("the image keeps its data in an external file: convert it to a single file first")]
    DataFile,
    /// Incompatible features that nobody told us the meaning of.
    #[error("the image uses unknown incompatible qcow2 features (bits {bits:#x})")]
    UnknownFeatures {
        /// The unknown bits.
        bits: u64,
    },
    /// Its writer did not close it.
    #[error("the image was not closed by its last writer: repair it first (qemu-img check -r all)")]
    Dirty,
    /// QEMU marked it as corrupt.
    #[error("the image is marked as corrupt: repair it first (qemu-img check -r all)")]
    Corrupt,
    /// It is encrypted.
    #[error("the image is encrypted: decrypt it first (qemu-img convert)")]
    Encrypted,
    /// A compression that is not known.
    #[error("the image uses compression type {kind}; only zlib (0) and zstd (1) are known")]
    Compression {
        /// The type in the header.
        kind: u8,
    },
    /// Too many internal snapshots.
    #[error("the image has {count} internal snapshots; the limit is {limit}: delete them first")]
    Snapshots {
        /// How many.
        count: u32,
        /// The most that are taken.
        limit: u32,
    },
    /// The L1 table does not fit the size of the disk.
    #[error("the L1 table has {entries} entries; a disk of this size has {least} to {most}")]
    L1Size {
        /// How many it has.
        entries: u32,
        /// How many the disk needs.
        least: u64,
        /// How many QEMU takes.
        most: u64,
    },
    /// A table or cluster lies where it cannot lie.
    #[error("the qcow2 image is corrupt: {what} lies at byte {offset}")]
    Misplaced {
        /// What.
        what: &'static str,
        /// Where.
        offset: u64,
    },
    /// An ISO volume descriptor that contradicts itself.
    #[error("the ISO volume descriptor is invalid: {what} is {value}")]
    IsoHeader {
        /// Which field.
        what: &'static str,
        /// Its value.
        value: u64,
    },
}

/// Checks that an image is what it was declared to be and may be given to QEMU's tools.
///
/// Blocks on file reads: at most the first cluster, one L1 table (32 MiB) and [`Limits::l2_bytes`].
///
/// # Errors
/// The first reason against it that is found.
pub fn inspect(file: &File, declared: Format, limits: &Limits) -> Result<Inspection, Unsafe> {
    let source = Source::open(file)?;
    if source.size() > limits.file_size {
        return Err(Unsafe::FileTooLarge {
            size: source.size(),
            limit: limits.file_size,
        });
    }
    match (magic::container(&source)?, declared) {
        (Some(Container::Qcow), Format::Qcow2) => {
            let virtual_size = qcow2::inspect(&source, limits)?;
            Ok(Inspection {
                format: declared,
                virtual_size,
                file_size: source.size(),
                content: Content::default(),
            })
        }
        (Some(Container::Qcow), declared) => Err(Unsafe::QcowInDisguise { declared }),
        (Some(found), _) => Err(Unsafe::UnsupportedContainer { found }),
        (None, Format::Qcow2) => Err(Unsafe::NotAsDeclared { declared }),
        (None, Format::Raw) => plain(&source, declared, limits, iso::volume_id(&source)?),
        (None, Format::Iso) => {
            let volume = iso::inspect(&source)?;
            plain(&source, declared, limits, Some(volume))
        }
    }
}

/// Tells the format from the magic numbers alone, for images that come without a declared one.
/// What it says is then the declaration that [`inspect`] holds the image to.
///
/// # Errors
/// [`Unsafe::UnsupportedContainer`] for a container that is not taken; [`Unsafe::Unrecognised`] if
/// there is no magic at all (a disk without a boot sector: it must be declared raw).
pub fn detect(file: &File) -> Result<Format, Unsafe> {
    let source = Source::open(file)?;
    match magic::container(&source)? {
        Some(Container::Qcow) => return Ok(Format::Qcow2),
        Some(found) => return Err(Unsafe::UnsupportedContainer { found }),
        None => {}
    }
    // An ISO first: a hybrid one has a boot sector too.
    if iso::volume_id(&source)?.is_some() {
        return Ok(Format::Iso);
    }
    let (mbr, gpt) = magic::partition_tables(&source)?;
    if mbr || gpt {
        return Ok(Format::Raw);
    }
    Err(Unsafe::Unrecognised)
}

/// What the header of a qcow2 says that a guest uses, in a file or on a block device. Unlike an image,
/// which [`inspect`] is for, it may be open in QEMU and may refer to other files: which they are, is told.
///
/// # Errors
/// If it has no header that QEMU of today would open.
pub fn qcow2_disk(file: &File) -> Result<DiskLook, Unsafe> {
    qcow2::disk(&Source::disk(file)?)
}

fn plain(
    source: &Source<'_>,
    format: Format,
    limits: &Limits,
    iso9660_volume: Option<String>,
) -> Result<Inspection, Unsafe> {
    if source.size() > limits.virtual_size {
        return Err(Unsafe::VirtualTooLarge {
            size: source.size(),
            limit: limits.virtual_size,
        });
    }
    let (mbr, gpt) = magic::partition_tables(source)?;
    Ok(Inspection {
        format,
        virtual_size: source.size(),
        file_size: source.size(),
        content: Content {
            mbr,
            gpt,
            iso9660_volume,
        },
    })
}
