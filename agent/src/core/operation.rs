// SPDX-License-Identifier: Apache-2.0
//! Records of operations: how far a plan is, and how it ended.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{
    action::Verb,
    caller::Who,
    plan::Plan,
    reason::{Refusal, Warning},
    state::{PowerState, named_states},
};

named_states! {
    /// Where an operation is.
    pub enum OperationState {
        /// Steps are being applied.
        Running = "running",
        /// Applied steps are being taken back.
        Reverting = "reverting",
        /// The outcome stands; clean-up goes on.
        CleaningUp = "cleaning-up",
        /// Ended as asked.
        Done = "done",
        /// Failed; the server is as before, or in ERROR.
        Failed = "failed",
        /// Cancelled; the server is as before.
        Cancelled = "cancelled",
    }
}

impl OperationState {
    /// Has it ended?
    #[must_use]
    pub const fn is_final(self) -> bool {
        matches!(self, Self::Done | Self::Failed | Self::Cancelled)
    }
}

named_states! {
    /// Where a step is.
    pub enum StepState {
        /// Not begun.
        Pending = "pending",
        /// Being applied, or it was when the agent died.
        Running = "running",
        /// Applied.
        Done = "done",
        /// Could not be applied.
        Failed = "failed",
        /// Being taken back.
        Reverting = "reverting",
        /// Taken back.
        Reverted = "reverted",
        /// Could not be taken back.
        RevertFailed = "revert-failed",
    }
}

named_states! {
    /// How a guest came to be off.
    pub enum GuestStop {
        /// It was off already.
        WasOff = "was-off",
        /// It shut down by itself when asked.
        ByItself = "by-itself",
        /// It was ended.
        Forced = "forced",
    }
}

/// A step of an operation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepRecord {
    /// Kind.
    pub kind: String,
    /// Phase.
    pub phase: String,
    /// What it does, for people.
    pub description: String,
    /// Where it is.
    pub state: StepState,
    /// When it began, in milliseconds since the Unix epoch.
    pub started_at_ms: Option<i64>,
    /// When it ended.
    pub ended_at_ms: Option<i64>,
    /// What happened.
    pub message: String,
    /// It did nothing, because it was so already or could not be begun: it is not taken back.
    #[serde(default)]
    pub untouched: bool,
}

/// What the host shows of a server, as it was looked at when its state was reset.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostReport {
    /// Power state of the domain.
    pub power: PowerState,
    /// libvirt's reason for it.
    pub power_reason: String,
    /// There is a persistent definition.
    pub defined: bool,
    /// That is a rescue's.
    pub rescue_domain: bool,
    /// Saved memory waits for the next start.
    pub saved_memory: bool,
    /// Files and devices of disks that are not there, by target.
    pub missing_disks: BTreeMap<String, String>,
    /// What could not be looked at, and why; empty if all could.
    pub unknown: String,
    /// When it was looked at, in milliseconds since the Unix epoch.
    pub at_ms: i64,
}

impl std::fmt::Display for HostReport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (self.power, self.defined) {
            (PowerState::Unknown, _) => f.write_str("the domain's state cannot be told")?,
            (PowerState::NoState, false) => f.write_str("there is no domain")?,
            (power, true) => write!(f, "the domain is {power}")?,
            (power, false) => write!(f, "the domain is {power} and has no persistent definition")?,
        }
        if self.rescue_domain {
            f.write_str(", its definition is a rescue's")?;
        }
        if self.saved_memory {
            f.write_str(", saved memory waits for its next start")?;
        }
        for (target, source) in &self.missing_disks {
            write!(f, ", disk {target} ({source}) is missing")?;
        }
        if !self.unknown.is_empty() {
            write!(f, "; {}", self.unknown)?;
        }
        Ok(())
    }
}

/// An operation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OperationRecord {
    /// Its id, which is the plan's.
    pub id: Uuid,
    /// Server.
    pub server: Uuid,
    /// Verb.
    pub verb: Verb,
    /// The client's request id.
    pub request_id: Option<String>,
    /// Who asked.
    pub caller: String,
    /// Where it is.
    pub state: OperationState,
    /// Steps in order.
    pub steps: Vec<StepRecord>,
    /// When it was accepted, in milliseconds since the Unix epoch.
    pub created_at_ms: i64,
    /// When it ended.
    pub ended_at_ms: Option<i64>,
    /// Why it failed or was cancelled.
    pub error: Option<Refusal>,
    /// How the guest was stopped, if it was.
    pub guest_stop: Option<GuestStop>,
    /// Somebody asked for it to be cancelled.
    pub cancel_requested: bool,
    /// It was cancelled because the server is to be deleted: taking it back starts no guest.
    #[serde(default)]
    pub server_goes: bool,
    /// So many times the agent was restarted while it ran.
    pub recoveries: u32,
    /// Warnings.
    pub warnings: Vec<Warning>,
    /// The user for whom it was asked; empty if nobody said.
    #[serde(default)]
    pub user: String,
    /// The project for which it was asked; empty if nobody said.
    #[serde(default)]
    pub project: String,
    /// What the host really shows, if the state is reset.
    #[serde(default)]
    pub host: Option<HostReport>,
}

impl OperationRecord {
    /// The record of an accepted plan. One that changes the record alone has ended with that.
    #[must_use]
    pub fn accepted(
        plan: &Plan,
        request_id: Option<String>,
        caller: String,
        who: &Who,
        now_ms: i64,
    ) -> Self {
        let changes_record = plan.record_change().is_some();
        Self {
            id: plan.id,
            server: plan.server,
            verb: plan.verb,
            request_id,
            caller,
            state: if changes_record {
                OperationState::Done
            } else {
                OperationState::Running
            },
            steps: plan
                .steps
                .iter()
                .map(|planned| StepRecord {
                    kind: planned.step.kind().to_owned(),
                    phase: planned.phase.name().to_owned(),
                    description: planned.step.describe(),
                    state: StepState::Pending,
                    started_at_ms: None,
                    ended_at_ms: None,
                    message: String::new(),
                    untouched: false,
                })
                .collect(),
            created_at_ms: now_ms,
            ended_at_ms: changes_record.then_some(now_ms),
            error: None,
            guest_stop: None,
            cancel_requested: false,
            server_goes: false,
            recoveries: 0,
            warnings: plan.warnings.clone(),
            user: who.user.clone(),
            project: who.project.clone(),
            host: plan.host_report().cloned(),
        }
    }
}
