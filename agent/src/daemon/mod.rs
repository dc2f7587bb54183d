// SPDX-License-Identifier: Apache-2.0
//! The life of the agent's process, from a checked configuration to its end.
//!
//! ```text
//!  signals ─> state lock ─> services ─> socket ─> READY ─ serve ─ SIGTERM ─> refuse new work, health NOT_SERVING
//!                                                                              │ running work ends, or its time does
//!                              exit 0 <─ socket removed <─ streams end <───────┘
//! ```
//!
//! Owns the order of these steps and the process's relation to the host. Knows no verb and no libvirt: what is served and
//! what has to come to rest is one value, [`Services`].

mod boot;
mod lock;
mod notify;
mod parts;
mod server;
mod signals;
mod socket;
mod templates;

use std::io;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::thread::available_parallelism;
use std::time::Duration;

use thiserror::Error;
use tokio::runtime::Builder;
use tokio::sync::watch;
use tonic::service::Routes;

use crate::config::Config;
use crate::hypervisor::LinkState;
use crate::libvirt;
use crate::storage::files::FileError;
use crate::store::StoreError;

pub use self::boot::boot_id;
pub use self::lock::{LockError, StateLock};
pub use self::notify::{Notifier, NotifyEnvironment};
pub use self::server::{Serving, serve};
pub use self::signals::Drain;
pub use self::socket::{SocketError, SocketGuard, SocketOptions, bind};
pub use self::templates::{
    Checked, TemplatesDirError, Thoroughness, check_templates, load_templates,
};

/// More workers than this have nothing to do: they pass messages on, and calls that wait run elsewhere.
const WORKERS: usize = 4;

/// Enough for the deepest of our futures in a build without optimisation; the system's default is 2 MiB.
const WORKER_STACK: usize = 1 << 20;

/// Threads for calls that block and come back, such as hashing. Work on files that may hang has threads of
/// its own. They end after ten idle seconds.
const BLOCKING_THREADS: usize = 32;

/// Why the agent ended, or never began.
#[derive(Debug, Error)]
pub enum DaemonError {
    /// The runtime or the signal handlers could not be set up.
    #[error("cannot start: {doing}")]
    Start {
        /// What was being done.
        doing: &'static str,
        /// What the system says.
        source: io::Error,
    },
    /// The state folder is not ours.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// There is no socket to listen on.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The state folder cannot be used.
    #[error("the state folder cannot be used")]
    State(#[source] FileError),
    /// The store cannot be used.
    #[error("the store in the state folder cannot be used")]
    Store(#[from] StoreError),
    /// The templates cannot be used.
    #[error(transparent)]
    Templates(#[from] TemplatesDirError),
    /// libvirt's client library could not be set up.
    #[error("libvirt cannot be used")]
    Libvirt(#[from] libvirt::OpenError),
    /// A part panicked while it was set up.
    #[error("the {part} could not be set up; this is a fault of the agent")]
    Panicked {
        /// Which.
        part: &'static str,
    },
    /// `SALVOR_FAILPOINT` of a test build cannot be read.
    #[cfg(feature = "failpoints")]
    #[error("SALVOR_FAILPOINT has a part that cannot be read: {part:?}")]
    Failpoint {
        /// The part.
        part: String,
    },
    /// The service that describes the API could not be built.
    #[error("cannot describe the API for reflection")]
    Reflection(#[from] tonic_reflection::server::Error),
    /// The server ended although nobody asked it to.
    #[error("the server on {path:?} ended")]
    Server {
        /// The socket.
        path: PathBuf,
        /// What the server says.
        source: tonic::transport::Error,
    },
}

/// What the daemon serves, and what it needs to know of the work behind it.
pub struct Services {
    /// Every gRPC service but health, which the daemon itself answers.
    pub routes: Routes,
    /// Completes when no work runs any more. Polled once the agent drains, and dropped when its time is over.
    pub at_rest: Pin<Box<dyn Future<Output = ()> + Send>>,
    /// The link to libvirt, and the services whose health follows it.
    pub link: watch::Receiver<LinkState>,
    /// Their full names.
    pub need_link: &'static [&'static str],
    /// Whether the store can be written. Those services' health follows that, too.
    pub writable: watch::Receiver<bool>,
    /// Whether the work gets on. Asked for every beat of the watchdog; must not block.
    pub progress: Arc<dyn Fn() -> bool + Send + Sync>,
}

/// Runs the agent until it is asked to end. The log must be set up.
///
/// # Errors
/// The agent cannot start, or its server ends unasked.
pub fn run(config: &Config) -> Result<(), DaemonError> {
    let workers = available_parallelism().map_or(1, usize::from).min(WORKERS);
    let runtime = Builder::new_multi_thread()
        .worker_threads(workers)
        .thread_stack_size(WORKER_STACK)
        .max_blocking_threads(BLOCKING_THREADS)
        .thread_name("salvor")
        .enable_all()
        .build()
        .map_err(|source| DaemonError::Start {
            doing: "making threads",
            source,
        })?;
    let result = runtime.block_on(live(config));
    // What still blocks a thread must not hold up the end: its deadline is over, and the next start continues it.
    runtime.shutdown_background();
    result
}

async fn live(config: &Config) -> Result<(), DaemonError> {
    let drain = signals::handle(config.drain.timeout).map_err(|source| DaemonError::Start {
        doing: "handling signals",
        source,
    })?;
    let _lock = StateLock::take(&config.state_dir)?;
    let notifier = Notifier::connect(&NotifyEnvironment::from_process()).map_err(|source| {
        DaemonError::Start {
            doing: "reaching NOTIFY_SOCKET",
            source,
        }
    })?;
    let boot = boot_id().map_err(|source| DaemonError::Start {
        doing: "reading the host's boot id",
        source,
    })?;
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        pid = std::process::id(),
        %boot,
        state_dir = %config.state_dir.display(),
        "salvord starts"
    );

    let services = tokio::select! {
        // It may be dropped half-way by a signal, as if the process had been killed.
        services = parts::assemble(config, boot, &drain) => services?,
        () = drain.draining() => {
            tracing::info!("asked to end while starting");
            return Ok(());
        }
    };
    let (listener, _socket) = bind(&SocketOptions {
        path: &config.listen,
        mode: config.socket_mode,
        group: config.socket_group.as_deref(),
    })?;
    notifier.ready("serving");
    tracing::info!(listen = %config.listen.display(), "ready");

    let serving = Serving {
        listener,
        services,
        drain: drain.clone(),
        notifier,
    };
    serve(serving, within(config.drain.timeout))
        .await
        .map_err(|source| DaemonError::Server {
            path: config.listen.clone(),
            source,
        })?;
    tracing::info!("salvord ends");
    Ok(())
}

/// The longest time from the first signal to the end of the process, for the service manager.
fn within(drain_timeout: Duration) -> Duration {
    // What remains after the deadline is a rename and some frees; five seconds are for a host that swaps.
    drain_timeout.saturating_add(Duration::from_secs(5))
}
