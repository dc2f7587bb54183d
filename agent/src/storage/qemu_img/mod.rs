// SPDX-License-Identifier: Apache-2.0
//! qemu-img, told everything and left to guess nothing.
//!
//! Formats are always stated: a guest writes what it likes into a raw disk, and a
//! tool that guesses would believe it (CVE-2014-0134, CVE-2026-24708). Every run has a deadline, can
//! be cancelled, and happens under resource limits in a process group of its own
//! (CVE-2015-5162: an image that makes qemu-img eat the host).
//!
//! **Names.** QEMU reads `nbd:…`, `json:…` and `http://…` as protocols, but only where no slash comes
//! before the colon. All paths here are absolute, so they begin with a slash: they are file names to
//! QEMU whatever follows, and never options. Nothing is passed inside a comma-separated `-o` list.
//!
//! **Durability.** What a command wrote is synced, with its folder, before it counts as done.
//!
//! This module does not know what a disk is for, and where disks lie.

mod process;
#[cfg(test)]
mod tests;

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::Duration;

use super::apart;
use super::inspect::Format;
use super::overlay;
use crate::cancel::Cancel;

/// What went wrong with qemu-img.
#[derive(Debug, thiserror::Error)]
pub enum QemuImgError {
    /// It could not be started or waited for.
    #[error("{} cannot be run under setpriv and prlimit: are qemu-utils and util-linux installed?", program.display())]
    Spawn {
        /// The program.
        program: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It ended in an error or by a signal (SIGXCPU, SIGXFSZ and SIGKILL mean a limit was met).
    #[error("qemu-img {command} failed ({status}): {stderr}")]
    Failed {
        /// The command.
        command: &'static str,
        /// How it ended.
        status: ExitStatus,
        /// The last lines of what it said.
        stderr: String,
    },
    /// It did not end in time and was killed.
    #[error("qemu-img {command} did not end within {after:?} and was killed")]
    Deadline {
        /// The command.
        command: &'static str,
        /// The time it had.
        after: Duration,
    },
    /// It was no longer wanted and was killed. What it was writing is incomplete.
    #[error("qemu-img {command} was cancelled")]
    Cancelled {
        /// The command.
        command: &'static str,
    },
    /// A path that QEMU could misread.
    #[error("{} cannot be given to qemu-img: {rule}", path.display())]
    Path {
        /// The path.
        path: PathBuf,
        /// The rule that it breaks.
        rule: &'static str,
    },
    /// A file could not be synced or emptied after.
    #[error("{} could not be {action}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What should have been done: "synced", "emptied".
        action: &'static str,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// What one qemu-img may use up at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Address space in bytes.
    pub address_space: u64,
    /// CPU time in seconds.
    pub cpu_seconds: u64,
    /// The largest file that may be written, in bytes.
    pub file_size: u64,
    /// Open files.
    pub open_files: u64,
}

/// 2 GiB of memory are what Nova gives qemu-img; writing 2 TiB takes at most hours, not days.
impl Default for Limits {
    fn default() -> Self {
        Self {
            address_space: 2 << 30,
            // As long as a step that writes a disk may take.
            cpu_seconds: 6 * 3600,
            // The largest disk that is taken, and as much again in metadata as any layout needs.
            file_size: (2 << 40) + (64 << 30),
            open_files: 256,
        }
    }
}

/// How one command is run.
#[derive(Clone)]
pub struct Job<'a> {
    /// It is killed after this time.
    pub deadline: Duration,
    /// It is killed when this says so.
    pub cancel: Cancel,
    /// Told the percentage done, 0 to 100.
    pub progress: Option<&'a (dyn Fn(u8) + Send + Sync)>,
}

/// A disk file and what it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Disk<'a> {
    /// Its absolute path.
    pub path: &'a Path,
    /// Its format, as recorded by us.
    pub format: Format,
}

/// The program and its limits.
#[derive(Debug, Clone)]
pub struct QemuImg {
    /// The program, a name to be searched in PATH or a path.
    pub program: PathBuf,
    /// What each run may use up.
    pub limits: Limits,
}

impl Default for QemuImg {
    fn default() -> Self {
        Self {
            program: PathBuf::from("qemu-img"),
            limits: Limits::default(),
        }
    }
}

impl QemuImg {
    /// Writes what an overlay of `size` bytes changed into its base. Until the base is synced the
    /// overlay stays as it is (`-d`), so that doing it again, after a crash in the middle, ends in the
    /// same base. Then an empty overlay takes its place: whatever runs on the base from now on, a
    /// commit that is repeated later cannot write old blocks over newer ones.
    ///
    /// # Errors
    /// [`QemuImgError`]; the base may then hold part of the changes.
    pub async fn commit(
        &self,
        job: &Job<'_>,
        overlay: &Path,
        base: Disk<'_>,
        size: u64,
    ) -> Result<(), QemuImgError> {
        let mut arguments = words(&["-p", "-t", "writeback", "-d", "-f", "qcow2", "-b"]);
        arguments.push(name(base.path)?);
        arguments.push(name(overlay)?);
        let roomy = Self {
            program: self.program.clone(),
            limits: Limits {
                // A disk of somebody else's may be larger than those that are made here, and stopping
                // half-way is worse than writing all of it. qcow2 adds less than a 64th for its tables.
                file_size: self.limits.file_size.max(size.saturating_add(size / 64)),
                ..self.limits
            },
        };
        roomy.run(job, "commit", arguments).await?;
        sync(base.path).await?;
        let (path, backing) = (overlay.to_owned(), base.path.to_owned());
        let format = base.format;
        let whose = overlay.display().to_string();
        let emptied = apart::run(&whose, move || {
            overlay::create(&path, &backing, format, size)
        });
        let failed = match emptied.await {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(error)) => std::io::Error::other(error),
            Err(error) => std::io::Error::other(error),
        };
        Err(QemuImgError::File {
            path: overlay.to_owned(),
            action: "emptied",
            source: failed,
        })
    }
}

fn words(words: &[&str]) -> Vec<OsString> {
    words.iter().map(OsString::from).collect()
}

/// A path as an argument that QEMU takes for a file name and nothing else.
fn name(path: &Path) -> Result<OsString, QemuImgError> {
    let refuse = |rule| {
        Err(QemuImgError::Path {
            path: path.to_owned(),
            rule,
        })
    };
    if !path.is_absolute() {
        return refuse("it must be absolute");
    }
    if path.as_os_str().as_bytes().contains(&0) {
        return refuse("it must not contain a NUL byte");
    }
    Ok(path.as_os_str().to_owned())
}

/// Brings a file and its folder's entry for it to the disk.
async fn sync(path: &Path) -> Result<(), QemuImgError> {
    let (file, whose) = (path.to_owned(), path.display().to_string());
    let synced = apart::run(&whose, move || {
        std::fs::File::open(&file)?.sync_all()?;
        match file.parent() {
            Some(folder) => std::fs::File::open(folder)?.sync_all(),
            None => Ok(()),
        }
    });
    let synced = synced
        .await
        .unwrap_or_else(|error| Err(std::io::Error::other(error)));
    synced.map_err(|source| QemuImgError::File {
        path: path.to_owned(),
        action: "synced",
        source,
    })
}
