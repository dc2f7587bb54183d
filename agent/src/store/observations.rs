// SPDX-License-Identifier: Apache-2.0
//! What was seen of servers. What is new is written at once, with an event. That it was seen again is
//! kept in memory, and written without one every now and then ([`Store::save_observations`]): it is
//! what a restart with libvirt away has to tell.

use std::collections::HashMap;

use rusqlite::{Connection, params};
use uuid::Uuid;

use super::{
    Durability, Publish, Store, StoreResult,
    events::{self, Change},
    journal::put_server,
};
use crate::core::{
    incident::IncidentReport,
    reconcile::{Seen, is_stale, reconcile},
    record::{AgentSeen, ServerRecord},
    state::ObservationSource,
};

/// When a server was seen last as its record says.
pub(super) struct SeenAgain {
    /// The record's revision then: of any other one it tells nothing.
    revision: i64,
    at_ms: i64,
    source: ObservationSource,
}

impl SeenAgain {
    /// Puts it into the record that was read, if it is about that one.
    pub(super) fn bring_back(&self, record: &mut ServerRecord) {
        if self.revision == record.revision {
            record.power.observed_at_ms = self.at_ms;
            record.power.source = self.source;
        }
    }
}

/// What [`Store::save_observations`] wrote, by the servers' numbers.
pub(super) fn saved(connection: &Connection) -> StoreResult<HashMap<i64, SeenAgain>> {
    let mut statement =
        connection.prepare("SELECT server, revision, at, source FROM observations")?;
    let rows = statement.query_map([], |row| {
        Ok((
            row.get::<_, i64>(0)?,
            row.get::<_, i64>(1)?,
            row.get::<_, i64>(2)?,
            row.get::<_, String>(3)?,
        ))
    })?;
    let mut saved = HashMap::new();
    for row in rows {
        let (server, revision, at_ms, source) = row?;
        // A word of a newer agent tells nothing.
        if let Some(source) = ObservationSource::from_name(&source) {
            let seen = SeenAgain {
                revision,
                at_ms,
                source,
            };
            saved.insert(server, seen);
        }
    }
    Ok(saved)
}

impl Store {
    /// Records the name that a server's domain was seen to have.
    ///
    /// # Errors
    /// If the store fails.
    pub async fn observe_name(&self, server: Uuid, name: String, now_ms: i64) -> StoreResult<()> {
        self.run(move |db| {
            let Some((order, mut record)) = db.server(server) else {
                return Ok(());
            };
            record.domain_name = name;
            db.change(Durability::Process, |tx, publish| {
                put_server(tx, publish, order, record, now_ms).map(|_| ())
            })
        })
        .await
    }

    /// Folds an observation into a server's record; says whether it told something new.
    ///
    /// # Errors
    /// If the store fails.
    pub async fn observe(&self, server: Uuid, seen: impl Into<Seen>) -> StoreResult<bool> {
        let seen = seen.into();
        self.run(move |db| {
            let Some((order, mut record)) = db.server(server) else {
                return Ok(false);
            };
            if is_stale(&record, &seen.power) {
                return Ok(false);
            }
            let now_ms = seen.power.observed_at_ms;
            let Some(reconciled) = reconcile(&record, seen.clone()) else {
                record.power.observed_at_ms = now_ms;
                record.power.source = seen.power.source;
                db.publish(Publish {
                    put: vec![(order, record)],
                    ..Publish::default()
                });
                db.seen_again.insert(server);
                return Ok(false);
            };
            record.power = reconciled.power;
            record.last_known_power = reconciled.last_known_power;
            record.vm_state = reconciled.vm_state;
            record.mismatch = reconciled.mismatch;
            record.agent = reconciled.agent;
            db.change(Durability::Process, |tx, publish| {
                put_server(tx, publish, order, record, now_ms).map(|_| ())
            })?;
            Ok(true)
        })
        .await
    }

    /// Records whether a server's guest agent is connected; says whether that is new.
    ///
    /// # Errors
    /// If the store fails.
    pub async fn observe_agent(
        &self,
        server: Uuid,
        connected: bool,
        at_ms: i64,
    ) -> StoreResult<bool> {
        self.run(move |db| {
            let Some((order, mut record)) = db.server(server) else {
                return Ok(false);
            };
            let before = record.agent;
            if before.is_some_and(|seen| seen.connected == connected || seen.at_ms > at_ms) {
                return Ok(false);
            }
            record.agent = Some(AgentSeen { connected, at_ms });
            db.change(Durability::Process, |tx, publish| {
                put_server(tx, publish, order, record, at_ms).map(|_| true)
            })
        })
        .await
    }

    /// Tells the watchers what happened in or to a server's guest.
    ///
    /// # Errors
    /// If the store fails.
    pub async fn tell(&self, server: Uuid, report: IncidentReport) -> StoreResult<()> {
        self.run(move |db| {
            if db.server(server).is_none() {
                return Ok(());
            }
            let at_ms = report.last_at_ms;
            db.change(Durability::Process, |tx, publish| {
                events::append(tx, publish, at_ms, server, &Change::Guest(report)).map(|_| ())
            })
        })
        .await
    }

    /// Writes when servers were seen last, where only that is new; says of how many.
    ///
    /// # Errors
    /// If the store fails. It is written another time then.
    pub async fn save_observations(&self) -> StoreResult<usize> {
        self.run(|db| {
            let seen_again: Vec<_> = db.seen_again.iter().filter_map(|id| db.server(*id)).collect();
            if !seen_again.is_empty() {
                db.change(Durability::Process, |tx, _| {
                    let mut put = tx.prepare_cached(
                        "INSERT OR REPLACE INTO observations (server, revision, at, source) VALUES (?1, ?2, ?3, ?4)",
                    )?;
                    for (order, record) in &seen_again {
                        let power = &record.power;
                        put.execute(params![
                            order,
                            record.revision,
                            power.observed_at_ms,
                            power.source.name()
                        ])?;
                    }
                    Ok(())
                })?;
            }
            db.seen_again.clear();
            Ok(seen_again.len())
        })
        .await
    }
}
