// SPDX-License-Identifier: Apache-2.0
//! The figures held against their goals, as a table for people and as JSON.

use std::fmt::Write as _;
use std::time::Duration;

use serde_json::{Value, json};

use super::samples::Samples;

/// What an operation's median is to be, measured against that of the peer in its row.
#[derive(Debug, Clone, Copy)]
pub enum Goal {
    /// Nothing in particular.
    None,
    /// At most so many times as long.
    Ratio(f64),
    /// At most so many times as long, and at most so much longer.
    RatioAndExcess(f64, Duration),
    /// At most so much longer.
    Excess(Duration),
    /// At most so long.
    Within(Duration),
    /// The slowest in a hundred at most so long.
    TailWithin(Duration),
    /// The middle at most so much longer, the slowest in a hundred at most so many times as long.
    ExcessAndTail(Duration, f64),
}

/// One operation by two peers.
#[derive(Debug)]
pub struct Row {
    /// The operation.
    pub operation: String,
    /// What the agent is compared with.
    pub base_is: &'static str,
    /// That peer's calls.
    pub base: Samples,
    /// The agent's.
    pub agent: Samples,
    /// What is to be reached.
    pub goal: Goal,
}

/// One figure that is compared with nothing, in a unit of its own.
#[derive(Debug)]
pub struct Figure {
    /// What it is.
    pub what: String,
    /// The figure.
    pub value: f64,
    /// Its unit.
    pub unit: &'static str,
    /// At most this, if there is a goal.
    pub goal: Option<f64>,
}

impl Row {
    fn ratio(&self) -> f64 {
        self.agent.p50().as_secs_f64() / self.base.p50().as_secs_f64()
    }

    fn excess(&self) -> Duration {
        self.agent.p50().saturating_sub(self.base.p50())
    }

    /// By how much the middle is longer than it may be; `None` if it is not.
    fn exceeds(&self, excess: Duration) -> Option<String> {
        over(self.excess(), excess)
    }

    fn goal(&self) -> String {
        match self.goal {
            Goal::None => String::new(),
            Goal::Ratio(ratio) => format!("<= {ratio:.2} x"),
            Goal::RatioAndExcess(ratio, excess) => format!("<= {ratio:.2} x, + {}", text(excess)),
            Goal::Excess(excess) => format!("<= + {}", text(excess)),
            Goal::Within(limit) => format!("<= {}", text(limit)),
            Goal::TailWithin(limit) => format!("p99 <= {}", text(limit)),
            Goal::ExcessAndTail(excess, ratio) => {
                format!("<= + {}, p99 {ratio:.0} x", text(excess))
            }
        }
    }

    /// By how much the goal is missed; `None` if it is met.
    fn missed_by(&self) -> Option<String> {
        let ratio = |limit: f64| over(self.agent.p50(), self.base.p50().mul_f64(limit));
        match self.goal {
            Goal::None => None,
            Goal::Ratio(limit) => ratio(limit),
            Goal::RatioAndExcess(limit, excess) => ratio(limit).or_else(|| self.exceeds(excess)),
            Goal::Excess(excess) => self.exceeds(excess),
            Goal::ExcessAndTail(excess, limit) => self.exceeds(excess).or_else(|| {
                let allowed = self.base.p99().mul_f64(limit);
                over(self.agent.p99(), allowed).map(|by| format!("{by} at p99"))
            }),
            Goal::Within(limit) => over(self.agent.p50(), limit),
            Goal::TailWithin(limit) => over(self.agent.p99(), limit),
        }
    }

    fn verdict(&self) -> String {
        match (self.goal, self.missed_by()) {
            (Goal::None, _) => String::new(),
            (_, None) => "met".to_owned(),
            (_, Some(by)) => format!("MISSED {by}"),
        }
    }

    fn json(&self) -> Value {
        json!({
            "operation": self.operation,
            "compared_with": self.base_is,
            "base": self.base.json(),
            "agent": self.agent.json(),
            "ratio_p50": self.ratio(),
            "goal": self.goal(),
            "missed": self.missed_by(),
        })
    }
}

impl Figure {
    /// By how much the goal is missed; `None` if it is met.
    fn missed_by(&self) -> Option<f64> {
        let goal = self.goal?;
        (self.value > goal).then_some(self.value - goal)
    }

    fn verdict(&self) -> String {
        match (self.goal, self.missed_by()) {
            (None, _) => String::new(),
            (_, None) => "met".to_owned(),
            (_, Some(by)) => format!("MISSED by {by:.3} {}", self.unit),
        }
    }

    fn json(&self) -> Value {
        json!({
            "what": self.what,
            "value": self.value,
            "unit": self.unit,
            "goal": self.goal,
            "missed": self.missed_by(),
        })
    }
}

/// All rows and figures, as a table.
pub fn table(rows: &[Row], figures: &[Figure]) -> String {
    let mut lines = vec![
        [
            "operation",
            "n",
            "against",
            "p50",
            "p99",
            "agent p50",
            "p99",
            "ratio",
            "goal",
            "",
        ]
        .map(str::to_owned)
        .to_vec(),
    ];
    for row in rows {
        lines.push(vec![
            row.operation.clone(),
            row.agent.count().to_string(),
            row.base_is.to_owned(),
            text(row.base.p50()),
            text(row.base.p99()),
            text(row.agent.p50()),
            text(row.agent.p99()),
            format!("{:.3}", row.ratio()),
            row.goal(),
            row.verdict(),
        ]);
    }
    let mut out = aligned(&lines);
    out.push('\n');
    let mut lines = Vec::new();
    for row in rows {
        if let Some(cpu) = row.agent.cpu() {
            let base = row.base.cpu().map(text).unwrap_or_default();
            lines.push(vec![
                format!("CPU of one {}, with children", row.operation),
                text(cpu),
                if base.is_empty() {
                    base
                } else {
                    format!("({}: {base})", row.base_is)
                },
            ]);
        }
    }
    for figure in figures {
        let goal = figure
            .goal
            .map(|goal| format!("<= {goal} {}: {}", figure.unit, figure.verdict()));
        lines.push(vec![
            figure.what.clone(),
            format!("{:.3} {}", figure.value, figure.unit),
            goal.unwrap_or_default(),
        ]);
    }
    out.push_str(&aligned(&lines));
    out
}

/// All rows and figures, for machines.
pub fn json(rows: &[Row], figures: &[Figure]) -> Value {
    json!({
        "operations": rows.iter().map(Row::json).collect::<Vec<_>>(),
        "figures": figures.iter().map(Figure::json).collect::<Vec<_>>(),
    })
}

fn aligned(lines: &[Vec<String>]) -> String {
    let columns = lines.iter().map(Vec::len).max().unwrap_or_default();
    let width = |column: usize| {
        let cells = lines.iter().filter_map(|line| line.get(column));
        cells
            .map(|cell| cell.chars().count())
            .max()
            .unwrap_or_default()
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut out = String::new();
    for line in lines {
        let mut text = String::new();
        for (cell, width) in line.iter().zip(&widths) {
            // Writing to a String cannot fail.
            let _ = write!(text, "{cell:width$}  ");
        }
        out.push_str(text.trim_end());
        out.push('\n');
    }
    out
}

/// By how much a time is above its limit; `None` if it is not.
fn over(time: Duration, limit: Duration) -> Option<String> {
    let more = time.checked_sub(limit).filter(|more| !more.is_zero());
    more.map(|more| format!("by {}", text(more)))
}

fn text(time: Duration) -> String {
    if time < Duration::from_millis(10) {
        format!("{} us", time.as_micros())
    } else {
        format!("{:.1} ms", time.as_secs_f64() * 1e3)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(base_ms: u64, agent_ms: u64, goal: Goal) -> Row {
        let of = |millis| {
            let mut samples = Samples::default();
            samples.add(Duration::from_millis(millis));
            samples
        };
        let operation = "x".to_owned();
        let (base, agent) = (of(base_ms), of(agent_ms));
        Row {
            operation,
            base_is: "raw",
            base,
            agent,
            goal,
        }
    }

    #[test]
    fn goals_are_met_up_to_their_limit_and_missed_beyond() {
        assert_eq!(row(100, 110, Goal::None).verdict(), "");
        assert_eq!(row(100, 110, Goal::Ratio(1.1)).verdict(), "met");
        assert_eq!(
            row(100, 112, Goal::Ratio(1.1)).verdict(),
            "MISSED by 2000 us"
        );
        let both = Goal::RatioAndExcess(1.1, Duration::from_millis(15));
        assert_eq!(row(200, 215, both).verdict(), "met");
        assert_eq!(row(200, 216, both).verdict(), "MISSED by 1000 us");
        assert_eq!(row(100, 115, both).verdict(), "MISSED by 5000 us");
        let within = Goal::Within(Duration::from_millis(8));
        assert_eq!(row(1, 8, within).verdict(), "met");
        assert_eq!(row(1, 9, within).verdict(), "MISSED by 1000 us");
        let tail = Goal::TailWithin(Duration::from_millis(5));
        assert_eq!(row(1, 5, tail).verdict(), "met");
        assert_eq!(row(9, 6, tail).verdict(), "MISSED by 1000 us");
        let excess = Goal::Excess(Duration::from_millis(1));
        assert_eq!(row(1, 2, excess).verdict(), "met");
        assert_eq!(row(1, 4, excess).verdict(), "MISSED by 2000 us");
    }

    #[test]
    fn a_figure_that_misses_its_goal_says_by_how_much() {
        let figure = |value, goal| Figure {
            what: "RSS".to_owned(),
            value,
            unit: "MiB",
            goal,
        };
        assert_eq!(figure(46.0, None).verdict(), "");
        assert_eq!(figure(45.0, Some(45.0)).verdict(), "met");
        let missed = figure(46.25, Some(45.0));
        assert_eq!(missed.verdict(), "MISSED by 1.250 MiB");
        assert_eq!(missed.json()["missed"], 1.25);
    }

    #[test]
    fn the_cpu_of_each_operation_is_in_the_table() {
        let mut list = row(100, 110, Goal::None);
        list.operation = "list of 10".to_owned();
        list.agent.add_cpu(Duration::from_millis(30), 10);
        let table = table(&[list], &[]);
        let line = table.lines().find(|line| line.starts_with("CPU")).unwrap();
        assert!(
            line.contains("list of 10") && line.contains("3000 us"),
            "{line}"
        );
    }
}
