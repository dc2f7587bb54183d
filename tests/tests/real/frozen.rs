// SPDX-License-Identifier: Apache-2.0
//! One sick guest stays one sick guest: while the QEMU of one server is frozen and calls about it hang,
//! everything else is as fast as before, and the frozen one can be destroyed.

use std::time::{Duration, Instant};

use salvor_proto::google::longrunning::Operation;
use salvor_proto::v1::{
    DeleteServerRequest, GetHostRequest, GuestStop, OperationState, StopServerRequest, StuckCall,
    VmState,
};
use salvor_tests::agent::AgentSettings;
use salvor_tests::client::{Client, Ended};
use salvor_tests::host::TestHost;
use salvor_tests::run_folder::RunFolder;
use salvor_tests::wait::SOON;
use uuid::Uuid;

use crate::actor::{Actor, FIXER, tiny};
use crate::scene::Scene;

/// So many calls and actions make a median.
const READS: usize = 200;
const ACTIONS: usize = 5;

/// What one frozen guest may cost the others.
const LIMIT: Duration = Duration::from_millis(50);

/// How long things take; medians.
#[derive(Debug)]
struct Figures {
    get: Duration,
    list: Duration,
    rescue: Duration,
    unrescue: Duration,
    delete: Duration,
}

fn median(mut samples: Vec<Duration>) -> Duration {
    samples.sort();
    samples[samples.len() / 2]
}

async fn measure(scene: &mut Scene<'_>, well: &Actor, round: &str) -> Figures {
    let (mut get, mut list) = (Vec::new(), Vec::new());
    for _ in 0..READS {
        let begun = Instant::now();
        scene.client.get(well.id).await;
        get.push(begun.elapsed());
        let begun = Instant::now();
        scene.client.list().await;
        list.push(begun.elapsed());
    }
    let (mut rescue, mut unrescue, mut delete) = (Vec::new(), Vec::new(), Vec::new());
    for action in 0..ACTIONS {
        let (mark, begun) = (well.console().mark(), Instant::now());
        let operation = scene.begin_rescue(well).await;
        scene.client.wait(&operation).await.done();
        rescue.push(begun.elapsed());
        well.wait_ready(mark, FIXER);

        let (mark, begun) = (well.console().mark(), Instant::now());
        let operation = scene.begin_unrescue(well).await;
        scene.client.wait(&operation).await.done();
        unrescue.push(begun.elapsed());
        well.wait_ready(mark, &well.name);

        let guest = tiny(&format!("doomed-{round}-{action}"));
        let doomed = scene.another_actor(&guest).await;
        let begun = Instant::now();
        let ended = begin_delete(scene, doomed.id).await;
        ended.done();
        delete.push(begun.elapsed());
    }
    Figures {
        get: median(get),
        list: median(list),
        rescue: median(rescue),
        unrescue: median(unrescue),
        delete: median(delete),
    }
}

async fn begin_delete(scene: &mut Scene<'_>, server: Uuid) -> Ended {
    let request = DeleteServerRequest {
        server: server.to_string(),
        ..Default::default()
    };
    let answer = scene
        .client
        .servers
        .delete_server(request)
        .await
        .unwrap()
        .into_inner();
    scene.client.wait(&answer.operation.unwrap()).await
}

async fn begin_graceful_stop(scene: &mut Scene<'_>, server: Uuid) -> Operation {
    let request = StopServerRequest {
        server: server.to_string(),
        shutdown_timeout: Some(Duration::from_secs(600).try_into().unwrap()),
        ..Default::default()
    };
    let answer = scene
        .client
        .servers
        .stop_server(request)
        .await
        .unwrap()
        .into_inner();
    answer.operation.unwrap()
}

async fn stuck_calls(scene: &mut Scene<'_>) -> Vec<StuckCall> {
    let host = scene
        .client
        .hosts
        .get_host(GetHostRequest {})
        .await
        .unwrap()
        .into_inner();
    host.host.unwrap().stuck_calls
}

/// Waits until the host tells of stuck calls, or tells of none.
async fn wait_stuck(scene: &mut Scene<'_>, some: bool) -> Vec<StuckCall> {
    let deadline = Instant::now() + SOON;
    loop {
        let stuck = stuck_calls(scene).await;
        if stuck.is_empty() != some {
            return stuck;
        }
        assert!(
            Instant::now() < deadline,
            "waited in vain for some={some}: {stuck:#?}"
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_guest_delays_nobody_and_can_be_destroyed() {
    let folder = RunFolder::for_this_test();
    let host = TestHost::start(folder.path());
    let (well, mut scene) = Scene::with_actor(
        &host,
        folder.path(),
        &tiny("well"),
        AgentSettings::default(),
    )
    .await;
    let mut frozen = Vec::new();
    for name in ["frozen-0", "frozen-1"] {
        frozen.push(scene.another_actor(&tiny(name)).await);
    }
    let healthy = measure(&mut scene, &well, "healthy").await;
    println!("healthy: {healthy:?}");

    let mut stops = Vec::new();
    for actor in &frozen {
        host.freeze_qemu(actor.id);
        stops.push(begin_graceful_stop(&mut scene, actor.id).await);
    }
    let sick = measure(&mut scene, &well, "sick").await;
    println!("two frozen, their stops hang: {sick:?}");
    for (what, before, now) in [
        ("get", healthy.get, sick.get),
        ("list", healthy.list, sick.list),
    ] {
        assert!(
            now <= before + LIMIT,
            "{what} was {before:?} and is {now:?}"
        );
    }
    // The machine may be busy with other tests: what a hanging call costs is seconds.
    for (what, before, now) in [
        ("rescue", healthy.rescue, sick.rescue),
        ("unrescue", healthy.unrescue, sick.unrescue),
        ("delete", healthy.delete, sick.delete),
    ] {
        let over = now.saturating_sub(before);
        println!("{what}: {before:?} healthy, {now:?} with two frozen: {over:?} more");
        assert!(
            now <= 2 * before + Duration::from_secs(1),
            "{what} was {before:?} and is {now:?}"
        );
    }
    let stuck = wait_stuck(&mut scene, true).await;
    println!("{stuck:?}");
    for call in &stuck {
        assert!(
            frozen
                .iter()
                .any(|actor| actor.id.to_string() == call.domain_id),
            "{call:#?}"
        );
        assert!(
            !call.call.is_empty() && call.age.unwrap().seconds >= 5,
            "{call:#?}"
        );
    }

    // Destroyed while frozen: one by a delete that overtakes the stop, and meanwhile a rescue of another.
    let [first, second] = frozen.as_slice() else {
        panic!("two");
    };
    let request = DeleteServerRequest {
        server: first.id.to_string(),
        ..Default::default()
    };
    let mut servers = scene.client.servers.clone();
    let begun = Instant::now();
    let deleting = tokio::spawn(async move { servers.delete_server(request).await });
    let meanwhile = measure(&mut scene, &well, "meanwhile").await;
    println!("while a frozen one is deleted: {meanwhile:?}");
    assert!(meanwhile.get <= healthy.get + LIMIT && meanwhile.list <= healthy.list + LIMIT);
    let deleted = deleting
        .await
        .unwrap()
        .unwrap()
        .into_inner()
        .operation
        .unwrap();
    scene.client.wait(&deleted).await.done();
    println!("a frozen one was deleted in {:?}", begun.elapsed());
    assert_eq!(host.qemu(first.id), None);
    let overtaken = scene.client.wait(&stops[0]).await;
    assert_eq!(
        overtaken.metadata.state(),
        OperationState::Cancelled,
        "{overtaken:#?}"
    );

    // The other by a stop that gives it no time, once the one that hangs is cancelled.
    let begun = Instant::now();
    let name = stops[1].name.clone();
    let cancel = salvor_proto::google::longrunning::CancelOperationRequest { name };
    scene
        .client
        .operations
        .cancel_operation(cancel)
        .await
        .unwrap();
    let cancelled = scene.client.wait(&stops[1]).await;
    assert_eq!(
        cancelled.metadata.state(),
        OperationState::Cancelled,
        "{cancelled:#?}"
    );
    println!("a stop that hung was cancelled in {:?}", begun.elapsed());
    let begun = Instant::now();
    let stopped = scene
        .client
        .stop(second.id, Some(Duration::ZERO))
        .await
        .done();
    println!("a frozen one was stopped in {:?}", begun.elapsed());
    assert_eq!(stopped.guest_stop(), GuestStop::Forced);
    Client::assert_settled(&stopped.server.unwrap(), VmState::Stopped);
    assert_eq!(host.qemu(second.id), None);

    wait_stuck(&mut scene, false).await;
    let mark = second.console().mark();
    scene.client.start(second.id).await.done();
    second.wait_ready(mark, &second.name);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_guest_that_is_asked_politely_is_ended_when_its_time_is_over() {
    let folder = RunFolder::for_this_test();
    let host = TestHost::start(folder.path());
    let (actor, mut scene) = Scene::with_actor(
        &host,
        folder.path(),
        &tiny("stiff"),
        AgentSettings::default(),
    )
    .await;
    host.freeze_qemu(actor.id);
    let begun = Instant::now();
    let stopped = scene
        .client
        .stop(actor.id, Some(Duration::from_secs(12)))
        .await
        .done();
    println!(
        "a frozen guest was given 12 s and was off after {:?}",
        begun.elapsed()
    );
    assert_eq!(stopped.guest_stop(), GuestStop::Forced);
    assert_eq!(host.qemu(actor.id), None);
    wait_stuck(&mut scene, false).await;
}
