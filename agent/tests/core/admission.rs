// SPDX-License-Identifier: Apache-2.0
//! The admission table against the same table, written down a second time.

use salvor_agent::core::{
    action::Verb,
    admission::{Allowed, admit, allowed},
    reason::Reason,
    record::{Origin, ServerRecord},
    state::{TaskState, VmState},
};
use uuid::Uuid;

use crate::bench::{created_xml, record, rescue_args, rescued};

/// Nova's states for each verb (`check_instance_state` in `nova/compute/api.py`), and ours:
/// `yes`, `no`, `if` a rescue is in force, `unless` one is. `*` marks what Nova does not do so:
/// it has no adopted servers and nothing to release; it rescues a half-rescued server in ERROR again
/// and loses its way back, and cannot unrescue it; it stops a half-rescued one and calls it stopped.
const TABLE: &str = "
    vm_state          delete  release  start  stop     rescue   unrescue  deliverPassword
    building          yes     no       no     no       no       no        no
    active            yes     yes*     no     yes      unless*  no        no
    paused            yes     yes*     no     no       no       no        no
    suspended         yes     yes*     no     no       no       no        no
    stopped           yes     yes*     yes    no       unless*  no        no
    rescued           yes     no       no     no       no       yes       yes*
    resized           yes     no       no     no       no       no        no
    soft-delete       yes     no       no     no       no       no        no
    deleted           no      no       no     no       no       no        no
    error             yes     unless*  no     unless*  unless*  if*       no
    shelved           yes     no       no     no       no       no        no
    shelved_offloaded yes     no       no     no       no       no        no
";

/// What the table says of every verb in every state.
fn table() -> Vec<(Verb, VmState, Allowed)> {
    let mut lines = TABLE.lines().map(str::trim).filter(|line| !line.is_empty());
    let verbs: Vec<Verb> = lines
        .next()
        .unwrap()
        .split_whitespace()
        .skip(1)
        .map(|name| Verb::from_name(name).unwrap())
        .collect();
    let mut table = Vec::new();
    for line in lines {
        let mut words = line.split_whitespace();
        let state = VmState::from_name(words.next().unwrap()).unwrap();
        for (verb, word) in verbs.iter().zip(words) {
            let allowed = match word.trim_end_matches('*') {
                "yes" => Allowed::Yes,
                "no" => Allowed::No,
                "if" => Allowed::IfRescued,
                "unless" => Allowed::UnlessRescued,
                other => panic!("{other}"),
            };
            table.push((*verb, state, allowed));
        }
        // These make a server.
        table.push((Verb::Create, state, Allowed::No));
        table.push((Verb::Adopt, state, Allowed::No));
    }
    table
}

#[test]
fn every_verb_is_allowed_in_the_states_of_the_table_and_in_no_other() {
    let table = table();
    assert_eq!(table.len(), Verb::ALL.len() * VmState::ALL.len());
    for (verb, state, expected) in table {
        assert_eq!(allowed(verb, state), expected, "{verb} in {state}");
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
            server.operation = Some(Uuid::from_u128(9));
            records.push(server.clone());
            for task in TaskState::ALL {
                server.task_state = Some(*task);
                records.push(server.clone());
            }
        }
    }
    records
}

/// The rule, said differently than the code says it.
fn expected(verb: Verb, server: &ServerRecord, allowed: Allowed) -> Result<(), Reason> {
    let rescued = server.rescue.is_some();
    if server.operation.is_some() {
        let overtakes = match verb {
            Verb::Delete => server.task_state != Some(TaskState::Deleting),
            Verb::DeliverPassword => false,
            _ => server.task_state == Some(TaskState::UpdatingPassword),
        };
        if !overtakes {
            return Err(Reason::ServerBusy);
        }
    }
    if verb == Verb::Release && server.origin == Origin::Created {
        return Err(Reason::NotAdopted);
    }
    let yes = match allowed {
        Allowed::Yes => true,
        Allowed::No => false,
        Allowed::IfRescued => rescued,
        Allowed::UnlessRescued => !rescued,
    };
    match verb {
        _ if yes => Ok(()),
        Verb::Rescue if rescued => Err(Reason::AlreadyRescued),
        Verb::Unrescue if !rescued => Err(Reason::NotRescued),
        _ => Err(Reason::InvalidState),
    }
}

#[test]
fn admission_follows_the_table_for_every_state_task_rescue_and_origin() {
    let mut cases = 0;
    let by_state: Vec<_> = VmState::ALL.iter().map(|state| records(*state)).collect();
    for (verb, state, allowed) in table() {
        let index = VmState::ALL
            .iter()
            .position(|other| *other == state)
            .unwrap();
        for server in by_state[index].clone() {
            let answer = admit(verb, &server).map_err(|refusal| refusal.reason);
            let expected = expected(verb, &server, allowed);
            let task = server.task_state;
            assert_eq!(
                answer, expected,
                "{verb} in {state}, {task:?}, {}",
                server.origin
            );
            cases += 1;
        }
    }
    let records = Origin::ALL.len() * 2 * (2 + TaskState::ALL.len());
    assert_eq!(cases, Verb::ALL.len() * VmState::ALL.len() * records);
}

#[test]
fn every_refusal_says_what_is_in_the_way_and_what_would_help() {
    for (verb, state, _) in table() {
        for server in records(state) {
            let Err(refusal) = admit(verb, &server) else {
                continue;
            };
            let message = &refusal.message;
            assert!(message.contains(&server.id.to_string()), "{message}");
            match refusal.reason {
                Reason::ServerBusy => {
                    assert!(message.contains("operations/"), "{message}");
                    assert!(message.contains("wait for it or cancel it"), "{message}");
                }
                Reason::InvalidState => {
                    let subject = ("vm_state".to_owned(), state.name().to_owned());
                    assert_eq!(refusal.subject, Some(subject));
                    assert!(message.contains(state.name()), "{message}");
                    let (_, advice) = message.split_once(": ").unwrap();
                    assert!(advice.len() > 10, "{message}");
                }
                Reason::AlreadyRescued => assert!(message.contains("unrescue it first")),
                Reason::NotRescued => assert!(message.contains(state.name()), "{message}"),
                Reason::NotAdopted => assert!(message.contains("delete it"), "{message}"),
                other => panic!("{other}"),
            }
        }
    }
}
