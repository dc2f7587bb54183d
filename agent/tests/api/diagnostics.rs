// SPDX-License-Identifier: Apache-2.0
//! GetServerDiagnostics.

use std::time::Duration;

use salvor_agent::{
    core::state::PowerState,
    hypervisor::{HypervisorError, StuckCall},
};
use salvor_proto::v1;
use uuid::Uuid;

use crate::{console::server, harness::Agent};

async fn read(agent: &Agent, definitions: bool) -> v1::GetServerDiagnosticsResponse {
    let request = v1::GetServerDiagnosticsRequest {
        server: "web".to_owned(),
        definitions,
    };
    let answer = agent.servers().get_server_diagnostics(request).await;
    answer.unwrap().into_inner()
}

fn missing(answer: &v1::GetServerDiagnosticsResponse) -> Vec<(&str, &str)> {
    let missing = answer.missing.iter();
    missing
        .map(|missing| (missing.part.as_str(), missing.reason.as_str()))
        .collect()
}

#[tokio::test]
async fn everything_about_a_running_server_is_told() {
    let agent = Agent::start().await;
    let graphics = "<graphics type='vnc' passwd='s3cret'/>";
    let id = server(&agent, "web", graphics).await;
    agent.hypervisor.guest_agent(id, true);
    agent.hypervisor.disk_fails(id, "no space");
    agent
        .hypervisor
        .set_power(id, PowerState::Running, "unpaused");
    let call = |domain| StuckCall {
        call: "virDomainGetDiskErrors",
        domain,
        age: Duration::from_secs(60),
    };
    agent
        .hypervisor
        .set_stuck_calls(vec![call(Some(id)), call(Some(Uuid::new_v4())), call(None)]);
    let answer = read(&agent, false).await;
    assert_eq!(answer.server.as_ref().unwrap().id, id.to_string());
    let domain = answer.domain.as_ref().unwrap();
    assert_eq!(domain.power_state(), v1::PowerState::Running);
    let control = answer.control.as_ref().unwrap();
    assert_eq!(control.state, "occupied");
    assert_eq!(control.since.unwrap().seconds, 7);
    let counters = answer.counters.as_ref().unwrap();
    assert_eq!((counters.vcpus, counters.disks[0].read_requests), (2, 11));
    assert_eq!(counters.interfaces[0].sent_packets, 12);
    assert_eq!(answer.disk_errors[0].error, "no space");
    assert_eq!(answer.messages, ["tainted: a test"]);
    // Written by the guest.
    let guest = answer.guest_agent.as_ref().unwrap();
    assert_eq!(guest.hostname, "evil\\u{1b}[2Jhost");
    assert_eq!(answer.stuck_calls.len(), 1);
    assert_eq!(answer.operations.len(), 1);
    // The fake guest has no process.
    assert_eq!(missing(&answer), [("process", "DOMAIN_NOT_FOUND")]);
    assert!(answer.live_definition.is_empty() && answer.inactive_definition.is_empty());

    let answer = read(&agent, true).await;
    for definition in [&answer.live_definition, &answer.inactive_definition] {
        assert!(definition.contains("<name>web</name>"), "{definition}");
        assert!(!definition.contains("s3cret"), "{definition}");
    }
}

#[tokio::test]
async fn a_part_that_cannot_be_read_costs_only_itself() {
    let agent = Agent::start().await;
    let id = server(&agent, "web", "").await;
    agent.hypervisor.guest_agent(id, true);
    let late = HypervisorError::Deadline {
        call: "virDomainListGetStats",
        after: Duration::from_secs(4),
    };
    agent.hypervisor.fail_next("counters", late);
    let answer = read(&agent, false).await;
    assert_eq!(
        missing(&answer),
        [
            ("process", "DOMAIN_NOT_FOUND"),
            ("counters", "DEADLINE_EXCEEDED")
        ]
    );
    assert!(answer.control.is_some() && answer.guest_agent.is_some() && answer.counters.is_none());
    agent.hypervisor.guest_agent(id, false);
    let answer = read(&agent, false).await;
    assert_eq!(
        missing(&answer),
        [
            ("process", "DOMAIN_NOT_FOUND"),
            ("guest_agent", "GUEST_AGENT_UNAVAILABLE")
        ]
    );
}

#[tokio::test]
async fn what_a_server_that_is_off_does_not_have_is_not_missing() {
    let agent = Agent::start().await;
    let id = server(&agent, "web", "").await;
    agent.hypervisor.guest_powers_off(id);
    let answer = read(&agent, true).await;
    assert_eq!(missing(&answer), []);
    assert!(answer.control.is_none() && answer.counters.is_none() && answer.process.is_none());
    assert!(answer.live_definition.is_empty() && !answer.inactive_definition.is_empty());
}
