// SPDX-License-Identifier: Apache-2.0
//! The host's boot as the agent knew it last, and the servers that are to come back after another one.

use rusqlite::{OptionalExtension as _, Row, params};
use uuid::Uuid;

use super::{
    Durability, Store, StoreResult,
    documents::{Column, column},
};
use crate::core::{
    autostart::{Comeback, ComebackState, comes_back},
    state::VmState,
};

const SERVER: Column = column("autostart", "server");

impl Store {
    /// Notes which boot of the host this is. If it is another one than before, the servers that ran then
    /// are to come back, if that is wanted; says how many. In one transaction: an agent that dies in the
    /// middle of bringing them back goes on with it.
    ///
    /// # Errors
    /// If the store fails.
    pub async fn note_boot(&self, boot: Uuid, bring_back: bool) -> StoreResult<usize> {
        let servers = self.servers_after(i64::MIN);
        self.run(move |db| {
            let before: Option<String> = db
                .connection
                .query_row("SELECT value FROM meta WHERE key = 'boot_id'", [], |row| {
                    row.get(0)
                })
                .optional()?;
            if before.as_deref() == Some(boot.to_string().as_str()) {
                return Ok(0);
            }
            let mut ran: Vec<_> = servers
                .iter()
                // Of an unknown boot it is not known what ran in it.
                .filter(|(_, server)| bring_back && before.is_some() && comes_back(server))
                .collect();
            ran.sort_by_key(|(order, server)| (server.autostart_order.unwrap_or(u32::MAX), *order));
            db.change(Durability::Power, |tx, _| {
                tx.execute("DELETE FROM autostart", [])?;
                for (place, (_, server)) in (0_i64..).zip(&ran) {
                    tx.execute(
                        "INSERT INTO autostart (server, ord, was, tries, outcome, message) VALUES (?1, ?2, ?3, 0, ?4, '')",
                        params![
                            server.id.to_string(),
                            place,
                            server.vm_state.name(),
                            ComebackState::Waiting.name()
                        ],
                    )?;
                }
                tx.execute(
                    "INSERT OR REPLACE INTO meta (key, value) VALUES ('boot_id', ?1)",
                    [boot.to_string()],
                )?;
                Ok(())
            })?;
            Ok(ran.len())
        })
        .await
    }

    /// The servers that ran before this boot, in their order, with what became of them.
    ///
    /// # Errors
    /// If the store fails.
    pub async fn comebacks(&self) -> StoreResult<Vec<Comeback>> {
        self.run(|db| {
            let mut statement = db.connection.prepare_cached(
                "SELECT server, was, tries, outcome, message FROM autostart ORDER BY ord",
            )?;
            let rows = statement.query_map([], columns)?;
            let mut comebacks = Vec::new();
            for row in rows {
                let (server, was, tries, state, message) = row?;
                comebacks.push(Comeback {
                    server: SERVER.id(&server, &server)?,
                    // A word of a newer agent: it is looked at all the same.
                    was: VmState::from_name(&was).unwrap_or(VmState::Active),
                    tries,
                    state: ComebackState::from_name(&state).unwrap_or(ComebackState::Waiting),
                    message,
                });
            }
            Ok(comebacks)
        })
        .await
    }

    /// Notes how a server's coming back fares.
    ///
    /// # Errors
    /// If the store fails.
    pub async fn note_comeback(&self, comeback: Comeback) -> StoreResult<()> {
        self.run(move |db| {
            db.change(Durability::Process, |tx, _| {
                tx.execute(
                    "UPDATE autostart SET tries = ?2, outcome = ?3, message = ?4 WHERE server = ?1",
                    params![
                        comeback.server.to_string(),
                        comeback.tries,
                        comeback.state.name(),
                        comeback.message
                    ],
                )?;
                Ok(())
            })
        })
        .await
    }
}

fn columns(row: &Row<'_>) -> rusqlite::Result<(String, String, u32, String, String)> {
    Ok((
        row.get(0)?,
        row.get(1)?,
        row.get(2)?,
        row.get(3)?,
        row.get(4)?,
    ))
}
