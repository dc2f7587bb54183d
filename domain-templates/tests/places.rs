// SPDX-License-Identifier: Apache-2.0
//! Where the disks of a rescue domain stand.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod common;

use common::{cdrom, disk, domain, on, places, render, spec, with_config_drive};
use salvor_domain_templates::{Bus, Device, Mode, PlaceError, TemplateError};

#[test]
fn classic_puts_the_rescue_disk_first_and_the_root_second() {
    let devices = [
        disk("vda", "virtio", ""),
        disk("vdb", "virtio", ""),
        disk("vdd", "virtio", ""),
    ]
    .concat();
    let rendering = render(
        &domain("pc", "<boot dev='hd'/>", &devices),
        &with_config_drive(spec(Mode::Classic)),
    )
    .unwrap();
    assert_eq!(
        places(&rendering),
        [
            "rescue:vda/virtio",
            "vda:vdb/virtio",
            "vdb:vdc/virtio",
            "vdd:vdd/virtio",
            "config:vde/virtio"
        ]
    );
}

#[test]
fn classic_takes_all_addresses_off_the_roots_bus_and_none_elsewhere() {
    let devices = [
        disk(
            "vda",
            "virtio",
            "<address type='pci' slot='0x05'/><alias name='virtio-disk0'/>",
        ),
        disk(
            "vdc",
            "virtio",
            "<address type='pci' slot='0x09'/><alias name='ua-logs'/>",
        ),
        disk("sda", "sata", "<address type='drive' unit='0'/>"),
    ]
    .concat();
    let rendering = render(&domain("q35", "", &devices), &spec(Mode::Classic)).unwrap();
    assert_eq!(
        places(&rendering),
        [
            "rescue:vda/virtio",
            "vda:vdb/virtio",
            "vdc:vdc/virtio",
            "sda:sda/sata"
        ]
    );
    assert!(!rendering.xml.contains("type='pci'") && !rendering.xml.contains("virtio-disk0"));
    assert!(rendering.xml.contains("type='drive'"));
    assert!(
        rendering.xml.contains("ua-logs"),
        "a user's alias is not a place"
    );
}

#[test]
fn classic_puts_a_root_that_was_not_first_second() {
    let devices = [
        disk("vda", "virtio", ""),
        disk("vdb", "virtio", "<boot order='1'/>"),
    ]
    .concat();
    let rendering = render(&domain("pc", "", &devices), &spec(Mode::Classic)).unwrap();
    assert_eq!(
        places(&rendering),
        ["rescue:vda/virtio", "vdb:vdb/virtio", "vda:vdc/virtio"]
    );
}

#[test]
fn classic_passes_over_names_that_other_buses_hold() {
    let devices = [
        disk("sda", "scsi", ""),
        cdrom("sdb", "sata"),
        disk("sdc", "scsi", ""),
    ]
    .concat();
    let rendering = render(&domain("q35", "", &devices), &spec(Mode::Classic)).unwrap();
    assert_eq!(
        places(&rendering),
        [
            "rescue:sda/scsi",
            "sda:sdc/scsi",
            "sdb:sdb/sata",
            "sdc:sdd/scsi"
        ]
    );
}

#[test]
fn classic_on_another_bus_than_the_roots_moves_nothing() {
    let rendering = render(
        &domain("pc", "", &disk("vda", "virtio", "")),
        &on(Mode::Classic, Bus::Scsi),
    )
    .unwrap();
    assert_eq!(places(&rendering), ["rescue:sda/scsi", "vda:vda/virtio"]);
}

#[test]
fn stable_moves_nothing_and_takes_the_first_free_name() {
    let devices = [disk("vda", "virtio", ""), disk("vdc", "virtio", "")].concat();
    let rendering = render(&domain("pc", "", &devices), &spec(Mode::Stable)).unwrap();
    assert_eq!(
        places(&rendering),
        ["vda:vda/virtio", "vdc:vdc/virtio", "rescue:vdb/virtio"]
    );
}

#[test]
fn a_free_name_whose_place_on_the_bus_is_taken_is_passed_over() {
    let odd = "<address type='drive' controller='0' bus='0' target='0' unit='1'/>";
    let hostdev = "<hostdev mode='subsystem' type='scsi'><address type='drive' controller='0' bus='0' target='0' unit='2'/></hostdev>";
    let xml = domain("pc", "", &(disk("sda", "scsi", odd) + hostdev));
    let rendering = render(&xml, &on(Mode::Stable, Bus::Scsi)).unwrap();
    assert_eq!(places(&rendering), ["sda:sda/scsi", "rescue:sdd/scsi"]);
}

#[test]
fn a_rescue_cdrom_takes_the_bus_its_machine_is_used_to() {
    for (machine, bus) in [
        ("q35", "sata"),
        ("pc-q35-7.2", "sata"),
        ("pc", "ide"),
        ("pc-i440fx-7.2", "ide"),
        ("virt", "scsi"),
    ] {
        let mut spec = spec(Mode::Stable);
        spec.rescue_disk.device = Device::Cdrom;
        let rendering = render(&domain(machine, "", &disk("vda", "virtio", "")), &spec).unwrap();
        assert_eq!(rendering.disks.last().unwrap().bus, bus, "{machine}");
        assert!(rendering.xml.contains("device='cdrom'"));
    }
}

#[test]
fn impossible_buses_are_refused() {
    let root = disk("vda", "virtio", "");
    let mut cdrom_on_virtio = on(Mode::Stable, Bus::Virtio);
    cdrom_on_virtio.rescue_disk.device = Device::Cdrom;
    let refused = render(&domain("q35", "", &root), &cdrom_on_virtio);
    assert!(
        matches!(
            refused,
            Err(TemplateError::Place(PlaceError::CdromOnVirtio))
        ),
        "{refused:?}"
    );
    let refused = render(&domain("q35", "", &root), &on(Mode::Stable, Bus::Ide));
    assert!(
        matches!(
            refused,
            Err(TemplateError::Place(PlaceError::NoSuchBus { .. }))
        ),
        "{refused:?}"
    );
    let full = ["hda", "hdb", "hdc", "hdd"]
        .map(|target| disk(target, "ide", ""))
        .concat();
    for spec in [on(Mode::Stable, Bus::Ide), spec(Mode::Classic)] {
        let refused = render(&domain("pc", "", &full), &spec);
        assert!(
            matches!(
                refused,
                Err(TemplateError::Place(PlaceError::Full { bus: Bus::Ide }))
            ),
            "{refused:?}"
        );
    }
}

#[test]
fn usb_gets_a_fast_controller_only_where_there_is_none() {
    for (have, added, bus) in [
        ("", "index='0' model='qemu-xhci'", "0"),
        (
            "<controller type='usb' index='0' model='none'/>",
            "index='0' model='qemu-xhci'",
            "0",
        ),
        (
            "<controller type='usb' index='0' model='piix3-uhci'/>",
            "index='1' model='qemu-xhci'",
            "1",
        ),
        (
            "<controller type='usb' index='0' model='ich9-ehci1'/><controller type='usb' index='0' model='ich9-uhci1'/>",
            "index='1' model='qemu-xhci'",
            "1",
        ),
        (
            "<controller type='usb' index='0' model='qemu-xhci'/>",
            "",
            "0",
        ),
        (
            "<controller type='usb' index='0' model='piix3-uhci'/><controller type='usb' index='1' model='nec-xhci'/>",
            "",
            "1",
        ),
        // Three of four ports are in use: no room for two more disks.
        (
            "<controller type='usb' index='0' model='qemu-xhci'/><input type='tablet' bus='usb'><address type='usb' bus='0' port='1'/></input>\
             <redirdev bus='usb'><address type='usb' bus='0' port='2'/></redirdev><redirdev bus='usb'><address type='usb' bus='0' port='3'/></redirdev>",
            "index='1' model='qemu-xhci'",
            "1",
        ),
    ] {
        let xml = domain("pc", "", &(disk("vda", "virtio", "") + have));
        let rendering = render(&xml, &on(Mode::Stable, Bus::Usb)).unwrap();
        assert_eq!(
            rendering.xml.contains("ports='15'"),
            !added.is_empty(),
            "{have}"
        );
        assert!(rendering.xml.contains(added), "{have}");
        assert!(
            rendering
                .xml
                .contains(&format!("<address type='usb' bus='{bus}'/>")),
            "{have}"
        );
        assert!(!rendering.xml.contains("model='none'"), "{have}");
    }
}

#[test]
fn a_domain_without_usb_stays_without_unless_usb_is_asked_for() {
    let xml = domain(
        "pc",
        "",
        &(disk("vda", "virtio", "") + "<controller type='usb' index='0' model='none'/>"),
    );
    assert!(
        render(&xml, &spec(Mode::Stable))
            .unwrap()
            .xml
            .contains("model='none'")
    );
}

#[test]
fn scsi_gets_a_controller_only_where_there_is_none() {
    let controller = "<controller type='scsi' index='0' model='lsilogic'/>";
    let with = domain("pc", "", &(disk("vda", "virtio", "") + controller));
    assert!(
        !render(&with, &on(Mode::Stable, Bus::Scsi))
            .unwrap()
            .xml
            .contains("virtio-scsi")
    );
    let without = domain("pc", "", &disk("vda", "virtio", ""));
    assert!(
        render(&without, &on(Mode::Stable, Bus::Scsi))
            .unwrap()
            .xml
            .contains("model='virtio-scsi'")
    );
}

#[test]
fn a_domain_without_any_disk_can_be_rescued() {
    for mode in [Mode::Classic, Mode::Stable] {
        let rendering = render(
            &domain("pc", "", "<emulator>/q</emulator>"),
            &with_config_drive(spec(mode)),
        )
        .unwrap();
        assert_eq!(
            places(&rendering),
            ["rescue:vda/virtio", "config:vdb/virtio"]
        );
    }
}

#[test]
fn a_config_drive_is_read_only_where_the_bus_allows_it() {
    for (bus, target, readonly) in [
        ("virtio", "vda", true),
        ("scsi", "sda", true),
        ("usb", "sda", true),
        ("sata", "sda", false),
        ("ide", "hda", false),
    ] {
        let rendering = render(
            &domain("pc", "", &disk(target, bus, "")),
            &with_config_drive(spec(Mode::Stable)),
        )
        .unwrap();
        assert_eq!(rendering.disks.last().unwrap().bus, bus);
        assert_eq!(rendering.xml.contains("<readonly/>"), readonly, "{bus}");
    }
}

#[test]
fn a_config_drive_that_finds_ide_full_goes_to_sata() {
    let devices = ["hda", "hdb", "hdc", "hdd"]
        .map(|target| disk(target, "ide", ""))
        .concat();
    let rendering = render(
        &domain("pc", "", &devices),
        &with_config_drive(spec(Mode::Stable)),
    )
    .unwrap();
    assert_eq!(rendering.disks.last().unwrap().bus, "sata");
}
