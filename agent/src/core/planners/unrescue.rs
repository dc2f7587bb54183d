// SPDX-License-Identifier: Apache-2.0
//! Unrescue: the server's own definition comes back, byte for byte.

use salvor_domain_templates::Role;

use super::{
    Builder,
    protect::{commit_overlay, put_owners_back},
    read_domain, rescue_holder,
};
use crate::core::{
    action::{UnrescueArgs, Verb},
    facts::Facts,
    plan::{Mark, Phase, Plan, RescueChange, Step},
    reason::{Reason, Refusal, Warning, WarningName},
    record::{OverlayDisposition, RescueRecord, ServerRecord},
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
    if commit {
        check_commit(server, rescue, facts)?;
        check_references(rescue, facts)?;
    }
    let mut builder = Builder::new(Verb::Unrescue, server.id, facts);
    if let Some(domain) = &facts.domain {
        builder.step(
            Phase::Switch,
            Step::power_off(args.shutdown, domain.power.is_on()),
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
            builder.step(Phase::Switch, commit_overlay(overlay));
        }
    }
    if let Some(step) = put_owners_back(rescue, &facts.host.layout.rescue(server.id, rescue.plan)) {
        builder.step(Phase::Switch, step);
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
        if !commit {
            for overlay in &rescue.overlays {
                builder.step(
                    Phase::Switch,
                    Step::EmptyOverlay {
                        path: overlay.path.clone(),
                        base: overlay.base.clone(),
                        base_format: overlay.base_format.clone(),
                    },
                );
            }
        }
        builder.step(
            Phase::Switch,
            Step::StartDomain {
                mark: Mark::Own,
                fresh: true,
            },
        );
    } else {
        // A start to come resumes what was saved, as it should; but not the rescue.
        builder.step(Phase::Switch, Step::DropSavedMemory);
    }
    builder.step(
        Phase::CleanUp,
        Step::RemoveFolder {
            path: facts.host.layout.rescue(server.id, rescue.plan),
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

/// Are the overlays still those of the domain that is there? A disk that something else wrote to
/// under them would be half the one and half the other. A commit that has begun goes on all the same:
/// the plan that began it may have given the domain its own definition back already.
fn check_commit(
    server: &ServerRecord,
    rescue: &RescueRecord,
    facts: &Facts,
) -> Result<(), Refusal> {
    let Some(domain) = facts.domain.as_ref().filter(|_| !rescue.commit_started) else {
        return Ok(());
    };
    let mark = read_domain(&domain.xml)?.salvor_mark();
    if mark.is_some_and(|mark| mark.role == Role::Rescue && mark.plan == rescue.plan.to_string()) {
        return Ok(());
    }
    Err(Refusal::new(
        Reason::DomainChanged,
        format!(
            "overlay: the definition of domain {} is not that of the rescue any more, so its disks may have changed under the overlays of server {}; they can be discarded",
            domain.name, server.id
        ),
    ))
}

/// Does each disk still refer to the same files as before the rescue? A commit opens them, with the
/// agent's rights: somebody else's words in a header must not choose them.
fn check_references(rescue: &RescueRecord, facts: &Facts) -> Result<(), Refusal> {
    for overlay in &rescue.overlays {
        let refuse = |reason, what: &str| {
            let advice = if rescue.commit_started {
                "put its header right (qemu-img info, qemu-img rebase -u) and commit again"
            } else {
                "put its header right (qemu-img info, qemu-img rebase -u), or discard the overlays"
            };
            let base = &overlay.base;
            Err(Refusal::new(
                reason,
                format!("overlay: {base} {what}; {advice}"),
            ))
        };
        let before = &overlay.base_references;
        match facts.commit_references.get(&overlay.path) {
            Some(Ok(now)) if now == before => {}
            Some(Ok(now)) => {
                let what =
                    format!("referred to {before} before the rescue and refers to {now} now");
                return refuse(Reason::DiskChanged, &what);
            }
            Some(Err(why)) => {
                let what = format!("cannot be looked at ({why})");
                return refuse(Reason::StorageFailed, &what);
            }
            None => return refuse(Reason::StorageFailed, "or the overlay on it is not there"),
        }
    }
    Ok(())
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
