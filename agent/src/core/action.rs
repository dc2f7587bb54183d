// SPDX-License-Identifier: Apache-2.0
//! Actions: the verbs of the API with their arguments, validated at the edge.
//!
//! No action holds a password in clear: the edge makes the crypt hash and keeps the clear text for
//! its one answer.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::password::CryptHash;
use super::{
    change::FieldChange,
    record::{Flavor, OverlayDisposition, Protection, RescueBus, RescueDevice, RescueMode},
    state::{TaskState, named_states},
};

named_states! {
    /// A verb. Where Nova records the same action, the name is Nova's.
    pub enum Verb {
        /// Make a server from an image.
        Create = "create",
        /// Take over a domain.
        Adopt = "adopt",
        /// Give an adopted domain back.
        Release = "release",
        /// Remove a server.
        Delete = "delete",
        /// Start a stopped server.
        Start = "start",
        /// Stop a server.
        Stop = "stop",
        /// Boot a rescue image in the server's place.
        Rescue = "rescue",
        /// Put a rescued server back.
        Unrescue = "unrescue",
        /// Hand the rescue's password to the guest agent, once it answers. Only the agent asks for it.
        DeliverPassword = "deliverPassword",
        /// Have the guest shut down, and start it again.
        Reboot = "reboot",
        /// End the guest and start it again.
        HardReboot = "hardReboot",
        /// Stop the guest's CPUs.
        Pause = "pause",
        /// Let the CPUs of a paused guest run again.
        Unpause = "unpause",
        /// Save the guest's memory to disk and end it.
        Suspend = "suspend",
        /// Start a suspended guest from its saved memory.
        Resume = "resume",
        /// Inject an NMI, at which a guest that is set up for it dumps its memory inside.
        CrashDump = "trigger_crash_dump",
        /// Write the guest's memory to a file of the host.
        DumpMemory = "dumpMemory",
        /// Have the guest agent set a user's password.
        ChangePassword = "changePassword",
        /// Keep everybody but the administrator from changing the server.
        Lock = "lock",
        /// Take a lock off.
        Unlock = "unlock",
        /// Say what a server is meant to be, whatever was under way.
        ResetState = "resetState",
        /// Stop a server and remove it after some time, unless it is restored.
        SoftDelete = "softDelete",
        /// Bring a soft-deleted server back.
        Restore = "restore",
        /// Remove a server at once, soft-deleted or not.
        ForceDelete = "forceDelete",
        /// Change what the record says of the server.
        Update = "update",
        /// Take a definition that somebody changed for the server's own from now on.
        AcceptDrift = "acceptDrift",
        /// Define the domain again as it was before somebody changed it.
        RestoreDefinition = "restoreDefinition",
        /// Start a rescue guest that went down with its host. Only the agent asks for it.
        StartRescue = "startRescue",
    }
}

impl Verb {
    /// The name under which Nova records the same action (`nova/compute/instance_actions.py`). Those that
    /// Nova does not record have ours.
    #[must_use]
    pub const fn action_name(self) -> &'static str {
        match self {
            Self::HardReboot => Self::Reboot.name(),
            Self::SoftDelete | Self::ForceDelete => Self::Delete.name(),
            verb => verb.name(),
        }
    }

    /// The name of Nova's event within that action: what its compute service calls the method that does it, or its
    /// API (`wrap_instance_event` of `nova/compute/utils.py`). Nova has none for what it does not record.
    #[must_use]
    pub const fn event_name(self) -> Option<&'static str> {
        Some(match self {
            Self::Create => "compute__do_build_and_run_instance",
            Self::Delete | Self::ForceDelete => "compute_terminate_instance",
            Self::SoftDelete => "compute_soft_delete_instance",
            Self::Restore => "compute_restore_instance",
            Self::Start => "compute_start_instance",
            Self::Stop => "compute_stop_instance",
            Self::Rescue => "compute_rescue_instance",
            Self::Unrescue => "compute_unrescue_instance",
            Self::Reboot | Self::HardReboot => "compute_reboot_instance",
            Self::Pause => "compute_pause_instance",
            Self::Unpause => "compute_unpause_instance",
            Self::Suspend => "compute_suspend_instance",
            Self::Resume => "compute_resume_instance",
            Self::CrashDump => "compute_trigger_crash_dump",
            Self::ChangePassword => "compute_set_admin_password",
            Self::Lock => "api_lock",
            Self::Unlock => "api_unlock",
            Self::Adopt
            | Self::Release
            | Self::DeliverPassword
            | Self::DumpMemory
            | Self::ResetState
            | Self::Update
            | Self::AcceptDrift
            | Self::RestoreDefinition
            | Self::StartRescue => return None,
        })
    }

    /// Does a lock keep everybody but the administrator from it? What changes a server does; what the agent
    /// asks for itself, what makes a server and what is about the lock does not. Nova lets images, backups
    /// and networks of a locked server be changed; verbs for these belong to the first group here.
    #[must_use]
    pub const fn respects_lock(self) -> bool {
        match self {
            Self::Release
            | Self::Delete
            | Self::Start
            | Self::Stop
            | Self::Rescue
            | Self::Unrescue
            | Self::SoftDelete
            | Self::Restore
            | Self::ForceDelete
            | Self::Reboot
            | Self::HardReboot
            | Self::Pause
            | Self::Unpause
            | Self::Suspend
            | Self::Resume
            | Self::CrashDump
            | Self::DumpMemory
            | Self::ChangePassword
            | Self::AcceptDrift
            | Self::RestoreDefinition
            | Self::Update => true,
            Self::Create
            | Self::Adopt
            | Self::StartRescue
            | Self::DeliverPassword
            | Self::Lock
            | Self::Unlock
            | Self::ResetState => false,
        }
    }

    /// May only the administrator ask for it? Adopting takes a domain that belongs to nobody's project.
    #[must_use]
    pub const fn is_for_admin(self) -> bool {
        match self {
            Self::Adopt | Self::DeliverPassword | Self::StartRescue | Self::ResetState => true,
            Self::Create
            | Self::Release
            | Self::Delete
            | Self::Start
            | Self::Stop
            | Self::Rescue
            | Self::Unrescue
            | Self::Lock
            | Self::Unlock
            | Self::SoftDelete
            | Self::Restore
            | Self::ForceDelete
            | Self::Reboot
            | Self::HardReboot
            | Self::Pause
            | Self::Unpause
            | Self::Suspend
            | Self::Resume
            | Self::CrashDump
            | Self::DumpMemory
            | Self::ChangePassword
            | Self::AcceptDrift
            | Self::RestoreDefinition
            | Self::Update => false,
        }
    }

    /// Does it need the server's lane? What changes the record alone goes through while another operation
    /// is under way.
    #[must_use]
    pub const fn needs_lane(self) -> bool {
        !matches!(self, Self::Lock | Self::Unlock | Self::Update)
    }

    /// Is there no record any more when it has succeeded?
    #[must_use]
    pub const fn removes_record(self) -> bool {
        matches!(self, Self::Delete | Self::ForceDelete | Self::Release)
    }

    /// The task state while it runs.
    #[must_use]
    pub const fn task_state(self) -> Option<TaskState> {
        match self {
            Self::Create => Some(TaskState::Spawning),
            // None of these changes the guest's power or its disks.
            Self::Adopt
            | Self::Release
            | Self::Lock
            | Self::Unlock
            | Self::ResetState
            | Self::Update => None,
            Self::Delete | Self::ForceDelete => Some(TaskState::Deleting),
            Self::Start => Some(TaskState::PoweringOn),
            Self::Stop => Some(TaskState::PoweringOff),
            Self::Rescue => Some(TaskState::Rescuing),
            Self::Unrescue => Some(TaskState::Unrescuing),
            Self::DeliverPassword | Self::ChangePassword => Some(TaskState::UpdatingPassword),
            Self::Reboot => Some(TaskState::Rebooting),
            Self::HardReboot => Some(TaskState::RebootingHard),
            Self::Pause => Some(TaskState::Pausing),
            Self::Unpause => Some(TaskState::Unpausing),
            Self::Suspend => Some(TaskState::Suspending),
            Self::Resume => Some(TaskState::Resuming),
            // The guest goes on as it is.
            Self::CrashDump | Self::DumpMemory => None,
            Self::SoftDelete => Some(TaskState::SoftDeleting),
            Self::Restore => Some(TaskState::Restoring),
            // What runs is not touched.
            Self::AcceptDrift | Self::RestoreDefinition => None,
            Self::StartRescue => Some(TaskState::PoweringOn),
        }
    }

    /// Does it cancel what is under way instead of being refused? Everything that users ask for
    /// overtakes what the agent does of its own; a delete overtakes everything but another delete, a hard
    /// reboot what is about power (Nova: `ALLOW_REBOOT` of `nova/compute/task_states.py`, and stop and start
    /// besides), and a reset of the state everything: it is what is left when something is stuck.
    #[must_use]
    pub const fn overtakes(self, under_way: Self) -> bool {
        let own = matches!(under_way, Self::DeliverPassword);
        match self {
            Self::Delete | Self::ForceDelete => {
                !matches!(under_way, Self::Delete | Self::ForceDelete)
            }
            Self::SoftDelete => !matches!(
                under_way,
                Self::Delete | Self::ForceDelete | Self::SoftDelete
            ),
            Self::ResetState => !matches!(under_way, Self::ResetState),
            Self::HardReboot => {
                own || matches!(
                    under_way,
                    Self::Start
                        | Self::Stop
                        | Self::Reboot
                        | Self::HardReboot
                        | Self::Pause
                        | Self::Unpause
                        | Self::Suspend
                        | Self::Resume
                )
            }
            Self::Create
            | Self::Adopt
            | Self::Release
            | Self::Start
            | Self::Stop
            | Self::Rescue
            | Self::Unrescue
            | Self::Reboot
            | Self::Pause
            | Self::Unpause
            | Self::Suspend
            | Self::Resume
            | Self::CrashDump
            | Self::DumpMemory
            | Self::ChangePassword
            | Self::AcceptDrift
            | Self::RestoreDefinition
            | Self::Restore => own,
            // They go through beside it.
            Self::Lock | Self::Unlock | Self::Update => false,
            Self::DeliverPassword | Self::StartRescue => false,
        }
    }
}

/// Where a new network interface is connected.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum NicConnection {
    /// A bridge of the host.
    Bridge(String),
    /// A network of libvirt.
    Network(String),
    /// QEMU's user-mode network.
    User,
}

/// A network interface for a new server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NicArgs {
    /// Connection.
    pub connection: NicConnection,
    /// MAC address; derived from the server's id if `None`.
    pub mac: Option<String>,
    /// Device model.
    pub model: String,
}

/// Arguments of [`Verb::Create`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CreateArgs {
    /// uuid of the new server.
    pub id: Uuid,
    /// Name.
    pub name: String,
    /// Image.
    pub image: Uuid,
    /// Size.
    pub flavor: Flavor,
    /// Network interfaces.
    pub nics: Vec<NicArgs>,
    /// Hash of the administrator's password.
    pub password: CryptHash,
    /// Host name.
    pub hostname: String,
    /// SSH public keys by name.
    pub public_keys: BTreeMap<String, String>,
    /// User data for cloud-init.
    pub user_data: Option<Vec<u8>>,
    /// Metadata.
    pub metadata: BTreeMap<String, String>,
    /// Machine type; the host's default if `None`.
    pub machine: Option<String>,
    /// Has it UEFI firmware?
    pub uefi: bool,
    /// Leave it powered off.
    pub powered_off: bool,
}

/// Arguments of [`Verb::Adopt`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AdoptArgs {
    /// Name of the server; the domain's if `None`.
    pub name: Option<String>,
}

/// How long a guest may take to shut down by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shutdown {
    /// Time in milliseconds; 0 ends it at once.
    pub timeout_ms: u64,
    /// The request is repeated so often, in milliseconds: a guest that was not ready for it loses it.
    pub retry_ms: u64,
}

/// So long a guest may take to shut down for a soft reboot, if the request does not say (Nova:
/// `[libvirt] wait_soft_reboot_seconds`), in milliseconds.
pub const SOFT_REBOOT_MS: u64 = 120_000;

/// Arguments of [`Verb::Reboot`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RebootArgs {
    /// Time for the guest to shut down.
    pub shutdown: Shutdown,
    /// A guest that does not shut down in time goes on, and the reboot fails, instead of being ended.
    pub or_fail: bool,
}

/// Arguments of [`Verb::ChangePassword`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChangePasswordArgs {
    /// The user; the guest's administrator if `None`.
    pub user: Option<String>,
    /// Hash of the password.
    pub password: CryptHash,
}

/// Arguments of [`Verb::Rescue`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RescueArgs {
    /// Image; the server's own or the host's default if `None`.
    pub image: Option<Uuid>,
    /// Mode; by the image if `None`.
    pub mode: Option<RescueMode>,
    /// Bus; by image and mode if `None`.
    pub bus: Option<RescueBus>,
    /// Device type; by image if `None`.
    pub device: Option<RescueDevice>,
    /// What the rescue guest may do to the original disks.
    pub protection: Protection,
    /// Hash of the administrator's password.
    pub password: CryptHash,
    /// User data for the rescue guest.
    #[serde(default)]
    pub user_data: Option<Vec<u8>>,
    /// End it by itself after this time in milliseconds; 0 never; the configured time if `None`.
    pub timeout_ms: Option<u64>,
    /// What then becomes of the overlays.
    pub timeout_overlay: Option<OverlayDisposition>,
    /// Time for the guest to shut down.
    pub shutdown: Shutdown,
}

/// Arguments of [`Verb::Unrescue`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnrescueArgs {
    /// What becomes of the overlays.
    pub overlay: Option<OverlayDisposition>,
    /// Leave it as it was before the rescue instead of starting it.
    pub restore_power: bool,
    /// Time for the rescue guest to shut down.
    pub shutdown: Shutdown,
}

/// Arguments of [`Verb::Lock`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LockArgs {
    /// Why.
    pub reason: Option<String>,
    /// After so many milliseconds it holds no longer.
    pub expires_in_ms: Option<u64>,
}

named_states! {
    /// What the state of a server is reset to.
    pub enum ResetTo {
        /// Active; RESCUED while a rescue is in force.
        Active = "active",
        /// In error.
        Error = "error",
    }
}

/// A verb with its arguments.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Action {
    /// See [`Verb::Create`].
    Create(Box<CreateArgs>),
    /// See [`Verb::Adopt`].
    Adopt(AdoptArgs),
    /// See [`Verb::Release`].
    Release,
    /// See [`Verb::Delete`].
    Delete,
    /// See [`Verb::Start`].
    Start,
    /// See [`Verb::Stop`].
    Stop(Shutdown),
    /// See [`Verb::Rescue`].
    Rescue(Box<RescueArgs>),
    /// See [`Verb::Unrescue`].
    Unrescue(UnrescueArgs),
    /// See [`Verb::DeliverPassword`].
    DeliverPassword,
    /// See [`Verb::Reboot`].
    Reboot(RebootArgs),
    /// See [`Verb::HardReboot`].
    HardReboot,
    /// See [`Verb::Pause`].
    Pause,
    /// See [`Verb::Unpause`].
    Unpause,
    /// See [`Verb::Suspend`].
    Suspend,
    /// See [`Verb::Resume`].
    Resume,
    /// See [`Verb::CrashDump`].
    CrashDump,
    /// See [`Verb::DumpMemory`].
    DumpMemory,
    /// See [`Verb::ChangePassword`].
    ChangePassword(ChangePasswordArgs),
    /// See [`Verb::Lock`].
    Lock(LockArgs),
    /// See [`Verb::Unlock`].
    Unlock {
        /// Only a lock whose time is over: the agent's own look may be older than the next lock.
        only_expired: bool,
    },
    /// See [`Verb::ResetState`].
    ResetState(ResetTo),
    /// See [`Verb::SoftDelete`].
    SoftDelete,
    /// See [`Verb::Restore`].
    Restore,
    /// See [`Verb::ForceDelete`].
    ForceDelete,
    /// See [`Verb::Update`].
    Update(Vec<FieldChange>),
    /// See [`Verb::AcceptDrift`].
    AcceptDrift,
    /// See [`Verb::RestoreDefinition`].
    RestoreDefinition,
    /// See [`Verb::StartRescue`].
    StartRescue,
}

impl Action {
    /// The verb.
    #[must_use]
    pub const fn verb(&self) -> Verb {
        match self {
            Self::Create(_) => Verb::Create,
            Self::Adopt(_) => Verb::Adopt,
            Self::Release => Verb::Release,
            Self::Delete => Verb::Delete,
            Self::Start => Verb::Start,
            Self::Stop(_) => Verb::Stop,
            Self::Rescue(_) => Verb::Rescue,
            Self::Unrescue(_) => Verb::Unrescue,
            Self::DeliverPassword => Verb::DeliverPassword,
            Self::Reboot(_) => Verb::Reboot,
            Self::HardReboot => Verb::HardReboot,
            Self::Pause => Verb::Pause,
            Self::Unpause => Verb::Unpause,
            Self::Suspend => Verb::Suspend,
            Self::Resume => Verb::Resume,
            Self::CrashDump => Verb::CrashDump,
            Self::DumpMemory => Verb::DumpMemory,
            Self::ChangePassword(_) => Verb::ChangePassword,
            Self::Lock(_) => Verb::Lock,
            Self::Unlock { .. } => Verb::Unlock,
            Self::ResetState(_) => Verb::ResetState,
            Self::SoftDelete => Verb::SoftDelete,
            Self::Restore => Verb::Restore,
            Self::ForceDelete => Verb::ForceDelete,
            Self::Update(_) => Verb::Update,
            Self::AcceptDrift => Verb::AcceptDrift,
            Self::RestoreDefinition => Verb::RestoreDefinition,
            Self::StartRescue => Verb::StartRescue,
        }
    }
}
