// SPDX-License-Identifier: Apache-2.0
//! What went down with its host and comes back with it, where it is no plain start.

use super::{Builder, need_domain};
use crate::core::{
    action::Verb,
    facts::Facts,
    plan::{Mark, Phase, Plan, RescueChange, Step},
    reason::{Reason, Refusal},
    record::ServerRecord,
    state::VmState,
};

/// Starts the rescue domain as it is defined: the server stays RESCUED.
pub(super) fn start_rescue(server: &ServerRecord, facts: &Facts) -> Result<Plan, Refusal> {
    need_domain(server, facts)?;
    let Some(rescue) = &server.rescue else {
        return Err(Refusal::new(
            Reason::NotRescued,
            format!("no rescue of server {} is in force", server.id),
        ));
    };
    let mut builder = Builder::new(Verb::StartRescue, server.id, facts);
    builder.step(
        Phase::Switch,
        Step::StartDomain {
            mark: Mark::Plan(rescue.plan),
            fresh: false,
        },
    );
    Ok(builder.becomes(VmState::Rescued, RescueChange::Keep))
}
