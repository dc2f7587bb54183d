// SPDX-License-Identifier: Apache-2.0
//! What changes the record alone: locks, updates, a state that the administrator says. These plans have no
//! steps; see [`Outcome::Record`].

use super::Builder;
use crate::core::{
    action::{LockArgs, ResetTo, Verb},
    change::{FieldChange, RecordChange},
    facts::Facts,
    plan::{Outcome, Plan},
    reason::{Reason, Refusal},
    record::{Fault, Lock, LockOwner, ServerRecord},
    state::VmState,
};

fn changes(verb: Verb, server: &ServerRecord, facts: &Facts, change: RecordChange) -> Plan {
    Builder::new(verb, server.id, facts).ends(Outcome::Record(change))
}

/// Locks a server (Nova: `lock` of `nova/compute/api.py`). The owner of a locked server changes nothing by
/// locking it again, neither who locked it nor why; an administrator takes the lock over.
pub(super) fn lock(server: &ServerRecord, args: &LockArgs, facts: &Facts) -> Plan {
    let now = facts.host.now_ms;
    let owns = facts.who.owns(server);
    let change = if owns && server.lock_at(now).is_some() {
        RecordChange::Nothing
    } else {
        let end = |after| now.saturating_add(i64::try_from(after).unwrap_or(i64::MAX));
        RecordChange::Lock(Lock {
            by: if owns {
                LockOwner::Owner
            } else {
                LockOwner::Admin
            },
            reason: args.reason.clone(),
            at_ms: now,
            expires_at_ms: args.expires_in_ms.map(end),
        })
    };
    changes(Verb::Lock, server, facts, change)
}

/// Takes a lock off; with `only_expired`, one that holds no longer.
pub(super) fn unlock(server: &ServerRecord, only_expired: bool, facts: &Facts) -> Plan {
    let holds = server.lock_at(facts.host.now_ms).is_some();
    let change = if server.lock.is_none() || (only_expired && holds) {
        RecordChange::Nothing
    } else {
        RecordChange::Unlock
    };
    changes(Verb::Unlock, server, facts, change)
}

/// Gives fields new values.
pub(super) fn update(server: &ServerRecord, fields: &[FieldChange], facts: &Facts) -> Plan {
    changes(
        Verb::Update,
        server,
        facts,
        RecordChange::Update(fields.to_vec()),
    )
}

/// Says what a server is meant to be. Nothing on the host is changed; what it shows is reported.
///
/// # Errors
/// Only if it was not looked at, which is a fault of ours.
pub(super) fn reset(server: &ServerRecord, to: ResetTo, facts: &Facts) -> Result<Plan, Refusal> {
    let Some(host) = facts.host_report.clone() else {
        return Err(Refusal::new(
            Reason::Internal,
            "the state is to be reset and the host was not looked at",
        ));
    };
    let (vm_state, fault) = match to {
        // The saved definition is the way back, and only of a rescued server unrescue takes it.
        ResetTo::Active if server.rescue.is_some() => (VmState::Rescued, None),
        ResetTo::Active => (VmState::Active, None),
        ResetTo::Error => {
            let fault = Fault {
                reason: Reason::StateReset,
                message: format!(
                    "the administrator reset the state to error; the host shows: {host}"
                ),
                step: String::new(),
                revert_step: String::new(),
                left_behind: Vec::new(),
                at_ms: facts.host.now_ms,
            };
            (VmState::Error, Some(fault))
        }
    };
    let change = RecordChange::Reset {
        vm_state,
        fault,
        host,
    };
    Ok(changes(Verb::ResetState, server, facts, change))
}
