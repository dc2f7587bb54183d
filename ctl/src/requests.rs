// SPDX-License-Identifier: Apache-2.0
//! Arguments as requests of the API. Verbs and plans are made by the same functions. Only what the
//! agent cannot see is checked here: files and standard input.

use std::{
    collections::HashMap,
    fs::File,
    io::{self, BufRead as _, Read as _},
    path::Path,
};

use salvor_proto::v1;

use crate::{
    cli::{AdoptArgs, CreateArgs, RescueArgs, ServerArg, StopArgs, UnrescueArgs},
    errors::Failure,
    units::to_api,
};

/// Longest password line that is read, in bytes. The agent has a lower limit of its own.
const LONGEST_PASSWORD: u64 = 4096;
/// Largest file with a key or user data that is read, in bytes. The agent has lower limits of its own.
const LARGEST_FILE: u64 = 1 << 20;

/// The password from standard input, if it is asked for.
fn admin_pass(asked: bool) -> Result<Option<String>, Failure> {
    if !asked {
        return Ok(None);
    }
    let mut line = String::new();
    io::stdin()
        .lock()
        .take(LONGEST_PASSWORD + 1)
        .read_line(&mut line)
        .map_err(|cause| Failure::File {
            what: "cannot read the password from standard input".to_owned(),
            cause,
        })?;
    let password = line.strip_suffix('\n').unwrap_or(&line);
    let password = password.strip_suffix('\r').unwrap_or(password);
    if password.is_empty() {
        return Err(Failure::Usage(
            "--admin-pass-stdin: standard input begins with no password".to_owned(),
        ));
    }
    if line.len() > usize::try_from(LONGEST_PASSWORD).unwrap_or(usize::MAX) {
        return Err(Failure::Usage(format!(
            "--admin-pass-stdin: the password is longer than {LONGEST_PASSWORD} bytes"
        )));
    }
    Ok(Some(password.to_owned()))
}

/// A small file's content.
fn read(path: &Path) -> Result<Vec<u8>, Failure> {
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(LARGEST_FILE + 1).read_to_end(&mut bytes))
        .map_err(|cause| Failure::File {
            what: format!("cannot read {}", path.display()),
            cause,
        })?;
    if bytes.len() > usize::try_from(LARGEST_FILE).unwrap_or(usize::MAX) {
        return Err(Failure::Usage(format!(
            "{} is larger than 1 MiB",
            path.display()
        )));
    }
    Ok(bytes)
}

/// Keys by name from `[NAME=]FILE` arguments.
fn public_keys(arguments: &[String]) -> Result<HashMap<String, String>, Failure> {
    let mut keys = HashMap::new();
    for argument in arguments {
        let (name, file) = match argument.split_once('=') {
            Some((name, file)) => (name.to_owned(), file),
            None => {
                let stem = Path::new(argument).file_stem().unwrap_or_default();
                (stem.to_string_lossy().into_owned(), argument.as_str())
            }
        };
        let Ok(key) = String::from_utf8(read(Path::new(file))?) else {
            return Err(Failure::Usage(format!(
                "--key: {file} is no SSH public key: it is not text"
            )));
        };
        if key.contains("PRIVATE KEY") {
            return Err(Failure::Usage(format!(
                "--key: {file} is a private key; give the public one ({file}.pub)"
            )));
        }
        if keys.insert(name.clone(), key.trim().to_owned()).is_some() {
            return Err(Failure::Usage(format!(
                "--key: two keys have the name {name}; name one with --key NAME=FILE"
            )));
        }
    }
    Ok(keys)
}

/// Pairs as a map.
///
/// # Errors
/// [`Failure::Usage`] if a key occurs twice.
pub(crate) fn map(
    option: &str,
    pairs: &[(String, String)],
) -> Result<HashMap<String, String>, Failure> {
    let mut map = HashMap::new();
    for (key, value) in pairs {
        if map.insert(key.clone(), value.clone()).is_some() {
            return Err(Failure::Usage(format!("{option}: {key} is given twice")));
        }
    }
    Ok(map)
}

/// The bytes of a file with user data; none if none is named.
fn user_data(file: Option<&Path>) -> Result<Vec<u8>, Failure> {
    Ok(file.map(read).transpose()?.unwrap_or_default())
}

/// The request of `create`.
///
/// # Errors
/// [`Failure::Usage`] or [`Failure::File`] if what the arguments name cannot be used.
pub(crate) fn create(args: &CreateArgs) -> Result<v1::CreateServerRequest, Failure> {
    Ok(v1::CreateServerRequest {
        request_id: String::new(),
        server_id: args.id.map(|id| id.to_string()).unwrap_or_default(),
        name: args.name.clone(),
        image: args.image.clone(),
        flavor: Some(v1::Flavor {
            vcpus: args.vcpus,
            memory_mib: args.memory,
            disk_gib: args.disk,
        }),
        interfaces: args.interfaces.0.clone(),
        hostname: args.hostname.clone().unwrap_or_default(),
        public_keys: public_keys(&args.keys)?,
        user_data: user_data(args.user_data.as_deref())?,
        metadata: map("--metadata", &args.metadata)?,
        machine: args.machine.clone().unwrap_or_default(),
        firmware: args.firmware.api(),
        powered_off: args.powered_off,
        admin_pass: admin_pass(args.admin_pass.admin_pass_stdin)?,
    })
}

/// The request of `adopt`.
pub(crate) fn adopt(args: &AdoptArgs) -> v1::AdoptServerRequest {
    v1::AdoptServerRequest {
        request_id: String::new(),
        domain: args.domain.clone(),
        name: args.name.clone().unwrap_or_default(),
    }
}

/// The request of `release`.
pub(crate) fn release(args: &ServerArg) -> v1::ReleaseServerRequest {
    v1::ReleaseServerRequest {
        request_id: String::new(),
        server: args.server.clone(),
    }
}

/// The request of `delete`.
pub(crate) fn delete(args: &ServerArg) -> v1::DeleteServerRequest {
    v1::DeleteServerRequest {
        request_id: String::new(),
        server: args.server.clone(),
    }
}

/// The request of `start`.
pub(crate) fn start(args: &ServerArg) -> v1::StartServerRequest {
    v1::StartServerRequest {
        request_id: String::new(),
        server: args.server.clone(),
    }
}

/// The request of `stop`.
pub(crate) fn stop(args: &StopArgs) -> v1::StopServerRequest {
    v1::StopServerRequest {
        request_id: String::new(),
        server: args.server.clone(),
        shutdown_timeout: args.shutdown.shutdown_timeout.map(to_api),
    }
}

/// The request of `rescue`.
///
/// # Errors
/// As [`create`].
pub(crate) fn rescue(args: &RescueArgs) -> Result<v1::RescueServerRequest, Failure> {
    Ok(v1::RescueServerRequest {
        request_id: String::new(),
        server: args.server.clone(),
        image: args.image.clone(),
        mode: args.mode.api(),
        bus: args.bus.map_or(0, |bus| bus.api()),
        device: args.device.map_or(0, |device| device.api()),
        disk_protection: args.disks.api(),
        timeout: args.timeout.map(to_api),
        timeout_overlay: args.timeout_overlay.map_or(0, |overlay| overlay.api()),
        shutdown_timeout: args.shutdown.shutdown_timeout.map(to_api),
        user_data: user_data(args.user_data.as_deref())?,
        admin_pass: admin_pass(args.admin_pass.admin_pass_stdin)?,
    })
}

/// The request of `unrescue`.
pub(crate) fn unrescue(args: &UnrescueArgs) -> v1::UnrescueServerRequest {
    v1::UnrescueServerRequest {
        request_id: String::new(),
        server: args.server.clone(),
        overlay: args.overlay.map_or(0, |overlay| overlay.api()),
        power: args.power.api(),
        shutdown_timeout: args.shutdown.shutdown_timeout.map(to_api),
    }
}

/// `AcceptServerDrift`.
pub(crate) fn accept_drift(server: String) -> v1::AcceptServerDriftRequest {
    v1::AcceptServerDriftRequest {
        request_id: String::new(),
        server,
    }
}

/// `RestoreServerDefinition`.
pub(crate) fn restore_definition(server: String) -> v1::RestoreServerDefinitionRequest {
    v1::RestoreServerDefinitionRequest {
        request_id: String::new(),
        server,
    }
}
