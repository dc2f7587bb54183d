// SPDX-License-Identifier: Apache-2.0
//! ConsoleService: logs of serial ports, the ports themselves, pictures of screens. All reads: no plan, no
//! operation.

use std::{pin::Pin, sync::Arc, time::Duration};

use futures_util::{Stream, stream};
use salvor_proto::v1::{
    self, attach_console_request::Item as Sent, attach_console_response::Item as Told,
    console_service_server::ConsoleService,
};
use tokio::{
    sync::broadcast::error::RecvError,
    sync::watch,
    task::JoinHandle,
    time::{Instant, timeout},
};
use tonic::{Request, Response, Status, Streaming};
use uuid::Uuid;

use super::{Api, convert::time::timestamp, edge::Call, resolve, validate::Checked};
use crate::{
    console::{Attached, Client, Cursor, From, Heard, LogRead, LogRequest, Logs, Whose, Wish, png},
    core::{
        admission::admit_writing,
        reason::{Reason, Refusal},
        record::ServerRecord,
        state::VmState,
    },
    hypervisor::Definition,
    store::Store,
};

/// The most that one answer holds of a log.
const ANSWER: usize = 1 << 20;

/// Pieces of a followed log and of a picture.
const PIECE: usize = 64 << 10;

/// The most that a client may send to a guest at once.
const INPUT: usize = 64 << 10;

/// A followed log is looked at so often.
const LOOK: Duration = Duration::from_millis(150);

/// Where a followed log is, is looked up so often.
const LOOK_UP: Duration = Duration::from_secs(10);

/// A silent stream says so often that it lives.
const TELL: Duration = Duration::from_secs(5);

/// How a client attaches must be said within this time.
const OPEN: Duration = Duration::from_secs(10);

type Stuff<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

fn count(field: &str, number: i64) -> Checked<Option<u64>> {
    match number {
        -1 => Ok(None),
        number => u64::try_from(number).map(Some).map_err(|_| {
            Refusal::field(
                field,
                format!("must be -1 (everything) or not negative, and is {number}"),
            )
        }),
    }
}

fn cursor(text: &str) -> Checked<From> {
    let cursor: Result<Cursor, _> = text.parse();
    let cursor = cursor.map_err(|error| Refusal::field("cursor", error.to_string()))?;
    Ok(From::Cursor(cursor))
}

/// Whose words; `otherwise` where the request does not say.
fn whose(number: i32, otherwise: Whose) -> Checked<Whose> {
    use v1::ConsoleGuest as Guest;
    match Guest::try_from(number) {
        Ok(Guest::Unspecified) => Ok(otherwise),
        Ok(Guest::Server) => Ok(Whose::Server),
        Ok(Guest::Rescue) => Ok(Whose::Rescue),
        Ok(Guest::All) => Ok(Whose::All),
        Err(_) => Err(Refusal::field(
            "guest",
            format!("must be a value of ConsoleGuest, and is {number}"),
        )),
    }
}

fn log_request(request: &v1::GetConsoleLogRequest, server: &ServerRecord) -> Checked<LogRequest> {
    use v1::get_console_log_request::From as Wanted;
    let most = match usize::try_from(request.max_bytes) {
        Ok(0) => ANSWER,
        Ok(most) if most <= ANSWER => most,
        _ => {
            return Err(Refusal::field(
                "max_bytes",
                format!(
                    "must be 0 (the default) to {ANSWER}, and is {}",
                    request.max_bytes
                ),
            ));
        }
    };
    let newest = u64::try_from(most).unwrap_or(u64::MAX);
    let runs = match server.vm_state {
        VmState::Rescued => Whose::Rescue,
        _ => Whose::Server,
    };
    Ok(LogRequest {
        from: match &request.from {
            None => From::LastBytes(Some(newest)),
            Some(Wanted::LastLines(lines)) => From::LastLines(count("last_lines", *lines)?),
            Some(Wanted::LastBytes(bytes)) => From::LastBytes(count("last_bytes", *bytes)?),
            Some(Wanted::Cursor(text)) => cursor(text)?,
        },
        // A boot that is named is either.
        whose: whose(
            request.guest,
            if request.boot.is_some() {
                Whose::All
            } else {
                runs
            },
        )?,
        boot: request.boot,
        most,
        one_boot: false,
    })
}

fn follow_request(request: &v1::FollowConsoleLogRequest) -> Checked<LogRequest> {
    use v1::follow_console_log_request::From as Wanted;
    Ok(LogRequest {
        from: match &request.from {
            None => From::LastBytes(Some(0)),
            Some(Wanted::LastLines(lines)) => From::LastLines(count("last_lines", *lines)?),
            Some(Wanted::LastBytes(bytes)) => From::LastBytes(count("last_bytes", *bytes)?),
            Some(Wanted::Cursor(text)) => cursor(text)?,
        },
        whose: whose(request.guest, Whose::All)?,
        boot: None,
        most: PIECE,
        one_boot: true,
    })
}

fn log_response(read: LogRead) -> v1::GetConsoleLogResponse {
    let boots = read.boots.into_iter().map(|(boot, size)| v1::ConsoleBoot {
        number: boot.number,
        start_time: boot.started_at_ms.map(timestamp),
        rescue: boot.rescue,
        size: i64::try_from(size).unwrap_or(i64::MAX),
    });
    v1::GetConsoleLogResponse {
        data: read.data,
        next_cursor: read.next.to_string(),
        more: read.more,
        gap: read.gap,
        boots: boots.collect(),
    }
}

fn draining() -> Refusal {
    Refusal::new(
        Reason::Draining,
        "the agent is stopping; go on when it is back",
    )
}

/// One followed log. It is pulled: a slow client slows only itself.
struct Follower {
    call: Call,
    store: Store,
    logs: Logs,
    draining: watch::Receiver<bool>,
    server: Uuid,
    path: String,
    looked_up: Instant,
    request: LogRequest,
    /// Before the log was read last. While it stays so there is nothing new.
    version: Option<(u64, u64)>,
    more: bool,
    begun: bool,
    told: Instant,
    ended: bool,
}

impl Follower {
    async fn next(&mut self) -> Option<Result<v1::FollowConsoleLogResponse, Status>> {
        if self.ended {
            return None;
        }
        match self.item().await {
            Ok(Some(item)) => {
                self.told = Instant::now();
                Some(Ok(item))
            }
            Ok(None) => {
                self.ended = true;
                None
            }
            Err(refusal) => {
                self.ended = true;
                Some(Err(self.call.refuse(&refusal)))
            }
        }
    }

    /// The next message; `None` once the server is gone.
    async fn item(&mut self) -> Checked<Option<v1::FollowConsoleLogResponse>> {
        loop {
            if *self.draining.borrow() {
                return Err(draining());
            }
            let Some(server) = self.store.server(self.server) else {
                return Ok(None);
            };
            if self.looked_up.elapsed() >= LOOK_UP {
                self.looked_up = Instant::now();
                // While it cannot be said, it is where it was.
                if let Ok(path) = self.logs.file(&server).await {
                    self.path = path;
                }
            }
            let version = self.logs.version(self.server, &self.path).await;
            if self.more || !self.begun || version != self.version {
                let first = !std::mem::replace(&mut self.begun, true);
                self.version = version;
                let path = self.path.clone();
                let read = self.logs.read(self.server, path, self.request).await?;
                self.request.from = From::Cursor(read.next);
                self.more = read.more;
                if first || read.gap || !read.data.is_empty() {
                    return Ok(Some(told(read)));
                }
            }
            if self.told.elapsed() >= TELL {
                let From::Cursor(cursor) = self.request.from else {
                    return Ok(None);
                };
                return Ok(Some(v1::FollowConsoleLogResponse {
                    cursor: cursor.to_string(),
                    ..v1::FollowConsoleLogResponse::default()
                }));
            }
            // The end of the agent is what may come sooner.
            let _ = timeout(LOOK, self.draining.wait_for(|draining| *draining)).await;
        }
    }
}

fn told(read: LogRead) -> v1::FollowConsoleLogResponse {
    v1::FollowConsoleLogResponse {
        data: read.data,
        cursor: read.next.to_string(),
        boot: read.boot,
        gap: read.gap,
    }
}

/// The end of a task with whoever holds this.
struct Ends(JoinHandle<()>);

impl Drop for Ends {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// What one attached client is told.
struct Listener {
    attached: Attached,
    draining: watch::Receiver<bool>,
    /// Before what is heard: the greeting, and what was said before.
    first: Vec<Told>,
    ended: bool,
    _writing: Ends,
}

impl Listener {
    async fn next(&mut self) -> Option<v1::AttachConsoleResponse> {
        if self.ended {
            return None;
        }
        let item = match self.first.pop() {
            Some(item) => item,
            None => self.hear().await,
        };
        self.ended = matches!(item, Told::Ended(_));
        Some(v1::AttachConsoleResponse { item: Some(item) })
    }

    async fn hear(&mut self) -> Told {
        let ended = |message: &str| {
            Told::Ended(v1::ConsoleEnded {
                message: message.to_owned(),
            })
        };
        loop {
            let heard = tokio::select! {
                heard = self.attached.heard.recv() => heard,
                _ = self.draining.wait_for(|draining| *draining) => {
                    return ended("the agent is stopping");
                }
            };
            return match heard {
                Ok(Heard::Output(bytes)) => Told::Output(bytes.to_vec()),
                Ok(Heard::Lost(pieces)) | Err(RecvError::Lagged(pieces)) => Told::Lost(pieces),
                Ok(Heard::TakenOver { from, by }) if self.attached.client.is(from) => {
                    let caller = by.to_string();
                    Told::TakenOver(v1::ConsoleTakenOver { caller })
                }
                Ok(Heard::TakenOver { .. }) => continue,
                Ok(Heard::Ended(why)) => ended(&why),
                Err(RecvError::Closed) => ended("the serial port is closed"),
            };
        }
    }
}

/// Passes on what a client sends, until it ends.
async fn write(client: Arc<Client>, mut sent: Streaming<v1::AttachConsoleRequest>) {
    while let Ok(Some(request)) = sent.message().await {
        match request.item {
            Some(Sent::Input(bytes)) if bytes.len() <= INPUT => {
                // Who may not write was told so.
                client.write(bytes).await;
            }
            // Not as agreed: it is not listened to any more.
            _ => break,
        }
    }
    client.lay_down_the_pen();
}

impl Api {
    /// The server, if its guest runs and its domain has what is needed for `what`.
    async fn running(
        &self,
        word: &str,
        missing: Reason,
        what: impl FnOnce(&salvor_domain_templates::Domain) -> bool,
    ) -> Checked<Arc<ServerRecord>> {
        let server = resolve::server(&self.store, word)?;
        let power = self.hypervisor.power(server.id).await?;
        if !power.is_some_and(|power| power.power.is_on()) {
            return Err(Refusal::new(
                Reason::GuestNotRunning,
                format!(
                    "{} does not run (it is {}); start it first",
                    server.name,
                    server.status().name()
                ),
            ));
        }
        let xml = self
            .hypervisor
            .domain_xml(server.id, Definition::Live)
            .await?;
        let domain = salvor_domain_templates::Domain::parse(&xml);
        if domain.is_ok_and(|domain| what(&domain)) {
            return Ok(server);
        }
        Err(Refusal::new(
            missing,
            format!("{}: {}", server.name, missing.explanation()),
        ))
    }

    async fn log(&self, request: &v1::GetConsoleLogRequest) -> Checked<LogRead> {
        let server = resolve::server(&self.store, &request.server)?;
        let wanted = log_request(request, &server)?;
        let path = self.logs.file(&server).await?;
        self.logs.read(server.id, path, wanted).await
    }

    async fn follower(
        &self,
        call: &Call,
        request: &v1::FollowConsoleLogRequest,
    ) -> Checked<Follower> {
        let server = resolve::server(&self.store, &request.server)?;
        let wanted = follow_request(request)?;
        let path = self.logs.file(&server).await?;
        Ok(Follower {
            call: call.clone(),
            store: self.store.clone(),
            logs: self.logs.clone(),
            draining: self.draining.clone(),
            server: server.id,
            path,
            looked_up: Instant::now(),
            request: wanted,
            version: None,
            more: false,
            begun: false,
            told: Instant::now(),
            ended: false,
        })
    }

    async fn attach(
        &self,
        call: &Call,
        first: Option<v1::AttachConsoleRequest>,
        sent: Streaming<v1::AttachConsoleRequest>,
    ) -> Checked<Listener> {
        if *self.draining.borrow() {
            return Err(draining());
        }
        let Some(Sent::Open(open)) = first.and_then(|first| first.item) else {
            return Err(Refusal::field("open", "must be the first message"));
        };
        // What is typed changes what runs there; what is read does not.
        if !open.read_only {
            let server = resolve::server(&self.store, &open.server)?;
            admit_writing(&server, &call.who)?;
        }
        let server = self
            .running(&open.server, Reason::NoConsole, |domain| {
                domain.has_console()
            })
            .await?;
        let wish = Wish {
            read_only: open.read_only,
            force: open.force,
            history: open.history,
        };
        let caller = call.caller.to_string();
        let attached = self.ports.attach(server.id, &caller, wish).await?;
        // Who writes to a guest is in the log as who did something to it.
        if attached.writer {
            tracing::info!(server = %server.id, name = server.name, caller, force = open.force, "somebody writes to a serial port");
        }
        let mut first = vec![Told::Attached(v1::ConsoleAttached {
            writer: attached.writer,
            clients: attached.clients,
        })];
        if !attached.history.is_empty() {
            first.insert(0, Told::Output(attached.history.clone()));
        }
        let writing = tokio::spawn(write(Arc::clone(&attached.client), sent));
        Ok(Listener {
            attached,
            draining: self.draining.clone(),
            first,
            ended: false,
            _writing: Ends(writing),
        })
    }

    async fn picture(&self, word: &str) -> Checked<Vec<v1::GetScreenshotResponse>> {
        let server = self
            .running(word, Reason::NoScreen, |domain| domain.has_screen())
            .await?;
        let given = self.hypervisor.screenshot(server.id).await?;
        let picture =
            png(given).map_err(|error| Refusal::new(Reason::LibvirtRefused, error.to_string()))?;
        let mut pieces: Vec<_> = picture
            .png
            .chunks(PIECE)
            .map(|piece| v1::GetScreenshotResponse {
                data: piece.to_vec(),
                ..v1::GetScreenshotResponse::default()
            })
            .collect();
        if let Some(first) = pieces.first_mut() {
            (first.width, first.height) = (picture.width, picture.height);
        }
        Ok(pieces)
    }
}

#[tonic::async_trait]
impl ConsoleService for Api {
    type FollowConsoleLogStream = Stuff<v1::FollowConsoleLogResponse>;
    type AttachConsoleStream = Stuff<v1::AttachConsoleResponse>;
    type GetScreenshotStream = Stuff<v1::GetScreenshotResponse>;

    async fn get_console_log(
        &self,
        request: Request<v1::GetConsoleLogRequest>,
    ) -> Result<Response<v1::GetConsoleLogResponse>, Status> {
        let (call, message) = Call::open(request)?;
        let read = self.log(&message).await;
        let read = read.map_err(|refusal| call.refuse(&refusal))?;
        Ok(Response::new(log_response(read)))
    }

    async fn follow_console_log(
        &self,
        request: Request<v1::FollowConsoleLogRequest>,
    ) -> Result<Response<Self::FollowConsoleLogStream>, Status> {
        let (call, message) = Call::open(request)?;
        let follower = self.follower(&call, &message).await;
        let follower = follower.map_err(|refusal| call.refuse(&refusal))?;
        let stream = stream::unfold(follower, |mut follower| async move {
            let message = follower.next().await?;
            Some((message, follower))
        });
        Ok(Response::new(Box::pin(stream)))
    }

    async fn attach_console(
        &self,
        request: Request<Streaming<v1::AttachConsoleRequest>>,
    ) -> Result<Response<Self::AttachConsoleStream>, Status> {
        let (call, mut sent) = Call::open(request)?;
        // Late is as good as nothing.
        let first = timeout(OPEN, sent.message()).await.unwrap_or(Ok(None))?;
        let listener = self.attach(&call, first, sent).await;
        let listener = listener.map_err(|refusal| call.refuse(&refusal))?;
        let stream = stream::unfold(listener, |mut listener| async move {
            let message = listener.next().await?;
            Some((Ok(message), listener))
        });
        Ok(Response::new(Box::pin(stream)))
    }

    async fn get_screenshot(
        &self,
        request: Request<v1::GetScreenshotRequest>,
    ) -> Result<Response<Self::GetScreenshotStream>, Status> {
        let (call, message) = Call::open(request)?;
        let pieces = self.picture(&message.server).await;
        let pieces = pieces.map_err(|refusal| call.refuse(&refusal))?;
        Ok(Response::new(Box::pin(stream::iter(
            pieces.into_iter().map(Ok),
        ))))
    }
}
