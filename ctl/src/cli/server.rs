// SPDX-License-Identifier: Apache-2.0
//! The arguments of `salvor server` and, with the same types, of `salvor plan`.

use std::{path::PathBuf, time::Duration};

use clap::{Args, Subcommand};
use uuid::Uuid;

use super::{
    How,
    values::{
        BusArg, DeviceArg, DisksArg, FirmwareArg, Interfaces, ModeArg, OriginArg, OverlayArg,
        PowerArg, PowerStateArg, VmStateArg, key_value,
    },
};
use crate::units;

#[derive(Debug, Subcommand)]
pub(crate) enum ServerCommand {
    /// Make a server from an image and start it.
    Create {
        #[command(flatten)]
        args: Box<CreateArgs>,
        #[command(flatten)]
        how: How,
    },
    /// Take over a domain that exists in libvirt. It is neither changed nor restarted.
    Adopt {
        #[command(flatten)]
        args: AdoptArgs,
        #[command(flatten)]
        how: How,
    },
    /// Give an adopted server back to libvirt: the domain stays as it is.
    Release {
        #[command(flatten)]
        args: ServerArg,
        #[command(flatten)]
        how: How,
    },
    /// List the servers.
    #[command(visible_alias = "ls")]
    List(ListServers),
    /// Show a server.
    Show(ServerArg),
    /// Start a stopped server.
    Start {
        #[command(flatten)]
        args: ServerArg,
        #[command(flatten)]
        how: How,
    },
    /// Ask the guest to shut down and, when its time is over, end it.
    Stop {
        #[command(flatten)]
        args: StopArgs,
        #[command(flatten)]
        how: How,
    },
    /// Boot a rescue image in the server's place, with the server's disks attached.
    ///
    /// The password of the rescue guest's administrator is printed once, as soon as the agent has
    /// accepted: the agent keeps only its hash.
    Rescue {
        #[command(flatten)]
        args: RescueArgs,
        #[command(flatten)]
        how: How,
    },
    /// Put a rescued server back.
    Unrescue {
        #[command(flatten)]
        args: UnrescueArgs,
        #[command(flatten)]
        how: How,
    },
    /// Show what somebody changed in a server's definition past the agent, and deal with it.
    Drift {
        #[command(flatten)]
        args: DriftArgs,
        #[command(flatten)]
        how: How,
    },
    /// Remove a server at once. The disks of a created server go, those of an adopted one stay.
    #[command(visible_alias = "rm")]
    Delete {
        #[command(flatten)]
        args: ServerArg,
        #[command(flatten)]
        how: How,
    },
}

/// A server.
#[derive(Debug, Args)]
pub(crate) struct ServerArg {
    /// The server: uuid, at least four digits that no other uuid begins with, or unique name.
    pub(crate) server: String,
}

/// Which servers to list. All that is given must hold.
#[derive(Debug, Args)]
pub(crate) struct ListServers {
    /// Servers whose name contains this.
    #[arg(
        long,
        value_name = "TEXT",
        default_value = "",
        hide_default_value = true
    )]
    pub(crate) name: String,
    /// Servers with this status (ACTIVE, RESCUE, …). Can be given more than once.
    #[arg(long = "status", value_name = "STATUS")]
    pub(crate) statuses: Vec<String>,
    /// Servers that are meant to be in this state. Can be given more than once.
    #[arg(long = "vm-state", value_name = "STATE", value_enum)]
    pub(crate) vm_states: Vec<VmStateArg>,
    /// Servers in this power state. Can be given more than once.
    #[arg(long = "power", value_name = "STATE", value_enum)]
    pub(crate) power_states: Vec<PowerStateArg>,
    /// Servers that came to be managed in this way.
    #[arg(long, value_enum)]
    pub(crate) origin: Option<OriginArg>,
}

/// What to make.
#[derive(Debug, Args)]
pub(crate) struct CreateArgs {
    /// Name of the server.
    #[arg(long)]
    pub(crate) name: String,
    /// Image: id, at least four digits that no other id begins with, or unique name.
    #[arg(long)]
    pub(crate) image: String,
    /// Virtual CPUs.
    #[arg(long, default_value_t = 1, value_name = "NUMBER")]
    pub(crate) vcpus: u32,
    /// Memory, for instance 512MiB or 2GiB.
    #[arg(long, default_value = "512MiB", value_name = "SIZE", value_parser = units::mebibytes)]
    pub(crate) memory: u64,
    /// Size of the root disk, for instance 10GiB; 0 means the image's own size.
    #[arg(long, default_value = "0", value_name = "SIZE", value_parser = units::gibibytes)]
    pub(crate) disk: u64,
    #[command(flatten)]
    pub(crate) interfaces: Interfaces,
    /// File with an SSH public key; its name is the file's unless given. Can be given more than once.
    #[arg(long = "key", value_name = "[NAME=]FILE")]
    pub(crate) keys: Vec<String>,
    /// File with user data for cloud-init.
    #[arg(long, value_name = "FILE")]
    pub(crate) user_data: Option<PathBuf>,
    /// Host name; derived from the name if absent.
    #[arg(long)]
    pub(crate) hostname: Option<String>,
    /// Machine type (pc, q35, …); the host's default if absent.
    #[arg(long, value_name = "TYPE")]
    pub(crate) machine: Option<String>,
    /// Firmware.
    #[arg(long, value_enum, default_value = "bios")]
    pub(crate) firmware: FirmwareArg,
    /// Metadata. Can be given more than once.
    #[arg(long, value_name = "KEY=VALUE", value_parser = key_value)]
    pub(crate) metadata: Vec<(String, String)>,
    /// Leave the server powered off.
    #[arg(long)]
    pub(crate) powered_off: bool,
    /// uuid of the server; chosen by the agent if absent.
    #[arg(long, value_name = "UUID")]
    pub(crate) id: Option<Uuid>,
    #[command(flatten)]
    pub(crate) admin_pass: AdminPass,
}

/// Where the password comes from. It is never an argument: other users could read it there.
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct AdminPass {
    /// Read the administrator's password from standard input, one line; generated if absent.
    #[arg(long)]
    pub(crate) admin_pass_stdin: bool,
}

/// What to take over.
#[derive(Debug, Args)]
pub(crate) struct AdoptArgs {
    /// The domain: uuid or name (see `salvor host unmanaged`).
    pub(crate) domain: String,
    /// Name of the server; the domain's if absent.
    #[arg(long)]
    pub(crate) name: Option<String>,
}

/// How to stop.
#[derive(Debug, Args)]
pub(crate) struct StopArgs {
    /// The server: uuid, at least four digits that no other uuid begins with, or unique name.
    pub(crate) server: String,
    #[command(flatten)]
    pub(crate) shutdown: Shutdown,
}

/// The time that a guest is given.
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct Shutdown {
    /// How long the guest may take to shut down by itself (30s, 2m, …); the configured time if
    /// absent, at once if 0.
    #[arg(long, value_name = "TIME", value_parser = units::duration)]
    pub(crate) shutdown_timeout: Option<Duration>,
}

/// How to rescue.
#[derive(Debug, Args)]
pub(crate) struct RescueArgs {
    /// The server: uuid, at least four digits that no other uuid begins with, or unique name.
    pub(crate) server: String,
    /// Rescue image; if absent the server's own image, else the host's default rescue image.
    #[arg(long)]
    pub(crate) image: Option<String>,
    /// How the rescue disk joins the server's disks.
    #[arg(long, value_enum, default_value = "auto")]
    pub(crate) mode: ModeArg,
    /// Bus of the rescue disk; if absent the image's property or what the machine suggests.
    #[arg(long, value_enum)]
    pub(crate) bus: Option<BusArg>,
    /// Kind of device that the rescue disk is; if absent told from the image.
    #[arg(long, value_enum)]
    pub(crate) device: Option<DeviceArg>,
    /// What the rescue guest may do to the server's disks.
    #[arg(long, value_enum, default_value = "read-write")]
    pub(crate) disks: DisksArg,
    #[command(flatten)]
    pub(crate) admin_pass: AdminPass,
    /// File with user data for the rescue system's cloud-init. The server's own is for its first boot
    /// and is not given to a rescue.
    #[arg(long, value_name = "FILE")]
    pub(crate) user_data: Option<PathBuf>,
    /// Unrescue by itself after this time (2h, 1h30m, …); the configured time if absent, never if 0.
    #[arg(long, value_name = "TIME", value_parser = units::duration)]
    pub(crate) timeout: Option<Duration>,
    /// What becomes of the overlays when the timeout is over; needed with `--disks overlay` and `--timeout`.
    #[arg(long, value_enum, value_name = "WHAT")]
    pub(crate) timeout_overlay: Option<OverlayArg>,
    #[command(flatten)]
    pub(crate) shutdown: Shutdown,
}

/// What to do about a changed definition.
#[derive(Debug, Args)]
pub(crate) struct DriftArgs {
    /// The server: uuid, at least four digits that no other uuid begins with, or unique name.
    pub(crate) server: String,
    /// Take the definition that libvirt has for the server's own from now on.
    #[arg(long, conflicts_with = "restore")]
    pub(crate) accept: bool,
    /// Define the domain again as it was. A guest that runs goes on as it is until its next start.
    #[arg(long)]
    pub(crate) restore: bool,
}

/// How to put a server back.
#[derive(Debug, Args)]
pub(crate) struct UnrescueArgs {
    /// The server: uuid, at least four digits that no other uuid begins with, or unique name.
    pub(crate) server: String,
    /// What becomes of the overlays of a rescue with --disks overlay.
    #[arg(long, value_enum)]
    pub(crate) overlay: Option<OverlayArg>,
    /// Start the server, or restore the power state that it had before the rescue.
    #[arg(long, value_enum, default_value = "start")]
    pub(crate) power: PowerArg,
    #[command(flatten)]
    pub(crate) shutdown: Shutdown,
}
