// SPDX-License-Identifier: Apache-2.0
//! A defect of ours: carrying an operation on panics, once or always.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use salvor_agent::{
    core::{
        action::Action,
        operation::{OperationRecord, OperationState},
        plan::Step,
        reason::{Reason, WarningName},
        state::VmState,
    },
    engine::{Engine, NoProbe, StepContext, StepError, StepReport, StepRunner},
    hypervisor::{Boot, Hypervisor as _},
    steps::Steps,
    storage::qemu_img::QemuImg,
    store::{Accept, Accepted},
};

use uuid::Uuid;

use crate::host::{
    Agent, Host, NEW, ON, PATIENCE, SERVER, Seen, adopt, anonymous, rescue_action, unrescue,
};

/// Steps that panic where they are told to, so many times each.
struct Panics {
    steps: Steps,
    apply: (&'static str, AtomicUsize),
    revert: (&'static str, AtomicUsize),
}

impl Panics {
    fn at((kind, times): &(&'static str, AtomicUsize), step: &Step) {
        let again = |left: usize| left.checked_sub(1);
        if step.kind() == *kind
            && times
                .fetch_update(Ordering::SeqCst, Ordering::SeqCst, again)
                .is_ok()
        {
            panic!("a defect in {kind}");
        }
    }
}

#[async_trait::async_trait]
impl StepRunner for Panics {
    async fn apply(&self, context: StepContext<'_>, step: &Step) -> Result<StepReport, StepError> {
        Self::at(&self.apply, step);
        self.steps.apply(context, step).await
    }

    async fn revert(&self, context: StepContext<'_>, step: &Step) -> Result<(), StepError> {
        Self::at(&self.revert, step);
        self.steps.revert(context, step).await
    }

    async fn observe(&self, context: StepContext<'_>, step: &Step) -> Result<bool, StepError> {
        self.steps.observe(context, step).await
    }

    async fn ready(&self) {
        self.steps.ready().await;
    }

    async fn settled(&self, server: Uuid) {
        self.steps.settled(server).await;
    }
}

const ALWAYS: usize = usize::MAX;

/// A rescue of a server that runs, with panics before a step is applied and before one is taken back.
struct Outcome {
    operation: OperationRecord,
    agent: Agent,
    before: Seen,
    after: Seen,
    _host: Host,
}

async fn rescue(apply: (&'static str, usize), revert: (&'static str, usize)) -> Outcome {
    carry_out(rescue_action(), apply, revert).await
}

/// The same for any action; an unrescue finds a rescue.
async fn carry_out(
    action: Action,
    apply: (&'static str, usize),
    revert: (&'static str, usize),
) -> Outcome {
    let host = Host::new();
    let agent = host.agent(Arc::new(NoProbe)).await;
    host.add_images(&agent.store).await;
    let xml = host.foreign_domain(false);
    host.define(&xml).await;
    host.fake.start(SERVER, Boot::Resume).await.unwrap();
    agent.succeed(NEW, adopt()).await;
    if matches!(action, Action::Unrescue(_)) {
        agent.succeed(ON, rescue_action()).await;
    }
    let before = host.look(&agent).await;
    let plan = agent.plan(ON, &action).await;
    let steps = Steps::new(
        Arc::new(agent.fake.clone()),
        agent.store.clone(),
        QemuImg::default(),
        host.layout(),
    );
    let panics = Panics {
        steps,
        apply: (apply.0, AtomicUsize::new(apply.1)),
        revert: (revert.0, AtomicUsize::new(revert.1)),
    };
    let engine = Engine::new(agent.store.clone(), Arc::new(panics), Arc::new(NoProbe));
    let accept = Accept {
        plan,
        request: anonymous(),
        planned_for: agent.store.server(SERVER),
        now_ms: 1,
    };
    let Accepted::New(operation) = engine.submit(accept).await.unwrap() else {
        panic!("it was not asked for before");
    };
    let view = engine.wait(operation.id, PATIENCE).await.unwrap().unwrap();
    let after = host.look(&agent).await;
    Outcome {
        operation: OperationRecord::clone(&view.operation),
        agent,
        before,
        after,
        _host: host,
    }
}

const NEVER: (&str, usize) = ("", 0);

#[tokio::test]
async fn a_step_that_panics_once_is_done_all_the_same() {
    let outcome = rescue(("DefineDomain", 1), NEVER).await;
    assert_eq!(outcome.operation.state, OperationState::Done);
    assert_eq!(outcome.agent.record().vm_state, VmState::Rescued);
}

#[tokio::test]
async fn an_operation_that_always_panics_is_taken_back() {
    let outcome = rescue(("DefineDomain", ALWAYS), NEVER).await;
    assert_eq!(outcome.operation.state, OperationState::Failed);
    assert_eq!(outcome.operation.error.unwrap().reason, Reason::Internal);
    assert_eq!(
        outcome.before.differences(&outcome.after),
        Vec::<String>::new()
    );
    assert_eq!(outcome.agent.record().operation, None);
}

#[tokio::test]
async fn a_roll_back_that_panics_once_is_done_all_the_same() {
    let outcome = rescue(("StartDomain", ALWAYS), ("DefineDomain", 1)).await;
    assert_eq!(outcome.operation.state, OperationState::Failed);
    assert_eq!(
        outcome.before.differences(&outcome.after),
        Vec::<String>::new()
    );
}

#[tokio::test]
async fn a_roll_back_that_always_panics_ends_in_an_error_that_says_so() {
    let outcome = rescue(("DefineDomain", ALWAYS), ("DefineDomain", ALWAYS)).await;
    assert_eq!(outcome.operation.state, OperationState::Failed);
    let error = outcome.operation.error.unwrap();
    assert_eq!(error.reason, Reason::RollbackFailed);
    let record = outcome.agent.record();
    assert_eq!((record.vm_state, record.operation), (VmState::Error, None));
    assert_eq!(record.fault.clone().unwrap().step, "DefineDomain");
}

#[tokio::test]
async fn a_clean_up_that_always_panics_is_left_and_said() {
    let unrescue = Action::Unrescue(unrescue());
    let outcome = carry_out(unrescue, ("RemoveFolder", ALWAYS), NEVER).await;
    assert_eq!(outcome.operation.state, OperationState::Done);
    let warnings: Vec<_> = outcome.operation.warnings.iter().map(|w| w.name).collect();
    assert_eq!(warnings, [WarningName::LeftBehind]);
    let record = outcome.agent.record();
    assert_eq!((record.vm_state, record.operation), (VmState::Active, None));
}
