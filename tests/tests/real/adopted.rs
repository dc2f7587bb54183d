// SPDX-License-Identifier: Apache-2.0
//! Domains that somebody else made: everything in them is there during a rescue, and as it was after it.

use salvor_proto::v1::{
    DiskProtection, OverlayDisposition, RescueMode, RescueServerRequest, UnrescueServerRequest,
    VmState,
};
use salvor_tests::client::Client;
use salvor_tests::domain::DomainXml;
use salvor_tests::guests::{Format, LinuxGuest, TinyGuest, labelled_disk, linux_slot};
use salvor_tests::wait::{BOOT, SOON};

use crate::scene::{Scene, rescue_with, restore_of, unrescue_of};

// gap 10
#[tokio::test(flavor = "multi_thread")]
async fn three_disks_and_two_nics_by_hand_are_all_there_in_both_modes() {
    let mut scene = Scene::new().await;
    let macs = ["52:54:00:00:0a:01", "52:54:00:00:0a:02"];
    let [root, data, shelf] = ["root", "data", "shelf"].map(|name| scene.folder.join(name));
    TinyGuest::new("orig").build(&root, Format::Qcow2);
    labelled_disk("data", 4, &data, Format::Raw);
    labelled_disk("shelf", 4, &shelf, Format::Qcow2);
    let name = Scene::unique("hand-made");
    let xml = DomainXml::linux(&name, &scene.log("orig"))
        .device("<controller type='scsi' model='lsilogic'/>")
        .device("<controller type='scsi' index='1' model='virtio-scsi'/>")
        .disk(&root, Format::Qcow2, "vda", "virtio", "root", Some(1))
        .disk(&data, Format::Raw, "vdc", "virtio", "data", None)
        .device(&format!(
            "<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{}'/>\
             <target dev='sdh' bus='scsi'/><serial>shelf</serial>\
             <address type='drive' controller='1' bus='0' target='0' unit='2'/></disk>",
            shelf.display()
        ))
        .nic(macs[0])
        .nic(macs[1]);
    let id = scene.running(&xml, "TINY-READY orig").await;
    let definition = scene.libvirt.inactive_xml(id).unwrap();
    let server = scene.client.get(id).await;
    let disks: Vec<_> = server
        .disks
        .iter()
        .map(|disk| disk.target.as_str())
        .collect();
    assert_eq!(disks, ["vda", "vdc", "sdh"]);
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
        scene.rescue(request).await;
        console.wait_line(mark, "GUEST ready name=resc", BOOT);
        assert_eq!(console.macs(mark), macs);
        let seen = console.disks(mark);
        for serial in ["root", "data", "shelf", "salvor-rescue", "salvor-config"] {
            assert!(
                seen.iter().any(|disk| disk.serial == serial),
                "no {serial}: {seen:#?}"
            );
        }
        assert_eq!(seen.len(), 5, "{seen:#?}");
        // Labels say that behind each serial number there is the right content.
        for (serial, label) in [("root", "disk-orig"), ("data", "data"), ("shelf", "shelf")] {
            let disk = seen.iter().find(|disk| disk.serial == serial).unwrap();
            let read = format!(
                "dd if=/dev/{} bs=512 skip=4 count=1 2> /dev/null | head -c 32 | tr -d '\\0'; echo",
                disk.name
            );
            assert_eq!(console.run_ok(&read), format!("{label}\n"));
        }
        let mark = console.mark();
        scene.unrescue(unrescue_of(id)).await;
        drop(slot);
        console.wait_line(mark, "TINY-READY orig", SOON);
        assert_eq!(scene.libvirt.inactive_xml(id).unwrap(), definition);
    }
}

/// Ways in which people write their domains: what stands beside the devices, and devices.
const SHAPES: [(&str, &str, &str); 8] = [
    ("plain", "", ""),
    (
        "boot dev network and hd",
        "<os><type arch='x86_64' machine='pc'>hvm</type><boot dev='network'/><boot dev='hd'/>\
         <bootmenu enable='yes' timeout='100'/></os>",
        "<interface type='user'><mac address='52:54:00:00:0b:01'/><model type='e1000'/></interface>",
    ),
    (
        "on_reboot destroy and other habits",
        "<on_poweroff>destroy</on_poweroff><on_reboot>destroy</on_reboot><on_crash>preserve</on_crash>\
         <clock offset='utc'><timer name='rtc' tickpolicy='catchup'/></clock>",
        "<panic model='isa'/>",
    ),
    (
        "somebody else's metadata",
        "<title>A &lt;title&gt; &amp; more</title><description>two\nlines</description>\
         <metadata><a:app xmlns:a='http://a.example/1'><a:owner name='x &apos;y&apos;'/></a:app>\
         <b:b xmlns:b='urn:b'>text</b:b></metadata>",
        "",
    ),
    (
        "secrets",
        "",
        "<graphics type='vnc' port='-1' autoport='yes' passwd='s&amp;esame' passwdValidTo='2040-01-01T00:00:00'>\
         <listen type='address' address='127.0.0.1'/></graphics><video><model type='vga'/></video>",
    ),
    ("a security label", "<seclabel type='none'/>", ""),
    (
        "threads and a genid",
        "<genid>7f9a1c0e-5c0d-4d8a-9a51-0f3f2a4b8c11</genid><iothreads>1</iothreads>",
        "<memballoon model='none'/><input type='tablet' bus='usb'/>",
    ),
    (
        "an alias of one's own and QEMU arguments",
        "<qemu:commandline xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>\
         <qemu:env name='SALVOR_TEST' value='a b'/></qemu:commandline>",
        "<sound model='ac97'><alias name='ua-sound'/></sound>",
    ),
];

#[tokio::test(flavor = "multi_thread")]
async fn a_definition_comes_back_byte_for_byte_whatever_its_shape() {
    let mut scene = Scene::new().await;
    let image = scene.tiny_image("resc").await;
    for (number, (shape, beside, devices)) in SHAPES.into_iter().enumerate() {
        println!("{shape}");
        let guest = TinyGuest::new(&format!("orig-{number}"));
        let disk = scene.disk(&guest.name);
        guest.build(&disk, Format::Qcow2);
        // `<boot dev>` and `<boot order>` exclude each other.
        let boot = (!beside.contains("<boot dev")).then_some(1);
        let xml = DomainXml::tiny(&Scene::unique(&guest.name), &scene.log(&guest.name))
            .disk(&disk, Format::Qcow2, "vda", "virtio", "root", boot)
            .device(devices)
            .xml();
        let id = scene.define_xml(&with(&xml, beside));
        scene.libvirt.start(id).unwrap();
        let ready = format!("TINY-READY {}", guest.name);
        let console = scene.console(id);
        console.wait_line(salvor_tests::console::Mark::START, &ready, BOOT);
        let definition = scene.libvirt.inactive_xml(id).unwrap();
        scene.client.adopt(id).await;
        assert_eq!(
            scene.libvirt.inactive_xml(id).unwrap(),
            definition,
            "adopting {shape}"
        );
        for mode in [RescueMode::Classic, RescueMode::Stable] {
            let mark = console.mark();
            let request = RescueServerRequest {
                mode: mode.into(),
                ..rescue_with(id, &image)
            };
            scene.rescue(request).await;
            console.wait_line(mark, "TINY-READY resc", SOON);
            assert_eq!(scene.saved_definition(id).as_ref(), Some(&definition));
            let server = scene.unrescue(restore_of(id)).await;
            Client::assert_settled(&server, VmState::Active);
            assert_eq!(
                scene.libvirt.inactive_xml(id).unwrap(),
                definition,
                "{shape}"
            );
            console.wait_line(mark, &ready, BOOT);
        }
        scene.libvirt.destroy(id).unwrap();
    }
}

/// The XML with elements of the domain added, or put in the place of those of the same name.
fn with(xml: &str, beside: &str) -> String {
    let mut xml = xml.to_owned();
    for name in ["os", "on_poweroff", "on_reboot", "on_crash"] {
        if beside.contains(&format!("<{name}>")) {
            let from = xml.find(&format!("<{name}>")).unwrap();
            let end = format!("</{name}>");
            let to = xml.find(&end).unwrap() + end.len();
            xml.replace_range(from..to, "");
        }
    }
    xml.replace("</domain>", &format!("{beside}</domain>"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_domain_edited_and_disks_attached_after_adoption_are_rescued_as_they_are_now() {
    let mut scene = Scene::new().await;
    let guest = TinyGuest::new("orig");
    let id = scene.tiny(&guest).await;
    let image = scene.tiny_image("resc").await;
    let attached = scene.folder.join("attached");
    labelled_disk("late", 4, &attached, Format::Raw);
    let disk = format!(
        "<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{}'/>\
         <target dev='vdb' bus='virtio'/><serial>late</serial></disk>",
        attached.display()
    );
    let both = virt::sys::VIR_DOMAIN_AFFECT_CONFIG;
    scene
        .libvirt
        .domain(id, move |domain| domain.attach_device_flags(&disk, both))
        .unwrap();
    let definition = scene.libvirt.inactive_xml(id).unwrap();
    let request = RescueServerRequest {
        disk_protection: DiskProtection::Overlay.into(),
        ..rescue_with(id, &image)
    };
    let rescued = scene.rescue(request).await.rescue.unwrap();
    let originals: Vec<_> = rescued
        .disks
        .iter()
        .filter(|disk| disk.role == "original")
        .map(|disk| disk.original_target.as_str())
        .collect();
    assert_eq!(originals, ["vda", "vdb"]);
    let request = UnrescueServerRequest {
        overlay: OverlayDisposition::Discard.into(),
        ..unrescue_of(id)
    };
    scene.unrescue(request).await;
    assert_eq!(scene.libvirt.inactive_xml(id).unwrap(), definition);
}
