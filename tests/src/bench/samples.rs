// SPDX-License-Identifier: Apache-2.0
//! Samples of one operation by one peer: how long each call took, and how much CPU.

use std::time::Duration;

use serde_json::{Value, json};

/// Times of calls, in order of their making, and the CPU time that all of them took.
#[derive(Debug, Clone, Default)]
pub struct Samples {
    times: Vec<Duration>,
    cpu: Duration,
    cpu_of: u32,
}

impl Samples {
    /// Adds a call.
    pub fn add(&mut self, took: Duration) {
        self.times.push(took);
    }

    /// Adds the CPU time that `calls` calls took together.
    pub fn add_cpu(&mut self, cpu: Duration, calls: u32) {
        self.cpu += cpu;
        self.cpu_of += calls;
    }

    /// How many calls there were.
    pub fn count(&self) -> usize {
        self.times.len()
    }

    /// The smallest time that `percent` of the calls did not exceed (the nearest rank), zero without calls.
    pub fn percentile(&self, percent: usize) -> Duration {
        let mut sorted = self.times.clone();
        sorted.sort_unstable();
        let rank = (sorted.len() * percent).div_ceil(100).max(1);
        sorted.get(rank - 1).copied().unwrap_or_default()
    }

    /// The median.
    pub fn p50(&self) -> Duration {
        self.percentile(50)
    }

    /// What 99 of 100 calls did not exceed; the slowest one if there are fewer than 100.
    pub fn p99(&self) -> Duration {
        self.percentile(99)
    }

    /// CPU time of one call, if it was measured.
    pub fn cpu(&self) -> Option<Duration> {
        (self.cpu_of > 0).then(|| self.cpu / self.cpu_of)
    }

    /// Everything, with every sample in microseconds.
    pub fn json(&self) -> Value {
        let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        json!({
            "count": self.count(),
            "p50_us": micros(self.p50()),
            "p99_us": micros(self.p99()),
            "cpu_us_per_call": self.cpu().map(micros),
            "samples_us": self.times.iter().copied().map(micros).collect::<Vec<_>>(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_of_the_nearest_rank() {
        let mut samples = Samples::default();
        assert_eq!(samples.p50(), Duration::ZERO);
        for millis in [5, 1, 4, 2, 3] {
            samples.add(Duration::from_millis(millis));
        }
        assert_eq!(samples.p50(), Duration::from_millis(3));
        assert_eq!(samples.p99(), Duration::from_millis(5));
        assert_eq!(samples.percentile(20), Duration::from_millis(1));
        assert_eq!(samples.percentile(21), Duration::from_millis(2));
    }

    #[test]
    fn cpu_time_is_shared_among_its_calls() {
        let mut samples = Samples::default();
        assert_eq!(samples.cpu(), None);
        samples.add_cpu(Duration::from_millis(30), 2);
        samples.add_cpu(Duration::ZERO, 1);
        assert_eq!(samples.cpu(), Some(Duration::from_millis(10)));
    }
}
