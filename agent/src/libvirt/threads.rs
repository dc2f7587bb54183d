// SPDX-License-Identifier: Apache-2.0
//! The threads that libvirt calls run on, and what becomes of a call that does not come back.
//!
//! A libvirt call blocks and cannot be cancelled. So each connection has a [`Pool`]: a queue and a
//! few named threads. A caller that has waited long enough gives its call up: one that still waits
//! in the queue is taken out and never runs; one that runs goes on as a stuck call, listed until it
//! returns, and keeps its thread. A pool with stuck calls is [retired](Pool::retire) and a new one,
//! with a connection of its own, takes over what was queued.
//!
//! Nothing here knows libvirt: what the calls work on is a type parameter.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use uuid::Uuid;

use crate::hypervisor::StuckCall;

/// How many calls of one connection may be at the daemon at once. libvirtd stops reading a client
/// that has `max_client_requests` (5 by default) unanswered, keepalive included, so it must be less.
pub(super) const CALLS_PER_POOL: usize = 4;

/// How long no thread of a pool may have taken a job before the pool counts as hanging: most calls
/// take a few milliseconds, and a call that waits behind those of a frozen guest should not wait for
/// much longer than that.
pub(super) const HANGS_AFTER: Duration = Duration::from_millis(25);

/// Panics are caught before they could leave a lock in a bad state.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How far a call has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Queued,
    /// By the pool of this generation.
    Running(u64),
    /// Given up on before it ran: it never will.
    Cancelled,
    /// Given up on while it ran.
    Stuck,
    Done,
}

/// One call, as seen by the caller, by the thread that runs it and by the list of stuck calls.
#[derive(Debug)]
pub(super) struct Ticket {
    call: &'static str,
    domain: Option<Uuid>,
    made: Instant,
    phase: Mutex<Phase>,
}

impl Ticket {
    /// A call of this libvirt function, not yet queued.
    pub(super) fn new(call: &'static str, domain: Option<Uuid>) -> Arc<Self> {
        Arc::new(Self {
            call,
            domain,
            made: Instant::now(),
            phase: Mutex::new(Phase::Queued),
        })
    }

    /// Does it still wait for a thread?
    pub(super) fn is_queued(&self) -> bool {
        *lock(&self.phase) == Phase::Queued
    }

    fn begin(&self, generation: u64) -> bool {
        let mut phase = lock(&self.phase);
        let runs = *phase == Phase::Queued;
        if runs {
            *phase = Phase::Running(generation);
        }
        runs
    }

    fn end(&self) {
        let was = std::mem::replace(&mut *lock(&self.phase), Phase::Done);
        if was == Phase::Stuck {
            let (call, domain, age) = (self.call, self.domain, self.made.elapsed());
            tracing::info!(call, ?domain, ?age, "a stuck libvirt call came back");
        }
    }

    /// Whoever waited for it waits no more. The generation of the pool that it is stuck in, if it is.
    fn give_up(&self) -> Option<u64> {
        let mut phase = lock(&self.phase);
        match *phase {
            Phase::Queued => *phase = Phase::Cancelled,
            Phase::Running(generation) => {
                *phase = Phase::Stuck;
                return Some(generation);
            }
            Phase::Cancelled | Phase::Stuck | Phase::Done => {}
        }
        None
    }
}

/// The calls that were given up on and have not come back.
#[derive(Debug, Default)]
pub(super) struct StuckCalls(Mutex<Vec<Arc<Ticket>>>);

impl StuckCalls {
    /// Gives a call up; the generation of the pool that it is stuck in, if it is.
    pub(super) fn give_up(&self, ticket: &Arc<Ticket>) -> Option<u64> {
        let mut list = lock(&self.0);
        let generation = ticket.give_up()?;
        list.retain(|ticket| *lock(&ticket.phase) == Phase::Stuck);
        list.push(Arc::clone(ticket));
        let (call, domain) = (ticket.call, ticket.domain);
        tracing::warn!(call, ?domain, "a libvirt call hangs; giving it up");
        Some(generation)
    }

    /// All of them, oldest first.
    pub(super) fn list(&self) -> Vec<StuckCall> {
        let mut list = lock(&self.0);
        list.retain(|ticket| *lock(&ticket.phase) == Phase::Stuck);
        list.iter()
            .map(|ticket| StuckCall {
                call: ticket.call,
                domain: ticket.domain,
                age: ticket.made.elapsed(),
            })
            .collect()
    }

    /// The oldest one about this domain.
    pub(super) fn of(&self, domain: Uuid) -> Option<StuckCall> {
        let mut list = self.list().into_iter();
        list.find(|call| call.domain == Some(domain))
    }
}

/// What a thread of a pool does for one call.
pub(super) struct Job<C> {
    ticket: Arc<Ticket>,
    work: Box<dyn FnOnce(&C) + Send>,
}

impl<C> Job<C> {
    /// A job that does `work` unless its ticket is given up before.
    pub(super) fn new(ticket: &Arc<Ticket>, work: impl FnOnce(&C) + Send + 'static) -> Self {
        Self {
            ticket: Arc::clone(ticket),
            work: Box::new(work),
        }
    }
}

struct State<C> {
    queue: VecDeque<Job<C>>,
    threads: usize,
    idle: usize,
    /// When a thread last took a job.
    taken: Instant,
    retired: bool,
}

struct Shared<C> {
    name: &'static str,
    generation: u64,
    resource: C,
    state: Mutex<State<C>>,
    wake: Condvar,
}

/// Threads that work on one resource, the connection. Dropping it retires it.
pub(super) struct Pool<C: Send + Sync + 'static> {
    shared: Arc<Shared<C>>,
}

/// Tells whether a retired pool still has a call that has not come back.
pub(super) struct PoolLife(Weak<dyn Send + Sync>);

impl PoolLife {
    /// Has it?
    pub(super) fn lasts(&self) -> bool {
        self.0.strong_count() > 0
    }
}

impl<C: Send + Sync + 'static> Pool<C> {
    /// A pool without threads; they are made as calls need them, up to [`CALLS_PER_POOL`].
    pub(super) fn new(name: &'static str, generation: u64, resource: C) -> Self {
        let state = Mutex::new(State {
            queue: VecDeque::new(),
            threads: 0,
            idle: 0,
            taken: Instant::now(),
            retired: false,
        });
        Self {
            shared: Arc::new(Shared {
                name,
                generation,
                resource,
                state,
                wake: Condvar::new(),
            }),
        }
    }

    /// Which one it is.
    pub(super) fn generation(&self) -> u64 {
        self.shared.generation
    }

    /// What its threads work on.
    pub(super) fn resource(&self) -> &C {
        &self.shared.resource
    }

    /// How to see whether it is really gone after it was retired.
    pub(super) fn life(&self) -> PoolLife {
        let shared: Weak<Shared<C>> = Arc::downgrade(&self.shared);
        PoolLife(shared)
    }

    /// Queues a job; gives it back if the pool is retired.
    pub(super) fn submit(&self, job: Job<C>) -> Result<(), Job<C>> {
        let mut state = lock(&self.shared.state);
        if state.retired {
            return Err(job);
        }
        state.queue.push_back(job);
        if state.queue.len() > state.idle && state.threads < CALLS_PER_POOL {
            let shared = Arc::clone(&self.shared);
            let name = format!("{}-{}", shared.name, shared.generation);
            let thread = std::thread::Builder::new().name(name);
            match thread.spawn(move || shared.work()) {
                Ok(_) => state.threads += 1,
                // The other threads will come to it, or its caller will give it up.
                Err(error) => tracing::error!(%error, "cannot start a thread for libvirt calls"),
            }
        }
        drop(state);
        self.shared.wake.notify_one();
        Ok(())
    }

    /// Do jobs wait while every thread has been at the same call for [`HANGS_AFTER`]? A queue that
    /// moves does not count, however long it is.
    pub(super) fn hangs(&self) -> bool {
        let state = lock(&self.shared.state);
        !state.queue.is_empty()
            && state.threads == CALLS_PER_POOL
            && state.taken.elapsed() >= HANGS_AFTER
    }

    /// Takes no more jobs; its threads end with the call they are at. What no thread had begun.
    pub(super) fn retire(&self) -> VecDeque<Job<C>> {
        let mut state = lock(&self.shared.state);
        state.retired = true;
        self.shared.wake.notify_all();
        std::mem::take(&mut state.queue)
    }
}

impl<C: Send + Sync + 'static> Drop for Pool<C> {
    fn drop(&mut self) {
        self.retire();
    }
}

impl<C> Shared<C> {
    fn work(&self) {
        while let Some(job) = self.next() {
            if !job.ticket.begin(self.generation) {
                continue;
            }
            let work = job.work;
            if catch_unwind(AssertUnwindSafe(|| work(&self.resource))).is_err() {
                let call = job.ticket.call;
                tracing::error!(call, "the libvirt binding panicked");
            }
            job.ticket.end();
        }
    }

    fn next(&self) -> Option<Job<C>> {
        let mut state = lock(&self.state);
        loop {
            if let Some(job) = state.queue.pop_front() {
                state.taken = Instant::now();
                return Some(job);
            }
            if state.retired {
                state.threads -= 1;
                return None;
            }
            state.idle += 1;
            let woken = self.wake.wait(state);
            state = woken.unwrap_or_else(PoisonError::into_inner);
            state.idle -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]

    use std::sync::mpsc::{self, Receiver, Sender};

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(20);

    /// A job that says when it has begun and ends when it is told.
    fn blocker(ticket: &Arc<Ticket>) -> (Job<()>, Receiver<()>, Sender<()>) {
        let (begun, has_begun) = mpsc::channel();
        let (end, told) = mpsc::channel::<()>();
        let job = Job::new(ticket, move |()| {
            begun.send(()).unwrap();
            let _ = told.recv_timeout(PATIENCE);
        });
        (job, has_begun, end)
    }

    fn teller(ticket: &Arc<Ticket>, word: &'static str) -> (Job<()>, Receiver<&'static str>) {
        let (done, is_done) = mpsc::channel();
        let job = Job::new(ticket, move |()| {
            let _ = done.send(word);
        });
        (job, is_done)
    }

    fn submit(pool: &Pool<()>, job: Job<()>) {
        assert!(pool.submit(job).is_ok());
    }

    /// A pool whose threads are all at a call, and how to end those calls.
    fn busy_pool() -> (Pool<()>, Vec<Sender<()>>) {
        let pool = Pool::new("busy", 1, ());
        let ends = (0..CALLS_PER_POOL).map(|_| {
            let (job, begun, end) = blocker(&Ticket::new("busy", None));
            submit(&pool, job);
            begun.recv_timeout(PATIENCE).unwrap();
            end
        });
        let ends = ends.collect();
        (pool, ends)
    }

    fn until(what: &str, condition: impl Fn() -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !condition() {
            assert!(Instant::now() < deadline, "{what}");
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_call_given_up_while_it_runs_is_stuck_until_it_comes_back() {
        let pool = Pool::new("t", 7, ());
        let stuck = StuckCalls::default();
        let domain = Uuid::from_u128(3);
        let ticket = Ticket::new("virDomainShutdownFlags", Some(domain));
        let (job, begun, end) = blocker(&ticket);
        submit(&pool, job);
        begun.recv_timeout(PATIENCE).unwrap();
        assert_eq!(stuck.list(), []);

        assert_eq!(stuck.give_up(&ticket), Some(7));
        assert_eq!(stuck.of(domain).unwrap().call, "virDomainShutdownFlags");
        assert_eq!(stuck.of(Uuid::nil()), None);

        end.send(()).unwrap();
        until("it stays listed", || stuck.list().is_empty());
        assert_eq!(stuck.give_up(&ticket), None, "a call that is done");
    }

    #[test]
    fn a_call_given_up_in_the_queue_never_runs() {
        let (pool, ends) = busy_pool();
        let stuck = StuckCalls::default();
        let ticket = Ticket::new("late", None);
        let (job, done) = teller(&ticket, "ran");
        submit(&pool, job);
        assert!(ticket.is_queued());
        assert_eq!(stuck.give_up(&ticket), None);
        assert_eq!(stuck.list(), []);

        drop(ends);
        let (job, next) = teller(&Ticket::new("next", None), "next");
        submit(&pool, job);
        assert_eq!(next.recv_timeout(PATIENCE), Ok("next"));
        assert!(done.recv().is_err(), "its job is dropped");
    }

    #[test]
    fn what_a_retired_pool_had_not_begun_is_done_by_the_next_one() {
        let (old, ends) = busy_pool();
        let (job, done) = teller(&Ticket::new("waits", None), "done");
        submit(&old, job);
        until("all threads are taken", || old.hangs());

        let life = old.life();
        let new = Pool::new("new", 2, ());
        for job in old.retire() {
            submit(&new, job);
        }
        assert_eq!(done.recv_timeout(PATIENCE), Ok("done"));
        let (job, _) = teller(&Ticket::new("late", None), "late");
        assert!(old.submit(job).is_err(), "a retired pool takes nothing");

        drop(old);
        assert!(life.lasts(), "its calls have not come back");
        drop(ends);
        until("it never ends", || !life.lasts());
    }

    #[test]
    fn a_queue_without_waiting_jobs_does_not_hang() {
        let (pool, _ends) = busy_pool();
        assert!(!pool.hangs());
    }

    #[test]
    fn a_panic_ends_one_call_and_not_its_thread() {
        let pool = Pool::new("t", 1, ());
        for _ in 0..2 * CALLS_PER_POOL {
            submit(
                &pool,
                Job::new(&Ticket::new("bad", None), |()| panic!("on purpose")),
            );
        }
        let (job, done) = teller(&Ticket::new("good", None), "good");
        submit(&pool, job);
        assert_eq!(done.recv_timeout(PATIENCE), Ok("good"));
    }
}
