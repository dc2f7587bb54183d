// SPDX-License-Identifier: Apache-2.0
//! Guest images for the tests: built here from sources in `tests/guests/`, without loop devices or mounts.
//!
//! * [`TinyGuest`]: no operating system at all, boots in well under a second. Enough wherever it matters
//!   *which disk* booted, that the power button is honoured or not, or that a disk was written to.
//! * [`LinuxGuest`]: Debian's kernel, busybox and the QEMU guest agent. For whatever needs a file system,
//!   a config drive, the guest agent or the guest's own view of its devices.
//!
//! What does not differ from guest to guest is made once and kept in `target/guests/<hash of the sources>/`.
//! This module knows nothing of libvirt.

mod initramfs;
mod linux;
mod programs;
mod tiny;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use nix::fcntl::{Flock, FlockArg};
use sha2::{Digest, Sha256};

pub use linux::LinuxGuest;
pub use programs::run;
pub use tiny::{TinyGuest, labelled_disk, mark_of};

use crate::run_folder::{repository, target_folder};
use crate::tool;
use crate::wait::{BOOT, wait_for};

/// The file format of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Format {
    /// QEMU's own.
    Qcow2,
    /// Plain bytes of a disk.
    Raw,
    /// A bootable CD (El Torito). Linux guests only.
    Iso,
}

/// Where the sources of the guests are.
fn sources() -> PathBuf {
    repository().join("tests/guests")
}

/// The parts that all guests share, in `target/guests/<hash>/<name>`: made by `make` if they are not there
/// yet, or if one of `inputs` (files) has changed since. Test processes that want the same wait for one
/// another.
fn cached(name: &str, inputs: &[PathBuf], make: impl FnOnce(&Path)) -> PathBuf {
    let mut hash = Sha256::new();
    for input in inputs {
        let bytes = fs::read(input)
            .unwrap_or_else(|e| panic!("cannot read {}: {e}; run tools/setup", input.display()));
        hash.update(input.file_name().unwrap().as_encoded_bytes());
        hash.update((bytes.len() as u64).to_le_bytes());
        hash.update(&bytes);
    }
    let key = hash
        .finalize()
        .iter()
        .take(6)
        .map(|byte| format!("{byte:02x}"))
        .collect::<String>();
    let guests = target_folder().join("guests");
    let folder = guests.join(format!("{name}-{key}"));
    if folder.is_dir() {
        return folder;
    }
    fs::create_dir_all(&guests).unwrap();
    let lock = File::create(guests.join(format!("{name}.lock"))).unwrap();
    let _held = Flock::lock(lock, FlockArg::LockExclusive)
        .map_err(|(_, e)| e)
        .unwrap();
    if !folder.is_dir() {
        let part = guests.join(format!("{name}-{key}.part"));
        let _ = fs::remove_dir_all(&part);
        fs::create_dir(&part).unwrap();
        make(&part);
        // What older sources made is of no use to anybody any more.
        for entry in fs::read_dir(&guests).unwrap().flatten() {
            let old = entry
                .file_name()
                .to_string_lossy()
                .starts_with(&format!("{name}-"));
            if old && entry.path() != part {
                let _ = fs::remove_dir_all(entry.path());
            }
        }
        fs::rename(&part, &folder).unwrap();
    }
    folder
}

/// Turns a raw image into the format asked for. `raw` is used up.
fn finish(raw: &Path, image: &Path, format: Format) {
    match format {
        Format::Qcow2 => {
            tool!(
                "qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, image
            );
            fs::remove_file(raw).unwrap();
        }
        Format::Raw => fs::rename(raw, image).unwrap(),
        Format::Iso => panic!("this guest has no ISO"),
    }
}

/// How many Linux guests may run at once: each wants a CPU of its own for seconds.
const LINUX_SLOTS: usize = 2;

static LINUX_RUNNING: Mutex<usize> = Mutex::new(0);

/// The right to run one Linux guest, until it is dropped.
#[derive(Debug)]
pub struct LinuxSlot(());

/// Waits until fewer than two Linux guests run in this test process. Take it before the guest starts, and
/// only one at a time, or two tests may wait for each other.
#[track_caller]
pub fn linux_slot() -> LinuxSlot {
    wait_for("a slot for a Linux guest is free", 10 * BOOT, || {
        let mut running = LINUX_RUNNING.lock().unwrap_or_else(PoisonError::into_inner);
        (*running < LINUX_SLOTS).then(|| {
            *running += 1;
            LinuxSlot(())
        })
    })
}

impl Drop for LinuxSlot {
    fn drop(&mut self) {
        *LINUX_RUNNING.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
    }
}
