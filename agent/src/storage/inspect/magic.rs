// SPDX-License-Identifier: Apache-2.0
//! Magic numbers: which container or partition table do the bytes look like?
//!
//! The numbers are those by which QEMU's block drivers probe (and the containers' specifications
//! name), so that nothing passes as raw that QEMU would take for something else if it were allowed
//! to guess. Fixed VHD and dmg are known by a trailer and listed for the error message.

use super::Unsafe;
use super::source::{Source, field};

/// A file format that wraps a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Container {
    /// qcow of any version.
    Qcow,
    /// QEMU enhanced disk.
    Qed,
    /// VMware: sparse extent, COW disk or descriptor.
    Vmdk,
    /// Hyper-V, the newer one.
    Vhdx,
    /// Hyper-V and Virtual PC, the older one, dynamic or fixed.
    Vhd,
    /// VirtualBox.
    Vdi,
    /// A LUKS-encrypted device.
    Luks,
    /// Parallels.
    Parallels,
    /// Bochs growing disk.
    Bochs,
    /// Compressed loop device.
    Cloop,
    /// Apple disk image.
    Dmg,
    /// A file compressed with gzip.
    Gzip,
    /// A file compressed with xz.
    Xz,
    /// A file compressed with zstd.
    Zstd,
}

impl std::fmt::Display for Container {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Qcow => "a qcow image",
            Self::Qed => "a QED image",
            Self::Vmdk => "a VMDK image or descriptor",
            Self::Vhdx => "a VHDX image",
            Self::Vhd => "a VHD (VPC) image",
            Self::Vdi => "a VDI image",
            Self::Luks => "a LUKS-encrypted device",
            Self::Parallels => "a Parallels image",
            Self::Bochs => "a Bochs image",
            Self::Cloop => "a cloop image",
            Self::Dmg => "an Apple dmg image",
            Self::Gzip => "a gzip-compressed file",
            Self::Xz => "an xz-compressed file",
            Self::Zstd => "a zstd-compressed file",
        })
    }
}

/// Magic numbers at the start of the file.
const AT_START: [(&[u8], Container); 14] = [
    (b"QFI\xfb", Container::Qcow),
    (b"QED\0", Container::Qed),
    (b"KDMV", Container::Vmdk),
    (b"COWD", Container::Vmdk),
    (b"vhdxfile", Container::Vhdx),
    (b"conectix", Container::Vhd),
    (b"LUKS\xba\xbe", Container::Luks),
    (b"WithoutFreeSpace", Container::Parallels),
    (b"WithouFreSpacExt", Container::Parallels),
    (b"Bochs Virtual HD Image", Container::Bochs),
    (b"#!/bin/sh\n#V2.0 Format\n", Container::Cloop),
    (b"\x1f\x8b\x08", Container::Gzip),
    (b"\xfd7zXZ\0", Container::Xz),
    (b"\x28\xb5\x2f\xfd", Container::Zstd),
];

/// A VDI header has its magic after 64 bytes of free text.
const VDI: (usize, [u8; 4]) = (64, [0x7f, 0x10, 0xda, 0xbe]);

/// Trailers are one sector long.
const TRAILER: u64 = 512;
const AT_TRAILER: [(&[u8], Container); 2] =
    [(b"conectix", Container::Vhd), (b"koly", Container::Dmg)];

/// How much of a text file is searched for what makes it a VMDK descriptor.
const DESCRIPTOR: usize = 4096;

/// The container that the bytes look like; `None` for plain content.
pub(super) fn container(source: &Source<'_>) -> Result<Option<Container>, Unsafe> {
    let start = source.read_up_to(0, DESCRIPTOR)?;
    for (magic, container) in AT_START {
        if start.starts_with(magic) {
            return Ok(Some(container));
        }
    }
    if field(&start, VDI.0) == Some(VDI.1) {
        return Ok(Some(Container::Vdi));
    }
    if is_vmdk_descriptor(&start) {
        return Ok(Some(Container::Vmdk));
    }
    if let Some(offset) = source.size().checked_sub(TRAILER) {
        let trailer = source.read("the last sector", offset, 512)?;
        for (magic, container) in AT_TRAILER {
            if trailer.starts_with(magic) {
                return Ok(Some(container));
            }
        }
    }
    Ok(None)
}

/// A VMDK descriptor is text: comments and empty lines, then `version=N`. The customary first
/// comment names it, but QEMU takes it without, and so it counts without.
fn is_vmdk_descriptor(start: &[u8]) -> bool {
    const NAME: &[u8] = b"# disk descriptorfile";
    if start
        .get(..NAME.len())
        .is_some_and(|head| head.eq_ignore_ascii_case(NAME))
    {
        return true;
    }
    start
        .split(|&byte| byte == b'\n')
        .map(<[u8]>::trim_ascii)
        .find(|line| !line.is_empty() && !line.starts_with(b"#"))
        .is_some_and(|line| line.to_ascii_lowercase().starts_with(b"version="))
}

/// Whether there is a boot sector, and whether a GUID partition table follows it.
pub(super) fn partition_tables(source: &Source<'_>) -> Result<(bool, bool), Unsafe> {
    const GPT: Option<[u8; 8]> = Some(*b"EFI PART");
    let start = source.read_up_to(0, 4096 + 8)?;
    let mbr = field(&start, 510) == Some([0x55, 0xaa]);
    let gpt = field(&start, 512) == GPT || field(&start, 4096) == GPT;
    Ok((mbr, gpt))
}
