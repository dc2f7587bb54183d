// SPDX-License-Identifier: Apache-2.0
//! The guest without an operating system; `tests/guests/tiny.S` says what it prints and obeys.

use std::fs;
use std::path::Path;

use super::{Format, cached, finish, sources};
use crate::tool;

const SECTOR: usize = 512;
const IDENTITY: usize = 4 * SECTOR;
const NAME: usize = IDENTITY + 32;
const FLAGS: usize = IDENTITY + 64;
const MARK: usize = 5 * SECTOR;
const TEXT: usize = 32;

/// What a tiny guest's disk holds.
#[derive(Debug, Clone)]
pub struct TinyGuest {
    /// The name that it prints in `TINY-UP` and `TINY-READY`. Up to 31 bytes.
    pub name: String,
    /// The label of its disk, which every tiny guest that sees the disk prints. Up to 31 bytes.
    pub label: String,
    /// Does it power off when the button is pressed? If not, it prints `TINY-POWERBUTTON` and stays.
    pub honours_acpi: bool,
    /// Does it mark the first other disk as soon as it is up, as a rescue system would?
    pub fixes: bool,
    /// Size of the disk in MiB.
    pub size_mib: u64,
}

impl TinyGuest {
    /// A well-behaved guest with an 8 MiB disk, labelled `disk-NAME`.
    pub fn new(name: &str) -> Self {
        Self {
            name: name.into(),
            label: format!("disk-{name}"),
            honours_acpi: true,
            fixes: false,
            size_mib: 8,
        }
    }

    /// A guest that ignores the power button.
    #[must_use]
    pub fn deaf(mut self) -> Self {
        self.honours_acpi = false;
        self
    }

    /// A guest that marks the first other disk at boot.
    #[must_use]
    pub fn fixing(mut self) -> Self {
        self.fixes = true;
        self
    }

    /// Writes the disk image.
    #[track_caller]
    pub fn build(&self, image: &Path, format: Format) {
        let code = cached("tiny", &[sources().join("tiny.S")], |folder| {
            let object = folder.join("tiny.o");
            tool!("as", "--32", "-o", object, sources().join("tiny.S"));
            let origin = ["-Ttext", "0x7c00", "--oformat", "binary"];
            let code = folder.join("tiny.bin");
            tool!(
                "ld", "-m", "elf_i386", origin[0], origin[1], origin[2], origin[3], "-o", code,
                object
            );
        });
        let mut bytes = fs::read(code.join("tiny.bin")).unwrap();
        bytes.resize(MARK + SECTOR, 0);
        put_text(&mut bytes, IDENTITY, &self.label);
        put_text(&mut bytes, NAME, &self.name);
        bytes[FLAGS] = u8::from(self.honours_acpi) | u8::from(self.fixes) << 1;
        disk_of(&bytes, self.size_mib, image, format);
    }
}

/// An image that no BIOS boots but that tiny guests show with a label: a data disk.
#[track_caller]
pub fn labelled_disk(label: &str, size_mib: u64, image: &Path, format: Format) {
    let mut bytes = vec![0; MARK + SECTOR];
    put_text(&mut bytes, IDENTITY, label);
    disk_of(&bytes, size_mib, image, format);
}

/// A disk that begins with `bytes`.
#[track_caller]
fn disk_of(bytes: &[u8], size_mib: u64, image: &Path, format: Format) {
    let raw = image.with_extension("raw.part");
    fs::write(&raw, bytes).unwrap();
    fs::File::options()
        .write(true)
        .open(&raw)
        .unwrap()
        .set_len(size_mib << 20)
        .unwrap();
    finish(&raw, image, format);
}

/// The mark that a tiny guest left on a disk (`by-NAME`), empty if none did. For raw images; turn a qcow2
/// into one first.
pub fn mark_of(raw: &Path) -> String {
    let bytes = fs::read(raw).unwrap();
    let mark = &bytes[MARK..MARK + TEXT];
    String::from_utf8_lossy(mark.split(|byte| *byte == 0).next().unwrap_or_default()).into_owned()
}

#[track_caller]
fn put_text(bytes: &mut [u8], at: usize, text: &str) {
    assert!(
        text.len() < TEXT,
        "'{text}' is longer than {} bytes",
        TEXT - 1
    );
    assert!(
        text.bytes().all(|byte| byte.is_ascii_graphic()),
        "'{text}' holds more than graphic ASCII"
    );
    bytes[at..at + text.len()].copy_from_slice(text.as_bytes());
}
