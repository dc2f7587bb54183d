// SPDX-License-Identifier: Apache-2.0
//! Records of images.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::state::named_states;

named_states! {
    /// Formats of images. Nothing else is accepted.
    pub enum ImageFormat {
        /// A raw disk.
        Raw = "raw",
        /// qcow2 that refers to no other file.
        Qcow2 = "qcow2",
        /// An ISO 9660 CD-ROM.
        Iso = "iso",
    }
}

impl ImageFormat {
    /// The name of the QEMU block driver for it: an ISO is raw to QEMU.
    #[must_use]
    pub const fn driver(self) -> &'static str {
        match self {
            Self::Raw | Self::Iso => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// An image of the local store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRecord {
    /// Its id.
    pub id: Uuid,
    /// Its name; need not be unique.
    pub name: String,
    /// Its format, as inspected when it was imported.
    pub format: ImageFormat,
    /// Size of the file in bytes.
    pub size: u64,
    /// Size of the disk that a guest sees, in bytes.
    pub virtual_size: u64,
    /// SHA-256 of the file, hexadecimal.
    pub sha256: String,
    /// Properties with Glance's names.
    pub properties: BTreeMap<String, String>,
    /// When it was imported, in milliseconds since the Unix epoch.
    pub created_at_ms: i64,
}
