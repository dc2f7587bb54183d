// SPDX-License-Identifier: Apache-2.0
//! Adopt, start and stop, and the plainest rescue there is, on real guests.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use salvor_proto::v1::{GuestStop, PowerState, VmState};
use salvor_tests::agent::AgentSettings;
use salvor_tests::client::Client;
use salvor_tests::console::Mark;
use salvor_tests::guests::TinyGuest;
use salvor_tests::host::TestHost;
use salvor_tests::run_folder::RunFolder;
use salvor_tests::wait::SOON;
use virt::sys;

use crate::actor::tiny;
use crate::scene::{Scene, rescue_with, unrescue_of};

#[tokio::test(flavor = "multi_thread")]
async fn an_adopted_domain_is_stopped_and_started_and_its_definition_stays() {
    let mut scene = Scene::new().await;
    let xml = scene.tiny_xml(&TinyGuest::new("adopted"));
    let id = scene.define(&xml);
    scene.libvirt.start(id).unwrap();
    let console = scene.console(id);
    console.wait_line(Mark::START, "TINY-READY adopted", SOON);
    let definition = scene.libvirt.inactive_xml(id).unwrap();

    let server = scene.client.adopt(id).await;
    Client::assert_settled(&server, VmState::Active);
    assert_eq!(server.power.unwrap().state(), PowerState::Running);

    let stopped = scene.client.stop(id, None).await.done();
    assert_eq!(stopped.guest_stop(), GuestStop::ByItself);
    Client::assert_settled(&stopped.server.unwrap(), VmState::Stopped);

    let mark = console.mark();
    let started = scene.client.start(id).await.done().server.unwrap();
    Client::assert_settled(&started, VmState::Active);
    console.wait_line(mark, "TINY-READY adopted", SOON);

    let forced = scene.client.stop(id, Some(Duration::ZERO)).await.done();
    assert_eq!(forced.guest_stop(), GuestStop::Forced);
    assert_eq!(scene.libvirt.inactive_xml(id).unwrap(), definition);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repair_made_in_the_rescue_is_there_afterwards() {
    let folder = RunFolder::for_this_test();
    let settings = AgentSettings::default();
    let host = TestHost::shared();
    let (actor, mut scene) =
        Scene::with_actor(host, folder.path(), &tiny("patient"), settings).await;
    scene.rescue_actor(&actor).await;
    scene.unrescue_actor(&actor).await;
}

// gap 4
#[tokio::test(flavor = "multi_thread")]
async fn what_another_rescue_left_behind_is_not_used_and_goes_at_the_next_start() {
    let mut scene = Scene::new().await;
    let id = scene.tiny(&TinyGuest::new("orig")).await;
    let (one, other) = (
        scene.tiny_image("one").await,
        scene.tiny_image("other").await,
    );
    let console = scene.console(id);
    let mark = console.mark();
    scene.rescue(rescue_with(id, &one)).await;
    console.wait_line(mark, "TINY-READY one", SOON);
    // As if removing them had failed.
    let files: Vec<(PathBuf, Vec<u8>)> = scene
        .files_of(id)
        .into_iter()
        .map(|file| (file.clone(), fs::read(file).unwrap()))
        .collect();
    assert!(files.iter().any(|(file, _)| file.ends_with("disk.config")));
    scene.unrescue(unrescue_of(id)).await;
    for (file, content) in &files {
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(file, content).unwrap();
    }

    let mark = console.mark();
    scene.rescue(rescue_with(id, &other)).await;
    console.wait_line(mark, "TINY-READY other", SOON);
    for (file, content) in &files {
        assert_eq!(&fs::read(file).unwrap(), content, "{}", file.display());
    }
    scene.agent.kill_9();
    scene.restart().await;
    assert!(!files.iter().any(|(file, _)| file.exists()));
    let mark = console.mark();
    scene.unrescue(unrescue_of(id)).await;
    console.wait_line(mark, "TINY-READY orig", SOON);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_somebody_attaches_with_virsh_is_shown() {
    // libvirt tells nobody of this: it is seen with the next look at everything.
    let settings = AgentSettings::default().set("libvirt.resync_interval", "1s");
    let mut scene = Scene::with(settings).await;
    let xml = scene.tiny_xml(&TinyGuest::new("attached"));
    let id = scene.define(&xml);
    let before = scene.client.adopt(id).await.interfaces.len();
    let nic = "<interface type='user'><mac address='52:54:00:00:0a:01'/></interface>";
    scene
        .libvirt
        .domain(id, move |domain| {
            domain.attach_device_flags(nic, sys::VIR_DOMAIN_AFFECT_CONFIG)
        })
        .unwrap();
    let server = scene
        .client
        .wait_server(id, "the interface is shown", |server| {
            server.interfaces.len() > before
        })
        .await;
    let macs = server.interfaces.iter().map(|nic| nic.mac.as_str());
    assert!(macs.into_iter().any(|mac| mac == "52:54:00:00:0a:01"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_definition_that_somebody_edits_is_shown() {
    let settings = AgentSettings::default().set("libvirt.resync_interval", "1h");
    let mut scene = Scene::with(settings).await;
    let xml = scene.tiny_xml(&TinyGuest::new("edited"));
    let id = scene.define(&xml);
    let before = scene.client.adopt(id).await.interfaces.len();
    let nic = "<interface type='user'><mac address='52:54:00:00:0a:02'/></interface></devices>";
    let xml = scene.libvirt.inactive_xml(id).unwrap();
    scene
        .libvirt
        .define(&xml.replace("</devices>", nic))
        .unwrap();
    scene
        .client
        .wait_server(id, "the interface is shown", |server| {
            server.interfaces.len() == before + 1
        })
        .await;
}
