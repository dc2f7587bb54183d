// SPDX-License-Identifier: Apache-2.0
//! Adopt, start, stop and release, on real guests.

use std::time::Duration;

use salvor_proto::v1::{
    GuestStop, ImageFormat, PowerState, RescueServerRequest, UnrescueServerRequest, VmState,
};
use salvor_tests::agent::{AgentSettings, TestAgent};
use salvor_tests::client::Client;
use salvor_tests::console::{Console, Mark};
use salvor_tests::domain::DomainXml;
use salvor_tests::guests::{Format, TinyGuest};
use salvor_tests::host::TestHost;
use salvor_tests::run_folder::RunFolder;
use salvor_tests::wait::SOON;
use uuid::Uuid;
use virt::sys;

/// Defines a domain with one tiny guest.
fn define(host: &TestHost, folder: &RunFolder, guest: &TinyGuest) -> Uuid {
    let disk = folder.join(format!("{}.qcow2", guest.name));
    guest.build(&disk, Format::Qcow2);
    let xml = DomainXml::tiny(&guest.name, &folder.join(format!("{}.console", guest.name)))
        .disk(&disk, Format::Qcow2, "vda", "virtio", "root", Some(1))
        .xml();
    host.libvirt().define(&xml).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_adopted_domain_is_stopped_and_started_and_its_definition_stays() {
    let folder = RunFolder::for_this_test();
    let host = TestHost::shared();
    let libvirt = host.libvirt();
    let id = define(host, &folder, &TinyGuest::new("adopted"));
    libvirt.start(id).unwrap();
    Console::of(&libvirt, id).wait_line(Mark::START, "TINY-READY adopted", SOON);
    let definition = libvirt.inactive_xml(id).unwrap();

    let agent = TestAgent::start(host, folder.path(), AgentSettings::default()).await;
    let mut client = Client::new(agent.channel());
    let server = client.adopt(id).await;
    Client::assert_settled(&server, VmState::Active);
    assert_eq!(server.power.unwrap().state(), PowerState::Running);

    let stopped = client.stop(id, None).await.done();
    assert_eq!(stopped.guest_stop(), GuestStop::ByItself);
    Client::assert_settled(&stopped.server.unwrap(), VmState::Stopped);

    let started = client.start(id).await.done().server.unwrap();
    Client::assert_settled(&started, VmState::Active);
    Console::of(&libvirt, id).wait_line(Mark::START, "TINY-READY adopted", SOON);

    let forced = client.stop(id, Some(Duration::ZERO)).await.done();
    assert_eq!(forced.guest_stop(), GuestStop::Forced);
    assert_eq!(libvirt.inactive_xml(id).unwrap(), definition);
    libvirt.remove(id);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repair_made_in_the_rescue_is_there_afterwards() {
    let folder = RunFolder::for_this_test();
    let host = TestHost::shared();
    let libvirt = host.libvirt();
    let id = define(host, &folder, &TinyGuest::new("patient"));
    libvirt.start(id).unwrap();
    Console::of(&libvirt, id).wait_line(Mark::START, "TINY-READY patient", SOON);
    let definition = libvirt.inactive_xml(id).unwrap();

    let agent = TestAgent::start(host, folder.path(), AgentSettings::default()).await;
    let mut client = Client::new(agent.channel());
    client.adopt(id).await;
    let image = folder.join("rescue.qcow2");
    TinyGuest::new("doctor").build(&image, Format::Qcow2);
    client
        .import(
            "rescue",
            ImageFormat::Qcow2,
            &[],
            std::fs::read(&image).unwrap(),
        )
        .await;

    let (answer, ended) = client
        .rescue(RescueServerRequest {
            server: id.to_string(),
            image: Some("rescue".into()),
            ..RescueServerRequest::default()
        })
        .await;
    assert_eq!(answer.admin_pass.len(), 12);
    Client::assert_settled(&ended.done().server.unwrap(), VmState::Rescued);
    Console::of(&libvirt, id).wait_line(Mark::START, "TINY-READY doctor", SOON);

    let back = client
        .unrescue(UnrescueServerRequest {
            server: id.to_string(),
            ..UnrescueServerRequest::default()
        })
        .await;
    Client::assert_settled(&back.done().server.unwrap(), VmState::Active);
    Console::of(&libvirt, id).wait_line(Mark::START, "TINY-READY patient", SOON);
    assert_eq!(libvirt.inactive_xml(id).unwrap(), definition);
    libvirt.remove(id);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_somebody_attaches_with_virsh_is_shown() {
    let folder = RunFolder::for_this_test();
    let host = TestHost::shared();
    let libvirt = host.libvirt();
    let id = define(host, &folder, &TinyGuest::new("attached"));
    // libvirt tells nobody of this: it is seen with the next look at everything.
    let settings = AgentSettings::default().set("libvirt.resync_interval", "1s");
    let agent = TestAgent::start(host, folder.path(), settings).await;
    let mut client = Client::new(agent.channel());
    let server = client.adopt(id).await;
    let before = server.interfaces.len();
    let nic = "<interface type='user'><mac address='52:54:00:00:0a:01'/></interface>";
    libvirt
        .domain(id, move |domain| {
            domain.attach_device_flags(nic, sys::VIR_DOMAIN_AFFECT_CONFIG)
        })
        .unwrap();
    let server = client
        .wait_server(id, "the interface is shown", |server| {
            server.interfaces.len() > before
        })
        .await;
    let macs = server.interfaces.iter().map(|nic| nic.mac.as_str());
    assert!(macs.into_iter().any(|mac| mac == "52:54:00:00:0a:01"));
    libvirt.remove(id);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_definition_that_somebody_edits_is_shown() {
    let folder = RunFolder::for_this_test();
    let host = TestHost::shared();
    let libvirt = host.libvirt();
    let id = define(host, &folder, &TinyGuest::new("edited"));
    let settings = AgentSettings::default().set("libvirt.resync_interval", "1h");
    let agent = TestAgent::start(host, folder.path(), settings).await;
    let mut client = Client::new(agent.channel());
    let before = client.adopt(id).await.interfaces.len();
    let nic = "<interface type='user'><mac address='52:54:00:00:0a:02'/></interface></devices>";
    let xml = libvirt.inactive_xml(id).unwrap();
    libvirt.define(&xml.replace("</devices>", nic)).unwrap();
    client
        .wait_server(id, "the interface is shown", |server| {
            server.interfaces.len() == before + 1
        })
        .await;
    libvirt.remove(id);
}
