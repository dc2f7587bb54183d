// SPDX-License-Identifier: Apache-2.0
//! Requests for actions, checked field by field. Pure: what they name is looked up later.
//!
//! A verb and its dry run go through the same [`Ask::wish`].

use std::{
    collections::{BTreeMap, HashMap},
    mem::take,
    time::Duration,
};

use prost::Message;
use salvor_proto::v1;
use sha2::{Digest as _, Sha256};
use uuid::Uuid;

use super::{
    convert::states::Wire as _,
    password::{Password, no_hash},
    validate::{self, Checked},
};
use crate::core::{
    action::{
        Action, AdoptArgs, ChangePasswordArgs, CreateArgs, LockArgs, RebootArgs, RescueArgs,
        ResetTo, SOFT_REBOOT_MS, Shutdown, UnrescueArgs, Verb,
    },
    image::{USER_RULE, is_user},
    reason::Refusal,
    record::{OverlayDisposition, Protection, RescueBus, RescueDevice, RescueMode},
};

/// Ids of servers that are made from request ids, so that a repeated CreateServer means the same one.
const SERVER_IDS: Uuid = Uuid::from_u128(0x5b0d_1f0e_94a7_4c0c_9d0f_6a3e_2b71_c8d4);

/// What an action is to be done to, in the caller's words.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Subject {
    /// A server.
    Server(String),
    /// A domain that is to become one.
    Domain(String),
    /// A server that is to be made.
    New(Uuid),
}

/// A checked request.
#[derive(Debug)]
pub(super) struct Wish {
    /// The client's id of the call.
    pub(super) request_id: Option<String>,
    /// Hash of what is asked for; see [`body_hash`].
    pub(super) body_hash: String,
    /// What it is to be done to.
    pub(super) subject: Subject,
    /// What is to be done. `image` and `password` are still to be filled in.
    pub(super) action: Action,
    /// The image that is named.
    pub(super) image: Option<String>,
    /// The password.
    pub(super) password: Password,
}

/// A request for an action.
pub(super) trait Ask: Message + Sized {
    /// The verb.
    const VERB: Verb;

    /// What it is to be done to, as the caller wrote it.
    fn subject(&self) -> &str;

    /// Checks every field. `shutdown` applies where the request does not say.
    ///
    /// # Errors
    /// The first field that breaks a rule, and the rule.
    fn wish(self, shutdown: Shutdown) -> Checked<Wish>;
}

/// The hash by which a repeated request is known: SHA-256 over the verb and the encoded request
/// without its id. Of a password it holds only whether one was given: an unsalted hash of a password
/// at rest would be as good as the password. Maps have no order in the encoding and are hashed apart.
fn body_hash(verb: Verb, message: &impl Message, maps: &[&HashMap<String, String>]) -> String {
    hash_of(verb.name(), message, maps)
}

/// The same for a call that is no action on a server.
pub(super) fn hash_of(
    call: &str,
    message: &impl Message,
    maps: &[&HashMap<String, String>],
) -> String {
    let mut hash = Sha256::new();
    let mut part = |bytes: &[u8]| {
        hash.update(bytes.len().to_be_bytes());
        hash.update(bytes);
    };
    part(call.as_bytes());
    part(&message.encode_to_vec());
    for map in maps {
        part(&map.len().to_be_bytes());
        for (key, value) in map.iter().collect::<BTreeMap<_, _>>() {
            part(key.as_bytes());
            part(value.as_bytes());
        }
    }
    format!("{:x}", hash.finalize())
}

pub(super) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn shutdown(given: Option<prost_types::Duration>, usual: Shutdown) -> Checked<Shutdown> {
    let timeout = validate::duration("shutdown_timeout", given, validate::SHUTDOWN)?;
    Ok(Shutdown {
        timeout_ms: timeout.map_or(usual.timeout_ms, millis),
        ..usual
    })
}

/// A wish without image and password.
pub(super) fn plain(
    request_id: Option<String>,
    body_hash: String,
    server: String,
    action: Action,
) -> Checked<Wish> {
    validate::reference("server", &server)?;
    Ok(Wish {
        request_id,
        body_hash,
        subject: Subject::Server(server),
        action,
        image: None,
        password: Password::None,
    })
}

/// The id that was taken out of a request, checked, and the hash of the rest.
pub(super) fn identify<A: Ask>(
    request_id: String,
    rest: &A,
    maps: &[&HashMap<String, String>],
) -> Checked<(Option<String>, String)> {
    let request_id = validate::request_id(&request_id)?;
    Ok((request_id, body_hash(A::VERB, rest, maps)))
}

impl Ask for v1::CreateServerRequest {
    const VERB: Verb = Verb::Create;

    fn subject(&self) -> &str {
        &self.name
    }

    fn wish(mut self, _shutdown: Shutdown) -> Checked<Wish> {
        let password = Password::take(&mut self.admin_pass)?;
        let (public_keys, metadata) = (take(&mut self.public_keys), take(&mut self.metadata));
        let (request_id, body_hash) = identify(
            take(&mut self.request_id),
            &self,
            &[&public_keys, &metadata],
        )?;
        let id = match (
            validate::optional_uuid("server_id", &self.server_id)?,
            &request_id,
        ) {
            (Some(id), _) => id,
            (None, Some(request_id)) => Uuid::new_v5(&SERVER_IDS, request_id.as_bytes()),
            (None, None) => Uuid::new_v4(),
        };
        validate::name("name", &self.name)?;
        validate::reference("image", &self.image)?;
        let hostname = if self.hostname.is_empty() {
            validate::hostname_from(&self.name, id)
        } else {
            validate::hostname("hostname", &self.hostname)?;
            self.hostname
        };
        if !self.machine.is_empty() {
            validate::word("machine", &self.machine)?;
        }
        let uefi = match v1::Firmware::try_from(self.firmware) {
            Ok(v1::Firmware::Unspecified | v1::Firmware::Bios) => false,
            Ok(v1::Firmware::Uefi) => true,
            Err(_) => {
                return Err(Refusal::field(
                    "firmware",
                    format!("{} is no value of Firmware", self.firmware),
                ));
            }
        };
        let args = CreateArgs {
            id,
            name: self.name,
            image: Uuid::nil(),
            flavor: validate::flavor("flavor", self.flavor)?,
            nics: validate::interfaces("interfaces", self.interfaces)?,
            password: no_hash(),
            hostname,
            public_keys: validate::public_keys("public_keys", public_keys)?,
            user_data: validate::user_data("user_data", self.user_data)?,
            metadata: validate::metadata("metadata", metadata)?,
            machine: (!self.machine.is_empty()).then_some(self.machine),
            uefi,
            powered_off: self.powered_off,
        };
        Ok(Wish {
            request_id,
            body_hash,
            subject: Subject::New(id),
            action: Action::Create(Box::new(args)),
            image: Some(self.image),
            password,
        })
    }
}

impl Ask for v1::AdoptServerRequest {
    const VERB: Verb = Verb::Adopt;

    fn subject(&self) -> &str {
        &self.domain
    }

    fn wish(mut self, _shutdown: Shutdown) -> Checked<Wish> {
        let (request_id, body_hash) = identify(take(&mut self.request_id), &self, &[])?;
        validate::reference("domain", &self.domain)?;
        if !self.name.is_empty() {
            validate::name("name", &self.name)?;
        }
        Ok(Wish {
            request_id,
            body_hash,
            subject: Subject::Domain(self.domain),
            action: Action::Adopt(AdoptArgs {
                name: (!self.name.is_empty()).then_some(self.name),
            }),
            image: None,
            password: Password::None,
        })
    }
}

/// Requests that say no more than which server.
macro_rules! ask_plain {
    ($($request:ident: $verb:ident $({ $($field:ident: $value:expr),+ })?),+ $(,)?) => {
        $(impl Ask for v1::$request {
            const VERB: Verb = Verb::$verb;

            fn subject(&self) -> &str {
                &self.server
            }

            fn wish(mut self, _shutdown: Shutdown) -> Checked<Wish> {
                let (request_id, body_hash) = identify(take(&mut self.request_id), &self, &[])?;
                plain(request_id, body_hash, self.server, Action::$verb $({ $($field: $value),+ })?)
            }
        })+
    };
}

ask_plain! {
    ReleaseServerRequest: Release,
    DeleteServerRequest: Delete,
    StartServerRequest: Start,
    UnlockServerRequest: Unlock { only_expired: false },
    RestoreServerRequest: Restore,
    ForceDeleteServerRequest: ForceDelete,
    PauseServerRequest: Pause,
    UnpauseServerRequest: Unpause,
    SuspendServerRequest: Suspend,
    ResumeServerRequest: Resume,
    TriggerCrashDumpRequest: CrashDump,
    DumpServerMemoryRequest: DumpMemory,
    AcceptServerDriftRequest: AcceptDrift,
    RestoreServerDefinitionRequest: RestoreDefinition,
}

impl Ask for v1::LockServerRequest {
    const VERB: Verb = Verb::Lock;

    fn subject(&self) -> &str {
        &self.server
    }

    fn wish(mut self, _shutdown: Shutdown) -> Checked<Wish> {
        let (request_id, body_hash) = identify(take(&mut self.request_id), &self, &[])?;
        if let Some(reason) = &self.reason {
            validate::reason("reason", reason)?;
        }
        let time = validate::duration("expires_in", self.expires_in, validate::LOCK)?;
        if time.is_some_and(|time| time < Duration::from_millis(1)) {
            return Err(Refusal::field(
                "expires_in",
                "must be more than nothing; leave it out for a lock without an end",
            ));
        }
        let args = LockArgs {
            reason: self.reason,
            expires_in_ms: time.map(millis),
        };
        plain(request_id, body_hash, self.server, Action::Lock(args))
    }
}

impl Ask for v1::ResetServerStateRequest {
    const VERB: Verb = Verb::ResetState;

    fn subject(&self) -> &str {
        &self.server
    }

    fn wish(mut self, _shutdown: Shutdown) -> Checked<Wish> {
        let (request_id, body_hash) = identify(take(&mut self.request_id), &self, &[])?;
        let to = match v1::VmState::try_from(self.state) {
            Ok(v1::VmState::Active) => ResetTo::Active,
            Ok(v1::VmState::Error) => ResetTo::Error,
            _ => {
                return Err(Refusal::field(
                    "state",
                    "must be VM_STATE_ACTIVE or VM_STATE_ERROR",
                ));
            }
        };
        plain(request_id, body_hash, self.server, Action::ResetState(to))
    }
}

impl Ask for v1::StopServerRequest {
    const VERB: Verb = Verb::Stop;

    fn subject(&self) -> &str {
        &self.server
    }

    fn wish(mut self, usual: Shutdown) -> Checked<Wish> {
        let (request_id, body_hash) = identify(take(&mut self.request_id), &self, &[])?;
        let action = Action::Stop(shutdown(self.shutdown_timeout, usual)?);
        plain(request_id, body_hash, self.server, action)
    }
}

impl Ask for v1::RescueServerRequest {
    const VERB: Verb = Verb::Rescue;

    fn subject(&self) -> &str {
        &self.server
    }

    fn wish(mut self, usual: Shutdown) -> Checked<Wish> {
        let password = Password::take(&mut self.admin_pass)?;
        let (request_id, body_hash) = identify(take(&mut self.request_id), &self, &[])?;
        if let Some(image) = &self.image {
            validate::reference("image", image)?;
        }
        let timeout = validate::duration("timeout", self.timeout, validate::RESCUE)?;
        let args = RescueArgs {
            image: None,
            mode: RescueMode::from_wire("mode", self.mode)?,
            bus: RescueBus::from_wire("bus", self.bus)?,
            device: RescueDevice::from_wire("device", self.device)?,
            protection: Protection::from_wire("disk_protection", self.disk_protection)?
                .unwrap_or(Protection::ReadWrite),
            password: no_hash(),
            user_data: validate::user_data("user_data", self.user_data)?,
            timeout_ms: timeout.map(millis),
            timeout_overlay: OverlayDisposition::from_wire(
                "timeout_overlay",
                self.timeout_overlay,
            )?,
            shutdown: shutdown(self.shutdown_timeout, usual)?,
        };
        let wish = plain(
            request_id,
            body_hash,
            self.server,
            Action::Rescue(Box::new(args)),
        )?;
        Ok(Wish {
            image: self.image,
            password,
            ..wish
        })
    }
}

impl Ask for v1::UnrescueServerRequest {
    const VERB: Verb = Verb::Unrescue;

    fn subject(&self) -> &str {
        &self.server
    }

    fn wish(mut self, usual: Shutdown) -> Checked<Wish> {
        let (request_id, body_hash) = identify(take(&mut self.request_id), &self, &[])?;
        let restore_power = match v1::UnrescuePower::try_from(self.power) {
            Ok(v1::UnrescuePower::Unspecified | v1::UnrescuePower::Start) => false,
            Ok(v1::UnrescuePower::Restore) => true,
            Err(_) => {
                return Err(Refusal::field(
                    "power",
                    format!("{} is no value of UnrescuePower", self.power),
                ));
            }
        };
        let args = UnrescueArgs {
            overlay: OverlayDisposition::from_wire("overlay", self.overlay)?,
            restore_power,
            shutdown: shutdown(self.shutdown_timeout, usual)?,
        };
        plain(request_id, body_hash, self.server, Action::Unrescue(args))
    }
}

impl Ask for v1::RebootServerRequest {
    const VERB: Verb = Verb::Reboot;

    fn subject(&self) -> &str {
        &self.server
    }

    fn wish(mut self, usual: Shutdown) -> Checked<Wish> {
        let (request_id, body_hash) = identify(take(&mut self.request_id), &self, &[])?;
        let or_fail = match v1::RebootOnTimeout::try_from(self.on_timeout) {
            Ok(v1::RebootOnTimeout::Unspecified) => None,
            Ok(v1::RebootOnTimeout::Hard) => Some(false),
            Ok(v1::RebootOnTimeout::Fail) => Some(true),
            Err(_) => {
                return Err(Refusal::field(
                    "on_timeout",
                    format!("{} is no value of RebootOnTimeout", self.on_timeout),
                ));
            }
        };
        let for_soft = "is for a soft reboot only: a hard one does not wait for the guest";
        let action = match v1::RebootType::try_from(self.r#type) {
            Ok(v1::RebootType::Soft) => {
                let usual = Shutdown {
                    timeout_ms: SOFT_REBOOT_MS,
                    ..usual
                };
                let shutdown = shutdown(self.shutdown_timeout, usual)?;
                let or_fail = or_fail.unwrap_or(false);
                if or_fail && shutdown.timeout_ms == 0 {
                    return Err(Refusal::field(
                        "shutdown_timeout",
                        "must not be 0 with on_timeout FAIL: the guest would not even be asked",
                    ));
                }
                Action::Reboot(RebootArgs { shutdown, or_fail })
            }
            Ok(v1::RebootType::Hard) if or_fail.is_some() => {
                return Err(Refusal::field("on_timeout", for_soft));
            }
            Ok(v1::RebootType::Hard) if self.shutdown_timeout.is_some() => {
                return Err(Refusal::field("shutdown_timeout", for_soft));
            }
            Ok(v1::RebootType::Hard) => Action::HardReboot,
            Ok(v1::RebootType::Unspecified) => {
                return Err(Refusal::field("type", "must be given: soft or hard"));
            }
            Err(_) => {
                return Err(Refusal::field(
                    "type",
                    format!("{} is no value of RebootType", self.r#type),
                ));
            }
        };
        plain(request_id, body_hash, self.server, action)
    }
}

impl Ask for v1::ChangeServerPasswordRequest {
    const VERB: Verb = Verb::ChangePassword;

    fn subject(&self) -> &str {
        &self.server
    }

    fn wish(mut self, _shutdown: Shutdown) -> Checked<Wish> {
        let password = Password::take(&mut self.admin_pass)?;
        let (request_id, body_hash) = identify(take(&mut self.request_id), &self, &[])?;
        if !self.user.is_empty() && !is_user(&self.user) {
            return Err(Refusal::field("user", USER_RULE));
        }
        let args = ChangePasswordArgs {
            user: (!self.user.is_empty()).then_some(self.user),
            password: no_hash(),
        };
        let wish = plain(
            request_id,
            body_hash,
            self.server,
            Action::ChangePassword(args),
        )?;
        Ok(Wish { password, ..wish })
    }
}

#[cfg(test)]
#[path = "wish_tests.rs"]
mod tests;
