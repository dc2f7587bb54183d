// SPDX-License-Identifier: Apache-2.0
//! The status that users see, and what observations mean.

use std::collections::BTreeMap;

use salvor_agent::core::{
    action::{Action, AdoptArgs, Verb},
    autostart::{Turn, comes_back, turn},
    change::FieldChange,
    effects::effects,
    plan::{Outcome, Plan},
    planners::plan,
    reconcile::{Mismatch, is_stale, reconcile},
    record::{Origin, ServerRecord},
    state::{ObservationSource, PowerObservation, PowerState, Status, TaskState, VmState, status},
};
use uuid::Uuid;

use crate::bench::{
    NOW, created_xml, domain, facts, fixture, record, rescue_args, rescued, templates,
    unrescue_args,
};

/// `_STATE_MAP` of `nova/api/openstack/common.py`: the row's default, then exceptions by task state.
const NOVA: &str = "
    active ACTIVE rebooting=REBOOT reboot_pending=REBOOT reboot_started=REBOOT rebooting_hard=HARD_REBOOT reboot_pending_hard=HARD_REBOOT reboot_started_hard=HARD_REBOOT updating_password=PASSWORD rebuilding=REBUILD rebuild_block_device_mapping=REBUILD rebuild_spawning=REBUILD migrating=MIGRATING resize_prep=RESIZE resize_migrating=RESIZE resize_migrated=RESIZE resize_finish=RESIZE
    building BUILD
    stopped SHUTOFF resize_prep=RESIZE resize_migrating=RESIZE resize_migrated=RESIZE resize_finish=RESIZE rebuilding=REBUILD rebuild_block_device_mapping=REBUILD rebuild_spawning=REBUILD
    resized VERIFY_RESIZE resize_reverting=REVERT_RESIZE
    paused PAUSED migrating=MIGRATING
    suspended SUSPENDED
    rescued RESCUE
    error ERROR rebuilding=REBUILD rebuild_block_device_mapping=REBUILD rebuild_spawning=REBUILD
    soft-delete SOFT_DELETED
    deleted DELETED
    shelved SHELVED
    shelved_offloaded SHELVED_OFFLOADED
";

#[test]
fn the_status_of_every_pair_of_states_is_novas() {
    let mut rows = 0;
    for line in NOVA.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let mut words = line.split_whitespace();
        let vm_state = VmState::from_name(words.next().unwrap()).unwrap();
        let default = Status::from_name(words.next().unwrap()).unwrap();
        let exceptions: BTreeMap<TaskState, Status> = words
            .map(|word| {
                let (task, status) = word.split_once('=').unwrap();
                (
                    TaskState::from_name(task).unwrap(),
                    Status::from_name(status).unwrap(),
                )
            })
            .collect();
        assert_eq!(status(vm_state, None), default);
        for task in TaskState::ALL {
            let expected = exceptions.get(task).copied().unwrap_or(default);
            assert_eq!(status(vm_state, Some(*task)), expected, "{vm_state} {task}");
        }
        rows += 1;
    }
    assert_eq!(rows, VmState::ALL.len());
}

#[test]
fn names_are_stable_and_unique() {
    fn check<T: Copy + PartialEq + std::fmt::Debug + serde::Serialize>(
        all: &[T],
        name: impl Fn(T) -> &'static str,
        from: impl Fn(&str) -> Option<T>,
    ) {
        for value in all {
            assert_eq!(from(name(*value)), Some(*value));
            let json = serde_json::to_string(value).unwrap();
            assert_eq!(json, format!("{:?}", name(*value)));
        }
    }
    check(VmState::ALL, VmState::name, VmState::from_name);
    check(TaskState::ALL, TaskState::name, TaskState::from_name);
    check(PowerState::ALL, PowerState::name, PowerState::from_name);
    check(Status::ALL, Status::name, Status::from_name);
    assert_eq!(VmState::from_name("ACTIVE"), None);
}

fn seen(state: PowerState, observed_at_ms: i64) -> PowerObservation {
    PowerObservation {
        state,
        reason: "why".to_owned(),
        observed_at_ms,
        source: ObservationSource::Event,
    }
}

#[test]
fn only_what_was_seen_after_the_last_operation_and_outside_of_one_changes_the_intent() {
    for busy in [false, true] {
        // Before, at, and after the time when the last operation ended.
        for at in [999, 1_000, 1_001] {
            let mut server = record(Origin::Adopted, VmState::Active);
            server.power.observed_at_ms = 900;
            server.operation = busy.then(|| Uuid::from_u128(1));
            let reconciled = reconcile(&server, seen(PowerState::Shutdown, at)).unwrap();
            let counts = !busy && at > 1_000;
            let expected = if counts {
                VmState::Stopped
            } else {
                VmState::Active
            };
            assert_eq!(reconciled.vm_state, expected, "{busy} {at}");
            assert_eq!(reconciled.power.state, PowerState::Shutdown);
        }
    }
}

#[test]
fn an_outage_keeps_what_was_known_before_it_however_long_it_lasts() {
    let mut server = record(Origin::Adopted, VmState::Active);
    let known = server.power.clone();
    for at in 2_000..2_010 {
        let reason = format!("try {at}");
        let outage = PowerObservation {
            reason,
            ..seen(PowerState::Unknown, at)
        };
        let reconciled = reconcile(&server, outage).unwrap();
        assert_eq!(reconciled.last_known_power, Some(known.clone()));
        assert_eq!(reconciled.vm_state, VmState::Active);
        server.power = reconciled.power;
        server.last_known_power = reconciled.last_known_power;
    }
    let back = reconcile(&server, seen(PowerState::Running, 3_000)).unwrap();
    assert_eq!(
        (back.power.state, back.last_known_power),
        (PowerState::Running, None)
    );
}

#[test]
fn what_is_seen_again_is_no_news() {
    let mut server = record(Origin::Adopted, VmState::Active);
    server.power = seen(PowerState::Running, 2_000);
    assert_eq!(reconcile(&server, seen(PowerState::Running, 3_000)), None);
    // Off already when the operation ended, and nobody had drawn the conclusion.
    server.power = seen(PowerState::Shutdown, 900);
    let reconciled = reconcile(&server, seen(PowerState::Shutdown, 3_000)).unwrap();
    assert_eq!(reconciled.vm_state, VmState::Stopped);
}

#[test]
fn an_observation_is_stale_if_a_newer_one_is_known_unless_the_clock_was_set_back() {
    let mut server = record(Origin::Adopted, VmState::Active);
    server.power.observed_at_ms = 1_000_000;
    for (at, expected) in [
        (1_000_001, false),
        (1_000_000, false),
        (999_999, true),
        (940_000, true),
        (939_999, false),
        (0, false),
    ] {
        assert_eq!(
            is_stale(&server, &seen(PowerState::Running, at)),
            expected,
            "{at}"
        );
    }
}

#[test]
fn a_server_that_ran_comes_back_whatever_was_under_way_unless_that_was_to_end_it() {
    let ends = [
        Verb::Stop,
        Verb::Delete,
        Verb::ForceDelete,
        Verb::SoftDelete,
        Verb::Release,
    ];
    for vm_state in VmState::ALL {
        let mut server = record(Origin::Adopted, *vm_state);
        let runs = [VmState::Active, VmState::Paused, VmState::Rescued].contains(vm_state);
        assert_eq!(comes_back(&server), runs, "{vm_state}");
        for verb in Verb::ALL {
            server.give_lane(Some((Uuid::from_u128(9), *verb)));
            let expected = runs && !ends.contains(verb);
            assert_eq!(comes_back(&server), expected, "{verb} in {vm_state}");
        }
    }
    let mut server = record(Origin::Adopted, VmState::Active);
    server.power.state = PowerState::Shutdown;
    assert!(!comes_back(&server));
    server.power.state = PowerState::Running;
    server.autostart = false;
    assert!(!comes_back(&server));
}

#[test]
fn what_ended_meanwhile_stays_off_after_a_reboot_of_the_host() {
    use VmState as S;
    assert_eq!(turn(S::Active, S::Stopped), Turn::Start);
    assert_eq!(turn(S::Paused, S::Stopped), Turn::Start);
    assert_eq!(turn(S::Rescued, S::Rescued), Turn::StartRescue);
    for (was, vm_state) in [
        (S::Rescued, S::Stopped),
        (S::Active, S::Suspended),
        (S::Active, S::SoftDeleted),
    ] {
        let left = matches!(turn(was, vm_state), Turn::LeaveOff(_));
        assert!(left, "{was} {vm_state}");
    }
    assert_eq!(turn(S::Active, S::Error), Turn::Fail);
}

#[test]
fn an_adopted_server_is_at_once_what_its_domain_is_seen_to_be() {
    for (power, reason, saved, expected) in [
        (
            PowerState::Running,
            "booted",
            false,
            (VmState::Active, None),
        ),
        (PowerState::Paused, "user", false, (VmState::Paused, None)),
        (
            PowerState::Paused,
            "ioerror",
            false,
            (VmState::Active, Some(Mismatch::IoError)),
        ),
        (
            PowerState::Shutdown,
            "saved",
            true,
            (VmState::Suspended, None),
        ),
        (
            PowerState::Shutdown,
            "crashed",
            false,
            (VmState::Stopped, None),
        ),
    ] {
        let mut seen = domain(fixture("virt-manager"), power);
        seen.power_reason = reason.to_owned();
        seen.managed_save = saved;
        let adopt = Action::Adopt(AdoptArgs { name: None });
        let adopted = plan(None, &adopt, &facts(Some(seen), None), templates()).unwrap();
        let Outcome::Insert(server) = adopted.outcome else {
            panic!("{:?}", adopted.outcome);
        };
        let mismatch = server.mismatch.map(|mismatch| mismatch.what);
        assert_eq!((server.vm_state, mismatch), expected, "{power} ({reason})");
    }
}

#[test]
fn a_dry_run_says_what_changes_in_the_record() {
    let told = |plan: &Plan, server: Option<&ServerRecord>| {
        let effects = effects(plan, server, NOW).into_iter();
        let told = effects.map(|it| format!("{}: {} -> {}", it.field, it.before, it.after));
        told.collect::<Vec<_>>()
    };
    let active = record(Origin::Created, VmState::Active);
    let on = facts(Some(domain(&created_xml(false), PowerState::Running)), None);
    let made = |server, action: Action| plan(server, &action, &on, templates()).unwrap();
    let pause = made(Some(&active), Action::Pause);
    assert_eq!(told(&pause, Some(&active)), ["vm_state: active -> paused"]);
    let nothing = made(Some(&active), Action::CrashDump);
    assert_eq!(told(&nothing, Some(&active)), Vec::<String>::new());
    let gone = told(&made(Some(&active), Action::Delete), Some(&active));
    assert!(gone.contains(&"name: web -> ".to_owned()), "{gone:?}");
    let metadata = [("k".to_owned(), "v".to_owned())].into();
    let update = made(
        Some(&active),
        Action::Update(vec![FieldChange::Metadata(metadata)]),
    );
    assert_eq!(told(&update, Some(&active)), ["metadata.k:  -> v"]);
    let (server, in_rescue) = rescued(&active, &created_xml(false), rescue_args());
    let unrescue = Action::Unrescue(unrescue_args());
    let unrescue = plan(Some(&server), &unrescue, &in_rescue, templates()).unwrap();
    let told = told(&unrescue, Some(&server));
    assert_eq!(told[0], "vm_state: rescued -> active");
    assert!(told[1].starts_with("rescue: image 7e5c0000"), "{told:?}");
}
