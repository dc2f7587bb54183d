// SPDX-License-Identifier: Apache-2.0
//! To whom disks belong, noted and put back.
//!
//! libvirt gives the files of a guest to the user that QEMU runs as, and back when the guest is off.
//! Back it gives only what the guest could write to: what it holds for shared, read-only disks and
//! files below an overlay, stays QEMU's. A disk that was protected in a rescue would belong to somebody
//! else for good, and be open to whoever breaks out of any QEMU. So its owner is noted while no guest
//! has it, and put back when the rescue is over.
//!
//! A note is durable and written once. It holds which file it speaks of, not just its path: whoever
//! can put another file there must not have the agent give that one away.
//!
//! Everything here blocks. It knows nothing of rescues.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use nix::fcntl::{AtFlags, OFlag};
use nix::unistd::{Gid, Uid, fchownat};
use serde::{Deserialize, Serialize};

use super::files::{DISK_MODE, FileError, cannot, create_part, finish_part, part_of, unwritten};

/// To whom a file belonged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Owned {
    path: PathBuf,
    /// Number and time of birth: together the same for no two files of a file system, and unlike the
    /// number of the file system itself the same after a reboot.
    inode: u64,
    born: Option<Duration>,
    uid: u32,
    gid: u32,
}

impl Owned {
    fn of(path: &Path, file: &File) -> std::io::Result<Self> {
        let metadata = file.metadata()?;
        let born = metadata.created().ok();
        Ok(Self {
            path: path.to_owned(),
            inode: metadata.ino(),
            born: born.and_then(|born| born.duration_since(UNIX_EPOCH).ok()),
            uid: metadata.uid(),
            gid: metadata.gid(),
        })
    }
}

/// Makes room for the note of so many files, so that writing it, while a guest is off, needs none.
///
/// # Errors
/// [`FileError`].
pub fn reserve(files: &[PathBuf], note: &Path) -> Result<(), FileError> {
    let paths: usize = files.iter().map(|path| path.as_os_str().len()).sum();
    // Twice: JSON escapes quotes and backslashes. And what is noted besides, with its names.
    let room = paths * 2 + files.len() * 256 + 16;
    let part = part_of(note);
    create_part(&part)?
        .write_all(&vec![b' '; room])
        .map_err(unwritten(&part, room as u64))
}

/// Notes at `note` to whom these files belong. What is noted there already stays; a file that is not
/// there is left out.
///
/// # Errors
/// [`FileError`].
pub fn note(files: &[PathBuf], note: &Path) -> Result<(), FileError> {
    if note.try_exists().map_err(cannot("looked for", note))? {
        return Ok(());
    }
    let mut owners = Vec::new();
    for path in files {
        match look(path).and_then(|file| Owned::of(path, &file)) {
            Ok(owned) => owners.push(owned),
            // Nobody starts a guest from it; that is said when it is tried.
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(cannot("looked at", path)(error)),
        }
    }
    let text =
        serde_json::to_vec(&owners).map_err(|error| cannot("written", note)(error.into()))?;
    let part = part_of(note);
    let reserved = OpenOptions::new().read(true).write(true).open(&part);
    let file = match reserved {
        Err(error) if error.kind() == ErrorKind::NotFound => create_part(&part)?,
        file => file.map_err(cannot("opened", &part))?,
    };
    // What was reserved beyond it is blank, which JSON does not mind.
    file.write_all_at(&text, 0)
        .map_err(cannot("written", &part))?;
    finish_part(&file, &part, note, DISK_MODE)
}

/// Puts back what is noted at `note`, if there is a note, and says of which files it could not, and
/// why.
///
/// # Errors
/// [`FileError`] if the note cannot be read.
pub fn put_back(note: &Path) -> Result<Vec<String>, FileError> {
    let text = match fs::read(note) {
        Ok(text) => text,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(cannot("read", note)(error)),
    };
    let owners: Vec<Owned> =
        serde_json::from_slice(&text).map_err(|error| cannot("read", note)(error.into()))?;
    let failed = owners.iter().filter_map(|owned| {
        let error = give_back(owned).err()?;
        let Owned { path, uid, gid, .. } = owned;
        Some(format!("{} (of {uid}:{gid}): {error}", path.display()))
    });
    Ok(failed.collect())
}

fn give_back(owned: &Owned) -> std::io::Result<()> {
    let file = match look(&owned.path) {
        // Nobody can be harmed by it any more.
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        file => file?,
    };
    let now = Owned::of(&owned.path, &file)?;
    if (now.inode, now.born) != (owned.inode, owned.born) {
        return Err(std::io::Error::other("it is another file now"));
    }
    if now == *owned {
        return Ok(());
    }
    let (uid, gid) = (Uid::from_raw(owned.uid), Gid::from_raw(owned.gid));
    Ok(fchownat(
        &file,
        "",
        Some(uid),
        Some(gid),
        AtFlags::AT_EMPTY_PATH,
    )?)
}

/// Holds a file without opening it: a device is not woken, a pipe not waited for.
fn look(path: &Path) -> std::io::Result<File> {
    OpenOptions::new()
        .read(true)
        .custom_flags(OFlag::O_PATH.bits())
        .open(path)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::os::unix::fs::{PermissionsExt as _, chown, symlink};

    use super::*;

    fn owner(path: &Path) -> (u32, u32) {
        let metadata = fs::metadata(path).unwrap();
        (metadata.uid(), metadata.gid())
    }

    /// A folder with a disk of 7:8 and the place of a note. Tests of owners need root, as the agent
    /// does.
    fn scene() -> (tempfile::TempDir, PathBuf, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let (disk, noted) = (dir.path().join("disk"), dir.path().join("owners"));
        fs::write(&disk, "guest").unwrap();
        chown(&disk, Some(7), Some(8)).unwrap();
        (dir, disk, noted)
    }

    #[test]
    fn a_file_goes_back_to_its_owner_as_often_as_it_is_asked_for() {
        let (dir, disk, noted) = scene();
        // The agent follows a link as libvirt does.
        let link = dir.path().join("link");
        symlink(&disk, &link).unwrap();
        note(std::slice::from_ref(&link), &noted).unwrap();
        let mode = fs::metadata(&noted).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, DISK_MODE);
        for _ in 0..2 {
            chown(&disk, Some(9), Some(9)).unwrap();
            // Noted again it is as before.
            note(std::slice::from_ref(&link), &noted).unwrap();
            assert_eq!(put_back(&noted).unwrap(), Vec::<String>::new());
            assert_eq!(owner(&disk), (7, 8));
        }
    }

    #[test]
    fn another_file_in_its_place_is_left_alone_and_told_of() {
        let (dir, disk, noted) = scene();
        note(std::slice::from_ref(&disk), &noted).unwrap();
        let other = dir.path().join("other");
        fs::write(&other, "somebody's").unwrap();
        let before = owner(&other);
        for place in [&|| symlink(&other, &disk).unwrap(), &|| {
            fs::rename(&other, &disk).unwrap()
        }] as [&dyn Fn(); 2]
        {
            fs::remove_file(&disk).unwrap();
            place();
            let failed = put_back(&noted).unwrap();
            assert!(
                matches!(failed.as_slice(), [one] if one.contains("another file")),
                "{failed:?}"
            );
            assert_eq!(owner(&disk), before);
        }
    }

    #[test]
    fn without_a_note_or_a_file_there_is_nothing_to_do() {
        let (_dir, disk, noted) = scene();
        assert_eq!(put_back(&noted).unwrap(), Vec::<String>::new());
        let absent = disk.with_extension("absent");
        note(&[disk.clone(), absent], &noted).unwrap();
        fs::remove_file(&disk).unwrap();
        assert_eq!(put_back(&noted).unwrap(), Vec::<String>::new());
    }
}
