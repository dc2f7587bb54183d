// SPDX-License-Identifier: Apache-2.0
//! What an observation means for a record, against the same table written down a second time.

use salvor_agent::core::{
    incident::{Incident, IncidentKind},
    reconcile::{
        IO_ERROR, Mismatch, Mismatched, NO_DOMAIN, News, Policy, Response, Seen, Told, follow,
        is_to_be_started, reconcile, respond,
    },
    record::{AgentSeen, Origin, ServerRecord},
    state::{ObservationSource, PowerObservation, PowerState, VmState},
};

use crate::bench::record;

/// What is seen, by a word of the table: the power state, libvirt's reasons, and whether memory was saved.
const SEEN: &[(&str, PowerState, &[&str], Option<bool>)] = &[
    (
        "runs",
        PowerState::Running,
        &[
            "unknown",
            "booted",
            "restored",
            "unpaused",
            "wakeup",
            "shutting-down",
        ],
        Some(false),
    ),
    ("asleep", PowerState::Suspended, &["unknown"], None),
    (
        "paused",
        PowerState::Paused,
        &["user", "from-snapshot"],
        None,
    ),
    (
        "io-error",
        PowerState::Paused,
        &["ioerror", "ioerror: no space on vda"],
        None,
    ),
    (
        "fault",
        PowerState::Paused,
        &["watchdog", "crashed", "postcopy-failed", "api-error"],
        None,
    ),
    (
        "passing",
        PowerState::Paused,
        &[
            "unknown",
            "migration",
            "save",
            "dump",
            "shutting-down",
            "snapshot",
            "starting-up",
            "postcopy",
            "a word of a newer libvirt",
        ],
        None,
    ),
    (
        "shut-down",
        PowerState::Shutdown,
        &["shutdown"],
        Some(false),
    ),
    (
        "crashed",
        PowerState::Shutdown,
        &["crashed", "failed"],
        Some(false),
    ),
    ("saved", PowerState::Shutdown, &["saved"], Some(true)),
    ("memory-gone", PowerState::Shutdown, &["saved"], Some(false)),
    (
        "off",
        PowerState::Shutdown,
        &[
            "unknown",
            "destroyed",
            "migrated",
            "from-snapshot",
            "daemon",
            "",
        ],
        Some(false),
    ),
    // Nobody asked whether memory was saved.
    ("off?", PowerState::Shutdown, &["unknown"], None),
    (
        "panicked",
        PowerState::Crashed,
        &["unknown", "panicked"],
        None,
    ),
    ("missing", PowerState::NoState, &[NO_DOMAIN], None),
    ("nothing", PowerState::NoState, &["unknown", "booted"], None),
    ("away", PowerState::Unknown, &["Connection reset"], None),
];

/// For each vm state what it becomes, in the order of [`SEEN`], with what becomes of the mismatch: `-` there is
/// none, `=` it stays, `~` it stays if it is why the guest is off, `!…` this is it. An empty word before it: the
/// vm state stays.
const TABLE: &str = "
    active:    active- active- paused- active!io-error active!halted = stopped!stopped-by-itself stopped!crashed
               suspended- stopped- stopped- stopped- stopped!crashed !vanished = =
    paused:    active- active- paused- paused!io-error paused!halted = stopped!stopped-by-itself stopped!crashed
               suspended- stopped- stopped- stopped- stopped!crashed !vanished = =
    stopped:   active- active- paused- active!io-error active!halted = ~ ~
               suspended- ~ ~ ~ stopped!crashed !vanished = =
    suspended: active- active- paused- active!io-error active!halted = stopped- stopped-
               suspended- stopped- stopped- suspended- stopped!crashed !vanished = =
    rescued:   - - - !io-error !halted = - - - - - - !halted !vanished = =
    resized:   - - - !io-error !halted = - - - - - - !halted !vanished = =
    error:     - - - !io-error !halted = - - - - - - !halted !vanished = =
    shelved:   - - - !io-error !halted = - - - - - - !halted !vanished = =
    soft-delete: !runs-although-deleted !runs-although-deleted !runs-although-deleted !runs-although-deleted
               !runs-although-deleted !runs-although-deleted - - - - - - !runs-although-deleted !vanished = =
    building:  = = = = = = = = = = = = = = = =
    deleted:   = = = = = = = = = = = = = = = =
    shelved_offloaded: = = = = = = = = = = = = = = = =
";

/// The rows: a vm state, and the words for each of [`SEEN`].
fn rows() -> Vec<(VmState, Vec<&'static str>)> {
    let mut rows: Vec<(VmState, Vec<&str>)> = Vec::new();
    for word in TABLE.split_whitespace() {
        match word.strip_suffix(':') {
            Some(state) => rows.push((VmState::from_name(state).unwrap(), Vec::new())),
            None => rows.last_mut().unwrap().1.push(word),
        }
    }
    rows
}

fn expected(vm_state: VmState, word: &str) -> (VmState, Told) {
    let at = word.find(['-', '=', '~', '!']).unwrap();
    // `stopped!stopped-by-itself` has a hyphen later, `stopped-` one at the end.
    let at = word.find('!').unwrap_or(at);
    let (state, told) = word.split_at(at);
    let state = if state.is_empty() {
        vm_state
    } else {
        VmState::from_name(state).unwrap()
    };
    let told = match told {
        "-" => Told::Clear,
        "=" => Told::Keep,
        "~" => Told::StillOff,
        mismatch => Told::Is(Mismatch::from_name(&mismatch[1..]).unwrap()),
    };
    (state, told)
}

#[test]
fn what_a_server_becomes_follows_the_table_for_every_state_and_reason() {
    let rows = rows();
    let states: Vec<VmState> = rows.iter().map(|(state, _)| *state).collect();
    assert!(VmState::ALL.iter().all(|state| states.contains(state)));
    assert_eq!(states.len(), VmState::ALL.len());
    for power in PowerState::ALL {
        assert!(SEEN.iter().any(|(_, seen, ..)| seen == power), "{power}");
    }
    for (state, words) in rows {
        assert_eq!(words.len(), SEEN.len(), "{state}");
        for ((name, power, reasons, memory), word) in SEEN.iter().zip(words) {
            for reason in *reasons {
                assert_eq!(
                    follow(state, *power, reason, *memory),
                    expected(state, word),
                    "{state} seen {name} ({reason})"
                );
            }
        }
    }
}

fn seen(state: PowerState, reason: &str, at: i64) -> PowerObservation {
    PowerObservation {
        state,
        reason: reason.to_owned(),
        observed_at_ms: at,
        source: ObservationSource::Event,
    }
}

/// What the record is after it was seen so.
fn after(server: &ServerRecord, seen: impl Into<Seen>) -> ServerRecord {
    let mut server = server.clone();
    if let Some(reconciled) = reconcile(&server, seen) {
        server.power = reconciled.power;
        server.vm_state = reconciled.vm_state;
        server.mismatch = reconciled.mismatch;
    }
    server
}

fn what(server: &ServerRecord) -> Option<Mismatch> {
    server.mismatch.map(|mismatch| mismatch.what)
}

#[test]
fn a_mismatch_has_its_first_time_and_lasts_through_an_outage() {
    let server = record(Origin::Adopted, VmState::Active);
    let off = after(&server, seen(PowerState::Shutdown, "crashed", 2_000));
    let expected = Mismatched {
        what: Mismatch::Crashed,
        since_ms: 2_000,
    };
    assert_eq!(off.mismatch, Some(expected));
    let away = after(&off, seen(PowerState::Unknown, "gone", 3_000));
    // libvirt has forgotten why.
    let back = after(&away, seen(PowerState::Shutdown, "unknown", 4_000));
    assert_eq!(back.mismatch, Some(expected));
    let on = after(&back, seen(PowerState::Running, "booted", 5_000));
    assert_eq!((on.vm_state, what(&on)), (VmState::Active, None));
}

#[test]
fn a_domain_that_is_back_has_not_vanished_any_more() {
    let server = record(Origin::Adopted, VmState::Stopped);
    let gone = after(&server, seen(PowerState::NoState, NO_DOMAIN, 2_000));
    assert_eq!(
        (gone.vm_state, what(&gone)),
        (VmState::Stopped, Some(Mismatch::Vanished))
    );
    let back = after(&gone, seen(PowerState::Shutdown, "unknown", 3_000));
    assert_eq!((back.vm_state, what(&back)), (VmState::Stopped, None));
}

#[test]
fn which_disk_failed_is_kept_until_the_guest_is_something_else() {
    let server = record(Origin::Adopted, VmState::Active);
    let detail = format!("{IO_ERROR}: no space on vda");
    let paused = after(&server, seen(PowerState::Paused, &detail, 2_000));
    assert_eq!(paused.vm_state, VmState::Active);
    assert_eq!(
        reconcile(&paused, seen(PowerState::Paused, IO_ERROR, 3_000)),
        None
    );
    let by_hand = after(&paused, seen(PowerState::Paused, "user", 4_000));
    assert_eq!((by_hand.vm_state, what(&by_hand)), (VmState::Paused, None));
    assert_eq!(by_hand.power.reason, "user");
}

#[test]
fn while_an_operation_runs_neither_the_intent_nor_the_mismatch_changes() {
    let mut server = record(Origin::Adopted, VmState::Active);
    server.operation = Some(uuid::Uuid::from_u128(1));
    let off = after(&server, seen(PowerState::Shutdown, "crashed", 2_000));
    assert_eq!((off.vm_state, off.mismatch), (VmState::Active, None));
    assert_eq!(off.power.state, PowerState::Shutdown);
}

/// News, with what follows from it: recorded `agent+` `agent-`, told `!kind`, asked `definition` `password` (of
/// a rescued server only).
const NEWS: &[(&str, &str)] = &[
    ("agent connects", "agent+ password"),
    ("agent leaves", "agent-"),
    ("defined", "definition"),
    ("block job completed", "definition"),
    ("block job canceled", "definition"),
    ("block job ready", "definition"),
    ("block job failed", "definition !block-job-failed"),
    ("device removed", "definition !device-removed"),
    ("balloon", "!memory-changed"),
    ("rebooted", "!rebooted"),
    ("panicked", "!panicked"),
    ("io-error", "!io-error"),
    ("watchdog", "!watchdog"),
];

fn news(word: &str) -> News {
    let job = |state| News::BlockJob {
        disk: "vda".to_owned(),
        state,
    };
    match word {
        "agent connects" => News::Agent { connected: true },
        "agent leaves" => News::Agent { connected: false },
        "defined" => News::Definition,
        "block job completed" => job("completed"),
        "block job canceled" => job("canceled"),
        "block job ready" => job("ready"),
        "block job failed" => job("failed"),
        "device removed" => News::DeviceRemoved {
            device: "net1".to_owned(),
        },
        "balloon" => News::Balloon { memory_kib: 4096 },
        kind => News::Happened(Incident::new(IncidentKind::from_name(kind).unwrap())),
    }
}

#[test]
fn what_follows_from_news_is_what_the_table_says_and_nothing_of_foreign_domains() {
    let server = record(Origin::Adopted, VmState::Active);
    let xml = crate::bench::created_xml(false);
    let (rescued, _) = crate::bench::rescued(&server, &xml, crate::bench::rescue_args());
    for (word, follows) in NEWS {
        for server in [&server, &rescued] {
            let Response {
                agent,
                incident,
                read_definition,
                ask_agent,
            } = respond(Some(server), news(word));
            let mut found = Vec::new();
            if read_definition {
                found.push("definition".to_owned());
            }
            if let Some(connected) = agent {
                found.push(if connected { "agent+" } else { "agent-" }.to_owned());
            }
            if ask_agent {
                found.push("password".to_owned());
            }
            found.extend(incident.map(|incident| format!("!{}", incident.kind)));
            let mut expected: Vec<&str> = follows.split_whitespace().collect();
            expected.retain(|word| *word != "password" || server.rescue.is_some());
            assert_eq!(found, expected, "{word}");
        }
        assert_eq!(respond(None, news(word)), Response::default(), "{word}");
    }
    let failed = respond(Some(&server), news("block job failed"))
        .incident
        .unwrap();
    assert_eq!(
        (failed.device.as_str(), failed.reason.as_str()),
        ("vda", "failed")
    );
    let balloon = respond(Some(&server), news("balloon")).incident.unwrap();
    assert_eq!(balloon.reason, "4096 KiB");
}

#[test]
fn a_guest_is_started_again_only_if_it_is_off_for_a_reason_that_the_policy_names() {
    let policies = [(false, false), (true, false), (false, true), (true, true)];
    for (start_crashed, start_stopped_by_itself) in policies {
        let policy = Policy {
            start_crashed,
            start_stopped_by_itself,
        };
        for mismatch in Mismatch::ALL.iter().copied().map(Some).chain([None]) {
            for vm_state in VmState::ALL {
                for power in PowerState::ALL {
                    let mut server = record(Origin::Adopted, *vm_state);
                    server.power.state = *power;
                    server.mismatch = mismatch.map(|what| Mismatched { what, since_ms: 1 });
                    let off = [PowerState::Shutdown, PowerState::Crashed].contains(power);
                    let named = (mismatch == Some(Mismatch::Crashed) && start_crashed)
                        || (mismatch == Some(Mismatch::StoppedByItself) && start_stopped_by_itself);
                    let expected = named && off && *vm_state == VmState::Stopped;
                    assert_eq!(is_to_be_started(&server, policy), expected, "{server:?}");
                    server.operation = Some(uuid::Uuid::from_u128(1));
                    assert!(!is_to_be_started(&server, policy));
                }
            }
        }
    }
}

#[test]
fn a_guest_that_is_off_has_no_agent() {
    let mut server = record(Origin::Adopted, VmState::Active);
    server.agent = Some(AgentSeen {
        connected: true,
        at_ms: 1_500,
    });
    let agent = |seen| reconcile(&server, seen).map(|reconciled| reconciled.agent);
    let paused = agent(seen(PowerState::Paused, "user", 2_000));
    assert_eq!(paused, Some(server.agent));
    let away = agent(seen(PowerState::Unknown, "gone", 2_000));
    assert_eq!(away, Some(server.agent));
    let off = agent(seen(PowerState::Shutdown, "shutdown", 2_000));
    assert_eq!(off, Some(None));
    // Also where a step of ours has said before that it is off.
    server.power.state = PowerState::Shutdown;
    server.power.reason = "shutdown".to_owned();
    server.vm_state = VmState::Stopped;
    let again = reconcile(&server, seen(PowerState::Shutdown, "shutdown", 2_000));
    assert_eq!(again.map(|reconciled| reconciled.agent), Some(None));
}
