// SPDX-License-Identifier: Apache-2.0
//! What happens to real guests past the agent: it is seen and told, and nothing is fought.

use std::time::Duration;

use salvor_proto::v1::{
    GuestEvent, PowerState, Server, VmState, WatchEventsRequest, event::Change,
    watch_events_response::Item,
};
use salvor_tests::agent::AgentSettings;
use salvor_tests::client::{Client, Plain};
use salvor_tests::console::{Console, Mark};
use salvor_tests::guests::TinyGuest;
use salvor_tests::host::TestHost;
use salvor_tests::run_folder::RunFolder;
use salvor_tests::wait::SOON;
use uuid::Uuid;
use virt::domain::DomainState;

use crate::ends::SmallDisk;
use crate::scene::{Scene, power_of, rescue_with, unrescue_of};

/// The reason of a server's power.
fn reason_of(server: &Server) -> &str {
    server.power.as_ref().map_or("", |power| &power.reason)
}

/// How its guest is not as it should be; empty if it is.
fn mismatch_of(server: &Server) -> &str {
    server
        .mismatch
        .as_ref()
        .map_or("", |mismatch| &mismatch.kind)
}

/// Waits until the server is meant to be so.
async fn becomes(scene: &mut Scene<'_>, id: Uuid, vm_state: VmState) -> Server {
    let what = format!("it is {vm_state:?}");
    let is_so = |server: &Server| server.vm_state() == vm_state;
    scene.client.wait_server(id, &what, is_so).await
}

fn resume(scene: &Scene<'_>, id: Uuid) {
    scene.libvirt.domain(id, |domain| domain.resume()).unwrap();
}

/// Waits until the watchers are told of such an incident.
async fn told(scene: &Scene<'_>, id: Uuid, kind: &str) -> GuestEvent {
    let request = WatchEventsRequest {
        after_revision: Some(0),
        servers: vec![id.to_string()],
    };
    let mut watches = scene.client.watches.clone();
    let mut stream = watches.watch_events(request).await.unwrap().into_inner();
    let wait = async {
        loop {
            let item = stream.message().await.unwrap().unwrap().item.unwrap();
            if let Item::Event(event) = item
                && let Some(Change::Guest(guest)) = event.change
                && guest.kind == kind
            {
                return guest;
            }
        }
    };
    tokio::time::timeout(SOON, wait)
        .await
        .unwrap_or_else(|_| panic!("nobody is told of {kind}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn reboots_watchdogs_and_panics_of_guests_are_told_to_watchers() {
    let mut scene = Scene::new().await;
    let xml = scene
        .tiny_xml(&TinyGuest::new("restless"))
        .device("<watchdog model='ib700' action='pause'/>")
        .device("<panic model='isa'/>");
    let id = scene.running(&xml, "TINY-READY restless").await;
    let mut console = scene.console(id);

    let mark = console.mark();
    console.send("r");
    console.wait_line(mark, "TINY-READY restless", SOON);
    assert_eq!(told(&scene, id, "rebooted").await.count, 1);
    assert_eq!(scene.client.get(id).await.vm_state(), VmState::Active);

    console.send("w");
    let fired = told(&scene, id, "watchdog").await;
    assert_eq!(fired.action, "pause");
    let server = scene.wait_power(id, PowerState::Paused).await;
    assert_eq!(
        (server.vm_state(), reason_of(&server), mismatch_of(&server)),
        (VmState::Active, "watchdog", "halted")
    );
    resume(&scene, id);
    let server = scene.wait_power(id, PowerState::Running).await;
    assert_eq!(mismatch_of(&server), "");

    let mark = console.mark();
    console.send("r");
    console.wait_line(mark, "TINY-READY restless", SOON);
    console.send("p");
    told(&scene, id, "panicked").await;
    let server = becomes(&mut scene, id, VmState::Stopped).await;
    assert_eq!(mismatch_of(&server), "crashed");
    let server = scene.client.start(id).await.done().server.unwrap();
    assert_eq!(mismatch_of(&server), "");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_reboots_without_end_fills_no_log() {
    let mut scene = Scene::new().await;
    let id = scene.tiny(&TinyGuest::new("looping")).await;
    let mut console = scene.console(id);
    for _ in 0..10 {
        let mark = console.mark();
        console.send("r");
        console.wait_line(mark, "TINY-READY looping", SOON);
    }
    // The rest of them comes together, a while after the first.
    let request = WatchEventsRequest {
        after_revision: Some(0),
        servers: vec![id.to_string()],
    };
    let mut watches = scene.client.watches.clone();
    let mut stream = watches.watch_events(request).await.unwrap().into_inner();
    let wait = async {
        let (mut events, mut reboots) = (0, 0);
        while reboots < 10 {
            let item = stream.message().await.unwrap().unwrap().item.unwrap();
            if let Item::Event(event) = item
                && let Some(Change::Guest(guest)) = event.change
            {
                assert_eq!(guest.kind, "rebooted");
                events += 1;
                reboots += guest.count;
            }
        }
        (events, reboots)
    };
    let (events, reboots) = tokio::time::timeout(2 * SOON, wait).await.unwrap();
    println!("{reboots} reboots in {events} events");
    assert!(events <= 4, "{events} events of {reboots} reboots");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_whose_disk_is_full_says_so_and_goes_on_when_there_is_room() {
    let folder = RunFolder::for_this_test();
    let host = TestHost::start(folder.path());
    let small = folder.join("small");
    let disk = SmallDisk::mount(&host, &small, "size=16m");
    let mut scene = Scene::on(&host, folder.path(), AgentSettings::default()).await;
    let guest = TinyGuest::new("hungry");
    let xml = scene.tiny_xml(&guest);
    // Its disk lies where there is no room.
    let from = scene.disk("hungry");
    std::fs::copy(&from, disk.outside.join("hungry.qcow2")).unwrap();
    let moved = small.join("hungry.qcow2");
    let xml = xml
        .xml()
        .replace(from.to_str().unwrap(), moved.to_str().unwrap());
    let id = scene.define_xml(&xml);
    scene.libvirt.start(id).unwrap();
    let mut console = scene.console(id);
    console.wait_line(Mark::START, "TINY-READY hungry", SOON);
    scene.client.adopt(id).await;

    // Nobody is there when it happens, and libvirt itself goes away after it.
    scene.agent.kill_9();
    let filler = disk.use_up_bytes();
    console.send("d");
    scene.libvirt.wait_state(id, DomainState::Paused, SOON);
    host.kill_libvirtd();
    host.start_libvirtd();
    scene.restart().await;
    let says = |server: &Server| reason_of(server) == "ioerror: no space on vda";
    let server = scene.client.wait_server(id, "it says why", says).await;
    assert_eq!(
        (server.vm_state(), power_of(&server), mismatch_of(&server)),
        (VmState::Active, PowerState::Paused, "io-error")
    );

    // Without room it is halted again at once, and now somebody hears it.
    resume(&scene, id);
    let event = told(&scene, id, "io-error").await;
    assert_eq!(
        (event.reason.as_str(), event.action.as_str()),
        ("no space", "pause")
    );
    assert!(event.device.contains("virtio-disk0"), "{event:?}");
    scene.client.wait_server(id, "it says why", says).await;

    std::fs::remove_file(filler).unwrap();
    scene.client.act(Plain::Unpause, id).await.done();
    let server = scene.wait_power(id, PowerState::Running).await;
    assert_eq!(
        (server.vm_state(), mismatch_of(&server)),
        (VmState::Active, "")
    );
    let mark = console.mark();
    console.send("t");
    console.wait_line(mark, "TINY-TICK", SOON);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_crashes_is_started_again_if_configured_and_does_not_spin() {
    let settings = AgentSettings::default().set("policy.crashed", "start");
    let mut scene = Scene::with(settings).await;
    let id = scene.tiny(&TinyGuest::new("fragile")).await;
    let console = scene.console(id);
    let mark = console.mark();
    scene.host.kill_qemu(id);
    console.wait_line(mark, "TINY-READY fragile", SOON);
    let server = becomes(&mut scene, id, VmState::Active).await;
    assert_eq!(mismatch_of(&server), "");

    scene.host.kill_qemu(id);
    let server = becomes(&mut scene, id, VmState::Stopped).await;
    assert_eq!(mismatch_of(&server), "crashed");
    let mark = console.mark();
    // The next try is half a minute after the first. What would come at once would be here by now.
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(console.since(mark), "");
    assert_eq!(scene.client.get(id).await.vm_state(), VmState::Stopped);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_somebody_pauses_saves_or_starts_is_what_it_is_seen_to_be() {
    let mut scene = Scene::new().await;
    let id = scene.tiny(&TinyGuest::new("shared")).await;
    let console = scene.console(id);
    scene.libvirt.suspend(id).unwrap();
    let server = becomes(&mut scene, id, VmState::Paused).await;
    assert_eq!(
        (server.status.as_str(), reason_of(&server)),
        ("PAUSED", "user")
    );

    // Through a restart of the agent, and past one that is away.
    scene.agent.kill_9();
    scene.restart().await;
    let server = scene.wait_power(id, PowerState::Paused).await;
    Client::assert_settled(&server, VmState::Paused);
    scene.agent.kill_9();
    resume(&scene, id);
    scene.restart().await;
    becomes(&mut scene, id, VmState::Active).await;
    scene.agent.kill_9();
    scene.libvirt.suspend(id).unwrap();
    scene.restart().await;
    becomes(&mut scene, id, VmState::Paused).await;
    resume(&scene, id);
    becomes(&mut scene, id, VmState::Active).await;

    let save = |scene: &Scene<'_>| {
        let saved = scene.libvirt.domain(id, |domain| domain.managed_save(0));
        saved.unwrap();
    };
    save(&scene);
    let server = becomes(&mut scene, id, VmState::Suspended).await;
    assert_eq!(power_of(&server), PowerState::Shutdown);
    let mark = console.mark();
    scene.libvirt.start(id).unwrap();
    becomes(&mut scene, id, VmState::Active).await;
    assert!(!console.since(mark).contains("TINY-UP"), "it went on");
    save(&scene);
    becomes(&mut scene, id, VmState::Suspended).await;
    scene.agent.kill_9();
    let drop_memory = |scene: &Scene<'_>| {
        let dropped = scene
            .libvirt
            .domain(id, |domain| domain.managed_save_remove(0));
        dropped.unwrap();
    };
    drop_memory(&scene);
    scene.restart().await;
    becomes(&mut scene, id, VmState::Stopped).await;
    let mark = console.mark();
    scene.client.start(id).await.done();
    console.wait_line(mark, "TINY-READY shared", SOON);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_look_after_an_outage_of_libvirt_finds_all_that_was_missed() {
    let folder = RunFolder::for_this_test();
    let host = TestHost::start(folder.path());
    let mut scene = Scene::on(&host, folder.path(), AgentSettings::default()).await;
    let crashes = scene.tiny(&TinyGuest::new("crashes")).await;
    let quits = scene.tiny(&TinyGuest::new("quits")).await;
    let stays = scene.tiny(&TinyGuest::new("stays")).await;
    let paused = scene.tiny(&TinyGuest::new("paused")).await;
    scene.libvirt.suspend(paused).unwrap();
    becomes(&mut scene, paused, VmState::Paused).await;
    let mut console = Console::of(&scene.libvirt, quits);
    // Opened before libvirt is away.
    console.send("t");
    let revision = scene.client.get(quits).await.revision;

    host.kill_libvirtd();
    for id in [crashes, quits, stays, paused] {
        let server = scene.wait_power(id, PowerState::Unknown).await;
        let known = server.power.as_ref().unwrap().last_known_state();
        let expected = match id == paused {
            true => PowerState::Paused,
            false => PowerState::Running,
        };
        assert_eq!(known, expected);
    }
    assert_eq!(scene.client.get(paused).await.vm_state(), VmState::Paused);
    host.kill_qemu(crashes);
    let mark = console.mark();
    console.type_on("q");
    console.wait_line(mark, "TINY-OFF", SOON);
    host.start_libvirtd();

    let server = becomes(&mut scene, crashes, VmState::Stopped).await;
    assert_eq!(mismatch_of(&server), "crashed");
    let server = becomes(&mut scene, quits, VmState::Stopped).await;
    assert_eq!(mismatch_of(&server), "stopped-by-itself");
    let server = scene.wait_power(stays, PowerState::Running).await;
    assert_eq!(
        (server.vm_state(), mismatch_of(&server)),
        (VmState::Active, "")
    );
    let server = scene.wait_power(paused, PowerState::Paused).await;
    assert_eq!(server.vm_state(), VmState::Paused);

    // A guest that was shutting down when libvirt came back was never called off before it was: its QEMU
    // holds its disks for some seconds.
    let request = WatchEventsRequest {
        after_revision: Some(revision),
        servers: vec![quits.to_string()],
    };
    let mut stream = scene
        .client
        .watches
        .watch_events(request)
        .await
        .unwrap()
        .into_inner();
    let mut seen = Vec::new();
    loop {
        let item = tokio::time::timeout(SOON, stream.message()).await.unwrap();
        match item.unwrap().unwrap().item.unwrap() {
            Item::Event(event) => {
                if let Some(Change::Server(server)) = event.change {
                    let power = server.power.clone().unwrap();
                    seen.push((server.vm_state(), power.state(), power.reason));
                }
            }
            Item::CaughtUp(_) => break,
            Item::Gap(gap) => panic!("{gap:?}"),
        }
    }
    println!("{seen:?}");
    assert!(seen.iter().all(|(vm_state, power, _)| {
        (*vm_state == VmState::Stopped) == (*power == PowerState::Shutdown)
    }));
    assert_eq!(
        seen.last().map(|(_, power, _)| *power),
        Some(PowerState::Shutdown)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rescue_guest_that_powers_off_is_a_rescue_still_and_unrescue_is_the_way_out() {
    let mut scene = Scene::new().await;
    let id = scene.tiny(&TinyGuest::new("patient")).await;
    let image = scene.tiny_image("doctor").await;
    let mut console = scene.console(id);
    let mark = console.mark();
    scene.rescue(rescue_with(id, &image)).await;
    console.wait_line(mark, "TINY-READY doctor", SOON);
    console.send("q");
    let server = scene.wait_power(id, PowerState::Shutdown).await;
    Client::assert_settled(&server, VmState::Rescued);
    assert_eq!(mismatch_of(&server), "");
    scene.agent.kill_9();
    scene.restart().await;
    let server = scene.wait_power(id, PowerState::Shutdown).await;
    Client::assert_settled(&server, VmState::Rescued);
    let mark = console.mark();
    let server = scene.unrescue(unrescue_of(id)).await;
    Client::assert_settled(&server, VmState::Active);
    console.wait_line(mark, "TINY-READY patient", SOON);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_domain_that_vanished_leaves_a_server_that_says_what_can_be_done() {
    let mut scene = Scene::new().await;
    let id = scene.tiny(&TinyGuest::new("lost")).await;
    scene.libvirt.undefine(id).unwrap();
    assert_eq!(scene.libvirt.state(id).unwrap(), DomainState::Running);
    scene.libvirt.destroy(id).unwrap();
    let server = scene.wait_power(id, PowerState::Nostate).await;
    let gone = |server: &Server| mismatch_of(server) == "vanished";
    scene.client.wait_server(id, "it is gone", gone).await;
    assert_eq!(reason_of(&server), "no domain");
    let mismatch = scene.client.get(id).await.mismatch.unwrap();
    assert!(mismatch.advice.contains("--restore"), "{mismatch:?}");
    scene.client.delete(id).await;
}
