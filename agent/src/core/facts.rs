// SPDX-License-Identifier: Apache-2.0
//! What a planner must know of the host, gathered by read-only probes before it plans.

use std::collections::{BTreeMap, BTreeSet};

use salvor_domain_templates::Domain;
use uuid::Uuid;

use super::{
    backing::References, caller::Who, image::ImageRecord, layout::Layout, operation::HostReport,
    record::Owner, state::PowerState,
};

/// The host.
#[derive(Debug, Clone)]
pub struct HostFacts {
    /// Where things are.
    pub layout: Layout,
    /// Domain type of new domains: `kvm` or `qemu`.
    pub virt_type: String,
    /// CPU architecture.
    pub arch: String,
    /// Free bytes on the filesystem that servers' files are made on; 0 for an action that makes none there.
    pub free_bytes: u64,
    /// Bytes that must stay free.
    pub reserve_bytes: u64,
    /// Rescues end by themselves after this time in milliseconds, if the request does not say; 0 never.
    pub rescue_timeout_ms: u64,
    /// Soft-deleted servers are removed after this time in milliseconds; 0 if there is no soft delete.
    pub reclaim_ms: u64,
    /// The time now, in milliseconds since the Unix epoch.
    pub now_ms: i64,
}

/// What the host has for a new domain. What cannot be told is `None`, and not checked.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Capacity {
    /// Memory in MiB.
    pub memory_mib: u64,
    /// The most CPUs that a guest of the machine type can have.
    pub max_vcpus: Option<u32>,
    /// libvirt's networks, each with whether it is active.
    pub networks: Option<BTreeMap<String, bool>>,
    /// The network interfaces, bridges among them.
    pub interfaces: Option<BTreeSet<String>>,
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
    /// The file with its UEFI variables, if there is one. Only for a rescue.
    pub nvram: Option<String>,
    /// Files and devices of its disks that are not there, by target. Only for a rescue.
    pub missing: BTreeMap<String, String>,
    /// What was attached to the running domain and not to its definition, in words; only for a rescue.
    pub live_only: Vec<String>,
    /// What a look at its disks showed, by target, or why it cannot be told. Nothing that a guest wrote
    /// is opened as anything but what the definition says. Only for a rescue with overlays.
    pub disks: BTreeMap<String, Result<DiskLook, String>>,
    /// Why the agent could not write to a disk, by target. Only for a rescue that protects disks.
    pub unwritable: BTreeMap<String, String>,
}

/// What a look at a disk shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskLook {
    /// Virtual size in bytes.
    pub size: u64,
    /// The other files that belong to it.
    pub references: References,
}

/// What runs in the live domain and is not in its persistent definition: disks by their targets, network
/// interfaces by their MAC addresses. Sources are not compared: libvirt shows a running disk's whole
/// chain, and the file that stands for a volume.
#[must_use]
pub fn live_only(persistent: &Domain, live: &Domain) -> Vec<String> {
    let disks = live
        .disks()
        .iter()
        .filter(|disk| persistent.disk(&disk.target).is_none())
        .map(|disk| match disk.path() {
            Some(path) => format!("disk {} ({path})", disk.target),
            None => format!("disk {}", disk.target),
        });
    let known: BTreeSet<String> = persistent
        .interfaces()
        .into_iter()
        .filter_map(|nic| Some(nic.mac?.to_ascii_lowercase()))
        .collect();
    let nics = live
        .interfaces()
        .into_iter()
        .filter_map(|nic| nic.mac)
        .filter(|mac| !known.contains(&mac.to_ascii_lowercase()))
        .map(|mac| format!("network interface {mac}"));
    disks.chain(nics).collect()
}

impl Facts {
    /// To whom a server belongs that is made for the caller.
    #[must_use]
    pub fn owner(&self) -> Owner {
        Owner {
            project_id: self.who.project.clone(),
            user_id: self.who.user.clone(),
        }
    }
}

/// The room that committing an overlay may need.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CommitSpace {
    /// Bytes that the overlay holds.
    pub allocated: u64,
    /// Bytes that are free on the filesystem of the disk under it.
    pub free: u64,
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

/// The room where libvirt saves the memory of guests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SaveRoom {
    /// The folder.
    pub folder: String,
    /// Bytes that are free on its file system.
    pub free_bytes: u64,
}

/// What a look at a guest's agent showed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AgentLook {
    /// It answers.
    Answers,
    /// It does not, in libvirt's words.
    Silent(String),
    /// It did not answer so often that it is not asked for now.
    GivenUp {
        /// So often in a row.
        failures: u32,
        /// It is asked again after so many seconds.
        seconds: u64,
    },
}

/// Everything a planner may ask for. A verb gathers what it needs.
#[derive(Debug, Clone)]
pub struct Facts {
    /// Id of the plan to be.
    pub plan: Uuid,
    /// Host.
    pub host: HostFacts,
    /// What it has for a new domain; only for a create.
    pub capacity: Option<Capacity>,
    /// The server's domain; `None` if libvirt has none.
    pub domain: Option<DomainFacts>,
    /// The image that the action names or implies.
    pub image: Option<ImageFacts>,
    /// The saved definition, while a rescue is in force.
    pub saved_xml: Option<String>,
    /// The definition that is known to be the server's own; only for verbs about that,
    /// and for those that must not lose a domain that has no definition.
    pub known_xml: Option<String>,
    /// For a commit of overlays onto files: the room for each, by the overlay's path.
    pub commit_space: BTreeMap<String, CommitSpace>,
    /// For a commit of overlays: the other files that the disk under each refers to now, or why that
    /// cannot be told, by the overlay's path. Where the disk or the overlay is gone there is none.
    pub commit_references: BTreeMap<String, Result<References, String>>,
    /// For a suspend: where the memory goes. `None` if it cannot be told.
    pub save_room: Option<SaveRoom>,
    /// For a change of a password: does the guest agent answer?
    pub agent: Option<AgentLook>,
    /// For whom the action is asked.
    pub who: Who,
    /// What the host shows of the server; only for a reset of its state.
    pub host_report: Option<HostReport>,
}
