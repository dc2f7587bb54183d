// SPDX-License-Identifier: Apache-2.0
//! Random histories of one server: actions that succeed, fail, are cancelled or cannot be taken back,
//! and observations. The host is a small model of what steps do to the real one.

use std::collections::BTreeSet;

use proptest::prelude::*;
use salvor_agent::core::{
    action::{
        Action, AdoptArgs, ChangePasswordArgs, LockArgs, RebootArgs, ResetTo, UnrescueArgs, Verb,
    },
    admission::{admit as admit_for, permit},
    caller::{Role as AskerRole, Who},
    change::FieldChange,
    facts::{DomainFacts, Facts},
    image::ImageFormat,
    operation::HostReport,
    plan::{Mark, Outcome, Phase, Plan, PlannedStep, RescueChange, Step},
    planners::plan,
    reason::{Reason, Refusal},
    reconcile::reconcile,
    record::{
        Fault, Origin, OverlayDisposition, Protection, RescueMode, ServerRecord, SoftDeletion,
    },
    state::{ObservationSource, PowerObservation, PowerState, VmState},
};
use salvor_domain_templates::{Domain, Role};
use uuid::Uuid;

use crate::bench::{
    BASE, NOVA, RESCUE, create_args, domain, facts, fixture, hash, image, rescue_args,
    same_references, templates, unrescue_args,
};

/// What a step can change.
#[derive(Debug, Clone, Default, PartialEq)]
struct Host {
    defined: Option<String>,
    /// The definition that the running guest was started with.
    running: Option<String>,
    saved: Option<(Uuid, String)>,
    files: BTreeSet<String>,
    holders: BTreeSet<String>,
    /// The running guest's CPUs are stopped.
    paused: bool,
    /// The definition of the guest whose memory was saved.
    memory: Option<String>,
}

fn is_rescue(xml: &str) -> bool {
    let mark = Domain::parse(xml).unwrap().salvor_mark();
    mark.is_some_and(|mark| mark.role == Role::Rescue)
}

fn mark_of(xml: &str) -> Option<String> {
    Some(Domain::parse(xml).unwrap().salvor_mark()?.plan)
}

impl Host {
    fn apply(&mut self, plan: &Plan, step: &Step, record: &mut Option<ServerRecord>) {
        match step {
            Step::HoldImage { holder, .. } => {
                self.holders.insert(holder.clone());
            }
            Step::MakeFolder { path }
            | Step::CreateOverlay { path, .. }
            | Step::CopyFile { to: path, .. }
            | Step::BuildConfigDrive { path, .. } => {
                self.files.insert(path.clone());
            }
            Step::SaveDefinition { xml } => {
                // Whatever becomes of it: the way back is written once.
                assert_eq!(self.saved, None, "a saved definition is never overwritten");
                assert!(!is_rescue(xml), "the way back is the server's own");
                self.saved = Some((plan.id, xml.clone()));
            }
            Step::PowerOff { .. } => self.end(),
            Step::ReserveNote { .. } => {}
            Step::NoteOwners { note, .. } => {
                assert_eq!(self.running, None, "the owners are those without a guest");
                self.files.insert(note.clone());
            }
            Step::PutOwnersBack { .. } => {
                assert_eq!(self.running, None, "no guest needs the disks");
            }
            Step::MarkCommitStarted => {
                let rescue = record.as_mut().and_then(|record| record.rescue.as_mut());
                rescue.unwrap().commit_started = true;
            }
            Step::CommitOverlay { path, .. } | Step::EmptyOverlay { path, .. } => {
                assert!(self.files.contains(path), "{path}");
            }
            Step::DefineDomain { xml, .. } => self.defined = Some(xml.clone()),
            Step::UndefineDomain { .. } => {
                self.defined = None;
                self.memory = None;
            }
            Step::StartDomain { mark, .. } => {
                assert_eq!(self.running, None, "nothing runs that is in the way");
                let xml = self.defined.clone().expect("there is something to start");
                match mark {
                    Mark::Own => assert!(!is_rescue(&xml)),
                    Mark::Plan(id) => assert_eq!(mark_of(&xml), Some(id.to_string())),
                }
                self.running = Some(xml);
                self.memory = None;
            }
            Step::DropSavedMemory => {
                assert_eq!(self.running, None);
                self.memory = None;
            }
            Step::Pause { .. } => self.paused = true,
            Step::Unpause => self.paused = false,
            Step::SaveMemory { .. } => {
                self.memory = Some(self.running.clone().expect("there is a guest to save"));
                self.end();
            }
            Step::RestoreMemory { .. } => {
                if self.running.is_none() {
                    let memory = self.memory.take();
                    self.running = Some(memory.expect("there is memory to bring back"));
                }
                self.paused = false;
            }
            Step::SetGuestTime => {}
            Step::InjectNmi => assert!(self.running.is_some()),
            Step::DumpMemory { path, .. } => {
                assert!(self.running.is_some());
                self.files.insert(path.clone());
            }
            Step::SetUserPassword { .. } => assert!(self.running.is_some()),
            Step::RemoveFolder { path } => {
                let inside = format!("{path}/");
                self.files
                    .retain(|file| file != path && !file.starts_with(&inside));
            }
            Step::ReleaseImage { holder, .. } => {
                self.holders.remove(holder);
            }
            Step::DropSavedDefinition => self.saved = None,
            Step::KnowDefinition { xml } => {
                assert!(!is_rescue(xml), "what is known is the server's own");
            }
        }
    }

    fn revert(&mut self, plan: &Plan, step: &Step) {
        match step {
            Step::HoldImage { holder, .. } => {
                self.holders.remove(holder);
            }
            Step::MakeFolder { path }
            | Step::CreateOverlay { path, .. }
            | Step::CopyFile { to: path, .. }
            | Step::BuildConfigDrive { path, .. }
            | Step::DumpMemory { path, .. }
            | Step::NoteOwners { note: path, .. } => {
                self.files.remove(path);
            }
            Step::Pause { was_running } => self.paused &= !was_running,
            Step::Unpause => self.paused = self.running.is_some(),
            Step::SaveMemory { .. } => self.running = self.memory.take(),
            Step::RestoreMemory { .. } => panic!("a step that is final is not taken back"),
            Step::SaveDefinition { .. } => {
                if self
                    .saved
                    .as_ref()
                    .is_some_and(|(owner, _)| *owner == plan.id)
                {
                    self.saved = None;
                }
            }
            Step::PowerOff { was_on, .. } => {
                if *was_on && self.running.is_none() {
                    self.running.clone_from(&self.defined);
                }
            }
            Step::DefineDomain { before, .. } => self.defined.clone_from(before),
            Step::UndefineDomain { before, .. } => self.defined = Some(before.clone()),
            Step::StartDomain { .. } => self.end(),
            Step::MarkCommitStarted
            | Step::ReserveNote { .. }
            | Step::PutOwnersBack { .. }
            | Step::CommitOverlay { .. }
            | Step::EmptyOverlay { .. }
            | Step::DropSavedMemory
            | Step::SetUserPassword { .. }
            | Step::RemoveFolder { .. }
            | Step::ReleaseImage { .. }
            | Step::SetGuestTime
            | Step::InjectNmi
            | Step::DropSavedDefinition
            | Step::KnowDefinition { .. } => {}
        }
    }

    fn end(&mut self) {
        self.running = None;
        self.paused = false;
    }
}

/// As the administrator.
fn admit(verb: Verb, server: &ServerRecord) -> Result<(), Refusal> {
    admit_for(verb, server, &Who::default(), 0)
}

/// The administrator, or a member of the project that servers are made for.
fn asker(choice: u8) -> Who {
    Who {
        role: AskerRole::ALL[usize::from(choice / 64 % 2)],
        user: "u".to_owned(),
        project: "p".to_owned(),
    }
}

/// How an action ends.
#[derive(Debug, Clone, Copy)]
enum End {
    Succeeds,
    /// After so many steps (modulo their number) it is taken back.
    TakenBack(usize),
    /// After so many steps it is taken back, which fails after so many steps.
    Stuck(usize, usize),
}

#[derive(Debug, Clone)]
enum Event {
    Act(Verb, u8, End),
    GuestPowersOff,
    SomebodyStarts,
    LinkLost,
    Seen,
}

fn events() -> impl Strategy<Value = Vec<Event>> {
    let end = prop_oneof![
        4 => Just(End::Succeeds),
        2 => any::<usize>().prop_map(End::TakenBack),
        1 => (any::<usize>(), any::<usize>()).prop_map(|(at, stuck)| End::Stuck(at, stuck)),
    ];
    let verb = proptest::sample::select(Verb::ALL);
    let event = prop_oneof![
        8 => (verb, any::<u8>(), end).prop_map(|(verb, choice, end)| Event::Act(verb, choice, end)),
        1 => Just(Event::GuestPowersOff),
        1 => Just(Event::SomebodyStarts),
        1 => Just(Event::LinkLost),
        2 => Just(Event::Seen),
    ];
    proptest::collection::vec(event, 1..30)
}

/// A server's life.
struct World {
    host: Host,
    record: Option<ServerRecord>,
    /// The definition that the server has to come back to.
    own: Option<String>,
    clock: i64,
    plans: u128,
}

impl World {
    /// With a domain that somebody made, or with an empty host.
    fn new(foreign: bool) -> Self {
        let xml = foreign.then(|| fixture("virt-manager").to_owned());
        Self {
            host: Host {
                defined: xml.clone(),
                running: xml.clone(),
                ..Host::default()
            },
            record: None,
            own: xml,
            clock: 10_000,
            plans: 0,
        }
    }

    fn power(&self) -> PowerState {
        match (&self.host.defined, &self.host.running) {
            (_, Some(_)) if self.host.paused => PowerState::Paused,
            (_, Some(_)) => PowerState::Running,
            (Some(_), None) => PowerState::Shutdown,
            (None, None) => PowerState::NoState,
        }
    }

    fn action(&self, verb: Verb, choice: u8) -> Action {
        match verb {
            Verb::Create => {
                let mut args = create_args();
                args.uefi = choice.is_multiple_of(2);
                args.powered_off = choice.is_multiple_of(3);
                Action::Create(Box::new(args))
            }
            Verb::Adopt => Action::Adopt(AdoptArgs { name: None }),
            Verb::Release => Action::Release,
            Verb::Delete => Action::Delete,
            Verb::Start => Action::Start,
            Verb::Stop => Action::Stop(NOVA),
            Verb::Rescue => {
                let mut args = rescue_args();
                args.mode = [None, Some(RescueMode::Classic), Some(RescueMode::Stable)]
                    [usize::from(choice % 3)];
                args.protection = Protection::ALL[usize::from(choice / 3 % 3)];
                Action::Rescue(Box::new(args))
            }
            Verb::Unrescue => Action::Unrescue(UnrescueArgs {
                restore_power: choice.is_multiple_of(2),
                ..self.sane_unrescue(choice)
            }),
            Verb::DeliverPassword => Action::DeliverPassword,
            Verb::Reboot => Action::Reboot(RebootArgs {
                shutdown: NOVA,
                or_fail: choice.is_multiple_of(2),
            }),
            Verb::HardReboot => Action::HardReboot,
            Verb::Pause => Action::Pause,
            Verb::Unpause => Action::Unpause,
            Verb::Suspend => Action::Suspend,
            Verb::Resume => Action::Resume,
            Verb::CrashDump => Action::CrashDump,
            Verb::DumpMemory => Action::DumpMemory,
            Verb::ChangePassword => Action::ChangePassword(ChangePasswordArgs {
                user: None,
                password: hash(),
            }),
            Verb::Lock => Action::Lock(LockArgs {
                reason: Some(choice.to_string()),
                expires_in_ms: choice.is_multiple_of(3).then_some(20),
            }),
            Verb::Unlock => Action::Unlock {
                only_expired: choice.is_multiple_of(4),
            },
            Verb::ResetState => Action::ResetState(ResetTo::ALL[usize::from(choice % 2)]),
            Verb::SoftDelete => Action::SoftDelete,
            Verb::Restore => Action::Restore,
            Verb::ForceDelete => Action::ForceDelete,
            Verb::Update => Action::Update(vec![FieldChange::Name(format!("web-{choice}"))]),
            Verb::AcceptDrift => Action::AcceptDrift,
            Verb::RestoreDefinition => Action::RestoreDefinition,
            Verb::StartRescue => Action::StartRescue,
        }
    }

    /// The overlays are decided about as they have to be.
    fn sane_unrescue(&self, choice: u8) -> UnrescueArgs {
        let rescue = self
            .record
            .as_ref()
            .and_then(|record| record.rescue.as_ref());
        let overlay = rescue
            .filter(|rescue| !rescue.overlays.is_empty())
            .map(|rescue| {
                if rescue.commit_started || choice > 100 {
                    OverlayDisposition::Commit
                } else {
                    OverlayDisposition::Discard
                }
            });
        UnrescueArgs {
            overlay,
            ..unrescue_args()
        }
    }

    fn facts(&self, verb: Verb, choice: u8) -> Facts {
        let image = match verb {
            Verb::Create => Some(image(BASE, "base", ImageFormat::Qcow2)),
            Verb::Rescue => Some(image(RESCUE, "rescue", ImageFormat::Qcow2)),
            _ => None,
        };
        let power = self.power();
        let domain = self.host.defined.as_ref().map(|xml| DomainFacts {
            managed_save: self.host.memory.is_some(),
            ..domain(xml, power)
        });
        let mut facts = facts(domain, image);
        facts.plan = Uuid::from_u128(0x1000 + self.plans);
        facts.host.now_ms = self.clock;
        facts.known_xml.clone_from(&self.own);
        facts.saved_xml = self.host.saved.as_ref().map(|(_, xml)| xml.clone());
        let rescue = self
            .record
            .as_ref()
            .and_then(|record| record.rescue.as_ref());
        facts.commit_references = rescue.map(same_references).unwrap_or_default();
        facts.who = asker(choice);
        facts.host.reclaim_ms = 1_000;
        if verb == Verb::ResetState {
            facts.host_report = Some(HostReport {
                power,
                power_reason: String::new(),
                defined: self.host.defined.is_some(),
                rescue_domain: self.host.defined.as_deref().is_some_and(is_rescue),
                saved_memory: false,
                missing_disks: [].into(),
                unknown: String::new(),
                at_ms: self.clock,
            });
        }
        facts
    }

    /// Does an action, if it is admitted; what comes out of it is what the store makes of outcomes.
    fn act(&mut self, verb: Verb, choice: u8, end: End) {
        let action = self.action(verb, choice);
        match &self.record {
            None if !matches!(verb, Verb::Create | Verb::Adopt) => return,
            Some(_) if matches!(verb, Verb::Create | Verb::Adopt) => return,
            Some(server) if admit_for(verb, server, &asker(choice), self.clock).is_err() => return,
            None if permit(verb, None, &asker(choice)).is_err() => return,
            None | Some(_) => {}
        }
        self.plans += 1;
        let facts = self.facts(verb, choice);
        let plan = match plan(self.record.as_ref(), &action, &facts, templates()) {
            Ok(plan) => plan,
            Err(refusal) => {
                // Only for what is so on the host or was said by the user.
                let gone = self.host.defined.is_none();
                let fine = match refusal.reason {
                    Reason::DomainNotFound => gone,
                    Reason::ServerExists => !gone && verb == Verb::Create,
                    Reason::DomainUnsupported => {
                        verb == Verb::Adopt || !(choice / 3).is_multiple_of(3)
                    }
                    Reason::NotRescued => verb == Verb::DeliverPassword,
                    Reason::InvalidState => {
                        // Or seen off last: what runs now was not seen yet.
                        let seen = self.record.as_ref().map(|record| record.power.state);
                        let off = !self.power().is_on() || !seen.is_some_and(PowerState::is_on);
                        let paused = self.power() == PowerState::Paused;
                        off || (verb == Verb::Reboot && paused)
                    }
                    Reason::SavedMemory => verb == Verb::Rescue && self.host.memory.is_some(),
                    Reason::NoSavedMemory => verb == Verb::Resume && self.host.memory.is_none(),
                    Reason::GuestAgentUnavailable => verb == Verb::ChangePassword,
                    // Overlays are committed from under the rescue's own domain only.
                    Reason::DomainChanged => {
                        let defined = self.host.defined.as_deref();
                        verb == Verb::Unrescue && !defined.is_some_and(is_rescue)
                    }
                    _ => false,
                };
                assert!(fine, "{verb} was admitted and then refused: {refusal:?}");
                return;
            }
        };
        self.check_plan(&plan);
        // Without a guest their first step fails, and nothing was done.
        let needs_guest = matches!(
            verb,
            Verb::DeliverPassword
                | Verb::Pause
                | Verb::Unpause
                | Verb::Suspend
                | Verb::CrashDump
                | Verb::DumpMemory
                | Verb::ChangePassword
        );
        if needs_guest && self.host.running.is_none() {
            return;
        }
        // Only what is off is started.
        if verb == Verb::StartRescue && self.host.running.is_some() {
            return;
        }
        self.carry_out(&plan, end);
        self.check();
    }

    fn check_plan(&self, plan: &Plan) {
        let phases: Vec<Phase> = plan.steps.iter().map(|planned| planned.phase).collect();
        assert!(phases.is_sorted(), "prepare, switch, clean up: {phases:?}");
        let guest_is_touched = |step: &Step| {
            matches!(
                step,
                Step::PowerOff { .. }
                    | Step::DefineDomain { .. }
                    | Step::UndefineDomain { .. }
                    | Step::DropSavedMemory
                    | Step::StartDomain { .. }
                    | Step::CommitOverlay { .. }
                    | Step::EmptyOverlay { .. }
            )
        };
        for planned in &plan.steps {
            if guest_is_touched(&planned.step) {
                assert_eq!(planned.phase, Phase::Switch, "{:?}", planned.step);
            }
        }
        let text = serde_json::to_string(plan).unwrap();
        let again: Plan = serde_json::from_str(&text).unwrap();
        assert_eq!(again, *plan, "a plan survives the journal");
    }

    fn carry_out(&mut self, plan: &Plan, end: End) {
        let before = (self.host.clone(), self.record.clone());
        if let Some(initial) = &plan.initial {
            self.record = Some(initial.as_ref().clone());
        }
        let switch = plan.steps_before_commit();
        let applied = match end {
            End::Succeeds => switch,
            End::TakenBack(at) | End::Stuck(at, _) => at % (switch + 1),
        };
        // Once a step took effect that is final, the plan only goes forward.
        let is_final = plan.steps[..applied]
            .iter()
            .any(|planned| planned.step.is_final());
        let (end, applied) = if is_final {
            (End::Succeeds, switch)
        } else {
            (end, applied)
        };
        for planned in &plan.steps[..applied] {
            self.host.apply(plan, &planned.step, &mut self.record);
        }
        self.clock += 10;
        // What changes the record alone has ended when it is accepted.
        let end = if plan.record_change().is_some() {
            assert!(plan.steps.is_empty());
            End::Succeeds
        } else {
            end
        };
        match end {
            End::Succeeds => {
                self.commit(plan);
                for planned in &plan.steps[switch..] {
                    self.host.apply(plan, &planned.step, &mut self.record);
                }
            }
            End::TakenBack(_) => {
                self.revert(plan, 0, applied);
                let mut expected = before.0;
                // A paused guest that was ended boots anew: its memory is gone, and it has no reason to wait.
                expected.paused &= !plan.steps[..applied]
                    .iter()
                    .any(|planned| matches!(planned.step, Step::PowerOff { .. }));
                // A hard reboot drops what was saved, which nothing brings back.
                let drops = |planned: &PlannedStep| {
                    matches!(planned.step, Step::StartDomain { fresh: true, .. })
                };
                if plan.verb == Verb::HardReboot && plan.steps[..applied].iter().any(drops) {
                    expected.memory = None;
                }
                assert!(
                    self.host == expected,
                    "{} after {applied} steps: {:#?} instead of {expected:#?}",
                    plan.verb,
                    self.host
                );
                if plan.initial.is_some() {
                    self.record = None;
                }
                let mut record = self.record.clone();
                if let (Some(now), Some(then)) = (&mut record, &before.1)
                    && let (Some(now), Some(then)) = (&mut now.rescue, &then.rescue)
                {
                    now.commit_started = then.commit_started;
                }
                assert_eq!(record, before.1);
                self.settle();
            }
            End::Stuck(_, stuck) => {
                if applied == 0 {
                    self.record = before.1;
                    return;
                }
                let stuck = stuck % applied;
                self.revert(plan, stuck + 1, applied);
                self.fault(plan, &plan.steps[stuck].step);
            }
        }
    }

    fn revert(&mut self, plan: &Plan, from: usize, to: usize) {
        for planned in plan.steps[from..to].iter().rev() {
            self.host.revert(plan, &planned.step);
        }
    }

    fn settle(&mut self) {
        if let Some(record) = &mut self.record {
            record.settled_at_ms = self.clock;
        }
    }

    /// As `Store::commit` does it.
    fn commit(&mut self, plan: &Plan) {
        match &plan.outcome {
            Outcome::Insert(record) => self.record = Some(record.as_ref().clone()),
            Outcome::Remove => self.record = None,
            Outcome::Keep => {}
            Outcome::Change {
                vm_state, rescue, ..
            } => {
                let record = self.record.as_mut().unwrap();
                record.vm_state = *vm_state;
                record.fault = None;
                match rescue {
                    RescueChange::Keep => {}
                    RescueChange::Begin { rescue, .. } => {
                        record.rescue = Some(rescue.as_ref().clone());
                    }
                    RescueChange::End => record.rescue = None,
                    RescueChange::Delivered(_) => {
                        record.rescue.as_mut().unwrap().password_for_agent = None;
                    }
                }
            }
            Outcome::Record(change) => {
                change.apply(self.record.as_mut().unwrap(), self.clock);
                return;
            }
            Outcome::SoftDelete {
                vm_state,
                power,
                fault,
                reclaim_in_ms,
            } => {
                let record = self.record.as_mut().unwrap();
                let after = i64::try_from(*reclaim_in_ms).unwrap();
                record.deletion = Some(SoftDeletion {
                    vm_state: *vm_state,
                    power: *power,
                    fault: fault.clone(),
                    at_ms: self.clock,
                    reclaim_at_ms: self.clock + after,
                });
                record.vm_state = VmState::SoftDeleted;
                record.fault = None;
            }
            Outcome::Restore { vm_state, fault } => {
                let record = self.record.as_mut().unwrap();
                record.deletion = None;
                record.vm_state = *vm_state;
                record.fault.clone_from(fault);
            }
        }
        if let (Some(record), Some((_, power))) = (&mut self.record, plan.power_after()) {
            record.power.state = power;
        }
        self.settle();
    }

    /// As `Store::rolled_back` does it with a fault.
    fn fault(&mut self, plan: &Plan, step: &Step) {
        let saved_by_it = self
            .host
            .saved
            .as_ref()
            .is_some_and(|(owner, _)| *owner == plan.id);
        let Some(record) = self.record.as_mut() else {
            return;
        };
        record.vm_state = VmState::Error;
        record.deletion = None;
        record.fault = Some(Fault {
            reason: Reason::RollbackFailed,
            message: String::new(),
            step: String::new(),
            revert_step: step.kind().to_owned(),
            left_behind: Vec::new(),
            at_ms: self.clock,
        });
        if let Outcome::Change {
            rescue: RescueChange::Begin { rescue, .. },
            ..
        } = &plan.outcome
            && saved_by_it
        {
            record.rescue = Some(rescue.as_ref().clone());
        }
        self.settle();
    }

    fn observe(&mut self, state: PowerState) {
        self.clock += 10;
        let Some(record) = self.record.as_mut() else {
            return;
        };
        let seen = PowerObservation {
            state,
            reason: String::new(),
            observed_at_ms: self.clock,
            source: ObservationSource::Poll,
        };
        if let Some(reconciled) = reconcile(record, seen) {
            record.power = reconciled.power;
            record.last_known_power = reconciled.last_known_power;
            record.vm_state = reconciled.vm_state;
            record.mismatch = reconciled.mismatch;
        }
        self.check();
    }

    fn happen(&mut self, event: &Event) {
        match event {
            Event::Act(verb, choice, end) => self.act(*verb, *choice, *end),
            Event::GuestPowersOff => self.host.end(),
            Event::SomebodyStarts => {
                if self.host.running.is_none() {
                    let memory = self.host.memory.take();
                    self.host.running = memory.or_else(|| self.host.defined.clone());
                }
            }
            Event::LinkLost => self.observe(PowerState::Unknown),
            Event::Seen => self.observe(self.power()),
        }
        // Whatever falls off between two looks is looked at before the next action.
        if matches!(event, Event::GuestPowersOff | Event::SomebodyStarts) {
            self.observe(self.power());
        }
    }

    /// What holds at every time.
    fn check(&mut self) {
        let Some(server) = &self.record else {
            self.own = None;
            return;
        };
        if self.own.is_none() {
            self.own.clone_from(&self.host.defined);
        }
        assert_eq!(admit(Verb::Delete, server), Ok(()), "{server:?}");
        let waits = server.vm_state == VmState::SoftDeleted;
        assert_eq!(server.deletion.is_some(), waits, "{server:?}");
        // In force, or half-way in: the definition to go back to is there, and nothing overwrote it.
        if server.rescue.is_some() {
            let saved = self.host.saved.as_ref().map(|(_, xml)| xml.clone());
            assert_eq!(saved, self.own, "{server:?}");
            // It waits with the server, if that was deleted.
            assert_eq!(admit(Verb::Unrescue, server).is_ok(), !waits, "{server:?}");
            assert!(admit(Verb::Rescue, server).is_err());
        }
        if server.vm_state == VmState::Rescued {
            assert!(server.rescue.is_some());
        }
        if self.host.defined.is_none() {
            return;
        }
        // There is a way on that is not the end: something that is admitted, and then planned.
        let ways = [
            Verb::Start,
            Verb::Stop,
            Verb::Rescue,
            Verb::Unrescue,
            Verb::Resume,
            Verb::Unpause,
            Verb::HardReboot,
            Verb::Restore,
        ];
        let way = ways.into_iter().find(|verb| {
            admit(*verb, server).is_ok() && {
                let action = match verb {
                    Verb::Unrescue => Action::Unrescue(self.sane_unrescue(0)),
                    verb => self.action(*verb, 0),
                };
                let facts = self.facts(*verb, 0);
                plan(Some(server), &action, &facts, templates()).is_ok()
            }
        });
        assert!(way.is_some(), "a dead end: {server:?}");
    }

    /// From wherever it is: back in its own definition, and then gone with everything.
    fn end(&mut self) {
        if self
            .record
            .as_ref()
            .is_some_and(|server| server.rescue.is_some())
        {
            if self
                .record
                .as_ref()
                .is_some_and(|server| server.deletion.is_some())
            {
                self.act(Verb::Restore, 0, End::Succeeds);
            }
            let args = self.sane_unrescue(0);
            let facts = self.facts(Verb::Unrescue, 0);
            self.plans += 1;
            let unrescue = Action::Unrescue(args);
            let back = plan(self.record.as_ref(), &unrescue, &facts, templates()).unwrap();
            self.carry_out(&back, End::Succeeds);
            assert_eq!(self.host.defined, self.own);
            assert_eq!(self.host.running, self.own);
            assert_eq!(self.host.saved, None);
        }
        if let Some(server) = self.record.clone() {
            let delete =
                [Verb::Delete, Verb::ForceDelete][usize::from(self.plans.is_multiple_of(2))];
            self.act(delete, 0, End::Succeeds);
            assert_eq!(self.record, None);
            assert_eq!((&self.host.defined, &self.host.running), (&None, &None));
            assert_eq!(self.host.saved, None);
            assert!(self.host.files.is_empty(), "{:?}", self.host.files);
            // A faulty rescue without a way back may still stand on its image, until the next start.
            let own = |holder: &&String| !holder.contains("/rescue/");
            assert_eq!(self.host.holders.iter().find(own), None, "{server:?}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_history_ends_in_a_dead_end_or_loses_the_way_back(foreign in any::<bool>(), events in events()) {
        let mut world = World::new(foreign);
        // Most histories would begin with refusals otherwise.
        let first = if foreign { Verb::Adopt } else { Verb::Create };
        world.act(first, 0, End::Succeeds);
        prop_assert_eq!(
            world.record.as_ref().map(|record| record.origin),
            Some(if foreign { Origin::Adopted } else { Origin::Created })
        );
        for event in &events {
            world.happen(event);
        }
        world.end();
    }
}
