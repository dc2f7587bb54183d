// SPDX-License-Identifier: Apache-2.0
//! Saving and dumping memory, cut off: by a clock that only goes when everybody waits.

use std::time::Duration;

use salvor_agent::{
    cancel::Cancel,
    core::{plan::Step, reason::Reason, state::PowerState},
    engine::{StepContext, StepError, StepReport, StepRunner as _},
    hypervisor::Hypervisor as _,
};
use tokio::{
    sync::watch,
    time::{Instant, sleep},
};
use uuid::Uuid;

use crate::power_off::{Bench, plan_of, run};

const SAVE: &Step = &Step::SaveMemory {
    memory_kib: 1024,
    file: String::new(),
};

const IDS: [Uuid; 4] = [
    Uuid::from_u128(1),
    Uuid::from_u128(2),
    Uuid::from_u128(3),
    Uuid::from_u128(4),
];

impl Bench {
    /// Does a step to a server of its own.
    async fn to(
        &self,
        server: Uuid,
        step: &Step,
        cancel: Cancel,
        server_goes: Cancel,
    ) -> Result<StepReport, StepError> {
        let plan = plan_of(server);
        let context = StepContext {
            plan: &plan,
            cancel,
            server_goes,
            progress: &|_| {},
        };
        self.steps.apply(context, step).await
    }

    async fn power(&self, id: Uuid) -> PowerState {
        self.fake.domain(id).await.unwrap().unwrap().power
    }
}

/// Turns to `true` after a while.
fn after(time: Duration) -> Cancel {
    let (sender, signal) = watch::channel(false);
    tokio::spawn(async move {
        sleep(time).await;
        sender.send_replace(true);
    });
    Cancel::from(signal)
}

#[tokio::test(start_paused = true)]
async fn a_save_that_is_cancelled_before_its_turn_never_happens() {
    let bench = Bench::new().await;
    for id in IDS {
        run(&bench.fake, id).await;
    }
    bench.fake.hang(Some("save"));
    let [a, b, c, last] = IDS;
    let first = async {
        tokio::join!(
            bench.to(a, SAVE, Cancel::never(), Cancel::never()),
            bench.to(b, SAVE, Cancel::never(), Cancel::never()),
            bench.to(c, SAVE, Cancel::never(), Cancel::never()),
        )
    };
    let begun = Instant::now();
    let fourth = async {
        sleep(Duration::from_secs(1)).await;
        let cancelled = bench
            .to(last, SAVE, after(Duration::from_secs(5)), Cancel::never())
            .await;
        assert_eq!(cancelled.unwrap_err().reason, Reason::Cancelled);
        assert_eq!(begun.elapsed(), Duration::from_secs(6), "at once");
        bench.fake.hang(None);
    };
    let ((a_saved, b_saved, c_saved), ()) = tokio::join!(first, fourth);
    for (id, saved) in [(a, a_saved), (b, b_saved), (c, c_saved)] {
        saved.unwrap();
        assert_eq!(bench.power(id).await, PowerState::Shutdown);
    }
    sleep(Duration::from_secs(3600)).await;
    assert_eq!(bench.power(last).await, PowerState::Running);
    assert_eq!(bench.count("save"), 3);
}

#[tokio::test(start_paused = true)]
async fn a_save_that_does_not_heed_its_end_is_given_up_and_does_not_come_later() {
    let bench = Bench::new().await;
    let [id, ..] = IDS;
    run(&bench.fake, id).await;
    bench.fake.hang(Some("save"));
    let begun = Instant::now();
    let cancelled = bench
        .to(id, SAVE, after(Duration::from_secs(5)), Cancel::never())
        .await;
    assert_eq!(cancelled.unwrap_err().reason, Reason::Cancelled);
    assert_eq!(begun.elapsed(), Duration::from_secs(35));
    assert!(bench.count("abort_job") > 1, "it is asked for again");
    bench.fake.hang(None);
    sleep(Duration::from_secs(3600)).await;
    assert_eq!(bench.power(id).await, PowerState::Running);
}

#[tokio::test(start_paused = true)]
async fn a_dump_that_is_cancelled_has_ended_when_its_operation_ends() {
    let bench = Bench::new().await;
    let [id, ..] = IDS;
    run(&bench.fake, id).await;
    bench.fake.hang(Some("dump"));
    let file = bench.file_of(id, "memory.elf");
    let dump = Step::DumpMemory {
        path: file.clone(),
        memory_kib: 1024,
    };
    let begun = Instant::now();
    let written = async {
        sleep(Duration::from_secs(60)).await;
        bench.fake.hang(None);
    };
    let dumped = bench.to(id, &dump, after(Duration::from_secs(5)), Cancel::never());
    let (cancelled, ()) = tokio::join!(dumped, written);
    assert_eq!(cancelled.unwrap_err().reason, Reason::Cancelled);
    assert_eq!(begun.elapsed(), Duration::from_secs(60));
    assert_eq!(bench.power(id).await, PowerState::Running);
    assert_eq!(bench.count("abort_job"), 0, "QEMU knows no such order");
    assert!(std::fs::exists(file).unwrap(), "taking back removes it");
}

#[tokio::test(start_paused = true)]
async fn a_dump_of_a_guest_that_is_to_go_is_not_waited_for() {
    let bench = Bench::new().await;
    let [id, ..] = IDS;
    run(&bench.fake, id).await;
    bench.fake.hang(Some("dump"));
    let dump = Step::DumpMemory {
        path: bench.file_of(id, "memory.elf"),
        memory_kib: 1024,
    };
    let ended = async {
        while bench.power(id).await != PowerState::Shutdown {
            sleep(Duration::from_millis(100)).await;
        }
        // The end of QEMU ends the call.
        bench.fake.hang(None);
    };
    let (cancel, goes) = (after(Duration::from_secs(5)), after(Duration::from_secs(5)));
    let (cancelled, ()) = tokio::join!(bench.to(id, &dump, cancel, goes), ended);
    assert_eq!(cancelled.unwrap_err().reason, Reason::Cancelled);
}
