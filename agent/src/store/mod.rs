// SPDX-License-Identifier: Apache-2.0
//! The store: servers, operations, saved definitions, images and events, in one SQLite file.
//!
//! One OS thread owns the connection and makes every change, so that changes have one order, and a
//! slow disk holds up no other thread. What is read often, the servers, is kept in memory and
//! published when a change is committed; reading it waits for nobody.
//!
//! SQLite's write-ahead log lets each change choose its durability ([`Durability`]): what must survive
//! a power cut is synced before the call returns, the progress of steps is not. Progress that a power
//! cut takes away costs nothing, for a step may be applied again.

mod autostart;
mod definitions;
mod documents;
mod events;
mod images;
mod journal;
mod known;
mod observations;
mod room;
mod schema;
mod secrets;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    path::Path,
    sync::{
        Arc, RwLock,
        atomic::{AtomicI64, Ordering},
    },
    time::{Duration, Instant},
};

use rusqlite::Connection;
use tokio::sync::{mpsc, oneshot, watch};
use uuid::Uuid;

pub use documents::Damage;
pub use events::{Change, EventPage, StoredEvent};
pub use images::ImageAnswer;
pub use journal::{Accept, Accepted, Request};

use crate::core::record::ServerRecord;

/// What can go wrong in the store.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// SQLite refused.
    #[error("the store failed")]
    Sqlite(#[from] rusqlite::Error),
    /// What is stored cannot be read.
    #[error(
        "salvor.db is damaged: {column} of {row} in the table {table} cannot be read; stop the agent and repair it, or put salvor.db back from a backup; do not delete the row, for without it the agent takes the files that belong to it for left-overs"
    )]
    Damaged {
        /// The table.
        table: &'static str,
        /// The column.
        column: &'static str,
        /// The row's id.
        row: String,
        /// What is wrong with it.
        #[source]
        damage: Damage,
    },
    /// A record cannot be written as a document.
    #[error("a record cannot be written as JSON")]
    Unwritable(#[source] serde_json::Error),
    /// The store was written by a newer agent.
    #[error(
        "the store has schema version {found}, newer than the {known} that this agent knows; use the newer agent"
    )]
    Newer {
        /// Version of the store.
        found: i64,
        /// Version of the agent.
        known: i64,
    },
    /// The log has lost its room.
    #[error("the store's log has no room to spare")]
    Room(#[source] std::io::Error),
    /// The store's thread could not be started.
    #[error("the store's thread cannot be started")]
    Thread(#[source] std::io::Error),
    /// The store's thread has ended.
    #[error("the store is closed")]
    Closed,
    /// A refusal found while the change was made.
    #[error(transparent)]
    Refused(#[from] crate::core::reason::Refusal),
    /// There is no such record.
    #[error("there is no {what} {id}")]
    Missing {
        /// What kind of record.
        what: &'static str,
        /// Its id.
        id: String,
    },
}

/// The answer of a call to the store.
pub type StoreResult<T> = Result<T, StoreError>;

/// What a change survives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Durability {
    /// A crash of the agent.
    Process,
    /// A power cut.
    Power,
}

/// The servers, in memory.
#[derive(Debug, Default)]
struct Servers {
    by_id: HashMap<Uuid, (i64, Arc<ServerRecord>)>,
    by_order: BTreeMap<i64, Uuid>,
}

/// What the store's thread owns.
struct Db {
    connection: Connection,
    servers: Arc<RwLock<Servers>>,
    revision: watch::Sender<i64>,
    /// So many events are kept.
    keep_events: i64,
    events_since_trim: i64,
    durability: Durability,
    /// Servers that were seen again since that was last written.
    seen_again: HashSet<Uuid>,
    /// The log may hold passwords' hashes that are nowhere else any more.
    stale_secrets: bool,
    /// Nothing begins without room to carry it to its end.
    keeps_room: bool,
    writable: watch::Sender<bool>,
}

/// The store's thread does nothing.
const IDLE: i64 = -1;

fn millis_since(start: Instant) -> i64 {
    i64::try_from(start.elapsed().as_millis()).unwrap_or(i64::MAX)
}

type Job = Box<dyn FnOnce(&mut Db) + Send>;

/// A handle to the store. Cheap to clone.
#[derive(Clone)]
pub struct Store {
    jobs: mpsc::UnboundedSender<Job>,
    servers: Arc<RwLock<Servers>>,
    revision: watch::Receiver<i64>,
    writable: watch::Receiver<bool>,
    host_id: Uuid,
    /// When the thread began what it does now, in milliseconds since it was started; negative while
    /// it does nothing.
    busy_since: Arc<AtomicI64>,
    started: Instant,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store")
            .field("host_id", &self.host_id)
            .finish_non_exhaustive()
    }
}

impl Store {
    /// Opens (or makes) the store at `path` and keeps the newest `keep_events` events.
    ///
    /// # Errors
    /// If SQLite cannot open or read it, or a newer agent wrote it.
    pub fn open(path: &Path, keep_events: u32) -> StoreResult<Self> {
        let connection = schema::open(path)?;
        let host_id = schema::host_id(&connection)?;
        // An agent that died may not have come to it.
        let stale_secrets = !secrets::empty_log(&connection)?;
        let servers = Arc::new(RwLock::new(journal::load_servers(&connection)?));
        let (revision_tx, revision) = watch::channel(events::newest(&connection)?);
        let (writable_tx, writable) = watch::channel(true);
        let mut db = Db {
            connection,
            servers: Arc::clone(&servers),
            revision: revision_tx,
            keep_events: i64::from(keep_events.max(1)),
            events_since_trim: 0,
            durability: Durability::Power,
            seen_again: HashSet::new(),
            stale_secrets,
            keeps_room: false,
            writable: writable_tx,
        };
        // Requests are bounded by the callers: each waits for its answer before it sends another.
        let (jobs, mut inbox) = mpsc::unbounded_channel::<Job>();
        let started = Instant::now();
        let busy_since = Arc::new(AtomicI64::new(IDLE));
        let busy = Arc::clone(&busy_since);
        std::thread::Builder::new()
            .name("salvor-store".to_owned())
            .spawn(move || {
                while let Some(job) = inbox.blocking_recv() {
                    busy.store(millis_since(started), Ordering::Relaxed);
                    job(&mut db);
                    busy.store(IDLE, Ordering::Relaxed);
                }
            })
            .map_err(StoreError::Thread)?;
        Ok(Self {
            jobs,
            servers,
            revision,
            writable,
            host_id,
            busy_since,
            started,
        })
    }

    /// This host's uuid, made when the store was.
    #[must_use]
    pub fn host_id(&self) -> Uuid {
        self.host_id
    }

    /// Is the store's thread getting on: idle, or at what it does for less than `limit`?
    #[must_use]
    pub fn gets_on(&self, limit: Duration) -> bool {
        let since = self.busy_since.load(Ordering::Relaxed);
        let limit = i64::try_from(limit.as_millis()).unwrap_or(i64::MAX);
        since == IDLE || millis_since(self.started).saturating_sub(since) < limit
    }

    /// The newest revision, and when there is a newer one.
    #[must_use]
    pub fn revision(&self) -> watch::Receiver<i64> {
        self.revision.clone()
    }

    /// Did the last change succeed? A full filesystem is the usual reason if not.
    #[must_use]
    pub fn writable(&self) -> watch::Receiver<bool> {
        self.writable.clone()
    }

    /// One server.
    #[must_use]
    pub fn server(&self, id: Uuid) -> Option<Arc<ServerRecord>> {
        let servers = self
            .servers
            .read()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        servers.by_id.get(&id).map(|(_, record)| Arc::clone(record))
    }

    /// Servers in order of their making, beginning after the number `after`, each with its number.
    #[must_use]
    pub fn servers_after(&self, after: i64) -> Vec<(i64, Arc<ServerRecord>)> {
        let servers = self
            .servers
            .read()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        servers
            .by_order
            .range((std::ops::Bound::Excluded(after), std::ops::Bound::Unbounded))
            .filter_map(|(order, id)| {
                servers
                    .by_id
                    .get(id)
                    .map(|(_, record)| (*order, Arc::clone(record)))
            })
            .collect()
    }

    /// How many servers there are.
    #[must_use]
    pub fn server_count(&self) -> usize {
        self.servers
            .read()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .by_id
            .len()
    }

    /// Runs `work` on the store's thread.
    async fn run<T, F>(&self, work: F) -> StoreResult<T>
    where
        T: Send + 'static,
        F: FnOnce(&mut Db) -> StoreResult<T> + Send + 'static,
    {
        let (answer, wait) = oneshot::channel();
        self.jobs
            .send(Box::new(move |db| {
                let _ = answer.send(work(db));
            }))
            .map_err(|_| StoreError::Closed)?;
        wait.await.map_err(|_| StoreError::Closed)?
    }
}

/// What a transaction will publish once it is committed.
#[derive(Default)]
struct Publish {
    put: Vec<(i64, ServerRecord)>,
    remove: Vec<Uuid>,
    revision: Option<i64>,
}

impl Db {
    /// Makes a change in one transaction and, once it is committed, publishes it.
    fn change<T>(
        &mut self,
        durability: Durability,
        work: impl FnOnce(&Connection, &mut Publish) -> StoreResult<T>,
    ) -> StoreResult<T> {
        let changed = self.try_change(durability, work);
        self.note_writing(&changed);
        changed
    }

    /// Notes whether the store can be written; what was refused for another reason tells nothing.
    fn note_writing<T>(&self, outcome: &StoreResult<T>) {
        let writable = match outcome {
            Ok(_) => true,
            Err(StoreError::Sqlite(_)) => false,
            Err(_) => return,
        };
        self.writable.send_if_modified(|before| {
            let changed = *before != writable;
            *before = writable;
            changed
        });
    }

    fn try_change<T>(
        &mut self,
        durability: Durability,
        work: impl FnOnce(&Connection, &mut Publish) -> StoreResult<T>,
    ) -> StoreResult<T> {
        if self.durability != durability {
            self.connection.pragma_update(
                None,
                "synchronous",
                match durability {
                    Durability::Process => "NORMAL",
                    Durability::Power => "FULL",
                },
            )?;
            self.durability = durability;
        }
        let mut publish = Publish::default();
        let transaction = self.connection.transaction()?;
        let value = work(&transaction, &mut publish)?;
        transaction.commit()?;
        self.publish(publish);
        if self.events_since_trim > 1_000 {
            self.events_since_trim = 0;
            // The change stands whatever becomes of old events; they are trimmed another time.
            if let Err(error) = events::trim(&self.connection, self.keep_events) {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "old events cannot be removed"
                );
            }
        }
        Ok(value)
    }

    fn publish(&mut self, publish: Publish) {
        {
            let mut servers = self
                .servers
                .write()
                .unwrap_or_else(std::sync::PoisonError::into_inner);
            for (order, record) in publish.put {
                servers.by_order.insert(order, record.id);
                servers.by_id.insert(record.id, (order, Arc::new(record)));
            }
            for id in publish.remove {
                if let Some((order, _)) = servers.by_id.remove(&id) {
                    servers.by_order.remove(&order);
                }
            }
        }
        if let Some(revision) = publish.revision {
            self.events_since_trim += 1;
            self.revision.send_replace(revision);
        }
    }

    /// A copy of a server's record and its order.
    fn server(&self, id: Uuid) -> Option<(i64, ServerRecord)> {
        let servers = self
            .servers
            .read()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        servers
            .by_id
            .get(&id)
            .map(|(order, record)| (*order, ServerRecord::clone(record)))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[tokio::test]
    async fn a_change_that_hangs_is_noticed_and_forgotten_when_it_ends() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("salvor.db"), 1000).unwrap();
        let (release, held) = std::sync::mpsc::channel::<()>();
        let (began, beginning) = oneshot::channel();
        let hanging = tokio::spawn({
            let store = store.clone();
            async move {
                store
                    .run(move |_| {
                        began.send(()).unwrap();
                        held.recv().unwrap();
                        Ok(())
                    })
                    .await
            }
        });
        beginning.await.unwrap();
        assert!(!store.gets_on(Duration::ZERO));
        assert!(store.gets_on(Duration::from_secs(3600)));
        release.send(()).unwrap();
        hanging.await.unwrap().unwrap();
        // The thread takes up the next job only when it has noted the end of the last one, and notes
        // the end of this one after its answer.
        let idle = async {
            while !store.gets_on(Duration::ZERO) {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(30), idle)
            .await
            .unwrap();
    }
}
