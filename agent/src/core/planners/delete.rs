// SPDX-License-Identifier: Apache-2.0
//! Delete: the domain goes, and what the agent made for it. Disks that it did not make stay.

use super::{Builder, disk_holder, protect::put_owners_back, rescue_holder};
use crate::core::{
    action::{Shutdown, Verb},
    facts::Facts,
    plan::{Outcome, Phase, Plan, Step},
    reason::{Warning, WarningName},
    record::{Origin, ServerRecord},
};

/// Plans a delete. It works in every state, also when the domain is gone already.
pub(super) fn plan(server: &ServerRecord, facts: &Facts) -> Plan {
    let mut builder = Builder::new(Verb::Delete, server.id, facts);
    if let Some(domain) = &facts.domain {
        let at_once = Shutdown {
            timeout_ms: 0,
            retry_ms: 0,
        };
        builder.step(
            Phase::Switch,
            Step::PowerOff {
                shutdown: at_once,
                was_on: domain.power.is_on(),
            },
        );
    }
    // Disks of an adopted server stay, and somebody may want them.
    let rescue = server.rescue.as_ref();
    if let Some(rescue) = rescue.filter(|_| server.origin == Origin::Adopted)
        && let Some(step) = put_owners_back(rescue)
    {
        builder.step(Phase::Switch, step);
    }
    if let Some(domain) = facts.domain.as_ref().filter(|domain| domain.persistent) {
        builder.step(
            Phase::Switch,
            Step::UndefineDomain {
                before: domain.xml.clone(),
            },
        );
    }
    if server.origin == Origin::Adopted {
        let kept: Vec<_> = server
            .disks
            .iter()
            .filter(|disk| !disk.source.is_empty())
            .map(|disk| disk.source.as_str())
            .collect();
        if !kept.is_empty() {
            builder.plan.warnings.push(Warning {
                name: WarningName::DisksKept,
                message: format!(
                    "the server was adopted, so its disks stay: {}",
                    kept.join(", ")
                ),
            });
        }
    }
    builder.plan.warnings.extend(repairs_lost(server, facts));
    // Of an adopted server only the rescues are the agent's, wherever its disks may lie.
    let layout = &facts.host.layout;
    let path = match server.origin {
        Origin::Created => layout.server(server.id),
        Origin::Adopted => layout.rescues(server.id),
    };
    builder.step(Phase::CleanUp, Step::RemoveFolder { path });
    if let Some(rescue) = &server.rescue {
        let holder = rescue_holder(server.id, rescue.plan);
        builder.step(
            Phase::CleanUp,
            Step::ReleaseImage {
                image: rescue.image_id,
                holder,
            },
        );
    }
    if let Some(image) = server.image_id {
        builder.step(
            Phase::CleanUp,
            Step::ReleaseImage {
                image,
                holder: disk_holder(server.id),
            },
        );
    }
    builder.step(Phase::CleanUp, Step::DropSavedDefinition);
    builder.ends(Outcome::Remove)
}

/// Overlays go with the server; disks that stay are without what was repaired in them.
fn repairs_lost(server: &ServerRecord, facts: &Facts) -> Option<Warning> {
    let rescue = server.rescue.as_ref()?;
    let own = format!("{}/", facts.host.layout.server(server.id));
    let stay: Vec<&str> = rescue
        .overlays
        .iter()
        .map(|overlay| overlay.base.as_str())
        .filter(|base| !base.starts_with(&own))
        .collect();
    if stay.is_empty() {
        return None;
    }
    let stay = stay.join(", ");
    Some(Warning {
        name: WarningName::RepairsLost,
        message: if rescue.commit_started {
            format!(
                "a commit of the overlays has begun and did not end, so these disks may be half written: {stay}; to make them whole, unrescue with --overlay commit before deleting"
            )
        } else {
            format!(
                "the overlays were not committed, so what was repaired in them is lost; these disks stay as they were before the rescue: {stay}"
            )
        },
    })
}
