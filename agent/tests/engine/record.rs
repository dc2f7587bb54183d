// SPDX-License-Identifier: Apache-2.0
//! What changes the record alone: it has ended when it is accepted, goes through beside what is under way,
//! and is lost to nothing that ends later.

use std::sync::Arc;

use salvor_agent::{
    core::{
        action::{Action, LockArgs, ResetTo, Verb},
        caller::{Role, Who},
        change::FieldChange,
        operation::OperationState,
        reason::Reason,
        record::LockOwner,
        state::{PowerState, VmState},
    },
    engine::{NoProbe, Point},
    hypervisor::Hypervisor as _,
    store::{Accept, Change, Request, StoreError},
};

use crate::{
    dispatch::with_server,
    gate::{Gate, until},
    host::{AT_ONCE, Agent, Host, NEW, ON, SERVER, anonymous, create, rescue_action},
    observe::Watched,
};

fn lock(expires_in_ms: Option<u64>) -> Action {
    Action::Lock(LockArgs {
        reason: Some("audit".to_owned()),
        expires_in_ms,
    })
}

fn unlock() -> Action {
    Action::Unlock {
        only_expired: false,
    }
}

fn rename(name: &str) -> Action {
    Action::Update(vec![FieldChange::Name(name.to_owned())])
}

fn of(role: Role, project: &str) -> Request {
    Request {
        who: Who {
            role,
            user: "u".to_owned(),
            project: project.to_owned(),
        },
        ..anonymous()
    }
}

/// A server that was made for project `p`.
async fn of_a_project(host: &Host) -> Agent {
    let agent = host.agent(Arc::new(NoProbe)).await;
    host.add_images(&agent.store).await;
    let made = agent
        .dispatcher
        .submit(NEW, create(false), of(Role::Member, "p"))
        .await
        .unwrap();
    agent.ended(made.operation.id).await;
    agent
}

#[tokio::test]
async fn a_server_belongs_to_whom_it_was_made_for_and_operations_say_for_whom_they_were() {
    let host = Host::new();
    let agent = of_a_project(&host).await;
    let owner = agent.record().owner.clone();
    assert_eq!(
        (owner.project_id.as_str(), owner.user_id.as_str()),
        ("p", "u")
    );
    let (_, made) = agent
        .store
        .operations(Some(SERVER), i64::MAX, 1)
        .await
        .unwrap()
        .remove(0);
    assert_eq!((made.project.as_str(), made.user.as_str()), ("p", "u"));
    let refusal = agent
        .dispatcher
        .submit(ON, Action::Stop(AT_ONCE), of(Role::Member, "q"))
        .await
        .unwrap_err();
    assert_eq!(refusal.reason, Reason::PermissionDenied);
}

#[tokio::test]
async fn a_lock_keeps_members_out_and_lets_the_administrator_pass() {
    let host = Host::new();
    let agent = of_a_project(&host).await;
    let member = || of(Role::Member, "p");
    let submit = async |action, request| agent.dispatcher.submit(ON, action, request).await;
    submit(lock(None), member()).await.unwrap();
    assert_eq!(agent.record().lock.as_ref().unwrap().by, LockOwner::Owner);
    for action in [
        Action::Stop(AT_ONCE),
        Action::Delete,
        rename("db"),
        rescue_action(),
    ] {
        let refusal = submit(action, member()).await.unwrap_err();
        assert_eq!(refusal.reason, Reason::ServerLocked);
        assert!(refusal.message.contains("audit"), "{refusal}");
    }
    agent.succeed(ON, Action::Stop(AT_ONCE)).await;
    // The administrator takes it over, and then its owner can neither change nor unlock it.
    submit(lock(None), anonymous()).await.unwrap();
    assert_eq!(agent.record().lock.as_ref().unwrap().by, LockOwner::Admin);
    let taken = agent.record().lock.clone();
    submit(lock(None), member()).await.unwrap();
    assert_eq!(agent.record().lock, taken, "a success that changes nothing");
    let refusal = submit(unlock(), member()).await.unwrap_err();
    assert_eq!(refusal.reason, Reason::PermissionDenied);
    submit(unlock(), anonymous()).await.unwrap();
    assert_eq!(agent.record().lock, None);
    submit(Action::Start, member()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_changes_the_record_alone_goes_through_beside_an_operation_and_stays() {
    let host = Host::new();
    let gate = Gate::new(Verb::Stop, Point::BeforeCommit);
    let agent = with_server(&host, Arc::clone(&gate) as _).await;
    let stop = agent.submit(ON, Action::Stop(AT_ONCE)).await.unwrap();
    gate.reached().await;
    for action in [lock(None), rename("db")] {
        let done = agent.submit(ON, action).await.unwrap().operation;
        assert_eq!(done.state, OperationState::Done);
        assert!(done.ended_at_ms.is_some() && done.steps.is_empty());
        let record = agent.record();
        assert_eq!(
            record.operation,
            Some(stop.operation.id),
            "it keeps its lane"
        );
        assert_eq!(record.operation_verb, Some(Verb::Stop));
        assert!(record.task_state.is_some());
    }
    gate.open();
    let ended = agent.ended(stop.operation.id).await;
    assert_eq!(ended.state, OperationState::Done);
    let record = agent.record();
    assert_eq!(
        (record.name.as_str(), record.vm_state),
        ("db", VmState::Stopped)
    );
    assert!(record.lock.is_some() && record.operation.is_none());
}

#[tokio::test]
async fn a_plan_without_steps_is_one_transaction_with_its_events() {
    let host = Host::new();
    let agent = with_server(&host, Arc::new(NoProbe)).await;
    let first = *agent.store.revision().borrow();
    let request = Request {
        id: Some("once".to_owned()),
        ..anonymous()
    };
    let submit = || agent.dispatcher.submit(ON, rename("db"), request.clone());
    let done = submit().await.unwrap();
    let events = agent.store.events_after(first, 100).await.unwrap().events;
    let [server, operation] = events.as_slice() else {
        panic!("{events:?}");
    };
    assert!(matches!(&server.change, Change::Server(record) if record.name == "db"));
    assert!(
        matches!(&operation.change, Change::Operation(record) if record.state == OperationState::Done)
    );
    let again = submit().await.unwrap();
    assert_eq!(again.operation, done.operation);
    assert!(again.plan.is_none());
    assert_eq!(agent.engine.under_way(), 0);
    // What is so already is no news but that it was asked for.
    let second = *agent.store.revision().borrow();
    agent.succeed(ON, rename("db")).await;
    assert_eq!(*agent.store.revision().borrow(), second + 1);
}

#[tokio::test]
async fn a_lock_that_came_while_an_action_was_planned_is_not_passed() {
    let host = Host::new();
    let agent = with_server(&host, Arc::new(NoProbe)).await;
    let planned_for = agent.store.server(SERVER);
    let plans = [
        agent.plan(ON, &Action::Stop(AT_ONCE)).await,
        agent.plan(ON, &rename("db")).await,
    ];
    agent.succeed(ON, lock(None)).await;
    for plan in plans {
        let accept = Accept {
            plan,
            request: anonymous(),
            planned_for: planned_for.clone(),
            now_ms: 1,
        };
        let Err(StoreError::Refused(refusal)) = agent.engine.submit(accept).await else {
            panic!("it is refused");
        };
        assert_eq!(refusal.reason, Reason::ServerBusy);
    }
}

#[tokio::test]
async fn a_lock_whose_time_is_over_holds_no_longer_and_is_taken_off() {
    let watched = Watched::with(|_| {}).await;
    let agent = &watched.agent;
    agent.succeed(ON, lock(Some(150))).await;
    assert!(agent.record().lock.is_some());
    until("it is taken off", || agent.record().lock.is_none()).await;
    assert_eq!(watched.operations(Verb::Unlock).await, 1);
    // The next one has its own time.
    agent.succeed(ON, lock(Some(150))).await;
    until("it is taken off", || agent.record().lock.is_none()).await;
    agent.succeed(ON, lock(None)).await;
    let late = Action::Unlock { only_expired: true };
    agent.succeed(ON, late).await;
    assert!(agent.record().lock.is_some(), "a look that is too old");
    watched.end().await;
}

#[tokio::test]
async fn the_servers_own_time_to_shut_down_comes_before_the_configured_one() {
    let host = Host::new();
    let agent = with_server(&host, Arc::new(NoProbe)).await;
    let settings = agent.dispatcher.settings().clone();
    assert_eq!(settings.shutdown_of(&agent.record()), settings.shutdown);
    let update = Action::Update(vec![FieldChange::ShutdownTimeout(Some(7_000))]);
    agent.succeed(ON, update).await;
    let own = settings.shutdown_of(&agent.record());
    assert_eq!(
        (own.timeout_ms, own.retry_ms),
        (7_000, settings.shutdown.retry_ms)
    );
}

#[tokio::test]
async fn a_reset_says_what_the_host_shows_and_changes_nothing_there() {
    let host = Host::new();
    let agent = with_server(&host, Arc::new(NoProbe)).await;
    host.fake.guest_powers_off(SERVER);
    std::fs::remove_file(host.outside().join("root.raw")).unwrap();
    agent.fake.clear_calls();
    let done = agent
        .carry_out(ON, Action::ResetState(ResetTo::Error))
        .await;
    let shown = done.host.clone().unwrap();
    assert_eq!((shown.power, shown.defined), (PowerState::Shutdown, true));
    assert!(shown.missing_disks.contains_key("vda"), "{shown}");
    assert!(!shown.rescue_domain && shown.unknown.is_empty());
    let record = agent.record();
    assert_eq!(record.vm_state, VmState::Error);
    assert_eq!(record.power.state, PowerState::Shutdown);
    let fault = record.fault.clone().unwrap();
    assert_eq!(fault.reason, Reason::StateReset);
    assert!(fault.message.contains("root.raw"), "{}", fault.message);
    agent.succeed(ON, Action::ResetState(ResetTo::Active)).await;
    let record = agent.record();
    assert_eq!((record.vm_state, &record.fault), (VmState::Active, &None));
    let changes = ["define ", "start ", "destroy ", "shutdown ", "undefine "];
    let calls = agent.fake.calls();
    let changed = |call: &&String| changes.iter().any(|name| call.starts_with(name));
    assert_eq!(calls.iter().find(changed), None);
}

#[tokio::test]
async fn a_reset_works_while_the_domain_cannot_be_looked_at_and_says_so() {
    let host = Host::new();
    let agent = with_server(&host, Arc::new(NoProbe)).await;
    agent
        .fake
        .set_link(salvor_agent::hypervisor::LinkState::Down {
            reason: "Connection refused".to_owned(),
        });
    let done = agent
        .carry_out(ON, Action::ResetState(ResetTo::Error))
        .await;
    let shown = done.host.unwrap();
    assert_eq!(shown.power, PowerState::Unknown);
    assert!(!shown.unknown.is_empty(), "{shown}");
    assert_eq!(agent.record().vm_state, VmState::Error);
}

#[tokio::test]
async fn a_reset_to_active_keeps_the_way_back_of_a_rescue() {
    let host = Host::new();
    let agent = with_server(&host, Arc::new(NoProbe)).await;
    let original = host.look(&agent).await;
    agent.succeed(ON, rescue_action()).await;
    for (to, becomes) in [
        (ResetTo::Error, VmState::Error),
        (ResetTo::Active, VmState::Rescued),
    ] {
        let done = agent.carry_out(ON, Action::ResetState(to)).await;
        assert!(done.host.unwrap().rescue_domain);
        assert_eq!(agent.record().vm_state, becomes);
        assert!(agent.record().rescue.is_some());
    }
    let back = Action::Unrescue(crate::host::unrescue());
    agent.succeed(ON, back).await;
    let seen = host.look(&agent).await;
    assert_eq!((seen.inactive, seen.saved), (original.inactive, None));
    assert!(
        agent
            .fake
            .domain(SERVER)
            .await
            .unwrap()
            .unwrap()
            .power
            .is_on()
    );
}
