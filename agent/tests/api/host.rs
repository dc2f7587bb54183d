// SPDX-License-Identifier: Apache-2.0
//! HostService, and what the socket describes of itself.

use std::time::Duration;

use salvor_agent::hypervisor::{HypervisorError, LinkState, StuckCall};
use salvor_proto::v1;
use tonic::Code;

use crate::harness::{Agent, refusal};

async fn host(agent: &Agent) -> v1::Host {
    let answer = agent.host().get_host(v1::GetHostRequest {}).await.unwrap();
    answer.into_inner().host.unwrap()
}

#[tokio::test]
async fn the_host_is_told_also_while_libvirt_is_away() {
    let agent = Agent::start().await;
    agent.server("web").await;
    let up = host(&agent).await;
    assert!(up.libvirt.as_ref().unwrap().up);
    assert!(!up.libvirt_version.is_empty() && up.cpus > 0 && up.disk_total_bytes > 0);
    assert_eq!((up.servers, up.virt_type.as_str()), (1, "qemu"));
    assert_eq!(up.revision, *agent.store.revision().borrow());

    agent.hypervisor.set_stuck_calls(vec![StuckCall {
        call: "virDomainGetState",
        domain: None,
        age: Duration::from_secs(7),
    }]);
    agent.hypervisor.set_link(LinkState::Down {
        reason: "no route".to_owned(),
    });
    let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
    let down = loop {
        let down = host(&agent).await;
        if !down.libvirt.as_ref().unwrap().up {
            break down;
        }
        assert!(tokio::time::Instant::now() < deadline);
    };
    let link = down.libvirt.as_ref().unwrap();
    assert_eq!(
        (link.reason.as_str(), link.uri.as_str()),
        ("no route", "qemu:///system")
    );
    assert!(link.since.is_some());
    assert_eq!(
        (
            down.libvirt_version.as_str(),
            down.hypervisor_version.as_str()
        ),
        ("", "")
    );
    // What does not change is told as it was last known.
    assert_eq!((down.cpus, down.memory_mib), (up.cpus, up.memory_mib));
    assert_eq!(down.stuck_calls[0].age.unwrap().seconds, 7);
    assert_eq!(down.id, up.id);

    let domains = agent
        .host()
        .list_unmanaged_domains(v1::ListUnmanagedDomainsRequest {})
        .await;
    let (code, reason, _) = refusal(domains);
    assert_eq!(
        (code, reason.as_str()),
        (Code::Unavailable, "LIBVIRT_UNAVAILABLE")
    );
}

#[tokio::test]
async fn a_host_that_libvirt_does_not_describe_is_told_without_versions() {
    let agent = Agent::start().await;
    agent.hypervisor.fail_next(
        "host",
        HypervisorError::Refused {
            call: "virConnectGetVersion",
            message: "no".to_owned(),
        },
    );
    let told = host(&agent).await;
    assert_eq!(told.libvirt_version, "");
    assert!(!told.hostname.is_empty() && !told.arch.is_empty());
}

#[tokio::test]
async fn domains_that_are_no_servers_are_listed_by_name() {
    let agent = Agent::start().await;
    agent.server("mine").await;
    let (b, a) = (agent.domain("b").await, agent.domain("a").await);
    let answer = agent
        .host()
        .list_unmanaged_domains(v1::ListUnmanagedDomainsRequest {})
        .await
        .unwrap();
    let domains = answer.into_inner().domains;
    let ids: Vec<_> = domains.iter().map(|domain| domain.id.clone()).collect();
    assert_eq!(ids, [a.to_string(), b.to_string()]);
    assert!(domains.iter().all(|domain| domain.persistent));
    assert_eq!(domains[0].power_state, i32::from(v1::PowerState::Running));
}

#[tokio::test]
async fn the_api_describes_itself_in_both_versions_of_reflection() {
    use tonic_reflection::pb;
    let agent = Agent::start().await;
    let request = pb::v1::ServerReflectionRequest {
        message_request: Some(
            pb::v1::server_reflection_request::MessageRequest::ListServices(String::new()),
        ),
        ..Default::default()
    };
    let mut client = pb::v1::server_reflection_client::ServerReflectionClient::new(agent.channel());
    let mut stream = client
        .server_reflection_info(tokio_stream::once(request))
        .await
        .unwrap()
        .into_inner();
    let Some(pb::v1::server_reflection_response::MessageResponse::ListServicesResponse(list)) =
        stream.message().await.unwrap().unwrap().message_response
    else {
        panic!("no list")
    };
    let names: Vec<_> = list
        .service
        .iter()
        .map(|service| service.name.as_str())
        .collect();
    for service in [
        "salvor.compute.v1.ServerService",
        "salvor.compute.v1.WatchService",
        "salvor.compute.v1.ImageService",
        "salvor.compute.v1.HostService",
        "google.longrunning.Operations",
        "grpc.health.v1.Health",
    ] {
        assert!(names.contains(&service), "{service} is not in {names:?}");
    }
    let request = pb::v1alpha::ServerReflectionRequest {
        message_request: Some(
            pb::v1alpha::server_reflection_request::MessageRequest::ListServices(String::new()),
        ),
        ..Default::default()
    };
    let mut client =
        pb::v1alpha::server_reflection_client::ServerReflectionClient::new(agent.channel());
    assert!(
        client
            .server_reflection_info(tokio_stream::once(request))
            .await
            .is_ok()
    );
}
