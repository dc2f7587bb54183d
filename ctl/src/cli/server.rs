// SPDX-License-Identifier: Apache-2.0
//! The arguments of `salvor server` and, with the same types, of `salvor plan`.

use std::{path::PathBuf, time::Duration};

use clap::{ArgAction, Args, Subcommand};
use uuid::Uuid;

use super::{
    How,
    console::{ConsoleArgs, ConsoleLogArgs, DiagnosticsArgs, ScreenshotArgs},
    values::{
        BusArg, ClearArg, DeviceArg, DisksArg, FirmwareArg, Interfaces, ModeArg, OnTimeoutArg,
        OriginArg, OverlayArg, PowerArg, PowerStateArg, ResetArg, VmStateArg, key_value,
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
    /// Have the guest shut down and start it again; with --hard, end it and start it again.
    Reboot {
        #[command(flatten)]
        args: RebootArgs,
        #[command(flatten)]
        how: How,
    },
    /// Stop the guest's CPUs; its memory stays where it is.
    Pause {
        #[command(flatten)]
        args: ServerArg,
        #[command(flatten)]
        how: How,
    },
    /// Let the CPUs of a paused guest run again.
    Unpause {
        #[command(flatten)]
        args: ServerArg,
        #[command(flatten)]
        how: How,
    },
    /// Save the guest's memory to disk and end it.
    Suspend {
        #[command(flatten)]
        args: ServerArg,
        #[command(flatten)]
        how: How,
    },
    /// Start a suspended guest from its saved memory.
    Resume {
        #[command(flatten)]
        args: ServerArg,
        #[command(flatten)]
        how: How,
    },
    /// Inject an NMI, at which a guest that is set up for it dumps its memory; with --to-host, write the
    /// memory to a file of the host instead.
    CrashDump {
        #[command(flatten)]
        args: CrashDumpArgs,
        #[command(flatten)]
        how: How,
    },
    /// Have the guest agent set a user's password.
    ///
    /// The password is printed once, unless it was given: the agent keeps only its hash.
    SetPassword {
        #[command(flatten)]
        args: SetPasswordArgs,
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
    /// Remove a server. The disks of a created server go, those of an adopted one stay.
    ///
    /// Where the agent has a reclaim interval, the server is powered off at once and removed when that time
    /// is over; until then it can be restored.
    #[command(visible_alias = "rm")]
    Delete {
        #[command(flatten)]
        args: ServerArg,
        #[command(flatten)]
        how: How,
    },
    /// Show what the guest has said on its serial port, over several boots.
    #[command(visible_alias = "log")]
    ConsoleLog(ConsoleLogArgs),
    /// Attach the terminal to the guest's serial port. Ctrl-] leaves it.
    ///
    /// One client writes, others may look on. What the guest says goes to the terminal as it is.
    /// Standard input may also be a pipe: what is in it is sent, and the answer shown for a while.
    Console(ConsoleArgs),
    /// Take a picture of the guest's screen.
    Screenshot(ScreenshotArgs),
    /// Tell everything that can be read of a server and its guest now.
    ///
    /// What cannot be read is named with the reason; a guest that hangs holds nothing else up.
    Diagnostics(DiagnosticsArgs),
    /// Keep everybody but the administrator from changing a server.
    Lock {
        #[command(flatten)]
        args: LockArgs,
        #[command(flatten)]
        how: How,
    },
    /// Take a lock off.
    Unlock {
        #[command(flatten)]
        args: ServerArg,
        #[command(flatten)]
        how: How,
    },
    /// Change what the record says of a server. The guest is not touched.
    Update {
        #[command(flatten)]
        args: UpdateArgs,
        #[command(flatten)]
        how: How,
    },
    /// Say that a server is active or in error, whatever was under way; for the administrator.
    ///
    /// An operation that is under way is abandoned. Nothing on the host is changed: the answer says what it
    /// really shows.
    ResetState {
        #[command(flatten)]
        args: ResetStateArgs,
        #[command(flatten)]
        how: How,
    },
    /// Bring a deleted server back that is not removed yet, and start it if it ran.
    Restore {
        #[command(flatten)]
        args: ServerArg,
        #[command(flatten)]
        how: How,
    },
    /// Remove a server at once, deleted already or not.
    ForceDelete {
        #[command(flatten)]
        args: ServerArg,
        #[command(flatten)]
        how: How,
    },
}

/// How to lock.
#[derive(Debug, Args)]
pub(crate) struct LockArgs {
    /// The server: uuid, at least four digits that no other uuid begins with, or unique name.
    pub(crate) server: String,
    /// Why, for those who find it locked.
    #[arg(long, value_name = "TEXT")]
    pub(crate) reason: Option<String>,
    /// After this time the lock holds no longer (30m, 8h, …); never if absent.
    #[arg(long, value_name = "TIME", value_parser = units::duration)]
    pub(crate) expires_in: Option<Duration>,
}

/// What to change; what is not given stays as it is.
#[derive(Debug, Args)]
pub(crate) struct UpdateArgs {
    /// The server: uuid, at least four digits that no other uuid begins with, or unique name.
    pub(crate) server: String,
    #[command(flatten)]
    pub(crate) fields: UpdateFields,
}

/// The fields that can be changed.
#[derive(Debug, Args)]
#[group(required = true, multiple = true)]
pub(crate) struct UpdateFields {
    /// Name. The domain keeps its own.
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// Description.
    #[arg(long, value_name = "TEXT")]
    pub(crate) description: Option<String>,
    /// Metadata, all of it: what is not given goes. Can be given more than once.
    #[arg(long, value_name = "KEY=VALUE", value_parser = key_value)]
    pub(crate) metadata: Vec<(String, String)>,
    /// Tags, all of them. Can be given more than once.
    #[arg(long = "tag", value_name = "TAG")]
    pub(crate) tags: Vec<String>,
    /// IPv4 address by which people reach the server.
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) access_ipv4: Option<String>,
    /// IPv6 address by which people reach the server.
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) access_ipv6: Option<String>,
    /// How long the guest may take to shut down by itself, where a request does not say (30s, 2m, …).
    #[arg(long, value_name = "TIME", value_parser = units::duration)]
    pub(crate) shutdown_timeout: Option<Duration>,
    /// Start it again after the host was rebooted, if it ran before.
    #[arg(long, value_name = "BOOL", action = ArgAction::Set)]
    pub(crate) autostart: Option<bool>,
    /// Its place when servers are started again: lower ones first, those without one last.
    #[arg(long, value_name = "NUMBER")]
    pub(crate) autostart_order: Option<u32>,
    /// Fields to be without a value. Can be given more than once.
    #[arg(long, value_name = "FIELD", value_enum)]
    pub(crate) clear: Vec<ClearArg>,
}

/// What to reset a state to.
#[derive(Debug, Args)]
pub(crate) struct ResetStateArgs {
    /// The server: uuid, at least four digits that no other uuid begins with, or unique name.
    pub(crate) server: String,
    /// The state. A server whose rescue is in force is RESCUED when it is reset to active.
    #[arg(value_enum)]
    pub(crate) state: ResetArg,
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
    /// Servers with this tag. Can be given more than once.
    #[arg(long = "tag", value_name = "TAG")]
    pub(crate) tags: Vec<String>,
    /// Servers that are locked (true) or not (false).
    #[arg(long, value_name = "BOOL", action = ArgAction::Set)]
    pub(crate) locked: Option<bool>,
    /// Servers of this project.
    #[arg(
        long,
        value_name = "PROJECT",
        default_value = "",
        hide_default_value = true
    )]
    pub(crate) project: String,
    /// Servers with this metadata. Can be given more than once.
    #[arg(long, value_name = "KEY=VALUE", value_parser = key_value)]
    pub(crate) metadata: Vec<(String, String)>,
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
    /// End the guest at once, without asking it to shut down.
    #[arg(long, conflicts_with = "shutdown_timeout")]
    pub(crate) force: bool,
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

/// How to reboot.
#[derive(Debug, Args)]
pub(crate) struct RebootArgs {
    /// The server: uuid, at least four digits that no other uuid begins with, or unique name.
    pub(crate) server: String,
    /// End the guest at once. Memory that was saved of it is lost.
    #[arg(long, conflicts_with_all = ["shutdown_timeout", "on_timeout"])]
    pub(crate) hard: bool,
    /// How long the guest may take to shut down by itself (30s, 2m, …).
    #[arg(long, value_name = "TIME", value_parser = units::duration, default_value = "2m")]
    pub(crate) shutdown_timeout: Duration,
    /// What becomes of a guest that does not shut down in time: it is ended, or goes on and the reboot fails.
    #[arg(long, value_enum, default_value = "hard")]
    pub(crate) on_timeout: OnTimeoutArg,
}

/// What to dump.
#[derive(Debug, Args)]
pub(crate) struct CrashDumpArgs {
    /// The server: uuid, at least four digits that no other uuid begins with, or unique name.
    pub(crate) server: String,
    /// Write the guest's memory to a file on the host, which the result names. The guest stands still
    /// meanwhile, and goes on then.
    #[arg(long)]
    pub(crate) to_host: bool,
}

/// Whose password to set.
#[derive(Debug, Args)]
pub(crate) struct SetPasswordArgs {
    /// The server: uuid, at least four digits that no other uuid begins with, or unique name.
    pub(crate) server: String,
    /// The user; the administrator's account if absent.
    #[arg(long)]
    pub(crate) user: Option<String>,
    #[command(flatten)]
    pub(crate) admin_pass: AdminPass,
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
