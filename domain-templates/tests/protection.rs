// SPDX-License-Identifier: Apache-2.0
//! Protecting the original disks.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod common;

use common::{disk, domain, overlay, protecting, render};
use salvor_domain_templates::{DiskChange, Domain, Mode, TemplateError};

#[test]
fn read_only_is_refused_where_qemu_has_no_such_disk() {
    for (bus, target, allowed) in [
        ("virtio", "vda", true),
        ("scsi", "sda", true),
        ("usb", "sda", true),
        ("sata", "sda", false),
        ("ide", "hda", false),
    ] {
        let result = render(
            &domain("pc", "", &disk(target, bus, "")),
            &protecting(Mode::Stable, target, DiskChange::ReadOnly),
        );
        match result {
            Ok(rendering) => assert!(allowed && rendering.xml.contains("<readonly/>"), "{bus}"),
            Err(error) => {
                assert!(!allowed, "{bus}: {error}");
                assert!(
                    error.to_string().contains(target) && error.to_string().contains("OVERLAY"),
                    "{error}"
                );
            }
        }
    }
}

#[test]
fn an_overlay_takes_the_place_of_a_file_or_block_device() {
    let block = "<disk type='block' device='disk'><driver name='qemu' type='raw' cache='none' io='native'/>\
                 <source dev='/dev/vg/root'><seclabel model='dac' relabel='no'/></source><backingStore/>\
                 <target dev='vda' bus='virtio'/><serial>abc</serial><address type='pci' slot='0x05'/></disk>";
    for (mode, target) in [(Mode::Stable, "vda"), (Mode::Classic, "vdb")] {
        let rendering = render(
            &domain("pc", "", block),
            &protecting(mode, "vda", overlay()),
        )
        .unwrap();
        let disk = Domain::parse(&rendering.xml)
            .unwrap()
            .disk(target)
            .unwrap()
            .clone();
        assert_eq!(disk.path(), Some("/srv/rescue/overlay"));
        assert_eq!(disk.format.as_deref(), Some("qcow2"));
        assert_eq!(disk.serial.as_deref(), Some("abc"));
        assert!(rendering.xml.contains("<disk type='file' device='disk'><driver name='qemu' type='qcow2' cache='none' io='native'/>"));
        // Whom the disk belongs to is the disk's affair, not the overlay's.
        assert_eq!(rendering.xml.matches("seclabel").count(), 1);
        assert!(
            rendering.xml.contains(
                "<backingStore type='block'><format type='raw'/><source dev='/dev/vg/root'>\
             <seclabel model='dac' relabel='no'/></source><backingStore/></backingStore>"
            ),
            "{}",
            rendering.xml
        );
        assert_eq!(rendering.xml.contains("slot='0x05'"), mode == Mode::Stable);
    }
}

#[test]
fn what_cannot_have_an_overlay_is_refused_by_name() {
    for odd in [
        "<disk type='network'><source protocol='rbd' name='p/v'/><target dev='vdq'/></disk>",
        "<disk type='volume'><source pool='p' volume='v'/><target dev='vdq'/></disk>",
        "<disk type='nvme'><source type='pci'/><target dev='vdq'/></disk>",
        "<disk type='file' device='cdrom'><source file='/i'/><target dev='vdq'/></disk>",
        "<disk type='block' device='lun'><source dev='/dev/sdx'/><target dev='vdq'/></disk>",
        "<disk type='file'><target dev='vdq'/></disk>",
        "<disk type='file'><source file='/e'><encryption format='luks'/></source><target dev='vdq'/></disk>",
        "<disk type='file'><source file='/e'/><encryption format='luks'/><target dev='vdq'/></disk>",
        "<disk type='file'><source file='/e'><slices/></source><target dev='vdq'/></disk>",
    ] {
        let refused = render(
            &domain("pc", "", odd),
            &protecting(Mode::Stable, "vdq", overlay()),
        );
        let Err(TemplateError::OverlayUnsupported { target, .. }) = refused else {
            panic!("{odd}: {refused:?}")
        };
        assert_eq!(target, "vdq");
    }
}

#[test]
fn protecting_a_disk_that_is_not_there_is_refused() {
    let refused = render(
        &domain("pc", "", &disk("vda", "virtio", "")),
        &protecting(Mode::Stable, "vdz", overlay()),
    );
    assert!(
        matches!(refused, Err(TemplateError::NoSuchDisk { .. })),
        "{refused:?}"
    );
}

#[test]
fn a_chain_that_the_definition_states_stays_stated_below_the_overlay() {
    let chain = "<backingStore type='file'><format type='raw'/><source file='/base'/><backingStore/></backingStore>";
    let rendered = |more: &str| {
        let xml = domain("pc", "", &disk("vda", "virtio", more));
        let spec = protecting(Mode::Stable, "vda", overlay());
        render(&xml, &spec).unwrap().xml
    };
    let wanted = format!(
        "<backingStore type='file'><format type='qcow2'/><source file='/d/vda'/>{chain}</backingStore>"
    );
    let xml = rendered(chain);
    assert!(xml.contains(&wanted), "{xml}");
    assert_eq!(xml.matches("<backingStore").count(), 3);
    // Nothing was stated: libvirt reads the overlay's header, which names the format.
    assert!(!rendered("").contains("backingStore"));
}

#[test]
fn what_is_said_of_a_disks_owner_is_said_below_the_overlay_too() {
    let label = "<seclabel model='dac' relabel='no'/>";
    let labelled = format!(
        "<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/d/vda'>{label}</source>\
         <target dev='vda' bus='virtio'/></disk>"
    );
    let spec = protecting(Mode::Stable, "vda", overlay());
    let xml = render(&domain("pc", "", &labelled), &spec).unwrap().xml;
    // The rest of the chain is libvirt's to find, as before.
    let backing = format!(
        "<backingStore type='file'><format type='qcow2'/><source file='/d/vda'>{label}</source></backingStore>"
    );
    assert!(xml.contains(&backing), "{xml}");
    assert_eq!(xml.matches("seclabel").count(), 1, "{xml}");
}
