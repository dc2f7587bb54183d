// SPDX-License-Identifier: Apache-2.0
//! The observer: what is seen of guests, and what falls due.

use std::{sync::Arc, time::Duration};

use salvor_agent::{
    core::{
        action::{Action, RescueArgs, Verb},
        reason::Reason,
        reconcile::Policy,
        record::{OverlayDisposition, PASSWORD_OFFERS, PasswordDelivery, Protection},
        state::{ObservationSource, PowerState, VmState},
    },
    dispatch::{Settings, Target},
    engine::NoProbe,
    hypervisor::{
        Boot, Definition, Hypervisor as _, HypervisorError, LinkState, fake::FakeHypervisor,
    },
    observe::Observer,
};
use tokio::{sync::watch, task::JoinHandle};
use uuid::Uuid;

use crate::{
    gate::{stays, until},
    host::{Agent, Host, NEW, ON, SERVER, adopt, rescue, rescue_action},
};

/// A host with an adopted server that runs, an agent, and its observer.
pub(crate) struct Watched {
    pub(crate) host: Host,
    pub(crate) agent: Agent,
    stop: watch::Sender<bool>,
    observer: JoinHandle<()>,
}

/// An observer for an agent, and what ends it.
pub(crate) fn observe(agent: &Agent) -> (watch::Sender<bool>, JoinHandle<()>) {
    observe_under(agent, Policy::default())
}

fn observe_under(agent: &Agent, policy: Policy) -> (watch::Sender<bool>, JoinHandle<()>) {
    // Events have to do: the interval is far longer than any test.
    let observer = Observer::new(
        agent.store.clone(),
        Arc::new(agent.fake.clone()),
        agent.dispatcher.clone(),
        Duration::from_secs(600),
    )
    .with_policy(policy);
    let (stop, stopped) = watch::channel(false);
    (stop, tokio::spawn(observer.run(stopped)))
}

impl Watched {
    pub(crate) async fn new() -> Self {
        Self::with(|_| {}).await
    }

    /// With other settings.
    pub(crate) async fn with(change: impl FnOnce(&mut Settings)) -> Self {
        Self::made(change, Policy::default()).await
    }

    /// With a policy.
    pub(crate) async fn under(policy: Policy) -> Self {
        Self::made(|_| {}, policy).await
    }

    async fn made(change: impl FnOnce(&mut Settings), policy: Policy) -> Self {
        let host = Host::new();
        let mut settings = host.settings();
        change(&mut settings);
        let agent = Agent::start(&host, settings, Arc::new(NoProbe)).await;
        host.add_images(&agent.store).await;
        host.define(&host.foreign_domain(false)).await;
        host.fake.start(SERVER, Boot::Resume).await.unwrap();
        agent.succeed(NEW, adopt()).await;
        let (stop, observer) = observe_under(&agent, policy);
        let watched = Self {
            host,
            agent,
            stop,
            observer,
        };
        // Its first look is over: a change is seen by an event from now on.
        watched
            .host
            .fake
            .set_power(SERVER, PowerState::Paused, "user");
        watched.sees(PowerState::Paused).await;
        watched
            .host
            .fake
            .set_power(SERVER, PowerState::Running, "unpaused");
        watched.sees(PowerState::Running).await;
        watched
    }

    pub(crate) async fn sees(&self, power: PowerState) {
        let seen = || self.agent.record().power.state == power;
        until(&format!("{power} is seen"), seen).await;
    }

    pub(crate) async fn becomes(&self, vm_state: VmState) {
        let is_so = || self.agent.record().vm_state == vm_state;
        until(&format!("the server is {vm_state}"), is_so).await;
    }

    async fn rescue(&self, change: impl FnOnce(&mut RescueArgs)) {
        let mut args = rescue();
        change(&mut args);
        self.agent.succeed(ON, Action::Rescue(Box::new(args))).await;
    }

    pub(crate) async fn operations(&self, verb: Verb) -> usize {
        let all = self
            .agent
            .store
            .operations(Some(SERVER), i64::MAX, 10_000)
            .await
            .unwrap();
        all.iter()
            .filter(|(_, operation)| operation.verb == verb)
            .count()
    }

    /// Ends the observer; its agent goes on.
    pub(crate) async fn stop(&self) {
        self.stop.send_replace(true);
        until("the observer has ended", || self.observer.is_finished()).await;
    }

    pub(crate) async fn end(self) {
        self.stop.send_replace(true);
        tokio::time::timeout(Duration::from_secs(10), self.observer)
            .await
            .unwrap()
            .unwrap();
    }
}

#[tokio::test]
async fn a_domain_that_was_renamed_has_its_new_name_in_the_record_after_the_next_look() {
    let watched = Watched::new().await;
    watched.host.fake.guest_powers_off(SERVER);
    watched.host.fake.rename(SERVER, "renamed").unwrap();
    watched.host.fake.set_link(down());
    watched.host.fake.set_link(LinkState::Up);
    let named = || watched.agent.record().domain_name == "renamed";
    until("the new name is seen", named).await;
    assert_eq!(watched.agent.record().name, "foreign");
    watched.end().await;
}

fn down() -> LinkState {
    LinkState::Down {
        reason: "Connection reset by peer".to_owned(),
    }
}

#[tokio::test]
async fn an_outage_is_unknown_and_never_off() {
    let watched = Watched::new().await;
    let agent = &watched.agent;
    let first = *agent.store.revision().borrow();
    watched.host.fake.set_link(down());
    watched.sees(PowerState::Unknown).await;
    let record = agent.record();
    assert_eq!(record.vm_state, VmState::Active);
    assert_eq!(record.power.source, ObservationSource::Inferred);
    assert!(record.power.reason.contains("reset by peer"));
    let known = record.last_known_power.clone().unwrap();
    assert_eq!(known.state, PowerState::Running);
    assert!(known.observed_at_ms <= record.power.observed_at_ms);

    watched.host.fake.set_link(LinkState::Up);
    watched.sees(PowerState::Running).await;
    let record = agent.record();
    assert_eq!(
        (record.vm_state, &record.last_known_power),
        (VmState::Active, &None)
    );
    let events = agent.store.events_after(first, 1_000).await.unwrap().events;
    for event in events {
        if let salvor_agent::store::Change::Server(record) = event.change {
            assert!(record.power.state != PowerState::Shutdown, "{record:?}");
            assert!(record.power.state != PowerState::NoState, "{record:?}");
        }
    }
    watched.end().await;
}

#[tokio::test]
async fn what_happened_during_an_outage_is_seen_after_it() {
    let watched = Watched::new().await;
    watched.host.fake.set_link(down());
    watched.sees(PowerState::Unknown).await;
    watched.host.fake.crash_guest(SERVER);
    stays("unknown", || {
        watched.agent.record().power.state == PowerState::Unknown
    })
    .await;
    watched.host.fake.set_link(LinkState::Up);
    watched.sees(PowerState::Shutdown).await;
    watched.becomes(VmState::Stopped).await;
    assert_eq!(watched.agent.record().power.reason, "crashed");
    watched.end().await;
}

#[tokio::test]
async fn a_guest_that_powers_off_is_stopped_and_one_that_somebody_starts_is_active() {
    let watched = Watched::new().await;
    watched.host.fake.guest_powers_off(SERVER);
    watched.becomes(VmState::Stopped).await;
    assert_eq!(watched.agent.record().power.state, PowerState::Shutdown);
    assert_eq!(
        watched.agent.record().power.source,
        ObservationSource::Event
    );
    watched.host.fake.start(SERVER, Boot::Resume).await.unwrap();
    watched.becomes(VmState::Active).await;
    stays("it is left alone", || {
        watched.agent.record().vm_state == VmState::Active
    })
    .await;
    watched.host.fake.guest_powers_off(SERVER);
    watched.becomes(VmState::Stopped).await;
    watched.agent.succeed(ON, Action::Start).await;
    watched.end().await;
}

#[tokio::test]
async fn a_rescue_guest_that_powers_off_is_still_a_rescue() {
    let watched = Watched::new().await;
    watched.rescue(|_| {}).await;
    watched.sees(PowerState::Running).await;
    watched.host.fake.guest_powers_off(SERVER);
    watched.sees(PowerState::Shutdown).await;
    assert_eq!(watched.agent.record().vm_state, VmState::Rescued);
    watched
        .agent
        .succeed(ON, Action::Unrescue(crate::host::unrescue()))
        .await;
    watched.becomes(VmState::Active).await;
    watched.end().await;
}

#[tokio::test]
async fn a_domain_that_somebody_removed_has_no_state_and_can_be_deleted() {
    let watched = Watched::new().await;
    watched.host.fake.destroy(SERVER).await.unwrap();
    watched.becomes(VmState::Stopped).await;
    watched.host.fake.undefine(SERVER).await.unwrap();
    watched.sees(PowerState::NoState).await;
    watched.agent.succeed(ON, Action::Delete).await;
    watched.end().await;
}

#[tokio::test]
async fn a_rescue_whose_time_is_over_ends_by_itself() {
    let watched = Watched::new().await;
    let before = watched.host.look(&watched.agent).await;
    watched
        .rescue(|args| {
            args.protection = Protection::Overlay;
            args.timeout_ms = Some(50);
            args.timeout_overlay = Some(OverlayDisposition::Discard);
        })
        .await;
    watched.becomes(VmState::Active).await;
    until("it has cleaned up", || {
        watched.agent.record().operation.is_none()
    })
    .await;
    let after = watched.host.look(&watched.agent).await;
    assert_eq!(after.inactive, before.inactive);
    assert_eq!(after.files, before.files);
    assert_eq!(watched.operations(Verb::Unrescue).await, 1);
    watched.end().await;
}

#[tokio::test]
async fn a_rescue_that_ends_by_itself_leaves_off_what_was_off() {
    let watched = Watched::new().await;
    watched.host.fake.guest_powers_off(SERVER);
    watched.becomes(VmState::Stopped).await;
    watched
        .rescue(|args| {
            args.protection = Protection::Overlay;
            args.timeout_ms = Some(50);
            args.timeout_overlay = Some(OverlayDisposition::Discard);
        })
        .await;
    watched.becomes(VmState::Stopped).await;
    until("it has cleaned up", || {
        watched.agent.record().operation.is_none()
    })
    .await;
    let seen = watched.host.look(&watched.agent).await;
    assert_eq!(seen.power, Some(PowerState::Shutdown));
    assert_eq!(watched.operations(Verb::Unrescue).await, 1);
    watched.end().await;
}

#[tokio::test]
async fn an_unrescue_that_fails_by_itself_is_not_repeated_at_once() {
    let watched = Watched::new().await;
    watched.rescue(|args| args.timeout_ms = Some(200)).await;
    for _ in 0..1_000 {
        let no = HypervisorError::Refused {
            call: "virDomainDefineXML",
            message: "no".to_owned(),
        };
        watched.host.fake.fail_next("define", no);
    }
    let tries = || {
        let calls = watched.host.fake.calls();
        calls
            .iter()
            .filter(|call| call.starts_with("define"))
            .count()
    };
    let before = tries();
    until("it was tried", || tries() > before).await;
    stays("it was tried once", || tries() == before + 1).await;
    assert_eq!(watched.operations(Verb::Unrescue).await, 1);
    assert_eq!(watched.agent.record().vm_state, VmState::Rescued);
    assert_eq!(watched.agent.record().power.state, PowerState::Running);
    watched.end().await;
}

#[tokio::test]
async fn the_password_is_handed_over_when_the_guest_agent_answers() {
    let watched = Watched::new().await;
    watched.rescue(|_| {}).await;
    let waits = || {
        watched
            .agent
            .record()
            .rescue
            .clone()
            .unwrap()
            .password_for_agent
            .is_some()
    };
    assert!(waits());
    watched.host.fake.guest_agent(SERVER, true);
    until("the password is delivered", || !waits()).await;
    let passwords = watched.host.fake.passwords(SERVER);
    assert_eq!(passwords, [("root".to_owned(), crate::host::hash())]);
    let rescue = watched.agent.record().rescue.clone().unwrap();
    let ways = [PasswordDelivery::ConfigDrive, PasswordDelivery::GuestAgent];
    assert_eq!(rescue.password_delivered, ways);
    watched.end().await;
}

#[tokio::test]
async fn a_guest_agent_that_was_there_before_the_rescue_stood_gets_the_password_too() {
    let watched = Watched::new().await;
    watched.host.fake.guest_agent(SERVER, true);
    watched.agent.submit(ON, rescue_action()).await.unwrap();
    let delivered = || !watched.host.fake.passwords(SERVER).is_empty();
    until("the password is delivered", delivered).await;
    watched.end().await;
}

fn no_user() -> HypervisorError {
    HypervisorError::GuestAgentRefused {
        reason: "no such user".to_owned(),
    }
}

#[tokio::test]
async fn a_guest_agent_that_keeps_refusing_the_password_is_given_up_and_the_operations_say_why() {
    let watched = Watched::new().await;
    for _ in 0..1_000 {
        watched.host.fake.fail_next("set_user_password", no_user());
    }
    watched.rescue(|_| {}).await;
    let rescue = || watched.agent.record().rescue.clone().unwrap();
    for refusals in 1..=PASSWORD_OFFERS {
        assert!(rescue().password_for_agent.is_some());
        // It is offered at once to one that has just come.
        watched.host.fake.guest_agent(SERVER, true);
        until("it was refused", || rescue().password_refusals == refusals).await;
        watched.host.fake.guest_agent(SERVER, false);
    }
    assert_eq!(rescue().password_for_agent, None);
    assert_eq!(rescue().password_delivered, [PasswordDelivery::ConfigDrive]);
    watched.host.fake.guest_agent(SERVER, true);
    let offers = || {
        let calls = watched.host.fake.calls();
        let offers = calls
            .iter()
            .filter(|call| call.starts_with("set_user_password"));
        u32::try_from(offers.count()).unwrap()
    };
    stays("it is not offered again", || offers() == PASSWORD_OFFERS).await;
    let operations = watched.agent.store.operations(None, i64::MAX, 100).await;
    let last = operations.unwrap().remove(0).1;
    assert_eq!(last.verb, Verb::DeliverPassword);
    assert_eq!(last.error.unwrap().reason, Reason::GuestAgentRefused);
    watched.end().await;
}

#[tokio::test]
async fn a_password_that_the_guest_agent_refuses_is_not_offered_again_at_once() {
    let watched = Watched::new().await;
    for _ in 0..1_000 {
        watched.host.fake.fail_next("set_user_password", no_user());
    }
    watched.rescue(|_| {}).await;
    watched.host.fake.guest_agent(SERVER, true);
    let offers = || {
        let calls = watched.host.fake.calls();
        calls
            .iter()
            .filter(|call| call.starts_with("set_user_password"))
            .count()
    };
    until("it was offered", || offers() > 0).await;
    stays("it was offered once", || offers() == 1).await;
    assert_eq!(watched.operations(Verb::DeliverPassword).await, 1);
    // Another agent may take it.
    watched.host.fake.guest_agent(SERVER, false);
    watched.host.fake.guest_agent(SERVER, true);
    until("it was offered again", || offers() == 2).await;
    assert_eq!(watched.agent.record().vm_state, VmState::Rescued);
    watched.end().await;
}

#[tokio::test]
async fn a_question_that_hangs_holds_up_nothing_else() {
    let watched = Watched::new().await;
    let fake = &watched.host.fake;
    watched.rescue(|_| {}).await;
    watched.sees(PowerState::Running).await;
    fake.hang(Some("ping_guest_agent"));
    fake.guest_agent(SERVER, true);
    fake.set_power(SERVER, PowerState::Paused, "user");
    watched.sees(PowerState::Paused).await;
    fake.hang(Some("power"));
    fake.set_power(SERVER, PowerState::Running, "unpaused");
    fake.set_link(down());
    watched.sees(PowerState::Unknown).await;
    // What hung was asked before all that, and tells nothing new when it comes back.
    fake.set_link(LinkState::Up);
    fake.hang(None);
    watched.sees(PowerState::Running).await;
    watched.end().await;
}

#[tokio::test]
async fn a_list_of_all_domains_that_hangs_holds_up_no_news_of_one() {
    let watched = Watched::new().await;
    let fake = &watched.host.fake;
    fake.hang(Some("domains"));
    fake.set_link(down());
    watched.sees(PowerState::Unknown).await;
    // Everything is to be looked at.
    fake.set_link(LinkState::Up);
    fake.set_power(SERVER, PowerState::Paused, "user");
    watched.sees(PowerState::Paused).await;
    fake.hang(None);
    fake.set_power(SERVER, PowerState::Running, "unpaused");
    watched.sees(PowerState::Running).await;
    watched.end().await;
}

#[tokio::test]
async fn a_due_action_that_hangs_holds_up_no_news() {
    let watched = Watched::new().await;
    let fake = &watched.host.fake;
    watched.rescue(|args| args.timeout_ms = Some(300)).await;
    // What the unrescue begins with.
    fake.hang(Some("domain"));
    until("it hangs", || fake.hanging() > 0).await;
    fake.set_power(SERVER, PowerState::Paused, "user");
    watched.sees(PowerState::Paused).await;
    assert_eq!(watched.agent.record().vm_state, VmState::Rescued);
    fake.hang(None);
    watched.becomes(VmState::Active).await;
    watched.end().await;
}

/// Attaches an interface to the definition, as `virsh attach-interface --config` does, and says what it
/// has then.
async fn attach(fake: &FakeHypervisor, mac: &str) -> Vec<String> {
    let xml = fake.domain_xml(SERVER, Definition::Inactive).await.unwrap();
    let nic = format!("<interface type='user'><mac address='{mac}'/></interface>");
    let changed = xml.replace("<channel", &format!("{nic}<channel"));
    fake.define(&changed).await.unwrap();
    let parsed = salvor_domain_templates::Domain::parse(&changed).unwrap();
    parsed
        .interfaces()
        .into_iter()
        .map(|nic| nic.mac.unwrap())
        .collect()
}

fn shown(agent: &Agent) -> Vec<String> {
    let record = agent.record();
    record.nics.iter().map(|nic| nic.mac.clone()).collect()
}

#[tokio::test]
async fn a_record_shows_the_devices_that_the_definition_has_now() {
    let watched = Watched::new().await;
    let (agent, fake) = (&watched.agent, &watched.host.fake);
    let macs = attach(fake, "52:54:00:00:00:02").await;
    assert_eq!(macs.len(), 2);
    until("the interface is shown", || shown(agent) == macs).await;
    // Nothing new is no change.
    let revision = *agent.store.revision().borrow();
    let xml = fake.domain_xml(SERVER, Definition::Inactive).await.unwrap();
    fake.define(&xml).await.unwrap();
    stays("it is not written again", || {
        *agent.store.revision().borrow() == revision
    })
    .await;
    watched.end().await;
}

#[tokio::test]
async fn what_was_defined_while_nobody_observed_is_seen_at_the_start() {
    let Watched {
        host,
        agent,
        stop,
        observer,
    } = Watched::new().await;
    stop.send_replace(true);
    observer.await.unwrap();
    let macs = attach(&host.fake, "52:54:00:00:00:02").await;
    assert_ne!(shown(&agent), macs);
    let observer = Observer::new(
        agent.store.clone(),
        Arc::new(agent.fake.clone()),
        agent.dispatcher.clone(),
        Duration::from_secs(600),
    );
    let (_stop, stopped) = watch::channel(false);
    let observer = tokio::spawn(observer.run(stopped));
    until("the interface is shown", || shown(&agent) == macs).await;
    observer.abort();
}

#[tokio::test]
async fn definitions_that_no_event_tells_of_are_read_in_turn() {
    let host = Host::new();
    let agent = host.agent(Arc::new(NoProbe)).await;
    let xml = host.foreign_domain(false);
    let ids: Vec<Uuid> = (1..=20).map(Uuid::from_u128).collect();
    for id in &ids {
        let own = xml
            .replace(&SERVER.to_string(), &id.to_string())
            .replace("<name>foreign", &format!("<name>foreign-{id}"));
        host.fake.define(&own).await.unwrap();
        agent.succeed(Target::New(*id), adopt()).await;
    }
    let observer = Observer::new(
        agent.store.clone(),
        Arc::new(agent.fake.clone()),
        agent.dispatcher.clone(),
        Duration::from_secs(1),
    );
    let (_stop, stopped) = watch::channel(false);
    let observer = tokio::spawn(observer.run(stopped));
    let read = || {
        let calls = host.fake.calls();
        let ids = calls
            .iter()
            .filter_map(|call| call.strip_prefix("domain_xml "));
        ids.map(str::to_owned).collect::<Vec<_>>()
    };
    // At the start all are.
    until("all are read", || {
        ids.iter().all(|id| read().contains(&id.to_string()))
    })
    .await;
    host.fake.clear_calls();
    until("all are read again", || {
        ids.iter().all(|id| read().contains(&id.to_string()))
    })
    .await;
    observer.abort();
}

#[tokio::test]
async fn the_devices_of_a_rescue_are_not_the_servers() {
    let watched = Watched::new().await;
    let (agent, fake) = (&watched.agent, &watched.host.fake);
    let own = agent.record();
    watched.rescue(|_| {}).await;
    let rescue = attach(fake, "52:54:00:00:00:02").await;
    assert!(rescue.len() > own.nics.len());
    stays("the server's own are shown", || {
        let record = agent.record();
        record.disks == own.disks && record.nics == own.nics
    })
    .await;
    let back = Action::Unrescue(crate::host::unrescue());
    agent.succeed(ON, back).await;
    let macs = attach(fake, "52:54:00:00:00:04").await;
    until("the interface is shown", || shown(agent) == macs).await;
    watched.end().await;
}

#[tokio::test]
async fn planning_sees_the_devices_where_no_event_told() {
    let host = Host::new();
    let agent = host.agent(Arc::new(NoProbe)).await;
    host.add_images(&agent.store).await;
    host.fake.define(&host.foreign_domain(false)).await.unwrap();
    agent.succeed(NEW, adopt()).await;
    // There is no observer.
    let first = attach(&host.fake, "52:54:00:00:00:02").await;
    assert_ne!(shown(&agent), first);
    agent.succeed(ON, Action::Start).await;
    assert_eq!(shown(&agent), first);
    let second = attach(&host.fake, "52:54:00:00:00:03").await;
    agent.succeed(ON, Action::Rescue(Box::new(rescue()))).await;
    assert_eq!(shown(&agent), second);
    attach(&host.fake, "52:54:00:00:00:04").await;
    let back = Action::Unrescue(crate::host::unrescue());
    agent.succeed(ON, back).await;
    assert_eq!(shown(&agent), second);
}
