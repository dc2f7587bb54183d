// SPDX-License-Identifier: Apache-2.0
//! What an observation of the hypervisor means for a record.
//!
//! Observations are recorded, never fought: nothing is stopped because somebody else started it, and
//! nothing started because it stopped.

use super::{
    record::ServerRecord,
    state::{PowerObservation, PowerState, VmState},
};

/// What to change in the record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reconciled {
    /// The new observation.
    pub power: PowerObservation,
    /// What was seen last, while the new observation is that nothing can be seen.
    pub last_known_power: Option<PowerObservation>,
    /// The vm state that follows.
    pub vm_state: VmState,
}

/// No call to the hypervisor takes longer, in milliseconds. An observation that seems older than that
/// was made after the host's clock was set back.
const SLOWEST_ANSWER_MS: i64 = 60_000;

/// Was `seen` asked for before `known` was learned? Answers may come in another order than they were
/// asked for.
fn is_before(seen: i64, known: i64) -> bool {
    seen < known && known.saturating_sub(seen) <= SLOWEST_ANSWER_MS
}

/// Is the observation older than what the record knows already?
#[must_use]
pub fn is_stale(server: &ServerRecord, seen: &PowerObservation) -> bool {
    is_before(seen.observed_at_ms, server.power.observed_at_ms)
}

/// Folds an observation into a record; `None` if it tells nothing new.
///
/// While an operation is under way the vm state is the operation's business. Otherwise a server that
/// should run but is off becomes STOPPED, so that it can be started (Nova: the power sync of
/// `nova/compute/manager.py`), and a stopped one that runs becomes ACTIVE (Nova kills it; we do not).
#[must_use]
pub fn reconcile(server: &ServerRecord, seen: PowerObservation) -> Option<Reconciled> {
    // Seen before the last operation ended: what it saw may be that operation's own work.
    let settled = server.operation.is_none()
        && seen.observed_at_ms != server.settled_at_ms
        && !is_before(seen.observed_at_ms, server.settled_at_ms);
    let vm_state = match (settled, server.vm_state, seen.state) {
        (true, VmState::Active, PowerState::Shutdown | PowerState::Crashed) => VmState::Stopped,
        (true, VmState::Stopped, PowerState::Running) => VmState::Active,
        (_, state, _) => state,
    };
    let last_known_power = if seen.state == PowerState::Unknown {
        // An outage that goes on does not make the last observation older or newer.
        if server.power.state == PowerState::Unknown {
            server.last_known_power.clone()
        } else {
            Some(server.power.clone())
        }
    } else {
        None
    };
    let same = server.power.state == seen.state && server.power.reason == seen.reason;
    if same && server.vm_state == vm_state {
        return None;
    }
    Some(Reconciled {
        power: seen,
        last_known_power,
        vm_state,
    })
}
