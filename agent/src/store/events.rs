// SPDX-License-Identifier: Apache-2.0
//! The log of events. An event is written in the transaction of the change it tells of, so none is
//! lost and none is invented.

use rusqlite::{Connection, params};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{
    Publish, Store, StoreResult,
    documents::{self, column},
};
use crate::core::{
    action::Verb, incident::IncidentReport, operation::OperationRecord, record::ServerRecord,
};

/// What changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Change {
    /// A server, as it is after the change.
    Server(Box<ServerRecord>),
    /// A server is no longer managed.
    Removed(Verb),
    /// An operation began, turned round or ended.
    Operation(Box<OperationRecord>),
    /// Something happened in or to a server's guest.
    Guest(IncidentReport),
}

/// An event of the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredEvent {
    /// Number; grows from event to event.
    pub revision: i64,
    /// When, in milliseconds since the Unix epoch.
    pub at_ms: i64,
    /// Server.
    pub server: Uuid,
    /// What changed.
    pub change: Change,
}

/// A part of the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EventPage {
    /// The oldest revision that is kept.
    pub oldest: i64,
    /// The newest revision.
    pub newest: i64,
    /// Events in order.
    pub events: Vec<StoredEvent>,
}

/// The newest revision; 0 if there was never an event.
pub(super) fn newest(connection: &Connection) -> StoreResult<i64> {
    // sqlite_sequence still knows it when the newest events were trimmed.
    Ok(connection.query_row(
        "SELECT coalesce(max(seq), 0) FROM sqlite_sequence WHERE name = 'events'",
        [],
        |row| row.get(0),
    )?)
}

/// Appends an event and returns its revision.
pub(super) fn append(
    connection: &Connection,
    publish: &mut Publish,
    at_ms: i64,
    server: Uuid,
    change: &Change,
) -> StoreResult<i64> {
    connection
        .prepare_cached("INSERT INTO events (at, server, doc) VALUES (?1, ?2, ?3)")?
        .execute(params![
            at_ms,
            server.to_string(),
            documents::write(change)?
        ])?;
    let revision = connection.last_insert_rowid();
    publish.revision = Some(revision);
    Ok(revision)
}

/// Removes all but the newest `keep` events.
pub(super) fn trim(connection: &Connection, keep: i64) -> StoreResult<()> {
    connection.execute(
        "DELETE FROM events WHERE revision <= (SELECT max(revision) FROM events) - ?1",
        [keep],
    )?;
    Ok(())
}

impl Store {
    /// Events after `after`, at most `limit`.
    ///
    /// # Errors
    /// If the store fails.
    pub async fn events_after(&self, after: i64, limit: u32) -> StoreResult<EventPage> {
        self.run(move |db| {
            let newest = newest(&db.connection)?;
            let oldest: Option<i64> = db
                .connection
                .query_row("SELECT min(revision) FROM events", [], |row| row.get(0))?;
            let mut statement = db.connection.prepare_cached(
                "SELECT revision, at, server, doc FROM events WHERE revision > ?1 ORDER BY revision LIMIT ?2",
            )?;
            let rows = statement.query_map(params![after, limit], |row| {
                Ok((
                    row.get::<_, i64>(0)?,
                    row.get::<_, i64>(1)?,
                    row.get::<_, String>(2)?,
                    row.get::<_, String>(3)?,
                ))
            })?;
            let mut events = Vec::new();
            for row in rows {
                let (revision, at_ms, server, doc) = row?;
                events.push(StoredEvent {
                    revision,
                    at_ms,
                    server: column("events", "server").id(&revision, &server)?,
                    change: documents::CHANGE.read(&revision, &doc)?,
                });
            }
            Ok(EventPage {
                oldest: oldest.unwrap_or(newest + 1),
                newest,
                events,
            })
        })
        .await
    }
}
