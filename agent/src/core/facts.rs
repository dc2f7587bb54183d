// SPDX-License-Identifier: Apache-2.0
//! What a planner must know of the host, gathered by read-only probes before it plans.

use std::collections::BTreeMap;

use uuid::Uuid;

use super::{image::ImageRecord, layout::Layout, state::PowerState};

/// The host.
#[derive(Debug, Clone)]
pub struct HostFacts {
    /// Where things are.
    pub layout: Layout,
    /// Domain type of new domains: `kvm` or `qemu`.
    pub virt_type: String,
    /// CPU architecture.
    pub arch: String,
    /// Free bytes on the filesystem of the state folder.
    pub free_bytes: u64,
    /// Bytes that must stay free.
    pub reserve_bytes: u64,
    /// Rescues end by themselves after this time in milliseconds, if the request does not say; 0 never.
    pub rescue_timeout_ms: u64,
    /// The time now, in milliseconds since the Unix epoch.
    pub now_ms: i64,
}

/// A domain.
#[derive(Debug, Clone)]
pub struct DomainFacts {
    /// uuid.
    pub id: Uuid,
    /// Name.
    pub name: String,
    /// The persistent definition, with security info, as libvirt prints it.
    pub xml: String,
    /// Power state.
    pub power: PowerState,
    /// libvirt's reason for it.
    pub power_reason: String,
    /// It has a persistent definition.
    pub persistent: bool,
    /// There is saved memory that the next start would restore.
    pub managed_save: bool,
    /// The file with its UEFI variables is there.
    pub nvram_present: bool,
    /// Virtual sizes of its disks in bytes, by target; only of those that could be told without
    /// opening guest-written data as anything but what the definition says.
    pub disk_sizes: BTreeMap<String, u64>,
}

/// An image and its file.
#[derive(Debug, Clone)]
pub struct ImageFacts {
    /// Record.
    pub record: ImageRecord,
    /// File.
    pub path: String,
    /// The file is there and has the recorded size.
    pub present: bool,
}

/// Everything a planner may ask for. A verb gathers what it needs.
#[derive(Debug, Clone)]
pub struct Facts {
    /// Id of the plan to be.
    pub plan: Uuid,
    /// Host.
    pub host: HostFacts,
    /// The server's domain; `None` if libvirt has none.
    pub domain: Option<DomainFacts>,
    /// The image that the action names or implies.
    pub image: Option<ImageFacts>,
    /// The saved definition, while a rescue is in force.
    pub saved_xml: Option<String>,
}
