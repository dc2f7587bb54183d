// SPDX-License-Identifier: Apache-2.0
//! The plans of rescue and unrescue on real libvirt, cut off at every point: the real daemon is killed
//! (by itself, with SIGKILL) before and after every step, every step fails, somebody cancels at every step,
//! the way back is cut off as well, and taking back fails. However it was cut off, the operation ends in "done" or "as before".
//!
//! `SALVOR_CRASH_CASE=unrescue:after-step:1:kill` plays only the cases whose failpoints hold that text.
//! The same over all verbs on a hypervisor in memory is in the agent's own tests.

pub(crate) mod cases;
mod commit;
mod removal;
mod stage;

use std::collections::{BTreeMap, VecDeque};
use std::fmt::Write as _;
use std::fs;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use salvor_proto::v1::OperationState;
use salvor_tests::run_folder::{RunFolder, target_folder};

use cases::{Case, Script, cases, cases_of_files};
use stage::Stage;

use crate::actor::Kind;

/// So many cases run at once, each on a domain and with an agent of its own.
const WORKERS: usize = 4;

/// The cases of all scripts, by their plans as they really are: a run that nothing cuts off.
async fn all_cases(stage: &mut Stage) -> Vec<Case> {
    let mut all = Vec::new();
    for script in Script::ALL {
        stage.actor.remove_mark();
        stage.scene.start_with("").await;
        if script.verb() == "unrescue" {
            stage.rescue_with_repair().await;
        }
        let (mark, number) = (stage.actor.console().mark(), stage.actor.number());
        let action = script.action(&stage.actor);
        let planned = stage.steps(&action).await;
        let operation = stage.submit(&action).await.unwrap();
        let ended = stage.scene.client.wait(&operation).await;
        ended.done();
        let done: Vec<_> = ended.metadata.steps.iter().map(|step| &step.kind).collect();
        let foreseen: Vec<_> = planned.iter().map(|(kind, _)| kind).collect();
        assert_eq!(done, foreseen, "PlanAction foretold another plan");
        stage.check_done(script, &operation, mark, number).await;
        stage.scene.agent.kill_9();
        let before_commit = planned.iter().filter(|(_, cleans_up)| !cleans_up).count();
        println!("{script:?}: {} steps: {foreseen:?}", planned.len());
        all.extend(cases(script, planned.len(), before_commit));
    }
    all
}

/// The cases of a server that the agent made.
async fn made_cases(folder: &RunFolder, kind: Kind) -> Vec<Case> {
    let mut stage = Stage::made(folder, &format!("{kind:?}-plans").to_lowercase(), kind).await;
    let firmware_only = kind == Kind::MadeUefi;
    let (there, back) = if firmware_only {
        (Script::ClassicReadWrite, Script::Discard)
    } else {
        (Script::StableOverlay, Script::Commit)
    };
    stage.scene.start_with("").await;
    let steps = stage.steps(&there.action(&stage.actor)).await;
    let mut all = cases_of_files(there, &steps, firmware_only);
    stage.rescue(Script::StableOverlay).await;
    let steps = stage.steps(&back.action(&stage.actor)).await;
    all.extend(cases_of_files(back, &steps, firmware_only));
    stage.unrescue(Script::Discard, false).await;
    stage.scene.agent.kill_9();
    stage.delete().await;
    all
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
}

/// Only the cases that are asked for.
fn chosen(all: Vec<Case>) -> VecDeque<Case> {
    let only = std::env::var("SALVOR_CRASH_CASE").ok();
    let is_it = |case: &Case| {
        only.as_ref()
            .is_none_or(|only| case.failpoints().contains(only))
    };
    all.into_iter().filter(is_it).collect()
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
    let queue = Mutex::new(chosen(all));
    let played = Played::default();
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
                        let told = Told(&case, format!("worker {worker}"));
                        let state = stage.play(&case).await;
                        drop(told);
                        played.count(&case, state);
                    }
                });
            });
        }
    });
    played.report("crash-cases-real.txt", "real crash cases", begun.elapsed());
}

#[test]
fn a_made_servers_files_survive_whatever_cuts_off_its_rescue_and_unrescue() {
    let folder = RunFolder::for_this_test();
    let begun = Instant::now();
    let played = Played::default();
    std::thread::scope(|scope| {
        for kind in [Kind::Made, Kind::MadeUefi] {
            let (folder, played) = (&folder, &played);
            scope.spawn(move || {
                runtime().block_on(async {
                    let cases = chosen(made_cases(folder, kind).await);
                    for (number, case) in cases.iter().enumerate() {
                        let name = format!("{kind:?}-{number}").to_lowercase();
                        let told = Told(case, name.clone());
                        // A new one each time: what was committed cannot be taken off again.
                        let mut stage = Stage::made(folder, &name, kind).await;
                        let state = stage.play(case).await;
                        stage.delete().await;
                        drop(told);
                        played.count(case, state);
                    }
                });
            });
        }
    });
    let what = "real crash cases of made servers";
    played.report("crash-cases-real-made.txt", what, begun.elapsed());
}

/// Says which case it was when one fails.
struct Told<'a>(&'a Case, String);

impl Drop for Told<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!(
                "{} failed at {:?} {}",
                self.1,
                self.0.script,
                self.0.failpoints()
            );
        }
    }
}

/// How many cases of which script ended how.
#[derive(Default)]
struct Played(Mutex<BTreeMap<(Script, &'static str), usize>>);

impl Played {
    fn count(&self, case: &Case, state: OperationState) {
        let key = (case.script, state.as_str_name());
        *self.0.lock().unwrap().entry(key).or_default() += 1;
    }

    fn report(&self, file: &str, what: &str, took: Duration) {
        let played = self.0.lock().unwrap();
        let mut text = String::new();
        for ((script, state), count) in played.iter() {
            let _ = writeln!(text, "  {script:?} {state}: {count}");
        }
        let total: usize = played.values().sum();
        let _ = writeln!(text, "{what}: {total}");
        println!("{text}in {:.0} s", took.as_secs_f64());
        fs::write(target_folder().join(file), text).unwrap();
    }
}
