// SPDX-License-Identifier: Apache-2.0
//! The threads that libvirt calls run on, and what becomes of a call that does not come back.
//!
//! A libvirt call blocks and cannot be cancelled. So there are [`Pool`]s: a queue and a few named
//! threads, each with a connection of its own, so that a connection never has more than one call
//! under way. (libvirt's client lets threads share a connection, but then one thread reads the socket
//! for all, and when its own call hangs the answers for the others were seen to lie there until the
//! next keepalive.)
//!
//! A caller that has waited long enough gives its call up: one that still waits in the queue never
//! runs; one that runs goes on as a stuck call, listed until it returns, and keeps its thread and
//! connection. Other threads take its place, up to the pool's limit.
//!
//! Nothing here knows libvirt: what the calls work on is a type parameter.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use uuid::Uuid;

use crate::hypervisor::StuckCall;

/// How long a thread with nothing to do stays, unless it is the last.
const IDLE: Duration = Duration::from_secs(60);

/// Panics are caught before they could leave a lock in a bad state.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How far a call has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Queued,
    Running,
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
    class: &'static str,
    domain: Option<Uuid>,
    made: Instant,
    phase: Mutex<Phase>,
}

impl Ticket {
    /// A call of this libvirt function for the pool of this class, not yet queued.
    pub(super) fn new(call: &'static str, class: &'static str, domain: Option<Uuid>) -> Arc<Self> {
        Arc::new(Self {
            call,
            class,
            domain,
            made: Instant::now(),
            phase: Mutex::new(Phase::Queued),
        })
    }

    fn stuck(&self) -> StuckCall {
        StuckCall {
            call: self.call,
            domain: self.domain,
            age: self.made.elapsed(),
        }
    }

    fn begin(&self) -> bool {
        let mut phase = lock(&self.phase);
        let runs = *phase == Phase::Queued;
        if runs {
            *phase = Phase::Running;
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

    /// Whoever waited for it waits no more. Is it stuck now?
    fn give_up(&self) -> bool {
        let mut phase = lock(&self.phase);
        match *phase {
            Phase::Queued => *phase = Phase::Cancelled,
            Phase::Running => {
                *phase = Phase::Stuck;
                return true;
            }
            Phase::Cancelled | Phase::Stuck | Phase::Done => {}
        }
        false
    }
}

/// The calls that were given up on and have not come back.
#[derive(Debug, Default)]
pub(super) struct StuckCalls(Mutex<Vec<Arc<Ticket>>>);

impl StuckCalls {
    /// Gives a call up.
    pub(super) fn give_up(&self, ticket: &Arc<Ticket>) {
        let mut list = lock(&self.0);
        list.retain(|ticket| *lock(&ticket.phase) == Phase::Stuck);
        if ticket.give_up() {
            list.push(Arc::clone(ticket));
            let (call, domain) = (ticket.call, ticket.domain);
            tracing::warn!(call, ?domain, "a libvirt call hangs; giving it up");
        }
    }

    /// All of them, oldest first.
    pub(super) fn list(&self) -> Vec<StuckCall> {
        let mut list = lock(&self.0);
        list.retain(|ticket| *lock(&ticket.phase) == Phase::Stuck);
        list.iter().map(|ticket| ticket.stuck()).collect()
    }

    /// The oldest one of this class about this domain: a further one would only hang too.
    pub(super) fn in_the_way(&self, class: &str, domain: Uuid) -> Option<StuckCall> {
        let list = lock(&self.0);
        list.iter()
            .find(|ticket| {
                ticket.class == class
                    && ticket.domain == Some(domain)
                    && *lock(&ticket.phase) == Phase::Stuck
            })
            .map(|ticket| ticket.stuck())
    }

    /// The oldest one about this domain.
    pub(super) fn of(&self, domain: Uuid) -> Option<StuckCall> {
        let mut list = self.list().into_iter();
        list.find(|call| call.domain == Some(domain))
    }
}

type Work<C, E> = Box<dyn FnOnce(Result<&C, E>) + Send>;

/// What a thread of a pool does for one call.
pub(super) struct Job<C, E> {
    ticket: Arc<Ticket>,
    work: Work<C, E>,
}

impl<C, E> Job<C, E> {
    /// A job that does `work`, on a connection or with why there is none, unless its ticket is given
    /// up before.
    pub(super) fn new(
        ticket: &Arc<Ticket>,
        work: impl FnOnce(Result<&C, E>) + Send + 'static,
    ) -> Self {
        Self {
            ticket: Arc::clone(ticket),
            work: Box::new(work),
        }
    }
}

/// Makes what the threads of a pool work on.
pub(super) trait Source: Send + Sync + 'static {
    /// A connection.
    type Item;
    /// Why there is none.
    type Error;

    /// A new one. It may block.
    fn open(&self) -> Result<Self::Item, Self::Error>;

    /// Can this one still be used?
    fn is_alive(&self, item: &Self::Item) -> bool;
}

struct State<S: Source> {
    queue: VecDeque<Job<S::Item, S::Error>>,
    threads: usize,
    idle: usize,
    closed: bool,
}

struct Shared<S: Source> {
    name: &'static str,
    limit: usize,
    source: S,
    state: Mutex<State<S>>,
    wake: Condvar,
}

/// Threads that each work on a connection of their own. They end when the pool is dropped.
pub(super) struct Pool<S: Source> {
    shared: Arc<Shared<S>>,
}

impl<S: Source> Pool<S> {
    /// A pool without threads; they are made as calls need them, up to the limit.
    pub(super) fn new(name: &'static str, limit: usize, source: S) -> Self {
        Self {
            shared: Arc::new(Shared {
                name,
                limit,
                source,
                state: Mutex::new(State {
                    queue: VecDeque::new(),
                    threads: 0,
                    idle: 0,
                    closed: false,
                }),
                wake: Condvar::new(),
            }),
        }
    }

    /// Queues a job.
    pub(super) fn submit(&self, job: Job<S::Item, S::Error>) {
        let mut state = lock(&self.shared.state);
        state.queue.push_back(job);
        if state.queue.len() > state.idle && state.threads < self.shared.limit {
            let shared = Arc::clone(&self.shared);
            let thread = std::thread::Builder::new().name(shared.name.to_owned());
            match thread.spawn(move || shared.work()) {
                Ok(_) => state.threads += 1,
                // The other threads will come to it, or its caller will give it up.
                Err(error) => tracing::error!(%error, "cannot start a thread for libvirt calls"),
            }
        }
        drop(state);
        self.shared.wake.notify_one();
    }
}

impl<S: Source> Drop for Pool<S> {
    fn drop(&mut self) {
        let mut state = lock(&self.shared.state);
        state.closed = true;
        state.queue.clear();
        self.shared.wake.notify_all();
    }
}

impl<S: Source> Shared<S> {
    fn work(&self) {
        let mut item = None;
        while let Some(job) = self.next() {
            if !job.ticket.begin() {
                continue;
            }
            let work = job.work;
            let done = catch_unwind(AssertUnwindSafe(|| work(self.usable(&mut item))));
            if done.is_err() {
                let call = job.ticket.call;
                tracing::error!(call, "the libvirt binding panicked");
            }
            job.ticket.end();
        }
    }

    fn usable<'a>(&self, item: &'a mut Option<S::Item>) -> Result<&'a S::Item, S::Error> {
        // The dead one ends before the new one begins.
        *item = item.take().filter(|item| self.source.is_alive(item));
        match item {
            Some(item) => Ok(item),
            none => Ok(none.insert(self.source.open()?)),
        }
    }

    fn next(&self) -> Option<Job<S::Item, S::Error>> {
        let mut state = lock(&self.state);
        loop {
            if let Some(job) = state.queue.pop_front() {
                return Some(job);
            }
            if state.closed {
                state.threads -= 1;
                return None;
            }
            state.idle += 1;
            let woken = self.wake.wait_timeout(state, IDLE);
            let (guard, timeout) = woken.unwrap_or_else(PoisonError::into_inner);
            state = guard;
            state.idle -= 1;
            if timeout.timed_out() && state.threads > 1 && state.queue.is_empty() {
                state.threads -= 1;
                return None;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]

    use std::sync::atomic::{AtomicU32, Ordering};
    use std::sync::mpsc::{self, Receiver, Sender};

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(20);
    const LIMIT: usize = 3;

    /// Connections that are numbers; the test says which is the first that lives.
    #[derive(Default)]
    struct Numbers {
        opened: AtomicU32,
        alive_from: Arc<AtomicU32>,
    }

    impl Source for Numbers {
        type Item = u32;
        type Error = &'static str;

        fn open(&self) -> Result<u32, &'static str> {
            match self.alive_from.load(Ordering::SeqCst) {
                u32::MAX => Err("nobody there"),
                _ => Ok(self.opened.fetch_add(1, Ordering::SeqCst)),
            }
        }

        fn is_alive(&self, item: &u32) -> bool {
            *item >= self.alive_from.load(Ordering::SeqCst)
        }
    }

    type TestPool = Pool<Numbers>;
    type TestJob = Job<u32, &'static str>;

    fn pool() -> TestPool {
        Pool::new("t", LIMIT, Numbers::default())
    }

    /// A job that says when it has begun and ends when it is told.
    fn blocker(ticket: &Arc<Ticket>) -> (TestJob, Receiver<()>, Sender<()>) {
        let (begun, has_begun) = mpsc::channel();
        let (end, told) = mpsc::channel::<()>();
        let job = Job::new(ticket, move |_| {
            begun.send(()).unwrap();
            let _ = told.recv_timeout(PATIENCE);
        });
        (job, has_begun, end)
    }

    /// What a job is given to work on.
    fn given(pool: &TestPool) -> Receiver<Result<u32, &'static str>> {
        let (given, is_given) = mpsc::channel();
        let work = move |item: Result<&u32, _>| given.send(item.copied()).unwrap();
        pool.submit(Job::new(&Ticket::new("given", "t", None), work));
        is_given
    }

    /// Lets calls hang in the pool until the senders are dropped.
    fn hang(pool: &TestPool, count: usize) -> Vec<Sender<()>> {
        let hang = |_| {
            let (job, begun, end) = blocker(&Ticket::new("busy", "t", None));
            pool.submit(job);
            begun.recv_timeout(PATIENCE).unwrap();
            end
        };
        (0..count).map(hang).collect()
    }

    #[test]
    fn a_call_given_up_while_it_runs_is_stuck_until_it_comes_back() {
        let pool = pool();
        let stuck = StuckCalls::default();
        let domain = Uuid::from_u128(3);
        let ticket = Ticket::new("virDomainShutdownFlags", "t", Some(domain));
        let (job, begun, end) = blocker(&ticket);
        pool.submit(job);
        begun.recv_timeout(PATIENCE).unwrap();
        assert_eq!(stuck.list(), []);

        stuck.give_up(&ticket);
        assert_eq!(stuck.of(domain).unwrap().call, "virDomainShutdownFlags");
        assert_eq!(stuck.of(Uuid::nil()), None);
        assert!(stuck.in_the_way("t", domain).is_some());
        assert_eq!(stuck.in_the_way("another", domain), None);
        assert_eq!(stuck.in_the_way("t", Uuid::nil()), None);

        end.send(()).unwrap();
        let deadline = Instant::now() + PATIENCE;
        while !stuck.list().is_empty() {
            assert!(Instant::now() < deadline, "it stays listed");
            std::thread::yield_now();
        }
        stuck.give_up(&ticket);
        assert_eq!(stuck.list(), [], "a call that is done");
    }

    #[test]
    fn a_call_given_up_in_the_queue_never_runs() {
        let pool = pool();
        let ends = hang(&pool, LIMIT);
        let stuck = StuckCalls::default();
        let ticket = Ticket::new("late", "t", None);
        let (job, begun, _end) = blocker(&ticket);
        pool.submit(job);
        stuck.give_up(&ticket);
        assert_eq!(stuck.list(), []);

        drop(ends);
        assert!(given(&pool).recv_timeout(PATIENCE).is_ok());
        assert!(begun.recv().is_err(), "its job is dropped");
    }

    #[test]
    fn calls_that_hang_keep_their_connection_to_themselves() {
        let pool = pool();
        let _ends = hang(&pool, LIMIT - 1);
        let number = u32::try_from(LIMIT - 1).unwrap();
        for _ in 0..3 {
            assert_eq!(given(&pool).recv_timeout(PATIENCE), Ok(Ok(number)));
        }
    }

    #[test]
    fn no_more_calls_run_than_the_limit_allows() {
        let pool = pool();
        let ends = hang(&pool, LIMIT);
        let waits = given(&pool);
        assert_eq!(lock(&pool.shared.state).threads, LIMIT);
        assert!(waits.try_recv().is_err());
        drop(ends);
        assert!(waits.recv_timeout(PATIENCE).is_ok());
    }

    #[test]
    fn a_dead_connection_is_replaced_and_a_missing_one_is_reported() {
        let pool = pool();
        let alive_from = Arc::clone(&pool.shared.source.alive_from);
        assert_eq!(given(&pool).recv_timeout(PATIENCE), Ok(Ok(0)));
        alive_from.store(u32::MAX, Ordering::SeqCst);
        let missing = given(&pool).recv_timeout(PATIENCE);
        assert_eq!(missing, Ok(Err("nobody there")));
        alive_from.store(1, Ordering::SeqCst);
        assert_eq!(given(&pool).recv_timeout(PATIENCE), Ok(Ok(1)));
    }

    #[test]
    fn a_panic_ends_one_call_and_not_its_thread() {
        let pool = pool();
        for _ in 0..2 * LIMIT {
            let ticket = Ticket::new("bad", "t", None);
            pool.submit(Job::new(&ticket, |_| panic!("on purpose")));
        }
        assert!(given(&pool).recv_timeout(PATIENCE).is_ok());
    }
}
