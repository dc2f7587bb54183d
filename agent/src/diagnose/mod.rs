// SPDX-License-Identifier: Apache-2.0
//! Everything that can be told of a domain and its guest now.
//!
//! Each part is read by itself, all at the same time, and each within its own time: a QEMU that hangs
//! costs the parts that ask it, and nobody else anything. Nothing is changed.

mod process;

use std::{future::Future, time::Duration};

use tokio::time::timeout;
use uuid::Uuid;

pub use process::Process;

use crate::{
    core::{
        reason::{Reason, Refusal},
        state::PowerState,
    },
    hypervisor::{
        Control, Counters, Definition, DiskError, DomainStatus, GuestInfo, Hypervisor,
        HypervisorError,
    },
    storage::apart,
};

/// How long a part may take.
const PART: Duration = Duration::from_secs(9);

/// A part: read, not applicable, or why it could not be read.
pub type Part<T> = Result<Option<T>, Refusal>;

/// What was read.
#[derive(Debug)]
pub struct Diagnosis {
    /// What libvirt says of the domain.
    pub domain: Part<DomainStatus>,
    /// The guest's process.
    pub process: Part<Process>,
    /// How libvirt stands with it.
    pub control: Part<Control>,
    /// Counters.
    pub counters: Part<Counters>,
    /// Disks with errors.
    pub disk_errors: Part<Vec<DiskError>>,
    /// What libvirt has to say about the domain.
    pub messages: Part<Vec<String>>,
    /// The guest agent.
    pub guest_agent: Part<GuestInfo>,
    /// The running guest's definition.
    pub live: Part<String>,
    /// The persistent definition.
    pub inactive: Part<String>,
}

/// Within its time, or the refusal that it took longer.
async fn part<T>(applies: bool, work: impl Future<Output = Result<T, HypervisorError>>) -> Part<T> {
    if !applies {
        return Ok(None);
    }
    match timeout(PART, work).await {
        Ok(Ok(part)) => Ok(Some(part)),
        // It has gone meanwhile, or there is none of this kind.
        Ok(Err(HypervisorError::NoDomain { .. })) => Ok(None),
        Ok(Err(error)) => Err(error.into()),
        Err(_) => Err(late()),
    }
}

fn late() -> Refusal {
    Refusal::new(
        Reason::DeadlineExceeded,
        format!("not read within {} s", PART.as_secs()),
    )
}

/// Reads everything about a domain; its definitions only if asked to.
pub async fn diagnose(hypervisor: &dyn Hypervisor, id: Uuid, definitions: bool) -> Diagnosis {
    let domain = match timeout(PART, hypervisor.domain(id)).await {
        Ok(read) => read.map_err(Refusal::from),
        Err(_) => Err(late()),
    };
    let there = !matches!(domain, Ok(None));
    // If it cannot be said whether it runs, the parts say what they can.
    let runs = match &domain {
        Ok(status) => status
            .as_ref()
            .is_some_and(|status| status.power.is_on() || status.power == PowerState::Crashed),
        Err(_) => true,
    };
    // One after the other: libvirt lets one of them ask QEMU at a time, and counters do not wait.
    let asked = async {
        let counters = part(runs, hypervisor.counters(id)).await;
        (counters, part(runs, hypervisor.disk_errors(id)).await)
    };
    let (process, control, asked, messages, guest_agent, live, inactive) = tokio::join!(
        process_of(runs, id),
        part(runs, hypervisor.control(id)),
        asked,
        part(there, hypervisor.domain_messages(id)),
        part(runs, hypervisor.guest_info(id)),
        part(
            runs && definitions,
            hypervisor.domain_xml(id, Definition::Live)
        ),
        part(
            there && definitions,
            hypervisor.domain_xml(id, Definition::Inactive)
        ),
    );
    let (counters, disk_errors) = asked;
    Diagnosis {
        domain,
        process,
        control,
        counters,
        disk_errors,
        messages,
        guest_agent,
        live,
        inactive,
    }
}

async fn process_of(runs: bool, id: Uuid) -> Part<Process> {
    if !runs {
        return Ok(None);
    }
    match apart::look("processes", move || process::of(id)).await {
        Ok(Some(process)) => Ok(Some(process)),
        Ok(None) => Err(Refusal::new(
            Reason::DomainNotFound,
            "no process of this host has the domain's uuid in its command line",
        )),
        Err(error) => Err(Refusal::new(Reason::DeadlineExceeded, error.to_string())),
    }
}
