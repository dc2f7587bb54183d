// SPDX-License-Identifier: Apache-2.0
//! The tables, and how they came to be what they are.

use std::{path::Path, time::Duration};

use rusqlite::{Connection, OptionalExtension as _};
use uuid::Uuid;

use super::{StoreError, StoreResult};

/// Each entry brings the store from the version of its index to the next. An entry that was released
/// never changes. A change of the documents' form makes a new version too, with nothing to be done here
/// if older documents can be read as they are: what counts is that older agents refuse the store.
const MIGRATIONS: &[&str] = &["
    CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
    CREATE TABLE servers (
        ord INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        doc TEXT NOT NULL
    ) STRICT;
    CREATE TABLE operations (
        ord INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        server TEXT NOT NULL,
        request_id TEXT UNIQUE,
        body_hash TEXT NOT NULL,
        final INTEGER NOT NULL,
        created_at INTEGER NOT NULL,
        plan TEXT,
        doc TEXT NOT NULL
    ) STRICT;
    CREATE INDEX operations_of_server ON operations (server, ord);
    CREATE INDEX operations_under_way ON operations (ord) WHERE final = 0;
    CREATE TABLE saved_definitions (
        server TEXT PRIMARY KEY,
        plan TEXT NOT NULL,
        xml TEXT NOT NULL
    ) STRICT;
    CREATE TABLE images (id TEXT PRIMARY KEY, name TEXT NOT NULL, doc TEXT NOT NULL) STRICT;
    CREATE TABLE image_holders (
        image TEXT NOT NULL REFERENCES images (id),
        holder TEXT NOT NULL,
        PRIMARY KEY (image, holder)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE events (
        revision INTEGER PRIMARY KEY AUTOINCREMENT,
        at INTEGER NOT NULL,
        server TEXT NOT NULL,
        doc TEXT NOT NULL
    ) STRICT;
    CREATE TABLE observations (
        server INTEGER PRIMARY KEY REFERENCES servers (ord) ON DELETE CASCADE,
        revision INTEGER NOT NULL,
        at INTEGER NOT NULL,
        source TEXT NOT NULL
    ) STRICT;
    CREATE TABLE image_files (image TEXT PRIMARY KEY) STRICT, WITHOUT ROWID;
    CREATE TABLE image_requests (
        request_id TEXT PRIMARY KEY,
        body_hash TEXT NOT NULL,
        created_at INTEGER NOT NULL,
        doc TEXT
    ) STRICT;
    CREATE TABLE room (filler BLOB NOT NULL) STRICT;
    CREATE TABLE known_definitions (
        server TEXT NOT NULL,
        plan TEXT NOT NULL,
        xml TEXT NOT NULL,
        in_force INTEGER NOT NULL,
        PRIMARY KEY (server, plan)
    ) STRICT;
    CREATE TABLE autostart (
        server TEXT PRIMARY KEY,
        ord INTEGER NOT NULL,
        was TEXT NOT NULL,
        tries INTEGER NOT NULL,
        outcome TEXT NOT NULL,
        message TEXT NOT NULL
    ) STRICT;
"];

/// Another process that has locked the store is waited for so long.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);

/// Opens the store and brings it to the newest version.
pub(super) fn open(path: &Path) -> StoreResult<Connection> {
    let mut connection = Connection::open(path)?;
    connection.busy_timeout(PATIENCE)?;
    // A write-ahead log is synced once for a change instead of two or three times.
    let _mode: String = connection.query_row("PRAGMA journal_mode = WAL", [], |row| row.get(0))?;
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.pragma_update(None, "foreign_keys", true)?;
    // What is deleted may have been a secret.
    connection.pragma_update(None, "secure_delete", true)?;
    let found: i64 = connection.query_row("PRAGMA user_version", [], |row| row.get(0))?;
    let known = i64::try_from(MIGRATIONS.len()).unwrap_or(i64::MAX);
    if found > known {
        return Err(StoreError::Newer { found, known });
    }
    for (version, migration) in (0i64..)
        .zip(MIGRATIONS)
        .skip_while(|(version, _)| *version < found)
    {
        let transaction = connection.transaction()?;
        transaction.execute_batch(migration)?;
        transaction.pragma_update(None, "user_version", version + 1)?;
        transaction.commit()?;
    }
    Ok(connection)
}

/// This host's uuid; made when first asked for.
pub(super) fn host_id(connection: &Connection) -> StoreResult<Uuid> {
    let stored: Option<String> = connection
        .query_row("SELECT value FROM meta WHERE key = 'host_id'", [], |row| {
            row.get(0)
        })
        .optional()?;
    if let Some(id) = stored.and_then(|id| Uuid::parse_str(&id).ok()) {
        return Ok(id);
    }
    let id = Uuid::new_v4();
    connection.execute(
        "INSERT OR REPLACE INTO meta (key, value) VALUES ('host_id', ?1)",
        [id.to_string()],
    )?;
    Ok(id)
}
