// SPDX-License-Identifier: Apache-2.0
//! Steps on disks: overlays made and written back, owners kept.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use super::{Applied, Steps, files::storage_reason, work::FileJob};
use crate::{
    core::{backing::References, errors::chain, reason::Reason},
    engine::{StepContext, StepError, StepReport},
    storage::{
        inspect::Format,
        look_at_disk, overlay, owners,
        qemu_img::{Disk, Job, QemuImgError},
        references,
    },
};

/// qemu-img itself gets as long as the step: the engine's deadline ends both.
const NO_SHORTER_DEADLINE: Duration = Duration::from_secs(6 * 3600);

impl Steps {
    pub(super) async fn create_overlay(
        &self,
        job: FileJob,
        path: &str,
        base: Base,
        size: u64,
    ) -> Applied {
        let path = self.own(path)?;
        // What is there already was made by this very plan: nothing has used it yet.
        let create = move || {
            base.check()?;
            overlay::create(&path, &base.path, base.format, size)
                .map_err(|error| StepError::new(storage_reason(&error), chain(&error)))
        };
        self.files.run(job, create).await?;
        Ok(None)
    }

    /// Whatever the disk under it refers to by now: it is not opened for this.
    pub(super) async fn empty_overlay(
        &self,
        job: FileJob,
        path: &str,
        base: &str,
        base_format: &str,
    ) -> Applied {
        let format = format(base_format)?;
        let (path, base) = (self.own(path)?, PathBuf::from(base));
        let create = move || {
            overlay::create(&path, &base, format, overlay_size(&path)?)
                .map_err(|error| StepError::new(storage_reason(&error), chain(&error)))
        };
        self.files.run(job, create).await?;
        Ok(None)
    }

    pub(super) async fn reserve_note(&self, job: FileJob, disks: &[String], note: &str) -> Applied {
        let disks: Vec<PathBuf> = disks.iter().map(PathBuf::from).collect();
        let note = self.own(note)?;
        let reserve = move || owners::reserve(&disks, &note).map_err(StepError::from);
        self.files.run(job, reserve).await?;
        Ok(None)
    }

    pub(super) async fn note_owners(&self, job: FileJob, disks: &[String], note: &str) -> Applied {
        let disks: Vec<PathBuf> = disks.iter().map(PathBuf::from).collect();
        let note = self.own(note)?;
        let write = move || owners::note(&disks, &note).map_err(StepError::from);
        self.files.run(job, write).await?;
        Ok(None)
    }

    /// What cannot be put back is told and does not hold up the server: it runs as before.
    pub(super) async fn put_owners_back(&self, job: FileJob, note: &str) -> Applied {
        let note = self.own(note)?;
        let put_back = move || owners::put_back(&note).map_err(StepError::from);
        let failed = self.files.run(job, put_back).await?;
        if failed.is_empty() {
            return Ok(None);
        }
        let message = format!("disks that keep QEMU's owner: {}", failed.join("; "));
        tracing::warn!("{message}");
        Ok(Some(StepReport {
            message,
            ..StepReport::default()
        }))
    }

    pub(super) async fn commit_overlay(
        &self,
        context: &StepContext<'_>,
        job: FileJob,
        path: &str,
        base: Base,
    ) -> Applied {
        let path = PathBuf::from(path);
        let look = move || {
            base.check()?;
            let size = overlay_size(&path)?;
            Ok((path, base, size))
        };
        let (path, base, size) = self.files.run(job, look).await?;
        let base = Disk {
            path: &base.path,
            format: base.format,
        };
        let job = Job {
            deadline: NO_SHORTER_DEADLINE,
            cancel: context.cancel.clone(),
            progress: Some(context.progress),
        };
        self.qemu_img.commit(&job, &path, base, size).await?;
        Ok(None)
    }
}

/// The size of the disk that an overlay shows, in bytes. It blocks.
fn overlay_size(path: &Path) -> Result<u64, StepError> {
    look_at_disk(path, Format::Qcow2.driver())
        .map(|look| look.size)
        .map_err(|error| {
            let message = format!("the overlay {} cannot be read: {error}", path.display());
            StepError::new(Reason::StorageFailed, message)
        })
}

/// What stands under an overlay, as it was when that was planned.
pub(super) struct Base {
    path: PathBuf,
    format: Format,
    references: References,
}

impl Base {
    pub(super) fn new(
        path: &str,
        format_name: &str,
        references: &References,
    ) -> Result<Self, StepError> {
        Ok(Self {
            path: PathBuf::from(path),
            format: format(format_name)?,
            references: references.clone(),
        })
    }

    /// Does it still refer to the same files? Whatever opens it next follows its header. It blocks.
    fn check(&self) -> Result<(), StepError> {
        let path = self.path.display();
        let now = references(&self.path, self.format).map_err(|error| {
            StepError::new(
                Reason::StorageFailed,
                format!("{path} cannot be looked at: {error}"),
            )
        })?;
        if now == self.references {
            return Ok(());
        }
        let before = &self.references;
        Err(StepError::new(
            Reason::DiskChanged,
            format!(
                "{path} referred to {before} when this was planned and refers to {now} now; nothing followed it: look at it with qemu-img info"
            ),
        ))
    }
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
