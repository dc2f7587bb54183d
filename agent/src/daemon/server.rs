// SPDX-License-Identifier: Apache-2.0
//! The gRPC server on its socket, and how it comes to an end.
//!
//! Owns the health service and the order of the end: health says NOT_SERVING, running work comes to rest while reads are
//! still answered, streams are asked to end, and what is left is cut off.

use std::time::Duration;

use futures_util::StreamExt as _;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{oneshot, watch};
use tokio_stream::Stream;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;
use tonic_health::ServingStatus;
use tonic_health::server::{HealthReporter, health_reporter};

use super::{Drain, Notifier, Services};
use crate::hypervisor::LinkState;

/// How long streams may go on after all work has come to rest. Watchers never end by themselves.
const LINGER: Duration = Duration::from_secs(1);

/// How long no connection is accepted after accepting one failed. It fails at once and again while the process has no
/// free file descriptor, and trying without a pause would keep a CPU busy.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What is needed to serve.
pub struct Serving {
    /// The socket.
    pub listener: UnixListener,
    /// What is served on it.
    pub services: Services,
    /// When to end.
    pub drain: Drain,
    /// Who is told.
    pub notifier: Notifier,
}

/// Serves until the agent has drained, which the service manager is told takes at most `within`.
///
/// # Errors
/// The server ends unasked.
pub async fn serve(serving: Serving, within: Duration) -> Result<(), tonic::transport::Error> {
    let Serving {
        listener,
        services,
        drain,
        notifier,
    } = serving;
    let Services {
        routes,
        at_rest,
        link,
        need_link,
        writable,
        progress,
    } = services;
    let (health, health_service) = health_reporter();
    health.set_service_status("", ServingStatus::Serving).await;

    let following = follow(health.clone(), link, writable, need_link);
    let (stop, stopped) = oneshot::channel::<()>();
    let server = Server::builder()
        .add_routes(routes.add_service(health_service))
        .serve_with_incoming_shutdown(pausing(UnixListenerStream::new(listener)), async {
            // Dropping the sender is the signal.
            let _ = stopped.await;
        });

    let end = async {
        drain.draining().await;
        health
            .set_service_status("", ServingStatus::NotServing)
            .await;
        notifier.stopping(within, "draining");
        tokio::select! {
            () = at_rest => tracing::info!("all work has come to rest"),
            () = drain.expired() => {
                tracing::warn!("time is over: running work is left for the next start to continue");
            }
        }
        drop(stop);
        tokio::select! {
            () = tokio::time::sleep(LINGER) => {}
            () = drain.expired() => {}
        }
    };

    tokio::select! {
        result = server => result,
        () = end => {
            tracing::info!("open streams are cut off");
            Ok(())
        }
        () = notifier.clone().heartbeat(|| progress()) => Ok(()),
        () = following => Ok(()),
    }
}

/// Has the health of the services that need libvirt and the store follow both. Never ends.
async fn follow(
    health: HealthReporter,
    mut link: watch::Receiver<LinkState>,
    mut writable: watch::Receiver<bool>,
    services: &'static [&'static str],
) {
    loop {
        let (up, writes) = (
            *link.borrow_and_update() == LinkState::Up,
            *writable.borrow_and_update(),
        );
        let status = if up && writes {
            ServingStatus::Serving
        } else {
            ServingStatus::NotServing
        };
        for service in services {
            health.set_service_status(*service, status).await;
        }
        let told = tokio::select! {
            told = link.changed() => told,
            told = writable.changed() => told,
        };
        if told.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

/// The connections of `incoming`, with a pause after each failure to accept one.
fn pausing(
    incoming: impl Stream<Item = std::io::Result<UnixStream>>,
) -> impl Stream<Item = std::io::Result<UnixStream>> {
    incoming.then(|accepted| async {
        if let Err(error) = &accepted {
            tracing::warn!(%error, "a connection could not be accepted");
            tokio::time::sleep(ACCEPT_PAUSE).await;
        }
        accepted
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::io;
    use std::sync::Arc;
    use std::time::Instant;

    use tempfile::TempDir;
    use tokio::task::JoinHandle;
    use tokio::time::timeout;
    use tonic::service::Routes;
    use tonic::transport::{Channel, Endpoint};
    use tonic_health::pb::HealthCheckRequest;
    use tonic_health::pb::health_check_response::ServingStatus as Status;
    use tonic_health::pb::health_client::HealthClient;

    use super::*;
    use crate::daemon::NotifyEnvironment;
    use crate::daemon::signals::ByHand;

    const PATIENCE: Duration = Duration::from_secs(10);

    /// A server whose work comes to rest when a test says so.
    struct Fixture {
        _dir: TempDir,
        client: HealthClient<Channel>,
        signals: ByHand,
        drain: Drain,
        rest: Option<oneshot::Sender<()>>,
        link: watch::Sender<LinkState>,
        writable: watch::Sender<bool>,
        server: JoinHandle<Result<(), tonic::transport::Error>>,
    }

    async fn serving() -> Fixture {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let (signals, drain) = ByHand::new();
        let (rest, resting) = oneshot::channel();
        let (link, writable) = (watch::Sender::new(LinkState::Up), watch::Sender::new(true));
        let services = Services {
            routes: Routes::default(),
            at_rest: Box::pin(async {
                let _ = resting.await;
            }),
            link: link.subscribe(),
            need_link: &["servers"],
            writable: writable.subscribe(),
            progress: Arc::new(|| true),
        };
        let notifier = Notifier::connect(&NotifyEnvironment::default()).unwrap();
        let serving = Serving {
            listener,
            services,
            drain: drain.clone(),
            notifier,
        };
        let server = tokio::spawn(serve(serving, PATIENCE));
        let endpoint = Endpoint::from_shared(format!("unix:{}", path.display())).unwrap();
        let client = HealthClient::new(endpoint.connect().await.unwrap());
        Fixture {
            _dir: dir,
            client,
            signals,
            drain,
            rest: Some(rest),
            link,
            writable,
            server,
        }
    }

    fn everything() -> HealthCheckRequest {
        HealthCheckRequest {
            service: String::new(),
        }
    }

    #[tokio::test]
    async fn what_needs_libvirt_and_the_store_is_well_while_both_are() {
        let mut fixture = serving().await;
        let request = HealthCheckRequest {
            service: "servers".to_owned(),
        };
        let mut watch = fixture.client.watch(request).await.unwrap().into_inner();
        let down = LinkState::Down {
            reason: String::new(),
        };
        let mut next = async || watch.message().await.unwrap().unwrap().status();
        while next().await != Status::Serving {}
        fixture.writable.send_replace(false);
        assert_eq!(next().await, Status::NotServing);
        fixture.writable.send_replace(true);
        assert_eq!(next().await, Status::Serving);
        fixture.link.send_replace(down);
        assert_eq!(next().await, Status::NotServing);
    }

    #[tokio::test]
    async fn requests_are_answered_while_work_comes_to_rest_and_then_it_ends() {
        let mut fixture = serving().await;
        let mut watch = fixture
            .client
            .watch(everything())
            .await
            .unwrap()
            .into_inner();
        assert_eq!(
            watch.message().await.unwrap().unwrap().status(),
            Status::Serving
        );

        fixture.signals.ask().await;
        assert_eq!(
            watch.message().await.unwrap().unwrap().status(),
            Status::NotServing
        );
        let answer = fixture
            .client
            .check(everything())
            .await
            .unwrap()
            .into_inner();
        assert_eq!(answer.status(), Status::NotServing);
        assert!(!fixture.server.is_finished());

        drop(fixture.rest.take());
        // The watch is still open: it is cut off.
        timeout(PATIENCE, fixture.server)
            .await
            .unwrap()
            .unwrap()
            .unwrap();
        timeout(PATIENCE, fixture.drain.draining()).await.unwrap();
    }

    #[tokio::test]
    async fn work_that_does_not_come_to_rest_is_left_when_time_is_over() {
        let fixture = serving().await;
        fixture.signals.ask().await;
        timeout(PATIENCE, fixture.drain.draining()).await.unwrap();
        assert!(!fixture.server.is_finished());
        fixture.signals.ask().await;
        timeout(PATIENCE, fixture.server)
            .await
            .unwrap()
            .unwrap()
            .unwrap();
    }

    #[tokio::test]
    async fn a_failed_accept_does_not_end_the_server_and_does_not_spin() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let incoming = tokio_stream::iter([
            Err(io::Error::from_raw_os_error(nix::libc::EMFILE)),
            Err(io::Error::from_raw_os_error(nix::libc::EMFILE)),
            Ok(ours),
        ]);
        let begun = Instant::now();
        let accepted: Vec<_> = pausing(incoming).collect().await;
        assert_eq!(
            accepted.iter().filter(|accepted| accepted.is_ok()).count(),
            1
        );
        assert!(begun.elapsed() >= 2 * ACCEPT_PAUSE);
    }
}
