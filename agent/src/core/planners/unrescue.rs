// SPDX-License-Identifier: Apache-2.0
//! Unrescue: the server's own definition comes back, byte for byte.

use super::{Builder, rescue_holder};
use crate::core::{
    action::{UnrescueArgs, Verb},
    facts::Facts,
    plan::{Mark, Phase, Plan, RescueChange, Step},
    reason::{Reason, Refusal, Warning, WarningName},
    record::{OverlayDisposition, ServerRecord},
    state::VmState,
};

pub(super) fn plan(
    server: &ServerRecord,
    args: &UnrescueArgs,
    facts: &Facts,
) -> Result<Plan, Refusal> {
    let (Some(rescue), Some(saved)) = (&server.rescue, &facts.saved_xml) else {
        return Err(Refusal::new(
            Reason::NotRescued,
            format!(
                "no rescue of server {} is in force: there is no saved definition",
                server.id
            ),
        ));
    };
    let commit = overlay_decision(server, args.overlay)?;
    let mut builder = Builder::new(Verb::Unrescue, server.id, facts);
    if let Some(domain) = &facts.domain {
        builder.step(
            Phase::Switch,
            Step::PowerOff {
                shutdown: args.shutdown,
                was_on: domain.power.is_on(),
            },
        );
    }
    if commit {
        builder.step(Phase::Switch, Step::MarkCommitStarted);
        for overlay in &rescue.overlays {
            if let Some(space) = facts.commit_space.get(&overlay.path)
                && space.free < space.allocated
            {
                builder.plan.warnings.push(Warning {
                    name: WarningName::SpaceMayRunOut,
                    message: format!(
                        "committing may write {} bytes to {}, and {} are free there; if it does not end, make room and unrescue with commit again",
                        space.allocated, overlay.base, space.free
                    ),
                });
            }
            builder.step(
                Phase::Switch,
                Step::CommitOverlay {
                    path: overlay.path.clone(),
                    base: overlay.base.clone(),
                },
            );
        }
    }
    builder.step(
        Phase::Switch,
        Step::DefineDomain {
            xml: saved.clone(),
            mark: Mark::Own,
            before: facts.domain.as_ref().map(|domain| domain.xml.clone()),
        },
    );
    let start = !args.restore_power || rescue.power_before.is_on();
    if start {
        builder.step(Phase::Switch, Step::StartDomain { mark: Mark::Own });
    }
    builder.step(
        Phase::CleanUp,
        Step::RemoveFolder {
            path: facts.host.layout.rescues(server.id),
        },
    );
    builder.step(
        Phase::CleanUp,
        Step::ReleaseImage {
            image: rescue.image_id,
            holder: rescue_holder(server.id, rescue.plan),
        },
    );
    builder.step(Phase::CleanUp, Step::DropSavedDefinition);
    Ok(builder.becomes(
        if start {
            VmState::Active
        } else {
            VmState::Stopped
        },
        RescueChange::End,
    ))
}

/// Are the overlays to be committed?
fn overlay_decision(
    server: &ServerRecord,
    wanted: Option<OverlayDisposition>,
) -> Result<bool, Refusal> {
    let Some(rescue) = &server.rescue else {
        return Ok(false);
    };
    if rescue.overlays.is_empty() {
        return match wanted {
            None => Ok(false),
            Some(_) => Err(Refusal::new(
                Reason::NoOverlays,
                format!(
                    "overlay: the disks of server {} are {}, so there is nothing to commit or to discard",
                    server.id, rescue.protection
                ),
            )),
        };
    }
    match wanted {
        Some(OverlayDisposition::Commit) => Ok(true),
        Some(OverlayDisposition::Discard) if rescue.commit_started => Err(Refusal::new(
            Reason::CommitStarted,
            format!(
                "the overlays of server {} are partly written to its disks already; only committing makes them whole",
                server.id
            ),
        )),
        Some(OverlayDisposition::Discard) => Ok(false),
        None => Err(Refusal::new(
            Reason::OverlayDecisionNeeded,
            format!(
                "overlay: the rescue of server {} wrote to overlays; say commit or discard",
                server.id
            ),
        )),
    }
}
