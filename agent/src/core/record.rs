// SPDX-License-Identifier: Apache-2.0
//! Records of servers: what the agent remembers, and what it shows.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, Ipv6Addr},
};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{
    action::Verb,
    backing::References,
    reason::Reason,
    reconcile::Mismatched,
    state::{PowerObservation, PowerState, Status, TaskState, VmState, named_states, status},
};

named_states! {
    /// How a server came to be managed.
    pub enum Origin {
        /// Made from an image.
        Created = "created",
        /// A domain that existed in libvirt and was taken over.
        Adopted = "adopted",
    }
}

/// The size of a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Flavor {
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Root disk in GiB; 0 means the image's own size.
    pub disk_gib: u64,
}

/// A disk as the server's own definition names it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskSummary {
    /// Target name (`vda`).
    pub target: String,
    /// Bus.
    pub bus: String,
    /// Device type (`disk`, `cdrom`, …).
    pub device: String,
    /// File, device or volume behind it; empty without a medium.
    pub source: String,
    /// Format that the definition states.
    pub format: String,
    /// Cannot be written.
    pub read_only: bool,
    /// The server boots from it.
    pub root: bool,
}

/// A network interface as the server's own definition names it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NicSummary {
    /// MAC address.
    pub mac: String,
    /// Kind of connection.
    pub kind: String,
    /// What it is connected to.
    pub source: String,
    /// Device model.
    pub model: String,
}

named_states! {
    /// See `RescueMode` of the API.
    pub enum RescueMode {
        /// The rescue disk first, the original root second.
        Classic = "classic",
        /// Every original disk in its place, the rescue disk last.
        Stable = "stable",
    }
}

named_states! {
    /// Bus of the rescue disk.
    pub enum RescueBus {
        /// virtio-blk.
        Virtio = "virtio",
        /// SCSI.
        Scsi = "scsi",
        /// USB on xHCI.
        Usb = "usb",
        /// SATA.
        Sata = "sata",
        /// IDE.
        Ide = "ide",
    }
}

named_states! {
    /// Device type of the rescue disk.
    pub enum RescueDevice {
        /// A hard disk.
        Disk = "disk",
        /// A CD-ROM.
        Cdrom = "cdrom",
    }
}

named_states! {
    /// What the rescue guest may do to the original disks.
    pub enum Protection {
        /// Write to them.
        ReadWrite = "read-write",
        /// Write to overlays.
        Overlay = "overlay",
        /// Only read them.
        ReadOnly = "read-only",
    }
}

named_states! {
    /// What becomes of overlays.
    pub enum OverlayDisposition {
        /// Written to the original disks.
        Commit = "commit",
        /// Thrown away.
        Discard = "discard",
    }
}

named_states! {
    /// A way by which an admin password reaches the guest.
    pub enum PasswordDelivery {
        /// A config drive for cloud-init.
        ConfigDrive = "config-drive",
        /// The QEMU guest agent.
        GuestAgent = "guest-agent",
    }
}

/// A disk of the rescue domain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RescueDisk {
    /// Target name in the rescue domain.
    pub target: String,
    /// Bus in the rescue domain.
    pub bus: String,
    /// Target name in the server's own definition; empty for disks of the rescue itself.
    pub original_target: String,
    /// `rescue`, `original` or `config-drive`.
    pub role: String,
    /// What is behind it.
    pub source: String,
}

/// An overlay over an original disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Overlay {
    /// The overlay's file.
    pub path: String,
    /// The original disk.
    pub base: String,
    /// The original disk's format.
    pub base_format: String,
    /// The other files that the original disk referred to before the rescue guest ran.
    #[serde(default)]
    pub base_references: References,
}

/// A rescue in force: everything that unrescue needs besides the saved definition.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RescueRecord {
    /// The operation that began it; its files are in a folder of this name.
    pub plan: Uuid,
    /// Image.
    pub image_id: Uuid,
    /// Mode in force.
    pub mode: RescueMode,
    /// Bus in force.
    pub bus: RescueBus,
    /// Device type in force.
    pub device: RescueDevice,
    /// Protection in force.
    pub protection: Protection,
    /// Power state before.
    pub power_before: PowerState,
    /// When it began, in milliseconds since the Unix epoch.
    pub started_at_ms: i64,
    /// When the agent ends it by itself, in milliseconds since the Unix epoch.
    pub expires_at_ms: Option<i64>,
    /// What then becomes of the overlays.
    pub expiry_overlay: Option<OverlayDisposition>,
    /// Disks of the rescue domain.
    pub disks: Vec<RescueDisk>,
    /// Overlays to commit or to discard.
    pub overlays: Vec<Overlay>,
    /// A commit of the overlays began.
    pub commit_started: bool,
    /// The ways by which the password was delivered so far.
    pub password_delivered: Vec<PasswordDelivery>,
    /// The password's hash, until the guest agent has been given it; only if the domain has a channel.
    pub password_for_agent: Option<super::password::CryptHash>,
    /// The user whose password it is.
    pub password_user: String,
    /// So often the guest agent refused the password.
    #[serde(default)]
    pub password_refusals: u32,
}

/// After so many refusals a guest agent is not offered the password any more. More than one, because
/// the user may be made only after the agent was started.
pub const PASSWORD_OFFERS: u32 = 5;

impl RescueRecord {
    /// Notes that the guest agent refused the password, and gives up if it did so too often: then the
    /// hash goes.
    pub fn password_refused(&mut self) {
        self.password_refusals = self.password_refusals.saturating_add(1);
        if self.password_refusals >= PASSWORD_OFFERS {
            self.password_for_agent = None;
        }
    }
}

/// Why a server is in ERROR.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fault {
    /// Reason.
    pub reason: Reason,
    /// What happened, for people.
    pub message: String,
    /// The step that failed, or the last that had begun when the operation was cancelled.
    pub step: String,
    /// The step that could not be taken back.
    #[serde(default)]
    pub revert_step: String,
    /// What is left on the host.
    pub left_behind: Vec<String>,
    /// When, in milliseconds since the Unix epoch.
    pub at_ms: i64,
}

/// To whom a server belongs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    /// Project; empty if nobody said.
    pub project_id: String,
    /// User who created or adopted it; empty if nobody said.
    pub user_id: String,
}

named_states! {
    /// Who locked a server (Nova: `locked_by`).
    pub enum LockOwner {
        /// Somebody of the server's own project.
        Owner = "owner",
        /// Somebody else: an administrator.
        Admin = "admin",
    }
}

/// A lock on a server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lock {
    /// Who locked it.
    pub by: LockOwner,
    /// Why.
    pub reason: Option<String>,
    /// When, in milliseconds since the Unix epoch.
    pub at_ms: i64,
    /// From when on it holds no longer.
    pub expires_at_ms: Option<i64>,
}

/// A server that was soft-deleted: what it comes back to, and until when.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SoftDeletion {
    /// vm state before.
    pub vm_state: VmState,
    /// Power state before.
    pub power: PowerState,
    /// Why it was in ERROR, if it was.
    pub fault: Option<Fault>,
    /// When it was deleted, in milliseconds since the Unix epoch.
    pub at_ms: i64,
    /// When it is removed for good.
    pub reclaim_at_ms: i64,
}

impl SoftDeletion {
    /// What it is when it is restored, and whether it is started. Memory that the hypervisor held went
    /// when the guest was ended, so what was paused runs again.
    #[must_use]
    pub fn comes_back(&self) -> (VmState, bool) {
        let state = match self.vm_state {
            VmState::Paused => VmState::Active,
            state => state,
        };
        (state, self.power.is_on())
    }
}

const fn yes() -> bool {
    true
}

/// Whether a guest's agent is connected to its channel, as it was told or seen last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentSeen {
    /// Is it?
    pub connected: bool,
    /// When that was, in milliseconds since the Unix epoch.
    pub at_ms: i64,
}

/// The disks and interfaces of a server's own definition.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Devices {
    /// Disks.
    pub disks: Vec<DiskSummary>,
    /// Interfaces.
    pub nics: Vec<NicSummary>,
    /// It has a channel for a guest agent.
    #[serde(default)]
    pub guest_agent: bool,
    /// Its size, where the record is to follow that as well.
    #[serde(default)]
    pub flavor: Option<Flavor>,
}

/// A server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServerRecord {
    /// uuid, which is the domain's.
    pub id: Uuid,
    /// Name.
    pub name: String,
    /// How it came to be managed.
    pub origin: Origin,
    /// Name of the domain.
    pub domain_name: String,
    /// Last stable intent.
    pub vm_state: VmState,
    /// What is under way.
    pub task_state: Option<TaskState>,
    /// Last observation.
    pub power: PowerObservation,
    /// While the power state is unknown: what was seen last.
    pub last_known_power: Option<PowerObservation>,
    /// Image it was made from.
    pub image_id: Option<Uuid>,
    /// Size.
    pub flavor: Flavor,
    /// Disks of its own definition.
    pub disks: Vec<DiskSummary>,
    /// Interfaces of its own definition.
    pub nics: Vec<NicSummary>,
    /// The rescue in force.
    pub rescue: Option<RescueRecord>,
    /// Why it is in ERROR.
    pub fault: Option<Fault>,
    /// The operation under way.
    pub operation: Option<Uuid>,
    /// What that does.
    #[serde(default)]
    pub operation_verb: Option<Verb>,
    /// Number of the last change on this host.
    pub revision: i64,
    /// When the record was made, in milliseconds since the Unix epoch.
    pub created_at_ms: i64,
    /// When it last changed, in milliseconds since the Unix epoch.
    pub updated_at_ms: i64,
    /// When the last operation ended. What was seen before says nothing about the server's intent.
    pub settled_at_ms: i64,
    /// Metadata of the creator.
    pub metadata: BTreeMap<String, String>,
    /// Host name.
    pub hostname: String,
    /// SSH public keys by name, for its rescues as well.
    #[serde(default)]
    pub public_keys: BTreeMap<String, String>,
    /// Its own definition has a channel for a guest agent.
    #[serde(default)]
    pub guest_agent: bool,
    /// How the guest is not as it should be.
    #[serde(default)]
    pub mismatch: Option<Mismatched>,
    /// To whom it belongs.
    #[serde(default)]
    pub owner: Owner,
    /// The lock on it. One whose time is over holds no longer; see [`ServerRecord::lock_at`].
    #[serde(default)]
    pub lock: Option<Lock>,
    /// Description.
    #[serde(default)]
    pub description: Option<String>,
    /// Tags.
    #[serde(default)]
    pub tags: Vec<String>,
    /// IPv4 address by which people reach it.
    #[serde(default)]
    pub access_ipv4: Option<Ipv4Addr>,
    /// IPv6 address by which people reach it.
    #[serde(default)]
    pub access_ipv6: Option<Ipv6Addr>,
    /// How long its guest may take to shut down, in milliseconds; the host's time if `None`.
    #[serde(default)]
    pub shutdown_timeout_ms: Option<u64>,
    /// Start it again after the host was rebooted, if it ran before.
    #[serde(default = "yes")]
    pub autostart: bool,
    /// Its place when servers are started again: lower ones first, those without one last.
    #[serde(default)]
    pub autostart_order: Option<u32>,
    /// What it comes back to, while it is soft-deleted.
    #[serde(default)]
    pub deletion: Option<SoftDeletion>,
    /// Since when its definition is another than what is known to be its own, in milliseconds since the
    /// Unix epoch.
    #[serde(default)]
    pub drift_since_ms: Option<i64>,
    /// Whether its guest agent is connected; `None` if that is not known, or it is off.
    #[serde(default)]
    pub agent: Option<AgentSeen>,
}

impl ServerRecord {
    /// The lock that is in force at this time, in milliseconds since the Unix epoch.
    #[must_use]
    pub fn lock_at(&self, now_ms: i64) -> Option<&Lock> {
        self.lock
            .as_ref()
            .filter(|lock| lock.expires_at_ms.is_none_or(|end| now_ms < end))
    }

    /// The word that users read.
    #[must_use]
    pub fn status(&self) -> Status {
        status(self.vm_state, self.task_state)
    }

    /// An operation has its lane from now on, or none has.
    pub fn give_lane(&mut self, to: Option<(Uuid, Verb)>) {
        (self.operation, self.operation_verb) = to.unzip();
    }

    /// Shows these devices from now on. Are they others than before?
    pub fn show(&mut self, devices: &Devices) -> bool {
        let others = self.disks != devices.disks
            || self.nics != devices.nics
            || self.guest_agent != devices.guest_agent;
        if others {
            self.disks.clone_from(&devices.disks);
            self.nics.clone_from(&devices.nics);
            self.guest_agent = devices.guest_agent;
        }
        if let Some(flavor) = devices.flavor {
            self.flavor = flavor;
        }
        others
    }
}
