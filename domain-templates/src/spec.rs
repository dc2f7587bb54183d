// SPDX-License-Identifier: Apache-2.0
//! The words of a rescue: what is asked for, and where each disk came to stand.
//!
//! Does not know: how any of it becomes XML.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::disk::Bus;
use crate::image::BaseImage;

/// The serial number of the rescue disk, by which a guest can know it.
pub const RESCUE_SERIAL: &str = "salvor-rescue";

/// The serial number of the config drive.
pub const CONFIG_DRIVE_SERIAL: &str = "salvor-config";

/// How the rescue disk joins the disks of the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// The rescue disk comes first on the root disk's bus, the root second, the others on that bus after them. Every
    /// disk on that bus loses its address, so that the guest sees them in this order.
    Classic,
    /// Every disk keeps its name and address; the rescue disk comes last.
    Stable,
}

/// The format of a disk that Salvor made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskFormat {
    /// Plain bytes.
    Raw,
    /// qcow2.
    Qcow2,
}

impl DiskFormat {
    /// libvirt's word for it.
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// How the rescue image shows itself to the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Device {
    /// As a hard disk.
    Disk,
    /// As a CD-ROM.
    Cdrom,
}

/// The disk to boot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RescueDisk {
    /// File on this host.
    pub path: String,
    /// Its format; never guessed.
    pub format: DiskFormat,
    /// The bus asked for. `None`: the root disk's bus in classic mode, else virtio; for a CD-ROM what the machine type
    /// is used to.
    pub bus: Option<Bus>,
    /// How it shows itself. A CD-ROM is the image itself.
    pub device: Device,
    /// The image that a hard disk stands on.
    pub base: Option<BaseImage>,
}

/// What protects an original disk while the rescue runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskChange {
    /// The rescue cannot write to it.
    ReadOnly,
    /// The rescue writes to an overlay.
    Overlay {
        /// A qcow2 file whose backing file is the original disk.
        path: String,
    },
}

/// What a rescue domain is made from, besides the original's definition.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RescueSpec {
    /// Id of the plan; it goes into the domain's mark.
    pub plan: String,
    /// How the rescue disk joins the others.
    pub mode: Mode,
    /// The disk to boot.
    pub rescue_disk: RescueDisk,
    /// Target name of an original disk → what protects it. Disks not named are attached as they were.
    pub protection: BTreeMap<String, DiskChange>,
    /// The rescue's own copy of the UEFI variables.
    pub nvram: Option<String>,
    /// A raw image with a FAT file system labelled config-2.
    pub config_drive: Option<String>,
}

/// What a disk of the rescue domain is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskRole {
    /// The disk that boots.
    Rescue,
    /// A disk of the server.
    Original {
        /// Its target name in the server's own definition.
        was: String,
    },
    /// The config drive.
    ConfigDrive,
}

/// A disk of the rescue domain and its place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlacedDisk {
    /// What it is.
    pub role: DiskRole,
    /// Target name.
    pub target: String,
    /// Bus, in libvirt's words.
    pub bus: String,
    /// File or block device; `None` for network disks, pool volumes and empty drives.
    pub path: Option<String>,
}

/// A rendered rescue domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RescueRendering {
    /// The definition, ready for libvirt.
    pub xml: String,
    /// Its disks, in document order.
    pub disks: Vec<PlacedDisk>,
}
