// SPDX-License-Identifier: Apache-2.0
//! `salvord`: reads the arguments and the configuration, sets the log up, runs the agent, and turns what came of it into
//! an exit code and one message.
#![forbid(unsafe_code)]

use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use salvor_agent::config::{Config, ConfigError, Loaded};
use salvor_agent::core::errors::chain;
use salvor_agent::daemon::{self, DaemonError};
use salvor_agent::libvirt;
use salvor_agent::telemetry::{self, FILTER_VARIABLE};

/// The configuration that is read when none is named. It may be missing.
const DEFAULT_CONFIG: &str = "/etc/salvor/salvor.toml";

/// Failed while starting or running.
const FAILED: u8 = 1;
/// Wrong arguments (`EX_USAGE` of sysexits.h).
const USAGE: u8 = 64;
/// Wrong configuration (`EX_CONFIG` of sysexits.h).
const CONFIG: u8 = 78;

const VERSION: &str = if cfg!(feature = "failpoints") {
    concat!(
        env!("CARGO_PKG_VERSION"),
        " (API salvor.compute.v1; test build with failpoints)"
    )
} else if cfg!(debug_assertions) {
    concat!(
        env!("CARGO_PKG_VERSION"),
        " (API salvor.compute.v1; debug build)"
    )
} else {
    concat!(env!("CARGO_PKG_VERSION"), " (API salvor.compute.v1)")
};

/// The Salvor compute agent: turns gRPC requests into libvirt operations on this host's guests.
#[derive(Debug, Parser)]
#[command(name = "salvord", version = VERSION, max_term_width = 100)]
#[command(
    after_help = "Exit codes: 0 ended as asked, 1 failed, 64 wrong arguments, 78 wrong configuration."
)]
struct Arguments {
    /// The configuration [default: /etc/salvor/salvor.toml if it exists]
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,

    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Checks the configuration and prints what is in effect, and where each value came from
    CheckConfig,
    /// Renders the domain templates with a matrix of servers and rescues, and checks what comes out
    /// against libvirt's schema
    CheckTemplates,
}

fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            // Help and version are "errors" to clap, and nothing can be done if they cannot be printed.
            let _ = error.print();
            return if error.use_stderr() {
                USAGE.into()
            } else {
                ExitCode::SUCCESS
            };
        }
    };
    let loaded = match load(arguments.config.as_deref()) {
        Ok(loaded) => loaded,
        Err(error) => return failed(CONFIG, &error),
    };
    match arguments.command {
        Some(Command::CheckConfig) => check_config(&loaded),
        Some(Command::CheckTemplates) => check_templates(&loaded),
        None => run(&loaded),
    }
}

/// The named configuration, which must exist; else the default one, which need not.
fn load(named: Option<&Path>) -> Result<Loaded, ConfigError> {
    match named {
        Some(path) => Config::load(path),
        None => match Config::load(Path::new(DEFAULT_CONFIG)) {
            Err(ConfigError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                Ok(Config::defaults())
            }
            loaded => loaded,
        },
    }
}

fn check_config(loaded: &Loaded) -> ExitCode {
    match io::stdout().lock().write_all(loaded.describe().as_bytes()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failed(FAILED, &error),
    }
}

fn check_templates(loaded: &Loaded) -> ExitCode {
    let folder = loaded.config.templates_dir.as_deref();
    let checked = daemon::load_templates(folder).and_then(|templates| {
        daemon::check_templates(&templates, daemon::Thoroughness::Everything)
    });
    match checked {
        Ok(checked) => {
            let of = folder.map_or_else(
                || "built-in templates".to_owned(),
                |folder| folder.display().to_string(),
            );
            let _ = writeln!(
                io::stdout(),
                "{of}: {} domains rendered, {} of them held against libvirt's schema: all good",
                checked.rendered,
                checked.validated
            );
            ExitCode::SUCCESS
        }
        Err(error) => failed(CONFIG, &error),
    }
}

fn run(loaded: &Loaded) -> ExitCode {
    let filter = std::env::var(FILTER_VARIABLE).ok();
    if let Err(error) = telemetry::init(&loaded.config.log, filter.as_deref()) {
        return failed(CONFIG, &error);
    }
    match loaded.path() {
        Some(path) => tracing::info!(path = %path.display(), "configuration read"),
        None => tracing::info!("{DEFAULT_CONFIG} does not exist: every setting has its default"),
    }
    let code = match daemon::run(&loaded.config) {
        Ok(()) => 0,
        Err(error @ DaemonError::Templates(_)) => {
            tell(&error);
            CONFIG
        }
        Err(error) => {
            tell(&error);
            FAILED
        }
    };
    // Standard error has no buffer, and this is all that standard output may have.
    let _ = io::stdout().flush();
    libvirt::leave(code)
}

fn failed(code: u8, error: &dyn std::error::Error) -> ExitCode {
    tell(error);
    code.into()
}

/// Says once what went wrong, with all causes: in the log if there is one, else as plain text.
fn tell(error: &dyn std::error::Error) {
    let chain = chain(error);
    if tracing::enabled!(tracing::Level::ERROR) {
        tracing::error!("{chain}");
    } else {
        // There is nowhere left to complain.
        let _ = writeln!(io::stderr(), "{chain}");
    }
}
