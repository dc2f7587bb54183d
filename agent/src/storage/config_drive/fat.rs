// SPDX-License-Identifier: Apache-2.0
//! Writes files into a new FAT file system, the same bytes for the same files.
//!
//! The crate `fatfs` gives long names even to `.` and `..`. Linux and Windows do not mind, but a
//! checker calls each folder broken, so these entries are put right when everything is written.

use std::io::{Seek as _, SeekFrom, Write as _};

use fatfs::{Date, DateTime, FileSystem, FormatVolumeOptions, FsOptions, Time, TimeProvider};

use super::sparse::Sparse;

/// cloud-init looks for this label, in lower or upper case.
const LABEL: [u8; 11] = *b"config-2   ";

/// Every file is from this moment: the drive says nothing about when it was made.
const DATE: Date = Date {
    year: 2000,
    month: 1,
    day: 1,
};
const MIDNIGHT: Time = Time {
    hour: 0,
    min: 0,
    sec: 0,
    millis: 0,
};

#[derive(Debug)]
struct StoppedClock;

impl TimeProvider for StoppedClock {
    fn get_current_date(&self) -> Date {
        DATE
    }

    fn get_current_date_time(&self) -> DateTime {
        DateTime {
            date: DATE,
            time: MIDNIGHT,
        }
    }
}

/// Makes the file system over the whole of `disk` and writes `files` (path and content, in order).
pub(super) fn write(
    disk: &mut Sparse,
    volume_id: u32,
    files: &[(String, Vec<u8>)],
) -> std::io::Result<()> {
    disk.seek(SeekFrom::Start(0))?;
    let options = FormatVolumeOptions::new()
        .volume_id(volume_id)
        .volume_label(LABEL);
    fatfs::format_volume(&mut *disk, options)?;
    disk.seek(SeekFrom::Start(0))?;
    let options = FsOptions::new().time_provider(&StoppedClock);
    let volume = FileSystem::new(&mut *disk, options)?;
    for (path, content) in files {
        let mut folder = volume.root_dir();
        let mut rest = path.as_str();
        while let Some((name, below)) = rest.split_once('/') {
            // Opens the folder if it is there.
            folder = folder.create_dir(name)?;
            rest = below;
        }
        let mut entry = folder.create_file(rest)?;
        entry.write_all(content)?;
        entry.flush()?;
    }
    volume.unmount()?;
    plain_dots(disk)
}

/// One entry of a FAT folder.
type Entry = [u8; 32];
const ENTRY: u64 = size_of::<Entry>() as u64;
const ATTRIBUTES: usize = 11;
const LONG_NAME: u8 = 0x0f;
const FOLDER: u8 = 0x10;
const DELETED: u8 = 0xe5;
const DOT: &[u8] = b".          ";
const DOT_DOT: &[u8] = b"..         ";

/// Takes the long names from the `.` and `..` of every folder. The file system is our own work of a
/// moment ago: FAT16, and no folder of ours fills its first cluster.
fn plain_dots(disk: &mut Sparse) -> std::io::Result<()> {
    let mut boot = [0; 32];
    disk.read_exact_at(&mut boot, 0)?;
    let u8_at = |at: usize| boot.get(at).copied().map_or(0, u64::from);
    let u16_at = |at: usize| u8_at(at) + (u8_at(at + 1) << 8);
    let (sector, sectors_per_cluster) = (u16_at(11), u8_at(13));
    let root = (u16_at(14) + u8_at(16) * u16_at(22)) * sector;
    let data = root + u16_at(17) * ENTRY;
    let cluster = sectors_per_cluster * sector;

    let mut folders = vec![root];
    while let Some(start) = folders.pop() {
        let end = if start == root { data } else { start + cluster };
        if start != root {
            // Long name of `.`, `.`, long name of `..`, `..`.
            let dot = entry_at(disk, start + ENTRY)?;
            let dot_dot = entry_at(disk, start + 3 * ENTRY)?;
            if dot.starts_with(DOT) && dot_dot.starts_with(DOT_DOT) {
                let mut gone = [0; 32];
                gone[0] = DELETED;
                disk.write_all_at(&[dot, dot_dot, gone, gone].concat(), start)?;
            }
        }
        for offset in (start..end).step_by(size_of::<Entry>()) {
            let entry = entry_at(disk, offset)?;
            if entry[0] == 0 {
                break;
            }
            let is_folder = entry[ATTRIBUTES] & FOLDER != 0 && entry[ATTRIBUTES] != LONG_NAME;
            if is_folder && entry[0] != DELETED && entry[0] != b'.' {
                let first = u64::from(u16::from_le_bytes([entry[26], entry[27]]));
                folders.push(data + first.saturating_sub(2) * cluster);
            }
        }
    }
    Ok(())
}

fn entry_at(disk: &mut Sparse, offset: u64) -> std::io::Result<Entry> {
    let mut entry = [0; 32];
    disk.read_exact_at(&mut entry, offset)?;
    Ok(entry)
}
