// SPDX-License-Identifier: Apache-2.0
//! Which servers come back after a reboot of their host, and how far that is.

use uuid::Uuid;

use super::{
    action::Verb,
    record::ServerRecord,
    state::{PowerState, VmState, named_states},
};

named_states! {
    /// What became of a server that is to come back.
    pub enum ComebackState {
        /// Its turn has not come, or it is tried again.
        Waiting = "waiting",
        /// The agent started it.
        Started = "started",
        /// There was nothing to do: it ran already, or is not to come back any more.
        LeftAlone = "left-alone",
        /// It cannot be started.
        Failed = "failed",
    }
}

/// A server that ran when its host went down.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Comeback {
    /// Which.
    pub server: Uuid,
    /// What it was.
    pub was: VmState,
    /// How often it was tried in vain.
    pub tries: u32,
    /// What became of it.
    pub state: ComebackState,
    /// Why, for people; empty if there is nothing to be said.
    pub message: String,
}

/// Did it run when it was seen last, and is it to come back? A suspended one stays suspended. Of an operation
/// that was under way the recovery makes what it was to be, or takes it back; where that leaves the server off,
/// it comes back all the same, unless the operation was to end it.
#[must_use]
pub fn comes_back(server: &ServerRecord) -> bool {
    let ran = match server.power.state {
        PowerState::Unknown => server
            .last_known_power
            .as_ref()
            .is_some_and(|power| power.state.is_on()),
        state => state.is_on(),
    };
    ran && !server.operation_verb.is_some_and(ends_it)
        && server.autostart
        && matches!(
            server.vm_state,
            VmState::Active | VmState::Paused | VmState::Rescued
        )
}

/// Is a server not to run after this verb, or no business of the agent's any more? What is said of the others is
/// found out when it is their server's turn ([`turn`]): a suspend that was in time has made it SUSPENDED.
const fn ends_it(verb: Verb) -> bool {
    match verb {
        Verb::Stop | Verb::Delete | Verb::ForceDelete | Verb::SoftDelete | Verb::Release => true,
        Verb::Create
        | Verb::Adopt
        | Verb::Start
        | Verb::Rescue
        | Verb::Unrescue
        | Verb::DeliverPassword
        | Verb::Reboot
        | Verb::HardReboot
        | Verb::Pause
        | Verb::Unpause
        | Verb::Suspend
        | Verb::Resume
        | Verb::CrashDump
        | Verb::DumpMemory
        | Verb::ChangePassword
        | Verb::Lock
        | Verb::Unlock
        | Verb::ResetState
        | Verb::Restore
        | Verb::Update
        | Verb::AcceptDrift
        | Verb::RestoreDefinition
        | Verb::StartRescue => false,
    }
}

/// What is to be done about a server that was `was` before the reboot, and is seen off now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    /// It is started.
    Start,
    /// Its rescue guest is.
    StartRescue,
    /// What was seen is not drawn into the record yet.
    Wait,
    /// It stays off, and that is right.
    LeaveOff(&'static str),
    /// It should run, and cannot be started.
    Fail,
}

/// The table of [`Turn`].
#[must_use]
pub const fn turn(was: VmState, vm_state: VmState) -> Turn {
    match vm_state {
        VmState::Stopped => match was {
            // Who ended the rescue has said whether the server is then started.
            VmState::Rescued => Turn::LeaveOff("its rescue ended meanwhile, and it was left off"),
            _ => Turn::Start,
        },
        VmState::Rescued => Turn::StartRescue,
        VmState::Active | VmState::Paused => Turn::Wait,
        VmState::Suspended => Turn::LeaveOff("it is suspended"),
        VmState::SoftDeleted | VmState::Deleted => Turn::LeaveOff("it is deleted"),
        VmState::Shelved | VmState::ShelvedOffloaded => Turn::LeaveOff("it is shelved"),
        VmState::Building | VmState::Resized | VmState::Error => Turn::Fail,
    }
}
