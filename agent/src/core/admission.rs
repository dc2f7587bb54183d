// SPDX-License-Identifier: Apache-2.0
//! Admission: may this verb be done to a server in this state?
//!
//! One table, exhaustive and without a wildcard: a new verb or state does not compile until the table
//! decides about it. The allowed states are Nova's, with the deviations that `docs/STATES.md` lists.

use uuid::Uuid;

use super::{
    action::Verb,
    caller::Who,
    reason::{Reason, Refusal},
    record::{LockOwner, Origin, ServerRecord},
    state::{PowerState, VmState},
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
    /// Only while the guest's CPUs are seen stopped.
    IfPaused,
    /// No.
    No,
}

/// The table.
#[must_use]
pub const fn allowed(verb: Verb, vm_state: VmState) -> Allowed {
    use Allowed::{IfPaused, IfRescued, No, UnlessRescued, Yes};
    use VmState as S;
    match verb {
        // These make the record; there is none yet.
        Verb::Create | Verb::Adopt => No,
        Verb::Delete
        | Verb::ForceDelete
        | Verb::Lock
        | Verb::Unlock
        | Verb::ResetState
        | Verb::Update => match vm_state {
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
        // What was never built has nothing to come back to: it is deleted at once.
        Verb::SoftDelete => match vm_state {
            S::Active
            | S::Paused
            | S::Suspended
            | S::Stopped
            | S::Rescued
            | S::Resized
            | S::Error
            | S::Shelved
            | S::ShelvedOffloaded => Yes,
            S::Building | S::SoftDeleted | S::Deleted => No,
        },
        Verb::Restore => match vm_state {
            S::SoftDeleted => Yes,
            S::Building
            | S::Active
            | S::Paused
            | S::Suspended
            | S::Stopped
            | S::Rescued
            | S::Resized
            | S::Deleted
            | S::Error
            | S::Shelved
            | S::ShelvedOffloaded => No,
        },
        Verb::Reboot | Verb::Pause | Verb::Suspend | Verb::ChangePassword => match vm_state {
            S::Active => Yes,
            S::Building
            | S::Paused
            | S::Suspended
            | S::Stopped
            | S::Rescued
            | S::Resized
            | S::SoftDeleted
            | S::Deleted
            | S::Error
            | S::Shelved
            | S::ShelvedOffloaded => No,
        },
        // From ERROR as Nova does, but not over a rescue: unrescue is the way out of that.
        Verb::HardReboot => match vm_state {
            S::Active | S::Stopped | S::Paused | S::Suspended => Yes,
            S::Error => UnlessRescued,
            S::Building
            | S::Rescued
            | S::Resized
            | S::SoftDeleted
            | S::Deleted
            | S::Shelved
            | S::ShelvedOffloaded => No,
        },
        // What stopped the CPUs of one that should run may have been a full disk, or somebody at the host.
        Verb::Unpause => match vm_state {
            S::Paused => Yes,
            S::Active | S::Rescued | S::Resized | S::Error => IfPaused,
            S::Building
            | S::Suspended
            | S::Stopped
            | S::SoftDeleted
            | S::Deleted
            | S::Shelved
            | S::ShelvedOffloaded => No,
        },
        Verb::Resume => match vm_state {
            S::Suspended => Yes,
            S::Building
            | S::Active
            | S::Paused
            | S::Stopped
            | S::Rescued
            | S::Resized
            | S::SoftDeleted
            | S::Deleted
            | S::Error
            | S::Shelved
            | S::ShelvedOffloaded => No,
        },
        Verb::CrashDump | Verb::DumpMemory => match vm_state {
            S::Active | S::Paused | S::Rescued | S::Resized | S::Error => Yes,
            S::Building
            | S::Suspended
            | S::Stopped
            | S::SoftDeleted
            | S::Deleted
            | S::Shelved
            | S::ShelvedOffloaded => No,
        },
        // While a rescue is in force the definition is the rescue's.
        Verb::AcceptDrift => match vm_state {
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
        // Also from ERROR: without its definition nothing else brings a server back.
        Verb::RestoreDefinition => match vm_state {
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
    }
}

/// What a user can do to get on, said at the end of a refusal. Nothing is to be deleted that something else
/// brings back.
const fn advice(verb: Verb, vm_state: VmState, rescued: bool) -> &'static str {
    match (verb, vm_state) {
        (Verb::Rescue, VmState::Rescued) => "unrescue it first",
        (Verb::Restore, VmState::Deleted) => "it is gone",
        (
            Verb::Restore,
            VmState::Building
            | VmState::Active
            | VmState::Paused
            | VmState::Suspended
            | VmState::Stopped
            | VmState::Rescued
            | VmState::Resized
            | VmState::Error
            | VmState::Shelved
            | VmState::ShelvedOffloaded,
        ) => "it is not deleted",
        (Verb::Unpause, VmState::Active | VmState::Rescued | VmState::Resized | VmState::Error) => {
            "its CPUs are not stopped"
        }
        (
            Verb::Start
            | Verb::Stop
            | Verb::Release
            | Verb::Reboot
            | Verb::HardReboot
            | Verb::Pause
            | Verb::Suspend
            | Verb::Resume
            | Verb::ChangePassword
            | Verb::AcceptDrift
            | Verb::RestoreDefinition,
            VmState::Rescued,
        ) => "unrescue it",
        (Verb::AcceptDrift, VmState::Error) if !rescued => {
            "stop it or reboot it hard first, or put back what is known (server drift --restore)"
        }
        (_, VmState::Error) if rescued => "a rescue is in force; unrescue it",
        (_, VmState::Error) => {
            "its fault says what is left on the host; stop it or reboot it hard, or have an administrator reset its state"
        }
        (_, VmState::Paused) => "unpause it first",
        (_, VmState::Suspended) => "resume it first",
        (Verb::Resume, VmState::Active) => "it runs already",
        (
            Verb::Reboot
            | Verb::Pause
            | Verb::Suspend
            | Verb::ChangePassword
            | Verb::CrashDump
            | Verb::DumpMemory,
            VmState::Stopped,
        ) => "start it first",
        (Verb::Unpause | Verb::Resume, VmState::Stopped) => "it is off; start it",
        (Verb::Start, VmState::Active) => {
            "it is started already; if its guest is gone, reboot it hard"
        }
        (Verb::Stop, VmState::Stopped) => "it is stopped already",
        (Verb::SoftDelete, VmState::SoftDeleted) => {
            "it is deleted already and goes when its time is over; restore it, or force its deletion"
        }
        (_, VmState::SoftDeleted) => "restore it first",
        (_, VmState::Building) => "wait until it is built, or delete it",
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

/// May this caller ask for `verb` at all, be it of this server or to make one?
///
/// # Errors
/// [`Reason::PermissionDenied`].
pub fn permit(verb: Verb, server: Option<&ServerRecord>, who: &Who) -> Result<(), Refusal> {
    if who.is_admin() {
        return Ok(());
    }
    if verb.is_for_admin() {
        return Err(Refusal::new(
            Reason::PermissionDenied,
            format!("only the administrator may ask for {verb}"),
        ));
    }
    match server {
        Some(server) => of_own_project(server, who),
        None => Ok(()),
    }
}

/// A member changes the servers of its project only.
fn of_own_project(server: &ServerRecord, who: &Who) -> Result<(), Refusal> {
    if who.is_admin() || who.owns(server) {
        return Ok(());
    }
    Err(Refusal::new(
        Reason::PermissionDenied,
        format!(
            "server {} does not belong to project {}; its members and the administrator may change it",
            server.id, who.project
        ),
    ))
}

/// Does a lock keep this caller from changing the server?
fn unlocked(
    verb: impl std::fmt::Display,
    server: &ServerRecord,
    who: &Who,
    now_ms: i64,
) -> Result<(), Refusal> {
    let Some(lock) = server.lock_at(now_ms).filter(|_| !who.is_admin()) else {
        return Ok(());
    };
    let by = match lock.by {
        LockOwner::Owner => "its owner",
        LockOwner::Admin => "an administrator",
    };
    let why = match &lock.reason {
        Some(reason) => format!(" ({reason})"),
        None => String::new(),
    };
    let who_can = match lock.by {
        LockOwner::Owner => "unlock it first",
        LockOwner::Admin => "only the administrator can unlock it",
    };
    Err(Refusal::new(
        Reason::ServerLocked,
        format!(
            "cannot {verb} server {}: it was locked by {by}{why}; {who_can}",
            server.id
        ),
    )
    .about("locked_by", lock.by.name()))
}

/// May this caller cancel the operation that is under way on the server?
///
/// # Errors
/// [`Reason::PermissionDenied`], or [`Reason::ServerLocked`].
pub fn admit_cancel(server: &ServerRecord, who: &Who, now_ms: i64) -> Result<(), Refusal> {
    of_own_project(server, who)?;
    unlocked("cancel an operation on", server, who, now_ms)
}

/// May this caller write to the server's serial port? Who may change the server may. A lock is no
/// obstacle (nor is it Nova's consoles'): what is typed is between the caller and the guest.
///
/// # Errors
/// [`Reason::PermissionDenied`].
pub fn admit_writing(server: &ServerRecord, who: &Who) -> Result<(), Refusal> {
    of_own_project(server, who).map_err(|mut refusal| {
        refusal.message.push_str("; look on (read-only)");
        refusal
    })
}

/// May `verb` be done to this server now, if this caller asks for it? Looks at the record only, at the
/// time `now_ms` (in milliseconds since the Unix epoch). First comes who asks, then the lock, then what
/// is under way, then the state (Nova's order: policy, `check_instance_lock`, `check_instance_state`).
///
/// # Errors
/// A [`Refusal`] that says what is in the way and what would help. An operation under way is a
/// [`Reason::ServerBusy`] that names it, unless the verb overtakes or needs no lane.
pub fn admit(verb: Verb, server: &ServerRecord, who: &Who, now_ms: i64) -> Result<(), Refusal> {
    permit(verb, Some(server), who)?;
    if verb.respects_lock() {
        unlocked(verb, server, who, now_ms)?;
    }
    if verb == Verb::Unlock
        && !who.is_admin()
        && server
            .lock_at(now_ms)
            .is_some_and(|lock| lock.by == LockOwner::Admin)
    {
        return Err(Refusal::new(
            Reason::PermissionDenied,
            format!(
                "server {} was locked by an administrator, so only an administrator can unlock it",
                server.id
            ),
        ));
    }
    if verb.needs_lane()
        && let Some(operation) = server.operation
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
        (Allowed::IfPaused, _) if server.power.state == PowerState::Paused => Ok(()),
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
        (Allowed::IfRescued | Allowed::UnlessRescued | Allowed::IfPaused | Allowed::No, _) => {
            Err(Refusal::state(
                "vm_state",
                state.name(),
                format!(
                    "cannot {verb} server {} while it is in vm_state {state}: {}",
                    server.id,
                    advice(verb, state, rescued)
                ),
            ))
        }
    }
}
