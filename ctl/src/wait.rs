// SPDX-License-Identifier: Apache-2.0
//! Waiting for the end of an operation, with its steps on standard error.
//!
//! The agent is asked again and again what the operation is like by now (`WaitOperation` with a short
//! time, which answers at once when it ends). That needs no memory of what was seen before, so an
//! agent that is restarted meanwhile is nothing special: the calls fail for a while.

mod progress;

use std::time::Duration;

use salvor_proto::google::longrunning::{
    Operation, WaitOperationRequest, operation::Result as Outcome,
};
use tokio::time::{Instant, sleep_until};

pub(crate) use progress::Progress;

use crate::{
    connect::{Agent, BackOff, ask_within, is_away, is_broken, is_unfinished},
    errors::{Failure, broken},
    output::{Ui, show},
    units::{show_duration, to_api},
};

/// How often the steps are looked at while somebody watches them.
const LOOK: Duration = Duration::from_millis(250);
/// How often the operation is looked at while nobody does.
const LOOK_QUIET: Duration = Duration::from_secs(10);
/// What the agent may take beyond the time that it was asked to wait.
const GRACE: Duration = Duration::from_secs(10);

/// An operation as it was last seen, and why the wait ended.
#[derive(Debug)]
pub(crate) struct Waited {
    /// The operation.
    pub(crate) operation: Operation,
    /// Why the wait ended early, or how the operation failed.
    pub(crate) end: Result<(), Failure>,
}

/// Waits until `operation` has ended, `limit` has passed or somebody presses Ctrl-C.
pub(crate) async fn until_done(
    agent: &Agent,
    ui: &Ui,
    operation: Operation,
    limit: Duration,
) -> Waited {
    let mut progress = Progress::new(ui);
    let mut operation = operation;
    let name = operation.name.clone();
    let end = tokio::select! {
        end = follow(agent, ui, &mut operation, &mut progress, limit) => end,
        _ = tokio::signal::ctrl_c() => Err(Failure::Interrupted { name }),
    };
    progress.leave();
    let end = end.and_then(|()| match &operation.result {
        Some(Outcome::Error(error)) => Err(Failure::Operation {
            name: operation.name.clone(),
            error: error.clone(),
        }),
        _ => Ok(()),
    });
    Waited { operation, end }
}

/// Looks at the operation until it is done.
async fn follow(
    agent: &Agent,
    ui: &Ui,
    operation: &mut Operation,
    progress: &mut Progress,
    limit: Duration,
) -> Result<(), Failure> {
    let deadline = Instant::now() + limit;
    let look = if ui.quiet() { LOOK_QUIET } else { LOOK };
    let mut away: Option<(Instant, BackOff)> = None;
    loop {
        progress.show(&show::metadata(operation));
        if operation.done {
            return Ok(());
        }
        let begun = Instant::now();
        let left = deadline.saturating_duration_since(begun);
        if left.is_zero() {
            return Err(Failure::StillRunning {
                name: operation.name.clone(),
                after: limit,
            });
        }
        let turn = look.min(left);
        let request = WaitOperationRequest {
            name: operation.name.clone(),
            timeout: Some(to_api(turn)),
        };
        match agent
            .operations()
            .wait_operation(ask_within(request, turn + GRACE))
            .await
        {
            Ok(answer) => {
                *operation = answer.into_inner();
                if let Some((since, _)) = away.take() {
                    progress.note(&format!(
                        "the agent is back after {}",
                        show_duration(since.elapsed())
                    ));
                }
                // An agent that answers early must not be asked without pause.
                if !operation.done {
                    sleep_until((begun + turn / 2).min(deadline)).await;
                }
            }
            Err(status) if is_away(&status) => {
                let (_, pause) = away.get_or_insert_with(|| {
                    let why = if is_broken(&status) || is_unfinished(&status) {
                        broken(&status)
                    } else {
                        format!("the agent is away: {}", status.message())
                    };
                    progress.note(&format!(
                        "{why}; trying {} again, the operation goes on when the agent does",
                        agent.socket().display()
                    ));
                    (begun, BackOff::default())
                });
                if !pause.wait(deadline).await {
                    return Err(status.into());
                }
            }
            Err(status) => return Err(status.into()),
        }
    }
}
