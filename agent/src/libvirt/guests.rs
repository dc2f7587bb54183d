// SPDX-License-Identifier: Apache-2.0
//! What guests, their QEMU and their agents are asked, with the time limit that keeps a guest from holding
//! a thread.

use std::time::Duration;

use uuid::Uuid;
use virt::domain::Domain;
use virt::error::ErrorNumber;
use virt::sys;

use super::Libvirt;
use super::call::Call;
use super::connections::Class;
use super::errors::{Failure, agent_failure, is};
use crate::hypervisor::{Ask, HypervisorError, HypervisorResult};

/// How long libvirt waits for a guest agent.
const AGENT_TIMEOUT: Duration = Duration::from_secs(5);

impl Libvirt {
    /// Like [`Self::call`], for what asks a guest or its QEMU: while an earlier call of the domain
    /// hangs, a further one would only hang too.
    pub(super) async fn ask_guest<T, F>(
        &self,
        id: Uuid,
        name: &'static str,
        work: F,
    ) -> HypervisorResult<T>
    where
        T: Send + 'static,
        F: FnOnce(&Domain) -> Result<T, Failure> + Send + 'static,
    {
        if let Some(stuck) = self.shared.stuck.of(id).filter(|stuck| self.hangs(stuck)) {
            return Err(HypervisorError::Deadline {
                call: stuck.call,
                after: stuck.age,
            });
        }
        let call = Call::new(name, self.shared.config.guest_timeout).about(id);
        self.call(Class::Mutate, call, move |connect| {
            work(&connect.lookup_domain_by_uuid(id)?)
        })
        .await
    }

    pub(super) async fn ask_agent(&self, id: Uuid, command: String) -> HypervisorResult<()> {
        let timeout = AGENT_TIMEOUT.min(self.shared.config.guest_timeout / 2);
        let seconds = i32::try_from(timeout.as_secs().max(1)).unwrap_or(i32::MAX);
        self.ask_guest(id, "virDomainQemuAgentCommand", move |domain| {
            let asked = domain.qemu_agent_command(&command, seconds, 0);
            asked.map(drop).map_err(agent_failure)
        })
        .await
    }

    /// Asks the guest to shut down.
    pub(super) async fn ask_to_shut_down(&self, id: Uuid, how: Ask) -> HypervisorResult<()> {
        if how == Ask::GuestAgent {
            // The agent answers a shutdown that it makes by not answering: libvirt's own call knows that.
            return self
                .ask_guest(id, "virDomainShutdownFlags", |domain| {
                    domain
                        .shutdown_flags(sys::VIR_DOMAIN_SHUTDOWN_GUEST_AGENT)
                        .map_err(agent_failure)
                })
                .await;
        }
        self.ask_guest(id, "virDomainShutdownFlags", |domain| {
            match domain.shutdown_flags(sys::VIR_DOMAIN_SHUTDOWN_ACPI_POWER_BTN) {
                // A driver with one way only, such as the test driver. (QEMU's would go to the
                // guest agent without the flag.)
                Err(error) if is(&error, ErrorNumber::InvalidArg) => Ok(domain.shutdown()?),
                answer => Ok(answer?),
            }
        })
        .await
    }
}
