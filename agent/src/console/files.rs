// SPDX-License-Identifier: Apache-2.0
//! The files of a console log: opening them as root without being led elsewhere, reading them, and
//! giving back to the filesystem what is no longer kept.
//!
//! Where libvirt has virtlogd write the log, a file that has grown to 2 MiB is renamed to `<log>.0`,
//! that one to `<log>.1`, and so on.
//!
//! Everything here blocks.

use std::{
    fs::{File, OpenOptions},
    io::{self, ErrorKind},
    os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _},
    path::Path,
};

use nix::{
    fcntl::{FallocateFlags, OFlag, fallocate},
    unistd::{Whence, lseek},
};
use uuid::Uuid;

use super::pieces::{Part, Piece};

/// virtlogd can be told to keep more files than this; they are not looked at.
const ROTATED: u32 = 16;

/// Less than this is not worth giving back.
const WORTH: u64 = 1 << 20;

/// In whose name the files are worked on (see `storage::apart`).
pub(super) fn whose(server: Uuid) -> String {
    format!("console log of {server}")
}

/// A log as it is now.
#[derive(Debug, Default)]
pub(super) struct LogFiles {
    files: Vec<File>,
    /// One for each file, oldest first.
    pub(super) parts: Vec<Part>,
}

/// Opens a file of a log. The file is named by a definition, and the guest's QEMU may write to its
/// folder: neither a link nor anything but a regular file is read, and nothing is waited for.
fn open(path: &str, write: bool) -> io::Result<Option<File>> {
    if !Path::new(path).is_absolute() {
        return Err(io::Error::new(
            ErrorKind::InvalidInput,
            format!("{path} is not an absolute path"),
        ));
    }
    let opened = OpenOptions::new()
        .read(true)
        .write(write)
        .custom_flags((OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_NOCTTY).bits())
        .open(path);
    let named = |error: io::Error| io::Error::new(error.kind(), format!("{path}: {error}"));
    let file = match opened {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(named(error)),
    };
    if !file.metadata().map_err(named)?.is_file() {
        return Err(io::Error::new(
            ErrorKind::InvalidInput,
            format!("{path} is not a regular file"),
        ));
    }
    Ok(Some(file))
}

/// Inode number and length of a log's newest file, if there is one.
pub(super) fn standing(path: &str) -> io::Result<Option<(u64, u64)>> {
    let Some(file) = open(path, false)? else {
        return Ok(None);
    };
    let metadata = file.metadata()?;
    Ok(Some((metadata.ino(), metadata.len())))
}

impl LogFiles {
    /// Opens the log at `path` with what virtlogd has rotated. No file at all is an empty log.
    pub(super) fn open(path: &str) -> io::Result<Self> {
        Self::open_for(path, false)
    }

    fn open_for(path: &str, write: bool) -> io::Result<Self> {
        let mut log = Self::default();
        let rotated = (0..ROTATED).map(|number| format!("{path}.{number}"));
        for (number, path) in std::iter::once(path.to_owned()).chain(rotated).enumerate() {
            match open(&path, write)? {
                Some(file) => log.add(file)?,
                None if number == 0 => {}
                None => break,
            }
        }
        log.files.reverse();
        log.parts.reverse();
        Ok(log)
    }

    fn add(&mut self, file: File) -> io::Result<()> {
        let metadata = file.metadata()?;
        let part = Part {
            file: metadata.ino(),
            from: first_data(&file),
            len: metadata.len(),
        };
        // Renamed while we looked: it is here already.
        if !self.parts.iter().any(|known| known.file == part.file) {
            self.files.push(file);
            self.parts.push(part);
        }
        Ok(())
    }

    /// Reads from `offset` of a piece's file: up to `most` bytes, and not beyond the piece. Nothing if
    /// the file has become shorter.
    pub(super) fn read(&self, piece: &Piece, offset: u64, most: usize) -> io::Result<Vec<u8>> {
        let left = usize::try_from(piece.to.saturating_sub(offset)).unwrap_or(usize::MAX);
        let mut bytes = vec![0; left.min(most)];
        let mut have = 0;
        let Some(file) = self.files.get(piece.part) else {
            return Ok(Vec::new());
        };
        while let Some(rest) = bytes.get_mut(have..).filter(|rest| !rest.is_empty()) {
            let at = offset.saturating_add(u64::try_from(have).unwrap_or(u64::MAX));
            match file.read_at(rest, at) {
                Ok(0) => break,
                Ok(read) => have += read,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        bytes.truncate(have);
        Ok(bytes)
    }

    /// Gives back to the filesystem what is before these pieces. The log keeps its length, so that no
    /// place in it moves, and a QEMU that writes to it notices nothing. Returns how many bytes.
    pub(super) fn give_back(&self, kept: &[Piece]) -> io::Result<u64> {
        let mut given = 0;
        for (at, (file, part)) in self.files.iter().zip(&self.parts).enumerate() {
            let first = kept.iter().find(|piece| piece.part >= at);
            let until = match first {
                Some(piece) if piece.part == at => piece.from,
                Some(_) => part.len,
                // Nothing of the log is kept: it has just been begun.
                None => break,
            };
            if until.saturating_sub(part.from) < WORTH {
                continue;
            }
            let length = i64::try_from(until).map_err(io::Error::other)?;
            let how = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            fallocate(file, how, 0, length)?;
            given += until - part.from;
        }
        Ok(given)
    }
}

/// Opens a log of the agent's own to give back what is no longer kept.
pub(super) fn open_to_trim(path: &str) -> io::Result<LogFiles> {
    LogFiles::open_for(path, true)
}

/// Where the first byte is that was not given back.
fn first_data(file: &File) -> u64 {
    // A filesystem that does not know holes has none; an empty file has no data at all.
    let at = lseek(file, 0, Whence::SeekData).unwrap_or(0);
    u64::try_from(at).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing)]

    use std::fs;

    use super::super::{boots::Boots, pieces::pieces};
    use super::*;

    fn text(path: &Path) -> String {
        path.to_str().unwrap().to_owned()
    }

    #[test]
    fn rotated_files_come_before_the_newest() {
        let dir = tempfile::tempdir().unwrap();
        let log = text(&dir.path().join("log"));
        assert!(LogFiles::open(&log).unwrap().parts.is_empty());
        for (name, content) in [
            ("", "newest"),
            (".0", "older "),
            (".1", "oldest "),
            (".3", "x"),
        ] {
            fs::write(format!("{log}{name}"), content).unwrap();
        }
        let files = LogFiles::open(&log).unwrap();
        let cut = pieces(&files.parts, &Boots::default(), u64::MAX);
        let read = cut.iter().map(|p| files.read(p, p.from, 100).unwrap());
        assert_eq!(read.collect::<Vec<_>>().concat(), b"oldest older newest");
        assert_eq!(standing(&log).unwrap().unwrap().1, 6);
    }

    #[test]
    fn nothing_but_a_regular_file_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let secret = dir.path().join("secret");
        fs::write(&secret, "secret").unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&secret, &link).unwrap();
        let pipe = dir.path().join("pipe");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRUSR).unwrap();
        for path in [&link, &pipe, &dir.path().to_owned()] {
            assert!(LogFiles::open(&text(path)).is_err(), "{}", path.display());
            assert!(standing(&text(path)).is_err());
        }
        assert!(LogFiles::open("relative").is_err());
        // Nor is one that stands in a rotated file's place.
        let log = dir.path().join("log");
        fs::write(&log, "x").unwrap();
        std::os::unix::fs::symlink(&secret, dir.path().join("log.0")).unwrap();
        assert!(LogFiles::open(&text(&log)).is_err());
    }

    #[test]
    fn what_is_not_kept_is_given_back_and_no_place_moves() {
        let dir = tempfile::tempdir().unwrap();
        let path = text(&dir.path().join("log"));
        let content: Vec<u8> = (0_u32..8 << 20)
            .map(|n| u8::try_from(n % 251).unwrap() + 1)
            .collect();
        fs::write(&path, &content).unwrap();
        let keep = 1 << 20;
        let kept = |files: &LogFiles| pieces(&files.parts, &Boots::default(), keep);
        let files = open_to_trim(&path).unwrap();
        let given = files.give_back(&kept(&files)).unwrap();
        assert!(given >= 6 << 20, "{given}");
        let blocks = fs::metadata(&path).unwrap().blocks() * 512;
        assert!(blocks < 3 << 20, "{blocks} bytes are still held");
        assert_eq!(fs::metadata(&path).unwrap().len(), 8 << 20);

        let files = open_to_trim(&path).unwrap();
        let all = pieces(&files.parts, &Boots::default(), u64::MAX);
        let read = files.read(&all[0], all[0].from, usize::MAX).unwrap();
        assert!(!read.contains(&0), "holes are not shown");
        assert!(content.ends_with(&read) && read.len() >= 1 << 20);
        assert_eq!(files.give_back(&kept(&files)).unwrap(), 0, "not again");
    }
}
