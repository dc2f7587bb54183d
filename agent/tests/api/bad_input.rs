// SPDX-License-Identifier: Apache-2.0
//! What callers get wrong, alone and all at once: the answer says what, and nothing has changed.

use std::collections::{BTreeSet, HashMap};

use futures_util::future::join_all;
use salvor_proto::{
    google::longrunning::{CancelOperationRequest, ListOperationsRequest, Operation},
    v1,
};
use tonic::{Code, Status};
use tonic_types::StatusExt as _;
use uuid::Uuid;

use crate::harness::{Agent, metadata, refusal, rescue, stop};

/// Asks for one of several actions, none of which overtakes another.
async fn ask(agent: &Agent, number: usize, server: Uuid) -> Result<Operation, Status> {
    let mut servers = agent.servers();
    let answer = match number % 3 {
        0 => {
            let answer = servers.stop_server(stop(server)).await?;
            answer.into_inner().operation
        }
        1 => {
            let request = v1::PauseServerRequest {
                server: server.to_string(),
                ..v1::PauseServerRequest::default()
            };
            servers.pause_server(request).await?.into_inner().operation
        }
        _ => {
            let request = v1::RebootServerRequest {
                server: server.to_string(),
                r#type: v1::RebootType::Soft.into(),
                ..v1::RebootServerRequest::default()
            };
            servers.reboot_server(request).await?.into_inner().operation
        }
    };
    Ok(answer.unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_several_who_ask_at_once_one_wins_and_the_others_are_told_who() {
    let agent = Agent::start().await;
    for round in 0..10 {
        let id = agent.server(&format!("web-{round}")).await;
        agent.gate.send_replace(false);
        let answers = join_all((0..9).map(|number| ask(&agent, number, id))).await;
        let (won, lost): (Vec<_>, Vec<_>) = answers.into_iter().partition(Result::is_ok);
        let [Ok(winner)] = won.as_slice() else {
            panic!("{won:?}");
        };
        for refused in lost {
            let (code, reason, details) = refusal(refused);
            assert_eq!((code, reason.as_str()), (Code::Aborted, "SERVER_BUSY"));
            let named = &details.error_info().unwrap().metadata["operation"];
            assert_eq!(*named, winner.name);
        }
        agent.gate.send_replace(true);
        let ended = agent.ended(Some(winner.clone())).await;
        let server = agent.get(&id.to_string()).await.unwrap();
        let expected = match metadata(&ended).action.as_str() {
            "stop" => "SHUTOFF",
            "pause" => "PAUSED",
            _ => "ACTIVE",
        };
        assert_eq!(server.status, expected);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn one_request_id_is_one_operation_whoever_repeats_it_and_when() {
    let agent = Agent::start().await;
    let image = agent.image("rescue").await;
    let mut last = None;
    for round in 0..10 {
        let name = format!("web-{round}");
        let id = agent.server(&name).await;
        let request = v1::RescueServerRequest {
            request_id: Uuid::new_v4().to_string(),
            ..rescue(&name, &image)
        };
        let answers = at_once(|| {
            let (mut servers, request) = (agent.servers(), request.clone());
            async move { servers.rescue_server(request).await }
        });
        let answers = answers.await;
        let operations = answers.iter().map(|answer| answer.operation.clone());
        let first = same(operations).unwrap();
        let told = answers
            .iter()
            .filter(|answer| !answer.admin_pass.is_empty());
        assert_eq!(told.count(), 1, "the password is told once");
        agent.ended(Some(first.clone())).await;
        let list = ListOperationsRequest {
            filter: format!("server={id}"),
            ..ListOperationsRequest::default()
        };
        let answer = agent.operations().list_operations(list).await.unwrap();
        // It was adopted before.
        assert_eq!(answer.into_inner().operations.len(), 2);
        last = Some((request, first));
    }
    let (request, first) = last.unwrap();
    let agent = agent.restart().await;
    let again = agent.servers().rescue_server(request.clone()).await;
    let again = again.unwrap().into_inner();
    assert_eq!(again.operation.unwrap().name, first.name);
    // Anything else under the same id: other arguments, another server, another action.
    let mut other = [request.clone(), request.clone()];
    other[0].disk_protection = v1::DiskProtection::Overlay.into();
    other[1].server = "web-0".to_owned();
    for other in other {
        let refused = agent.servers().rescue_server(other).await;
        assert_eq!(refusal(refused).1, "REQUEST_ID_REUSED");
    }
    let other = v1::StopServerRequest {
        request_id: request.request_id,
        ..stop(request.server)
    };
    let refused = agent.servers().stop_server(other).await;
    assert_eq!(refusal(refused).1, "REQUEST_ID_REUSED");
}

/// The same call, made by many callers at once.
async fn at_once<T, F: Future<Output = Result<tonic::Response<T>, Status>>>(
    call: impl Fn() -> F,
) -> Vec<T> {
    let answers = join_all((0..32).map(|_| call())).await;
    let answers = answers.into_iter();
    answers.map(|answer| answer.unwrap().into_inner()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_call_that_is_repeated_does_not_overtake_itself_nor_miss_what_it_removed() {
    let agent = Agent::start().await;
    for round in 0..10 {
        let server = agent.server(&format!("web-{round}")).await.to_string();
        let reboot = v1::RebootServerRequest {
            request_id: Uuid::new_v4().to_string(),
            server: server.clone(),
            r#type: v1::RebootType::Hard.into(),
            ..v1::RebootServerRequest::default()
        };
        let delete = v1::DeleteServerRequest {
            request_id: Uuid::new_v4().to_string(),
            server,
        };
        let reboots = at_once(|| {
            let (mut servers, request) = (agent.servers(), reboot.clone());
            async move { servers.reboot_server(request).await }
        });
        let operations = reboots.await.into_iter().map(|answer| answer.operation);
        let rebooted = agent.ended(same(operations)).await;
        assert_eq!(metadata(&rebooted).state(), v1::OperationState::Done);
        let deletes = at_once(|| {
            let (mut servers, request) = (agent.servers(), delete.clone());
            async move { servers.delete_server(request).await }
        });
        same(deletes.await.into_iter().map(|answer| answer.operation));
    }
}

/// The operation, if it is the same one everywhere.
#[track_caller]
fn same(operations: impl Iterator<Item = Option<Operation>>) -> Option<Operation> {
    let operations: Vec<Operation> = operations.flatten().collect();
    let names = operations.iter().map(|operation| &operation.name);
    assert_eq!(names.collect::<BTreeSet<_>>().len(), 1);
    operations.into_iter().next()
}

#[tokio::test]
async fn what_has_ended_is_not_cancelled() {
    let agent = Agent::start().await;
    let id = agent.server("web").await;
    let lock = v1::LockServerRequest {
        server: id.to_string(),
        ..v1::LockServerRequest::default()
    };
    let locked = agent.servers().lock_server(lock).await.unwrap();
    let stopped = agent.servers().stop_server(stop(id)).await.unwrap();
    for operation in [
        locked.into_inner().operation,
        stopped.into_inner().operation,
    ] {
        let ended = agent.ended(operation).await;
        let name = ended.name.clone();
        let cancel = CancelOperationRequest { name: name.clone() };
        let (code, reason, details) = refusal(agent.operations().cancel_operation(cancel).await);
        assert_eq!(
            (code, reason.as_str()),
            (Code::FailedPrecondition, "NOT_CANCELLABLE")
        );
        assert_eq!(details.error_info().unwrap().metadata["operation"], name);
        let after = agent.ended(Some(ended.clone())).await;
        assert_eq!(metadata(&after), metadata(&ended));
        assert!(!metadata(&after).cancel_requested);
    }
    assert_eq!(agent.get("web").await.unwrap().status, "SHUTOFF");
}

/// The one field that a call is refused for.
fn field<T: std::fmt::Debug>(answer: Result<T, Status>) -> (String, String) {
    let status = answer.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
    let details = status.get_error_details();
    let violations = &details.bad_request().unwrap().field_violations;
    let [violation] = violations.as_slice() else {
        panic!("{violations:?}");
    };
    (violation.field.clone(), status.message().to_owned())
}

#[tokio::test]
async fn a_password_that_no_guest_could_take_is_refused_and_not_repeated() {
    let agent = Agent::start().await;
    let image = agent.image("cirros").await;
    agent.server("web").await;
    let mut bad: Vec<String> = [
        "\n",
        "\r",
        "\0",
        "\t",
        "\u{7}",
        "\u{1b}[2J",
        "\u{7f}",
        "\u{85}",
        ":",
    ]
    .iter()
    .map(|bad| format!("s3cret{bad}s3cret"))
    .collect();
    bad.extend([String::new(), "s3cret".repeat(100)]);
    for password in bad {
        let admin_pass = Some(password.clone());
        let create = v1::CreateServerRequest {
            name: "new".to_owned(),
            image: image.id.clone(),
            flavor: Some(v1::Flavor {
                vcpus: 1,
                memory_mib: 64,
                disk_gib: 0,
            }),
            admin_pass: admin_pass.clone(),
            ..v1::CreateServerRequest::default()
        };
        let rescue = v1::RescueServerRequest {
            admin_pass: admin_pass.clone(),
            ..rescue("web", &image)
        };
        let change = v1::ChangeServerPasswordRequest {
            server: "web".to_owned(),
            admin_pass,
            ..v1::ChangeServerPasswordRequest::default()
        };
        let mut servers = agent.servers();
        for (at, message) in [
            field(servers.create_server(create).await),
            field(servers.rescue_server(rescue).await),
            field(servers.change_server_password(change).await),
        ] {
            assert_eq!(at, "admin_pass");
            assert!(!message.contains("s3cret"), "{message}");
        }
    }
    assert_eq!(agent.get("web").await.unwrap().status, "ACTIVE");
    assert_eq!(agent.store.server_count(), 1);
}

fn entries(count: usize, key: usize, value: usize) -> HashMap<String, String> {
    let entry = |number| (format!("{number:0key$}"), "é".repeat(value));
    (0..count).map(entry).collect()
}

#[tokio::test]
async fn metadata_has_novas_limits() {
    let agent = Agent::start().await;
    let id = agent.server("web").await.to_string();
    let update = |metadata| v1::UpdateServerRequest {
        server: id.clone(),
        update_mask: Some(prost_types::FieldMask {
            paths: vec!["metadata".to_owned()],
        }),
        metadata,
        ..v1::UpdateServerRequest::default()
    };
    let create = |metadata| v1::CreateServerRequest {
        name: "new".to_owned(),
        image: "none".to_owned(),
        flavor: Some(v1::Flavor {
            vcpus: 1,
            memory_mib: 64,
            disk_gib: 0,
        }),
        metadata,
        ..v1::CreateServerRequest::default()
    };
    let most = entries(128, 255, 255);
    let answer = agent.servers().update_server(update(most.clone())).await;
    answer.unwrap();
    assert_eq!(agent.get(&id).await.unwrap().metadata, most);
    let one = |key: &str, value: &str| [(key.to_owned(), value.to_owned())].into();
    for wrong in [
        entries(129, 3, 1),
        entries(1, 256, 1),
        entries(1, 1, 256),
        one("", "x"),
        one("a/b", "x"),
        one("é", "x"),
        one("a\nb", "x"),
        one("k", "a\nb"),
        one("k", "\u{1b}[2J"),
    ] {
        let mut servers = agent.servers();
        for (at, message) in [
            field(servers.update_server(update(wrong.clone())).await),
            field(servers.create_server(create(wrong)).await),
        ] {
            assert!(at.starts_with("metadata"), "{at}");
            assert!(
                message.len() < 1_000 && !message.contains('\u{1b}'),
                "{message}"
            );
        }
    }
    assert_eq!(agent.get(&id).await.unwrap().metadata, most);
}

#[tokio::test]
async fn a_mask_with_an_unknown_path_changes_nothing_and_is_told_the_known_ones() {
    let agent = Agent::start().await;
    let id = agent.server("web").await.to_string();
    let before = agent.get(&id).await.unwrap();
    let long = "name".repeat(1_000);
    for unknown in [
        "",
        "*",
        "Name",
        "name ",
        "name,tags",
        "metadata.key",
        "server",
        "request_id",
        "update_mask",
        "vm_state",
        "\u{1b}[2J",
        &long,
    ] {
        let request = v1::UpdateServerRequest {
            server: id.clone(),
            update_mask: Some(prost_types::FieldMask {
                paths: vec!["name".to_owned(), unknown.to_owned()],
            }),
            name: "renamed".to_owned(),
            ..v1::UpdateServerRequest::default()
        };
        let (at, message) = field(agent.servers().update_server(request).await);
        assert_eq!(at, "update_mask", "{unknown}");
        assert!(
            message.contains("access_ipv6, shutdown_timeout"),
            "{message}"
        );
        assert!(
            message.len() < 1_000 && !message.contains('\u{1b}'),
            "{message}"
        );
    }
    for mask in [None, Some(prost_types::FieldMask::default())] {
        let request = v1::UpdateServerRequest {
            server: id.clone(),
            update_mask: mask,
            name: "renamed".to_owned(),
            ..v1::UpdateServerRequest::default()
        };
        let (at, _) = field(agent.servers().update_server(request).await);
        assert_eq!(at, "update_mask");
    }
    assert_eq!(agent.get(&id).await.unwrap(), before);
}
