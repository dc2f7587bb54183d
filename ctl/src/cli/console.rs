// SPDX-License-Identifier: Apache-2.0
//! The arguments of what shows a server: `console-log`, `console`, `screenshot` and `diagnostics`.

use std::{path::PathBuf, time::Duration};

use clap::{Args, ValueEnum};
use salvor_proto::v1::ConsoleGuest;

use crate::units;

/// Whose words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum GuestArg {
    /// The server's own guest.
    Server,
    /// Rescue guests.
    Rescue,
    /// Both, in the order in which they ran.
    All,
}

impl GuestArg {
    pub(crate) fn api(self) -> i32 {
        match self {
            Self::Server => ConsoleGuest::Server.into(),
            Self::Rescue => ConsoleGuest::Rescue.into(),
            Self::All => ConsoleGuest::All.into(),
        }
    }
}

/// What to show of a log.
#[derive(Debug, Clone, Args)]
pub(crate) struct ConsoleLogArgs {
    /// The server: uuid, at least four digits that no other uuid begins with, or unique name.
    pub(crate) server: String,
    /// So many lines from the end; -1 is everything that is kept. Without --lines, --bytes and --cursor
    /// the newest MiB is shown, or with --follow what comes from now on.
    #[arg(long, short = 'n', value_name = "NUMBER", allow_negative_numbers = true, conflicts_with_all = ["bytes", "cursor"])]
    pub(crate) lines: Option<i64>,
    /// So many bytes from the end; -1 is everything that is kept.
    #[arg(
        long,
        value_name = "NUMBER",
        allow_negative_numbers = true,
        conflicts_with = "cursor"
    )]
    pub(crate) bytes: Option<i64>,
    /// From where an earlier call ended (see --show-cursor).
    #[arg(long, value_name = "CURSOR", allow_hyphen_values = true)]
    pub(crate) cursor: Option<String>,
    /// Whose words. If absent: the rescue guests' while the server is rescued, else its own guest's;
    /// with --follow everybody's.
    #[arg(long, value_enum)]
    pub(crate) guest: Option<GuestArg>,
    /// Of this boot only (see --boots).
    #[arg(long, value_name = "NUMBER", conflicts_with = "follow")]
    pub(crate) boot: Option<i64>,
    /// List the boots of which something is kept, instead of what they said.
    #[arg(long, conflicts_with_all = ["lines", "bytes", "cursor", "boot", "guest", "follow", "raw"])]
    pub(crate) boots: bool,
    /// Go on with what the guest says, until interrupted; over restarts of the guest and the agent.
    #[arg(long, short)]
    pub(crate) follow: bool,
    /// Write the guest's bytes as they are. Else what a terminal could obey is written out.
    #[arg(long)]
    pub(crate) raw: bool,
    /// Tell on standard error where the log ends now.
    #[arg(long)]
    pub(crate) show_cursor: bool,
}

/// How to attach.
#[derive(Debug, Args)]
pub(crate) struct ConsoleArgs {
    /// The server: uuid, at least four digits that no other uuid begins with, or unique name.
    pub(crate) server: String,
    /// Look on only.
    #[arg(long)]
    pub(crate) read_only: bool,
    /// Take over from whoever writes to the console, virsh included.
    #[arg(long, conflicts_with = "read_only")]
    pub(crate) force: bool,
    /// Do not begin with what was said last while others were attached.
    #[arg(long)]
    pub(crate) no_history: bool,
    /// When standard input is no terminal and has ended: go on for so long to show what the guest says.
    #[arg(long, default_value = "2s", value_name = "TIME", value_parser = units::duration)]
    pub(crate) linger: Duration,
}

/// Where the picture goes.
#[derive(Debug, Args)]
pub(crate) struct ScreenshotArgs {
    /// The server: uuid, at least four digits that no other uuid begins with, or unique name.
    pub(crate) server: String,
    /// The PNG file to write. What is there is replaced.
    #[arg(long, short, value_name = "FILE")]
    pub(crate) file: PathBuf,
}

/// What to tell of a server.
#[derive(Debug, Args)]
pub(crate) struct DiagnosticsArgs {
    /// The server: uuid, at least four digits that no other uuid begins with, or unique name.
    pub(crate) server: String,
    /// Write everything, with the domain's definitions and the host's description, into a new JSON file
    /// for a support ticket. Secrets in the definitions are masked.
    #[arg(long, value_name = "FILE")]
    pub(crate) bundle: Option<PathBuf>,
}
