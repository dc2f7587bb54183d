// SPDX-License-Identifier: Apache-2.0
//! One server after the other in the same place: made or adopted, asked for this and that by chance, made
//! anew when it is gone.

use std::fs;
use std::path::PathBuf;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use rand::Rng as _;
use rand::rngs::StdRng;
use salvor_proto::v1::plan_action_request::Action;
use salvor_proto::v1::{
    AdoptServerRequest, CreateServerRequest, Firmware, Flavor, GetServerRequest, PlanActionRequest,
    Server, VmState,
};
use tokio::sync::watch;
use uuid::Uuid;

use super::asking::{After, Asked, reason_of};
use super::chaos::Now;
use super::reads;
use super::tally::Tally;
use super::verbs::{Caller, Verb};
use crate::client::Client;
use crate::domain::DomainXml;
use crate::guests::{Format, TinyGuest};
use crate::libvirt::{Libvirt, LibvirtError};
use crate::wait::BOOT;

/// What kind of server lives here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Made by the agent.
    Made,
    /// The same from the image of a guest that does not hear the power button.
    MadeDeaf,
    /// The same with UEFI variables. Its firmware finds nothing to boot.
    MadeUefi,
    /// The same with a TPM, which is defined past the agent and accepted.
    MadeTpm,
    /// A domain that somebody made.
    Adopted,
    /// The same with a guest that does not hear the power button.
    AdoptedDeaf,
}

impl Kind {
    /// Did the agent make it?
    pub(super) const fn is_made(self) -> bool {
        matches!(
            self,
            Self::Made | Self::MadeDeaf | Self::MadeUefi | Self::MadeTpm
        )
    }

    const fn is_deaf(self) -> bool {
        matches!(self, Self::MadeDeaf | Self::AdoptedDeaf)
    }

    /// The image that it is made from.
    pub(super) const fn image(self) -> &'static str {
        if self.is_deaf() { "soak-deaf" } else { "soak" }
    }
}

/// A place and who lives there.
pub(super) struct Life {
    pub(super) place: usize,
    pub(super) kind: Kind,
    pub(super) id: Uuid,
    pub(super) client: Client,
    pub(super) libvirt: Libvirt,
    pub(super) folder: PathBuf,
    pub(super) tally: Tally,
    pub(super) now: Now,
    pub(super) random: StdRng,
    /// Was something asked for that removes the server?
    going: bool,
    generation: u32,
}

impl Life {
    /// A place that nobody lives in yet.
    pub(super) fn new(
        (place, kind): (usize, Kind),
        client: Client,
        libvirt: Libvirt,
        folder: PathBuf,
        (tally, now): (Tally, Now),
        random: StdRng,
    ) -> Self {
        Self {
            place,
            kind,
            id: Uuid::nil(),
            client,
            libvirt,
            folder,
            tally,
            now,
            random,
            going: false,
            generation: 0,
        }
    }

    /// Asks for one thing after the other until it is told to stop.
    pub(super) async fn live(mut self, stop: watch::Receiver<bool>) -> Self {
        while !*stop.borrow() {
            // The pace of somebody who looks at the answer: guests get some time to run between verbs.
            let pause = Duration::from_millis(self.random.random_range(0..1_200));
            tokio::time::sleep(pause).await;
            let Some(server) = self.look().await else {
                self.begin().await;
                continue;
            };
            match self.random.random_range(0..100) {
                0..15 => reads::read(&mut self).await,
                15..22 => self.dry_run(&server).await,
                22..32 => {
                    let (first, second) = (self.choose(&server), self.choose(&server));
                    tokio::join!(self.act(first, After::Wait), self.act(second, After::Wait));
                }
                32..42 => {
                    let asked = self.choose(&server);
                    let after = Duration::from_millis(self.random.random_range(0..400));
                    self.act(asked, After::Cancel(after)).await;
                }
                42..44 => {
                    let asked = self.choose(&server);
                    let after = Duration::from_millis(self.random.random_range(0..400));
                    self.act(asked, After::Abandon(after)).await;
                }
                _ => {
                    let asked = self.choose(&server);
                    self.act(asked, After::Wait).await;
                }
            }
        }
        self
    }

    /// Was something asked for that removes the server?
    pub(super) const fn going(&self) -> bool {
        self.going
    }

    /// The server as it is; `None` if it is gone, as was asked for.
    pub(super) async fn look(&mut self) -> Option<Server> {
        let begun = Instant::now();
        let request = GetServerRequest {
            server: self.id.to_string(),
        };
        loop {
            let answer = self.client.servers.get_server(request.clone()).await;
            let status = match answer {
                Ok(answer) => {
                    let server = answer.into_inner().server?;
                    self.going = server.vm_state() == VmState::SoftDeleted
                        || server.task_state.contains("deleting");
                    return Some(server);
                }
                Err(status) => status,
            };
            if reason_of(&status).as_deref() == Some("SERVER_NOT_FOUND") {
                if !self.going {
                    self.tally.defect(format!("server {} is lost", self.id));
                }
                return None;
            }
            if !self.is_away(&status, begun).await {
                self.tally.defect(format!("GetServer: {status:?}"));
                return None;
            }
        }
    }

    fn choose(&mut self, server: &Server) -> Asked {
        let verb = Verb::choose(&mut self.random, server.vm_state());
        self.going |= verb.removes();
        Asked {
            verb: verb.name(),
            server: self.id,
            action: verb.action(&mut self.random, server),
            caller: Caller::choose(&mut self.random),
        }
    }

    async fn dry_run(&mut self, server: &Server) {
        let begun = Instant::now();
        let asked = self.choose_dry(server);
        let request = PlanActionRequest {
            action: Some(asked.action),
        };
        loop {
            let request = asked.caller.says(request.clone());
            let mut servers = self.client.servers.clone();
            let answer = Box::pin(servers.plan_action(request)).await;
            if self.answer_to("dry run", answer, begun).await {
                return;
            }
        }
    }

    /// Nothing goes by a dry run.
    fn choose_dry(&mut self, server: &Server) -> Asked {
        let going = self.going;
        let asked = self.choose(server);
        self.going = going;
        asked
    }
}

/// Beginnings.
impl Life {
    /// A new server takes the place, or the one that was released is adopted again.
    pub(super) async fn begin(&mut self) {
        let begun = Instant::now();
        loop {
            if self.kind.is_made() {
                self.create().await;
            } else {
                self.adopt().await;
            }
            self.going = true;
            if self.look().await.is_some() {
                break;
            }
            if begun.elapsed() > BOOT {
                self.tally.defect(format!(
                    "no server of kind {:?} can be had for {BOOT:?}",
                    self.kind
                ));
                break;
            }
        }
        let mut now = self.now.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(id) = now.get_mut(self.place) {
            *id = self.id;
        }
    }

    async fn create(&mut self) {
        self.generation += 1;
        self.id = Uuid::from_u128(self.random.random());
        let uefi = self.kind == Kind::MadeUefi;
        let request = CreateServerRequest {
            request_id: Uuid::from_u128(self.random.random()).to_string(),
            server_id: self.id.to_string(),
            name: format!("made-{}-{}", self.place, self.generation),
            image: self.kind.image().to_owned(),
            flavor: Some(Flavor {
                vcpus: 1,
                memory_mib: if uefi { 96 } else { 16 },
                disk_gib: 0,
            }),
            firmware: if uefi { Firmware::Uefi } else { Firmware::Bios }.into(),
            powered_off: self.kind == Kind::MadeTpm || self.random.random_bool(0.3),
            ..CreateServerRequest::default()
        };
        let asked = Asked {
            verb: "create",
            server: self.id,
            action: Action::Create(request),
            caller: Caller::ForProject,
        };
        self.act(asked, After::Wait).await;
        if self.kind == Kind::MadeTpm {
            self.add_tpm().await;
        }
    }

    /// The API gives no TPM, so somebody with virsh does.
    async fn add_tpm(&mut self) {
        let (libvirt, id) = (self.libvirt.clone(), self.id);
        let defined = tokio::task::spawn_blocking(move || {
            let xml = libvirt.inactive_xml(id)?;
            let tpm =
                "<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm></devices>";
            libvirt.define(&xml.replace("</devices>", tpm))
        });
        // Without libvirtd it goes without.
        let _ = defined.await;
        if let Some(server) = self.look().await {
            let asked = Asked {
                verb: Verb::AcceptDrift.name(),
                server: self.id,
                action: Verb::AcceptDrift.action(&mut self.random, &server),
                caller: Caller::Admin,
            };
            self.act(asked, After::Wait).await;
        }
    }

    async fn adopt(&mut self) {
        match self.is_defined().await {
            Some(true) => {}
            Some(false) => self.define().await,
            None => return,
        }
        let request = AdoptServerRequest {
            request_id: Uuid::from_u128(self.random.random()).to_string(),
            domain: self.id.to_string(),
            name: String::new(),
        };
        let asked = Asked {
            verb: "adopt",
            server: self.id,
            action: Action::Adopt(request),
            caller: Caller::ForProject,
        };
        self.act(asked, After::Wait).await;
    }

    /// Is there the domain of a server that was released? `None` if libvirtd is away.
    async fn is_defined(&self) -> Option<bool> {
        let (libvirt, id) = (self.libvirt.clone(), self.id);
        let listed = tokio::task::spawn_blocking(move || libvirt.list());
        let Ok(Ok(domains)) = listed.await else {
            // It is back soon.
            tokio::time::sleep(Duration::from_millis(100)).await;
            return None;
        };
        Some(domains.iter().any(|domain| domain.id == id))
    }

    /// Somebody makes a domain, with a disk and a name of its own.
    async fn define(&mut self) {
        let before = self.disk();
        self.generation += 1;
        let (libvirt, disk) = (self.libvirt.clone(), self.disk());
        let (name, deaf) = (self.name(), self.kind.is_deaf());
        let console = self.folder.join(format!("{name}.console"));
        let start = self.random.random_bool(0.7);
        let defined = tokio::task::spawn_blocking(move || {
            let _ = fs::remove_file(before);
            let mut guest = TinyGuest::new(&name);
            guest.honours_acpi = !deaf;
            guest.size_mib = 1;
            guest.build(&disk, Format::Qcow2);
            let xml = DomainXml::tiny(&name, &console)
                .disk(&disk, Format::Qcow2, "vda", "virtio", "root", Some(1))
                .xml();
            let id = libvirt.define(&xml)?;
            if start {
                let _ = libvirt.start(id);
            }
            Ok::<_, LibvirtError>(id)
        });
        // Without libvirtd it is tried again.
        if let Ok(Ok(id)) = defined.await {
            self.id = id;
        }
    }

    /// The name of an adopted server's domain.
    fn name(&self) -> String {
        format!("adopted-{}-{}", self.place, self.generation)
    }

    fn disk(&self) -> PathBuf {
        self.folder.join(format!("{}.qcow2", self.name()))
    }
}
