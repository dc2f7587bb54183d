// SPDX-License-Identifier: Apache-2.0
//! Steps on disks: overlays made and written back.

use std::{path::PathBuf, time::Duration};

use uuid::Uuid;

use super::{
    Applied, Steps,
    files::{blocking, storage_reason},
};
use crate::{
    core::{backing::References, errors::chain, reason::Reason},
    engine::{StepContext, StepError},
    storage::{
        inspect::Format,
        look_at_disk, overlay,
        qemu_img::{Disk, Job, QemuImgError},
        references,
    },
};

/// qemu-img itself gets as long as the step: the engine's deadline ends both.
const NO_SHORTER_DEADLINE: Duration = Duration::from_secs(6 * 3600);

impl Steps {
    pub(super) async fn create_overlay(
        &self,
        server: Uuid,
        path: &str,
        base: Base,
        size: u64,
    ) -> Applied {
        let path = self.own(path)?;
        // What is there already was made by this very plan: nothing has used it yet.
        blocking(server, move || {
            base.check()?;
            overlay::create(&path, &base.path, base.format, size)
                .map_err(|error| StepError::new(storage_reason(&error), chain(&error)))
        })
        .await?;
        Ok(None)
    }

    pub(super) async fn commit_overlay(
        &self,
        context: &StepContext<'_>,
        path: &str,
        base: Base,
    ) -> Applied {
        let server = context.plan.server;
        let path = PathBuf::from(path);
        let (path, base, size) = blocking(server, move || {
            base.check()?;
            let overlay = look_at_disk(&path, Format::Qcow2.driver()).map_err(|error| {
                let message = format!("the overlay {} cannot be read: {error}", path.display());
                StepError::new(Reason::StorageFailed, message)
            })?;
            Ok((path, base, overlay.size))
        })
        .await?;
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
