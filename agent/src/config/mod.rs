// SPDX-License-Identifier: Apache-2.0
//! The agent's configuration: what can be set, and how a file becomes a checked value.
//!
//! Owns the table of settings, their units and rules. Opens nothing but the file itself and knows nobody who uses a
//! setting: a [`Config`] is complete and valid before the first socket, lock or connection exists.
//!
//! ```text
//!  settings.rs   the one table ── kinds.rs (rules of values) ── units.rs
//!      │ walked by
//!      ├─ load.rs       TOML text → Config, all mistakes with their lines
//!      ├─ show.rs       check-config
//!      └─ reference.rs  docs/CONFIGURATION.md
//! ```

mod kinds;
mod load;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod reference;
mod settings;
mod show;
#[cfg(test)]
mod tests;
mod units;
mod virt_type;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use thiserror::Error;

pub use self::settings::{
    ApiConfig, AutostartConfig, Config, ConsoleConfig, DrainConfig, EventsConfig, LibvirtConfig,
    LogConfig, LogFormat, LogLevel, OperationsConfig, PolicyConfig, Reaction, RescueConfig,
    ShutdownConfig, StorageConfig,
};
pub use self::units::ByteSize;
pub use self::virt_type::{Chosen, DomainType, VirtType};

/// The largest configuration that is read. All settings with long comments are a tenth of it; anything larger is some
/// other file.
const FILE_LIMIT: u64 = 1 << 20;

/// A configuration and where its values came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Loaded {
    /// The effective configuration.
    pub config: Config,
    /// The file; `None` when everything is a default.
    path: Option<PathBuf>,
    /// The line of each setting that the file has.
    origins: BTreeMap<String, usize>,
}

impl Loaded {
    /// The file that was read; `None` when everything is a default.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }
}

/// Why there is no configuration.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {path:?}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The file is far larger than a configuration.
    #[error("the configuration {path:?} is larger than 1 MiB; is it the right file?")]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// The text has mistakes.
    #[error("{}", list(path, problems))]
    Invalid {
        /// The file.
        path: PathBuf,
        /// All of them, in the order of their lines.
        problems: Vec<Problem>,
    },
}

/// One mistake in a configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The line, counted from one.
    pub line: usize,
    /// What is wrong and what would be right.
    pub text: String,
}

fn list(path: &Path, problems: &[Problem]) -> String {
    let lines: Vec<String> = problems
        .iter()
        .map(|problem| format!("{}:{}: {}", path.display(), problem.line, problem.text))
        .collect();
    lines.join("\n")
}

impl Config {
    /// Reads the file at `path`.
    ///
    /// # Errors
    /// The file cannot be read, is too large, or has mistakes; these are reported all at once.
    pub fn load(path: &Path) -> Result<Loaded, ConfigError> {
        let read = |source| ConfigError::Read {
            path: path.to_path_buf(),
            source,
        };
        let mut text = String::new();
        File::open(path)
            .and_then(|file| file.take(FILE_LIMIT + 1).read_to_string(&mut text))
            .map_err(read)?;
        if text.len() > usize::try_from(FILE_LIMIT).unwrap_or(usize::MAX) {
            return Err(ConfigError::TooLarge {
                path: path.to_path_buf(),
            });
        }
        Self::parse(&text, path)
    }

    /// The configuration without a file.
    #[must_use]
    pub fn defaults() -> Loaded {
        Loaded {
            config: Self::default(),
            path: None,
            origins: BTreeMap::new(),
        }
    }
}
