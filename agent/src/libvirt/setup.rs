// SPDX-License-Identifier: Apache-2.0
//! What the layer is set up with: how to talk to libvirt, and libvirt's event loop. It knows no domain.

use std::io;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::Duration;

/// How to talk to libvirt.
#[derive(Debug, Clone)]
pub struct Config {
    /// libvirt's URI, `qemu:///system` as a rule.
    pub uri: String,
    /// The folder in which it keeps the definitions of domains.
    pub definitions: PathBuf,
    /// How long a call may take that should take no time.
    pub call_timeout: Duration,
    /// How long a call may take that asks a guest or its QEMU (shutdown, guest agent). It is to be
    /// shorter: when it has passed, the threads that hang are replaced.
    pub guest_timeout: Duration,
    /// How long a start may take.
    pub start_timeout: Duration,
    /// How long a destroy may take. A QEMU that hangs needs more than 10 s: libvirt first asks it to
    /// end, then kills it.
    pub destroy_timeout: Duration,
    /// How often each connection is probed; whole seconds.
    pub keepalive_interval: Duration,
    /// How many probes may go unanswered before the connection counts as lost.
    pub keepalive_count: u32,
}

impl Config {
    /// The defaults for a URI.
    #[must_use]
    pub fn new(uri: impl Into<String>) -> Self {
        Self {
            uri: uri.into(),
            definitions: PathBuf::from("/etc/libvirt/qemu"),
            call_timeout: Duration::from_secs(30),
            guest_timeout: Duration::from_secs(10),
            start_timeout: Duration::from_secs(120),
            destroy_timeout: Duration::from_secs(40),
            keepalive_interval: Duration::from_secs(5),
            keepalive_count: 3,
        }
    }
}

/// Why the layer could not be set up. That libvirt is away is no reason.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The URI cannot be one.
    #[error("the libvirt URI {uri:?} contains a NUL; give one like qemu:///system")]
    Uri {
        /// The URI.
        uri: String,
    },
    /// libvirt's event loop could not be set up.
    #[error("libvirt's event loop cannot be set up: {message}")]
    EventLoop {
        /// libvirt's message.
        message: String,
    },
    /// A thread could not be started.
    #[error("a thread for libvirt cannot be started")]
    Thread(#[source] io::Error),
}

/// Registers libvirt's default event loop and starts its thread, once per process. It has to be
/// there before the first connection is opened, or that one has neither events nor keepalive.
pub(super) fn start_event_loop() -> Result<(), OpenError> {
    static STARTED: OnceLock<Result<(), String>> = OnceLock::new();
    let started = STARTED.get_or_init(|| {
        virt::error::clear_error_callback();
        virt::event::event_register_default_impl().map_err(|e| e.message().to_owned())?;
        std::thread::Builder::new()
            .name("lv-events".to_owned())
            .spawn(run_event_loop)
            .map(drop)
            .map_err(|error| error.to_string())
    });
    started
        .clone()
        .map_err(|message| OpenError::EventLoop { message })
}

fn run_event_loop() {
    loop {
        if let Err(error) = virt::event::event_run_default_impl() {
            tracing::error!(error = error.message(), "libvirt's event loop failed");
            // poll(2) failed, for want of memory as a rule. Do not spin.
            std::thread::park_timeout(Duration::from_millis(100));
        }
    }
}
