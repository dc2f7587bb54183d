// SPDX-License-Identifier: Apache-2.0
//! A disk in memory that holds only what was written to it.
//!
//! A FAT file system is made by some thousand small reads and writes all over the disk. Here none of
//! them is a system call, and blocks that hold nothing stay holes in the file that is made of it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Error, ErrorKind, Read, Result, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt as _;

const BLOCK: usize = 4096;

/// The disk. As a stream it is read and written at its own place.
#[derive(Debug)]
pub(super) struct Sparse {
    blocks: BTreeMap<u64, Box<[u8; BLOCK]>>,
    size: u64,
    place: u64,
}

impl Sparse {
    /// A disk of `size` bytes, all of them zero.
    pub(super) fn new(size: u64) -> Self {
        Self {
            blocks: BTreeMap::new(),
            size,
            place: 0,
        }
    }

    /// Reads what lies at `offset`.
    pub(super) fn read_exact_at(&mut self, out: &mut [u8], offset: u64) -> Result<()> {
        self.place = offset;
        self.read_exact(out)
    }

    /// Writes at `offset`.
    pub(super) fn write_all_at(&mut self, bytes: &[u8], offset: u64) -> Result<()> {
        self.place = offset;
        self.write_all(bytes)
    }

    /// So many bytes are in it, in whole blocks.
    pub(super) fn held(&self) -> u64 {
        self.blocks.len() as u64 * BLOCK as u64
    }

    /// Writes everything that is not zero into a file that is all zero.
    pub(super) fn write_to(&self, file: &File) -> Result<()> {
        for (number, block) in &self.blocks {
            if block.iter().any(|byte| *byte != 0) {
                file.write_all_at(block.as_slice(), number * BLOCK as u64)?;
            }
        }
        Ok(())
    }

    /// The block at the place, where in it the place lies, and how many of `wanted` bytes lie in it.
    fn here(&self, wanted: usize) -> (u64, usize, usize) {
        let start = usize::try_from(self.place % BLOCK as u64).unwrap_or(0);
        let left = usize::try_from(self.size.saturating_sub(self.place)).unwrap_or(usize::MAX);
        let count = wanted.min(BLOCK - start).min(left);
        (self.place / BLOCK as u64, start, count)
    }
}

impl Read for Sparse {
    fn read(&mut self, out: &mut [u8]) -> Result<usize> {
        let (block, start, count) = self.here(out.len());
        if let Some(out) = out.get_mut(..count) {
            let held = self.blocks.get(&block);
            match held.and_then(|block| block.get(start..start + count)) {
                Some(bytes) => out.copy_from_slice(bytes),
                None => out.fill(0),
            }
        }
        self.place += count as u64;
        Ok(count)
    }
}

impl Write for Sparse {
    fn write(&mut self, bytes: &[u8]) -> Result<usize> {
        let (block, start, count) = self.here(bytes.len());
        let held = self
            .blocks
            .entry(block)
            .or_insert_with(|| Box::new([0; BLOCK]));
        if let (Some(held), Some(bytes)) = (held.get_mut(start..start + count), bytes.get(..count))
        {
            held.copy_from_slice(bytes);
        }
        self.place += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> Result<()> {
        Ok(())
    }
}

impl Seek for Sparse {
    fn seek(&mut self, to: SeekFrom) -> Result<u64> {
        let place = match to {
            SeekFrom::Start(place) => Some(place),
            SeekFrom::End(offset) => self.size.checked_add_signed(offset),
            SeekFrom::Current(offset) => self.place.checked_add_signed(offset),
        };
        self.place = place.ok_or_else(|| Error::from(ErrorKind::InvalidInput))?;
        Ok(self.place)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing)]

    use std::os::unix::fs::MetadataExt as _;

    use super::*;

    #[test]
    fn it_is_what_a_file_would_be_with_holes_where_nothing_was_written() {
        let size = 1 << 20;
        let mut disk = Sparse::new(size);
        let (across, end) = ([7; 100], BLOCK as u64 * 9 - 50);
        disk.write_all_at(&across, end).unwrap();
        disk.write_all_at(&[0; 9000], BLOCK as u64 * 20).unwrap();
        disk.seek(SeekFrom::End(-3)).unwrap();
        disk.write_all(b"end").unwrap();
        assert_eq!(disk.write(b"more").unwrap(), 0, "it does not grow");

        let file = tempfile::tempfile().unwrap();
        file.set_len(size).unwrap();
        disk.write_to(&file).unwrap();
        let mut bytes = vec![0; 1 << 20];
        file.read_exact_at(&mut bytes, 0).unwrap();
        let mut same = vec![1; 1 << 20];
        disk.read_exact_at(&mut same, 0).unwrap();
        assert_eq!(bytes, same);
        let from = usize::try_from(end).unwrap();
        assert_eq!(bytes[from..from + 100], across);
        assert_eq!(bytes.iter().filter(|byte| **byte != 0).count(), 103);
        assert!(file.metadata().unwrap().blocks() * 512 <= 4 * BLOCK as u64);
    }

    #[test]
    fn places_before_the_beginning_are_refused_and_behind_the_end_is_nothing() {
        let mut disk = Sparse::new(10);
        assert!(disk.seek(SeekFrom::Current(-1)).is_err());
        assert!(disk.read_exact_at(&mut [0; 4], 8).is_err());
        assert!(disk.write_all_at(&[0; 4], 20).is_err());
    }
}
