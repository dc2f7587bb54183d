// SPDX-License-Identifier: Apache-2.0
//! Passwords' hashes leave the store with the operation that needed them. A plan goes when its operation
//! has ended, and SQLite overwrites what is deleted (`secure_delete`, see [`super::schema`]); but its log
//! still has pages as they were, until they happen to be written over. So the log is emptied when
//! something has gone that must not be read from it.
//!
//! What knows when that is: [`super::journal`].

use std::time::Duration;

use rusqlite::Connection;

use super::{Db, Store, StoreResult, room, schema};
use crate::core::record::ServerRecord;

/// Does the record hold a hash?
pub(super) fn holds_password(record: &ServerRecord) -> bool {
    record
        .rescue
        .as_ref()
        .is_some_and(|rescue| rescue.password_for_agent.is_some())
}

/// The record as the log of events has it: events are kept long, and nobody looks for a hash there.
pub(super) fn without_password(record: &ServerRecord) -> ServerRecord {
    let mut record = record.clone();
    if let Some(rescue) = &mut record.rescue {
        rescue.password_for_agent = None;
    }
    record
}

/// Copies SQLite's log to the database and empties it. Nothing is waited for: `false` if another process
/// reads there.
pub(super) fn empty_log(connection: &Connection) -> StoreResult<bool> {
    connection.busy_timeout(Duration::ZERO)?;
    let busy = connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |row| {
        row.get::<_, bool>(0)
    });
    connection.busy_timeout(schema::PATIENCE)?;
    Ok(!busy?)
}

impl Db {
    /// Empties the log if it may hold what must not be read any more.
    pub(super) fn wipe(&mut self) -> StoreResult<()> {
        if !self.stale_secrets {
            return Ok(());
        }
        self.stale_secrets = !empty_log(&self.connection)?;
        if self.keeps_room && !self.stale_secrets {
            room::keep_log(&self.connection)?;
        }
        Ok(())
    }
}

impl Store {
    /// Has the log emptied, if there is a reason, before anything else is done with the store. Whoever
    /// has ended an operation need not wait for it. What fails is tried again when the next operation
    /// ends, and when the agent starts.
    pub(super) fn wipe(&self) {
        // Without a thread there is nothing to be done.
        let _ = self.jobs.send(Box::new(|db| {
            if let Err(error) = db.wipe() {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "the store's log cannot be emptied"
                );
            }
        }));
    }
}
