// SPDX-License-Identifier: Apache-2.0
//! The arguments. Their doc comments are the help texts and the manual pages.

mod console;
mod server;
mod values;

use std::{path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand, ValueEnum};
use uuid::Uuid;

pub(crate) use self::{
    console::{ConsoleArgs, ConsoleLogArgs, DiagnosticsArgs, ScreenshotArgs},
    server::{
        AdoptArgs, CrashDumpArgs, CreateArgs, ListServers, LockArgs, RebootArgs, RescueArgs,
        ResetStateArgs, ServerArg, ServerCommand, SetPasswordArgs, StopArgs, UnrescueArgs,
        UpdateArgs,
    },
    values::{ImageFormatArg, key_value},
};
use crate::{errors::EXIT_CODES, units};

/// Drive the Salvor compute agent of this host
///
/// Salvor looks after the servers (virtual machines) of a KVM host; above all it rescues them: it
/// boots a rescue image in a broken server's place, with the server's disks attached, and later puts
/// the server back.
///
/// SERVER is a uuid, at least four digits that no other uuid of this host begins with, or a unique
/// name; so is IMAGE. OPERATION is its name, its uuid, or at least four digits as above.
/// Actions wait for their end and show their steps on standard error; results go to standard output.
#[derive(Debug, Parser)]
#[command(
    name = "salvor",
    version,
    after_help = EXIT_CODES,
    max_term_width = 100,
    arg_required_else_help = true,
    infer_long_args = false
)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// How results are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// Aligned text for people.
    Table,
    /// The API's message as proto3 JSON, fields named as in the .proto files.
    Json,
}

/// What every command takes.
#[derive(Debug, Args)]
pub(crate) struct Global {
    /// The agent's socket: a path, or unix:PATH.
    #[arg(
        long,
        global = true,
        env = "SALVOR_SOCKET",
        default_value = "/run/salvor/salvor.sock",
        value_name = "PATH",
        value_parser = socket,
        help_heading = "Global options"
    )]
    pub(crate) socket: PathBuf,
    /// How to write results.
    #[arg(
        short,
        long,
        global = true,
        value_enum,
        default_value = "table",
        value_name = "FORMAT",
        help_heading = "Global options"
    )]
    pub(crate) output: Format,
    /// Write results and errors only: no steps, no notes.
    #[arg(short, long, global = true, help_heading = "Global options")]
    pub(crate) quiet: bool,
    /// Call for this user.
    #[arg(long, global = true, value_name = "USER", value_parser = header, help_heading = "Global options")]
    pub(crate) as_user: Option<String>,
    /// Call for this project: what is made belongs to it.
    #[arg(long, global = true, value_name = "PROJECT", value_parser = header, help_heading = "Global options")]
    pub(crate) as_project: Option<String>,
    /// Call with this role. A member may change the servers of its project, unless they are locked.
    #[arg(
        long,
        global = true,
        value_name = "ROLE",
        value_enum,
        help_heading = "Global options"
    )]
    pub(crate) as_role: Option<RoleArg>,
}

/// What a caller may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum RoleArg {
    /// Everything.
    Admin,
    /// What the owners of servers may do.
    Member,
}

impl RoleArg {
    /// The API's word.
    pub(crate) const fn word(self) -> &'static str {
        match self {
            Self::Admin => "admin",
            Self::Member => "member",
        }
    }
}

/// How long to wait.
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct Patience {
    /// Give up waiting after this time; what was begun goes on.
    #[arg(long, default_value = "1h", value_name = "TIME", value_parser = units::duration)]
    pub(crate) wait_timeout: Duration,
}

/// How an action is asked for.
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct How {
    /// Do not wait: print the operation as soon as it is accepted.
    #[arg(long)]
    pub(crate) no_wait: bool,
    #[command(flatten)]
    pub(crate) patience: Patience,
    #[command(flatten)]
    pub(crate) repeatable: Repeatable,
}

/// How a request is known again.
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct Repeatable {
    /// Makes the request repeatable: the same id with the same arguments gives the answer that the
    /// first request was given, and does nothing twice. Generated if absent, and used when a broken
    /// connection makes the request be sent again.
    #[arg(long, value_name = "UUID")]
    request_id: Option<Uuid>,
}

impl Repeatable {
    /// The request id to use: the one that was given, or a new one.
    pub(crate) fn request_id(&self) -> String {
        self.request_id.unwrap_or_else(Uuid::new_v4).to_string()
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Servers and what can be done to them.
    #[command(subcommand, visible_alias = "servers")]
    Server(ServerCommand),
    /// Images that this host keeps.
    #[command(subcommand, visible_alias = "images")]
    Image(ImageCommand),
    /// Operations: what is and was done.
    #[command(subcommand, visible_aliases = ["operations", "op"])]
    Operation(OperationCommand),
    /// Show what happens, as it happens.
    ///
    /// First every server as it is now, then each change. If the agent goes away, the watch is taken
    /// up where it broke off when the agent is back.
    Watch(WatchArgs),
    /// This host and its agent.
    #[command(subcommand)]
    Host(HostCommand),
    /// Show what an action would do, without doing any of it.
    ///
    /// Takes the arguments of the action. Ends with exit code 3 if the action would be refused.
    #[command(subcommand)]
    Plan(PlanCommand),
    /// Print a completion script for a shell.
    ///
    /// For instance: salvor completion bash > /etc/bash_completion.d/salvor
    Completion {
        /// The shell.
        shell: Shell,
    },
    /// Write the manual pages.
    Man {
        /// Folder to write them to; it is made if it does not exist.
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
    },
}

/// Shells for which a completion script can be made.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum Shell {
    /// GNU Bash.
    Bash,
    /// Z shell.
    Zsh,
    /// Fish.
    Fish,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ImageCommand {
    /// Import an image file.
    ///
    /// The file is sent to the agent, which inspects it before anything opens it. With --on-host the
    /// agent reads the file itself; it must be in one of the agent's import folders.
    Import(ImportArgs),
    /// List the images.
    #[command(visible_alias = "ls")]
    List,
    /// Show an image.
    Show {
        /// The image.
        image: String,
    },
    /// Remove an image that no disk stands on.
    #[command(visible_alias = "rm")]
    Delete {
        /// The image.
        image: String,
        #[command(flatten)]
        repeatable: Repeatable,
    },
}

/// What to import.
#[derive(Debug, Args)]
pub(crate) struct ImportArgs {
    /// The file: raw, qcow2 or ISO.
    pub(crate) file: PathBuf,
    /// Name of the image; the file's name without its ending if absent.
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// A property, for instance hw_rescue_bus=usb. Can be given more than once.
    #[arg(long = "property", value_name = "KEY=VALUE", value_parser = key_value)]
    pub(crate) properties: Vec<(String, String)>,
    /// Format; told from the content if absent.
    #[arg(long, value_enum)]
    pub(crate) format: Option<ImageFormatArg>,
    /// SHA-256 that the file must have, hexadecimal.
    #[arg(long, value_name = "HEX")]
    pub(crate) sha256: Option<String>,
    /// uuid of the image. Importing the same image again under the same id is a success.
    #[arg(long, value_name = "UUID")]
    pub(crate) id: Option<Uuid>,
    /// The file is on the agent's host; the agent reads it itself.
    #[arg(long)]
    pub(crate) on_host: bool,
    #[command(flatten)]
    pub(crate) patience: Patience,
    #[command(flatten)]
    pub(crate) repeatable: Repeatable,
}

#[derive(Debug, Subcommand)]
pub(crate) enum OperationCommand {
    /// List operations.
    #[command(visible_alias = "ls")]
    List {
        /// Only operations of this server: its id, the unique beginning of it, or its unique name. Those of a
        /// server that was deleted are found by the whole id.
        server: Option<String>,
        /// The same.
        #[arg(long = "server", value_name = "SERVER", conflicts_with = "server")]
        of_server: Option<String>,
        /// Only operations that this filter of the agent selects, for instance done=false.
        #[arg(long, default_value = "", hide_default_value = true)]
        filter: String,
    },
    /// Show an operation with all its steps.
    Show {
        /// The operation: its name, what follows `operations/` in it, or at least four digits that no
        /// other operation's uuid begins with.
        operation: String,
    },
    /// Wait for the end of an operation.
    ///
    /// Ends with exit code 1 if the operation ended in an error.
    Wait {
        /// The operation.
        operation: String,
        #[command(flatten)]
        patience: Patience,
    },
    /// Cancel an operation: what it did is taken back.
    ///
    /// Waits until the server is as before. Ends with exit code 1 if the operation ended otherwise.
    Cancel {
        /// The operation.
        operation: String,
        /// Do not wait until it has ended.
        #[arg(long)]
        no_wait: bool,
        #[command(flatten)]
        patience: Patience,
    },
    /// End an operation that hangs; for the administrator.
    ///
    /// It is cancelled and, if it does not end in time, given up: its server is in ERROR then, and the fault
    /// says which step hangs and what may be left on the host.
    Abandon {
        /// The operation.
        operation: String,
        /// How long it may take to be cancelled in good order.
        #[arg(long, default_value = "60s", value_name = "TIME", value_parser = units::duration)]
        after: Duration,
    },
}

/// What to watch.
#[derive(Debug, Args)]
pub(crate) struct WatchArgs {
    /// Only these servers; all if none is given.
    #[arg(value_name = "SERVER")]
    pub(crate) servers: Vec<String>,
    /// Begin after this revision instead of now.
    #[arg(long, value_name = "REVISION")]
    pub(crate) after: Option<i64>,
    /// Give up when the agent has been away for this time.
    #[arg(long, default_value = "5m", value_name = "TIME", value_parser = units::duration)]
    pub(crate) wait_timeout: Duration,
}

#[derive(Debug, Subcommand)]
pub(crate) enum HostCommand {
    /// Show the host: versions, capacity, and how the agent stands with libvirt.
    Show,
    /// List the domains of libvirt that are no servers. They can be adopted.
    Unmanaged,
}

#[derive(Debug, Subcommand)]
pub(crate) enum PlanCommand {
    /// What `server create` would do.
    Create(CreateArgs),
    /// What `server adopt` would do.
    Adopt(AdoptArgs),
    /// What `server release` would do.
    Release(ServerArg),
    /// What `server delete` would do.
    Delete(ServerArg),
    /// What `server start` would do.
    Start(ServerArg),
    /// What `server stop` would do.
    Stop(StopArgs),
    /// What `server rescue` would do.
    Rescue(RescueArgs),
    /// What `server unrescue` would do.
    Unrescue(UnrescueArgs),
    /// What `server reboot` would do.
    Reboot(RebootArgs),
    /// What `server pause` would do.
    Pause(ServerArg),
    /// What `server unpause` would do.
    Unpause(ServerArg),
    /// What `server suspend` would do.
    Suspend(ServerArg),
    /// What `server resume` would do.
    Resume(ServerArg),
    /// What `server crash-dump` would do.
    CrashDump(CrashDumpArgs),
    /// What `server set-password` would do.
    SetPassword(SetPasswordArgs),
    /// What `server lock` would do.
    Lock(LockArgs),
    /// What `server unlock` would do.
    Unlock(ServerArg),
    /// What `server update` would do.
    Update(UpdateArgs),
    /// What `server reset-state` would do. What is under way is not abandoned for that.
    ResetState(ResetStateArgs),
    /// What `server restore` would do.
    Restore(ServerArg),
    /// What `server force-delete` would do.
    ForceDelete(ServerArg),
    /// What `server drift --accept` would do.
    AcceptDrift(ServerArg),
    /// What `server drift --restore` would do.
    RestoreDefinition(ServerArg),
}

/// What a header of a call can hold.
fn header(text: &str) -> Result<String, &'static str> {
    let printable = text.bytes().all(|byte| matches!(byte, b' '..=b'~'));
    if (1..=255).contains(&text.len()) && printable {
        Ok(text.to_owned())
    } else {
        Err("it must be 1 to 255 printable ASCII characters")
    }
}

/// Reads the socket's path; `unix:PATH` is how the agent's configuration has it.
fn socket(text: &str) -> Result<PathBuf, &'static str> {
    let path = text.strip_prefix("unix:").unwrap_or(text);
    let path = path
        .strip_prefix("//")
        .filter(|rest| rest.starts_with('/'))
        .unwrap_or(path);
    if path.is_empty() {
        return Err("it is empty; name the agent's Unix socket");
    }
    if path.contains("://") {
        return Err("the agent listens on a Unix socket only; give its path");
    }
    Ok(PathBuf::from(path))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::path::Path;

    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_arguments_hold_together() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_socket_is_a_path_or_unix_and_a_path() {
        for text in ["/run/a.sock", "unix:/run/a.sock", "unix:///run/a.sock"] {
            assert_eq!(socket(text).unwrap(), Path::new("/run/a.sock"), "{text}");
        }
        assert_eq!(socket("a.sock").unwrap(), Path::new("a.sock"));
        assert!(socket("").is_err());
        assert!(socket("unix:").is_err());
        assert!(socket("http://host").is_err());
    }
}
