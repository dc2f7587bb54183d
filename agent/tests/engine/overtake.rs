// SPDX-License-Identifier: Apache-2.0
//! A delete that overtakes: what it is to remove is not repaired first, and no guest is started only
//! to be ended.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use salvor_agent::{
    core::{
        action::{Action, Shutdown},
        operation::OperationState,
        plan::Plan,
        reason::Reason,
        state::{PowerState, VmState},
    },
    engine::{Event, NoProbe, Point, Probe},
    hypervisor::Hypervisor as _,
};
use tokio::task::JoinHandle;
use uuid::Uuid;

use crate::{
    dispatch::with_server,
    gate::until,
    host::{Agent, Host, ON, PATIENCE, SERVER, anonymous, rescue_action},
};

/// Far longer than a delete may take.
const LONG: Shutdown = Shutdown {
    timeout_ms: 60_000,
    retry_ms: 10_000,
};

/// A destroy takes no time here; the rest is for a slow machine. Less than the ten seconds for which a
/// call to a frozen guest hangs, and for which one is watched that was asked to shut down.
const SOON: Duration = Duration::from_secs(8);

/// Asks for a delete, and waits until what is under way knows.
async fn overtake(agent: &Agent, operation: Uuid) -> JoinHandle<OperationState> {
    let (dispatcher, engine) = (agent.dispatcher.clone(), agent.engine.clone());
    let delete = tokio::spawn(async move {
        let submitted = dispatcher.submit(ON, Action::Delete, anonymous()).await;
        let id = submitted.unwrap().operation.id;
        let view = engine.wait(id, PATIENCE).await.unwrap().unwrap();
        view.operation.state
    });
    until("the delete has asked", || {
        let view = agent.engine.watch(operation);
        view.is_none_or(|view| view.borrow().operation.server_goes)
    })
    .await;
    delete
}

fn count(agent: &Agent, name: &str) -> usize {
    let calls = agent.fake.calls();
    let named = |call: &&String| call.split(' ').next() == Some(name);
    calls.iter().filter(named).count()
}

/// Waits until the step of this kind is under way.
async fn at(agent: &Agent, operation: Uuid, kind: &str) {
    until(kind, || {
        let view = agent.engine.watch(operation).unwrap();
        let view = view.borrow();
        let step = view.operation.steps.iter().find(|step| step.kind == kind);
        step.is_some_and(|step| step.started_at_ms.is_some())
    })
    .await;
}

#[tokio::test]
async fn a_rescue_that_a_delete_overtakes_is_taken_back_without_starting_a_guest() {
    let host = Host::new();
    let agent = with_server(&host, Arc::new(NoProbe)).await;
    agent.fake.hang(Some("define"));
    agent.fake.clear_calls();
    let rescue = agent.submit(ON, rescue_action()).await.unwrap().operation;
    at(&agent, rescue.id, "DefineDomain").await;
    let delete = overtake(&agent, rescue.id).await;
    agent.fake.hang(None);
    assert_eq!(delete.await.unwrap(), OperationState::Done);
    let rescue = agent.ended(rescue.id).await;
    assert_eq!(rescue.state, OperationState::Cancelled);
    let error = rescue.error.unwrap();
    assert_eq!(error.reason, Reason::Cancelled);
    assert!(error.message.contains("deleted"), "{error}");
    assert_eq!(count(&agent, "start"), 0);
    assert_eq!(agent.store.server(SERVER), None);
    assert_eq!(agent.fake.domain(SERVER).await.unwrap(), None);
    let folder = host.layout().server(SERVER);
    assert!(!std::fs::exists(folder).unwrap());
}

#[tokio::test]
async fn a_delete_does_not_wait_for_a_frozen_guest_that_is_being_asked() {
    let host = Host::new();
    let agent = with_server(&host, Arc::new(NoProbe)).await;
    agent.fake.hang(Some("shutdown"));
    let stop = agent.submit(ON, Action::Stop(LONG)).await.unwrap();
    at(&agent, stop.operation.id, "PowerOff").await;
    let begun = Instant::now();
    let delete = overtake(&agent, stop.operation.id).await;
    assert_eq!(delete.await.unwrap(), OperationState::Done);
    assert!(begun.elapsed() < SOON, "{:?}", begun.elapsed());
    assert_eq!(agent.store.server(SERVER), None);
}

#[tokio::test]
async fn a_delete_ends_the_watch_over_a_guest_whose_stop_was_cancelled() {
    let host = Host::new();
    let agent = with_server(&host, Arc::new(NoProbe)).await;
    agent.fake.guest_ignores_acpi(SERVER);
    let stop = agent.submit(ON, Action::Stop(LONG)).await.unwrap();
    let stop = stop.operation.id;
    until("it was asked", || count(&agent, "shutdown") > 0).await;
    agent.engine.cancel(stop).await.unwrap();
    until("it is taken back", || {
        let view = agent.engine.watch(stop).unwrap();
        view.borrow().operation.state == OperationState::Reverting
    })
    .await;
    let begun = Instant::now();
    agent.succeed(ON, Action::Delete).await;
    assert!(begun.elapsed() < SOON, "{:?}", begun.elapsed());
    let stop = agent.ended(stop).await;
    assert_eq!(stop.state, OperationState::Cancelled);
    assert!(stop.cancel_requested, "the step was as quick as the note");
}

/// The agent dies when it begins to take anything back.
struct DiesInRevert;

impl Probe for DiesInRevert {
    fn at(&self, _plan: &Plan, point: Point) -> Event {
        match point {
            Point::BeforeRevert(_) => Event::Die,
            _ => Event::Go,
        }
    }
}

#[tokio::test]
async fn an_agent_that_dies_in_between_starts_no_guest_either() {
    let host = Host::new();
    let first = with_server(&host, Arc::new(DiesInRevert)).await;
    let original = host.look(&first).await;
    first.fake.hang(Some("define"));
    first.fake.clear_calls();
    let rescue = first.submit(ON, rescue_action()).await.unwrap().operation;
    at(&first, rescue.id, "DefineDomain").await;
    let delete = overtake(&first, rescue.id).await;
    first.fake.hang(None);
    until("it dies", || first.engine.watch(rescue.id).is_none()).await;
    delete.abort();
    drop(first);

    let agent = host.agent(Arc::new(NoProbe)).await;
    let rescue = agent.ended(rescue.id).await;
    assert_eq!(rescue.state, OperationState::Cancelled);
    assert_eq!(count(&agent, "start"), 0);
    // All but the guest is as before, and the server can be used if nobody deletes it.
    let seen = host.look(&agent).await;
    assert_eq!(seen.power, Some(PowerState::Shutdown));
    assert_eq!(
        (seen.inactive, seen.files),
        (original.inactive, original.files)
    );
    assert_eq!(agent.record().vm_state, VmState::Active);
    agent.succeed(ON, Action::Delete).await;
}
