// SPDX-License-Identifier: Apache-2.0
//! Lists of servers, and what names find.

use salvor_proto::v1;
use tonic::Code;

use crate::harness::{Agent, delete, refusal, stop};

#[tokio::test]
async fn pages_stay_valid_while_servers_are_deleted() {
    let agent = Agent::start().await;
    let mut ids = Vec::new();
    for index in 0..7 {
        ids.push(agent.server(&format!("web-{index}")).await);
    }
    let list = async |page_token: String| {
        let request = v1::ListServersRequest {
            page_size: 3,
            page_token,
            ..v1::ListServersRequest::default()
        };
        agent
            .servers()
            .list_servers(request)
            .await
            .unwrap()
            .into_inner()
    };
    let names = |page: &v1::ListServersResponse| {
        page.servers
            .iter()
            .map(|server| server.name.clone())
            .collect::<Vec<_>>()
    };
    let first = list(String::new()).await;
    assert_eq!(names(&first), ["web-0", "web-1", "web-2"]);
    // The one that the token stands at goes, and one before and one behind it.
    for index in [0, 2, 3] {
        let answer = agent
            .servers()
            .delete_server(delete(ids[index]))
            .await
            .unwrap()
            .into_inner();
        agent.ended(answer.operation).await;
    }
    let second = list(first.next_page_token).await;
    assert_eq!(names(&second), ["web-4", "web-5", "web-6"]);
    assert_eq!(second.next_page_token, "");
}

#[tokio::test]
async fn filters_must_all_hold() {
    let agent = Agent::start().await;
    for name in ["web-1", "web-2", "db-1"] {
        agent.server(name).await;
    }
    let answer = agent
        .servers()
        .stop_server(stop("web-2"))
        .await
        .unwrap()
        .into_inner();
    agent.ended(answer.operation).await;
    let names = async |request: v1::ListServersRequest| {
        let page = agent.servers().list_servers(request).await?.into_inner();
        let names: Vec<_> = page.servers.into_iter().map(|server| server.name).collect();
        Ok::<_, tonic::Status>(names)
    };
    let all = v1::ListServersRequest::default;
    assert_eq!(names(all()).await.unwrap(), ["web-1", "web-2", "db-1"]);
    let web = v1::ListServersRequest {
        name_contains: "web".to_owned(),
        statuses: vec!["SHUTOFF".to_owned(), "RESCUE".to_owned()],
        vm_states: vec![v1::VmState::Stopped.into()],
        origin: v1::ServerOrigin::Adopted.into(),
        ..all()
    };
    assert_eq!(names(web).await.unwrap(), ["web-2"]);
    let created = v1::ListServersRequest {
        origin: v1::ServerOrigin::Created.into(),
        ..all()
    };
    assert!(names(created).await.unwrap().is_empty());
    for wrong in [
        v1::ListServersRequest {
            page_size: -1,
            ..all()
        },
        v1::ListServersRequest {
            page_token: "x".to_owned(),
            ..all()
        },
        v1::ListServersRequest {
            statuses: vec!["shutoff".to_owned()],
            ..all()
        },
        v1::ListServersRequest {
            vm_states: vec![0],
            ..all()
        },
        v1::ListServersRequest {
            power_states: vec![99],
            ..all()
        },
        v1::ListServersRequest {
            origin: -1,
            ..all()
        },
    ] {
        assert_eq!(refusal(names(wrong).await).0, Code::InvalidArgument);
    }
}

#[tokio::test]
async fn names_that_several_have_are_refused() {
    let agent = Agent::start().await;
    let one = agent.server("one").await;
    let two = agent.domain("two").await;
    let adopt = v1::AdoptServerRequest {
        domain: two.to_string(),
        name: "one".to_owned(),
        ..v1::AdoptServerRequest::default()
    };
    let answer = agent
        .servers()
        .adopt_server(adopt)
        .await
        .unwrap()
        .into_inner();
    agent.ended(answer.operation).await;
    let (code, reason, _) = refusal(agent.get("one").await);
    assert_eq!(
        (code, reason.as_str()),
        (Code::InvalidArgument, "AMBIGUOUS_NAME")
    );
    assert_eq!(
        agent.get(&one.to_string().to_uppercase()).await.unwrap().id,
        one.to_string()
    );
}

#[tokio::test]
async fn a_page_ends_before_it_is_too_large_for_a_client() {
    let agent = Agent::start().await;
    agent.image("cirros").await;
    for index in 0..40 {
        let request = v1::CreateServerRequest {
            name: format!("web-{index}"),
            image: "cirros".to_owned(),
            flavor: Some(v1::Flavor {
                vcpus: 1,
                memory_mib: 64,
                disk_gib: 0,
            }),
            metadata: (0..128)
                .map(|i| (format!("k{i}"), "🚀".repeat(255)))
                .collect(),
            ..v1::CreateServerRequest::default()
        };
        let answer = agent.servers().create_server(request).await.unwrap();
        agent.ended(answer.into_inner().operation).await;
    }
    let (mut names, mut page_token) = (Vec::new(), String::new());
    loop {
        let request = v1::ListServersRequest {
            page_token,
            ..v1::ListServersRequest::default()
        };
        let page = agent
            .servers()
            .list_servers(request)
            .await
            .unwrap()
            .into_inner();
        names.extend(page.servers.into_iter().map(|server| server.name));
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
        assert!(
            names.len() < 40,
            "there is a next page, and it is not empty"
        );
    }
    let all: Vec<_> = (0..40).map(|index| format!("web-{index}")).collect();
    assert_eq!(names, all);
}
