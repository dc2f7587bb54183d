// SPDX-License-Identifier: Apache-2.0
//! Steps on the memory of a guest: its CPUs stopped, its memory saved, brought back, dumped; its clock.

use std::{future::Future, path::Path, sync::Arc, time::Duration};

use tokio::time::Instant;
use uuid::Uuid;

use super::{Applied, Steps};
use crate::{
    core::{
        plan::{Mark, Step},
        reason::Reason,
        state::PowerState,
    },
    engine::{StepContext, StepError, StepReport},
    hypervisor::{HypervisorError, HypervisorResult, PowerReading},
};

/// How often it is looked how far a save or dump is.
const LOOK_AT_JOB: Duration = Duration::from_millis(500);

/// A save or dump is ended so long before its step's deadline, so that the guest goes on within it.
const TIME_TO_END: Duration = Duration::from_secs(60);

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
        let limit = Duration::from_millis(step.deadline_ms()).saturating_sub(TIME_TO_END);
        let by = Instant::now() + limit;
        self.until_no_job(context, id, by).await?;
        if self.is_saved(id).await? {
            return Ok(None);
        }
        let hypervisor = Arc::clone(&self.hypervisor);
        let save = async move { hypervisor.save(id, limit + TIME_TO_END / 2).await };
        let saved = self.job(context, id, by, save).await?;
        match saved {
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
        let limit = Duration::from_millis(step.deadline_ms());
        let by = Instant::now() + limit;
        while self.busy(id).await?.is_some() && Instant::now() < by {
            self.hypervisor.abort_job(id).await?;
            tokio::time::sleep(LOOK_AT_JOB).await;
        }
        // A server that is to be deleted need not go on first.
        if self.is_saved(id).await? && !context.server_goes.is_cancelled() {
            self.hypervisor.restore(id, limit).await?;
        }
        Ok(())
    }

    /// Starts the guest from its saved memory. A start that fails leaves that where it is.
    pub(super) async fn restore_memory(&self, id: Uuid, step: &Step) -> Applied {
        let limit = Duration::from_millis(step.deadline_ms()).saturating_sub(TIME_TO_END);
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
        self.hypervisor.restore(id, limit).await?;
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
        let limit = Duration::from_millis(step.deadline_ms()).saturating_sub(TIME_TO_END);
        let by = Instant::now() + limit;
        self.until_no_job(context, id, by).await?;
        let (hypervisor, to) = (Arc::clone(&self.hypervisor), path.to_owned());
        let dump = async move { hypervisor.dump(id, &to, limit + TIME_TO_END / 2).await };
        match self.job(context, id, by, dump).await? {
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

    /// Waits for a job of libvirt's, says how far it is, and ends it when it is cancelled or its time is
    /// over: the guest goes on then.
    async fn job(
        &self,
        context: &StepContext<'_>,
        id: Uuid,
        by: Instant,
        job: impl Future<Output = HypervisorResult<()>> + Send + 'static,
    ) -> Result<HypervisorResult<()>, StepError> {
        // In a task of its own: it goes on while the agent asks how far it is.
        let mut job = tokio::spawn(job);
        let ended = |ended: Result<HypervisorResult<()>, tokio::task::JoinError>| {
            ended.map_err(|error| {
                StepError::new(Reason::Internal, format!("a job panicked: {error}"))
            })
        };
        let why = loop {
            tokio::select! {
                done = &mut job => return ended(done),
                () = context.cancel.cancelled() => break StepError::cancelled(),
                () = tokio::time::sleep_until(by) => break StepError::new(
                    Reason::DeadlineExceeded,
                    "it took too long, so it was ended and the guest goes on",
                ),
                () = tokio::time::sleep(LOOK_AT_JOB) => {
                    // Not to know how far it is does not end it.
                    if let Ok(Some(percent)) = self.hypervisor.job_percent(id).await {
                        (context.progress)(percent);
                    }
                }
            }
        };
        self.hypervisor.abort_job(id).await?;
        // It may have been done in this very moment; taking the step back sees to that.
        let _ = tokio::time::timeout(TIME_TO_END / 2, job).await;
        Err(why)
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
