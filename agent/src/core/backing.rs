// SPDX-License-Identifier: Apache-2.0
//! What stands under an overlay: the other files that it brings along.

use serde::{Deserialize, Serialize};

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
