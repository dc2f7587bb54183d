// SPDX-License-Identifier: Apache-2.0
//! The admission table against the same table, written down a second time.

use salvor_agent::core::{
    action::Verb,
    admission::{Allowed, admit, admit_cancel, allowed, permit},
    caller::{Role, Who},
    reason::Reason,
    record::{Lock, LockOwner, Origin, Owner, ServerRecord},
    state::{PowerState, VmState},
};
use uuid::Uuid;

use crate::bench::{created_xml, record, rescue_args, rescued};

/// Nova's states for each verb (`check_instance_state` in `nova/compute/api.py`), and ours: the states in which
/// it is admitted, `if:` or `unless:` a rescue is in force; after `|` what it overtakes, or `beside` if it goes
/// through while anything is under way; after the second `|` whether a lock stops everybody but the
/// administrator (`L`, else `-`) and who may ask for it: a member of the server's project (`M`) or only the
/// administrator (`A`). `*` marks what Nova does not do so: it has no adopted servers and nothing to release; it
/// rescues a half-rescued server in ERROR again and loses its way back, and cannot unrescue it; it stops a
/// half-rescued one and calls it stopped. Nova's delete does not cancel what is under way, but races with it, and
/// so does its reset. Its lock does not cover a server's name and description, it does its metadata.
/// It unpauses no guest that it did not pause itself, dumps no memory to the host, refuses a hard reboot while a
/// start or stop runs, and hard reboots a half-rescued server out of its rescue. It knows no drift, and
/// starts no rescue guest after a reboot of its host. `docs/STATES.md` shows the marks.
const TABLE: &str = include_str!("admission.txt");

/// What the table says of a verb.
struct Row {
    verb: Verb,
    states: Vec<(VmState, Allowed)>,
    overtakes: Vec<Verb>,
    /// It goes through while anything is under way.
    beside: bool,
    locked_out: bool,
    for_admin: bool,
}

/// A word without the mark of a deviation.
fn word(word: &str) -> &str {
    word.trim_end_matches('*')
}

fn rows() -> Vec<Row> {
    let mut lines: Vec<String> = Vec::new();
    for line in TABLE.lines().map(str::trim).filter(|line| !line.is_empty()) {
        if line.contains(':') && Verb::from_name(line.split(':').next().unwrap()).is_some() {
            lines.push(line.to_owned());
        } else {
            let last = lines.last_mut().unwrap();
            last.push(' ');
            last.push_str(line);
        }
    }
    lines.iter().map(|line| row(line)).collect()
}

fn row(line: &str) -> Row {
    let (verb, rest) = line.split_once(':').unwrap();
    let mut columns = rest.split('|');
    let mut column = || columns.next().unwrap_or_else(|| panic!("{line}"));
    let (states, overtakes, access) = (column(), column(), word(column().trim()));
    let states = states.split_whitespace().map(|state| {
        let (allowed, state) = match word(state).split_once(':') {
            None => (Allowed::Yes, word(state)),
            Some(("if", state)) => (Allowed::IfRescued, state),
            Some(("unless", state)) => (Allowed::UnlessRescued, state),
            Some(("if-paused", state)) => (Allowed::IfPaused, state),
            Some(other) => panic!("{other:?}"),
        };
        (VmState::from_name(state).unwrap(), allowed)
    });
    let mut named: Vec<&str> = overtakes.split_whitespace().map(word).collect();
    let beside = named.first() == Some(&"beside");
    let all_but = named.first() == Some(&"all-but");
    if all_but || beside {
        named.remove(0);
    }
    let named: Vec<Verb> = named
        .iter()
        .map(|name| Verb::from_name(name).unwrap())
        .collect();
    let mut overtakes = Verb::ALL.to_vec();
    overtakes.retain(|verb| named.contains(verb) != all_but);
    Row {
        verb: Verb::from_name(verb).unwrap(),
        states: states.collect(),
        overtakes,
        beside,
        locked_out: match access.get(..1) {
            Some("L") => true,
            Some("-") => false,
            _ => panic!("{line}"),
        },
        for_admin: match access.get(1..) {
            Some("A") => true,
            Some("M") => false,
            _ => panic!("{line}"),
        },
    }
}

impl Row {
    fn allowed(&self, state: VmState) -> Allowed {
        let found = self.states.iter().find(|(listed, _)| *listed == state);
        found.map_or(Allowed::No, |(_, allowed)| *allowed)
    }
}

#[test]
fn every_verb_is_allowed_in_the_states_of_the_table_and_in_no_other() {
    let rows = rows();
    assert_eq!(rows.len(), Verb::ALL.len());
    for row in &rows {
        for state in VmState::ALL {
            let verb = row.verb;
            assert_eq!(
                allowed(verb, *state),
                row.allowed(*state),
                "{verb} in {state}"
            );
        }
    }
}

#[test]
fn every_verb_overtakes_what_the_table_says_and_nothing_else() {
    for row in rows() {
        for other in Verb::ALL {
            let verb = row.verb;
            let expected = row.overtakes.contains(other);
            assert_eq!(verb.overtakes(*other), expected, "{verb} over {other}");
        }
        assert_eq!(row.verb.needs_lane(), !row.beside, "{}", row.verb);
    }
}

const NOW: i64 = 1_000_000;

/// Not locked, locked by each, with an end to come, and with one that has come.
fn locks() -> Vec<Option<Lock>> {
    let mut locks = vec![None];
    for by in LockOwner::ALL {
        for expires_at_ms in [None, Some(NOW + 1), Some(NOW)] {
            locks.push(Some(Lock {
                by: *by,
                reason: Some("audit".to_owned()),
                at_ms: 1,
                expires_at_ms,
            }));
        }
    }
    locks
}

/// The administrator and members, for nobody, for the server's project, and for another one.
fn askers() -> Vec<Who> {
    let asker = |role, project: &str| Who {
        role,
        user: "u".to_owned(),
        project: project.to_owned(),
    };
    vec![
        Who::default(),
        asker(Role::Admin, "p"),
        asker(Role::Admin, "other"),
        asker(Role::Member, "p"),
        asker(Role::Member, "other"),
        // The edge lets none in without a project; then it owns nothing.
        asker(Role::Member, ""),
    ]
}

/// Every record that admission can tell from another, but for its lock and its state.
fn records(state: VmState) -> Vec<ServerRecord> {
    let mut records = Vec::new();
    let server = record(Origin::Adopted, VmState::Active);
    let (server, _) = rescued(&server, &created_xml(false), rescue_args());
    let rescue = server.rescue;
    for origin in Origin::ALL {
        for rescue in [None, rescue.clone()] {
            let mut server = record(*origin, state);
            server.owner = Owner {
                project_id: "p".to_owned(),
                user_id: "u".to_owned(),
            };
            server.rescue = rescue;
            records.push(server.clone());
            server.power.state = PowerState::Paused;
            records.push(server.clone());
            for under_way in Verb::ALL {
                server.give_lane(Some((Uuid::from_u128(9), *under_way)));
                server.task_state = under_way.task_state();
                records.push(server.clone());
            }
        }
    }
    records
}

fn may_ask(row: &Row, who: &Who) -> bool {
    who.role == Role::Admin || (who.project == "p" && !row.for_admin)
}

fn holds(lock: Option<&Lock>) -> Option<LockOwner> {
    let lock = lock?;
    (lock.expires_at_ms != Some(NOW)).then_some(lock.by)
}

/// The rule, said differently than the code says it.
fn expected(row: &Row, server: &ServerRecord, who: &Who) -> Result<(), Reason> {
    let rescued = server.rescue.is_some();
    if !may_ask(row, who) {
        return Err(Reason::PermissionDenied);
    }
    if who.role == Role::Member {
        match (row.verb, holds(server.lock.as_ref())) {
            (Verb::Unlock, Some(LockOwner::Admin)) => return Err(Reason::PermissionDenied),
            (_, Some(_)) if row.locked_out => return Err(Reason::ServerLocked),
            _ => {}
        }
    }
    if let Some(under_way) = server.operation_verb
        && !row.beside
        && !row.overtakes.contains(&under_way)
    {
        return Err(Reason::ServerBusy);
    }
    if row.verb == Verb::Release && server.origin == Origin::Created {
        return Err(Reason::NotAdopted);
    }
    let yes = match row.allowed(server.vm_state) {
        Allowed::Yes => true,
        Allowed::No => false,
        Allowed::IfRescued => rescued,
        Allowed::UnlessRescued => !rescued,
        Allowed::IfPaused => server.power.state == PowerState::Paused,
    };
    match row.verb {
        _ if yes => Ok(()),
        Verb::Rescue if rescued => Err(Reason::AlreadyRescued),
        Verb::Unrescue if !rescued => Err(Reason::NotRescued),
        _ => Err(Reason::InvalidState),
    }
}

#[test]
fn admission_follows_the_table_for_every_state_operation_rescue_origin_lock_and_caller() {
    let (mut cases, rows, askers) = (0, rows(), askers());
    for state in VmState::ALL {
        for mut server in records(*state) {
            for lock in locks() {
                server.lock = lock;
                for (row, who) in rows
                    .iter()
                    .flat_map(|row| askers.iter().map(move |who| (row, who)))
                {
                    let answer =
                        admit(row.verb, &server, who, NOW).map_err(|refusal| refusal.reason);
                    assert_eq!(
                        answer,
                        expected(row, &server, who),
                        "{} in {state}, {:?}, {}, {:?}, {who:?}",
                        row.verb,
                        server.operation_verb,
                        server.origin,
                        server.lock
                    );
                    cases += 1;
                }
            }
        }
    }
    let records = Origin::ALL.len() * 2 * (2 + Verb::ALL.len());
    let callers = locks().len() * askers.len();
    assert_eq!(
        cases,
        Verb::ALL.len() * VmState::ALL.len() * records * callers
    );
}

#[test]
fn what_makes_a_server_is_asked_for_by_those_of_the_table() {
    for row in rows() {
        for who in askers() {
            let answer = permit(row.verb, None, &who).map_err(|refusal| refusal.reason);
            let may = who.role == Role::Admin || !row.for_admin;
            let expected = if may {
                Ok(())
            } else {
                Err(Reason::PermissionDenied)
            };
            assert_eq!(answer, expected, "{} by {who:?}", row.verb);
        }
    }
}

#[test]
fn an_operation_is_cancelled_by_those_who_may_change_its_server() {
    let mut server = record(Origin::Created, VmState::Active);
    server.owner.project_id = "p".to_owned();
    for lock in locks() {
        server.lock = lock;
        for who in askers() {
            let answer = admit_cancel(&server, &who, NOW).map_err(|refusal| refusal.reason);
            let expected = match (who.role, who.project.as_str()) {
                (Role::Admin, _) => Ok(()),
                (Role::Member, "p") if holds(server.lock.as_ref()).is_some() => {
                    Err(Reason::ServerLocked)
                }
                (Role::Member, "p") => Ok(()),
                (Role::Member, _) => Err(Reason::PermissionDenied),
            };
            assert_eq!(answer, expected, "{who:?}, {:?}", server.lock);
        }
    }
}

/// Only what was never built has nothing else to come back to.
#[test]
fn a_refusal_never_advises_to_delete_what_something_else_brings_back() {
    for state in VmState::ALL {
        for server in records(*state) {
            for verb in Verb::ALL {
                let Err(refusal) = admit(*verb, &server, &Who::default(), NOW) else {
                    continue;
                };
                let says = |words: &str| refusal.message.contains(words);
                let deletes = says("delete it") || says("delete the server");
                let may = *state == VmState::Building
                    || (*verb == Verb::Release && server.origin == Origin::Created);
                assert!(may || !deletes, "{refusal}");
                if *state == VmState::Error && refusal.reason == Reason::InvalidState {
                    let rescued = server.rescue.is_some();
                    let helps = match *verb {
                        Verb::Restore | Verb::Unpause | Verb::Create | Verb::Adopt => continue,
                        _ if rescued => "unrescue it",
                        _ => "reboot it hard",
                    };
                    assert!(says(helps), "{refusal}");
                }
            }
        }
    }
}

#[test]
fn a_refusal_for_a_lock_says_who_locked_it_and_why() {
    let mut server = record(Origin::Created, VmState::Active);
    server.owner.project_id = "p".to_owned();
    let who = askers().remove(3);
    for lock in locks().into_iter().flatten() {
        if holds(Some(&lock)).is_none() {
            continue;
        }
        let by = match lock.by {
            LockOwner::Owner => "by its owner",
            LockOwner::Admin => "by an administrator",
        };
        server.lock = Some(lock);
        let text = admit(Verb::Stop, &server, &who, NOW).unwrap_err().message;
        assert!(text.contains(by) && text.contains("(audit)"), "{text}");
    }
}
