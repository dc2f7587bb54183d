// SPDX-License-Identifier: Apache-2.0
//! Soft delete and restore: the guest is off, everything else stays as it is until the server is
//! restored or its time is over.

use super::{
    Builder,
    drift::{define_known, keep_defined, transient},
    need_domain, read_domain,
};
use crate::core::{
    action::{Shutdown, Verb},
    facts::Facts,
    plan::{Mark, Outcome, Phase, Plan, Step},
    reason::{Reason, Refusal},
    record::ServerRecord,
    state::PowerState,
};

/// Ends the guest at once (Nova: `soft_delete_instance` of `nova/compute/manager.py`) and remembers what
/// the server was. A domain that is gone is off.
pub(super) fn plan(server: &ServerRecord, facts: &Facts) -> Result<Plan, Refusal> {
    let mut builder = Builder::new(Verb::SoftDelete, server.id, facts);
    let mut power = PowerState::NoState;
    if let Some(domain) = &facts.domain {
        if !keep_defined(&mut builder, server, facts) {
            return Err(transient(server, domain));
        }
        power = domain.power;
        let shutdown = Shutdown {
            timeout_ms: 0,
            retry_ms: 0,
        };
        let was_on = power.is_on();
        builder.step(Phase::Switch, Step::power_off(shutdown, was_on));
    }
    Ok(builder.ends(Outcome::SoftDelete {
        vm_state: server.vm_state,
        power,
        fault: server.fault.clone(),
        reclaim_in_ms: facts.host.reclaim_ms,
    }))
}

/// Brings a server back to what it was, and starts it if it ran. Of a server in rescue that is the rescue.
/// A domain that somebody removed meanwhile is defined again as it is known.
pub(super) fn restore(server: &ServerRecord, facts: &Facts) -> Result<Plan, Refusal> {
    let Some(deletion) = &server.deletion else {
        return Err(Refusal::new(
            Reason::Internal,
            "a soft-deleted server does not know what it was",
        ));
    };
    let (vm_state, starts) = deletion.comes_back();
    let mut builder = Builder::new(Verb::Restore, server.id, facts);
    let is_off = facts
        .domain
        .as_ref()
        .is_none_or(|domain| !domain.power.is_on());
    let gone = facts.domain.is_none() && server.rescue.is_none();
    if gone && define_known(&mut builder, facts) {
        if starts {
            let mark = Mark::Own;
            builder.step(Phase::Switch, Step::StartDomain { mark, fresh: false });
        }
    } else if starts && is_off {
        let domain = need_domain(server, facts)?;
        let defined = read_domain(&domain.xml)?.salvor_mark();
        let rescue = server
            .rescue
            .as_ref()
            .map(|rescue| rescue.plan)
            .filter(|plan| defined.is_some_and(|mark| mark.plan == plan.to_string()));
        let mark = rescue.map_or(Mark::Own, Mark::Plan);
        builder.step(Phase::Switch, Step::StartDomain { mark, fresh: false });
    }
    Ok(builder.ends(Outcome::Restore {
        vm_state,
        fault: deletion.fault.clone(),
    }))
}
