// SPDX-License-Identifier: Apache-2.0
//! Start and stop.

use super::{Builder, need_domain};
use crate::core::{
    action::{Shutdown, Verb},
    facts::Facts,
    plan::{Mark, Phase, Plan, RescueChange, Step},
    reason::Refusal,
    record::ServerRecord,
    state::VmState,
};

/// Starts the persistent definition. Saved memory is resumed, as libvirt does it.
pub(super) fn start(server: &ServerRecord, facts: &Facts) -> Result<Plan, Refusal> {
    need_domain(server, facts)?;
    let mut builder = Builder::new(Verb::Start, server.id, facts);
    builder.step(
        Phase::Switch,
        Step::StartDomain {
            mark: Mark::Own,
            fresh: false,
        },
    );
    Ok(builder.becomes(VmState::Active, RescueChange::Keep))
}

/// Shuts the guest down, or ends it. A domain that is gone is off.
pub(super) fn stop(server: &ServerRecord, shutdown: Shutdown, facts: &Facts) -> Plan {
    let mut builder = Builder::new(Verb::Stop, server.id, facts);
    let was_on = facts
        .domain
        .as_ref()
        .is_some_and(|domain| domain.power.is_on());
    builder.step(Phase::Switch, Step::PowerOff { shutdown, was_on });
    builder.becomes(VmState::Stopped, RescueChange::Keep)
}
