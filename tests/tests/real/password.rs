// SPDX-License-Identifier: Apache-2.0
//! The administrator's password of a rescue: told once, really set, and at rest nowhere but as a hash.

use salvor_proto::v1::{AdminPassDelivery, RescueMode, RescueServerRequest};
use salvor_tests::client::assert_refused;
use salvor_tests::console::{Console, Mark};
use salvor_tests::domain::DomainXml;
use salvor_tests::guests::{Format, LinuxGuest, TinyGuest, linux_slot};
use salvor_tests::wait::BOOT;
use tonic::Code;
use uuid::Uuid;

use crate::scene::{Scene, crypt, rescue_with, unrescue_of};

/// A server with a tiny guest in a machine that is large enough for a Linux rescue.
async fn server(scene: &mut Scene<'_>) -> Uuid {
    let disk = scene.disk("orig");
    TinyGuest::new("orig").build(&disk, Format::Qcow2);
    let name = Scene::unique("orig");
    let xml = DomainXml::linux(&name, &scene.log("orig")).disk(
        &disk,
        Format::Qcow2,
        "vda",
        "virtio",
        "root",
        Some(1),
    );
    scene.running(&xml, "TINY-READY orig").await
}

/// The hash that the guest has for root.
#[track_caller]
fn hash_of_root(console: &mut Console) -> String {
    let line = console.run_ok("grep ^root: /etc/shadow");
    line.split(':').nth(1).unwrap().to_owned()
}

/// Checks that a password is neither in the agent's files nor in its log.
#[track_caller]
fn assert_kept_nowhere(scene: &Scene<'_>, password: &str) {
    let everything = scene.everything_kept();
    let found = everything
        .windows(password.len())
        .any(|window| window == password.as_bytes());
    assert!(!found, "the password is at rest in clear");
}

// gap 11, gap 4: in both modes, and new for each rescue.
#[tokio::test(flavor = "multi_thread")]
async fn a_generated_password_is_told_once_set_by_the_config_drive_and_never_kept() {
    let mut scene = Scene::new().await;
    let id = server(&mut scene).await;
    let system = LinuxGuest::new("resc").without_agent();
    let image = scene.linux_image(&system, Format::Qcow2).await;
    let mut earlier = Vec::new();
    for mode in [RescueMode::Classic, RescueMode::Stable] {
        let slot = linux_slot();
        let mut console = scene.console(id);
        let mark = console.mark();
        let request = RescueServerRequest {
            request_id: Uuid::new_v4().to_string(),
            mode: mode.into(),
            ..rescue_with(id, &image)
        };
        let (answer, ended) = scene.client.rescue(request.clone()).await;
        let rescue = ended.done().server.unwrap().rescue.unwrap();
        let drive = AdminPassDelivery::ConfigDrive;
        assert!(answer.admin_pass_delivery().any(|way| way == drive));
        assert_eq!(rescue.admin_pass_delivered().collect::<Vec<_>>(), [drive]);
        assert!(answer.admin_pass.len() >= 12);
        assert!(!earlier.contains(&answer.admin_pass));

        console.wait_line(mark, "GUEST password root set from", BOOT);
        console.wait_line(mark, "GUEST ready name=resc", BOOT);
        let hash = hash_of_root(&mut console);
        assert!(hash.starts_with("$6$"), "{hash}");
        assert_eq!(hash, crypt(&answer.admin_pass, &hash));
        assert_ne!(hash, crypt("another", &hash));
        assert_kept_nowhere(&scene, &answer.admin_pass);

        // Who asks again is told everything but the password.
        let again = scene.client.servers.rescue_server(request).await;
        let again = again.unwrap().into_inner();
        assert_eq!(
            again.operation.unwrap().name,
            answer.operation.unwrap().name
        );
        assert_eq!(again.admin_pass, "");
        scene.unrescue(unrescue_of(id)).await;
        drop(slot);
        assert_kept_nowhere(&scene, &answer.admin_pass);
        earlier.push(answer.admin_pass);
    }
}

// gap 11
#[tokio::test(flavor = "multi_thread")]
async fn the_guest_agent_sets_the_password_as_soon_as_it_answers_and_the_record_says_so() {
    let mut scene = Scene::new().await;
    let id = server(&mut scene).await;
    let system = LinuxGuest::new("resc").without_agent();
    let image = scene.linux_image(&system, Format::Qcow2).await;
    for mode in [RescueMode::Classic, RescueMode::Stable] {
        let slot = linux_slot();
        let mut console = scene.console(id);
        let mark = console.mark();
        let request = RescueServerRequest {
            mode: mode.into(),
            ..rescue_with(id, &image)
        };
        let (answer, ended) = scene.client.rescue(request).await;
        ended.done();
        let agent = AdminPassDelivery::GuestAgent;
        assert!(answer.admin_pass_delivery().any(|way| way == agent));
        console.wait_line(mark, "GUEST ready name=resc", BOOT);
        // Nothing of what the config drive did is left, so that what follows is the agent's work.
        console.run_ok("sed -i 's/^root:[^:]*:/root:*:/' /etc/shadow");
        assert_eq!(hash_of_root(&mut console), "*");
        console.run_ok("guest-agent > /dev/null 2>&1 &");
        scene
            .client
            .wait_server(id, "the agent has set the password", |server| {
                let rescue = server.rescue.as_ref().unwrap();
                rescue.admin_pass_delivered().any(|way| way == agent)
            })
            .await;
        let hash = hash_of_root(&mut console);
        assert_eq!(hash, crypt(&answer.admin_pass, &hash));
        assert_kept_nowhere(&scene, &answer.admin_pass);
        scene.unrescue(unrescue_of(id)).await;
        drop(slot);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_given_password_is_set_and_one_that_no_guest_could_take_is_refused() {
    let mut scene = Scene::new().await;
    let id = server(&mut scene).await;
    let system = LinuxGuest::new("resc").without_agent();
    let image = scene.linux_image(&system, Format::Qcow2).await;
    let given = |password: &str| RescueServerRequest {
        admin_pass: Some(password.into()),
        ..rescue_with(id, &image)
    };
    for bad in [
        "",
        "with:colon",
        "with\nline",
        "with\0nul",
        &"x".repeat(129),
    ] {
        let answer = scene.client.servers.rescue_server(given(bad)).await;
        let refusal = assert_refused(answer, Code::InvalidArgument, "INVALID_FIELD");
        assert!(bad.is_empty() || !refusal.message().contains(bad));
    }
    let password = r#"a'b"c$d\e &<f>{{7*7}}"#;
    let _slot = linux_slot();
    let (answer, ended) = scene.client.rescue(given(password)).await;
    ended.done();
    assert_eq!(answer.admin_pass, password);
    let mut console = scene.console(id);
    console.wait_line(Mark::START, "GUEST ready name=resc", BOOT);
    let hash = hash_of_root(&mut console);
    assert_eq!(hash, crypt(password, &hash));
    assert_kept_nowhere(&scene, password);
}
