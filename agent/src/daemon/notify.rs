// SPDX-License-Identifier: Apache-2.0
//! What the agent tells the service manager (sd_notify(3)): ready, stopping, a status line, and that it is alive.
//!
//! Takes the environment as values, so that it can be tested; knows nothing of what the agent does. Without a service
//! manager every message goes nowhere.

use std::ffi::OsString;
use std::io;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::Arc;
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::time::MissedTickBehavior;

/// The link to the service manager.
#[derive(Debug, Clone)]
pub struct Notifier {
    socket: Option<Arc<UnixDatagram>>,
    watchdog: Option<Duration>,
}

/// What the service manager put into the environment.
#[derive(Debug, Clone, Default)]
pub struct NotifyEnvironment {
    /// `NOTIFY_SOCKET`.
    pub socket: Option<OsString>,
    /// `WATCHDOG_USEC`.
    pub watchdog_usec: Option<String>,
    /// `WATCHDOG_PID`: the process that the watchdog is meant for.
    pub watchdog_pid: Option<String>,
}

impl NotifyEnvironment {
    /// Reads the process's environment.
    #[must_use]
    pub fn from_process() -> Self {
        Self {
            socket: std::env::var_os("NOTIFY_SOCKET"),
            watchdog_usec: std::env::var("WATCHDOG_USEC").ok(),
            watchdog_pid: std::env::var("WATCHDOG_PID").ok(),
        }
    }

    /// The time after which the service manager gives up on a silent agent.
    fn watchdog(&self) -> Option<Duration> {
        let meant_for_us = self
            .watchdog_pid
            .as_deref()
            .is_none_or(|pid| pid.parse() == Ok(std::process::id()));
        let usec: u64 = self.watchdog_usec.as_deref()?.parse().ok()?;
        (meant_for_us && usec > 0).then_some(Duration::from_micros(usec))
    }
}

impl Notifier {
    /// Connects to the service manager if there is one.
    ///
    /// # Errors
    /// It named a socket that cannot be connected to.
    pub fn connect(environment: &NotifyEnvironment) -> io::Result<Self> {
        let socket = match environment.socket.as_deref().map(OsStrExt::as_bytes) {
            None | Some([]) => None,
            Some(name) => {
                let address = match name.strip_prefix(b"@") {
                    Some(name) => SocketAddr::from_abstract_name(name)?,
                    None => SocketAddr::from_pathname(std::ffi::OsStr::from_bytes(name))?,
                };
                let socket = UnixDatagram::unbound()?;
                socket.connect_addr(&address)?;
                // A service manager that does not read must not hold the agent up.
                socket.set_nonblocking(true)?;
                Some(Arc::new(socket))
            }
        };
        Ok(Self {
            socket,
            watchdog: environment.watchdog(),
        })
    }

    /// The agent serves requests.
    pub fn ready(&self, status: &str) {
        self.send(&[NotifyState::Ready, NotifyState::Status(&one_line(status))]);
    }

    /// The agent is ending, which takes at most `within`.
    pub fn stopping(&self, within: Duration, status: &str) {
        let usec = u32::try_from(within.as_micros()).unwrap_or(u32::MAX);
        self.send(&[
            NotifyState::Stopping,
            NotifyState::ExtendTimeoutUsec(usec),
            NotifyState::Status(&one_line(status)),
        ]);
    }

    /// Sends a sign of life in half of the time that the service manager allows, each time that `progress` says that the
    /// agent gets on with its work. `progress` must not block. Ends only by being dropped; without a watchdog it costs
    /// nothing.
    pub async fn heartbeat(self, progress: impl Fn() -> bool) {
        let Some(allowed) = self.watchdog else {
            return std::future::pending().await;
        };
        let half = (allowed / 2).max(Duration::from_millis(1));
        let mut ticks = tokio::time::interval(half);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            if progress() {
                self.send(&[NotifyState::Watchdog]);
            } else {
                tracing::error!("no progress: the watchdog is not answered");
            }
        }
    }

    fn send(&self, states: &[NotifyState<'_>]) {
        let Some(socket) = &self.socket else { return };
        let lines: Vec<String> = states.iter().map(ToString::to_string).collect();
        if let Err(error) = socket.send(lines.join("\n").as_bytes()) {
            tracing::warn!(%error, "the service manager could not be told: {}", lines.join(", "));
        }
    }
}

/// In a message every line is an assignment of its own.
fn one_line(status: &str) -> String {
    status.replace(char::is_control, " ")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Instant;

    use super::*;

    /// A service manager that listens on `name`.
    fn manager(address: &SocketAddr) -> UnixDatagram {
        let socket = UnixDatagram::bind_addr(address).unwrap();
        socket
            .set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        socket
    }

    fn received(socket: &UnixDatagram) -> String {
        let mut buffer = [0; 512];
        let length = loop {
            match socket.recv(&mut buffer) {
                // A socket with a timeout is interrupted whenever the process was stopped (signal(7)).
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                received => break received.unwrap(),
            }
        };
        String::from_utf8_lossy(buffer.get(..length).unwrap()).into_owned()
    }

    #[test]
    fn the_manager_hears_ready_and_stopping_with_one_line_of_status() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let manager = manager(&SocketAddr::from_pathname(&path).unwrap());
        let environment = NotifyEnvironment {
            socket: Some(path.into()),
            ..NotifyEnvironment::default()
        };
        let notifier = Notifier::connect(&environment).unwrap();
        notifier.ready("serving\nMAINPID=1");
        assert_eq!(received(&manager), "READY=1\nSTATUS=serving MAINPID=1");
        notifier.stopping(Duration::from_secs(2), "draining");
        assert_eq!(
            received(&manager),
            "STOPPING=1\nEXTEND_TIMEOUT_USEC=2000000\nSTATUS=draining"
        );
    }

    #[test]
    fn abstract_sockets_are_reached_too() {
        let name = format!("salvor-test-{}", std::process::id());
        let manager = manager(&SocketAddr::from_abstract_name(&name).unwrap());
        let environment = NotifyEnvironment {
            socket: Some(format!("@{name}").into()),
            ..NotifyEnvironment::default()
        };
        Notifier::connect(&environment).unwrap().ready("x");
        assert!(received(&manager).starts_with("READY=1\n"));
    }

    #[test]
    fn without_a_manager_messages_go_nowhere() {
        let notifier = Notifier::connect(&NotifyEnvironment::default()).unwrap();
        notifier.ready("serving");
        let missing = NotifyEnvironment {
            socket: Some("/nonexistent/notify".into()),
            ..NotifyEnvironment::default()
        };
        assert!(Notifier::connect(&missing).is_err());
    }

    #[test]
    fn the_watchdog_is_only_for_the_process_it_names() {
        let watchdog = |usec: &str, pid: Option<String>| {
            NotifyEnvironment {
                socket: None,
                watchdog_usec: Some(usec.into()),
                watchdog_pid: pid,
            }
            .watchdog()
        };
        let own = Some(std::process::id().to_string());
        assert_eq!(watchdog("2000000", None), Some(Duration::from_secs(2)));
        assert_eq!(watchdog("2000000", own), Some(Duration::from_secs(2)));
        assert_eq!(watchdog("2000000", Some("1".into())), None);
        assert_eq!(watchdog("0", None), None);
        assert_eq!(watchdog("soon", None), None);
    }

    #[tokio::test]
    async fn a_heartbeat_is_only_sent_while_there_is_progress() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let manager = manager(&SocketAddr::from_pathname(&path).unwrap());
        let environment = NotifyEnvironment {
            socket: Some(path.into()),
            watchdog_usec: Some("20000".into()),
            watchdog_pid: None,
        };
        let notifier = Notifier::connect(&environment).unwrap();
        let asked = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&asked);
        // Progress at the first and third question, none at the second and from the fourth on.
        let heartbeat = tokio::spawn(
            notifier.heartbeat(move || matches!(counter.fetch_add(1, Ordering::SeqCst), 0 | 2)),
        );
        let deadline = Instant::now() + Duration::from_secs(10);
        while asked.load(Ordering::SeqCst) < 6 && Instant::now() < deadline {
            tokio::task::yield_now().await;
        }
        heartbeat.abort();
        manager.set_nonblocking(true).unwrap();
        let mut beats = 0;
        while manager.recv(&mut [0; 64]).is_ok() {
            beats += 1;
        }
        assert_eq!(beats, 2);
    }
}
