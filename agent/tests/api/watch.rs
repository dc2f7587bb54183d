// SPDX-License-Identifier: Apache-2.0
//! WatchService.

use std::time::Duration;

use salvor_proto::v1::{self, event::Change, watch_events_response::Item};
use tonic::{Code, Streaming};

use crate::harness::{Agent, delete, refusal, start, stop};

async fn open(
    agent: &Agent,
    after: Option<i64>,
    servers: &[&str],
) -> Streaming<v1::WatchEventsResponse> {
    let request = v1::WatchEventsRequest {
        after_revision: after,
        servers: servers.iter().map(ToString::to_string).collect(),
    };
    agent
        .watch()
        .watch_events(request)
        .await
        .unwrap()
        .into_inner()
}

async fn next(stream: &mut Streaming<v1::WatchEventsResponse>) -> Item {
    let message = tokio::time::timeout(Duration::from_secs(20), stream.message()).await;
    message
        .expect("a message in time")
        .unwrap()
        .unwrap()
        .item
        .unwrap()
}

/// Everything up to the next sign that the stream has caught up, and that revision.
async fn caught_up(stream: &mut Streaming<v1::WatchEventsResponse>) -> (Vec<Item>, i64) {
    let mut items = Vec::new();
    loop {
        match next(stream).await {
            Item::CaughtUp(caught_up) => return (items, caught_up.revision),
            item => items.push(item),
        }
    }
}

fn events(items: &[Item]) -> Vec<&v1::Event> {
    items
        .iter()
        .filter_map(|item| match item {
            Item::Event(event) => Some(event),
            Item::Gap(_) | Item::CaughtUp(_) => None,
        })
        .collect()
}

#[tokio::test]
async fn without_a_revision_the_servers_come_first_and_then_what_changes() {
    let agent = Agent::start().await;
    let id = agent.server("web").await;
    agent.server("db").await;
    let mut stream = open(&agent, None, &[]).await;
    let (items, revision) = caught_up(&mut stream).await;
    assert_eq!(items.len(), 2);
    assert!(
        events(&items)
            .iter()
            .all(|event| matches!(event.change, Some(Change::Server(_))))
    );
    assert_eq!(revision, *agent.store.revision().borrow());

    let answer = agent
        .servers()
        .stop_server(stop(id))
        .await
        .unwrap()
        .into_inner();
    agent.ended(answer.operation).await;
    let newest = *agent.store.revision().borrow();
    let (mut items, mut at) = caught_up(&mut stream).await;
    while at < newest {
        let more = caught_up(&mut stream).await;
        items.extend(more.0);
        at = more.1;
    }
    let told = events(&items);
    let revisions: Vec<_> = told.iter().map(|event| event.revision).collect();
    assert!(revisions.is_sorted_by(|a, b| a < b), "{revisions:?}");
    assert!(revisions[0] > revision);
    assert!(
        told.iter()
            .any(|event| matches!(&event.change, Some(Change::Server(s)) if s.status == "SHUTOFF"))
    );
    assert!(
        told.iter()
            .any(|event| matches!(&event.change, Some(Change::Operation(o)) if o.done))
    );
}

#[tokio::test]
async fn a_stream_is_taken_up_where_it_broke_off_also_by_another_agent() {
    let agent = Agent::start().await;
    let id = agent.server("web").await;
    let (all, newest) = caught_up(&mut open(&agent, Some(0), &[]).await).await;
    let revisions: Vec<_> = events(&all).iter().map(|event| event.revision).collect();
    assert_eq!(revisions, (1..=newest).collect::<Vec<_>>());
    let agent = agent.restart().await;
    let (rest, _) = caught_up(&mut open(&agent, Some(2), &[]).await).await;
    assert_eq!(rest, all[2..]);
    let (none, at) = caught_up(&mut open(&agent, Some(newest), &[]).await).await;
    assert!(none.is_empty() && at == newest);

    let answer = agent
        .servers()
        .delete_server(delete(id))
        .await
        .unwrap()
        .into_inner();
    agent.ended(answer.operation).await;
    let (told, _) = caught_up(&mut open(&agent, Some(newest), &[]).await).await;
    assert!(events(&told).iter().any(|event| {
        matches!(&event.change, Some(Change::ServerRemoved(removed)) if removed.action == "delete")
    }));
}

#[tokio::test]
async fn what_is_no_longer_kept_is_a_gap_and_so_is_a_revision_of_another_store() {
    let agent = Agent::start_keeping(5).await;
    let id = agent.server("web").await;
    // The log is trimmed now and then only.
    while agent.store.events_after(0, 1).await.unwrap().oldest == 1 {
        let answer = agent
            .servers()
            .stop_server(stop(id))
            .await
            .unwrap()
            .into_inner();
        agent.ended(answer.operation).await;
        agent.hypervisor.guest_powers_off(id);
        let answer = agent
            .servers()
            .start_server(start(id))
            .await
            .unwrap()
            .into_inner();
        agent.ended(answer.operation).await;
        agent
            .hypervisor
            .set_power(id, salvor_agent::core::state::PowerState::Running, "booted");
    }
    let newest = *agent.store.revision().borrow();
    for after in [1, newest + 1_000] {
        let (items, at) = caught_up(&mut open(&agent, Some(after), &[]).await).await;
        let Item::Gap(gap) = items[0] else {
            panic!("no gap after {after}")
        };
        assert_eq!(gap.after_revision, after);
        assert!(gap.oldest_revision > 1 && gap.oldest_revision <= newest + 1);
        assert!(
            matches!(&events(&items)[0].change, Some(Change::Server(server)) if server.id == id.to_string())
        );
        assert_eq!((items.len(), at), (2, newest));
    }
}

#[tokio::test]
async fn a_stream_about_some_servers_tells_of_no_others() {
    let agent = Agent::start().await;
    let (web, db) = (agent.server("web").await, agent.server("db").await);
    for id in [web, db] {
        let answer = agent
            .servers()
            .stop_server(stop(id))
            .await
            .unwrap()
            .into_inner();
        agent.ended(answer.operation).await;
    }
    let (items, _) = caught_up(&mut open(&agent, Some(0), &["web"]).await).await;
    assert!(!items.is_empty());
    assert!(
        events(&items)
            .iter()
            .all(|event| event.server_id == web.to_string())
    );
    let (items, _) = caught_up(&mut open(&agent, None, &["db"]).await).await;
    assert_eq!(events(&items)[0].server_id, db.to_string());
    assert_eq!(items.len(), 1);
}

#[tokio::test]
async fn a_watch_that_makes_no_sense_is_refused() {
    let agent = Agent::start().await;
    let watch = async |after_revision, servers: Vec<String>| {
        let request = v1::WatchEventsRequest {
            after_revision,
            servers,
        };
        agent.watch().watch_events(request).await.map(|_| ())
    };
    assert_eq!(
        refusal(watch(Some(-1), Vec::new()).await).0,
        Code::InvalidArgument
    );
    assert_eq!(
        refusal(watch(None, vec!["none".to_owned()]).await).0,
        Code::NotFound
    );
    assert_eq!(
        refusal(watch(None, vec!["x".to_owned(); 1_001]).await).0,
        Code::InvalidArgument
    );
}

#[tokio::test]
async fn a_stream_ends_when_the_agent_stops() {
    let agent = Agent::start().await;
    let mut stream = open(&agent, None, &[]).await;
    caught_up(&mut stream).await;
    agent.draining.send_replace(true);
    let ended = tokio::time::timeout(Duration::from_secs(20), stream.message())
        .await
        .unwrap();
    let (code, reason, _) = refusal(ended);
    assert_eq!((code, reason.as_str()), (Code::Unavailable, "DRAINING"));
}

#[tokio::test]
async fn a_client_that_does_not_read_holds_up_nobody() {
    let agent = Agent::start().await;
    let id = agent.server("web").await;
    let mut lazy = open(&agent, Some(0), &[]).await;
    for _ in 0..40 {
        let answer = agent
            .servers()
            .stop_server(stop(id))
            .await
            .unwrap()
            .into_inner();
        agent.ended(answer.operation).await;
        agent.hypervisor.guest_powers_off(id);
        let answer = agent
            .servers()
            .start_server(start(id))
            .await
            .unwrap()
            .into_inner();
        agent.ended(answer.operation).await;
        agent
            .hypervisor
            .set_power(id, salvor_agent::core::state::PowerState::Running, "booted");
    }
    let newest = *agent.store.revision().borrow();
    let (mut items, mut at) = caught_up(&mut lazy).await;
    while at < newest {
        let more = caught_up(&mut lazy).await;
        items.extend(more.0);
        at = more.1;
    }
    let revisions: Vec<_> = events(&items).iter().map(|event| event.revision).collect();
    assert_eq!(revisions, (1..=newest).collect::<Vec<_>>());
}
