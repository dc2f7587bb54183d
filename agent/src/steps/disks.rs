// SPDX-License-Identifier: Apache-2.0
//! Steps on disks: overlays made and written back, owners kept.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use super::{
    Applied, Steps,
    files::{blocking, storage_reason},
};
use crate::{
    core::{errors::chain, reason::Reason},
    engine::{StepContext, StepError, StepReport},
    storage::{
        disk_size,
        inspect::Format,
        overlay, owners,
        qemu_img::{Disk, Job, QemuImgError},
    },
};

/// qemu-img itself gets as long as the step: the engine's deadline ends both.
const NO_SHORTER_DEADLINE: Duration = Duration::from_secs(6 * 3600);

impl Steps {
    pub(super) async fn create_overlay(
        &self,
        path: &str,
        backing: &str,
        backing_format: &str,
        size: u64,
    ) -> Applied {
        let format = format(backing_format)?;
        let (path, backing) = (self.own(path)?, PathBuf::from(backing));
        // What is there already was made by this very plan, and nothing has used it yet, or is to go.
        blocking(move || {
            overlay::create(&path, &backing, format, size)
                .map_err(|error| StepError::new(storage_reason(&error), chain(&error)))
        })
        .await?;
        Ok(None)
    }

    pub(super) async fn empty_overlay(&self, path: &str, base: &str, base_format: &str) -> Applied {
        let size = overlay_size(Path::new(path)).await?;
        self.create_overlay(path, base, base_format, size).await
    }

    pub(super) async fn note_owners(&self, disks: &[String], note: &str) -> Applied {
        let disks: Vec<PathBuf> = disks.iter().map(PathBuf::from).collect();
        let note = self.own(note)?;
        blocking(move || owners::note(&disks, &note).map_err(StepError::from)).await?;
        Ok(None)
    }

    /// What cannot be put back is told and does not hold up the server: it runs as before.
    pub(super) async fn put_owners_back(&self, note: &str) -> Applied {
        let note = self.own(note)?;
        let failed = blocking(move || owners::put_back(&note).map_err(StepError::from)).await?;
        if failed.is_empty() {
            return Ok(None);
        }
        let message = format!("disks that keep QEMU's owner: {}", failed.join("; "));
        tracing::warn!("{message}");
        Ok(Some(StepReport {
            message,
            guest_stop: None,
        }))
    }

    pub(super) async fn commit_overlay(
        &self,
        context: &StepContext<'_>,
        path: &str,
        base: &str,
        base_format: &str,
    ) -> Applied {
        let path = Path::new(path);
        let base = Disk {
            path: Path::new(base),
            format: format(base_format)?,
        };
        let size = overlay_size(path).await?;
        let job = Job {
            deadline: NO_SHORTER_DEADLINE,
            cancel: context.cancel.clone(),
            progress: Some(context.progress),
        };
        self.qemu_img.commit(&job, path, base, size).await?;
        Ok(None)
    }
}

/// The size of the disk that an overlay shows, in bytes.
async fn overlay_size(path: &Path) -> Result<u64, StepError> {
    disk_size(path, Format::Qcow2.name())
        .await
        .map_err(|error| {
            let message = format!("the overlay {} cannot be read: {error}", path.display());
            StepError::new(Reason::StorageFailed, message)
        })
}

fn format(name: &str) -> Result<Format, StepError> {
    match name {
        "raw" => Ok(Format::Raw),
        "qcow2" => Ok(Format::Qcow2),
        other => Err(StepError::new(
            Reason::Internal,
            format!("no disk here has the format {other}"),
        )),
    }
}

impl From<QemuImgError> for StepError {
    fn from(error: QemuImgError) -> Self {
        match &error {
            QemuImgError::Cancelled { .. } => Self::cancelled(),
            QemuImgError::Deadline { .. } => Self::new(Reason::DeadlineExceeded, error.to_string()),
            QemuImgError::Failed { stderr, .. } if stderr.contains("No space left") => {
                Self::new(Reason::NoSpace, error.to_string())
            }
            _ => Self::new(super::files::storage_reason(&error), chain(&error)),
        }
    }
}
