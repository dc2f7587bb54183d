// SPDX-License-Identifier: Apache-2.0
//! For whom a call is made: a role, a user and a project.
//!
//! Who reaches the agent's socket is the administrator. A control plane that acts for a user says so, and
//! that can only lower rights. It does not know how a call says it; see the edge of the API.

use super::{record::ServerRecord, state::named_states};

named_states! {
    /// What a caller may do.
    pub enum Role {
        /// Everything.
        Admin = "admin",
        /// What the owners of servers may do with those of their project.
        Member = "member",
    }
}

/// For whom a call is made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Who {
    /// Role.
    pub role: Role,
    /// User; empty if nobody said.
    pub user: String,
    /// Project; empty if nobody said, and then no server is its own.
    pub project: String,
}

impl Default for Who {
    /// The administrator, and nobody in particular.
    fn default() -> Self {
        Self {
            role: Role::Admin,
            user: String::new(),
            project: String::new(),
        }
    }
}

impl Who {
    /// Is it the administrator?
    #[must_use]
    pub fn is_admin(&self) -> bool {
        self.role == Role::Admin
    }

    /// Is the server one of the caller's project?
    #[must_use]
    pub fn owns(&self, server: &ServerRecord) -> bool {
        !self.project.is_empty() && self.project == server.owner.project_id
    }
}
