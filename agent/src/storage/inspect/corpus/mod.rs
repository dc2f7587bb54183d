// SPDX-License-Identifier: Apache-2.0
//! The corpus of hostile and broken images, made here byte by byte, and of good ones from qemu-img.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;

mod fuzz;
mod real;
mod refused;

use super::{Format, Inspection, Limits, Unsafe, detect, inspect};

const KIB: usize = 1 << 10;
const MIB: u64 = 1 << 20;

impl Unsafe {
    /// The reason without its numbers.
    pub(in crate::storage) fn name(&self) -> &'static str {
        match self {
            Self::Unreadable { .. } => "unreadable",
            Self::NotRegular => "not-regular",
            Self::Empty => "empty",
            Self::FileTooLarge { .. } => "file-too-large",
            Self::VirtualTooLarge { .. } => "virtual-size-too-large",
            Self::VirtualEmpty => "virtual-size-zero",
            Self::UnsupportedContainer { .. } => "unsupported-container",
            Self::QcowInDisguise { .. } => "qcow2-in-disguise",
            Self::NotAsDeclared { .. } => "not-as-declared",
            Self::Unrecognised => "unrecognised",
            Self::Truncated { .. } => "truncated",
            Self::QcowVersion { .. } => "qcow-version",
            Self::QcowHeader { .. } => "qcow2-header",
            Self::QcowExtension { .. } => "qcow2-extension",
            Self::BackingFile => "backing-file",
            Self::DataFile => "external-data-file",
            Self::UnknownFeatures { .. } => "unknown-features",
            Self::Dirty => "dirty",
            Self::Corrupt => "corrupt",
            Self::Encrypted => "encrypted",
            Self::Compression { .. } => "compression",
            Self::Snapshots { .. } => "snapshots",
            Self::L1Size { .. } => "l1-size",
            Self::Misplaced { .. } => "misplaced",
            Self::IsoHeader { .. } => "iso-header",
        }
    }
}

fn file_of(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

fn sparse(size: u64) -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(size).unwrap();
    file
}

fn check(bytes: &[u8], declared: Format) -> Result<Inspection, Unsafe> {
    inspect(&file_of(bytes), declared, &Limits::default())
}

/// Overwrites part of an image, which grows if it must.
fn put(image: &mut Vec<u8>, offset: usize, bytes: &[u8]) {
    let end = offset + bytes.len();
    if image.len() < end {
        image.resize(end, 0);
    }
    image[offset..end].copy_from_slice(bytes);
}

fn put32(image: &mut Vec<u8>, offset: usize, value: u32) {
    put(image, offset, &value.to_be_bytes());
}

fn put64(image: &mut Vec<u8>, offset: usize, value: u64) {
    put(image, offset, &value.to_be_bytes());
}

/// A small valid version 3 image with 64 KiB clusters: header, refcount table, refcount block, L1,
/// one L2 table and one data cluster; 1 GiB of disk.
fn qcow2() -> Vec<u8> {
    const CLUSTER: usize = 64 * KIB;
    let mut image = vec![0; 6 * CLUSTER];
    put(&mut image, 0, b"QFI\xfb");
    put32(&mut image, 4, 3);
    put32(&mut image, 20, 16);
    put64(&mut image, 24, 1 << 30);
    put32(&mut image, 36, 2);
    put64(&mut image, 40, 3 * CLUSTER as u64);
    put64(&mut image, 48, CLUSTER as u64);
    put32(&mut image, 56, 1);
    put32(&mut image, 96, 4);
    put32(&mut image, 100, 104);
    put64(&mut image, CLUSTER, 2 * CLUSTER as u64);
    put64(&mut image, 3 * CLUSTER, (1 << 63) | (4 * CLUSTER as u64));
    put64(&mut image, 4 * CLUSTER, (1 << 63) | (5 * CLUSTER as u64));
    image
}

fn qcow2_with(change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut image = qcow2();
    change(&mut image);
    image
}

/// An ISO with a primary and a terminating descriptor.
fn iso() -> Vec<u8> {
    let mut image = vec![0; 64 * KIB];
    put(&mut image, 0x8000, b"\x01CD001\x01");
    put(&mut image, 0x8000 + 40, b"RESCUE_CD                       ");
    put(&mut image, 0x8000 + 80, &32u32.to_le_bytes());
    put(&mut image, 0x8000 + 128, &2048u16.to_le_bytes());
    put(&mut image, 0x8800, b"\xffCD001\x01");
    image
}

fn iso_with(change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut image = iso();
    change(&mut image);
    image
}

fn disk_beginning_with(magic: &[u8]) -> Vec<u8> {
    let mut image = vec![0; 64 * KIB];
    put(&mut image, 0, magic);
    image
}

#[test]
fn containers_are_refused_whatever_they_are_declared_to_be() {
    let magics: [&[u8]; 12] = [
        b"QED\0",
        b"KDMV",
        b"COWD",
        b"vhdxfile",
        b"conectix",
        b"LUKS\xba\xbe",
        b"WithoutFreeSpace",
        b"WithouFreSpacExt",
        b"Bochs Virtual HD Image",
        b"\x1f\x8b\x08\0",
        b"\xfd7zXZ\0",
        b"\x28\xb5\x2f\xfd",
    ];
    for magic in magics {
        for declared in [Format::Raw, Format::Qcow2, Format::Iso] {
            let refusal = check(&disk_beginning_with(magic), declared).unwrap_err();
            assert_eq!(refusal.name(), "unsupported-container", "{magic:?}");
        }
        let refusal = detect(&file_of(&disk_beginning_with(magic))).unwrap_err();
        assert_eq!(refusal.name(), "unsupported-container", "{magic:?}");
    }
}

#[test]
fn absurd_sparse_files_are_refused_by_size() {
    for declared in [Format::Raw, Format::Qcow2, Format::Iso] {
        let refusal = inspect(&sparse(8 << 40), declared, &Limits::default()).unwrap_err();
        assert_eq!(refusal.name(), "file-too-large");
    }
    let limits = Limits {
        virtual_size: MIB,
        ..Limits::default()
    };
    let refusal = inspect(&sparse(MIB + 1), Format::Raw, &limits).unwrap_err();
    assert_eq!(refusal.name(), "virtual-size-too-large");
    assert!(inspect(&sparse(MIB), Format::Raw, &limits).is_ok());
}

#[test]
fn only_regular_files_are_inspected() {
    for path in ["/dev/null", "/"] {
        let refusal =
            inspect(&File::open(path).unwrap(), Format::Raw, &Limits::default()).unwrap_err();
        assert_eq!(refusal.name(), "not-regular", "{path}");
    }
}

#[test]
fn plain_content_is_taken_as_raw_with_hints() {
    let mut image = vec![0; 64 * KIB];
    put(&mut image, 510, &[0x55, 0xaa]);
    put(&mut image, 512, b"EFI PART");
    let found = check(&image, Format::Raw).unwrap();
    assert_eq!(found.virtual_size, 64 * KIB as u64);
    assert!(found.content.mbr && found.content.gpt);
    assert_eq!(detect(&file_of(&image)).unwrap(), Format::Raw);

    let found = check(&[1, 2, 3], Format::Raw).unwrap();
    assert_eq!(found.file_size, 3);
    assert!(!found.content.mbr && !found.content.gpt);
}

#[test]
fn an_iso_is_taken_as_iso_and_as_raw() {
    let found = check(&iso(), Format::Iso).unwrap();
    assert_eq!(found.content.iso9660_volume.as_deref(), Some("RESCUE_CD"));
    let hybrid = iso_with(|image| put(image, 510, &[0x55, 0xaa]));
    let found = check(&hybrid, Format::Raw).unwrap();
    assert_eq!(found.content.iso9660_volume.as_deref(), Some("RESCUE_CD"));
    assert_eq!(detect(&file_of(&hybrid)).unwrap(), Format::Iso);
}

#[test]
fn an_iso_with_a_disk_image_on_it_is_an_iso() {
    // Behind its descriptors, as a file of it would lie; one that names another file, at that.
    let backed = qcow2_with(|image| {
        put64(image, 8, 0x200);
        put32(image, 16, 11);
    });
    let image = iso_with(|image| put(image, 0x9000, &backed));
    let found = check(&image, Format::Iso).unwrap();
    assert_eq!(found.virtual_size, image.len() as u64);
    assert_eq!(detect(&file_of(&image)).unwrap(), Format::Iso);
}

#[test]
fn volume_ids_never_carry_control_characters() {
    let image = iso_with(|image| put(image, 0x8000 + 40, b"A\x1b[31m\n\0\xffB"));
    let found = check(&image, Format::Iso).unwrap();
    assert_eq!(found.content.iso9660_volume.as_deref(), Some("A[31mB"));
}

#[test]
fn formats_that_cannot_be_told_must_be_declared() {
    let refusal = detect(&file_of(&[0; 4096])).unwrap_err();
    assert_eq!(refusal.name(), "unrecognised");
    assert_eq!(detect(&file_of(&qcow2())).unwrap(), Format::Qcow2);
}

#[test]
fn unknown_header_extensions_and_compatible_features_are_ignored() {
    let image = qcow2_with(|image| {
        put64(image, 80, u64::MAX);
        put64(image, 88, 1);
        put32(image, 104, 0x1234_5678);
        put32(image, 108, 13);
        put32(image, 128, 0xe279_2aca);
        put32(image, 132, 5);
    });
    assert_eq!(check(&image, Format::Qcow2).unwrap().virtual_size, 1 << 30);
}

#[test]
fn images_with_a_repeated_l2_table_cost_no_more_than_the_budget() {
    // Four million L1 entries, all naming one table: read each time, that were 256 GiB.
    let mut image = qcow2();
    put64(&mut image, 40, 6 * 64 * KIB as u64);
    put32(&mut image, 36, 4 << 20);
    for _ in 0..4 << 20 {
        image.extend_from_slice(&(4 * 64 * KIB as u64).to_be_bytes());
    }
    let limits = Limits {
        l2_bytes: MIB,
        ..Limits::default()
    };
    assert!(inspect(&file_of(&image), Format::Qcow2, &limits).is_ok());
}

#[test]
fn a_file_that_shrinks_while_it_is_read_is_truncated_not_a_panic() {
    let file = file_of(&qcow2());
    let source = super::source::Source::open(&file).unwrap();
    file.set_len(100).unwrap();
    let refusal = super::qcow2::inspect(&source, &Limits::default()).unwrap_err();
    assert_eq!(refusal.name(), "truncated");
    let mut byte = [0];
    assert_eq!(file.read_at(&mut byte, 100).unwrap(), 0);
}
