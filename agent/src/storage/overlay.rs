// SPDX-License-Identifier: Apache-2.0
//! Empty qcow2 overlays, written here and not by qemu-img.
//!
//! An overlay that holds nothing yet is a header that names its backing file, and three tables that
//! are empty but for the count of the file's own clusters. Writing it takes a rescue a millisecond
//! where a qemu-img under limits takes ten, and opens no file but the new one: the backing file, which
//! a guest may be writing to, is not looked at.
//!
//! ```text
//!   cluster 0   header, its extension (the backing file's format), the backing file's name
//!           1   refcount table: one entry, cluster 2
//!           2   refcount block: 1 for each cluster of this file
//!           3…  L1 table: zeros, so every read goes to the backing file
//! ```
//!
//! After QEMU's `docs/interop/qcow2.txt`, version 3, without features. It blocks.

use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use super::files::{DISK_MODE, FileError, replace_durable, unwritten};
use super::inspect::Format;
use crate::core::backing::{LARGEST, check_name};

/// 64 KiB, as qemu-img chooses.
const CLUSTER_BITS: u32 = 16;
const CLUSTER: u64 = 1 << CLUSTER_BITS;
/// What one L1 entry stands for: a cluster of L2 entries, 8 bytes each. One refcount block counts the
/// clusters of the largest L1 table.
const PER_L1_ENTRY: u64 = CLUSTER / 8 * CLUSTER;
const HEADER: u32 = 104;
/// Header extension: the format of the backing file.
const BACKING_FORMAT: u32 = 0xe279_2aca;

/// Why an overlay was not made.
#[derive(Debug, thiserror::Error)]
pub enum OverlayError {
    /// A backing file that QEMU could not find, or could take for something else.
    #[error("{} cannot back an overlay: {rule}", path.display())]
    Backing {
        /// The backing file.
        path: PathBuf,
        /// The rule that its name breaks.
        rule: &'static str,
    },
    /// The size is none that a disk can have.
    #[error("an overlay cannot have {size} bytes: at most 2 PiB are possible")]
    Size {
        /// The size.
        size: u64,
    },
    /// It could not be written.
    #[error("the overlay could not be made")]
    File(#[from] FileError),
}

/// Makes an empty overlay of `size` bytes, rounded up to whole sectors, at `path` on `backing`, in place
/// of one that is there. It is on the disk, whole, when this returns.
///
/// # Errors
/// [`OverlayError`]; what was at `path` is untouched then.
pub fn create(path: &Path, backing: &Path, format: Format, size: u64) -> Result<(), OverlayError> {
    let name = backing_name(backing)?;
    if size > LARGEST {
        return Err(OverlayError::Size { size });
    }
    let size = size.next_multiple_of(512);
    let l1_entries = size.div_ceil(PER_L1_ENTRY);
    let clusters = 3 + (l1_entries * 8).div_ceil(CLUSTER);
    let header = header(name, format.driver(), size, l1_entries);
    let refcounts: Vec<u8> = (0..clusters).flat_map(|_| 1u16.to_be_bytes()).collect();
    replace_durable(path, DISK_MODE, |file, part| {
        file.set_len(clusters * CLUSTER)
            .and_then(|()| file.write_all_at(&header, 0))
            .and_then(|()| file.write_all_at(&(2 * CLUSTER).to_be_bytes(), CLUSTER))
            .and_then(|()| file.write_all_at(&refcounts, 2 * CLUSTER))
            .map_err(unwritten(part, clusters * CLUSTER))
    })?;
    Ok(())
}

fn header(name: &[u8], format: &str, size: u64, l1_entries: u64) -> Vec<u8> {
    let word = |number: u64| u32::try_from(number).unwrap_or(u32::MAX).to_be_bytes();
    let length = |bytes: &[u8]| word(bytes.len() as u64);
    let mut extension = [BACKING_FORMAT.to_be_bytes(), length(format.as_bytes())].concat();
    extension.extend(format.bytes());
    extension.resize(extension.len().next_multiple_of(8), 0);
    // The end of the extensions: type 0, length 0.
    extension.extend([0; 8]);
    let name_offset = u64::from(HEADER) + extension.len() as u64;

    let mut header = b"QFI\xfb".to_vec();
    header.extend(3u32.to_be_bytes()); // version
    header.extend(name_offset.to_be_bytes());
    header.extend(length(name));
    header.extend(CLUSTER_BITS.to_be_bytes());
    header.extend(size.to_be_bytes());
    header.extend(0u32.to_be_bytes()); // encryption: none
    header.extend(word(l1_entries));
    header.extend((3 * CLUSTER).to_be_bytes()); // L1 table
    header.extend(CLUSTER.to_be_bytes()); // refcount table
    header.extend(1u32.to_be_bytes()); // clusters of the refcount table
    header.extend(0u32.to_be_bytes()); // snapshots
    header.extend(0u64.to_be_bytes()); // snapshot table
    header.extend([0; 3 * 8]); // incompatible, compatible, autoclear features: none
    header.extend(4u32.to_be_bytes()); // refcounts of 2^4 bits
    header.extend(HEADER.to_be_bytes());
    header.extend(extension);
    header.extend(name);
    header
}

/// The name as it is written into the header.
fn backing_name(backing: &Path) -> Result<&[u8], OverlayError> {
    let name = backing.as_os_str().as_bytes();
    match check_name(name) {
        Ok(()) => Ok(name),
        Err(rule) => Err(OverlayError::Backing {
            path: backing.to_owned(),
            rule,
        }),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing)]

    use std::fs;
    use std::os::unix::fs::PermissionsExt as _;
    use std::process::Command;

    use serde_json::Value;

    use super::*;

    const MIB: u64 = 1 << 20;

    /// What `qemu-img COMMAND` says of an overlay, in JSON.
    fn qemu_img(command: &str, path: &Path) -> Value {
        let output = Command::new("qemu-img")
            .args([command, "--output=json", "-f", "qcow2"])
            .arg(path)
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    #[test]
    fn qemu_finds_in_it_what_was_asked_for_and_nothing_to_complain_of() {
        let dir = tempfile::tempdir().unwrap();
        let (base, path) = (dir.path().join("base"), dir.path().join("disk"));
        for size in [0, 512, 513, MIB, 512 * MIB, 512 * MIB + 1, 3 << 40, LARGEST] {
            // The backing file need not even be there.
            create(&path, &base, Format::Qcow2, size).unwrap();
            let info = qemu_img("info", &path);
            assert_eq!(info["format"], "qcow2");
            assert_eq!(info["virtual-size"], size.next_multiple_of(512));
            assert_eq!(info["backing-filename"], base.to_str().unwrap());
            assert_eq!(info["backing-filename-format"], "qcow2");
            let mode = fs::metadata(&path).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, DISK_MODE);

            fs::File::create(&base).unwrap();
            create(&path, &base, Format::Raw, size).unwrap();
            let report = qemu_img("check", &path);
            assert_eq!(report["check-errors"], 0, "{size}");
            // It names these two only where it has found some.
            assert!(report.get("corruptions").is_none(), "{report}");
            assert!(report.get("leaks").is_none(), "{report}");
            fs::remove_file(&base).unwrap();
        }
    }

    #[test]
    fn it_shows_its_backing_file_in_the_format_that_was_said() {
        let dir = tempfile::tempdir().unwrap();
        let (base, path) = (dir.path().join("base"), dir.path().join("disk"));
        let flat = dir.path().join("flat");
        // The content of the raw base looks like qcow2; nothing may fall for it.
        let mut content = b"QFI\xfb\0\0\0\x03".to_vec();
        content.resize(65_536, 7);
        fs::write(&base, &content).unwrap();
        create(&path, &base, Format::Raw, 65_536).unwrap();
        assert_eq!(qemu_img("info", &path)["backing-filename-format"], "raw");
        let converted = Command::new("qemu-img")
            .args(["convert", "-f", "qcow2", "-O", "raw"])
            .args([&path, &flat])
            .status();
        assert!(converted.unwrap().success());
        assert_eq!(fs::read(&flat).unwrap(), content);
    }

    #[test]
    fn names_that_qemu_could_misread_and_impossible_sizes_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let try_with = |base: &str, size| create(&path, Path::new(base), Format::Raw, size);
        for wrong in [
            "nbd:localhost",
            "base",
            "/a\0b",
            &format!("/{}", "a".repeat(1023)),
        ] {
            let refused = try_with(wrong, MIB);
            assert!(
                matches!(refused, Err(OverlayError::Backing { .. })),
                "{wrong}"
            );
        }
        let refused = try_with("/base", LARGEST + 1);
        assert!(matches!(refused, Err(OverlayError::Size { .. })));
        assert!(!path.exists());
        try_with(&format!("/{}", "a".repeat(1022)), MIB).unwrap();
    }

    #[test]
    fn the_same_overlay_is_the_same_bytes_and_takes_the_place_of_an_old_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        fs::write(&path, "half made").unwrap();
        create(&path, Path::new("/base"), Format::Raw, MIB).unwrap();
        let first = fs::read(&path).unwrap();
        create(&path, Path::new("/base"), Format::Raw, MIB).unwrap();
        assert_eq!(fs::read(&path).unwrap(), first);
        assert_eq!(first.len() as u64, 4 * CLUSTER);
    }
}
