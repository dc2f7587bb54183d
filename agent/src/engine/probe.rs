// SPDX-License-Identifier: Apache-2.0
//! Crash points: places where a test makes an operation fail, be cancelled, or the agent die.

use crate::core::{plan::Plan, reason::Reason};

/// A place in the life of an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Point {
    /// Step noted as begun, not applied.
    BeforeStep(usize),
    /// Step applied, not noted as done.
    AfterStep(usize),
    /// Step noted as being taken back, not taken back.
    BeforeRevert(usize),
    /// Step taken back, not noted.
    AfterRevert(usize),
    /// Every step before the outcome is done, the outcome does not stand.
    BeforeCommit,
    /// The outcome stands.
    AfterCommit,
    /// Everything is done, the lane is still taken.
    BeforeFinish,
}

/// What happens there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// Nothing.
    Go,
    /// The step fails (before it is applied, or although it was).
    Fail(Reason),
    /// Somebody cancels the operation.
    Cancel,
    /// The agent dies: nothing more is written.
    Die,
}

/// Decides what happens at a point. Outside of tests, nothing ever does.
pub trait Probe: Send + Sync + 'static {
    /// What happens at `point` of `plan`.
    fn at(&self, plan: &Plan, point: Point) -> Event;
}

/// Nothing happens anywhere.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoProbe;

impl Probe for NoProbe {
    fn at(&self, _plan: &Plan, _point: Point) -> Event {
        Event::Go
    }
}

/// The crash points of the real daemon, in builds for tests: `SALVOR_FAILPOINT=VERB:WHERE[:INDEX]:WHAT`
/// with WHERE one of `before-step`, `after-step`, `before-revert`, `after-revert`, `before-commit`,
/// `after-commit`, `before-finish` and WHAT one of `kill` (SIGKILL to the agent itself), `fail` and `cancel`.
/// Several are separated by commas.
#[cfg(feature = "failpoints")]
#[derive(Debug, Clone, Default)]
pub struct EnvProbe {
    points: Vec<(String, Point, Event)>,
}

#[cfg(feature = "failpoints")]
impl EnvProbe {
    /// Reads the environment. A point that cannot be read is an error in the test, and said so.
    ///
    /// # Errors
    /// The part that cannot be read.
    pub fn from_env() -> Result<Self, String> {
        let text = std::env::var("SALVOR_FAILPOINT").unwrap_or_default();
        let mut points = Vec::new();
        for part in text.split(',').filter(|part| !part.is_empty()) {
            points.push(Self::parse(part).ok_or_else(|| part.to_owned())?);
        }
        Ok(Self { points })
    }

    fn parse(part: &str) -> Option<(String, Point, Event)> {
        let mut words = part.split(':');
        let verb = words.next()?.to_owned();
        let place = words.next()?;
        let mut index = || words.next()?.parse::<usize>().ok();
        let point = match place {
            "before-step" => Point::BeforeStep(index()?),
            "after-step" => Point::AfterStep(index()?),
            "before-revert" => Point::BeforeRevert(index()?),
            "after-revert" => Point::AfterRevert(index()?),
            "before-commit" => Point::BeforeCommit,
            "after-commit" => Point::AfterCommit,
            "before-finish" => Point::BeforeFinish,
            _ => return None,
        };
        let event = match words.next()? {
            "kill" => Event::Die,
            "fail" => Event::Fail(Reason::Internal),
            "cancel" => Event::Cancel,
            _ => return None,
        };
        words.next().is_none().then_some((verb, point, event))
    }
}

#[cfg(feature = "failpoints")]
impl Probe for EnvProbe {
    fn at(&self, plan: &Plan, point: Point) -> Event {
        for (verb, at, event) in &self.points {
            if verb != plan.verb.name() || *at != point {
                continue;
            }
            if *event == Event::Die {
                // Not an exit: nothing may be flushed, dropped or said on the way out.
                let _ = nix::sys::signal::kill(
                    nix::unistd::Pid::this(),
                    nix::sys::signal::Signal::SIGKILL,
                );
            }
            return *event;
        }
        Event::Go
    }
}
