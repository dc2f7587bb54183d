// SPDX-License-Identifier: Apache-2.0
//! Steps that only the store sees: images held, definitions saved.

use std::path::PathBuf;

use tokio::sync::watch;
use uuid::Uuid;

use super::{
    Applied, Steps,
    files::NotWanted,
    work::{FileJob, FileWork},
};
use crate::{
    core::reason::Reason,
    engine::{StepContext, StepError, StepReport, now_ms},
    storage::{file_identity, files},
    store::StoreError,
};

impl Steps {
    /// Holds an image whose file is what was imported. That is known of a file that was not touched
    /// since; any other one is read.
    pub(super) async fn hold_image(
        &self,
        context: &StepContext<'_>,
        job: FileJob,
        image: Uuid,
        (path, size): (&str, u64),
        holder: &str,
    ) -> Applied {
        self.store.hold_image(image, holder.to_owned()).await?;
        // Looked at after it is held: from here on nobody can remove it.
        let looked = PathBuf::from(path);
        let looked = self.files.run(job.clone(), move || Ok(looked.metadata()));
        let file = match looked.await? {
            Ok(metadata) if metadata.is_file() && metadata.len() == size => {
                file_identity(&metadata)
            }
            Ok(metadata) => {
                return Err(StepError::new(
                    Reason::ImageNotFound,
                    format!(
                        "the file {path} of image {image} has {} bytes instead of {size}; import the image again",
                        metadata.len()
                    ),
                ));
            }
            Err(error) => {
                return Err(StepError::new(
                    Reason::ImageNotFound,
                    format!(
                        "the file {path} of image {image} cannot be read ({error}); import the image again"
                    ),
                ));
            }
        };
        let record = self.store.image(image).await?.ok_or(StoreError::Missing {
            what: "image",
            id: image.to_string(),
        })?;
        if record.file == Some(file) {
            return Ok(None);
        }
        let found = sha256(context, &self.files, job, path, size).await?;
        if found != record.sha256 {
            return Err(StepError::new(
                Reason::ImageDamaged,
                format!(
                    "the file {path} of image {image} is not what was imported any more: its SHA-256 is {found} instead of {}; delete the image and import it again",
                    record.sha256
                ),
            ));
        }
        self.store.note_image_identity(image, file).await?;
        Ok(Some(StepReport {
            message: "the image's file was touched; it has its content still".to_owned(),
            ..StepReport::default()
        }))
    }

    pub(super) async fn release_image(&self, image: Uuid, holder: &str) -> Applied {
        self.store.release_image(image, holder.to_owned()).await?;
        Ok(None)
    }

    pub(super) async fn save_definition(&self, server: Uuid, plan: Uuid, xml: &str) -> Applied {
        self.store
            .save_definition(server, plan, xml.to_owned())
            .await?;
        Ok(None)
    }

    pub(super) async fn drop_definition_of(
        &self,
        server: Uuid,
        plan: Uuid,
    ) -> Result<(), StepError> {
        Ok(self.store.drop_definition(server, Some(plan)).await?)
    }

    pub(super) async fn drop_saved_definition(&self, server: Uuid) -> Applied {
        self.store.drop_definition(server, None).await?;
        Ok(None)
    }

    pub(super) async fn know_definition(&self, server: Uuid, plan: Uuid, xml: &str) -> Applied {
        self.store
            .know_definition(server, plan, xml.to_owned())
            .await?;
        Ok(None)
    }

    pub(super) async fn mark_commit_started(&self, server: Uuid) -> Applied {
        self.store.mark_commit_started(server, now_ms()).await?;
        Ok(None)
    }
}

/// The sum of a file, with progress, until the operation is cancelled.
async fn sha256(
    context: &StepContext<'_>,
    work: &FileWork,
    job: FileJob,
    path: &str,
    size: u64,
) -> Result<String, StepError> {
    let (not_wanted, cancel) = NotWanted::new();
    let (tell, mut told) = watch::channel(0u64);
    let path = PathBuf::from(path);
    let read = work.run(job, move || {
        files::sha256_file(&path, &cancel, &mut |bytes| {
            tell.send_replace(bytes);
        })
        .map_err(StepError::from)
    });
    let tell_on = async {
        while told.changed().await.is_ok() {
            let percent = told.borrow_and_update().saturating_mul(100) / size.max(1);
            (context.progress)(u8::try_from(percent.min(100)).unwrap_or(100));
        }
    };
    let (sum, ()) = not_wanted
        .unless_cancelled(context, async { tokio::join!(read, tell_on) })
        .await;
    sum
}
