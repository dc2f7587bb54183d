// SPDX-License-Identifier: Apache-2.0
//! The steps of an operation on standard error: drawn over on a terminal, a line for each change
//! elsewhere, nothing if the program is to be quiet.

use std::time::{Duration, SystemTime};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use salvor_proto::v1::{OperationMetadata, OperationState, OperationStep, StepState};

use crate::{
    output::{
        Ui,
        show::step_word,
        text::{clean, pad, width},
        warn,
    },
    units::{between, show_duration},
};

/// How often a spinner turns.
const TURN: Duration = Duration::from_millis(100);
/// Without a terminal, progress within a step is told when it has grown by so many percent.
const LEAP: u32 = 25;

/// Shows the steps.
#[derive(Debug)]
pub(crate) enum Progress {
    /// Not at all.
    Silent,
    /// Line by line.
    Plain(Seen),
    /// On a terminal.
    Live(Live),
}

/// What was told last.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    steps: Vec<(StepState, u32)>,
    state: Option<OperationState>,
    recoveries: Option<u32>,
    cancelling: bool,
}

/// A line for each step, and what stands in it: drawing the same again would only flicker.
#[derive(Debug)]
pub(crate) struct Live {
    lines: MultiProgress,
    bars: Vec<(ProgressBar, Option<(StepState, String)>)>,
    seen: Seen,
}

impl Progress {
    /// What suits standard error.
    pub(crate) fn new(ui: &Ui) -> Self {
        if ui.quiet() {
            Self::Silent
        } else if ui.live() {
            Self::Live(Live {
                lines: MultiProgress::with_draw_target(ProgressDrawTarget::stderr()),
                bars: Vec::new(),
                seen: Seen::default(),
            })
        } else {
            Self::Plain(Seen::default())
        }
    }

    /// Shows where the operation is.
    pub(crate) fn show(&mut self, now: &OperationMetadata) {
        match self {
            Self::Silent => {}
            Self::Plain(seen) => {
                for line in seen.changes(now) {
                    warn(&line);
                }
                for line in seen.step_changes(&now.steps) {
                    warn(&line);
                }
            }
            Self::Live(live) => live.show(now),
        }
    }

    /// Tells something between the steps.
    pub(crate) fn note(&self, text: &str) {
        match self {
            Self::Silent => {}
            Self::Plain(_) => warn(text),
            Self::Live(live) => {
                // With standard error gone there is nobody to tell.
                let _ = live.lines.println(clean(text));
            }
        }
    }

    /// Stops drawing; what stands there stays.
    pub(crate) fn leave(&self) {
        if let Self::Live(live) = self {
            for (bar, _) in &live.bars {
                bar.abandon();
            }
        }
    }
}

impl Seen {
    /// What has changed with the operation as a whole.
    fn changes(&mut self, now: &OperationMetadata) -> Vec<String> {
        let mut lines = Vec::new();
        if self
            .recoveries
            .is_some_and(|before| now.recoveries > before)
        {
            lines.push("the agent was restarted and goes on with the operation".to_owned());
        }
        self.recoveries = Some(now.recoveries);
        if now.cancel_requested && !self.cancelling {
            self.cancelling = true;
            lines.push("cancelling was asked for".to_owned());
        }
        if self.state != Some(now.state()) {
            self.state = Some(now.state());
            match now.state() {
                OperationState::Reverting => lines.push("taking back what was done".to_owned()),
                OperationState::Cancelled => {
                    lines.push("cancelled; the server is as before".to_owned());
                }
                _ => {}
            }
        }
        lines
    }

    /// A line for each step that has changed.
    fn step_changes(&mut self, steps: &[OperationStep]) -> Vec<String> {
        let mut lines = Vec::new();
        self.steps.resize(steps.len(), (StepState::Pending, 0));
        for ((number, step), seen) in (1_usize..).zip(steps).zip(&mut self.steps) {
            let percent = step.progress_percent.unwrap_or(0);
            let further = step.state() == StepState::Running && percent >= seen.1 + LEAP;
            if step.state() != seen.0 || further {
                *seen = (step.state(), percent);
                lines.push(format!(
                    "[{number}/{}] {}: {}",
                    steps.len(),
                    title(step),
                    state_text(step, SystemTime::now())
                ));
            }
        }
        lines
    }
}

impl Live {
    fn show(&mut self, now: &OperationMetadata) {
        for line in self.seen.changes(now) {
            // With standard error gone there is nobody to tell.
            let _ = self.lines.println(clean(&line));
        }
        while self.bars.len() < now.steps.len() {
            self.bars
                .push((self.lines.add(ProgressBar::new_spinner()), None));
        }
        let total = now.steps.len();
        let widest = now
            .steps
            .iter()
            .map(|step| width(&clean(title(step))))
            .max()
            .unwrap_or(0);
        for ((number, step), (bar, drawn)) in (1_usize..).zip(&now.steps).zip(&mut self.bars) {
            let state = match step.state() {
                StepState::Pending | StepState::Unspecified => String::new(),
                _ => clean(&state_text(step, SystemTime::now())).into_owned(),
            };
            let text = format!("{number:>2}/{total} {}  {state}", pad(title(step), widest));
            let line = Some((step.state(), text.clone()));
            if *drawn == line {
                continue;
            }
            *drawn = line;
            let turning = matches!(step.state(), StepState::Running | StepState::Reverting);
            let sign = match step.state() {
                StepState::Running | StepState::Reverting => "{spinner:.cyan}",
                StepState::Done => "{prefix:.green}",
                StepState::Failed | StepState::RevertFailed => "{prefix:.red}",
                StepState::Reverted => "{prefix:.yellow}",
                StepState::Pending | StepState::Unspecified => "{prefix:.dim}",
            };
            if let Ok(style) = ProgressStyle::with_template(&format!("{sign} {{wide_msg}}")) {
                bar.set_style(style);
            }
            bar.set_prefix(mark(step.state()));
            bar.set_message(text);
            if turning {
                bar.enable_steady_tick(TURN);
            } else {
                bar.disable_steady_tick();
                bar.tick();
            }
        }
    }
}

/// What a step is called: what it does, else its kind.
fn title(step: &OperationStep) -> &str {
    if step.description.is_empty() {
        &step.kind
    } else {
        &step.description
    }
}

fn mark(state: StepState) -> &'static str {
    match state {
        StepState::Done => "✓",
        StepState::Failed | StepState::RevertFailed => "✗",
        StepState::Reverted => "↩",
        _ => "·",
    }
}

/// `done in 0.12 s`, `running 40%`, `failed after 2 s: no space left`.
fn state_text(step: &OperationStep, now: SystemTime) -> String {
    let mut text = step_word(step.state.to_owned());
    match step.state() {
        StepState::Running => {
            if let Some(percent) = step.progress_percent {
                text.push_str(&format!(" {percent}%"));
            }
            let began = between(step.start_time.as_ref(), Some(&now.into()));
            // What has just begun needs no time.
            if let Some(time) = began.filter(|time| time.as_secs() >= 1) {
                text.push_str(&format!(
                    ", {}",
                    show_duration(Duration::from_secs(time.as_secs()))
                ));
            }
        }
        state => {
            if let Some(time) = between(step.start_time.as_ref(), step.end_time.as_ref()) {
                let joint = match state {
                    StepState::Failed | StepState::RevertFailed => "after",
                    _ => "in",
                };
                text.push_str(&format!(" {joint} {}", show_duration(time)));
            }
        }
    }
    if !step.message.is_empty() {
        text.push_str(&format!(": {}", step.message));
    }
    text
}

#[cfg(test)]
mod tests {
    use prost_types::Timestamp;

    use super::*;

    fn step(state: StepState) -> OperationStep {
        OperationStep {
            kind: "CreateOverlay".to_owned(),
            description: "Make the rescue disk".to_owned(),
            state: state.into(),
            start_time: Some(Timestamp {
                seconds: 100,
                nanos: 0,
            }),
            end_time: Some(Timestamp {
                seconds: 100,
                nanos: 120_000_000,
            }),
            ..Default::default()
        }
    }

    #[test]
    fn a_step_is_told_when_it_changes_and_only_then() {
        let mut seen = Seen::default();
        let pending = step(StepState::Pending);
        assert!(
            seen.step_changes(&[pending.clone(), pending.clone()])
                .is_empty()
        );
        let steps = [step(StepState::Done), pending];
        assert_eq!(
            seen.step_changes(&steps),
            ["[1/2] Make the rescue disk: done in 0.12 s"]
        );
        assert!(seen.step_changes(&steps).is_empty());
    }

    #[test]
    fn progress_without_a_terminal_is_told_in_leaps() {
        let mut seen = Seen::default();
        let mut running = step(StepState::Running);
        running.start_time = None;
        let mut told = Vec::new();
        for percent in [0, 10, 24, 25, 30, 70, 90] {
            running.progress_percent = Some(percent);
            told.extend(seen.step_changes(std::slice::from_ref(&running)));
        }
        assert_eq!(told.len(), 3, "{told:?}");
    }

    #[test]
    fn a_restart_and_a_roll_back_are_told_once() {
        let mut seen = Seen::default();
        let mut now = OperationMetadata {
            recoveries: 1,
            ..Default::default()
        };
        assert!(
            seen.changes(&now).is_empty(),
            "a restart before the wait is no news"
        );
        now.recoveries = 2;
        now.set_state(OperationState::Reverting);
        assert_eq!(seen.changes(&now).len(), 2);
        assert!(seen.changes(&now).is_empty());
    }

    #[test]
    fn a_failed_step_says_why() {
        let mut failed = step(StepState::Failed);
        failed.message = "no space left".to_owned();
        assert_eq!(
            state_text(&failed, SystemTime::now()),
            "failed after 0.12 s: no space left"
        );
    }
}
