// SPDX-License-Identifier: Apache-2.0
//! What a rescue makes of a definition besides its disks, and what is read from one.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod common;

use common::{cdrom, disk, domain, render, spec};
use salvor_domain_templates::{Domain, Firmware, Mode, RescueSpec, Role, TemplateError};

#[test]
fn only_the_rescue_disk_boots() {
    let devices = [
        disk("vda", "virtio", "<boot order='2'/>"),
        "<interface type='user'><boot order='1'/></interface>".to_owned(),
        "<hostdev mode='subsystem' type='pci'><boot order='3'/></hostdev>".to_owned(),
    ]
    .concat();
    let os = "<kernel>/k</kernel><initrd>/i</initrd><cmdline>root=/dev/vda1</cmdline><bootmenu enable='yes'/>";
    for mode in [Mode::Classic, Mode::Stable] {
        let xml = render(&domain("pc", os, &devices), &spec(mode))
            .unwrap()
            .xml;
        assert_eq!(xml.matches("<boot ").count(), 1);
        assert!(xml.contains("<bootmenu enable='yes'/>"));
        assert!(!xml.contains("kernel") && !xml.contains("initrd") && !xml.contains("cmdline"));
    }
}

#[test]
fn the_root_is_the_disk_that_boots_never_a_cdrom() {
    for (devices, root) in [
        (cdrom("hda", "ide") + &disk("vda", "virtio", ""), "vda"),
        (
            disk("vdb", "virtio", "") + &disk("vda", "virtio", ""),
            "vda",
        ),
        (
            disk("sda", "scsi", "") + &disk("vda", "virtio", "<boot order='7'/>"),
            "vda",
        ),
        (
            disk("vdaa", "virtio", "") + &disk("vdb", "virtio", ""),
            "vdb",
        ),
    ] {
        let domain = Domain::parse(&domain("pc", "<boot dev='cdrom'/>", &devices)).unwrap();
        assert_eq!(
            domain.root_disk().map(|disk| disk.target.as_str()),
            Some(root)
        );
    }
    assert!(
        Domain::parse(&domain("pc", "", &cdrom("hda", "ide")))
            .unwrap()
            .root_disk()
            .is_none()
    );
}

#[test]
fn the_rescue_has_its_own_nvram_whatever_way_the_original_names_it() {
    let mut spec = spec(Mode::Stable);
    spec.nvram = Some("/srv/rescue/nvram".to_owned());
    let flash = "<loader type='pflash'>/code.fd</loader>";
    for (os, template) in [
        (
            format!("{flash}<nvram template='/t.fd'>/old.fd</nvram>"),
            Some("/t.fd"),
        ),
        (
            format!("{flash}<nvram type='file' template='/t.fd'><source file='/old.fd'/></nvram>"),
            Some("/t.fd"),
        ),
        (flash.to_owned(), None),
    ] {
        let xml = render(&domain("q35", &os, &disk("vda", "virtio", "")), &spec)
            .unwrap()
            .xml;
        let expected = Firmware::Uefi {
            nvram: Some("/srv/rescue/nvram".to_owned()),
            template: template.map(str::to_owned),
            auto_selected: false,
        };
        assert_eq!(Domain::parse(&xml).unwrap().firmware(), expected);
        assert!(!xml.contains("/old.fd"));
    }
    let auto = domain("q35", "", "").replace("<os>", "<os firmware='efi'>");
    let xml = render(&auto, &spec).unwrap().xml;
    assert!(matches!(
        Domain::parse(&xml).unwrap().firmware(),
        Firmware::Uefi {
            auto_selected: true,
            nvram: Some(_),
            ..
        }
    ));
    let refused = render(&domain("q35", "", ""), &spec);
    assert!(
        matches!(refused, Err(TemplateError::NvramWithoutUefi)),
        "{refused:?}"
    );
}

#[test]
fn the_mark_is_replaced_whatever_its_prefix_and_the_rest_of_the_metadata_stays() {
    let old = "<metadata><other:x xmlns:other='http://o/'><salvor>no mark</salvor></other:x>\
               <s:salvor xmlns:s='https://salvor.example/xmlns/domain/1'><s:plan>old</s:plan><s:role>server</s:role></s:salvor></metadata>";
    let original = domain("pc", "", "").replace("<os>", &format!("{old}<os>"));
    let before = Domain::parse(&original).unwrap().salvor_mark().unwrap();
    assert_eq!(
        (before.plan.as_str(), before.role, before.server),
        ("old", Role::Server, None)
    );
    let xml = render(&original, &spec(Mode::Stable)).unwrap().xml;
    let mark = Domain::parse(&xml).unwrap().salvor_mark().unwrap();
    assert_eq!((mark.plan.as_str(), mark.role), ("plan-1", Role::Rescue));
    assert_eq!(
        mark.server.as_deref(),
        Some("8a8d2c5c-5c0b-4e0e-9f5e-0a5a3c1f0001")
    );
    assert_eq!(xml.matches("xmlns/domain/1").count(), 1);
    assert!(xml.contains("<salvor>no mark</salvor>"));
    let twice = render(&xml, &spec(Mode::Stable)).unwrap().xml;
    assert_eq!(twice.matches("xmlns/domain/1").count(), 1);
}

#[test]
fn a_foreign_element_called_salvor_is_no_mark() {
    let foreign = "<metadata><salvor xmlns='http://elsewhere/'><plan>p</plan><role>rescue</role></salvor></metadata><os>";
    assert!(
        Domain::parse(&domain("pc", "", "").replace("<os>", foreign))
            .unwrap()
            .salvor_mark()
            .is_none()
    );
}

#[test]
fn text_that_xml_cannot_carry_is_refused_by_field() {
    type Change = fn(&mut RescueSpec);
    let changes: [(&str, Change); 4] = [
        ("plan", |spec| spec.plan = "a\0b".to_owned()),
        ("rescue disk", |spec| {
            spec.rescue_disk.path = "/a\u{1b}[2J".to_owned()
        }),
        ("NVRAM", |spec| spec.nvram = Some("/\u{fffe}".to_owned())),
        ("config drive", |spec| {
            spec.config_drive = Some("/\u{7}".to_owned())
        }),
    ];
    for (field, change) in changes {
        let mut spec = spec(Mode::Stable);
        change(&mut spec);
        let error = render(&domain("pc", "", &disk("vda", "virtio", "")), &spec).unwrap_err();
        assert!(
            matches!(error, TemplateError::Text { .. }) && error.to_string().contains(field),
            "{error}"
        );
    }
}

#[test]
fn what_is_not_a_domain_is_refused() {
    for text in [
        "",
        "<network/>",
        "<domain/>",
        "<domain><name> </name></domain>",
        "<domain><name>x</name>",
        "\0",
    ] {
        let refused = render(text, &spec(Mode::Stable));
        assert!(
            matches!(refused, Err(TemplateError::Domain(_))),
            "{text:?}: {refused:?}"
        );
    }
    let twice = domain(
        "pc",
        "",
        &(disk("vda", "virtio", "") + &disk("vda", "scsi", "")),
    );
    assert!(matches!(
        render(&twice, &spec(Mode::Stable)),
        Err(TemplateError::Domain(_))
    ));
}

#[test]
fn facts_of_a_domain_are_read() {
    let xml = salvor_domain_templates::fixtures::ORIGINALS
        .iter()
        .find(|o| o.name == "nova")
        .unwrap()
        .xml;
    let nova = Domain::parse(xml).unwrap();
    assert_eq!(
        (nova.name(), nova.arch()),
        ("instance-0000002a", Some("x86_64"))
    );
    assert_eq!(
        (nova.machine(), nova.memory_kib(), nova.vcpus()),
        (Some("pc-q35-7.2"), Some(2_097_152), Some(1))
    );
    assert!(
        !nova.has_guest_agent_channel()
            && nova.salvor_mark().is_none()
            && nova.firmware() == Firmware::Bios
    );
    assert_eq!(
        nova.interfaces()[0].mac.as_deref(),
        Some("fa:16:3e:5a:3b:01")
    );
    let small =
        domain("pc", "", "").replace("<memory>131072</memory>", "<memory unit='MB'>1</memory>");
    assert_eq!(Domain::parse(&small).unwrap().memory_kib(), Some(977));
}

#[test]
fn a_running_domain_says_whether_its_guest_agent_is_connected() {
    let with = |target: &str| {
        let device =
            format!("<channel type='unix'>{target}</channel><tpm model='tpm-crb'/></devices>");
        let xml = domain("pc", "", "").replace("</devices>", &device);
        Domain::parse(&xml).unwrap()
    };
    let target = |name: &str, state: &str| {
        with(&format!("<target type='virtio' name='{name}'{state}/>")).guest_agent_connected()
    };
    let agent = "org.qemu.guest_agent.0";
    assert_eq!(target(agent, " state='connected'"), Some(true));
    assert_eq!(target(agent, " state='disconnected'"), Some(false));
    assert_eq!(target(agent, ""), None);
    assert_eq!(target("com.redhat.spice.0", " state='connected'"), None);
    assert!(with("").has_tpm());
    assert!(!Domain::parse(&domain("pc", "", "")).unwrap().has_tpm());
}
