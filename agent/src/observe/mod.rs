// SPDX-License-Identifier: Apache-2.0
//! Keeps the records' observations true: events, polls, outages. And acts where a record says that
//! something is due ([`due`]).
//!
//! The loop itself waits for nobody: whatever asks the hypervisor or submits an action does so in a task
//! of its own, so a domain that is slow to answer, or a list of them all, holds up no news of another.
//!
//! An event is only a hint: the domain is asked for its state, and that is what is recorded. Whatever
//! is missed is found by the next look at everything.

mod autostart;
mod due;

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use salvor_domain_templates::Domain;
use tokio::{
    sync::{Semaphore, broadcast::error::RecvError, watch},
    task::JoinSet,
    time::{Instant, MissedTickBehavior},
};
use uuid::Uuid;

use crate::core::reconcile::{News, Policy, respond};
use crate::{
    core::{
        action::Verb,
        devices::{may_follow, own_devices},
        incident::{IncidentReport, Incidents},
        reconcile::{IO_ERROR, NO_DOMAIN, Seen, needs_saved_memory, too_early},
        record::ServerRecord,
        state::{ObservationSource, PowerObservation, PowerState, VmState},
        text,
    },
    dispatch::Dispatcher,
    engine::now_ms,
    hypervisor::{
        DEFINED, Definition, Hypervisor, HypervisorError, HypervisorEvent, LinkState, PowerReading,
        UNDEFINED,
    },
    store::{Store, StoreResult},
};

pub use autostart::Autostart;
use due::Tried;

/// So many due actions are submitted at a time. Each may wait for a domain that is slow to answer.
const ACTS: usize = 8;

/// So many definitions are read at a time, when all are.
const READS: usize = 4;

/// So many definitions are read with each look at everything, in turn: libvirt tells of what is defined
/// anew, but not of a device that is attached to a definition (`virsh attach-device --config`). More at a
/// time would make an idle host busy.
const IN_TURN: usize = 8;

/// What the hypervisor is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Question {
    /// The state of every domain.
    All,
    /// That of one.
    Power(Uuid),
    /// What devices has its definition?
    Definition(Uuid),
    /// Does its guest agent answer?
    GuestAgent(Uuid),
}

/// Questions under way, each in a task of its own: a domain that is slow to answer holds up nobody.
#[derive(Debug, Default)]
struct Questions {
    /// Each says whether the answer is good for what it was put for. What it told is recorded.
    tasks: JoinSet<bool>,
    under_way: HashMap<tokio::task::Id, Question>,
    /// To be asked once more: something happened after the question was put.
    again: HashSet<Question>,
    /// Looked at while an operation was under way, from which nothing may be concluded: to be looked at
    /// after it.
    unsettled: HashSet<Uuid>,
}

/// An observation that is lost is made again.
fn recorded<T>(server: Uuid, outcome: StoreResult<T>) {
    if let Err(error) = outcome {
        tracing::error!(%server, error = &error as &dyn std::error::Error, "an observation cannot be recorded");
    }
}

/// The observer.
pub struct Observer {
    store: Store,
    hypervisor: Arc<dyn Hypervisor>,
    dispatcher: Dispatcher,
    /// Everything is looked at so often, whatever events say.
    resync_interval: Duration,
    policy: Policy,
    autostart: Option<Autostart>,
    /// Who may submit an action that is due.
    acts: Arc<Semaphore>,
    /// Who may read a definition.
    reads: Arc<Semaphore>,
}

impl Observer {
    /// An observer that looks at everything at least every `resync_interval`.
    #[must_use]
    pub fn new(
        store: Store,
        hypervisor: Arc<dyn Hypervisor>,
        dispatcher: Dispatcher,
        resync_interval: Duration,
    ) -> Self {
        Self {
            store,
            hypervisor,
            dispatcher,
            resync_interval,
            policy: Policy::default(),
            autostart: None,
            acts: Arc::new(Semaphore::new(ACTS)),
            reads: Arc::new(Semaphore::new(READS)),
        }
    }

    /// The same with another policy than that of recording and doing nothing.
    #[must_use]
    pub fn with_policy(self, policy: Policy) -> Self {
        Self { policy, ..self }
    }

    /// The same, and servers that are to come back ([`Store::note_boot`]) do.
    #[must_use]
    pub fn with_autostart(self, autostart: Autostart) -> Self {
        Self {
            autostart: Some(autostart),
            ..self
        }
    }

    /// Observes until `stop` is true.
    pub async fn run(self, stop: watch::Receiver<bool>) {
        Arc::new(self).observe(stop).await;
    }

    async fn observe(self: Arc<Self>, mut stop: watch::Receiver<bool>) {
        if let Some(how) = self.autostart {
            tokio::spawn(Arc::clone(&self).bring_back(how, stop.clone()));
        }
        let mut questions = Questions::default();
        let mut events = self.hypervisor.events();
        let mut revision = self.store.revision();
        let mut tick = tokio::time::interval(self.resync_interval.max(Duration::from_secs(1)));
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut tried = Tried::default();
        let mut due = self.act_on_due(&mut tried);
        let mut agents = HashSet::new();
        // Domains whose definitions are to be read as soon as that makes sense.
        let mut defined = HashSet::new();
        defined.extend(self.servers());
        self.look_at_defined(&mut questions, &mut defined);
        // Whose definition was read last of those that are read in turn.
        let mut turn = i64::MIN;
        let mut incidents = Incidents::default();
        loop {
            let at = due.unwrap_or_else(|| Instant::now() + self.resync_interval);
            let tell = incidents.next();
            let tell_at = tell.map_or(at, Instant::from_std);
            tokio::select! {
                () = stopped(&mut stop) => return,
                event = events.recv() => match event {
                    Ok(
                        event @ (HypervisorEvent::Domain { .. }
                        | HypervisorEvent::GuestAgent { .. }
                        | HypervisorEvent::Guest { .. }
                        | HypervisorEvent::BlockJob { .. }
                        | HypervisorEvent::DeviceRemoved { .. }
                        | HypervisorEvent::Balloon { .. }),
                    ) => {
                        let Some((id, news)) = self.hear(&mut questions, event) else {
                            continue;
                        };
                        let server = self.store.server(id);
                        if let News::Agent { connected } = news {
                            if connected {
                                agents.insert(id);
                            } else {
                                agents.remove(&id);
                            }
                        }
                        let response = respond(server.as_deref(), news);
                        if let Some(connected) = response.agent {
                            self.note_agent(id, connected);
                        }
                        if let Some(incident) = response.incident
                            && let Some(report) = incidents.happened(id, incident, Instant::now().into_std(), now_ms())
                        {
                            self.tell(id, report);
                        }
                        if response.read_definition {
                            defined.insert(id);
                            self.look_at_defined(&mut questions, &mut defined);
                        }
                        if response.ask_agent {
                            if let Some(rescue) = server.and_then(|server| Some(server.rescue.as_ref()?.plan)) {
                                tried.forget(rescue, Verb::DeliverPassword);
                            }
                            self.offer_password(&mut questions, id, &tried);
                        }
                    }
                    Ok(HypervisorEvent::Link(LinkState::Down { reason })) => self.lost(&reason).await,
                    Ok(HypervisorEvent::Link(LinkState::Up) | HypervisorEvent::Resync) | Err(RecvError::Lagged(_)) => {
                        self.ask(&mut questions, Question::All);
                        // Events may have been missed: every definition may be another.
                        defined.extend(self.servers());
                        self.look_at_defined(&mut questions, &mut defined);
                    }
                    Err(RecvError::Closed) => return,
                },
                _ = tick.tick() => {
                    self.ask(&mut questions, Question::All);
                    defined.extend(self.next_in_turn(&mut turn));
                    self.look_at_defined(&mut questions, &mut defined);
                }
                Some(ended) = questions.tasks.join_next_with_id() => {
                    let (task, answered) = ended.unwrap_or_else(|error| (error.id(), false));
                    let Some(question) = questions.under_way.remove(&task) else {
                        continue;
                    };
                    match question {
                        Question::All => {
                            for (_, server) in self.store.servers_after(i64::MIN) {
                                self.offer_password(&mut questions, server.id, &tried);
                                if lacks_disk_errors(&server) {
                                    self.ask(&mut questions, Question::Power(server.id));
                                }
                            }
                        }
                        Question::GuestAgent(id) if answered => self.deliver_password(id, &mut tried),
                        Question::Power(id) if !answered && self.is_busy(id) => {
                            questions.unsettled.insert(id);
                        }
                        Question::Power(_) if !answered => self.ask(&mut questions, question),
                        Question::GuestAgent(_) | Question::Power(_) | Question::Definition(_) => {}
                    }
                    if questions.again.remove(&question) {
                        match question {
                            Question::GuestAgent(id) => self.offer_password(&mut questions, id, &tried),
                            Question::All | Question::Power(_) | Question::Definition(_) => {
                                self.ask(&mut questions, question);
                            }
                        }
                    }
                }
                // An operation or a rescue may have begun or ended.
                _ = revision.changed() => {
                    self.look_at_defined(&mut questions, &mut defined);
                    let ended = questions.unsettled.extract_if(|id| !self.is_busy(*id));
                    for id in ended.collect::<Vec<_>>() {
                        self.ask(&mut questions, Question::Power(id));
                    }
                    due = self.next_due(&tried);
                    for id in &agents {
                        self.offer_password(&mut questions, *id, &tried);
                    }
                }
                () = tokio::time::sleep_until(tell_at), if tell.is_some() => {
                    for (id, report) in incidents.due(Instant::now().into_std()) {
                        self.tell(id, report);
                    }
                }
                () = tokio::time::sleep_until(at), if due.is_some() => due = self.act_on_due(&mut tried),
            }
        }
    }

    /// Looks at every domain. One that is missing has no state.
    async fn look_at_all(&self) {
        let asked_at = now_ms();
        match self.hypervisor.domains().await {
            Ok(domains) => {
                let seen: HashSet<Uuid> = domains.iter().map(|domain| domain.id).collect();
                for domain in domains {
                    if let Some(server) = self.store.server(domain.id) {
                        if server.domain_name != domain.name {
                            let name = domain.name.clone();
                            let named = self.store.observe_name(server.id, name, asked_at).await;
                            recorded(server.id, named);
                        }
                        let reading = PowerReading {
                            power: domain.power,
                            reason: domain.reason,
                        };
                        let seen = Seen {
                            power: observation(Some(reading), ObservationSource::Poll, asked_at),
                            saved_memory: Some(domain.managed_save),
                        };
                        self.record(&server, seen).await;
                    }
                }
                for (_, server) in self.store.servers_after(i64::MIN) {
                    if !seen.contains(&server.id) {
                        self.record(
                            &server,
                            observation(None, ObservationSource::Poll, asked_at),
                        )
                        .await;
                    }
                }
            }
            Err(HypervisorError::LinkDown { reason }) => self.lost(&reason).await,
            Err(error) => tracing::warn!(%error, "the domains cannot be listed"),
        }
    }

    /// Asks; what is being asked already is asked again after the answer, which may be older than what
    /// is to be seen now.
    fn ask(self: &Arc<Self>, questions: &mut Questions, question: Question) {
        if questions.under_way.values().any(|asked| *asked == question) {
            questions.again.insert(question);
            return;
        }
        let observer = Arc::clone(self);
        let task = questions.tasks.spawn(async move {
            match question {
                Question::All => observer.look_at_all().await,
                Question::Power(id) => {
                    return observer.look_at(id, ObservationSource::Event).await;
                }
                Question::Definition(id) => observer.look_at_definition(id).await,
                Question::GuestAgent(id) => {
                    return observer.hypervisor.ping_guest_agent(id).await.is_ok();
                }
            }
            true
        });
        questions.under_way.insert(task.id(), question);
    }

    /// Looks at a domain. `false`: an operation is under way, or has ended meanwhile, so that nothing could be
    /// concluded from what was seen.
    async fn look_at(&self, id: Uuid, source: ObservationSource) -> bool {
        let Some(server) = self.store.server(id) else {
            return true;
        };
        if let Some(left) = too_early(&server, now_ms()) {
            tokio::time::sleep(Duration::from_millis(left)).await;
        }
        let asked_at = now_ms();
        match self.hypervisor.power(id).await {
            Ok(reading) => {
                let seen = self
                    .in_detail(&server, observation(reading, source, asked_at))
                    .await;
                self.record(&server, seen).await;
            }
            Err(HypervisorError::LinkDown { .. }) => {}
            Err(error) => tracing::warn!(server = %id, %error, "the domain cannot be looked at"),
        }
        self.store.server(id).is_none_or(|server| {
            server.operation.is_none() && too_early(&server, asked_at).is_none()
        })
    }

    /// What a look at the power alone does not show: whether memory was saved of a guest that is off, and
    /// which disk failed of one that is paused for that.
    async fn in_detail(&self, server: &ServerRecord, mut power: PowerObservation) -> Seen {
        let id = server.id;
        if needs_saved_memory(server, power.state, &power.reason) {
            return match self.hypervisor.domain(id).await {
                Ok(Some(status)) if status.power == power.state => Seen {
                    power,
                    saved_memory: Some(status.managed_save),
                },
                // It is something else by now, which an event tells; or it cannot be asked.
                Ok(_) | Err(_) => power.into(),
            };
        }
        if power.state == PowerState::Paused && power.reason == IO_ERROR {
            // First of all that it is paused is known: this one asks a QEMU that may hang.
            self.record(server, power.clone()).await;
            match self.hypervisor.disk_errors(id).await {
                Ok(errors) => {
                    let errors = errors
                        .iter()
                        .map(|failed| format!("{} on {}", failed.error, text::echo(&failed.disk)));
                    let errors = errors.collect::<Vec<_>>().join(", ");
                    if !errors.is_empty() {
                        power.reason = format!("{IO_ERROR}: {errors}");
                    }
                }
                Err(error) => {
                    tracing::warn!(server = %id, %error, "which disk failed cannot be told")
                }
            }
        }
        power.into()
    }

    /// What an event says besides that a domain's power is to be looked at, which is begun.
    fn hear(
        self: &Arc<Self>,
        questions: &mut Questions,
        event: HypervisorEvent,
    ) -> Option<(Uuid, News)> {
        match event {
            HypervisorEvent::Domain { id, what } => {
                self.ask(questions, Question::Power(id));
                (what == DEFINED || what == UNDEFINED).then_some((id, News::Definition))
            }
            HypervisorEvent::GuestAgent { id, connected } => Some((id, News::Agent { connected })),
            HypervisorEvent::Guest { id, incident } => Some((id, News::Happened(incident))),
            HypervisorEvent::BlockJob { id, disk, state } => {
                Some((id, News::BlockJob { disk, state }))
            }
            HypervisorEvent::DeviceRemoved { id, device } => {
                Some((id, News::DeviceRemoved { device }))
            }
            HypervisorEvent::Balloon { id, memory_kib } => Some((id, News::Balloon { memory_kib })),
            HypervisorEvent::Link(_) | HypervisorEvent::Resync => None,
        }
    }

    /// Records that a guest agent is there, or gone. In a task of its own: the store may be slow.
    fn note_agent(self: &Arc<Self>, id: Uuid, connected: bool) {
        if connected {
            self.dispatcher.agent_connected(id);
        }
        let (observer, at) = (Arc::clone(self), now_ms());
        tokio::spawn(async move {
            recorded(id, observer.store.observe_agent(id, connected, at).await);
        });
    }

    /// Tells the watchers of an incident. In a task of its own: the store may be slow.
    fn tell(self: &Arc<Self>, id: Uuid, report: IncidentReport) {
        let observer = Arc::clone(self);
        tracing::info!(server = %id, kind = %report.incident.kind, device = report.incident.device, reason = report.incident.reason, count = report.count, "something happened to a guest");
        tokio::spawn(async move { recorded(id, observer.store.tell(id, report).await) });
    }

    fn servers(&self) -> impl Iterator<Item = Uuid> {
        let servers = self.store.servers_after(i64::MIN);
        servers.into_iter().map(|(_, server)| server.id)
    }

    /// The servers whose turn it is, beginning after the one with the number `turn`.
    fn next_in_turn(&self, turn: &mut i64) -> Vec<Uuid> {
        let mut next = self.store.servers_after(*turn);
        if next.is_empty() {
            next = self.store.servers_after(i64::MIN);
        }
        next.truncate(IN_TURN);
        if let Some((last, _)) = next.last() {
            *turn = *last;
        }
        next.into_iter().map(|(_, server)| server.id).collect()
    }

    /// Asks for the definitions that were changed. While an operation or a rescue is in force the
    /// definition is its business, and is looked at after it.
    fn look_at_defined(self: &Arc<Self>, questions: &mut Questions, defined: &mut HashSet<Uuid>) {
        defined.retain(|id| match self.store.server(*id) {
            None => false,
            Some(server) if !may_follow(&server) => true,
            Some(_) => {
                self.ask(questions, Question::Definition(*id));
                false
            }
        });
    }

    fn is_busy(&self, id: Uuid) -> bool {
        let server = self.store.server(id);
        server.is_some_and(|server| server.operation.is_some())
    }

    /// Has the record show what the definition has, and whether it is still the server's own, unless that is an operation's or a rescue's business.
    async fn look_at_definition(&self, id: Uuid) {
        if !self
            .store
            .server(id)
            .is_some_and(|server| may_follow(&server))
        {
            return;
        }
        // It is never closed.
        let _turn = self.reads.acquire().await;
        self.look_at_channel(id).await;
        let asked_at = now_ms();
        let seen = match self.hypervisor.domain_xml(id, Definition::Inactive).await {
            Ok(xml) => own_devices(&xml).map(|devices| Some((xml, devices))),
            // Somebody undefined it, and its guest may go on.
            Err(HypervisorError::NoDomain { .. }) => Some(None),
            Err(HypervisorError::LinkDown { .. }) => None,
            Err(error) => {
                tracing::warn!(server = %id, %error, "the definition cannot be looked at");
                None
            }
        };
        let Some(seen) = seen else { return };
        recorded(id, self.store.observe_definition(id, seen, asked_at).await);
    }

    /// Is the guest agent connected? Events tell when that changes; this is for those that were missed.
    async fn look_at_channel(&self, id: Uuid) {
        let server = self.store.server(id);
        if !server.is_some_and(|server| server.guest_agent && server.power.state.is_on()) {
            return;
        }
        let asked_at = now_ms();
        let Ok(live) = self.hypervisor.domain_xml(id, Definition::Live).await else {
            return;
        };
        let connected = Domain::parse(&live)
            .ok()
            .and_then(|domain| domain.guest_agent_connected());
        if let Some(connected) = connected {
            recorded(id, self.store.observe_agent(id, connected, asked_at).await);
        }
    }

    /// The link is lost: nothing is known of any server until it is back.
    async fn lost(&self, reason: &str) {
        for (_, server) in self.store.servers_after(i64::MIN) {
            let unknown = PowerObservation {
                state: PowerState::Unknown,
                reason: reason.to_owned(),
                observed_at_ms: now_ms(),
                source: ObservationSource::Inferred,
            };
            self.record(&server, unknown).await;
        }
    }

    async fn record(&self, server: &ServerRecord, seen: impl Into<Seen>) {
        recorded(server.id, self.store.observe(server.id, seen).await);
    }

    /// A server whose rescue's password waits for the guest agent, with the rescue's plan.
    fn waiting(&self, id: Uuid) -> Option<(Arc<ServerRecord>, Uuid)> {
        let server = self.store.server(id)?;
        let rescue = server.rescue.as_ref()?.plan;
        waits_for_agent(&server).then_some((server, rescue))
    }

    /// Asks whether the guest agent answers, if a password waits for it.
    fn offer_password(self: &Arc<Self>, questions: &mut Questions, id: Uuid, tried: &Tried) {
        if let Some((_, rescue)) = self.waiting(id)
            && tried
                .not_before(rescue, Verb::DeliverPassword)
                .is_none_or(|at| at <= Instant::now())
        {
            self.ask(questions, Question::GuestAgent(id));
        }
    }
}

async fn stopped(stop: &mut watch::Receiver<bool>) {
    // If nobody can ask for a stop any more, the agent is ending anyway.
    let _ = stop.wait_for(|stop| *stop).await;
}

fn waits_for_agent(server: &ServerRecord) -> bool {
    server.vm_state == VmState::Rescued
        && server.operation.is_none()
        && server
            .rescue
            .as_ref()
            .is_some_and(|rescue| rescue.password_for_agent.is_some())
        && server.power.state == PowerState::Running
}

/// Is it known that a disk failed, and not which?
fn lacks_disk_errors(server: &ServerRecord) -> bool {
    server.power.state == PowerState::Paused && server.power.reason == IO_ERROR
}

/// `asked_at_ms`: when the hypervisor was asked. What it answered may be older than its answer.
fn observation(
    reading: Option<PowerReading>,
    source: ObservationSource,
    asked_at_ms: i64,
) -> PowerObservation {
    let reading = reading.unwrap_or_else(|| PowerReading {
        power: PowerState::NoState,
        reason: NO_DOMAIN.to_owned(),
    });
    PowerObservation {
        state: reading.power,
        reason: reading.reason,
        observed_at_ms: asked_at_ms,
        source,
    }
}
