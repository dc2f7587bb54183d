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
        /// Take a definition that somebody changed for the server's own from now on.
        AcceptDrift = "acceptDrift",
        /// Define the domain again as it was before somebody changed it.
        RestoreDefinition = "restoreDefinition",
        /// Start a rescue guest that went down with its host. Only the agent asks for it.
        StartRescue = "startRescue",
    }
}

impl Verb {
    /// The task state while it runs.
    #[must_use]
    pub const fn task_state(self) -> Option<TaskState> {
        match self {
            Self::Create => Some(TaskState::Spawning),
            // Neither touches the guest.
            Self::Adopt | Self::Release => None,
            Self::Delete => Some(TaskState::Deleting),
            Self::Start => Some(TaskState::PoweringOn),
            Self::Stop => Some(TaskState::PoweringOff),
            Self::Rescue => Some(TaskState::Rescuing),
            Self::Unrescue => Some(TaskState::Unrescuing),
            Self::DeliverPassword => Some(TaskState::UpdatingPassword),
            // What runs is not touched.
            Self::AcceptDrift | Self::RestoreDefinition => None,
            Self::StartRescue => Some(TaskState::PoweringOn),
        }
    }

    /// Does it cancel what is under way instead of being refused? Everything that users ask for
    /// overtakes the delivery of a password; a delete overtakes everything but another delete.
    #[must_use]
    pub const fn overtakes(self, under_way: Self) -> bool {
        match self {
            Self::Delete => !matches!(under_way, Self::Delete),
            Self::Create
            | Self::Adopt
            | Self::Release
            | Self::Start
            | Self::Stop
            | Self::Rescue
            | Self::Unrescue
            | Self::AcceptDrift
            | Self::RestoreDefinition => matches!(under_way, Self::DeliverPassword),
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
            Self::AcceptDrift => Verb::AcceptDrift,
            Self::RestoreDefinition => Verb::RestoreDefinition,
            Self::StartRescue => Verb::StartRescue,
        }
    }
}
