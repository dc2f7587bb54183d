// SPDX-License-Identifier: Apache-2.0
//! Calls about a server: made until somebody hears them, followed to their end, and judged: what may be
//! refused or fail, and for what only while something is done to the host.

use std::time::{Duration, Instant};

use salvor_proto::google::longrunning::{
    CancelOperationRequest, Operation, WaitOperationRequest, operation,
};
use salvor_proto::v1::plan_action_request::Action;
use salvor_proto::v1::{AbandonOperationRequest, OperationState};
use tonic::{Code, Status};
use tonic_types::{RpcStatusExt as _, StatusExt as _};
use uuid::Uuid;

use super::life::Life;
use super::tally::Ending;
use super::verbs::{Caller, submit};
use crate::client::metadata_of;
use crate::wait::BOOT;

/// Every call is answered within this, by an agent that is there or by one that has come back.
const ANSWER: Duration = Duration::from_secs(60);

/// How long an abandoned operation gets to end in good order: longer than any restart takes.
const PATIENCE: i64 = 40;

impl Life {
    /// Asks for an action and follows it to its end.
    pub(super) async fn act(&self, asked: Asked, after: After) {
        let begun = Instant::now();
        let (verb, server) = (asked.verb, asked.server);
        let accepted = self.ask(asked, begun).await;
        let (ending, what) = match accepted {
            Err(refused) => (Ending::Refused(refused), String::new()),
            Ok(operation) => {
                let name = operation.name.clone();
                let disturbed = match after {
                    After::Wait => false,
                    After::Cancel(pause) => {
                        tokio::time::sleep(pause).await;
                        self.cancel(&name).await;
                        true
                    }
                    After::Abandon(pause) => {
                        tokio::time::sleep(pause).await;
                        self.abandon(&name).await;
                        true
                    }
                };
                let ending = self.end_of(verb, server, &name, begun, disturbed).await;
                (ending, format!("{verb} of {server}, {name}"))
            }
        };
        self.tally.ended(verb, &ending, begun.elapsed(), &what);
    }

    /// Asks until there is an answer, with the same request id: what was accepted before the agent died is
    /// not done twice.
    pub(super) async fn ask(&self, asked: Asked, begun: Instant) -> Result<Operation, String> {
        loop {
            let mut client = self.client.clone();
            let call = submit(&mut client, asked.action.clone(), asked.caller);
            let answer = tokio::time::timeout(ANSWER, Box::pin(call)).await;
            let Ok(answer) = answer else {
                self.tally
                    .defect(format!("{} of {}: no answer", asked.verb, asked.server));
                return Err("no answer".to_owned());
            };
            let status = match answer {
                Ok(operation) => return Ok(operation),
                Err(status) => status,
            };
            if let Some(reason) = reason_of(&status) {
                self.judge(&asked, &reason, status.message(), begun);
                return Err(reason);
            }
            if !self.is_away(&status, begun).await {
                self.tally
                    .defect(format!("{} of {}: {status:?}", asked.verb, asked.server));
                return Err("no answer".to_owned());
            }
        }
    }

    /// May the agent have refused or failed this for that reason?
    fn judge(&self, asked: &Asked, reason: &str, message: &str, begun: Instant) {
        if reason == "PERMISSION_DENIED" && asked.caller == Caller::Member {
            return;
        }
        self.judge_for(asked.verb, asked.server, reason, message, begun);
    }

    fn judge_for(&self, verb: &str, server: Uuid, reason: &str, message: &str, begun: Instant) {
        let excuse = self.tally.excuse(begun, server);
        let fine = match reason {
            // The table of admission, and what follows from the server's state.
            "INVALID_STATE"
            | "SERVER_BUSY"
            | "SERVER_LOCKED"
            | "ALREADY_RESCUED"
            | "NOT_RESCUED"
            | "OVERLAY_DECISION_NEEDED"
            | "NO_OVERLAYS"
            | "COMMIT_STARTED"
            | "SAVED_MEMORY"
            | "NO_SAVED_MEMORY"
            | "NOT_ADOPTED"
            | "NOT_CANCELLABLE"
            | "GUEST_AGENT_UNAVAILABLE"
            | "GUEST_NOT_RUNNING"
            | "NO_SCREEN"
            | "CONSOLE_BUSY"
            | "GUEST_STILL_ON" => true,
            "SERVER_NOT_FOUND" => self.going(),
            "LIBVIRT_UNAVAILABLE" => excuse.libvirtd || excuse.agent,
            "DRAINING" => excuse.agent,
            "LIBVIRT_REFUSED" => excuse.libvirtd || excuse.guest,
            // Somebody ended the guest just when taking back started it again; libvirtd is waited for.
            "ROLLBACK_FAILED" => excuse.guest,
            _ => false,
        };
        if !fine {
            self.tally.defect(format!(
                "{verb} of {server}: {reason} ({excuse:?}): {message}"
            ));
        }
    }

    /// Waits for the end of an operation; `may_stop`: somebody asked for it to be cancelled.
    async fn end_of(
        &self,
        verb: &str,
        server: Uuid,
        name: &str,
        begun: Instant,
        may_stop: bool,
    ) -> Ending {
        let stuck = Instant::now() + BOOT;
        loop {
            let request = WaitOperationRequest {
                name: name.to_owned(),
                timeout: Some(seconds(5)),
            };
            let mut operations = self.client.operations.clone();
            let answer = operations.wait_operation(request).await;
            let operation = match answer {
                Ok(answer) => answer.into_inner(),
                Err(status) if reason_of(&status).is_none_or(|reason| reason == "DRAINING") => {
                    if self.is_away(&status, Instant::now()).await && Instant::now() < stuck {
                        continue;
                    }
                    self.tally
                        .defect(format!("the end of {verb}, {name}: {status:?}"));
                    return Ending::Failed("no answer".to_owned());
                }
                Err(status) => {
                    self.tally
                        .defect(format!("the end of {verb}, {name}: {status:?}"));
                    return Ending::Failed("no answer".to_owned());
                }
            };
            if operation.done {
                return self.judge_end(verb, server, &operation, begun, may_stop);
            }
            if Instant::now() >= stuck {
                let how = brief(&operation);
                self.tally
                    .defect(format!("{verb} of {server} is stuck: {how}"));
                return Ending::Failed("stuck".to_owned());
            }
        }
    }

    fn judge_end(
        &self,
        verb: &str,
        server: Uuid,
        operation: &Operation,
        begun: Instant,
        may_stop: bool,
    ) -> Ending {
        let metadata = metadata_of(operation);
        let Some(operation::Result::Error(error)) = &operation.result else {
            return Ending::Done;
        };
        let status = tonic_types::pb::Status {
            code: error.code,
            message: error.message.clone(),
            details: error.details.clone(),
        };
        let reason = status
            .get_details_error_info()
            .map_or_else(|| "no reason".to_owned(), |info| info.reason);
        if metadata.state() == OperationState::Cancelled {
            // By us, or by another verb that overtook it.
            if !metadata.cancel_requested {
                self.tally.defect(format!(
                    "{verb} of {server} cancelled itself: {metadata:#?}"
                ));
            }
            return Ending::Cancelled;
        }
        let about = format!("{} [{}]", error.message, brief(operation));
        if !(may_stop && reason == "CANCELLED") {
            self.judge_for(verb, server, &reason, &about, begun);
        }
        Ending::Failed(reason)
    }

    async fn cancel(&self, name: &str) {
        let begun = Instant::now();
        let request = CancelOperationRequest {
            name: name.to_owned(),
        };
        loop {
            let mut operations = self.client.operations.clone();
            let answer = operations.cancel_operation(request.clone()).await;
            if self.answer_to("operation cancel", answer, begun).await {
                return;
            }
        }
    }

    async fn abandon(&self, name: &str) {
        let begun = Instant::now();
        let request = AbandonOperationRequest {
            name: name.to_owned(),
            patience: Some(seconds(PATIENCE)),
        };
        loop {
            let mut servers = self.client.servers.clone();
            let answer = servers.abandon_operation(request.clone()).await;
            if self.answer_to("operation abandon", answer, begun).await {
                return;
            }
        }
    }

    /// Counts an answer of the agent's; `false` if nobody has heard the call.
    pub(super) async fn answer_to<T>(
        &self,
        what: &'static str,
        answer: Result<T, Status>,
        begun: Instant,
    ) -> bool {
        let ending = match answer {
            Ok(_) => Ending::Done,
            Err(status) => {
                if !self.answered(what, &status, begun).await {
                    return false;
                }
                Ending::Refused(reason_of(&status).unwrap_or_default())
            }
        };
        self.tally.ended(what, &ending, begun.elapsed(), what);
        true
    }

    /// Was that an answer of the agent's, or has nobody heard the call?
    async fn answered(&self, what: &str, status: &Status, begun: Instant) -> bool {
        if let Some(reason) = reason_of(status) {
            self.judge_for(what, self.id, &reason, status.message(), begun);
            return true;
        }
        if self.is_away(status, begun).await {
            return false;
        }
        self.tally
            .defect(format!("{what} at {}: {status:?}", self.id));
        true
    }

    /// Did nobody hear the call, or die over it? Then it is worth asking again, until it takes too long.
    pub(super) async fn is_away(&self, status: &Status, begun: Instant) -> bool {
        let broken = matches!(
            status.code(),
            Code::Unavailable | Code::Unknown | Code::Cancelled | Code::Internal
        );
        if !broken || begun.elapsed() > ANSWER || !self.tally.excuse(begun, self.id).agent {
            return false;
        }
        // A socket that nobody listens at refuses at once.
        tokio::time::sleep(Duration::from_millis(20)).await;
        true
    }
}

/// What is asked for.
pub(super) struct Asked {
    pub(super) verb: &'static str,
    pub(super) server: Uuid,
    pub(super) action: Action,
    pub(super) caller: Caller,
}

/// What is done once an action was accepted.
#[derive(Debug, Clone, Copy)]
pub(super) enum After {
    /// Its end is waited for.
    Wait,
    /// It is cancelled after a while.
    Cancel(Duration),
    /// It is abandoned after a while.
    Abandon(Duration),
}

/// An operation in a line.
pub(super) fn brief(operation: &Operation) -> String {
    let metadata = metadata_of(operation);
    let steps: Vec<String> = metadata
        .steps
        .iter()
        .map(|step| format!("{} {:?} {}", step.kind, step.state(), step.message))
        .collect();
    format!(
        "{} {} {:?}, taken up {} times: {}",
        operation.name,
        metadata.action,
        metadata.state(),
        metadata.recoveries,
        steps.join("; ")
    )
}

/// The agent's reason, if the answer is the agent's.
pub(super) fn reason_of(status: &Status) -> Option<String> {
    let details = status.get_error_details();
    Some(details.error_info()?.reason.clone())
}

fn seconds(seconds: i64) -> prost_types::Duration {
    prost_types::Duration { seconds, nanos: 0 }
}
