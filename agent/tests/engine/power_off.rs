// SPDX-License-Identifier: Apache-2.0
//! Shutting guests down, by a clock that only goes when everybody waits.

use std::{sync::Arc, time::Duration};

use salvor_agent::{
    cancel::Cancel,
    core::{
        action::{Shutdown, Verb},
        layout::Layout,
        operation::GuestStop,
        plan::{Mark, Outcome, Plan, Step},
        reason::Reason,
        state::PowerState,
    },
    engine::{StepContext, StepError, StepReport, StepRunner as _},
    hypervisor::{Boot, Hypervisor as _, HypervisorError, fake::FakeHypervisor},
    steps::Steps,
    storage::qemu_img::QemuImg,
    store::Store,
};
use tempfile::TempDir;
use tokio::{sync::watch, time::Instant};
use uuid::Uuid;

const ID: Uuid = Uuid::from_u128(7);

/// Nova's times.
const NOVA: Shutdown = Shutdown {
    timeout_ms: 60_000,
    retry_ms: 10_000,
};

/// Steps done one by one on a hypervisor in memory.
pub(crate) struct Bench {
    pub(crate) fake: FakeHypervisor,
    pub(crate) steps: Arc<Steps>,
    plan: Arc<Plan>,
    _folder: TempDir,
}

/// A plan for a server, with nothing in it.
pub(crate) fn plan_of(server: Uuid) -> Plan {
    Plan {
        id: Uuid::new_v4(),
        server,
        verb: Verb::Stop,
        initial: None,
        steps: Vec::new(),
        outcome: Outcome::Remove,
        warnings: Vec::new(),
        password_delivery: Vec::new(),
    }
}

impl Bench {
    /// A domain that runs.
    pub(crate) async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let fake = FakeHypervisor::new();
        run(&fake, ID).await;
        fake.clear_calls();
        let store = Store::open(&folder.path().join("db"), 10).unwrap();
        let layout = Layout::new(folder.path().to_str().unwrap());
        let steps = Steps::new(Arc::new(fake.clone()), store, QemuImg::default(), layout);
        Self {
            fake,
            steps: Arc::new(steps),
            plan: Arc::new(plan_of(ID)),
            _folder: folder,
        }
    }

    /// A file in the folder of a server.
    pub(crate) fn file_of(&self, server: Uuid, name: &str) -> String {
        let folder = self._folder.path().join(format!("servers/{server}"));
        std::fs::create_dir_all(&folder).unwrap();
        folder.join(name).to_str().unwrap().to_owned()
    }

    pub(crate) async fn apply(&self, step: &Step, cancel: Cancel) -> Result<StepReport, StepError> {
        let context = StepContext {
            plan: &self.plan,
            cancel,
            server_goes: Cancel::never(),
            progress: &|_| {},
        };
        self.steps.apply(context, step).await
    }

    /// Powers off; says how the guest stopped and how long that took.
    async fn power_off(&self, shutdown: Shutdown) -> (GuestStop, Duration) {
        let begun = Instant::now();
        let step = Step::power_off(shutdown, true);
        let report = self.apply(&step, Cancel::never()).await.unwrap();
        let status = self.fake.domain(ID).await.unwrap().unwrap();
        assert_eq!(status.power, PowerState::Shutdown);
        (report.guest_stop.unwrap(), begun.elapsed())
    }

    /// Takes a power-off of a guest that was on back.
    async fn take_back(&self, shutdown: Shutdown) {
        let context = StepContext {
            plan: &self.plan,
            cancel: Cancel::never(),
            server_goes: Cancel::never(),
            progress: &|_| {},
        };
        let step = Step::power_off(shutdown, true);
        self.steps.revert(context, &step).await.unwrap();
    }

    pub(crate) fn count(&self, name: &str) -> usize {
        let calls = self.fake.calls();
        calls
            .iter()
            .filter(|call| call.split(' ').next() == Some(name))
            .count()
    }
}

/// Defines a domain and starts it.
pub(crate) async fn run(fake: &FakeHypervisor, id: Uuid) {
    let xml = format!("<domain><name>{id}</name><uuid>{id}</uuid></domain>");
    fake.define(&xml).await.unwrap();
    fake.start(id, Boot::Resume).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_ignores_the_request_is_asked_every_ten_seconds_and_ended_after_sixty() {
    let bench = Bench::new().await;
    bench.fake.guest_ignores_acpi(ID);
    let off = bench.power_off(NOVA);
    let count = async {
        let mut counts = Vec::new();
        tokio::time::sleep(Duration::from_secs(5)).await;
        for _ in 0..6 {
            counts.push(bench.count("shutdown"));
            tokio::time::sleep(Duration::from_secs(10)).await;
        }
        counts
    };
    let ((stop, took), counts) = tokio::join!(off, count);
    assert_eq!(stop, GuestStop::Forced);
    assert_eq!(took, Duration::from_secs(60));
    assert_eq!(counts, [1, 2, 3, 4, 5, 6]);
    assert_eq!((bench.count("shutdown"), bench.count("destroy")), (6, 1));
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_missed_the_first_request_hears_the_second() {
    let bench = Bench::new().await;
    bench.fake.guest_misses_acpi(ID, 1);
    let (stop, took) = bench.power_off(NOVA).await;
    assert_eq!((stop, took), (GuestStop::ByItself, Duration::from_secs(10)));
    assert_eq!((bench.count("shutdown"), bench.count("destroy")), (2, 0));
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_takes_its_time_is_noticed_when_it_is_off() {
    let bench = Bench::new().await;
    bench.fake.guest_ignores_acpi(ID);
    let fake = bench.fake.clone();
    let guest = async {
        tokio::time::sleep(Duration::from_millis(12_345)).await;
        fake.guest_powers_off(ID);
    };
    let ((stop, took), ()) = tokio::join!(bench.power_off(NOVA), guest);
    assert_eq!(
        (stop, took),
        (GuestStop::ByItself, Duration::from_millis(12_345))
    );
    assert_eq!(bench.count("destroy"), 0);
}

#[tokio::test(start_paused = true)]
async fn a_guest_whose_cpus_are_stopped_is_not_waited_for() {
    let bench = Bench::new().await;
    for power in [
        PowerState::Paused,
        PowerState::Suspended,
        PowerState::Crashed,
    ] {
        bench.fake.set_power(ID, power, "");
        let (stop, took) = bench.power_off(NOVA).await;
        assert_eq!((stop, took), (GuestStop::Forced, Duration::ZERO), "{power}");
        assert_eq!(bench.count("shutdown"), 0);
    }
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_is_not_to_be_ended_is_left_alone_whatever_keeps_it_from_shutting_down() {
    let bench = Bench::new().await;
    let step = |timeout_ms| Step::PowerOff {
        shutdown: Shutdown { timeout_ms, ..NOVA },
        was_on: true,
        ask_agent: false,
        or_fail: true,
    };
    for power in [
        PowerState::Paused,
        PowerState::Suspended,
        PowerState::Crashed,
    ] {
        bench.fake.set_power(ID, power, "");
        let error = bench.apply(&step(60_000), Cancel::never()).await;
        assert_eq!(error.unwrap_err().reason, Reason::GuestStillOn, "{power}");
    }
    bench.fake.set_power(ID, PowerState::Running, "");
    bench.fake.guest_ignores_acpi(ID);
    for timeout_ms in [0, 20_000] {
        let error = bench.apply(&step(timeout_ms), Cancel::never()).await;
        assert_eq!(error.unwrap_err().reason, Reason::GuestStillOn);
    }
    assert_eq!((bench.count("shutdown"), bench.count("destroy")), (2, 0));
}

#[tokio::test(start_paused = true)]
async fn without_time_a_guest_is_ended_unasked() {
    let bench = Bench::new().await;
    let none = Shutdown {
        timeout_ms: 0,
        ..NOVA
    };
    let (stop, took) = bench.power_off(none).await;
    assert_eq!((stop, took), (GuestStop::Forced, Duration::ZERO));
    assert_eq!((bench.count("shutdown"), bench.count("destroy")), (0, 1));
    let (stop, _) = bench.power_off(none).await;
    assert_eq!(stop, GuestStop::WasOff);
    assert_eq!(bench.count("destroy"), 1);
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_cannot_be_asked_is_ended_all_the_same() {
    let bench = Bench::new().await;
    bench.fake.guest_ignores_acpi(ID);
    for _ in 0..6 {
        let hangs = HypervisorError::Deadline {
            call: "virDomainShutdown",
            after: Duration::from_secs(5),
        };
        bench.fake.fail_next("shutdown", hangs);
    }
    let (stop, took) = bench.power_off(NOVA).await;
    assert_eq!((stop, took), (GuestStop::Forced, Duration::from_secs(60)));
}

#[tokio::test(start_paused = true)]
async fn a_cancel_ends_the_waiting_and_leaves_the_guest() {
    let bench = Bench::new().await;
    bench.fake.guest_ignores_acpi(ID);
    let (cancel, signal) = watch::channel(false);
    let step = Step::power_off(NOVA, true);
    let begun = Instant::now();
    let later = async {
        tokio::time::sleep(Duration::from_millis(3_500)).await;
        cancel.send_replace(true);
    };
    let (outcome, ()) = tokio::join!(bench.apply(&step, Cancel::from(signal)), later);
    assert_eq!(outcome.unwrap_err().reason, Reason::Cancelled);
    assert_eq!(begun.elapsed(), Duration::from_millis(3_500));
    assert_eq!(bench.count("destroy"), 0);
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_obeys_after_the_cancel_is_started_again() {
    let bench = Bench::new().await;
    bench.fake.guest_ignores_acpi(ID);
    let fake = bench.fake.clone();
    let guest = async {
        tokio::time::sleep(Duration::from_secs(2)).await;
        fake.guest_powers_off(ID);
    };
    let ((), ()) = tokio::join!(bench.take_back(NOVA), guest);
    let status = bench.fake.domain(ID).await.unwrap().unwrap();
    assert_eq!(status.power, PowerState::Running);
    assert_eq!((bench.count("start"), bench.count("destroy")), (1, 0));
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_does_not_obey_holds_up_the_cancel_for_ten_seconds_at_most() {
    let bench = Bench::new().await;
    bench.fake.guest_ignores_acpi(ID);
    let soon = Shutdown {
        timeout_ms: 200,
        ..NOVA
    };
    let never = Shutdown {
        timeout_ms: 0,
        ..NOVA
    };
    for (shutdown, ms) in [(NOVA, 10_000), (soon, 200), (never, 0)] {
        let begun = Instant::now();
        bench.take_back(shutdown).await;
        assert_eq!(begun.elapsed(), Duration::from_millis(ms));
    }
    let begun = Instant::now();
    bench.fake.set_power(ID, PowerState::Paused, "user");
    bench.take_back(NOVA).await;
    assert_eq!(begun.elapsed(), Duration::ZERO, "it cannot obey");
    assert_eq!(bench.count("start"), 0);
}

#[tokio::test(start_paused = true)]
async fn what_is_left_of_a_crashed_guest_is_not_in_the_way_of_a_start() {
    let bench = Bench::new().await;
    bench.fake.set_power(ID, PowerState::Crashed, "panicked");
    let start = Step::StartDomain {
        mark: Mark::Own,
        fresh: false,
    };
    bench.apply(&start, Cancel::never()).await.unwrap();
    let status = bench.fake.domain(ID).await.unwrap().unwrap();
    assert_eq!(status.power, PowerState::Running);
    assert_eq!((bench.count("destroy"), bench.count("start")), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_somebody_else_started_is_neither_taken_for_ours_nor_ended() {
    let bench = Bench::new().await;
    let start = Step::StartDomain {
        mark: Mark::Plan(bench.plan.id),
        fresh: false,
    };
    let error = bench.apply(&start, Cancel::never()).await.unwrap_err();
    assert!(error.message.contains("somebody else"), "{error}");
    let context = StepContext {
        plan: &bench.plan,
        cancel: Cancel::never(),
        server_goes: Cancel::never(),
        progress: &|_| {},
    };
    bench.steps.revert(context, &start).await.unwrap();
    let status = bench.fake.domain(ID).await.unwrap().unwrap();
    assert_eq!(status.power, PowerState::Running);
}

#[tokio::test]
async fn nothing_outside_of_the_folder_of_servers_is_made_or_removed() {
    let bench = Bench::new().await;
    let folder = bench._folder.path().to_str().unwrap();
    std::fs::create_dir_all(format!("{folder}/servers/x")).unwrap();
    std::fs::write(format!("{folder}/precious"), "").unwrap();
    for path in [
        folder.to_owned(),
        format!("{folder}/precious"),
        format!("{folder}/servers"),
        format!("{folder}/servers/x/../../precious"),
        "/etc".to_owned(),
    ] {
        for step in [
            Step::RemoveFolder { path: path.clone() },
            Step::MakeFolder { path: path.clone() },
        ] {
            let error = bench.apply(&step, Cancel::never()).await.unwrap_err();
            assert_eq!(error.reason, Reason::Internal, "{path}");
        }
    }
    assert!(std::fs::exists(format!("{folder}/precious")).unwrap());
    assert!(std::fs::exists(format!("{folder}/servers/x")).unwrap());
}
