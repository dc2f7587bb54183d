// SPDX-License-Identifier: Apache-2.0
//! Protections of disks: what they cannot cover, and what becomes of overlays.

use salvor_agent::core::{
    action::{Action, UnrescueArgs},
    backing::References,
    facts::CommitSpace,
    facts::Facts,
    plan::Step,
    planners::plan,
    reason::{Reason, Refusal, WarningName},
    record::{OverlayDisposition, Protection, ServerRecord},
};

use crate::{
    bench::{defined, fixture, rescue_args, rescued, templates, unrescue_args},
    refusals::{active, refused, rescue_facts, rescue_refused, says, unrescue_refused, warning},
};

#[test]
fn a_timeout_with_overlays_needs_a_decision() {
    let refusal = rescue_refused(|_, args| {
        args.protection = Protection::Overlay;
        args.timeout_ms = Some(1);
    });
    says(&refusal, Reason::InvalidField, &["committed or discarded"]);
    assert_eq!(refusal.subject.unwrap().0, "timeout_overlay");
}

#[test]
fn disks_that_cannot_have_an_overlay_are_named() {
    let overlay = |xml: &str, change: &dyn Fn(&mut Facts)| {
        let mut args = rescue_args();
        args.protection = Protection::Overlay;
        let mut facts = rescue_facts(xml);
        change(&mut facts);
        refused(Some(&active()), &Action::Rescue(Box::new(args)), &facts)
    };
    let refusal = overlay(fixture("three-disks"), &|_| {});
    says(
        &refusal,
        Reason::DomainUnsupported,
        &["disk vda", "shared", "READ_ONLY"],
    );
    let network = fixture("virt-manager")
        .replace(
            "<disk type='file' device='disk'>",
            "<disk type='network' device='disk'>",
        )
        .replace(
            "<source file='/var/lib/libvirt/images/fedora-workstation.qcow2'/>",
            "<source protocol='rbd' name='pool/image'><host name='mon'/></source>",
        );
    let refusal = overlay(&network, &|_| {});
    says(
        &refusal,
        Reason::DomainUnsupported,
        &["disk vda", "neither a file nor a block device"],
    );
    let lun = fixture("virt-manager")
        .replace(
            "<disk type='file' device='disk'>",
            "<disk type='block' device='lun'>",
        )
        .replace(
            "<source file='/var/lib/libvirt/images/fedora-workstation.qcow2'/>",
            "<source dev='/dev/sdx'/>",
        );
    says(
        &overlay(&lun, &|_| {}),
        Reason::DomainUnsupported,
        &["disk vda", "LUN passed through", "READ_ONLY"],
    );
    let vmdk = fixture("virt-manager").replacen("type='qcow2'", "type='vmdk'", 1);
    says(
        &overlay(&vmdk, &|_| {}),
        Reason::DomainUnsupported,
        &["its format is vmdk"],
    );
    let refusal = overlay(fixture("virt-manager"), &|facts| {
        let disks = &mut facts.domain.as_mut().unwrap().disks;
        disks.insert("vda".to_owned(), Err("no such file".to_owned()));
    });
    says(
        &refusal,
        Reason::DomainUnsupported,
        &["size cannot be told (no such file)"],
    );
    let refusal = overlay(fixture("virt-manager"), &|facts| {
        let unwritable = &mut facts.domain.as_mut().unwrap().unwritable;
        unwritable.insert("vda".to_owned(), "Read-only file system".to_owned());
    });
    says(
        &refusal,
        Reason::DomainUnsupported,
        &[
            "disk vda",
            "/var/lib/libvirt/images/fedora-workstation.qcow2 cannot be written by the agent (Read-only file system)",
            "ReadWritePaths",
        ],
    );
}

#[test]
fn overlays_that_qemu_could_not_name_or_hold_are_refused_while_the_guest_runs() {
    let own = "/var/lib/libvirt/images/fedora-workstation.qcow2";
    let overlay = |path: &str, size: u64| {
        let xml = fixture("virt-manager").replace(own, path);
        let mut facts = rescue_facts(&xml);
        let disks = &mut facts.domain.as_mut().unwrap().disks;
        disks.get_mut("vda").unwrap().as_mut().unwrap().size = size;
        let mut args = rescue_args();
        args.protection = Protection::Overlay;
        plan(
            Some(&active()),
            &Action::Rescue(Box::new(args)),
            &facts,
            templates(),
        )
    };
    let path = |length: usize| format!("/{}", "a".repeat(length - 1));
    overlay(&path(1023), 2 << 50).unwrap();
    for (path, size, word) in [
        (path(1024), 1 << 30, "1023 bytes"),
        ("disk.qcow2".to_owned(), 1 << 30, "absolute"),
        (own.to_owned(), (2 << 50) + 512, "bytes, and"),
    ] {
        let words = ["disk vda cannot have an overlay", word, "READ_ONLY"];
        says(
            &overlay(&path, size).unwrap_err(),
            Reason::DomainUnsupported,
            &words,
        );
    }
    let refusal = rescue_refused(|facts, _| facts.image.as_mut().unwrap().path = path(1024));
    says(&refusal, Reason::StorageFailed, &["state_dir", "1023"]);
}

#[test]
fn overlays_need_a_decision_and_only_overlays_take_one() {
    let refusal = unrescue_refused(Protection::Overlay, |_, _| {});
    says(
        &refusal,
        Reason::OverlayDecisionNeeded,
        &["commit or discard"],
    );
    for protection in [Protection::ReadWrite, Protection::ReadOnly] {
        for overlay in OverlayDisposition::ALL {
            let refusal = unrescue_refused(protection, |_, args| args.overlay = Some(*overlay));
            says(&refusal, Reason::NoOverlays, &[protection.name()]);
        }
    }
}

#[test]
fn a_commit_that_began_cannot_be_discarded() {
    let refusal = unrescue_refused(Protection::Overlay, |server, args| {
        server.rescue.as_mut().unwrap().commit_started = true;
        args.overlay = Some(OverlayDisposition::Discard);
    });
    says(&refusal, Reason::CommitStarted, &["only committing"]);
}

/// A definition with things that no protection of disks covers.
fn with_other_storage() -> String {
    fixture("virt-manager").replacen(
        "<devices>",
        "<devices>\
         <disk type='file' device='floppy'><source file='/f.img'/><target dev='fda' bus='fdc'/></disk>\
         <hostdev mode='subsystem' type='usb'><source><vendor id='0x1234'/></source></hostdev>\
         <filesystem type='mount'><source dir='/srv/share'/><target dir='share'/></filesystem>\
         <filesystem type='mount'><source dir='/srv/ro'/><target dir='ro'/><readonly/></filesystem>",
        1,
    )
}

#[test]
fn what_no_protection_of_disks_covers_is_named() {
    let xml = with_other_storage();
    let warned = |protection| {
        let mut args = rescue_args();
        args.protection = protection;
        let planned = plan(
            Some(&active()),
            &Action::Rescue(Box::new(args)),
            &rescue_facts(&xml),
            templates(),
        )
        .unwrap();
        let warning = planned
            .warnings
            .iter()
            .find(|warning| warning.name == WarningName::NotProtected)
            .map(|warning| warning.message.clone());
        (warning, defined(&planned))
    };
    let (read_only, xml) = warned(Protection::ReadOnly);
    let read_only = read_only.unwrap();
    assert!(
        read_only.contains("hostdev usb (id=0x1234); filesystem share (dir=/srv/share)"),
        "{read_only}"
    );
    assert!(!read_only.contains("/srv/ro") && !read_only.contains("fda"));
    let parsed = salvor_domain_templates::Domain::parse(&xml).unwrap();
    assert!(parsed.disk("fda").unwrap().readonly);
    assert!(
        warned(Protection::Overlay)
            .0
            .unwrap()
            .contains("floppy fda")
    );
    assert_eq!(warned(Protection::ReadWrite).0, None);
}

/// A server in a rescue with overlays, and its facts.
fn with_overlays() -> (ServerRecord, Facts) {
    let mut args = rescue_args();
    args.protection = Protection::Overlay;
    rescued(&active(), fixture("virt-manager"), args)
}

#[test]
fn a_commit_that_may_not_fit_is_warned_of() {
    let (server, mut facts) = with_overlays();
    let overlay = server.rescue.as_ref().unwrap().overlays[0].clone();
    let commit = Action::Unrescue(UnrescueArgs {
        overlay: Some(OverlayDisposition::Commit),
        ..unrescue_args()
    });
    for (free, warned) in [(2, false), (1, true)] {
        let space = CommitSpace { allocated: 2, free };
        facts.commit_space.insert(overlay.path.clone(), space);
        let plan = plan(Some(&server), &commit, &facts, templates()).unwrap();
        assert!(plan.steps.iter().any(|planned| {
            matches!(&planned.step, Step::CommitOverlay { path, .. } if *path == overlay.path)
        }));
        let found = warning(&plan, WarningName::SpaceMayRunOut);
        assert_eq!(
            found.is_some_and(|text| text.contains(&overlay.base)),
            warned
        );
    }
}

#[test]
fn overlays_are_not_committed_to_a_disk_that_names_other_files_than_before() {
    let (mut server, facts) = with_overlays();
    let commit = Action::Unrescue(UnrescueArgs {
        overlay: Some(OverlayDisposition::Commit),
        ..unrescue_args()
    });
    let overlay = server.rescue.as_ref().unwrap().overlays[0].clone();
    assert_eq!(overlay.base_references.backing.as_deref(), Some("/under"));
    plan(Some(&server), &commit, &facts, templates()).unwrap();
    let with = |look| {
        let mut facts = facts.clone();
        facts.commit_references.insert(overlay.path.clone(), look);
        facts
    };
    for now in [
        References::default(),
        References {
            backing: Some("/etc/shadow".to_owned()),
            ..overlay.base_references.clone()
        },
        References {
            data_file: Some("/etc/shadow".to_owned()),
            ..overlay.base_references.clone()
        },
    ] {
        let refusal = refused(Some(&server), &commit, &with(Ok(now.clone())));
        let words = [&overlay.base, "/under", &now.to_string(), "discard"];
        says(&refusal, Reason::DiskChanged, &words);
    }
    let unknown = with(Err("no answer".to_owned()));
    let refusal = refused(Some(&server), &commit, &unknown);
    says(&refusal, Reason::StorageFailed, &["no answer", "discard"]);
    // There is no discarding any more.
    server.rescue.as_mut().unwrap().commit_started = true;
    let refusal = refused(Some(&server), &commit, &unknown);
    says(&refusal, Reason::StorageFailed, &["commit again"]);
    assert!(!refusal.message.contains("discard"));
}

#[test]
fn a_delete_says_which_repairs_are_lost() {
    let (mut server, facts) = with_overlays();
    let base = server.rescue.as_ref().unwrap().overlays[0].base.clone();
    let deleted = |server: &ServerRecord| {
        let plan = plan(Some(server), &Action::Delete, &facts, templates()).unwrap();
        warning(&plan, WarningName::RepairsLost).map(str::to_owned)
    };
    let text = deleted(&server).unwrap();
    assert!(
        text.contains(&base) && text.contains("not committed"),
        "{text}"
    );
    server.rescue.as_mut().unwrap().overlays.clear();
    assert_eq!(deleted(&server), None);
}

#[test]
fn a_delete_ends_a_commit_that_has_begun_and_takes_no_last_whole_copy() {
    let (mut server, mut facts) = with_overlays();
    let rescue = server.rescue.as_mut().unwrap();
    rescue.commit_started = true;
    let overlay = rescue.overlays[0].clone();
    let commits = |facts: &Facts| {
        let plan = plan(Some(&server), &Action::Delete, facts, templates())?;
        assert_eq!(warning(&plan, WarningName::RepairsLost), None);
        let commits =
            |step: &Step| matches!(step, Step::CommitOverlay { path, .. } if *path == overlay.path);
        Ok::<_, Refusal>(plan.steps.iter().any(|planned| commits(&planned.step)))
    };
    let looks = |look| [(overlay.path.clone(), look)].into();
    facts.commit_references = looks(Ok(overlay.base_references.clone()));
    assert!(commits(&facts).unwrap());
    facts.commit_references = looks(Err("it does not answer".to_owned()));
    let refusal = commits(&facts).unwrap_err();
    says(
        &refusal,
        Reason::StorageFailed,
        &[overlay.base.as_str(), "does not answer", "delete again"],
    );
    // Another disk is there now, or none.
    facts.commit_references = looks(Ok(References::default()));
    assert!(!commits(&facts).unwrap());
    facts.commit_references.clear();
    assert!(!commits(&facts).unwrap());
}

#[test]
fn overlays_are_committed_only_while_the_domain_is_their_rescue() {
    let mut args = rescue_args();
    args.protection = Protection::Overlay;
    let own = fixture("virt-manager");
    let (server, facts) = rescued(&active(), own, args);
    let back = |overlay| {
        Action::Unrescue(UnrescueArgs {
            overlay: Some(overlay),
            ..unrescue_args()
        })
    };
    let (commit, discard) = (
        back(OverlayDisposition::Commit),
        back(OverlayDisposition::Discard),
    );
    plan(Some(&server), &commit, &facts, templates()).unwrap();
    let rescue = facts.domain.as_ref().unwrap().xml.clone();
    let id = server.rescue.as_ref().unwrap().plan.to_string();
    let other = rescue.replace(&id, &uuid::Uuid::nil().to_string());
    assert_ne!(other, rescue);
    for xml in [own.to_owned(), other] {
        let mut facts = facts.clone();
        facts.domain.as_mut().unwrap().xml = xml;
        says(
            &refused(Some(&server), &commit, &facts),
            Reason::DomainChanged,
            &["overlay", "can be discarded"],
        );
        plan(Some(&server), &discard, &facts, templates()).unwrap();
        // The commit itself may have put it there.
        let mut server = server.clone();
        server.rescue.as_mut().unwrap().commit_started = true;
        plan(Some(&server), &commit, &facts, templates()).unwrap();
    }
}
