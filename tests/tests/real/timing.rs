// SPDX-License-Identifier: Apache-2.0
//! How guests are shut down before a rescue, and rescues that end by themselves.

use std::time::{Duration, Instant};

use salvor_proto::v1::{
    DiskProtection, GuestStop, OverlayDisposition, RescueServerRequest, VmState,
};
use salvor_tests::agent::AgentSettings;
use salvor_tests::client::{Client, assert_refused};
use salvor_tests::console::Mark;
use salvor_tests::guests::{LinuxGuest, TinyGuest, linux_slot};
use salvor_tests::wait::{BOOT, SOON};
use tonic::Code;

use crate::scene::{Scene, rescue_with, seconds, sha256, unrescue_of};

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_honours_the_power_button_shuts_down_by_itself_and_nobody_waits_longer() {
    let mut scene = Scene::new().await;
    let id = scene.tiny(&TinyGuest::new("orig")).await;
    let image = scene.tiny_image("resc").await;
    let console = scene.console(id);
    let begun = Instant::now();
    let request = RescueServerRequest {
        shutdown_timeout: None,
        ..rescue_with(id, &image)
    };
    let (_, ended) = scene.client.rescue(request).await;
    assert_eq!(ended.done().guest_stop(), GuestStop::ByItself);
    assert!(begun.elapsed() < SOON, "{:?}", begun.elapsed());
    assert!(console.text().contains("TINY-OFF"));
    console.wait_line(Mark::START, "TINY-READY resc", SOON);

    // The rescue guest gets the same chance.
    let request = salvor_proto::v1::UnrescueServerRequest {
        shutdown_timeout: None,
        ..unrescue_of(id)
    };
    let ended = scene.client.unrescue(request).await;
    assert_eq!(ended.done().guest_stop(), GuestStop::ByItself);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deaf_guest_is_ended_when_its_time_is_over_and_not_before() {
    let mut scene = Scene::with(AgentSettings::default().set("shutdown.timeout", "4s")).await;
    let id = scene.tiny(&TinyGuest::new("orig").deaf()).await;
    let image = scene.tiny_image("resc").await;
    let console = scene.console(id);
    for (asked, least) in [(None, 4), (seconds(2), 2), (seconds(0), 0)] {
        let mark = console.mark();
        let begun = Instant::now();
        let request = RescueServerRequest {
            shutdown_timeout: asked,
            ..rescue_with(id, &image)
        };
        let (_, ended) = scene.client.rescue(request).await;
        assert_eq!(ended.done().guest_stop(), GuestStop::Forced);
        let took = begun.elapsed();
        assert!(took >= Duration::from_secs(least), "{took:?}");
        let asked_politely = console.since(mark).contains("TINY-POWERBUTTON");
        assert_eq!(asked_politely, least > 0, "{}", console.since(mark));
        console.wait_line(mark, "TINY-READY resc", SOON);
        scene.unrescue(unrescue_of(id)).await;
        console.wait_line(mark, "TINY-READY orig", SOON);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_is_still_booting_is_asked_again_until_it_hears() {
    let settings = AgentSettings::default()
        .set("shutdown.timeout", "150s")
        .set("shutdown.retry_interval", "1s");
    let mut scene = Scene::with(settings).await;
    let xml = scene.linux_xml(&LinuxGuest::new("orig").without_agent());
    let id = scene.define(&xml);
    scene.client.adopt(id).await;
    let image = scene.tiny_image("resc").await;
    let _slot = linux_slot();
    scene.client.start(id).await.done();
    let console = scene.console(id);
    let request = RescueServerRequest {
        shutdown_timeout: None,
        ..rescue_with(id, &image)
    };
    // The BIOS has not even found the disk by now: the first request is lost.
    assert!(!console.text().contains("GUEST up"), "{}", console.text());
    let (_, ended) = scene.client.rescue(request).await;
    assert_eq!(ended.done().guest_stop(), GuestStop::ByItself);
    console.wait_line(Mark::START, "GUEST power button", BOOT);
    console.wait_line(Mark::START, "TINY-READY resc", SOON);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_whose_cpus_are_stopped_is_not_waited_for() {
    let mut scene = Scene::new().await;
    let id = scene.tiny(&TinyGuest::new("orig")).await;
    let image = scene.tiny_image("resc").await;
    scene.libvirt.suspend(id).unwrap();
    scene
        .client
        .wait_server(id, "it is seen paused", |server| {
            server.vm_state() == VmState::Paused
        })
        .await;
    let request = RescueServerRequest {
        shutdown_timeout: seconds(150),
        ..rescue_with(id, &image)
    };
    let begun = Instant::now();
    let answer = scene.client.servers.rescue_server(request).await;
    let refused = assert_refused(answer, Code::FailedPrecondition, "INVALID_STATE");
    assert!(refused.message().contains("unpause it"), "{refused:?}");
    scene.client.delete(id).await.done();
    assert!(begun.elapsed() < SOON, "{:?}", begun.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rescue_ends_by_itself_when_its_time_is_over() {
    let mut scene = Scene::new().await;
    let id = scene.tiny(&TinyGuest::new("orig")).await;
    let definition = scene.libvirt.inactive_xml(id).unwrap();
    let image = scene.tiny_image("resc").await;
    let console = scene.console(id);
    let mark = console.mark();
    let request = RescueServerRequest {
        timeout: seconds(5),
        ..rescue_with(id, &image)
    };
    let server = scene.rescue(request).await;
    assert!(server.rescue.unwrap().expire_time.is_some());
    console.wait_line(mark, "TINY-READY resc", SOON);
    console.wait_line(mark, "TINY-READY orig", SOON);
    let server = scene
        .client
        .wait_server(id, "it is unrescued", |server| server.operation.is_empty())
        .await;
    Client::assert_settled(&server, VmState::Active);
    assert_eq!(scene.libvirt.inactive_xml(id).unwrap(), definition);
    scene.assert_no_rescue_left(id);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rescue_with_overlays_and_a_timeout_must_say_what_becomes_of_them_and_does_it() {
    let settings = AgentSettings::default().set("rescue.timeout", "1h");
    let mut scene = Scene::with(settings).await;
    let id = scene.tiny(&TinyGuest::new("orig")).await;
    let image = scene.tiny_image("resc").await;
    let before = sha256(&scene.disk("orig"));
    let with_overlay = RescueServerRequest {
        disk_protection: DiskProtection::Overlay.into(),
        ..rescue_with(id, &image)
    };
    let undecided = RescueServerRequest {
        timeout: seconds(5),
        ..with_overlay.clone()
    };
    let answer = scene.client.servers.rescue_server(undecided.clone()).await;
    assert_refused(answer, Code::InvalidArgument, "INVALID_FIELD");

    // The configured time applies only to rescues that can end without a decision.
    let (answer, ended) = scene.client.rescue(with_overlay).await;
    assert_eq!(answer.warnings[0].name, "TIMEOUT_NOT_APPLIED");
    let rescued = ended.done().server.unwrap().rescue.unwrap();
    assert_eq!(rescued.expire_time, None);
    let request = salvor_proto::v1::UnrescueServerRequest {
        overlay: OverlayDisposition::Discard.into(),
        ..unrescue_of(id)
    };
    scene.unrescue(request).await;

    let console = scene.console(id);
    for overlay in [OverlayDisposition::Discard, OverlayDisposition::Commit] {
        let mark = console.mark();
        let decided = RescueServerRequest {
            timeout_overlay: overlay.into(),
            ..undecided.clone()
        };
        scene.rescue(decided).await;
        console.wait_line(mark, "TINY-READY resc", SOON);
        console.wait_line(mark, "TINY-READY orig", SOON);
        let ended = |server: &salvor_proto::v1::Server| server.operation.is_empty();
        let server = scene.client.wait_server(id, "it has ended", ended).await;
        Client::assert_settled(&server, VmState::Active);
        scene.assert_no_rescue_left(id);
        if overlay == OverlayDisposition::Discard {
            assert_eq!(sha256(&scene.disk("orig")), before);
        }
    }
}
