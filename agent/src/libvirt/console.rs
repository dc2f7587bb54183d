// SPDX-License-Identifier: Apache-2.0
//! A line to a domain's serial port: a thread and a connection of its own.
//!
//! The stream does not block; the thread looks at it again every [`LOOK`], and sooner when there is
//! something to send. (libvirt's callbacks for streams run on the thread that all events come over,
//! which a talkative guest must not hold up.) Sending may block all the same while the guest does not
//! read: then only this line hangs, until the connection's keepalive ends it.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::time::timeout;
use uuid::Uuid;
use virt::error::{Error, ErrorNumber};
use virt::stream::Stream;
use virt::sys;

use super::Config;
use super::call::Call;
use super::connections;
use super::errors::{is, refusal};
use crate::hypervisor::{ConsoleSaid, ConsoleSink, HypervisorError, HypervisorResult};

/// So many lines may be open at once.
pub(super) const LINES: usize = 16;

/// How often the stream is looked at.
const LOOK: Duration = Duration::from_millis(15);

/// How long opening a line may take.
const OPEN: Duration = Duration::from_secs(10);

/// So many pieces may wait to be sent to the guest.
const QUEUE: usize = 16;

/// Output is taken in pieces of this size; so many are taken before it is looked whether there is input.
const PIECE: usize = 8 << 10;
const PIECES: usize = 64;

const NAME: &str = "virDomainOpenConsole";

type Opened = oneshot::Sender<HypervisorResult<mpsc::Sender<Vec<u8>>>>;

/// Opens a line.
pub(super) async fn open(
    config: &Arc<Config>,
    lines: &Arc<Semaphore>,
    id: Uuid,
    take_over: bool,
    said: ConsoleSink,
) -> HypervisorResult<mpsc::Sender<Vec<u8>>> {
    let permit = Arc::clone(lines)
        .try_acquire_owned()
        .map_err(|_| HypervisorError::TooManyConsoles { limit: LINES })?;
    let (opened, answer) = oneshot::channel();
    let line = Line {
        config: Arc::clone(config),
        runtime: Handle::current(),
        id,
        take_over,
        _permit: permit,
    };
    let thread = std::thread::Builder::new().name("lv-console".to_owned());
    let run = move || {
        if catch_unwind(AssertUnwindSafe(|| line.run(opened, said))).is_err() {
            tracing::error!(domain = %id, "a serial port's thread panicked");
        }
    };
    thread
        .spawn(run)
        .map_err(|error| HypervisorError::Refused {
            call: NAME,
            message: format!("a thread cannot be started: {error}"),
        })?;
    let late = Call::new(NAME, OPEN).too_late();
    // A line that opens later finds nobody waiting, and closes.
    match timeout(OPEN, answer).await {
        Ok(Ok(answer)) => answer,
        Ok(Err(_)) | Err(_) => Err(late),
    }
}

struct Line {
    config: Arc<Config>,
    runtime: Handle,
    id: Uuid,
    take_over: bool,
    _permit: OwnedSemaphorePermit,
}

/// Tells of the end, in any case and last: another line can be opened then.
struct TellsOfTheEnd {
    said: ConsoleSink,
    why: String,
}

impl Drop for TellsOfTheEnd {
    fn drop(&mut self) {
        (self.said)(ConsoleSaid::Ended(&self.why));
    }
}

impl Line {
    fn run(&self, opened: Opened, said: ConsoleSink) {
        // Before the connection, so that it goes after it.
        let mut told = TellsOfTheEnd {
            said,
            why: "the agent's line to the serial port broke".to_owned(),
        };
        let (connect, stream) = match self.connected() {
            Ok(line) => line,
            Err(error) => {
                let _ = opened.send(Err(error));
                return;
            }
        };
        let (sender, input) = mpsc::channel(QUEUE);
        if opened.send(Ok(sender)).is_ok() {
            told.why = self.pump(&stream, input, &mut told.said);
        }
        // One that has ended by itself cannot be aborted, which is as well.
        let _ = stream.abort();
        drop(connect);
    }

    fn connected(&self) -> HypervisorResult<(virt::connect::Connect, Stream)> {
        let call = Call::new(NAME, OPEN).about(self.id);
        let connect = connections::open(&self.config).map_err(|error| {
            let reason = error.message().to_owned();
            HypervisorError::LinkDown { reason }
        })?;
        let stream = (|| {
            let domain = connect.lookup_domain_by_uuid(self.id)?;
            let stream = Stream::new(&connect, sys::VIR_STREAM_NONBLOCK)?;
            let flags = if self.take_over {
                sys::VIR_DOMAIN_CONSOLE_FORCE
            } else {
                0
            };
            #[allow(clippy::disallowed_methods, reason = "there is no string")]
            domain.open_console(None, &stream, flags)?;
            Ok(stream)
        })();
        match stream {
            Ok(stream) => Ok((connect, stream)),
            Err(error) if is_taken(&error) => {
                Err(HypervisorError::ConsoleTaken { domain: self.id })
            }
            Err(error) => Err(refusal(&call, &error)),
        }
    }

    /// Passes on what comes, both ways, until one side ends it; says why it did.
    fn pump(
        &self,
        stream: &Stream,
        mut input: mpsc::Receiver<Vec<u8>>,
        said: &mut ConsoleSink,
    ) -> String {
        let mut piece = vec![0; PIECE];
        let mut waiting: Vec<u8> = Vec::new();
        loop {
            let mut pieces = 0;
            while pieces < PIECES {
                #[allow(clippy::disallowed_methods, reason = "negative numbers are looked for")]
                match stream.recv(&mut piece) {
                    Ok(0) => return "the guest is off, or its serial port is closed".to_owned(),
                    Ok(length) => match usize::try_from(length) {
                        Ok(length) => {
                            said(ConsoleSaid::Bytes(piece.get(..length).unwrap_or_default()));
                        }
                        // There is nothing now.
                        Err(_) => break,
                    },
                    Err(error) => return ended(&error),
                }
                pieces += 1;
            }
            if waiting.is_empty() {
                let more = self.runtime.block_on(async {
                    let wait = if pieces < PIECES {
                        LOOK
                    } else {
                        Duration::ZERO
                    };
                    timeout(wait, input.recv()).await
                });
                match more {
                    Ok(Some(bytes)) => waiting = bytes,
                    Ok(None) => return "nobody is attached any more".to_owned(),
                    Err(_) => {}
                }
            } else {
                if input.is_closed() {
                    return "nobody is attached any more".to_owned();
                }
                std::thread::sleep(LOOK);
            }
            while !waiting.is_empty() {
                #[allow(clippy::disallowed_methods, reason = "negative numbers are looked for")]
                match stream.send(&waiting).map(usize::try_from) {
                    Ok(Ok(sent)) => drop(waiting.drain(..sent.min(waiting.len()))),
                    // It takes no more now.
                    Ok(Err(_)) => break,
                    Err(error) => return ended(&error),
                }
            }
        }
    }
}

fn ended(error: &Error) -> String {
    format!("libvirt ended it: {}", error.message().trim())
}

/// libvirt has no number of its own for this.
fn is_taken(error: &Error) -> bool {
    is(error, ErrorNumber::OperationFailed) && error.message().contains("ctive console session")
}
