// SPDX-License-Identifier: Apache-2.0
//! What happens to every call before and after its handler, in one place and one order.
//!
//! ```text
//!  request ─> deadline ─> identity ─> request id ─> span ─> handler (a panic is caught)
//!  answer  <───────────────────────── request id in the initial metadata <─┘
//! ```
//!
//! Who may reach the socket is decided by its mode and owner. A call whose peer cannot be told is
//! refused all the same. Who reaches it is the administrator, unless the call says that it is made for
//! somebody else.

use std::{
    convert::Infallible,
    future::Future,
    panic::AssertUnwindSafe,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use futures_util::FutureExt as _;
use tokio::time::Instant;
use tonic::{
    Code, Status,
    body::Body,
    codegen::{BoxFuture, Service, http},
    server::NamedService,
    transport::server::UdsConnectInfo,
};
use tracing::Instrument as _;
use uuid::Uuid;

use super::errors::{self, About, status};
use crate::core::{
    caller::{Role, Who},
    reason::{Reason, Refusal},
    text::echo,
};

/// The header that names a call across services, as OpenStack's services do.
const REQUEST_ID_HEADER: &str = "x-openstack-request-id";

/// The headers by which a control plane says for whom it calls.
const ROLE_HEADER: &str = "x-salvor-role";
const USER_HEADER: &str = "x-salvor-user";
const PROJECT_HEADER: &str = "x-salvor-project";

/// The longest user and project, as Nova's columns have them.
const LONGEST_NAME: usize = 255;

/// An answer leaves at least and at most so long before the caller's deadline, and otherwise a tenth
/// of its time, so that it is there in time.
const ANSWER_MARGIN: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(500));

/// Who calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Caller {
    uid: u32,
    pid: Option<i32>,
}

impl std::fmt::Display for Caller {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "uid:{}", self.uid)
    }
}

/// A call, as its handler sees it.
#[derive(Debug, Clone)]
pub(super) struct Call {
    /// Names the call in answers and logs.
    pub(super) request_id: Arc<str>,
    /// Who calls; operations record it.
    pub(super) caller: Caller,
    /// For whom.
    pub(super) who: Who,
    /// When the answer must leave.
    pub(super) answer_by: Option<Instant>,
}

impl Call {
    /// The call and the message of a request that came through an [`Edge`].
    ///
    /// # Errors
    /// If it did not.
    pub(super) fn open<T>(request: tonic::Request<T>) -> Result<(Self, T), Status> {
        let (_, extensions, message) = request.into_parts();
        match extensions.get::<Self>() {
            Some(call) => Ok((call.clone(), message)),
            None => Err(stranger(&About::default())),
        }
    }

    /// What an error of this call says besides its refusal.
    pub(super) fn about(&self) -> About {
        About {
            request_id: self.request_id.to_string(),
            ..About::default()
        }
    }

    /// The error that a refusal is to the caller.
    pub(super) fn refuse(&self, refusal: &Refusal) -> Status {
        status(refusal, &self.about())
    }

    /// How long a wait may take, if `wanted` is what was asked for: its answer must be in time.
    pub(super) fn patience(&self, wanted: Duration) -> Duration {
        match self.answer_by {
            Some(by) => wanted.min(by.saturating_duration_since(Instant::now())),
            None => wanted,
        }
    }
}

/// Puts what every call needs around a service.
#[derive(Debug, Clone)]
pub(super) struct Edge<S>(pub(super) S);

impl<S: NamedService> NamedService for Edge<S> {
    const NAME: &'static str = S::NAME;
}

impl<S> Service<http::Request<Body>> for Edge<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>, Error = Infallible>
        + Clone
        + Send
        + 'static,
    S::Future: Send,
{
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Infallible>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, mut request: http::Request<Body>) -> Self::Future {
        let begun = Instant::now();
        let times = timeout(request.headers()).map(|timeout| times(begun, timeout));
        let caller = caller(request.extensions());
        let request_id = request_id(request.headers());
        let who = who(request.headers());
        let span = tracing::info_span!("call", method = %request.uri().path(), request_id = %request_id,
            uid = caller.map(|caller| caller.uid), pid = caller.and_then(|caller| caller.pid));
        let mut inner = self.0.clone();
        let work = async move {
            let Some(caller) = caller else {
                let request_id = request_id.to_string();
                let about = About {
                    request_id,
                    ..About::default()
                };
                return stranger(&about).into_http();
            };
            let (who, wrong) = match who {
                Ok(who) => (who, None),
                Err(refusal) => (Who::default(), Some(refusal)),
            };
            let call = Call {
                request_id,
                caller,
                who,
                answer_by: times.map(|(by, _)| by),
            };
            if let Some(refusal) = wrong {
                return call.refuse(&refusal).into_http();
            }
            request.extensions_mut().insert(call.clone());
            let handler = AssertUnwindSafe(async move { inner.call(request).await }).catch_unwind();
            let mut response = match within(times.map(|(_, at)| at), handler).await {
                Some(Ok(Ok(response))) => match without_details(&response) {
                    Some(bare) => call.refuse(&errors::bare(&bare)).into_http(),
                    None => response,
                },
                Some(Err(_)) => {
                    tracing::error!("a handler panicked");
                    call.refuse(&Refusal::new(Reason::Internal, "a handler panicked"))
                        .into_http()
                }
                None => call
                    .refuse(&Refusal::new(
                        Reason::DeadlineExceeded,
                        "the answer was not there by the caller's deadline; what was begun goes on",
                    ))
                    .into_http(),
            };
            tracing::debug!(
                status = response
                    .headers()
                    .get("grpc-status")
                    .and_then(|status| status.to_str().ok()),
                elapsed_us = begun.elapsed().as_micros(),
                "answered"
            );
            if let Ok(value) = http::HeaderValue::from_str(&call.request_id) {
                response.headers_mut().insert(REQUEST_ID_HEADER, value);
            }
            response
        };
        Box::pin(work.map(Ok).instrument(span))
    }
}

/// The error of a call whose peer is not known.
fn stranger(about: &About) -> Status {
    let message =
        "the peer of this connection cannot be told; connect over the agent's Unix socket";
    status(&Refusal::new(Reason::UnknownCaller, message), about)
}

/// The error that is the whole response, if it says nothing that a program could read.
fn without_details(response: &http::Response<Body>) -> Option<Status> {
    let status = Status::from_header_map(response.headers())?;
    (status.code() != Code::Ok && status.details().is_empty()).then_some(status)
}

/// When a handler should answer, and when it is no longer waited for.
fn times(now: Instant, timeout: Duration) -> (Instant, Instant) {
    let (least, most) = ANSWER_MARGIN;
    let margin = (timeout / 10).clamp(least, most);
    (
        now + timeout.saturating_sub(margin),
        now + timeout.saturating_sub(margin / 2),
    )
}

/// The outcome of `work`, or `None` if it is not there by then.
async fn within<F: Future>(at: Option<Instant>, work: F) -> Option<F::Output> {
    match at {
        Some(at) => tokio::time::timeout_at(at, work).await.ok(),
        None => Some(work.await),
    }
}

/// The time that the caller gives (`grpc-timeout` of the gRPC protocol over HTTP/2).
fn timeout(headers: &http::HeaderMap) -> Option<Duration> {
    let value = headers.get("grpc-timeout")?.to_str().ok()?;
    let unit = value.chars().next_back()?;
    let digits = value.strip_suffix(unit)?;
    if !(1..=8).contains(&digits.len()) || !digits.bytes().all(|digit| digit.is_ascii_digit()) {
        return None;
    }
    let count: u64 = digits.parse().ok()?;
    match unit {
        'H' => Some(Duration::from_secs(count * 3_600)),
        'M' => Some(Duration::from_secs(count * 60)),
        'S' => Some(Duration::from_secs(count)),
        'm' => Some(Duration::from_millis(count)),
        'u' => Some(Duration::from_micros(count)),
        'n' => Some(Duration::from_nanos(count)),
        _ => None,
    }
}

/// The peer of the Unix socket, as the kernel names it.
fn caller(extensions: &http::Extensions) -> Option<Caller> {
    let credentials = extensions.get::<UdsConnectInfo>()?.peer_cred?;
    Some(Caller {
        uid: credentials.uid(),
        pid: credentials.pid(),
    })
}

/// For whom a call is made. What is not said is the administrator's; a member is one of a project.
fn who(headers: &http::HeaderMap) -> Result<Who, Refusal> {
    let role = match said(headers, ROLE_HEADER)? {
        None => Role::Admin,
        Some(name) => Role::from_name(&name).ok_or_else(|| {
            Refusal::field(
                ROLE_HEADER,
                format!("must be admin or member, and is {:?}", echo(&name)),
            )
        })?,
    };
    let who = Who {
        role,
        user: said(headers, USER_HEADER)?.unwrap_or_default(),
        project: said(headers, PROJECT_HEADER)?.unwrap_or_default(),
    };
    if who.role == Role::Member && who.project.is_empty() {
        return Err(Refusal::field(
            PROJECT_HEADER,
            "must be given with the role member",
        ));
    }
    Ok(who)
}

/// What a header says, once.
fn said(headers: &http::HeaderMap, name: &'static str) -> Result<Option<String>, Refusal> {
    let mut values = headers.get_all(name).iter();
    let Some(value) = values.next() else {
        return Ok(None);
    };
    if values.next().is_some() {
        return Err(Refusal::field(name, "must be given once"));
    }
    let text = value
        .to_str()
        .ok()
        .filter(|text| (1..=LONGEST_NAME).contains(&text.len()))
        .filter(|text| text.bytes().all(|byte| matches!(byte, b' '..=b'~')));
    match text {
        Some(text) => Ok(Some(text.to_owned())),
        None => Err(Refusal::field(
            name,
            format!("must be 1 to {LONGEST_NAME} printable ASCII characters"),
        )),
    }
}

/// The caller's id of the call if it gave a usable one, else a new one.
fn request_id(headers: &http::HeaderMap) -> Arc<str> {
    let given = headers
        .get(REQUEST_ID_HEADER)
        .and_then(|value| value.to_str().ok());
    let usable = |id: &&str| {
        (1..=64).contains(&id.len())
            && id
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
    };
    match given.filter(usable) {
        Some(id) => Arc::from(id),
        None => Arc::from(format!("req-{}", Uuid::new_v4())),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

    use super::*;

    /// A service that does what its path says.
    #[derive(Clone)]
    struct Acts;

    impl Service<http::Request<Body>> for Acts {
        type Response = http::Response<Body>;
        type Error = Infallible;
        type Future = BoxFuture<Self::Response, Infallible>;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
            Poll::Ready(Ok(()))
        }

        fn call(&mut self, request: http::Request<Body>) -> Self::Future {
            Box::pin(async move {
                match request.uri().path() {
                    "/panic" => panic!("a fault with /a/secret/path"),
                    "/hang" => std::future::pending().await,
                    _ => Ok(http::Response::new(Body::empty())),
                }
            })
        }
    }

    async fn call(path: &str, peer: bool) -> (http::HeaderMap, Status) {
        let (ours, _theirs) = tokio::net::UnixStream::pair().unwrap();
        let mut request = http::Request::new(Body::empty());
        *request.uri_mut() = path.parse().unwrap();
        request
            .headers_mut()
            .insert("grpc-timeout", "300m".parse().unwrap());
        request
            .headers_mut()
            .insert(REQUEST_ID_HEADER, "req-1".parse().unwrap());
        request.extensions_mut().insert(UdsConnectInfo {
            peer_addr: None,
            peer_cred: peer.then(|| ours.peer_cred().unwrap()),
        });
        let response = Edge(Acts).call(request).await.unwrap();
        let status = Status::from_header_map(response.headers());
        (response.headers().clone(), status.unwrap_or(Status::ok("")))
    }

    #[tokio::test]
    async fn a_panic_is_an_internal_error_that_tells_nothing() {
        let (headers, status) = call("/panic", true).await;
        assert_eq!(status.code(), tonic::Code::Internal);
        assert!(!status.message().contains("secret"));
        assert_eq!(headers[REQUEST_ID_HEADER], "req-1");
    }

    #[tokio::test]
    async fn a_call_that_takes_too_long_is_answered_by_its_deadline() {
        let begun = std::time::Instant::now();
        let (headers, status) = call("/hang", true).await;
        assert_eq!(status.code(), tonic::Code::DeadlineExceeded);
        assert_eq!(headers[REQUEST_ID_HEADER], "req-1");
        assert!(begun.elapsed() < Duration::from_secs(20));
    }

    #[tokio::test]
    async fn a_peer_that_cannot_be_told_is_refused() {
        assert_eq!(call("/", true).await.1.code(), tonic::Code::Ok);
        assert_eq!(
            call("/", false).await.1.code(),
            tonic::Code::Unauthenticated
        );
    }

    fn headers(name: &'static str, value: &str) -> http::HeaderMap {
        let mut headers = http::HeaderMap::new();
        headers.insert(name, http::HeaderValue::from_str(value).unwrap());
        headers
    }

    #[test]
    fn deadlines_are_read_as_the_protocol_writes_them() {
        let read = |value: &str| timeout(&headers("grpc-timeout", value));
        assert_eq!(read("2H"), Some(Duration::from_secs(7_200)));
        assert_eq!(read("3M"), Some(Duration::from_secs(180)));
        assert_eq!(read("4S"), Some(Duration::from_secs(4)));
        assert_eq!(read("5m"), Some(Duration::from_millis(5)));
        assert_eq!(read("6u"), Some(Duration::from_micros(6)));
        assert_eq!(read("7n"), Some(Duration::from_nanos(7)));
        for wrong in ["", "S", "5", "-1S", "+1S", "123456789S", "5x", "5 S"] {
            assert_eq!(read(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn an_answer_leaves_before_the_deadline() {
        let now = Instant::now();
        let before = |timeout: Duration| {
            let (by, at) = times(now, timeout);
            assert!(by < at && at < now + timeout);
            now + timeout - by
        };
        assert_eq!(before(Duration::from_millis(50)), Duration::from_millis(20));
        assert_eq!(before(Duration::from_secs(2)), Duration::from_millis(200));
        assert_eq!(before(Duration::from_secs(600)), Duration::from_millis(500));
        assert_eq!(times(now, Duration::ZERO), (now, now));
    }

    #[test]
    fn a_caller_says_once_and_plainly_for_whom_it_calls() {
        let of = |pairs: &[(&'static str, &str)]| {
            let mut headers = http::HeaderMap::new();
            for (name, value) in pairs {
                headers.append(*name, http::HeaderValue::from_str(value).unwrap());
            }
            who(&headers)
        };
        assert_eq!(of(&[]), Ok(Who::default()));
        let member = of(&[
            (ROLE_HEADER, "member"),
            (USER_HEADER, "u 1"),
            (PROJECT_HEADER, "p"),
        ]);
        let expected = Who {
            role: Role::Member,
            user: "u 1".to_owned(),
            project: "p".to_owned(),
        };
        assert_eq!(member, Ok(expected));
        let long = "a".repeat(256);
        for wrong in [
            [(ROLE_HEADER, "root"), (PROJECT_HEADER, "p")],
            [(ROLE_HEADER, "Admin"), (PROJECT_HEADER, "p")],
            [(ROLE_HEADER, "member"), (USER_HEADER, "u")],
            [(ROLE_HEADER, "member"), (PROJECT_HEADER, "")],
            [(PROJECT_HEADER, "p"), (PROJECT_HEADER, "q")],
            [(USER_HEADER, "u"), (PROJECT_HEADER, "p\tq")],
            [(USER_HEADER, "\u{e9}"), (PROJECT_HEADER, "p")],
            [(USER_HEADER, long.as_str()), (PROJECT_HEADER, "p")],
        ] {
            let refusal = of(&wrong).unwrap_err();
            assert_eq!(refusal.reason, Reason::InvalidField, "{wrong:?}");
        }
    }

    #[test]
    fn a_usable_request_id_is_kept_and_any_other_replaced() {
        let id = |value: &str| request_id(&headers(REQUEST_ID_HEADER, value));
        assert_eq!(&*id("req-8f2"), "req-8f2");
        for hostile in ["", "a b", "x\tlevel=error", "<id>", &"a".repeat(65)] {
            assert!(id(hostile).starts_with("req-"), "{hostile}");
        }
        assert!(request_id(&http::HeaderMap::new()).starts_with("req-"));
    }
}
