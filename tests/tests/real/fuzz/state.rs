// SPDX-License-Identifier: Apache-2.0
//! Hostile calls about power, records and consoles. As in [`super::calls`], none that names a server which
//! exists may be accepted if it would change something.

use prost::Message as _;
use rand::Rng as _;
use rand::seq::IndexedRandom as _;
use salvor_proto::v1::{
    AbandonOperationRequest, AttachConsoleRequest, ChangeServerPasswordRequest, ConsoleOpen,
    FollowConsoleLogRequest, GetConsoleLogRequest, GetScreenshotRequest, LockServerRequest,
    PauseServerRequest, RebootServerRequest, ResetServerStateRequest, UpdateServerRequest, VmState,
    attach_console_request::Item, follow_console_log_request::From as FollowFrom,
    get_console_log_request::From,
};

use super::calls::{Call, SERVERS, one};
use super::values::Fuzz;

const CONSOLES: &str = "salvor.compute.v1.ConsoleService";

/// Names of fields that an update has, and that it has not.
const MASKS: [&str; 8] = [
    "id",
    "*",
    "metadata.key",
    "name.",
    "Name",
    "vm_state",
    "lock",
    "rescue.plan",
];

impl Fuzz<'_> {
    pub(super) fn reboot(&mut self) -> RebootServerRequest {
        let (request_id, server) = self.plain();
        let mut request = RebootServerRequest {
            request_id,
            server,
            r#type: self.rng.random_range(0..3),
            ..RebootServerRequest::default()
        };
        if self.chance(60) {
            match self.rng.random_range(0..4) {
                0 => request.r#type = self.bad_enum(),
                1 => request.on_timeout = self.bad_enum(),
                2 => request.shutdown_timeout = self.bad_duration(),
                _ => request.r#type = 0,
            }
            request.request_id = String::new();
            request.server = self.server();
        }
        request
    }

    /// Something that says no more than which server.
    pub(super) fn bare(&mut self) -> Call {
        let (request_id, server) = self.plain();
        let method = [
            "PauseServer",
            "UnpauseServer",
            "SuspendServer",
            "ResumeServer",
            "TriggerCrashDump",
            "DumpServerMemory",
            "UnlockServer",
            "RestoreServer",
            "ForceDeleteServer",
            "AcceptServerDrift",
            "RestoreServerDefinition",
        ]
        .choose(&mut self.rng)
        .unwrap();
        // All their requests are alike.
        let request = PauseServerRequest { request_id, server };
        one(SERVERS, method, &request)
    }

    pub(super) fn password(&mut self) -> ChangeServerPasswordRequest {
        let (request_id, server) = self.plain();
        let mut request = ChangeServerPasswordRequest {
            request_id,
            server,
            user: self.maybe_id(),
            admin_pass: self.chance(50).then(|| self.word()),
        };
        if self.chance(60) {
            // The server runs, so it is the password or the user that is refused.
            if self.chance(50) {
                request.admin_pass = Some("a\nb:c".into());
            } else {
                request.user = "../root".into();
            }
            request.request_id = String::new();
            request.server = self.server();
        }
        request
    }

    pub(super) fn lock(&mut self) -> LockServerRequest {
        let (request_id, server) = self.plain();
        let mut request = LockServerRequest {
            request_id,
            server,
            reason: self.chance(50).then(|| self.word()),
            expires_in: self.maybe_duration(),
        };
        if self.chance(60) {
            if self.chance(50) {
                request.reason = Some("a\u{1b}[2J".into());
            } else {
                let seconds = *[0, -1, i64::MIN, i64::MAX].choose(&mut self.rng).unwrap();
                request.expires_in = Some(prost_types::Duration { seconds, nanos: 0 });
            }
            request.request_id = String::new();
            request.server = self.server();
        }
        request
    }

    pub(super) fn update(&mut self) -> UpdateServerRequest {
        let (request_id, server) = self.plain();
        let mut request = UpdateServerRequest {
            request_id,
            server,
            name: self.word(),
            description: self.maybe_id(),
            autostart_order: self.chance(50).then(|| self.rng.random()),
            ..UpdateServerRequest::default()
        };
        let mut paths = vec![self.word()];
        if self.chance(60) {
            // What is named is surely wrong, whatever else is named.
            let wrong = match self.rng.random_range(0..8) {
                0 => MASKS.choose(&mut self.rng).unwrap(),
                1 => {
                    request.name = "a\nb".into();
                    "name"
                }
                2 => {
                    request.description = "x".repeat(256);
                    "description"
                }
                3 => {
                    request.tags = vec!["a,b".into()];
                    "tags"
                }
                4 => {
                    let key = |number: u32| (format!("k{number}"), self.word());
                    request.metadata = (0..129).map(key).collect();
                    "metadata"
                }
                5 => {
                    request.access_ipv4 = "fe80::1".into();
                    "access_ipv4"
                }
                6 => {
                    request.access_ipv6 = "10.0.0.1/8".into();
                    "access_ipv6"
                }
                _ => {
                    request.shutdown_timeout = self.bad_duration();
                    "shutdown_timeout"
                }
            };
            paths = vec!["autostart_order".into(), wrong.into()];
            request.request_id = String::new();
            request.server = self.server();
        }
        request.update_mask = self.chance(90).then_some(prost_types::FieldMask { paths });
        request
    }

    pub(super) fn reset(&mut self) -> ResetServerStateRequest {
        let (request_id, server) = self.plain();
        let mut request = ResetServerStateRequest {
            request_id,
            server,
            state: VmState::Active.into(),
        };
        if self.chance(60) {
            request.state = match self.chance(50) {
                true => self.bad_enum(),
                false => (*[VmState::Unspecified, VmState::Rescued, VmState::Deleted]
                    .choose(&mut self.rng)
                    .unwrap())
                .into(),
            };
            request.request_id = String::new();
            request.server = self.server();
        }
        request
    }

    /// Somebody wants to write to a guest who may not, or does not do as agreed.
    pub(super) fn write(&mut self) -> Call {
        let input = Item::Input(self.bytes(100_000));
        let open = |server| {
            Item::Open(ConsoleOpen {
                server,
                force: true,
                ..ConsoleOpen::default()
            })
        };
        let mut headers = Vec::new();
        let items = match self.rng.random_range(0..4) {
            0 => vec![Some(input)],
            1 => vec![None, Some(open(self.server()))],
            2 => vec![Some(open(self.word())), Some(input)],
            _ => {
                headers = vec![
                    ("x-salvor-role", "member".to_owned()),
                    ("x-salvor-project", "q".to_owned()),
                ];
                vec![Some(open(self.server())), Some(input)]
            }
        };
        let message = |item| AttachConsoleRequest { item }.encode_to_vec();
        Call {
            path: format!("/{CONSOLES}/AttachConsole"),
            messages: items.into_iter().map(message).collect(),
            headers,
            ..Call::default()
        }
    }

    /// What looks at a console, and changes nothing.
    pub(super) fn look(&mut self) -> Call {
        let counts = [i64::MIN, -2, -1, 0, 1, 1 << 40, i64::MAX];
        let count = *counts.choose(&mut self.rng).unwrap();
        let server = if self.chance(70) {
            self.server()
        } else {
            self.word()
        };
        let guest = if self.chance(30) { self.bad_enum() } else { 0 };
        match self.rng.random_range(0..4) {
            0 => {
                let request = GetConsoleLogRequest {
                    server,
                    from: Some(match self.rng.random_range(0..3) {
                        0 => From::LastLines(count),
                        1 => From::LastBytes(count),
                        _ => From::Cursor(self.word()),
                    }),
                    guest,
                    boot: self.chance(30).then_some(count),
                    max_bytes: self.number(),
                };
                one(CONSOLES, "GetConsoleLog", &request)
            }
            1 => {
                let request = FollowConsoleLogRequest {
                    server,
                    from: Some(match self.rng.random_range(0..3) {
                        0 => FollowFrom::LastLines(count),
                        1 => FollowFrom::LastBytes(count),
                        _ => FollowFrom::Cursor(self.word()),
                    }),
                    guest,
                };
                one(CONSOLES, "FollowConsoleLog", &request)
            }
            2 => one(CONSOLES, "GetScreenshot", &GetScreenshotRequest { server }),
            _ => {
                let open = ConsoleOpen {
                    server,
                    read_only: true,
                    force: self.chance(50),
                    history: self.chance(50),
                };
                let item = Some(Item::Open(open));
                let mut call = one(CONSOLES, "AttachConsole", &AttachConsoleRequest { item });
                // Who looks on may send what he likes: it goes nowhere.
                let item = Some(Item::Input(self.bytes(100)));
                call.messages
                    .push(AttachConsoleRequest { item }.encode_to_vec());
                call
            }
        }
    }

    /// Those that there are have all ended.
    pub(super) fn abandon(&mut self) -> Call {
        let request = AbandonOperationRequest {
            name: self.name_of_operation(),
            patience: self.maybe_duration(),
        };
        one(SERVERS, "AbandonOperation", &request)
    }
}
