// SPDX-License-Identifier: Apache-2.0
//! Keeps the records' observations true: events, polls, outages. And acts where a record says that
//! something is due: a rescue that ends by itself, a password that the guest agent can be given.
//!
//! An event is only a hint: the domain is asked for its state, and that is what is recorded. Whatever
//! is missed is found by the next look at everything.

use std::{collections::HashSet, sync::Arc, time::Duration};

use tokio::{
    sync::{broadcast::error::RecvError, watch},
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
    hypervisor::{DomainStatus, Hypervisor, HypervisorError, HypervisorEvent, LinkState},
    store::{Request, Store},
};

/// A due action that was refused (a busy server, libvirt away) is tried again after this time.
const TRY_AGAIN: Duration = Duration::from_secs(30);

/// Who asks for the actions that fall due.
const CALLER: &str = "salvord";

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
    pub async fn run(self, mut stop: watch::Receiver<bool>) {
        let mut events = self.hypervisor.events();
        let mut revision = self.store.revision();
        let mut tick = tokio::time::interval(self.resync_interval.max(Duration::from_secs(1)));
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut due = self.act_on_due().await;
        let mut agents = HashSet::new();
        loop {
            let at = due.unwrap_or_else(|| Instant::now() + self.resync_interval);
            tokio::select! {
                () = stopped(&mut stop) => return,
                event = events.recv() => match event {
                    Ok(HypervisorEvent::Domain { id, .. }) => self.look_at(id, ObservationSource::Event).await,
                    Ok(HypervisorEvent::GuestAgent { id, connected: true }) => {
                        agents.insert(id);
                        self.deliver_password(id).await;
                    }
                    Ok(HypervisorEvent::GuestAgent { id, connected: false }) => {
                        agents.remove(&id);
                    }
                    Ok(HypervisorEvent::Link(LinkState::Down { reason })) => self.lost(&reason).await,
                    Ok(HypervisorEvent::Link(LinkState::Up) | HypervisorEvent::Resync) | Err(RecvError::Lagged(_)) => {
                        self.resync().await;
                    }
                    Err(RecvError::Closed) => return,
                },
                _ = tick.tick() => self.resync().await,
                // A rescue may have begun or ended.
                _ = revision.changed() => {
                    due = self.next_due();
                    for id in &agents {
                        self.deliver_password(*id).await;
                    }
                }
                () = tokio::time::sleep_until(at), if due.is_some() => due = self.act_on_due().await,
            }
        }
    }

    /// Looks at every domain. One that is missing has no state.
    async fn resync(&self) {
        let asked_at = now_ms();
        match self.hypervisor.domains().await {
            Ok(domains) => {
                let seen: HashSet<Uuid> = domains.iter().map(|domain| domain.id).collect();
                for domain in domains {
                    if let Some(server) = self.store.server(domain.id) {
                        self.record(
                            &server,
                            observation(Some(&domain), ObservationSource::Poll, asked_at),
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
            if waits_for_agent(&server) {
                self.deliver_password(server.id).await;
            }
        }
    }

    async fn look_at(&self, id: Uuid, source: ObservationSource) {
        let Some(server) = self.store.server(id) else {
            return;
        };
        let asked_at = now_ms();
        match self.hypervisor.domain(id).await {
            Ok(status) => {
                self.record(&server, observation(status.as_ref(), source, asked_at))
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

    /// When the next rescue ends by itself.
    fn next_due(&self) -> Option<Instant> {
        let now = now_ms();
        let expiry = |server: &ServerRecord| {
            server
                .rescue
                .as_ref()
                .and_then(|rescue| rescue.expires_at_ms)
        };
        let first = self
            .store
            .servers_after(i64::MIN)
            .iter()
            .filter_map(|(_, server)| expiry(server))
            .min()?;
        let wait = u64::try_from(first.saturating_sub(now)).unwrap_or_default();
        Some(Instant::now() + Duration::from_millis(wait))
    }

    /// Ends the rescues whose time is over; says when to look again.
    async fn act_on_due(&self) -> Option<Instant> {
        let now = now_ms();
        let mut again = false;
        for (_, server) in self.store.servers_after(i64::MIN) {
            let Some(rescue) = &server.rescue else {
                continue;
            };
            if server.vm_state != VmState::Rescued
                || rescue.expires_at_ms.is_none_or(|expiry| expiry > now)
            {
                continue;
            }
            tracing::info!(server = %server.id, "the rescue's time is over");
            let action = Action::Unrescue(UnrescueArgs {
                overlay: if rescue.overlays.is_empty() {
                    None
                } else {
                    rescue.expiry_overlay
                },
                restore_power: false,
                shutdown: self.dispatcher.settings().shutdown,
            });
            again |= !self.act(&server, action).await;
        }
        if again {
            Some(Instant::now() + TRY_AGAIN)
        } else {
            self.next_due()
                .map(|due| due.max(Instant::now() + Duration::from_secs(1)))
        }
    }

    /// Hands a rescue's password to its guest agent, if it waits for that and answers.
    async fn deliver_password(&self, id: Uuid) {
        let Some(server) = self
            .store
            .server(id)
            .filter(|server| waits_for_agent(server))
        else {
            return;
        };
        if self.hypervisor.ping_guest_agent(id).await.is_ok() {
            self.act(&server, Action::DeliverPassword).await;
        }
    }

    /// Submits an action of the agent's own; says whether it was accepted.
    async fn act(&self, server: &ServerRecord, action: Action) -> bool {
        let verb: Verb = action.verb();
        let request = Request {
            id: None,
            body_hash: String::new(),
            caller: CALLER.to_owned(),
        };
        match self
            .dispatcher
            .submit(Target::Server(server.id), action, request)
            .await
        {
            Ok(_) => true,
            Err(refusal) => {
                if refusal.reason != Reason::ServerBusy {
                    tracing::warn!(server = %server.id, %verb, %refusal, "an action that is due was refused");
                }
                false
            }
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
    status: Option<&DomainStatus>,
    source: ObservationSource,
    asked_at_ms: i64,
) -> PowerObservation {
    PowerObservation {
        state: status.map_or(PowerState::NoState, |status| status.power),
        reason: status.map_or_else(|| "no domain".to_owned(), |status| status.reason.clone()),
        observed_at_ms: asked_at_ms,
        source,
    }
}
