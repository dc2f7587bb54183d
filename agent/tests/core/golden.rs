// SPDX-License-Identifier: Apache-2.0
//! Plans as text. `UPDATE_GOLDEN=1 cargo test` writes the files anew; the difference is then for
//! people to judge.

use std::{fmt::Write as _, fs, path::PathBuf};

use salvor_agent::core::{
    action::{Action, AdoptArgs, ChangePasswordArgs, RebootArgs, RescueArgs, Shutdown},
    backing::References,
    effects::effects,
    facts::{AgentLook, DomainFacts, Facts, SaveRoom},
    image::ImageFormat,
    plan::{Outcome, Plan, RescueChange, Step},
    planners::plan,
    reason::Refusal,
    record::{
        Origin, OverlayDisposition, Protection, RescueBus, RescueDevice, RescueMode, ServerRecord,
        SoftDeletion,
    },
    state::{PowerState, VmState},
};
use sha2::{Digest as _, Sha256};

use crate::bench::{
    BASE, RESCUE, create_args, created_xml, domain, facts, fixture, hash, image, record,
    rescue_args, rescued, templates, unrescue_args,
};

/// Compares a text with the file of that name.
pub(crate) fn check(name: &str, text: &str) {
    let path = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/plans"));
    let path = path.join(name);
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
    }
    let expected = fs::read_to_string(&path).unwrap_or_default();
    let diff = similar::TextDiff::from_lines(expected.as_str(), text);
    let diff = diff.unified_diff().header("golden file", "now").to_string();
    assert!(
        diff.is_empty(),
        "{name}:\n{diff}\nUPDATE_GOLDEN=1 accepts it"
    );
}

fn refers(references: &References, detail: &mut impl FnMut(String)) {
    if *references != References::default() {
        detail(format!("which has {references}"));
    }
}

/// A definition's name in a listing: what it holds shows in the golden files of the templates.
fn short(xml: &str) -> String {
    let hash = format!("{:x}", Sha256::digest(xml));
    format!("{} lines, sha256 {}", xml.lines().count(), &hash[..16])
}

/// A plan, for people.
fn listing(plan: &Plan, server: Option<&ServerRecord>) -> String {
    let mut text = String::new();
    let out = &mut text;
    if let Some(initial) = &plan.initial {
        let _ = writeln!(
            out,
            "  first     a record: {} {} {}",
            initial.origin, initial.vm_state, initial.domain_name
        );
    }
    for planned in &plan.steps {
        let (phase, step) = (planned.phase.name(), &planned.step);
        let _ = writeln!(out, "  {phase:<9} {:<19} {}", step.kind(), step.describe());
        let mut detail = |line: String| {
            let _ = writeln!(out, "  {:29} | {line}", "");
        };
        match step {
            Step::HoldImage {
                path, size, holder, ..
            } => {
                detail(format!("{path}, {size} bytes, for {holder}"));
            }
            Step::CreateOverlay {
                backing_format,
                backing_references,
                size,
                ..
            } => {
                detail(format!("on {backing_format}, {size} bytes"));
                refers(backing_references, &mut detail);
            }
            Step::CommitOverlay {
                base_references, ..
            } => refers(base_references, &mut detail),
            Step::BuildConfigDrive { drive, .. } => detail(format!(
                "instance {}, host {}, password of {}: {}",
                drive.instance_id,
                drive.hostname,
                drive.password_user,
                if drive.password.is_some() {
                    "hash"
                } else {
                    "none"
                }
            )),
            Step::SaveDefinition { xml } => detail(short(xml)),
            Step::PowerOff { was_on, .. } => detail(format!("was on: {was_on}")),
            Step::DefineDomain { xml, mark, before } => {
                detail(format!("{mark:?}: {}", short(xml)));
                detail(format!(
                    "before: {}",
                    before.as_deref().map_or("none".to_owned(), short)
                ));
            }
            Step::UndefineDomain { before, tpm_goes } => {
                detail(format!("before: {}", short(before)));
                if *tpm_goes {
                    detail("the TPM's state goes".to_owned());
                }
            }
            Step::StartDomain { mark, fresh } => {
                detail(format!("{mark:?}{}", if *fresh { ", fresh" } else { "" }))
            }
            Step::SetUserPassword { hash, .. } => detail(format!("{hash:?}")),
            Step::ReleaseImage { holder, .. } => detail(format!("from {holder}")),
            Step::MakeFolder { .. }
            | Step::Pause { .. }
            | Step::Unpause
            | Step::SaveMemory { .. }
            | Step::RestoreMemory { .. }
            | Step::SetGuestTime
            | Step::InjectNmi
            | Step::DumpMemory { .. }
            | Step::DropSavedMemory
            | Step::CopyFile { .. }
            | Step::ReserveNote { .. }
            | Step::NoteOwners { .. }
            | Step::PutOwnersBack { .. }
            | Step::MarkCommitStarted
            | Step::EmptyOverlay { .. }
            | Step::RemoveFolder { .. }
            | Step::DropSavedDefinition => {}
            Step::KnowDefinition { xml } => detail(short(xml)),
        }
        for (path, what) in step.files() {
            detail(format!("{what} {path}"));
        }
    }
    // Of what changes the record alone there is nothing else to be listed.
    let alone = plan.record_change().map(|_| ());
    for effect in alone
        .into_iter()
        .flat_map(|()| effects(plan, server, crate::bench::NOW))
    {
        let _ = writeln!(
            out,
            "  record    {}: {:?} -> {:?}",
            effect.field, effect.before, effect.after
        );
    }
    let _ = writeln!(out, "  outcome   {}", outcome(&plan.outcome));
    if !plan.password_delivery.is_empty() {
        let ways: Vec<&str> = plan
            .password_delivery
            .iter()
            .map(|way| way.name())
            .collect();
        let _ = writeln!(out, "  password  {}", ways.join(", "));
    }
    for warning in &plan.warnings {
        let _ = writeln!(out, "  warning   {}: {}", warning.name, warning.message);
    }
    text
}

fn outcome(outcome: &Outcome) -> String {
    match outcome {
        Outcome::Remove => "the record goes".to_owned(),
        Outcome::Keep => "the record stays".to_owned(),
        Outcome::Record(change) => format!("the record alone: {change:?}"),
        Outcome::SoftDelete {
            vm_state,
            power,
            reclaim_in_ms,
            ..
        } => format!("soft-deleted, was {vm_state} {power}, goes after {reclaim_in_ms} ms"),
        Outcome::Restore { vm_state, fault } => {
            let fault = fault.as_ref().map_or("", |_| " with its fault");
            format!("restored: {vm_state}{fault}")
        }
        Outcome::Insert(record) => {
            let mut text = format!(
                "a record: {} {} {}",
                record.origin, record.vm_state, record.domain_name
            );
            for disk in &record.disks {
                let root = if disk.root { ", root" } else { "" };
                let _ = write!(
                    text,
                    "\n  {:9} disk {} {} {}{root}",
                    "", disk.target, disk.bus, disk.source
                );
            }
            for nic in &record.nics {
                let _ = write!(
                    text,
                    "\n  {:9} nic {} {} {} {}",
                    "", nic.mac, nic.kind, nic.source, nic.model
                );
            }
            text
        }
        Outcome::Change {
            vm_state, rescue, ..
        } => match rescue {
            RescueChange::Keep => vm_state.to_string(),
            RescueChange::End => format!("{vm_state}, the rescue ends"),
            RescueChange::Delivered(way) => format!("{vm_state}, password delivered by {way}"),
            RescueChange::Begin { rescue, timeout_ms } => {
                let expires =
                    timeout_ms.map_or("never".to_owned(), |after| format!("after {after} ms"));
                let mut text = format!(
                    "{vm_state}, the rescue begins: {} {} {} {}, before {}, expires {expires}",
                    rescue.mode, rescue.bus, rescue.device, rescue.protection, rescue.power_before,
                );
                for disk in &rescue.disks {
                    let was = if disk.original_target.is_empty() {
                        String::new()
                    } else {
                        format!(", was {}", disk.original_target)
                    };
                    let _ = write!(
                        text,
                        "\n  {:9} disk {} {} {}{was}: {}",
                        "", disk.target, disk.bus, disk.role, disk.source
                    );
                }
                text
            }
        },
    }
}

fn made(server: Option<&ServerRecord>, action: &Action, facts: &Facts) -> Result<Plan, Refusal> {
    plan(server, action, facts, templates())
}

/// Plans of one file, each under its name.
pub(crate) struct Book(pub(crate) String);

impl Book {
    pub(crate) fn new() -> Self {
        Self(String::new())
    }

    pub(crate) fn add(
        &mut self,
        title: &str,
        server: Option<&ServerRecord>,
        action: &Action,
        facts: &Facts,
    ) {
        let text = match made(server, action, facts) {
            Ok(plan) => listing(&plan, server),
            Err(refusal) => format!("  refused   {}: {}\n", refusal.reason, refusal.message),
        };
        let _ = write!(self.0, "{title}\n{text}\n");
    }
}

fn rescue_facts(xml: &str, power: PowerState) -> Facts {
    let rescue = image(RESCUE, "rescue", ImageFormat::Qcow2);
    facts(Some(domain(xml, power)), Some(rescue))
}

fn rescue_action(change: impl FnOnce(&mut RescueArgs)) -> Action {
    let mut args = rescue_args();
    change(&mut args);
    Action::Rescue(Box::new(args))
}

#[test]
fn plans_of_create_and_adopt() {
    let mut book = Book::new();
    let base = facts(None, Some(image(BASE, "base", ImageFormat::Qcow2)));
    let create = |change: &dyn Fn(&mut salvor_agent::core::action::CreateArgs)| {
        let mut args = create_args();
        change(&mut args);
        Action::Create(Box::new(args))
    };
    book.add("create, BIOS", None, &create(&|_| {}), &base);
    book.add(
        "create, UEFI, powered off, 20 GiB",
        None,
        &create(&|args| {
            args.uefi = true;
            args.powered_off = true;
            args.flavor.disk_gib = 20;
        }),
        &base,
    );
    let mut tight = base.clone();
    tight.host.free_bytes = 2 << 30;
    tight.image = Some(image(BASE, "base", ImageFormat::Raw));
    book.add(
        "create, raw image, little space",
        None,
        &create(&|args| args.flavor.disk_gib = 20),
        &tight,
    );
    let adopt = Action::Adopt(AdoptArgs { name: None });
    for (name, power) in [
        ("virt-manager", PowerState::Running),
        ("three-disks", PowerState::Shutdown),
        ("nova", PowerState::Paused),
    ] {
        let facts = facts(Some(domain(fixture(name), power)), None);
        book.add(&format!("adopt, {name}, {power}"), None, &adopt, &facts);
    }
    check("make.txt", &book.0);
}

#[test]
fn plans_of_drift() {
    let mut book = Book::new();
    let known = created_xml(false).to_string();
    let device = "<input type='tablet' bus='usb'/></devices>";
    let changed = known.replace("</devices>", device);
    let server = record(Origin::Created, VmState::Active);
    let with = |xml: Option<&str>| {
        let mut facts = facts(xml.map(|xml| domain(xml, PowerState::Running)), None);
        facts.known_xml = Some(known.clone());
        facts
    };
    for (name, xml) in [
        ("changed", Some(changed.as_str())),
        ("as it was", Some(known.as_str())),
        ("gone", None),
    ] {
        let facts = with(xml);
        if xml.is_some() {
            let accept = format!("accept, {name}");
            book.add(&accept, Some(&server), &Action::AcceptDrift, &facts);
        }
        let restore = format!("restore, {name}");
        book.add(&restore, Some(&server), &Action::RestoreDefinition, &facts);
    }
    let error = record(Origin::Adopted, VmState::Error);
    book.add(
        "restore, gone, from ERROR",
        Some(&error),
        &Action::RestoreDefinition,
        &with(None),
    );
    // Somebody undefined it, and its guest goes on.
    let mut undefined = with(Some(&changed));
    if let Some(domain) = &mut undefined.domain {
        domain.persistent = false;
    }
    let mut unknown = undefined.clone();
    unknown.known_xml = None;
    let adopted = record(Origin::Adopted, VmState::Active);
    let soft = Action::Reboot(RebootArgs {
        shutdown: crate::bench::NOVA,
        or_fail: false,
    });
    for (name, server, action) in [
        ("restore", &server, Action::RestoreDefinition),
        ("stop", &server, Action::Stop(crate::bench::NOVA)),
        ("reboot", &server, soft),
        ("hard reboot, created", &server, Action::HardReboot),
        ("hard reboot, adopted", &adopted, Action::HardReboot),
        ("soft delete", &server, Action::SoftDelete),
    ] {
        let title = format!("{name}, undefined while it runs");
        book.add(&title, Some(server), &action, &undefined);
        let title = format!("{name}, undefined while it runs, not known");
        book.add(&title, Some(server), &action, &unknown);
    }
    let mut deleted = record(Origin::Adopted, VmState::SoftDeleted);
    deleted.deletion = Some(SoftDeletion {
        vm_state: VmState::Active,
        power: PowerState::Running,
        fault: None,
        at_ms: 1,
        reclaim_at_ms: 2,
    });
    for (name, state, action) in [
        ("start", VmState::Stopped, Action::Start),
        ("hard reboot", VmState::Active, Action::HardReboot),
    ] {
        let created = record(Origin::Created, state);
        let adopted = record(Origin::Adopted, state);
        let title = format!("{name}, created, gone");
        book.add(&title, Some(&created), &action, &with(None));
        let title = format!("{name}, created, gone, not known");
        book.add(&title, Some(&created), &action, &facts(None, None));
        let title = format!("{name}, adopted, gone");
        book.add(&title, Some(&adopted), &action, &with(None));
    }
    let title = "restore of a soft-deleted server, gone";
    book.add(title, Some(&deleted), &Action::Restore, &with(None));
    check("drift.txt", &book.0);
}

#[test]
fn plans_of_power_and_end() {
    let mut book = Book::new();
    let xml = created_xml(false);
    let created = |state| record(Origin::Created, state);
    let on = facts(Some(domain(&xml, PowerState::Running)), None);
    let off = facts(Some(domain(&xml, PowerState::Shutdown)), None);
    let now = Shutdown {
        timeout_ms: 0,
        retry_ms: 0,
    };
    let stopped = created(VmState::Stopped);
    let active = created(VmState::Active);
    book.add("start", Some(&stopped), &Action::Start, &off);
    book.add(
        "stop, gracefully",
        Some(&active),
        &Action::Stop(crate::bench::NOVA),
        &on,
    );
    book.add("stop, at once", Some(&active), &Action::Stop(now), &on);
    book.add(
        "stop, domain gone",
        Some(&active),
        &Action::Stop(now),
        &facts(None, None),
    );
    book.add("delete, created", Some(&active), &Action::Delete, &on);
    book.add(
        "delete, domain gone",
        Some(&active),
        &Action::Delete,
        &facts(None, None),
    );
    let mut adopted = record(Origin::Adopted, VmState::Active);
    let foreign = facts(
        Some(domain(fixture("three-disks"), PowerState::Running)),
        None,
    );
    let adopt = made(None, &Action::Adopt(AdoptArgs { name: None }), &foreign).unwrap();
    if let Outcome::Insert(record) = adopt.outcome {
        adopted = *record;
    }
    book.add("delete, adopted", Some(&adopted), &Action::Delete, &foreign);
    let uefi = fixture("virt-manager").replace("</devices>", "<tpm model='tpm-crb'/></devices>");
    let uefi = facts(Some(domain(&uefi, PowerState::Running)), None);
    book.add(
        "delete, adopted, UEFI and TPM",
        Some(&adopted),
        &Action::Delete,
        &uefi,
    );
    book.add(
        "release",
        Some(&adopted),
        &Action::Release,
        &facts(None, None),
    );
    let (server, in_rescue) = rescued(&active, &xml, rescue_args());
    book.add(
        "delete, created, rescued",
        Some(&server),
        &Action::Delete,
        &in_rescue,
    );
    let mut somebody_off = in_rescue.clone();
    if let Some(domain) = &mut somebody_off.domain {
        domain.power = PowerState::Shutdown;
    }
    book.add(
        "start of a rescue guest that went down with its host",
        Some(&server),
        &Action::StartRescue,
        &somebody_off,
    );
    check("power-and-end.txt", &book.0);
}

#[test]
fn plans_of_memory_and_reboots() {
    let mut book = Book::new();
    let xml = created_xml(false);
    let server = |vm_state, power, guest_agent| {
        let mut record = record(Origin::Created, vm_state);
        record.power.state = power;
        record.guest_agent = guest_agent;
        record
    };
    let seen = |power, managed_save| {
        let mut facts = facts(
            Some(DomainFacts {
                managed_save,
                ..domain(&xml, power)
            }),
            None,
        );
        facts.save_room = Some(SaveRoom {
            folder: "/var/lib/libvirt/qemu/save".to_owned(),
            free_bytes: 100 << 30,
        });
        facts.agent = Some(AgentLook::Answers);
        facts
    };
    let (on, off) = (PowerState::Running, PowerState::Shutdown);
    let active = server(VmState::Active, on, true);
    let suspended = server(VmState::Suspended, off, true);
    let soft = |or_fail| {
        Action::Reboot(RebootArgs {
            shutdown: crate::bench::NOVA,
            or_fail,
        })
    };
    let mut add = |title: &str, server: &ServerRecord, action: Action, facts: &Facts| {
        book.add(title, Some(server), &action, facts);
    };
    let running = seen(on, false);
    let saved = seen(off, true);
    add("reboot", &active, soft(false), &running);
    add("reboot, or fail", &active, soft(true), &running);
    add(
        "reboot, or fail, paused by somebody else",
        &active,
        soft(true),
        &seen(PowerState::Paused, false),
    );
    add("hard reboot", &active, Action::HardReboot, &running);
    add(
        "hard reboot, suspended",
        &suspended,
        Action::HardReboot,
        &saved,
    );
    let mut drifted = running.clone();
    drifted.known_xml = Some(xml.replace("<vcpu>1</vcpu>", "<vcpu>2</vcpu>"));
    add(
        "hard reboot, drifted",
        &active,
        Action::HardReboot,
        &drifted,
    );
    let mut adopted = active.clone();
    adopted.origin = Origin::Adopted;
    add(
        "hard reboot, adopted, drifted",
        &adopted,
        Action::HardReboot,
        &drifted,
    );
    add("pause", &active, Action::Pause, &running);
    add(
        "pause, off",
        &server(VmState::Active, off, false),
        Action::Pause,
        &running,
    );
    let paused = server(VmState::Paused, PowerState::Paused, true);
    add("unpause", &paused, Action::Unpause, &running);
    add(
        "unpause, no agent",
        &server(VmState::Paused, PowerState::Paused, false),
        Action::Unpause,
        &running,
    );
    for vm_state in [VmState::Active, VmState::Rescued, VmState::Error] {
        let halted = server(vm_state, PowerState::Paused, false);
        let title = format!("unpause, {vm_state}, halted");
        add(&title, &halted, Action::Unpause, &running);
    }
    add("suspend", &active, Action::Suspend, &running);
    let mut full = running.clone();
    full.save_room = full.save_room.map(|room| SaveRoom {
        free_bytes: 1 << 30,
        ..room
    });
    add("suspend, no room", &active, Action::Suspend, &full);
    add("resume", &suspended, Action::Resume, &saved);
    add(
        "resume, the memory is gone",
        &suspended,
        Action::Resume,
        &seen(off, false),
    );
    add(
        "start, with saved memory",
        &server(VmState::Stopped, off, true),
        Action::Start,
        &saved,
    );
    add("crash dump", &active, Action::CrashDump, &running);
    add("memory dump", &active, Action::DumpMemory, &running);
    let mut small = running.clone();
    small.host.free_bytes = 1 << 20;
    add("memory dump, no room", &active, Action::DumpMemory, &small);
    let password = |user: Option<&str>| {
        Action::ChangePassword(ChangePasswordArgs {
            user: user.map(str::to_owned),
            password: hash(),
        })
    };
    add("password", &active, password(None), &running);
    add(
        "password of a user",
        &active,
        password(Some("bob")),
        &running,
    );
    let mut image = image(BASE, "base", ImageFormat::Qcow2);
    image
        .record
        .properties
        .insert("os_type".to_owned(), "windows".to_owned());
    let windows = Facts {
        image: Some(image),
        ..running.clone()
    };
    add("password, windows", &active, password(None), &windows);
    for (title, agent) in [
        (
            "password, silent agent",
            AgentLook::Silent("not connected".to_owned()),
        ),
        (
            "password, agent given up",
            AgentLook::GivenUp {
                failures: 3,
                seconds: 120,
            },
        ),
    ] {
        let facts = Facts {
            agent: Some(agent),
            ..running.clone()
        };
        add(title, &active, password(None), &facts);
    }
    let paused = seen(PowerState::Paused, false);
    add("password, paused", &active, password(None), &paused);
    let without = facts(Some(domain(fixture("three-disks"), on)), None);
    add("password, no channel", &active, password(None), &without);
    check("memory-and-reboots.txt", &book.0);
}

#[test]
fn plans_of_rescue() {
    let mut book = Book::new();
    let active = record(Origin::Created, VmState::Active);
    let bios = created_xml(false);
    let uefi = created_xml(true);
    let running = rescue_facts(&bios, PowerState::Running);
    book.add(
        "created, BIOS, as the image suits",
        Some(&active),
        &rescue_action(|_| {}),
        &running,
    );
    let stopped = record(Origin::Created, VmState::Stopped);
    book.add(
        "created, UEFI, off",
        Some(&stopped),
        &rescue_action(|_| {}),
        &rescue_facts(&uefi, PowerState::Shutdown),
    );
    let mut no_nvram = rescue_facts(&uefi, PowerState::Running);
    no_nvram.domain.as_mut().unwrap().nvram = None;
    book.add(
        "created, UEFI, never started",
        Some(&active),
        &rescue_action(|_| {}),
        &no_nvram,
    );
    let mut own = running.clone();
    own.image = Some(image(BASE, "base", ImageFormat::Qcow2));
    book.add(
        "created, its own image",
        Some(&active),
        &rescue_action(|args| args.image = None),
        &own,
    );
    let mut iso = running.clone();
    iso.image = Some(image(RESCUE, "cd", ImageFormat::Iso));
    book.add("created, ISO", Some(&active), &rescue_action(|_| {}), &iso);
    let mut usb = running.clone();
    let properties = &mut usb.image.as_mut().unwrap().record.properties;
    properties.insert("hw_rescue_bus".to_owned(), "usb".to_owned());
    properties.insert("os_admin_user".to_owned(), "admin".to_owned());
    book.add(
        "created, image with hw_rescue_bus=usb",
        Some(&active),
        &rescue_action(|_| {}),
        &usb,
    );
    let error = record(Origin::Adopted, VmState::Error);
    book.add(
        "adopted, virt-manager (UEFI, agent), from ERROR, overlays, 2 h",
        Some(&error),
        &rescue_action(|args| {
            args.protection = Protection::Overlay;
            args.timeout_ms = Some(7_200_000);
            args.timeout_overlay = Some(OverlayDisposition::Discard);
        }),
        &rescue_facts(fixture("virt-manager"), PowerState::Running),
    );
    let mut configured = rescue_facts(fixture("virt-manager"), PowerState::Running);
    configured.host.rescue_timeout_ms = 60_000;
    let adopted = record(Origin::Adopted, VmState::Active);
    book.add(
        "adopted, overlays, configured timeout that cannot apply",
        Some(&adopted),
        &rescue_action(|args| args.protection = Protection::Overlay),
        &configured,
    );
    book.add(
        "adopted, configured timeout",
        Some(&adopted),
        &rescue_action(|args| args.mode = Some(RescueMode::Stable)),
        &configured,
    );
    check("rescue.txt", &book.0);
}

/// What becomes of every choice, a line or two each: the disks as the guest sees them, or the refusal.
fn matrix(server: &ServerRecord, xml: &str) -> String {
    let mut text = String::new();
    for mode in RescueMode::ALL {
        for device in RescueDevice::ALL {
            for bus in std::iter::once(None).chain(RescueBus::ALL.iter().copied().map(Some)) {
                for protection in Protection::ALL {
                    let action = rescue_action(|args| {
                        args.mode = Some(*mode);
                        args.device = Some(*device);
                        args.bus = bus;
                        args.protection = *protection;
                    });
                    let _ = write!(
                        text,
                        "{mode} {device} {} {protection}: ",
                        bus.map_or("any", RescueBus::name)
                    );
                    match made(
                        Some(server),
                        &action,
                        &rescue_facts(xml, PowerState::Running),
                    ) {
                        Err(refusal) => {
                            let _ = writeln!(text, "{}: {}", refusal.reason, refusal.message);
                        }
                        Ok(plan) => {
                            let kinds: Vec<&str> = plan
                                .steps
                                .iter()
                                .map(|planned| planned.step.kind())
                                .collect();
                            let Outcome::Change {
                                rescue: RescueChange::Begin { rescue, .. },
                                ..
                            } = &plan.outcome
                            else {
                                panic!("a rescue begins");
                            };
                            let disks: Vec<String> = rescue
                                .disks
                                .iter()
                                .map(|disk| {
                                    let was = if disk.original_target.is_empty() {
                                        &disk.role
                                    } else {
                                        &disk.original_target
                                    };
                                    format!("{}@{}={was}", disk.target, disk.bus)
                                })
                                .collect();
                            let _ = writeln!(
                                text,
                                "{}, {} overlays\n  {}",
                                disks.join(" "),
                                rescue.overlays.len(),
                                kinds.join(" ")
                            );
                        }
                    }
                }
            }
        }
    }
    text
}

#[test]
fn every_choice_of_mode_device_bus_and_protection() {
    let created = record(Origin::Created, VmState::Active);
    let adopted = record(Origin::Adopted, VmState::Active);
    check(
        "rescue-matrix-created.txt",
        &matrix(&created, &created_xml(false)),
    );
    check(
        "rescue-matrix-virt-manager.txt",
        &matrix(&adopted, fixture("virt-manager")),
    );
    check(
        "rescue-matrix-three-disks.txt",
        &matrix(&adopted, fixture("three-disks")),
    );
}

#[test]
fn plans_of_unrescue_and_password() {
    let mut book = Book::new();
    let active = record(Origin::Adopted, VmState::Active);
    let xml = fixture("virt-manager");
    let unrescue = |overlay, restore_power| {
        Action::Unrescue(salvor_agent::core::action::UnrescueArgs {
            overlay,
            restore_power,
            ..unrescue_args()
        })
    };
    let (server, in_rescue) = rescued(&active, xml, rescue_args());
    book.add(
        "unrescue",
        Some(&server),
        &unrescue(None, false),
        &in_rescue,
    );
    let mut gone = in_rescue.clone();
    gone.domain = None;
    book.add(
        "unrescue, domain gone",
        Some(&server),
        &unrescue(None, false),
        &gone,
    );
    book.add(
        "hand over the password",
        Some(&server),
        &Action::DeliverPassword,
        &in_rescue,
    );
    let mut was_off = server.clone();
    was_off.rescue.as_mut().unwrap().power_before = PowerState::Shutdown;
    book.add(
        "unrescue, power restored (was off)",
        Some(&was_off),
        &unrescue(None, true),
        &in_rescue,
    );
    let mut args = rescue_args();
    args.protection = Protection::Overlay;
    let (server, in_rescue) = rescued(&active, xml, args);
    for overlay in OverlayDisposition::ALL {
        book.add(
            &format!("unrescue, {overlay}"),
            Some(&server),
            &unrescue(Some(*overlay), true),
            &in_rescue,
        );
    }
    check("unrescue.txt", &book.0);
}

#[test]
fn a_rescues_drive_carries_the_user_data_that_the_rescue_was_given_and_no_other() {
    for given in [None, Some(b"#!/bin/sh".to_vec())] {
        let args = RescueArgs {
            user_data: given.clone(),
            ..rescue_args()
        };
        let facts = facts(
            Some(domain(&created_xml(false), PowerState::Running)),
            Some(image(RESCUE, "rescue", ImageFormat::Qcow2)),
        );
        let server = record(Origin::Created, VmState::Active);
        let action = Action::Rescue(Box::new(args));
        let plan = plan(Some(&server), &action, &facts, templates()).unwrap();
        let drives: Vec<_> = plan
            .steps
            .iter()
            .filter_map(|planned| match &planned.step {
                Step::BuildConfigDrive { drive, .. } => Some(drive.user_data.clone()),
                _ => None,
            })
            .collect();
        assert_eq!(drives, [given]);
    }
}
