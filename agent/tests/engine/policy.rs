// SPDX-License-Identifier: Apache-2.0
//! Guests that are not as they should be: what is recorded, what is told, and what is done about it.

use salvor_agent::{
    core::{
        action::{Action, ResetTo, Verb},
        incident::{Incident, IncidentKind},
        reconcile::{Mismatch, Policy},
        state::{PowerState, VmState},
    },
    hypervisor::{Boot, Hypervisor as _, HypervisorEvent, LinkState},
    store::Change,
};

use crate::{
    gate::{stays, until},
    host::{ON, SERVER, rescue_action},
    observe::Watched,
};

const START: Policy = Policy {
    start_crashed: true,
    start_stopped_by_itself: false,
};

fn mismatch(watched: &Watched) -> Option<Mismatch> {
    let record = watched.agent.record();
    record.mismatch.map(|mismatch| mismatch.what)
}

#[tokio::test]
async fn a_guest_that_crashed_is_left_off_and_shown_unless_told_otherwise() {
    let watched = Watched::new().await;
    watched.host.fake.crash_guest(SERVER);
    watched.becomes(VmState::Stopped).await;
    assert_eq!(mismatch(&watched), Some(Mismatch::Crashed));
    stays("off", || {
        watched.agent.record().vm_state == VmState::Stopped
    })
    .await;
    assert_eq!(watched.operations(Verb::Start).await, 0);
    watched.agent.succeed(ON, Action::Start).await;
    assert_eq!(mismatch(&watched), None);
    watched.end().await;
}

#[tokio::test]
async fn a_guest_that_crashed_is_started_again_if_so_configured_and_the_next_time_after_a_pause() {
    let watched = Watched::under(START).await;
    let starts = || {
        let calls = watched.host.fake.calls();
        let starts = calls.iter().filter(|call| call.starts_with("start "));
        starts.count()
    };
    let before = starts();
    watched.host.fake.crash_guest(SERVER);
    until("it is started", || starts() > before).await;
    let started = || {
        let record = watched.agent.record();
        record.vm_state == VmState::Active && record.operation.is_none()
    };
    until("the start has ended", started).await;
    assert_eq!(watched.operations(Verb::Start).await, 1);
    let operations = watched
        .agent
        .store
        .operations(Some(SERVER), i64::MAX, 1)
        .await
        .unwrap();
    assert_eq!(operations[0].1.caller, "salvord");

    // Again at once: a boot loop must not spin.
    watched.host.fake.crash_guest(SERVER);
    watched.becomes(VmState::Stopped).await;
    stays("off", || {
        watched.agent.record().vm_state == VmState::Stopped
    })
    .await;
    assert_eq!(watched.operations(Verb::Start).await, 1);

    // What it does about crashes says nothing about a guest that shut itself down.
    watched.agent.succeed(ON, Action::Start).await;
    watched.host.fake.guest_powers_off(SERVER);
    watched.becomes(VmState::Stopped).await;
    assert_eq!(mismatch(&watched), Some(Mismatch::StoppedByItself));
    stays("off", || {
        watched.agent.record().vm_state == VmState::Stopped
    })
    .await;
    watched.end().await;
}

#[tokio::test]
async fn a_guest_paused_by_an_io_error_is_active_and_says_which_disk_and_why() {
    let watched = Watched::new().await;
    watched.host.fake.disk_fails(SERVER, "no space");
    let reason = || watched.agent.record().power.reason.clone();
    until("it says why", || reason() == "ioerror: no space on vda").await;
    let record = watched.agent.record();
    assert_eq!(
        (record.vm_state, record.power.state),
        (VmState::Active, PowerState::Paused)
    );
    assert_eq!(mismatch(&watched), Some(Mismatch::IoError));
    // The same again after an outage, in which nothing else was to be heard of it.
    let down = LinkState::Down {
        reason: "reset".to_owned(),
    };
    watched.host.fake.set_link(down);
    watched.sees(PowerState::Unknown).await;
    watched.host.fake.set_link(LinkState::Up);
    until("it says why", || reason() == "ioerror: no space on vda").await;
    assert_eq!(mismatch(&watched), Some(Mismatch::IoError));
    watched
        .host
        .fake
        .set_power(SERVER, PowerState::Running, "unpaused");
    watched.sees(PowerState::Running).await;
    assert_eq!(mismatch(&watched), None);
    watched.end().await;
}

#[tokio::test]
async fn a_guest_that_a_full_disk_has_halted_goes_on_when_asked_whatever_its_server_is() {
    let prepared: [(VmState, Vec<Action>); 3] = [
        (VmState::Active, Vec::new()),
        (VmState::Rescued, vec![rescue_action()]),
        (VmState::Error, vec![Action::ResetState(ResetTo::Error)]),
    ];
    for (vm_state, before) in prepared {
        let watched = Watched::new().await;
        for action in before {
            watched.agent.succeed(ON, action).await;
        }
        let fault = watched.agent.record().fault.clone();
        let refused = watched.agent.submit(ON, Action::Unpause).await;
        let refusal = refused.unwrap_err();
        assert!(refusal.message.contains("not stopped"), "{refusal}");
        watched.host.fake.disk_fails(SERVER, "no space");
        until("it is told", || {
            mismatch(&watched) == Some(Mismatch::IoError)
        })
        .await;
        watched.agent.succeed(ON, Action::Unpause).await;
        let record = watched.agent.record();
        assert_eq!(
            (record.vm_state, record.power.state),
            (vm_state, PowerState::Running)
        );
        assert_eq!((&record.fault, record.mismatch), (&fault, None));
        watched.end().await;
    }
}

#[tokio::test]
async fn a_qemu_that_hangs_when_asked_which_disk_failed_holds_up_nothing() {
    let watched = Watched::new().await;
    watched.host.fake.hang(Some("disk_errors"));
    watched.host.fake.disk_fails(SERVER, "no space");
    watched.sees(PowerState::Paused).await;
    assert_eq!(mismatch(&watched), Some(Mismatch::IoError));
    // The loop goes on.
    let rebooted = Incident::new(IncidentKind::Rebooted);
    watched.host.fake.tell(HypervisorEvent::Guest {
        id: SERVER,
        incident: rebooted,
    });
    until_told(&watched, 1).await;
    watched.host.fake.hang(None);
    watched.end().await;
}

#[tokio::test]
async fn memory_that_somebody_saved_makes_a_server_suspended_until_it_is_gone() {
    let watched = Watched::new().await;
    watched.host.fake.managed_save(SERVER);
    watched.becomes(VmState::Suspended).await;
    watched.host.fake.drop_saved_memory(SERVER).await.unwrap();
    let down = LinkState::Down {
        reason: "reset".to_owned(),
    };
    watched.host.fake.set_link(down);
    watched.sees(PowerState::Unknown).await;
    assert_eq!(watched.agent.record().vm_state, VmState::Suspended);
    watched.host.fake.set_link(LinkState::Up);
    watched.becomes(VmState::Stopped).await;

    watched.host.fake.start(SERVER, Boot::Resume).await.unwrap();
    watched.becomes(VmState::Active).await;
    watched.host.fake.managed_save(SERVER);
    watched.becomes(VmState::Suspended).await;
    watched.host.fake.start(SERVER, Boot::Resume).await.unwrap();
    watched.becomes(VmState::Active).await;
    watched.end().await;
}

/// The incidents in the log, each with how often it was.
async fn told(watched: &Watched) -> Vec<u32> {
    let page = watched.agent.store.events_after(0, 1_000).await.unwrap();
    let events = page.events.into_iter();
    let counts = events.filter_map(|event| match event.change {
        Change::Guest(report) => Some(report.count),
        _ => None,
    });
    counts.collect()
}

async fn until_told(watched: &Watched, many: usize) {
    let deadline = tokio::time::Instant::now() + std::time::Duration::from_secs(10);
    while told(watched).await.len() < many {
        assert!(tokio::time::Instant::now() < deadline, "not told");
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_guest_that_reboots_a_thousand_times_fills_no_log() {
    let watched = Watched::new().await;
    for _ in 0..1_000 {
        let incident = Incident::new(IncidentKind::Rebooted);
        let event = HypervisorEvent::Guest {
            id: SERVER,
            incident,
        };
        watched.host.fake.tell(event);
    }
    // Somebody else's guest is nobody's business.
    let incident = Incident::new(IncidentKind::Panicked);
    let id = uuid::Uuid::from_u128(77);
    watched
        .host
        .fake
        .tell(HypervisorEvent::Guest { id, incident });
    until_told(&watched, 1).await;
    // And what is the matter after that is seen at once.
    watched.host.fake.guest_powers_off(SERVER);
    watched.becomes(VmState::Stopped).await;
    assert_eq!(told(&watched).await, [1]);
    watched.end().await;
}

#[tokio::test]
async fn whether_the_guest_agent_is_connected_is_recorded_and_what_happens_to_devices_is_told() {
    let watched = Watched::new().await;
    let fake = &watched.host.fake;
    let agent = || watched.agent.record().agent.map(|seen| seen.connected);
    assert_eq!(agent(), None);
    for connected in [true, false, true] {
        fake.tell(HypervisorEvent::GuestAgent {
            id: SERVER,
            connected,
        });
        until("it is recorded", || agent() == Some(connected)).await;
    }
    for event in [
        HypervisorEvent::BlockJob {
            id: SERVER,
            disk: "vda".to_owned(),
            state: "failed",
        },
        HypervisorEvent::DeviceRemoved {
            id: SERVER,
            device: "net1".to_owned(),
        },
        HypervisorEvent::Balloon {
            id: SERVER,
            memory_kib: 4096,
        },
    ] {
        fake.tell(event);
    }
    until_told(&watched, 3).await;
    fake.guest_powers_off(SERVER);
    watched.becomes(VmState::Stopped).await;
    until("its agent is gone with it", || agent().is_none()).await;
    watched.end().await;
}
