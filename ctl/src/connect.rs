// SPDX-License-Identifier: Apache-2.0
//! The connection to the agent: a Unix socket, calls with deadlines, and when a call may be repeated.

use std::{
    error::Error as _,
    fmt, fs, io,
    os::unix::fs::{FileTypeExt as _, MetadataExt as _},
    path::{Path, PathBuf},
    time::Duration,
};

use hyper_util::rt::TokioIo;
use salvor_proto::{
    google::longrunning::operations_client::OperationsClient,
    v1::{
        console_service_client::ConsoleServiceClient, host_service_client::HostServiceClient,
        image_service_client::ImageServiceClient, server_service_client::ServerServiceClient,
        watch_service_client::WatchServiceClient,
    },
};
use tokio::{
    net::UnixStream,
    time::{Instant, sleep},
};
use tonic::{
    Code, Request, Status,
    metadata::{Ascii, MetadataValue},
    service::{Interceptor, interceptor::InterceptedService},
    transport::{Channel, Endpoint},
};
use tonic_types::StatusExt as _;

use crate::{
    cli::{Global, RoleArg},
    errors::{Failure, broken, is_libvirt},
    output::Ui,
};

/// Longest time that a connection may take to be made.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest time that an answer may take: the agent answers from its records, or accepts and goes on.
pub(crate) const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
/// Longest time that the answer to an action may take: what it overtakes is taken back first, for up to
/// five minutes. The first answer is the only one with a generated password, so it is worth waiting.
pub(crate) const ACTION_TIMEOUT: Duration = Duration::from_secs(360);
/// A peer that is silent for so long is asked whether it is there, and has as long again to say so.
const KEEP_ALIVE: Duration = Duration::from_secs(10);
/// For so long a request that may be repeated is repeated after the connection broke.
const REPEAT_FOR: Duration = Duration::from_secs(30);
/// Largest answer that is taken; a page of servers is far below.
const LARGEST_ANSWER: usize = 64 << 20;

/// Waits that grow from a tenth of a second to two seconds.
#[derive(Debug, Default)]
pub(crate) struct BackOff {
    rounds: u32,
}

impl BackOff {
    /// Waits for the next turn, but not beyond `deadline`. False if the deadline has passed.
    pub(crate) async fn wait(&mut self, deadline: Instant) -> bool {
        let pause = Duration::from_millis(100)
            .saturating_mul(1 << self.rounds.min(5))
            .min(Duration::from_secs(2));
        self.rounds = self.rounds.saturating_add(1);
        let left = deadline.saturating_duration_since(Instant::now());
        sleep(pause.min(left)).await;
        Instant::now() < deadline
    }
}

/// Why no connection could be made.
#[derive(Debug, thiserror::Error)]
#[error("cannot reach the agent at {}: {}", .socket.display(), Why(.cause))]
pub(crate) struct ConnectError {
    /// The socket.
    pub(crate) socket: PathBuf,
    /// What stood in the way.
    #[source]
    pub(crate) cause: io::Error,
}

/// The cause in words; the operating system's are kept for what is not foreseen.
struct Why<'a>(&'a io::Error);

impl fmt::Display for Why<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.kind() {
            io::ErrorKind::NotFound => f.write_str("there is no such socket"),
            io::ErrorKind::ConnectionRefused => f.write_str("nobody listens on the socket"),
            io::ErrorKind::PermissionDenied => f.write_str("you may not use the socket"),
            io::ErrorKind::TimedOut => f.write_str("it took too long"),
            _ => self.0.fmt(f),
        }
    }
}

impl ConnectError {
    /// What to check.
    pub(crate) fn hint(&self) -> String {
        match self.cause.kind() {
            io::ErrorKind::PermissionDenied => match owner(&self.socket) {
                Some(group) => format!(
                    "The socket is for root and group {group}: become a member (then log in again), \
                     or use sudo."
                ),
                None => "Use sudo, or ask for access to the folder that the socket is in."
                    .to_owned(),
            },
            io::ErrorKind::NotFound => {
                "Is salvord running (systemctl status salvord)? Does it listen elsewhere (`listen` in \
                 /etc/salvor/salvor.toml)? Name the socket with --socket or SALVOR_SOCKET."
                    .to_owned()
            }
            _ => "Is salvord running? See: systemctl status salvord, journalctl -u salvord".to_owned(),
        }
    }
}

/// The group of the socket, by name if the host knows one.
fn owner(socket: &Path) -> Option<String> {
    let metadata = fs::metadata(socket)
        .ok()
        .filter(|file| file.file_type().is_socket())?;
    let gid = metadata.gid().to_string();
    let groups = fs::read_to_string("/etc/group").unwrap_or_default();
    let name = groups.lines().find_map(|line| {
        let mut parts = line.split(':');
        let name = parts.next()?;
        (parts.nth(1)? == gid).then(|| name.to_owned())
    });
    Some(name.unwrap_or(gid))
}

/// For whom calls are made, in the headers of each.
#[derive(Debug, Clone, Default)]
pub(crate) struct ForWhom(Vec<(&'static str, MetadataValue<Ascii>)>);

impl ForWhom {
    /// What the arguments say.
    ///
    /// # Errors
    /// [`Failure::Usage`] if a member is of no project.
    pub(crate) fn new(global: &Global) -> Result<Self, Failure> {
        if global.as_role == Some(RoleArg::Member) && global.as_project.is_none() {
            return Err(Failure::Usage(
                "--as-role member: give the project with --as-project".to_owned(),
            ));
        }
        let mut headers = Vec::new();
        for (name, value) in [
            ("x-salvor-role", global.as_role.map(RoleArg::word)),
            ("x-salvor-user", global.as_user.as_deref()),
            ("x-salvor-project", global.as_project.as_deref()),
        ] {
            if let Some(value) = value {
                let value = MetadataValue::try_from(value)
                    .map_err(|_| Failure::Usage(format!("{name} cannot hold that value")))?;
                headers.push((name, value));
            }
        }
        Ok(Self(headers))
    }
}

impl Interceptor for ForWhom {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        for (name, value) in &self.0 {
            request.metadata_mut().insert(*name, value.clone());
        }
        Ok(request)
    }
}

/// What clients call through.
pub(crate) type Wire = InterceptedService<Channel, ForWhom>;

/// The agent at the other end of a socket. Calls connect again by themselves after a break.
#[derive(Debug, Clone)]
pub(crate) struct Agent {
    channel: Channel,
    for_whom: ForWhom,
    socket: PathBuf,
}

impl Agent {
    /// Connects.
    ///
    /// # Errors
    /// [`ConnectError`], which says what to check.
    pub(crate) async fn connect(socket: &Path, for_whom: ForWhom) -> Result<Self, ConnectError> {
        let path = socket.to_owned();
        // The address is never looked up: it becomes the `:authority` of the calls.
        let channel = Endpoint::from_static("http://salvord")
            .connect_timeout(CONNECT_TIMEOUT)
            .http2_keep_alive_interval(KEEP_ALIVE)
            .keep_alive_timeout(KEEP_ALIVE)
            .connect_with_connector(tower::service_fn(move |_| {
                let path = path.clone();
                async move { UnixStream::connect(path).await.map(TokioIo::new) }
            }))
            .await
            .map_err(|error| ConnectError {
                socket: socket.to_owned(),
                cause: io_cause(&error),
            })?;
        Ok(Self {
            channel,
            for_whom,
            socket: socket.to_owned(),
        })
    }

    /// The socket.
    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    /// `ServerService`.
    pub(crate) fn servers(&self) -> ServerServiceClient<Wire> {
        ServerServiceClient::with_interceptor(self.channel.clone(), self.for_whom.clone())
            .max_decoding_message_size(LARGEST_ANSWER)
    }

    /// `ImageService`.
    pub(crate) fn images(&self) -> ImageServiceClient<Wire> {
        ImageServiceClient::with_interceptor(self.channel.clone(), self.for_whom.clone())
            .max_decoding_message_size(LARGEST_ANSWER)
    }

    /// `HostService`.
    pub(crate) fn host(&self) -> HostServiceClient<Wire> {
        HostServiceClient::with_interceptor(self.channel.clone(), self.for_whom.clone())
            .max_decoding_message_size(LARGEST_ANSWER)
    }

    /// `WatchService`.
    pub(crate) fn watch(&self) -> WatchServiceClient<Wire> {
        WatchServiceClient::with_interceptor(self.channel.clone(), self.for_whom.clone())
            .max_decoding_message_size(LARGEST_ANSWER)
    }

    /// `ConsoleService`.
    pub(crate) fn consoles(&self) -> ConsoleServiceClient<Channel> {
        ConsoleServiceClient::new(self.channel.clone()).max_decoding_message_size(LARGEST_ANSWER)
    }

    /// `google.longrunning.Operations`.
    pub(crate) fn operations(&self) -> OperationsClient<Wire> {
        OperationsClient::with_interceptor(self.channel.clone(), self.for_whom.clone())
            .max_decoding_message_size(LARGEST_ANSWER)
    }
}

/// The operating system's error at the end of a chain.
fn io_cause(error: &tonic::transport::Error) -> io::Error {
    let mut next = error.source();
    let mut last = String::new();
    while let Some(cause) = next {
        if let Some(cause) = cause.downcast_ref::<io::Error>() {
            return match cause.raw_os_error() {
                Some(number) => io::Error::from_raw_os_error(number),
                None => io::Error::new(cause.kind(), cause.to_string()),
            };
        }
        last = cause.to_string();
        next = cause.source();
    }
    io::Error::other(last)
}

/// A request with the deadline of calls that are answered at once.
pub(crate) fn ask<T>(message: T) -> Request<T> {
    ask_within(message, ANSWER_TIMEOUT)
}

/// A request that has `time` to be answered.
pub(crate) fn ask_within<T>(message: T, time: Duration) -> Request<T> {
    let mut request = Request::new(message);
    // gRPC writes a timeout with eight digits at most: in whole seconds it reaches for three years.
    request.set_timeout(Duration::from_secs(time.as_secs().clamp(1, 99_999_999)));
    request
}

/// Did the connection break, or did no answer come in time? What an agent answers has no cause on this
/// side, and says why. Both sides know the deadline, and either may be the first to end the call.
pub(crate) fn is_broken(status: &Status) -> bool {
    status.source().is_some() || (is_late(status) && !is_answer(status))
}

/// Is it the agent's word that something was not done in time? What was begun goes on.
pub(crate) fn is_unfinished(status: &Status) -> bool {
    status.code() == Code::DeadlineExceeded && is_answer(status)
}

/// Did the agent itself answer?
fn is_answer(status: &Status) -> bool {
    status.get_error_details().error_info().is_some()
}

/// Did the answer not come in time? Nobody but the deadline cancels a call.
pub(crate) fn is_late(status: &Status) -> bool {
    matches!(status.code(), Code::Cancelled | Code::DeadlineExceeded)
}

/// Is the agent away for the moment: not there, or about to stop?
pub(crate) fn is_away(status: &Status) -> bool {
    is_broken(status)
        || is_unfinished(status)
        || (status.code() == Code::Unavailable && !is_libvirt(status))
}

/// Calls until there is an answer: a call that broke off is repeated. Only for calls that may be made
/// twice, because they read.
///
/// # Errors
/// The agent's status, or the last broken one after half a minute.
pub(crate) async fn repeat<T>(
    ui: &Ui,
    call: impl AsyncFn() -> Result<tonic::Response<T>, Status>,
) -> Result<T, Status> {
    let deadline = Instant::now() + REPEAT_FOR;
    let mut pause = BackOff::default();
    let mut told = false;
    loop {
        match call().await {
            Ok(answer) => return Ok(answer.into_inner()),
            Err(status) if is_broken(&status) && pause.wait(deadline).await => {
                if !told {
                    ui.note(&format!("{}; asking again", broken(&status)));
                    told = true;
                }
            }
            Err(status) => return Err(status),
        }
    }
}

/// Calls an action, which carries a request id, until there is an answer: one that broke off is
/// repeated for half a minute, and one that the agent could not answer in time until `limit` is over.
///
/// # Errors
/// The agent's status, or the last one of a call that was not answered.
pub(crate) async fn repeat_for<T>(
    ui: &Ui,
    limit: Duration,
    call: impl AsyncFn() -> Result<tonic::Response<T>, Status>,
) -> Result<T, Status> {
    let mut again = Again::new(limit);
    loop {
        match call().await {
            Ok(answer) => return Ok(answer.into_inner()),
            Err(status) => again.after(ui, status).await?,
        }
    }
}

/// When a call with a request id is made again.
#[derive(Debug)]
pub(crate) struct Again {
    /// Answers that came too late are asked for until then.
    limit: Instant,
    /// The agent was away since then.
    broke: Option<Instant>,
    pause: BackOff,
    told: bool,
}

impl Again {
    /// Of calls that are to end within `limit`.
    pub(crate) fn new(limit: Duration) -> Self {
        Self {
            limit: Instant::now() + limit,
            broke: None,
            pause: BackOff::default(),
            told: false,
        }
    }

    /// Waits until the call is to be made again.
    ///
    /// # Errors
    /// The status, if it is not to be.
    pub(crate) async fn after(&mut self, ui: &Ui, status: Status) -> Result<(), Status> {
        let deadline = if is_unfinished(&status) {
            self.broke = None;
            self.limit
        } else if is_broken(&status) {
            *self.broke.get_or_insert_with(Instant::now) + REPEAT_FOR
        } else {
            return Err(status);
        };
        if !self.pause.wait(deadline).await {
            return Err(status);
        }
        if !self.told {
            ui.note(&format!("{}; asking again", broken(&status)));
            self.told = true;
        }
        Ok(())
    }
}
