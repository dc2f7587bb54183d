// SPDX-License-Identifier: Apache-2.0
//! Steps on the memory of a guest: its CPUs stopped, its memory saved, brought back, dumped; its clock.

use std::{future::Future, path::Path, sync::Arc, time::Duration};

use tokio::{sync::SemaphorePermit, task::JoinHandle, time::Instant};
use uuid::Uuid;

use super::{Applied, Steps};
use crate::{
    cancel::Cancel,
    core::{
        plan::{Mark, Step, TURN_WAIT_MS},
        reason::Reason,
        state::PowerState,
    },
    engine::{StepContext, StepError, StepReport},
    hypervisor::{HypervisorError, HypervisorResult, PowerReading},
};

/// How often it is looked how far a save or dump is.
const LOOK_AT_JOB: Duration = Duration::from_millis(500);

/// A save is ended so long before its step's deadline, so that the guest goes on within it.
const TIME_TO_END: Duration = Duration::from_secs(60);

/// So many memories are saved, brought back or dumped at once: disks are no faster with more, and threads
/// are left for everything else.
pub(super) const LONG_JOBS: usize = 3;

/// The times of a step that works through a guest's memory.
#[derive(Debug, Clone, Copy)]
struct Times {
    /// How long the work itself may take.
    limit: Duration,
    /// When all of it has to be over.
    last: Instant,
}

impl Times {
    fn of(step: &Step) -> Self {
        let deadline = Duration::from_millis(step.deadline_ms()).saturating_sub(TIME_TO_END);
        Self {
            limit: deadline.saturating_sub(Duration::from_millis(TURN_WAIT_MS)),
            last: Instant::now() + deadline,
        }
    }

    /// When work that begins now is to be over.
    fn by(self) -> Instant {
        (Instant::now() + self.limit).min(self.last)
    }
}

/// What libvirt does with a guest's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Job {
    Save,
    /// Nobody can end it: QEMU knows no such order (libvirt: "cannot abort memory-only dump").
    Dump,
}

/// A call in a task of its own. When nobody waits for it any more it does not go on unseen: one that has
/// not begun never does, one that has is a call that was given up, which whoever comes next waits for.
struct Call(JoinHandle<HypervisorResult<()>>);

impl Drop for Call {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Steps {
    pub(super) async fn pause(&self, id: Uuid) -> Applied {
        match self.hypervisor.pause(id).await {
            Ok(()) => Ok(None),
            Err(error) => Err(self.off_or(id, error).await),
        }
    }

    /// libvirt refuses to do it to a guest that runs: then somebody was faster.
    pub(super) async fn unpause(&self, id: Uuid) -> Applied {
        match self.hypervisor.unpause(id).await {
            Ok(()) => Ok(None),
            Err(HypervisorError::Refused { .. })
                if self.has_power(id, PowerState::Running).await? =>
            {
                Ok(Some(StepReport {
                    message: "ran already".to_owned(),
                    untouched: true,
                    ..StepReport::default()
                }))
            }
            Err(error) => Err(self.off_or(id, error).await),
        }
    }

    /// Takes a pause back. A guest that is off meanwhile, or runs, is as it would be without the pause.
    pub(super) async fn unpause_again(&self, id: Uuid) -> Result<(), StepError> {
        if self.has_power(id, PowerState::Paused).await? {
            self.unpause(id).await?;
        }
        Ok(())
    }

    /// Takes it back that the CPUs run.
    pub(super) async fn pause_again(&self, id: Uuid) -> Result<(), StepError> {
        if self.has_power(id, PowerState::Running).await? {
            self.hypervisor.pause(id).await?;
        }
        Ok(())
    }

    pub(super) async fn has_power(&self, id: Uuid, power: PowerState) -> Result<bool, StepError> {
        let reading = self.hypervisor.power(id).await?;
        Ok(reading.is_some_and(|reading| reading.power == power))
    }

    /// Why a call failed that needs a guest: there may be none.
    async fn off_or(&self, id: Uuid, error: HypervisorError) -> StepError {
        match (&error, self.hypervisor.power(id).await) {
            (HypervisorError::Refused { .. }, Ok(reading))
                if !reading.as_ref().is_some_and(|r| r.power.is_on()) =>
            {
                StepError::untouched(Reason::InvalidState, "the guest is off: start it first")
            }
            _ => error.into(),
        }
    }

    /// Saves the guest's memory. libvirt goes on with a save whose agent died: that is waited for.
    pub(super) async fn save_memory(&self, context: &StepContext<'_>, step: &Step) -> Applied {
        let id = context.plan.server;
        let times = Times::of(step);
        self.until_no_job(context, id, times.by()).await?;
        if self.is_saved(id).await? {
            return Ok(None);
        }
        let _turn = self.turn(&context.cancel).await?;
        let hypervisor = Arc::clone(&self.hypervisor);
        let limit = times.limit + TIME_TO_END / 2;
        let save = async move { hypervisor.save(id, limit).await };
        match self.job(context, Job::Save, times.by(), save).await? {
            Ok(()) => {}
            Err(error) => return Err(self.off_or(id, error).await),
        }
        if !self.is_saved(id).await? {
            return Err(StepError::new(
                Reason::LibvirtRefused,
                format!("libvirt said that it saved the memory of domain {id}, but has none"),
            ));
        }
        Ok(None)
    }

    /// Is the guest off, with its memory saved?
    pub(super) async fn is_saved(&self, id: Uuid) -> Result<bool, StepError> {
        let status = self.hypervisor.domain(id).await?;
        Ok(status.is_some_and(|status| status.managed_save && !status.power.is_on()))
    }

    /// Takes a save back: one that is under way is ended, and a guest whose memory was saved goes on.
    pub(super) async fn go_on_again(
        &self,
        context: &StepContext<'_>,
        step: &Step,
    ) -> Result<(), StepError> {
        let id = context.plan.server;
        let times = Times::of(step);
        let by = times.by();
        while self.busy(id).await?.is_some() && Instant::now() < by {
            self.hypervisor.abort_job(id).await?;
            tokio::time::sleep(LOOK_AT_JOB).await;
        }
        // A server that is to be deleted need not go on first.
        if self.is_saved(id).await? && !context.server_goes.is_cancelled() {
            // A turn is better, but the guest comes first.
            let _turn = self.turn(&Cancel::never()).await.ok();
            self.hypervisor.restore(id, times.limit).await?;
        }
        Ok(())
    }

    /// Starts the guest from its saved memory. A start that fails leaves that where it is.
    pub(super) async fn restore_memory(&self, context: &StepContext<'_>, step: &Step) -> Applied {
        let id = context.plan.server;
        let times = Times::of(step);
        let turn = self.turn(&context.cancel).await?;
        match self.hypervisor.domain(id).await? {
            Some(status) if status.power.is_on() => {
                // Somebody was faster. One that was saved while it was paused comes back paused.
                if status.power == PowerState::Paused {
                    self.unpause(id).await?;
                }
                return Ok(Some(StepReport {
                    message: "was on already".to_owned(),
                    untouched: true,
                    ..StepReport::default()
                }));
            }
            Some(status) if !status.managed_save => {
                return Err(StepError::untouched(
                    Reason::NoSavedMemory,
                    "there is no saved memory any more; a hard reboot boots the server anew",
                ));
            }
            _ => {}
        }
        self.hypervisor.restore(id, times.limit).await?;
        drop(turn);
        self.check_started(id, Mark::Own).await?;
        let Some(reading) = self.hypervisor.power(id).await? else {
            return Ok(None);
        };
        if reading.power == PowerState::Paused {
            self.unpause(id).await?;
        }
        // libvirt boots anew where the file was cut off while it was written.
        if reading.reason == "booted" {
            return Ok(Some(StepReport {
                message: "the saved memory was not whole, so the guest booted anew".to_owned(),
                ..StepReport::default()
            }));
        }
        Ok(None)
    }

    /// Best effort: a guest whose agent does not set the time goes on with the one it has.
    pub(super) async fn set_guest_time(&self, id: Uuid) -> Applied {
        let said = |message: String| {
            Ok(Some(StepReport {
                message,
                ..StepReport::default()
            }))
        };
        match self.hypervisor.set_guest_time(id).await {
            Ok(()) => said("set".to_owned()),
            Err(
                error @ (HypervisorError::NoGuestAgent { .. }
                | HypervisorError::GuestAgentRefused { .. }
                | HypervisorError::Deadline { .. }
                | HypervisorError::Refused { .. }),
            ) => said(format!("not set: {error}")),
            Err(error) => Err(error.into()),
        }
    }

    pub(super) async fn inject_nmi(&self, id: Uuid) -> Applied {
        match self.hypervisor.inject_nmi(id).await {
            Ok(()) => Ok(None),
            Err(error) => Err(self.off_or(id, error).await),
        }
    }

    /// Writes the guest's memory to a file. What an earlier try left is written anew.
    pub(super) async fn dump_memory(
        &self,
        context: &StepContext<'_>,
        step: &Step,
        path: &str,
    ) -> Applied {
        let id = context.plan.server;
        let file = self.own(path)?;
        let times = Times::of(step);
        self.until_no_job(context, id, times.by()).await?;
        let _turn = self.turn(&context.cancel).await?;
        let (hypervisor, to) = (Arc::clone(&self.hypervisor), path.to_owned());
        let limit = times.limit + TIME_TO_END / 2;
        let dump = async move { hypervisor.dump(id, &to, limit).await };
        match self.job(context, Job::Dump, times.by(), dump).await? {
            Ok(()) => {}
            Err(error) => return Err(self.off_or(id, error).await),
        }
        let size = size_of(&file).await;
        Ok(Some(StepReport {
            message: format!("{path}, {size} bytes"),
            ..StepReport::default()
        }))
    }

    /// What a domain does for somebody, if its guest stands still for a save or a dump.
    async fn busy(&self, id: Uuid) -> Result<Option<PowerReading>, StepError> {
        let reading = self.hypervisor.power(id).await?;
        let works = |reading: &PowerReading| {
            reading.power == PowerState::Paused && matches!(&*reading.reason, "save" | "dump")
        };
        Ok(reading.filter(works))
    }

    /// Waits for a save or dump that an agent before this one began.
    async fn until_no_job(
        &self,
        context: &StepContext<'_>,
        id: Uuid,
        by: Instant,
    ) -> Result<(), StepError> {
        while let Some(reading) = self.busy(id).await? {
            if Instant::now() >= by {
                return Err(StepError::untouched(
                    Reason::DeadlineExceeded,
                    format!("another {} of the guest does not end", reading.reason),
                ));
            }
            tokio::select! {
                () = tokio::time::sleep(LOOK_AT_JOB) => {}
                () = context.cancel.cancelled() => return Err(StepError::cancelled()),
            }
        }
        Ok(())
    }

    /// A turn for work on a guest's memory. Waiting for it is not the work's own time.
    async fn turn(&self, cancel: &Cancel) -> Result<SemaphorePermit<'_>, StepError> {
        tokio::select! {
            turn = self.long_jobs.acquire() => turn.map_err(|error| {
                StepError::untouched(Reason::Internal, format!("no turn: {error}"))
            }),
            () = cancel.cancelled() => Err(StepError::cancelled()),
            () = tokio::time::sleep(Duration::from_millis(TURN_WAIT_MS)) => Err(StepError::untouched(
                Reason::DeadlineExceeded,
                format!(
                    "{LONG_JOBS} memories are saved, brought back or dumped at a time, and it did not come to this one's turn within {} min; nothing was changed, try again",
                    TURN_WAIT_MS / 60_000
                ),
            )),
        }
    }

    /// Waits for a job of libvirt's and says how far it is. When it is cancelled or its time is over, a save
    /// is ended, and the guest goes on; a dump is waited for, unless the guest is to go anyway.
    async fn job(
        &self,
        context: &StepContext<'_>,
        what: Job,
        by: Instant,
        call: impl Future<Output = HypervisorResult<()>> + Send + 'static,
    ) -> Result<HypervisorResult<()>, StepError> {
        let id = context.plan.server;
        // In a task of its own: it goes on while the agent asks how far it is.
        let mut call = Call(tokio::spawn(call));
        let mut failure = None;
        let mut until = by;
        loop {
            tokio::select! {
                done = &mut call.0 => {
                    let done = done.map_err(|error| {
                        StepError::new(Reason::Internal, format!("a job panicked: {error}"))
                    })?;
                    // It may have been done all the same; taking the step back sees to that.
                    return failure.map_or(Ok(done), Err);
                }
                () = context.cancel.cancelled(), if failure.is_none() => {
                    failure = Some(StepError::cancelled());
                    if what == Job::Save {
                        until = Instant::now() + TIME_TO_END / 2;
                    }
                }
                () = tokio::time::sleep_until(until) => {
                    if failure.is_some() {
                        break;
                    }
                    let said = match what {
                        Job::Save => "it took too long, so it was ended and the guest goes on",
                        Job::Dump => "it takes too long; a dump cannot be ended, and the guest goes on when it is written",
                    };
                    failure = Some(StepError::new(Reason::DeadlineExceeded, said));
                    until = Instant::now() + TIME_TO_END / 2;
                }
                () = tokio::time::sleep(LOOK_AT_JOB) => {
                    // Not to know how far it is does not end it.
                    if let Ok(Some(percent)) = self.hypervisor.job_percent(id).await {
                        (context.progress)(percent);
                    }
                    if what == Job::Dump && context.server_goes.is_cancelled() {
                        self.hypervisor.destroy(id).await?;
                    }
                }
            }
            // Again and again: the call may not have come to its job yet.
            if what == Job::Save && failure.is_some() {
                self.hypervisor.abort_job(id).await?;
            }
        }
        Err(failure.unwrap_or_else(StepError::cancelled))
    }

    /// Has the domain been started as the server's own?
    pub(super) async fn runs_its_own(&self, id: Uuid) -> Result<bool, StepError> {
        self.is_started(id, Mark::Own).await
    }
}

async fn size_of(file: &Path) -> u64 {
    tokio::fs::metadata(file)
        .await
        .map_or(0, |metadata| metadata.len())
}
