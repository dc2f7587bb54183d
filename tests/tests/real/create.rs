// SPDX-License-Identifier: Apache-2.0
//! Servers made from images: what they boot and are told, their rescue, and what their deletion leaves.

use std::collections::HashMap;
use std::path::PathBuf;

use salvor_proto::v1::{
    CreateServerRequest, DeleteImageRequest, Firmware, Flavor, Image, NetworkInterfaceSpec,
    PlanActionRequest, RescueMode, RescueServerRequest, ServerOrigin, VmState,
    network_interface_spec::Connection, plan_action_request::Action,
};
use salvor_tests::agent::AgentSettings;
use salvor_tests::client::{Client, assert_refused};
use salvor_tests::console::Mark;
use salvor_tests::guests::{Format, LinuxGuest, TinyGuest, linux_slot};
use salvor_tests::wait::{BOOT, SOON};
use serde_json::Value;
use tonic::Code;
use tonic_types::StatusExt as _;
use uuid::Uuid;
use virt::connect::Connect;
use virt::domain::DomainState;

use crate::firmware::{setting, variable};
use crate::scene::{AT_ONCE, Scene, crypt, rescue_with, sha256, unrescue_of};

/// A request for a server as small as can be.
pub(crate) fn server_from(image: &Image, memory_mib: u64) -> CreateServerRequest {
    CreateServerRequest {
        name: "made".into(),
        image: image.id.clone(),
        flavor: Some(Flavor {
            vcpus: 1,
            memory_mib,
            disk_gib: 0,
        }),
        ..CreateServerRequest::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_made_of_a_qcow2_or_raw_image_boots_knows_who_it_is_and_leaves_nothing() {
    let mut scene = Scene::new().await;
    for format in [Format::Qcow2, Format::Raw] {
        let image = scene.linux_image(&LinuxGuest::new("made"), format).await;
        let stored = scene.stored_file(&image);
        let sum = sha256(&stored);
        let mac = "52:54:00:00:0c:01";
        let request = CreateServerRequest {
            flavor: Some(Flavor {
                vcpus: 1,
                memory_mib: 192,
                disk_gib: 1,
            }),
            interfaces: vec![NetworkInterfaceSpec {
                connection: Some(Connection::User(true)),
                mac: mac.into(),
                ..NetworkInterfaceSpec::default()
            }],
            hostname: "the-made-one".into(),
            public_keys: HashMap::from([("mine".into(), "ssh-ed25519 AAAAC3 me@here".into())]),
            user_data: b"#!/bin/sh\necho '<&>' \"$1\"\n".to_vec(),
            metadata: HashMap::from([("purpose".into(), "tests & <more>".into())]),
            ..server_from(&image, 192)
        };
        let _slot = linux_slot();
        let (answer, ended) = scene.client.create(request.clone()).await;
        let server = ended.done().server.unwrap();
        let id: Uuid = answer.server_id.parse().unwrap();
        scene.remove_at_end(id);
        Client::assert_settled(&server, VmState::Active);
        assert_eq!(server.origin(), ServerOrigin::Created);
        assert_eq!(scene.references(&image.id).await, 1);

        let mut console = scene.console(id);
        console.wait_line(Mark::START, "GUEST ready name=made", BOOT);
        assert_eq!(console.macs(Mark::START), [mac]);
        let root = &console.disks(Mark::START)[0];
        let size = console.run_ok(&format!("cat /sys/block/{}/size", root.name));
        assert_eq!(size, "2097152\n", "1 GiB");
        let shadow = console.run_ok("grep ^root: /etc/shadow");
        let hash = shadow.split(':').nth(1).unwrap();
        assert_eq!(hash, crypt(&answer.admin_pass, hash));

        console.run_ok("mount -o ro $(findfs LABEL=config-2) /mnt");
        let told = console.run_ok("cat /mnt/openstack/latest/meta_data.json");
        let told: Value = serde_json::from_str(&told).unwrap();
        assert_eq!(told["uuid"], id.to_string());
        assert_eq!(told["hostname"], "the-made-one");
        assert_eq!(told["public_keys"]["mine"], "ssh-ed25519 AAAAC3 me@here");
        assert_eq!(told["meta"]["purpose"], "tests & <more>");
        assert_eq!(
            console
                .run_ok("cat /mnt/openstack/latest/user_data")
                .into_bytes(),
            request.user_data
        );

        scene.client.delete(id).await.done();
        assert!(scene.libvirt.state(id).is_err(), "the domain is gone");
        assert_eq!(scene.files_of(id), Vec::<PathBuf>::new());
        assert!(scene.client.list().await.is_empty());
        assert_eq!(scene.references(&image.id).await, 0);
        assert_eq!(sha256(&stored), sum, "nobody wrote to the image");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_host_has_not_is_refused_before_anything_is_made() {
    let mut scene = Scene::new().await;
    let image = scene.tiny_image("small").await;
    let (name, bridge) = (Scene::unique("idle"), Scene::unique("br"));
    let xml = format!("<network><name>{name}</name><bridge name='{bridge}' stp='off'/></network>");
    let network = scene.libvirt.call(move |connect| {
        let network = connect.define_network_xml(&xml)?;
        network.name()
    });
    let network = network.unwrap();
    let with = |connection| CreateServerRequest {
        interfaces: vec![NetworkInterfaceSpec {
            connection: Some(connection),
            ..NetworkInterfaceSpec::default()
        }],
        ..server_from(&image, 64)
    };
    let mut many = server_from(&image, 64);
    many.flavor.as_mut().unwrap().vcpus = 512;
    for (request, field) in [
        (server_from(&image, 16 << 20), "flavor.memory_mib"),
        (many, "flavor.vcpus"),
        (
            with(Connection::Bridge(bridge.clone())),
            "interfaces[0].bridge",
        ),
        (
            with(Connection::Network("none".into())),
            "interfaces[0].network",
        ),
        (
            with(Connection::Network(network.clone())),
            "interfaces[0].network",
        ),
    ] {
        let refused = scene.client.servers.create_server(request).await;
        let details = refused.as_ref().unwrap_err().get_error_details();
        let fields = &details.bad_request().expect(field).field_violations;
        println!("{}: {}", fields[0].field, fields[0].description);
        assert_eq!(fields[0].field, field);
        assert_refused(refused, Code::InvalidArgument, "INVALID_FIELD");
    }
    assert!(scene.client.list().await.is_empty());
    // What is there is taken: the network that runs, and the bridge that came with it.
    let called = {
        let name = network.clone();
        let started = move |connect: &Connect| connect.lookup_network_by_name(&name)?.create();
        scene.libvirt.call(started)
    };
    called.unwrap();
    for there in [
        Connection::Network(network.clone()),
        Connection::Bridge(bridge),
    ] {
        let action = Some(Action::Create(with(there.clone())));
        let planned = scene
            .client
            .servers
            .plan_action(PlanActionRequest { action });
        let planned = planned.await.unwrap_or_else(|no| panic!("{there:?}: {no}"));
        assert!(planned.into_inner().accepted);
    }
    let removed = scene.libvirt.call(move |connect| {
        let network = connect.lookup_network_by_name(&network)?;
        network.destroy()?;
        network.undefine()
    });
    removed.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_uefi_server_is_made_rescued_and_deleted_with_its_variables() {
    let mut scene = Scene::new().await;
    let guest = LinuxGuest::new("made").without_agent();
    let image = scene.linux_image(&guest, Format::Qcow2).await;
    let request = CreateServerRequest {
        firmware: Firmware::Uefi.into(),
        ..server_from(&image, 256)
    };
    let _slot = linux_slot();
    let (answer, ended) = scene.client.create(request).await;
    ended.done();
    let id: Uuid = answer.server_id.parse().unwrap();
    scene.remove_at_end(id);
    let mut console = scene.console(id);
    console.wait_line(Mark::START, "GUEST ready name=made", BOOT);
    console.run_ok("test -d /sys/firmware/efi");
    assert!(
        scene
            .files_of(id)
            .iter()
            .any(|file| file.ends_with("nvram.fd"))
    );

    console.run_ok(&setting("ByTheServer"));
    let mark = console.mark();
    scene.rescue(rescue_with(id, &image)).await;
    console.wait_line(mark, "GUEST ready name=made", BOOT);
    console.run_ok(&setting("ByTheRescue"));
    console.run_ok(&format!("test -e {}", variable("ByTheServer")));
    let mark = console.mark();
    scene.client.unrescue(unrescue_of(id)).await.done();
    console.wait_line(mark, "GUEST ready name=made", BOOT);
    console.run_ok(&setting("AfterTheRescue"));
    console.run_ok(&format!("test -e {}", variable("ByTheServer")));
    console.run_ok(&format!("test ! -e {}", variable("ByTheRescue")));

    scene.client.delete(id).await.done();
    assert_eq!(scene.files_of(id), Vec::<PathBuf>::new());
    assert!(scene.libvirt.state(id).is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_made_powered_off_boots_only_when_it_is_started() {
    let mut scene = Scene::new().await;
    let image = scene.tiny_image("made").await;
    let request = CreateServerRequest {
        powered_off: true,
        ..server_from(&image, 16)
    };
    let (answer, ended) = scene.client.create(request).await;
    Client::assert_settled(&ended.done().server.unwrap(), VmState::Stopped);
    let id: Uuid = answer.server_id.parse().unwrap();
    scene.remove_at_end(id);
    assert_eq!(scene.libvirt.state(id).unwrap(), DomainState::Shutoff);
    let console = scene.console(id);
    assert_eq!(console.text(), "");
    scene.client.start(id).await.done();
    console.wait_line(Mark::START, "TINY-READY made", SOON);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rescue_with_the_servers_own_image_is_stable_warned_of_and_boots_the_rescue_disk() {
    let mut scene = Scene::new().await;
    let image = scene.tiny_image("made").await;
    let (answer, ended) = scene.client.create(server_from(&image, 16)).await;
    ended.done();
    let id: Uuid = answer.server_id.parse().unwrap();
    scene.remove_at_end(id);
    let mut console = scene.console(id);
    console.wait_line(Mark::START, "TINY-READY made", SOON);
    let definition = scene.libvirt.inactive_xml(id).unwrap();
    let files = scene.files_of(id);

    let mark = console.mark();
    let request = RescueServerRequest {
        server: id.to_string(),
        shutdown_timeout: AT_ONCE,
        ..RescueServerRequest::default()
    };
    let (answer, ended) = scene.client.rescue(request).await;
    let rescue = ended.done().server.unwrap().rescue.unwrap();
    assert_eq!(rescue.mode(), RescueMode::Stable);
    assert_eq!(rescue.image_id, image.id);
    assert_eq!(answer.warnings[0].name, "RESCUE_IMAGE_IS_SERVER_IMAGE");
    assert_eq!(scene.references(&image.id).await, 2);
    console.wait_line(mark, "TINY-READY made", SOON);
    // It marks the disk that it booted from.
    console.send("m");
    console.wait_line(mark, "TINY-MARKED 80", SOON);

    let mark = console.mark();
    let server = scene.client.unrescue(unrescue_of(id)).await.done().server;
    Client::assert_settled(&server.unwrap(), VmState::Active);
    console.wait_line(mark, "TINY-READY made", SOON);
    let original = "TINY-DISK 80 disk-made -";
    assert!(
        console.since(mark).contains(original),
        "{}",
        console.since(mark)
    );
    assert_eq!(scene.libvirt.inactive_xml(id).unwrap(), definition);
    assert_eq!(scene.files_of(id), files);
    assert_eq!(scene.references(&image.id).await, 1);
}

// gap 11: the server's own config drive does not hide the rescue's.
#[tokio::test(flavor = "multi_thread")]
async fn the_rescue_of_a_made_server_has_the_rescues_password_in_both_modes() {
    let mut scene = Scene::new().await;
    let image = scene.tiny_image("made").await;
    let (made, ended) = scene.client.create(server_from(&image, 192)).await;
    ended.done();
    let id: Uuid = made.server_id.parse().unwrap();
    scene.remove_at_end(id);
    let system = LinuxGuest::new("resc").without_agent();
    let rescue = scene.linux_image(&system, Format::Qcow2).await;
    for mode in [RescueMode::Classic, RescueMode::Stable] {
        let _slot = linux_slot();
        let mut console = scene.console(id);
        let mark = console.mark();
        let request = RescueServerRequest {
            mode: mode.into(),
            ..rescue_with(id, &rescue)
        };
        let (answer, ended) = scene.client.rescue(request).await;
        ended.done();
        console.wait_line(mark, "GUEST ready name=resc", BOOT);
        let shadow = console.run_ok("grep ^root: /etc/shadow");
        let hash = shadow.split(':').nth(1).unwrap();
        assert_eq!(hash, crypt(&answer.admin_pass, hash));
        assert_ne!(answer.admin_pass, made.admin_pass);
        scene.client.unrescue(unrescue_of(id)).await.done();
    }
}

// gap 5: what a rescue disk stands on is in use like any other image.
#[tokio::test(flavor = "multi_thread")]
async fn an_image_is_not_deleted_while_a_servers_or_a_rescues_disk_stands_on_it() {
    let mut scene = Scene::new().await;
    let base = scene.tiny_image("made").await;
    let resc = scene.tiny_image("resc").await;
    let (answer, ended) = scene.client.create(server_from(&base, 16)).await;
    ended.done();
    let id: Uuid = answer.server_id.parse().unwrap();
    scene.remove_at_end(id);
    let console = scene.console(id);
    let mark = console.mark();
    scene.rescue(rescue_with(id, &resc)).await;
    console.wait_line(mark, "TINY-READY resc", SOON);
    let delete = |image: &Image| DeleteImageRequest {
        image: image.id.clone(),
        ..DeleteImageRequest::default()
    };
    for image in [&base, &resc] {
        let answer = scene.client.images.delete_image(delete(image)).await;
        assert_refused(answer, Code::FailedPrecondition, "IMAGE_IN_USE");
        assert!(scene.stored_file(image).exists());
    }
    scene.client.unrescue(unrescue_of(id)).await.done();
    scene
        .client
        .images
        .delete_image(delete(&resc))
        .await
        .unwrap();
    let answer = scene.client.images.delete_image(delete(&base)).await;
    assert_refused(answer, Code::FailedPrecondition, "IMAGE_IN_USE");
    // A rescued server that is deleted lets go of both.
    scene.client.delete(id).await.done();
    scene
        .client
        .images
        .delete_image(delete(&base))
        .await
        .unwrap();
    let images = scene.agent.state_folder().join("images");
    assert_eq!(std::fs::read_dir(images).unwrap().count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rescued_server_that_is_deleted_leaves_neither_files_nor_references() {
    let mut scene = Scene::new().await;
    let base = scene.tiny_image("made").await;
    let resc = scene.tiny_image("resc").await;
    let (answer, ended) = scene.client.create(server_from(&base, 16)).await;
    ended.done();
    let id: Uuid = answer.server_id.parse().unwrap();
    scene.remove_at_end(id);
    scene.rescue(rescue_with(id, &resc)).await;
    scene.client.delete(id).await.done();
    scene.assert_no_rescue_left(id);
    assert!(scene.libvirt.state(id).is_err());
    for image in [&base, &resc] {
        assert_eq!(scene.references(&image.id).await, 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_hosts_default_image_is_booted_when_neither_request_nor_server_names_one() {
    let settings = AgentSettings::default().set("rescue.default_image", "the-default");
    let mut scene = Scene::with(settings).await;
    let id = scene.tiny(&TinyGuest::new("orig")).await;
    let image = scene.tiny_image("the-default").await;
    let console = scene.console(id);
    let request = RescueServerRequest {
        server: id.to_string(),
        shutdown_timeout: AT_ONCE,
        ..RescueServerRequest::default()
    };
    let rescued = scene.rescue(request).await;
    assert_eq!(rescued.rescue.unwrap().image_id, image.id);
    console.wait_line(Mark::START, "TINY-READY the-default", SOON);
}
