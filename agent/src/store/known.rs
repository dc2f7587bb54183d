// SPDX-License-Identifier: Apache-2.0
//! Known definitions: what a server's own domain looks like, as libvirt printed it when the agent defined
//! it, adopted it, or was told to accept it. What libvirt has is held against it.
//!
//! A plan writes its own beside the one in force, once. It comes into force with the plan's outcome, in
//! the same transaction, and goes if the plan is taken back.

use rusqlite::{Connection, OptionalExtension as _, params};
use uuid::Uuid;

use super::{Durability, Store, StoreResult, journal::put_server};
use crate::core::{
    devices::{drifted, may_follow},
    record::Devices,
};

impl Store {
    /// Writes what a plan knows the server's definition to be; once: what the plan wrote before stays.
    ///
    /// # Errors
    /// If the store fails.
    pub async fn know_definition(&self, server: Uuid, plan: Uuid, xml: String) -> StoreResult<()> {
        // It counts only together with the outcome, which is synced.
        self.run(move |db| {
            db.change(Durability::Process, |tx, _| {
                put(tx, server, plan, &xml, false)
            })
        })
        .await
    }

    /// The definition in force.
    ///
    /// # Errors
    /// If the store fails.
    pub async fn known_definition(&self, server: Uuid) -> StoreResult<Option<String>> {
        self.run(move |db| in_force(&db.connection, server)).await
    }

    /// Servers with what plans wrote that have not ended, for tests of what is left behind.
    ///
    /// # Errors
    /// If the store fails.
    pub async fn definitions_not_in_force(&self) -> StoreResult<u32> {
        self.run(|db| {
            Ok(db.connection.query_row(
                "SELECT count(*) FROM known_definitions WHERE in_force = 0",
                [],
                |row| row.get(0),
            )?)
        })
        .await
    }

    /// Takes note of a definition that was read at `asked_at_ms`: the record shows its devices, and since
    /// when it is another than the known one. Of a server of which nothing is known it is the known one.
    /// `None`: there is none any more, which is another than the known one as well.
    /// Not if an operation or a rescue has made another of it since. Says whether the record changed.
    ///
    /// # Errors
    /// If the store fails.
    pub async fn observe_definition(
        &self,
        server: Uuid,
        seen: Option<(String, Devices)>,
        asked_at_ms: i64,
    ) -> StoreResult<bool> {
        self.run(move |db| {
            let Some((order, mut record)) = db.server(server) else {
                return Ok(false);
            };
            if !may_follow(&record) || asked_at_ms < record.settled_at_ms {
                return Ok(false);
            }
            let known = in_force(&db.connection, server)?;
            let differs = match (&known, &seen) {
                (Some(known), Some((xml, _))) => drifted(known, xml),
                (Some(_), None) => true,
                (None, _) => false,
            };
            let since = differs.then(|| record.drift_since_ms.unwrap_or(asked_at_ms));
            let others = seen
                .as_ref()
                .is_some_and(|(_, devices)| record.show(devices));
            let changed = others || record.drift_since_ms != since;
            let new = match (&known, &seen) {
                (None, Some((xml, _))) => Some(xml),
                (Some(_), _) | (None, None) => None,
            };
            if !changed && new.is_none() {
                return Ok(false);
            }
            record.drift_since_ms = since;
            db.change(Durability::Process, |tx, publish| {
                if let Some(xml) = new {
                    put(tx, server, Uuid::nil(), xml, true)?;
                }
                if changed {
                    put_server(tx, publish, order, record, asked_at_ms)?;
                }
                Ok(changed)
            })
        })
        .await
    }
}

fn put(
    connection: &Connection,
    server: Uuid,
    plan: Uuid,
    xml: &str,
    in_force: bool,
) -> StoreResult<()> {
    connection.execute(
        "INSERT OR IGNORE INTO known_definitions (server, plan, xml, in_force) VALUES (?1, ?2, ?3, ?4)",
        params![server.to_string(), plan.to_string(), xml, in_force],
    )?;
    Ok(())
}

fn in_force(connection: &Connection, server: Uuid) -> StoreResult<Option<String>> {
    Ok(connection
        .query_row(
            "SELECT xml FROM known_definitions WHERE server = ?1 AND in_force = 1",
            [server.to_string()],
            |row| row.get(0),
        )
        .optional()?)
}

/// The plan's outcome stands: what it wrote is in force. Says whether it wrote something.
pub(super) fn stands(connection: &Connection, server: Uuid, plan: Uuid) -> StoreResult<bool> {
    let wrote = connection.execute(
        "UPDATE known_definitions SET in_force = 1 WHERE server = ?1 AND plan = ?2",
        params![server.to_string(), plan.to_string()],
    )?;
    if wrote > 0 {
        connection.execute(
            "DELETE FROM known_definitions WHERE server = ?1 AND plan <> ?2",
            params![server.to_string(), plan.to_string()],
        )?;
    }
    Ok(wrote > 0)
}

/// The plan was taken back: what it wrote goes, unless it is in force.
pub(super) fn taken_back(connection: &Connection, server: Uuid, plan: Uuid) -> StoreResult<()> {
    connection.execute(
        "DELETE FROM known_definitions WHERE server = ?1 AND plan = ?2 AND in_force = 0",
        params![server.to_string(), plan.to_string()],
    )?;
    Ok(())
}

/// The server is gone.
pub(super) fn forget(connection: &Connection, server: Uuid) -> StoreResult<()> {
    connection.execute(
        "DELETE FROM known_definitions WHERE server = ?1",
        [server.to_string()],
    )?;
    Ok(())
}
