// SPDX-License-Identifier: Apache-2.0
//! Keeps the records' observations true: events, polls, outages. And acts where a record says that
//! something is due: a rescue that ends by itself, a password that the guest agent can be given.
//!
//! An event is only a hint: the domain is asked for its state, and that is what is recorded. Whatever
//! is missed is found by the next look at everything.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use tokio::{
    sync::{broadcast::error::RecvError, watch},
    task::JoinSet,
    time::{Instant, MissedTickBehavior},
};
use uuid::Uuid;

use crate::{
    core::{
        action::{Action, UnrescueArgs, Verb},
        reason::Reason,
        record::ServerRecord,
        state::{ObservationSource, PowerObservation, PowerState, VmState},
    },
    dispatch::{Dispatcher, Target},
    engine::now_ms,
    hypervisor::{Hypervisor, HypervisorError, HypervisorEvent, LinkState, PowerReading},
    store::{Request, Store, StoreResult},
};

/// A due action that was refused (a busy server, libvirt away) or that failed is tried again after
/// this time, and then after twice as long each time.
const TRY_AGAIN: Duration = Duration::from_secs(30);

/// The longest time between two tries.
const TRY_AGAIN_AT_MOST: Duration = Duration::from_secs(3600);

/// Who asks for the actions that fall due.
const CALLER: &str = "salvord";

/// Actions of the agent's own that were tried, each with the time before which it is not tried again.
/// What a try changes wakes the observer: without this it would try again at once, and for ever.
#[derive(Debug, Default)]
struct Tried(HashMap<(Uuid, Verb), (Instant, Duration)>);

impl Tried {
    /// When the action may be tried for a rescue (named by its plan) at the earliest.
    fn not_before(&self, rescue: Uuid, verb: Verb) -> Option<Instant> {
        self.0.get(&(rescue, verb)).map(|(at, _)| *at)
    }

    /// May it be tried now? Then it counts as tried.
    fn try_now(&mut self, rescue: Uuid, verb: Verb) -> bool {
        let now = Instant::now();
        let pause = match self.0.get(&(rescue, verb)) {
            Some((at, _)) if *at > now => return false,
            Some((_, pause)) => (*pause * 2).min(TRY_AGAIN_AT_MOST),
            None => TRY_AGAIN,
        };
        self.0.insert((rescue, verb), (now + pause, pause));
        true
    }

    /// Something changed that makes another try worth while.
    fn forget(&mut self, rescue: Uuid, verb: Verb) {
        self.0.remove(&(rescue, verb));
    }

    fn keep(&mut self, rescues: &HashSet<Uuid>) {
        self.0.retain(|(rescue, _), _| rescues.contains(rescue));
    }
}

/// What a domain is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Question {
    Power,
    GuestAgent,
}

/// Questions under way, each in a task of its own: a domain that is slow to answer holds up nobody.
#[derive(Debug, Default)]
struct Questions {
    /// Each says whether a guest agent answered.
    tasks: JoinSet<bool>,
    under_way: HashMap<tokio::task::Id, (Uuid, Question)>,
    /// To be asked once more: something happened after the question was put.
    again: HashSet<(Uuid, Question)>,
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
        let mut due = self.act_on_due(&mut tried).await;
        let mut agents = HashSet::new();
        loop {
            let at = due.unwrap_or_else(|| Instant::now() + self.resync_interval);
            tokio::select! {
                () = stopped(&mut stop) => return,
                event = events.recv() => match event {
                    Ok(HypervisorEvent::Domain { id, .. }) => self.ask(&mut questions, id, Question::Power),
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
                        self.resync(&mut questions, &tried).await;
                    }
                    Err(RecvError::Closed) => return,
                },
                _ = tick.tick() => self.resync(&mut questions, &tried).await,
                Some(ended) = questions.tasks.join_next_with_id() => {
                    let (task, answered) = ended.unwrap_or_else(|error| (error.id(), false));
                    let Some((id, question)) = questions.under_way.remove(&task) else {
                        continue;
                    };
                    if answered {
                        self.deliver_password(id, &mut tried).await;
                    }
                    if questions.again.remove(&(id, question)) {
                        match question {
                            Question::Power => self.ask(&mut questions, id, question),
                            Question::GuestAgent => self.offer_password(&mut questions, id, &tried),
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
                () = tokio::time::sleep_until(at), if due.is_some() => due = self.act_on_due(&mut tried).await,
            }
        }
    }

    /// Looks at every domain. One that is missing has no state.
    async fn resync(self: &Arc<Self>, questions: &mut Questions, tried: &Tried) {
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
        for (_, server) in self.store.servers_after(i64::MIN) {
            self.offer_password(questions, server.id, tried);
        }
    }

    /// Asks a domain; what it was asked already is asked again after the answer, which may be older
    /// than what is to be seen now.
    fn ask(self: &Arc<Self>, questions: &mut Questions, id: Uuid, question: Question) {
        if questions
            .under_way
            .values()
            .any(|asked| *asked == (id, question))
        {
            questions.again.insert((id, question));
            return;
        }
        let observer = Arc::clone(self);
        let task = questions.tasks.spawn(async move {
            match question {
                Question::Power => {
                    observer.look_at(id, ObservationSource::Event).await;
                    false
                }
                Question::GuestAgent => observer.hypervisor.ping_guest_agent(id).await.is_ok(),
            }
        });
        questions.under_way.insert(task.id(), (id, question));
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
        recorded(server.id, self.store.observe(server.id, seen).await);
    }

    /// When a rescue is to be ended next.
    fn next_due(&self, tried: &Tried) -> Option<Instant> {
        let (now, now_ms) = (Instant::now(), now_ms());
        self.store
            .servers_after(i64::MIN)
            .iter()
            .filter_map(|(_, server)| {
                let (rescue, expiry) = expiring(server)?;
                let wait = u64::try_from(expiry.saturating_sub(now_ms)).unwrap_or_default();
                let at = now + Duration::from_millis(wait);
                Some(at.max(tried.not_before(rescue, Verb::Unrescue).unwrap_or(at)))
            })
            .min()
    }

    /// Ends the rescues whose time is over; says when to look again.
    async fn act_on_due(&self, tried: &mut Tried) -> Option<Instant> {
        let now = now_ms();
        let servers = self.store.servers_after(i64::MIN);
        let rescues = servers
            .iter()
            .filter_map(|(_, server)| Some(server.rescue.as_ref()?.plan));
        tried.keep(&rescues.collect());
        for (_, server) in servers {
            let Some((plan, expiry)) = expiring(&server) else {
                continue;
            };
            let Some(rescue) = &server.rescue else {
                continue;
            };
            if expiry > now || !tried.try_now(plan, Verb::Unrescue) {
                continue;
            }
            tracing::info!(server = %server.id, "the rescue's time is over");
            let action = Action::Unrescue(UnrescueArgs {
                overlay: if rescue.overlays.is_empty() {
                    None
                } else {
                    rescue.expiry_overlay
                },
                // Nobody asked for a start: what was off before the rescue stays off.
                restore_power: true,
                shutdown: self.dispatcher.settings().shutdown,
            });
            self.act(&server, action).await;
        }
        // Clocks differ a little: a timer must not fire again and again just before the time.
        self.next_due(tried)
            .map(|due| due.max(Instant::now() + Duration::from_millis(10)))
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
            self.ask(questions, id, Question::GuestAgent);
        }
    }

    /// Hands a rescue's password to its guest agent, which has answered.
    async fn deliver_password(&self, id: Uuid, tried: &mut Tried) {
        if let Some((server, rescue)) = self.waiting(id)
            && tried.try_now(rescue, Verb::DeliverPassword)
        {
            self.act(&server, Action::DeliverPassword).await;
        }
    }

    /// Submits an action of the agent's own.
    async fn act(&self, server: &ServerRecord, action: Action) {
        let verb: Verb = action.verb();
        let request = Request {
            id: None,
            body_hash: String::new(),
            caller: CALLER.to_owned(),
        };
        let submitted = self
            .dispatcher
            .submit(Target::Server(server.id), action, request)
            .await;
        if let Err(refusal) = submitted
            && refusal.reason != Reason::ServerBusy
        {
            tracing::warn!(server = %server.id, %verb, %refusal, "an action that is due was refused");
        }
    }
}

/// The rescue that is to end by itself, and when (in milliseconds since the Unix epoch).
fn expiring(server: &ServerRecord) -> Option<(Uuid, i64)> {
    let rescue = server.rescue.as_ref()?;
    (server.vm_state == VmState::Rescued).then_some((rescue.plan, rescue.expires_at_ms?))
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
