// SPDX-License-Identifier: Apache-2.0
//! What falls due: a rescue that ends by itself, a password that the guest agent can be given, a guest that
//! is off and is to be started again. And when a try that was in vain is made again.

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
        reason::Reason,
        reconcile::Mismatch,
        record::ServerRecord,
        state::{PowerState, VmState},
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

/// Actions of the agent's own that were tried (about a rescue, by its plan, or about a server), each with the time before which it is not tried again.
/// What a try changes wakes the observer: without this it would try again at once, and for ever.
#[derive(Debug, Default)]
pub(super) struct Tried(HashMap<(Uuid, Verb), (Instant, Duration)>);

impl Tried {
    /// When the action may be tried for a rescue (named by its plan) at the earliest.
    pub(super) fn not_before(&self, rescue: Uuid, verb: Verb) -> Option<Instant> {
        self.0.get(&(rescue, verb)).map(|(at, _)| *at)
    }

    /// May it be tried now? Then it counts as tried.
    pub(super) fn try_now(&mut self, rescue: Uuid, verb: Verb) -> bool {
        let now = Instant::now();
        let pause = match self.0.get(&(rescue, verb)) {
            Some((at, _)) if *at > now => return false,
            Some((at, _)) if *at + WELL <= now => TRY_AGAIN,
            Some((_, pause)) => (*pause * 2).min(TRY_AGAIN_AT_MOST),
            None => TRY_AGAIN,
        };
        self.0.insert((rescue, verb), (now + pause, pause));
        true
    }

    /// Something changed that makes another try worth while.
    pub(super) fn forget(&mut self, rescue: Uuid, verb: Verb) {
        self.0.remove(&(rescue, verb));
    }

    fn keep(&mut self, about: &HashSet<Uuid>) {
        self.0.retain(|(id, _), _| about.contains(id));
    }
}

impl Observer {
    /// When a rescue is to be ended, or a guest to be started again, next.
    pub(super) fn next_due(&self, tried: &Tried) -> Option<Instant> {
        let (now, now_ms) = (Instant::now(), now_ms());
        let not_before =
            |about, verb, at: Instant| at.max(tried.not_before(about, verb).unwrap_or(at));
        self.store
            .servers_after(i64::MIN)
            .iter()
            .filter_map(|(_, server)| {
                if self.is_to_be_started(server) {
                    return Some(not_before(server.id, Verb::Start, now));
                }
                let (rescue, expiry) = expiring(server)?;
                let wait = u64::try_from(expiry.saturating_sub(now_ms)).unwrap_or_default();
                let at = now + Duration::from_millis(wait);
                Some(not_before(rescue, Verb::Unrescue, at))
            })
            .min()
    }

    /// Is the guest off, and is it the configuration's wish that it is then started again?
    fn is_to_be_started(&self, server: &ServerRecord) -> bool {
        let wanted = match server.mismatch.map(|mismatch| mismatch.what) {
            Some(Mismatch::Crashed) => self.policy.start_crashed,
            Some(Mismatch::StoppedByItself) => self.policy.start_stopped_by_itself,
            Some(
                Mismatch::IoError
                | Mismatch::Halted
                | Mismatch::Vanished
                | Mismatch::RunsAlthoughDeleted,
            )
            | None => false,
        };
        wanted
            && server.vm_state == VmState::Stopped
            && server.operation.is_none()
            && matches!(
                server.power.state,
                PowerState::Shutdown | PowerState::Crashed
            )
    }

    /// Ends the rescues whose time is over and starts the guests that are to be; says when to look again.
    pub(super) fn act_on_due(self: &Arc<Self>, tried: &mut Tried) -> Option<Instant> {
        let now = now_ms();
        let servers = self.store.servers_after(i64::MIN);
        let about = servers.iter().flat_map(|(_, server)| {
            let rescue = server.rescue.as_ref().map(|rescue| rescue.plan);
            [Some(server.id), rescue].into_iter().flatten()
        });
        tried.keep(&about.collect());
        for (_, server) in servers {
            if self.is_to_be_started(&server) && tried.try_now(server.id, Verb::Start) {
                tracing::warn!(server = %server.id, reason = %server.power.reason, "the guest is off by itself; it is started again");
                self.act(&server, Action::Start);
            }
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
            self.act(&server, action);
        }
        // Clocks differ a little: a timer must not fire again and again just before the time.
        self.next_due(tried)
            .map(|due| due.max(Instant::now() + Duration::from_millis(10)))
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

/// The rescue that is to end by itself, and when (in milliseconds since the Unix epoch).
fn expiring(server: &ServerRecord) -> Option<(Uuid, i64)> {
    let rescue = server.rescue.as_ref()?;
    (server.vm_state == VmState::Rescued).then_some((rescue.plan, rescue.expires_at_ms?))
}
