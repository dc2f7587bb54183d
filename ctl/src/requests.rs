// SPDX-License-Identifier: Apache-2.0
//! Arguments as requests of the API. Verbs and plans are made by the same functions. Only what the
//! agent cannot see is checked here: files and standard input.

use std::{
    collections::HashMap,
    fs::File,
    io::{self, BufRead as _, Read as _},
    path::Path,
    time::Duration,
};

use salvor_proto::v1;

use crate::{
    cli::{
        AdoptArgs, CreateArgs, LockArgs, RebootArgs, RescueArgs, ResetStateArgs, ServerArg,
        SetPasswordArgs, StopArgs, UnrescueArgs, UpdateArgs,
    },
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
        shutdown_timeout: if args.force {
            Some(to_api(Duration::ZERO))
        } else {
            args.shutdown.shutdown_timeout.map(to_api)
        },
    }
}

/// The request of `reboot`.
pub(crate) fn reboot(args: &RebootArgs) -> v1::RebootServerRequest {
    let (kind, on_timeout, shutdown_timeout) = if args.hard {
        (v1::RebootType::Hard, 0, None)
    } else {
        let timeout = Some(to_api(args.shutdown_timeout));
        (v1::RebootType::Soft, args.on_timeout.api(), timeout)
    };
    v1::RebootServerRequest {
        request_id: String::new(),
        server: args.server.clone(),
        r#type: kind.into(),
        on_timeout,
        shutdown_timeout,
    }
}

/// The requests that say no more than which server.
macro_rules! plain {
    ($($(#[doc = $doc:literal])+ $name:ident: $request:ident),+ $(,)?) => {
        $($(#[doc = $doc])+
        pub(crate) fn $name(server: &str) -> v1::$request {
            v1::$request {
                request_id: String::new(),
                server: server.to_owned(),
            }
        })+
    };
}

plain! {
    /// The request of `pause`.
    pause: PauseServerRequest,
    /// The request of `unpause`.
    unpause: UnpauseServerRequest,
    /// The request of `suspend`.
    suspend: SuspendServerRequest,
    /// The request of `resume`.
    resume: ResumeServerRequest,
    /// The request of `crash-dump`.
    crash_dump: TriggerCrashDumpRequest,
    /// The request of `crash-dump --to-host`.
    dump_memory: DumpServerMemoryRequest,
}

/// The request of `set-password`.
///
/// # Errors
/// If the password cannot be read from standard input.
pub(crate) fn set_password(
    args: &SetPasswordArgs,
) -> Result<v1::ChangeServerPasswordRequest, Failure> {
    Ok(v1::ChangeServerPasswordRequest {
        request_id: String::new(),
        server: args.server.clone(),
        user: args.user.clone().unwrap_or_default(),
        admin_pass: admin_pass(args.admin_pass.admin_pass_stdin)?,
    })
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

/// The request of `lock`.
pub(crate) fn lock(args: &LockArgs) -> v1::LockServerRequest {
    v1::LockServerRequest {
        request_id: String::new(),
        server: args.server.clone(),
        reason: args.reason.clone(),
        expires_in: args.expires_in.map(to_api),
    }
}

/// The request of `unlock`.
pub(crate) fn unlock(args: &ServerArg) -> v1::UnlockServerRequest {
    v1::UnlockServerRequest {
        request_id: String::new(),
        server: args.server.clone(),
    }
}

/// The request of `update`: its mask names what is given or to be cleared.
///
/// # Errors
/// [`Failure::Usage`] if a field is both given and to be cleared, or a key is given twice.
pub(crate) fn update(args: &UpdateArgs) -> Result<v1::UpdateServerRequest, Failure> {
    let fields = &args.fields;
    let mut paths = Vec::new();
    for (field, given) in [
        ("name", fields.name.is_some()),
        ("description", fields.description.is_some()),
        ("metadata", !fields.metadata.is_empty()),
        ("tags", !fields.tags.is_empty()),
        ("access_ipv4", fields.access_ipv4.is_some()),
        ("access_ipv6", fields.access_ipv6.is_some()),
        ("shutdown_timeout", fields.shutdown_timeout.is_some()),
        ("autostart", fields.autostart.is_some()),
        ("autostart_order", fields.autostart_order.is_some()),
    ] {
        let cleared = fields.clear.iter().any(|clear| clear.field() == field);
        if given && cleared {
            return Err(Failure::Usage(format!(
                "--clear: {field} is given a value as well"
            )));
        }
        if given || cleared {
            paths.push(field.to_owned());
        }
    }
    Ok(v1::UpdateServerRequest {
        request_id: String::new(),
        server: args.server.clone(),
        update_mask: Some(prost_types::FieldMask { paths }),
        name: fields.name.clone().unwrap_or_default(),
        description: fields.description.clone().unwrap_or_default(),
        metadata: map("--metadata", &fields.metadata)?,
        tags: fields.tags.clone(),
        access_ipv4: fields.access_ipv4.clone().unwrap_or_default(),
        access_ipv6: fields.access_ipv6.clone().unwrap_or_default(),
        shutdown_timeout: fields.shutdown_timeout.map(to_api),
        autostart: fields.autostart.unwrap_or_default(),
        autostart_order: fields.autostart_order,
    })
}

/// The request of `reset-state`.
pub(crate) fn reset_state(args: &ResetStateArgs) -> v1::ResetServerStateRequest {
    v1::ResetServerStateRequest {
        request_id: String::new(),
        server: args.server.clone(),
        state: args.state.api(),
    }
}

/// The request of `restore`.
pub(crate) fn restore(args: &ServerArg) -> v1::RestoreServerRequest {
    v1::RestoreServerRequest {
        request_id: String::new(),
        server: args.server.clone(),
    }
}

/// The request of `force-delete`.
pub(crate) fn force_delete(args: &ServerArg) -> v1::ForceDeleteServerRequest {
    v1::ForceDeleteServerRequest {
        request_id: String::new(),
        server: args.server.clone(),
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
