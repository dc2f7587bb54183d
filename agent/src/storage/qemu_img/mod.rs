// SPDX-License-Identifier: Apache-2.0
//! qemu-img, told everything and left to guess nothing.
//!
//! Formats are always stated (`-f`, `-F`, `-O`): a guest writes what it likes into a raw disk, and a
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

use serde::Deserialize;

use super::apart;
use super::files::DISK_MODE;
use super::inspect::Format;
use super::overlay;
use crate::cancel::Cancel;
use process::{Kind, failed};

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
    /// The file that should be created is there already.
    #[error("{} exists already", path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// A path that QEMU could misread.
    #[error("{} cannot be given to qemu-img: {rule}", path.display())]
    Path {
        /// The path.
        path: PathBuf,
        /// The rule that it breaks.
        rule: &'static str,
    },
    /// The report could not be understood.
    #[error("qemu-img {command} reported something that cannot be read as its JSON")]
    Report {
        /// The command.
        command: &'static str,
        /// Where it breaks off.
        #[source]
        source: serde_json::Error,
    },
    /// A file could not be made or removed before, or synced after.
    #[error("{} could not be {action}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What should have been done: "made", "removed", "renamed", "synced".
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
    /// CPU time of a command that only reads, in seconds.
    pub cpu_seconds_reading: u64,
    /// CPU time of a command that writes a disk, in seconds.
    pub cpu_seconds_writing: u64,
    /// The largest file that may be written, in bytes. Commands that only read may write none.
    pub file_size: u64,
    /// Open files.
    pub open_files: u64,
}

/// 2 GiB and 30 s are what Nova gives qemu-img; writing 2 TiB takes at most hours, not days.
impl Default for Limits {
    fn default() -> Self {
        Self {
            address_space: 2 << 30,
            cpu_seconds_reading: 30,
            // As long as a step that writes a disk may take.
            cpu_seconds_writing: 6 * 3600,
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
    /// Told the percentage done, 0 to 100, of commands that report it (convert, commit).
    pub progress: Option<&'a (dyn Fn(u8) + Send + Sync)>,
}

impl Job<'_> {
    /// A job that cannot be cancelled and reports nothing.
    #[must_use]
    pub fn within(deadline: Duration) -> Self {
        Self {
            deadline,
            cancel: Cancel::never(),
            progress: None,
        }
    }
}

/// A disk file and what it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Disk<'a> {
    /// Its absolute path.
    pub path: &'a Path,
    /// Its format, as recorded by us.
    pub format: Format,
}

/// What to do when a file that should be created is there already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IfExists {
    /// Fail with [`QemuImgError::Exists`].
    Fail,
    /// Remove it first: whoever has the old one open keeps that, unchanged.
    Replace,
}

/// What `qemu-img info` says of one file of a chain.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Info {
    /// The format that it was opened as.
    pub format: String,
    /// The size of the disk in bytes.
    #[serde(rename = "virtual-size")]
    pub virtual_size: u64,
    /// Bytes allocated on the host.
    #[serde(rename = "actual-size", default)]
    pub actual_size: u64,
    /// The backing file as the header names it.
    #[serde(rename = "backing-filename")]
    pub backing_path: Option<PathBuf>,
    /// The format of the backing file as the header names it.
    #[serde(rename = "backing-filename-format")]
    pub backing_format: Option<String>,
}

/// What `qemu-img check` found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
pub struct CheckReport {
    /// Errors that mean lost data.
    #[serde(default)]
    pub corruptions: u64,
    /// Clusters that are allocated but not used: space, not data.
    #[serde(default)]
    pub leaks: u64,
    /// Errors of the check itself.
    #[serde(rename = "check-errors", default)]
    pub check_errors: u64,
}

impl CheckReport {
    /// Is all data there?
    #[must_use]
    pub fn is_sound(&self) -> bool {
        self.corruptions == 0 && self.check_errors == 0
    }
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
    /// Creates an empty disk of `size` bytes; a raw one is sparse.
    ///
    /// # Errors
    /// [`QemuImgError`]; nothing is left behind then.
    pub async fn create_empty(
        &self,
        job: &Job<'_>,
        disk: Disk<'_>,
        size: u64,
        if_exists: IfExists,
    ) -> Result<(), QemuImgError> {
        let arguments = words(&["-q", "-f", disk.format.driver()]);
        self.create(job, arguments, disk.path, Some(size), if_exists)
            .await
    }

    async fn create(
        &self,
        job: &Job<'_>,
        mut arguments: Vec<OsString>,
        path: &Path,
        size: Option<u64>,
        if_exists: IfExists,
    ) -> Result<(), QemuImgError> {
        arguments.push(name(path)?);
        arguments.extend(size.map(|size| OsString::from(size.to_string())));
        make_room(path, if_exists).await?;
        let made = self.run_ok(job, Kind::Writes, "create", arguments).await;
        written(path, made).await
    }

    /// Copies a disk into another format, its whole backing chain included; holes stay holes.
    ///
    /// # Errors
    /// [`QemuImgError`]; no half-written target is left behind.
    pub async fn convert(
        &self,
        job: &Job<'_>,
        from: Disk<'_>,
        to: Disk<'_>,
        if_exists: IfExists,
    ) -> Result<(), QemuImgError> {
        // qemu-img's default cache mode here is "unsafe", which ignores flushes.
        let mut arguments = words(&["-p", "-t", "writeback", "-f", from.format.driver()]);
        arguments.extend(words(&["-O", to.format.driver()]));
        arguments.push(name(from.path)?);
        arguments.push(name(to.path)?);
        make_room(to.path, if_exists).await?;
        let made = self.run_ok(job, Kind::Writes, "convert", arguments).await;
        written(to.path, made).await
    }

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
        roomy.run_ok(job, Kind::Writes, "commit", arguments).await?;
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

    /// Checks a qcow2 file's metadata. Repairs nothing. The disk must not be in use.
    ///
    /// # Errors
    /// [`QemuImgError`] if the check could not be made; what it found is in the report.
    pub async fn check(&self, job: &Job<'_>, path: &Path) -> Result<CheckReport, QemuImgError> {
        const COMMAND: &str = "check";
        let mut arguments = words(&["--output=json", "-f", "qcow2"]);
        arguments.push(name(path)?);
        let finished = self.run(job, Kind::Reads, COMMAND, arguments).await?;
        // 2: corruptions, 3: leaks; both with a report. Everything else is no answer.
        if !matches!(finished.status.code(), Some(0 | 2 | 3)) {
            return Err(failed(COMMAND, &finished));
        }
        serde_json::from_slice(&finished.stdout).map_err(|source| QemuImgError::Report {
            command: COMMAND,
            source,
        })
    }

    /// Makes a disk larger. Making it smaller is refused by qemu-img. The disk must not be in use.
    ///
    /// # Errors
    /// [`QemuImgError`].
    pub async fn resize(
        &self,
        job: &Job<'_>,
        disk: Disk<'_>,
        size: u64,
    ) -> Result<(), QemuImgError> {
        let mut arguments = words(&["-q", "-f", disk.format.driver()]);
        arguments.push(name(disk.path)?);
        arguments.push(OsString::from(size.to_string()));
        self.run_ok(job, Kind::Writes, "resize", arguments).await?;
        sync(disk.path).await
    }

    /// What a disk is and what it stands on. Reads its own header only, not the backing file's; the
    /// disk may be in use (sizes are then those of the moment).
    ///
    /// # Errors
    /// [`QemuImgError`].
    pub async fn info(&self, job: &Job<'_>, disk: Disk<'_>) -> Result<Info, QemuImgError> {
        const COMMAND: &str = "info";
        let mut arguments = words(&["-U", "--output=json", "-f", disk.format.driver()]);
        arguments.push(name(disk.path)?);
        let finished = self.run_ok(job, Kind::Reads, COMMAND, arguments).await?;
        serde_json::from_slice(&finished.stdout).map_err(|source| QemuImgError::Report {
            command: COMMAND,
            source,
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

/// Makes an empty file of our own for qemu-img to fill. It would make one that everybody can read,
/// and keeps the mode of one that is there.
async fn make_room(path: &Path, if_exists: IfExists) -> Result<(), QemuImgError> {
    match (tokio::fs::symlink_metadata(path).await, if_exists) {
        (Ok(_), IfExists::Fail) => {
            return Err(QemuImgError::Exists {
                path: path.to_owned(),
            });
        }
        (Ok(_), IfExists::Replace) => remove(path).await?,
        (Err(_), _) => {}
    }
    let made = tokio::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(DISK_MODE)
        .open(path)
        .await;
    made.map(drop).map_err(|source| QemuImgError::File {
        path: path.to_owned(),
        action: "made",
        source,
    })
}

async fn remove(path: &Path) -> Result<(), QemuImgError> {
    match tokio::fs::remove_file(path).await {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => Err(QemuImgError::File {
            path: path.to_owned(),
            action: "removed",
            source,
        }),
        _ => Ok(()),
    }
}

/// Syncs what was made, or removes what was half made.
async fn written<T>(path: &Path, made: Result<T, QemuImgError>) -> Result<(), QemuImgError> {
    match made {
        Ok(_) => sync(path).await,
        Err(error) => {
            // The first error is the one to tell.
            let _ = remove(path).await;
            Err(error)
        }
    }
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
