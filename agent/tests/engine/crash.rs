// SPDX-License-Identifier: Apache-2.0
//! The generic crash test: every plan of every verb, with the agent dying, a step failing and somebody
//! cancelling at every point, with the agent dying in every call to the hypervisor and the link to it
//! lost there. Whatever happens, it ends in "done" or "as before".

use std::{
    collections::VecDeque,
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use salvor_agent::{
    core::{
        action::Action,
        operation::{OperationRecord, OperationState, StepState},
        plan::{Phase, Plan},
        reason::Reason,
        record::OverlayDisposition,
        state::{PowerState, VmState},
    },
    engine::{Event, NoProbe, Point, Probe},
    hypervisor::{Hypervisor as _, LinkState},
    store::{Accept, Accepted},
};

use crate::{
    host::{Agent, Host, ON, PATIENCE, SERVER, Saved, Seen, anonymous, content, unrescue},
    variants::{Variant, prepare, variants},
};

/// Lets happen at each point what it was told to, once, and notes every point.
#[derive(Default)]
pub(crate) struct Plot {
    events: Mutex<Vec<(Point, Event)>>,
    seen: Mutex<Vec<Point>>,
}

impl Plot {
    pub(crate) fn new(events: &[(Point, Event)]) -> Arc<Self> {
        Arc::new(Self {
            events: Mutex::new(events.to_vec()),
            ..Self::default()
        })
    }

    fn seen(&self) -> Vec<Point> {
        self.seen.lock().unwrap().clone()
    }
}

impl Probe for Plot {
    fn at(&self, _plan: &Plan, point: Point) -> Event {
        self.seen.lock().unwrap().push(point);
        let mut events = self.events.lock().unwrap();
        match events.iter().position(|(at, _)| *at == point) {
            Some(index) => events.remove(index).1,
            None => Event::Go,
        }
    }
}

pub(crate) const FAIL: Event = Event::Fail(Reason::StorageFailed);

/// What goes wrong.
#[derive(Debug, Clone)]
enum Trouble {
    At(Vec<(Point, Event)>),
    DiesAfterCall(usize),
    DiesWithinCall(usize),
    LosesLinkAfterCall(usize),
    LosesLinkWithinCall(usize),
}

/// How it has to end.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Expected {
    Done,
    Before,
    Either,
}

/// A plan, with the host on which it is tried.
struct Trial {
    variant: Variant,
    host: Host,
    saved: Saved,
    plan: Arc<Plan>,
    before: Seen,
    done: Seen,
    /// What guests see on the disks that overlays are committed to, before and after.
    shown: [Vec<String>; 2],
    cases: usize,
    failures: Vec<String>,
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
}

impl Trial {
    /// Brings the host to where the plan begins, plans, and lets it run once undisturbed.
    fn new(variant: Variant) -> (Self, Vec<Point>, usize) {
        let mut host = Host::new();
        runtime().block_on(prepare(&host, &variant.prior));
        let saved = host.save();
        host.restore(&saved);
        let (before, plan) = runtime().block_on(async {
            let agent = host.agent(Arc::new(NoProbe)).await;
            let plan = agent.plan(variant.target, &variant.action).await;
            (host.look(&agent).await, plan)
        });
        let mut trial = Self {
            variant,
            host,
            saved,
            plan,
            done: before.clone(),
            before,
            shown: [Vec::new(), Vec::new()],
            cases: 0,
            failures: Vec::new(),
        };
        trial.host.restore(&trial.saved);
        trial.shown[0] = trial.shown_by_disks();
        let plot = Plot::new(&[]);
        let calls = trial.host.fake.calls().len();
        let (operation, done) = trial.live(&Trouble::At(Vec::new()), &plot).unwrap();
        assert_eq!(operation.state, OperationState::Done, "{operation:#?}");
        let calls = trial.host.fake.calls().len() - calls;
        trial.shown[1] = trial.shown_by_disks();
        trial.done = done;
        (trial, plot.seen(), calls)
    }

    /// What a guest sees now on the disks that have or had overlays.
    fn shown_by_disks(&self) -> Vec<String> {
        let rescue = self.before.record.as_ref().and_then(|r| r.rescue.as_ref());
        if !self.variant.commits {
            return Vec::new();
        }
        rescue
            .into_iter()
            .flat_map(|rescue| &rescue.overlays)
            .map(|overlay| {
                let path = PathBuf::from(&overlay.path);
                if path.exists() {
                    content(&path, "qcow2")
                } else {
                    content(Path::new(&overlay.base), &overlay.base_format)
                }
            })
            .collect()
    }

    /// One life of an agent, in which the plan is submitted; `None` if it dies of it.
    fn live(&self, trouble: &Trouble, plot: &Arc<Plot>) -> Option<(OperationRecord, Seen)> {
        let runtime = runtime();
        let probe: Arc<dyn Probe> = Arc::clone(plot) as _;
        let ended = runtime.block_on(async {
            let agent = self.host.agent(probe).await;
            match trouble {
                Trouble::At(_) => {}
                Trouble::DiesAfterCall(n) => agent.fake.stop_after(*n),
                Trouble::DiesWithinCall(n) => agent.fake.stop_within(*n),
                Trouble::LosesLinkAfterCall(n) => agent.fake.lose_link_after(*n),
                Trouble::LosesLinkWithinCall(n) => agent.fake.lose_link_within(*n),
            }
            let accept = Accept {
                plan: Arc::clone(&self.plan),
                request: anonymous(),
                planned_for: agent.store.server(SERVER),
                now_ms: 1,
            };
            let accepted = agent.engine.submit(accept).await.unwrap();
            assert!(matches!(accepted, Accepted::New(_)));
            tokio::select! {
                () = agent.fake.stopped() => None,
                () = bring_link_back(&agent) => None,
                view = agent.engine.wait(self.plan.id, PATIENCE) => {
                    let operation = OperationRecord::clone(&view.unwrap().unwrap().operation);
                    if operation.state.is_final() {
                        Some((operation, self.host.look(&agent).await))
                    } else {
                        None
                    }
                }
            }
        });
        // Nothing of a dead agent goes on.
        drop(runtime);
        ended
    }

    /// The next life: it has to bring to an end what the one before began.
    fn live_on(&self) -> (OperationRecord, Seen) {
        runtime().block_on(async {
            let agent = self.host.agent(Arc::new(NoProbe)).await;
            let operation = agent.ended(self.plan.id).await;
            (operation, self.host.look(&agent).await)
        })
    }

    fn check(&mut self, trouble: &Trouble, expected: Expected) -> Vec<Point> {
        self.cases += 1;
        self.host.restore(&self.saved);
        let plot = Plot::new(match trouble {
            Trouble::At(events) => events,
            _ => &[],
        });
        let (operation, seen) = match self.live(trouble, &plot) {
            Some(ended) => ended,
            None => self.live_on(),
        };
        let left_behind =
            !operation.warnings.is_empty() && operation.warnings != self.plan.warnings;
        // What clean-up could not remove goes when the agent starts next.
        let (operation, seen) = if left_behind {
            self.live_on()
        } else {
            (operation, seen)
        };
        let done = operation.state == OperationState::Done;
        let right = match expected {
            Expected::Done => done,
            Expected::Before => !done,
            Expected::Either => true,
        };
        let mut wrong = if done {
            seen.differences(&self.done)
        } else {
            seen.differences(&self.as_before(&seen, &operation))
        };
        if self.variant.commits {
            let shown = self.shown_by_disks();
            if shown != self.shown[usize::from(done)] {
                wrong.push("the disks show something else".to_owned());
            }
        }
        if !operation.state.is_final() || !right {
            wrong.push(format!("it ended {}, not {expected:?}", operation.state));
        }
        if !wrong.is_empty() {
            self.fail(trouble, &wrong, &operation);
        }
        plot.seen()
    }

    /// Where the whole plan can be made to turn back: before its end, or before a step that is not
    /// taken back.
    fn last_turn(&self) -> Point {
        let last = self
            .plan
            .steps
            .iter()
            .position(|planned| planned.step.is_final());
        last.map_or(Point::BeforeCommit, Point::BeforeStep)
    }

    /// How the host has to look if the plan was taken back.
    fn as_before(&self, seen: &Seen, operation: &OperationRecord) -> Seen {
        let mut before = self.before.clone();
        // What a discarded overlay held is gone for good before the server can change its disk.
        let begun = |kind: &str, about: &str| {
            operation.steps.iter().any(|step| {
                step.kind == kind
                    && step.state != StepState::Pending
                    && step.description.contains(about)
            })
        };
        // A paused guest that was ended boots anew.
        if before.power == Some(PowerState::Paused) && begun("PowerOff", "") {
            before.power = seen.power.filter(|power| power.is_on());
        }
        // A guest that was ended and started again has the definition as it is now.
        if begun("PowerOff", "") && seen.live.is_some() && seen.live == before.inactive {
            before.live.clone_from(&seen.live);
        }
        // Memory that a hard reboot drops, nothing brings back.
        if before.memory && begun("StartDomain", "") {
            before.memory = seen.memory;
        }
        let rescue = self.before.record.as_ref().and_then(|r| r.rescue.as_ref());
        for overlay in rescue.iter().flat_map(|rescue| &rescue.overlays) {
            if !begun("EmptyOverlay", &overlay.path) {
                continue;
            }
            let path = Path::new(&overlay.path);
            let name = path.strip_prefix(self.host.dir.path()).unwrap();
            let name = name.display().to_string();
            let emptied = content(Path::new(&overlay.base), &overlay.base_format);
            if begun("StartDomain", "") || seen.files.get(&name) == Some(&emptied) {
                before.files.insert(name, emptied);
            }
        }
        if !self.variant.commits {
            return before;
        }
        // A commit that began cannot be unbegun: the overlays hide how far it came, and must stay.
        let began = seen
            .record
            .as_ref()
            .and_then(|record| record.rescue.as_ref())
            .is_some_and(|rescue| rescue.commit_started);
        if let Some(rescue) = before
            .record
            .as_mut()
            .and_then(|record| record.rescue.as_mut())
            && began
        {
            rescue.commit_started = true;
            for overlay in &rescue.overlays {
                let name = overlay.base.rsplit('/').next().unwrap();
                let name = format!("outside/{name}");
                before.files.insert(name.clone(), seen.files[&name].clone());
            }
        }
        before
    }

    fn fail(&mut self, trouble: &Trouble, wrong: &[String], operation: &OperationRecord) {
        let mut text = format!("{} with {trouble:?}:\n", self.variant.name);
        for line in wrong {
            let _ = writeln!(text, "  {line}");
        }
        let steps: Vec<String> = operation
            .steps
            .iter()
            .map(|step| format!("{} {} {}", step.kind, step.state, step.message))
            .collect();
        let _ = writeln!(
            text,
            "  {} {:?} {steps:?}",
            operation.state, operation.error
        );
        self.failures.push(text);
    }

    /// Taking back fails at a step: the server is in ERROR, the fault says what is left, and there is
    /// a way out.
    fn check_fault(&mut self, index: usize) {
        self.cases += 1;
        self.host.restore(&self.saved);
        let plot = Plot::new(&[(self.last_turn(), FAIL), (Point::BeforeRevert(index), FAIL)]);
        let probe: Arc<dyn Probe> = plot;
        let kind = self.plan.steps[index].step.kind();
        let wrong: Vec<String> = runtime().block_on(async {
            let mut wrong = Vec::new();
            let mut expect = |what: &str, right: bool| {
                if !right {
                    wrong.push(what.to_owned());
                }
            };
            {
                let agent = self.host.agent(probe).await;
                let accept = Accept {
                    plan: Arc::clone(&self.plan),
                    request: anonymous(),
                    planned_for: agent.store.server(SERVER),
                    now_ms: 1,
                };
                agent.engine.submit(accept).await.unwrap();
                let operation = agent.ended(self.plan.id).await;
                expect("it failed", operation.state == OperationState::Failed);
                let reason = operation.error.map(|error| error.reason);
                expect("for the roll-back", reason == Some(Reason::RollbackFailed));
                let record = agent.record();
                expect("ERROR", record.vm_state == VmState::Error);
                expect(
                    "no task",
                    record.task_state.is_none() && record.operation.is_none(),
                );
                let fault = record.fault.clone().unwrap();
                expect("the fault names the step", fault.revert_step == kind);
                expect(
                    "the fault names what is left",
                    !fault.left_behind.is_empty(),
                );
                if record.rescue.is_some() && index.is_multiple_of(2) {
                    let record = record.rescue.clone().unwrap();
                    let mut args = unrescue();
                    if !record.overlays.is_empty() {
                        args.overlay = Some(if record.commit_started {
                            OverlayDisposition::Commit
                        } else {
                            OverlayDisposition::Discard
                        });
                    }
                    let original = agent.store.saved_definition(SERVER).await.unwrap();
                    agent.succeed(ON, Action::Unrescue(args)).await;
                    let seen = self.host.look(&agent).await;
                    expect(
                        "the definition is back",
                        seen.inactive == original && original.is_some(),
                    );
                    expect("it runs", seen.live.is_some());
                }
                agent.succeed(ON, Action::Delete).await;
            }
            let agent = self.host.agent(Arc::new(NoProbe)).await;
            let seen = self.host.look(&agent).await;
            expect("no record", seen.record.is_none());
            expect("no domain", seen.power.is_none());
            expect("no saved definition", seen.saved.is_none());
            expect("nobody holds an image", seen.holders.is_empty());
            let files = |seen: &Seen| -> Vec<String> {
                let keep = |name: &&String| !name.starts_with("state/servers/");
                seen.files.keys().filter(keep).cloned().collect()
            };
            let kept: Vec<String> = seen.files.keys().cloned().collect();
            expect(&format!("no files: {kept:?}"), kept == files(&self.before));
            wrong
        });
        if !wrong.is_empty() {
            let plan = &self.plan;
            let text = format!(
                "{}: fault at {index} ({kind}) of {}: {wrong:?}",
                self.variant.name, plan.id
            );
            self.failures.push(text);
        }
    }

    /// Everything that can happen to the plan.
    fn check_all(&mut self, points: &[Point], calls: usize) {
        if self.plan.record_change().is_some() {
            // It has ended when it is accepted: there is nothing between.
            assert!(points.is_empty());
            self.check(&Trouble::At(Vec::new()), Expected::Done);
            return;
        }
        let first_clean_up = self.plan.steps_before_commit();
        let before_commit = |point: &Point| match point {
            Point::BeforeStep(index) | Point::AfterStep(index) => *index < first_clean_up,
            Point::BeforeCommit => true,
            _ => false,
        };
        let last_turn = self.last_turn();
        let turns = points.iter().position(|point| *point == last_turn).unwrap();
        for (at, point) in points.iter().enumerate() {
            self.check(&Trouble::At(vec![(*point, Event::Die)]), Expected::Done);
            if at > turns {
                self.check(&Trouble::At(vec![(*point, FAIL)]), Expected::Done);
                self.check(&Trouble::At(vec![(*point, Event::Cancel)]), Expected::Done);
                continue;
            }
            self.check(
                &Trouble::At(vec![(*point, Event::Cancel)]),
                Expected::Either,
            );
            let seen = self.check(&Trouble::At(vec![(*point, FAIL)]), Expected::Before);
            let reverting = seen.iter().skip_while(|at| *at != point).skip(1);
            for revert in reverting.filter(|at| !before_commit(at)) {
                let events = vec![(*point, FAIL), (*revert, Event::Die)];
                self.check(&Trouble::At(events), Expected::Before);
            }
        }
        for n in 0..calls {
            self.check(&Trouble::DiesAfterCall(n), Expected::Done);
            self.check(&Trouble::DiesWithinCall(n + 1), Expected::Done);
            self.check(&Trouble::LosesLinkAfterCall(n), Expected::Done);
            self.check(&Trouble::LosesLinkWithinCall(n + 1), Expected::Done);
        }
        for index in 0..first_clean_up {
            let planned = &self.plan.steps[index];
            if planned.phase == Phase::Prepare && planned.step.kind() != "SaveDefinition" {
                // It fails, and something is left behind until the agent starts next.
                let revert = (Point::BeforeRevert(index), FAIL);
                let events = vec![(last_turn, FAIL), revert];
                self.check(&Trouble::At(events), Expected::Before);
            } else {
                self.check_fault(index);
            }
        }
    }
}

/// Never ends: each time the link is lost, it comes back a moment later.
async fn bring_link_back(agent: &Agent) {
    let mut link = agent.fake.link();
    loop {
        let down = link.wait_for(|link| *link != LinkState::Up).await.is_ok();
        assert!(down, "the sender lives as long as the agent");
        tokio::time::sleep(Duration::from_millis(5)).await;
        agent.fake.set_link(LinkState::Up);
    }
}

/// What was applied is found to be so: doing it again would do no harm, but stop a guest twice.
#[test]
fn a_step_that_was_applied_before_the_agent_died_is_not_applied_again() {
    let variant = variants()
        .into_iter()
        .find(|variant| variant.name == "rescue, classic, running");
    let (mut trial, _, calls) = Trial::new(variant.unwrap());
    for index in 0..trial.plan.steps.len() {
        trial.host.restore(&trial.saved);
        let before = trial.host.fake.calls().len();
        let plot = Plot::new(&[(Point::AfterStep(index), Event::Die)]);
        assert!(trial.live(&Trouble::At(Vec::new()), &plot).is_none());
        let (operation, _) = trial.live_on();
        assert_eq!(
            (operation.state, operation.recoveries),
            (OperationState::Done, 1)
        );
        let changes = |call: &&String| {
            ["define ", "start ", "destroy ", "shutdown "]
                .iter()
                .any(|name| call.starts_with(name))
        };
        let calls_now = trial.host.fake.calls();
        let changed: Vec<_> = calls_now[before..].iter().filter(changes).collect();
        assert_eq!(changed.len(), 3, "after step {index}: {changed:?}");
    }
    assert!(calls > 3);
}

#[test]
fn whatever_happens_to_a_plan_it_ends_done_or_as_before() {
    let queue: Mutex<VecDeque<Variant>> = Mutex::new(variants().into());
    let report = Mutex::new(Vec::new());
    let failures = Mutex::new(Vec::new());
    let total = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                loop {
                    let Some(variant) = queue.lock().unwrap().pop_front() else {
                        return;
                    };
                    let (mut trial, points, calls) = Trial::new(variant);
                    trial.check_all(&points, calls);
                    total.fetch_add(trial.cases, Ordering::SeqCst);
                    let (verb, name) = (trial.plan.verb, trial.variant.name);
                    report
                        .lock()
                        .unwrap()
                        .push(format!("crash cases: {verb} ({name}): {}", trial.cases));
                    failures.lock().unwrap().append(&mut trial.failures);
                }
            });
        }
    });
    let mut report = report.into_inner().unwrap();
    report.sort();
    report.push(format!("crash cases: {} in all", total.into_inner()));
    let report = report.join("\n");
    println!("{report}");
    let target = concat!(env!("CARGO_MANIFEST_DIR"), "/../target");
    fs::create_dir_all(target).unwrap();
    fs::write(format!("{target}/crash-cases.txt"), report + "\n").unwrap();
    let failures = failures.into_inner().unwrap();
    assert!(
        failures.is_empty(),
        "{} cases went wrong; the first:\n{}",
        failures.len(),
        failures.iter().take(15).cloned().collect::<String>()
    );
}
