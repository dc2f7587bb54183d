// SPDX-License-Identifier: Apache-2.0
//! Adopt and release: neither touches the domain.

use std::collections::BTreeMap;

use super::{Builder, read_domain};
use crate::core::{
    action::{AdoptArgs, Verb},
    devices::devices,
    facts::Facts,
    plan::{Outcome, Phase, Plan, Step},
    reason::{Reason, Refusal},
    reconcile::{Mismatched, Told, follow},
    record::{Devices, Flavor, Origin, ServerRecord},
    state::{ObservationSource, PowerObservation, VmState},
};

/// Makes the record of a domain that exists.
pub(super) fn plan(args: &AdoptArgs, facts: &Facts) -> Result<Plan, Refusal> {
    let Some(domain) = &facts.domain else {
        return Err(Refusal::new(
            Reason::DomainNotFound,
            "libvirt has no such domain",
        ));
    };
    if !domain.persistent {
        return Err(Refusal::new(
            Reason::DomainTransient,
            format!(
                "domain {} is transient: it would be gone once it is off; define it first (virsh dumpxml {} > file; virsh define file)",
                domain.name, domain.name
            ),
        ));
    }
    let parsed = read_domain(&domain.xml)?;
    if let Some(mark) = parsed.salvor_mark()
        && mark.role == salvor_domain_templates::Role::Rescue
    {
        return Err(Refusal::new(
            Reason::DomainUnsupported,
            format!(
                "the definition of domain {} is that of a rescue (plan {}), not the server's own; restore that first",
                domain.name, mark.plan
            ),
        ));
    }
    let Devices {
        disks,
        nics,
        guest_agent,
        ..
    } = devices(&parsed);
    let now = facts.host.now_ms;
    let as_begun = if domain.power.is_on() {
        VmState::Active
    } else {
        VmState::Stopped
    };
    // As if it had been ours and seen so: somebody may have paused it, or saved its memory.
    let (vm_state, told) = follow(
        as_begun,
        domain.power,
        &domain.power_reason,
        Some(domain.managed_save),
    );
    let mismatch = match told {
        Told::Is(what) => Some(Mismatched {
            what,
            since_ms: now,
        }),
        Told::Keep | Told::StillOff | Told::Clear => None,
    };
    let record = ServerRecord {
        id: domain.id,
        name: args.name.clone().unwrap_or_else(|| domain.name.clone()),
        origin: Origin::Adopted,
        domain_name: domain.name.clone(),
        vm_state,
        task_state: None,
        power: PowerObservation {
            state: domain.power,
            reason: domain.power_reason.clone(),
            observed_at_ms: now,
            source: ObservationSource::Poll,
        },
        last_known_power: None,
        image_id: None,
        flavor: Flavor {
            vcpus: parsed.vcpus().unwrap_or(1),
            memory_mib: parsed.memory_kib().unwrap_or_default() / 1024,
            disk_gib: 0,
        },
        disks,
        nics,
        rescue: None,
        fault: None,
        operation: None,
        operation_verb: None,
        revision: 0,
        created_at_ms: now,
        updated_at_ms: now,
        settled_at_ms: now,
        metadata: BTreeMap::new(),
        hostname: String::new(),
        public_keys: BTreeMap::new(),
        guest_agent,
        mismatch,
        owner: facts.owner(),
        lock: None,
        description: None,
        tags: Vec::new(),
        access_ipv4: None,
        access_ipv6: None,
        shutdown_timeout_ms: None,
        autostart: true,
        autostart_order: None,
        deletion: None,
        drift_since_ms: None,
        agent: None,
    };
    let mut builder = Builder::new(Verb::Adopt, domain.id, facts);
    builder.step(
        Phase::Prepare,
        Step::KnowDefinition {
            xml: domain.xml.clone(),
        },
    );
    Ok(builder.ends(Outcome::Insert(Box::new(record))))
}

/// Forgets the record, and removes what dumps of the guest's memory there are: nobody would know of them.
pub(super) fn release(server: &ServerRecord, facts: &Facts) -> Plan {
    let mut builder = Builder::new(Verb::Release, server.id, facts);
    let path = facts.host.layout.dumps(server.id);
    builder.step(Phase::CleanUp, Step::RemoveFolder { path });
    builder.ends(Outcome::Remove)
}
