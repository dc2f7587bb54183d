// SPDX-License-Identifier: Apache-2.0
//! libvirt's errors in the words of the seam.

use virt::enumutil::Enum;
use virt::error::{Error, ErrorNumber};

use super::call::Call;
use super::schema::SchemaError;
use crate::hypervisor::HypervisorError;

/// Why a piece of work on a connection failed.
#[derive(Debug)]
pub(super) enum Failure {
    /// libvirt says so. Whether it means the connection is seen when it is looked at.
    Libvirt(Error),
    /// It is said already.
    Said(HypervisorError),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Libvirt(error)
    }
}

impl From<HypervisorError> for Failure {
    fn from(error: HypervisorError) -> Self {
        Self::Said(error)
    }
}

/// Does libvirt say this?
pub(super) fn is(error: &Error, number: ErrorNumber) -> bool {
    error.code() == Enum::Known(number)
}

/// Did QEMU end while it was started, without a word of its own? Where it had one, libvirt puts it behind
/// this, after a colon. Newer ones name the domain in parentheses.
pub(super) fn is_silent_end(error: &Error) -> bool {
    let message = error.message().trim_end();
    let said = message
        .split_once(" (vm=")
        .map_or(message, |(said, _)| said);
    is(error, ErrorNumber::InternalError)
        && [
            "process exited while connecting to monitor",
            "unexpectedly closed the monitor",
        ]
        .iter()
        .any(|words| said.ends_with(words))
}

/// What libvirt said of a call on a connection that is alive.
pub(super) fn refusal(call: &Call, error: &Error) -> HypervisorError {
    let message = error.message().trim().to_owned();
    match (error.code(), call.domain) {
        (Enum::Known(ErrorNumber::NoDomain), Some(domain)) => HypervisorError::NoDomain {
            domain: domain.to_string(),
        },
        (
            Enum::Known(
                ErrorNumber::AgentUnresponsive
                | ErrorNumber::AgentUnsynced
                | ErrorNumber::AgentCommandTimeout,
            ),
            _,
        ) => HypervisorError::NoGuestAgent { reason: message },
        _ => HypervisorError::Refused {
            call: call.name,
            message,
        },
    }
}

/// What libvirt said of a command to the guest agent. "No channel for an agent" has no number of
/// its own; it comes as an unsupported argument or configuration. An error that the agent answers
/// comes as an internal error.
pub(super) fn agent_failure(error: Error) -> Failure {
    match error.code() {
        Enum::Known(ErrorNumber::ArgumentUnsupported | ErrorNumber::ConfigUnsupported) => {
            Failure::Said(HypervisorError::NoGuestAgent {
                reason: error.message().trim().to_owned(),
            })
        }
        Enum::Known(ErrorNumber::InternalError) => {
            Failure::Said(HypervisorError::GuestAgentRefused {
                reason: error.message().trim().to_owned(),
            })
        }
        _ => Failure::Libvirt(error),
    }
}

/// The answer of a schema check as that of a call.
pub(super) fn schema_failure(call: &'static str, error: &SchemaError) -> Failure {
    let mut message = error.to_string();
    if let SchemaError::TestHost(cause) = error {
        message = format!("{message}: {cause}");
    }
    Failure::Said(HypervisorError::Refused { call, message })
}
