// SPDX-License-Identifier: Apache-2.0
//! How the agent is asked to end, as a value that is handed to whoever needs to know.
//!
//! ```text
//!  Running ──SIGTERM, SIGINT──> Draining ──drain.timeout or a second signal──> Expired
//! ```

use std::io;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};

/// Where in its life the agent is. It only goes forward.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    /// Everything is served.
    Running,
    /// New work is refused; what runs may end.
    Draining,
    /// What still runs is left for recovery.
    Expired,
}

/// A view of the agent's phase. Clones see the same.
#[derive(Debug, Clone)]
pub struct Drain {
    phase: watch::Receiver<Phase>,
}

impl Drain {
    /// Completes when new work must no longer begin.
    pub async fn draining(&self) {
        self.reached(Phase::Draining).await;
    }

    /// Completes when running work must be left as it is.
    pub async fn expired(&self) {
        self.reached(Phase::Expired).await;
    }

    async fn reached(&self, phase: Phase) {
        // An error means that nobody can ask any more: the process is ending.
        let _ = self.phase.clone().wait_for(|now| *now >= phase).await;
    }
}

/// A signal that the agent acts upon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Signal {
    Terminate,
    Interrupt,
    HangUp,
}

/// Takes over SIGTERM, SIGINT and SIGHUP. After the first of the former two, running work has `timeout`; the second ends
/// it at once. SIGHUP is only noted: the configuration is read once.
///
/// # Errors
/// The handlers cannot be installed.
pub(super) fn handle(timeout: Duration) -> io::Result<Drain> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hang_up = signal(SignalKind::hangup())?;
    let (sender, signals) = mpsc::channel(8);
    tokio::spawn(async move {
        loop {
            let signal = tokio::select! {
                _ = terminate.recv() => Signal::Terminate,
                _ = interrupt.recv() => Signal::Interrupt,
                _ = hang_up.recv() => Signal::HangUp,
            };
            if sender.send(signal).await.is_err() {
                return;
            }
        }
    });
    Ok(drain_on(signals, timeout))
}

/// A drain that a test moves on: the first message drains, the second ends.
#[cfg(test)]
pub(super) struct ByHand(mpsc::Sender<Signal>);

#[cfg(test)]
impl ByHand {
    pub(super) fn new() -> (Self, Drain) {
        let (sender, signals) = mpsc::channel(8);
        (Self(sender), drain_on(signals, Duration::from_secs(3600)))
    }

    pub(super) async fn ask(&self) {
        let _ = self.0.send(Signal::Terminate).await;
    }
}

fn drain_on(signals: mpsc::Receiver<Signal>, timeout: Duration) -> Drain {
    let (sender, phase) = watch::channel(Phase::Running);
    tokio::spawn(drive(signals, timeout, sender));
    Drain { phase }
}

async fn drive(
    mut signals: mpsc::Receiver<Signal>,
    timeout: Duration,
    phase: watch::Sender<Phase>,
) {
    let signal = asked_to_end(&mut signals).await;
    tracing::info!(
        ?signal,
        ?timeout,
        "draining: no new work; running work may end"
    );
    phase.send_replace(Phase::Draining);
    tokio::select! {
        () = tokio::time::sleep(timeout) => {}
        signal = asked_to_end(&mut signals) => {
            tracing::warn!(?signal, "asked again: ending now");
        }
    }
    phase.send_replace(Phase::Expired);
    // The sender must outlive every waiter; these end with the process.
    phase.closed().await;
}

/// The next signal that asks the agent to end.
async fn asked_to_end(signals: &mut mpsc::Receiver<Signal>) -> Signal {
    loop {
        match signals.recv().await {
            Some(Signal::HangUp) => {
                tracing::info!("SIGHUP is ignored: restart the agent to read the configuration");
            }
            Some(signal) => return signal,
            None => return std::future::pending().await,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use tokio::time::timeout;

    use super::*;

    const LONG: Duration = Duration::from_secs(3600);
    const PATIENCE: Duration = Duration::from_secs(10);

    #[tokio::test]
    async fn the_first_signal_drains_and_the_second_ends() {
        let (send, signals) = mpsc::channel(8);
        let drain = drain_on(signals, LONG);
        assert_eq!(*drain.phase.borrow(), Phase::Running);
        send.send(Signal::Terminate).await.unwrap();
        timeout(PATIENCE, drain.draining()).await.unwrap();
        assert_eq!(*drain.phase.borrow(), Phase::Draining);
        send.send(Signal::Interrupt).await.unwrap();
        timeout(PATIENCE, drain.expired()).await.unwrap();
        assert_eq!(*drain.phase.borrow(), Phase::Expired);
    }

    #[tokio::test]
    async fn draining_ends_at_its_deadline() {
        let (send, signals) = mpsc::channel(8);
        let drain = drain_on(signals, Duration::from_millis(10));
        send.send(Signal::Interrupt).await.unwrap();
        timeout(PATIENCE, drain.expired()).await.unwrap();
        // Who comes late is told at once.
        timeout(PATIENCE, drain.draining()).await.unwrap();
    }

    #[tokio::test]
    async fn a_hang_up_changes_nothing() {
        let (send, signals) = mpsc::channel(1);
        let drain = drain_on(signals, LONG);
        // The third one only fits once the first two were looked at.
        for _ in 0..3 {
            send.send(Signal::HangUp).await.unwrap();
        }
        assert_eq!(*drain.phase.borrow(), Phase::Running);
        send.send(Signal::Terminate).await.unwrap();
        send.send(Signal::HangUp).await.unwrap();
        send.send(Signal::HangUp).await.unwrap();
        timeout(PATIENCE, drain.draining()).await.unwrap();
        assert_eq!(*drain.phase.borrow(), Phase::Draining);
    }
}
