// SPDX-License-Identifier: Apache-2.0
//! Room that the store has for sure. A filesystem that fills up while a guest is off must not keep its
//! operation from being carried on: so SQLite's two files have blocks of their own before any guest is
//! touched, and where that cannot be had, nothing that touches one begins.
//!
//! A filler is written, copied to the database and deleted again: its pages stay with the database,
//! which reuses them, and with the log, which is written from its beginning after each checkpoint and
//! made shorter only to be emptied of secrets, and then gets its blocks back. Filesystems that copy on write promise less.

use std::{
    fs::{self, OpenOptions},
    path::PathBuf,
};

use nix::fcntl::posix_fallocate;
use rusqlite::Connection;

use super::{Store, StoreError, StoreResult};
use crate::core::{
    action::Verb,
    reason::{Reason, Refusal},
};

/// So many bytes are made. SQLite copies its log to the database when it has 1,000 pages (4 MB); an
/// operation writes some 100 KB to the database and ten times that to the log.
const ROOM: i64 = 9 << 19;

/// With fewer bytes left no operation begins before there are more.
const ENOUGH: i64 = ROOM / 4;

/// The bytes of the database that nothing uses.
fn free(connection: &Connection) -> StoreResult<i64> {
    let pragma = |name| connection.query_row(name, [], |row| row.get::<_, i64>(0));
    Ok(pragma("PRAGMA freelist_count")?.saturating_mul(pragma("PRAGMA page_size")?))
}

/// Makes the room, or what of it is missing.
fn make(connection: &Connection) -> StoreResult<()> {
    let filled = connection
        .execute("INSERT INTO room (filler) VALUES (zeroblob(?1))", [ROOM])
        .and_then(|_| connection.query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |_| Ok(())));
    // Whatever became of it: without a filler this writes nothing. Zeros are not worth overwriting.
    connection.pragma_update(None, "secure_delete", false)?;
    let emptied = connection.execute("DELETE FROM room", []);
    connection.pragma_update(None, "secure_delete", true)?;
    emptied?;
    Ok(filled?)
}

/// SQLite's log.
fn log(connection: &Connection) -> PathBuf {
    format!("{}-wal", connection.path().unwrap_or_default()).into()
}

/// Gives a log that was emptied its blocks back. Of an empty log SQLite reads nothing, so these zeros are
/// in nobody's way; it writes from the beginning.
pub(super) fn keep_log(connection: &Connection) -> StoreResult<()> {
    let file = OpenOptions::new().write(true).open(log(connection));
    let kept = file.and_then(|file| Ok(posix_fallocate(file, 0, ROOM)?));
    kept.map_err(StoreError::Room)
}

/// Has the log blocks enough?
fn has_log(connection: &Connection) -> bool {
    let enough = u64::try_from(ENOUGH).unwrap_or(u64::MAX);
    fs::metadata(log(connection)).is_ok_and(|log| log.len() >= enough)
}

/// Is there room to carry an operation to its end? A delete is let through: it makes room.
pub(super) fn check(connection: &Connection, verb: Verb) -> StoreResult<()> {
    if free(connection)? >= ENOUGH && has_log(connection) {
        return Ok(());
    }
    match make(connection) {
        Ok(()) => Ok(()),
        Err(error) if matches!(verb, Verb::Delete | Verb::ForceDelete) => {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "the store has no room to spare; a delete is begun all the same"
            );
            Ok(())
        }
        Err(error) => {
            tracing::error!(
                error = &error as &dyn std::error::Error,
                "the store has no room to spare"
            );
            Err(Refusal::new(
                Reason::NoSpace,
                format!(
                    "the state folder has no room for the journal ({} MiB are wanted in advance), which might leave the guest off half-way; make room there",
                    ROOM >> 20
                ),
            )
            .into())
        }
    }
}

impl Store {
    /// Makes room in advance, and from now on sees to it that no operation begins without.
    ///
    /// # Errors
    /// If there is none. Operations are refused then until there is.
    pub async fn keep_room(&self) -> StoreResult<()> {
        self.run(|db| {
            db.keeps_room = true;
            let made = make(&db.connection);
            db.note_writing(&made);
            made
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]

    use std::os::unix::fs::MetadataExt as _;

    use super::super::Durability;
    use super::*;

    /// What an operation on one server writes, a dozen times over.
    async fn write(store: &Store, times: i64) -> StoreResult<()> {
        store
            .run(move |db| {
                for number in 0..times {
                    db.change(Durability::Process, |tx, _| {
                        tx.execute(
                            "INSERT INTO events (at, server, doc) VALUES (?1, 'a', printf('%.20000c', 'x'))",
                            [number],
                        )?;
                        Ok(())
                    })?;
                }
                Ok(())
            })
            .await
    }

    #[tokio::test]
    async fn a_store_that_cannot_grow_carries_on_what_has_begun_and_begins_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("salvor.db");
        let store = Store::open(&path, 1_000_000).unwrap();
        store.keep_room().await.unwrap();
        let log = || {
            std::fs::metadata(path.with_extension("db-wal"))
                .unwrap()
                .len()
        };
        let before = log();
        assert!(before >= u64::try_from(ROOM).unwrap(), "{before}");
        // As if the filesystem were full.
        let full = |pages: &'static str| {
            store.run(move |db| {
                db.connection
                    .query_row(&format!("PRAGMA max_page_count = {pages}"), [], |_| Ok(()))?;
                Ok(())
            })
        };
        full("1").await.unwrap();
        write(&store, 100).await.unwrap();
        assert_eq!(log(), before, "the log was there already");
        let may = async |verb| store.run(move |db| check(&db.connection, verb)).await;
        may(Verb::Rescue).await.unwrap();
        while write(&store, 1).await.is_ok() {}
        assert!(!*store.writable().borrow());
        let Err(StoreError::Refused(refusal)) = may(Verb::Rescue).await else {
            panic!("it is refused");
        };
        assert_eq!(refusal.reason, Reason::NoSpace);
        may(Verb::Delete).await.unwrap();
        full("1000000").await.unwrap();
        may(Verb::Rescue).await.unwrap();
        write(&store, 1).await.unwrap();
        assert!(*store.writable().borrow());
    }

    #[tokio::test]
    async fn a_log_that_is_emptied_keeps_its_room_and_can_be_read_after_a_crash() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("salvor.db");
        let store = Store::open(&path, 1_000_000).unwrap();
        store.keep_room().await.unwrap();
        write(&store, 1).await.unwrap();
        let emptied = store.run(|db| {
            db.stale_secrets = true;
            db.wipe()
        });
        emptied.await.unwrap();
        let log = std::fs::read(path.with_extension("db-wal")).unwrap();
        assert!(log.iter().all(|byte| *byte == 0));
        let blocks = || {
            std::fs::metadata(path.with_extension("db-wal"))
                .unwrap()
                .blocks()
        };
        assert!(blocks() * 512 >= u64::try_from(ROOM).unwrap());
        // An agent that dies now leaves a log of zeros; one that dies later has begun to write there.
        for events in [1, 2] {
            let left = folder.path().join(format!("left-{events}.db"));
            for end in ["", "-wal"] {
                let name = |path: &std::path::Path| format!("{}{end}", path.display());
                std::fs::copy(name(&path), name(&left)).unwrap();
            }
            let next = Store::open(&left, 1_000_000).unwrap();
            assert_eq!(*next.revision().borrow(), events);
            write(&store, 1).await.unwrap();
        }
    }
}
