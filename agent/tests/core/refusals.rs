// SPDX-License-Identifier: Apache-2.0
//! What planners refuse, each with the reason and the words that help.

use salvor_agent::core::{
    action::{Action, AdoptArgs, UnrescueArgs},
    facts::{Facts, live_only},
    image::ImageFormat,
    plan::{Plan, Step},
    planners::{HostImage, choose_image, plan},
    reason::{Reason, Refusal, WarningName},
    record::{Origin, Protection, RescueBus, RescueDevice, ServerRecord},
    state::{PowerState, VmState},
};

use crate::bench::{
    BASE, RESCUE, create_args, created_xml, defined, domain, facts, fixture, image, record,
    rescue_args, rescued, templates, unrescue_args,
};

pub(crate) fn refused(server: Option<&ServerRecord>, action: &Action, facts: &Facts) -> Refusal {
    match plan(server, action, facts, templates()) {
        Err(refusal) => refusal,
        Ok(plan) => panic!("it was planned: {plan:?}"),
    }
}

/// The refusal has this reason and says all of these.
pub(crate) fn says(refusal: &Refusal, reason: Reason, words: &[&str]) {
    assert_eq!(refusal.reason, reason, "{refusal}");
    for word in words {
        assert!(
            refusal.message.contains(word),
            "{word:?} is not in {refusal}"
        );
    }
}

pub(crate) fn active() -> ServerRecord {
    record(Origin::Adopted, VmState::Active)
}

pub(crate) fn rescue_facts(xml: &str) -> Facts {
    let rescue = image(RESCUE, "rescue", ImageFormat::Qcow2);
    facts(Some(domain(xml, PowerState::Running)), Some(rescue))
}

/// A rescue with other facts or arguments than those that would succeed.
pub(crate) fn rescue_refused(
    change: impl FnOnce(&mut Facts, &mut salvor_agent::core::action::RescueArgs),
) -> Refusal {
    let (mut facts, mut args) = (rescue_facts(fixture("virt-manager")), rescue_args());
    let good = Action::Rescue(Box::new(args.clone()));
    plan(Some(&active()), &good, &facts, templates()).unwrap();
    change(&mut facts, &mut args);
    refused(Some(&active()), &Action::Rescue(Box::new(args)), &facts)
}

#[test]
fn a_transient_domain_has_no_way_back() {
    let refusal = rescue_refused(|facts, _| facts.domain.as_mut().unwrap().persistent = false);
    says(
        &refusal,
        Reason::DomainTransient,
        &["no way back", "server drift --restore"],
    );
    let mut transient = facts(Some(domain(fixture("minimal"), PowerState::Running)), None);
    transient.domain.as_mut().unwrap().persistent = false;
    let adopt = Action::Adopt(AdoptArgs { name: None });
    let refusal = refused(None, &adopt, &transient);
    says(&refusal, Reason::DomainTransient, &["virsh define"]);
}

#[test]
fn saved_memory_would_come_back_instead_of_the_rescue() {
    let refusal = rescue_refused(|facts, _| facts.domain.as_mut().unwrap().managed_save = true);
    says(
        &refusal,
        Reason::SavedMemory,
        &["managedsave-remove", "start server"],
    );
}

#[test]
fn without_its_domain_a_server_is_neither_rescued_nor_started() {
    let refusal = rescue_refused(|facts, _| facts.domain = None);
    says(
        &refusal,
        Reason::DomainNotFound,
        &["server drift --restore"],
    );
    let stopped = record(Origin::Created, VmState::Stopped);
    let refusal = refused(Some(&stopped), &Action::Start, &facts(None, None));
    says(
        &refusal,
        Reason::DomainNotFound,
        &["server drift --restore"],
    );
    let (server, _) = rescued(&active(), fixture("virt-manager"), rescue_args());
    let refusal = refused(Some(&server), &Action::DumpMemory, &facts(None, None));
    says(&refusal, Reason::DomainNotFound, &["unrescue it"]);
    let unknown = refused(
        Some(&stopped),
        &Action::RestoreDefinition,
        &facts(None, None),
    );
    says(&unknown, Reason::InvalidState, &["virsh define"]);
    let adopt = Action::Adopt(AdoptArgs { name: None });
    says(
        &refused(None, &adopt, &facts(None, None)),
        Reason::DomainNotFound,
        &[],
    );
}

#[test]
fn without_space_nothing_begins() {
    let refusal = rescue_refused(|facts, _| facts.host.free_bytes = facts.host.reserve_bytes);
    says(
        &refusal,
        Reason::NoSpace,
        &["storage.reserve", "/var/lib/salvor/servers"],
    );
    let mut tight = facts(None, Some(image(BASE, "base", ImageFormat::Qcow2)));
    tight.host.free_bytes = tight.host.reserve_bytes + 1;
    let create = Action::Create(Box::new(create_args()));
    says(&refused(None, &create, &tight), Reason::NoSpace, &["needs"]);
}

#[test]
fn an_image_must_be_there_with_its_file() {
    let refusal = rescue_refused(|facts, _| facts.image = None);
    says(&refusal, Reason::ImageNotFound, &[]);
    let refusal = rescue_refused(|facts, _| facts.image.as_mut().unwrap().present = false);
    says(&refusal, Reason::ImageNotFound, &["import it again"]);
}

#[test]
fn properties_of_an_image_that_mean_nothing_are_refused_before_the_guest_is_stopped() {
    for (name, value, choices) in [
        ("hw_rescue_bus", "xen", "virtio, scsi, usb, sata or ide"),
        ("hw_rescue_device", "floppy", "disk or cdrom"),
        ("os_admin_user", "root:x\n", "1 to 32 of the characters"),
        ("os_shutdown_timeout", "soon", "0 to 3600 seconds"),
    ] {
        let refusal = rescue_refused(|facts, _| {
            let properties = &mut facts.image.as_mut().unwrap().record.properties;
            properties.insert(name.to_owned(), value.to_owned());
        });
        let value = format!("{value:?}");
        says(&refusal, Reason::InvalidField, &[name, &value, choices]);
        assert_eq!(refusal.subject.unwrap().0, "image");
        let mut base = image(BASE, "base", ImageFormat::Qcow2);
        let properties = &mut base.record.properties;
        properties.insert(name.to_owned(), value.clone());
        let create = Action::Create(Box::new(create_args()));
        let refusal = refused(None, &create, &facts(None, Some(base)));
        says(&refusal, Reason::InvalidField, &[name, choices]);
    }
}

#[test]
fn there_is_no_virtio_cdrom() {
    let refusal = rescue_refused(|_, args| {
        args.bus = Some(RescueBus::Virtio);
        args.device = Some(RescueDevice::Cdrom);
    });
    says(&refusal, Reason::InvalidField, &["sata, scsi, ide or usb"]);
    assert_eq!(refusal.subject.unwrap().0, "bus");
}

#[test]
fn a_bus_that_the_machine_has_not_is_refused() {
    let refusal = rescue_refused(|_, args| args.bus = Some(RescueBus::Ide));
    says(&refusal, Reason::DomainUnsupported, &["ide"]);
}

#[test]
fn a_definition_that_cannot_be_read_is_neither_adopted_nor_rescued() {
    let refusal = rescue_refused(|facts, _| {
        facts.domain.as_mut().unwrap().xml = "<domain><name>x</domain>".to_owned();
    });
    says(&refusal, Reason::DomainUnsupported, &["cannot be read"]);
}

#[test]
fn the_definition_of_a_rescue_is_not_adopted_as_the_servers_own() {
    let (_, in_rescue) = rescued(&active(), fixture("virt-manager"), rescue_args());
    let adopt = Action::Adopt(AdoptArgs { name: None });
    let refusal = refused(None, &adopt, &in_rescue);
    says(
        &refusal,
        Reason::DomainUnsupported,
        &["that of a rescue", "restore that first"],
    );
}

#[test]
fn what_is_there_is_not_made_again() {
    let exists = facts(
        Some(domain(&created_xml(false), PowerState::Shutdown)),
        Some(image(BASE, "base", ImageFormat::Qcow2)),
    );
    let create = Action::Create(Box::new(create_args()));
    says(
        &refused(None, &create, &exists),
        Reason::ServerExists,
        &["libvirt has a domain"],
    );
    says(
        &refused(Some(&active()), &create, &exists),
        Reason::ServerExists,
        &[],
    );
    let adopt = Action::Adopt(AdoptArgs { name: None });
    says(
        &refused(Some(&active()), &adopt, &exists),
        Reason::ServerExists,
        &[],
    );
}

#[test]
fn what_is_not_there_is_not_acted_on() {
    let facts = facts(None, None);
    for action in [
        Action::Release,
        Action::Delete,
        Action::Start,
        Action::Stop(crate::bench::NOVA),
        Action::Rescue(Box::new(rescue_args())),
        Action::Unrescue(unrescue_args()),
        Action::DeliverPassword,
    ] {
        says(&refused(None, &action, &facts), Reason::ServerNotFound, &[]);
    }
}

#[test]
fn a_server_is_made_from_a_disk_image_that_fits() {
    let create = |gib, format| {
        let mut args = create_args();
        args.flavor.disk_gib = gib;
        let mut facts = facts(None, Some(image(BASE, "base", format)));
        facts.image.as_mut().unwrap().record.virtual_size = (2 << 30) + 1;
        refused(None, &Action::Create(Box::new(args)), &facts)
    };
    says(
        &create(0, ImageFormat::Iso),
        Reason::InvalidField,
        &["is an ISO"],
    );
    says(
        &create(2, ImageFormat::Raw),
        Reason::ImageTooLarge,
        &["at least 3 GiB"],
    );
}

pub(crate) fn unrescue_refused(
    protection: Protection,
    change: impl FnOnce(&mut ServerRecord, &mut UnrescueArgs),
) -> Refusal {
    let mut args = rescue_args();
    args.protection = protection;
    let (mut server, in_rescue) = rescued(&active(), fixture("virt-manager"), args);
    let mut args = unrescue_args();
    change(&mut server, &mut args);
    refused(Some(&server), &Action::Unrescue(args), &in_rescue)
}

#[test]
fn without_a_rescue_there_is_nothing_to_go_back_to() {
    let refusal = unrescue_refused(Protection::ReadWrite, |server, _| server.rescue = None);
    says(&refusal, Reason::NotRescued, &["no saved definition"]);
    let (server, mut in_rescue) = rescued(&active(), fixture("virt-manager"), rescue_args());
    in_rescue.saved_xml = None;
    let refusal = refused(
        Some(&server),
        &Action::Unrescue(unrescue_args()),
        &in_rescue,
    );
    says(&refusal, Reason::NotRescued, &["no saved definition"]);
    let facts = facts(None, None);
    says(
        &refused(Some(&active()), &Action::DeliverPassword, &facts),
        Reason::NotRescued,
        &[],
    );
    let mut delivered = server;
    delivered.rescue.as_mut().unwrap().password_for_agent = None;
    says(
        &refused(Some(&delivered), &Action::DeliverPassword, &facts),
        Reason::NotRescued,
        &[],
    );
}

#[test]
fn the_image_of_a_rescue_is_the_named_one_else_the_servers_else_the_hosts() {
    let other = uuid::Uuid::from_u128(5);
    let host = HostImage::Image(other);
    let (created, adopted) = (record(Origin::Created, VmState::Active), active());
    assert_eq!(choose_image(&created, Some(RESCUE), &host), Ok(RESCUE));
    assert_eq!(choose_image(&created, None, &host), Ok(BASE));
    assert_eq!(choose_image(&adopted, None, &host), Ok(other));
    // One that is wrong is no reason to refuse what does not need it.
    let missing = HostImage::Missing(String::new());
    assert_eq!(choose_image(&created, None, &missing), Ok(BASE));
}

#[test]
fn a_host_without_a_usable_rescue_image_says_what_is_the_matter_with_it() {
    let named = |id, name: &str| image(id, name, ImageFormat::Qcow2).record;
    let images = [
        named(BASE, "rescue"),
        named(RESCUE, "rescue"),
        named(uuid::Uuid::from_u128(5), "other"),
    ];
    let refusal = |wanted: Option<&str>| {
        choose_image(&active(), None, &HostImage::find(wanted, &images)).unwrap_err()
    };
    let reason = Reason::NoRescueImage;
    says(&refusal(None), reason, &["rescue.default_image is not set"]);
    let words = [
        "rescue.default_image is \"gone\"",
        "no image of the store",
        "import",
    ];
    says(&refusal(Some("gone")), reason, &words);
    let ids = [BASE.to_string(), RESCUE.to_string()];
    let words = ["several images", &ids[0], &ids[1], "set it to an id"];
    says(&refusal(Some("rescue")), reason, &words);
    for wanted in ["other", "00000000-0000-0000-0000-000000000005"] {
        let found = HostImage::find(Some(wanted), &images);
        assert_eq!(found, HostImage::Image(uuid::Uuid::from_u128(5)));
    }
}

#[test]
fn a_domain_whose_files_libvirt_may_give_to_nobody_is_refused_unless_its_qemu_is_root() {
    let labelled =
        |label: &str| fixture("virt-manager").replace("</domain>", &format!("{label}</domain>"));
    let fixed = |owner: &str| {
        labelled(&format!(
            "<seclabel type='static' model='dac' relabel='no'><label>{owner}</label></seclabel>"
        ))
    };
    let refusal =
        rescue_refused(|facts, _| facts.domain.as_mut().unwrap().xml = fixed("+64055:+107"));
    says(
        &refusal,
        Reason::DomainUnsupported,
        &["+64055:+107", "relabel='yes'", "virsh edit web"],
    );
    for good in [
        fixed("+0:+0"),
        fixed("root:root"),
        fixed("+7:+7").replace("relabel='no'", "relabel='yes'"),
        labelled("<seclabel type='none'/>"),
    ] {
        let action = Action::Rescue(Box::new(rescue_args()));
        plan(Some(&active()), &action, &rescue_facts(&good), templates()).unwrap();
    }
}

#[test]
fn protected_disks_whose_owners_cannot_be_put_back_are_named() {
    let volume = "<disk type='volume' device='disk'><driver name='qemu' type='raw'/>\
                  <source pool='p' volume='v'/><target dev='vdy' bus='virtio'/></disk>";
    let shared = volume
        .replace("vdy", "vdz")
        .replace("/></disk>", "/><shareable/></disk>");
    let xml =
        fixture("virt-manager").replacen("<devices>", &format!("<devices>{volume}{shared}"), 1);
    let warned = |protection, unwritable: bool| {
        let mut args = rescue_args();
        args.protection = protection;
        let mut facts = rescue_facts(&xml);
        if unwritable {
            let found = &mut facts.domain.as_mut().unwrap().unwritable;
            found.insert("vda".to_owned(), "Read-only file system".to_owned());
        }
        let action = Action::Rescue(Box::new(args));
        let planned = plan(Some(&active()), &action, &facts, templates()).unwrap();
        let noted = planned.steps.iter().any(|planned| {
            matches!(&planned.step, Step::NoteOwners { disks, .. }
                if *disks == ["/var/lib/libvirt/images/fedora-workstation.qcow2"])
        });
        (
            warning(&planned, WarningName::OwnersNotKept).map(str::to_owned),
            noted,
        )
    };
    let (told, noted) = warned(Protection::ReadOnly, true);
    let told = told.unwrap();
    assert!(told.contains("vdy (volume v of pool p"), "{told}");
    assert!(
        told.contains("fedora-workstation.qcow2: Read-only file system"),
        "{told}"
    );
    // libvirt itself never restores what domains share.
    assert!(!told.contains("vdz"), "{told}");
    assert!(noted);
    assert_eq!(warned(Protection::ReadWrite, false), (None, false));
}

#[test]
fn what_was_attached_to_the_running_domain_only_is_refused_by_name() {
    let persistent = fixture("virt-manager");
    let live = persistent.replacen(
        "<devices>",
        "<devices>\
         <disk type='file' device='disk'><source file='/new.raw'/><target dev='vdx' bus='virtio'/></disk>\
         <interface type='user'><mac address='52:54:00:AA:00:01'/></interface>",
        1,
    );
    let parse = |xml: &str| salvor_domain_templates::Domain::parse(xml).unwrap();
    // libvirt shows the same disk of a running domain with other words.
    let same = persistent.replace("/var/lib/libvirt/images/", "/mnt/images/");
    assert!(live_only(&parse(persistent), &parse(&same)).is_empty());
    let only = live_only(&parse(persistent), &parse(&live));
    assert_eq!(
        only,
        ["disk vdx (/new.raw)", "network interface 52:54:00:AA:00:01"]
    );
    let other_case = live.replace("52:54:00:AA", "52:54:00:aa");
    assert!(live_only(&parse(&live), &parse(&other_case)).is_empty());
    let refusal = rescue_refused(|facts, _| facts.domain.as_mut().unwrap().live_only = only);
    says(
        &refusal,
        Reason::DomainUnsupported,
        &[
            "disk vdx (/new.raw)",
            "52:54:00:AA:00:01",
            "--config",
            "detach",
        ],
    );
}

pub(crate) fn warning(plan: &Plan, name: WarningName) -> Option<&str> {
    let mut warnings = plan.warnings.iter();
    let found = warnings.find(|warning| warning.name == name);
    found.map(|warning| warning.message.as_str())
}

#[test]
fn a_rescue_disk_may_outgrow_the_free_space_and_a_cd_cannot() {
    for (format, device, warned) in [
        (ImageFormat::Qcow2, None, true),
        (ImageFormat::Iso, Some(RescueDevice::Disk), true),
        (ImageFormat::Iso, None, false),
        (ImageFormat::Raw, Some(RescueDevice::Cdrom), false),
    ] {
        let mut facts = rescue_facts(fixture("virt-manager"));
        facts.image = Some(image(RESCUE, "rescue", format));
        facts.image.as_mut().unwrap().record.virtual_size = facts.host.free_bytes + 1;
        let mut args = rescue_args();
        args.device = device;
        let rescue = Action::Rescue(Box::new(args));
        let plan = plan(Some(&active()), &rescue, &facts, templates()).unwrap();
        let found = warning(&plan, WarningName::SpaceMayRunOut);
        assert_eq!(found.is_some(), warned, "{format} {device:?}");
    }
}

#[test]
fn a_rescue_is_refused_while_a_disk_is_not_there() {
    let refusal = rescue_refused(|facts, _| {
        let domain = facts.domain.as_mut().unwrap();
        domain.missing = [("sda".to_owned(), "/iso/installer.iso".to_owned())].into();
    });
    says(
        &refusal,
        Reason::DiskMissing,
        &["sda", "/iso/installer.iso", "--eject"],
    );
}

#[test]
fn the_definition_of_a_rescue_is_no_way_back() {
    let (_, left) = rescued(&active(), fixture("virt-manager"), rescue_args());
    let refusal = rescue_refused(|facts, _| facts.domain = left.domain);
    says(
        &refusal,
        Reason::DomainUnsupported,
        &["that of a rescue", "restore that first"],
    );
}

#[test]
fn a_rescue_takes_the_keys_that_the_server_was_made_with() {
    let keys = std::collections::BTreeMap::from([("me".to_owned(), "ssh-ed25519 AAAA".to_owned())]);
    let mut args = create_args();
    args.public_keys.clone_from(&keys);
    let base = facts(None, Some(image(BASE, "base", ImageFormat::Qcow2)));
    let create = plan(None, &Action::Create(Box::new(args)), &base, templates()).unwrap();
    let mut server = *create.initial.unwrap();
    server.vm_state = VmState::Active;
    let rescue = Action::Rescue(Box::new(rescue_args()));
    let facts = rescue_facts(&created_xml(false));
    let rescue = plan(Some(&server), &rescue, &facts, templates()).unwrap();
    let drive = rescue.steps.iter().find_map(|planned| match &planned.step {
        Step::BuildConfigDrive { drive, .. } => Some(drive),
        _ => None,
    });
    assert_eq!(drive.unwrap().public_keys, keys);
}

#[test]
fn a_server_takes_the_time_to_shut_down_from_its_image() {
    let mut base = image(BASE, "base", ImageFormat::Qcow2);
    let create = Action::Create(Box::new(create_args()));
    for (value, expected) in [
        (None, None),
        (Some("90"), Some(90_000)),
        (Some("0"), Some(0)),
    ] {
        if let Some(value) = value {
            let properties = &mut base.record.properties;
            properties.insert("os_shutdown_timeout".to_owned(), value.to_owned());
        }
        let facts = facts(None, Some(base.clone()));
        let plan = plan(None, &create, &facts, templates()).unwrap();
        assert_eq!(plan.initial.unwrap().shutdown_timeout_ms, expected);
    }
}

#[test]
fn the_machine_of_a_server_suits_the_architecture() {
    let mut base = facts(None, Some(image(BASE, "base", ImageFormat::Qcow2)));
    for (arch, machine) in [("x86_64", "q35"), ("aarch64", "virt")] {
        base.host.arch = arch.to_owned();
        let create = Action::Create(Box::new(create_args()));
        let xml = defined(&plan(None, &create, &base, templates()).unwrap());
        let parsed = salvor_domain_templates::Domain::parse(&xml).unwrap();
        assert_eq!(parsed.machine(), Some(machine));
    }
}
