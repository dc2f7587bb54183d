// SPDX-License-Identifier: Apache-2.0
//! The admission table against the same table, written down a second time.

use salvor_agent::core::{
    action::Verb,
    admission::{Allowed, admit, allowed},
    reason::Reason,
    record::{Origin, ServerRecord},
    state::VmState,
};
use uuid::Uuid;

use crate::bench::{created_xml, record, rescue_args, rescued};

/// Nova's states for each verb (`check_instance_state` in `nova/compute/api.py`), and ours: the states in which
/// it is admitted, `if:` or `unless:` a rescue is in force, and after `|` what it overtakes. `*` marks what
/// Nova does not do so: it has no adopted servers and nothing to release; it rescues a half-rescued server in
/// ERROR again and loses its way back, and cannot unrescue it; it stops a half-rescued one and calls it stopped.
/// Nova's delete does not cancel what is under way, but races with it. It knows no drift, and starts no rescue
/// guest after a reboot of its host.
const TABLE: &str = "
    delete: building active paused suspended stopped rescued resized soft-delete error shelved shelved_offloaded
        | all-but* delete
    release: active* paused* suspended* stopped* unless:error* | deliverPassword*
    start: stopped | deliverPassword*
    stop: active unless:error* | deliverPassword*
    rescue: unless:active* unless:stopped* unless:error* | deliverPassword*
    unrescue: rescued if:error* | deliverPassword*
    deliverPassword: rescued* |
    acceptDrift: active* paused* suspended* stopped* | deliverPassword*
    restoreDefinition: active* paused* suspended* stopped* | deliverPassword*
    startRescue: rescued* |
    create: | deliverPassword*
    adopt: | deliverPassword*
";

/// What the table says of a verb.
struct Row {
    verb: Verb,
    states: Vec<(VmState, Allowed)>,
    overtakes: Vec<Verb>,
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
    let (states, overtakes) = rest.split_once('|').unwrap();
    let states = states.split_whitespace().map(|state| {
        let (allowed, state) = match word(state).split_once(':') {
            None => (Allowed::Yes, word(state)),
            Some(("if", state)) => (Allowed::IfRescued, state),
            Some(("unless", state)) => (Allowed::UnlessRescued, state),
            Some(other) => panic!("{other:?}"),
        };
        (VmState::from_name(state).unwrap(), allowed)
    });
    let mut named: Vec<&str> = overtakes.split_whitespace().map(word).collect();
    let all_but = named.first() == Some(&"all-but");
    if all_but {
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
    }
}

/// Every record that admission can tell from another.
fn records(state: VmState) -> Vec<ServerRecord> {
    let mut records = Vec::new();
    let server = record(Origin::Adopted, VmState::Active);
    let (server, _) = rescued(&server, &created_xml(false), rescue_args());
    let rescue = server.rescue;
    for origin in Origin::ALL {
        for rescue in [None, rescue.clone()] {
            let mut server = record(*origin, state);
            server.rescue = rescue;
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

/// The rule, said differently than the code says it.
fn expected(row: &Row, server: &ServerRecord) -> Result<(), Reason> {
    let rescued = server.rescue.is_some();
    if let Some(under_way) = server.operation_verb
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
    };
    match row.verb {
        _ if yes => Ok(()),
        Verb::Rescue if rescued => Err(Reason::AlreadyRescued),
        Verb::Unrescue if !rescued => Err(Reason::NotRescued),
        _ => Err(Reason::InvalidState),
    }
}

#[test]
fn admission_follows_the_table_for_every_state_operation_rescue_and_origin() {
    let mut cases = 0;
    let by_state: Vec<_> = VmState::ALL.iter().map(|state| records(*state)).collect();
    for row in rows() {
        for server in by_state.iter().flatten() {
            let answer = admit(row.verb, server).map_err(|refusal| refusal.reason);
            assert_eq!(
                answer,
                expected(&row, server),
                "{} in {}, {:?}, {}",
                row.verb,
                server.vm_state,
                server.operation_verb,
                server.origin
            );
            cases += 1;
        }
    }
    let records = Origin::ALL.len() * 2 * (1 + Verb::ALL.len());
    assert_eq!(cases, Verb::ALL.len() * VmState::ALL.len() * records);
}
