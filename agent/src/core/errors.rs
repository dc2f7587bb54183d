// SPDX-License-Identifier: Apache-2.0
//! Errors as text.

/// An error with its causes, in one line: what a log, a fault or a refusal says.
#[must_use]
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
