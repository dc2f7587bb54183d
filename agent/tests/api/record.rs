// SPDX-License-Identifier: Apache-2.0
//! Callers with a role, locks, updates, resets, soft delete, and operations that are abandoned.

use salvor_proto::{
    google::longrunning::{
        CancelOperationRequest, ListOperationsRequest, operation::Result as Outcome,
    },
    v1::{self, plan_action_request::Action},
};
use tonic::Code;
use uuid::Uuid;

use crate::harness::{Agent, metadata, of, refusal, start, stop};

/// A server that the administrator adopted for the project `p`.
async fn server(agent: &Agent, name: &str) -> String {
    let id = agent.domain(name).await.to_string();
    let adopt = v1::AdoptServerRequest {
        domain: id.clone(),
        ..v1::AdoptServerRequest::default()
    };
    let answer = agent.servers().adopt_server(of("admin", "p", adopt)).await;
    agent.ended(answer.unwrap().into_inner().operation).await;
    id
}

fn lock(server: &str) -> v1::LockServerRequest {
    v1::LockServerRequest {
        server: server.to_owned(),
        reason: Some("audit".to_owned()),
        ..v1::LockServerRequest::default()
    }
}

fn unlock(server: &str) -> v1::UnlockServerRequest {
    v1::UnlockServerRequest {
        server: server.to_owned(),
        ..v1::UnlockServerRequest::default()
    }
}

fn reset(server: &str, state: v1::VmState) -> v1::ResetServerStateRequest {
    v1::ResetServerStateRequest {
        server: server.to_owned(),
        state: state.into(),
        ..v1::ResetServerStateRequest::default()
    }
}

#[tokio::test]
async fn a_caller_can_lower_its_rights_and_its_operations_say_for_whom_they_were() {
    let agent = Agent::start().await;
    let id = server(&agent, "web").await;
    let shown = agent.get(&id).await.unwrap();
    assert_eq!(
        (shown.project_id.as_str(), shown.user_id.as_str()),
        ("p", "u-1")
    );
    for (project, code) in [("p", None), ("q", Some(Code::PermissionDenied))] {
        let answer = agent
            .servers()
            .stop_server(of("member", project, stop(&id)))
            .await;
        match code {
            None => {
                let ended = agent.ended(answer.unwrap().into_inner().operation).await;
                let metadata = metadata(&ended);
                assert_eq!(metadata.project_id, "p");
                assert_eq!(metadata.user_id, "u-1");
                assert_eq!(metadata.instance_action, "stop");
            }
            Some(code) => {
                let (found, reason, details) = refusal(answer);
                assert_eq!((found, reason.as_str()), (code, "PERMISSION_DENIED"));
                assert_eq!(details.error_info().unwrap().metadata["http"], "403");
            }
        }
    }
    // Adopting is for the administrator.
    let domain = agent.domain("other").await.to_string();
    let adopt = v1::AdoptServerRequest {
        domain,
        ..v1::AdoptServerRequest::default()
    };
    let answer = agent.servers().adopt_server(of("member", "p", adopt)).await;
    assert_eq!(refusal(answer).0, Code::PermissionDenied);
    for (role, project) in [("root", "p"), ("member", ""), ("", "p")] {
        let answer = agent
            .servers()
            .start_server(of(role, project, start(&id)))
            .await;
        let (code, reason, details) = refusal(answer);
        assert_eq!(
            (code, reason.as_str()),
            (Code::InvalidArgument, "INVALID_FIELD")
        );
        let field = &details.bad_request().unwrap().field_violations[0].field;
        assert!(field.starts_with("x-salvor-"), "{field}");
    }
}

#[tokio::test]
async fn a_lock_stops_members_and_the_refusal_says_who_and_why() {
    let agent = Agent::start().await;
    let id = server(&agent, "web").await;
    let done = agent
        .servers()
        .lock_server(of("member", "p", lock(&id)))
        .await
        .unwrap();
    let operation = done.into_inner().operation.unwrap();
    assert!(operation.done, "it has ended when it is accepted");
    assert_eq!(metadata(&operation).action, "lock");
    let held = agent.get(&id).await.unwrap().lock.unwrap();
    assert_eq!(held.locked_by, i32::from(v1::LockOwner::Owner));
    assert_eq!((held.reason.as_str(), held.expire_time), ("audit", None));
    let (code, reason, details) = refusal(
        agent
            .servers()
            .stop_server(of("member", "p", stop(&id)))
            .await,
    );
    assert_eq!(
        (code, reason.as_str()),
        (Code::FailedPrecondition, "SERVER_LOCKED")
    );
    assert_eq!(details.error_info().unwrap().metadata["locked_by"], "owner");
    let violation = &details.precondition_failure().unwrap().violations[0];
    assert!(violation.description.contains("audit"), "{violation:?}");
    // A dry run says the same, and the administrator passes.
    let plan = |role| {
        let action = Some(Action::Stop(stop(&id)));
        of(role, "p", v1::PlanActionRequest { action })
    };
    let member = agent
        .servers()
        .plan_action(plan("member"))
        .await
        .unwrap()
        .into_inner();
    assert_eq!(member.refusals[0].reason, "SERVER_LOCKED");
    assert!(
        agent
            .servers()
            .plan_action(plan("admin"))
            .await
            .unwrap()
            .into_inner()
            .accepted
    );
    // Taken over by an administrator of another project, its owner cannot take it off.
    agent
        .servers()
        .lock_server(of("admin", "", lock(&id)))
        .await
        .unwrap_err();
    agent.servers().lock_server(lock(&id)).await.unwrap();
    let answer = agent
        .servers()
        .unlock_server(of("member", "p", unlock(&id)))
        .await;
    assert_eq!(refusal(answer).1, "PERMISSION_DENIED");
    agent.servers().unlock_server(unlock(&id)).await.unwrap();
    assert_eq!(agent.get(&id).await.unwrap().lock, None);
    for wrong in [
        v1::LockServerRequest {
            reason: Some(String::new()),
            ..lock(&id)
        },
        v1::LockServerRequest {
            reason: Some("x".repeat(256)),
            ..lock(&id)
        },
        v1::LockServerRequest {
            reason: Some("a\nb".to_owned()),
            ..lock(&id)
        },
        v1::LockServerRequest {
            expires_in: Some(prost_types::Duration::default()),
            ..lock(&id)
        },
    ] {
        assert_eq!(
            refusal(agent.servers().lock_server(wrong).await).1,
            "INVALID_FIELD"
        );
    }
}

#[tokio::test]
async fn an_update_changes_what_its_mask_names_also_while_something_is_under_way() {
    let agent = Agent::start().await;
    let id = server(&agent, "web").await;
    agent.gate.send_replace(false);
    let running = agent
        .servers()
        .stop_server(stop(&id))
        .await
        .unwrap()
        .into_inner();
    let update = v1::UpdateServerRequest {
        request_id: Uuid::new_v4().to_string(),
        server: id.clone(),
        update_mask: Some(prost_types::FieldMask {
            paths: [
                "name",
                "tags",
                "metadata",
                "shutdown_timeout",
                "access_ipv6",
                "autostart",
            ]
            .map(str::to_owned)
            .to_vec(),
        }),
        name: "db".to_owned(),
        description: "not named".to_owned(),
        tags: vec!["blue".to_owned()],
        metadata: [("k".to_owned(), "v".to_owned())].into(),
        shutdown_timeout: Some(prost_types::Duration {
            seconds: 7,
            nanos: 0,
        }),
        access_ipv6: "2001:DB8::1".to_owned(),
        ..v1::UpdateServerRequest::default()
    };
    let first = agent
        .servers()
        .update_server(update.clone())
        .await
        .unwrap()
        .into_inner();
    let again = agent
        .servers()
        .update_server(update.clone())
        .await
        .unwrap()
        .into_inner();
    assert_eq!(first.operation.unwrap().name, again.operation.unwrap().name);
    let shown = agent.get(&id).await.unwrap();
    assert_eq!(shown.name, "db");
    assert_eq!(shown.operation, running.operation.as_ref().unwrap().name);
    assert_eq!((shown.description.as_str(), shown.autostart), ("", false));
    assert_eq!(shown.access_ipv6, "2001:db8::1");
    assert_eq!(shown.shutdown_timeout.unwrap().seconds, 7);
    agent.gate.send_replace(true);
    agent.ended(running.operation).await;
    assert_eq!(agent.get(&id).await.unwrap().tags, ["blue"]);
    // The property stands where a request does not say.
    agent
        .ended(
            agent
                .servers()
                .start_server(start(&id))
                .await
                .unwrap()
                .into_inner()
                .operation,
        )
        .await;
    let steps = async |stop| {
        let action = Some(Action::Stop(stop));
        let plan = agent
            .servers()
            .plan_action(v1::PlanActionRequest { action })
            .await;
        plan.unwrap().into_inner().steps[0].description.clone()
    };
    assert!(steps(stop(&id)).await.ends_with("after 7 s"));
    let said = v1::StopServerRequest {
        shutdown_timeout: Some(prost_types::Duration {
            seconds: 3,
            nanos: 0,
        }),
        ..stop(&id)
    };
    assert!(steps(said).await.ends_with("after 3 s"));
    let mut wrong = update;
    wrong.request_id.clear();
    wrong.update_mask = Some(prost_types::FieldMask {
        paths: vec!["flavor".to_owned()],
    });
    let (_, reason, details) = refusal(agent.servers().update_server(wrong).await);
    assert_eq!(reason, "INVALID_FIELD");
    let violation = &details.bad_request().unwrap().field_violations[0];
    assert_eq!(violation.field, "update_mask");
    assert!(
        violation.description.contains("shutdown_timeout"),
        "{violation:?}"
    );
}

#[tokio::test]
async fn servers_are_found_by_tag_lock_project_and_metadata() {
    let agent = Agent::start().await;
    let (web, db) = (server(&agent, "web").await, server(&agent, "db").await);
    agent.server("free").await;
    let update = v1::UpdateServerRequest {
        server: web.clone(),
        update_mask: Some(prost_types::FieldMask {
            paths: vec!["tags".to_owned(), "metadata".to_owned()],
        }),
        tags: vec!["a".to_owned(), "b".to_owned()],
        metadata: [("k".to_owned(), "v".to_owned())].into(),
        ..v1::UpdateServerRequest::default()
    };
    agent.servers().update_server(update).await.unwrap();
    agent.servers().lock_server(lock(&db)).await.unwrap();
    let found = async |change: &dyn Fn(&mut v1::ListServersRequest)| {
        let mut request = v1::ListServersRequest::default();
        change(&mut request);
        let list = agent
            .servers()
            .list_servers(request)
            .await
            .unwrap()
            .into_inner();
        let names: Vec<_> = list.servers.into_iter().map(|server| server.name).collect();
        names.join(" ")
    };
    assert_eq!(
        found(&|list| list.tags = vec!["b".to_owned(), "a".to_owned()]).await,
        "web"
    );
    assert_eq!(
        found(&|list| list.tags = vec!["a".to_owned(), "c".to_owned()]).await,
        ""
    );
    assert_eq!(found(&|list| list.locked = Some(true)).await, "db");
    assert_eq!(found(&|list| list.locked = Some(false)).await, "web free");
    assert_eq!(
        found(&|list| list.project_id = "p".to_owned()).await,
        "web db"
    );
    assert_eq!(
        found(&|list| list.metadata = [("k".to_owned(), "v".to_owned())].into()).await,
        "web"
    );
}

#[tokio::test]
async fn a_reset_is_for_the_administrator_and_reports_the_host() {
    let agent = Agent::start().await;
    let id = server(&agent, "web").await;
    let member = of("member", "p", reset(&id, v1::VmState::Error));
    assert_eq!(
        refusal(agent.servers().reset_server_state(member).await).1,
        "PERMISSION_DENIED"
    );
    let wrong = reset(&id, v1::VmState::Stopped);
    assert_eq!(
        refusal(agent.servers().reset_server_state(wrong).await).1,
        "INVALID_FIELD"
    );
    let done = agent
        .servers()
        .reset_server_state(reset(&id, v1::VmState::Error))
        .await
        .unwrap();
    let operation = done.into_inner().operation.unwrap();
    let Some(Outcome::Response(response)) = operation.result else {
        panic!("it has ended");
    };
    let result: v1::ActionResult = response.to_msg().unwrap();
    let host = result.host.unwrap();
    assert_eq!(host.power_state, i32::from(v1::PowerState::Running));
    assert!(host.defined && host.unknown.is_empty());
    let server = result.server.unwrap();
    assert_eq!(server.status, "ERROR");
    assert_eq!(server.fault.unwrap().reason, "STATE_RESET");
    agent
        .servers()
        .reset_server_state(reset(&id, v1::VmState::Active))
        .await
        .unwrap();
    let shown = agent.get(&id).await.unwrap();
    assert_eq!((shown.status.as_str(), shown.fault), ("ACTIVE", None));
}

#[tokio::test]
async fn an_operation_that_hangs_is_abandoned_by_the_administrator_only() {
    let agent = Agent::start().await;
    let id = server(&agent, "web").await;
    agent.gate.send_replace(false);
    let stop = agent
        .servers()
        .stop_server(stop(&id))
        .await
        .unwrap()
        .into_inner();
    let name = stop.operation.unwrap().name;
    let abandon = |name: &str| v1::AbandonOperationRequest {
        name: name.to_owned(),
        patience: Some(prost_types::Duration {
            seconds: 0,
            nanos: 200_000_000,
        }),
    };
    let member = of("member", "p", abandon(&name));
    assert_eq!(
        refusal(agent.servers().abandon_operation(member).await).1,
        "PERMISSION_DENIED"
    );
    let cancel = CancelOperationRequest { name: name.clone() };
    let other = of("member", "q", cancel);
    assert_eq!(
        refusal(agent.operations().cancel_operation(other).await).1,
        "PERMISSION_DENIED"
    );
    let ended = agent
        .servers()
        .abandon_operation(abandon(&name))
        .await
        .unwrap()
        .into_inner();
    let Some(Outcome::Error(error)) = ended.operation.unwrap().result else {
        panic!("it failed");
    };
    assert!(error.message.contains("given up"), "{}", error.message);
    let shown = agent.get(&id).await.unwrap();
    assert_eq!(
        (shown.status.as_str(), shown.operation.as_str()),
        ("ERROR", "")
    );
    assert_eq!(shown.fault.unwrap().step, "PowerOff");
    let again = agent.servers().abandon_operation(abandon(&name)).await;
    assert_eq!(refusal(again).1, "NOT_CANCELLABLE");
    let cancel = CancelOperationRequest { name };
    assert_eq!(
        refusal(agent.operations().cancel_operation(cancel).await).1,
        "NOT_CANCELLABLE"
    );
    let unknown = abandon(&format!("operations/{}", Uuid::new_v4()));
    assert_eq!(
        refusal(agent.servers().abandon_operation(unknown).await).1,
        "OPERATION_NOT_FOUND"
    );
    let mut long = abandon("operations/0000");
    long.patience = Some(prost_types::Duration {
        seconds: 301,
        nanos: 0,
    });
    assert_eq!(
        refusal(agent.servers().abandon_operation(long).await).1,
        "INVALID_FIELD"
    );
}

#[tokio::test]
async fn what_was_done_to_a_server_is_listed_with_novas_names_and_kept_when_it_is_gone() {
    let agent = Agent::start().await;
    let id = server(&agent, "web").await;
    agent.servers().lock_server(lock(&id)).await.unwrap();
    let delete = v1::ForceDeleteServerRequest {
        server: id.clone(),
        ..v1::ForceDeleteServerRequest::default()
    };
    let deleted = agent
        .servers()
        .force_delete_server(delete)
        .await
        .unwrap()
        .into_inner();
    agent.ended(deleted.operation).await;
    let restore = v1::RestoreServerRequest {
        server: id.clone(),
        ..v1::RestoreServerRequest::default()
    };
    assert_eq!(
        refusal(agent.servers().restore_server(restore).await).1,
        "SERVER_NOT_FOUND"
    );
    let list = ListOperationsRequest {
        filter: format!("server={id}"),
        ..ListOperationsRequest::default()
    };
    let list = agent
        .operations()
        .list_operations(list)
        .await
        .unwrap()
        .into_inner();
    let names: Vec<_> = list
        .operations
        .iter()
        .map(|operation| {
            let metadata = metadata(operation);
            assert!(metadata.end_time.is_some() && operation.done);
            (
                metadata.action,
                metadata.instance_action,
                metadata.instance_event,
            )
        })
        .collect();
    let expected = [
        ("forceDelete", "delete", "compute_terminate_instance"),
        ("lock", "lock", "api_lock"),
        // Nova adopts nothing.
        ("adopt", "adopt", ""),
    ];
    assert_eq!(
        names,
        expected.map(|(ours, action, event)| {
            (ours.to_owned(), action.to_owned(), event.to_owned())
        })
    );
}
