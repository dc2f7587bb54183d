// SPDX-License-Identifier: Apache-2.0
//! Power: start, stop, reboot, and the guest's memory stopped, saved and brought back.

use salvor_domain_templates::same_definition;

use super::{
    Builder,
    drift::{define_known, keep_defined, named_like, transient},
    need_domain, read_domain,
};
use crate::core::{
    action::{RebootArgs, Shutdown, Verb},
    devices::own_devices,
    facts::{DomainFacts, Facts},
    plan::{Mark, Outcome, Phase, Plan, RescueChange, Step},
    reason::{Reason, Refusal, Warning, WarningName},
    record::{Origin, ServerRecord},
    state::{PowerState, VmState},
};

/// What a libvirt's saved memory has besides the guest's: the definition, and the state of its devices.
const SAVED_BESIDES_KIB: u64 = 64 * 1024;

const AT_ONCE: Shutdown = Shutdown {
    timeout_ms: 0,
    retry_ms: 0,
};

/// Starts the persistent definition. Saved memory is brought back instead of being lost.
pub(super) fn start(server: &ServerRecord, facts: &Facts) -> Result<Plan, Refusal> {
    let mut builder = Builder::new(Verb::Start, server.id, facts);
    if made_again(&mut builder, server, facts) {
        builder.step(Phase::Switch, START);
        return Ok(builder.becomes(VmState::Active, RescueChange::Keep));
    }
    let domain = need_domain(server, facts)?;
    if domain.managed_save {
        restore(&mut builder, domain)?;
    } else {
        builder.step(Phase::Switch, START);
    }
    Ok(builder.becomes(VmState::Active, RescueChange::Keep))
}

/// A created server's domain that somebody removed is defined again as it is known, as Nova makes it from its
/// record; one that was adopted is its owner's. Says whether it is.
fn made_again(builder: &mut Builder, server: &ServerRecord, facts: &Facts) -> bool {
    server.origin == Origin::Created
        && facts.domain.is_none()
        && server.rescue.is_none()
        && define_known(builder, facts)
}

const START: Step = Step::StartDomain {
    mark: Mark::Own,
    fresh: false,
};

const FRESH: Step = Step::StartDomain {
    mark: Mark::Own,
    fresh: true,
};

/// Shuts the guest down, or ends it. A domain that is gone is off. One that runs without a definition is given
/// the known one, if there is one.
pub(super) fn stop(server: &ServerRecord, shutdown: Shutdown, facts: &Facts) -> Plan {
    let mut builder = Builder::new(Verb::Stop, server.id, facts);
    keep_defined(&mut builder, server, facts);
    builder.step(Phase::Switch, power_off(shutdown, facts));
    builder.becomes(VmState::Stopped, RescueChange::Keep)
}

fn is_on(facts: &Facts) -> bool {
    facts
        .domain
        .as_ref()
        .is_some_and(|domain| domain.power.is_on())
}

fn power_off(shutdown: Shutdown, facts: &Facts) -> Step {
    Step::power_off(shutdown, is_on(facts))
}

/// Has the guest shut down, and starts it again. The guest agent is asked too, where there is one: not
/// every guest hears a power button.
pub(super) fn reboot(
    server: &ServerRecord,
    args: RebootArgs,
    facts: &Facts,
) -> Result<Plan, Refusal> {
    let domain = need_domain(server, facts)?;
    let agent = read_domain(&domain.xml)?.has_guest_agent_channel();
    // Its CPUs do not run, so it cannot shut down.
    if args.or_fail && domain.power.is_on() && domain.power != PowerState::Running {
        return Err(Refusal::state(
            "power_state",
            domain.power.name(),
            format!(
                "server {} is {} ({}) and cannot shut down; let it run first (a paused one with unpause), or reboot it hard",
                server.id, domain.power, domain.power_reason
            ),
        ));
    }
    let mut builder = Builder::new(Verb::Reboot, server.id, facts);
    if !keep_defined(&mut builder, server, facts) {
        return Err(transient(server, domain));
    }
    builder.step(
        Phase::Switch,
        Step::PowerOff {
            shutdown: args.shutdown,
            was_on: domain.power.is_on(),
            ask_agent: agent,
            or_fail: args.or_fail,
        },
    );
    builder.step(Phase::Switch, START);
    Ok(builder.becomes(VmState::Active, RescueChange::Keep))
}

/// Ends the guest and starts it again, a created server with the definition that is known, whether libvirt still
/// has its domain or not. Memory that was saved of it is lost: that is said.
pub(super) fn hard_reboot(server: &ServerRecord, facts: &Facts) -> Result<Plan, Refusal> {
    let mut builder = Builder::new(Verb::HardReboot, server.id, facts);
    if made_again(&mut builder, server, facts) {
        builder.step(Phase::Switch, FRESH);
        return Ok(builder.becomes(VmState::Active, RescueChange::Keep));
    }
    let domain = need_domain(server, facts)?;
    if !keep_defined(&mut builder, server, facts) {
        return Err(transient(server, domain));
    }
    builder.step(Phase::Switch, power_off(AT_ONCE, facts));
    if domain.managed_save {
        builder.plan.warnings.push(Warning {
            name: WarningName::SavedMemoryLost,
            message: format!(
                "the memory that was saved of server {} is lost: it boots anew",
                server.id
            ),
        });
    }
    // What somebody changed past the agent goes with a created server (Nova makes the definition anew); one
    // that was adopted is its owner's.
    if server.origin == Origin::Created
        && domain.persistent
        && let Some(known) = &facts.known_xml
    {
        let xml = named_like(known, &domain.xml);
        if !same_definition(&domain.xml, &xml) {
            builder.devices = own_devices(&xml);
            builder.step(
                Phase::Switch,
                Step::DefineDomain {
                    xml,
                    mark: Mark::Own,
                    before: Some(domain.xml.clone()),
                },
            );
        }
    }
    builder.step(Phase::Switch, FRESH);
    Ok(builder.becomes(VmState::Active, RescueChange::Keep))
}

/// Stops the guest's CPUs. What is known of the domain is in the record: reading more would take longer
/// than the action does.
pub(super) fn pause(server: &ServerRecord, facts: &Facts) -> Result<Plan, Refusal> {
    need_on(server, "pause")?;
    let mut builder = Builder::new(Verb::Pause, server.id, facts);
    let was_running = server.power.state != PowerState::Paused;
    builder.step(Phase::Switch, Step::Pause { was_running });
    Ok(builder.becomes(VmState::Paused, RescueChange::Keep))
}

/// Lets the guest's CPUs run, and its clock catch up. A rescue guest goes on as one, and a server in ERROR stays
/// so: what failed was not this.
pub(super) fn unpause(server: &ServerRecord, facts: &Facts) -> Result<Plan, Refusal> {
    need_on(server, "unpause")?;
    let mut builder = Builder::new(Verb::Unpause, server.id, facts);
    builder.step(Phase::Switch, Step::Unpause);
    if server.guest_agent {
        builder.step(Phase::CleanUp, Step::SetGuestTime);
    }
    let vm_state = match server.vm_state {
        VmState::Paused => VmState::Active,
        other => other,
    };
    Ok(builder.becomes(vm_state, RescueChange::Keep))
}

/// By what was seen last, is there a QEMU? What was not seen yet, or cannot be now, is left to the step.
pub(super) fn need_on(server: &ServerRecord, verb: &str) -> Result<(), Refusal> {
    let power = server.power.state;
    if !matches!(power, PowerState::Shutdown | PowerState::Crashed) {
        return Ok(());
    }
    Err(Refusal::state(
        "power_state",
        power.name(),
        format!(
            "cannot {verb} server {}: its guest is off ({power}); start it first",
            server.id
        ),
    ))
}

/// Saves the guest's memory and ends it.
pub(super) fn suspend(server: &ServerRecord, facts: &Facts) -> Result<Plan, Refusal> {
    need_on(server, "suspend")?;
    let domain = need_domain(server, facts)?;
    if !domain.persistent {
        return Err(Refusal::new(
            Reason::DomainTransient,
            format!(
                "domain {} is transient, and libvirt keeps no saved memory of such a one; have it defined again as it was known (server drift --restore)",
                domain.name
            ),
        ));
    }
    let memory_kib = memory(domain)?;
    let need = memory_kib
        .saturating_add(SAVED_BESIDES_KIB)
        .saturating_mul(1024);
    if let Some(room) = &facts.save_room
        && room.free_bytes < need.saturating_add(facts.host.reserve_bytes)
    {
        return Err(Refusal::new(
            Reason::NoSpace,
            format!(
                "saving {} MiB of memory needs {need} bytes on the file system of {}, besides {} that stay free, and {} are free; make room, or stop the server instead",
                memory_kib / 1024,
                room.folder,
                facts.host.reserve_bytes,
                room.free_bytes
            ),
        ));
    }
    let mut builder = Builder::new(Verb::Suspend, server.id, facts);
    // libvirt's own name for it (`qemuDomainManagedSavePath`).
    let room = facts.save_room.as_ref();
    let file = room.map(|room| format!("{}/{}.save", room.folder, domain.name));
    let file = file.unwrap_or_default();
    builder.step(Phase::Switch, Step::SaveMemory { file, memory_kib });
    Ok(builder.becomes(VmState::Suspended, RescueChange::Keep))
}

/// Starts a suspended guest from its saved memory; without that there is nothing to resume.
pub(super) fn resume(server: &ServerRecord, facts: &Facts) -> Result<Plan, Refusal> {
    let domain = need_domain(server, facts)?;
    if !domain.managed_save && !domain.power.is_on() {
        return Err(Refusal::new(
            Reason::NoSavedMemory,
            format!(
                "there is no saved memory of server {} any more: somebody removed it; boot it anew with a hard reboot",
                server.id
            ),
        ));
    }
    let mut builder = Builder::new(Verb::Resume, server.id, facts);
    restore(&mut builder, domain)?;
    Ok(builder.becomes(VmState::Active, RescueChange::Keep))
}

fn restore(builder: &mut Builder, domain: &DomainFacts) -> Result<(), Refusal> {
    let memory_kib = memory(domain)?;
    builder.step(Phase::Switch, Step::RestoreMemory { memory_kib });
    if read_domain(&domain.xml)?.has_guest_agent_channel() {
        builder.step(Phase::CleanUp, Step::SetGuestTime);
    }
    Ok(())
}

/// A domain's memory in KiB.
fn memory(domain: &DomainFacts) -> Result<u64, Refusal> {
    read_domain(&domain.xml)?.memory_kib().ok_or_else(|| {
        Refusal::new(
            Reason::DomainUnsupported,
            format!(
                "the definition of domain {} states no memory that can be read",
                domain.name
            ),
        )
    })
}

/// Injects an NMI.
pub(super) fn crash_dump(server: &ServerRecord, facts: &Facts) -> Result<Plan, Refusal> {
    need_on(server, "trigger a crash dump of")?;
    let mut builder = Builder::new(Verb::CrashDump, server.id, facts);
    builder.step(Phase::Switch, Step::InjectNmi);
    Ok(builder.ends(Outcome::Keep))
}

/// Writes the guest's memory to a file in the server's folder, which is removed with the server.
pub(super) fn dump_memory(server: &ServerRecord, facts: &Facts) -> Result<Plan, Refusal> {
    need_on(server, "dump the memory of")?;
    let domain = need_domain(server, facts)?;
    let memory_kib = memory(domain)?;
    let host = &facts.host;
    let need = memory_kib
        .saturating_add(SAVED_BESIDES_KIB)
        .saturating_mul(1024);
    if host.free_bytes < need.saturating_add(host.reserve_bytes) {
        return Err(Refusal::new(
            Reason::NoSpace,
            format!(
                "dumping {} MiB of memory needs {need} bytes in {}, besides {} that stay free, and {} are free",
                memory_kib / 1024,
                host.layout.servers(),
                host.reserve_bytes,
                host.free_bytes
            ),
        ));
    }
    let mut builder = Builder::new(Verb::DumpMemory, server.id, facts);
    let folder = host.layout.dump(server.id, facts.plan);
    let path = format!("{folder}/memory.elf");
    builder.step(Phase::Prepare, Step::MakeFolder { path: folder });
    builder.step(Phase::Switch, Step::DumpMemory { path, memory_kib });
    Ok(builder.ends(Outcome::Keep))
}
