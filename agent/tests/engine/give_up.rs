// SPDX-License-Identifier: Apache-2.0
//! Operations that hang: they can be given up, and the server is not stuck then.

use std::{sync::Arc, time::Duration};

use salvor_agent::{
    core::{
        action::{Action, ResetTo},
        operation::{OperationState, StepState},
        reason::Reason,
        state::VmState,
    },
    engine::NoProbe,
    hypervisor::Hypervisor as _,
    store::StoreError,
};
use uuid::Uuid;

use crate::{
    dispatch::with_server,
    gate::until,
    host::{AT_ONCE, Agent, Host, NEW, ON, SERVER, create, rescue_action},
};

const AT_LONGEST: Duration = Duration::from_millis(200);

/// Begins an action and waits until this call of it hangs.
async fn hangs(agent: &Agent, action: Action, call: &'static str) -> Uuid {
    agent.fake.hang(Some(call));
    let id = agent.submit(ON, action).await.unwrap().operation.id;
    until("it hangs", || agent.fake.hanging() > 0).await;
    id
}

#[tokio::test]
async fn what_hangs_is_given_up_and_the_fault_says_which_step_and_what_is_left() {
    let host = Host::new();
    let agent = with_server(&host, Arc::new(NoProbe)).await;
    let id = hangs(&agent, Action::Stop(AT_ONCE), "destroy").await;
    let view = agent.engine.give_up(id, AT_LONGEST).await.unwrap().unwrap();
    let ended = view.operation;
    assert_eq!(ended.state, OperationState::Failed);
    assert!(ended.cancel_requested, "it was cancelled first");
    assert_eq!(ended.error.as_ref().unwrap().reason, Reason::Abandoned);
    assert_eq!(ended.steps[0].state, StepState::Failed);
    let record = agent.record();
    assert_eq!(record.vm_state, VmState::Error);
    assert_eq!((record.operation, record.task_state), (None, None));
    let fault = record.fault.clone().unwrap();
    assert_eq!(
        (fault.reason, fault.step.as_str()),
        (Reason::Abandoned, "PowerOff")
    );
    assert_eq!(fault.left_behind, ["power the guest off at once"]);
    assert!(fault.message.contains("did not end"), "{}", fault.message);
    assert_eq!(agent.engine.under_way(), 0);
    // Nothing goes on behind our back, and the server can be worked on.
    agent.fake.hang(None);
    until("it is back", || agent.fake.hanging() == 0).await;
    agent.succeed(ON, Action::Stop(AT_ONCE)).await;
    assert_eq!(agent.record().vm_state, VmState::Stopped);
}

#[tokio::test]
async fn what_ends_in_time_when_it_is_cancelled_is_as_before() {
    let host = Host::new();
    let agent = with_server(&host, Arc::new(NoProbe)).await;
    let id = hangs(&agent, rescue_action(), "define").await;
    let engine = agent.engine.clone();
    let given_up = tokio::spawn(async move { engine.give_up(id, Duration::from_secs(30)).await });
    until("it is cancelled", || {
        let view = agent.engine.watch(id);
        view.is_none_or(|view| view.borrow().operation.cancel_requested)
    })
    .await;
    agent.fake.hang(None);
    let view = given_up.await.unwrap().unwrap().unwrap();
    assert_eq!(view.operation.state, OperationState::Cancelled);
    assert_eq!(agent.record().vm_state, VmState::Active);
}

#[tokio::test]
async fn a_hanging_roll_back_is_given_up_as_well_and_leaves_a_way_back() {
    let host = Host::new();
    let agent = with_server(&host, Arc::new(NoProbe)).await;
    let original = host.look(&agent).await;
    agent.fake.hang(Some("start"));
    let id = agent
        .submit(ON, rescue_action())
        .await
        .unwrap()
        .operation
        .id;
    until("it hangs", || agent.fake.hanging() > 0).await;
    let view = agent.engine.give_up(id, AT_LONGEST).await.unwrap().unwrap();
    assert_eq!(view.operation.state, OperationState::Failed);
    let record = agent.record();
    assert_eq!(record.vm_state, VmState::Error);
    assert!(
        record.rescue.is_some(),
        "the definition was saved, so unrescue takes it"
    );
    agent.fake.hang(None);
    until("it is back", || agent.fake.hanging() == 0).await;
    agent
        .succeed(ON, Action::Unrescue(crate::host::unrescue()))
        .await;
    assert_eq!(host.look(&agent).await.inactive, original.inactive);
}

#[tokio::test]
async fn what_only_cleans_up_has_succeeded_and_says_what_is_left() {
    let host = Host::new();
    let agent = with_server(&host, Arc::new(NoProbe)).await;
    let missing = agent.engine.give_up(Uuid::new_v4(), AT_LONGEST).await;
    let reason = |error| match error {
        Err(StoreError::Refused(refusal)) => refusal.reason,
        other => panic!("{other:?}"),
    };
    assert_eq!(reason(missing.map(|_| ())), Reason::OperationNotFound);
    let done = agent.carry_out(ON, Action::Stop(AT_ONCE)).await;
    let ended = agent.engine.give_up(done.id, AT_LONGEST).await;
    assert_eq!(reason(ended.map(|_| ())), Reason::NotCancellable);
}

#[tokio::test]
async fn a_create_that_is_given_up_leaves_a_server_that_can_be_deleted() {
    let host = Host::new();
    let agent = host.agent(Arc::new(NoProbe)).await;
    host.add_images(&agent.store).await;
    agent.fake.hang(Some("define"));
    let id = agent.submit(NEW, create(false)).await.unwrap().operation.id;
    until("it hangs", || agent.fake.hanging() > 0).await;
    agent.engine.give_up(id, AT_LONGEST).await.unwrap();
    assert_eq!(agent.record().vm_state, VmState::Error);
    agent.fake.hang(None);
    until("it is back", || agent.fake.hanging() == 0).await;
    agent.succeed(ON, Action::Delete).await;
    assert_eq!(agent.store.server(SERVER), None);
    assert_eq!(agent.fake.domain(SERVER).await.unwrap(), None);
    assert!(!std::fs::exists(host.layout().server(SERVER)).unwrap());
}

#[tokio::test]
async fn a_reset_of_the_state_overtakes_everything_but_does_not_edit_it_alone() {
    let host = Host::new();
    let agent = with_server(&host, Arc::new(NoProbe)).await;
    let id = hangs(&agent, rescue_action(), "define").await;
    let dispatcher = agent.dispatcher.clone();
    let reset = tokio::spawn(async move {
        let reset = Action::ResetState(ResetTo::Active);
        dispatcher.submit(ON, reset, crate::host::anonymous()).await
    });
    until("it is cancelled", || {
        let view = agent.engine.watch(id);
        view.is_none_or(|view| view.borrow().operation.cancel_requested)
    })
    .await;
    assert_eq!(
        agent.record().operation,
        Some(id),
        "its lane is not taken from it"
    );
    agent.fake.hang(None);
    let reset = reset.await.unwrap().unwrap().operation;
    assert_eq!(reset.state, OperationState::Done);
    assert_eq!(agent.ended(id).await.state, OperationState::Cancelled);
    assert_eq!(agent.record().vm_state, VmState::Active);
}
