// SPDX-License-Identifier: Apache-2.0
//! Locks, updates, resets, soft delete and abandoned operations, on real guests.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use salvor_proto::google::longrunning::Operation;
use salvor_proto::v1::{
    AbandonOperationRequest, CreateServerRequest, ForceDeleteServerRequest, LockServerRequest,
    PowerState, ResetServerStateRequest, RestoreServerRequest, StopServerRequest,
    UnlockServerRequest, UpdateServerRequest, VmState,
};
use salvor_tests::agent::AgentSettings;
use salvor_tests::client::{Client, assert_refused};
use salvor_tests::guests::TinyGuest;
use salvor_tests::wait::SOON;
use tonic::{Code, Request};
use uuid::Uuid;

use crate::create::server_from;
use crate::scene::{Scene, files_below, rescue_with, seconds, unrescue_of};

/// A call for a member of the project `p`.
fn member<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    let headers = request.metadata_mut();
    headers.insert("x-salvor-role", "member".parse().unwrap());
    headers.insert("x-salvor-project", "p".parse().unwrap());
    request
}

async fn wait(scene: &mut Scene<'_>, operation: Option<Operation>) -> salvor_tests::client::Ended {
    scene.client.wait(&operation.unwrap()).await
}

async fn force_delete(scene: &mut Scene<'_>, id: Uuid) {
    let request = ForceDeleteServerRequest {
        server: id.to_string(),
        ..ForceDeleteServerRequest::default()
    };
    let answer = scene.client.servers.force_delete_server(request).await;
    wait(scene, answer.unwrap().into_inner().operation)
        .await
        .done();
}

async fn restore(scene: &mut Scene<'_>, id: Uuid) -> salvor_proto::v1::Server {
    let request = RestoreServerRequest {
        server: id.to_string(),
        ..RestoreServerRequest::default()
    };
    let answer = scene.client.servers.restore_server(request).await;
    let ended = wait(scene, answer.unwrap().into_inner().operation).await;
    ended.done().server.unwrap()
}

async fn reset(scene: &mut Scene<'_>, id: Uuid, to: VmState) -> salvor_proto::v1::ActionResult {
    let request = ResetServerStateRequest {
        server: id.to_string(),
        state: to.into(),
        ..ResetServerStateRequest::default()
    };
    let answer = scene.client.servers.reset_server_state(request).await;
    wait(scene, answer.unwrap().into_inner().operation)
        .await
        .done()
}

fn stop(id: Uuid) -> StopServerRequest {
    StopServerRequest {
        server: id.to_string(),
        shutdown_timeout: seconds(0),
        ..StopServerRequest::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_said_of_a_server_does_not_touch_its_guest() {
    let mut scene = Scene::new().await;
    let image = scene.tiny_image("said").await;
    let request = member(CreateServerRequest {
        ..server_from(&image, 64)
    });
    let made = scene
        .client
        .servers
        .create_server(request)
        .await
        .unwrap()
        .into_inner();
    let id: Uuid = made.server_id.parse().unwrap();
    scene.remove_at_end(id);
    wait(&mut scene, made.operation).await.done();
    let (qemu, xml) = (scene.host.qemu(id), scene.libvirt.live_xml(id).unwrap());
    assert!(qemu.is_some());

    let lock = LockServerRequest {
        server: id.to_string(),
        reason: Some("audit".into()),
        expires_in: seconds(2),
        ..LockServerRequest::default()
    };
    scene
        .client
        .servers
        .lock_server(member(lock))
        .await
        .unwrap();
    let refused = scene.client.servers.stop_server(member(stop(id))).await;
    assert_refused(refused, Code::FailedPrecondition, "SERVER_LOCKED");
    let update = UpdateServerRequest {
        server: id.to_string(),
        update_mask: Some(prost_types::FieldMask {
            paths: vec!["name".into(), "tags".into()],
        }),
        name: "renamed".into(),
        tags: vec!["blue".into()],
        ..UpdateServerRequest::default()
    };
    scene.client.servers.update_server(update).await.unwrap();
    scene.agent.kill_9();
    scene.restart().await;
    let server = scene
        .client
        .wait_server(id, "the lock's time is over", |server| {
            server.lock.is_none()
        })
        .await;
    assert_eq!(
        (server.name.as_str(), server.tags.as_slice()),
        ("renamed", &["blue".into()][..])
    );
    assert_eq!(server.project_id, "p");
    let unlock = UnlockServerRequest {
        server: id.to_string(),
        ..UnlockServerRequest::default()
    };
    scene
        .client
        .servers
        .unlock_server(member(unlock))
        .await
        .unwrap();

    let shown = reset(&mut scene, id, VmState::Error).await;
    assert_eq!(shown.server.unwrap().status, "ERROR");
    let host = shown.host.unwrap();
    assert_eq!(host.power_state(), PowerState::Running);
    assert!(host.defined && host.missing_disks.is_empty(), "{host:?}");
    let shown = reset(&mut scene, id, VmState::Active).await;
    Client::assert_settled(&shown.server.unwrap(), VmState::Active);
    assert_eq!(scene.host.qemu(id), qemu, "it is the same process");
    assert_eq!(scene.libvirt.live_xml(id).unwrap(), xml);
    let answer = scene
        .client
        .servers
        .stop_server(member(stop(id)))
        .await
        .unwrap();
    wait(&mut scene, answer.into_inner().operation).await.done();
    force_delete(&mut scene, id).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reset_of_a_rescued_server_keeps_its_way_back() {
    let mut scene = Scene::new().await;
    let id = scene.tiny(&TinyGuest::new("orig")).await;
    let definition = scene.libvirt.inactive_xml(id).unwrap();
    let image = scene.tiny_image("resc").await;
    let console = scene.console(id);
    let mark = console.mark();
    scene.rescue(rescue_with(id, &image)).await;
    console.wait_line(mark, "TINY-READY resc", SOON);
    reset(&mut scene, id, VmState::Error).await;
    let shown = reset(&mut scene, id, VmState::Active).await;
    assert!(shown.host.unwrap().rescue_domain);
    assert_eq!(shown.server.unwrap().status, "RESCUE");
    let mark = console.mark();
    scene.unrescue(unrescue_of(id)).await;
    console.wait_line(mark, "TINY-READY orig", SOON);
    assert_eq!(scene.libvirt.inactive_xml(id).unwrap(), definition);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_soft_deleted_server_is_restored_and_boots_or_goes_when_its_time_is_over() {
    let settings = AgentSettings::default().set("delete.reclaim_interval", "20s");
    let mut scene = Scene::with(settings).await;
    let id = scene.tiny(&TinyGuest::new("kept")).await;
    let definition = scene.libvirt.inactive_xml(id).unwrap();
    let console = scene.console(id);
    let deleted = scene.client.delete(id).await.done().server.unwrap();
    Client::assert_settled(&deleted, VmState::SoftDeleted);
    assert!(scene.host.qemu(id).is_none());
    assert_eq!(scene.libvirt.inactive_xml(id).unwrap(), definition);
    scene.agent.kill_9();
    scene.restart().await;
    let mark = console.mark();
    let restored = restore(&mut scene, id).await;
    Client::assert_settled(&restored, VmState::Active);
    console.wait_line(mark, "TINY-READY kept", SOON);
    assert_eq!(scene.libvirt.inactive_xml(id).unwrap(), definition);

    // Another one is not restored; the time goes on while the agent is away.
    let image = scene.tiny_image("gone").await;
    let (made, ended) = scene.client.create(server_from(&image, 64)).await;
    ended.done();
    let gone: Uuid = made.server_id.parse().unwrap();
    scene.remove_at_end(gone);
    scene.agent.kill_9();
    scene
        .agent
        .change_settings(|settings| settings.set("delete.reclaim_interval", "2s"));
    scene.restart().await;
    scene.client.delete(gone).await.done();
    scene.agent.kill_9();
    scene.restart().await;
    let deadline = std::time::Instant::now() + SOON;
    while scene
        .client
        .list()
        .await
        .iter()
        .any(|server| server.id == gone.to_string())
        || !scene.files_of(gone).is_empty()
    {
        assert!(std::time::Instant::now() < deadline, "it is not reclaimed");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(scene.libvirt.inactive_xml(gone).is_err());
    assert_eq!(scene.references(&image.id).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_made_server_goes_with_the_state_of_its_tpm_and_an_adopted_one_without() {
    let mut scene = Scene::new().await;
    let tpm = "<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm></devices>";
    let state = |scene: &Scene<'_>, id: Uuid| {
        let folder = PathBuf::from(format!("/var/lib/libvirt/swtpm/{id}"));
        scene.host.outside(&folder)
    };
    let image = scene.tiny_image("made").await;
    let (made, ended) = scene
        .client
        .create(CreateServerRequest {
            powered_off: true,
            ..server_from(&image, 64)
        })
        .await;
    ended.done();
    let made: Uuid = made.server_id.parse().unwrap();
    scene.remove_at_end(made);
    let adopted = scene.define(&scene.tiny_xml(&TinyGuest::new("orig")).q35());
    scene.client.adopt(adopted).await;
    for id in [made, adopted] {
        let xml = scene.libvirt.inactive_xml(id).unwrap();
        scene
            .libvirt
            .define(&xml.replace("</devices>", tpm))
            .unwrap();
        scene.client.start(id).await.done();
        assert!(
            !files_below(&state(&scene, id)).is_empty(),
            "it has a state"
        );
        force_delete(&mut scene, id).await;
        assert!(scene.libvirt.inactive_xml(id).is_err());
        assert!(scene.host.qemu(id).is_none());
    }
    assert!(!state(&scene, made).exists());
    assert!(state(&scene, adopted).exists(), "it is not ours to remove");
    fs::remove_dir_all(state(&scene, adopted)).unwrap();
    assert!(scene.files_of(made).is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_that_hangs_on_a_frozen_guest_is_abandoned_and_the_server_used_again() {
    let mut scene = Scene::new().await;
    let id = scene.tiny(&TinyGuest::new("frozen")).await;
    let console = scene.console(id);
    scene.host.freeze_qemu(id);
    let answer = scene.client.servers.stop_server(stop(id)).await.unwrap();
    let operation = answer.into_inner().operation.unwrap();
    let abandon = AbandonOperationRequest {
        name: operation.name.clone(),
        patience: seconds(1),
    };
    // libvirt waits ten seconds and more before it kills a QEMU that does not end.
    let answer = scene
        .client
        .servers
        .abandon_operation(abandon)
        .await
        .unwrap();
    let ended = scene
        .client
        .wait(&answer.into_inner().operation.unwrap())
        .await;
    assert!(ended.error().message.contains("given up"), "{ended:?}");
    let server = scene.client.get(id).await;
    assert_eq!(server.status, "ERROR");
    let fault = server.fault.unwrap();
    assert_eq!(
        (fault.reason.as_str(), fault.step.as_str()),
        ("ABANDONED", "PowerOff")
    );
    // What was given up may take effect, and is in nobody's way.
    let answer = scene.client.servers.stop_server(stop(id)).await.unwrap();
    let stopped = wait(&mut scene, answer.into_inner().operation).await.done();
    Client::assert_settled(&stopped.server.unwrap(), VmState::Stopped);
    let mark = console.mark();
    scene.client.start(id).await.done();
    console.wait_line(mark, "TINY-READY frozen", SOON);
}
