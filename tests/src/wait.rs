// SPDX-License-Identifier: Apache-2.0
//! Level-triggered waits: look, and look again until it is so or the time is up. Never a bare sleep.

use std::time::{Duration, Instant};

/// How often a wait looks.
const INTERVAL: Duration = Duration::from_millis(10);

/// For guests without an operating system, libvirt calls, daemons: things that take a fraction of a second
/// on an idle machine.
pub const SOON: Duration = Duration::from_secs(30);

/// For Linux guests to boot or to shut down: seconds on an idle machine, most of a minute on a busy one.
pub const BOOT: Duration = Duration::from_secs(180);

/// Looks until `look` returns something. Panics with `what` when the time is up.
#[track_caller]
pub fn wait_for<T>(what: &str, within: Duration, mut look: impl FnMut() -> Option<T>) -> T {
    match try_wait(within, &mut look) {
        Some(found) => found,
        None => panic!("waited {within:?} in vain: {what}"),
    }
}

/// Looks until `look` returns something or the time is up.
pub fn try_wait<T>(within: Duration, mut look: impl FnMut() -> Option<T>) -> Option<T> {
    let deadline = Instant::now() + within;
    loop {
        if let Some(found) = look() {
            return Some(found);
        }
        if Instant::now() >= deadline {
            return None;
        }
        std::thread::sleep(INTERVAL);
    }
}
