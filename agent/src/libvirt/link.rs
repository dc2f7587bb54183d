// SPDX-License-Identifier: Apache-2.0
//! When to connect: the pure half of keeping the link up.
//!
//! [`Link`] is told what happened and says what to do. It knows no thread, no clock and no libvirt;
//! `connections` does what it says.

use std::time::{Duration, Instant};

use crate::hypervisor::LinkState;

/// The first pause after the connection was lost or could not be opened; it doubles up to
/// [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// The longest pause between two attempts.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// What happened.
#[derive(Debug)]
pub(super) enum Happened {
    /// Time has passed.
    Nothing,
    /// The connection that [`Do::Open`] asked for is there.
    Opened,
    /// It could not be opened.
    OpenFailed(String),
    /// The connection of this number has ended.
    Closed(u64, String),
}

/// What to do about it.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Do {
    /// Open a connection, which gets this number.
    Open(u64),
    /// Keep the connection that was just opened.
    Keep,
    /// Forget the connection, which has ended.
    Forget,
    /// Tell everybody.
    Publish(LinkState),
    /// Tell everybody to look at everything anew: events may have been lost.
    Resync,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Not before then.
    Waiting(Option<Instant>),
    Opening,
    Up,
}

/// The connection that events come over, as a state.
#[derive(Debug)]
pub(super) struct Link {
    phase: Phase,
    /// The number of the newest connection.
    newest: u64,
    pause: Duration,
    published: LinkState,
}

impl Link {
    /// Nothing is open yet.
    pub(super) fn new() -> Self {
        Self {
            phase: Phase::Waiting(None),
            newest: 0,
            pause: FIRST_PAUSE,
            published: LinkState::Down {
                reason: "not connected yet".to_owned(),
            },
        }
    }

    /// What everybody was told last.
    pub(super) fn published(&self) -> &LinkState {
        &self.published
    }

    /// The number of the connection in use, if there is one.
    pub(super) fn up(&self) -> Option<u64> {
        (self.phase == Phase::Up).then_some(self.newest)
    }

    /// When to call [`Self::after`] with [`Happened::Nothing`] at the latest, if at all.
    pub(super) fn next_attempt(&self) -> Option<Instant> {
        match self.phase {
            Phase::Waiting(until) => until,
            Phase::Opening | Phase::Up => None,
        }
    }

    /// What to do, in this order.
    pub(super) fn after(&mut self, happened: Happened, now: Instant) -> Vec<Do> {
        let mut todo = Vec::new();
        match happened {
            Happened::Nothing => {}
            Happened::Opened => {
                self.phase = Phase::Up;
                self.pause = FIRST_PAUSE;
                todo.push(Do::Keep);
                self.publish(LinkState::Up, &mut todo);
                todo.push(Do::Resync);
            }
            Happened::OpenFailed(reason) => self.lost(reason, now, &mut todo),
            Happened::Closed(number, reason) => {
                if self.up() == Some(number) {
                    todo.push(Do::Forget);
                    self.lost(reason, now, &mut todo);
                }
            }
        }
        if let Phase::Waiting(until) = self.phase
            && until.is_none_or(|until| until <= now)
        {
            self.newest += 1;
            self.phase = Phase::Opening;
            todo.push(Do::Open(self.newest));
        }
        todo
    }

    fn lost(&mut self, reason: String, now: Instant, todo: &mut Vec<Do>) {
        self.phase = Phase::Waiting(Some(now + self.pause));
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
        self.publish(LinkState::Down { reason }, todo);
    }

    fn publish(&mut self, state: LinkState, todo: &mut Vec<Do>) {
        if state != self.published {
            todo.push(Do::Publish(state.clone()));
            self.published = state;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn up(now: Instant) -> Link {
        let mut link = Link::new();
        assert_eq!(link.after(Happened::Nothing, now), [Do::Open(1)]);
        assert_eq!(
            link.after(Happened::Opened, now),
            [Do::Keep, Do::Publish(LinkState::Up), Do::Resync]
        );
        link
    }

    #[test]
    fn a_lost_connection_is_forgotten_published_and_opened_anew_after_a_pause() {
        let now = Instant::now();
        let mut link = up(now);
        let reason = "eof".to_owned();
        assert_eq!(
            link.after(Happened::Closed(1, reason.clone()), now),
            [Do::Forget, Do::Publish(LinkState::Down { reason })]
        );
        assert_eq!(link.next_attempt(), Some(now + FIRST_PAUSE));
        assert_eq!(link.after(Happened::Nothing, now), []);
        let later = now + FIRST_PAUSE;
        assert_eq!(link.after(Happened::Nothing, later), [Do::Open(2)]);
        let back = link.after(Happened::Opened, later);
        assert_eq!(back, [Do::Keep, Do::Publish(LinkState::Up), Do::Resync]);
    }

    #[test]
    fn pauses_grow_to_the_longest_and_start_anew_after_success() {
        let mut now = Instant::now();
        let mut link = up(now);
        link.after(Happened::Closed(1, String::new()), now);
        let mut pauses = Vec::new();
        for _ in 0..6 {
            let next = link.next_attempt().unwrap_or(now);
            pauses.push((next - now).as_millis());
            now = next;
            link.after(Happened::Nothing, now);
            link.after(Happened::OpenFailed("no".to_owned()), now);
        }
        assert_eq!(pauses, [100, 200, 400, 800, 1000, 1000]);
        now += LONGEST_PAUSE;
        link.after(Happened::Nothing, now);
        link.after(Happened::Opened, now);
        let number = link.up().unwrap_or_default();
        link.after(Happened::Closed(number, String::new()), now);
        assert_eq!(link.next_attempt(), Some(now + FIRST_PAUSE));
    }

    #[test]
    fn an_attempt_that_does_not_end_is_not_repeated() {
        let now = Instant::now();
        let mut link = Link::new();
        assert_eq!(link.after(Happened::Nothing, now), [Do::Open(1)]);
        let later = now + 100 * LONGEST_PAUSE;
        assert_eq!(link.after(Happened::Nothing, later), []);
        assert_eq!(link.next_attempt(), None);
    }

    #[test]
    fn the_end_of_an_earlier_connection_means_nothing() {
        let now = Instant::now();
        let mut link = up(now);
        link.after(Happened::Closed(1, String::new()), now);
        link.after(Happened::Nothing, now + FIRST_PAUSE);
        link.after(Happened::Opened, now);
        let late = Happened::Closed(1, "late".to_owned());
        assert_eq!(link.after(late, now), []);
        assert_eq!(link.published(), &LinkState::Up);
    }

    #[test]
    fn the_same_reason_is_not_published_twice() {
        let now = Instant::now();
        let mut link = Link::new();
        link.after(Happened::Nothing, now);
        let failed = || Happened::OpenFailed("refused".to_owned());
        assert_eq!(link.after(failed(), now).len(), 1);
        link.after(Happened::Nothing, now + LONGEST_PAUSE);
        assert_eq!(link.after(failed(), now + LONGEST_PAUSE), []);
    }
}
