// SPDX-License-Identifier: Apache-2.0
//! Imports of images: what is to be imported, and the way from bytes to a record.
//!
//! The file comes first and the record last, so whatever has a record is complete and safe. An import
//! that ends early leaves nothing: what was written goes with its writer.

use std::{
    collections::{BTreeMap, HashSet},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use salvor_proto::v1::ImageSpec;
use sha2::{Digest as _, Sha256};
use uuid::Uuid;

use super::{
    Api,
    convert::states::Wire as _,
    text,
    validate::{self, Checked},
};
use crate::{
    cancel::Cancel,
    core::{
        errors::chain,
        image::{ImageFormat, ImageRecord, Understood},
        reason::{Reason, Refusal},
    },
    dispatch::refused,
    engine::now_ms,
    storage::{
        files::{self, FileError},
        images::{ImportError, ImportWriter, Imported},
        inspect::Unsafe,
    },
};

/// A checked [`ImageSpec`].
#[derive(Debug, Clone)]
pub(super) struct Wanted {
    pub(super) id: Uuid,
    name: String,
    format: Option<ImageFormat>,
    properties: BTreeMap<String, String>,
    sha256: Option<String>,
    /// So many bytes are to come, if that was said.
    pub(super) size: Option<u64>,
}

impl Wanted {
    pub(super) fn read(spec: ImageSpec) -> Checked<Self> {
        validate::name("spec.name", &spec.name)?;
        let id = validate::optional_uuid("spec.id", &spec.id)?.unwrap_or_else(Uuid::new_v4);
        let sha256 = match spec.sha256.as_str() {
            "" => None,
            sum if sum.len() == 64 && sum.bytes().all(|byte| byte.is_ascii_hexdigit()) => {
                Some(sum.to_ascii_lowercase())
            }
            _ => {
                return Err(Refusal::field(
                    "spec.sha256",
                    "must be 64 hexadecimal digits",
                ));
            }
        };
        let properties = validate::properties("spec.properties", spec.properties)?;
        Understood::read(&properties).map_err(|error| {
            let rule = format!("{}, and is {:?}", error.rule, text::echo(&error.value));
            Refusal::field(format!("spec.properties[{}]", error.name), rule)
        })?;
        Ok(Self {
            id,
            format: ImageFormat::from_wire("spec.format", spec.format)?,
            properties,
            sha256,
            size: spec.size_bytes,
            name: spec.name,
        })
    }

    /// Has the content the sum that was named?
    fn check_sum(&self, found: &str) -> Checked<()> {
        match &self.sha256 {
            Some(wanted) if wanted != found => Err(Refusal::new(
                Reason::ImageChecksum,
                format!("the content has the SHA-256 {found}, not {wanted}; fetch it again"),
            )),
            _ => Ok(()),
        }
    }

    /// Are these all the bytes that were announced?
    fn check_size(&self, found: u64) -> Checked<()> {
        match self.size {
            Some(wanted) if wanted != found => Err(Refusal::new(
                Reason::ImageChecksum,
                format!("{found} bytes came instead of {wanted}; send it again"),
            )),
            _ => Ok(()),
        }
    }

    fn record(self, imported: Imported) -> ImageRecord {
        ImageRecord {
            id: self.id,
            name: self.name,
            format: imported.format,
            size: imported.size,
            virtual_size: imported.virtual_size,
            sha256: imported.sha256,
            file: Some(imported.file),
            properties: self.properties,
            created_at_ms: now_ms(),
        }
    }

    /// The image that is there under the id: a success if it is just the one that is wanted.
    fn same(&self, there: ImageRecord, sha256: &str) -> Checked<ImageRecord> {
        self.check_sum(sha256)?;
        let same = there.sha256 == sha256
            && there.name == self.name
            && there.properties == self.properties
            && self.format.is_none_or(|format| format == there.format);
        if same {
            Ok(there)
        } else {
            Err(exists(self.id))
        }
    }
}

fn exists(id: Uuid) -> Refusal {
    Refusal::new(
        Reason::ImageExists,
        format!("there is another image {id}; import this one under another id, or under none"),
    )
    .about("image", id.to_string())
}

/// Keeps an id to one import or deletion at a time.
pub(super) struct Claim {
    api: Api,
    id: Uuid,
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut importing = self
            .api
            .importing
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        importing.remove(&self.id);
    }
}

/// Where the bytes of an upload go.
enum Sink {
    /// To a new image.
    Image(Box<ImportWriter>),
    /// Nowhere: the image is there, and only its sum is compared.
    Compare(Sha256, Box<ImageRecord>),
}

/// An import of bytes that a client sends.
pub(super) struct Upload {
    claim: Claim,
    wanted: Wanted,
    sink: Sink,
}

/// Runs what blocks on a thread that may.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Checked<T> + Send + 'static,
) -> Checked<T> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|_| {
        Err(Refusal::new(
            Reason::Internal,
            "importing an image panicked",
        ))
    })
}

impl Upload {
    pub(super) async fn begin(api: &Api, wanted: Wanted) -> Checked<Self> {
        let (claim, there) = api.claim(wanted.id).await?;
        let sink = match there {
            Some(record) => Sink::Compare(Sha256::new(), Box::new(record)),
            None => {
                let (images, id, size) = (api.images.clone(), wanted.id, wanted.size);
                let begin = move || images.begin_import(id, size).map_err(import_refused);
                Sink::Image(Box::new(blocking(begin).await?))
            }
        };
        Ok(Self {
            claim,
            wanted,
            sink,
        })
    }

    pub(super) async fn write(self, chunk: Vec<u8>) -> Checked<Self> {
        blocking(move || {
            let mut upload = self;
            match &mut upload.sink {
                Sink::Image(writer) => writer.write(&chunk).map_err(import_refused)?,
                Sink::Compare(sum, _) => sum.update(&chunk),
            }
            Ok(upload)
        })
        .await
    }

    /// Makes the image of what was written. Once this is begun it is carried through, also if the
    /// caller is gone.
    pub(super) async fn finish(self) -> Checked<ImageRecord> {
        let Self {
            claim,
            wanted,
            sink,
        } = self;
        let work = async move {
            match sink {
                Sink::Compare(sum, there) => wanted.same(*there, &format!("{:x}", sum.finalize())),
                Sink::Image(writer) => {
                    let declared = wanted.format;
                    let imported =
                        blocking(move || writer.finish(declared).map_err(import_refused)).await?;
                    claim.keep(wanted, imported).await
                }
            }
        };
        detached(work).await
    }
}

async fn detached<T: Send + 'static>(
    work: impl Future<Output = Checked<T>> + Send + 'static,
) -> Checked<T> {
    tokio::spawn(work).await.unwrap_or_else(|_| {
        Err(Refusal::new(
            Reason::Internal,
            "importing an image panicked",
        ))
    })
}

impl Claim {
    /// Records an image whose file is in place, or removes the file.
    async fn keep(&self, wanted: Wanted, imported: Imported) -> Checked<ImageRecord> {
        let id = wanted.id;
        let complete = wanted
            .check_size(imported.size)
            .and_then(|()| wanted.check_sum(&imported.sha256));
        let kept = match complete {
            Ok(()) => {
                let record = wanted.record(imported);
                let added = self.api.store.add_image(record.clone()).await;
                added.map(|()| record).map_err(refused)
            }
            Err(refusal) => Err(refusal),
        };
        if kept.is_err() {
            self.api.remove_file(id).await;
        }
        kept
    }
}

impl Api {
    /// Takes the id for one import, and says which image has it already.
    async fn claim(&self, id: Uuid) -> Checked<(Claim, Option<ImageRecord>)> {
        if *self.draining.borrow() {
            return Err(Refusal::new(
                Reason::Draining,
                "the agent is stopping and imports no images; retry when it is back",
            ));
        }
        let claim = self.hold(id)?;
        let there = self.store.image(id).await.map_err(refused)?;
        if there.is_none() {
            // What an agent left that died between the file and its record is nobody's.
            self.remove_file(id).await;
            // Nor is what this one leaves if it dies there.
            self.store.note_image_file(id).await.map_err(refused)?;
        }
        Ok((claim, there))
    }

    /// Keeps an id from being imported or deleted by somebody else meanwhile.
    pub(super) fn hold(&self, id: Uuid) -> Checked<Claim> {
        let mut importing = self
            .importing
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if importing.insert(id) {
            return Ok(Claim {
                api: self.clone(),
                id,
            });
        }
        Err(Refusal::new(
            Reason::ImageExists,
            format!("image {id} is being imported or deleted; wait until that has ended"),
        )
        .about("image", id.to_string()))
    }

    pub(super) async fn remove_file(&self, id: Uuid) {
        let images = self.images.clone();
        let removed = tokio::task::spawn_blocking(move || images.remove(id)).await;
        match removed {
            Ok(Ok(())) => {
                if let Err(error) = self.store.forget_image_file(id).await {
                    tracing::warn!(image = %id, error = %chain(&error), "it cannot be noted that the file of an image is gone");
                }
            }
            Ok(Err(error)) => {
                tracing::error!(image = %id, error = %chain(&error), "the file of an image could not be removed; it is tried again at the next start");
            }
            Err(_) => {}
        }
    }

    /// Imports a file of this host, telling `progress` how many bytes are copied.
    pub(super) async fn import_path(
        &self,
        wanted: Wanted,
        path: PathBuf,
        cancel: Cancel,
        progress: impl Fn(u64) + Send + 'static,
    ) -> Checked<ImageRecord> {
        let (claim, there) = self.claim(wanted.id).await?;
        let images = self.images.clone();
        let work = async move {
            if let Some(there) = there {
                let sum = blocking(move || {
                    files::sha256_file(&path, &cancel, &mut |bytes| progress(bytes))
                        .map_err(file_refused)
                });
                return wanted.same(there, &sum.await?);
            }
            let (id, declared) = (wanted.id, wanted.format);
            let imported = blocking(move || {
                images
                    .import_from_path(id, &path, declared, &cancel, &mut |bytes| progress(bytes))
                    .map_err(import_refused)
            });
            claim.keep(wanted, imported.await?).await
        };
        detached(work).await
    }
}

/// The file that `path` names, if it is a regular one under one of `folders`, and its size.
pub(super) fn allowed(path: &str, folders: &[PathBuf]) -> Checked<(PathBuf, u64)> {
    let refuse = |rule: &str| Err(Refusal::field("path", rule));
    if folders.is_empty() {
        return refuse(
            "no import folders are configured: set import_dirs, or send the image instead",
        );
    }
    let given = Path::new(path);
    if path.len() > 4_096 || path.chars().any(char::is_control) || !given.is_absolute() {
        return refuse("must be an absolute path without control characters");
    }
    let outside = "must be a regular file under one of the configured import_dirs";
    let (Some(folder), Some(name)) = (given.parent(), given.file_name()) else {
        return refuse(outside);
    };
    // Only the folder is resolved: what the file itself is, is looked at when it is opened.
    let Ok(folder) = folder.canonicalize() else {
        return refuse(outside);
    };
    let inside = |allowed: &PathBuf| {
        allowed
            .canonicalize()
            .is_ok_and(|allowed| folder.starts_with(allowed))
    };
    let path = folder.join(name);
    match path.symlink_metadata() {
        Ok(metadata) if metadata.is_file() && folders.iter().any(inside) => {
            Ok((path, metadata.len()))
        }
        _ => refuse(outside),
    }
}

fn file_refused(error: FileError) -> Refusal {
    let reason = match &error {
        FileError::Cancelled { .. } => Reason::Cancelled,
        error if error.is_full() => Reason::NoSpace,
        FileError::Io { .. } | FileError::Full { .. } => Reason::StorageFailed,
    };
    Refusal::new(reason, chain(&error))
}

fn import_refused(error: ImportError) -> Refusal {
    let reason = match error {
        ImportError::File(error) => return file_refused(error),
        ImportError::Unsafe(Unsafe::FileTooLarge { .. } | Unsafe::VirtualTooLarge { .. }) => {
            Reason::ImageTooLarge
        }
        ImportError::Unsafe(Unsafe::Unreadable { .. }) => Reason::StorageFailed,
        ImportError::Unsafe(_) | ImportError::Symlink { .. } => Reason::ImageUnsafe,
        ImportError::NoSpace { .. } => Reason::NoSpace,
        ImportError::Exists { .. } | ImportError::Busy { .. } => Reason::ImageExists,
    };
    Refusal::new(reason, chain(&error))
}

/// The ids of the imports and deletions under way.
pub(super) type Importing = Mutex<HashSet<Uuid>>;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn only_files_under_the_import_folders_may_be_imported() {
        let dir = tempfile::tempdir().unwrap();
        let (inside, outside) = (dir.path().join("in"), dir.path().join("out"));
        for folder in [&inside, &outside] {
            std::fs::create_dir_all(folder.join("sub")).unwrap();
            std::fs::write(folder.join("image"), b"abc").unwrap();
        }
        std::os::unix::fs::symlink(outside.join("image"), inside.join("link")).unwrap();
        std::os::unix::fs::symlink(&outside, inside.join("folder")).unwrap();
        let folders = [inside.clone()];
        let check = |path: &Path| allowed(path.to_str().unwrap(), &folders);
        assert_eq!(check(&inside.join("image")).unwrap().1, 3);
        assert!(check(&inside.join("sub/../image")).is_ok());
        for refused in [
            outside.join("image"),
            inside.join("../out/image"),
            inside.join("link"),
            inside.join("folder/image"),
            inside.join("missing"),
            inside.clone(),
            PathBuf::from("image"),
            PathBuf::from("/"),
            PathBuf::from("/etc/shadow"),
            inside.join("a\0b"),
            inside.join("a\nb"),
        ] {
            assert!(check(&refused).is_err(), "{}", refused.display());
        }
        assert!(allowed(inside.join("image").to_str().unwrap(), &[]).is_err());
    }
}
