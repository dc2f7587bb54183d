// SPDX-License-Identifier: Apache-2.0
//! The state model: what a server is meant to be, what is being done to it, and what was last seen.
//!
//! Three independent fields, with Nova's names: `vm_state` is the last stable intent, `task_state`
//! the operation in flight, `power_state` the last observation of the hypervisor. Users mostly read
//! the [`Status`] that follows from the first two.
//!
//! Salvor adds [`PowerState::Unknown`], and says of every observation when and how it was made
//! ([`PowerObservation`]): an outage of libvirt must never look like a server that was shut off.

use serde::{Deserialize, Serialize};

/// Declares an enum whose variants have one stable name each, in the store, in logs and in errors.
macro_rules! named_states {
    ($(#[$meta:meta])* pub enum $ty:ident { $($(#[$vmeta:meta])* $variant:ident = $name:literal,)+ }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
        pub enum $ty {
            $($(#[$vmeta])* #[serde(rename = $name)] $variant,)+
        }

        impl $ty {
            /// Every value, in order of declaration.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)+];

            /// The stable name: what is stored, logged and shown.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)+ }
            }

            /// The value with this stable name.
            #[must_use]
            pub fn from_name(name: &str) -> Option<Self> {
                match name { $($name => Some(Self::$variant),)+ _ => None }
            }
        }

        impl std::fmt::Display for $ty {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.name())
            }
        }
    };
}
#[allow(unused_imports)]
pub(crate) use named_states;

named_states! {
    /// The last stable intent for a server (Nova: `nova/compute/vm_states.py`).
    pub enum VmState {
        /// The record exists, nothing runs yet.
        Building = "building",
        /// It should be running.
        Active = "active",
        /// CPUs stopped, memory kept by the hypervisor.
        Paused = "paused",
        /// Memory saved to disk.
        Suspended = "suspended",
        /// Powered off, disks kept.
        Stopped = "stopped",
        /// The rescue domain runs in its place.
        Rescued = "rescued",
        /// Runs at a new size, waits for confirm or revert.
        Resized = "resized",
        /// Powered off, waits for reclaim or restore.
        SoftDeleted = "soft-delete",
        /// Gone.
        Deleted = "deleted",
        /// An action failed and its roll-back failed too; the fault says what is left on the host.
        Error = "error",
        /// Powered off, its image stored, disks still on the host.
        Shelved = "shelved",
        /// Nothing of it is on any host.
        ShelvedOffloaded = "shelved_offloaded",
    }
}

named_states! {
    /// The operation in flight (Nova: `nova/compute/task_states.py`, with its mixed spelling).
    pub enum TaskState {
        /// Waits for a host.
        Scheduling = "scheduling",
        /// Disks are being prepared.
        BlockDeviceMapping = "block_device_mapping",
        /// Networks are being prepared.
        Networking = "networking",
        /// The domain is being made.
        Spawning = "spawning",
        /// A snapshot was asked for.
        ImageSnapshotPending = "image_snapshot_pending",
        /// A snapshot is being taken.
        ImageSnapshot = "image_snapshot",
        /// A snapshot waits for its upload.
        ImagePendingUpload = "image_pending_upload",
        /// A snapshot is being uploaded.
        ImageUploading = "image_uploading",
        /// A backup is being made.
        ImageBackup = "image_backup",
        /// A password is being set.
        UpdatingPassword = "updating_password",
        /// A resize prepares.
        ResizePrep = "resize_prep",
        /// A resize moves the disks.
        ResizeMigrating = "resize_migrating",
        /// A resize has moved the disks.
        ResizeMigrated = "resize_migrated",
        /// A resize starts the server at its new size.
        ResizeFinish = "resize_finish",
        /// A resize is being undone.
        ResizeReverting = "resize_reverting",
        /// A resize is being confirmed.
        ResizeConfirming = "resize_confirming",
        /// A soft reboot was asked for.
        Rebooting = "rebooting",
        /// A soft reboot prepares.
        RebootPending = "reboot_pending",
        /// A soft reboot runs.
        RebootStarted = "reboot_started",
        /// A hard reboot was asked for.
        RebootingHard = "rebooting_hard",
        /// A hard reboot prepares.
        RebootPendingHard = "reboot_pending_hard",
        /// A hard reboot runs.
        RebootStartedHard = "reboot_started_hard",
        /// CPUs are being stopped.
        Pausing = "pausing",
        /// CPUs are being started again.
        Unpausing = "unpausing",
        /// Memory is being saved.
        Suspending = "suspending",
        /// Memory is being restored.
        Resuming = "resuming",
        /// The server is being stopped.
        PoweringOff = "powering-off",
        /// The server is being started.
        PoweringOn = "powering-on",
        /// The server is being put into rescue.
        Rescuing = "rescuing",
        /// The server is being put back.
        Unrescuing = "unrescuing",
        /// A rebuild was asked for.
        Rebuilding = "rebuilding",
        /// A rebuild prepares disks.
        RebuildBlockDeviceMapping = "rebuild_block_device_mapping",
        /// A rebuild makes the domain.
        RebuildSpawning = "rebuild_spawning",
        /// A live migration runs.
        Migrating = "migrating",
        /// The server is being deleted.
        Deleting = "deleting",
        /// The server is being soft-deleted.
        SoftDeleting = "soft-deleting",
        /// A soft-deleted server is being restored.
        Restoring = "restoring",
        /// The server is being shelved.
        Shelving = "shelving",
        /// A shelved server's image waits for its upload.
        ShelvingImagePendingUpload = "shelving_image_pending_upload",
        /// A shelved server's image is being uploaded.
        ShelvingImageUploading = "shelving_image_uploading",
        /// A shelved server is being taken off the host.
        ShelvingOffloading = "shelving_offloading",
        /// A shelved server is being brought back.
        Unshelving = "unshelving",
    }
}

named_states! {
    /// What the hypervisor last said of the domain (Nova: `nova/compute/power_state.py`, plus `unknown`).
    pub enum PowerState {
        /// libvirt has no state for it, or there is no domain.
        NoState = "nostate",
        /// The guest runs.
        Running = "running",
        /// CPUs are stopped.
        Paused = "paused",
        /// The guest is off. A domain with saved memory is off as well.
        Shutdown = "shutdown",
        /// The guest crashed.
        Crashed = "crashed",
        /// The guest put itself to sleep (pmsuspended).
        Suspended = "suspended",
        /// libvirt could not be asked. The observation says since when.
        Unknown = "unknown",
    }
}

impl PowerState {
    /// Is there a QEMU process behind it (running, paused or sleeping)?
    #[must_use]
    pub const fn is_on(self) -> bool {
        matches!(self, Self::Running | Self::Paused | Self::Suspended)
    }
}

named_states! {
    /// How an observation was made.
    pub enum ObservationSource {
        /// libvirt told us by an event.
        Event = "event",
        /// We asked libvirt.
        Poll = "poll",
        /// It follows from something else: a step of ours that succeeded, or a lost connection.
        Inferred = "inferred",
    }
}

/// A power state with its provenance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PowerObservation {
    /// What was seen.
    pub state: PowerState,
    /// The hypervisor's reason, in libvirt's word (`shutdown`, `crashed`, `ioerror`, …); empty if none.
    pub reason: String,
    /// When it was seen, in milliseconds since the Unix epoch.
    pub observed_at_ms: i64,
    /// How it was seen.
    pub source: ObservationSource,
}

named_states! {
    /// The one word users read, derived from `vm_state` and `task_state` (Nova: `_STATE_MAP` in
    /// `nova/api/openstack/common.py`).
    pub enum Status {
        /// See [`VmState::Active`].
        Active = "ACTIVE",
        /// See [`VmState::Building`].
        Build = "BUILD",
        /// See [`VmState::Deleted`].
        Deleted = "DELETED",
        /// See [`VmState::Error`].
        Error = "ERROR",
        /// A hard reboot is under way.
        HardReboot = "HARD_REBOOT",
        /// A live migration is under way.
        Migrating = "MIGRATING",
        /// A password is being set.
        Password = "PASSWORD",
        /// See [`VmState::Paused`].
        Paused = "PAUSED",
        /// A soft reboot is under way.
        Reboot = "REBOOT",
        /// A rebuild is under way.
        Rebuild = "REBUILD",
        /// See [`VmState::Rescued`].
        Rescue = "RESCUE",
        /// A resize is under way.
        Resize = "RESIZE",
        /// A resize is being undone.
        RevertResize = "REVERT_RESIZE",
        /// See [`VmState::Shelved`].
        Shelved = "SHELVED",
        /// See [`VmState::ShelvedOffloaded`].
        ShelvedOffloaded = "SHELVED_OFFLOADED",
        /// See [`VmState::Stopped`].
        Shutoff = "SHUTOFF",
        /// See [`VmState::SoftDeleted`].
        SoftDeleted = "SOFT_DELETED",
        /// See [`VmState::Suspended`].
        Suspended = "SUSPENDED",
        /// See [`VmState::Resized`].
        VerifyResize = "VERIFY_RESIZE",
    }
}

/// The status that users see for a pair of states (Nova: `status_from_state`).
#[must_use]
pub fn status(vm_state: VmState, task_state: Option<TaskState>) -> Status {
    use TaskState as T;
    let rebuilding = matches!(
        task_state,
        Some(T::Rebuilding | T::RebuildBlockDeviceMapping | T::RebuildSpawning)
    );
    let resizing = matches!(
        task_state,
        Some(T::ResizePrep | T::ResizeMigrating | T::ResizeMigrated | T::ResizeFinish)
    );
    match vm_state {
        VmState::Active => match task_state {
            Some(T::Rebooting | T::RebootPending | T::RebootStarted) => Status::Reboot,
            Some(T::RebootingHard | T::RebootPendingHard | T::RebootStartedHard) => {
                Status::HardReboot
            }
            Some(T::UpdatingPassword) => Status::Password,
            Some(T::Migrating) => Status::Migrating,
            _ if rebuilding => Status::Rebuild,
            _ if resizing => Status::Resize,
            _ => Status::Active,
        },
        VmState::Building => Status::Build,
        VmState::Stopped if rebuilding => Status::Rebuild,
        VmState::Stopped if resizing => Status::Resize,
        VmState::Stopped => Status::Shutoff,
        VmState::Resized if task_state == Some(T::ResizeReverting) => Status::RevertResize,
        VmState::Resized => Status::VerifyResize,
        VmState::Paused if task_state == Some(T::Migrating) => Status::Migrating,
        VmState::Paused => Status::Paused,
        VmState::Suspended => Status::Suspended,
        VmState::Rescued => Status::Rescue,
        VmState::Error if rebuilding => Status::Rebuild,
        VmState::Error => Status::Error,
        VmState::SoftDeleted => Status::SoftDeleted,
        VmState::Deleted => Status::Deleted,
        VmState::Shelved => Status::Shelved,
        VmState::ShelvedOffloaded => Status::ShelvedOffloaded,
    }
}
