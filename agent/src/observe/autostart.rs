// SPDX-License-Identifier: Apache-2.0
//! After a reboot of the host: the servers that ran before come back, in their order and a few at a time,
//! by the same way in as everybody's actions.

use std::{collections::VecDeque, num::NonZeroUsize, sync::Arc, time::Duration};

use tokio::{sync::watch, task::JoinSet, time::Instant};
use uuid::Uuid;

use super::{Observer, due::CALLER, recorded, stopped};
use crate::{
    core::{
        action::Action,
        autostart::{Comeback, ComebackState, Turn, turn},
        caller::Who,
        incident::{Incident, IncidentKind, IncidentReport},
        operation::OperationState,
        reason::Reason,
        state::{ObservationSource, PowerState, VmState},
        text,
    },
    dispatch::Target,
    engine::now_ms,
    hypervisor::LinkState,
    store::Request,
};

/// A server that could not be started is tried again after this time, then after twice as long.
const TRY_AGAIN: Duration = Duration::from_secs(10);

/// So often it is tried.
const TRIES: u32 = 5;

/// What only has to wait (an operation is under way, libvirt is away) is looked at again so often.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// How servers come back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Autostart {
    /// So many are started at a time.
    pub parallel: NonZeroUsize,
    /// How long to wait before the first, once libvirt is there.
    pub delay: Duration,
}

/// What became of one look at a server.
enum Look {
    /// It is over with it.
    Done(ComebackState, String),
    /// A try was in vain.
    InVain(String),
    /// It cannot be tried now.
    Later,
}

impl Observer {
    /// Brings back what is to come back, until it is done or `stop` is true.
    pub(super) async fn bring_back(
        self: Arc<Self>,
        how: Autostart,
        mut stop: watch::Receiver<bool>,
    ) {
        tokio::select! {
            () = stopped(&mut stop) => {}
            () = self.bring_all_back(how) => {}
        }
    }

    async fn bring_all_back(self: &Arc<Self>, how: Autostart) {
        let waiting = match self.store.comebacks().await {
            Ok(all) => all
                .into_iter()
                .filter(|comeback| comeback.state == ComebackState::Waiting),
            Err(error) => {
                tracing::error!(
                    error = &error as &dyn std::error::Error,
                    "which servers are to come back cannot be read"
                );
                return;
            }
        };
        let mut next: VecDeque<Comeback> = waiting.collect();
        if next.is_empty() {
            return;
        }
        let mut link = self.hypervisor.link();
        if link.wait_for(|link| *link == LinkState::Up).await.is_err() {
            return;
        }
        tokio::time::sleep(how.delay).await;
        tracing::info!(
            servers = next.len(),
            parallel = how.parallel,
            "the host was rebooted: servers that ran before are started again"
        );
        // A task that ends with the loop leaves its action under way, which is taken up again.
        let mut tasks = JoinSet::new();
        let mut later: Vec<(Instant, Comeback)> = Vec::new();
        loop {
            while tasks.len() < how.parallel.get()
                && let Some(comeback) = next.pop_front()
            {
                let observer = Arc::clone(self);
                tasks.spawn(async move {
                    let look = observer.try_to_bring_back(&comeback).await;
                    (comeback, look)
                });
            }
            if tasks.is_empty() && later.is_empty() {
                tracing::info!("no more servers are to be started");
                return;
            }
            let again = later.iter().map(|(at, _)| *at).min();
            let at = again.unwrap_or_else(Instant::now);
            tokio::select! {
                Some(ended) = tasks.join_next() => {
                    if let Ok((comeback, look)) = ended {
                        later.extend(self.note(comeback, look).await);
                    }
                }
                () = tokio::time::sleep_until(at), if again.is_some() => {
                    let now = Instant::now();
                    later.retain(|(at, comeback)| {
                        let due = *at <= now;
                        if due {
                            next.push_back(comeback.clone());
                        }
                        !due
                    });
                }
            }
        }
    }

    /// Notes what became of a look, and says when there is to be another one.
    async fn note(&self, mut comeback: Comeback, look: Look) -> Option<(Instant, Comeback)> {
        let server = comeback.server;
        let again = match look {
            Look::Later => return Some((Instant::now() + LOOK_AGAIN, comeback)),
            Look::Done(state, message) => {
                tracing::info!(%server, %state, message, "after the host's reboot");
                (comeback.state, comeback.message) = (state, message);
                None
            }
            Look::InVain(message) => {
                let pause = TRY_AGAIN.saturating_mul(1_u32 << comeback.tries.min(10));
                comeback.tries = comeback.tries.saturating_add(1);
                comeback.message = message;
                if comeback.tries >= TRIES {
                    comeback.state = ComebackState::Failed;
                    tracing::error!(%server, message = comeback.message, tries = comeback.tries, "the server cannot be started after the host's reboot");
                    None
                } else {
                    tracing::warn!(%server, message = comeback.message, "the server could not be started after the host's reboot; it is tried again");
                    Some(Instant::now() + pause)
                }
            }
        };
        recorded(server, self.store.note_comeback(comeback.clone()).await);
        again.map(|at| (at, comeback))
    }

    /// Looks at a server as it is now, and starts it if that is what is missing.
    async fn try_to_bring_back(self: &Arc<Self>, comeback: &Comeback) -> Look {
        let id = comeback.server;
        let alone = |why: &str| Look::Done(ComebackState::LeftAlone, why.to_owned());
        let failed = |why: String| Look::Done(ComebackState::Failed, why);
        self.look_at(id, ObservationSource::Poll).await;
        let Some(server) = self.store.server(id) else {
            return alone("it is gone");
        };
        if !server.autostart {
            return alone("it is not to be started any more");
        }
        if server.operation.is_some() {
            return Look::Later;
        }
        match server.power.state {
            PowerState::Unknown => return Look::Later,
            power if power.is_on() => return alone("it runs already"),
            PowerState::NoState => return failed("libvirt has no domain of it".to_owned()),
            _ => {}
        }
        let action = match turn(comeback.was, server.vm_state) {
            Turn::Start => Action::Start,
            Turn::StartRescue => Action::StartRescue,
            Turn::Wait => return Look::Later,
            Turn::LeaveOff(why) => return alone(why),
            Turn::Fail => return failed(format!("it is {}", server.vm_state)),
        };
        let request = Request {
            id: None,
            body_hash: String::new(),
            caller: CALLER.to_owned(),
            who: Who::default(),
        };
        // A task of its own: between the journal and the engine there is no place to stop.
        let dispatcher = self.dispatcher.clone();
        let submitted =
            tokio::spawn(
                async move { dispatcher.submit(Target::Server(id), action, request).await },
            );
        let operation = match submitted.await {
            Ok(Ok(submitted)) => submitted.operation.id,
            Ok(Err(refusal)) if refusal.reason == Reason::ServerBusy => return Look::Later,
            Ok(Err(refusal)) => return Look::InVain(text::message(&refusal.message)),
            Err(_) => return Look::InVain("starting it panicked".to_owned()),
        };
        self.ended(id, operation, comeback.was).await
    }

    /// Waits until the start has ended, which it does by its steps' deadlines.
    async fn ended(self: &Arc<Self>, server: Uuid, operation: Uuid, was: VmState) -> Look {
        let mut revision = self.store.revision();
        let ended = loop {
            match self.store.operation(operation).await {
                Ok(Some(record)) if record.state.is_final() => break record,
                Ok(Some(_)) => {}
                Ok(None) => return Look::Later,
                Err(error) => return Look::InVain(text::message(&error.to_string())),
            }
            if revision.changed().await.is_err() {
                return Look::Later;
            }
        };
        if ended.state != OperationState::Done {
            let why = ended.error.map(|error| error.message);
            return Look::InVain(text::message(&why.unwrap_or_default()));
        }
        if was != VmState::Paused {
            return Look::Done(ComebackState::Started, String::new());
        }
        let now = now_ms();
        self.tell(
            server,
            IncidentReport {
                incident: Incident::new(IncidentKind::MemoryLost),
                count: 1,
                first_at_ms: now,
                last_at_ms: now,
            },
        );
        let message = "it was paused, and its memory was lost with the host".to_owned();
        Look::Done(ComebackState::Started, message)
    }
}
