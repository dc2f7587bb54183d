// SPDX-License-Identifier: Apache-2.0
//! A definition that somebody changed: taken for the server's own, or put back. Neither touches what runs.

use salvor_domain_templates::{Domain, Role, renamed, same_definition};

use super::{Builder, need_domain, read_domain};
use crate::core::{
    action::Verb,
    devices::own_devices,
    facts::{DomainFacts, Facts},
    plan::{Mark, Phase, Plan, RescueChange, Step},
    reason::{Reason, Refusal},
    record::{Flavor, ServerRecord},
};

/// What libvirt has now is the server's own from now on. Without drift nothing changes by it.
pub(super) fn accept(server: &ServerRecord, facts: &Facts) -> Result<Plan, Refusal> {
    let domain = need_domain(server, facts)?;
    if !domain.persistent {
        return Err(Refusal::new(
            Reason::DomainTransient,
            format!(
                "domain {} has no definition any more, only what runs; have it defined again as it was known (server drift --restore)",
                domain.name
            ),
        ));
    }
    let parsed = read_domain(&domain.xml)?;
    if let Some(mark) = parsed.salvor_mark()
        && mark.role == Role::Rescue
    {
        return Err(Refusal::new(
            Reason::DomainUnsupported,
            format!(
                "the definition of domain {} is that of a rescue (plan {}), not the server's own; have that restored (server drift --restore)",
                domain.name, mark.plan
            ),
        ));
    }
    let mut builder = Builder::new(Verb::AcceptDrift, server.id, facts);
    builder.step(
        Phase::Prepare,
        Step::KnowDefinition {
            xml: domain.xml.clone(),
        },
    );
    let flavor = Flavor {
        vcpus: parsed.vcpus().unwrap_or(server.flavor.vcpus),
        memory_mib: parsed
            .memory_kib()
            .map_or(server.flavor.memory_mib, |kib| kib / 1024),
        ..server.flavor
    };
    if let Some(devices) = &mut builder.devices {
        devices.flavor = Some(flavor);
    }
    Ok(builder.becomes(server.vm_state, RescueChange::Keep))
}

/// A known definition under the name that the domain has now: who renamed it meant that.
pub(super) fn named_like(known: &str, now: &str) -> String {
    let named = Domain::parse(now)
        .ok()
        .and_then(|domain| renamed(known, domain.name()));
    named.unwrap_or_else(|| known.to_owned())
}

/// A domain that somebody undefined while it runs goes with its guest, and the state of its TPM with it. Where
/// the guest is to end it is first defined again as it is known; says whether that is so, or not needed.
///
/// The definition of a rescue is not the server's own, and is not known.
pub(super) fn keep_defined(builder: &mut Builder, server: &ServerRecord, facts: &Facts) -> bool {
    match &facts.domain {
        Some(domain) if !domain.persistent && server.rescue.is_none() => {
            define_known(builder, facts)
        }
        Some(_) | None => true,
    }
}

/// Defines a domain that has no definition as it is known; says whether it is known.
pub(super) fn define_known(builder: &mut Builder, facts: &Facts) -> bool {
    let Some(known) = &facts.known_xml else {
        return false;
    };
    let xml = match &facts.domain {
        Some(domain) => named_like(known, &domain.xml),
        None => known.clone(),
    };
    builder.devices = own_devices(&xml);
    builder.step(
        Phase::Switch,
        Step::DefineDomain {
            xml,
            mark: Mark::Own,
            before: None,
        },
    );
    true
}

/// The refusal where a domain without a definition would be lost with its guest, and none is known.
pub(super) fn transient(server: &ServerRecord, domain: &DomainFacts) -> Refusal {
    Refusal::new(
        Reason::DomainTransient,
        format!(
            "somebody undefined domain {} while its guest runs, and nothing is known of how server {} was defined: it would be gone with its guest; define it first (`virsh dumpxml`, `virsh define`)",
            domain.name, server.id
        ),
    )
}

/// The domain is defined again as it is known, also one that somebody has undefined. A guest that runs
/// goes on as it is until its next start.
pub(super) fn restore(server: &ServerRecord, facts: &Facts) -> Result<Plan, Refusal> {
    let Some(known) = &facts.known_xml else {
        return Err(Refusal::state(
            "known_definition",
            "none",
            format!(
                "nothing is known yet of how server {} was defined; {}",
                server.id,
                match &facts.domain {
                    Some(domain) if domain.persistent => {
                        "the agent notes it with its next look"
                    }
                    Some(_) => "define what runs (`virsh dumpxml`, `virsh define`)",
                    None => "define it by hand (`virsh define`)",
                }
            ),
        ));
    };
    let before = facts
        .domain
        .as_ref()
        .filter(|domain| domain.persistent)
        .map(|domain| domain.xml.clone());
    let mut builder = Builder::new(Verb::RestoreDefinition, server.id, facts);
    builder.devices = own_devices(known);
    let xml = match &before {
        Some(before) => named_like(known, before),
        None => known.clone(),
    };
    builder.step(Phase::Prepare, Step::KnowDefinition { xml: xml.clone() });
    let same = |before: &String| same_definition(before, &xml);
    if !before.as_ref().is_some_and(same) {
        builder.step(
            Phase::Switch,
            Step::DefineDomain {
                xml,
                mark: Mark::Own,
                before,
            },
        );
    }
    Ok(builder.becomes(server.vm_state, RescueChange::Keep))
}
