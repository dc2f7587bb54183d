// SPDX-License-Identifier: Apache-2.0
//! Records as JSON documents in columns of the tables.
//!
//! The form of a document belongs to the schema version, like the tables: whoever changes it makes a new
//! version ([`super::schema`]), so an agent never meets a field that it would lose when it writes the
//! document again. What older versions wrote is read: a field that came later has a default that means
//! what was so before, and a field that is gone is passed over.

use std::fmt::Display;

use rusqlite::Row;
use serde::{Serialize, de::DeserializeOwned};
use uuid::Uuid;

use super::{StoreError, StoreResult};

/// Why a stored value cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum Damage {
    /// It is not the document that it should be.
    #[error(transparent)]
    Document(#[from] serde_json::Error),
    /// It is no id.
    #[error(transparent)]
    Id(#[from] uuid::Error),
}

/// A column, to be named if what is in it is damaged.
#[derive(Debug, Clone, Copy)]
pub(super) struct Column {
    table: &'static str,
    column: &'static str,
}

/// Servers.
pub(super) const SERVER: Column = column("servers", "doc");
/// Operations.
pub(super) const OPERATION: Column = column("operations", "doc");
/// Plans of operations.
pub(super) const PLAN: Column = column("operations", "plan");
/// Images.
pub(super) const IMAGE: Column = column("images", "doc");
/// Images that calls were answered with.
pub(super) const IMAGE_REQUEST: Column = column("image_requests", "doc");
/// Changes in the log of events.
pub(super) const CHANGE: Column = column("events", "doc");

/// A column of a table.
pub(super) const fn column(table: &'static str, column: &'static str) -> Column {
    Column { table, column }
}

impl Column {
    fn damaged(self, row: &dyn Display, damage: Damage) -> StoreError {
        StoreError::Damaged {
            table: self.table,
            column: self.column,
            row: row.to_string(),
            damage,
        }
    }

    /// The document in this column of the row that `row` names.
    pub(super) fn read<T: DeserializeOwned>(self, row: &dyn Display, doc: &str) -> StoreResult<T> {
        serde_json::from_str(doc).map_err(|error| self.damaged(row, error.into()))
    }

    /// The id in this column of the row that `row` names.
    pub(super) fn id(self, row: &dyn Display, id: &str) -> StoreResult<Uuid> {
        Uuid::parse_str(id).map_err(|error| self.damaged(row, error.into()))
    }
}

/// The form in which a record is stored.
pub(super) fn write<T: Serialize>(record: &T) -> StoreResult<String> {
    serde_json::to_string(record).map_err(StoreError::Unwritable)
}

/// The first two columns of a row, both text.
pub(super) fn two_texts(row: &Row<'_>) -> rusqlite::Result<(String, String)> {
    Ok((row.get(0)?, row.get(1)?))
}
