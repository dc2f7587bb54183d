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
//! * **No `network_data.json`**: to cloud-init an empty one means "configure no network"; without one
//!   it asks for an address by DHCP.
//!
//! A drive is written beside its place and renamed, with mode 0600 (see [`super::files`]). It blocks.

mod fat;
mod metadata;
mod sparse;
#[cfg(test)]
mod tests;

use std::path::Path;

use super::files::{DISK_MODE, FileError, cannot, replace_durable, unwritten};
use crate::core::image::{USER_RULE, is_user};
use crate::core::plan::ConfigDriveSpec;
use sparse::Sparse;

/// The most bytes of user data. Nova takes 65,535 characters of base64, which are so many bytes.
pub const LONGEST_USER_DATA: usize = 49_149;
/// The size of the file system: Nova's. The file is sparse, some 100 KiB of it are there.
const VOLUME: u64 = 64 << 20;

/// Why a config drive was not made.
#[derive(Debug, thiserror::Error)]
pub enum ConfigDriveError {
    /// The user data is too long.
    #[error("user_data has {length} bytes; at most {LONGEST_USER_DATA} are taken")]
    UserDataLength {
        /// Its length.
        length: usize,
    },
    /// The password hash is none.
    #[error("the administrator's password hash is not in the form that crypt(3) gives")]
    Hash,
    /// The administrator's name is none.
    #[error("the administrator's name {user:?} {USER_RULE}")]
    User {
        /// The name.
        user: String,
    },
    /// It could not be written.
    #[error("the config drive could not be made")]
    File(#[from] FileError),
}

/// Is everything in it fit for a drive? What passes here fails later only for the file system.
///
/// # Errors
/// [`ConfigDriveError`] naming what is not.
pub fn check(spec: &ConfigDriveSpec) -> Result<(), ConfigDriveError> {
    let length = spec.user_data.as_ref().map_or(0, Vec::len);
    if length > LONGEST_USER_DATA {
        return Err(ConfigDriveError::UserDataLength { length });
    }
    if spec
        .password
        .as_ref()
        .is_some_and(|hash| !is_crypt(&hash.0))
    {
        return Err(ConfigDriveError::Hash);
    }
    if !is_user(&spec.password_user) {
        return Err(ConfigDriveError::User {
            user: spec.password_user.clone(),
        });
    }
    Ok(())
}

/// Makes the drive at `path`, in place of one that is there.
///
/// # Errors
/// [`ConfigDriveError`]; the old drive is untouched then.
pub fn build(path: &Path, spec: &ConfigDriveSpec) -> Result<(), ConfigDriveError> {
    check(spec)?;
    let files = metadata::files(spec);
    let mut disk = Sparse::new(VOLUME);
    replace_durable(path, DISK_MODE, |file, part| {
        fat::write(&mut disk, volume_id(spec), &files).map_err(cannot("made", part))?;
        file.set_len(VOLUME)
            .and_then(|()| disk.write_to(file))
            .map_err(unwritten(part, disk.held()))
    })?;
    Ok(())
}

fn volume_id(spec: &ConfigDriveSpec) -> u32 {
    spec.instance_id
        .as_bytes()
        .chunks_exact(4)
        .filter_map(|word| word.try_into().ok().map(u32::from_be_bytes))
        .fold(0, |id, word| id ^ word)
}

/// `$ID$SALT$HASH` of crypt(3), and nothing that would begin a new line or field.
fn is_crypt(hash: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"$./=,-".contains(&byte);
    hash.starts_with('$') && hash.matches('$').count() >= 3 && hash.bytes().all(allowed)
}
