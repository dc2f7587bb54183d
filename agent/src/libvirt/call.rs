// SPDX-License-Identifier: Apache-2.0
//! One call to libvirt: what it is about, who waits for it, and what becomes of it when libvirt does not
//! answer. It does not know what is asked.

use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use super::connections::{Connections, Notice};
use super::threads::Ticket;
use crate::hypervisor::HypervisorError;

/// Which libvirt function is called about what, and for how long it is waited for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Call {
    pub(super) name: &'static str,
    pub(super) domain: Option<Uuid>,
    pub(super) deadline: Duration,
}

impl Call {
    pub(super) const fn new(name: &'static str, deadline: Duration) -> Self {
        Self {
            name,
            domain: None,
            deadline,
        }
    }

    pub(super) const fn about(mut self, domain: Uuid) -> Self {
        self.domain = Some(domain);
        self
    }

    pub(super) const fn too_late(&self) -> HypervisorError {
        HypervisorError::Deadline {
            call: self.name,
            after: self.deadline,
        }
    }
}

/// A caller that waits. When it stops waiting without an answer, at its deadline or because it was
/// dropped, the call is given up.
pub(super) struct Waiting<'a> {
    pub(super) shared: &'a Connections,
    pub(super) ticket: Option<&'a Arc<Ticket>>,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if let Some(ticket) = self.ticket {
            self.shared.stuck.give_up(ticket);
        }
    }
}

pub(super) fn link_down(shared: &Connections, error: &virt::error::Error) -> HypervisorError {
    shared.notify(Notice::Look);
    let reason = error.message().to_owned();
    HypervisorError::LinkDown { reason }
}

pub(super) fn panicked(call: &'static str) -> HypervisorError {
    HypervisorError::Refused {
        call,
        message: "the libvirt binding panicked; the log says where".to_owned(),
    }
}
