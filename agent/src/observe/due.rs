// SPDX-License-Identifier: Apache-2.0
//! What falls due: a rescue that ends by itself, a lock whose time is over, a soft-deleted server that
//! nobody restored, a guest that is off and is to be started again, a password that the guest agent can be
//! given. And when a try that was in vain is made again.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use tokio::time::Instant;
use uuid::Uuid;

use super::Observer;
use crate::{
    core::{
        action::{Action, UnrescueArgs, Verb},
        caller::Who,
        reason::Reason,
        reconcile::is_to_be_started,
        record::ServerRecord,
        state::VmState,
    },
    dispatch::Target,
    engine::now_ms,
    store::Request,
};

/// A due action that was refused (a busy server, libvirt away) or that failed is tried again after
/// this time, and then after twice as long each time.
const TRY_AGAIN: Duration = Duration::from_secs(30);

/// The longest time between two tries.
const TRY_AGAIN_AT_MOST: Duration = Duration::from_secs(3600);

/// What was tried, and was well for so long after the time at which it might have been tried again, is
/// tried anew without a pause.
const WELL: Duration = Duration::from_secs(600);

/// Who asks for the actions that fall due.
pub(super) const CALLER: &str = "salvord";

/// Actions of the agent's own that were tried, by what they are about ([`Due::subject`]), each with the time
/// before which it is not tried again.
/// What a try changes wakes the observer: without this it would try again at once, and for ever.
#[derive(Debug, Default)]
pub(super) struct Tried(HashMap<(Uuid, Verb), (Instant, Duration)>);

impl Tried {
    /// When the action may be tried at the earliest.
    pub(super) fn not_before(&self, subject: Uuid, verb: Verb) -> Option<Instant> {
        self.0.get(&(subject, verb)).map(|(at, _)| *at)
    }

    /// May it be tried now? Then it counts as tried.
    pub(super) fn try_now(&mut self, subject: Uuid, verb: Verb) -> bool {
        let now = Instant::now();
        let pause = match self.0.get(&(subject, verb)) {
            Some((at, _)) if *at > now => return false,
            Some((at, _)) if *at + WELL <= now => TRY_AGAIN,
            Some((_, pause)) => (*pause * 2).min(TRY_AGAIN_AT_MOST),
            None => TRY_AGAIN,
        };
        self.0.insert((subject, verb), (now + pause, pause));
        true
    }

    /// Something changed that makes another try worth while.
    pub(super) fn forget(&mut self, subject: Uuid, verb: Verb) {
        self.0.remove(&(subject, verb));
    }

    fn keep(&mut self, subjects: &HashSet<Uuid>) {
        self.0.retain(|(subject, _), _| subjects.contains(subject));
    }
}

/// Something of a server that falls due.
struct Due {
    /// What it is about: a rescue by its plan, a server by its id, else the server and the time.
    subject: Uuid,
    /// When, in milliseconds since the Unix epoch.
    at_ms: i64,
    /// What is to be done then.
    action: Action,
}

impl Observer {
    /// When something is to be done next.
    pub(super) fn next_due(&self, tried: &Tried) -> Option<Instant> {
        let (now, now_ms) = (Instant::now(), now_ms());
        self.store
            .servers_after(i64::MIN)
            .iter()
            .flat_map(|(_, server)| self.dues(server))
            .map(|due| {
                let wait = u64::try_from(due.at_ms.saturating_sub(now_ms)).unwrap_or_default();
                let at = now + Duration::from_millis(wait);
                let verb = due.action.verb();
                at.max(tried.not_before(due.subject, verb).unwrap_or(at))
            })
            .min()
    }

    /// Does what is due; says when to look again.
    pub(super) fn act_on_due(self: &Arc<Self>, tried: &mut Tried) -> Option<Instant> {
        let now = now_ms();
        let servers = self.store.servers_after(i64::MIN);
        let subjects = servers.iter().flat_map(|(_, server)| {
            let dues = self.dues(server).into_iter().map(|due| due.subject);
            // A server that goes off again and again is what its own tries are about.
            dues.chain([server.id])
                .chain(server.rescue.as_ref().map(|rescue| rescue.plan))
        });
        tried.keep(&subjects.collect());
        for (_, server) in servers {
            for due in self.dues(&server) {
                let verb = due.action.verb();
                if due.at_ms > now || !tried.try_now(due.subject, verb) {
                    continue;
                }
                tracing::info!(server = %server.id, %verb, "due");
                self.act(&server, due.action);
            }
        }
        // Clocks differ a little: a timer must not fire again and again just before the time.
        self.next_due(tried)
            .map(|due| due.max(Instant::now() + Duration::from_millis(10)))
    }

    /// What of a server falls due, now or later: its rescue ends, its lock holds no longer, its time in
    /// which it could be restored is over.
    fn dues(&self, server: &ServerRecord) -> Vec<Due> {
        let mut dues = Vec::new();
        if let Some(rescue) = &server.rescue
            && server.vm_state == VmState::Rescued
            && let Some(at_ms) = rescue.expires_at_ms
        {
            let action = Action::Unrescue(UnrescueArgs {
                overlay: if rescue.overlays.is_empty() {
                    None
                } else {
                    rescue.expiry_overlay
                },
                // Nobody asked for a start: what was off before the rescue stays off.
                restore_power: true,
                shutdown: self.dispatcher.settings().shutdown_of(server),
            });
            dues.push(Due {
                subject: rescue.plan,
                at_ms,
                action,
            });
        }
        if let Some(at_ms) = server.lock.as_ref().and_then(|lock| lock.expires_at_ms) {
            let action = Action::Unlock { only_expired: true };
            dues.push(Due {
                subject: of_time(server.id, at_ms),
                at_ms,
                action,
            });
        }
        if let Some(deletion) = &server.deletion
            && server.vm_state == VmState::SoftDeleted
        {
            dues.push(Due {
                subject: of_time(server.id, deletion.reclaim_at_ms),
                at_ms: deletion.reclaim_at_ms,
                action: Action::ForceDelete,
            });
        }
        if is_to_be_started(server, self.policy) {
            dues.push(Due {
                subject: server.id,
                at_ms: server.power.observed_at_ms,
                action: Action::Start,
            });
        }
        dues
    }

    /// Hands a rescue's password to its guest agent, which has answered.
    pub(super) fn deliver_password(self: &Arc<Self>, id: Uuid, tried: &mut Tried) {
        if let Some((server, rescue)) = self.waiting(id)
            && tried.try_now(rescue, Verb::DeliverPassword)
        {
            self.act(&server, Action::DeliverPassword);
        }
    }

    /// Submits an action of the agent's own, and goes on meanwhile. The task is its own master: between
    /// the journal and the engine there is no place to stop.
    fn act(self: &Arc<Self>, server: &ServerRecord, action: Action) {
        let (observer, server, verb) = (Arc::clone(self), server.id, action.verb());
        let request = Request {
            id: None,
            body_hash: String::new(),
            caller: CALLER.to_owned(),
            who: Who::default(),
        };
        tokio::spawn(async move {
            // It is never closed.
            let _turn = observer.acts.acquire().await;
            let submitted = observer
                .dispatcher
                .submit(Target::Server(server), action, request)
                .await;
            if let Err(refusal) = submitted
                && refusal.reason != Reason::ServerBusy
            {
                tracing::warn!(%server, %verb, %refusal, "an action that is due was refused");
            }
        });
    }
}

/// One lock or deletion of a server: another one has another time.
fn of_time(server: Uuid, at_ms: i64) -> Uuid {
    Uuid::new_v5(&server, &at_ms.to_be_bytes())
}
