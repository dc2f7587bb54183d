// SPDX-License-Identifier: Apache-2.0
//! Rescue in both modes, on every bus, with every protection: what boots, which disks the rescue system
//! sees and where, and whether what it writes reaches the original.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use salvor_proto::v1::{
    DiskProtection, ImageFormat, OverlayDisposition, RescueBus, RescueDevice, RescueInfo,
    RescueMode, RescueServerRequest, UnrescueServerRequest, VmState,
};
use salvor_tests::client::{Client, assert_refused};
use salvor_tests::console::GuestDisk;
use salvor_tests::domain::DomainXml;
use salvor_tests::guests::{Format, LinuxGuest, TinyGuest, labelled_disk, linux_slot};
use salvor_tests::tool;
use salvor_tests::wait::{BOOT, SOON};
use tonic::Code;

use crate::scene::{PROTECTIONS, Scene, rescue_with, sha256, unrescue_of};

/// What a rescue boots from.
#[derive(Debug, Clone, Copy)]
struct Medium {
    bus: RescueBus,
    device: RescueDevice,
    format: Format,
    q35: bool,
}

impl Medium {
    const fn disk(bus: RescueBus) -> Self {
        Self {
            bus,
            device: RescueDevice::Disk,
            format: Format::Qcow2,
            q35: false,
        }
    }

    const fn cd(bus: RescueBus) -> Self {
        Self {
            device: RescueDevice::Cdrom,
            format: Format::Iso,
            ..Self::disk(bus)
        }
    }

    const fn raw(self) -> Self {
        Self {
            format: Format::Raw,
            ..self
        }
    }

    const fn q35(self) -> Self {
        Self { q35: true, ..self }
    }

    /// Debian's small kernel knows neither.
    fn needs_all_drivers(self) -> bool {
        matches!(self.bus, RescueBus::Usb | RescueBus::Sata)
    }
}

/// One test for each mode and medium, all protections in turn (or the first few of them).
macro_rules! rescues {
    (@protections) => { &PROTECTIONS };
    (@protections $count:literal) => { &PROTECTIONS[..$count] };
    ($($name:ident: $mode:ident, $medium:expr $(, protections: $count:literal)?;)+) => {
        $(
            #[tokio::test(flavor = "multi_thread")]
            async fn $name() {
                let protections = rescues!(@protections $($count)?);
                rescue(RescueMode::$mode, $medium, protections).await;
            }
        )+
    };
}

// gap 10: no disk is missing and, in stable mode, none is renamed.
rescues! {
    classic_rescue_from_a_virtio_disk: Classic, Medium::disk(RescueBus::Virtio);
    classic_rescue_from_a_scsi_disk: Classic, Medium::disk(RescueBus::Scsi).raw();
    classic_rescue_from_a_usb_disk: Classic, Medium::disk(RescueBus::Usb);
    classic_rescue_from_a_sata_disk: Classic, Medium::disk(RescueBus::Sata).q35();
    classic_rescue_from_an_ide_cd: Classic, Medium::cd(RescueBus::Ide);
    classic_rescue_from_a_sata_cd: Classic, Medium::cd(RescueBus::Sata).q35();
    stable_rescue_from_a_virtio_disk: Stable, Medium::disk(RescueBus::Virtio);
    stable_rescue_from_a_scsi_disk: Stable, Medium::disk(RescueBus::Scsi);
    stable_rescue_from_a_usb_disk: Stable, Medium::disk(RescueBus::Usb);
    stable_rescue_from_a_sata_disk: Stable, Medium::disk(RescueBus::Sata).q35();
    stable_rescue_from_an_ide_cd: Stable, Medium::cd(RescueBus::Ide);
    stable_rescue_from_a_sata_cd: Stable, Medium::cd(RescueBus::Sata).q35();
    stable_rescue_from_a_scsi_cd: Stable, Medium::cd(RescueBus::Scsi), protections: 1;
}

/// The disks of the original by target: bus, and serial number and label.
const ORIGINALS: [(&str, &str, &str); 3] = [
    ("vda", "virtio", "root"),
    ("vdb", "virtio", "data"),
    ("sda", "scsi", "attached"),
];

/// An original with three disks, and the files of its disks by serial number.
fn original(scene: &Scene<'_>, medium: Medium) -> (DomainXml, BTreeMap<&'static str, PathBuf>) {
    let name = Scene::unique("orig");
    let mut xml = DomainXml::linux(&name, &scene.log("orig"))
        .device("<controller type='scsi' model='virtio-scsi'/>");
    if medium.q35 {
        xml = xml.q35();
    }
    let mut files = BTreeMap::new();
    for (number, (target, bus, serial)) in (1..).zip(ORIGINALS) {
        let format = if serial == "data" {
            Format::Raw
        } else {
            Format::Qcow2
        };
        let file = scene.folder.join(format!("{serial}.disk"));
        if serial == "root" {
            let mut guest = TinyGuest::new("orig");
            guest.label = serial.into();
            guest.build(&file, format);
        } else {
            labelled_disk(serial, 4, &file, format);
        }
        xml = xml.disk(&file, format, target, bus, serial, Some(number));
        files.insert(serial, file);
    }
    (xml, files)
}

async fn rescue(
    mode: RescueMode,
    medium: Medium,
    protections: &[(DiskProtection, OverlayDisposition)],
) {
    let mut scene = Scene::new().await;
    let (xml, files) = original(&scene, medium);
    let id = scene.running(&xml, "TINY-READY orig").await;
    let definition = scene.libvirt.inactive_xml(id).unwrap();
    let mut system = LinuxGuest::new("resc").without_agent();
    if medium.needs_all_drivers() {
        system = system.with_all_drivers();
    }
    let image = scene.linux_image(&system, medium.format).await;

    let mut written = BTreeMap::from(ORIGINALS.map(|(_, _, serial)| (serial, "-".to_owned())));
    for (number, (protection, overlay)) in protections.iter().copied().enumerate() {
        let before = hashes(&files);
        let mut console = scene.console(id);
        let mark = console.mark();
        let slot = linux_slot();
        let server = scene
            .rescue(RescueServerRequest {
                mode: mode.into(),
                bus: medium.bus.into(),
                device: medium.device.into(),
                disk_protection: protection.into(),
                ..rescue_with(id, &image)
            })
            .await;
        let rescue = server.rescue.unwrap();
        assert_eq!(
            (
                rescue.mode(),
                rescue.bus(),
                rescue.device(),
                rescue.disk_protection()
            ),
            (mode, medium.bus, medium.device, protection)
        );
        console.wait_line(mark, "GUEST ready name=resc", BOOT);
        let disks = console.disks(mark);
        check_places(mode, medium, &rescue, &disks);
        if medium.bus == RescueBus::Scsi && mode == RescueMode::Stable {
            // Linux names SCSI disks as they happen to answer; their addresses say who is who.
            let attached = &by_serial(&disks, "attached").name;
            let address = format!("basename $(readlink -f /sys/block/{attached}/device)");
            let address = console.run_ok(&address);
            assert!(address.ends_with(":0:0:0\n"), "{address}");
        }

        // gap 4: each rescue has a disk of its own, on which no other has written.
        if medium.device == RescueDevice::Disk {
            assert_eq!(console.run("test -e /data/was-here").0, 1);
            console.run_ok("touch /data/was-here; sync");
        }
        let sign = format!("by-{number}");
        for (_, _, serial) in ORIGINALS {
            let disk = by_serial(&disks, serial);
            assert_eq!(
                disk.read_only,
                protection == DiskProtection::ReadOnly,
                "{disk:?}"
            );
            let write = format!(
                "printf '{sign}\\0' | dd of=/dev/{} bs=512 seek=5 conv=notrunc,fsync",
                disk.name
            );
            let (status, said) = console.run(&write);
            assert_eq!(
                status == 0,
                protection != DiskProtection::ReadOnly,
                "{said}"
            );
        }

        let mark = console.mark();
        let request = UnrescueServerRequest {
            overlay: overlay.into(),
            ..unrescue_of(id)
        };
        let server = scene.unrescue(request).await;
        drop(slot);
        Client::assert_settled(&server, VmState::Active);
        assert_eq!(scene.libvirt.inactive_xml(id).unwrap(), definition);
        console.wait_line(mark, "TINY-READY orig", SOON);

        let kept = protection == DiskProtection::ReadOnly || overlay == OverlayDisposition::Discard;
        if kept {
            assert_eq!(hashes(&files), before, "{protection:?} {overlay:?}");
        } else {
            written.values_mut().for_each(|mark| mark.clone_from(&sign));
        }
        // What the original itself finds on its disks.
        for (serial, sign) in &written {
            console.wait_line(mark, &format!(" {serial} {sign}"), SOON);
        }
    }
}

fn hashes(files: &BTreeMap<&'static str, PathBuf>) -> Vec<String> {
    files.values().map(|file| sha256(file)).collect()
}

#[track_caller]
fn by_serial<'d>(disks: &'d [GuestDisk], serial: &str) -> &'d GuestDisk {
    disks
        .iter()
        .find(|disk| disk.serial == serial)
        .unwrap_or_else(|| panic!("the rescue system does not see the disk {serial}: {disks:#?}"))
}

/// Checks that each disk is where its mode promises, in the agent's words and in the guest's eyes.
#[track_caller]
fn check_places(mode: RescueMode, medium: Medium, rescue: &RescueInfo, disks: &[GuestDisk]) {
    let told: Vec<(&str, &str)> = rescue
        .disks
        .iter()
        .map(|disk| (disk.role.as_str(), disk.original_target.as_str()))
        .collect();
    let on_virtio = medium.bus == RescueBus::Virtio;
    let seen = |serial| by_serial(disks, serial).name.as_str();
    match mode {
        RescueMode::Classic => {
            let (rescue, root) = (("rescue", ""), ("original", "vda"));
            assert_eq!(
                told[..2],
                [rescue, root],
                "the rescue disk first, the root second"
            );
            let expected = if on_virtio {
                ["vdb", "vdc"]
            } else {
                ["vda", "vdb"]
            };
            assert_eq!([seen("root"), seen("data")], expected);
            if on_virtio {
                assert_eq!(seen("salvor-rescue"), "vda");
            }
        }
        RescueMode::Stable => {
            let originals = ORIGINALS.map(|(target, ..)| ("original", target));
            assert_eq!(told[..3], originals, "every original disk in its place");
            assert_eq!(told[3], ("rescue", ""), "the rescue disk last");
            for disk in &rescue.disks[..3] {
                assert_eq!(disk.target, disk.original_target, "no name changes");
            }
            assert_eq!([seen("root"), seen("data")], ["vda", "vdb"]);
        }
        RescueMode::Unspecified => unreachable!("each test names a mode"),
    }
    // A CD drive has no serial number that Linux shows without further ado: it is the only one.
    if medium.device == RescueDevice::Cdrom {
        assert!(disks.iter().any(|disk| disk.name == "sr0"), "{disks:#?}");
    } else {
        assert!(!by_serial(disks, "salvor-rescue").read_only);
    }
    // The config drive is there as well.
    let others = disks.iter().filter(|disk| disk.name.starts_with("sr"));
    let expected = ORIGINALS.len() + 1 + usize::from(medium.device == RescueDevice::Disk);
    assert_eq!(disks.len() - others.count(), expected, "{disks:#?}");
}

/// Buses of the root: its bus, its name, and whether the machine is a q35.
const ROOTS: [(&str, &str, bool); 5] = [
    ("virtio", "vda", false),
    ("scsi", "sda", false),
    ("usb", "sda", false),
    ("ide", "hda", false),
    ("sata", "sda", true),
];

#[tokio::test(flavor = "multi_thread")]
async fn a_rescue_disk_takes_the_roots_bus_in_classic_mode_and_virtio_in_stable_mode() {
    let mut scene = Scene::new().await;
    let image = scene.tiny_image("resc").await;
    for (bus, target, q35) in ROOTS {
        let name = format!("{bus}-root");
        let disk = scene.disk(&name);
        TinyGuest::new(&name).build(&disk, Format::Qcow2);
        let mut xml = DomainXml::tiny(&Scene::unique(&name), &scene.log(&name))
            .device("<controller type='scsi' model='virtio-scsi'/>")
            .device("<controller type='usb' model='qemu-xhci'/>")
            .disk(&disk, Format::Qcow2, target, bus, "root", Some(1));
        if q35 {
            xml = xml.q35();
        }
        let ready = format!("TINY-READY {name}");
        let id = scene.running(&xml, &ready).await;
        let definition = scene.libvirt.inactive_xml(id).unwrap();
        let console = scene.console(id);
        for (mode, own) in [(RescueMode::Classic, bus), (RescueMode::Stable, "virtio")] {
            println!("{bus} {mode:?}");
            let mark = console.mark();
            let request = RescueServerRequest {
                mode: mode.into(),
                ..rescue_with(id, &image)
            };
            let rescue = scene.rescue(request).await.rescue.unwrap();
            // BIOS calls it 80: the first disk, for the original cannot boot.
            console.wait_line(mark, "TINY-UP resc boot=80", SOON);
            let placed = |role: &str| rescue.disks.iter().find(|disk| disk.role == role).unwrap();
            assert_eq!(placed("rescue").bus, own);
            assert_eq!(placed("original").original_target, target);
            if mode == RescueMode::Stable {
                assert_eq!(placed("original").target, target);
            } else {
                assert_eq!(placed("rescue").target, target, "the root's old place");
            }
            scene.unrescue(unrescue_of(id)).await;
            console.wait_line(mark, &ready, SOON);
            assert_eq!(scene.libvirt.inactive_xml(id).unwrap(), definition);
        }
        scene.libvirt.destroy(id).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_images_properties_choose_the_mode_and_the_place_and_the_requests_words_come_first() {
    let mut scene = Scene::new().await;
    let id = scene.tiny(&TinyGuest::new("orig")).await;
    let disk = scene.disk("resc");
    TinyGuest::new("resc").build(&disk, Format::Qcow2);
    let iso = scene.folder.join("iso");
    LinuxGuest::new("iso").build(&iso, Format::Iso);
    let (classic, stable) = (RescueMode::Classic, RescueMode::Stable);
    let (hard, cd) = (RescueDevice::Disk, RescueDevice::Cdrom);
    let nothing = RescueServerRequest::default();
    let says_classic = RescueServerRequest {
        mode: classic.into(),
        bus: RescueBus::Virtio.into(),
        ..nothing.clone()
    };
    let none: Option<(&str, &str)> = None;
    let usb = Some(("hw_rescue_bus", "usb"));
    let scsi = Some(("hw_rescue_bus", "scsi"));
    let cdrom = Some(("hw_rescue_device", "cdrom"));
    let cases = [
        (
            none,
            Format::Qcow2,
            &nothing,
            classic,
            RescueBus::Virtio,
            hard,
        ),
        (usb, Format::Qcow2, &nothing, stable, RescueBus::Usb, hard),
        (scsi, Format::Qcow2, &nothing, stable, RescueBus::Scsi, hard),
        (cdrom, Format::Qcow2, &nothing, stable, RescueBus::Ide, cd),
        (none, Format::Iso, &nothing, stable, RescueBus::Ide, cd),
        (
            usb,
            Format::Qcow2,
            &says_classic,
            classic,
            RescueBus::Virtio,
            hard,
        ),
    ];
    for (property, format, words, mode, bus, device) in cases {
        println!("{property:?} {format:?}");
        let (format, file) = match format {
            Format::Iso => (ImageFormat::Iso, &iso),
            _ => (ImageFormat::Qcow2, &disk),
        };
        let image = scene
            .client
            .import_file("x", format, property.as_slice(), file)
            .await;
        let request = RescueServerRequest {
            mode: words.mode,
            bus: words.bus,
            device: words.device,
            ..rescue_with(id, &image)
        };
        let rescue = scene.rescue(request).await.rescue.unwrap();
        assert_eq!(
            (rescue.mode(), rescue.bus(), rescue.device()),
            (mode, bus, device)
        );
        scene.unrescue(unrescue_of(id)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn overlays_are_never_committed_or_discarded_without_being_asked() {
    let mut scene = Scene::new().await;
    let id = scene.tiny(&TinyGuest::new("orig")).await;
    let image = scene.tiny_image("resc").await;
    let unrescue = |overlay: OverlayDisposition| UnrescueServerRequest {
        overlay: overlay.into(),
        ..unrescue_of(id)
    };
    for (protection, undecided, reason) in [
        (
            DiskProtection::Overlay,
            OverlayDisposition::Unspecified,
            "OVERLAY_DECISION_NEEDED",
        ),
        (
            DiskProtection::ReadWrite,
            OverlayDisposition::Commit,
            "NO_OVERLAYS",
        ),
        (
            DiskProtection::ReadOnly,
            OverlayDisposition::Discard,
            "NO_OVERLAYS",
        ),
    ] {
        let request = RescueServerRequest {
            disk_protection: protection.into(),
            ..rescue_with(id, &image)
        };
        let rescued = scene.rescue(request).await;
        let run = scene.libvirt.number(id).unwrap();
        let answer = scene.client.servers.unrescue_server(unrescue(undecided));
        assert_refused(answer.await, Code::InvalidArgument, reason);
        assert_eq!(scene.libvirt.number(id).unwrap(), run);
        let server = scene.client.get(id).await;
        Client::assert_settled(&server, VmState::Rescued);
        assert_eq!(server.rescue, rescued.rescue);
        let decided = match protection {
            DiskProtection::Overlay => OverlayDisposition::Discard,
            _ => OverlayDisposition::Unspecified,
        };
        scene.unrescue(unrescue(decided)).await;
    }
    let answer = scene.client.servers.unrescue_server(unrescue_of(id)).await;
    assert_refused(answer, Code::FailedPrecondition, "NOT_RESCUED");
}

/// A CD that is a bootable disk as well: its first sectors, which mean nothing to a CD, are a tiny guest's.
fn hybrid_iso(scene: &Scene<'_>, name: &str) -> PathBuf {
    let [tree, iso, disk] = ["tree", "iso", "disk"].map(|end| scene.folder.join(end));
    fs::create_dir(&tree).unwrap();
    // A disk of less than a cylinder would have none to a BIOS.
    fs::write(tree.join("file"), vec![b'c'; 4 << 20]).unwrap();
    tool!("genisoimage", "-quiet", "-o", iso, tree);
    TinyGuest::new(name).build(&disk, Format::Raw);
    let mut bytes = fs::read(&iso).unwrap();
    bytes[..16 * 2048].copy_from_slice(&fs::read(&disk).unwrap()[..16 * 2048]);
    fs::write(&iso, bytes).unwrap();
    iso
}

/// Under libvirt 9.0 a USB CD-ROM is a USB disk to QEMU and the guest: it boots what a disk would.
#[tokio::test(flavor = "multi_thread")]
async fn a_usb_cd_boots_an_iso_that_is_a_bootable_disk_as_well() {
    let mut scene = Scene::new().await;
    let id = scene.tiny(&TinyGuest::new("orig")).await;
    let iso = hybrid_iso(&scene, "hybrid");
    let image = scene.import("hybrid", Format::Iso, &iso).await;
    let console = scene.console(id);
    let mark = console.mark();
    let request = RescueServerRequest {
        bus: RescueBus::Usb.into(),
        ..rescue_with(id, &image)
    };
    let server = scene.rescue(request).await;
    assert_eq!(server.rescue.unwrap().device(), RescueDevice::Cdrom);
    console.wait_line(mark, "TINY-READY hybrid", SOON);
    let said = console.since(mark);
    assert!(said.contains("TINY-UP hybrid boot=80"), "{said}");
    scene.unrescue(unrescue_of(id)).await;
    console.wait_line(mark, "TINY-READY orig", SOON);
}
