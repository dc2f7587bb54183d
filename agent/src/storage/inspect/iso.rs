// SPDX-License-Identifier: Apache-2.0
//! ISO 9660 (ECMA-119): the primary volume descriptor, and no more.

use super::source::{Source, field};
use super::{Format, Unsafe};

/// The system area in front of the descriptors: sixteen sectors of 2048 bytes.
const DESCRIPTOR: u64 = 16 * 2048;
const SECTOR: usize = 2048;
/// The area is ISO 9660 if any of the first descriptors is the primary one; a boot record may come
/// before it. Anything further away is not searched.
const DESCRIPTORS: u64 = 16;
const PRIMARY: u8 = 1;

/// The primary volume descriptor, if there is one.
fn primary(source: &Source<'_>) -> Result<Option<Vec<u8>>, Unsafe> {
    for index in 0..DESCRIPTORS {
        let bytes = source.read_up_to(DESCRIPTOR + index * SECTOR as u64, SECTOR)?;
        if field(&bytes, 1) != Some(*b"CD001") || bytes.len() < SECTOR {
            return Ok(None);
        }
        if bytes.first() == Some(&PRIMARY) {
            return Ok(Some(bytes));
        }
    }
    Ok(None)
}

/// The volume id if the content is ISO 9660; nothing is checked.
pub(super) fn volume_id(source: &Source<'_>) -> Result<Option<String>, Unsafe> {
    Ok(primary(source)?.map(|descriptor| label(&descriptor)))
}

/// Checks the volume against the file and returns its id.
pub(super) fn inspect(source: &Source<'_>) -> Result<String, Unsafe> {
    let descriptor = primary(source)?.ok_or(Unsafe::NotAsDeclared {
        declared: Format::Iso,
    })?;
    // Numbers are stored twice, little-endian first; the first is read.
    let blocks = field(&descriptor, 80).map_or(0, u32::from_le_bytes);
    let block = field(&descriptor, 128).map_or(0, u16::from_le_bytes);
    if !matches!(block, 512 | 1024 | 2048) {
        return Err(Unsafe::IsoHeader {
            what: "the logical block size",
            value: block.into(),
        });
    }
    if blocks == 0 {
        return Err(Unsafe::IsoHeader {
            what: "the volume space size",
            value: 0,
        });
    }
    source.need("the ISO volume", 0, u64::from(blocks) * u64::from(block))?;
    Ok(label(&descriptor))
}

/// Printable ASCII only: the label goes into listings.
fn label(descriptor: &[u8]) -> String {
    let bytes = field::<32>(descriptor, 40).unwrap_or_default();
    let text: String = bytes
        .iter()
        .map(|&byte| char::from(byte))
        .filter(|letter| letter.is_ascii_graphic() || *letter == ' ')
        .collect();
    text.trim().to_owned()
}
