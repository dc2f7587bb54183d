// SPDX-License-Identifier: Apache-2.0
//! The kinds of value that a setting can have: how each is read from TOML, shown as TOML, and described.
//!
//! Knows no setting by name. The reader, `check-config` and the reference page all go through [`Kind`], so a rule is
//! written once.

use std::fmt::Debug;
use std::marker::PhantomData;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use thiserror::Error;
use toml::de::DeValue;

use super::units::{ByteSize, UnitError, parse_duration, show_duration};

/// How one kind of value is read, shown and described.
pub(super) trait Kind {
    /// The type of the setting's field.
    type Value: Clone + PartialEq + Debug;

    /// What may be written, as a phrase for messages and the reference page.
    fn rule(&self) -> String;

    /// Reads a value; the error says what is wrong with it, [`Kind::rule`] what would be right.
    fn read(&self, value: &DeValue<'_>) -> Result<Self::Value, ValueError>;

    /// The value as TOML; `None` when there is no value to write.
    fn show(&self, value: &Self::Value) -> Option<String>;
}

/// What is wrong with a value.
#[derive(Debug, Error)]
pub(super) enum ValueError {
    #[error("{expected} expected, found {found}")]
    Type {
        expected: &'static str,
        found: &'static str,
    },
    #[error("{text:?}: {source}")]
    Unit { text: String, source: UnitError },
    #[error("{text} is out of range")]
    Range { text: String },
    #[error("{text:?} is not one of the choices")]
    Choice { text: String },
    #[error("{text:?} is not an absolute path without \"..\" and control characters")]
    Path { text: String },
    #[error("the path is {length} bytes long; a Unix socket's may have {limit}")]
    SocketPath { length: usize, limit: usize },
    #[error("{text:?}: TCP is not served: it comes together with mutual TLS and not before")]
    Tcp { text: String },
    #[error("{text:?} has another form")]
    Form { text: String },
}

fn string<'a>(value: &'a DeValue<'_>) -> Result<&'a str, ValueError> {
    value.as_str().ok_or_else(|| ValueError::Type {
        expected: "string",
        found: value.type_str(),
    })
}

/// A TOML string. Control characters come out escaped.
fn quoted(text: &str) -> String {
    toml::Value::from(text).to_string()
}

/// A duration between two bounds, both allowed.
pub(super) struct Span {
    pub(super) min: Duration,
    pub(super) max: Duration,
}

impl Kind for Span {
    type Value = Duration;

    fn rule(&self) -> String {
        format!(
            "a duration such as \"500ms\", \"30s\", \"5m\", \"2h\" or \"30d\", from {} to {}",
            show_duration(self.min),
            show_duration(self.max)
        )
    }

    fn read(&self, value: &DeValue<'_>) -> Result<Duration, ValueError> {
        let text = string(value)?;
        let duration = parse_duration(text).map_err(|source| ValueError::Unit {
            text: text.to_owned(),
            source,
        })?;
        if duration < self.min || duration > self.max {
            return Err(ValueError::Range {
                text: text.to_owned(),
            });
        }
        Ok(duration)
    }

    fn show(&self, value: &Duration) -> Option<String> {
        Some(quoted(&show_duration(*value)))
    }
}

/// A duration of which nought means "never".
pub(super) struct SpanOrNever(pub(super) Span);

impl Kind for SpanOrNever {
    type Value = Option<Duration>;

    fn rule(&self) -> String {
        format!("{}; or \"0\" for never", self.0.rule())
    }

    fn read(&self, value: &DeValue<'_>) -> Result<Option<Duration>, ValueError> {
        if matches!(string(value).map(parse_duration), Ok(Ok(Duration::ZERO))) {
            return Ok(None);
        }
        self.0.read(value).map(Some)
    }

    fn show(&self, value: &Option<Duration>) -> Option<String> {
        self.0.show(&value.unwrap_or_default())
    }
}

/// A size between two bounds, both allowed.
pub(super) struct Size {
    pub(super) min: ByteSize,
    pub(super) max: ByteSize,
}

impl Kind for Size {
    type Value = ByteSize;

    fn rule(&self) -> String {
        format!(
            "a size such as \"512KiB\", \"256MiB\" or \"64GiB\", from {} to {}",
            self.min, self.max
        )
    }

    fn read(&self, value: &DeValue<'_>) -> Result<ByteSize, ValueError> {
        let text = string(value)?;
        let size = ByteSize::parse(text).map_err(|source| ValueError::Unit {
            text: text.to_owned(),
            source,
        })?;
        if size < self.min || size > self.max {
            return Err(ValueError::Range {
                text: text.to_owned(),
            });
        }
        Ok(size)
    }

    fn show(&self, value: &ByteSize) -> Option<String> {
        Some(quoted(&value.to_string()))
    }
}

/// A whole number between two bounds, both allowed.
pub(super) struct Count {
    pub(super) min: u32,
    pub(super) max: u32,
}

impl Kind for Count {
    type Value = u32;

    fn rule(&self) -> String {
        format!("a whole number from {} to {}", self.min, self.max)
    }

    fn read(&self, value: &DeValue<'_>) -> Result<u32, ValueError> {
        let integer = value.as_integer().ok_or_else(|| ValueError::Type {
            expected: "whole number",
            found: value.type_str(),
        })?;
        u32::from_str_radix(integer.as_str(), integer.radix())
            .ok()
            .filter(|count| (self.min..=self.max).contains(count))
            .ok_or_else(|| ValueError::Range {
                text: integer.to_string(),
            })
    }

    fn show(&self, value: &u32) -> Option<String> {
        Some(value.to_string())
    }
}

/// Yes or no.
pub(super) struct Flag;

impl Kind for Flag {
    type Value = bool;

    fn rule(&self) -> String {
        "true or false".to_owned()
    }

    fn read(&self, value: &DeValue<'_>) -> Result<bool, ValueError> {
        value.as_bool().ok_or_else(|| ValueError::Type {
            expected: "boolean",
            found: value.type_str(),
        })
    }

    fn show(&self, value: &bool) -> Option<String> {
        Some(value.to_string())
    }
}

/// A closed set of words.
pub(super) trait Choice: Copy + PartialEq + Debug + 'static {
    /// Every value with its word.
    const ALL: &'static [(&'static str, Self)];

    /// The word of this value.
    fn word(self) -> &'static str {
        Self::ALL
            .iter()
            .find(|(_, value)| *value == self)
            .map_or("", |(word, _)| word)
    }
}

/// One word of a [`Choice`].
pub(super) struct OneOf<T>(pub(super) PhantomData<T>);

impl<T: Choice> Kind for OneOf<T> {
    type Value = T;

    fn rule(&self) -> String {
        let words: Vec<String> = T::ALL.iter().map(|(word, _)| quoted(word)).collect();
        format!("one of {}", words.join(", "))
    }

    fn read(&self, value: &DeValue<'_>) -> Result<T, ValueError> {
        let text = string(value)?;
        T::ALL
            .iter()
            .find(|(word, _)| *word == text)
            .map(|(_, value)| *value)
            .ok_or_else(|| ValueError::Choice {
                text: text.to_owned(),
            })
    }

    fn show(&self, value: &T) -> Option<String> {
        Some(quoted(value.word()))
    }
}

/// An absolute path. `..` is refused, because what it means depends on links that may change later; control characters,
/// because paths are shown in logs and messages.
pub(super) struct AbsolutePath;

fn absolute(text: &str) -> Result<PathBuf, ValueError> {
    let path = Path::new(text);
    let plain = path.components().all(|part| {
        matches!(
            part,
            Component::RootDir | Component::Normal(_) | Component::CurDir
        )
    });
    if !path.is_absolute() || !plain || text.contains(char::is_control) {
        return Err(ValueError::Path {
            text: text.to_owned(),
        });
    }
    Ok(path.to_path_buf())
}

impl Kind for AbsolutePath {
    type Value = PathBuf;

    fn rule(&self) -> String {
        "an absolute path without \"..\"".to_owned()
    }

    fn read(&self, value: &DeValue<'_>) -> Result<PathBuf, ValueError> {
        absolute(string(value)?)
    }

    fn show(&self, value: &PathBuf) -> Option<String> {
        Some(quoted(&value.to_string_lossy()))
    }
}

/// A list of absolute paths.
pub(super) struct AbsolutePaths;

impl Kind for AbsolutePaths {
    type Value = Vec<PathBuf>;

    fn rule(&self) -> String {
        "a list of absolute paths without \"..\"".to_owned()
    }

    fn read(&self, value: &DeValue<'_>) -> Result<Vec<PathBuf>, ValueError> {
        let array = value.as_array().ok_or_else(|| ValueError::Type {
            expected: "list",
            found: value.type_str(),
        })?;
        array
            .iter()
            .map(|item| AbsolutePath.read(item.get_ref()))
            .collect()
    }

    fn show(&self, value: &Vec<PathBuf>) -> Option<String> {
        let items: Vec<String> = value
            .iter()
            .filter_map(|path| AbsolutePath.show(path))
            .collect();
        Some(format!("[{}]", items.join(", ")))
    }
}

/// A value that may be left out.
pub(super) struct Maybe<K>(pub(super) K);

impl<K: Kind> Kind for Maybe<K> {
    type Value = Option<K::Value>;

    fn rule(&self) -> String {
        self.0.rule()
    }

    fn read(&self, value: &DeValue<'_>) -> Result<Option<K::Value>, ValueError> {
        self.0.read(value).map(Some)
    }

    fn show(&self, value: &Option<K::Value>) -> Option<String> {
        value.as_ref().and_then(|value| self.0.show(value))
    }
}

/// A name: some text on one line.
pub(super) struct Name;

/// The longest name in bytes; what the kernel allows for a file name, which every kind of name here stays under.
const NAME_LIMIT: usize = 255;

impl Kind for Name {
    type Value = String;

    fn rule(&self) -> String {
        format!("a name of 1 to {NAME_LIMIT} bytes without control characters")
    }

    fn read(&self, value: &DeValue<'_>) -> Result<String, ValueError> {
        let text = string(value)?;
        if text.is_empty() || text.len() > NAME_LIMIT || text.contains(char::is_control) {
            return Err(ValueError::Form {
                text: text.to_owned(),
            });
        }
        Ok(text.to_owned())
    }

    fn show(&self, value: &String) -> Option<String> {
        Some(quoted(value))
    }
}

/// The path of the socket that the agent listens on, written `unix:/path`.
pub(super) struct Listen;

/// `sun_path` has 108 bytes with the closing NUL (unix(7)); the socket is first bound under a name that is five longer
/// (`daemon::socket`).
const SOCKET_PATH_LIMIT: usize = 108 - 1 - 5;

impl Kind for Listen {
    type Value = PathBuf;

    fn rule(&self) -> String {
        format!("\"unix:\" and an absolute path of at most {SOCKET_PATH_LIMIT} bytes")
    }

    fn read(&self, value: &DeValue<'_>) -> Result<PathBuf, ValueError> {
        let text = string(value)?;
        let Some(path) = text.strip_prefix("unix:") else {
            // What is neither a path nor another scheme looks like host:port.
            return Err(if text.contains(':') && !text.starts_with('/') {
                ValueError::Tcp {
                    text: text.to_owned(),
                }
            } else {
                ValueError::Form {
                    text: text.to_owned(),
                }
            });
        };
        // "unix:///run/x" is what URIs look like, and the same path.
        let path = path.strip_prefix("//").unwrap_or(path);
        let path = absolute(path)?;
        let length = path.as_os_str().len();
        if length > SOCKET_PATH_LIMIT {
            return Err(ValueError::SocketPath {
                length,
                limit: SOCKET_PATH_LIMIT,
            });
        }
        if path.file_name().is_none() {
            return Err(ValueError::Form {
                text: text.to_owned(),
            });
        }
        Ok(path)
    }

    fn show(&self, value: &PathBuf) -> Option<String> {
        Some(quoted(&format!("unix:{}", value.to_string_lossy())))
    }
}

/// The mode of the socket. Who can write to it commands every guest on the host, so others never can.
pub(super) struct SocketMode;

impl Kind for SocketMode {
    type Value = u32;

    fn rule(&self) -> String {
        "\"0600\" (owner only) or \"0660\" (owner and group)".to_owned()
    }

    fn read(&self, value: &DeValue<'_>) -> Result<u32, ValueError> {
        match string(value)? {
            "0600" => Ok(0o600),
            "0660" => Ok(0o660),
            text => Err(ValueError::Choice {
                text: text.to_owned(),
            }),
        }
    }

    fn show(&self, value: &u32) -> Option<String> {
        Some(quoted(&format!("{value:04o}")))
    }
}

/// A libvirt connection URI that stays on this host: the agent hands libvirt paths of this host's files.
pub(super) struct LibvirtUri;

impl Kind for LibvirtUri {
    type Value = String;

    fn rule(&self) -> String {
        "a libvirt URI of this host: \"qemu:///…\", \"qemu+unix:///…\" or \"test:///…\"".to_owned()
    }

    fn read(&self, value: &DeValue<'_>) -> Result<String, ValueError> {
        let text = string(value)?;
        let local = ["qemu:///", "qemu+unix:///", "test:///"]
            .iter()
            .any(|prefix| {
                text.strip_prefix(prefix)
                    .is_some_and(|rest| !rest.is_empty())
            });
        if !local || text.contains(|c: char| c.is_control() || c.is_whitespace()) {
            return Err(ValueError::Form {
                text: text.to_owned(),
            });
        }
        Ok(text.to_owned())
    }

    fn show(&self, value: &String) -> Option<String> {
        Some(quoted(value))
    }
}
