// SPDX-License-Identifier: Apache-2.0
//! WatchService: the log of events as a stream.
//!
//! ```text
//!        no revision ──────────────┐
//!  gap ──> Gap ──> servers as they are ──> events, page by page ──> CaughtUp ──> wait ─┐
//!   ^                                        ^                         ^  every 5 s ───┤
//!   └──── revisions are missing ─────────────┴──────── newer revision ─────────────────┘
//! ```
//!
//! The stream is pulled: it reads the next page when the client has taken the one before. A slow
//! client slows only itself, and what it misses meanwhile it is told as a gap.

use std::{collections::HashSet, pin::Pin, sync::Arc, time::Duration, vec};

use futures_util::{Stream, stream};
use salvor_proto::v1::{
    self, WatchEventsRequest, WatchEventsResponse, event::Change as Told,
    watch_events_response::Item, watch_service_server::WatchService,
};
use tokio::{sync::watch, time::Instant};
use tonic::{Request, Response, Status};
use uuid::Uuid;

use super::{
    Api,
    convert::{operation::operation, server::server, time::timestamp},
    edge::Call,
    resolve,
    validate::Checked,
};
use crate::{
    core::{
        incident::IncidentReport,
        lookup::whole_id,
        reason::{Reason, Refusal},
        record::ServerRecord,
    },
    dispatch::refused,
    store::{Change, Store, StoredEvent},
};

/// Events are read so many at a time.
const PAGE: u32 = 64;

/// A silent stream says so often that it lives.
const TELL: Duration = Duration::from_secs(5);

/// A watch names at most so many servers.
const SERVERS: usize = 1_000;

/// What was read and is not sent yet.
enum Pending {
    Nothing,
    Gap(v1::Gap),
    Servers(vec::IntoIter<Arc<ServerRecord>>),
    Events(vec::IntoIter<StoredEvent>),
}

/// One stream.
struct Follower {
    call: Call,
    store: Store,
    revision: watch::Receiver<i64>,
    draining: watch::Receiver<bool>,
    /// Servers to tell of; all if `None`.
    only: Option<HashSet<Uuid>>,
    /// Everything up to this revision was read.
    after: i64,
    pending: Pending,
    /// Whether `after` is known to be one of this log's revisions.
    placed: bool,
    /// When to say next that the stream lives; at once after something was sent.
    tell_at: Option<Instant>,
    ended: bool,
}

impl Follower {
    /// The next message; `None` once the stream has ended.
    async fn next(&mut self) -> Option<Result<WatchEventsResponse, Status>> {
        if self.ended {
            return None;
        }
        let item = self.item().await;
        self.ended = item.is_err();
        Some(match item {
            Ok(item) => Ok(WatchEventsResponse { item: Some(item) }),
            Err(refusal) => Err(self.call.refuse(&refusal)),
        })
    }

    async fn item(&mut self) -> Checked<Item> {
        loop {
            if *self.draining.borrow() {
                return Err(Refusal::new(
                    Reason::Draining,
                    "the agent is stopping; watch on from the last revision when it is back",
                ));
            }
            if let Some(item) = self.take() {
                self.tell_at = None;
                return Ok(item);
            }
            let newest = *self.revision.borrow();
            if !self.placed || newest > self.after {
                self.read().await?;
                continue;
            }
            let now = Instant::now();
            match self.tell_at {
                Some(at) if at > now => self.wait(at).await?,
                _ => {
                    self.tell_at = Some(now + TELL);
                    return Ok(Item::CaughtUp(v1::CaughtUp {
                        revision: self.after,
                    }));
                }
            }
        }
    }

    fn wanted(&self, id: Uuid) -> bool {
        self.only.as_ref().is_none_or(|only| only.contains(&id))
    }

    /// The next of what was read.
    fn take(&mut self) -> Option<Item> {
        loop {
            let (id, event) = match &mut self.pending {
                Pending::Nothing => return None,
                Pending::Gap(gap) => {
                    let gap = *gap;
                    self.snapshot();
                    return Some(Item::Gap(gap));
                }
                Pending::Servers(servers) => match servers.next() {
                    Some(record) => (record.id, Next::Server(record)),
                    None => {
                        self.pending = Pending::Nothing;
                        continue;
                    }
                },
                Pending::Events(events) => match events.next() {
                    Some(event) => (event.server, Next::Event(event)),
                    None => {
                        self.pending = Pending::Nothing;
                        continue;
                    }
                },
            };
            if self.wanted(id) {
                return Some(Item::Event(match event {
                    Next::Server(record) => as_it_is(&record),
                    Next::Event(event) => told(event),
                }));
            }
        }
    }

    /// Every server as it is now. The revision is read first: what changes meanwhile is told again.
    fn snapshot(&mut self) {
        self.after = *self.revision.borrow();
        self.placed = true;
        let servers: Vec<_> = self
            .store
            .servers_after(i64::MIN)
            .into_iter()
            .map(|(_, record)| record)
            .collect();
        self.pending = Pending::Servers(servers.into_iter());
    }

    /// Reads the next page of the log, or finds that it is no longer there.
    async fn read(&mut self) -> Checked<()> {
        let page = self
            .store
            .events_after(self.after, PAGE)
            .await
            .map_err(refused)?;
        // A client that names more than there is has known another store.
        if self.after < page.oldest.saturating_sub(1) || self.after > page.newest {
            self.pending = Pending::Gap(v1::Gap {
                after_revision: self.after,
                oldest_revision: page.oldest,
            });
            return Ok(());
        }
        self.placed = true;
        self.after = page
            .events
            .last()
            .map_or(page.newest, |event| event.revision);
        self.pending = Pending::Events(page.events.into_iter());
        Ok(())
    }

    /// Waits until there is something to tell, or it is time to say that there is nothing.
    async fn wait(&mut self, until: Instant) -> Checked<()> {
        let after = self.after;
        let newer = tokio::select! {
            newer = self.revision.wait_for(|newest| *newest > after) => newer.map(|_| ()),
            draining = self.draining.wait_for(|draining| *draining) => draining.map(|_| ()),
            () = tokio::time::sleep_until(until) => Ok(()),
        };
        newer.map_err(|_| Refusal::new(Reason::Draining, "the agent is stopping"))
    }
}

/// What [`Follower::take`] took.
enum Next {
    Server(Arc<ServerRecord>),
    Event(StoredEvent),
}

fn as_it_is(record: &ServerRecord) -> v1::Event {
    v1::Event {
        revision: record.revision,
        time: Some(timestamp(record.updated_at_ms)),
        server_id: record.id.to_string(),
        change: Some(Told::Server(server(record))),
    }
}

fn told(event: StoredEvent) -> v1::Event {
    v1::Event {
        revision: event.revision,
        time: Some(timestamp(event.at_ms)),
        server_id: event.server.to_string(),
        change: Some(match event.change {
            Change::Server(record) => Told::Server(server(&record)),
            Change::Removed(verb) => Told::ServerRemoved(v1::ServerRemoved {
                action: verb.name().to_owned(),
            }),
            // The server is in the events round it, as it was then.
            Change::Operation(record) => Told::Operation(operation(&record, None, None)),
            Change::Guest(report) => Told::Guest(guest(report)),
        }),
    }
}

fn guest(report: IncidentReport) -> v1::GuestEvent {
    let incident = report.incident;
    v1::GuestEvent {
        kind: incident.kind.name().to_owned(),
        device: incident.device,
        source: incident.source,
        reason: incident.reason,
        action: incident.action,
        count: report.count,
        first_time: Some(timestamp(report.first_at_ms)),
    }
}

/// The servers that are named. A whole id need not be a server's: its events may still be kept.
fn only(store: &Store, words: &[String]) -> Checked<Option<HashSet<Uuid>>> {
    if words.len() > SERVERS {
        return Err(Refusal::field(
            "servers",
            format!("must be at most {SERVERS}, and are {}", words.len()),
        ));
    }
    let id = |word: &String| match whole_id(word) {
        Some(id) => Ok(id),
        None => resolve::server(store, word).map(|server| server.id),
    };
    let ids: HashSet<Uuid> = words.iter().map(id).collect::<Checked<_>>()?;
    Ok((!ids.is_empty()).then_some(ids))
}

fn follow(api: &Api, call: &Call, request: &WatchEventsRequest) -> Checked<Follower> {
    if request.after_revision.is_some_and(|after| after < 0) {
        return Err(Refusal::field("after_revision", "must not be negative"));
    }
    let mut follower = Follower {
        call: call.clone(),
        store: api.store.clone(),
        revision: api.store.revision(),
        draining: api.draining.clone(),
        only: only(&api.store, &request.servers)?,
        after: request.after_revision.unwrap_or_default(),
        pending: Pending::Nothing,
        placed: false,
        tell_at: None,
        ended: false,
    };
    if request.after_revision.is_none() {
        follower.snapshot();
    }
    Ok(follower)
}

#[tonic::async_trait]
impl WatchService for Api {
    type WatchEventsStream =
        Pin<Box<dyn Stream<Item = Result<WatchEventsResponse, Status>> + Send>>;

    async fn watch_events(
        &self,
        request: Request<WatchEventsRequest>,
    ) -> Result<Response<Self::WatchEventsStream>, Status> {
        let (call, message) = Call::open(request)?;
        let follower = follow(self, &call, &message).map_err(|refusal| call.refuse(&refusal))?;
        let stream = stream::unfold(follower, |mut follower| async move {
            let message = follower.next().await?;
            Some((message, follower))
        });
        Ok(Response::new(Box::pin(stream)))
    }
}
