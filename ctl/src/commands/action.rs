// SPDX-License-Identifier: Apache-2.0
//! What all actions have in common: a request id, an operation that is accepted, the wait for its end.

use std::future::Future;

use salvor_proto::{google::longrunning::Operation, v1};

use super::Session;
use crate::{
    cli::How,
    errors::Failure,
    output::{show, table::Fields, warn},
    wait::until_done,
};

/// What the agent answered when it accepted an action.
#[derive(Clone)]
pub(super) enum Reply {
    /// An operation, and what is worth knowing.
    Action(Operation, Vec<v1::Warning>),
    /// A new server.
    Create(v1::CreateServerResponse),
    /// A rescue.
    Rescue(v1::RescueServerResponse),
    /// A changed password.
    SetPassword(v1::ChangeServerPasswordResponse),
}

/// The way by which a changed password is delivered.
const AGENT: &[i32] = &[v1::AdminPassDelivery::GuestAgent as i32];

impl Reply {
    fn operation(&mut self) -> Option<&mut Operation> {
        match self {
            Self::Action(operation, _) => Some(operation),
            Self::Create(response) => response.operation.as_mut(),
            Self::Rescue(response) => response.operation.as_mut(),
            Self::SetPassword(response) => response.operation.as_mut(),
        }
    }

    fn warnings(&self) -> &[v1::Warning] {
        match self {
            Self::Action(_, warnings) => warnings,
            Self::Create(response) => &response.warnings,
            Self::Rescue(response) => &response.warnings,
            Self::SetPassword(_) => &[],
        }
    }

    /// The password and the ways by which it will be delivered, for actions that have one.
    fn password(&self) -> Option<(&str, &[i32])> {
        match self {
            Self::Action(..) => None,
            Self::Create(response) => Some((&response.admin_pass, &response.admin_pass_delivery)),
            Self::Rescue(response) => Some((&response.admin_pass, &response.admin_pass_delivery)),
            Self::SetPassword(response) => Some((&response.admin_pass, AGENT)),
        }
    }

    /// Writes what belongs to the operation as it is now, as JSON or as `text`.
    fn write(
        &self,
        session: &Session,
        text: impl FnOnce(&Operation) -> String,
    ) -> Result<(), Failure> {
        match self {
            Self::Action(operation, _) => session.ui.result(operation, text),
            Self::Create(response) => session.ui.result(response, |response| {
                text(&response.operation.clone().unwrap_or_default())
            }),
            Self::Rescue(response) => session.ui.result(response, |response| {
                text(&response.operation.clone().unwrap_or_default())
            }),
            Self::SetPassword(response) => session.ui.result(response, |response| {
                text(&response.operation.clone().unwrap_or_default())
            }),
        }
    }
}

/// Waits for an answer unless somebody presses Ctrl-C: then the request may have been accepted
/// already, and its id is the way to find out.
pub(super) async fn unless_interrupted<T>(
    request_id: &str,
    call: impl Future<Output = Result<T, Failure>>,
) -> Result<T, Failure> {
    tokio::select! {
        answer = call => answer.map_err(|failure| failure.unanswered(request_id)),
        _ = tokio::signal::ctrl_c() => {
            Err(Failure::InterruptedEarly { request_id: request_id.to_owned() })
        }
    }
}

/// Where a password comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Password {
    /// The caller knows it, or the action has none.
    Known,
    /// The agent made it.
    Generated,
}

/// Tells that an action was accepted, waits for its end if that is wanted, and writes the result.
pub(super) async fn finish(
    session: &Session,
    how: &How,
    mut reply: Reply,
    password: Password,
) -> Result<(), Failure> {
    let ui = &session.ui;
    for warning in reply.warnings() {
        ui.note(&format!("warning: {} ({})", warning.message, warning.name));
    }
    if password == Password::Generated
        && let Some((password, ways)) = reply.password()
    {
        if password.is_empty() {
            warn(
                "salvor: the password is not in this answer: the agent gives it in the first answer to \
                 a request only, and keeps but its hash, so nobody can tell it any more",
            );
            warn(match reply {
                Reply::Rescue(_) => {
                    "  hint: To set another, unrescue the server and rescue it again; a key of the \
                     rescue image is a way in as well."
                }
                Reply::SetPassword(_) => "  hint: To have one that is known, set it again.",
                Reply::Action(..) | Reply::Create(_) => {
                    "  hint: To set another, log in with a key, or rescue the server and do it from there."
                }
            });
        } else if !ui.is_json() {
            // At once: whatever happens while the operation is waited for, it is not lost.
            let mut fields = Fields::new();
            fields
                .add("admin password", password)
                .add("delivered by", show::deliveries(ways));
            ui.text(&fields.render())?;
            ui.note("This password is not shown again: the agent keeps only its hash.");
        }
    }
    let operation = reply
        .operation()
        .ok_or(Failure::Protocol("answered without an operation"))?;
    if how.no_wait {
        return reply.write(session, |operation| {
            let mut fields = Fields::new();
            let server = show::metadata(operation).server_id;
            fields
                .add("operation", &operation.name)
                .add("server", server);
            fields.render()
        });
    }
    let waited = until_done(
        &session.agent,
        ui,
        operation.clone(),
        how.patience.wait_timeout,
    )
    .await;
    *operation = waited.operation;
    match waited.end {
        Ok(()) => reply.write(session, show::outcome),
        Err(failure) => {
            // The message holds what the caller needs to go on from here, the password above all.
            if ui.is_json() {
                reply.write(session, |_| String::new())?;
            }
            Err(failure)
        }
    }
}
