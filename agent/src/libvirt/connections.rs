// SPDX-License-Identifier: Apache-2.0
//! The connections to libvirt and the thread that keeps the link up.
//!
//! ```text
//!   callers ──> pool Read ──────> threads, a connection each
//!           ──> pool Mutate ────> threads, a connection each
//!           ──> pool Emergency ─> threads, a connection each
//!           ──> pool Probe ─────> threads, a connection each
//!           ──> console ────────> a thread and a connection for each serial port
//!
//!   event loop thread <── the connection for events ── keepalive, close callback
//!                                  ^                            │
//!            opener thread ── Open ┴──── supervisor thread <────┘ notices
//! ```
//!
//! The connection for events makes no calls, so nothing holds up events. Whether it stands is what
//! the link's state means. The supervisor asks [`Link`] what to do; it never calls libvirt in a way
//! that could block it: the connection is opened and closed on threads of their own.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use tokio::sync::{broadcast, watch};
use virt::connect::Connect;
use virt::enumutil::Enum;
use virt::error::{Error, ErrorNumber};

use super::Config;
use super::ffi::{CloseWatch, DomainEvents, EventKind, Sink, Told};
use super::link::{Do, Happened, Link};
use super::threads::{Job, Pool, Source, StuckCalls, Ticket};
use super::words;
use crate::core::incident::{Incident, IncidentKind};
use crate::core::text;
use crate::hypervisor::{HypervisorEvent, LinkState};

/// How often the connection for events is asked whether it is alive, for drivers without a close
/// callback.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// What a call is for. Calls of one class never wait for those of another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Class {
    /// Only calls that neither take a domain's job lock nor ask its monitor.
    Read,
    /// Whatever changes something or talks to a guest.
    Mutate,
    /// Destroy, and nothing else.
    Emergency,
    /// Questions to a guest or its QEMU that nothing depends on.
    Probe,
}

impl Class {
    /// The name of its threads, for people who look at the process.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Read => "lv-read",
            Self::Mutate => "lv-change",
            Self::Emergency => "lv-destroy",
            Self::Probe => "lv-probe",
        }
    }

    /// How many calls may be under way at once, those that hang included. Together they are not more
    /// than libvirtd has workers by default (`max_workers = 20`), and those that can hang for long
    /// leave it some. (Probes come on top of that, and are few.)
    pub(super) const fn limit(self) -> usize {
        match self {
            Self::Read => 6,
            Self::Mutate => 10,
            Self::Emergency => 8,
            Self::Probe => 3,
        }
    }
}

/// Opens the connections that calls are made on.
pub(super) struct CallConnections(Arc<Config>);

impl Source for CallConnections {
    type Item = Connect;
    type Error = Error;

    fn open(&self) -> Result<Connect, Error> {
        open(&self.0)
    }

    fn is_alive(&self, connect: &Connect) -> bool {
        is_alive(connect)
    }
}

/// Is it usable? A question to this side of the connection, which is answered at once.
pub(super) fn is_alive(connect: &Connect) -> bool {
    connect.is_alive().unwrap_or(false)
}

/// Opens a connection. It may block for as long as libvirt likes.
pub(super) fn open(config: &Config) -> Result<Connect, Error> {
    let connect = Connect::open(Some(&config.uri))?;
    let seconds = i32::try_from(config.keepalive_interval.as_secs()).unwrap_or(i32::MAX);
    optional(connect.set_keep_alive(seconds, config.keepalive_count))?;
    Ok(connect)
}

/// `None` where the driver does not have the function at all.
fn optional<T>(answer: Result<T, Error>) -> Result<Option<T>, Error> {
    match answer {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.code() == Enum::Known(ErrorNumber::NoSupport) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The connection that events come over, with its registrations, which end before it does.
pub(super) struct EventConnection {
    _events: Vec<DomainEvents>,
    _close: Option<CloseWatch>,
    connect: Connect,
}

/// What the supervisor is told.
pub(super) enum Notice {
    /// An opener thread is done.
    Opened(Result<Box<EventConnection>, String>),
    /// The connection of this number has ended.
    Closed(u64, String),
    /// A call has found its connection dead: look whether the one for events is.
    Look,
    /// The end.
    Stop,
}

/// What the supervisor and the callers share.
pub(super) struct Connections {
    pub(super) config: Arc<Config>,
    read: Pool<CallConnections>,
    mutate: Pool<CallConnections>,
    emergency: Pool<CallConnections>,
    probe: Pool<CallConnections>,
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
        let config = Arc::new(config);
        let pool = |class: Class| {
            let source = CallConnections(Arc::clone(&config));
            Pool::new(class.name(), class.limit(), source)
        };
        Self {
            read: pool(Class::Read),
            mutate: pool(Class::Mutate),
            emergency: pool(Class::Emergency),
            probe: pool(Class::Probe),
            stuck: StuckCalls::default(),
            link: watch::Sender::new(Link::new().published().clone()),
            events,
            notices,
            config,
        }
    }

    /// Tells the supervisor.
    pub(super) fn notify(&self, notice: Notice) {
        // It is gone only when everything is.
        let _ = self.notices.send(notice);
    }

    /// Queues a job.
    pub(super) fn submit(&self, class: Class, job: Job<Connect, Error>) {
        match class {
            Class::Read => self.read.submit(job),
            Class::Mutate => self.mutate.submit(job),
            Class::Emergency => self.emergency.submit(job),
            Class::Probe => self.probe.submit(job),
        }
    }

    /// Opens a connection in each class before somebody waits for it.
    fn warm_up(&self) {
        for class in [Class::Read, Class::Mutate, Class::Emergency] {
            let ticket = Ticket::new("virConnectOpen", class.name(), None);
            self.submit(class, Job::new(&ticket, |_| ()));
        }
    }

    /// Opens the connection for events. It may block for as long as libvirt likes.
    fn open(&self, number: u64) -> Result<EventConnection, Error> {
        let connect = open(&self.config)?;
        let notices = self.notices.clone();
        let close = CloseWatch::new(
            &connect,
            Box::new(move |told| {
                if let Told::Closed { reason } = told {
                    let reason = words::closed(reason).to_owned();
                    let _ = notices.send(Notice::Closed(number, reason));
                }
            }),
        );
        let register = |kind| DomainEvents::register(&connect, kind, self.sink());
        let mut events = vec![register(EventKind::Lifecycle)?];
        for kind in EventKind::OPTIONAL {
            events.extend(optional(register(*kind))?);
        }
        Ok(EventConnection {
            _events: events,
            _close: optional(close)?,
            connect,
        })
    }

    fn sink(&self) -> Sink {
        let events = self.events.clone();
        Box::new(move |told| {
            for event in heard(told) {
                // Nobody listening is no error.
                let _ = events.send(event);
            }
        })
    }
}

/// What was told, in our words.
fn heard(told: Told) -> Vec<HypervisorEvent> {
    let guest = |id, incident| HypervisorEvent::Guest { id, incident };
    let event = match told {
        Told::Lifecycle { id, event } => {
            let mut events = vec![HypervisorEvent::Domain {
                id,
                what: words::lifecycle(event),
            }];
            if words::is_panic(event) {
                events.push(guest(id, Incident::new(IncidentKind::Panicked)));
            }
            return events;
        }
        Told::GuestAgent { id, state } => HypervisorEvent::GuestAgent {
            id,
            connected: words::agent_connected(state),
        },
        Told::Reboot { id } => guest(id, Incident::new(IncidentKind::Rebooted)),
        Told::Watchdog { id, action } => {
            let action = words::watchdog(action);
            guest(
                id,
                Incident::told(IncidentKind::Watchdog, "", "", "", action),
            )
        }
        Told::IoError {
            id,
            source,
            device,
            action,
            reason,
        } => {
            let (reason, action) = (
                words::io_error_reason(&reason),
                words::io_error_action(action),
            );
            let kind = IncidentKind::IoError;
            guest(id, Incident::told(kind, &device, &source, reason, action))
        }
        Told::BlockJob { id, disk, status } => HypervisorEvent::BlockJob {
            id,
            disk: text::echo(&disk),
            state: words::block_job(status),
        },
        Told::DeviceRemoved { id, device } => HypervisorEvent::DeviceRemoved {
            id,
            device: text::echo(&device),
        },
        Told::Balloon { id, memory_kib } => HypervisorEvent::Balloon { id, memory_kib },
        Told::Closed { .. } => return Vec::new(),
    };
    vec![event]
}

/// The thread that keeps the link up.
pub(super) struct Supervisor {
    shared: Arc<Connections>,
    notices: Receiver<Notice>,
    link: Link,
    connection: Option<Box<EventConnection>>,
}

impl Supervisor {
    pub(super) fn new(shared: Arc<Connections>, notices: Receiver<Notice>) -> Self {
        Self {
            shared,
            notices,
            link: Link::new(),
            connection: None,
        }
    }

    /// Runs until it is told to stop.
    pub(super) fn run(mut self) {
        let mut happened = Happened::Nothing;
        let mut brought = None;
        loop {
            for todo in self.link.after(happened, Instant::now()) {
                self.act(todo, &mut brought);
            }
            let wait = self.link.next_attempt();
            let wait = wait.map(|at| at.saturating_duration_since(Instant::now()));
            let wait = wait.unwrap_or(LOOK_EVERY).min(LOOK_EVERY);
            happened = match self.notices.recv_timeout(wait) {
                Ok(Notice::Opened(Ok(connection))) => {
                    brought = Some(connection);
                    Happened::Opened
                }
                Ok(Notice::Opened(Err(reason))) => Happened::OpenFailed(reason),
                Ok(Notice::Closed(number, reason)) => Happened::Closed(number, reason),
                Ok(Notice::Look) | Err(RecvTimeoutError::Timeout) => self.look(),
                Ok(Notice::Stop) | Err(RecvTimeoutError::Disconnected) => break,
            };
        }
        dispose(self.connection);
    }

    fn act(&mut self, todo: Do, brought: &mut Option<Box<EventConnection>>) {
        match todo {
            Do::Open(number) => self.open(number),
            Do::Keep => {
                dispose(std::mem::replace(&mut self.connection, brought.take()));
                self.shared.warm_up();
            }
            Do::Forget => dispose(self.connection.take()),
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

    fn open(&self, number: u64) {
        let shared = Arc::clone(&self.shared);
        let opener = move || {
            let opened = shared.open(number).map(Box::new);
            let opened = opened.map_err(|error| error.message().to_owned());
            shared.notify(Notice::Opened(opened));
        };
        let thread = std::thread::Builder::new().name("lv-open".to_owned());
        if let Err(error) = thread.spawn(opener) {
            let reason = format!("cannot start a thread: {error}");
            self.shared.notify(Notice::Opened(Err(reason)));
        }
    }

    fn look(&self) -> Happened {
        match (&self.connection, self.link.up()) {
            (Some(connection), Some(number)) if !is_alive(&connection.connect) => {
                Happened::Closed(number, "the connection is not alive".to_owned())
            }
            _ => Happened::Nothing,
        }
    }
}

/// Drops a connection on a thread of its own, because its end is a call to libvirt.
fn dispose(connection: Option<Box<EventConnection>>) {
    if let Some(connection) = connection {
        let thread = std::thread::Builder::new().name("lv-close".to_owned());
        if let Err(error) = thread.spawn(move || drop(connection)) {
            tracing::error!(%error, "cannot start a thread to close a connection");
        }
    }
}
