// SPDX-License-Identifier: Apache-2.0
//! Serial ports: one line to each, and everybody who is attached to it.
//!
//! ```text
//!   guest <──> libvirt ──> line's thread ──> history ─┬─> client, writes
//!                ^                                    ├─> client, looks on
//!                └──────────── whoever may write ─────┴─> …
//! ```
//!
//! The first client opens the line, and when the last one has gone it is closed. The line's thread
//! waits for nobody: a client that does not keep up misses pieces, and is told how many.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::{Mutex as AsyncMutex, broadcast, mpsc, watch},
    time::timeout,
};
use uuid::Uuid;

use crate::{
    core::reason::{Reason, Refusal},
    engine::now_ms,
    hypervisor::{ConsoleSaid, Hypervisor},
};

/// What is kept for who comes later.
const HISTORY: usize = 64 << 10;

/// A client may be so many pieces behind.
const BEHIND: usize = 256;

/// So many clients may be attached to one port.
const CLIENTS: u32 = 32;

/// A line that is about to close is waited for no longer.
const CLOSES: Duration = Duration::from_secs(10);

/// Others who attach to the same port are waited for no longer.
const TURN: Duration = Duration::from_secs(30);

/// What a client hears.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Heard {
    /// The guest wrote this.
    Output(Arc<[u8]>),
    /// So many pieces were missed.
    Lost(u64),
    /// Another client writes from now on.
    TakenOver {
        /// The client that wrote until now.
        from: u64,
        /// Who writes now.
        by: Arc<str>,
    },
    /// The line has ended. Nothing follows.
    Ended(Arc<str>),
}

/// How somebody wants to be attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wish {
    /// Look on only.
    pub read_only: bool,
    /// Take over from whoever writes.
    pub force: bool,
    /// Begin with what was said before.
    pub history: bool,
}

struct Writer {
    client: u64,
    caller: String,
    since_ms: i64,
}

#[derive(Default)]
struct State {
    input: Option<mpsc::Sender<Vec<u8>>>,
    history: VecDeque<u8>,
    writer: Option<Writer>,
    clients: u32,
    next: u64,
    ended: bool,
}

/// A line and its clients.
struct Session {
    state: Mutex<State>,
    output: broadcast::Sender<Heard>,
    /// The line is closed, and another can be opened.
    gone: watch::Sender<bool>,
}

impl Session {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::default(),
            output: broadcast::Sender::new(BEHIND),
            gone: watch::Sender::new(false),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the line says, on its thread.
    fn hear(&self, said: ConsoleSaid<'_>) {
        let mut state = self.state();
        let heard = match said {
            ConsoleSaid::Bytes(bytes) => {
                state.history.extend(bytes);
                let over = state.history.len().saturating_sub(HISTORY);
                state.history.drain(..over);
                Heard::Output(bytes.into())
            }
            ConsoleSaid::Ended(why) => {
                state.ended = true;
                state.input = None;
                self.gone.send_replace(true);
                Heard::Ended(why.into())
            }
        };
        // Under the lock, so that who joins has a piece either as history or as news. Nobody listening
        // is no error.
        let _ = self.output.send(heard);
    }

    /// One client more; `None` if the line is closed or about to be.
    fn join(self: &Arc<Self>, caller: &str, wish: Wish) -> Result<Option<Attached>, Refusal> {
        let mut state = self.state();
        if state.ended {
            return Ok(None);
        }
        if state.clients >= CLIENTS {
            return Err(Refusal::new(
                Reason::ConsoleLimit,
                format!("{CLIENTS} clients are attached to this serial port already"),
            ));
        }
        state.next += 1;
        let number = state.next;
        if !wish.read_only {
            match &state.writer {
                Some(writer) if !wish.force => return Err(busy(writer)),
                Some(writer) => {
                    let from = writer.client;
                    let by = caller.into();
                    let _ = self.output.send(Heard::TakenOver { from, by });
                }
                None => {}
            }
            state.writer = Some(Writer {
                client: number,
                caller: caller.to_owned(),
                since_ms: now_ms(),
            });
        }
        state.clients += 1;
        let history = match wish.history {
            true => state.history.iter().copied().collect(),
            false => Vec::new(),
        };
        let client = Client {
            session: Arc::clone(self),
            number,
        };
        Ok(Some(Attached {
            heard: self.output.subscribe(),
            history,
            clients: state.clients,
            writer: !wish.read_only,
            client: Arc::new(client),
        }))
    }

    async fn gone(&self) {
        let mut gone = self.gone.subscribe();
        // The line's thread tells of its end in any case; if it hangs, opening will say so.
        let _ = timeout(CLOSES, gone.wait_for(|gone| *gone)).await;
    }
}

fn busy(writer: &Writer) -> Refusal {
    let seconds = now_ms().saturating_sub(writer.since_ms) / 1_000;
    Refusal::new(
        Reason::ConsoleBusy,
        format!(
            "{} has been writing to this serial port for {seconds} s; look on (read-only), or take over (force)",
            writer.caller
        ),
    )
}

/// One attached client. It is detached when this is dropped.
pub struct Client {
    session: Arc<Session>,
    number: u64,
}

impl Client {
    /// Is this the client that [`Heard::TakenOver`] is about?
    #[must_use]
    pub fn is(&self, number: u64) -> bool {
        self.number == number
    }

    /// Sends bytes to the guest, as fast as it takes them. `false` if this client may not write.
    pub async fn write(&self, bytes: Vec<u8>) -> bool {
        let input = {
            let state = self.session.state();
            let mine = state
                .writer
                .as_ref()
                .is_some_and(|w| w.client == self.number);
            state.input.clone().filter(|_| mine)
        };
        match input {
            Some(input) => input.send(bytes).await.is_ok(),
            None => false,
        }
    }

    /// Writes no more.
    pub fn lay_down_the_pen(&self) {
        let mut state = self.session.state();
        if state
            .writer
            .as_ref()
            .is_some_and(|w| w.client == self.number)
        {
            state.writer = None;
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.lay_down_the_pen();
        let mut state = self.session.state();
        state.clients = state.clients.saturating_sub(1);
        if state.clients == 0 {
            state.ended = true;
            // The line closes.
            state.input = None;
        }
    }
}

/// What a new client is given.
pub struct Attached {
    /// What it hears from now on.
    pub heard: broadcast::Receiver<Heard>,
    /// What was said before, if asked for.
    pub history: Vec<u8>,
    /// So many clients there are, this one included.
    pub clients: u32,
    /// May it write?
    pub writer: bool,
    /// The client.
    pub client: Arc<Client>,
}

type Slot = Arc<AsyncMutex<Option<Arc<Session>>>>;

/// The serial ports of this host.
#[derive(Clone)]
pub struct Ports {
    hypervisor: Arc<dyn Hypervisor>,
    slots: Arc<Mutex<HashMap<Uuid, Slot>>>,
}

impl Ports {
    /// No port is connected with yet.
    #[must_use]
    pub fn new(hypervisor: Arc<dyn Hypervisor>) -> Self {
        Self {
            hypervisor,
            slots: Arc::default(),
        }
    }

    /// Attaches a client to the serial port of a server's running guest.
    ///
    /// # Errors
    /// [`Reason::ConsoleBusy`], [`Reason::ConsoleLimit`], or what the hypervisor says.
    pub async fn attach(
        &self,
        server: Uuid,
        caller: &str,
        wish: Wish,
    ) -> Result<Attached, Refusal> {
        let slot = self.slot(server);
        let Ok(mut held) = timeout(TURN, slot.lock()).await else {
            let message = "others wait to be connected with this serial port";
            return Err(Refusal::new(Reason::DeadlineExceeded, message));
        };
        if let Some(session) = held.as_ref() {
            if let Some(attached) = session.join(caller, wish)? {
                return Ok(attached);
            }
            session.gone().await;
        }
        let session = Session::new();
        let hearing = Arc::clone(&session);
        let said = Box::new(move |said: ConsoleSaid<'_>| hearing.hear(said));
        let input = self.hypervisor.open_console(server, wish.force, said);
        let input = input.await?;
        {
            let mut state = session.state();
            if !state.ended {
                state.input = Some(input);
            }
        }
        let attached = session.join(caller, wish)?;
        *held = Some(session);
        attached.ok_or_else(|| {
            let message = "the guest ended while its serial port was being connected with";
            Refusal::new(Reason::GuestNotRunning, message)
        })
    }

    fn slot(&self, server: Uuid) -> Slot {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        // What nobody holds and has ended is as good as new.
        slots.retain(|_, slot| {
            Arc::strong_count(slot) > 1
                || slot
                    .try_lock()
                    .is_ok_and(|held| held.as_ref().is_some_and(|session| !*session.gone.borrow()))
        });
        Arc::clone(slots.entry(server).or_default())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]

    use super::*;
    use crate::hypervisor::fake::FakeHypervisor;

    const SERVER: Uuid = Uuid::from_u128(1);
    const WRITE: Wish = Wish {
        read_only: false,
        force: false,
        history: false,
    };
    const LOOK: Wish = Wish {
        read_only: true,
        ..WRITE
    };
    const FORCE: Wish = Wish {
        force: true,
        ..WRITE
    };
    const LATE: Wish = Wish {
        history: true,
        ..LOOK
    };

    async fn host() -> (FakeHypervisor, Ports) {
        let host = FakeHypervisor::new();
        let xml = format!("<domain><name>d</name><uuid>{SERVER}</uuid></domain>");
        host.define(&xml).await.unwrap();
        host.start(SERVER, crate::hypervisor::Boot::Fresh)
            .await
            .unwrap();
        let ports = Ports::new(Arc::new(host.clone()));
        (host, ports)
    }

    async fn hear(attached: &mut Attached) -> Heard {
        let heard = timeout(Duration::from_secs(20), attached.heard.recv());
        heard.await.unwrap().unwrap()
    }

    fn output(text: &str) -> Heard {
        Heard::Output(text.as_bytes().into())
    }

    #[tokio::test]
    async fn one_client_writes_and_all_hear_the_same() {
        let (host, ports) = host().await;
        let mut first = ports.attach(SERVER, "uid:1", WRITE).await.unwrap();
        let mut viewer = ports.attach(SERVER, "uid:2", LOOK).await.unwrap();
        assert_eq!((first.writer, first.clients), (true, 1));
        assert_eq!((viewer.writer, viewer.clients), (false, 2));
        assert!(!viewer.client.write(b"no".to_vec()).await);
        // The fake port says what is sent to it.
        assert!(first.client.write(b"ls\n".to_vec()).await);
        assert_eq!(hear(&mut first).await, output("ls\n"));
        assert_eq!(hear(&mut viewer).await, output("ls\n"));

        let refused = ports.attach(SERVER, "uid:3", WRITE).await.err().unwrap();
        assert_eq!(refused.reason, Reason::ConsoleBusy);
        assert!(refused.message.contains("uid:1"), "{}", refused.message);

        let mut third = ports.attach(SERVER, "uid:3", FORCE).await.unwrap();
        let taken = hear(&mut first).await;
        let Heard::TakenOver { from, by } = taken else {
            panic!("{taken:?}");
        };
        assert!(first.client.is(from) && !viewer.client.is(from));
        assert_eq!(&*by, "uid:3");
        assert!(!first.client.write(b"mine?".to_vec()).await);
        assert!(third.client.write(b"x".to_vec()).await);
        for client in [&mut first, &mut third] {
            assert_eq!(hear(client).await, output("x"));
        }

        // Who lays the pen down leaves it to the next.
        third.client.lay_down_the_pen();
        ports.attach(SERVER, "uid:4", WRITE).await.unwrap();

        let late = ports.attach(SERVER, "uid:5", LATE).await.unwrap();
        assert_eq!(late.history, b"ls\nx");
        host.guest_powers_off(SERVER);
        assert!(matches!(hear(&mut third).await, Heard::Ended(_)));
    }

    #[tokio::test]
    async fn the_line_is_closed_with_the_last_client_and_opened_again() {
        let (host, ports) = host().await;
        for _ in 0..3 {
            let mut first = ports.attach(SERVER, "uid:1", WRITE).await.unwrap();
            let second = ports.attach(SERVER, "uid:1", LATE).await.unwrap();
            assert_eq!(second.history, b"");
            host.guest_says(SERVER, b"hello");
            assert_eq!(hear(&mut first).await, output("hello"));
        }
        let opened = host.calls();
        let opened = opened
            .iter()
            .filter(|call| call.starts_with("open_console"));
        assert_eq!(opened.count(), 3);
    }

    #[tokio::test]
    async fn who_does_not_keep_up_is_told_and_holds_nobody_up() {
        let (host, ports) = host().await;
        let mut slow = ports.attach(SERVER, "uid:1", LOOK).await.unwrap();
        let mut fast = ports.attach(SERVER, "uid:1", LOOK).await.unwrap();
        for _ in 0..2 * BEHIND {
            host.guest_says(SERVER, &[b'x'; 1024]);
            assert!(matches!(hear(&mut fast).await, Heard::Output(_)));
        }
        let lagged = slow.heard.recv().await.unwrap_err();
        assert!(matches!(lagged, broadcast::error::RecvError::Lagged(_)));
        let late = ports.attach(SERVER, "uid:1", LATE).await.unwrap();
        assert_eq!(late.history.len(), HISTORY);
    }

    #[tokio::test]
    async fn clients_of_one_port_are_limited() {
        let (_host, ports) = host().await;
        let mut clients = Vec::new();
        for _ in 0..CLIENTS {
            clients.push(ports.attach(SERVER, "uid:1", LOOK).await.unwrap());
        }
        let refused = ports.attach(SERVER, "uid:1", LOOK).await.err().unwrap();
        assert_eq!(refused.reason, Reason::ConsoleLimit);
    }
}
