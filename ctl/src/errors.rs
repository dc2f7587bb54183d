// SPDX-License-Identifier: Apache-2.0
//! What can go wrong, how it is told, and with which exit code the program ends.

use std::{io, time::Duration};

use salvor_proto::google::rpc;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, RpcStatusExt as _, StatusExt as _};

use crate::{
    connect::{ConnectError, is_broken, is_late, is_unfinished},
    output::{json::JsonError, text::clean},
    units::show_duration,
};

/// Exit code: done.
pub(crate) const DONE: u8 = 0;
/// Exit code: failed.
pub(crate) const FAILED: u8 = 1;
/// Exit code: wrong usage.
pub(crate) const USAGE: u8 = 2;
/// Exit code: the state does not allow it.
pub(crate) const REFUSED: u8 = 3;
/// Exit code: no agent.
pub(crate) const UNREACHABLE: u8 = 4;
/// Exit code: interrupted while waiting, as shells have it (128 + SIGINT).
pub(crate) const INTERRUPTED: u8 = 130;

/// The exit codes as `--help` and the manual page give them.
pub(crate) const EXIT_CODES: &str = "\
Exit codes:
  0    done
  1    failed: the operation ended in an error or was cancelled, it was not accepted or did not end
       while it was waited for, or anything not named below
  2    wrong usage, or the agent found an argument invalid
  3    refused: the state of the server or host does not allow it, or another operation is under way
  4    the agent cannot be reached
  130  interrupted while waiting; the operation goes on";

/// Why a command did not end as asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// No connection.
    #[error(transparent)]
    Unreachable(#[from] ConnectError),
    /// The agent refused, or the call broke off.
    #[error("the call failed")]
    Call(#[from] Box<Status>),
    /// The operation ended in an error.
    #[error("the operation failed")]
    Operation {
        /// Name of the operation.
        name: String,
        /// Its error.
        error: rpc::Status,
    },
    /// It still ran when the time to wait was over.
    #[error("still under way after {}", show_duration(*.after))]
    StillRunning {
        /// Name of the operation.
        name: String,
        /// The time that was waited.
        after: Duration,
    },
    /// An import took too long.
    #[error("the import was given up after {}; --wait-timeout gives it more time", show_duration(*.after))]
    ImportTooSlow {
        /// The time that it had.
        after: Duration,
    },
    /// It had ended as asked when it was to be cancelled.
    #[error("{name} ended as asked before it could be cancelled")]
    TooLate {
        /// Name of the operation.
        name: String,
    },
    /// Interrupted while an operation was waited for.
    #[error("interrupted")]
    Interrupted {
        /// Name of the operation.
        name: String,
    },
    /// Interrupted before the agent had answered.
    #[error("interrupted before the agent answered")]
    InterruptedEarly {
        /// The request's id.
        request_id: String,
    },
    /// The answer to a request with an id did not come.
    #[error("no answer")]
    Unanswered {
        /// The request's id.
        request_id: String,
        /// What came of the last try.
        status: Box<Status>,
    },
    /// A plan that would be refused.
    #[error("the action would be refused")]
    PlanRefused,
    /// The arguments do not go together, or a file that they name cannot be used.
    #[error("{0}")]
    Usage(String),
    /// A local file cannot be read or written.
    #[error("{what}: {cause}")]
    File {
        /// The file and what was tried.
        what: String,
        /// Why not.
        #[source]
        cause: io::Error,
    },
    /// A console ended by itself.
    #[error("the console ended: {0}")]
    Ended(String),
    /// The agent did not keep to the API.
    #[error("the agent {0}; is it of another version?")]
    Protocol(&'static str),
    /// Standard output is gone.
    #[error("cannot write: {0}")]
    Output(#[source] io::Error),
    /// Not representable as JSON.
    #[error("cannot write JSON")]
    Json(#[from] JsonError),
}

impl From<Status> for Failure {
    fn from(status: Status) -> Self {
        Self::Call(Box::new(status))
    }
}

/// Is libvirt away, and not the agent?
pub(crate) fn is_libvirt(status: &Status) -> bool {
    status
        .get_error_details()
        .error_info()
        .is_some_and(|info| info.reason == "LIBVIRT_UNAVAILABLE")
}

impl Failure {
    /// The same of a call with a request id: if it was not answered, the id is the way to find out
    /// what became of it.
    pub(crate) fn unanswered(self, request_id: &str) -> Self {
        match self {
            Self::Call(status) if is_broken(&status) || is_unfinished(&status) => {
                Self::Unanswered {
                    request_id: request_id.to_owned(),
                    status,
                }
            }
            other => other,
        }
    }

    /// The exit code that says so.
    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            Self::Unreachable(_) => UNREACHABLE,
            Self::Call(status) | Self::Unanswered { status, .. } if is_broken(status) => {
                UNREACHABLE
            }
            Self::Call(status) => match status.code() {
                Code::InvalidArgument => USAGE,
                Code::FailedPrecondition | Code::Aborted | Code::PermissionDenied => REFUSED,
                Code::Unavailable if !is_libvirt(status) => UNREACHABLE,
                _ => FAILED,
            },
            Self::Usage(_) => USAGE,
            Self::PlanRefused => REFUSED,
            Self::Interrupted { .. } | Self::InterruptedEarly { .. } => INTERRUPTED,
            // Whoever reads has read enough.
            Self::Output(cause) if cause.kind() == io::ErrorKind::BrokenPipe => DONE,
            Self::Unanswered { .. }
            | Self::Operation { .. }
            | Self::StillRunning { .. }
            | Self::TooLate { .. }
            | Self::ImportTooSlow { .. }
            | Self::File { .. }
            | Self::Ended(_)
            | Self::Protocol(_)
            | Self::Output(_)
            | Self::Json(_) => FAILED,
        }
    }

    /// The lines that tell it: what happened, then what is known about it, then what to do. Clean.
    pub(crate) fn lines(&self) -> Vec<String> {
        let mut lines = match self {
            Self::Output(cause) if cause.kind() == io::ErrorKind::BrokenPipe => return Vec::new(),
            Self::Unreachable(error) => vec![error.to_string(), hint(&error.hint())],
            Self::Call(status) if is_broken(status) => vec![broken(status), hint(RUNNING)],
            Self::Call(status) => {
                explain(status.code(), status.message(), &status.get_error_details())
            }
            Self::Operation { name, error } => {
                let details = tonic_types::Status {
                    code: error.code,
                    message: String::new(),
                    details: error.details.clone(),
                }
                .get_error_details();
                let mut lines = explain(Code::from(error.code), &error.message, &details);
                lines.push(hint(&format!(
                    "`salvor operation show {name}` shows every step."
                )));
                lines
            }
            Self::StillRunning { name, .. } => {
                vec![format!("{name} is {self}; it goes on"), hint(&go_on(name))]
            }
            Self::Interrupted { name } => {
                vec![format!("interrupted; {name} goes on"), hint(&go_on(name))]
            }
            Self::InterruptedEarly { request_id } => vec![
                "interrupted before the agent had answered; it may have accepted the request"
                    .to_owned(),
                find_out(request_id),
            ],
            Self::Unanswered { request_id, status } => {
                let mut lines = if is_broken(status) {
                    vec![
                        format!("{}; it may have accepted the request", broken(status)),
                        hint(RUNNING),
                    ]
                } else {
                    explain(status.code(), status.message(), &status.get_error_details())
                };
                lines.push(find_out(request_id));
                lines
            }
            Self::Json(error) => {
                let mut lines = vec![self.to_string()];
                let mut next: Option<&dyn std::error::Error> = Some(error);
                while let Some(cause) = next {
                    lines.push(format!("  because {cause}"));
                    next = cause.source();
                }
                lines
            }
            Self::Usage(_)
            | Self::PlanRefused
            | Self::TooLate { .. }
            | Self::ImportTooSlow { .. }
            | Self::File { .. }
            | Self::Ended(_)
            | Self::Protocol(_)
            | Self::Output(_) => vec![self.to_string()],
        };
        for line in &mut lines {
            *line = clean(line).into_owned();
        }
        if let Some(first) = lines.first_mut() {
            first.insert_str(0, "salvor: ");
        }
        lines
    }
}

fn hint(text: &str) -> String {
    format!("  hint: {text}")
}

/// What to check if nothing answers.
const RUNNING: &str = "Is salvord running? See: systemctl status salvord, journalctl -u salvord";

/// How to find out what became of a request.
fn find_out(request_id: &str) -> String {
    hint(&format!(
        "The same command with --request-id {request_id} finds out, and does nothing twice."
    ))
}

fn go_on(name: &str) -> String {
    format!(
        "`salvor operation wait {name}` waits for it, `salvor operation cancel {name}` cancels it."
    )
}

/// A call without an answer, in words.
pub(crate) fn broken(status: &Status) -> String {
    if is_unfinished(status) {
        format!("the agent has no answer yet: {}", status.message())
    } else if is_late(status) {
        "the agent did not answer in time".to_owned()
    } else {
        "the connection to the agent broke".to_owned()
    }
}

/// What a code means, for a status without a message.
fn meaning(code: Code) -> &'static str {
    code.description()
}

/// The lines of an error of the agent.
fn explain(code: Code, message: &str, details: &ErrorDetails) -> Vec<String> {
    let mut lines = vec![if message.is_empty() {
        meaning(code).to_owned()
    } else {
        message.to_owned()
    }];
    for violation in details
        .bad_request()
        .map_or(&[][..], |bad| &bad.field_violations)
    {
        // An agent often says here what its message says already.
        lines.push(if violation.description == message {
            format!("  field {}", violation.field)
        } else {
            format!("  field {}: {}", violation.field, violation.description)
        });
    }
    for violation in details
        .precondition_failure()
        .map_or(&[][..], |failure| &failure.violations)
    {
        // An agent often says here what its message says already.
        if violation.description != message {
            lines.push(format!(
                "  {} of {}: {}",
                violation.r#type, violation.subject, violation.description
            ));
        }
    }
    for violation in details
        .quota_failure()
        .map_or(&[][..], |failure| &failure.violations)
    {
        lines.push(format!(
            "  limit of {}: {}",
            violation.subject, violation.description
        ));
    }
    let Some(info) = details.error_info() else {
        return lines;
    };
    let mut about: Vec<_> = info
        .metadata
        .iter()
        .map(|(key, value)| format!("{key}={value}"))
        .collect();
    about.sort();
    lines.push(if about.is_empty() {
        format!("  reason: {}", info.reason)
    } else {
        format!("  reason: {} ({})", info.reason, about.join(", "))
    });
    lines.extend(hint_for(code, info).map(|text| hint(&text)));
    for link in details.help().map_or(&[][..], |help| &help.links) {
        lines.push(format!("  see: {} {}", link.description, link.url));
    }
    if let Some(delay) = details.retry_info().and_then(|retry| retry.retry_delay) {
        lines.push(hint(&format!("Try again in {}.", show_duration(delay))));
    }
    lines
}

/// What to do about the reasons that a command of this program can help with.
fn hint_for(code: Code, info: &tonic_types::ErrorInfo) -> Option<String> {
    if code == Code::Aborted
        && let Some(name) = info.metadata.get("operation")
    {
        return Some(go_on(name));
    }
    let text = match info.reason.as_str() {
        "SERVER_NOT_FOUND" => {
            "`salvor server list` shows the servers, `salvor host unmanaged` what can be adopted."
        }
        "IMAGE_NOT_FOUND" => "`salvor image list` shows the images.",
        "OPERATION_NOT_FOUND" => "`salvor operation list` shows the operations.",
        "LIBVIRT_UNAVAILABLE" => {
            "`salvor host show` says since when and why; what is recorded can still be read."
        }
        _ => return None,
    };
    Some(text.to_owned())
}
