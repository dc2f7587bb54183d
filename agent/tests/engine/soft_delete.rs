// SPDX-License-Identifier: Apache-2.0
//! Soft delete: a server waits to be removed, and can be restored meanwhile.

use std::{sync::Arc, time::Duration};

use salvor_agent::{
    core::{
        action::{Action, Verb},
        reason::Reason,
        state::{PowerState, VmState},
    },
    engine::NoProbe,
    hypervisor::Hypervisor as _,
};

use crate::{
    gate::until,
    host::{AT_ONCE, Agent, Host, NEW, ON, SERVER, create, rescue_action},
    observe::{Watched, observe},
};

async fn with_interval(host: &Host, reclaim_ms: u64) -> Agent {
    let mut settings = host.settings();
    settings.reclaim_ms = reclaim_ms;
    Agent::start(host, settings, Arc::new(NoProbe)).await
}

async fn made(host: &Host, reclaim_ms: u64) -> Agent {
    let agent = with_interval(host, reclaim_ms).await;
    host.add_images(&agent.store).await;
    agent.succeed(NEW, create(false)).await;
    agent
}

const HOUR: u64 = 3_600_000;

#[tokio::test]
async fn a_deleted_server_is_off_and_comes_back_as_it_was() {
    let host = Host::new();
    let agent = made(&host, HOUR).await;
    let before = host.look(&agent).await;
    let deleted = agent.carry_out(ON, Action::Delete).await;
    assert_eq!(deleted.verb, Verb::SoftDelete);
    assert_eq!(deleted.verb.action_name(), "delete");
    let record = agent.record();
    assert_eq!(record.vm_state, VmState::SoftDeleted);
    assert_eq!(record.power.state, PowerState::Shutdown);
    let deletion = record.deletion.clone().unwrap();
    assert_eq!(
        (deletion.vm_state, deletion.power),
        (VmState::Active, PowerState::Running)
    );
    assert_eq!(deletion.reclaim_at_ms - deletion.at_ms, 3_600_000);
    let seen = host.look(&agent).await;
    assert_eq!(
        (&seen.inactive, &seen.files),
        (&before.inactive, &before.files)
    );
    // It is neither deleted again nor worked on by chance.
    for action in [
        Action::Delete,
        Action::Start,
        Action::Stop(AT_ONCE),
        rescue_action(),
    ] {
        let refusal = agent.submit(ON, action).await.unwrap_err();
        assert_eq!(refusal.reason, Reason::InvalidState);
        assert!(refusal.message.contains("restore"), "{refusal}");
    }
    agent.succeed(ON, Action::Restore).await;
    let mut seen = host.look(&agent).await;
    // What inferred it does not say why.
    seen.live.clone_from(&before.live);
    assert_eq!(seen.differences(&before), Vec::<String>::new());
}

#[tokio::test]
async fn a_server_that_was_off_stays_off_and_one_in_error_keeps_its_fault() {
    let host = Host::new();
    let agent = made(&host, HOUR).await;
    agent.succeed(ON, Action::Stop(AT_ONCE)).await;
    agent.succeed(ON, Action::Delete).await;
    agent.succeed(ON, Action::Restore).await;
    assert_eq!(agent.record().vm_state, VmState::Stopped);
    assert!(
        !agent
            .fake
            .domain(SERVER)
            .await
            .unwrap()
            .unwrap()
            .power
            .is_on()
    );
    let reset = Action::ResetState(salvor_agent::core::action::ResetTo::Error);
    agent.succeed(ON, reset).await;
    let fault = agent.record().fault.clone();
    agent.succeed(ON, Action::Delete).await;
    assert_eq!(agent.record().fault, None);
    agent.succeed(ON, Action::Restore).await;
    assert_eq!(agent.record().vm_state, VmState::Error);
    assert_eq!(agent.record().fault, fault);
    let refusal = agent.submit(ON, Action::Restore).await.unwrap_err();
    assert_eq!(refusal.reason, Reason::InvalidState);
}

#[tokio::test]
async fn a_reset_takes_a_server_off_its_way_out() {
    let host = Host::new();
    let agent = made(&host, HOUR).await;
    agent.succeed(ON, Action::Delete).await;
    let reset = Action::ResetState(salvor_agent::core::action::ResetTo::Active);
    agent.succeed(ON, reset).await;
    assert_eq!(agent.record().vm_state, VmState::Active);
    assert_eq!(agent.record().deletion, None);
}

#[tokio::test]
async fn force_delete_removes_at_once_soft_deleted_or_not() {
    for soft_first in [true, false] {
        let host = Host::new();
        let agent = made(&host, HOUR).await;
        if soft_first {
            agent.succeed(ON, Action::Delete).await;
        }
        agent.succeed(ON, Action::ForceDelete).await;
        assert_eq!(agent.store.server(SERVER), None);
        assert_eq!(agent.fake.domain(SERVER).await.unwrap(), None);
        assert!(!std::fs::exists(host.layout().server(SERVER)).unwrap());
    }
}

#[tokio::test]
async fn without_an_interval_a_delete_removes_at_once() {
    let host = Host::new();
    let agent = made(&host, 0).await;
    let deleted = agent.carry_out(ON, Action::Delete).await;
    assert_eq!(deleted.verb, Verb::Delete);
    assert_eq!(agent.store.server(SERVER), None);
}

#[tokio::test]
async fn when_its_time_is_over_the_agent_removes_it() {
    let watched = Watched::with(|settings| settings.reclaim_ms = 400).await;
    watched.agent.succeed(ON, Action::Delete).await;
    until("it is reclaimed", || {
        watched.agent.store.server(SERVER).is_none()
    })
    .await;
    let removed = watched.operations(Verb::ForceDelete).await;
    assert_eq!(removed, 1);
    watched.end().await;
}

#[tokio::test]
async fn the_time_goes_on_while_the_agent_is_away() {
    let host = Host::new();
    let agent = made(&host, 300).await;
    agent.succeed(ON, Action::Delete).await;
    let end = agent.record().deletion.clone().unwrap().reclaim_at_ms;
    drop(agent);
    // The interval of the next agent is another one: what was said when it was deleted holds.
    let agent = with_interval(&host, HOUR).await;
    assert_eq!(agent.record().deletion.clone().unwrap().reclaim_at_ms, end);
    let (stop, observer) = observe(&agent);
    until("it is reclaimed", || agent.store.server(SERVER).is_none()).await;
    stop.send_replace(true);
    tokio::time::timeout(Duration::from_secs(10), observer)
        .await
        .unwrap()
        .unwrap();
}
