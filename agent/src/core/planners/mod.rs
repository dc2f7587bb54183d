// SPDX-License-Identifier: Apache-2.0
//! Planners: from an accepted action and the facts of the host to a plan. One file for each verb
//! that has more to it than a step or two.
//!
//! A planner refuses what it can see to be impossible; what it returns is meant to succeed.

mod adopt;
mod comeback;
mod create;
mod delete;
mod drift;
mod password;
mod power;
mod protect;
mod record;
mod rescue;
mod soft_delete;
mod unrescue;

use salvor_domain_templates::{Domain, Templates};
use uuid::Uuid;

use super::{
    action::{Action, Verb},
    devices::own_devices,
    facts::{DomainFacts, Facts},
    plan::{Outcome, Phase, Plan, PlannedStep, RescueChange, Step},
    reason::{Reason, Refusal},
    record::{Devices, ServerRecord},
    state::VmState,
};

pub use create::machine;
pub use rescue::{HostImage, choose_image};

/// Plans an action that admission accepted.
///
/// `server` is the record, or `None` for the verbs that make one.
///
/// # Errors
/// A [`Refusal`] for what the facts show to be impossible.
pub fn plan(
    server: Option<&ServerRecord>,
    action: &Action,
    facts: &Facts,
    templates: &Templates,
) -> Result<Plan, Refusal> {
    match (action, server) {
        (Action::Create(args), None) => create::plan(args, facts, templates),
        (Action::Adopt(args), None) => adopt::plan(args, facts),
        (Action::Release, Some(server)) => Ok(adopt::release(server, facts)),
        (Action::Delete, Some(server)) => delete::plan(Verb::Delete, server, facts),
        (Action::ForceDelete, Some(server)) => delete::plan(Verb::ForceDelete, server, facts),
        (Action::Start, Some(server)) => power::start(server, facts),
        (Action::Stop(shutdown), Some(server)) => Ok(power::stop(server, *shutdown, facts)),
        (Action::Rescue(args), Some(server)) => rescue::plan(server, args, facts, templates),
        (Action::Unrescue(args), Some(server)) => unrescue::plan(server, args, facts),
        (Action::DeliverPassword, Some(server)) => rescue::deliver_password(server, facts),
        (Action::Reboot(args), Some(server)) => power::reboot(server, *args, facts),
        (Action::HardReboot, Some(server)) => power::hard_reboot(server, facts),
        (Action::Pause, Some(server)) => power::pause(server, facts),
        (Action::Unpause, Some(server)) => power::unpause(server, facts),
        (Action::Suspend, Some(server)) => power::suspend(server, facts),
        (Action::Resume, Some(server)) => power::resume(server, facts),
        (Action::CrashDump, Some(server)) => power::crash_dump(server, facts),
        (Action::DumpMemory, Some(server)) => power::dump_memory(server, facts),
        (Action::ChangePassword(args), Some(server)) => password::change(server, args, facts),
        (Action::Lock(args), Some(server)) => Ok(record::lock(server, args, facts)),
        (Action::Unlock { only_expired }, Some(server)) => {
            Ok(record::unlock(server, *only_expired, facts))
        }
        (Action::Update(fields), Some(server)) => Ok(record::update(server, fields, facts)),
        (Action::ResetState(to), Some(server)) => record::reset(server, *to, facts),
        (Action::SoftDelete, Some(server)) => soft_delete::plan(server, facts),
        (Action::Restore, Some(server)) => soft_delete::restore(server, facts),
        (Action::AcceptDrift, Some(server)) => drift::accept(server, facts),
        (Action::RestoreDefinition, Some(server)) => drift::restore(server, facts),
        (Action::StartRescue, Some(server)) => comeback::start_rescue(server, facts),
        (Action::Create(_) | Action::Adopt(_), Some(server)) => Err(Refusal::new(
            Reason::ServerExists,
            format!("there is a server {} already", server.id),
        )),
        (
            Action::Release
            | Action::Delete
            | Action::Start
            | Action::Stop(_)
            | Action::Rescue(_)
            | Action::Unrescue(_)
            | Action::DeliverPassword
            | Action::Reboot(_)
            | Action::HardReboot
            | Action::Pause
            | Action::Unpause
            | Action::Suspend
            | Action::Resume
            | Action::CrashDump
            | Action::DumpMemory
            | Action::ChangePassword(_)
            | Action::Lock(_)
            | Action::Unlock { .. }
            | Action::ResetState(_)
            | Action::SoftDelete
            | Action::Restore
            | Action::ForceDelete
            | Action::Update(_)
            | Action::AcceptDrift
            | Action::RestoreDefinition
            | Action::StartRescue,
            None,
        ) => Err(Refusal::new(
            Reason::ServerNotFound,
            "there is no such server",
        )),
    }
}

/// Builds a plan step by step.
struct Builder {
    plan: Plan,
    /// Of the server's own definition, if it is known.
    devices: Option<Devices>,
}

impl Builder {
    fn new(verb: Verb, server: Uuid, facts: &Facts) -> Self {
        Self {
            plan: Plan {
                id: facts.plan,
                server,
                verb,
                initial: None,
                steps: Vec::new(),
                outcome: Outcome::Remove,
                warnings: Vec::new(),
                password_delivery: Vec::new(),
            },
            // While a rescue is in force, the server's own definition is the saved one.
            devices: match (&facts.saved_xml, &facts.domain) {
                (Some(saved), _) => own_devices(saved),
                (None, Some(domain)) if domain.persistent => own_devices(&domain.xml),
                (None, _) => None,
            },
        }
    }

    fn step(&mut self, phase: Phase, step: Step) {
        self.plan.steps.push(PlannedStep { phase, step });
    }

    fn becomes(mut self, vm_state: VmState, rescue: RescueChange) -> Plan {
        self.plan.outcome = Outcome::Change {
            vm_state,
            rescue,
            devices: self.devices,
        };
        self.plan
    }

    fn ends(mut self, outcome: Outcome) -> Plan {
        self.plan.outcome = outcome;
        self.plan
    }
}

/// The server's domain, which most verbs cannot do without. A refusal says what brings it back.
fn need_domain<'a>(server: &ServerRecord, facts: &'a Facts) -> Result<&'a DomainFacts, Refusal> {
    facts.domain.as_ref().ok_or_else(|| {
        let helps = match (server.rescue.is_some(), server.vm_state) {
            // The saved definition is in the store.
            (true, VmState::SoftDeleted) => {
                "have an administrator reset its state to active, and unrescue it"
            }
            (true, _) => "unrescue it, which defines its own domain again",
            (false, _) => "have it defined again as it was known (server drift --restore)",
        };
        Refusal::new(
            Reason::DomainNotFound,
            format!(
                "libvirt has no domain {} for server {}: somebody removed it; {helps}",
                server.domain_name, server.id
            ),
        )
    })
}

/// Reads a definition that libvirt printed.
fn read_domain(xml: &str) -> Result<Domain, Refusal> {
    Domain::parse(xml).map_err(|error| {
        Refusal::new(
            Reason::DomainUnsupported,
            format!("the domain's definition cannot be read: {error}"),
        )
    })
}

/// The name under which a server's own disk stands on an image.
fn disk_holder(server: Uuid) -> String {
    format!("servers/{server}/disk")
}

/// The name under which a rescue disk stands on an image.
fn rescue_holder(server: Uuid, plan: Uuid) -> String {
    format!("servers/{server}/rescue/{plan}")
}
