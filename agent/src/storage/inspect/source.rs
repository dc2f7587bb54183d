// SPDX-License-Identifier: Apache-2.0
//! Bounded reads from an open image: nothing past the end, nothing larger than asked for.

use std::fs::File;
use std::io::{ErrorKind, Seek as _, SeekFrom};
use std::os::unix::fs::FileExt;

use super::Unsafe;

/// An open image and the length it had when it was opened.
pub(super) struct Source<'a> {
    file: &'a File,
    size: u64,
}

impl<'a> Source<'a> {
    pub(super) fn open(file: &'a File) -> Result<Self, Unsafe> {
        let metadata = file
            .metadata()
            .map_err(|source| Unsafe::Unreadable { offset: 0, source })?;
        if !metadata.is_file() {
            return Err(Unsafe::NotRegular);
        }
        if metadata.len() == 0 {
            return Err(Unsafe::Empty);
        }
        Ok(Self {
            file,
            size: metadata.len(),
        })
    }

    /// Like [`Self::open`], of a block device too.
    pub(super) fn disk(mut file: &'a File) -> Result<Self, Unsafe> {
        let size = file
            .seek(SeekFrom::End(0))
            .map_err(|source| Unsafe::Unreadable { offset: 0, source })?;
        Ok(Self { file, size })
    }

    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// Fails with [`Unsafe::Truncated`] unless `length` bytes at `offset` lie within the file.
    pub(super) fn need(&self, what: &'static str, offset: u64, length: u64) -> Result<(), Unsafe> {
        let needs = offset.saturating_add(length);
        if needs > self.size {
            return Err(Unsafe::Truncated {
                what,
                needs,
                size: self.size,
            });
        }
        Ok(())
    }

    /// Reads exactly `length` bytes at `offset`.
    pub(super) fn read(
        &self,
        what: &'static str,
        offset: u64,
        length: usize,
    ) -> Result<Vec<u8>, Unsafe> {
        self.need(what, offset, length as u64)?;
        let bytes = self.read_up_to(offset, length)?;
        if bytes.len() < length {
            // The file shrank since it was opened.
            return Err(Unsafe::Truncated {
                what,
                needs: offset.saturating_add(length as u64),
                size: offset.saturating_add(bytes.len() as u64),
            });
        }
        Ok(bytes)
    }

    /// Reads `length` bytes at `offset`, or fewer where the file ends.
    pub(super) fn read_up_to(&self, offset: u64, length: usize) -> Result<Vec<u8>, Unsafe> {
        let left = self.size.saturating_sub(offset);
        let length = usize::try_from(left).map_or(length, |left| left.min(length));
        let mut bytes = vec![0; length];
        let mut filled = 0;
        while let Some(rest) = bytes.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            let at = offset.saturating_add(filled as u64);
            match self.file.read_at(rest, at) {
                Ok(0) => break,
                Ok(count) => filled = filled.saturating_add(count),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(source) => return Err(Unsafe::Unreadable { offset: at, source }),
            }
        }
        bytes.truncate(filled);
        Ok(bytes)
    }
}

/// A fixed-size field of `bytes`; `None` past the end.
pub(super) fn field<const N: usize>(bytes: &[u8], offset: usize) -> Option<[u8; N]> {
    bytes
        .get(offset..)?
        .get(..N)
        .and_then(|field| field.try_into().ok())
}
