// SPDX-License-Identifier: Apache-2.0
//! What is seen of domains, folded into the records of their servers.

use uuid::Uuid;

use super::{Durability, Publish, Store, StoreResult, journal::put_server};
use crate::core::{
    devices::may_follow,
    reconcile::{is_stale, reconcile},
    record::Devices,
    state::PowerObservation,
};

impl Store {
    /// Folds an observation into a server's record; says whether it told something new.
    ///
    /// # Errors
    /// If the store fails.
    pub async fn observe(&self, server: Uuid, seen: PowerObservation) -> StoreResult<bool> {
        self.run(move |db| {
            let Some((order, mut record)) = db.server(server) else {
                return Ok(false);
            };
            if is_stale(&record, &seen) {
                return Ok(false);
            }
            let now_ms = seen.observed_at_ms;
            let Some(reconciled) = reconcile(&record, seen.clone()) else {
                // Nothing new but its age, which is kept in memory only.
                record.power.observed_at_ms = seen.observed_at_ms;
                record.power.source = seen.source;
                db.publish(Publish {
                    put: vec![(order, record)],
                    ..Publish::default()
                });
                return Ok(false);
            };
            record.power = reconciled.power;
            record.last_known_power = reconciled.last_known_power;
            record.vm_state = reconciled.vm_state;
            db.change(Durability::Process, |tx, publish| {
                put_server(tx, publish, order, record, now_ms).map(|_| ())
            })?;
            Ok(true)
        })
        .await
    }

    /// Has a server's record show the devices that were read from its definition, unless an operation or
    /// a rescue has begun since; says whether they were others.
    ///
    /// # Errors
    /// If the store fails.
    pub async fn observe_devices(
        &self,
        server: Uuid,
        devices: Devices,
        now_ms: i64,
    ) -> StoreResult<bool> {
        self.run(move |db| {
            let Some((order, mut record)) = db.server(server) else {
                return Ok(false);
            };
            if !may_follow(&record) || !record.show(&devices) {
                return Ok(false);
            }
            db.change(Durability::Process, |tx, publish| {
                put_server(tx, publish, order, record, now_ms).map(|_| ())
            })?;
            Ok(true)
        })
        .await
    }
}
