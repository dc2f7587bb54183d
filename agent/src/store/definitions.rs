// SPDX-License-Identifier: Apache-2.0
//! Saved definitions: what a rescued server goes back to. Written once, and kept until it is back.

use rusqlite::{Connection, OptionalExtension as _, params};
use uuid::Uuid;

use super::{
    Durability, Store, StoreResult,
    documents::{Column, column, two_texts},
};
use crate::core::reason::{Reason, Refusal};

const SERVER: Column = column("saved_definitions", "server");
const PLAN: Column = column("saved_definitions", "plan");

impl Store {
    /// Stores the definition to go back to, once: storing it again for the same plan changes nothing.
    ///
    /// # Errors
    /// [`Reason::AlreadyRescued`] if one of another plan is stored.
    pub async fn save_definition(&self, server: Uuid, plan: Uuid, xml: String) -> StoreResult<()> {
        self.run(move |db| {
            db.change(Durability::Power, |tx, _| {
                tx.execute(
                    "INSERT OR IGNORE INTO saved_definitions (server, plan, xml) VALUES (?1, ?2, ?3)",
                    params![server.to_string(), plan.to_string(), xml],
                )?;
                let owner: String = tx.query_row(
                    "SELECT plan FROM saved_definitions WHERE server = ?1",
                    [server.to_string()],
                    |row| row.get(0),
                )?;
                if owner == plan.to_string() {
                    return Ok(());
                }
                Err(Refusal::new(
                    Reason::AlreadyRescued,
                    format!("the definition of server {server} is saved already, by operations/{owner}"),
                )
                .into())
            })
        })
        .await
    }

    /// The stored definition.
    ///
    /// # Errors
    /// If the store fails.
    pub async fn saved_definition(&self, server: Uuid) -> StoreResult<Option<String>> {
        self.run(move |db| {
            Ok(db
                .connection
                .query_row(
                    "SELECT xml FROM saved_definitions WHERE server = ?1",
                    [server.to_string()],
                    |row| row.get(0),
                )
                .optional()?)
        })
        .await
    }

    /// Servers with a stored definition, each with the plan that stored it.
    ///
    /// # Errors
    /// If the store fails.
    pub async fn saved_definitions(&self) -> StoreResult<Vec<(Uuid, Uuid)>> {
        self.run(|db| {
            let mut statement = db
                .connection
                .prepare_cached("SELECT server, plan FROM saved_definitions ORDER BY server")?;
            let rows = statement.query_map([], two_texts)?;
            let mut saved = Vec::new();
            for row in rows {
                let (server, plan) = row?;
                saved.push((SERVER.id(&server, &server)?, PLAN.id(&server, &plan)?));
            }
            Ok(saved)
        })
        .await
    }

    /// Forgets the stored definition. With a plan, only if that plan stored it.
    ///
    /// # Errors
    /// If the store fails.
    pub async fn drop_definition(&self, server: Uuid, only_of: Option<Uuid>) -> StoreResult<()> {
        self.run(move |db| {
            db.change(Durability::Process, |tx, _| {
                tx.execute(
                    "DELETE FROM saved_definitions WHERE server = ?1 AND (?2 IS NULL OR plan = ?2)",
                    params![server.to_string(), only_of.map(|plan| plan.to_string())],
                )?;
                Ok(())
            })
        })
        .await
    }
}

/// The plan that stored a server's definition.
pub(super) fn saved_by(connection: &Connection, server: Uuid) -> StoreResult<Option<Uuid>> {
    let plan: Option<String> = connection
        .query_row(
            "SELECT plan FROM saved_definitions WHERE server = ?1",
            [server.to_string()],
            |row| row.get(0),
        )
        .optional()?;
    plan.map(|plan| PLAN.id(&server, &plan)).transpose()
}
