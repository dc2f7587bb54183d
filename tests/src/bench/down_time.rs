// SPDX-License-Identifier: Apache-2.0
//! How long a guest is down: from the end of its QEMU to libvirt's word that the next one runs.
//!
//! The end is seen by looking at `/proc`, the start in what `virsh event` prints with its time. Neither
//! asks libvirt anything, which would disturb what is measured.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use super::process;
use crate::wait::SOON;

const DAY_MS: u128 = 24 * 3600 * 1000;

/// How often it is looked whether QEMU is gone.
const LOOK: Duration = Duration::from_micros(250);

/// Follows the starts of domains. Ends its virsh when dropped.
#[derive(Debug)]
pub struct Starts {
    virsh: Child,
    lines: Receiver<String>,
}

impl Starts {
    /// Begins to follow the libvirt under `uri`.
    pub fn of(uri: &str) -> Self {
        let mut virsh = Command::new("stdbuf")
            .args(["-oL", "virsh", "--quiet", "-c", uri])
            .args(["event", "--event", "lifecycle", "--loop", "--timestamp"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let output = BufReader::new(virsh.stdout.take().unwrap());
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Self { virsh, lines }
    }

    /// Forgets the starts so far.
    pub fn forget(&self) {
        while self.lines.try_recv().is_ok() {}
    }

    /// How long after `gone` the domain `name` was started, after what was forgotten.
    pub fn after(&self, gone: SystemTime, name: &str) -> Duration {
        let deadline = Instant::now() + SOON;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let line = self
                .lines
                .recv_timeout(left)
                .unwrap_or_else(|e| panic!("virsh told of no start of {name}: {e}"));
            if line.contains(name) && line.contains(": Started ") {
                return since(gone, time_of_day(&line));
            }
        }
    }
}

impl Drop for Starts {
    fn drop(&mut self) {
        let _ = self.virsh.kill();
        let _ = self.virsh.wait();
    }
}

/// Looks for the end of a process from now on, and says when it was.
pub fn watch_end(pid: u32) -> JoinHandle<SystemTime> {
    std::thread::spawn(move || {
        let deadline = Instant::now() + SOON;
        while !process::is_gone(pid) {
            assert!(Instant::now() < deadline, "{pid} does not end");
            std::thread::sleep(LOOK);
        }
        SystemTime::now()
    })
}

/// Milliseconds of the day in `2026-11-21 10:00:00.123+0000: event …`.
fn time_of_day(line: &str) -> u128 {
    let time = line.split([' ', '+']).nth(1).unwrap_or_default();
    let fields: Vec<u128> = time
        .split([':', '.'])
        .map(|field| field.parse().unwrap())
        .collect();
    let [hours, minutes, seconds, millis] = fields[..] else {
        panic!("no time in {line:?}");
    };
    ((hours * 60 + minutes) * 60 + seconds) * 1000 + millis
}

fn since(before: SystemTime, time_of_day: u128) -> Duration {
    let epoch = before.duration_since(SystemTime::UNIX_EPOCH).unwrap();
    let millis = (DAY_MS + time_of_day - epoch.as_millis() % DAY_MS) % DAY_MS;
    Duration::from_millis(u64::try_from(millis).unwrap())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_as_virsh_prints_them_also_across_midnight() {
        let line = "1970-01-02 00:00:00.250+0000: event 'lifecycle' for domain 'x': Started Booted";
        assert_eq!(time_of_day(line), 250);
        let before = SystemTime::UNIX_EPOCH + Duration::from_millis(24 * 3600 * 1000 - 100);
        assert_eq!(since(before, 250), Duration::from_millis(350));
    }
}
