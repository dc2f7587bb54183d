// SPDX-License-Identifier: Apache-2.0
//! File work on threads of its own, so many at a time for each whose work it is.
//!
//! A call on a file of a file server that is away does not come back, and nothing can end it. Paths are
//! named by callers, by domains, by the configuration: any of them may lie on such a server. On the
//! runtime's few threads for blocking work that would sooner or later leave none for anybody. So each
//! server's work, and each import folder's, has [`EACH`] turns. What hangs keeps its turn and its thread
//! until it comes back, holds up others of the same name only, and those no longer than they wait.
//!
//! Nothing is kept between calls: a thread costs some ten microseconds, the work far more.

use std::{
    collections::HashMap,
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, LazyLock, Mutex, PoisonError},
    time::Duration,
};

use tokio::{
    sync::{Semaphore, oneshot},
    time::timeout,
};

/// So many threads may work for one name at a time.
const EACH: usize = 8;

/// A turn is waited for no longer than this.
const TURN: Duration = Duration::from_secs(600);

/// A look at a file takes no longer than this.
pub const LOOK: Duration = Duration::from_secs(10);

/// Why work was not done, or is not known to be.
#[derive(Debug, thiserror::Error)]
pub enum ApartError {
    /// It did not end in time, or did not begin because what was begun before it did not end.
    #[error("its storage did not answer within {} s", after.as_secs())]
    Hangs {
        /// How long it was waited for.
        after: Duration,
    },
    /// No thread could be started.
    #[error("a thread for file work cannot be started")]
    Thread(#[source] io::Error),
    /// It panicked.
    #[error("file work panicked")]
    Panicked,
}

/// Turns by name. The process has one of these.
#[derive(Debug, Default)]
struct Turns(Mutex<HashMap<String, Arc<Semaphore>>>);

static TURNS: LazyLock<Turns> = LazyLock::new(Turns::default);

/// Does `work` for `whose`. Once it has begun it is waited for without an end: the caller's deadline ends
/// the wait, and the work goes on.
///
/// # Errors
/// [`ApartError`].
pub async fn run<T: Send + 'static>(
    whose: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, ApartError> {
    TURNS.run(whose, work).await
}

/// Like [`run`], for a look at a file: it is not waited for longer than [`LOOK`].
///
/// # Errors
/// [`ApartError`].
pub async fn look<T: Send + 'static>(
    whose: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, ApartError> {
    TURNS.within(LOOK, whose, work).await
}

impl Turns {
    async fn within<T: Send + 'static>(
        &self,
        after: Duration,
        whose: &str,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, ApartError> {
        let done = timeout(after, self.run(whose, work));
        done.await.unwrap_or(Err(ApartError::Hangs { after }))
    }

    async fn run<T: Send + 'static>(
        &self,
        whose: &str,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, ApartError> {
        let turn = timeout(TURN, self.of(whose).acquire_owned()).await;
        let turn = turn.map_err(|_| ApartError::Hangs { after: TURN })?;
        let (answer, answered) = oneshot::channel();
        std::thread::Builder::new()
            .name("salvor-files".to_owned())
            .spawn(move || {
                let done = catch_unwind(AssertUnwindSafe(work));
                drop(turn);
                // Nobody may wait for it any more.
                let _ = answer.send(done);
            })
            .map_err(ApartError::Thread)?;
        match answered.await {
            Ok(Ok(done)) => Ok(done),
            Ok(Err(_)) | Err(_) => Err(ApartError::Panicked),
        }
    }

    fn of(&self, whose: &str) -> Arc<Semaphore> {
        let mut turns = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // What nobody waits for or works with is as good as new.
        turns.retain(|_, turns| Arc::strong_count(turns) > 1);
        let new = || Arc::new(Semaphore::new(EACH));
        Arc::clone(turns.entry(whose.to_owned()).or_insert_with(new))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]

    use std::sync::{
        atomic::{AtomicUsize, Ordering},
        mpsc,
    };

    use tokio::task::JoinSet;

    use super::*;

    /// File servers that are away until they are dropped.
    struct Away {
        stuck: Arc<AtomicUsize>,
        back: Vec<mpsc::Sender<()>>,
    }

    impl Away {
        fn hang(&mut self) -> impl FnOnce() + Send + use<> {
            let (back, gone) = mpsc::channel::<()>();
            self.back.push(back);
            let stuck = Arc::clone(&self.stuck);
            move || {
                stuck.fetch_add(1, Ordering::SeqCst);
                let _ = gone.recv();
                stuck.fetch_sub(1, Ordering::SeqCst);
            }
        }
    }

    #[tokio::test]
    async fn two_hung_file_servers_hold_up_their_own_and_nobody_else() {
        const SHORT: Duration = Duration::from_millis(300);
        let turns = Arc::new(Turns::default());
        let mut away = Away {
            stuck: Arc::default(),
            back: Vec::new(),
        };
        let mut waiting = JoinSet::new();
        for _ in 0..50 {
            for whose in ["one", "two"] {
                let (turns, work) = (Arc::clone(&turns), away.hang());
                waiting.spawn(async move { turns.within(SHORT, whose, work).await });
            }
        }
        while let Some(ended) = waiting.join_next().await {
            let ended = ended.unwrap();
            assert!(matches!(ended, Err(ApartError::Hangs { .. })), "{ended:?}");
        }
        // So many threads hang and no more, however often it was tried.
        let stuck = Arc::clone(&away.stuck);
        assert_eq!(stuck.load(Ordering::SeqCst), 2 * EACH);
        let one = turns.within(SHORT, "one", || ()).await;
        assert!(matches!(one, Err(ApartError::Hangs { .. })), "{one:?}");
        for _ in 0..20 {
            assert_eq!(turns.run("three", || 3).await.unwrap(), 3);
        }
        // Once they are back everything goes on.
        drop(away);
        let patience = Duration::from_secs(30);
        assert_eq!(turns.within(patience, "one", || 1).await.unwrap(), 1);
        assert_eq!(turns.within(patience, "two", || 2).await.unwrap(), 2);
    }

    #[tokio::test]
    async fn work_that_panics_ends_and_gives_its_turn_back() {
        let turns = Turns::default();
        for _ in 0..=EACH {
            let ended = turns.run("one", || panic!("a fault of the test")).await;
            assert!(matches!(ended, Err::<(), _>(ApartError::Panicked)));
        }
        assert_eq!(turns.run("one", || 1).await.unwrap(), 1);
    }

    #[tokio::test]
    async fn names_that_nobody_uses_are_forgotten() {
        let turns = Turns::default();
        for number in 0..100 {
            turns.run(&number.to_string(), || ()).await.unwrap();
        }
        assert!(turns.0.lock().unwrap().len() <= 2);
    }
}
