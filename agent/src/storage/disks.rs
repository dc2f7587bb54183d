// SPDX-License-Identifier: Apache-2.0
//! A look at disks that guests write to, without any tool opening them.
//!
//! The format is what the disk's definition says: what a guest wrote is never asked. It blocks.

use std::{
    fs::{File, Metadata, OpenOptions},
    io::{self, Seek as _},
    os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _},
    path::Path,
};

use nix::fcntl::OFlag;

use super::inspect::{Format, Unsafe, qcow2_disk};
use crate::core::{
    backing::References,
    facts::DiskLook,
    image::{FileIdentity, ImageRecord},
    layout::Layout,
};

/// Why a disk cannot be looked at.
#[derive(Debug, thiserror::Error)]
pub enum LookError {
    /// It cannot be opened or read.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// It is a folder, a pipe, a socket or the like.
    #[error("it is neither a file nor a block device")]
    NoDisk,
    /// The header of a qcow2 is none that can be worked with.
    #[error("{0}")]
    Header(#[from] Unsafe),
    /// Neither raw nor qcow2.
    #[error("only raw and qcow2 disks can be looked at")]
    Format,
}

/// How large the disk in `path` is to its guest, and which other files belong to it.
///
/// # Errors
/// [`LookError`].
pub fn look_at_disk(path: &Path, format: &str) -> Result<DiskLook, LookError> {
    let file = open_disk(path, OpenOptions::new().read(true))?;
    match format {
        // Seeking tells the size of a block device as well.
        "raw" => Ok(DiskLook {
            size: (&file).seek(io::SeekFrom::End(0))?,
            references: References::default(),
        }),
        "qcow2" => Ok(qcow2_disk(&file)?),
        _ => Err(LookError::Format),
    }
}

/// The other files that belong to the disk in `path`.
///
/// # Errors
/// [`LookError`].
pub fn references(path: &Path, format: Format) -> Result<References, LookError> {
    Ok(look_at_disk(path, format.driver())?.references)
}

/// Can the disk be written to? It is really opened: access(2) does not know which devices the agent's
/// unit may use. Nothing is written.
///
/// # Errors
/// [`LookError`] says why not.
pub fn check_writable(path: &Path) -> Result<(), LookError> {
    open_disk(path, OpenOptions::new().write(true)).map(drop)
}

/// Opens without waiting: what has a disk's name may be a pipe.
fn open_disk(path: &Path, options: &mut OpenOptions) -> Result<File, LookError> {
    let file = options
        .custom_flags((OFlag::O_NONBLOCK | OFlag::O_NOCTTY).bits())
        .open(path)?;
    let kind = file.metadata()?.file_type();
    if kind.is_file() || kind.is_block_device() {
        Ok(file)
    } else {
        Err(LookError::NoDisk)
    }
}

/// Which file this is.
#[must_use]
pub fn file_identity(metadata: &Metadata) -> FileIdentity {
    FileIdentity {
        inode: metadata.ino(),
        size: metadata.len(),
        modified: (metadata.mtime(), metadata.mtime_nsec()),
    }
}

/// The file of an image.
#[must_use]
pub fn image_path(layout: &Layout, image: &ImageRecord) -> String {
    layout.image(image.id, image.format)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::fs;

    use nix::{sys::stat::Mode, unistd::mkfifo};

    use super::*;

    #[test]
    fn what_qemu_wrote_is_read_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
        let run = |arguments: &[&str]| {
            let status = std::process::Command::new("qemu-img")
                .args(arguments)
                .status();
            assert!(status.unwrap().success(), "{arguments:?}");
        };
        let (plain, over, split) = (path("plain"), path("over"), path("split"));
        run(&["create", "-q", "-f", "qcow2", &plain, "3M"]);
        run(&[
            "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", &plain, &over, "5M",
        ]);
        let data = path("data");
        let option = format!("data_file={data}");
        run(&["create", "-q", "-f", "qcow2", "-o", &option, &split, "7M"]);
        let look = |path: &str| look_at_disk(Path::new(path), "qcow2").unwrap();
        assert_eq!(
            (look(&plain).size, look(&plain).references),
            (3 << 20, References::default())
        );
        let seen = look(&over);
        assert_eq!(seen.size, 5 << 20);
        assert_eq!(seen.references.backing, Some(plain.clone()));
        assert_eq!(seen.references.backing_format.as_deref(), Some("qcow2"));
        let seen = look(&split);
        assert_eq!(
            (seen.size, seen.references.data_file),
            (7 << 20, Some(data))
        );
        // As raw, nothing in it means anything.
        let raw = look_at_disk(Path::new(&over), "raw").unwrap();
        assert_eq!(raw.size, fs::metadata(&over).unwrap().len());
        assert_eq!(raw.references, References::default());
    }

    #[test]
    fn what_is_no_disk_is_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let pipe = dir.path().join("pipe");
        mkfifo(&pipe, Mode::from_bits_truncate(0o600)).unwrap();
        for format in ["raw", "qcow2"] {
            assert!(matches!(
                look_at_disk(&pipe, format),
                Err(LookError::NoDisk)
            ));
            assert!(matches!(
                look_at_disk(dir.path(), format),
                Err(LookError::NoDisk)
            ));
        }
        assert!(check_writable(&pipe).is_err());
        let file = dir.path().join("file");
        fs::write(&file, "content").unwrap();
        assert!(matches!(
            look_at_disk(&file, "vmdk"),
            Err(LookError::Format)
        ));
        assert!(matches!(
            look_at_disk(&file, "qcow2"),
            Err(LookError::Header(_))
        ));
        assert_eq!(look_at_disk(&file, "raw").unwrap().size, 7);
    }

    #[test]
    fn what_can_be_written_is_told_without_changing_it() {
        let folder = tempfile::tempdir().unwrap();
        let disk = folder.path().join("disk");
        fs::write(&disk, "content").unwrap();
        check_writable(&disk).unwrap();
        assert_eq!(fs::read(&disk).unwrap(), b"content");
        // A folder is no disk, for root neither.
        assert!(check_writable(folder.path()).is_err());
    }
}
