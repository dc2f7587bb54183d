// SPDX-License-Identifier: Apache-2.0
//! Admission: may this verb be done to a server in this state?
//!
//! One table, exhaustive and without a wildcard: a new verb or state does not compile until the table
//! decides about it. The allowed states are Nova's, with the deviations that `docs/STATES.md` lists.

use uuid::Uuid;

use super::{
    action::Verb,
    reason::{Reason, Refusal},
    record::{Origin, ServerRecord},
    state::VmState,
};

/// What the table says of a verb in a vm state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Allowed {
    /// Yes.
    Yes,
    /// Only while a rescue is in force: there is a saved definition to go back to.
    IfRescued,
    /// Only while no rescue is in force: a second one would lose the way back.
    UnlessRescued,
    /// No.
    No,
}

/// The table.
#[must_use]
pub const fn allowed(verb: Verb, vm_state: VmState) -> Allowed {
    use Allowed::{IfRescued, No, UnlessRescued, Yes};
    use VmState as S;
    match verb {
        // These make the record; there is none yet.
        Verb::Create | Verb::Adopt => No,
        Verb::Delete => match vm_state {
            S::Building
            | S::Active
            | S::Paused
            | S::Suspended
            | S::Stopped
            | S::Rescued
            | S::Resized
            | S::SoftDeleted
            | S::Error
            | S::Shelved
            | S::ShelvedOffloaded => Yes,
            S::Deleted => No,
        },
        Verb::Release => match vm_state {
            S::Active | S::Paused | S::Suspended | S::Stopped => Yes,
            S::Error => UnlessRescued,
            S::Building
            | S::Rescued
            | S::Resized
            | S::SoftDeleted
            | S::Deleted
            | S::Shelved
            | S::ShelvedOffloaded => No,
        },
        Verb::Start => match vm_state {
            S::Stopped => Yes,
            S::Building
            | S::Active
            | S::Paused
            | S::Suspended
            | S::Rescued
            | S::Resized
            | S::SoftDeleted
            | S::Deleted
            | S::Error
            | S::Shelved
            | S::ShelvedOffloaded => No,
        },
        Verb::Stop => match vm_state {
            S::Active => Yes,
            // Stopping a half-undone rescue would call it stopped; unrescue is the way out.
            S::Error => UnlessRescued,
            S::Building
            | S::Paused
            | S::Suspended
            | S::Stopped
            | S::Rescued
            | S::Resized
            | S::SoftDeleted
            | S::Deleted
            | S::Shelved
            | S::ShelvedOffloaded => No,
        },
        Verb::Rescue => match vm_state {
            S::Active | S::Stopped | S::Error => UnlessRescued,
            S::Building
            | S::Paused
            | S::Suspended
            | S::Rescued
            | S::Resized
            | S::SoftDeleted
            | S::Deleted
            | S::Shelved
            | S::ShelvedOffloaded => No,
        },
        Verb::Unrescue => match vm_state {
            S::Rescued => Yes,
            // The way back from a rescue or unrescue whose roll-back failed.
            S::Error => IfRescued,
            S::Building
            | S::Active
            | S::Paused
            | S::Suspended
            | S::Stopped
            | S::Resized
            | S::SoftDeleted
            | S::Deleted
            | S::Shelved
            | S::ShelvedOffloaded => No,
        },
        Verb::DeliverPassword | Verb::StartRescue => match vm_state {
            S::Rescued => Yes,
            S::Building
            | S::Active
            | S::Paused
            | S::Suspended
            | S::Stopped
            | S::Resized
            | S::SoftDeleted
            | S::Deleted
            | S::Error
            | S::Shelved
            | S::ShelvedOffloaded => No,
        },
        // While a rescue is in force the definition is the rescue's.
        Verb::AcceptDrift | Verb::RestoreDefinition => match vm_state {
            S::Active | S::Paused | S::Suspended | S::Stopped => Yes,
            S::Building
            | S::Rescued
            | S::Resized
            | S::SoftDeleted
            | S::Deleted
            | S::Error
            | S::Shelved
            | S::ShelvedOffloaded => No,
        },
    }
}

/// What a user can do to get on, said at the end of a refusal.
const fn advice(verb: Verb, vm_state: VmState) -> &'static str {
    match (verb, vm_state) {
        (Verb::Rescue, VmState::Rescued) => "unrescue it first",
        (
            Verb::Start | Verb::Stop | Verb::Release | Verb::AcceptDrift | Verb::RestoreDefinition,
            VmState::Rescued,
        ) => "unrescue it",
        (Verb::Start, VmState::Active) => "it is started already",
        (Verb::Stop, VmState::Stopped) => "it is stopped already",
        (Verb::Start, VmState::Error) => "stop it first, or unrescue it if a rescue is in force",
        (_, VmState::Building) => "wait until it is built, or delete it",
        (_, VmState::Error) => {
            "its fault says what is left on the host; unrescue it if a rescue is in force, else delete it"
        }
        _ => "its state has to change first",
    }
}

/// The refusal of a verb while `operation` has the server's lane.
pub fn busy(verb: Verb, server: &ServerRecord, operation: Uuid) -> Refusal {
    let task = server.task_state.map_or("busy", |task| task.name());
    Refusal::new(
        Reason::ServerBusy,
        format!(
            "cannot {verb} server {}: operations/{operation} is under way ({task}); wait for it or cancel it",
            server.id
        ),
    )
    .about("operation", format!("operations/{operation}"))
}

/// May `verb` be done to this server now? Looks at the record only.
///
/// # Errors
/// A [`Refusal`] that says which state is in the way and what would help. An operation under way is a
/// [`Reason::ServerBusy`] that names it, unless the verb overtakes.
pub fn admit(verb: Verb, server: &ServerRecord) -> Result<(), Refusal> {
    if let Some(operation) = server.operation
        && !server
            .operation_verb
            .is_some_and(|under_way| verb.overtakes(under_way))
    {
        return Err(busy(verb, server, operation));
    }
    if verb == Verb::Release && server.origin != Origin::Adopted {
        return Err(Refusal::new(
            Reason::NotAdopted,
            format!(
                "server {} was created here, so its disks are the agent's; delete it instead of releasing it",
                server.id
            ),
        ));
    }
    let state = server.vm_state;
    let rescued = server.rescue.is_some();
    match (allowed(verb, state), rescued) {
        (Allowed::Yes, _) | (Allowed::IfRescued, true) | (Allowed::UnlessRescued, false) => Ok(()),
        (Allowed::UnlessRescued, true) | (Allowed::No, true) if verb == Verb::Rescue => {
            Err(Refusal::new(
                Reason::AlreadyRescued,
                format!(
                    "cannot rescue server {}: a rescue is in force and its way back is saved; unrescue it first",
                    server.id
                ),
            ))
        }
        (Allowed::IfRescued, false) | (Allowed::No, false) if verb == Verb::Unrescue => {
            Err(Refusal::new(
                Reason::NotRescued,
                format!(
                    "cannot unrescue server {}: it is {state}, and no rescue is in force",
                    server.id
                ),
            ))
        }
        (Allowed::IfRescued | Allowed::UnlessRescued | Allowed::No, _) => Err(Refusal::state(
            "vm_state",
            state.name(),
            format!(
                "cannot {verb} server {} while it is in vm_state {state}: {}",
                server.id,
                advice(verb, state)
            ),
        )),
    }
}
