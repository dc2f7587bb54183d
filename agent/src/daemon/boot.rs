// SPDX-License-Identifier: Apache-2.0
//! Which boot of the host this is: the kernel's boot id tells a restart of the agent from a restart of the host.

use std::io;
use std::path::Path;

use uuid::Uuid;

/// The id of the host's current boot (random(4)).
///
/// # Errors
/// The kernel's file cannot be read or holds no uuid.
pub fn boot_id() -> io::Result<Uuid> {
    read(Path::new("/proc/sys/kernel/random/boot_id"))
}

fn read(path: &Path) -> io::Result<Uuid> {
    let text = std::fs::read_to_string(path)?;
    text.trim()
        .parse()
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn the_boot_id_stays_the_same_within_a_boot() {
        assert_eq!(boot_id().unwrap(), boot_id().unwrap());
    }

    #[test]
    fn what_is_no_uuid_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert_eq!(
            read(file.path()).unwrap_err().kind(),
            io::ErrorKind::InvalidData
        );
    }
}
