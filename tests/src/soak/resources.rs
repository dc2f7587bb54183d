// SPDX-License-Identifier: Apache-2.0
//! What the agent holds: descriptors, threads, memory; and whether any of it has leaked.

use std::fmt;
use std::fs;

use crate::bench::process;

/// Each thread that makes calls to libvirt has a connection: a socket, and what wakes the thread. There are as
/// many of them as calls were made at a time (at most 27), and they stay for a while, or for good.
const DESCRIPTORS_OF_A_CALLER: usize = 2;

/// The connection of the watcher, who comes after the agent has been looked at first.
const WATCHER: usize = 1;

/// Descriptors, threads and memory of the agent.
#[derive(Debug, Clone, Copy)]
pub(super) struct Resources {
    descriptors: usize,
    threads: usize,
    /// Those among them that make calls to libvirt.
    callers: usize,
    rss_kib: u64,
}

impl Resources {
    pub(super) fn of(pid: u32) -> Option<Self> {
        let names = threads(pid);
        let calls = ["lv-read", "lv-change", "lv-destroy", "lv-probe"];
        Some(Self {
            descriptors: fs::read_dir(format!("/proc/{pid}/fd")).ok()?.count(),
            callers: names
                .iter()
                .filter(|name| calls.contains(&name.as_str()))
                .count(),
            threads: names.len(),
            rss_kib: process::rss_kib(pid),
        })
    }

    /// Has an agent that is like `self` leaked nothing since it was like `before`?
    pub(super) fn is_fine_after(self, before: Self) -> bool {
        let own = |of: Self| {
            (
                of.descriptors
                    .saturating_sub(of.callers * DESCRIPTORS_OF_A_CALLER),
                of.threads - of.callers,
            )
        };
        let (now, then) = (own(self), own(before));
        now.0 <= then.0 + WATCHER && now.1 <= then.1
    }
}

impl fmt::Display for Resources {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} descriptors, {} threads ({} of them for calls to libvirt), {:.1} MiB",
            self.descriptors,
            self.threads,
            self.callers,
            f64::from(u32::try_from(self.rss_kib).unwrap_or(u32::MAX)) / 1024.0
        )
    }
}

/// What a process has open, and what its threads are called, for whoever looks for a leak.
pub(super) fn held_by(pid: u32) -> String {
    let open = fs::read_dir(format!("/proc/{pid}/fd"));
    let open = open.into_iter().flatten().flatten();
    let mut held: Vec<String> = open
        .filter_map(|entry| Some(fs::read_link(entry.path()).ok()?.display().to_string()))
        .collect();
    let names = threads(pid);
    held.extend(names.iter().map(|name| format!("thread {name}")));
    held.sort();
    held.join(", ")
}

/// The names of a process's threads.
fn threads(pid: u32) -> Vec<String> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task"));
    let tasks = tasks.into_iter().flatten().flatten();
    tasks
        .filter_map(|entry| {
            let name = fs::read_to_string(entry.path().join("comm")).ok()?;
            Some(name.trim().to_owned())
        })
        .collect()
}
