// SPDX-License-Identifier: Apache-2.0
//! Files that are there after a power cut, or were never there.
//!
//! **Who may read what.** Folders are 0711: QEMU (an unprivileged user) reaches a file whose name
//! libvirt tells it, nobody lists them. Disks, config drives and NVRAM are 0600: libvirt's dynamic
//! ownership gives them to QEMU's user while the domain runs and takes them back after. Images are
//! 0444: many domains stand on one image at a time, so it stays root's (definitions tell libvirt so) and
//! nobody writes to it.
//!
//! Everything here blocks: call it from `tokio::task::spawn_blocking`. It knows nothing of servers or
//! images.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{ErrorKind, Read, Seek as _, SeekFrom};
use std::os::unix::fs::{
    DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _,
};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::unistd::{Whence, lseek};
use sha2::{Digest as _, Sha256};

use crate::cancel::Cancel;

/// Folders: to be passed through, not listed.
pub const DIR_MODE: u32 = 0o711;
/// Disks and everything that may hold a guest's secrets.
pub const DISK_MODE: u32 = 0o600;
/// Images, which many domains read and none writes.
pub const IMAGE_MODE: u32 = 0o444;

/// How much is read or copied between two looks at [`Cancel`].
const CHUNK: usize = 1 << 20;
const COPY_CHUNK: u64 = 64 << 20;

/// Told how many bytes are done so far.
pub type BytesDone<'a> = &'a mut dyn FnMut(u64);

/// What went wrong with a file.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The system refused.
    #[error("{} could not be {action}", path.display())]
    Io {
        /// What was to be done with it ("created", "renamed" …).
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// Why it could not.
        #[source]
        source: std::io::Error,
    },
    /// There is no room for it.
    #[error(
        "{} could not be written: it takes {needed} bytes, and its file system has {free} free",
        path.display()
    )]
    Full {
        /// The file.
        path: PathBuf,
        /// What all of it takes.
        needed: u64,
        /// What was free there before it was begun.
        free: u64,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The work was no longer wanted.
    #[error("the work on {} was cancelled", path.display())]
    Cancelled {
        /// The file that was worked on.
        path: PathBuf,
    },
}

impl FileError {
    /// Is the file system (or a quota) full?
    #[must_use]
    pub fn is_full(&self) -> bool {
        matches!(self, Self::Io { source, .. } | Self::Full { source, .. } if is_full(source))
    }
}

fn is_full(error: &std::io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded
    )
}

/// Makes a [`FileError`] of an [`std::io::Error`], for `map_err`.
pub(super) fn cannot(
    action: &'static str,
    path: &Path,
) -> impl FnOnce(std::io::Error) -> FileError + use<> {
    let path = path.to_owned();
    move |source| FileError::Io {
        action,
        path,
        source,
    }
}

/// The same for a file that is being written and takes `needed` bytes as a whole: where there is no
/// room for it, the error says so.
pub(super) fn unwritten(part: &Path, needed: u64) -> impl FnOnce(std::io::Error) -> FileError {
    let path = part.to_owned();
    move |source| {
        if !is_full(&source) {
            return cannot("written", &path)(source);
        }
        // What there is of it already goes with it, in blocks of 512 bytes.
        let written = fs::metadata(&path).map_or(0, |part| part.blocks().saturating_mul(512));
        let free = free_space(&path).unwrap_or(0).saturating_add(written);
        FileError::Full {
            path,
            needed,
            free,
            source,
        }
    }
}

/// Makes sure that a folder is there with this mode; parents that are missing get it too.
///
/// # Errors
/// [`FileError::Io`].
pub fn ensure_dir(path: &Path, mode: u32) -> Result<(), FileError> {
    DirBuilder::new()
        .recursive(true)
        .mode(mode)
        .create(path)
        .map_err(cannot("created", path))?;
    // The umask had its say in the first place, and an old folder may be anything.
    fs::set_permissions(path, Permissions::from_mode(mode))
        .map_err(cannot("given its mode", path))?;
    sync_parent(path)
}

/// Removes a file if it is there, for good. Says whether it was.
///
/// # Errors
/// [`FileError::Io`].
pub fn remove_if_exists(path: &Path) -> Result<bool, FileError> {
    match fs::remove_file(path) {
        Ok(()) => sync_parent(path).map(|()| true),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(error) => Err(cannot("removed", path)(error)),
    }
}

/// Makes sure that a file is there that only we can read. One that is there is left as it is, but
/// for its mode.
///
/// # Errors
/// [`FileError::Io`].
pub fn create_private(path: &Path) -> Result<(), FileError> {
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(DISK_MODE)
        .open(path)
        .map_err(cannot("created", path))?;
    file.set_permissions(Permissions::from_mode(DISK_MODE))
        .map_err(cannot("protected", path))
}

/// Copies a file: holes stay holes, and a file system that can share blocks does. The copy is there
/// with all its bytes or not at all. The original must be a regular file under its own name: where
/// QEMU's user can put a link in its place, a copy must not give it another file's content.
///
/// # Errors
/// [`FileError`].
pub fn copy_file_durable(
    from: &Path,
    to: &Path,
    mode: u32,
    cancel: &Cancel,
    done: BytesDone<'_>,
) -> Result<(), FileError> {
    let source = open_plain(from)?;
    replace_durable(to, mode, |file, part| {
        copy_contents(&source, file, part, cancel, done)
    })
}

/// Opens a regular file to read, and neither follows a link nor waits for a pipe.
fn open_plain(path: &Path) -> Result<File, FileError> {
    let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(flags.bits())
        .open(path)
        .map_err(cannot("opened", path))?;
    if file.metadata().map_err(cannot("read", path))?.is_file() {
        return Ok(file);
    }
    Err(cannot("copied", path)(std::io::Error::new(
        ErrorKind::InvalidInput,
        "it is not a regular file",
    )))
}

/// Has `fill` write a file beside `path`, and puts it in its place when that succeeded: it is there with
/// all its bytes or as it was before, whatever happens.
pub(super) fn replace_durable(
    path: &Path,
    mode: u32,
    fill: impl FnOnce(&mut File, &Path) -> Result<(), FileError>,
) -> Result<(), FileError> {
    let part = part_of(path);
    let mut file = create_part(&part)?;
    let made = fill(&mut file, &part).and_then(|()| finish_part(&file, &part, path, mode));
    if made.is_err() {
        // The first error is the one to tell; a part left here is replaced by the next try.
        let _ = fs::remove_file(&part);
    }
    made
}

/// The name under which a file is written before it is complete. Derived, not chosen at random: what
/// a crash left is overwritten by the next try. One agent owns the folder.
pub(super) fn part_of(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".part");
    PathBuf::from(name)
}

/// Creates a part anew, for reading and writing by us only.
pub(super) fn create_part(part: &Path) -> Result<File, FileError> {
    remove_if_exists(part)?;
    OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(DISK_MODE)
        .open(part)
        .map_err(cannot("created", part))
}

/// Syncs a complete part and renames it to what it is.
pub(super) fn finish_part(
    file: &File,
    part: &Path,
    path: &Path,
    mode: u32,
) -> Result<(), FileError> {
    file.set_permissions(Permissions::from_mode(mode))
        .map_err(cannot("given its mode", part))?;
    file.sync_all().map_err(cannot("synced", part))?;
    fs::rename(part, path).map_err(cannot("put in place", path))?;
    sync_parent(path)
}

/// Brings a folder's entry for a file to the disk.
fn sync_parent(path: &Path) -> Result<(), FileError> {
    let Some(folder) = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty())
    else {
        return Ok(());
    };
    File::open(folder)
        .and_then(|folder| folder.sync_all())
        .map_err(cannot("synced", folder))
}

/// Copies what `from` holds into the empty file `to`, from its beginning, holes left out.
pub(super) fn copy_contents(
    from: &File,
    to: &File,
    path: &Path,
    cancel: &Cancel,
    done: BytesDone<'_>,
) -> Result<(), FileError> {
    let failed = || cannot("copied", path);
    let (mut from, mut to) = (from, to);
    let metadata = from.metadata().map_err(failed())?;
    let (size, needed) = (metadata.len(), metadata.blocks().saturating_mul(512));
    to.set_len(size).map_err(failed())?;
    let mut offset = 0;
    while let Some((start, end)) = next_data(from, offset, size).map_err(failed())? {
        from.seek(SeekFrom::Start(start)).map_err(failed())?;
        to.seek(SeekFrom::Start(start)).map_err(failed())?;
        offset = start;
        while offset < end {
            if cancel.is_cancelled() {
                return Err(FileError::Cancelled {
                    path: path.to_owned(),
                });
            }
            // The standard library uses copy_file_range here, which shares blocks where it can.
            let length = COPY_CHUNK.min(end - offset);
            let copied = std::io::copy(&mut Read::take(from, length), &mut to)
                .map_err(unwritten(path, needed))?;
            if copied == 0 {
                // The source became shorter than it was.
                return Err(failed()(ErrorKind::UnexpectedEof.into()));
            }
            offset += copied;
            done(offset);
        }
    }
    done(size);
    Ok(())
}

/// The next stretch of `file` at or after `offset` that is not a hole; `None` at the end.
fn next_data(file: &File, offset: u64, size: u64) -> std::io::Result<Option<(u64, u64)>> {
    if offset >= size {
        return Ok(None);
    }
    let seek = |offset: u64, whence| {
        let offset = i64::try_from(offset).map_err(|_| Errno::EOVERFLOW)?;
        let found = lseek(file, offset, whence)?;
        u64::try_from(found).map_err(|_| Errno::EOVERFLOW)
    };
    match seek(offset, Whence::SeekData) {
        Ok(start) => {
            let end = seek(start, Whence::SeekHole)?.min(size);
            Ok((start < end).then_some((start, end)))
        }
        Err(Errno::ENXIO) => Ok(None),
        // A file system that knows no holes: all of it is data.
        Err(Errno::EINVAL) => Ok(Some((offset, size))),
        Err(error) => Err(error.into()),
    }
}

/// The bytes that we may still write to the file system that holds `path`.
///
/// # Errors
/// [`FileError::Io`].
pub fn free_space(path: &Path) -> Result<u64, FileError> {
    let stat = nix::sys::statvfs::statvfs(path)
        .map_err(|errno| cannot("measured for free space", path)(errno.into()))?;
    Ok(stat.blocks_available().saturating_mul(stat.fragment_size()))
}

/// The SHA-256 of a file, in lower-case hexadecimal digits.
///
/// # Errors
/// [`FileError`].
pub fn sha256_file(path: &Path, cancel: &Cancel, done: BytesDone<'_>) -> Result<String, FileError> {
    let file = File::open(path).map_err(cannot("opened", path))?;
    sha256_contents(&file, path, cancel, done)
}

/// The same of an open file, from its beginning.
pub(super) fn sha256_contents(
    mut file: &File,
    path: &Path,
    cancel: &Cancel,
    done: BytesDone<'_>,
) -> Result<String, FileError> {
    let failed = || cannot("read", path);
    file.seek(SeekFrom::Start(0)).map_err(failed())?;
    let mut digest = Sha256::new();
    let mut chunk = vec![0; CHUNK];
    let mut total = 0u64;
    loop {
        if cancel.is_cancelled() {
            return Err(FileError::Cancelled {
                path: path.to_owned(),
            });
        }
        let count = match file.read(&mut chunk) {
            Ok(0) => break,
            Ok(count) => count,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) => return Err(failed()(error)),
        };
        digest.update(chunk.get(..count).unwrap_or_default());
        total = total.saturating_add(count as u64);
        done(total);
    }
    Ok(hex(&digest.finalize()))
}

/// Lower-case hexadecimal digits.
pub(super) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a String does not fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

    use std::io::Write as _;
    use std::os::unix::fs::{FileExt as _, MetadataExt as _};

    use tokio::sync::watch;

    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().mode() & 0o7777
    }

    #[test]
    fn a_written_file_replaces_the_old_one_and_leaves_no_part() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        fs::write(part_of(&path), "left by a crash").unwrap();
        fs::write(&path, "old").unwrap();
        let old = File::open(&path).unwrap();
        replace_durable(&path, DISK_MODE, |file, part| {
            file.write_all(b"new").map_err(cannot("written", part))
        })
        .unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(std::io::read_to_string(old).unwrap(), "old");
        assert_eq!(mode(&path), 0o600);
        assert!(!part_of(&path).exists());
    }

    #[test]
    fn a_file_that_cannot_be_written_leaves_the_old_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        fs::write(&path, "old").unwrap();
        let result = replace_durable(&path, DISK_MODE, |file, part| {
            file.write_all(b"half").unwrap();
            Err(cannot("written", part)(ErrorKind::StorageFull.into()))
        });
        assert!(result.unwrap_err().is_full());
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert!(!part_of(&path).exists());
    }

    #[test]
    fn folders_get_their_mode_whatever_they_had() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b");
        ensure_dir(&path, DIR_MODE).unwrap();
        assert_eq!(mode(&path), 0o711);
        fs::set_permissions(&path, Permissions::from_mode(0o777)).unwrap();
        ensure_dir(&path, DIR_MODE).unwrap();
        assert_eq!(mode(&path), 0o711);
        fs::write(dir.path().join("file"), "").unwrap();
        assert!(ensure_dir(&dir.path().join("file"), DIR_MODE).is_err());
    }

    #[test]
    fn removing_what_is_not_there_is_success() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        fs::write(&path, "").unwrap();
        assert!(remove_if_exists(&path).unwrap());
        assert!(!remove_if_exists(&path).unwrap());
        assert!(remove_if_exists(dir.path()).is_err());
    }

    #[test]
    fn copies_have_the_same_bytes_and_the_same_holes() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        let source = File::create(&from).unwrap();
        source.set_len(64 << 20).unwrap();
        source.write_all_at(b"begin", 0).unwrap();
        source.write_all_at(&[7; 300_000], 20 << 20).unwrap();
        source.write_all_at(b"end", (64 << 20) - 3).unwrap();
        let mut seen = Vec::new();
        let never = Cancel::never();
        copy_file_durable(&from, &to, IMAGE_MODE, &never, &mut |done| seen.push(done)).unwrap();
        assert_eq!(fs::read(&from).unwrap(), fs::read(&to).unwrap());
        assert_eq!(mode(&to), 0o444);
        assert!(fs::metadata(&to).unwrap().blocks() * 512 < 2 << 20);
        assert!(
            seen.is_sorted() && seen.last() == Some(&(64 << 20)),
            "{seen:?}"
        );

        // A file that is one hole, and one that is nothing.
        for size in [0, 1 << 20] {
            source.set_len(0).unwrap();
            source.set_len(size).unwrap();
            copy_file_durable(&from, &to, DISK_MODE, &never, &mut |_| {}).unwrap();
            assert_eq!(fs::metadata(&to).unwrap().len(), size);
        }
    }

    #[test]
    fn cancelled_copies_and_sums_stop_and_leave_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        fs::write(&from, "x").unwrap();
        let (_stop, signal) = watch::channel(true);
        let cancel = Cancel::from(signal);
        let copied = copy_file_durable(&from, &to, DISK_MODE, &cancel, &mut |_| {});
        assert!(matches!(copied, Err(FileError::Cancelled { .. })));
        assert!(!to.exists() && !part_of(&to).exists());
        let summed = sha256_file(&from, &cancel, &mut |_| {});
        assert!(matches!(summed, Err(FileError::Cancelled { .. })));
    }

    #[test]
    fn sums_are_sha256_in_hexadecimal() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        // The vector of FIPS 180 for "abc".
        fs::write(&path, "abc").unwrap();
        let mut total = 0;
        let sum = sha256_file(&path, &Cancel::never(), &mut |done| total = done).unwrap();
        assert_eq!(
            sum,
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
        assert_eq!(total, 3);
    }

    #[test]
    fn an_error_of_a_full_file_system_says_what_was_needed_and_what_there_was() {
        let dir = tempfile::tempdir().unwrap();
        let part = dir.path().join("disk.part");
        fs::write(&part, [1; 4096]).unwrap();
        let full = unwritten(&part, 12_345)(Errno::ENOSPC.into());
        assert!(full.is_full());
        let FileError::Full { needed, free, .. } = &full else {
            panic!("{full:?}");
        };
        assert_eq!(*needed, 12_345);
        assert!(*free >= 4096, "what was written of it counts as free");
        let text = full.to_string();
        let parts = [part.to_str().unwrap(), "12345 bytes", &free.to_string()];
        assert!(parts.iter().all(|part| text.contains(part)), "{text}");

        let other = unwritten(&part, 1)(Errno::EIO.into());
        assert!(!other.is_full() && matches!(other, FileError::Io { .. }));
    }

    #[test]
    fn free_space_is_that_of_the_file_system_of_the_path() {
        assert!(free_space(Path::new("/")).unwrap() > 0);
        assert_eq!(free_space(Path::new("/proc")).unwrap(), 0);
        assert!(free_space(Path::new("/absent")).is_err());
    }

    #[test]
    fn only_a_regular_file_under_its_own_name_is_copied() {
        let dir = tempfile::tempdir().unwrap();
        let (secret, link) = (dir.path().join("secret"), dir.path().join("link"));
        fs::write(&secret, "secret").unwrap();
        std::os::unix::fs::symlink(&secret, &link).unwrap();
        let pipe = dir.path().join("pipe");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRUSR).unwrap();
        let to = dir.path().join("copy");
        for from in [&link, &pipe, &dir.path().to_owned()] {
            let copied = copy_file_durable(from, &to, DISK_MODE, &Cancel::never(), &mut |_| {});
            assert!(copied.is_err(), "{}", from.display());
            assert!(!to.exists());
        }
    }
}
