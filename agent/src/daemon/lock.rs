// SPDX-License-Identifier: Apache-2.0
//! One agent owns a state folder.
//!
//! The lock is flock(2) on a file in the folder: the kernel lets go of it when its holder ends, however that happens. The
//! pid written into the file is for messages only and decides nothing.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use thiserror::Error;

/// The name of the lock file in the state folder.
const LOCK_FILE: &str = "salvor.lock";

/// The mode of a state folder that the agent makes. QEMU runs as another user and must be able to pass through to the
/// disks of its guest, but nobody needs to list the folder.
const STATE_DIR_MODE: u32 = 0o711;

/// Why the state folder is not ours.
#[derive(Debug, Error)]
pub enum LockError {
    /// The folder does not exist and cannot be made.
    #[error("cannot make the state folder {path:?}")]
    Make {
        /// The folder.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The lock file cannot be opened, locked or written.
    #[error("cannot lock {path:?}")]
    Lock {
        /// The lock file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// Another process owns the folder.
    #[error(
        "the state folder {path:?} belongs to a running agent (pid {holder}); stop that one or set another state_dir"
    )]
    Held {
        /// The folder.
        path: PathBuf,
        /// The pid in the lock file, or "unknown".
        holder: String,
    },
}

/// The ownership of a state folder, until it is dropped.
#[derive(Debug)]
pub struct StateLock {
    _file: Flock<File>,
}

impl StateLock {
    /// Takes the folder, which is made if it does not exist. Never waits.
    ///
    /// # Errors
    /// The folder cannot be made or locked, or another process owns it.
    pub fn take(state_dir: &Path) -> Result<Self, LockError> {
        DirBuilder::new()
            .recursive(true)
            .mode(STATE_DIR_MODE)
            .create(state_dir)
            .map_err(|source| LockError::Make {
                path: state_dir.to_path_buf(),
                source,
            })?;

        let path = state_dir.join(LOCK_FILE);
        let failed = |source| LockError::Lock {
            path: path.clone(),
            source,
        };
        // Truncated only once the lock is ours: until then the content is its holder's.
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(failed)?;
        let mut file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(file) => file,
            Err((other, Errno::EWOULDBLOCK)) => {
                file = other;
                return Err(LockError::Held {
                    path: state_dir.to_path_buf(),
                    holder: holder(&mut file),
                });
            }
            Err((_, errno)) => return Err(failed(errno.into())),
        };
        file.set_len(0).map_err(failed)?;
        writeln!(file, "{}", std::process::id()).map_err(failed)?;
        Ok(Self { _file: file })
    }
}

/// The pid in the file. Its holder may be about to write it, so anything else is "unknown".
fn holder(file: &mut File) -> String {
    let mut text = String::new();
    let read = file.take(32).read_to_string(&mut text);
    match (read, text.trim().parse::<u32>()) {
        (Ok(_), Ok(pid)) => pid.to_string(),
        _ => "unknown".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::fs;
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_state_folder_has_one_owner_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let first = StateLock::take(dir.path()).unwrap();
        let error = StateLock::take(dir.path()).unwrap_err().to_string();
        assert!(
            error.contains(&format!("pid {}", std::process::id())),
            "{error}"
        );
        drop(first);
        StateLock::take(dir.path()).unwrap();
    }

    #[test]
    fn what_a_dead_owner_left_is_no_obstacle() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(LOCK_FILE), "4294967295 and more\n").unwrap();
        let _lock = StateLock::take(dir.path()).unwrap();
        let text = fs::read_to_string(dir.path().join(LOCK_FILE)).unwrap();
        assert_eq!(text, format!("{}\n", std::process::id()));
    }

    #[test]
    fn a_missing_state_folder_is_made_passable_but_not_listable() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("var/lib");
        let _lock = StateLock::take(&state).unwrap();
        let mode = fs::metadata(&state).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode & !0o711, 0, "{mode:o}");
    }

    #[test]
    fn a_file_in_place_of_the_folder_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("file");
        fs::write(&state, "").unwrap();
        assert!(matches!(
            StateLock::take(&state),
            Err(LockError::Make { .. })
        ));
    }
}
