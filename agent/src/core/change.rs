// SPDX-License-Identifier: Apache-2.0
//! Changes of a record alone: they touch nothing on the host, so they are made where they are accepted,
//! in one transaction, and no step comes before them.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, Ipv6Addr},
};

use serde::{Deserialize, Serialize};

use super::{
    operation::HostReport,
    record::{Fault, Lock, ServerRecord},
    state::{ObservationSource, PowerObservation, PowerState, VmState},
};

/// A field of a record and what it becomes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FieldChange {
    /// Name.
    Name(String),
    /// Description.
    Description(Option<String>),
    /// All of the metadata.
    Metadata(BTreeMap<String, String>),
    /// All of the tags.
    Tags(Vec<String>),
    /// IPv4 address by which people reach it.
    AccessIpv4(Option<Ipv4Addr>),
    /// IPv6 address by which people reach it.
    AccessIpv6(Option<Ipv6Addr>),
    /// Time for the guest to shut down, in milliseconds; the host's if `None`.
    ShutdownTimeout(Option<u64>),
    /// Start it again after the host was rebooted, if it ran before.
    Autostart(bool),
    /// Its place then.
    AutostartOrder(Option<u32>),
}

/// What changes in a record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum RecordChange {
    /// Nothing: it is so already.
    Nothing,
    /// It is locked.
    Lock(Lock),
    /// It is not locked any more.
    Unlock,
    /// Fields get new values.
    Update(Vec<FieldChange>),
    /// Its state is what the administrator says.
    Reset {
        /// The vm state.
        vm_state: VmState,
        /// Why it is in ERROR, if it is.
        fault: Option<Fault>,
        /// What the host really shows.
        host: HostReport,
    },
}

impl RecordChange {
    /// Makes the change.
    pub fn apply(&self, record: &mut ServerRecord, now_ms: i64) {
        match self {
            Self::Nothing => {}
            Self::Lock(lock) => record.lock = Some(lock.clone()),
            Self::Unlock => record.lock = None,
            Self::Update(fields) => {
                for field in fields {
                    field.apply(record);
                }
            }
            Self::Reset {
                vm_state,
                fault,
                host,
            } => {
                record.vm_state = *vm_state;
                record.fault.clone_from(fault);
                record.task_state = None;
                // It is no longer on its way out, so nothing reclaims it.
                record.deletion = None;
                record.settled_at_ms = now_ms;
                if host.power != PowerState::Unknown {
                    record.power = PowerObservation {
                        state: host.power,
                        reason: host.power_reason.clone(),
                        observed_at_ms: host.at_ms,
                        source: ObservationSource::Poll,
                    };
                    record.last_known_power = None;
                }
            }
        }
    }
}

impl FieldChange {
    fn apply(&self, record: &mut ServerRecord) {
        match self {
            Self::Name(name) => record.name.clone_from(name),
            Self::Description(text) => record.description.clone_from(text),
            Self::Metadata(metadata) => record.metadata.clone_from(metadata),
            Self::Tags(tags) => record.tags.clone_from(tags),
            Self::AccessIpv4(address) => record.access_ipv4 = *address,
            Self::AccessIpv6(address) => record.access_ipv6 = *address,
            Self::ShutdownTimeout(time) => record.shutdown_timeout_ms = *time,
            Self::Autostart(wanted) => record.autostart = *wanted,
            Self::AutostartOrder(place) => record.autostart_order = *place,
        }
    }
}
