// SPDX-License-Identifier: Apache-2.0
//! Imports of images: what is to be imported, and the way from bytes to a record.
//!
//! The file comes first and the record last, so whatever has a record is complete and safe. An import
//! that ends early leaves nothing: what was written goes with its writer.

use std::{
    collections::{BTreeMap, HashSet},
    path::{Path, PathBuf},
    time::Duration,
};

use salvor_proto::v1::ImageSpec;
use sha2::{Digest as _, Sha256};
use tokio::{sync::watch, time::timeout};
use uuid::Uuid;

use super::{
    Api,
    convert::states::Wire as _,
    validate::{self, Checked},
    wish::hash_of,
};
use crate::{
    cancel::Cancel,
    core::{
        errors::chain,
        image::{ImageFormat, ImageRecord, Understood},
        reason::{Reason, Refusal},
        text,
    },
    dispatch::refused,
    engine::now_ms,
    storage::{
        apart,
        files::{self, FileError},
        images::{ImportError, ImportWriter, Imported},
        inspect::Unsafe,
    },
    store::{ImageAnswer, Request},
};

/// Ids of images that are made from request ids, so that a repeated import means the same one.
const IMAGE_IDS: Uuid = Uuid::from_u128(0x1c47_5a0e_62f3_4b9d_8e51_0b7d_93a6_f2c8);

/// A repeated call waits so long for the first one to end, which its caller may have left.
const FIRST_CALL: Duration = Duration::from_secs(60);

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
    /// The call.
    request: Request,
}

impl Wanted {
    /// `path` is that of the file that is to be read, or nothing.
    pub(super) fn read(
        mut spec: ImageSpec,
        path: &str,
        request_id: &str,
        caller: String,
    ) -> Checked<Self> {
        let request_id = validate::request_id(request_id)?;
        let properties = std::mem::take(&mut spec.properties);
        let request = Request {
            body_hash: hash_of(&format!("import {path}"), &spec, &[&properties]),
            id: request_id,
            caller,
            ..Request::default()
        };
        validate::name("spec.name", &spec.name)?;
        let id = match (validate::optional_uuid("spec.id", &spec.id)?, &request.id) {
            (Some(id), _) => id,
            (None, Some(request_id)) => Uuid::new_v5(&IMAGE_IDS, request_id.as_bytes()),
            (None, None) => Uuid::new_v4(),
        };
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
        let properties = validate::properties("spec.properties", properties)?;
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
            request,
        })
    }

    /// Has the content the sum that was named?
    fn check_sum(&self, found: &str) -> Checked<()> {
        match &self.sha256 {
            Some(wanted) if wanted != found => Err(Refusal::new(
                Reason::ImageChecksum,
                format!("the content has the SHA-256 {found}, not {wanted}; fetch it again"),
            )
            .about("spec.sha256", wanted)),
            _ => Ok(()),
        }
    }

    /// Are these all the bytes that were announced?
    fn check_size(&self, found: u64) -> Checked<()> {
        match self.size {
            Some(wanted) if wanted != found => Err(Refusal::new(
                Reason::ImageChecksum,
                format!("{found} bytes came instead of {wanted}; send it again"),
            )
            .about("spec.size_bytes", wanted.to_string())),
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
        let id = self.id;
        self.api.importing.0.send_modify(|ids| {
            ids.remove(&id);
        });
    }
}

/// What is to become of the bytes.
enum There {
    /// Nothing has the id: they become an image.
    Nothing,
    /// This image has it, and may be the same.
    Image(Box<ImageRecord>),
    /// This image was the answer to the same call.
    Answer(Box<ImageRecord>),
}

/// Where the bytes of an upload go.
enum Sink {
    /// To a new image.
    Image(Box<ImportWriter>),
    /// Nowhere: the image is there, and only its sum is compared.
    Compare(Sha256, Box<ImageRecord>),
    /// Nowhere: the call was answered before with this image, and only its sum is compared.
    Repeat(Sha256, Box<ImageRecord>),
}

/// An import of bytes that a client sends.
pub(super) struct Upload {
    claim: Claim,
    wanted: Wanted,
    sink: Sink,
}

/// Whose work it is to read and to write files of the image store.
const STORE: &str = "images";

/// Does work on files that blocks.
async fn blocking<T: Send + 'static>(
    whose: &str,
    work: impl FnOnce() -> Checked<T> + Send + 'static,
) -> Checked<T> {
    apart::run(whose, work)
        .await
        .unwrap_or_else(|error| Err(Refusal::new(Reason::Internal, chain(&error))))
}

impl Upload {
    pub(super) async fn begin(api: &Api, wanted: Wanted) -> Checked<Self> {
        let (claim, there) = api.claim(&wanted).await?;
        let sink = match there {
            There::Answer(record) => Sink::Repeat(Sha256::new(), record),
            There::Image(record) => Sink::Compare(Sha256::new(), record),
            There::Nothing => {
                let (images, id, size) = (api.images.clone(), wanted.id, wanted.size);
                let begin = move || images.begin_import(id, size).map_err(upload_refused);
                Sink::Image(Box::new(blocking(STORE, begin).await?))
            }
        };
        Ok(Self {
            claim,
            wanted,
            sink,
        })
    }

    pub(super) async fn write(self, chunk: Vec<u8>) -> Checked<Self> {
        blocking(STORE, move || {
            let mut upload = self;
            match &mut upload.sink {
                Sink::Image(writer) => writer.write(&chunk).map_err(upload_refused)?,
                Sink::Compare(sum, _) | Sink::Repeat(sum, _) => sum.update(&chunk),
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
                Sink::Compare(sum, there) => {
                    let there = wanted.same(*there, &format!("{:x}", sum.finalize()))?;
                    claim.keep_answer(wanted, there).await
                }
                Sink::Repeat(sum, answer) => {
                    if answer.sha256 == format!("{:x}", sum.finalize()) {
                        Ok(*answer)
                    } else {
                        Err(Refusal::new(
                            Reason::RequestIdReused,
                            "the request id was used before with other content; use a new one",
                        ))
                    }
                }
                Sink::Image(writer) => {
                    let declared = wanted.format;
                    let imported = blocking(STORE, move || {
                        writer.finish(declared).map_err(upload_refused)
                    })
                    .await?;
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
                let request = wanted.request.clone();
                let record = wanted.record(imported);
                let added = self.api.store.add_image(record.clone(), request).await;
                added.map(|()| record).map_err(refused)
            }
            Err(refusal) => Err(refusal),
        };
        if kept.is_err() {
            self.api.remove_file(id).await;
        }
        kept
    }

    /// Records that a call imported what was there already.
    async fn keep_answer(&self, wanted: Wanted, there: ImageRecord) -> Checked<ImageRecord> {
        let store = &self.api.store;
        store
            .imported_again(there.clone(), wanted.request, now_ms())
            .await
            .map_err(refused)?;
        Ok(there)
    }
}

impl Api {
    /// Takes the id for one import, and says what there is of it already.
    async fn claim(&self, wanted: &Wanted) -> Checked<(Claim, There)> {
        if *self.draining.borrow() {
            return Err(Refusal::new(
                Reason::Draining,
                "the agent is stopping and imports no images; retry when it is back",
            ));
        }
        let (id, request) = (wanted.id, &wanted.request);
        let claim = self.hold(id, request).await?;
        let answered = self.store.repeated_on_image(request.clone()).await;
        match answered.map_err(refused)? {
            Some(ImageAnswer::Imported(image)) => return Ok((claim, There::Answer(image))),
            // The hash tells imports from deletions.
            Some(ImageAnswer::Deleted) | None => {}
        }
        let there = self.store.image(id).await.map_err(refused)?;
        Ok((
            claim,
            match there {
                Some(image) => There::Image(Box::new(image)),
                None => {
                    // What an agent left that died between the file and its record is nobody's.
                    self.remove_file(id).await;
                    // Nor is what this one leaves if it dies there.
                    self.store.note_image_file(id).await.map_err(refused)?;
                    There::Nothing
                }
            },
        ))
    }

    /// Keeps an id from being imported or deleted by somebody else meanwhile. A call that can be
    /// repeated may be the repetition of one that has not ended, and waits for it.
    pub(super) async fn hold(&self, id: Uuid, request: &Request) -> Checked<Claim> {
        let hold = async {
            while !self.importing.take(id) {
                self.importing.freed(id).await;
            }
        };
        let held = match request.id {
            Some(_) => timeout(FIRST_CALL, hold).await.is_ok(),
            None => self.importing.take(id),
        };
        if held {
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
        let removed = apart::run(STORE, move || images.remove(id)).await;
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
        (whose, path): (String, PathBuf),
        cancel: Cancel,
        progress: impl Fn(u64) + Send + 'static,
    ) -> Checked<ImageRecord> {
        let (claim, there) = self.claim(&wanted).await?;
        let images = self.images.clone();
        let work = async move {
            match there {
                There::Answer(image) => return Ok(*image),
                There::Image(there) => {
                    let sum = blocking(&whose, move || {
                        files::sha256_file(&path, &cancel, &mut |bytes| progress(bytes))
                            .map_err(file_refused)
                    });
                    let there = wanted.same(*there, &sum.await?)?;
                    return claim.keep_answer(wanted, there).await;
                }
                There::Nothing => {}
            }
            let (id, declared) = (wanted.id, wanted.format);
            let imported = blocking(&whose, move || {
                images
                    .import_from_path(id, &path, declared, &cancel, &mut |bytes| progress(bytes))
                    .map_err(path_refused)
            });
            claim.keep(wanted, imported.await?).await
        };
        detached(work).await
    }
}

/// Whose work it is to read a file of this path: that of the import folder that it is in by its name, for
/// each may lie on a file server of its own.
pub(super) fn reader(path: &str, folders: &[PathBuf]) -> String {
    let folder = folders
        .iter()
        .find(|folder| Path::new(path).starts_with(folder));
    format!(
        "import {}",
        folder.map_or("elsewhere".into(), |folder| folder.display().to_string())
    )
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

/// `field` of the request is what brings the content.
fn import_refused(error: ImportError, field: &str) -> Refusal {
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
    let refusal = Refusal::new(reason, chain(&error));
    match reason {
        Reason::ImageUnsafe | Reason::ImageTooLarge => refusal.about(field, ""),
        _ => refusal,
    }
}

/// The refusal of content that a client sends.
fn upload_refused(error: ImportError) -> Refusal {
    import_refused(error, "chunk")
}

/// The refusal of a file of this host.
fn path_refused(error: ImportError) -> Refusal {
    import_refused(error, "path")
}

/// The ids of the imports and deletions under way.
#[derive(Debug, Default)]
pub(super) struct Importing(watch::Sender<HashSet<Uuid>>);

impl Importing {
    /// Takes an id; false if it is taken.
    fn take(&self, id: Uuid) -> bool {
        self.0.send_if_modified(|ids| ids.insert(id))
    }

    /// Waits until an id is free.
    async fn freed(&self, id: Uuid) {
        // The sender lives as long as `self`.
        let _ = self.0.subscribe().wait_for(|ids| !ids.contains(&id)).await;
    }
}

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
