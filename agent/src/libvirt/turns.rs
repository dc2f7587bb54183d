// SPDX-License-Identifier: Apache-2.0
//! Whose turn it is to read: one reader at a time for each subject, so that a subject that cannot be
//! read for a while holds up one thread and not all of them.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, Weak};

use super::threads::lock;

type Turn = tokio::sync::Mutex<()>;

/// The turns that somebody has or waits for.
#[derive(Debug, Default)]
pub(super) struct Turns(Mutex<HashMap<String, Weak<Turn>>>);

impl Turns {
    /// The turn of this subject, to be locked.
    pub(super) fn of(&self, subject: &str) -> Arc<Turn> {
        let mut turns = lock(&self.0);
        if let Some(turn) = turns.get(subject).and_then(Weak::upgrade) {
            return turn;
        }
        turns.retain(|_, turn| turn.strong_count() > 0);
        let turn = Arc::new(Turn::default());
        turns.insert(subject.to_owned(), Arc::downgrade(&turn));
        turn
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_subject_has_one_turn_for_all_and_subjects_do_not_share() {
        let turns = Turns::default();
        let first = turns.of("a").try_lock_owned();
        assert!(first.is_ok());
        assert!(turns.of("a").try_lock_owned().is_err());
        assert!(turns.of("b").try_lock_owned().is_ok());
        drop(first);
        assert!(turns.of("a").try_lock_owned().is_ok());
    }

    #[test]
    fn turns_that_nobody_has_are_forgotten() {
        let turns = Turns::default();
        for subject in 0..1000 {
            drop(turns.of(&subject.to_string()));
        }
        assert!(lock(&turns.0).len() <= 1);
    }
}
