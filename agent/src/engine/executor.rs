// SPDX-License-Identifier: Apache-2.0
//! Carries one operation to its end, from wherever the journal says it is.
//!
//! ```text
//!            every step applied            outcome stands
//!  Running ──────────────────────> commit ────────────────> CleaningUp ──> Done
//!     │ a step failed, or cancelled
//!     v
//!  Reverting ── all taken back ──> Failed / Cancelled (the record is as before)
//!     └──────── one cannot be ───> Failed, the server in ERROR with a fault
//! ```
//!
//! A new operation and one that the journal brings back after a crash run through the same code: the
//! only difference is that a step noted as begun is observed before it is applied again.

use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use tokio::{
    sync::watch,
    time::{Instant, timeout_at},
};

use super::{
    View,
    probe::{Event, Point, Probe},
    runner::{StepContext, StepError, StepReport, StepRunner},
};
use crate::{
    cancel::Cancel,
    core::{
        operation::{OperationRecord, OperationState, StepRecord, StepState},
        plan::{Phase, Plan, Step},
        reason::{Reason, Refusal, Warning, WarningName},
        record::Fault,
    },
    store::{Store, StoreError},
};

/// Taking back may have to wait for libvirt to come back, for longer than a step may take.
const REVERT_DEADLINE: Duration = Duration::from_secs(600);

/// How long to wait before asking a hypervisor again that says it is there but does not answer.
const LINK_PAUSE: Duration = Duration::from_millis(100);

/// Why an operation was left as it is in the journal.
#[derive(Debug, thiserror::Error)]
pub(super) enum Abandoned {
    /// A crash point.
    #[error("the agent died at a crash point")]
    Died,
    /// The journal cannot be written.
    #[error("the journal cannot be written")]
    Store(#[from] StoreError),
}

/// Milliseconds since the Unix epoch.
pub(crate) fn now_ms() -> i64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

/// Why an operation goes on without what is under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum GiveUp {
    /// It panicked there, again and again.
    Panicked,
    /// It hangs there, and the administrator does not want to wait.
    Abandoned,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    Apply,
    Revert,
}

pub(super) struct Execution {
    pub(super) store: Store,
    pub(super) runner: Arc<dyn StepRunner>,
    pub(super) probe: Arc<dyn Probe>,
    pub(super) plan: Arc<Plan>,
    pub(super) operation: OperationRecord,
    pub(super) view: watch::Sender<View>,
    pub(super) cancel: watch::Sender<bool>,
    pub(super) server_goes: watch::Sender<bool>,
}

impl Execution {
    /// Carries the operation on until it has ended. With `give_up`, without what panics or hangs there.
    pub(super) async fn run(mut self, give_up: Option<GiveUp>) -> Result<(), Abandoned> {
        self.publish();
        match give_up {
            Some(GiveUp::Panicked) => self.give_up().await?,
            Some(GiveUp::Abandoned) => self.abandon().await?,
            None => {}
        }
        loop {
            match self.operation.state {
                OperationState::Running => self.forward().await?,
                OperationState::Reverting => self.backward().await?,
                OperationState::CleaningUp => self.clean_up().await?,
                OperationState::Done | OperationState::Failed | OperationState::Cancelled => {
                    return Ok(());
                }
            }
        }
    }

    /// A defect of ours makes this panic again and again: the operation goes on as if the step that
    /// is under way had failed.
    async fn give_up(&mut self) -> Result<(), Abandoned> {
        let error = StepError::new(
            Reason::Internal,
            "the agent panicked twice at this; its log has the details",
        );
        let under_way = self
            .operation
            .steps
            .iter()
            .rposition(|step| matches!(step.state, StepState::Running | StepState::Reverting));
        match self.operation.state {
            OperationState::Running => {
                if let Some(index) = under_way {
                    self.end_step(index, StepState::Failed, &error.message);
                }
                self.turn_back(error).await
            }
            OperationState::Reverting => {
                let index = under_way.unwrap_or_default();
                self.end_step(index, StepState::RevertFailed, &error.message);
                let fault = self.fault(index, &error);
                self.end_reverted(Some(fault)).await
            }
            OperationState::CleaningUp => {
                if let Some(index) = under_way {
                    self.leave_behind(index, &error);
                }
                Ok(())
            }
            OperationState::Done | OperationState::Failed | OperationState::Cancelled => Ok(()),
        }
    }

    /// Ends the operation where it is. Nothing more is done to the host, not even to take something back: a
    /// call that hangs would be in the way of that, or would undo it later.
    async fn abandon(&mut self) -> Result<(), Abandoned> {
        let hangs = self
            .operation
            .steps
            .iter()
            .rposition(|step| matches!(step.state, StepState::Running | StepState::Reverting));
        let (state, index) = (self.operation.state, hangs.unwrap_or_default());
        let what = match hangs {
            Some(index) => format!("\"{}\" did not end", self.describe(index)),
            None => "it did not get on".to_owned(),
        };
        let error = StepError::new(
            Reason::Abandoned,
            format!("given up by the administrator while {what}; it may still take effect"),
        );
        match state {
            OperationState::Running | OperationState::Reverting => {
                let ended = match state {
                    OperationState::Reverting => StepState::RevertFailed,
                    _ => StepState::Failed,
                };
                // What hangs may have been done, wholly or in part, so it counts as left.
                self.end_step(index, ended, &error.message);
                let mut fault = self.fault(index, &error);
                fault.reason = Reason::Abandoned;
                fault.message = format!("{}: {}", self.plan.verb, error.message);
                if state == OperationState::Running {
                    fault.revert_step = String::new();
                }
                self.end_reverted(Some(fault)).await
            }
            OperationState::CleaningUp => {
                // Its outcome stands: what is not removed is swept at the next start.
                for index in self.plan.steps_before_commit()..self.plan.steps.len() {
                    if !matches!(self.step_state(index), StepState::Done | StepState::Failed) {
                        self.leave_behind(index, &error);
                    }
                }
                Ok(())
            }
            OperationState::Done | OperationState::Failed | OperationState::Cancelled => Ok(()),
        }
    }

    async fn forward(&mut self) -> Result<(), Abandoned> {
        for index in 0..self.plan.steps_before_commit() {
            let state = self.step_state(index);
            if state == StepState::Done {
                continue;
            }
            if !self.only_forward() && self.cancel_requested().await? {
                return self.turn_back(StepError::cancelled()).await;
            }
            // Noted as begun by an agent that died: perhaps it was applied.
            let uncertain = state == StepState::Running;
            self.begin_step(index, StepState::Running);
            self.store.progress(self.operation.clone()).await?;
            let outcome = match self.probe(Point::BeforeStep(index))? {
                Some(error) => Err(error),
                None => self.attempt(index, Direction::Apply, uncertain).await?,
            };
            let is_final = self.is_final(index);
            let outcome = match outcome {
                Err(_) if is_final && self.took_effect(index).await => Ok(StepReport::default()),
                outcome => outcome,
            };
            let outcome = match (outcome, self.probe(Point::AfterStep(index))?) {
                (Ok(_), Some(error)) if !is_final => Err(error),
                (outcome, _) => outcome,
            };
            match outcome {
                Ok(report) => self.step_done(index, report),
                Err(error) => {
                    if let Some(step) = self.operation.steps.get_mut(index) {
                        step.untouched = error.untouched;
                    }
                    self.end_step(index, StepState::Failed, &error.message);
                    return self.turn_back(error).await;
                }
            }
        }
        let only_forward = self.only_forward();
        if !only_forward && self.cancel_requested().await? {
            return self.turn_back(StepError::cancelled()).await;
        }
        if let Some(error) = self.probe(Point::BeforeCommit)?
            && !only_forward
        {
            return self.turn_back(error).await;
        }
        self.operation.state = OperationState::after_commit(&self.plan);
        if self.operation.state.is_final() {
            self.operation.ended_at_ms = Some(now_ms());
        }
        self.store
            .commit(Arc::clone(&self.plan), self.operation.clone(), now_ms())
            .await?;
        self.publish();
        // The outcome stands: whatever happens here can no longer take it back.
        self.probe(Point::AfterCommit)?;
        Ok(())
    }

    fn is_final(&self, index: usize) -> bool {
        let planned = self.plan.steps.get(index);
        planned.is_some_and(|planned| planned.step.is_final())
    }

    /// Has a step taken effect that cannot be taken back whole?
    fn only_forward(&self) -> bool {
        (0..self.plan.steps_before_commit())
            .any(|index| self.is_final(index) && self.step_state(index) == StepState::Done)
    }

    /// Did a step that failed take effect all the same? A call that missed its deadline may have.
    async fn took_effect(&self, index: usize) -> bool {
        let Some(planned) = self.plan.steps.get(index) else {
            return false;
        };
        let context = StepContext {
            plan: &self.plan,
            cancel: Cancel::never(),
            server_goes: Cancel::never(),
            progress: &|_| {},
        };
        let look = async {
            self.runner.settled(self.operation.server).await;
            self.runner.observe(context, &planned.step).await
        };
        matches!(
            tokio::time::timeout(REVERT_DEADLINE, look).await,
            Ok(Ok(true))
        )
    }

    async fn clean_up(&mut self) -> Result<(), Abandoned> {
        for index in self.plan.steps_before_commit()..self.plan.steps.len() {
            if matches!(self.step_state(index), StepState::Done | StepState::Failed) {
                continue;
            }
            self.begin_step(index, StepState::Running);
            self.store.progress(self.operation.clone()).await?;
            let outcome = match self.probe(Point::BeforeStep(index))? {
                Some(error) => Err(error),
                None => self.attempt(index, Direction::Apply, false).await?,
            };
            self.probe(Point::AfterStep(index))?;
            match outcome {
                Ok(report) => self.step_done(index, report),
                Err(error) => self.leave_behind(index, &error),
            }
        }
        self.probe(Point::BeforeFinish)?;
        self.operation.state = OperationState::Done;
        self.operation.ended_at_ms = Some(now_ms());
        self.store
            .finish(Arc::clone(&self.plan), self.operation.clone(), now_ms())
            .await?;
        self.publish();
        Ok(())
    }

    /// Not worth failing for: what is left behind is said, and swept at the next start.
    fn leave_behind(&mut self, index: usize, error: &StepError) {
        self.end_step(index, StepState::Failed, &error.message);
        self.operation.warnings.push(Warning {
            name: WarningName::LeftBehind,
            message: format!("could not {}: {error}", self.describe(index)),
        });
    }

    async fn backward(&mut self) -> Result<(), Abandoned> {
        // A call that missed its deadline may still take effect: then it would undo what is taken
        // back before. If it never comes back, taking back is all the same the best there is.
        let settled = self.runner.settled(self.operation.server);
        if tokio::time::timeout(REVERT_DEADLINE, settled)
            .await
            .is_err()
        {
            tracing::error!(operation = %self.operation.id, "a call that was given up on hangs; taking the operation back under it");
        }
        let mut fault = None;
        for index in (0..self.plan.steps_before_commit()).rev() {
            let untouched = |step: &StepRecord| step.untouched;
            if matches!(
                self.step_state(index),
                StepState::Pending | StepState::Reverted
            ) || self.operation.steps.get(index).is_some_and(untouched)
            {
                continue;
            }
            // A delete may come while a cancelled operation is taken back.
            if !self.operation.server_goes && *self.server_goes.borrow() {
                self.note_cancel().await?;
            }
            self.begin_step(index, StepState::Reverting);
            self.store.progress(self.operation.clone()).await?;
            let outcome = match self.probe(Point::BeforeRevert(index))? {
                Some(error) => Err(error),
                None => self.attempt(index, Direction::Revert, false).await?,
            };
            self.probe(Point::AfterRevert(index))?;
            match outcome {
                Ok(_) => self.end_step(index, StepState::Reverted, ""),
                Err(error) => {
                    self.end_step(index, StepState::RevertFailed, &error.message);
                    if self.touches_no_guest(index) {
                        // Not worth the server's state: it is said, and swept at the next start.
                        self.operation.warnings.push(Warning {
                            name: WarningName::LeftBehind,
                            message: format!(
                                "could not take back \"{}\": {error}",
                                self.describe(index)
                            ),
                        });
                        continue;
                    }
                    // What was done before must stay as it is: taking it back now would be done to a
                    // host that is not what that step expects.
                    fault = Some(self.fault(index, &error));
                    break;
                }
            }
        }
        self.probe(Point::BeforeFinish)?;
        self.end_reverted(fault).await
    }

    /// Ends an operation that was taken back, or with a fault could not be.
    async fn end_reverted(&mut self, fault: Option<Fault>) -> Result<(), Abandoned> {
        let cancelled = self
            .operation
            .error
            .as_ref()
            .is_some_and(|error| error.reason == Reason::Cancelled);
        if cancelled && self.operation.server_goes {
            let message =
                "cancelled: the server is to be deleted, so its guest was not started again";
            self.operation.error = Some(Refusal::new(Reason::Cancelled, message));
        }
        self.operation.state = if cancelled && fault.is_none() {
            OperationState::Cancelled
        } else {
            OperationState::Failed
        };
        if let Some(fault) = &fault {
            self.operation.error = Some(Refusal::new(fault.reason, fault.message.clone()));
        }
        self.operation.ended_at_ms = Some(now_ms());
        self.store
            .rolled_back(
                Arc::clone(&self.plan),
                self.operation.clone(),
                fault,
                now_ms(),
            )
            .await?;
        self.publish();
        Ok(())
    }

    /// The rest of the journal's work is to take back what was done.
    async fn turn_back(&mut self, error: StepError) -> Result<(), Abandoned> {
        tracing::warn!(operation = %self.operation.id, reason = %error.reason, error = %error, "taking the operation back");
        self.operation.state = OperationState::Reverting;
        self.operation.error = Some(error.into());
        // A step that heeds a cancel at once has ended before the cancel was noted.
        self.operation.cancel_requested |= *self.cancel.borrow();
        self.operation.server_goes |= *self.server_goes.borrow();
        self.store.turn(self.operation.clone(), now_ms()).await?;
        self.publish();
        Ok(())
    }

    /// Applies a step or takes it back, within its deadline; waits for a hypervisor that is away.
    async fn attempt(
        &mut self,
        index: usize,
        direction: Direction,
        uncertain: bool,
    ) -> Result<Result<StepReport, StepError>, Abandoned> {
        let plan = Arc::clone(&self.plan);
        let Some(planned) = plan.steps.get(index) else {
            return Ok(Ok(StepReport::default()));
        };
        let step = &planned.step;
        let mut limit = Duration::from_millis(step.deadline_ms());
        if direction == Direction::Revert {
            limit = limit.max(REVERT_DEADLINE);
        }
        let deadline = Instant::now() + limit;
        let runner = Arc::clone(&self.runner);
        let view = self.view.clone();
        let progress = move |percent: u8| {
            view.send_modify(|view| view.percent = Some((index, percent.min(100))));
        };
        // Taking back is what a cancel asks for, and an outcome that stands is not taken back.
        let cancel = if self.operation.state == OperationState::Running {
            Cancel::from(self.cancel.subscribe())
        } else {
            Cancel::never()
        };
        let context = StepContext {
            plan: &plan,
            cancel: cancel.clone(),
            server_goes: Cancel::from(self.server_goes.subscribe()),
            progress: &progress,
        };
        let mut look_first = uncertain;
        loop {
            let once = try_once(
                runner.as_ref(),
                context.clone(),
                step,
                direction,
                look_first,
            );
            tokio::pin!(once);
            let watched = cancel.clone();
            let outcome = loop {
                tokio::select! {
                    biased;
                    outcome = timeout_at(deadline, &mut once) => break outcome,
                    () = watched.cancelled(), if !self.operation.cancel_requested => {
                        self.note_cancel().await?;
                    }
                }
            };
            let error = match outcome {
                Ok(Ok(report)) => return Ok(Ok(report)),
                Ok(Err(error)) if error.link_down => error,
                Ok(Err(error)) => return Ok(Err(error)),
                Err(_) => return Ok(Err(deadline_exceeded(step, limit))),
            };
            if cancel.is_cancelled() {
                return Ok(Err(StepError::cancelled()));
            }
            tracing::info!(operation = %self.operation.id, step = step.kind(), %error, "waiting for the hypervisor");
            let back = async {
                tokio::time::sleep(LINK_PAUSE).await;
                runner.ready().await;
            };
            let watched = cancel.clone();
            tokio::select! {
                back = timeout_at(deadline, back) => if back.is_err() {
                    return Ok(Err(error));
                },
                () = watched.cancelled() => return Ok(Err(StepError::cancelled())),
            }
            look_first = true;
        }
    }

    /// Has somebody asked for a cancel? Then it is noted for good.
    async fn cancel_requested(&mut self) -> Result<bool, Abandoned> {
        if !self.operation.cancel_requested && *self.cancel.borrow() {
            self.note_cancel().await?;
        }
        Ok(self.operation.cancel_requested)
    }

    async fn note_cancel(&mut self) -> Result<(), Abandoned> {
        self.operation.cancel_requested = true;
        self.operation.server_goes = *self.server_goes.borrow();
        self.store.turn(self.operation.clone(), now_ms()).await?;
        self.publish();
        Ok(())
    }

    fn probe(&self, point: Point) -> Result<Option<StepError>, Abandoned> {
        match self.probe.at(&self.plan, point) {
            Event::Go => Ok(None),
            Event::Fail(reason) => Ok(Some(StepError::new(reason, "a crash point made it fail"))),
            Event::Cancel => {
                self.cancel.send_replace(true);
                Ok(None)
            }
            Event::Die => Err(Abandoned::Died),
        }
    }

    fn step_state(&self, index: usize) -> StepState {
        self.operation
            .steps
            .get(index)
            .map_or(StepState::Pending, |step| step.state)
    }

    /// Is what the step leaves behind a file or a note that no guest sees? A saved definition is more:
    /// it is the way back of a rescue.
    fn touches_no_guest(&self, index: usize) -> bool {
        self.plan.steps.get(index).is_some_and(|planned| {
            planned.phase == Phase::Prepare && !matches!(planned.step, Step::SaveDefinition { .. })
        })
    }

    fn describe(&self, index: usize) -> String {
        self.plan
            .steps
            .get(index)
            .map(|planned| planned.step.describe())
            .unwrap_or_default()
    }

    fn begin_step(&mut self, index: usize, state: StepState) {
        if let Some(step) = self.operation.steps.get_mut(index) {
            step.state = state;
            if state == StepState::Running {
                step.started_at_ms = Some(now_ms());
            }
        }
        self.publish();
    }

    fn end_step(&mut self, index: usize, state: StepState, message: &str) {
        if let Some(step) = self.operation.steps.get_mut(index) {
            step.state = state;
            step.ended_at_ms = Some(now_ms());
            if !message.is_empty() {
                message.clone_into(&mut step.message);
            }
        }
        self.publish();
    }

    fn step_done(&mut self, index: usize, report: StepReport) {
        if report.guest_stop.is_some() {
            self.operation.guest_stop = report.guest_stop;
        }
        if let Some(step) = self.operation.steps.get_mut(index) {
            step.untouched = report.untouched;
        }
        self.end_step(index, StepState::Done, &report.message);
    }

    fn publish(&self) {
        self.view.send_replace(View {
            operation: Arc::new(self.operation.clone()),
            percent: None,
        });
    }

    fn fault(&self, index: usize, error: &StepError) -> Fault {
        let left_behind = (0..=index)
            .filter(|done| {
                !matches!(
                    self.step_state(*done),
                    StepState::Pending | StepState::Reverted
                )
            })
            .map(|done| self.describe(done))
            .collect();
        let first = self
            .operation
            .error
            .as_ref()
            .map_or("", |error| error.message.as_str());
        let what = self.describe(index);
        let kind =
            |step: Option<&StepRecord>| step.map(|step| step.kind.clone()).unwrap_or_default();
        Fault {
            reason: Reason::RollbackFailed,
            message: format!(
                "{} failed ({first}), and taking back \"{what}\" failed as well: {error}",
                self.plan.verb
            ),
            // Steps run in order, so none after the one that failed had begun.
            step: kind(
                self.operation
                    .steps
                    .iter()
                    .rev()
                    .find(|step| step.state != StepState::Pending),
            ),
            revert_step: kind(self.operation.steps.get(index)),
            left_behind,
            at_ms: now_ms(),
        }
    }
}

async fn try_once(
    runner: &dyn StepRunner,
    context: StepContext<'_>,
    step: &Step,
    direction: Direction,
    look_first: bool,
) -> Result<StepReport, StepError> {
    match direction {
        Direction::Apply => {
            if look_first && runner.observe(context.clone(), step).await? {
                return Ok(StepReport {
                    message: "was done already".to_owned(),
                    ..StepReport::default()
                });
            }
            runner.apply(context, step).await
        }
        Direction::Revert => runner
            .revert(context, step)
            .await
            .map(|()| StepReport::default()),
    }
}

fn deadline_exceeded(step: &Step, limit: Duration) -> StepError {
    StepError::new(
        Reason::DeadlineExceeded,
        format!("{} did not end within {} s", step.kind(), limit.as_secs()),
    )
}
