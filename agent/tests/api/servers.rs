// SPDX-License-Identifier: Apache-2.0
//! ServerService.

use salvor_agent::{
    core::facts::Capacity,
    hypervisor::{Definition, Hypervisor as _, LinkState},
};
use salvor_proto::{
    google::longrunning::operation::Result as Outcome,
    v1::{self, plan_action_request::Action},
};
use tonic::{Code, Request};
use uuid::Uuid;

use crate::harness::{Agent, delete, metadata, refusal, rescue, start, stop};

fn create(image: &v1::Image) -> v1::CreateServerRequest {
    v1::CreateServerRequest {
        name: "Web 1".to_owned(),
        image: image.name.clone(),
        flavor: Some(v1::Flavor {
            vcpus: 1,
            memory_mib: 64,
            disk_gib: 1,
        }),
        metadata: (0..10)
            .map(|i| (format!("k{i}"), format!("v{i}")))
            .collect(),
        ..v1::CreateServerRequest::default()
    }
}

#[tokio::test]
async fn a_server_is_created_from_an_image_and_its_password_told_once() {
    let agent = Agent::start().await;
    let image = agent.image("cirros").await;
    let request = v1::CreateServerRequest {
        request_id: Uuid::new_v4().to_string(),
        ..create(&image)
    };
    let first = agent
        .servers()
        .create_server(request.clone())
        .await
        .unwrap()
        .into_inner();
    assert_eq!(first.admin_pass.len(), 12);
    assert_eq!(
        first.admin_pass_delivery,
        [i32::from(v1::AdminPassDelivery::ConfigDrive)]
    );
    agent.ended(first.operation.clone()).await;
    let server = agent.get(&first.server_id).await.unwrap();
    assert_eq!(
        (server.status.as_str(), server.hostname.as_str()),
        ("ACTIVE", "web-1")
    );
    assert_eq!(server.metadata.len(), 10);

    // The same again, also of another agent on the same store.
    let again = agent
        .servers()
        .create_server(request.clone())
        .await
        .unwrap()
        .into_inner();
    assert_eq!(again.server_id, first.server_id);
    assert_eq!(
        again.operation.unwrap().name,
        first.operation.as_ref().unwrap().name
    );
    assert!(again.admin_pass.is_empty() && again.admin_pass_delivery.is_empty());
    let agent = agent.restart().await;
    let again = agent
        .servers()
        .create_server(request.clone())
        .await
        .unwrap()
        .into_inner();
    assert_eq!(again.operation.unwrap().name, first.operation.unwrap().name);

    let other = v1::CreateServerRequest {
        name: "other".to_owned(),
        ..request
    };
    let (code, reason, _) = refusal(agent.servers().create_server(other).await);
    assert_eq!(
        (code, reason.as_str()),
        (Code::InvalidArgument, "REQUEST_ID_REUSED")
    );
}

#[tokio::test]
async fn what_a_create_names_must_be_there_and_not_be_taken() {
    let agent = Agent::start().await;
    let image = agent.image("cirros").await;
    let id = agent.server("web").await;
    let missing = v1::CreateServerRequest {
        image: "none".to_owned(),
        ..create(&image)
    };
    let (code, reason, details) = refusal(agent.servers().create_server(missing).await);
    assert_eq!(
        (code, reason.as_str()),
        (Code::InvalidArgument, "IMAGE_NOT_FOUND")
    );
    assert_eq!(details.resource_info().unwrap().resource_name, "none");
    let taken = v1::CreateServerRequest {
        server_id: id.to_string(),
        ..create(&image)
    };
    let (code, reason, _) = refusal(agent.servers().create_server(taken).await);
    assert_eq!(
        (code, reason.as_str()),
        (Code::AlreadyExists, "SERVER_EXISTS")
    );
    let mut nameless = create(&image);
    nameless.name.clear();
    let (code, _, details) = refusal(agent.servers().create_server(nameless).await);
    assert_eq!(code, Code::InvalidArgument);
    assert_eq!(
        details.bad_request().unwrap().field_violations[0].field,
        "name"
    );
}

#[tokio::test]
async fn what_a_create_needs_of_the_host_must_be_there_before_anything_is_made() {
    use v1::network_interface_spec::Connection;
    let agent = Agent::start().await;
    let image = agent.image("cirros").await;
    agent.hypervisor.set_capacity(Capacity {
        memory_mib: 2048,
        max_vcpus: Some(4),
        networks: Some([("up".to_owned(), true), ("down".to_owned(), false)].into()),
        interfaces: Some(["br0".to_owned()].into()),
    });
    let with = |vcpus, memory_mib, connection| v1::CreateServerRequest {
        flavor: Some(v1::Flavor {
            vcpus,
            memory_mib,
            disk_gib: 0,
        }),
        interfaces: [Connection::User(true), connection]
            .map(|connection| v1::NetworkInterfaceSpec {
                connection: Some(connection),
                ..v1::NetworkInterfaceSpec::default()
            })
            .into(),
        ..create(&image)
    };
    let bridge = |name: &str| Connection::Bridge(name.to_owned());
    let network = |name: &str| Connection::Network(name.to_owned());
    for (request, field) in [
        (with(1, 2049, bridge("br0")), "flavor.memory_mib"),
        (with(5, 64, bridge("br0")), "flavor.vcpus"),
        (with(1, 64, bridge("br1")), "interfaces[1].bridge"),
        (with(1, 64, network("none")), "interfaces[1].network"),
        (with(1, 64, network("down")), "interfaces[1].network"),
    ] {
        let (code, reason, details) = refusal(agent.servers().create_server(request.clone()).await);
        assert_eq!(
            (code, reason.as_str()),
            (Code::InvalidArgument, "INVALID_FIELD")
        );
        assert_eq!(
            details.bad_request().unwrap().field_violations[0].field,
            field
        );
        let planned = v1::PlanActionRequest {
            action: Some(Action::Create(request)),
        };
        assert_eq!(
            refusal(agent.servers().plan_action(planned).await).0,
            Code::InvalidArgument
        );
    }
    assert_eq!(agent.store.server_count(), 0);
    for good in [with(4, 2048, bridge("br0")), with(1, 64, network("up"))] {
        agent.servers().create_server(good).await.unwrap();
    }
    // What cannot be told is not held against anybody.
    agent.hypervisor.set_capacity(Capacity {
        memory_mib: 64,
        ..Capacity::default()
    });
    for unknown in [with(64, 64, bridge("x")), with(1, 64, network("x"))] {
        agent.servers().create_server(unknown).await.unwrap();
    }
}

#[tokio::test]
async fn a_domain_is_adopted_by_name_or_id_and_given_back() {
    let agent = Agent::start().await;
    let id = agent.domain("by-hand").await;
    let adopt = v1::AdoptServerRequest {
        domain: "by-hand".to_owned(),
        name: "mine".to_owned(),
        ..v1::AdoptServerRequest::default()
    };
    let adopted = agent
        .servers()
        .adopt_server(adopt.clone())
        .await
        .unwrap()
        .into_inner();
    agent.ended(adopted.operation).await;
    let server = agent.get("mine").await.unwrap();
    assert_eq!(server.id, id.to_string());
    assert_eq!(server.origin, i32::from(v1::ServerOrigin::Adopted));
    let (code, reason, _) = refusal(agent.servers().adopt_server(adopt).await);
    assert_eq!(
        (code, reason.as_str()),
        (Code::AlreadyExists, "SERVER_EXISTS")
    );
    let missing = v1::AdoptServerRequest {
        domain: "none".to_owned(),
        ..v1::AdoptServerRequest::default()
    };
    let (code, reason, details) = refusal(agent.servers().adopt_server(missing).await);
    assert_eq!(
        (code, reason.as_str()),
        (Code::NotFound, "DOMAIN_NOT_FOUND")
    );
    assert_eq!(
        details.resource_info().unwrap().resource_type,
        "libvirt.Domain"
    );

    let release = v1::ReleaseServerRequest {
        server: "mine".to_owned(),
        ..v1::ReleaseServerRequest::default()
    };
    let released = agent
        .servers()
        .release_server(release)
        .await
        .unwrap()
        .into_inner();
    let ended = agent.ended(released.operation).await;
    let Some(Outcome::Response(response)) = ended.result else {
        panic!("no response")
    };
    let result: v1::ActionResult = response.to_msg().unwrap();
    assert_eq!(result.server, None);
    let (code, reason, _) = refusal(agent.get("mine").await);
    assert_eq!(
        (code, reason.as_str()),
        (Code::NotFound, "SERVER_NOT_FOUND")
    );
}

#[tokio::test]
async fn a_server_is_rescued_once_and_put_back() {
    let agent = Agent::start().await;
    let image = agent.image("rescue").await;
    let id = agent.server("web").await;
    let request = v1::RescueServerRequest {
        request_id: Uuid::new_v4().to_string(),
        admin_pass: Some("chosen one".to_owned()),
        ..rescue("web", &image)
    };
    let first = agent
        .servers()
        .rescue_server(request.clone())
        .await
        .unwrap()
        .into_inner();
    assert_eq!(first.admin_pass, "chosen one");
    assert!(!first.admin_pass_delivery.is_empty());
    let ended = agent.ended(first.operation.clone()).await;
    assert_eq!(metadata(&ended).request_id, request.request_id);
    let Some(Outcome::Response(response)) = ended.result else {
        panic!("no response")
    };
    let result: v1::ActionResult = response.to_msg().unwrap();
    assert_eq!(result.server.unwrap().status, "RESCUE");
    let again = agent
        .servers()
        .rescue_server(request)
        .await
        .unwrap()
        .into_inner();
    assert_eq!(again.operation.unwrap().name, first.operation.unwrap().name);
    assert!(again.admin_pass.is_empty());

    let (code, reason, details) = refusal(agent.servers().rescue_server(rescue(id, &image)).await);
    assert_eq!(
        (code, reason.as_str()),
        (Code::FailedPrecondition, "ALREADY_RESCUED")
    );
    assert_eq!(
        details.precondition_failure().unwrap().violations[0].subject,
        id.to_string()
    );
    let (code, reason, details) = refusal(agent.servers().stop_server(stop(id)).await);
    assert_eq!(
        (code, reason.as_str()),
        (Code::FailedPrecondition, "INVALID_STATE")
    );
    let violation = &details.precondition_failure().unwrap().violations[0];
    assert_eq!(violation.r#type, "VM_STATE");
    assert!(violation.description.contains("unrescue"));
    let info = details.error_info().unwrap();
    assert_eq!(
        (
            info.metadata["action"].as_str(),
            info.metadata["state"].as_str()
        ),
        ("stop", "rescued")
    );

    let unrescue = v1::UnrescueServerRequest {
        server: id.to_string(),
        ..v1::UnrescueServerRequest::default()
    };
    // The steps of these tests do nothing, so the way back is saved here.
    let plan = Uuid::parse_str(ended.name.strip_prefix("operations/").unwrap()).unwrap();
    let xml = agent
        .hypervisor
        .domain_xml(id, Definition::Inactive)
        .await
        .unwrap();
    agent.store.save_definition(id, plan, xml).await.unwrap();
    let answer = agent
        .servers()
        .unrescue_server(unrescue.clone())
        .await
        .unwrap()
        .into_inner();
    agent.ended(answer.operation).await;
    let server = agent.get("web").await.unwrap();
    assert_eq!((server.status.as_str(), server.rescue), ("ACTIVE", None));
    let fresh = agent.server("other").await;
    let unrescue = v1::UnrescueServerRequest {
        server: fresh.to_string(),
        ..unrescue
    };
    let (code, reason, _) = refusal(agent.servers().unrescue_server(unrescue).await);
    assert_eq!(
        (code, reason.as_str()),
        (Code::FailedPrecondition, "NOT_RESCUED")
    );
}

#[tokio::test]
async fn a_changed_password_is_told_only_if_the_agent_made_it() {
    let agent = Agent::start().await;
    let id = agent.server("web").await;
    let own = agent.hypervisor.domain_xml(id, Definition::Inactive).await;
    let channel = "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel></devices>";
    let with_agent = own.unwrap().replace("</devices>", channel);
    agent.hypervisor.define(&with_agent).await.unwrap();
    agent.hypervisor.guest_agent(id, true);
    let server = id.to_string();
    for given in [None, Some("Correct-Horse-7".to_owned())] {
        let request = v1::ChangeServerPasswordRequest {
            server: server.clone(),
            admin_pass: given.clone(),
            ..Default::default()
        };
        let answer = agent.servers().change_server_password(request).await;
        let answer = answer.unwrap().into_inner();
        agent.ended(answer.operation).await;
        let told = if given.is_some() { 0 } else { 12 };
        assert_eq!(answer.admin_pass.len(), told, "{given:?}");
    }
}

#[tokio::test]
async fn no_password_is_in_the_store() {
    let agent = Agent::start().await;
    let image = agent.image("rescue").await;
    agent.server("web").await;
    let request = v1::RescueServerRequest {
        request_id: Uuid::new_v4().to_string(),
        admin_pass: Some("Correct-Horse-7".to_owned()),
        ..rescue("web", &image)
    };
    let answer = agent
        .servers()
        .rescue_server(request)
        .await
        .unwrap()
        .into_inner();
    agent.ended(answer.operation).await;
    for file in std::fs::read_dir(agent.dir.path().join("state")).unwrap() {
        let path = file.unwrap().path();
        if path.is_file() {
            let bytes = std::fs::read(&path).unwrap();
            let found = bytes.windows(15).any(|window| window == b"Correct-Horse-7");
            assert!(!found, "{}", path.display());
        }
    }
}

#[tokio::test]
async fn servers_are_started_stopped_and_deleted() {
    let agent = Agent::start().await;
    let id = agent.server("web").await;
    let prefix = &id.to_string()[..8];
    let answer = agent
        .servers()
        .stop_server(stop(prefix))
        .await
        .unwrap()
        .into_inner();
    agent.ended(answer.operation).await;
    assert_eq!(agent.get("web").await.unwrap().status, "SHUTOFF");
    let (_, reason, _) = refusal(agent.servers().stop_server(stop(id)).await);
    assert_eq!(reason, "INVALID_STATE");
    agent.hypervisor.guest_powers_off(id);
    let answer = agent
        .servers()
        .start_server(start(id))
        .await
        .unwrap()
        .into_inner();
    agent.ended(answer.operation).await;
    assert_eq!(agent.get("web").await.unwrap().status, "ACTIVE");
    let request = v1::DeleteServerRequest {
        request_id: Uuid::new_v4().to_string(),
        ..delete("web")
    };
    let answer = agent
        .servers()
        .delete_server(request.clone())
        .await
        .unwrap()
        .into_inner();
    assert_eq!(answer.warnings[0].name, "DISKS_KEPT");
    agent.ended(answer.operation.clone()).await;
    assert!(agent.get("web").await.is_err());
    // The server that a repeated request names is gone by its own doing.
    let again = agent
        .servers()
        .delete_server(request)
        .await
        .unwrap()
        .into_inner();
    assert_eq!(
        again.operation.unwrap().name,
        answer.operation.unwrap().name
    );
    assert_eq!(again.warnings, answer.warnings);
}

#[tokio::test]
async fn a_busy_server_names_what_keeps_it_busy() {
    let agent = Agent::start().await;
    let id = agent.server("web").await;
    agent.gate.send_replace(false);
    let running = agent
        .servers()
        .stop_server(stop(id))
        .await
        .unwrap()
        .into_inner()
        .operation
        .unwrap();
    let (code, reason, details) = refusal(agent.servers().stop_server(stop(id)).await);
    assert_eq!((code, reason.as_str()), (Code::Aborted, "SERVER_BUSY"));
    assert_eq!(
        details.error_info().unwrap().metadata["operation"],
        running.name
    );
    assert!(details.retry_info().is_some());
    let server = agent.get("web").await.unwrap();
    assert_eq!(
        (server.task_state.as_str(), server.operation),
        ("powering-off", running.name.clone())
    );
    agent.gate.send_replace(true);
    agent.ended(Some(running)).await;
}

#[tokio::test]
async fn while_libvirt_is_away_reads_work_and_actions_are_unavailable() {
    let agent = Agent::start().await;
    let id = agent.server("web").await;
    agent.hypervisor.set_link(LinkState::Down {
        reason: "gone".to_owned(),
    });
    assert_eq!(agent.get("web").await.unwrap().id, id.to_string());
    let (code, reason, details) = refusal(agent.servers().stop_server(stop(id)).await);
    assert_eq!(
        (code, reason.as_str()),
        (Code::Unavailable, "LIBVIRT_UNAVAILABLE")
    );
    assert!(details.retry_info().is_some());
}

#[tokio::test]
async fn an_agent_that_stops_takes_no_new_work_but_knows_the_old() {
    let agent = Agent::start().await;
    let id = agent.server("web").await;
    let request = v1::StopServerRequest {
        request_id: Uuid::new_v4().to_string(),
        ..stop(id)
    };
    let before = agent
        .servers()
        .stop_server(request.clone())
        .await
        .unwrap()
        .into_inner();
    agent.draining.send_replace(true);
    let (code, reason, _) = refusal(agent.servers().delete_server(delete(id)).await);
    assert_eq!((code, reason.as_str()), (Code::Unavailable, "DRAINING"));
    let again = agent
        .servers()
        .stop_server(request)
        .await
        .unwrap()
        .into_inner();
    assert_eq!(
        again.operation.unwrap().name,
        before.operation.unwrap().name
    );
}

#[tokio::test]
async fn a_dry_run_tells_the_steps_or_the_refusal_and_changes_nothing() {
    let agent = Agent::start().await;
    let image = agent.image("rescue").await;
    let id = agent.server("web").await;
    let before = agent.store.revision().borrow().to_owned();
    let plan = async |action| {
        let request = v1::PlanActionRequest {
            action: Some(action),
        };
        agent
            .servers()
            .plan_action(request)
            .await
            .map(tonic::Response::into_inner)
    };
    let rescued = plan(Action::Rescue(rescue(id, &image))).await.unwrap();
    assert!(rescued.accepted, "{rescued:?}");
    assert!(
        rescued
            .steps
            .iter()
            .any(|step| step.kind == "StartDomain" && step.deadline.is_some())
    );
    assert!(rescued.files.iter().any(|file| file.effect == "create"));
    assert!(rescued.domain_diff.contains("+++"));
    let deleted = plan(Action::Delete(delete(id))).await.unwrap();
    assert_eq!(deleted.warnings[0].name, "DISKS_KEPT");
    for action in [
        Action::Stop(stop(id)),
        Action::Release(v1::ReleaseServerRequest {
            server: id.to_string(),
            ..Default::default()
        }),
    ] {
        assert!(plan(action).await.unwrap().accepted);
    }
    assert!(plan(Action::Create(create(&image))).await.unwrap().accepted);

    let refused = plan(Action::Start(start(id))).await.unwrap();
    assert!(!refused.accepted && refused.steps.is_empty());
    assert_eq!(refused.refusals[0].reason, "INVALID_STATE");
    let refused = plan(Action::Unrescue(v1::UnrescueServerRequest {
        server: id.to_string(),
        ..Default::default()
    }));
    assert_eq!(refused.await.unwrap().refusals[0].reason, "NOT_RESCUED");
    let refused = plan(Action::Adopt(v1::AdoptServerRequest {
        domain: "web".to_owned(),
        ..Default::default()
    }));
    assert_eq!(refused.await.unwrap().refusals[0].reason, "SERVER_EXISTS");

    let (code, _, _) = refusal(plan(Action::Stop(stop("none"))).await);
    assert_eq!(code, Code::NotFound);
    let (code, _, _) = refusal(plan(Action::Stop(stop(""))).await);
    assert_eq!(code, Code::InvalidArgument);
    let empty = agent
        .servers()
        .plan_action(v1::PlanActionRequest::default())
        .await;
    assert_eq!(refusal(empty).0, Code::InvalidArgument);
    assert_eq!(*agent.store.revision().borrow(), before);
}

#[tokio::test]
async fn every_answer_names_its_call() {
    let agent = Agent::start().await;
    let ask = async |id: Option<&'static str>, server: &str| {
        let mut request = Request::new(v1::GetServerRequest {
            server: server.to_owned(),
        });
        if let Some(id) = id {
            request
                .metadata_mut()
                .insert("x-openstack-request-id", id.parse().unwrap());
        }
        agent.servers().get_server(request).await
    };
    agent.server("web").await;
    let answer = ask(Some("req-7"), "web").await.unwrap();
    assert_eq!(
        answer.metadata().get("x-openstack-request-id").unwrap(),
        "req-7"
    );
    let refused = ask(Some("req-8"), "none").await.unwrap_err();
    assert_eq!(
        refused.metadata().get("x-openstack-request-id").unwrap(),
        "req-8"
    );
    let made = ask(None, "web").await.unwrap();
    let made = made
        .metadata()
        .get("x-openstack-request-id")
        .unwrap()
        .to_str()
        .unwrap();
    assert!(made.starts_with("req-"));
}
