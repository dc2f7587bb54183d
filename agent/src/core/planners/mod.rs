// SPDX-License-Identifier: Apache-2.0
//! Planners: from an accepted action and the facts of the host to a plan. One file for each verb
//! that has more to it than a step or two.
//!
//! A planner refuses what it can see to be impossible; what it returns is meant to succeed.

mod adopt;
mod create;
mod delete;
mod power;
mod protect;
mod rescue;
mod unrescue;

use salvor_domain_templates::{DiskSource, Domain, Templates};
use uuid::Uuid;

use super::{
    action::{Action, Verb},
    facts::{DomainFacts, Facts},
    plan::{Outcome, Phase, Plan, PlannedStep, RescueChange, Step},
    reason::{Reason, Refusal},
    record::{DiskSummary, NicSummary, ServerRecord},
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
        (Action::Delete, Some(server)) => Ok(delete::plan(server, facts)),
        (Action::Start, Some(server)) => power::start(server, facts),
        (Action::Stop(shutdown), Some(server)) => Ok(power::stop(server, *shutdown, facts)),
        (Action::Rescue(args), Some(server)) => rescue::plan(server, args, facts, templates),
        (Action::Unrescue(args), Some(server)) => unrescue::plan(server, args, facts),
        (Action::DeliverPassword, Some(server)) => rescue::deliver_password(server, facts),
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
            | Action::DeliverPassword,
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
        }
    }

    fn step(&mut self, phase: Phase, step: Step) {
        self.plan.steps.push(PlannedStep { phase, step });
    }

    fn becomes(mut self, vm_state: VmState, rescue: RescueChange) -> Plan {
        self.plan.outcome = Outcome::Change {
            vm_state,
            rescue,
            devices: None,
        };
        self.plan
    }

    fn ends(mut self, outcome: Outcome) -> Plan {
        self.plan.outcome = outcome;
        self.plan
    }
}

/// The server's domain, which most verbs cannot do without.
fn need_domain<'a>(server: &ServerRecord, facts: &'a Facts) -> Result<&'a DomainFacts, Refusal> {
    facts.domain.as_ref().ok_or_else(|| {
        Refusal::new(
            Reason::DomainNotFound,
            format!(
                "libvirt has no domain {} for server {}; somebody removed it; delete the server",
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

/// What a record shows of a definition's devices.
fn summaries(domain: &Domain) -> (Vec<DiskSummary>, Vec<NicSummary>) {
    let root = domain.root_disk().map(|disk| disk.index);
    let disks = domain
        .disks()
        .iter()
        .map(|disk| DiskSummary {
            target: disk.target.clone(),
            bus: disk.bus.clone(),
            device: disk.device.as_str().to_owned(),
            source: source_name(&disk.source),
            format: disk.format.clone().unwrap_or_default(),
            read_only: disk.readonly,
            root: Some(disk.index) == root,
        })
        .collect();
    let nics = domain
        .interfaces()
        .into_iter()
        .map(|nic| NicSummary {
            mac: nic.mac.unwrap_or_default(),
            kind: nic.kind,
            source: nic.source.unwrap_or_default(),
            model: nic.model.unwrap_or_default(),
        })
        .collect();
    (disks, nics)
}

fn source_name(source: &DiskSource) -> String {
    match source {
        DiskSource::File(path) | DiskSource::Block(path) => path.clone(),
        DiskSource::Network { protocol, name } => {
            format!("{protocol}:{}", name.as_deref().unwrap_or_default())
        }
        DiskSource::Volume { pool, volume } => format!("{pool}/{volume}"),
        DiskSource::Other(kind) => kind.clone(),
        DiskSource::None => String::new(),
    }
}

/// The name under which a server's own disk stands on an image.
fn disk_holder(server: Uuid) -> String {
    format!("servers/{server}/disk")
}

/// The name under which a rescue disk stands on an image.
fn rescue_holder(server: Uuid, plan: Uuid) -> String {
    format!("servers/{server}/rescue/{plan}")
}
