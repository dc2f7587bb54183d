// SPDX-License-Identifier: Apache-2.0
//! One server after the other in the same place: made or adopted, asked for this and that by chance, made
//! anew when it is gone.

use std::fs;
use std::path::PathBuf;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use rand::Rng as _;
use rand::rngs::StdRng;
use salvor_proto::google::longrunning::{
    CancelOperationRequest, Operation, WaitOperationRequest, operation,
};
use salvor_proto::v1::plan_action_request::Action;
use salvor_proto::v1::{
    AbandonOperationRequest, AdoptServerRequest, CreateServerRequest, Firmware, Flavor,
    GetServerRequest, OperationState, PlanActionRequest, Server, VmState,
};
use tokio::sync::watch;
use tonic::{Code, Status};
use tonic_types::{RpcStatusExt as _, StatusExt as _};
use uuid::Uuid;

use super::chaos::Now;
use super::reads;
use super::tally::{Ending, Tally};
use super::verbs::{Caller, Verb, submit};
use crate::client::{Client, metadata_of};
use crate::domain::DomainXml;
use crate::guests::{Format, TinyGuest};
use crate::libvirt::Libvirt;
use crate::wait::BOOT;

/// Every call is answered within this, by an agent that is there or by one that has come back.
const ANSWER: Duration = Duration::from_secs(60);

/// How long an abandoned operation gets to end in good order: longer than any restart takes.
const PATIENCE: i64 = 40;

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

    /// Asks for an action and follows it to its end.
    async fn act(&self, asked: Asked, after: After) {
        let begun = Instant::now();
        let (verb, server) = (asked.verb, asked.server);
        let accepted = self.ask(asked, begun).await;
        let (ending, what) = match accepted {
            Err(refused) => (Ending::Refused(refused), String::new()),
            Ok(operation) => {
                let name = operation.name.clone();
                let disturbed = match after {
                    After::Wait => false,
                    After::Cancel(pause) => {
                        tokio::time::sleep(pause).await;
                        self.cancel(&name).await;
                        true
                    }
                    After::Abandon(pause) => {
                        tokio::time::sleep(pause).await;
                        self.abandon(&name).await;
                        true
                    }
                };
                let ending = self.end_of(verb, server, &name, begun, disturbed).await;
                (ending, format!("{verb} of {server}, {name}"))
            }
        };
        self.tally.ended(verb, &ending, begun.elapsed(), &what);
    }

    /// Asks until there is an answer, with the same request id: what was accepted before the agent died is
    /// not done twice.
    async fn ask(&self, asked: Asked, begun: Instant) -> Result<Operation, String> {
        loop {
            let mut client = self.client.clone();
            let call = submit(&mut client, asked.action.clone(), asked.caller);
            let answer = tokio::time::timeout(ANSWER, Box::pin(call)).await;
            let Ok(answer) = answer else {
                self.tally
                    .defect(format!("{} of {}: no answer", asked.verb, asked.server));
                return Err("no answer".to_owned());
            };
            let status = match answer {
                Ok(operation) => return Ok(operation),
                Err(status) => status,
            };
            if let Some(reason) = reason_of(&status) {
                self.judge(&asked, &reason, status.message(), begun);
                return Err(reason);
            }
            if !self.is_away(&status, begun).await {
                self.tally
                    .defect(format!("{} of {}: {status:?}", asked.verb, asked.server));
                return Err("no answer".to_owned());
            }
        }
    }

    /// May the agent have refused or failed this for that reason?
    fn judge(&self, asked: &Asked, reason: &str, message: &str, begun: Instant) {
        if reason == "PERMISSION_DENIED" && asked.caller == Caller::Member {
            return;
        }
        self.judge_for(asked.verb, asked.server, reason, message, begun);
    }

    fn judge_for(&self, verb: &str, server: Uuid, reason: &str, message: &str, begun: Instant) {
        let excuse = self.tally.excuse(begun, server);
        let fine = match reason {
            // The table of admission, and what follows from the server's state.
            "INVALID_STATE"
            | "SERVER_BUSY"
            | "SERVER_LOCKED"
            | "ALREADY_RESCUED"
            | "NOT_RESCUED"
            | "OVERLAY_DECISION_NEEDED"
            | "NO_OVERLAYS"
            | "COMMIT_STARTED"
            | "SAVED_MEMORY"
            | "NO_SAVED_MEMORY"
            | "NOT_ADOPTED"
            | "NOT_CANCELLABLE"
            | "GUEST_AGENT_UNAVAILABLE"
            | "GUEST_NOT_RUNNING"
            | "NO_SCREEN"
            | "CONSOLE_BUSY"
            | "GUEST_STILL_ON" => true,
            "SERVER_NOT_FOUND" => self.going,
            "LIBVIRT_UNAVAILABLE" => excuse.libvirtd || excuse.agent,
            "DRAINING" => excuse.agent,
            "LIBVIRT_REFUSED" => excuse.libvirtd || excuse.guest,
            _ => false,
        };
        if !fine {
            self.tally.defect(format!(
                "{verb} of {server}: {reason} ({excuse:?}): {message}"
            ));
        }
    }

    /// Waits for the end of an operation; `may_stop`: somebody asked for it to be cancelled.
    async fn end_of(
        &self,
        verb: &str,
        server: Uuid,
        name: &str,
        begun: Instant,
        may_stop: bool,
    ) -> Ending {
        let stuck = Instant::now() + BOOT;
        loop {
            let request = WaitOperationRequest {
                name: name.to_owned(),
                timeout: Some(seconds(5)),
            };
            let mut operations = self.client.operations.clone();
            let answer = operations.wait_operation(request).await;
            let operation = match answer {
                Ok(answer) => answer.into_inner(),
                Err(status) if reason_of(&status).is_none_or(|reason| reason == "DRAINING") => {
                    if self.is_away(&status, Instant::now()).await && Instant::now() < stuck {
                        continue;
                    }
                    self.tally
                        .defect(format!("the end of {verb}, {name}: {status:?}"));
                    return Ending::Failed("no answer".to_owned());
                }
                Err(status) => {
                    self.tally
                        .defect(format!("the end of {verb}, {name}: {status:?}"));
                    return Ending::Failed("no answer".to_owned());
                }
            };
            if operation.done {
                return self.judge_end(verb, server, &operation, begun, may_stop);
            }
            if Instant::now() >= stuck {
                let how = brief(&operation);
                self.tally
                    .defect(format!("{verb} of {server} is stuck: {how}"));
                return Ending::Failed("stuck".to_owned());
            }
        }
    }

    fn judge_end(
        &self,
        verb: &str,
        server: Uuid,
        operation: &Operation,
        begun: Instant,
        may_stop: bool,
    ) -> Ending {
        let metadata = metadata_of(operation);
        let Some(operation::Result::Error(error)) = &operation.result else {
            return Ending::Done;
        };
        let status = tonic_types::pb::Status {
            code: error.code,
            message: error.message.clone(),
            details: error.details.clone(),
        };
        let reason = status
            .get_details_error_info()
            .map_or_else(|| "no reason".to_owned(), |info| info.reason);
        if metadata.state() == OperationState::Cancelled {
            // By us, or by another verb that overtook it.
            if !metadata.cancel_requested {
                self.tally.defect(format!(
                    "{verb} of {server} cancelled itself: {metadata:#?}"
                ));
            }
            return Ending::Cancelled;
        }
        let about = format!("{} [{}]", error.message, brief(operation));
        if !(may_stop && reason == "CANCELLED") {
            self.judge_for(verb, server, &reason, &about, begun);
        }
        Ending::Failed(reason)
    }

    async fn cancel(&self, name: &str) {
        let begun = Instant::now();
        let request = CancelOperationRequest {
            name: name.to_owned(),
        };
        loop {
            let mut operations = self.client.operations.clone();
            let answer = operations.cancel_operation(request.clone()).await;
            if self.answer_to("operation cancel", answer, begun).await {
                return;
            }
        }
    }

    async fn abandon(&self, name: &str) {
        let begun = Instant::now();
        let request = AbandonOperationRequest {
            name: name.to_owned(),
            patience: Some(seconds(PATIENCE)),
        };
        loop {
            let mut servers = self.client.servers.clone();
            let answer = servers.abandon_operation(request.clone()).await;
            if self.answer_to("operation abandon", answer, begun).await {
                return;
            }
        }
    }

    /// Counts an answer of the agent's; `false` if nobody has heard the call.
    pub(super) async fn answer_to<T>(
        &self,
        what: &'static str,
        answer: Result<T, Status>,
        begun: Instant,
    ) -> bool {
        let ending = match answer {
            Ok(_) => Ending::Done,
            Err(status) => {
                if !self.answered(what, &status, begun).await {
                    return false;
                }
                Ending::Refused(reason_of(&status).unwrap_or_default())
            }
        };
        self.tally.ended(what, &ending, begun.elapsed(), what);
        true
    }

    /// Was that an answer of the agent's, or has nobody heard the call?
    async fn answered(&self, what: &str, status: &Status, begun: Instant) -> bool {
        if let Some(reason) = reason_of(status) {
            self.judge_for(what, self.id, &reason, status.message(), begun);
            return true;
        }
        if self.is_away(status, begun).await {
            return false;
        }
        self.tally
            .defect(format!("{what} at {}: {status:?}", self.id));
        true
    }

    /// Did nobody hear the call, or die over it? Then it is worth asking again, until it takes too long.
    async fn is_away(&self, status: &Status, begun: Instant) -> bool {
        let broken = matches!(
            status.code(),
            Code::Unavailable | Code::Unknown | Code::Cancelled | Code::Internal
        );
        if !broken || begun.elapsed() > ANSWER || !self.tally.excuse(begun, self.id).agent {
            return false;
        }
        // A socket that nobody listens at refuses at once.
        tokio::time::sleep(Duration::from_millis(20)).await;
        true
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
            Ok::<_, crate::libvirt::LibvirtError>(id)
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

/// What is asked for.
struct Asked {
    verb: &'static str,
    server: Uuid,
    action: Action,
    caller: Caller,
}

/// What is done once an action was accepted.
#[derive(Debug, Clone, Copy)]
enum After {
    /// Its end is waited for.
    Wait,
    /// It is cancelled after a while.
    Cancel(Duration),
    /// It is abandoned after a while.
    Abandon(Duration),
}

/// An operation in a line.
pub(super) fn brief(operation: &Operation) -> String {
    let metadata = metadata_of(operation);
    let steps: Vec<String> = metadata
        .steps
        .iter()
        .map(|step| format!("{} {:?} {}", step.kind, step.state(), step.message))
        .collect();
    format!(
        "{} {} {:?}, taken up {} times: {}",
        operation.name,
        metadata.action,
        metadata.state(),
        metadata.recoveries,
        steps.join("; ")
    )
}

/// The agent's reason, if the answer is the agent's.
pub(super) fn reason_of(status: &Status) -> Option<String> {
    let details = status.get_error_details();
    Some(details.error_info()?.reason.clone())
}

fn seconds(seconds: i64) -> prost_types::Duration {
    prost_types::Duration { seconds, nanos: 0 }
}
