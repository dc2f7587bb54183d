// SPDX-License-Identifier: Apache-2.0
//! Three connections to libvirt, kept up: the half of it that does things.
//!
//! ```text
//!   callers ──> pool of Read ──────> connection + events ─┐
//!           ──> pool of Mutate ────> connection           ├─ keepalive, close callback
//!           ──> pool of Emergency ─> connection          ─┘         │
//!                                                                notices
//!   opener threads <── Open ── supervisor thread <──────────────────┘
//! ```
//!
//! The supervisor asks [`Links`] what to do. It never calls libvirt in a way that could block it:
//! connections are opened and closed on threads of their own. It knows no domain.

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{broadcast, watch};
use virt::connect::Connect;
use virt::enumutil::Enum;
use virt::error::{Error, ErrorNumber};

use super::Config;
use super::ffi::{CloseWatch, DomainEvents, Told};
use super::links::{Class, Do, Happened, Links};
use super::threads::{Job, Pool, PoolLife, StuckCalls};
use super::words;
use crate::hypervisor::{HypervisorEvent, LinkState};

/// How many pools of one class may have calls under way: with [`super::threads::CALLS_PER_POOL`]
/// calls each they stay below the 20 workers that libvirtd has by default (`max_workers`).
const POOLS_PER_CLASS: usize = 4;

/// How often connections are asked whether they are alive, for drivers without a close callback.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// One connection with its registrations, which end before it does.
pub(super) struct Connection {
    _events: Vec<DomainEvents>,
    _close: Option<CloseWatch>,
    connect: Connect,
    class: Class,
    generation: u64,
}

impl Connection {
    /// The handle for calls.
    pub(super) fn connect(&self) -> &Connect {
        &self.connect
    }

    /// Is it usable? A question to this side of the connection, which is answered at once.
    pub(super) fn is_alive(&self) -> bool {
        self.connect.is_alive().unwrap_or(false)
    }

    /// The notice that it has ended.
    pub(super) fn closed(&self, reason: String) -> Notice {
        Notice::Closed(self.class, self.generation, reason)
    }
}

/// What the supervisor is told.
pub(super) enum Notice {
    /// An opener thread is done.
    Opened(Class, Result<Box<Connection>, String>),
    /// A connection has ended.
    Closed(Class, u64, String),
    /// Calls hang on a connection.
    Hangs(Class, u64),
    /// The end.
    Stop,
}

/// What the supervisor and the callers share.
pub(super) struct Connections {
    pub(super) config: Config,
    pools: [Mutex<Option<Pool<Connection>>>; 3],
    pub(super) stuck: StuckCalls,
    pub(super) link: watch::Sender<LinkState>,
    pub(super) events: broadcast::Sender<HypervisorEvent>,
    notices: Sender<Notice>,
}

impl Connections {
    pub(super) fn new(
        config: Config,
        events: broadcast::Sender<HypervisorEvent>,
        notices: Sender<Notice>,
    ) -> Self {
        Self {
            config,
            pools: [Mutex::new(None), Mutex::new(None), Mutex::new(None)],
            stuck: StuckCalls::default(),
            link: watch::Sender::new(Links::new().published().clone()),
            events,
            notices,
        }
    }

    /// Tells the supervisor.
    pub(super) fn notify(&self, notice: Notice) {
        // It is gone only when everything is.
        let _ = self.notices.send(notice);
    }

    /// Queues a job; `false` if there is no connection to do it on.
    pub(super) fn submit(&self, class: Class, job: Job<Connection>) -> bool {
        let pool = self.pool(class);
        pool.as_ref().is_some_and(|pool| pool.submit(job).is_ok())
    }

    /// Asks for a new connection if the calls on the present one hang.
    pub(super) fn look_for_hanging(&self, class: Class) {
        let generation = match &*self.pool(class) {
            Some(pool) if pool.hangs() => pool.generation(),
            _ => return,
        };
        self.notify(Notice::Hangs(class, generation));
    }

    fn pool(&self, class: Class) -> MutexGuard<'_, Option<Pool<Connection>>> {
        let [read, mutate, emergency] = &self.pools;
        let pool = match class {
            Class::Read => read,
            Class::Mutate => mutate,
            Class::Emergency => emergency,
        };
        pool.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens one connection. It may block for as long as libvirt likes.
    fn open(&self, class: Class, generation: u64) -> Result<Connection, Error> {
        let connect = Connect::open(Some(&self.config.uri))?;
        let seconds = i32::try_from(self.config.keepalive_interval.as_secs()).unwrap_or(i32::MAX);
        optional(connect.set_keep_alive(seconds, self.config.keepalive_count))?;

        let notices = self.notices.clone();
        let close = CloseWatch::new(
            &connect,
            Box::new(move |told| {
                if let Told::Closed { reason } = told {
                    let reason = words::closed(reason).to_owned();
                    let _ = notices.send(Notice::Closed(class, generation, reason));
                }
            }),
        );
        let mut events = Vec::new();
        if class == Class::Read {
            events.push(DomainEvents::lifecycle(&connect, self.sink())?);
            events.extend(optional(DomainEvents::guest_agents(&connect, self.sink()))?);
        }
        Ok(Connection {
            _events: events,
            _close: optional(close)?,
            connect,
            class,
            generation,
        })
    }

    fn sink(&self) -> super::ffi::Sink {
        let events = self.events.clone();
        Box::new(move |told| {
            let event = match told {
                Told::Lifecycle { id, event } => HypervisorEvent::Domain {
                    id,
                    what: words::lifecycle(event),
                },
                Told::GuestAgent { id, state } => HypervisorEvent::GuestAgent {
                    id,
                    connected: words::agent_connected(state),
                },
                Told::Closed { .. } => return,
            };
            // Nobody listening is no error.
            let _ = events.send(event);
        })
    }
}

/// `None` where the driver does not have the function at all.
fn optional<T>(answer: Result<T, Error>) -> Result<Option<T>, Error> {
    match answer {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.code() == Enum::Known(ErrorNumber::NoSupport) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The thread that keeps the connections up.
pub(super) struct Supervisor {
    shared: Arc<Connections>,
    notices: Receiver<Notice>,
    links: Links,
    /// The connection that an opener thread has just brought.
    brought: Option<Box<Connection>>,
    retired: Vec<(Class, PoolLife)>,
}

impl Supervisor {
    pub(super) fn new(shared: Arc<Connections>, notices: Receiver<Notice>) -> Self {
        Self {
            shared,
            notices,
            links: Links::new(),
            brought: None,
            retired: Vec::new(),
        }
    }

    /// Runs until it is told to stop.
    pub(super) fn run(mut self) {
        let mut happened = Happened::Nothing;
        loop {
            for todo in self.links.after(happened, Instant::now()) {
                self.act(todo);
            }
            self.brought = None;
            let wait = self.links.next_attempt();
            let wait = wait.map(|at| at.saturating_duration_since(Instant::now()));
            let wait = wait.unwrap_or(LOOK_EVERY).min(LOOK_EVERY);
            happened = match self.notices.recv_timeout(wait) {
                Ok(Notice::Opened(class, Ok(connection))) => {
                    self.brought = Some(connection);
                    Happened::Opened(class)
                }
                Ok(Notice::Opened(class, Err(reason))) => Happened::OpenFailed(class, reason),
                Ok(Notice::Closed(class, generation, reason)) => {
                    Happened::Closed(class, generation, reason)
                }
                Ok(Notice::Hangs(class, _)) if self.is_full(class) => Happened::Nothing,
                Ok(Notice::Hangs(class, generation)) => Happened::Hangs(class, generation),
                Err(RecvTimeoutError::Timeout) => self.look(),
                Ok(Notice::Stop) | Err(RecvTimeoutError::Disconnected) => break,
            };
        }
        for class in Class::ALL {
            dispose(self.shared.pool(class).take());
        }
    }

    fn act(&mut self, todo: Do) {
        match todo {
            Do::Open(class, generation) => self.open(class, generation),
            Do::Install(class, generation) => self.install(class, generation),
            Do::Remove(class) => dispose(self.shared.pool(class).take()),
            Do::Publish(state) => {
                match &state {
                    LinkState::Up => tracing::info!("connected to libvirt"),
                    LinkState::Down { reason } => tracing::warn!(reason, "libvirt is away"),
                }
                self.shared.link.send_replace(state.clone());
                let _ = self.shared.events.send(HypervisorEvent::Link(state));
            }
            Do::Resync => {
                let _ = self.shared.events.send(HypervisorEvent::Resync);
            }
        }
    }

    fn open(&self, class: Class, generation: u64) {
        let shared = Arc::clone(&self.shared);
        let opener = move || {
            let opened = shared.open(class, generation).map(Box::new);
            let opened = opened.map_err(|error| error.message().to_owned());
            shared.notify(Notice::Opened(class, opened));
        };
        let thread = std::thread::Builder::new().name("lv-open".to_owned());
        if let Err(error) = thread.spawn(opener) {
            let reason = format!("cannot start a thread: {error}");
            self.shared.notify(Notice::Opened(class, Err(reason)));
        }
    }

    fn install(&mut self, class: Class, generation: u64) {
        let Some(connection) = self.brought.take() else {
            return;
        };
        let new = Pool::new(class.name(), generation, *connection);
        let mut slot = self.shared.pool(class);
        let old = slot.take();
        for job in old.iter().flat_map(Pool::retire) {
            // A new pool takes every job.
            let _ = new.submit(job);
        }
        *slot = Some(new);
        drop(slot);
        self.retired
            .extend(old.iter().map(|pool| (class, pool.life())));
        dispose(old);
    }

    /// Have so many pools of the class calls under way that a further one would be too much?
    fn is_full(&mut self, class: Class) -> bool {
        self.retired.retain(|(_, life)| life.lasts());
        let retired = self.retired.iter().filter(|(of, _)| *of == class).count();
        retired + 1 >= POOLS_PER_CLASS
    }

    fn look(&self) -> Happened {
        for class in Class::ALL {
            if let Some(pool) = &*self.shared.pool(class)
                && !pool.resource().is_alive()
            {
                let reason = "the connection is not alive".to_owned();
                return Happened::Closed(class, pool.generation(), reason);
            }
        }
        Happened::Nothing
    }
}

/// Drops a pool on a thread of its own, because the end of a connection is a call to libvirt.
fn dispose(pool: Option<Pool<Connection>>) {
    if let Some(pool) = pool {
        let thread = std::thread::Builder::new().name("lv-close".to_owned());
        if let Err(error) = thread.spawn(move || drop(pool)) {
            tracing::error!(%error, "cannot start a thread to close a connection");
        }
    }
}
