// SPDX-License-Identifier: Apache-2.0
//! The stream of events: taken up again after a restart nothing is missed and nothing told twice, and what
//! is no longer kept is told as a gap.

use std::time::Duration;

use salvor_proto::v1::{
    Event, Gap, GetHostRequest, ReleaseServerRequest, WatchEventsRequest, event::Change,
    watch_events_response::Item,
};
use salvor_tests::agent::AgentSettings;
use salvor_tests::host::TestHost;
use salvor_tests::run_folder::RunFolder;
use salvor_tests::wait::SOON;

use crate::actor::{Actor, tiny};
use crate::scene::Scene;

/// What a watch told until it had caught up with `newest`, and the revision that it had caught up with.
struct Told {
    events: Vec<Event>,
    gaps: Vec<Gap>,
    caught_up: i64,
}

/// Watches from a revision on until the stream says that it has caught up with `newest` at least.
async fn watch(scene: &mut Scene<'_>, after: Option<i64>, newest: i64) -> Told {
    let request = WatchEventsRequest {
        after_revision: after,
        servers: Vec::new(),
    };
    let mut stream = scene
        .client
        .watches
        .watch_events(request)
        .await
        .unwrap()
        .into_inner();
    let mut told = Told {
        events: Vec::new(),
        gaps: Vec::new(),
        caught_up: 0,
    };
    loop {
        let item = tokio::time::timeout(SOON, stream.message()).await;
        let item = item
            .expect("the stream fell silent")
            .unwrap()
            .expect("the stream ended");
        match item.item.unwrap() {
            Item::Event(event) => told.events.push(event),
            Item::Gap(gap) => told.gaps.push(gap),
            Item::CaughtUp(caught_up) if caught_up.revision >= newest => {
                told.caught_up = caught_up.revision;
                return told;
            }
            Item::CaughtUp(_) => {}
        }
    }
}

async fn newest(scene: &mut Scene<'_>) -> i64 {
    let host = scene
        .client
        .hosts
        .get_host(GetHostRequest {})
        .await
        .unwrap();
    host.into_inner().host.unwrap().revision
}

fn revisions(events: &[Event]) -> Vec<i64> {
    events.iter().map(|event| event.revision).collect()
}

/// Watches until the stream breaks off.
async fn watch_to_the_end(scene: &Scene<'_>, after: i64) -> tokio::task::JoinHandle<Vec<Event>> {
    let request = WatchEventsRequest {
        after_revision: Some(after),
        servers: Vec::new(),
    };
    let mut watches = scene.client.watches.clone();
    let mut stream = watches.watch_events(request).await.unwrap().into_inner();
    tokio::spawn(async move {
        let mut events = Vec::new();
        while let Ok(Some(message)) = stream.message().await {
            match message.item {
                Some(Item::Event(event)) => events.push(event),
                Some(Item::Gap(gap)) => panic!("{gap:?}"),
                _ => {}
            }
        }
        events
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_that_is_taken_up_again_misses_nothing_and_tells_nothing_twice() {
    let folder = RunFolder::for_this_test();
    let host = TestHost::shared();
    let (actor, mut scene) = Scene::with_actor(
        host,
        folder.path(),
        &tiny("watched"),
        AgentSettings::default(),
    )
    .await;
    let mut live: Vec<Event> = Vec::new();
    for kill in [true, false, true] {
        let after = live.last().map_or(0, |event| event.revision);
        let watching = watch_to_the_end(&scene, after).await;
        let operation = scene.begin_rescue(&actor).await;
        scene.wait_step(&operation, "DefineDomain").await;
        if kill {
            scene.agent.kill_9();
        } else {
            assert_eq!(scene.agent.sigterm_and_wait(SOON), "exit 0");
        }
        live.extend(tokio::time::timeout(SOON, watching).await.unwrap().unwrap());
        scene.restart().await;
        scene.client.wait(&operation).await.done();
        scene.unrescue_actor(&actor).await;
    }
    let after = live.last().map_or(0, |event| event.revision);
    let newest = newest(&mut scene).await;
    live.extend(watch(&mut scene, Some(after), newest).await.events);

    let all = watch(&mut scene, Some(0), newest).await;
    assert_eq!(all.gaps, []);
    let numbers = revisions(&all.events);
    assert!(
        numbers.windows(2).all(|pair| pair[0] < pair[1]),
        "{numbers:?}"
    );
    let last = live.last().unwrap().revision;
    let all: Vec<Event> = all
        .events
        .into_iter()
        .filter(|event| event.revision <= last)
        .collect();
    assert_eq!(revisions(&live), revisions(&all));
    assert_eq!(live, all);
    println!("{} events over four lives of the agent", live.len());

    // The last event of the server is the server as it is.
    let of_server = live.iter().rev().find_map(|event| match &event.change {
        Some(Change::Server(server)) => Some(server),
        _ => None,
    });
    let now = scene.client.get(actor.id).await;
    let told = of_server.unwrap();
    assert_eq!(
        (told.revision, &told.status, &told.vm_state),
        (now.revision, &now.status, &now.vm_state)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn revisions_that_are_no_longer_kept_are_told_as_a_gap() {
    let folder = RunFolder::for_this_test();
    let host = TestHost::shared();
    let kept = Actor::define(host, folder.path(), &tiny("kept"));
    let busy = Actor::define(host, folder.path(), &tiny("busy"));
    let settings = AgentSettings::default().set("events.keep", 1000);
    let mut scene = Scene::on(host, folder.path(), settings).await;
    for actor in [&kept, &busy] {
        scene.remove_at_end(actor.id);
    }
    scene.client.adopt(kept.id).await;
    // Adopting and releasing is the cheapest that makes events.
    while newest(&mut scene).await < 2500 {
        scene.client.adopt(busy.id).await;
        release(&mut scene, &busy).await;
    }
    // Nobody else is there to make events, but an observation may come late.
    let newest = newest(&mut scene).await;
    let told = watch(&mut scene, Some(1), newest).await;
    let [gap] = told.gaps.as_slice() else {
        panic!("{:?}", told.gaps);
    };
    println!("{gap:?}, newest {newest}");
    assert_eq!(gap.after_revision, 1);
    assert!(
        gap.oldest_revision > 2 && newest - gap.oldest_revision < 2001,
        "{gap:?}"
    );
    // Every server as it is follows: here one.
    let Some(Change::Server(server)) = &told.events[0].change else {
        panic!("{:?}", told.events[0]);
    };
    assert_eq!(server.id, kept.id.to_string());

    // From the oldest kept revision on, nothing is missing.
    let told = watch(&mut scene, Some(gap.oldest_revision - 1), newest).await;
    assert_eq!(told.gaps, []);
    assert_eq!(told.events[0].revision, gap.oldest_revision);
    assert!(told.caught_up >= newest);

    // A revision that never was is one of another store's.
    let told = watch(&mut scene, Some(newest + 1_000_000), newest).await;
    assert_eq!(told.gaps.len(), 1);
}

async fn release(scene: &mut Scene<'_>, actor: &Actor) {
    let request = ReleaseServerRequest {
        server: actor.id.to_string(),
        ..Default::default()
    };
    let answer = scene
        .client
        .servers
        .release_server(request)
        .await
        .unwrap()
        .into_inner();
    scene.client.wait(&answer.operation.unwrap()).await.done();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_stream_says_that_it_lives() {
    let folder = RunFolder::for_this_test();
    let host = TestHost::shared();
    let mut scene = Scene::on(host, folder.path(), AgentSettings::default()).await;
    let request = WatchEventsRequest::default();
    let mut stream = scene
        .client
        .watches
        .watch_events(request)
        .await
        .unwrap()
        .into_inner();
    for _ in 0..2 {
        let told = tokio::time::timeout(Duration::from_secs(15), stream.message()).await;
        let item = told.unwrap().unwrap().unwrap().item.unwrap();
        assert!(matches!(item, Item::CaughtUp(_)), "{item:?}");
    }
}
