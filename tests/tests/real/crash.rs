// SPDX-License-Identifier: Apache-2.0
//! The plans of rescue and unrescue on real libvirt, cut off at every point: the real daemon is killed
//! (by itself, with SIGKILL) before and after every step, every step fails, the way back is cut off as
//! well, and taking back fails. However it was cut off, the operation ends in "done" or "as before".
//!
//! `SALVOR_CRASH_CASE=unrescue:after-step:1:kill` plays only the cases whose failpoints hold that text.
//! The same over all verbs on a hypervisor in memory is in the agent's own tests.

use std::collections::{BTreeMap, VecDeque};
use std::fmt::Write as _;
use std::fs;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use salvor_proto::google::longrunning::Operation;
use salvor_proto::v1::{
    DiskProtection, OperationState, OverlayDisposition, PlanActionRequest, RescueBus, RescueMode,
    StepState, VmState, plan_action_request::Action,
};
use salvor_tests::agent::AgentSettings;
use salvor_tests::client::{Client, Ended};
use salvor_tests::console::Mark;
use salvor_tests::host::TestHost;
use salvor_tests::run_folder::{RunFolder, target_folder};
use salvor_tests::wait::SOON;
use tonic::Status;

use super::stage::{Actor, FIXER, Play, rescue_of, tiny, unrescue_of};

/// So many cases run at once, each on a domain and with an agent of its own.
const WORKERS: usize = 4;

/// What is cut off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Script {
    ClassicReadWrite,
    StableOverlay,
    Discard,
    Commit,
}

impl Script {
    const ALL: [Self; 4] = [
        Self::ClassicReadWrite,
        Self::StableOverlay,
        Self::Discard,
        Self::Commit,
    ];

    const fn verb(self) -> &'static str {
        match self {
            Self::ClassicReadWrite | Self::StableOverlay => "rescue",
            Self::Discard | Self::Commit => "unrescue",
        }
    }

    /// What becomes of the overlays in the end.
    const fn overlay(self) -> OverlayDisposition {
        match self {
            Self::ClassicReadWrite => OverlayDisposition::Unspecified,
            Self::StableOverlay | Self::Discard => OverlayDisposition::Discard,
            Self::Commit => OverlayDisposition::Commit,
        }
    }

    /// The request for the action.
    fn action(self, actor: &Actor) -> Action {
        match self {
            Self::ClassicReadWrite => {
                let mut request = rescue_of(actor, DiskProtection::ReadWrite);
                request.mode = RescueMode::Classic.into();
                Action::Rescue(request)
            }
            Self::StableOverlay => {
                let mut request = rescue_of(actor, DiskProtection::Overlay);
                request.mode = RescueMode::Stable.into();
                request.bus = RescueBus::Virtio.into();
                Action::Rescue(request)
            }
            Self::Discard | Self::Commit => Action::Unrescue(unrescue_of(actor, self.overlay())),
        }
    }
}

/// How the operation is cut off, and so how it may end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cut {
    /// The agent dies: done or as before.
    Kill,
    /// A step fails: as before.
    Fail,
    /// A step fails, and the agent dies while it takes back: as before.
    FailAndKill,
    /// A step of the clean-up fails: done, and what is left goes at the next start.
    FailCleanUp,
    /// A step fails and so does taking one back: ERROR, from which there is a way out.
    FailTwice,
}

#[derive(Debug, Clone)]
struct Case {
    script: Script,
    cut: Cut,
    /// Failpoints without their verb.
    points: Vec<String>,
}

impl Case {
    fn failpoints(&self) -> String {
        let verb = self.script.verb();
        let points: Vec<String> = self
            .points
            .iter()
            .map(|point| format!("{verb}:{point}"))
            .collect();
        points.join(",")
    }
}

/// Every case of a script whose plan has so many steps, of which so many come before the outcome.
fn cases(script: Script, steps: usize, before_commit: usize) -> Vec<Case> {
    let mut cases = Vec::new();
    let mut add = |cut: Cut, points: &[String]| {
        cases.push(Case {
            script,
            cut,
            points: points.to_vec(),
        });
    };
    for step in 0..steps {
        add(Cut::Kill, &[format!("before-step:{step}:kill")]);
        add(Cut::Kill, &[format!("after-step:{step}:kill")]);
    }
    add(Cut::Kill, &["before-commit:kill".into()]);
    add(Cut::Kill, &["after-commit:kill".into()]);
    if steps > before_commit {
        add(Cut::Kill, &["before-finish:kill".into()]);
    }
    for step in 0..before_commit {
        add(Cut::Fail, &[format!("before-step:{step}:fail")]);
        add(Cut::Fail, &[format!("after-step:{step}:fail")]);
    }
    add(Cut::Fail, &["before-commit:fail".into()]);
    for step in before_commit..steps {
        add(Cut::FailCleanUp, &[format!("before-step:{step}:fail")]);
    }
    for step in 0..before_commit {
        for place in ["before-revert", "after-revert"] {
            add(
                Cut::FailAndKill,
                &["before-commit:fail".into(), format!("{place}:{step}:kill")],
            );
        }
        add(
            Cut::FailAndKill,
            &[
                format!("before-step:{step}:fail"),
                "before-finish:kill".into(),
            ],
        );
        add(
            Cut::FailTwice,
            &[
                "before-commit:fail".into(),
                format!("before-revert:{step}:fail"),
            ],
        );
    }
    cases
}

/// A domain and an agent to play cases with. Between cases the server is ACTIVE, and the agent is down.
struct Stage {
    actor: Actor,
    play: Play<'static>,
}

impl Stage {
    async fn new(folder: &RunFolder, name: &str) -> Self {
        let host = TestHost::shared();
        let folder = folder.join(name);
        let actor = Actor::running(host, &folder, &tiny(name));
        let mut play = Play::start(host, &folder, AgentSettings::default()).await;
        play.client.adopt(actor.id).await;
        play.import_fixer(&folder).await;
        play.agent.kill_9();
        Self { actor, play }
    }

    async fn start_agent(&mut self, failpoints: &str) {
        self.play
            .agent
            .change_settings(|settings| settings.env("SALVOR_FAILPOINT", failpoints));
        self.play.agent.restart().await;
        self.play.client = Client::new(self.play.agent.channel());
    }

    async fn restart_agent(&mut self) {
        self.play.agent.kill_9();
        self.start_agent("").await;
    }

    async fn submit(&mut self, action: &Action) -> Result<Operation, Status> {
        let servers = &mut self.play.client.servers;
        let operation = match action.clone() {
            Action::Rescue(request) => servers.rescue_server(request).await?.into_inner().operation,
            Action::Unrescue(request) => {
                servers
                    .unrescue_server(request)
                    .await?
                    .into_inner()
                    .operation
            }
            other => panic!("no script does {other:?}"),
        };
        Ok(operation.expect("an action's answer has an operation"))
    }

    async fn rescue(&mut self, script: Script) -> Ended {
        let action = script.action(&self.actor);
        let operation = self.submit(&action).await.unwrap();
        let ended = self.play.client.wait(&operation).await;
        ended.done();
        ended
    }

    /// Brings a server that is RESCUED back; checks that it is, and that its disk is `marked`.
    async fn unrescue(&mut self, script: Script, marked: bool) {
        let (mark, number) = (self.actor.console().mark(), self.actor.number());
        let request = unrescue_of(&self.actor, script.overlay());
        self.play.client.unrescue(request).await.done();
        self.play.assert_original(&self.actor, mark, number).await;
        assert_eq!(self.actor.is_marked(), marked);
    }

    /// Brings a server in ERROR back.
    async fn repair(&mut self, script: Script) {
        self.restart_agent().await;
        let server = self.play.client.get(self.actor.id).await;
        let (mark, number) = (self.actor.console().mark(), self.actor.number());
        if server.rescue.is_some() {
            let request = unrescue_of(&self.actor, script.overlay());
            self.play.client.unrescue(request).await.done();
        } else {
            self.play
                .client
                .stop(self.actor.id, Some(Duration::ZERO))
                .await
                .done();
            self.play.client.start(self.actor.id).await.done();
        }
        // What a failed roll-back left of files goes at the next start.
        self.restart_agent().await;
        self.play.assert_original(&self.actor, mark, number).await;
    }

    /// Plays one case, from ACTIVE to ACTIVE.
    async fn play(&mut self, case: &Case) -> OperationState {
        let script = case.script;
        self.actor.remove_mark();
        self.start_agent(&case.failpoints()).await;
        let rescue = match script {
            Script::ClassicReadWrite | Script::StableOverlay => None,
            Script::Discard | Script::Commit => {
                let mark = self.actor.console().mark();
                let rescue = self.rescue(Script::StableOverlay).await;
                self.actor.wait_ready(mark, FIXER);
                Some(rescue.operation)
            }
        };

        let (mark, number) = (self.actor.console().mark(), self.actor.number());
        let action = script.action(&self.actor);
        let first = self.submit(&action).await;
        match case.cut {
            Cut::Kill | Cut::FailAndKill => {
                assert_eq!(self.play.agent.wait_end(SOON), "signal 9");
                self.start_agent("").await;
            }
            Cut::Fail | Cut::FailTwice | Cut::FailCleanUp => {}
        }
        // The same request again, also after a restart, is the same operation.
        let operation = self.submit(&action).await.unwrap();
        if let Ok(first) = first {
            assert_eq!(operation.name, first.name);
        }
        let ended = self.play.client.wait(&operation).await;
        let state = ended.metadata.state();
        match case.cut {
            Cut::Kill => assert!(
                matches!(state, OperationState::Done | OperationState::Failed),
                "{ended:#?}"
            ),
            Cut::Fail | Cut::FailAndKill | Cut::FailTwice => {
                assert_eq!(state, OperationState::Failed, "{ended:#?}");
            }
            Cut::FailCleanUp => {
                ended.done();
                let left_behind =
                    |warning: &salvor_proto::v1::Warning| warning.name == "LEFT_BEHIND";
                assert!(
                    ended.metadata.warnings.iter().any(left_behind),
                    "{ended:#?}"
                );
                self.restart_agent().await;
            }
        }

        if case.cut == Cut::FailTwice {
            let server = self.play.client.get(self.actor.id).await;
            Client::assert_settled(&server, VmState::Error);
            let fault = server.fault.unwrap();
            assert_eq!(fault.reason, "ROLLBACK_FAILED");
            assert!(
                !fault.step.is_empty() && !fault.left_behind.is_empty(),
                "{fault:#?}"
            );
            self.repair(script).await;
        } else if state == OperationState::Done {
            self.check_done(script, &operation, mark, number).await;
        } else {
            self.check_as_before(&ended, rescue.as_ref(), script, mark, number)
                .await;
        }
        self.play.agent.kill_9();
        state
    }

    async fn check_done(
        &mut self,
        script: Script,
        operation: &Operation,
        mark: Mark,
        number: Option<u32>,
    ) {
        match script {
            Script::ClassicReadWrite | Script::StableOverlay => {
                self.play
                    .assert_rescued(&self.actor, operation, mark, number)
                    .await;
                let said = self.actor.console().since(mark);
                assert!(said.contains("TINY-MARKED "), "{said}");
                let marked = script == Script::ClassicReadWrite;
                assert_eq!(self.actor.is_marked(), marked);
                self.unrescue(script, marked).await;
            }
            Script::Discard | Script::Commit => {
                self.play.assert_original(&self.actor, mark, number).await;
                assert_eq!(self.actor.is_marked(), script == Script::Commit);
            }
        }
    }

    async fn check_as_before(
        &mut self,
        ended: &Ended,
        rescue: Option<&Operation>,
        script: Script,
        mark: Mark,
        number: Option<u32>,
    ) {
        let touched = ended
            .metadata
            .steps
            .iter()
            .any(|step| step.kind == "PowerOff" && step.state() != StepState::Pending);
        if !touched {
            assert_eq!(self.actor.number(), number, "the guest was touched in vain");
        }
        let Some(rescue) = rescue else {
            self.play.assert_original(&self.actor, mark, number).await;
            let said = self.actor.console().since(mark);
            // The rescue guest may have been ended between writing and saying so.
            let marked = self.actor.is_marked();
            if script == Script::StableOverlay || !said.contains("TINY-UP") {
                assert!(!marked, "{said}");
            } else if said.contains("TINY-MARKED ") {
                assert!(marked, "{said}");
            }
            return;
        };
        self.play
            .assert_rescued(&self.actor, rescue, mark, number)
            .await;
        if script == Script::Discard {
            assert!(!self.actor.is_marked());
        } else {
            // The commit may have been done already: the overlay shows the same disk either way.
            self.actor.is_marked();
        }
        // Without failpoints.
        self.restart_agent().await;
        self.unrescue(script, script == Script::Commit).await;
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        self.actor.libvirt.remove(self.actor.id);
    }
}

/// The cases of all scripts, by their plans as they really are: a run that nothing cuts off.
async fn all_cases(stage: &mut Stage) -> Vec<Case> {
    let mut all = Vec::new();
    for script in Script::ALL {
        stage.actor.remove_mark();
        stage.start_agent("").await;
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
            .play
            .client
            .servers
            .plan_action(plan)
            .await
            .unwrap()
            .into_inner();
        assert!(planned.accepted, "{planned:#?}");
        let operation = stage.submit(&action).await.unwrap();
        let ended = stage.play.client.wait(&operation).await;
        ended.done();
        let done: Vec<_> = ended.metadata.steps.iter().map(|step| &step.kind).collect();
        let foreseen: Vec<_> = planned.steps.iter().map(|step| &step.kind).collect();
        assert_eq!(done, foreseen, "PlanAction foretold another plan");
        stage.check_done(script, &operation, mark, number).await;
        stage.play.agent.kill_9();
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
