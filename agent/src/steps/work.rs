// SPDX-License-Identifier: Apache-2.0
//! Work on the files of servers, on threads that may block.
//!
//! A thread that hangs in a disk cannot be stopped. A step that misses its deadline goes on, and what
//! it does then may be done to files of the next operation. So each server's files are worked on by one
//! thread at a time: what comes next waits until it is back, and fails if that takes too long.

use std::time::{Duration, Instant};

use tokio::sync::watch;
use uuid::Uuid;

use crate::{
    core::{errors::chain, plan::Step, reason::Reason},
    engine::StepError,
    storage::apart,
};

/// So long is waited for work that was given up on. Shorter than the shortest deadline of a step on
/// files (30 s), so that the step's error says what it waited for.
const WAIT: Duration = Duration::from_secs(20);

/// What is to be done to the files of a server.
#[derive(Debug, Clone)]
pub(super) struct FileJob {
    pub(super) server: Uuid,
    /// For people.
    pub(super) what: String,
}

impl FileJob {
    /// Applying a step.
    pub(super) fn apply(server: Uuid, step: &Step) -> Self {
        let what = step.describe();
        Self { server, what }
    }

    /// Taking a step back.
    pub(super) fn revert(server: Uuid, step: &Step) -> Self {
        let what = format!("take back \"{}\"", step.describe());
        Self { server, what }
    }
}

#[derive(Debug)]
struct UnderWay {
    number: u64,
    job: FileJob,
    since: Instant,
}

#[derive(Debug, Default)]
struct List {
    last: u64,
    under_way: Vec<UnderWay>,
}

impl List {
    fn of(&self, server: Uuid) -> Option<&UnderWay> {
        self.under_way.iter().find(|work| work.job.server == server)
    }
}

/// The work on files that is under way, whether somebody waits for it or not.
#[derive(Debug, Clone)]
pub(super) struct FileWork(watch::Sender<List>);

impl Default for FileWork {
    fn default() -> Self {
        Self(watch::Sender::new(List::default()))
    }
}

/// The end of work, however it ends.
struct Ending {
    list: watch::Sender<List>,
    number: u64,
}

impl Drop for Ending {
    fn drop(&mut self) {
        let ended = |work: &UnderWay| work.number == self.number;
        self.list
            .send_modify(|list| list.under_way.retain(|work| !ended(work)));
    }
}

impl FileWork {
    /// Does `work` on a thread that may block, after what is under way for the same server.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        job: FileJob,
        work: impl FnOnce() -> Result<T, StepError> + Send + 'static,
    ) -> Result<T, StepError> {
        let whose = job.server.to_string();
        let ending = self.begin(job, WAIT).await?;
        apart::run(&whose, move || {
            // Also if it panics.
            let _ending = ending;
            work()
        })
        .await
        .map_err(|error| StepError::new(Reason::Internal, chain(&error)))?
    }

    /// Comes back when nothing is under way for the server.
    pub(super) async fn at_rest(&self, server: Uuid) {
        // The sender lives in `self`, so the wait can only end with the value.
        let _ = self
            .0
            .subscribe()
            .wait_for(|list| list.of(server).is_none())
            .await;
    }

    async fn begin(&self, job: FileJob, wait: Duration) -> Result<Ending, StepError> {
        let server = job.server;
        let begun = async {
            loop {
                self.at_rest(server).await;
                let mut number = None;
                self.0.send_if_modified(|list| {
                    // Somebody else may have been quicker.
                    if list.of(server).is_none() {
                        list.last += 1;
                        list.under_way.push(UnderWay {
                            number: list.last,
                            job: job.clone(),
                            since: Instant::now(),
                        });
                        number = Some(list.last);
                    }
                    number.is_some()
                });
                if let Some(number) = number {
                    let list = self.0.clone();
                    return Ending { list, number };
                }
            }
        };
        tokio::time::timeout(wait, begun).await.map_err(|_| {
            let list = self.0.borrow();
            let hangs = list.of(server).map_or_else(String::new, |work| {
                let age = work.since.elapsed().as_secs();
                format!(": \"{}\", begun {age} s ago", work.job.what)
            });
            StepError::new(
                Reason::StorageFailed,
                format!("an earlier step on files of this server has not come back{hangs}; look at the storage and try again"),
            )
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]

    use std::sync::{Arc, mpsc};

    use super::*;

    const A: Uuid = Uuid::from_u128(1);
    const B: Uuid = Uuid::from_u128(2);

    fn job(server: Uuid, what: &str) -> FileJob {
        let what = what.to_owned();
        FileJob { server, what }
    }

    /// Work for server A that nobody waits for any more, until it is let go.
    async fn hung(files: &FileWork) -> mpsc::Sender<()> {
        let (release, held) = mpsc::channel::<()>();
        let (began, beginning) = tokio::sync::oneshot::channel();
        let work = files.run(job(A, "remove /a"), move || {
            began.send(()).unwrap();
            // Or the test has failed and is over.
            let _ = held.recv();
            Ok(())
        });
        tokio::select! {
            _ = work => panic!("it hangs"),
            begun = beginning => begun.unwrap(),
        }
        release
    }

    #[tokio::test]
    async fn what_was_given_up_on_is_waited_for_before_the_next_work_on_the_server() {
        let files = FileWork::default();
        let release = hung(&files).await;
        files.run(job(B, "make /b"), || Ok(())).await.unwrap();
        let order = Arc::new(std::sync::Mutex::new(Vec::new()));
        let next = files.run(job(A, "make /a"), {
            let order = Arc::clone(&order);
            move || {
                order.lock().unwrap().push("next");
                Ok(())
            }
        });
        let release = async {
            tokio::task::yield_now().await;
            order.lock().unwrap().push("released");
            release.send(()).unwrap();
            files.at_rest(A).await;
        };
        let (next, ()) = tokio::join!(next, release);
        next.unwrap();
        assert_eq!(*order.lock().unwrap(), ["released", "next"]);
    }

    #[tokio::test]
    async fn what_does_not_come_back_is_named() {
        let files = FileWork::default();
        let release = hung(&files).await;
        let begun = files.begin(job(A, "make /a"), Duration::from_millis(10));
        let error = begun.await.map(drop).unwrap_err();
        assert_eq!(error.reason, Reason::StorageFailed);
        assert!(error.message.contains("\"remove /a\", begun"), "{error}");
        drop(release);
        files.at_rest(A).await;
        drop(files.begin(job(A, "make /a"), WAIT).await.unwrap());
        files.run(job(A, "make /a"), || Ok(())).await.unwrap();
    }

    #[tokio::test]
    async fn work_that_panics_is_over() {
        let files = FileWork::default();
        let panics = files.run::<()>(job(A, "make /a"), || panic!("a defect"));
        assert_eq!(panics.await.unwrap_err().reason, Reason::Internal);
        files.run(job(A, "make /a"), || Ok(())).await.unwrap();
    }
}
