// SPDX-License-Identifier: Apache-2.0
//! The agent is killed at every point of a delete, a soft delete and the removal that follows it: whoever
//! comes next goes on, until nothing is left of the server.

use std::path::{Path, PathBuf};

use salvor_proto::google::longrunning::ListOperationsRequest;
use salvor_proto::v1::{
    CreateServerRequest, DeleteServerRequest, Firmware, Flavor, ForceDeleteServerRequest, Image,
    OperationState, PlanActionRequest, plan_action_request::Action,
};
use salvor_tests::agent::AgentSettings;
use salvor_tests::client::{Ended, Plain, metadata_of};
use salvor_tests::host::TestHost;
use salvor_tests::wait::SOON;
use uuid::Uuid;

use super::cases::points;
use crate::scene::{Scene, files_below};

/// A server with all that one can leave behind: files of its own, UEFI variables, saved memory, an image.
async fn with_saved_memory(scene: &mut Scene<'_>, image: &Image) -> Uuid {
    let id = running(scene, image).await;
    scene.client.act(Plain::Suspend, id).await.done();
    assert_eq!(saved(scene.host, id).len(), 1, "its memory");
    id
}

async fn running(scene: &mut Scene<'_>, image: &Image) -> Uuid {
    let flavor = Flavor {
        vcpus: 1,
        memory_mib: 32,
        disk_gib: 0,
    };
    let request = CreateServerRequest {
        name: "removed".into(),
        image: image.id.clone(),
        flavor: Some(flavor),
        firmware: Firmware::Uefi.into(),
        ..CreateServerRequest::default()
    };
    let (made, ended) = scene.client.create(request).await;
    ended.done();
    let id = made.server_id.parse().unwrap();
    scene.remove_at_end(id);
    let is_variables = |file: &PathBuf| file.ends_with("nvram.fd");
    assert!(scene.files_of(id).iter().any(is_variables));
    id
}

/// What libvirt keeps of a domain in files: its saved memory, UEFI variables, snapshots.
fn saved(host: &TestHost, id: Uuid) -> Vec<PathBuf> {
    let mut files = files_below(&host.outside(Path::new("/var/lib/libvirt/qemu")));
    files.retain(|file| file.to_string_lossy().contains(&id.to_string()));
    files
}

/// The failpoints of an action, in whose plan the agent is killed.
async fn points_of(scene: &mut Scene<'_>, action: Action) -> Vec<String> {
    let plan = PlanActionRequest {
        action: Some(action),
    };
    let planned = scene.client.servers.plan_action(plan).await.unwrap();
    let planned = planned.into_inner();
    assert!(planned.accepted, "{planned:#?}");
    let before_commit = planned
        .steps
        .iter()
        .filter(|step| step.phase != "clean-up")
        .count();
    points(planned.steps.len(), before_commit)
}

/// Waits for the end of the server's operation of this kind, which so many deaths of the agent have cut off.
async fn assert_went_on(scene: &mut Scene<'_>, id: Uuid, verb: &str, deaths: u32) {
    let request = ListOperationsRequest {
        filter: format!("server={id}"),
        ..ListOperationsRequest::default()
    };
    let answer = scene.client.operations.list_operations(request).await;
    let operations = answer.unwrap().into_inner().operations;
    let its = operations
        .iter()
        .find(|operation| metadata_of(operation).action == verb);
    let ended: Ended = scene.client.wait(its.expect("it was accepted")).await;
    assert_eq!(ended.metadata.state(), OperationState::Done, "{ended:#?}");
    assert_eq!(ended.metadata.recoveries, deaths, "{ended:#?}");
}

/// Checks that there is nothing left of a server.
async fn assert_gone(scene: &mut Scene<'_>, id: Uuid, image: &Image) {
    assert!(scene.libvirt.state(id).is_err(), "the domain");
    assert_eq!(scene.host.qemu(id), None, "the guest");
    assert_eq!(saved(scene.host, id), Vec::<PathBuf>::new());
    let servers = scene.agent.state_folder().join("servers");
    assert_eq!(files_below(&servers), Vec::<PathBuf>::new());
    assert!(!servers.join(id.to_string()).exists());
    assert_eq!(scene.saved_definition(id), None);
    assert_eq!(scene.references(&image.id).await, 0);
    assert_eq!(scene.client.list().await, [], "the record");
}

fn delete_of(id: Uuid) -> Action {
    Action::Delete(DeleteServerRequest {
        server: id.to_string(),
        ..DeleteServerRequest::default()
    })
}

fn force_delete_of(id: Uuid) -> Action {
    Action::ForceDelete(ForceDeleteServerRequest {
        server: id.to_string(),
        ..ForceDeleteServerRequest::default()
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_killed_anywhere_in_a_delete_goes_on_until_nothing_is_left() {
    let mut scene = Scene::new().await;
    let image = scene.tiny_image("gone").await;
    let mut id = with_saved_memory(&mut scene, &image).await;
    let mut points = points_of(&mut scene, delete_of(id)).await;
    println!("killed at {} points", points.len());
    while let Some(point) = points.pop() {
        println!("delete {point}");
        scene.restart_with(&format!("delete:{point}:kill")).await;
        // The answer may die with the agent.
        let _ = scene.client.begin(Plain::Delete, id).await;
        assert_eq!(scene.agent.wait_end(SOON), "signal 9");
        scene.start_with("").await;
        assert_went_on(&mut scene, id, "delete", 1).await;
        assert_gone(&mut scene, id, &image).await;
        if !points.is_empty() {
            id = with_saved_memory(&mut scene, &image).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_killed_anywhere_in_a_soft_delete_and_the_removal_goes_on_until_nothing_is_left() {
    let settings = AgentSettings::default().set("delete.reclaim_interval", "1s");
    let mut scene = Scene::with(settings).await;
    let image = scene.tiny_image("gone").await;
    let mut id = running(&mut scene, &image).await;
    let soft = points_of(&mut scene, delete_of(id)).await;
    let removals = points_of(&mut scene, force_delete_of(id)).await;
    // Whoever goes on with the soft delete is killed in the removal, which nobody asked it for.
    for (soft, removal) in soft.iter().cycle().zip(&removals) {
        println!("softDelete {soft}, forceDelete {removal}");
        scene.restart_with(&format!("softDelete:{soft}:kill")).await;
        let _ = scene.client.begin(Plain::Delete, id).await;
        assert_eq!(scene.agent.wait_end(SOON), "signal 9");
        assert!(scene.libvirt.state(id).is_ok(), "it is removed at once");
        assert!(!scene.files_of(id).is_empty());
        let failpoint = format!("forceDelete:{removal}:kill");
        scene
            .agent
            .change_settings(|settings| settings.env("SALVOR_FAILPOINT", &failpoint));
        // It may die before it serves.
        scene.agent.spawn();
        assert_eq!(scene.agent.wait_end(SOON), "signal 9");
        scene.start_with("").await;
        // Nothing comes after the outcome of a soft delete.
        let deaths = u32::from(soft != "after-commit");
        assert_went_on(&mut scene, id, "softDelete", deaths).await;
        assert_went_on(&mut scene, id, "forceDelete", 1).await;
        assert_gone(&mut scene, id, &image).await;
        if Some(removal) != removals.last() {
            id = running(&mut scene, &image).await;
        }
    }
    println!("killed at {} points", soft.len() + removals.len());
}
