// SPDX-License-Identifier: Apache-2.0
//! What somebody else does to a domain while it is rescued, or while it is being switched.

use std::sync::Arc;

use salvor_agent::{
    core::{
        action::Action,
        operation::OperationState,
        reason::Reason,
        state::{PowerState, VmState},
    },
    engine::{NoProbe, Probe},
    hypervisor::{Boot, Hypervisor as _},
};

use crate::host::{AT_ONCE, Agent, Host, NEW, ON, SERVER, adopt, rescue_action, unrescue};

/// An agent with an adopted server that runs.
async fn with_server(host: &Host, probe: Arc<dyn Probe>) -> Agent {
    let agent = host.agent(probe).await;
    host.add_images(&agent.store).await;
    host.fake.define(&host.foreign_domain(false)).await.unwrap();
    host.fake.start(SERVER, Boot::Resume).await.unwrap();
    agent.succeed(NEW, adopt()).await;
    agent
}

#[tokio::test]
async fn memory_saved_of_a_rescue_does_not_come_back_as_the_server() {
    let host = Host::new();
    let agent = with_server(&host, Arc::new(NoProbe)).await;
    let original = host.look(&agent).await;
    agent.succeed(ON, rescue_action()).await;
    host.fake.managed_save(SERVER);
    agent.succeed(ON, Action::Unrescue(unrescue())).await;
    let seen = host.look(&agent).await;
    assert_eq!(seen.live, original.live);
    assert_eq!(seen.inactive, original.inactive);
}

#[tokio::test]
async fn memory_saved_of_a_server_comes_back_when_it_is_started() {
    let host = Host::new();
    let agent = with_server(&host, Arc::new(NoProbe)).await;
    host.fake.managed_save(SERVER);
    agent.succeed(ON, Action::Stop(AT_ONCE)).await;
    agent.succeed(ON, Action::Start).await;
    let status = host.fake.domain(SERVER).await.unwrap().unwrap();
    assert_eq!(status.reason, "restored");
}

#[tokio::test]
async fn a_start_that_brings_back_a_rescue_is_not_taken_for_the_server() {
    let host = Host::new();
    let agent = with_server(&host, Arc::new(NoProbe)).await;
    agent.succeed(ON, Action::Stop(AT_ONCE)).await;
    agent.succeed(ON, rescue_action()).await;
    host.fake.managed_save(SERVER);
    let mut back = unrescue();
    back.restore_power = true;
    agent.succeed(ON, Action::Unrescue(back)).await;
    let operation = agent.carry_out(ON, Action::Start).await;
    assert_eq!(operation.state, OperationState::Failed);
    assert_eq!(operation.error.unwrap().reason, Reason::LibvirtRefused);
    let seen = host.look(&agent).await;
    assert_eq!(seen.power, Some(PowerState::Shutdown));
    assert_eq!(seen.record.unwrap().vm_state, VmState::Stopped);
    agent.succeed(ON, Action::Start).await;
    assert_eq!(host.look(&agent).await.live, seen.inactive);
}
