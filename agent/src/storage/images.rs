// SPDX-License-Identifier: Apache-2.0
//! The files of the local image store.
//!
//! An image arrives in `ID.part`, is hashed and inspected there, and only then becomes `ID.FORMAT`:
//! whatever has that name is complete, safe, on the disk, and never written again. Nothing but our
//! own inspection opens it before. Images are named by uuid, so no name comes from outside.
//!
//! What an image is called, its properties and who uses it are records of the store, not kept here.
//!
//! Everything here blocks: call it from `tokio::task::spawn_blocking`. An upload is a channel whose
//! receiving end a blocking task reads into an [`ImportWriter`].

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use sha2::{Digest as _, Sha256};
use uuid::Uuid;

use super::disks::file_identity;
use super::files::{
    self, BytesDone, DIR_MODE, DISK_MODE, FileError, IMAGE_MODE, cannot, ensure_dir, finish_part,
    remove_if_exists,
};
use super::inspect::{self, Content, Format, Inspection, Limits, Unsafe};
use crate::{cancel::Cancel, core::image::FileIdentity};

/// An upload looks at the free space again after this many bytes.
const SPACE_CHECK: u64 = 64 << 20;
/// The extension of an image that is not complete.
const PART: &str = "part";
const FORMATS: [Format; 3] = [Format::Raw, Format::Qcow2, Format::Iso];

/// Why an image was not imported.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// It is not what we take.
    #[error("the image is refused")]
    Unsafe(#[from] Unsafe),
    /// A file could not be read or written, or the work was cancelled.
    #[error("the image could not be stored")]
    File(#[from] FileError),
    /// The disk is too full.
    #[error(
        "the image store has {free} bytes free; {needed} are needed and {reserve} more stay reserved"
    )]
    NoSpace {
        /// What the image needs, as far as it is known.
        needed: u64,
        /// What is free.
        free: u64,
        /// What must stay free.
        reserve: u64,
    },
    /// The id is taken.
    #[error("image {id} is stored already")]
    Exists {
        /// The image.
        id: Uuid,
    },
    /// The id is being imported.
    #[error("image {id} is being imported already")]
    Busy {
        /// The image.
        id: Uuid,
    },
    /// The path names a symbolic link.
    #[error("{} is a symbolic link: name the file itself", path.display())]
    Symlink {
        /// The path.
        path: PathBuf,
    },
}

/// A stored image, as its record should say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Imported {
    /// Its format.
    pub format: Format,
    /// The size of the disk that a guest sees, in bytes.
    pub virtual_size: u64,
    /// The size of the file, in bytes.
    pub size: u64,
    /// SHA-256 of the file, lower-case hexadecimal.
    pub sha256: String,
    /// Which file it is.
    pub file: FileIdentity,
    /// Where it lies.
    pub path: PathBuf,
    /// What it seems to hold.
    pub content: Content,
}

/// What a sweep of the folder found.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// How many unfinished imports were removed.
    pub parts: usize,
    /// Images without a record.
    pub unknown: Vec<PathBuf>,
}

/// The folder of images.
#[derive(Debug, Clone)]
pub struct ImageFiles {
    dir: PathBuf,
    limits: Limits,
    reserve: u64,
}

impl ImageFiles {
    /// Uses `dir`, which is made if it is missing. Imports leave at least `reserve` bytes free.
    ///
    /// # Errors
    /// [`FileError::Io`].
    pub fn new(dir: PathBuf, limits: Limits, reserve: u64) -> Result<Self, FileError> {
        ensure_dir(&dir, DIR_MODE)?;
        Ok(Self {
            dir,
            limits,
            reserve,
        })
    }

    /// Where an image lies, or would lie.
    #[must_use]
    pub fn path(&self, id: Uuid, format: Format) -> PathBuf {
        self.dir.join(format!("{id}.{format}"))
    }

    fn part(&self, id: Uuid) -> PathBuf {
        self.dir.join(format!("{id}.{PART}"))
    }

    /// Begins to take an image byte by byte. `size` is what the sender announced, if it did.
    ///
    /// # Errors
    /// [`ImportError`]; nothing is left behind then.
    pub fn begin_import(&self, id: Uuid, size: Option<u64>) -> Result<ImportWriter, ImportError> {
        let size = size.unwrap_or(0);
        self.check_size(size)?;
        self.check_space(size)?;
        if FORMATS
            .iter()
            .any(|&format| self.path(id, format).symlink_metadata().is_ok())
        {
            return Err(ImportError::Exists { id });
        }
        let part = self.part(id);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(DISK_MODE)
            .open(&part)
            .map_err(|error| match error.kind() {
                ErrorKind::AlreadyExists => ImportError::Busy { id },
                _ => cannot("created", &part)(error).into(),
            })?;
        Ok(ImportWriter {
            store: self.clone(),
            id,
            part: Part(part),
            file,
            digest: Sha256::new(),
            written: 0,
            check_space_at: SPACE_CHECK,
        })
    }

    /// Takes an image from a file of this host. The file is opened once, and what was opened is what
    /// is looked at and copied, wherever its name points later. Only a regular file is taken, and no
    /// symbolic link in its place.
    ///
    /// # Errors
    /// [`ImportError`]; nothing is left behind then.
    pub fn import_from_path(
        &self,
        id: Uuid,
        path: &Path,
        declared: Option<Format>,
        cancel: &Cancel,
        done: BytesDone<'_>,
    ) -> Result<Imported, ImportError> {
        let source = open_plain(path)?;
        // Looked at now, so that a bad image of 100 GB is refused before it is copied; what counts
        // is the look at the copy, since somebody may be writing to the original.
        inspect_as(&source, declared, &self.limits)?;
        let metadata = source.metadata().map_err(cannot("read", path))?;
        self.check_size(metadata.len())?;
        // Holes stay holes, so that only allocated blocks (of 512 bytes) count.
        self.check_space(metadata.blocks().saturating_mul(512))?;
        let writer = self.begin_import(id, None)?;
        files::copy_contents(&source, &writer.file, &writer.part.0, cancel, done)?;
        let sha256 = files::sha256_contents(&writer.file, &writer.part.0, cancel, &mut |_| {})?;
        writer.place(declared, sha256)
    }

    /// Removes an image. None there is success: it is gone.
    ///
    /// # Errors
    /// [`FileError::Io`].
    pub fn remove(&self, id: Uuid) -> Result<(), FileError> {
        for format in FORMATS {
            remove_if_exists(&self.path(id, format))?;
        }
        Ok(())
    }

    /// Removes what imports left that a crash ended, and tells of images that are none of `known`: a
    /// crash came between the file and its record, or the records were lost. Those are left alone. To be
    /// called before the first import.
    ///
    /// # Errors
    /// [`FileError::Io`].
    pub fn sweep(&self, known: &BTreeSet<Uuid>) -> Result<Swept, FileError> {
        let mut swept = Swept::default();
        for entry in fs::read_dir(&self.dir).map_err(cannot("listed", &self.dir))? {
            let path = entry.map_err(cannot("listed", &self.dir))?.path();
            let stem = path.file_stem().and_then(|stem| stem.to_str());
            // Only names that we make: what an operator put here is not ours to remove.
            let Some(id) = stem.and_then(|stem| Uuid::try_parse(stem).ok()) else {
                continue;
            };
            if path.extension().is_some_and(|extension| extension == PART) {
                remove_if_exists(&path)?;
                swept.parts += 1;
            } else if !known.contains(&id) {
                swept.unknown.push(path);
            }
        }
        Ok(swept)
    }

    fn check_size(&self, size: u64) -> Result<(), ImportError> {
        if size > self.limits.file_size {
            return Err(Unsafe::FileTooLarge {
                size,
                limit: self.limits.file_size,
            }
            .into());
        }
        Ok(())
    }

    fn check_space(&self, needed: u64) -> Result<(), ImportError> {
        let free = files::free_space(&self.dir)?;
        if free < needed.saturating_add(self.reserve) {
            return Err(ImportError::NoSpace {
                needed,
                free,
                reserve: self.reserve,
            });
        }
        Ok(())
    }
}

/// Takes an image byte by byte. Dropped before [`ImportWriter::finish`], it leaves nothing.
#[derive(Debug)]
pub struct ImportWriter {
    store: ImageFiles,
    id: Uuid,
    part: Part,
    file: File,
    digest: Sha256,
    written: u64,
    check_space_at: u64,
}

/// A file that is removed when nobody wants it any more.
#[derive(Debug)]
struct Part(PathBuf);

impl Drop for Part {
    fn drop(&mut self) {
        // After a rename there is nothing to remove; what cannot be removed, the next sweep takes.
        let _ = fs::remove_file(&self.0);
    }
}

impl ImportWriter {
    /// Takes the next bytes.
    ///
    /// # Errors
    /// [`ImportError`] if there are too many or no space is left. The writer is of no use then.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), ImportError> {
        let written = self.written.saturating_add(bytes.len() as u64);
        self.store.check_size(written)?;
        if written >= self.check_space_at {
            self.store.check_space(bytes.len() as u64)?;
            self.check_space_at = written.saturating_add(SPACE_CHECK);
        }
        self.file
            .write_all(bytes)
            .map_err(cannot("written", &self.part.0))?;
        self.digest.update(bytes);
        self.written = written;
        Ok(())
    }

    /// Inspects the image and puts it into the store. `None` as format means: tell it from the
    /// content ([`inspect::detect`]).
    ///
    /// # Errors
    /// [`ImportError`]; nothing is left behind then.
    pub fn finish(self, declared: Option<Format>) -> Result<Imported, ImportError> {
        let sha256 = files::hex(&self.digest.clone().finalize());
        self.place(declared, sha256)
    }

    fn place(self, declared: Option<Format>, sha256: String) -> Result<Imported, ImportError> {
        let inspection = inspect_as(&self.file, declared, &self.store.limits)?;
        let path = self.store.path(self.id, inspection.format);
        finish_part(&self.file, &self.part.0, &path, IMAGE_MODE)?;
        let metadata = self.file.metadata().map_err(cannot("read", &path))?;
        Ok(Imported {
            file: file_identity(&metadata),
            format: inspection.format,
            virtual_size: inspection.virtual_size,
            size: inspection.file_size,
            sha256,
            path,
            content: inspection.content,
        })
    }
}

fn inspect_as(
    file: &File,
    declared: Option<Format>,
    limits: &Limits,
) -> Result<Inspection, Unsafe> {
    let format = match declared {
        Some(format) => format,
        None => inspect::detect(file)?,
    };
    inspect::inspect(file, format, limits)
}

/// Opens a regular file, and neither follows a symbolic link nor waits for a pipe's writer.
fn open_plain(path: &Path) -> Result<File, ImportError> {
    let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(flags.bits())
        .open(path)
        .map_err(|error| match error.raw_os_error().map(Errno::from_raw) {
            Some(Errno::ELOOP) => ImportError::Symlink {
                path: path.to_owned(),
            },
            _ => cannot("opened", path)(error).into(),
        })?;
    let metadata = file.metadata().map_err(cannot("read", path))?;
    if !metadata.is_file() {
        return Err(Unsafe::NotRegular.into());
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

    use std::os::unix::fs::{FileExt as _, MetadataExt as _};
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    const ID: Uuid = Uuid::from_u128(7);

    fn store(dir: &Path) -> ImageFiles {
        ImageFiles::new(dir.join("images"), Limits::default(), 0).unwrap()
    }

    fn files_in(store: &ImageFiles) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(&store.dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    fn boot_sector() -> Vec<u8> {
        let mut bytes = vec![0; 1024];
        bytes[510..512].copy_from_slice(&[0x55, 0xaa]);
        bytes
    }

    /// `printf 'abc'`, in FIPS 180.
    const ABC: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    #[test]
    fn an_upload_becomes_an_image_only_when_it_is_finished() {
        let dir = tempfile::tempdir().unwrap();
        let store = store(dir.path());
        let mut writer = store.begin_import(ID, Some(3)).unwrap();
        writer.write(b"a").unwrap();
        writer.write(b"bc").unwrap();
        assert_eq!(files_in(&store), [format!("{ID}.part")]);
        let image = writer.finish(Some(Format::Raw)).unwrap();
        assert_eq!(image.sha256, ABC);
        assert_eq!((image.size, image.virtual_size), (3, 3));
        assert_eq!(image.path, store.path(ID, Format::Raw));
        assert_eq!(files_in(&store), [format!("{ID}.raw")]);
        let mode = fs::metadata(&image.path).unwrap().mode();
        assert_eq!(mode & 0o7777, 0o444);

        store.remove(ID).unwrap();
        store.remove(ID).unwrap();
        assert!(files_in(&store).is_empty());
    }

    #[test]
    fn an_upload_that_is_given_up_or_refused_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let store = store(dir.path());
        let mut writer = store.begin_import(ID, None).unwrap();
        writer.write(b"abc").unwrap();
        drop(writer);
        assert!(files_in(&store).is_empty());

        let mut writer = store.begin_import(ID, None).unwrap();
        writer.write(b"QFI\xfb").unwrap();
        let refused = writer.finish(Some(Format::Raw)).unwrap_err();
        let ImportError::Unsafe(reason) = refused else {
            panic!("{refused}");
        };
        assert_eq!(reason.name(), "qcow2-in-disguise");
        assert!(files_in(&store).is_empty());

        let refused = store.begin_import(ID, None).unwrap().finish(None);
        assert!(matches!(refused, Err(ImportError::Unsafe(Unsafe::Empty))));
        assert!(files_in(&store).is_empty());
    }

    #[test]
    fn one_id_is_one_image() {
        let dir = tempfile::tempdir().unwrap();
        let store = store(dir.path());
        let mut writer = store.begin_import(ID, None).unwrap();
        assert!(matches!(
            store.begin_import(ID, None),
            Err(ImportError::Busy { .. })
        ));
        writer.write(&boot_sector()).unwrap();
        assert_eq!(writer.finish(None).unwrap().format, Format::Raw);
        assert!(matches!(
            store.begin_import(ID, None),
            Err(ImportError::Exists { .. })
        ));
        assert_eq!(files_in(&store), [format!("{ID}.raw")]);
    }

    #[test]
    fn an_upload_ends_at_the_limit_and_at_the_reserve() {
        let dir = tempfile::tempdir().unwrap();
        let mut store = store(dir.path());
        store.limits.file_size = 2;
        assert!(store.begin_import(ID, Some(3)).is_err());
        let mut writer = store.begin_import(ID, None).unwrap();
        let refused = writer.write(b"abc");
        assert!(matches!(
            refused,
            Err(ImportError::Unsafe(Unsafe::FileTooLarge {
                size: 3,
                limit: 2
            }))
        ));
        drop(writer);

        store.limits = Limits::default();
        let mut writer = store.begin_import(ID, None).unwrap();
        // The disk fills while the upload runs.
        writer.store.reserve = u64::MAX;
        let chunk = vec![0; 1 << 20];
        let refused = (0..=64).find_map(|_| writer.write(&chunk).err()).unwrap();
        assert!(matches!(refused, ImportError::NoSpace { .. }));
        drop(writer);
        store.reserve = u64::MAX;
        assert!(matches!(
            store.begin_import(ID, None),
            Err(ImportError::NoSpace { .. })
        ));
        assert!(files_in(&store).is_empty());
    }

    #[test]
    fn a_file_of_the_host_is_copied_and_keeps_its_holes() {
        let dir = tempfile::tempdir().unwrap();
        let store = store(dir.path());
        let path = dir.path().join("image");
        let source = File::create(&path).unwrap();
        source.write_all_at(&boot_sector(), 0).unwrap();
        source.set_len(64 << 20).unwrap();
        let never = Cancel::never();
        let mut last = 0;
        let image = store
            .import_from_path(ID, &path, None, &never, &mut |done| last = done)
            .unwrap();
        assert_eq!(image.format, Format::Raw);
        assert!(image.content.mbr);
        assert_eq!(last, 64 << 20);
        assert!(fs::metadata(&image.path).unwrap().blocks() * 512 < 1 << 20);
        let sum = files::sha256_file(&path, &never, &mut |_| {}).unwrap();
        assert_eq!(image.sha256, sum);
    }

    #[test]
    fn nothing_but_a_regular_file_is_imported_from_the_host() {
        let dir = tempfile::tempdir().unwrap();
        let store = store(dir.path());
        let import = |path: &Path| {
            store.import_from_path(ID, path, Some(Format::Raw), &Cancel::never(), &mut |_| {})
        };
        let secret = dir.path().join("secret");
        fs::write(&secret, "abc").unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&secret, &link).unwrap();
        assert!(matches!(import(&link), Err(ImportError::Symlink { .. })));

        let pipe = dir.path().join("pipe");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        for path in [pipe.as_path(), dir.path(), Path::new("/dev/zero")] {
            let refused = import(path);
            assert!(
                matches!(refused, Err(ImportError::Unsafe(Unsafe::NotRegular))),
                "{}: {refused:?}",
                path.display()
            );
        }
        assert!(import(&dir.path().join("absent")).is_err());
        assert!(files_in(&store).is_empty());
        assert_eq!(import(&secret).unwrap().sha256, ABC);
    }

    #[test]
    fn a_file_that_turns_bad_while_it_is_copied_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let store = store(dir.path());
        let path = dir.path().join("image");
        fs::write(&path, boot_sector()).unwrap();
        // The change comes with the first report of progress: after the look at the original,
        // before the look at the copy.
        let copied = AtomicBool::new(false);
        let mut change = |_| {
            if !copied.swap(true, Ordering::SeqCst) {
                let part = File::options().write(true).open(store.part(ID)).unwrap();
                part.write_all_at(b"QFI\xfb", 0).unwrap();
            }
        };
        let never = Cancel::never();
        let refused = store.import_from_path(ID, &path, None, &never, &mut change);
        assert!(
            matches!(refused, Err(ImportError::Unsafe(_))),
            "{refused:?}"
        );
        assert!(files_in(&store).is_empty());
    }

    #[test]
    fn sweeping_removes_parts_and_only_tells_of_images_without_a_record() {
        let dir = tempfile::tempdir().unwrap();
        let store = store(dir.path());
        let keep = [
            format!("{ID}.raw"),
            "mine.part".to_owned(),
            "notes".to_owned(),
        ];
        for name in &keep {
            fs::write(store.dir.join(name), "").unwrap();
        }
        fs::write(store.part(Uuid::from_u128(1)), "").unwrap();
        fs::write(store.part(Uuid::from_u128(2)), "").unwrap();
        let swept = store.sweep(&BTreeSet::from([ID])).unwrap();
        assert_eq!((swept.parts, swept.unknown), (2, vec![]));
        assert_eq!(files_in(&store), keep);
        let swept = store.sweep(&BTreeSet::new()).unwrap();
        let unknown = vec![store.path(ID, Format::Raw)];
        assert_eq!((swept.parts, swept.unknown), (0, unknown));
        assert_eq!(files_in(&store), keep);
    }
}
