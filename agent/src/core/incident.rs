// SPDX-License-Identifier: Apache-2.0
//! What happens in and to guests besides their power: reboots, watchdogs, I/O errors, panics. And how
//! often it is told: a guest can cause most of it as often as it likes, and must not fill the log of
//! events.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{state::named_states, text};

named_states! {
    /// A kind of incident.
    pub enum IncidentKind {
        /// The guest restarted itself; its QEMU went on.
        Rebooted = "rebooted",
        /// Its watchdog fired.
        Watchdog = "watchdog",
        /// A disk could not be read or written.
        IoError = "io-error",
        /// The guest's kernel panicked.
        Panicked = "panicked",
        /// Its memory was lost: it had been paused when its host went down.
        MemoryLost = "memory-lost",
        /// A job on a disk failed (a copy, a commit, a pull of somebody's).
        BlockJobFailed = "block-job-failed",
        /// A device is gone from the running guest.
        DeviceRemoved = "device-removed",
        /// It has more or less memory than before (its balloon).
        MemoryChanged = "memory-changed",
    }
}

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Incident {
    /// What.
    pub kind: IncidentKind,
    /// The device, by libvirt's alias (`virtio-disk0`); empty if it is about none.
    pub device: String,
    /// What is behind the device; empty if nothing is.
    pub source: String,
    /// Why (`no space`, …); empty if it is not known.
    pub reason: String,
    /// What the hypervisor did about it (`pause`, `reset`, …); empty if nothing.
    pub action: String,
}

impl Incident {
    /// One with nothing more to be said of it.
    #[must_use]
    pub const fn new(kind: IncidentKind) -> Self {
        Self {
            kind,
            device: String::new(),
            source: String::new(),
            reason: String::new(),
            action: String::new(),
        }
    }

    /// What libvirt said, as it may be stored and shown: short and printable.
    #[must_use]
    pub fn told(
        kind: IncidentKind,
        device: &str,
        source: &str,
        reason: &str,
        action: &str,
    ) -> Self {
        Self {
            kind,
            device: text::echo(device),
            source: text::message(source),
            reason: text::echo(reason),
            action: text::echo(action),
        }
    }
}

/// An incident as it is told: it stands for all of its kind in some time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IncidentReport {
    /// The last one.
    pub incident: Incident,
    /// How many there were.
    pub count: u32,
    /// When the first was, in milliseconds since the Unix epoch.
    pub first_at_ms: i64,
    /// When the last was.
    pub last_at_ms: i64,
}

/// After an incident was told, more of the same are only counted for so long; then for twice as long
/// each time that there were some.
const QUIET: Duration = Duration::from_secs(10);

/// The longest such time: what goes on for ever is told six times an hour.
const QUIET_AT_MOST: Duration = Duration::from_secs(600);

/// So many kinds and devices of a server are told apart.
const KEYS: usize = 32;

/// What makes incidents the same.
type Key = (Uuid, IncidentKind, String);

/// Incidents that are not told at once.
#[derive(Debug)]
struct Window {
    until: Instant,
    length: Duration,
    /// Those since the last was told.
    more: Option<IncidentReport>,
}

/// Decides which incidents are told, and when. It has no clock: whoever asks says what time it is.
#[derive(Debug, Default)]
pub struct Incidents {
    windows: HashMap<Key, Window>,
}

impl Incidents {
    /// Something happened; it is told now if this returns it, and else later ([`Self::due`]).
    pub fn happened(
        &mut self,
        server: Uuid,
        incident: Incident,
        now: Instant,
        now_ms: i64,
    ) -> Option<IncidentReport> {
        let mut key = (server, incident.kind, incident.device.clone());
        let of_server = self.windows.keys().filter(|key| key.0 == server).count();
        if of_server >= KEYS && !self.windows.contains_key(&key) {
            key.2.clear();
        }
        let report = IncidentReport {
            incident,
            count: 1,
            first_at_ms: now_ms,
            last_at_ms: now_ms,
        };
        match self.windows.get_mut(&key) {
            Some(window) => {
                let before = window.more.take();
                window.more = Some(IncidentReport {
                    count: before
                        .as_ref()
                        .map_or(1, |before| before.count.saturating_add(1)),
                    first_at_ms: before.map_or(now_ms, |before| before.first_at_ms),
                    ..report
                });
                None
            }
            None => {
                let window = Window {
                    until: now + QUIET,
                    length: QUIET,
                    more: None,
                };
                self.windows.insert(key, window);
                Some(report)
            }
        }
    }

    /// What is to be told now of what happened before.
    pub fn due(&mut self, now: Instant) -> Vec<(Uuid, IncidentReport)> {
        let mut told = Vec::new();
        self.windows.retain(|(server, ..), window| {
            if window.until > now {
                return true;
            }
            let Some(report) = window.more.take() else {
                return false;
            };
            told.push((*server, report));
            window.length = (window.length * 2).min(QUIET_AT_MOST);
            window.until = now + window.length;
            true
        });
        told
    }

    /// When to ask for [`Self::due`].
    #[must_use]
    pub fn next(&self) -> Option<Instant> {
        self.windows.values().map(|window| window.until).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SERVER: Uuid = Uuid::from_u128(1);

    fn rebooted() -> Incident {
        Incident::new(IncidentKind::Rebooted)
    }

    fn io_error(device: &str) -> Incident {
        Incident::told(IncidentKind::IoError, device, "", "", "")
    }

    #[test]
    fn a_guest_that_reboots_for_ever_is_told_of_six_times_an_hour_with_the_right_count() {
        let begin = Instant::now();
        let mut incidents = Incidents::default();
        let mut told = Vec::new();
        // Ten times a second, for two hours.
        for tenth in 0..72_000u32 {
            let now = begin + Duration::from_millis(100) * tenth;
            let due = incidents.due(now).into_iter();
            told.extend(due.map(|(_, report)| report));
            told.extend(incidents.happened(SERVER, rebooted(), now, i64::from(tenth)));
        }
        let end = begin + Duration::from_secs(3 * 3600);
        told.extend(incidents.due(end).into_iter().map(|(_, report)| report));
        assert!(told.len() <= 8 + 12, "{}", told.len());
        let all: u32 = told.iter().map(|report| report.count).sum();
        assert_eq!(all, 72_000);
        assert!(told.windows(2).all(|pair| {
            let [a, b] = pair else { return false };
            a.last_at_ms < b.first_at_ms
        }));
    }

    #[test]
    fn the_first_is_told_at_once_and_again_after_it_was_calm() {
        let begin = Instant::now();
        let mut incidents = Incidents::default();
        assert!(
            incidents
                .happened(SERVER, rebooted(), begin, 1)
                .is_some_and(|report| report.count == 1)
        );
        let soon = begin + Duration::from_secs(1);
        assert_eq!(incidents.happened(SERVER, rebooted(), soon, 2), None);
        // Others are no worse off.
        let other = Uuid::from_u128(2);
        assert!(incidents.happened(other, rebooted(), soon, 2).is_some());
        assert!(incidents.happened(SERVER, io_error("a"), soon, 2).is_some());
        assert_eq!(incidents.next(), Some(begin + QUIET));
        let due = incidents.due(begin + QUIET);
        assert!(matches!(due.as_slice(), [(SERVER, report)] if report.count == 1));
        let calm = begin + QUIET_AT_MOST;
        assert_eq!(incidents.due(calm), []);
        assert_eq!(incidents.next(), None);
        assert!(incidents.happened(SERVER, rebooted(), calm, 3).is_some());
    }

    #[test]
    fn what_is_told_is_short_and_printable_and_what_is_kept_is_bounded() {
        let nasty = format!("\n\u{1b}[31m\u{202e}{}", "x".repeat(100_000));
        let incident = Incident::told(IncidentKind::IoError, &nasty, &nasty, &nasty, &nasty);
        let all = format!("{incident:?}");
        assert!(all.len() < 4_000, "{}", all.len());
        assert!(
            [&incident.device, &incident.source, &incident.reason]
                .iter()
                .all(|text| text.chars().all(text::is_printable))
        );
        let mut incidents = Incidents::default();
        let now = Instant::now();
        for device in 0..10_000 {
            incidents.happened(SERVER, io_error(&device.to_string()), now, 1);
        }
        assert_eq!(incidents.windows.len(), KEYS + 1);
    }
}
