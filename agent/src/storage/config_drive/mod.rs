// SPDX-License-Identifier: Apache-2.0
//! The config drive: a small FAT disk that tells cloud-init who the guest is.
//!
//! Label and layout are OpenStack's (`config-2`, one folder for each metadata version), so that every
//! image made for OpenStack reads it. What is ours:
//!
//! * **No clear password.** There is no `admin_pass` key and no way to ask for one. The crypt hash
//!   travels as vendor data, a cloud-config that cloud-init merges *under* the user's own: user data
//!   stays byte for byte what the user sent, and what it says about passwords wins.
//! * **The same spec gives the same bytes**: a fixed date, a volume id made of the instance id, no
//!   random seed. A step that is done twice is done once.
//! * **A marker** behind the file system says which plan made the drive. It is read back without
//!   parsing the file system, which the guest may have rewritten.
//! * **No `network_data.json`**: to cloud-init an empty one means "configure no network"; without one
//!   it asks for an address by DHCP.
//!
//! A drive is written beside its place and renamed, with mode 0600 (see [`super::files`]). It blocks.

mod fat;
mod metadata;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::files::{DISK_MODE, FileError, cannot, replace_durable};
use crate::hypervisor::CryptHash;
pub use metadata::host_name;

/// The most characters of base64 text that user data may have; Nova's limit.
pub const LONGEST_USER_DATA: usize = 65_535;
/// The size of the file system: Nova's. The file is sparse, about 1 MiB of it is there.
const VOLUME: u64 = 64 << 20;
/// The marker's sector, behind the file system.
const TRAILER: usize = 512;
const MARKER: &str = "salvor config drive of plan ";
const LONGEST_PLAN: usize = 128;

/// Why a config drive was not made.
#[derive(Debug, thiserror::Error)]
pub enum ConfigDriveError {
    /// The user data is too long.
    #[error("user_data has {length} characters; at most {LONGEST_USER_DATA} of base64 are taken")]
    UserDataLength {
        /// Its length.
        length: usize,
    },
    /// The user data cannot be decoded.
    #[error("user_data is not base64")]
    UserData {
        /// Where it breaks.
        #[source]
        source: base64::DecodeError,
    },
    /// The password hash is none.
    #[error("the administrator's password hash is not in the form that crypt(3) gives")]
    Hash,
    /// The plan's id cannot be used as a marker.
    #[error("the plan id {plan:?} must be 1 to {LONGEST_PLAN} visible ASCII characters")]
    Plan {
        /// The id.
        plan: String,
    },
    /// It could not be written.
    #[error("the config drive could not be made")]
    File(#[from] FileError),
}

/// What a config drive says. Goes into plans, so it holds nothing that must not rest on a disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigDrive {
    /// The server's uuid. cloud-init runs its first-boot work again when it is new to it.
    pub instance_id: Uuid,
    /// The guest's host name, as [`host_name`] makes it.
    pub hostname: String,
    /// The server's name.
    pub name: String,
    /// SSH public keys by name.
    pub public_keys: BTreeMap<String, String>,
    /// The hash of root's password, if it is to be set.
    pub admin_pass_hash: Option<CryptHash>,
    /// User data in base64, as the API takes it; the drive carries the decoded bytes.
    pub user_data: Option<String>,
    /// The server's metadata.
    pub metadata: BTreeMap<String, String>,
    /// The plan that makes the drive.
    pub plan: String,
}

impl ConfigDrive {
    /// Is everything in it fit for a drive? What passes here fails later only for the file system.
    ///
    /// # Errors
    /// [`ConfigDriveError`] naming what is not.
    pub fn check(&self) -> Result<(), ConfigDriveError> {
        self.decoded_user_data()?;
        if self
            .admin_pass_hash
            .as_ref()
            .is_some_and(|hash| !is_crypt(&hash.0))
        {
            return Err(ConfigDriveError::Hash);
        }
        let fits = (1..=LONGEST_PLAN).contains(&self.plan.len())
            && self.plan.bytes().all(|byte| byte.is_ascii_graphic());
        if !fits {
            return Err(ConfigDriveError::Plan {
                plan: self.plan.clone(),
            });
        }
        Ok(())
    }

    /// Makes the drive at `path`, in place of one that is there.
    ///
    /// # Errors
    /// [`ConfigDriveError`]; the old drive is untouched then.
    pub fn build(&self, path: &Path) -> Result<(), ConfigDriveError> {
        self.check()?;
        let files = metadata::files(self, self.decoded_user_data()?.as_deref());
        replace_durable(path, DISK_MODE, |file, part| {
            file.set_len(VOLUME)
                .and_then(|()| fat::write(file, self.volume_id(), &files))
                .and_then(|()| self.write_marker(file))
                .map_err(cannot("written", part))
        })?;
        Ok(())
    }

    fn write_marker(&self, file: &mut File) -> std::io::Result<()> {
        let mut sector = format!("{MARKER}{}\n", self.plan).into_bytes();
        sector.resize(TRAILER, 0);
        file.seek(SeekFrom::Start(VOLUME))?;
        file.write_all(&sector)
    }

    fn decoded_user_data(&self) -> Result<Option<Vec<u8>>, ConfigDriveError> {
        let Some(text) = &self.user_data else {
            return Ok(None);
        };
        if text.len() > LONGEST_USER_DATA {
            return Err(ConfigDriveError::UserDataLength { length: text.len() });
        }
        // Lines are customary in base64, and Nova takes them.
        let text: String = text.split_ascii_whitespace().collect();
        match STANDARD.decode(text) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(source) => Err(ConfigDriveError::UserData { source }),
        }
    }

    fn volume_id(&self) -> u32 {
        self.instance_id
            .as_bytes()
            .chunks_exact(4)
            .filter_map(|word| word.try_into().ok().map(u32::from_be_bytes))
            .fold(0, |id, word| id ^ word)
    }
}

/// The plan that made the drive at `path`; `None` if there is no drive or it is not one of ours.
///
/// # Errors
/// [`FileError::Io`] if the file is there but cannot be read.
pub fn plan_of(path: &Path) -> Result<Option<String>, FileError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(cannot("opened", path)(error)),
    };
    let size = file.metadata().map_err(cannot("read", path))?.len();
    if size != VOLUME + TRAILER as u64 {
        return Ok(None);
    }
    let mut sector = [0; TRAILER];
    file.read_exact_at(&mut sector, VOLUME)
        .map_err(cannot("read", path))?;
    let plan = sector
        .strip_prefix(MARKER.as_bytes())
        .and_then(|rest| rest.split(|&byte| byte == b'\n').next())
        .filter(|plan| plan.len() <= LONGEST_PLAN && plan.iter().all(u8::is_ascii_graphic))
        .and_then(|plan| str::from_utf8(plan).ok());
    Ok(plan.filter(|plan| !plan.is_empty()).map(str::to_owned))
}

/// `$ID$SALT$HASH` of crypt(3), and nothing that would begin a new line or field.
fn is_crypt(hash: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"$./=,-".contains(&byte);
    hash.starts_with('$') && hash.matches('$').count() >= 3 && hash.bytes().all(allowed)
}
