// SPDX-License-Identifier: Apache-2.0
//! Delete: the domain goes, and what the agent made for it. Disks that it did not make stay.

use salvor_domain_templates::{Domain, Firmware};

use super::{
    Builder, disk_holder,
    protect::{commit_overlay, put_owners_back},
    rescue_holder,
};
use crate::core::{
    action::{Shutdown, Verb},
    facts::Facts,
    plan::{Outcome, Phase, Plan, Step},
    reason::{Reason, Refusal, Warning, WarningName},
    record::{Origin, Overlay, ServerRecord},
};

/// Plans a delete. It works in every state, also when the domain is gone already.
///
/// # Errors
/// Only where it would take the last whole copy of a disk that stays, and cannot yet make that whole.
pub(super) fn plan(verb: Verb, server: &ServerRecord, facts: &Facts) -> Result<Plan, Refusal> {
    let begun = begun_commits(server, facts)?;
    let mut builder = Builder::new(verb, server.id, facts);
    if let Some(domain) = &facts.domain {
        let at_once = Shutdown {
            timeout_ms: 0,
            retry_ms: 0,
        };
        builder.step(
            Phase::Switch,
            Step::power_off(at_once, domain.power.is_on()),
        );
    }
    for overlay in begun {
        builder.step(Phase::Switch, commit_overlay(overlay));
    }
    // Disks of an adopted server stay, and somebody may want them.
    let rescue = server.rescue.as_ref();
    if let Some(rescue) = rescue.filter(|_| server.origin == Origin::Adopted)
        && let Some(step) =
            put_owners_back(rescue, &facts.host.layout.rescue(server.id, rescue.plan))
    {
        builder.step(Phase::Switch, step);
    }
    if let Some(domain) = facts.domain.as_ref().filter(|domain| domain.persistent) {
        builder.step(
            Phase::Switch,
            Step::UndefineDomain {
                before: domain.xml.clone(),
                tpm_goes: server.origin == Origin::Created,
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
        let mut message = match kept.is_empty() {
            true => String::new(),
            false => format!("its disks stay: {}", kept.join(", ")),
        };
        if let Some(beside) = kept_beside_disks(facts) {
            let and = if message.is_empty() { "" } else { "; " };
            message = format!("{message}{and}{beside}");
        }
        if !message.is_empty() {
            builder.plan.warnings.push(Warning {
                name: WarningName::DisksKept,
                message: format!("the server was adopted, so {message}"),
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
    if server.origin == Origin::Adopted {
        let path = layout.dumps(server.id);
        builder.step(Phase::CleanUp, Step::RemoveFolder { path });
    }
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
    Ok(builder.ends(Outcome::Remove))
}

/// What an adopted server's own definition has besides its disks that stays on the host.
fn kept_beside_disks(facts: &Facts) -> Option<String> {
    let own = facts.saved_xml.as_ref();
    let own = own.or(facts.domain.as_ref().map(|domain| &domain.xml))?;
    let own = Domain::parse(own).ok()?;
    let nvram = match own.firmware() {
        Firmware::Uefi { nvram, .. } => Some(match nvram {
            Some(path) => format!("its UEFI variables stay ({path})"),
            None => "its UEFI variables stay where libvirt keeps them".to_owned(),
        }),
        Firmware::Bios => None,
    };
    let tpm = own
        .has_tpm()
        .then(|| "the state of its TPM stays where libvirt keeps it".to_owned());
    let kept: Vec<String> = nvram.into_iter().chain(tpm).collect();
    (!kept.is_empty()).then(|| kept.join("; "))
}

/// Overlays whose commit has begun and did not end: the disks under them are half written, and only
/// the overlays know the rest. Those of disks that go with the server, or are gone already, do not count.
fn begun_commits<'a>(
    server: &'a ServerRecord,
    facts: &'a Facts,
) -> Result<Vec<&'a Overlay>, Refusal> {
    let mut begun = Vec::new();
    let rescue = server
        .rescue
        .as_ref()
        .filter(|rescue| rescue.commit_started);
    for overlay in rescue.iter().flat_map(|rescue| &rescue.overlays) {
        match facts.commit_references.get(&overlay.path) {
            _ if goes_with(server, overlay, facts) => {}
            Some(Ok(now)) if *now == overlay.base_references => begun.push(overlay),
            // Somebody has put another disk there, or one of the two is gone.
            Some(Ok(_)) | None => {}
            Some(Err(why)) => {
                return Err(Refusal::new(
                    Reason::StorageFailed,
                    format!(
                        "a commit to {} has begun and did not end, and it cannot be looked at now ({why}); delete again when its storage answers, or when the disk is gone for good",
                        overlay.base
                    ),
                ));
            }
        }
    }
    Ok(begun)
}

/// Is the disk under the overlay the agent's own, to be removed with the server?
fn goes_with(server: &ServerRecord, overlay: &Overlay, facts: &Facts) -> bool {
    let own = format!("{}/", facts.host.layout.server(server.id));
    overlay.base.starts_with(&own)
}

/// Overlays go with the server; disks that stay are without what was repaired in them.
fn repairs_lost(server: &ServerRecord, facts: &Facts) -> Option<Warning> {
    let rescue = server.rescue.as_ref()?;
    // Those of a commit that has begun are written to their disks before they go.
    let stay: Vec<&str> = rescue
        .overlays
        .iter()
        .filter(|overlay| !rescue.commit_started && !goes_with(server, overlay, facts))
        .map(|overlay| overlay.base.as_str())
        .collect();
    if stay.is_empty() {
        return None;
    }
    Some(Warning {
        name: WarningName::RepairsLost,
        message: format!(
            "the overlays were not committed, so what was repaired in them is lost; these disks stay as they were before the rescue: {}",
            stay.join(", ")
        ),
    })
}
