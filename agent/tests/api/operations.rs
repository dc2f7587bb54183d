// SPDX-License-Identifier: Apache-2.0
//! google.longrunning.Operations.

use std::time::{Duration, Instant};

use salvor_proto::{
    google::longrunning::{
        CancelOperationRequest, DeleteOperationRequest, GetOperationRequest, ListOperationsRequest,
        WaitOperationRequest, operation::Result as Outcome,
    },
    v1,
};
use tonic::{Code, Request};
use uuid::Uuid;

use crate::harness::{Agent, metadata, refusal, start, stop};

fn seconds(seconds: i64) -> Option<prost_types::Duration> {
    Some(prost_types::Duration { seconds, nanos: 0 })
}

#[tokio::test]
async fn an_operation_is_told_while_it_runs_and_when_it_has_ended() {
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
    let get = GetOperationRequest {
        name: running.name.clone(),
    };
    let wait = WaitOperationRequest {
        name: running.name.clone(),
        timeout: seconds(0),
    };
    let shown = agent
        .operations()
        .wait_operation(wait.clone())
        .await
        .unwrap()
        .into_inner();
    assert!(!shown.done && shown.result.is_none());
    assert_eq!(
        metadata(&shown).state,
        i32::from(v1::OperationState::Running)
    );

    // The caller's deadline ends the wait in time for an answer, and not the operation.
    let mut request = Request::new(WaitOperationRequest {
        timeout: None,
        ..wait.clone()
    });
    request.set_timeout(Duration::from_secs(6));
    let begun = Instant::now();
    let waited = agent
        .operations()
        .wait_operation(request)
        .await
        .unwrap()
        .into_inner();
    assert!(!waited.done && begun.elapsed() < Duration::from_secs(6));

    agent.gate.send_replace(true);
    agent.ended(Some(running)).await;
    let ended = agent
        .operations()
        .get_operation(get.clone())
        .await
        .unwrap()
        .into_inner();
    assert!(matches!(ended.result, Some(Outcome::Response(_))));
    let agent = agent.restart().await;
    let kept = agent
        .operations()
        .get_operation(get)
        .await
        .unwrap()
        .into_inner();
    assert_eq!(metadata(&kept).steps, metadata(&ended).steps);
}

#[tokio::test]
async fn an_operation_is_cancelled_once_and_leaves_the_server_as_before() {
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
    let cancel = CancelOperationRequest {
        name: running.name.clone(),
    };
    agent
        .operations()
        .cancel_operation(cancel.clone())
        .await
        .unwrap();
    agent.gate.send_replace(true);
    let ended = agent.ended(Some(running)).await;
    let Some(Outcome::Error(error)) = &ended.result else {
        panic!("{ended:?}")
    };
    assert_eq!(error.code, i32::from(Code::Cancelled));
    assert!(
        error
            .details
            .iter()
            .any(|detail| detail.type_url.ends_with("google.rpc.ErrorInfo"))
    );
    let metadata = metadata(&ended);
    assert_eq!(metadata.state, i32::from(v1::OperationState::Cancelled));
    assert!(metadata.cancel_requested);
    assert_eq!(agent.get("web").await.unwrap().status, "ACTIVE");
    let (code, reason, _) = refusal(agent.operations().cancel_operation(cancel).await);
    assert_eq!(
        (code, reason.as_str()),
        (Code::FailedPrecondition, "NOT_CANCELLABLE")
    );
}

#[tokio::test]
async fn operations_are_listed_newest_first_by_server_and_end() {
    let agent = Agent::start().await;
    let (web, _) = (agent.server("web").await, agent.server("db").await);
    for _ in 0..2 {
        let answer = agent
            .servers()
            .stop_server(stop(web))
            .await
            .unwrap()
            .into_inner();
        agent.ended(answer.operation).await;
        agent.hypervisor.guest_powers_off(web);
        let answer = agent
            .servers()
            .start_server(start(web))
            .await
            .unwrap()
            .into_inner();
        agent.ended(answer.operation).await;
    }
    agent.gate.send_replace(false);
    let running = agent
        .servers()
        .stop_server(stop(web))
        .await
        .unwrap()
        .into_inner()
        .operation
        .unwrap();
    let list = async |filter: String, page_size: i32, page_token: String| {
        let request = ListOperationsRequest {
            filter,
            page_size,
            page_token,
            name: "operations".to_owned(),
            ..ListOperationsRequest::default()
        };
        agent
            .operations()
            .list_operations(request)
            .await
            .map(tonic::Response::into_inner)
    };
    let none = String::new;
    assert_eq!(list(none(), 0, none()).await.unwrap().operations.len(), 7);
    let first = list(format!("server={web}"), 4, none()).await.unwrap();
    let actions = |operations: &[salvor_proto::google::longrunning::Operation]| {
        operations
            .iter()
            .map(|operation| metadata(operation).action)
            .collect::<Vec<_>>()
    };
    assert_eq!(
        actions(&first.operations),
        ["stop", "start", "stop", "start"]
    );
    let second = list(format!("server={web}"), 4, first.next_page_token)
        .await
        .unwrap();
    assert_eq!(actions(&second.operations), ["stop", "adopt"]);
    assert_eq!(second.next_page_token, "");
    let under_way = list("done=false".to_owned(), 0, none()).await.unwrap();
    assert_eq!(under_way.operations.len(), 1);
    assert_eq!(under_way.operations[0].name, running.name);
    assert_eq!(
        metadata(&under_way.operations[0]).steps[0].progress_percent,
        Some(42)
    );
    assert_eq!(
        list("done=true".to_owned(), 0, none())
            .await
            .unwrap()
            .operations
            .len(),
        6
    );
    assert_eq!(
        refusal(list("state=x".to_owned(), 0, none()).await).0,
        Code::InvalidArgument
    );
    assert_eq!(
        refusal(list(none(), -1, none()).await).0,
        Code::InvalidArgument
    );
    agent.gate.send_replace(true);
}

#[tokio::test]
async fn an_operation_is_known_by_the_beginning_of_its_uuid() {
    let agent = Agent::start().await;
    let id = agent.server("web").await;
    agent.gate.send_replace(false);
    let stopping = agent.servers().stop_server(stop(id)).await.unwrap();
    let name = stopping.into_inner().operation.unwrap().name;
    let beginning = name[.."operations/".len() + 8].to_uppercase();
    let short = beginning.replace("OPERATIONS/", "operations/");
    let get = GetOperationRequest {
        name: short.clone(),
    };
    let found = agent.operations().get_operation(get).await.unwrap();
    assert_eq!(found.into_inner().name, name);
    let wait = WaitOperationRequest {
        name: short.clone(),
        timeout: seconds(0),
    };
    let found = agent.operations().wait_operation(wait).await.unwrap();
    assert_eq!(found.into_inner().name, name);
    let cancel = CancelOperationRequest { name: short };
    agent.operations().cancel_operation(cancel).await.unwrap();
    agent.gate.send_replace(true);
    for (wrong, code) in [
        ("operations/7f0", Code::InvalidArgument),
        ("operations/web1", Code::InvalidArgument),
        ("operations/00000000-0000", Code::NotFound),
    ] {
        let get = GetOperationRequest {
            name: wrong.to_owned(),
        };
        assert_eq!(refusal(agent.operations().get_operation(get).await).0, code);
    }
}

#[tokio::test]
async fn an_operation_that_is_not_there_is_not_found() {
    let agent = Agent::start().await;
    let name = format!("operations/{}", Uuid::new_v4());
    let get = agent
        .operations()
        .get_operation(GetOperationRequest { name: name.clone() })
        .await;
    let (code, reason, details) = refusal(get);
    assert_eq!(
        (code, reason.as_str()),
        (Code::NotFound, "OPERATION_NOT_FOUND")
    );
    assert_eq!(details.resource_info().unwrap().resource_name, name);
    let wait = WaitOperationRequest {
        name: name.clone(),
        timeout: None,
    };
    assert_eq!(
        refusal(agent.operations().wait_operation(wait).await).0,
        Code::NotFound
    );
    let cancel = CancelOperationRequest { name: name.clone() };
    assert_eq!(
        refusal(agent.operations().cancel_operation(cancel).await).0,
        Code::NotFound
    );
    let wait = WaitOperationRequest {
        name: name.clone(),
        timeout: seconds(-1),
    };
    assert_eq!(
        refusal(agent.operations().wait_operation(wait).await).0,
        Code::InvalidArgument
    );
    let get = GetOperationRequest {
        name: "operations/../x".to_owned(),
    };
    assert_eq!(
        refusal(agent.operations().get_operation(get).await).0,
        Code::InvalidArgument
    );
    let delete = agent
        .operations()
        .delete_operation(DeleteOperationRequest { name })
        .await;
    assert_eq!(delete.unwrap_err().code(), Code::Unimplemented);
}
