// SPDX-License-Identifier: Apache-2.0
//! After a reboot of the host: what ran comes back, by the way in that everybody uses.

use std::{num::NonZeroUsize, sync::Arc, time::Duration};

use salvor_agent::{
    core::{
        action::{Action, ChangePasswordArgs, Verb},
        autostart::{Comeback, ComebackState},
        incident::IncidentKind,
        state::{PowerState, VmState},
    },
    dispatch::Target,
    engine::{Event, NoProbe, Point},
    hypervisor::{Boot, Hypervisor as _, HypervisorError},
    observe::{Autostart, Observer},
    store::{Change, Store},
};
use tokio::{sync::watch, task::JoinHandle};
use uuid::Uuid;

use crate::{
    crash::Plot,
    host::{Agent, Host, NEW, ON, SERVER, adopt, hash, rescue_action},
    observe::Watched,
};

const FIRST_BOOT: Uuid = Uuid::from_u128(0xb001);
const SECOND_BOOT: Uuid = Uuid::from_u128(0xb002);

fn how() -> Autostart {
    Autostart {
        parallel: NonZeroUsize::MIN,
        delay: Duration::ZERO,
    }
}

/// The observer of an agent that was started after the reboot.
fn observe(agent: &Agent) -> (watch::Sender<bool>, JoinHandle<()>) {
    let observer = Observer::new(
        agent.store.clone(),
        Arc::new(agent.fake.clone()),
        agent.dispatcher.clone(),
        Duration::from_secs(600),
    )
    .with_autostart(how());
    let (stop, stopped) = watch::channel(false);
    (stop, tokio::spawn(observer.run(stopped)))
}

/// Waits until nothing is waited for any more, and says what became of each.
async fn all_done(store: &Store) -> Vec<Comeback> {
    loop {
        let all = store.comebacks().await.unwrap();
        if all.iter().all(|it| it.state != ComebackState::Waiting) {
            return all;
        }
        tokio::task::yield_now().await;
    }
}

/// A host with servers that run, but for the last.
async fn host_with(servers: u128) -> (Host, Agent, Vec<Uuid>) {
    let host = Host::new();
    let agent = host.agent(Arc::new(NoProbe)).await;
    let xml = host.foreign_domain(false);
    let ids: Vec<Uuid> = (1..=servers).map(Uuid::from_u128).collect();
    for id in &ids {
        let own = xml
            .replace(&SERVER.to_string(), &id.to_string())
            .replace("<name>foreign", &format!("<name>foreign-{id}"));
        host.fake.define(&own).await.unwrap();
        if Some(id) != ids.last() {
            host.fake.start(*id, Boot::Resume).await.unwrap();
        }
        agent.succeed(Target::New(*id), adopt()).await;
    }
    assert_eq!(agent.store.note_boot(FIRST_BOOT, true).await.unwrap(), 0);
    (host, agent, ids)
}

fn starts(host: &Host) -> Vec<String> {
    let calls = host.fake.calls().into_iter();
    calls.filter(|call| call.starts_with("start ")).collect()
}

#[tokio::test]
async fn servers_that_ran_come_back_in_their_order_and_others_do_not() {
    let (host, agent, ids) = host_with(5).await;
    host.fake.host_reboot();
    host.fake.clear_calls();
    // libvirt has started one by itself.
    host.fake.start(ids[1], Boot::Resume).await.unwrap();
    assert_eq!(agent.store.note_boot(SECOND_BOOT, true).await.unwrap(), 4);
    // An agent that was started again in the middle of it has no other reboot.
    assert_eq!(agent.store.note_boot(SECOND_BOOT, true).await.unwrap(), 0);
    let (stop, observer) = observe(&agent);
    let done = all_done(&agent.store).await;
    let became = |state| {
        let of = done.iter().filter(|it| it.state == state);
        of.map(|it| it.server).collect::<Vec<_>>()
    };
    assert_eq!(became(ComebackState::Started), [ids[0], ids[2], ids[3]]);
    assert_eq!(became(ComebackState::LeftAlone), [ids[1]]);
    let expected: Vec<String> = [ids[1], ids[0], ids[2], ids[3]]
        .iter()
        .map(|id| format!("start {id}"))
        .collect();
    assert_eq!(starts(&host), expected);
    let operations = agent.store.operations(Some(ids[0]), i64::MAX, 1).await;
    let last = &operations.unwrap()[0].1;
    assert_eq!((last.verb, last.caller.as_str()), (Verb::Start, "salvord"));
    let stopped = agent.store.server(ids[4]).unwrap();
    assert_eq!(stopped.vm_state, VmState::Stopped);
    stop.send_replace(true);
    observer.await.unwrap();
}

#[tokio::test]
async fn servers_come_back_by_their_number_and_those_without_one_last() {
    use salvor_agent::core::{action::Action::Update, change::FieldChange};
    let (host, agent, ids) = host_with(7).await;
    for (index, change) in [
        (5, FieldChange::AutostartOrder(Some(0))),
        (4, FieldChange::AutostartOrder(Some(7))),
        (1, FieldChange::AutostartOrder(Some(7))),
        (2, FieldChange::AutostartOrder(Some(u32::MAX - 1))),
        (3, FieldChange::Autostart(false)),
    ] {
        let target = Target::Server(ids[index]);
        agent.succeed(target, Update(vec![change])).await;
    }
    host.fake.host_reboot();
    host.fake.clear_calls();
    assert_eq!(agent.store.note_boot(SECOND_BOOT, true).await.unwrap(), 5);
    let (stop, observer) = observe(&agent);
    all_done(&agent.store).await;
    // Of two with the same number the one that was made first.
    let expected = [5, 1, 4, 2, 0].map(|index: usize| format!("start {}", ids[index]));
    assert_eq!(starts(&host), expected);
    stop.send_replace(true);
    observer.await.unwrap();
}

#[tokio::test]
async fn a_server_that_cannot_be_started_is_told_of_and_holds_up_no_other() {
    let (host, agent, _) = host_with(3).await;
    host.fake.host_reboot();
    agent.store.note_boot(SECOND_BOOT, true).await.unwrap();
    let refused = HypervisorError::Refused {
        call: "start",
        message: "no such network".to_owned(),
    };
    host.fake.fail_next("start", refused);
    let (stop, observer) = observe(&agent);
    while agent.store.comebacks().await.unwrap()[1].state != ComebackState::Started {
        tokio::task::yield_now().await;
    }
    let all = agent.store.comebacks().await.unwrap();
    assert_eq!((all[0].state, all[0].tries), (ComebackState::Waiting, 1));
    assert!(all[0].message.contains("no such network"), "{all:?}");
    stop.send_replace(true);
    observer.await.unwrap();
    // The next agent goes on with it.
    let (stop, observer) = observe(&agent);
    let done = all_done(&agent.store).await;
    assert_eq!(done[0].state, ComebackState::Started);
    stop.send_replace(true);
    observer.await.unwrap();
}

#[tokio::test]
async fn without_autostart_and_after_an_unknown_boot_nothing_comes_back() {
    let (host, agent, _) = host_with(2).await;
    host.fake.host_reboot();
    assert_eq!(agent.store.note_boot(SECOND_BOOT, false).await.unwrap(), 0);
    assert_eq!(agent.store.comebacks().await.unwrap(), []);
}

/// A server after a reboot of its host, with the agent that then observes it.
async fn rebooted(watched: &Watched) -> watch::Sender<bool> {
    let store = &watched.agent.store;
    store.note_boot(FIRST_BOOT, true).await.unwrap();
    watched.stop().await;
    watched.host.fake.host_reboot();
    assert_eq!(store.note_boot(SECOND_BOOT, true).await.unwrap(), 1);
    observe(&watched.agent).0
}

#[tokio::test]
async fn a_paused_server_is_started_and_its_lost_memory_is_told() {
    let watched = Watched::new().await;
    watched
        .host
        .fake
        .set_power(SERVER, PowerState::Paused, "user");
    watched.becomes(VmState::Paused).await;
    let _stop = rebooted(&watched).await;
    let agent = &watched.agent;
    let done = all_done(&agent.store).await;
    assert_eq!(done[0].state, ComebackState::Started);
    assert!(done[0].message.contains("memory was lost"), "{done:?}");
    assert_eq!(agent.record().vm_state, VmState::Active);
    loop {
        let events = agent.store.events_after(0, 1_000).await.unwrap().events;
        if events.iter().any(|event| {
            matches!(&event.change, Change::Guest(report) if report.incident.kind == IncidentKind::MemoryLost)
        }) {
            break;
        }
        tokio::task::yield_now().await;
    }
}

/// The power goes in the middle of an action, and the next agent takes that up.
async fn cut_off(action: Action) -> (Agent, Comeback, watch::Sender<bool>) {
    let host = Host::new();
    host.fake.define(&host.foreign_domain(false)).await.unwrap();
    host.fake.start(SERVER, Boot::Resume).await.unwrap();
    host.fake.guest_agent(SERVER, true);
    let adopted = host.agent(Arc::new(NoProbe)).await;
    adopted.succeed(NEW, adopt()).await;
    adopted.store.note_boot(FIRST_BOOT, true).await.unwrap();
    drop(adopted);
    let verb = action.verb();
    let dying = host
        .agent(Plot::new(&[(Point::BeforeStep(0), Event::Die)]))
        .await;
    dying.submit(ON, action).await.unwrap();
    assert_eq!(dying.record().operation_verb, Some(verb));
    drop(dying);
    host.fake.host_reboot();
    let store = Store::open(&host.database(), 1_000).unwrap();
    assert_eq!(
        store.note_boot(SECOND_BOOT, true).await.unwrap(),
        1,
        "{verb}"
    );
    drop(store);
    let agent = host.agent(Arc::new(NoProbe)).await;
    let (stop, _) = observe(&agent);
    let done = all_done(&agent.store).await.remove(0);
    (agent, done, stop)
}

#[tokio::test]
async fn a_server_comes_back_although_something_else_was_under_way() {
    let password = Action::ChangePassword(ChangePasswordArgs {
        user: None,
        password: hash(),
    });
    for action in [
        Action::Pause,
        Action::Suspend,
        Action::CrashDump,
        Action::DumpMemory,
        password,
        Action::AcceptDrift,
        Action::RestoreDefinition,
        Action::HardReboot,
    ] {
        let (agent, done, stop) = cut_off(action.clone()).await;
        let record = agent.record();
        assert_eq!(
            (record.vm_state, record.power.state),
            (VmState::Active, PowerState::Running),
            "{action:?}: {done:?}"
        );
        stop.send_replace(true);
    }
}

#[tokio::test]
async fn a_rescue_guest_comes_back_as_a_rescue() {
    let watched = Watched::new().await;
    watched.agent.succeed(ON, rescue_action()).await;
    watched.sees(PowerState::Running).await;
    let _stop = rebooted(&watched).await;
    let agent = &watched.agent;
    let done = all_done(&agent.store).await;
    assert_eq!(done[0].state, ComebackState::Started, "{done:?}");
    assert_eq!(agent.record().vm_state, VmState::Rescued);
    let power = agent.fake.power(SERVER).await.unwrap().unwrap();
    assert_eq!(power.power, PowerState::Running);
    let operations = agent.store.operations(Some(SERVER), i64::MAX, 1).await;
    assert_eq!(operations.unwrap()[0].1.verb, Verb::StartRescue);
}
