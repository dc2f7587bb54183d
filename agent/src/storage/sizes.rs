// SPDX-License-Identifier: Apache-2.0
//! Sizes of disks that guests write to, told without any tool opening them.

use std::{io, path::Path};

use tokio::{
    fs::File,
    io::{AsyncReadExt as _, AsyncSeekExt as _},
};

use crate::core::{image::ImageRecord, layout::Layout};

/// The first bytes of a qcow2 file.
const QCOW2_MAGIC: &[u8] = b"QFI\xfb";

/// The size in bytes of the disk that a guest sees in `path`, whose format is as its definition says.
///
/// A qcow2 header is QEMU's, not the guest's, so what it says can be believed.
///
/// # Errors
/// If the file cannot be read, or the format is neither `raw` nor `qcow2`, or a qcow2 has no header.
pub async fn disk_size(path: &Path, format: &str) -> io::Result<u64> {
    let mut file = File::open(path).await?;
    match format {
        // Seeking tells the size of a block device as well.
        "raw" => file.seek(io::SeekFrom::End(0)).await,
        "qcow2" => {
            let mut header = [0; 32];
            file.read_exact(&mut header).await?;
            match header.split_at(24) {
                (start, size) if start.starts_with(QCOW2_MAGIC) => Ok(size
                    .iter()
                    .fold(0, |value, byte| (value << 8) | u64::from(*byte))),
                _ => Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    "there is no qcow2 header",
                )),
            }
        }
        _ => Err(io::Error::new(
            io::ErrorKind::Unsupported,
            "only the sizes of raw and qcow2 disks can be told",
        )),
    }
}

/// The file of an image.
#[must_use]
pub fn image_path(layout: &Layout, image: &ImageRecord) -> String {
    format!("{}/{}.{}", layout.images(), image.id, image.format)
}
