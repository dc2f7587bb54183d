// SPDX-License-Identifier: Apache-2.0
//! Random changes to a valid image.

use proptest::prelude::*;

use super::*;

/// A valid image so small (clusters of 512 bytes) that random changes hit something that counts.
fn tiny() -> Vec<u8> {
    let mut image = vec![0; 6 * 512];
    put(&mut image, 0, b"QFI\xfb");
    put32(&mut image, 4, 3);
    put32(&mut image, 20, 9);
    put64(&mut image, 24, 64 * 1024);
    put32(&mut image, 36, 2);
    put64(&mut image, 40, 3 * 512);
    put64(&mut image, 48, 512);
    put32(&mut image, 56, 1);
    put32(&mut image, 96, 4);
    put32(&mut image, 100, 104);
    put32(&mut image, 104, 0x6803_f857);
    put32(&mut image, 108, 48);
    put64(&mut image, 512, 2 * 512);
    put64(&mut image, 3 * 512, (1 << 63) | (4 * 512));
    put64(&mut image, 4 * 512, (1 << 63) | (5 * 512));
    image
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 10_000,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    /// Whatever is done to an image, looking at it ends in a verdict; and a verdict in its favour
    /// says that nothing of it lies elsewhere.
    #[test]
    fn mutated_images_never_confuse_the_inspection(
        changes in prop::collection::vec(
            (prop_oneof![0usize..128, 0usize..3072], prop::collection::vec(any::<u8>(), 1..9)),
            0..6,
        ),
        edges in prop::collection::vec(
            (0usize..32, prop_oneof![Just(0u32), Just(1), Just(u32::MAX), Just(0x8000_0000), any::<u32>()]),
            0..3,
        ),
        length in prop_oneof![Just(3072usize), 0usize..3200],
        declared in prop_oneof![Just(Format::Qcow2), Just(Format::Qcow2), Just(Format::Raw), Just(Format::Iso)],
    ) {
        let mut image = tiny();
        for (offset, bytes) in &changes {
            put(&mut image, *offset, bytes);
        }
        for (word, value) in &edges {
            put32(&mut image, word * 4, *value);
        }
        image.resize(length, 0);
        let file = file_of(&image);
        let _ = detect(&file);
        if let Ok(found) = inspect(&file, declared, &Limits::default()) {
            prop_assert!(found.virtual_size > 0 && found.virtual_size <= Limits::default().virtual_size);
            if found.format == Format::Qcow2 {
                prop_assert_eq!(&image[..4], b"QFI\xfb");
                prop_assert_eq!(&image[8..16], &[0; 8], "a backing file passed");
                if image[7] == 3 {
                    prop_assert_eq!(image[79] & !0x18, 0, "a feature passed");
                    prop_assert_eq!(&image[72..79], &[0; 7], "a feature passed");
                }
            } else {
                prop_assert!(!image.starts_with(b"QFI\xfb"));
            }
        }
    }
}
