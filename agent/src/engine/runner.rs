// SPDX-License-Identifier: Apache-2.0
//! What the engine needs of steps: apply, take back, observe. It knows no step and no verb.

use crate::{
    cancel::Cancel,
    core::{
        operation::GuestStop,
        plan::{Plan, Step},
        reason::{Reason, Refusal},
    },
};
use async_trait::async_trait;
use uuid::Uuid;

/// Why a step could not be applied or taken back.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct StepError {
    /// The reason.
    pub reason: Reason,
    /// What happened, for people.
    pub message: String,
    /// The hypervisor was away: worth another try once it is back.
    pub link_down: bool,
    /// The step did nothing: there is nothing to take back.
    pub untouched: bool,
}

impl StepError {
    /// A failure that another try would not mend.
    pub fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self {
            reason,
            message: message.into(),
            link_down: false,
            untouched: false,
        }
    }

    /// A failure that came before anything was done.
    pub fn untouched(reason: Reason, message: impl Into<String>) -> Self {
        Self {
            untouched: true,
            ..Self::new(reason, message)
        }
    }

    /// The step noticed that it is to stop.
    #[must_use]
    pub fn cancelled() -> Self {
        Self::new(Reason::Cancelled, "cancelled")
    }
}

impl From<StepError> for Refusal {
    fn from(error: StepError) -> Self {
        Refusal::new(error.reason, error.message)
    }
}

/// What a step has to say.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StepReport {
    /// What happened, for people; empty if nothing is to be said.
    pub message: String,
    /// How the guest came to be off.
    pub guest_stop: Option<GuestStop>,
    /// Somebody else had done it already: there is nothing to take back.
    pub untouched: bool,
}

/// What a step is applied in.
#[derive(Clone)]
pub struct StepContext<'a> {
    /// The plan it belongs to.
    pub plan: &'a Plan,
    /// Long steps heed it.
    pub cancel: Cancel,
    /// The server is to be deleted: taking back starts no guest, and waits for none.
    pub server_goes: Cancel,
    /// Long steps say how far they are, in percent.
    pub progress: &'a (dyn Fn(u8) + Send + Sync),
}

/// What steps do on the host.
#[async_trait]
pub trait StepRunner: Send + Sync + 'static {
    /// Applies a step. Applying it again, also after it was half applied, leads to the same end.
    async fn apply(&self, context: StepContext<'_>, step: &Step) -> Result<StepReport, StepError>;

    /// Takes a step back, whether it was applied wholly, in part or not at all.
    async fn revert(&self, context: StepContext<'_>, step: &Step) -> Result<(), StepError>;

    /// Is it already so?
    async fn observe(&self, context: StepContext<'_>, step: &Step) -> Result<bool, StepError>;

    /// Returns when the hypervisor can be asked.
    async fn ready(&self);

    /// Returns when nothing that was given up on can change the server's domain or files any more.
    async fn settled(&self, server: Uuid);
}
