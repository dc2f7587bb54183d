// SPDX-License-Identifier: Apache-2.0
//! Real definitions that somebody changes with virsh: seen, shown, accepted, put back.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use salvor_proto::v1::{
    AcceptServerDriftRequest, CreateServerRequest, Firmware, Flavor, GetServerDriftRequest,
    GetServerDriftResponse, PowerState, RestoreServerDefinitionRequest, Server, VmState,
};
use salvor_tests::client::{Client, Plain};
use salvor_tests::guests::TinyGuest;
use salvor_tests::wait::SOON;
use uuid::Uuid;

use crate::create::server_from;
use crate::scene::{Scene, rescue_with, unrescue_of};

async fn drift(scene: &mut Scene<'_>, id: Uuid) -> GetServerDriftResponse {
    let server = id.to_string();
    let request = GetServerDriftRequest { server };
    let answer = scene.client.servers.get_server_drift(request).await;
    answer.unwrap().into_inner()
}

async fn accept(scene: &mut Scene<'_>, id: Uuid) -> Server {
    let request = AcceptServerDriftRequest {
        server: id.to_string(),
        ..Default::default()
    };
    let answer = scene.client.servers.accept_server_drift(request).await;
    let operation = answer.unwrap().into_inner().operation.unwrap();
    scene.client.wait(&operation).await.done().server.unwrap()
}

async fn restore(scene: &mut Scene<'_>, id: Uuid) -> Server {
    let request = RestoreServerDefinitionRequest {
        server: id.to_string(),
        ..Default::default()
    };
    let answer = scene
        .client
        .servers
        .restore_server_definition(request)
        .await;
    let operation = answer.unwrap().into_inner().operation.unwrap();
    scene.client.wait(&operation).await.done().server.unwrap()
}

/// A console with a password, and a device that needs no bus of its own.
const CONSOLE: &str = "<graphics type='vnc' port='-1' passwd='s3cret'/>";
const TABLET: &str = "<input type='tablet' bus='virtio'/>";

/// Somebody gives it a device, as with `virsh edit`.
fn edit(scene: &Scene<'_>, id: Uuid, device: &str) -> String {
    let xml = scene.libvirt.inactive_xml(id).unwrap();
    let edited = xml.replace("</devices>", &format!("{device}</devices>"));
    scene.libvirt.define(&edited).unwrap();
    scene.libvirt.inactive_xml(id).unwrap()
}

async fn until_drifted(scene: &mut Scene<'_>, id: Uuid) {
    let drifted = |server: &Server| server.drift_time.is_some();
    scene.client.wait_server(id, "it is drift", drifted).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_somebody_edits_is_shown_and_accepted_or_put_back_while_the_guest_runs() {
    let mut scene = Scene::new().await;
    let id = scene.tiny(&TinyGuest::new("edited")).await;
    let number = scene.libvirt.number(id).unwrap();
    assert!(!drift(&mut scene, id).await.drifted);

    let own = scene.libvirt.inactive_xml(id).unwrap();
    let edited = edit(&scene, id, CONSOLE);
    until_drifted(&mut scene, id).await;
    let shown = drift(&mut scene, id).await;
    assert!(shown.drifted && shown.since.is_some(), "{shown:?}");
    let added = shown.diff.lines().filter(|line| line.starts_with('+'));
    assert!(added.into_iter().any(|line| line.contains("<graphics")));
    assert!(!shown.diff.contains("s3cret"), "{}", shown.diff);
    println!("{}", shown.diff);

    let server = restore(&mut scene, id).await;
    Client::assert_settled(&server, VmState::Active);
    assert!(server.drift_time.is_none());
    assert_eq!(scene.libvirt.inactive_xml(id).unwrap(), own);
    assert!(!drift(&mut scene, id).await.drifted);

    edit(&scene, id, CONSOLE);
    until_drifted(&mut scene, id).await;
    assert_eq!(scene.libvirt.number(id).unwrap(), number, "it ran on");
    // A server that was adopted is its owner's: a hard reboot keeps what they made of it.
    scene.client.act(Plain::HardReboot, id).await.done();
    assert_eq!(scene.libvirt.inactive_xml(id).unwrap(), edited);
    assert!(drift(&mut scene, id).await.drifted);
    let number = scene.libvirt.number(id).unwrap();
    let server = accept(&mut scene, id).await;
    assert!(server.drift_time.is_none());
    assert_eq!(scene.libvirt.inactive_xml(id).unwrap(), edited);
    assert!(!drift(&mut scene, id).await.drifted);
    assert_eq!(
        scene.libvirt.number(id).unwrap(),
        number,
        "it ran all the time"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_libvirt_does_to_a_definition_is_no_drift_and_a_rescue_hides_none() {
    let mut scene = Scene::new().await;
    let image = scene.tiny_image("made").await;
    let request = CreateServerRequest {
        name: "made".to_owned(),
        image: image.id.clone(),
        flavor: Some(Flavor {
            vcpus: 1,
            memory_mib: 64,
            disk_gib: 0,
        }),
        machine: "pc".to_owned(),
        ..Default::default()
    };
    let (answer, ended) = scene.client.create(request).await;
    ended.done();
    let id: Uuid = answer.server_id.parse().unwrap();
    scene.remove_at_end(id);
    assert!(!drift(&mut scene, id).await.drifted);
    scene
        .client
        .stop(id, Some(std::time::Duration::ZERO))
        .await
        .done();
    // What somebody removes while it is off is made again when it is started.
    scene.libvirt.undefine(id).unwrap();
    scene.client.start(id).await.done();
    assert!(!drift(&mut scene, id).await.drifted);
    // The agent's own look agrees.
    scene.agent.kill_9();
    scene.restart().await;
    scene.wait_power(id, PowerState::Running).await;

    edit(&scene, id, TABLET);
    until_drifted(&mut scene, id).await;
    scene.rescue(rescue_with(id, &image)).await;
    let rescued = drift(&mut scene, id).await;
    assert!(rescued.diff.contains("type='tablet'"), "{}", rescued.diff);
    assert!(!rescued.diff.contains("salvor-rescue"), "{}", rescued.diff);
    scene.client.unrescue(unrescue_of(id)).await.done();
    // A hard reboot makes a server of the agent's own what it was.
    scene.client.act(Plain::HardReboot, id).await.done();
    assert!(!drift(&mut scene, id).await.drifted);
    let none = |server: &Server| server.drift_time.is_none();
    scene.client.wait_server(id, "it is none", none).await;
    edit(&scene, id, TABLET);
    until_drifted(&mut scene, id).await;
    let server = restore(&mut scene, id).await;
    assert!(server.drift_time.is_none());
    scene.client.delete(id).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_domain_that_somebody_undefined_comes_back_as_it_was() {
    let mut scene = Scene::new().await;
    let id = scene.tiny(&TinyGuest::new("undefined")).await;
    let console = scene.console(id);
    let own = scene.libvirt.inactive_xml(id).unwrap();
    // While it runs: what is left is a transient domain, which is shown.
    scene.libvirt.undefine(id).unwrap();
    until_drifted(&mut scene, id).await;
    assert!(drift(&mut scene, id).await.diff.contains("-<domain"));
    restore(&mut scene, id).await;
    assert_eq!(scene.libvirt.inactive_xml(id).unwrap(), own);
    // Its guest's end is not its own: a hard reboot and a stop define it first.
    scene.libvirt.undefine(id).unwrap();
    let mark = console.mark();
    scene.client.act(Plain::HardReboot, id).await.done();
    console.wait_line(mark, "TINY-READY undefined", SOON);
    assert_eq!(scene.libvirt.inactive_xml(id).unwrap(), own);
    scene.libvirt.undefine(id).unwrap();
    scene.client.stop(id, None).await.done();
    assert_eq!(scene.libvirt.inactive_xml(id).unwrap(), own);
    let server = scene.client.start(id).await.done().server.unwrap();
    Client::assert_settled(&server, VmState::Active);
    // And altogether.
    scene.libvirt.destroy(id).unwrap();
    scene.libvirt.undefine(id).unwrap();
    scene.wait_power(id, PowerState::Nostate).await;
    restore(&mut scene, id).await;
    assert_eq!(scene.libvirt.inactive_xml(id).unwrap(), own);
    let stopped = |server: &Server| server.vm_state() == VmState::Stopped;
    scene.client.wait_server(id, "it is stopped", stopped).await;
    let mark = console.mark();
    scene.client.start(id).await.done();
    console.wait_line(mark, "TINY-READY undefined", SOON);
}

/// Where a definition has its UEFI variables.
fn variables(xml: &str) -> PathBuf {
    let element = xml.split("<nvram").nth(1).expect("an <nvram>");
    let text = element.split_once('>').unwrap().1;
    text.split("</nvram>").next().unwrap().into()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_in_uefi_variables_is_no_drift_and_where_they_are_is() {
    let mut scene = Scene::new().await;
    let image = scene.tiny_image("made").await;
    let request = CreateServerRequest {
        firmware: Firmware::Uefi.into(),
        ..server_from(&image, 32)
    };
    let (answer, ended) = scene.client.create(request).await;
    ended.done();
    let made: Uuid = answer.server_id.parse().unwrap();
    scene.remove_at_end(made);
    // libvirt finds the firmware of this one itself, and a place for its variables.
    let adopted = scene.define(&scene.tiny_xml(&TinyGuest::new("found")).uefi());
    scene.client.adopt(adopted).await;
    scene.client.start(adopted).await.done();
    for id in [made, adopted] {
        let started = drift(&mut scene, id).await;
        assert!(!started.drifted, "{}", started.diff);
        let file = variables(&scene.libvirt.live_xml(id).unwrap());
        let file = scene.host.outside(&file);
        let mut bytes = fs::read(&file).unwrap();
        bytes.reverse();
        fs::write(&file, bytes).unwrap();
        scene.libvirt.destroy(id).unwrap();
        scene.wait_power(id, PowerState::Shutdown).await;
        scene.libvirt.start(id).unwrap();
        scene.wait_power(id, PowerState::Running).await;
        let now = drift(&mut scene, id).await;
        assert!(!now.drifted, "{}", now.diff);
        scene.client.stop(id, Some(Duration::ZERO)).await.done();
    }

    let own = scene.libvirt.inactive_xml(made).unwrap();
    let file = variables(&own);
    let before = fs::read(&file).unwrap();
    let elsewhere = scene.folder.join("other_VARS.fd");
    let moved = own.replace(
        &format!("{}</nvram>", file.display()),
        &format!("{}</nvram>", elsewhere.display()),
    );
    assert_ne!(moved, own);
    scene.libvirt.define(&moved).unwrap();
    until_drifted(&mut scene, made).await;
    let shown = drift(&mut scene, made).await.diff;
    assert!(shown.contains("other_VARS.fd"), "{shown}");
    restore(&mut scene, made).await;
    assert_eq!(scene.libvirt.inactive_xml(made).unwrap(), own);
    assert!(fs::read(&file).unwrap() == before, "they were touched");
    // Variables that are gone are none of a definition's business: libvirt starts with new ones.
    fs::remove_file(&file).unwrap();
    assert!(!drift(&mut scene, made).await.drifted);
    scene.client.start(made).await.done();
    assert_eq!(fs::read(&file).unwrap().len(), before.len());
    scene.client.delete(made).await.done();
}
