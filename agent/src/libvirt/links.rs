// SPDX-License-Identifier: Apache-2.0
//! When to open which connection: the pure half of keeping three connections up.
//!
//! [`Links`] is told what happened and says what to do. It knows no thread, no clock and no libvirt;
//! `connections` does what it says.

use std::time::{Duration, Instant};

use crate::hypervisor::LinkState;

/// The first pause after a connection was lost or could not be opened; it doubles up to
/// [`LONGEST_PAUSE`].
pub(super) const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// The longest pause between two attempts.
pub(super) const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// What a connection is for. Calls of one class never wait for those of another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Class {
    /// Reads and events: only calls that neither take a domain's job lock nor ask its monitor.
    Read,
    /// Whatever changes something or talks to a guest.
    Mutate,
    /// Destroy, and nothing else.
    Emergency,
}

impl Class {
    /// All of them.
    pub(super) const ALL: [Self; 3] = [Self::Read, Self::Mutate, Self::Emergency];

    /// The name of its threads, short enough for the kernel's 15 bytes with a number after it.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Read => "lv-read",
            Self::Mutate => "lv-change",
            Self::Emergency => "lv-destroy",
        }
    }
}

/// What happened.
#[derive(Debug)]
pub(super) enum Happened {
    /// Time has passed.
    Nothing,
    /// The connection that [`Do::Open`] asked for is there.
    Opened(Class),
    /// It could not be opened.
    OpenFailed(Class, String),
    /// The connection of this generation has ended.
    Closed(Class, u64, String),
    /// Calls hang on the connection of this generation: others need a new one.
    Hangs(Class, u64),
}

/// What to do about it.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Do {
    /// Open a connection; it gets this generation.
    Open(Class, u64),
    /// Use the connection that was just opened, with this generation, in place of the one before.
    Install(Class, u64),
    /// Forget the connection that has ended.
    Remove(Class),
    /// Tell everybody.
    Publish(LinkState),
    /// Tell everybody to look at everything anew: events may have been lost.
    Resync,
}

#[derive(Debug)]
struct Slot {
    class: Class,
    /// The generation of the newest connection that was asked for.
    newest: u64,
    /// The generation of the connection in use.
    up: Option<u64>,
    /// Has the newest one neither been opened nor failed?
    opening: bool,
    /// Not before then.
    next_attempt: Option<Instant>,
    pause: Duration,
    reason: String,
}

impl Slot {
    fn new(class: Class) -> Self {
        Self {
            class,
            newest: 0,
            up: None,
            opening: false,
            next_attempt: None,
            pause: FIRST_PAUSE,
            reason: "not connected yet".to_owned(),
        }
    }

    fn open(&mut self) -> Do {
        self.opening = true;
        self.next_attempt = None;
        self.newest += 1;
        Do::Open(self.class, self.newest)
    }

    fn pause(&mut self, now: Instant) {
        self.next_attempt = Some(now + self.pause);
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
    }

    fn due(&self, now: Instant) -> bool {
        self.up.is_none() && !self.opening && self.next_attempt.is_none_or(|at| at <= now)
    }
}

/// The three connections as one state.
#[derive(Debug)]
pub(super) struct Links {
    slots: [Slot; 3],
    published: LinkState,
}

impl Links {
    /// Nothing is open yet.
    pub(super) fn new() -> Self {
        let slots = Class::ALL.map(Slot::new);
        let published = down(&slots);
        Self { slots, published }
    }

    /// What was published last.
    pub(super) fn published(&self) -> &LinkState {
        &self.published
    }

    /// When to call [`Self::after`] with [`Happened::Nothing`] at the latest, if at all.
    pub(super) fn next_attempt(&self) -> Option<Instant> {
        self.slots.iter().filter_map(|slot| slot.next_attempt).min()
    }

    /// What to do, in this order.
    pub(super) fn after(&mut self, happened: Happened, now: Instant) -> Vec<Do> {
        let mut todo = Vec::new();
        match happened {
            Happened::Nothing => {}
            Happened::Opened(class) => self.opened(class, &mut todo),
            Happened::OpenFailed(class, reason) => {
                let slot = self.slot(class);
                slot.opening = false;
                slot.reason = reason;
                slot.pause(now);
            }
            Happened::Closed(class, generation, reason) => {
                let slot = self.slot(class);
                if slot.up == Some(generation) {
                    slot.up = None;
                    slot.reason = reason;
                    slot.pause(now);
                    todo.push(Do::Remove(class));
                }
            }
            Happened::Hangs(class, generation) => {
                let slot = self.slot(class);
                let paused = slot.next_attempt.is_some_and(|at| at > now);
                if slot.up == Some(generation) && !slot.opening && !paused {
                    todo.push(slot.open());
                }
            }
        }
        for slot in &mut self.slots {
            if slot.due(now) {
                todo.push(slot.open());
            }
        }
        self.publish(&mut todo);
        todo
    }

    fn opened(&mut self, class: Class, todo: &mut Vec<Do>) {
        let slot = self.slot(class);
        let replaces = slot.up.replace(slot.newest).is_some();
        slot.opening = false;
        slot.next_attempt = None;
        slot.pause = FIRST_PAUSE;
        todo.push(Do::Install(class, slot.newest));
        if replaces && class == Class::Read {
            todo.push(Do::Resync);
        }
    }

    fn publish(&mut self, todo: &mut Vec<Do>) {
        let state = if self.slots.iter().all(|slot| slot.up.is_some()) {
            LinkState::Up
        } else {
            down(&self.slots)
        };
        if state == self.published {
            return;
        }
        todo.push(Do::Publish(state.clone()));
        if state == LinkState::Up {
            todo.push(Do::Resync);
        }
        self.published = state;
    }

    fn slot(&mut self, class: Class) -> &mut Slot {
        let [read, mutate, emergency] = &mut self.slots;
        match class {
            Class::Read => read,
            Class::Mutate => mutate,
            Class::Emergency => emergency,
        }
    }
}

fn down(slots: &[Slot; 3]) -> LinkState {
    let reason = slots.iter().find(|slot| slot.up.is_none());
    LinkState::Down {
        reason: reason.map(|slot| slot.reason.clone()).unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn up(now: Instant) -> Links {
        let mut links = Links::new();
        links.after(Happened::Nothing, now);
        for class in Class::ALL {
            links.after(Happened::Opened(class), now);
        }
        assert_eq!(links.published(), &LinkState::Up);
        links
    }

    fn opens(todo: &[Do]) -> usize {
        let opens = todo.iter().filter(|todo| matches!(todo, Do::Open(..)));
        opens.count()
    }

    #[test]
    fn the_link_is_up_when_the_last_connection_is_and_then_all_is_looked_at_anew() {
        let now = Instant::now();
        let mut links = Links::new();
        assert_eq!(opens(&links.after(Happened::Nothing, now)), 3);
        assert_eq!(
            links.after(Happened::Opened(Class::Mutate), now),
            [Do::Install(Class::Mutate, 1)]
        );
        links.after(Happened::Opened(Class::Read), now);
        assert_eq!(
            links.after(Happened::Opened(Class::Emergency), now),
            [
                Do::Install(Class::Emergency, 1),
                Do::Publish(LinkState::Up),
                Do::Resync
            ]
        );
    }

    #[test]
    fn one_lost_connection_takes_the_link_down_with_its_reason() {
        let now = Instant::now();
        let mut links = up(now);
        let lost = Happened::Closed(Class::Emergency, 1, "eof".to_owned());
        let reason = "eof".to_owned();
        assert_eq!(
            links.after(lost, now),
            [
                Do::Remove(Class::Emergency),
                Do::Publish(LinkState::Down { reason })
            ]
        );
        assert_eq!(links.next_attempt(), Some(now + FIRST_PAUSE));
        let later = now + FIRST_PAUSE;
        assert_eq!(
            links.after(Happened::Nothing, later),
            [Do::Open(Class::Emergency, 2)]
        );
    }

    #[test]
    fn pauses_between_attempts_grow_to_the_longest_and_start_anew_after_success() {
        let mut now = Instant::now();
        let mut links = up(now);
        links.after(Happened::Closed(Class::Read, 1, String::new()), now);
        let mut pauses = Vec::new();
        for _ in 0..7 {
            let next = links.next_attempt().unwrap_or(now);
            pauses.push((next - now).as_millis());
            now = next;
            assert_eq!(opens(&links.after(Happened::Nothing, now)), 1);
            links.after(Happened::OpenFailed(Class::Read, "no".to_owned()), now);
        }
        assert_eq!(pauses, [100, 200, 400, 800, 1600, 2000, 2000]);
        now += LONGEST_PAUSE;
        links.after(Happened::Nothing, now);
        links.after(Happened::Opened(Class::Read), now);
        links.after(Happened::Closed(Class::Read, 9, String::new()), now);
        assert_eq!(links.next_attempt(), Some(now + FIRST_PAUSE));
    }

    #[test]
    fn an_attempt_that_does_not_end_is_not_repeated() {
        let now = Instant::now();
        let mut links = Links::new();
        assert_eq!(opens(&links.after(Happened::Nothing, now)), 3);
        let later = now + 100 * LONGEST_PAUSE;
        assert_eq!(links.after(Happened::Nothing, later), []);
        assert_eq!(links.next_attempt(), None);
    }

    #[test]
    fn a_connection_with_hanging_calls_is_replaced_without_the_link_going_down() {
        let now = Instant::now();
        let mut links = up(now);
        let hangs = || Happened::Hangs(Class::Mutate, 1);
        assert_eq!(links.after(hangs(), now), [Do::Open(Class::Mutate, 2)]);
        assert_eq!(links.after(hangs(), now), []);
        assert_eq!(
            links.after(Happened::Opened(Class::Mutate), now),
            [Do::Install(Class::Mutate, 2)]
        );
        assert_eq!(links.after(hangs(), now), [], "the old one is of the past");
        let old = Happened::Closed(Class::Mutate, 1, String::new());
        assert_eq!(links.after(old, now), [], "and so is its end");
    }

    #[test]
    fn a_replacement_that_cannot_be_opened_is_not_tried_in_a_tight_loop() {
        let now = Instant::now();
        let mut links = up(now);
        let hangs = || Happened::Hangs(Class::Mutate, 1);
        links.after(hangs(), now);
        let failed = Happened::OpenFailed(Class::Mutate, "too many clients".to_owned());
        assert_eq!(links.after(failed, now), []);
        assert_eq!(links.published(), &LinkState::Up);
        assert_eq!(links.after(hangs(), now), []);
        assert_eq!(opens(&links.after(hangs(), now + FIRST_PAUSE)), 1);
    }

    #[test]
    fn a_new_connection_for_events_means_that_events_may_have_been_lost() {
        let now = Instant::now();
        let mut links = up(now);
        links.after(Happened::Hangs(Class::Read, 1), now);
        assert_eq!(
            links.after(Happened::Opened(Class::Read), now),
            [Do::Install(Class::Read, 2), Do::Resync]
        );
    }
}
