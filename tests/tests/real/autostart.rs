// SPDX-License-Identifier: Apache-2.0
//! After a reboot of a host with real guests: what ran comes back.

use salvor_proto::v1::{GetHostRequest, Host, PowerState, Server, VmState};
use salvor_tests::agent::AgentSettings;
use salvor_tests::client::Client;
use salvor_tests::console::Console;
use salvor_tests::guests::TinyGuest;
use salvor_tests::host::TestHost;
use salvor_tests::run_folder::RunFolder;
use salvor_tests::wait::{BOOT, SOON};
use uuid::Uuid;

use crate::scene::{Scene, rescue_with, unrescue_of};

async fn host_of(scene: &mut Scene<'_>) -> Host {
    let answer = scene.client.hosts.get_host(GetHostRequest {}).await;
    answer.unwrap().into_inner().host.unwrap()
}

/// Waits until nothing is waited for any more.
async fn all_back(scene: &mut Scene<'_>) -> Host {
    let deadline = std::time::Instant::now() + BOOT;
    loop {
        let host = host_of(scene).await;
        if host.autostart.as_ref().is_some_and(|it| it.waiting == 0) {
            return host;
        }
        assert!(std::time::Instant::now() < deadline, "{host:#?}");
        tokio::task::yield_now().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_ran_before_a_reboot_of_the_host_comes_back_as_it_was() {
    let folder = RunFolder::for_this_test();
    let host = TestHost::start(folder.path());
    let settings = AgentSettings::default().set("autostart.enabled", true);
    let mut scene = Scene::on(&host, folder.path(), settings).await;
    let image = scene.tiny_image("doctor").await;
    let runs = scene.tiny(&TinyGuest::new("runs")).await;
    let off = scene.tiny(&TinyGuest::new("off")).await;
    scene
        .client
        .stop(off, Some(std::time::Duration::ZERO))
        .await
        .done();
    let paused = scene.tiny(&TinyGuest::new("paused")).await;
    scene.libvirt.suspend(paused).unwrap();
    let is_paused = |server: &Server| server.vm_state() == VmState::Paused;
    scene
        .client
        .wait_server(paused, "it is paused", is_paused)
        .await;
    let patient = scene.tiny(&TinyGuest::new("patient")).await;
    scene.rescue(rescue_with(patient, &image)).await;
    // libvirt starts this one by itself.
    let flagged = scene.tiny(&TinyGuest::new("flagged")).await;
    scene.libvirt.set_autostart(flagged).unwrap();
    let before = host_of(&mut scene).await;
    assert!(before.autostart.is_none(), "{before:#?}");

    let consoles: Vec<(Uuid, Console)> = [runs, paused, patient]
        .iter()
        .map(|id| (*id, scene.console(*id)))
        .collect();
    let marks: Vec<_> = consoles.iter().map(|(_, console)| console.mark()).collect();
    host.reboot();
    scene.agent.forget_process();
    scene.restart().await;
    let after = all_back(&mut scene).await;
    assert_ne!(after.boot_id, before.boot_id);
    let progress = after.autostart.unwrap();
    println!("{progress:?}");
    assert_eq!(
        (progress.started, progress.left_alone, progress.failed),
        (3, 1, 0),
        "{progress:?}"
    );
    for ((id, console), mark) in consoles.iter().zip(marks) {
        let ready = if *id == patient {
            "TINY-READY doctor"
        } else {
            "TINY-READY"
        };
        console.wait_line(mark, ready, SOON);
    }
    for id in [runs, paused, flagged] {
        let server = scene.wait_power(id, PowerState::Running).await;
        Client::assert_settled(&server, VmState::Active);
    }
    let server = scene.wait_power(patient, PowerState::Running).await;
    Client::assert_settled(&server, VmState::Rescued);
    let server = scene.wait_power(off, PowerState::Shutdown).await;
    Client::assert_settled(&server, VmState::Stopped);
    scene.unrescue(unrescue_of(patient)).await;

    // Another start of the agent in the same boot starts nothing.
    scene
        .client
        .stop(runs, Some(std::time::Duration::ZERO))
        .await
        .done();
    scene.agent.kill_9();
    scene.restart().await;
    let server = scene.wait_power(runs, PowerState::Shutdown).await;
    Client::assert_settled(&server, VmState::Stopped);
}
