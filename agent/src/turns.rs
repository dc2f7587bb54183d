// SPDX-License-Identifier: Apache-2.0
//! Whose turn it is: one at a time for each subject. It does not know what the subjects are: a domain whose
//! reads wait for each other, so that one that hangs holds up one thread and not all of them; the id of a
//! call that is made again before it was answered.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

type Turn = tokio::sync::Mutex<()>;

/// The turns that somebody has or waits for.
#[derive(Debug, Default)]
pub(crate) struct Turns(Mutex<HashMap<String, Weak<Turn>>>);

impl Turns {
    /// The turn of this subject, to be locked.
    pub(crate) fn of(&self, subject: &str) -> Arc<Turn> {
        let mut turns = self.all();
        if let Some(turn) = turns.get(subject).and_then(Weak::upgrade) {
            return turn;
        }
        turns.retain(|_, turn| turn.strong_count() > 0);
        let turn = Arc::new(Turn::default());
        turns.insert(subject.to_owned(), Arc::downgrade(&turn));
        turn
    }

    fn all(&self) -> MutexGuard<'_, HashMap<String, Weak<Turn>>> {
        // Nothing panics that holds it.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
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
        assert!(turns.all().len() <= 1);
    }
}
