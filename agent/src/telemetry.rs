// SPDX-License-Identifier: Apache-2.0
//! The log: format, level and where it goes (standard error).
//!
//! Owns that one event is one line, whatever its fields hold. Knows no event. That secrets stay out is not its work: their
//! types cannot be formatted.

use std::fmt::{self, Write as _};
use std::io::{self, IsTerminal as _};

use thiserror::Error;
use tracing::Subscriber;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::field::MakeExt as _;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::fmt::format::debug_fn;
use tracing_subscriber::util::{SubscriberInitExt as _, TryInitError};

use crate::config::{LogConfig, LogFormat};

/// The environment variable that overrides `log.level`.
pub const FILTER_VARIABLE: &str = "SALVOR_LOG";

/// Why there is no log.
#[derive(Debug, Error)]
pub enum TelemetryError {
    /// The variable holds no filter.
    #[error(
        "SALVOR_LOG={filter:?} is not a filter; write a level or pairs such as \"salvor=debug,h2=info\""
    )]
    Filter {
        /// What it holds.
        filter: String,
        /// What is wrong with it.
        source: tracing_subscriber::filter::ParseError,
    },
    /// A log was set up before.
    #[error("the log is set up already")]
    Twice(#[from] TryInitError),
}

/// Sets the process's log up, panics included. `overriding` is the value of [`FILTER_VARIABLE`].
///
/// # Errors
/// `overriding` is no filter, or there is a log already.
pub fn init(config: &LogConfig, overriding: Option<&str>) -> Result<(), TelemetryError> {
    let terminal = io::stderr().is_terminal();
    let human = match config.format {
        LogFormat::Auto => terminal,
        LogFormat::Human => true,
        LogFormat::Json => false,
    };
    let filter = filter(config, overriding)?;
    if human {
        human_subscriber(filter, terminal, io::stderr).try_init()?;
    } else {
        json_subscriber(filter, io::stderr).try_init()?;
    }
    std::panic::set_hook(Box::new(|panic| {
        let at = panic.location().map(ToString::to_string);
        tracing::error!(at, "a bug: {}", panic.payload_as_str().unwrap_or("panic"));
    }));
    Ok(())
}

/// The level holds for Salvor's own crates (`salvor…`); libraries are heard from warnings up.
fn filter(config: &LogConfig, overriding: Option<&str>) -> Result<EnvFilter, TelemetryError> {
    let level = config.level.as_str();
    let libraries = if level == "error" { "error" } else { "warn" };
    let filter = match overriding.filter(|text| !text.trim().is_empty()) {
        // A bare level means the same as in the configuration.
        Some(level) if level.parse::<tracing::Level>().is_ok() => format!("warn,salvor={level}"),
        Some(filter) => filter.to_owned(),
        None => format!("{libraries},salvor={level}"),
    };
    EnvFilter::try_new(&filter).map_err(|source| TelemetryError::Filter { filter, source })
}

/// A line of text per event. The library's own format writes messages and `%` fields as they are, so that a line end in
/// one forges a second event; here every control character comes out escaped.
fn human_subscriber<W>(filter: EnvFilter, colours: bool, writer: W) -> impl Subscriber + Send + Sync
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    let fields = debug_fn(|writer, field, value| {
        if field.name() == "message" {
            write!(OneLine(writer), "{value:?}")
        } else {
            write!(writer, "{field}=")?;
            write!(OneLine(writer), "{value:?}")
        }
    });
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(colours)
        // Escaping is done above, in one place.
        .with_ansi_sanitization(false)
        .fmt_fields(fields.delimited(" "))
        .with_writer(writer)
        .finish()
}

/// A JSON object per event. JSON itself allows no control character in a string.
fn json_subscriber<W>(filter: EnvFilter, writer: W) -> impl Subscriber + Send + Sync
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    tracing_subscriber::fmt()
        .json()
        .with_env_filter(filter)
        .flatten_event(true)
        .with_current_span(false)
        .with_writer(writer)
        .finish()
}

/// Writes text with everything escaped that could end the line or command a terminal.
struct OneLine<'a>(&'a mut dyn fmt::Write);

impl fmt::Write for OneLine<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        text.chars().try_for_each(|c| self.write_char(c))
    }

    fn write_char(&mut self, c: char) -> fmt::Result {
        if breaks_lines(c) {
            write!(self.0, "{}", c.escape_debug())
        } else {
            self.0.write_char(c)
        }
    }
}

/// Control characters (C0, DEL, C1), the Unicode line and paragraph separators, and what reverses the reading direction
/// of the rest of a line.
fn breaks_lines(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{2028}' | '\u{2029}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing)]

    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::config::LogLevel;
    use crate::core::errors::chain;

    #[derive(Clone, Default)]
    struct Buffer(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Buffer {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Buffer {
        fn text(&self) -> String {
            String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
        }
    }

    fn logged<S: Subscriber + Send + Sync + 'static>(
        subscriber: impl FnOnce(EnvFilter, Buffer) -> S,
        filter: &str,
        events: impl FnOnce(),
    ) -> String {
        let buffer = Buffer::default();
        let subscriber = subscriber(EnvFilter::new(filter), buffer.clone());
        tracing::subscriber::with_default(subscriber, events);
        buffer.text()
    }

    fn human(filter: EnvFilter, buffer: Buffer) -> impl Subscriber + Send + Sync {
        human_subscriber(filter, false, move || buffer.clone())
    }

    fn json(filter: EnvFilter, buffer: Buffer) -> impl Subscriber + Send + Sync {
        json_subscriber(filter, move || buffer.clone())
    }

    /// What a guest or a client might put into a name.
    const HOSTILE: &str = "a\nFORGED\r\u{1b}[31m\u{7f}\u{9b}31m\u{2028}\u{202e}\0z";

    fn log_hostile_values() {
        let span = tracing::info_span!("operation", shown = %HOSTILE, debugged = ?HOSTILE);
        let _inside = span.enter();
        tracing::info!(shown = %HOSTILE, plain = HOSTILE, pretty = ?Some(HOSTILE), "{HOSTILE}");
    }

    #[test]
    fn hostile_values_stay_on_their_line_in_the_human_format() {
        let text = logged(human, "info", log_hostile_values);
        assert_eq!(text.matches('\n').count(), 1, "{text:?}");
        let line = text.strip_suffix('\n').unwrap();
        assert!(!line.contains(breaks_lines), "{line:?}");
        assert!(
            line.contains(r"a\nFORGED\r\u{1b}[31m\u{7f}\u{9b}31m\u{2028}\u{202e}\0z"),
            "{line}"
        );
    }

    #[test]
    fn hostile_values_stay_on_their_line_in_json() {
        let text = logged(json, "info", log_hostile_values);
        assert_eq!(text.lines().count(), 1, "{text:?}");
        let event: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(event["message"], HOSTILE);
        assert_eq!(event["shown"], HOSTILE);
        assert_eq!(event["spans"][0]["name"], "operation");
        assert!(!text.trim_end().contains(|c: char| c < ' '), "{text:?}");
    }

    #[test]
    fn what_is_harmless_is_not_changed() {
        let text = logged(
            human,
            "info",
            || tracing::info!(name = %"Zoë's \"web\"", count = 3, "grüße"),
        );
        assert!(text.contains("grüße name=Zoë's \"web\" count=3"), "{text}");
    }

    #[test]
    fn the_level_is_for_our_own_events_and_libraries_warn() {
        let log = LogConfig {
            level: LogLevel::Debug,
            ..LogConfig::default()
        };
        let filter = filter(&log, None).unwrap().to_string();
        let text = logged(human, &filter, || {
            tracing::debug!("ours");
            tracing::debug!(target: "h2::codec", "chatter");
            tracing::warn!(target: "h2::codec", "trouble");
        });
        assert!(text.contains("ours") && text.contains("trouble") && !text.contains("chatter"));
    }

    #[test]
    fn the_variable_overrides_the_level_and_is_checked() {
        let log = LogConfig::default();
        assert!(
            filter(&log, Some("debug"))
                .unwrap()
                .to_string()
                .contains("salvor=debug")
        );
        assert!(
            filter(&log, Some("h2=trace"))
                .unwrap()
                .to_string()
                .contains("h2=trace")
        );
        assert!(
            filter(&log, Some(" "))
                .unwrap()
                .to_string()
                .contains("salvor=info")
        );
        let error = filter(&log, Some("salvor=loud")).unwrap_err();
        assert!(
            chain(&error).contains("SALVOR_LOG=\"salvor=loud\""),
            "{}",
            chain(&error)
        );
    }

    #[test]
    fn a_chain_has_every_cause_once() {
        let source = io::Error::other("disk gone");
        let error = crate::config::ConfigError::Read {
            path: "/x".into(),
            source,
        };
        assert_eq!(
            chain(&error),
            "cannot read the configuration \"/x\": disk gone"
        );
    }
}
