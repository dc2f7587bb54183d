// SPDX-License-Identifier: Apache-2.0
//! Which guest agents do not answer: after some tries in vain one is not asked for a while, because each
//! try takes seconds and a thread.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::Instant;
use uuid::Uuid;

/// So many tries in vain in a row, and the agent is given up for a while.
const TRIES: u32 = 3;

/// For so long it is not asked then.
const PAUSE: Duration = Duration::from_secs(300);

/// Guest agents that did not answer.
#[derive(Debug, Default)]
pub(super) struct Agents(Mutex<HashMap<Uuid, (u32, Instant)>>);

impl Agents {
    fn silent_ones(&self) -> MutexGuard<'_, HashMap<Uuid, (u32, Instant)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// So often it did not answer, and so long it is not asked; `None` if it may be asked.
    pub(super) fn given_up(&self, server: Uuid) -> Option<(u32, Duration)> {
        let (tries, last) = *self.silent_ones().get(&server)?;
        let pause = (last + PAUSE).checked_duration_since(Instant::now())?;
        (tries >= TRIES && !pause.is_zero()).then_some((tries, pause))
    }

    /// It did not answer.
    pub(super) fn silent(&self, server: Uuid) {
        let now = Instant::now();
        let mut silent = self.silent_ones();
        // What was long ago is forgotten, so that the list does not grow for ever.
        silent.retain(|_, (_, last)| *last + 2 * PAUSE > now);
        let (tries, last) = silent.entry(server).or_insert((0, now));
        *tries = tries.saturating_add(1);
        *last = now;
    }

    /// It answered, or has just connected.
    pub(super) fn answered(&self, server: Uuid) {
        self.silent_ones().remove(&server);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SERVER: Uuid = Uuid::from_u128(1);

    #[tokio::test(start_paused = true)]
    async fn an_agent_is_given_up_after_tries_in_a_row_and_asked_again_later_or_when_it_connects() {
        let agents = Agents::default();
        for _ in 0..TRIES - 1 {
            agents.silent(SERVER);
        }
        assert_eq!(agents.given_up(SERVER), None);
        agents.answered(SERVER);
        agents.silent(SERVER);
        assert_eq!(agents.given_up(SERVER), None, "not in a row");
        for _ in 1..TRIES {
            agents.silent(SERVER);
        }
        assert_eq!(agents.given_up(SERVER), Some((TRIES, PAUSE)));
        assert_eq!(agents.given_up(Uuid::from_u128(2)), None);
        tokio::time::advance(PAUSE).await;
        assert_eq!(agents.given_up(SERVER), None);
        agents.silent(SERVER);
        assert!(agents.given_up(SERVER).is_some(), "one more is enough then");
        agents.answered(SERVER);
        assert_eq!(agents.given_up(SERVER), None);
    }
}
