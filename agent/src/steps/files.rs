// SPDX-License-Identifier: Apache-2.0
//! Steps on files of a server: folders, copies, config drives.
//!
//! Everything that is removed lies under the folder of servers: a path that does not is refused, so
//! that no plan, however it came to be, can remove anything else.

use std::path::{Component, Path, PathBuf};

use tokio::sync::watch;

use super::{Applied, Steps, work::FileJob};
use crate::{
    cancel::Cancel,
    core::{errors::chain, plan::ConfigDriveSpec, reason::Reason},
    engine::{StepContext, StepError},
    storage::{
        config_drive,
        files::{self, DIR_MODE, DISK_MODE, FileError},
    },
};

impl Steps {
    pub(super) async fn make_folder(&self, job: FileJob, path: &str) -> Applied {
        let path = self.own(path)?;
        let make = move || files::ensure_dir(&path, DIR_MODE).map_err(StepError::from);
        self.files.run(job, make).await?;
        Ok(None)
    }

    pub(super) async fn copy_file(
        &self,
        context: &StepContext<'_>,
        job: FileJob,
        from: &str,
        to: &str,
    ) -> Applied {
        let (from, to) = (PathBuf::from(from), self.own(to)?);
        let (not_wanted, cancel) = NotWanted::new();
        let copy = self.files.run(job, move || {
            files::copy_file_durable(&from, &to, DISK_MODE, &cancel, &mut |_| {})
                .map_err(StepError::from)
        });
        not_wanted.unless_cancelled(context, copy).await?;
        Ok(None)
    }

    pub(super) async fn build_config_drive(
        &self,
        job: FileJob,
        path: &str,
        drive: &ConfigDriveSpec,
    ) -> Applied {
        let (path, drive) = (self.own(path)?, drive.clone());
        let build = move || {
            config_drive::build(&path, &drive)
                .map_err(|error| StepError::new(storage_reason(&error), chain(&error)))
        };
        self.files.run(job, build).await?;
        Ok(None)
    }

    pub(super) async fn remove_file(&self, job: FileJob, path: &str) -> Result<(), StepError> {
        let path = self.own(path)?;
        let remove = move || {
            files::remove_if_exists(&path)
                .map(|_| ())
                .map_err(StepError::from)
        };
        self.files.run(job, remove).await
    }

    /// Removes a folder, and those above it that are empty then, up to the folder of servers.
    pub(super) async fn remove_folder(&self, job: FileJob, path: &str) -> Applied {
        let (path, servers) = (self.own(path)?, PathBuf::from(self.layout.servers()));
        let remove = move || remove_tree(&path, &servers);
        self.files.run(job, remove).await?;
        Ok(None)
    }

    /// A path that is the agent's to make and to remove.
    pub(super) fn own(&self, path: &str) -> Result<PathBuf, StepError> {
        let servers = PathBuf::from(self.layout.servers());
        let path = PathBuf::from(path);
        let plain = path
            .components()
            .all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
        if plain && path.starts_with(&servers) && path != servers {
            return Ok(path);
        }
        Err(StepError::new(
            Reason::Internal,
            format!(
                "{} is not under {}, so the agent leaves it alone",
                path.display(),
                servers.display()
            ),
        ))
    }
}

/// Removes `path` and the folders above it that are empty then, below `top`.
pub(super) fn remove_tree(path: &Path, top: &Path) -> Result<(), StepError> {
    let failed = |path: &Path, error: &std::io::Error| {
        StepError::new(
            Reason::StorageFailed,
            format!("{} cannot be removed: {error}", path.display()),
        )
    };
    match std::fs::remove_dir_all(path) {
        Ok(()) => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(path, &error)),
    }
    for above in path
        .ancestors()
        .skip(1)
        .take_while(|above| *above != top && above.starts_with(top))
    {
        match std::fs::remove_dir(above) {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            // Something else of the server is in it.
            Err(error) if error.kind() == std::io::ErrorKind::DirectoryNotEmpty => break,
            Err(error) => return Err(failed(above, &error)),
        }
    }
    Ok(())
}

/// Ends long work on files when nobody wants it any more: whoever waited for it is gone, or it was
/// cancelled.
pub(super) struct NotWanted(watch::Sender<bool>);

impl NotWanted {
    pub(super) fn new() -> (Self, Cancel) {
        let (sender, receiver) = watch::channel(false);
        (Self(sender), Cancel::from(receiver))
    }

    /// Waits for the work, which ends early if the operation is cancelled.
    pub(super) async fn unless_cancelled<T>(
        self,
        context: &StepContext<'_>,
        work: impl Future<Output = T>,
    ) -> T {
        tokio::pin!(work);
        tokio::select! {
            done = &mut work => return done,
            () = context.cancel.cancelled() => {}
        }
        self.0.send_replace(true);
        work.await
    }
}

impl Drop for NotWanted {
    fn drop(&mut self) {
        self.0.send_replace(true);
    }
}

impl From<FileError> for StepError {
    fn from(error: FileError) -> Self {
        let reason = match &error {
            FileError::Cancelled { .. } => return Self::cancelled(),
            error if error.is_full() => Reason::NoSpace,
            _ => Reason::StorageFailed,
        };
        Self::new(reason, chain(&error))
    }
}

/// Is there an error of a full filesystem below it?
pub(super) fn storage_reason(error: &(dyn std::error::Error + 'static)) -> Reason {
    let mut cause = Some(error);
    while let Some(error) = cause {
        let full = |error: &std::io::Error| {
            matches!(
                error.kind(),
                std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded
            )
        };
        if error.downcast_ref::<std::io::Error>().is_some_and(full) {
            return Reason::NoSpace;
        }
        cause = error.source();
    }
    Reason::StorageFailed
}
