// SPDX-License-Identifier: Apache-2.0
//! Keeps the records' observations true: events, polls, outages. And acts where a record says that
//! something is due ([`due`]).
//!
//! The loop itself waits for nobody: whatever asks the hypervisor or submits an action does so in a task
//! of its own, so a domain that is slow to answer, or a list of them all, holds up no news of another.
//!
//! An event is only a hint: the domain is asked for its state, and that is what is recorded. Whatever
//! is missed is found by the next look at everything.

mod due;

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use tokio::{
    sync::{Semaphore, broadcast::error::RecvError, watch},
    task::JoinSet,
    time::{Instant, MissedTickBehavior},
};
use uuid::Uuid;

use crate::{
    core::{
        action::Verb,
        record::ServerRecord,
        state::{ObservationSource, PowerObservation, PowerState, VmState},
    },
    dispatch::Dispatcher,
    engine::now_ms,
    hypervisor::{Hypervisor, HypervisorError, HypervisorEvent, LinkState, PowerReading},
    store::Store,
};
use due::Tried;

/// So many due actions are submitted at a time. Each may wait for a domain that is slow to answer.
const ACTS: usize = 8;

/// What the hypervisor is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Question {
    /// The state of every domain.
    All,
    /// That of one.
    Power(Uuid),
    /// Does its guest agent answer?
    GuestAgent(Uuid),
}

/// Questions under way, each in a task of its own: a domain that is slow to answer holds up nobody.
#[derive(Debug, Default)]
struct Questions {
    /// Each says whether there was an answer. What it told is recorded.
    tasks: JoinSet<bool>,
    under_way: HashMap<tokio::task::Id, Question>,
    /// To be asked once more: something happened after the question was put.
    again: HashSet<Question>,
}

/// The observer.
pub struct Observer {
    store: Store,
    hypervisor: Arc<dyn Hypervisor>,
    dispatcher: Dispatcher,
    /// Everything is looked at so often, whatever events say.
    resync_interval: Duration,
    /// Who may submit an action that is due.
    acts: Arc<Semaphore>,
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
            acts: Arc::new(Semaphore::new(ACTS)),
        }
    }

    /// Observes until `stop` is true.
    pub async fn run(self, stop: watch::Receiver<bool>) {
        Arc::new(self).observe(stop).await;
    }

    async fn observe(self: Arc<Self>, mut stop: watch::Receiver<bool>) {
        let mut questions = Questions::default();
        let mut events = self.hypervisor.events();
        let mut revision = self.store.revision();
        let mut tick = tokio::time::interval(self.resync_interval.max(Duration::from_secs(1)));
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut tried = Tried::default();
        let mut due = self.act_on_due(&mut tried);
        let mut agents = HashSet::new();
        loop {
            let at = due.unwrap_or_else(|| Instant::now() + self.resync_interval);
            tokio::select! {
                () = stopped(&mut stop) => return,
                event = events.recv() => match event {
                    Ok(HypervisorEvent::Domain { id, .. }) => self.ask(&mut questions, Question::Power(id)),
                    Ok(HypervisorEvent::GuestAgent { id, connected: true }) => {
                        agents.insert(id);
                        if let Some(rescue) = self.store.server(id).and_then(|server| Some(server.rescue.as_ref()?.plan)) {
                            tried.forget(rescue, Verb::DeliverPassword);
                        }
                        self.offer_password(&mut questions, id, &tried);
                    }
                    Ok(HypervisorEvent::GuestAgent { id, connected: false }) => {
                        agents.remove(&id);
                    }
                    Ok(HypervisorEvent::Link(LinkState::Down { reason })) => self.lost(&reason).await,
                    Ok(HypervisorEvent::Link(LinkState::Up) | HypervisorEvent::Resync) | Err(RecvError::Lagged(_)) => {
                        self.ask(&mut questions, Question::All);
                    }
                    Err(RecvError::Closed) => return,
                },
                _ = tick.tick() => self.ask(&mut questions, Question::All),
                Some(ended) = questions.tasks.join_next_with_id() => {
                    let (task, answered) = ended.unwrap_or_else(|error| (error.id(), false));
                    let Some(question) = questions.under_way.remove(&task) else {
                        continue;
                    };
                    match question {
                        Question::All => {
                            for (_, server) in self.store.servers_after(i64::MIN) {
                                self.offer_password(&mut questions, server.id, &tried);
                            }
                        }
                        Question::GuestAgent(id) if answered => self.deliver_password(id, &mut tried),
                        Question::GuestAgent(_) | Question::Power(_) => {}
                    }
                    if questions.again.remove(&question) {
                        match question {
                            Question::GuestAgent(id) => self.offer_password(&mut questions, id, &tried),
                            Question::All | Question::Power(_) => self.ask(&mut questions, question),
                        }
                    }
                }
                // A rescue may have begun or ended.
                _ = revision.changed() => {
                    due = self.next_due(&tried);
                    for id in &agents {
                        self.offer_password(&mut questions, *id, &tried);
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
                        let reading = PowerReading {
                            power: domain.power,
                            reason: domain.reason,
                        };
                        self.record(
                            &server,
                            observation(Some(reading), ObservationSource::Poll, asked_at),
                        )
                        .await;
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
                Question::Power(id) => observer.look_at(id, ObservationSource::Event).await,
                Question::GuestAgent(id) => {
                    return observer.hypervisor.ping_guest_agent(id).await.is_ok();
                }
            }
            true
        });
        questions.under_way.insert(task.id(), question);
    }

    async fn look_at(&self, id: Uuid, source: ObservationSource) {
        let Some(server) = self.store.server(id) else {
            return;
        };
        let asked_at = now_ms();
        match self.hypervisor.power(id).await {
            Ok(reading) => {
                self.record(&server, observation(reading, source, asked_at))
                    .await
            }
            Err(HypervisorError::LinkDown { .. }) => {}
            Err(error) => tracing::warn!(server = %id, %error, "the domain cannot be looked at"),
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

    async fn record(&self, server: &ServerRecord, seen: PowerObservation) {
        match self.store.observe(server.id, seen).await {
            Ok(_) => {}
            Err(error) => {
                tracing::error!(server = %server.id, error = &error as &dyn std::error::Error, "an observation cannot be recorded")
            }
        }
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

/// `asked_at_ms`: when the hypervisor was asked. What it answered may be older than its answer.
fn observation(
    reading: Option<PowerReading>,
    source: ObservationSource,
    asked_at_ms: i64,
) -> PowerObservation {
    let reading = reading.unwrap_or_else(|| PowerReading {
        power: PowerState::NoState,
        reason: "no domain".to_owned(),
    });
    PowerObservation {
        state: reading.power,
        reason: reading.reason,
        observed_at_ms: asked_at_ms,
        source,
    }
}
