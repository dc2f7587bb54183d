// SPDX-License-Identifier: Apache-2.0
//! What happened: how verbs ended, what was done to the host meanwhile, and what should not have happened.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use uuid::Uuid;

/// So long after a disturbance is over its consequences may still be met.
const AFTERMATH: Duration = Duration::from_secs(3);

/// So many defects are told in full.
const TOLD: usize = 50;

/// What is done to the host behind the agent's back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Disturbance {
    /// The agent is killed.
    AgentKilled,
    /// The agent is asked to stop, and started again.
    AgentStopped,
    /// libvirtd is killed.
    LibvirtdKilled,
    /// A guest's QEMU is killed.
    QemuKilled(Uuid),
    /// Somebody starts, ends, pauses, resumes or saves a guest with libvirt.
    Outside(Uuid, &'static str),
}

impl Disturbance {
    fn name(self) -> String {
        match self {
            Self::AgentKilled => "agent killed".to_owned(),
            Self::AgentStopped => "agent restarted in order".to_owned(),
            Self::LibvirtdKilled => "libvirtd killed".to_owned(),
            Self::QemuKilled(_) => "QEMU killed".to_owned(),
            Self::Outside(_, what) => format!("outside {what}"),
        }
    }
}

/// Why something did not go as asked, as far as the soak itself is the cause.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Excuse {
    /// The agent was away, or had just come.
    pub(super) agent: bool,
    /// libvirtd was away, or had just come.
    pub(super) libvirtd: bool,
    /// Somebody laid hands on the guest.
    pub(super) guest: bool,
}

/// How an action ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Ending {
    Done,
    Refused(String),
    Failed(String),
    Cancelled,
}

#[derive(Debug, Default)]
struct Counts {
    done: u32,
    refused: u32,
    failed: u32,
    cancelled: u32,
    longest: Duration,
}

#[derive(Debug, Default)]
struct Inner {
    verbs: BTreeMap<&'static str, Counts>,
    /// Refusals and failures by reason.
    reasons: BTreeMap<(&'static str, String), u32>,
    disturbances: Vec<(Disturbance, Instant, Option<Instant>)>,
    longest: (Duration, String),
    /// All of what was found, and how much of it is kept.
    found: usize,
    defects: Vec<String>,
}

/// The account of a soak, shared by all that take part in it.
#[derive(Debug, Clone, Default)]
pub(super) struct Tally(Arc<Mutex<Inner>>);

impl Tally {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An action, or a read, has ended.
    pub(super) fn ended(&self, verb: &'static str, ending: &Ending, took: Duration, what: &str) {
        let mut inner = self.inner();
        let counts = inner.verbs.entry(verb).or_default();
        counts.longest = counts.longest.max(took);
        let told = match ending {
            Ending::Done => {
                counts.done += 1;
                None
            }
            Ending::Cancelled => {
                counts.cancelled += 1;
                None
            }
            Ending::Refused(reason) => {
                counts.refused += 1;
                Some(("refused", reason))
            }
            Ending::Failed(reason) => {
                counts.failed += 1;
                Some(("failed", reason))
            }
        };
        if let Some((how, reason)) = told {
            *inner.reasons.entry((how, reason.clone())).or_default() += 1;
        }
        if took > inner.longest.0 {
            inner.longest = (took, what.to_owned());
        }
    }

    /// Something that must not be.
    pub(super) fn defect(&self, what: impl Into<String>) {
        let what = what.into();
        println!("DEFECT: {what}");
        let mut inner = self.inner();
        inner.found += 1;
        if inner.defects.len() < TOLD {
            inner.defects.push(what);
        }
    }

    /// The defects so far.
    pub(super) fn defects(&self) -> Vec<String> {
        let inner = self.inner();
        let mut defects = inner.defects.clone();
        if inner.found > defects.len() {
            defects.push(format!("… and {} more", inner.found - defects.len()));
        }
        defects
    }

    /// A disturbance begins; the number is for [`Self::disturbed`].
    pub(super) fn disturb(&self, what: Disturbance) -> usize {
        let mut inner = self.inner();
        inner.disturbances.push((what, Instant::now(), None));
        inner.disturbances.len() - 1
    }

    /// It is over.
    pub(super) fn disturbed(&self, number: usize) {
        let over = Some(Instant::now());
        if let Some(disturbance) = self.inner().disturbances.get_mut(number) {
            disturbance.2 = over;
        }
    }

    /// What may have troubled something about this server since then.
    pub(super) fn excuse(&self, since: Instant, server: Uuid) -> Excuse {
        let mut excuse = Excuse::default();
        for (what, _, over) in &self.inner().disturbances {
            if over.is_some_and(|over| over + AFTERMATH < since) {
                continue;
            }
            match what {
                Disturbance::AgentKilled | Disturbance::AgentStopped => excuse.agent = true,
                Disturbance::LibvirtdKilled => excuse.libvirtd = true,
                Disturbance::QemuKilled(id) | Disturbance::Outside(id, _) if *id == server => {
                    excuse.guest = true;
                }
                Disturbance::QemuKilled(_) | Disturbance::Outside(..) => {}
            }
        }
        excuse
    }

    /// One line: where things are.
    pub(super) fn progress(&self) -> String {
        let inner = self.inner();
        let sum = |of: fn(&Counts) -> u32| inner.verbs.values().map(of).sum::<u32>();
        let kills = |is: fn(&Disturbance) -> bool| {
            inner
                .disturbances
                .iter()
                .filter(|(what, ..)| is(what))
                .count()
        };
        format!(
            "{} done, {} refused, {} failed, {} cancelled; killed: agent {}, libvirtd {}, QEMU {}; {} defects",
            sum(|counts| counts.done),
            sum(|counts| counts.refused),
            sum(|counts| counts.failed),
            sum(|counts| counts.cancelled),
            kills(|what| matches!(what, Disturbance::AgentKilled)),
            kills(|what| matches!(what, Disturbance::LibvirtdKilled)),
            kills(|what| matches!(what, Disturbance::QemuKilled(_))),
            inner.found
        )
    }

    /// The table for the end.
    pub(super) fn table(&self) -> String {
        let inner = self.inner();
        let mut text = String::new();
        let mut line = |what: std::fmt::Arguments<'_>| writeln!(text, "{what}").expect("a string");
        line(format_args!(
            "{:<20} {:>7} {:>8} {:>7} {:>10} {:>10}",
            "", "done", "refused", "failed", "cancelled", "longest"
        ));
        for (verb, counts) in &inner.verbs {
            line(format_args!(
                "{verb:<20} {:>7} {:>8} {:>7} {:>10} {:>8.2} s",
                counts.done,
                counts.refused,
                counts.failed,
                counts.cancelled,
                counts.longest.as_secs_f64()
            ));
        }
        line(format_args!(
            "longest of all: {} ({:.2} s)",
            inner.longest.1,
            inner.longest.0.as_secs_f64()
        ));
        for ((how, reason), count) in &inner.reasons {
            line(format_args!("{count:>7} {how} with {reason}"));
        }
        let mut disturbances: BTreeMap<String, u32> = BTreeMap::new();
        for (what, ..) in &inner.disturbances {
            *disturbances.entry(what.name()).or_default() += 1;
        }
        for (what, count) in disturbances {
            line(format_args!("{count:>7} × {what}"));
        }
        text
    }
}
