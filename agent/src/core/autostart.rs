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

/// Did it run when it was seen last, and is it to come back? A suspended one stays suspended, and one
/// whose operation was under way is that operation's business.
#[must_use]
pub fn comes_back(server: &ServerRecord) -> bool {
    let ran = match server.power.state {
        PowerState::Unknown => server
            .last_known_power
            .as_ref()
            .is_some_and(|power| power.state.is_on()),
        state => state.is_on(),
    };
    let at_rest = server
        .operation_verb
        .is_none_or(|verb| verb == Verb::DeliverPassword);
    ran && at_rest
        && server.autostart
        && matches!(
            server.vm_state,
            VmState::Active | VmState::Paused | VmState::Rescued
        )
}
