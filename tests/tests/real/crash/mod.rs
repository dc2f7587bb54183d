// SPDX-License-Identifier: Apache-2.0
//! The plans of rescue and unrescue on real libvirt, cut off at every point: the real daemon is killed
//! (by itself, with SIGKILL) before and after every step, every step fails, the way back is cut off as
//! well, and taking back fails. However it was cut off, the operation ends in "done" or "as before".
//!
//! `SALVOR_CRASH_CASE=unrescue:after-step:1:kill` plays only the cases whose failpoints hold that text.
//! The same over all verbs on a hypervisor in memory is in the agent's own tests.

mod cases;
mod stage;

use std::collections::{BTreeMap, VecDeque};
use std::fmt::Write as _;
use std::fs;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use salvor_proto::v1::PlanActionRequest;
use salvor_tests::run_folder::{RunFolder, target_folder};

use cases::{Case, Script, cases};
use stage::Stage;

use crate::actor::FIXER;

/// So many cases run at once, each on a domain and with an agent of its own.
const WORKERS: usize = 4;

/// The cases of all scripts, by their plans as they really are: a run that nothing cuts off.
async fn all_cases(stage: &mut Stage) -> Vec<Case> {
    let mut all = Vec::new();
    for script in Script::ALL {
        stage.actor.remove_mark();
        stage.scene.start_with("").await;
        if script.verb() == "unrescue" {
            let mark = stage.actor.console().mark();
            stage.rescue(Script::StableOverlay).await;
            stage.actor.wait_ready(mark, FIXER);
        }
        let (mark, number) = (stage.actor.console().mark(), stage.actor.number());
        let action = script.action(&stage.actor);
        let plan = PlanActionRequest {
            action: Some(action.clone()),
        };
        let planned = stage
            .scene
            .client
            .servers
            .plan_action(plan)
            .await
            .unwrap()
            .into_inner();
        assert!(planned.accepted, "{planned:#?}");
        let operation = stage.submit(&action).await.unwrap();
        let ended = stage.scene.client.wait(&operation).await;
        ended.done();
        let done: Vec<_> = ended.metadata.steps.iter().map(|step| &step.kind).collect();
        let foreseen: Vec<_> = planned.steps.iter().map(|step| &step.kind).collect();
        assert_eq!(done, foreseen, "PlanAction foretold another plan");
        stage.check_done(script, &operation, mark, number).await;
        stage.scene.agent.kill_9();
        let steps = ended.metadata.steps.len();
        let before_commit = planned
            .steps
            .iter()
            .filter(|step| step.phase != "clean-up")
            .count();
        println!("{script:?}: {steps} steps: {foreseen:?}");
        all.extend(cases(script, steps, before_commit));
    }
    all
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
}

#[test]
fn rescue_and_unrescue_cut_off_anywhere_end_done_or_as_before() {
    let folder = RunFolder::for_this_test();
    let begun = Instant::now();
    let (first, all) = runtime().block_on(async {
        let mut stage = Stage::new(&folder, "crash-0").await;
        let all = all_cases(&mut stage).await;
        (stage, all)
    });
    let only = std::env::var("SALVOR_CRASH_CASE").ok();
    let chosen = |case: &Case| {
        only.as_ref()
            .is_none_or(|only| case.failpoints().contains(only))
    };
    let queue: VecDeque<Case> = all.into_iter().filter(chosen).collect();
    let queue = Mutex::new(queue);
    let played = Mutex::new(BTreeMap::<(Script, &'static str), usize>::new());
    std::thread::scope(|scope| {
        let mut first = Some(first);
        for worker in 0..WORKERS {
            let (folder, queue, played) = (&folder, &queue, &played);
            let stage = first.take();
            scope.spawn(move || {
                runtime().block_on(async {
                    let mut stage = match stage {
                        Some(stage) => stage,
                        None => Stage::new(folder, &format!("crash-{worker}")).await,
                    };
                    loop {
                        let Some(case) = queue.lock().unwrap().pop_front() else {
                            return;
                        };
                        let told = Told(&case, worker);
                        let state = stage.play(&case).await;
                        drop(told);
                        *played
                            .lock()
                            .unwrap()
                            .entry((case.script, state.as_str_name()))
                            .or_default() += 1;
                    }
                });
            });
        }
    });
    report(&played.into_inner().unwrap(), begun.elapsed());
}

/// Says which case it was when one fails.
struct Told<'a>(&'a Case, usize);

impl Drop for Told<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!(
                "worker {} failed at {:?} {}",
                self.1,
                self.0.script,
                self.0.failpoints()
            );
        }
    }
}

fn report(played: &BTreeMap<(Script, &'static str), usize>, took: Duration) {
    for ((script, state), count) in played {
        println!("  {script:?} {state}: {count}");
    }
    let total: usize = played.values().sum();
    let line = format!("real crash cases: {total}");
    println!("{line} in {:.0} s", took.as_secs_f64());
    let mut text = String::new();
    for ((script, state), count) in played {
        let _ = writeln!(text, "{script:?} {state}: {count}");
    }
    fs::write(
        target_folder().join("crash-cases-real.txt"),
        text + &line + "\n",
    )
    .unwrap();
}
