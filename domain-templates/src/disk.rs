// SPDX-License-Identifier: Apache-2.0
//! Disks of a domain: what they are, and how libvirt turns a target name like `sdc` into a place on a bus.
//!
//! Does not know: rescue, templates.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::xml::Element;

/// A bus Salvor puts disks on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Bus {
    /// virtio-blk.
    Virtio,
    /// SCSI, on virtio-scsi where we add the controller.
    Scsi,
    /// USB storage, on xHCI.
    Usb,
    /// SATA (AHCI).
    Sata,
    /// IDE, on i440FX only.
    Ide,
}

impl Bus {
    /// Every bus.
    pub const ALL: [Self; 5] = [Self::Virtio, Self::Scsi, Self::Usb, Self::Sata, Self::Ide];

    /// libvirt's word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Virtio => "virtio",
            Self::Scsi => "scsi",
            Self::Usb => "usb",
            Self::Sata => "sata",
            Self::Ide => "ide",
        }
    }

    /// The bus of this name; `None` for buses we never place a disk on (`fdc`, `xen` …).
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|bus| bus.as_str() == name)
    }

    /// What target names on this bus begin with. It is a habit, not a law: any name may stand on any bus.
    pub fn prefix(self) -> &'static str {
        match self {
            Self::Virtio => "vd",
            Self::Scsi | Self::Usb | Self::Sata => "sd",
            Self::Ide => "hd",
        }
    }

    /// Can a hard disk (not a CD-ROM) on this bus be read-only? QEMU's IDE disk, which SATA uses as well, cannot.
    pub fn has_readonly_disks(self) -> bool {
        !matches!(self, Self::Ide | Self::Sata)
    }

    /// The controller, bus and unit that libvirt derives from the number in a target name (`virDomainDiskDefAssignAddress`,
    /// with QEMU's wide SCSI: 15 units to a controller, 7 is the controller itself). `None`: this bus has no such places.
    pub(crate) fn unit(self, index: usize) -> Option<(usize, usize, usize)> {
        match self {
            Self::Virtio | Self::Usb => None,
            Self::Scsi => {
                let unit = index % 15;
                Some((index / 15, 0, if unit < 7 { unit } else { unit + 1 }))
            }
            Self::Sata => Some((index / 6, 0, index % 6)),
            Self::Ide => Some((index / 4, index % 4 / 2, index % 2)),
        }
    }

    /// How many target numbers there are. IDE has one controller with four places; elsewhere libvirt adds controllers
    /// as needed and names end at `…zz`.
    pub(crate) fn capacity(self) -> usize {
        if self == Self::Ide { 4 } else { 26 * 27 }
    }
}

impl fmt::Display for Bus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// How a disk shows itself to the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DiskDevice {
    /// A hard disk.
    Disk,
    /// A CD-ROM drive.
    Cdrom,
    /// A floppy drive.
    Floppy,
    /// A SCSI LUN passed through.
    Lun,
}

impl DiskDevice {
    pub(crate) fn from_attribute(value: Option<&str>) -> Self {
        match value {
            Some("cdrom") => Self::Cdrom,
            Some("floppy") => Self::Floppy,
            Some("lun") => Self::Lun,
            _ => Self::Disk,
        }
    }

    /// libvirt's word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Disk => "disk",
            Self::Cdrom => "cdrom",
            Self::Floppy => "floppy",
            Self::Lun => "lun",
        }
    }
}

/// Where a disk's bytes are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DiskSource {
    /// A file on this host.
    File(String),
    /// A block device of this host.
    Block(String),
    /// A network disk.
    Network {
        /// `rbd`, `nbd`, `iscsi` …
        protocol: String,
        /// Its name there.
        name: Option<String>,
    },
    /// A volume of a libvirt storage pool.
    Volume {
        /// The pool.
        pool: String,
        /// The volume.
        volume: String,
    },
    /// Another sort of source, named by libvirt's word for it (`dir`, `nvme`, `vhostuser` …).
    Other(String),
    /// An empty drive.
    None,
}

/// A disk, CD-ROM or floppy of a domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// Its number in document order, from 0.
    pub index: usize,
    /// Target device name (`vda`): unique in the domain. The guest need not use the same name.
    pub target: String,
    /// Bus as libvirt writes it; derived from the target name as libvirt does where it is not written.
    pub bus: String,
    /// How it shows itself to the guest.
    pub device: DiskDevice,
    /// Where its bytes are.
    pub source: DiskSource,
    /// The recorded format (`qcow2`, `raw`). `None`: nothing is recorded, and libvirt then assumes raw.
    pub format: Option<String>,
    /// Can the guest not write to it? Always so for a CD-ROM.
    pub readonly: bool,
    /// Is it shared with other domains?
    pub shareable: bool,
    /// Its place in the boot order, from 1.
    pub boot_order: Option<u32>,
    /// Its serial number.
    pub serial: Option<String>,
    /// Does libvirt start the domain without it, or without its medium, if its file is missing
    /// (`startupPolicy='optional'`)?
    pub optional: bool,
}

impl Disk {
    /// The bus, if it is one we place disks on.
    pub fn known_bus(&self) -> Option<Bus> {
        Bus::from_name(&self.bus)
    }

    /// The path of the file or block device behind it.
    pub fn path(&self) -> Option<&str> {
        match &self.source {
            DiskSource::File(path) | DiskSource::Block(path) => Some(path),
            _ => None,
        }
    }
}

/// Where a `<disk>` says its bytes are.
pub(crate) fn read_source(disk: &Element) -> DiskSource {
    let Some(source) = disk.child("source") else {
        return DiskSource::None;
    };
    let attribute = |name: &str| {
        source
            .attribute(name)
            .filter(|value| !value.is_empty())
            .map(str::to_owned)
    };
    match disk.attribute("type").unwrap_or("file") {
        "file" => attribute("file").map_or(DiskSource::None, DiskSource::File),
        "block" => attribute("dev").map_or(DiskSource::None, DiskSource::Block),
        "network" => DiskSource::Network {
            protocol: attribute("protocol").unwrap_or_default(),
            name: attribute("name"),
        },
        "volume" => DiskSource::Volume {
            pool: attribute("pool").unwrap_or_default(),
            volume: attribute("volume").unwrap_or_default(),
        },
        other => DiskSource::Other(other.to_owned()),
    }
}

/// The bus libvirt derives from a target name where `bus=` is missing (`virDomainDiskDefParseXML`).
pub(crate) fn bus_from_target(target: &str, device: DiskDevice) -> &'static str {
    match target.get(..2) {
        _ if device == DiskDevice::Floppy => "fdc",
        Some("hd") => "ide",
        Some("sd") => "scsi",
        Some("vd") => "virtio",
        Some("xv") => "xen",
        _ => "ide",
    }
}

/// The name with this number: `vd` + 0 is `vda`, 26 is `vdaa`.
pub(crate) fn target_name(prefix: &str, index: usize) -> String {
    let mut letters = Vec::new();
    let mut rest = index + 1;
    while rest > 0 {
        rest -= 1;
        letters.push(u8::try_from(rest % 26).map_or('z', |digit| char::from(b'a' + digit)));
        rest /= 26;
    }
    prefix.chars().chain(letters.into_iter().rev()).collect()
}

/// The number in a target name, whatever its prefix; `None` if it is not one libvirt reads (`vda1` counts as `vda`).
pub(crate) fn target_index(target: &str) -> Option<usize> {
    let letters = ["xvd", "vd", "sd", "hd", "fd", "ubd"]
        .iter()
        .find_map(|prefix| target.strip_prefix(prefix))?;
    let letters = letters.trim_end_matches(|c: char| c.is_ascii_digit());
    if letters.is_empty() || letters.len() > 4 {
        return None;
    }
    let mut number = 0_usize;
    for letter in letters.bytes() {
        if !letter.is_ascii_lowercase() {
            return None;
        }
        number = number * 26 + usize::from(letter - b'a') + 1;
    }
    number.checked_sub(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn target_names_and_numbers_are_inverse() {
        for (index, name) in [
            (0, "vda"),
            (25, "vdz"),
            (26, "vdaa"),
            (51, "vdaz"),
            (52, "vdba"),
            (701, "vdzz"),
        ] {
            assert_eq!(target_name("vd", index), name);
        }
        for index in 0..26 * 27 {
            assert_eq!(target_index(&target_name("sd", index)), Some(index));
        }
        for odd in [
            "",
            "vd",
            "nvme0n1",
            "vdA",
            "sdaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
            "vda b",
            "vdä",
        ] {
            assert_eq!(target_index(odd), None, "{odd}");
        }
    }

    #[test]
    fn scsi_places_leave_out_the_controllers_own() {
        assert_eq!(Bus::Scsi.unit(6), Some((0, 0, 6)));
        assert_eq!(Bus::Scsi.unit(7), Some((0, 0, 8)));
        assert_eq!(Bus::Scsi.unit(15), Some((1, 0, 0)));
        assert_eq!(Bus::Ide.unit(3), Some((0, 1, 1)));
    }
}
