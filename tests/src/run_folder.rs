// SPDX-License-Identifier: Apache-2.0
//! The folder in which a real test keeps everything it makes: `target/test-runs/<test>/`.
//!
//! It goes when the test passes and stays, with all logs, when the test fails.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// The root of the repository.
pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("tests/ lies in the repository")
        .to_owned()
}

/// Cargo's target folder: the one this test binary was built in (`<target>/<profile>/deps/<binary>`).
pub fn target_folder() -> PathBuf {
    profile_folder()
        .parent()
        .expect("a profile folder lies in the target folder")
        .to_owned()
}

/// The folder with the binaries of the profile that this test was built in, `target/debug` as a rule.
pub fn profile_folder() -> PathBuf {
    let binary = std::env::current_exe().expect("the test binary has a path");
    let folder = binary.parent().expect("the test binary lies in a folder");
    if folder.ends_with("deps") || folder.ends_with("examples") {
        folder
            .parent()
            .expect("deps lies in the profile folder")
            .to_owned()
    } else {
        folder.to_owned()
    }
}

/// A test's own folder.
#[derive(Debug)]
pub struct RunFolder {
    path: PathBuf,
    keep: bool,
}

impl RunFolder {
    /// A new, empty folder for the test that calls this, named after the test's thread (which libtest
    /// names after the test).
    pub fn for_this_test() -> Self {
        let thread = std::thread::current();
        Self::named(thread.name().unwrap_or("unnamed"))
    }

    /// A new, empty folder with the given name. What an earlier run left there is removed.
    pub fn named(name: &str) -> Self {
        let name: String = name
            .chars()
            .map(|c| {
                if c.is_ascii_alphanumeric() || "-_".contains(c) {
                    c
                } else {
                    '.'
                }
            })
            .collect();
        Self::new(target_folder().join("test-runs").join(name))
    }

    /// A new, empty folder for the test that calls this, in a place that every user can get to: the
    /// repository may be in root's own folder.
    pub fn for_everybody() -> Self {
        let thread = std::thread::current();
        let name = thread.name().unwrap_or("unnamed").replace("::", ".");
        let folder = Self::new(Path::new("/var/tmp").join(format!("salvor-tests-{name}")));
        fs::set_permissions(&folder.path, fs::Permissions::from_mode(0o711)).unwrap();
        folder
    }

    fn new(path: PathBuf) -> Self {
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).unwrap_or_else(|e| panic!("cannot make {}: {e}", path.display()));
        Self { path, keep: false }
    }

    /// Keeps the folder although the test passes.
    pub fn keep(&mut self) {
        self.keep = true;
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A path in it.
    pub fn join(&self, name: impl AsRef<Path>) -> PathBuf {
        self.path.join(name)
    }
}

impl Drop for RunFolder {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!(
                "everything about this failure is in {}",
                self.path.display()
            );
        } else if !self.keep {
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}
