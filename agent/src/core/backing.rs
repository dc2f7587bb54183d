// SPDX-License-Identifier: Apache-2.0
//! What stands under an overlay: the rules for its name, and the other files that it brings along.

use serde::{Deserialize, Serialize};

/// QEMU keeps the name of a backing file in at most this many bytes.
pub const LONGEST_NAME: usize = 1023;

/// The largest disk that an overlay can have, in bytes: what QEMU's largest L1 table, 32 MiB, stands for
/// with clusters of 64 KiB.
pub const LARGEST: u64 = (32 << 20) / 8 * (1 << 29);

/// Can a disk of this path be written into an overlay's header? QEMU reads `nbd:…` or `json:…` as
/// protocols, but only where no slash comes before the colon.
///
/// # Errors
/// The rule that the path breaks.
pub fn check_name(path: &[u8]) -> Result<(), &'static str> {
    if !path.starts_with(b"/") {
        Err("its path must be absolute")
    } else if path.contains(&0) {
        Err("its path must not contain a NUL byte")
    } else if path.len() > LONGEST_NAME {
        Err("its path has more than 1023 bytes, which QEMU does not keep")
    } else {
        Ok(())
    }
}

/// The other files that a disk's header names. QEMU's tools open them with the disk, so whoever can
/// change the header chooses which files of the host they read. Names are bytes; what is not plain
/// ASCII in them is escaped.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct References {
    /// The backing file.
    pub backing: Option<String>,
    /// Its format.
    pub backing_format: Option<String>,
    /// The file that holds the data; empty if the header does not say which.
    pub data_file: Option<String>,
}

impl std::fmt::Display for References {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let none = |name: &Option<String>| name.clone().unwrap_or_else(|| "none".to_owned());
        write!(f, "backing file {}", none(&self.backing))?;
        if let Some(format) = &self.backing_format {
            write!(f, " ({format})")?;
        }
        write!(f, ", data file {}", none(&self.data_file))
    }
}
