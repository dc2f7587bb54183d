// SPDX-License-Identifier: Apache-2.0
//! Requests for actions, checked field by field. Pure: what they name is looked up later.
//!
//! A verb and its dry run go through the same [`Ask::wish`].

use std::{
    collections::{BTreeMap, HashMap},
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
    action::{Action, AdoptArgs, CreateArgs, RescueArgs, Shutdown, UnrescueArgs, Verb},
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
    let mut hash = Sha256::new();
    let mut part = |bytes: &[u8]| {
        hash.update(bytes.len().to_be_bytes());
        hash.update(bytes);
    };
    part(verb.name().as_bytes());
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

fn millis(duration: Duration) -> u64 {
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
fn plain(
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

/// Takes the id out of a request and hashes the rest.
macro_rules! identify {
    ($message:ident) => {{
        let request_id = validate::request_id(&std::mem::take(&mut $message.request_id))?;
        (request_id, body_hash(Self::VERB, &$message, &[]))
    }};
}

impl Ask for v1::CreateServerRequest {
    const VERB: Verb = Verb::Create;

    fn subject(&self) -> &str {
        &self.name
    }

    fn wish(mut self, _shutdown: Shutdown) -> Checked<Wish> {
        let password = Password::take(&mut self.admin_pass)?;
        let request_id = validate::request_id(&std::mem::take(&mut self.request_id))?;
        let (public_keys, metadata) = (
            std::mem::take(&mut self.public_keys),
            std::mem::take(&mut self.metadata),
        );
        let body_hash = body_hash(Self::VERB, &self, &[&public_keys, &metadata]);
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
        let (request_id, body_hash) = identify!(self);
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
    ($($request:ident: $verb:ident),+) => {
        $(impl Ask for v1::$request {
            const VERB: Verb = Verb::$verb;

            fn subject(&self) -> &str {
                &self.server
            }

            fn wish(mut self, _shutdown: Shutdown) -> Checked<Wish> {
                let (request_id, body_hash) = identify!(self);
                plain(request_id, body_hash, self.server, Action::$verb)
            }
        })+
    };
}

ask_plain! { ReleaseServerRequest: Release, DeleteServerRequest: Delete, StartServerRequest: Start }

impl Ask for v1::StopServerRequest {
    const VERB: Verb = Verb::Stop;

    fn subject(&self) -> &str {
        &self.server
    }

    fn wish(mut self, usual: Shutdown) -> Checked<Wish> {
        let (request_id, body_hash) = identify!(self);
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
        let (request_id, body_hash) = identify!(self);
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
        let (request_id, body_hash) = identify!(self);
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]

    use super::*;

    const USUAL: Shutdown = Shutdown {
        timeout_ms: 60_000,
        retry_ms: 10_000,
    };
    const ID: &str = "7f0c1a52-3d9e-4b6f-8a21-5c0e9d7b4f13";

    fn create() -> v1::CreateServerRequest {
        v1::CreateServerRequest {
            request_id: ID.to_owned(),
            name: "Web 1".to_owned(),
            image: "cirros".to_owned(),
            flavor: Some(v1::Flavor {
                vcpus: 1,
                memory_mib: 64,
                disk_gib: 0,
            }),
            metadata: (0..20)
                .map(|i| (format!("k{i}"), format!("v{i}")))
                .collect(),
            ..v1::CreateServerRequest::default()
        }
    }

    fn rescue() -> v1::RescueServerRequest {
        v1::RescueServerRequest {
            server: "web".to_owned(),
            ..v1::RescueServerRequest::default()
        }
    }

    fn hash(ask: impl Ask) -> String {
        ask.wish(USUAL).unwrap().body_hash
    }

    #[test]
    fn a_repeated_create_means_the_same_server() {
        let (one, two) = (create().wish(USUAL).unwrap(), create().wish(USUAL).unwrap());
        assert_eq!(one.subject, two.subject);
        assert_eq!(one.body_hash, two.body_hash);
        let mut other = create();
        other.request_id = ID.replace('7', "8");
        assert_ne!(other.wish(USUAL).unwrap().subject, one.subject);
    }

    #[test]
    fn the_hash_tells_requests_apart_but_not_their_ids() {
        let base = hash(create());
        let mut other = create();
        other.request_id.clear();
        other.server_id = String::new();
        assert_eq!(hash(other), base);
        let mut other = create();
        other.metadata.insert("k1".to_owned(), "changed".to_owned());
        assert_ne!(hash(other), base);
        let mut other = create();
        (other.public_keys, other.metadata) = (other.metadata, HashMap::new());
        assert_ne!(hash(other), base);
        let start = v1::StartServerRequest {
            server: "web".to_owned(),
            ..Default::default()
        };
        let delete = v1::DeleteServerRequest {
            server: "web".to_owned(),
            ..Default::default()
        };
        assert_ne!(hash(start), hash(delete));
    }

    #[test]
    fn the_hash_knows_that_a_password_was_given_but_not_which() {
        let with = |password: Option<&str>| v1::RescueServerRequest {
            admin_pass: password.map(str::to_owned),
            ..rescue()
        };
        assert_eq!(hash(with(Some("one"))), hash(with(Some("two"))));
        assert_ne!(hash(with(Some("one"))), hash(with(None)));
    }

    #[test]
    fn a_password_is_not_in_what_is_logged_of_a_wish() {
        let wish = v1::RescueServerRequest {
            admin_pass: Some("s3cret".to_owned()),
            ..rescue()
        }
        .wish(USUAL)
        .unwrap();
        assert!(!format!("{wish:?}").contains("s3cret"));
    }

    #[test]
    fn a_rescue_without_words_is_the_usual_one() {
        let Action::Rescue(args) = rescue().wish(USUAL).unwrap().action else {
            panic!("no rescue")
        };
        assert_eq!(args.protection, Protection::ReadWrite);
        assert_eq!((args.mode, args.bus, args.device), (None, None, None));
        assert_eq!(args.shutdown, USUAL);
        assert_eq!(args.timeout_ms, None);
    }

    #[test]
    fn times_that_are_given_replace_the_usual_ones() {
        let given = v1::RescueServerRequest {
            timeout: Some(prost_types::Duration {
                seconds: 0,
                nanos: 0,
            }),
            shutdown_timeout: Some(prost_types::Duration {
                seconds: 1,
                nanos: 500_000_000,
            }),
            ..rescue()
        };
        let Action::Rescue(args) = given.wish(USUAL).unwrap().action else {
            panic!("no rescue")
        };
        assert_eq!(args.timeout_ms, Some(0));
        assert_eq!(
            (args.shutdown.timeout_ms, args.shutdown.retry_ms),
            (1_500, 10_000)
        );
    }

    #[test]
    fn each_wrong_field_is_named() {
        let field = |refusal: Refusal| refusal.subject.unwrap().0;
        let refuse = |change: fn(&mut v1::CreateServerRequest)| {
            let mut request = create();
            change(&mut request);
            field(request.wish(USUAL).unwrap_err())
        };
        assert_eq!(refuse(|r| r.request_id = "x".into()), "request_id");
        assert_eq!(refuse(|r| r.server_id = "x".into()), "server_id");
        assert_eq!(refuse(|r| r.name = "a\0".into()), "name");
        assert_eq!(refuse(|r| r.image = String::new()), "image");
        assert_eq!(refuse(|r| r.flavor = None), "flavor");
        assert_eq!(refuse(|r| r.hostname = "a_b".into()), "hostname");
        assert_eq!(refuse(|r| r.machine = "pc'/>".into()), "machine");
        assert_eq!(refuse(|r| r.firmware = 9), "firmware");
        assert_eq!(refuse(|r| r.admin_pass = Some("a\nb".into())), "admin_pass");
        assert_eq!(refuse(|r| r.user_data = vec![0; 49_150]), "user_data");
        assert_eq!(
            refuse(|r| r.interfaces = vec![Default::default()]),
            "interfaces[0]"
        );
        let refuse = |change: fn(&mut v1::RescueServerRequest)| {
            let mut request = rescue();
            change(&mut request);
            field(request.wish(USUAL).unwrap_err())
        };
        assert_eq!(refuse(|r| r.server = String::new()), "server");
        assert_eq!(refuse(|r| r.image = Some(String::new())), "image");
        assert_eq!(refuse(|r| r.mode = 3), "mode");
        assert_eq!(refuse(|r| r.bus = -1), "bus");
        assert_eq!(refuse(|r| r.device = 99), "device");
        assert_eq!(refuse(|r| r.disk_protection = 4), "disk_protection");
        let long = Some(prost_types::Duration {
            seconds: 31 * 86_400,
            nanos: 0,
        });
        let request = v1::RescueServerRequest {
            timeout: long,
            ..rescue()
        };
        assert_eq!(field(request.wish(USUAL).unwrap_err()), "timeout");
        let unrescue = v1::UnrescueServerRequest {
            server: "web".to_owned(),
            power: 7,
            ..Default::default()
        };
        assert_eq!(field(unrescue.wish(USUAL).unwrap_err()), "power");
    }
}
