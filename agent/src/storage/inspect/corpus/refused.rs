// SPDX-License-Identifier: Apache-2.0
//! One broken or hostile image for every reason to refuse.

use super::*;

#[test]
fn every_bad_image_of_the_corpus_is_refused_for_its_own_reason() {
    use Format::{Iso, Qcow2, Raw};
    let descriptor = b"# Disk DescriptorFile\nversion=1\ncreateType=\"monolithicFlat\"\n\
        RW 2048 FLAT \"/etc/shadow\" 0\n";
    let anonymous = b"\n# hello\n\nversion=1\nRW 2048 FLAT \"/etc/shadow\" 0\n";
    let extension = |kind: u32, length: u32| {
        qcow2_with(|image| {
            put32(image, 104, kind);
            put32(image, 108, length);
        })
    };
    let cases: Vec<(&str, Vec<u8>, Format, &str)> = vec![
        ("empty raw", vec![], Raw, "empty"),
        ("empty qcow2", vec![], Qcow2, "empty"),
        ("empty iso", vec![], Iso, "empty"),
        // References to other files.
        (
            "backing file",
            qcow2_with(|image| {
                put64(image, 8, 0x200);
                put32(image, 16, 11);
                put(image, 0x200, b"/etc/passwd");
            }),
            Qcow2,
            "backing-file",
        ),
        (
            "version 2 with a backing file",
            qcow2_with(|image| {
                put32(image, 4, 2);
                put64(image, 8, 0x200);
                put32(image, 16, 11);
            }),
            Qcow2,
            "backing-file",
        ),
        (
            "external data file by feature bit",
            qcow2_with(|image| put64(image, 72, 1 << 2)),
            Qcow2,
            "external-data-file",
        ),
        (
            "external data file by header extension only",
            extension(0x4441_5441, 11),
            Qcow2,
            "external-data-file",
        ),
        (
            "external data file behind another extension",
            qcow2_with(|image| {
                put32(image, 104, 0x6803_f857);
                put32(image, 108, 3);
                put32(image, 120, 0x4441_5441);
                put32(image, 124, 11);
            }),
            Qcow2,
            "external-data-file",
        ),
        (
            "raw external data file by autoclear bit only",
            qcow2_with(|image| put64(image, 88, 1 << 1)),
            Qcow2,
            "external-data-file",
        ),
        // Features.
        (
            "unknown incompatible feature",
            qcow2_with(|image| put64(image, 72, 1 << 5)),
            Qcow2,
            "unknown-features",
        ),
        (
            "unknown incompatible feature in the highest bit",
            qcow2_with(|image| put64(image, 72, 1 << 63)),
            Qcow2,
            "unknown-features",
        ),
        (
            "dirty",
            qcow2_with(|image| put64(image, 72, 1)),
            Qcow2,
            "dirty",
        ),
        (
            "corrupt",
            qcow2_with(|image| put64(image, 72, 2)),
            Qcow2,
            "corrupt",
        ),
        (
            "encrypted with AES",
            qcow2_with(|image| put32(image, 32, 1)),
            Qcow2,
            "encrypted",
        ),
        (
            "encrypted with LUKS",
            qcow2_with(|image| put32(image, 32, 2)),
            Qcow2,
            "encrypted",
        ),
        (
            "crypt header extension only",
            extension(0x0537_be77, 16),
            Qcow2,
            "encrypted",
        ),
        (
            "unknown compression",
            qcow2_with(|image| {
                put64(image, 72, 1 << 3);
                put32(image, 100, 112);
                image[104] = 2;
            }),
            Qcow2,
            "compression",
        ),
        (
            "compression bit without a type",
            qcow2_with(|image| put64(image, 72, 1 << 3)),
            Qcow2,
            "qcow2-header",
        ),
        (
            "extended L2 with small clusters",
            qcow2_with(|image| {
                put64(image, 72, 1 << 4);
                put32(image, 20, 13);
            }),
            Qcow2,
            "qcow2-header",
        ),
        // Header fields.
        (
            "qcow version 1",
            qcow2_with(|image| put32(image, 4, 1)),
            Qcow2,
            "qcow-version",
        ),
        (
            "qcow version 4",
            qcow2_with(|image| put32(image, 4, 4)),
            Qcow2,
            "qcow-version",
        ),
        (
            "clusters of 256 bytes",
            qcow2_with(|image| put32(image, 20, 8)),
            Qcow2,
            "qcow2-header",
        ),
        (
            "clusters of 4 MiB",
            qcow2_with(|image| put32(image, 20, 22)),
            Qcow2,
            "qcow2-header",
        ),
        (
            "clusters of 2^4294967295 bytes",
            qcow2_with(|image| put32(image, 20, u32::MAX)),
            Qcow2,
            "qcow2-header",
        ),
        (
            "short header length",
            qcow2_with(|image| put32(image, 100, 72)),
            Qcow2,
            "qcow2-header",
        ),
        (
            "header longer than a cluster",
            qcow2_with(|image| put32(image, 100, 0x10008)),
            Qcow2,
            "qcow2-header",
        ),
        (
            "odd header length",
            qcow2_with(|image| put32(image, 100, 107)),
            Qcow2,
            "qcow2-header",
        ),
        (
            "refcounts of 128 bits",
            qcow2_with(|image| put32(image, 96, 7)),
            Qcow2,
            "qcow2-header",
        ),
        (
            "extension longer than the header cluster",
            extension(0x1234_5678, 0x10000),
            Qcow2,
            "qcow2-extension",
        ),
        (
            "extension of 4 GiB",
            extension(0x1234_5678, u32::MAX),
            Qcow2,
            "qcow2-extension",
        ),
        // Sizes and tables.
        (
            "disk of zero bytes",
            qcow2_with(|image| put64(image, 24, 0)),
            Qcow2,
            "virtual-size-zero",
        ),
        (
            "disk of 16 EiB",
            qcow2_with(|image| put64(image, 24, u64::MAX)),
            Qcow2,
            "virtual-size-too-large",
        ),
        (
            "disk one byte over the limit",
            qcow2_with(|image| put64(image, 24, Limits::default().virtual_size + 1)),
            Qcow2,
            "virtual-size-too-large",
        ),
        (
            "L1 table too small for the disk",
            qcow2_with(|image| put32(image, 36, 1)),
            Qcow2,
            "l1-size",
        ),
        (
            "absurd L1 table",
            qcow2_with(|image| put32(image, 36, u32::MAX)),
            Qcow2,
            "l1-size",
        ),
        (
            "L1 table past the end",
            qcow2_with(|image| put32(image, 36, 4 << 20)),
            Qcow2,
            "truncated",
        ),
        (
            "L1 table at the end of the address space",
            qcow2_with(|image| put64(image, 40, !0xffff)),
            Qcow2,
            "truncated",
        ),
        (
            "L1 table over the header",
            qcow2_with(|image| put64(image, 40, 0)),
            Qcow2,
            "misplaced",
        ),
        (
            "unaligned L1 table",
            qcow2_with(|image| put64(image, 40, 0x30008)),
            Qcow2,
            "misplaced",
        ),
        (
            "no refcount table",
            qcow2_with(|image| put32(image, 56, 0)),
            Qcow2,
            "qcow2-header",
        ),
        (
            "absurd refcount table",
            qcow2_with(|image| put32(image, 56, u32::MAX)),
            Qcow2,
            "qcow2-header",
        ),
        (
            "refcount table past the end",
            qcow2_with(|image| put64(image, 48, 1 << 40)),
            Qcow2,
            "truncated",
        ),
        (
            "too many snapshots",
            qcow2_with(|image| put32(image, 60, u32::MAX)),
            Qcow2,
            "snapshots",
        ),
        (
            "snapshot table past the end",
            qcow2_with(|image| {
                put32(image, 60, 1);
                put64(image, 64, 1 << 40);
            }),
            Qcow2,
            "truncated",
        ),
        (
            "L2 table past the end",
            qcow2_with(|image| put64(image, 0x30000, 1 << 40)),
            Qcow2,
            "truncated",
        ),
        (
            "unaligned L2 table",
            qcow2_with(|image| put64(image, 0x30000, 0x40200)),
            Qcow2,
            "misplaced",
        ),
        (
            "data cluster past the end",
            qcow2_with(|image| put64(image, 0x40000, 1 << 40)),
            Qcow2,
            "truncated",
        ),
        (
            "compressed cluster past the end",
            qcow2_with(|image| put64(image, 0x40000, (1 << 62) | (1 << 40))),
            Qcow2,
            "truncated",
        ),
        // Truncation.
        ("only the magic", qcow2()[..4].to_vec(), Qcow2, "truncated"),
        ("half a header", qcow2()[..100].to_vec(), Qcow2, "truncated"),
        (
            "only the header",
            qcow2()[..104].to_vec(),
            Qcow2,
            "truncated",
        ),
        (
            "without its data",
            qcow2()[..5 * 64 * KIB].to_vec(),
            Qcow2,
            "truncated",
        ),
        // Disguises.
        ("qcow2 declared raw", qcow2(), Raw, "qcow2-in-disguise"),
        ("qcow2 declared iso", qcow2(), Iso, "qcow2-in-disguise"),
        (
            "raw that begins with a qcow2 magic and nothing else",
            disk_beginning_with(b"QFI\xfb"),
            Raw,
            "qcow2-in-disguise",
        ),
        (
            "iso with a qcow2 in its system area",
            iso_with(|image| put(image, 0, &qcow2()[..104])),
            Iso,
            "qcow2-in-disguise",
        ),
        (
            "iso with a VMDK descriptor in its system area",
            iso_with(|image| put(image, 0, descriptor)),
            Iso,
            "unsupported-container",
        ),
        ("raw declared qcow2", vec![0; KIB], Qcow2, "not-as-declared"),
        ("iso declared qcow2", iso(), Qcow2, "not-as-declared"),
        (
            "raw declared iso",
            vec![0; 64 * KIB],
            Iso,
            "not-as-declared",
        ),
        (
            "short raw declared iso",
            vec![1; 100],
            Iso,
            "not-as-declared",
        ),
        // Containers.
        (
            "VMDK descriptor with an external extent",
            descriptor.to_vec(),
            Raw,
            "unsupported-container",
        ),
        (
            "VMDK descriptor declared qcow2",
            descriptor.to_vec(),
            Qcow2,
            "unsupported-container",
        ),
        (
            "VMDK descriptor without its name",
            anonymous.to_vec(),
            Raw,
            "unsupported-container",
        ),
        (
            "fixed VHD",
            {
                let mut image = vec![0; 64 * KIB];
                put(&mut image, 64 * KIB - 512, b"conectix");
                image
            },
            Raw,
            "unsupported-container",
        ),
        (
            "VDI",
            {
                let mut image = vec![0; 64 * KIB];
                put(&mut image, 64, &[0x7f, 0x10, 0xda, 0xbe]);
                image
            },
            Raw,
            "unsupported-container",
        ),
        // ISO.
        (
            "iso larger than its file",
            iso_with(|image| put(image, 0x8000 + 80, &33u32.to_le_bytes())),
            Iso,
            "truncated",
        ),
        (
            "iso with blocks of 7 bytes",
            iso_with(|image| put(image, 0x8000 + 128, &7u16.to_le_bytes())),
            Iso,
            "iso-header",
        ),
        (
            "iso of zero blocks",
            iso_with(|image| put(image, 0x8000 + 80, &[0; 4])),
            Iso,
            "iso-header",
        ),
        (
            "iso without a primary descriptor",
            iso_with(|image| put(image, 0x8000, b"\x00CD001\x01")),
            Iso,
            "not-as-declared",
        ),
    ];
    for (what, bytes, declared, reason) in cases {
        match check(&bytes, declared) {
            Ok(found) => panic!("{what}: accepted as {found:?}"),
            Err(refusal) => assert_eq!(refusal.name(), reason, "{what}: {refusal}"),
        }
    }
}
