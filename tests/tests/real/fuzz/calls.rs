// SPDX-License-Identifier: Apache-2.0
//! Calls with hostile and random arguments. None of them may be accepted if it would change something: a
//! server that exists is named only where something else is surely wrong.

use super::values::{Fuzz, TEXTS};
use prost::Message;
use rand::Rng as _;
use rand::seq::IndexedRandom as _;
use salvor_proto::google::longrunning::{
    CancelOperationRequest, DeleteOperationRequest, GetOperationRequest, ListOperationsRequest,
    WaitOperationRequest,
};
use salvor_proto::v1::{
    AcceptServerDriftRequest, AdoptServerRequest, CreateServerRequest, DeleteImageRequest,
    DeleteServerRequest, Flavor, ForceDeleteServerRequest, GetHostRequest, GetImageRequest,
    GetServerDiagnosticsRequest, GetServerDriftRequest, GetServerRequest, ImageSpec,
    ImportImageFromPathRequest, ImportImageRequest, ListImagesRequest, ListServersRequest,
    ListUnmanagedDomainsRequest, NetworkInterfaceSpec, PlanActionRequest, ReleaseServerRequest,
    RescueServerRequest, RestoreServerDefinitionRequest, RestoreServerRequest, StartServerRequest,
    StopServerRequest, UnlockServerRequest, UnrescueServerRequest, WatchEventsRequest,
    import_image_request::Part, network_interface_spec::Connection, plan_action_request::Action,
};

pub(super) const SERVERS: &str = "salvor.compute.v1.ServerService";

/// One call: its path, its messages as bytes, and headers.
#[derive(Debug, Default)]
pub(super) struct Call {
    pub(super) path: String,
    pub(super) messages: Vec<Vec<u8>>,
    pub(super) headers: Vec<(&'static str, String)>,
    /// It must be refused: it would change something.
    pub(super) must_fail: bool,
    /// Its bytes were tampered with, so the transport may refuse it before anybody looks at it.
    pub(super) tampered: bool,
}

impl Fuzz<'_> {
    fn create(&mut self) -> CreateServerRequest {
        let sound = Flavor {
            vcpus: 1,
            memory_mib: 64,
            disk_gib: 0,
        };
        let (image, flavor) = if self.chance(30) {
            let vcpus = *[0, 100_000, u32::MAX].choose(&mut self.rng).unwrap();
            let memory_mib = *[0, 1, u64::MAX].choose(&mut self.rng).unwrap();
            let image = self.known.images.choose(&mut self.rng).unwrap().clone();
            (
                image,
                self.chance(70).then_some(Flavor {
                    vcpus,
                    memory_mib,
                    disk_gib: u64::MAX,
                }),
            )
        } else {
            (self.word(), Some(sound))
        };
        let interface = NetworkInterfaceSpec {
            connection: self.chance(80).then(|| Connection::Bridge(self.word())),
            mac: self.word(),
            model: self.word(),
        };
        CreateServerRequest {
            request_id: self.maybe_id(),
            server_id: self.maybe_id(),
            name: self.word(),
            image,
            flavor,
            interfaces: if self.chance(30) {
                vec![interface]
            } else {
                Vec::new()
            },
            admin_pass: self.chance(30).then(|| self.word()),
            hostname: self.maybe_id(),
            public_keys: if self.chance(20) {
                [(self.word(), self.word())].into()
            } else {
                [].into()
            },
            user_data: if self.chance(20) {
                self.bytes(200_000)
            } else {
                Vec::new()
            },
            metadata: if self.chance(20) {
                [(self.word(), self.word())].into()
            } else {
                [].into()
            },
            machine: self.maybe_id(),
            firmware: if self.chance(20) { self.bad_enum() } else { 0 },
            powered_off: self.chance(50),
        }
    }

    fn adopt(&mut self) -> AdoptServerRequest {
        if self.chance(40) {
            let domain = self.known.domains.choose(&mut self.rng).unwrap().clone();
            return AdoptServerRequest {
                request_id: self.bad_id(),
                domain,
                name: self.word(),
            };
        }
        AdoptServerRequest {
            request_id: self.maybe_id(),
            domain: self.word(),
            name: self.word(),
        }
    }

    /// A server that exists with a bad request id, or one that does not.
    pub(super) fn plain(&mut self) -> (String, String) {
        if self.chance(40) {
            (self.bad_id(), self.server())
        } else {
            (self.maybe_id(), self.word())
        }
    }

    fn stop(&mut self) -> StopServerRequest {
        let (request_id, server) = self.plain();
        if self.chance(30) {
            return StopServerRequest {
                request_id: String::new(),
                server: self.server(),
                shutdown_timeout: self.bad_duration(),
            };
        }
        StopServerRequest {
            request_id,
            server,
            shutdown_timeout: self.maybe_duration(),
        }
    }

    fn rescue(&mut self) -> RescueServerRequest {
        let (request_id, server) = self.plain();
        let mut request = RescueServerRequest {
            request_id,
            server,
            image: self.chance(30).then(|| self.word()),
            admin_pass: self.chance(20).then(|| self.word()),
            ..RescueServerRequest::default()
        };
        if self.chance(60) {
            // Whatever is named, this is surely wrong.
            match self.rng.random_range(0..8) {
                0 => request.mode = self.bad_enum(),
                1 => request.bus = self.bad_enum(),
                2 => request.device = self.bad_enum(),
                3 => request.disk_protection = self.bad_enum(),
                4 => request.timeout_overlay = self.bad_enum(),
                5 => request.timeout = self.bad_duration(),
                6 => request.shutdown_timeout = self.bad_duration(),
                _ => request.image = Some("no-such-image".into()),
            }
            request.request_id = String::new();
            request.server = self.server();
        }
        request
    }

    fn unrescue(&mut self) -> UnrescueServerRequest {
        let (request_id, server) = self.plain();
        let mut request = UnrescueServerRequest {
            request_id,
            server,
            ..Default::default()
        };
        if self.chance(60) {
            match self.rng.random_range(0..4) {
                0 => request.overlay = self.bad_enum(),
                1 => request.power = self.bad_enum(),
                2 => request.shutdown_timeout = self.bad_duration(),
                // The rescue has no overlays.
                _ => request.overlay = 1,
            }
            request.request_id = String::new();
            request.server = self.server();
        }
        request
    }

    fn plan(&mut self) -> PlanActionRequest {
        // Only a dry run, so it may be sound as well.
        let server = if self.chance(50) {
            self.server()
        } else {
            self.word()
        };
        let action = match self.rng.random_range(0..20) {
            0 => Some(Action::Create(self.create())),
            1 => Some(Action::Adopt(self.adopt())),
            2 => Some(Action::Release(ReleaseServerRequest {
                server,
                ..Default::default()
            })),
            3 => Some(Action::Delete(DeleteServerRequest {
                server,
                ..Default::default()
            })),
            4 => Some(Action::Start(StartServerRequest {
                server,
                ..Default::default()
            })),
            5 => Some(Action::Stop(StopServerRequest {
                server,
                ..Default::default()
            })),
            6 => Some(Action::Rescue(self.rescue())),
            7 => {
                let image = self.known.images.choose(&mut self.rng).cloned();
                let disk_protection = self.rng.random_range(0..4);
                let mode = self.rng.random_range(0..3);
                Some(Action::Rescue(RescueServerRequest {
                    server,
                    image,
                    disk_protection,
                    mode,
                    ..Default::default()
                }))
            }
            8 => Some(Action::Unrescue(self.unrescue())),
            9 => Some(Action::Unrescue(UnrescueServerRequest {
                server,
                ..Default::default()
            })),
            10 => {
                let domain = self.known.domains.choose(&mut self.rng).unwrap().clone();
                Some(Action::Adopt(AdoptServerRequest {
                    domain,
                    ..Default::default()
                }))
            }
            11 => Some(Action::Lock(self.lock())),
            12 => Some(Action::Update(self.update())),
            13 => Some(Action::ResetState(self.reset())),
            14 => Some(Action::Unlock(UnlockServerRequest {
                server,
                ..Default::default()
            })),
            15 => Some(Action::Restore(RestoreServerRequest {
                server,
                ..Default::default()
            })),
            16 => Some(Action::ForceDelete(ForceDeleteServerRequest {
                server,
                ..Default::default()
            })),
            17 => Some(Action::AcceptDrift(AcceptServerDriftRequest {
                server,
                ..Default::default()
            })),
            18 => Some(Action::RestoreDefinition(RestoreServerDefinitionRequest {
                server,
                ..Default::default()
            })),
            _ => None,
        };
        PlanActionRequest { action }
    }

    fn spec(&mut self) -> ImageSpec {
        ImageSpec {
            id: self.maybe_id(),
            name: self.word(),
            format: if self.chance(30) {
                self.bad_enum()
            } else {
                self.rng.random_range(0..4)
            },
            properties: if self.chance(30) {
                [(self.word(), self.word())].into()
            } else {
                [].into()
            },
            // No content has this sum.
            sha256: if self.chance(50) {
                "0".repeat(64)
            } else {
                self.bad_id()
            },
            ..ImageSpec::default()
        }
    }

    fn import(&mut self) -> Vec<Vec<u8>> {
        let count = self.rng.random_range(0..5);
        let mut parts = Vec::new();
        for _ in 0..count {
            let part = match self.rng.random_range(0..5) {
                0 | 1 => Some(Part::Spec(self.spec())),
                2 | 3 => Some(Part::Chunk(self.bytes(60_000))),
                _ => None,
            };
            let request_id = self.maybe_id();
            parts.push(ImportImageRequest { part, request_id }.encode_to_vec());
        }
        parts
    }

    pub(super) fn name_of_operation(&mut self) -> String {
        match self.rng.random_range(0..3) {
            0 => self.known.operations.choose(&mut self.rng).unwrap().clone(),
            1 => format!("operations/{}", self.word()),
            _ => self.word(),
        }
    }

    /// The next call.
    pub(super) fn call(&mut self) -> Call {
        let mut call = if self.chance(50) {
            self.change()
        } else {
            self.read()
        };
        // What names a server that exists must stay as it is: a bit elsewhere could make it sound, and one who
        // looks on a writer.
        if !call.must_fail && !call.path.ends_with("/AttachConsole") && self.chance(20) {
            self.tamper(&mut call);
        }
        if self.chance(10) {
            let id = (*TEXTS.choose(&mut self.rng).unwrap()).to_owned();
            call.headers.push(("x-openstack-request-id", id));
        }
        if call.headers.is_empty() && self.chance(5) {
            let names = ["x-salvor-role", "x-salvor-user", "x-salvor-project"];
            let name = *names.choose(&mut self.rng).unwrap();
            let text = (*TEXTS.choose(&mut self.rng).unwrap()).to_owned();
            call.headers.push((name, text));
        }
        if self.chance(5) {
            let timeout = *["0n", "1u", "99999999H", "x", "-1S", ""]
                .choose(&mut self.rng)
                .unwrap();
            call.headers.push(("grpc-timeout", timeout.to_owned()));
        }
        call
    }

    fn tamper(&mut self, call: &mut Call) {
        call.tampered = true;
        match self.rng.random_range(0..4) {
            0 => call.messages = vec![self.bytes(200)],
            1 => call.messages.push(Vec::new()),
            2 => call.messages.clear(),
            _ => {
                for byte in call.messages.iter_mut().flatten() {
                    if self.rng.random_range(0..20) == 0 {
                        *byte = self.rng.random();
                    }
                }
            }
        }
    }

    fn change(&mut self) -> Call {
        let (request_id, server) = self.plain();
        let servers = SERVERS;
        let images = "salvor.compute.v1.ImageService";
        let mut call = match self.rng.random_range(0..20) {
            11 => one(servers, "RebootServer", &self.reboot()),
            12..15 => self.bare(),
            15 => one(servers, "ChangeServerPassword", &self.password()),
            16 => one(servers, "LockServer", &self.lock()),
            17 => one(servers, "UpdateServer", &self.update()),
            18 => one(servers, "ResetServerState", &self.reset()),
            19 => self.write(),
            0 => one(servers, "CreateServer", &self.create()),
            1 => one(servers, "AdoptServer", &self.adopt()),
            2 => one(
                servers,
                "ReleaseServer",
                &ReleaseServerRequest { request_id, server },
            ),
            3 => one(
                servers,
                "DeleteServer",
                &DeleteServerRequest { request_id, server },
            ),
            4 => one(
                servers,
                "StartServer",
                &StartServerRequest { request_id, server },
            ),
            5 => one(servers, "StopServer", &self.stop()),
            6 | 7 => one(servers, "RescueServer", &self.rescue()),
            8 => one(servers, "UnrescueServer", &self.unrescue()),
            9 => {
                let image = if self.chance(30) {
                    // In use by a rescue.
                    self.known.images.choose(&mut self.rng).unwrap().clone()
                } else {
                    self.word()
                };
                one(
                    images,
                    "DeleteImage",
                    &DeleteImageRequest { image, request_id },
                )
            }
            _ => Call {
                path: format!("/{images}/ImportImage"),
                messages: self.import(),
                ..Call::default()
            },
        };
        call.must_fail = true;
        call
    }

    fn read(&mut self) -> Call {
        let servers = SERVERS;
        let images = "salvor.compute.v1.ImageService";
        let hosts = "salvor.compute.v1.HostService";
        let operations = "google.longrunning.Operations";
        let name = self.name_of_operation();
        let (page_size, page_token) = (self.number(), self.maybe_id());
        match self.rng.random_range(0..22) {
            0 => {
                let server = if self.chance(50) {
                    self.server()
                } else {
                    self.word()
                };
                one(servers, "GetServer", &GetServerRequest { server })
            }
            1 | 2 => {
                let request = ListServersRequest {
                    page_size,
                    page_token,
                    name_contains: self.maybe_id(),
                    statuses: if self.chance(50) {
                        vec![self.word()]
                    } else {
                        Vec::new()
                    },
                    vm_states: if self.chance(30) {
                        vec![self.bad_enum()]
                    } else {
                        Vec::new()
                    },
                    power_states: if self.chance(30) {
                        vec![self.bad_enum()]
                    } else {
                        Vec::new()
                    },
                    origin: if self.chance(30) { self.bad_enum() } else { 0 },
                    project_id: self.maybe_id(),
                    tags: if self.chance(30) {
                        vec![self.word()]
                    } else {
                        Vec::new()
                    },
                    ..Default::default()
                };
                one(servers, "ListServers", &request)
            }
            3..6 => one(servers, "PlanAction", &self.plan()),
            6 => one(operations, "GetOperation", &GetOperationRequest { name }),
            7 => {
                let (filter, name) = (self.maybe_id(), self.maybe_id());
                let request = ListOperationsRequest {
                    name,
                    filter,
                    page_size,
                    page_token,
                    ..Default::default()
                };
                one(operations, "ListOperations", &request)
            }
            8 => {
                let timeout = self.bad_duration();
                one(
                    operations,
                    "WaitOperation",
                    &WaitOperationRequest { name, timeout },
                )
            }
            // Those that there are have all ended.
            9 => one(
                operations,
                "CancelOperation",
                &CancelOperationRequest { name },
            ),
            10 => {
                let name = self.word();
                one(
                    operations,
                    "DeleteOperation",
                    &DeleteOperationRequest { name },
                )
            }
            11 => {
                let after = [None, Some(-1), Some(0), Some(i64::MAX), Some(i64::MIN)];
                let request = WatchEventsRequest {
                    after_revision: *after.choose(&mut self.rng).unwrap(),
                    servers: if self.chance(60) {
                        vec![self.word()]
                    } else {
                        Vec::new()
                    },
                };
                one("salvor.compute.v1.WatchService", "WatchEvents", &request)
            }
            12 => {
                let image = self.word();
                one(images, "GetImage", &GetImageRequest { image })
            }
            13 => one(
                images,
                "ListImages",
                &ListImagesRequest {
                    page_size,
                    page_token,
                },
            ),
            14 => {
                let spec = self.chance(80).then(|| self.spec());
                let path = if self.chance(30) {
                    "/etc/passwd".into()
                } else {
                    self.word()
                };
                let request_id = self.maybe_id();
                let request = ImportImageFromPathRequest {
                    spec,
                    path,
                    request_id,
                };
                one(images, "ImportImageFromPath", &request)
            }
            16 | 18 => self.look(),
            19 => self.abandon(),
            20 => {
                let server = if self.chance(50) {
                    self.server()
                } else {
                    self.word()
                };
                one(servers, "GetServerDrift", &GetServerDriftRequest { server })
            }
            17 => {
                let request = GetServerDiagnosticsRequest {
                    server: self.server(),
                    definitions: self.chance(50),
                };
                one(servers, "GetServerDiagnostics", &request)
            }
            _ if self.chance(50) => one(hosts, "GetHost", &GetHostRequest {}),
            _ => one(
                hosts,
                "ListUnmanagedDomains",
                &ListUnmanagedDomainsRequest {},
            ),
        }
    }
}

pub(super) fn one(service: &str, method: &str, message: &impl Message) -> Call {
    Call {
        path: format!("/{service}/{method}"),
        messages: vec![message.encode_to_vec()],
        ..Call::default()
    }
}
