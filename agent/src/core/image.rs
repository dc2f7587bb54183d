// SPDX-License-Identifier: Apache-2.0
//! Records of images, and what their properties mean.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{
    record::{RescueBus, RescueDevice},
    state::named_states,
};

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

/// Which file it is, and when it was changed last: with all of this as it was, so is the content.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileIdentity {
    /// Number of the file on its filesystem.
    pub inode: u64,
    /// Size in bytes.
    pub size: u64,
    /// When the content was written last: seconds since the Unix epoch, and nanoseconds.
    pub modified: (i64, i64),
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
    /// The file that was found to have this content; `None` if that was not noted yet.
    #[serde(default)]
    pub file: Option<FileIdentity>,
    /// Properties with Glance's names.
    pub properties: BTreeMap<String, String>,
    /// When it was imported, in milliseconds since the Unix epoch.
    pub created_at_ms: i64,
}

/// A property that is understood has a value that is not.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the image's property {name} is {value:?}; it {rule}")]
pub struct PropertyError {
    /// The property.
    pub name: &'static str,
    /// Its value.
    pub value: String,
    /// What it has to be.
    pub rule: &'static str,
}

/// The properties that mean something here, with Glance's names. All others are kept and ignored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Understood {
    /// `hw_rescue_bus`.
    pub rescue_bus: Option<RescueBus>,
    /// `hw_rescue_device`.
    pub rescue_device: Option<RescueDevice>,
    /// `os_admin_user`: whose password is set. Without it `Administrator` where `os_type` is `windows`
    /// and `root` elsewhere (Nova: `set_admin_password` of its libvirt driver).
    pub admin_user: String,
    /// `os_shutdown_timeout`: how long a guest made from it may take to shut down, in milliseconds.
    pub shutdown_timeout_ms: Option<u64>,
}

/// The longest time to shut down that is taken of an image, in seconds: as in requests.
const LONGEST_SHUTDOWN: u64 = 3_600;

impl Understood {
    /// Reads an image's properties.
    ///
    /// # Errors
    /// [`PropertyError`] for the first one that breaks its rule.
    pub fn read(properties: &BTreeMap<String, String>) -> Result<Self, PropertyError> {
        let read = |name: &'static str| properties.get(name);
        let wrong = |name, value: &String, rule| PropertyError {
            name,
            value: value.clone(),
            rule,
        };
        let (bus, device, user) = ("hw_rescue_bus", "hw_rescue_device", "os_admin_user");
        let shutdown = "os_shutdown_timeout";
        Ok(Self {
            rescue_bus: read(bus)
                .map(|value| {
                    RescueBus::from_name(value)
                        .ok_or_else(|| wrong(bus, value, "must be virtio, scsi, usb, sata or ide"))
                })
                .transpose()?,
            rescue_device: read(device)
                .map(|value| {
                    RescueDevice::from_name(value)
                        .ok_or_else(|| wrong(device, value, "must be disk or cdrom"))
                })
                .transpose()?,
            shutdown_timeout_ms: read(shutdown)
                .map(|value| match value.parse::<u64>() {
                    Ok(seconds) if seconds <= LONGEST_SHUTDOWN => Ok(seconds.saturating_mul(1000)),
                    Ok(_) | Err(_) => Err(wrong(
                        shutdown,
                        value,
                        "must be 0 to 3600 seconds, as a number",
                    )),
                })
                .transpose()?,
            admin_user: match read(user) {
                None if read("os_type").is_some_and(|os| os == "windows") => {
                    "Administrator".to_owned()
                }
                None => "root".to_owned(),
                Some(name) if is_user(name) => name.clone(),
                Some(name) => return Err(wrong(user, name, USER_RULE)),
            },
        })
    }
}

/// What [`is_user`] wants.
pub const USER_RULE: &str =
    "must be 1 to 32 of the characters A-Z a-z 0-9 _ - and begin with a letter or _";

/// A name that a Unix system takes for a user, and that cannot begin a new line or field.
#[must_use]
pub fn is_user(name: &str) -> bool {
    let mut bytes = name.bytes();
    name.len() <= 32
        && bytes
            .next()
            .is_some_and(|first| first.is_ascii_alphabetic() || first == b'_')
        && bytes.all(|byte| byte.is_ascii_alphanumeric() || b"_-".contains(&byte))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn read(name: &str, value: &str) -> Result<Understood, PropertyError> {
        Understood::read(&BTreeMap::from([(name.to_owned(), value.to_owned())]))
    }

    #[test]
    fn what_is_understood_has_rules_and_what_is_not_has_none() {
        assert_eq!(read("os_admin_user", "_a-1").unwrap().admin_user, "_a-1");
        let timeout = |value| read("os_shutdown_timeout", value).unwrap();
        assert_eq!(timeout("90").shutdown_timeout_ms, Some(90_000));
        assert_eq!(timeout("0").shutdown_timeout_ms, Some(0));
        assert_eq!(read("os_distro", "\u{1f600} x").unwrap().admin_user, "root");
        let long = "a".repeat(33);
        for (name, wrong) in [
            ("hw_rescue_bus", "floppy"),
            ("hw_rescue_device", "tape"),
            ("os_shutdown_timeout", "1m"),
            ("os_shutdown_timeout", "-1"),
            ("os_shutdown_timeout", "3601"),
            ("os_admin_user", ""),
            ("os_admin_user", "a:b"),
            ("os_admin_user", "-a"),
            ("os_admin_user", "1a"),
            ("os_admin_user", &long),
        ] {
            let error = read(name, wrong).unwrap_err();
            assert_eq!((error.name, error.value.as_str()), (name, wrong));
        }
    }
}
