// SPDX-License-Identifier: Apache-2.0
//! Steps on disks: overlays made and written back.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use super::{Applied, Steps, files::storage_reason};
use crate::{
    core::{errors::chain, reason::Reason},
    engine::{StepContext, StepError},
    storage::{
        blocking, disk_size,
        inspect::Format,
        overlay,
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
        // What is there already was made by this very plan: nothing has used it yet.
        blocking(move || {
            overlay::create(&path, &backing, format, size)
                .map_err(|error| StepError::new(storage_reason(&error), chain(&error)))
        })
        .await?;
        Ok(None)
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
        let size = disk_size(path, Format::Qcow2.name())
            .await
            .map_err(|error| {
                let message = format!("the overlay {} cannot be read: {error}", path.display());
                StepError::new(Reason::StorageFailed, message)
            })?;
        let job = Job {
            deadline: NO_SHORTER_DEADLINE,
            cancel: context.cancel.clone(),
            progress: Some(context.progress),
        };
        self.qemu_img.commit(&job, path, base, size).await?;
        Ok(None)
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
