// SPDX-License-Identifier: Apache-2.0
//! The journal: operations with their plans, and what they do to servers' records.

use std::sync::Arc;

use rusqlite::{Connection, OptionalExtension as _, params};
use uuid::Uuid;

use super::{
    Durability, Publish, Servers, Store, StoreError, StoreResult,
    definitions::saved_by,
    documents::{self, two_texts},
    events::{self, Change},
    images, known, observations, room,
    secrets::{holds_password, without_password},
};
use crate::core::{
    action::Verb,
    admission::busy,
    caller::Who,
    operation::{OperationRecord, OperationState},
    plan::{Outcome, Plan, RescueChange},
    reason::{Reason, Refusal},
    reconcile::is_stale,
    record::{Fault, RescueRecord, ServerRecord, SoftDeletion},
    state::{ObservationSource, PowerObservation, VmState},
};

/// Who asks for an action, and how the call can be repeated.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Request {
    /// The client's id for the call.
    pub id: Option<String>,
    /// Hash of what it asked for.
    pub body_hash: String,
    /// Who asks.
    pub caller: String,
    /// For whom.
    pub who: Who,
}

/// A plan to be accepted.
#[derive(Debug, Clone)]
pub struct Accept {
    /// The plan.
    pub plan: Arc<Plan>,
    /// Who asks for it.
    pub request: Request,
    /// The record that it was planned for; `None` if the plan makes the server.
    pub planned_for: Option<Arc<ServerRecord>>,
    /// The time now, in milliseconds since the Unix epoch.
    pub now_ms: i64,
}

/// What became of a plan.
#[derive(Debug, Clone)]
pub enum Accepted {
    /// It is in the journal and can begin.
    New(Box<OperationRecord>),
    /// The same call was made before and began this operation.
    Before(Box<OperationRecord>),
}

/// Reads all servers.
pub(super) fn load_servers(connection: &Connection) -> StoreResult<Servers> {
    let mut servers = Servers::default();
    let seen = observations::saved(connection)?;
    let mut statement = connection.prepare("SELECT id, doc, ord FROM servers ORDER BY ord")?;
    let rows = statement.query_map([], |row| Ok((two_texts(row)?, row.get(2)?)))?;
    for row in rows {
        let ((id, doc), order) = row?;
        let mut record: ServerRecord = documents::SERVER.read(&id, &doc)?;
        if let Some(seen) = seen.get(&order) {
            seen.bring_back(&mut record);
        }
        servers.by_order.insert(order, record.id);
        servers.by_id.insert(record.id, (order, Arc::new(record)));
    }
    Ok(servers)
}

/// Writes a changed record with its event.
pub(super) fn put_server(
    tx: &Connection,
    publish: &mut Publish,
    order: i64,
    mut record: ServerRecord,
    now_ms: i64,
) -> StoreResult<ServerRecord> {
    record.updated_at_ms = now_ms;
    // The revision is the event's, which is known only once it is written, and the event shows the
    // record: so the next revision is read first. Nobody else writes.
    record.revision = events::newest(tx)? + 1;
    record.revision = events::append(
        tx,
        publish,
        now_ms,
        record.id,
        &Change::Server(Box::new(without_password(&record))),
    )?;
    tx.prepare_cached("UPDATE servers SET doc = ?2 WHERE ord = ?1")?
        .execute(params![order, documents::write(&record)?])?;
    publish.put.push((order, record.clone()));
    Ok(record)
}

fn insert_server(
    tx: &Connection,
    publish: &mut Publish,
    record: ServerRecord,
    now_ms: i64,
) -> StoreResult<()> {
    tx.execute(
        "INSERT INTO servers (id, doc) VALUES (?1, '{}')",
        [record.id.to_string()],
    )?;
    let order = tx.last_insert_rowid();
    put_server(tx, publish, order, record, now_ms)?;
    Ok(())
}

fn remove_server(
    tx: &Connection,
    publish: &mut Publish,
    operation: &OperationRecord,
    now_ms: i64,
) -> StoreResult<()> {
    tx.execute(
        "DELETE FROM servers WHERE id = ?1",
        [operation.server.to_string()],
    )?;
    known::forget(tx, operation.server)?;
    publish.remove.push(operation.server);
    events::append(
        tx,
        publish,
        now_ms,
        operation.server,
        &Change::Removed(operation.verb),
    )?;
    Ok(())
}

/// Writes an operation. Of one that has ended nobody needs the plan, and there are secrets in plans.
fn put_operation(tx: &Connection, operation: &OperationRecord) -> StoreResult<()> {
    tx.prepare_cached(
        "UPDATE operations SET doc = ?2, final = ?3, plan = iif(?3, NULL, plan) WHERE id = ?1",
    )?
    .execute(params![
        operation.id.to_string(),
        documents::write(operation)?,
        operation.state.is_final()
    ])?;
    Ok(())
}

fn announce(
    tx: &Connection,
    publish: &mut Publish,
    operation: &OperationRecord,
    now_ms: i64,
) -> StoreResult<()> {
    events::append(
        tx,
        publish,
        now_ms,
        operation.server,
        &Change::Operation(Box::new(operation.clone())),
    )?;
    Ok(())
}

fn missing_server(id: Uuid) -> StoreError {
    StoreError::Missing {
        what: "server",
        id: id.to_string(),
    }
}

impl Store {
    /// The operation that a call with this request id began, if there was one.
    ///
    /// # Errors
    /// [`Reason::RequestIdReused`] if the call asked for something else.
    pub async fn repeated(&self, request: Request) -> StoreResult<Option<OperationRecord>> {
        self.run(move |db| repeated(&db.connection, &request)).await
    }

    /// Accepts a plan: writes it to the journal and takes the server's lane, in one transaction that
    /// survives a power cut. What a plan without steps changes in the record is changed in the same
    /// transaction, and the operation has ended with it: the lane stays with whom it belongs to.
    ///
    /// # Errors
    /// [`Reason::ServerBusy`] if the lane is taken or the server changed since it was planned for;
    /// [`Reason::ServerExists`] if the plan makes a server that is there; see [`Store::repeated`].
    pub async fn accept(&self, accept: Accept) -> StoreResult<Accepted> {
        self.run(move |db| {
            let Accept {
                plan,
                request,
                planned_for,
                now_ms,
            } = accept;
            if let Some(before) = repeated(&db.connection, &request)? {
                return Ok(Accepted::Before(Box::new(before)));
            }
            let current = db.server(plan.server);
            check_lane(
                &db.connection,
                &plan,
                planned_for.as_deref(),
                current.as_ref().map(|(_, record)| record),
            )?;
            let change = plan.record_change();
            if change.is_none() {
                check_no_remains(&db.connection, plan.server)?;
                if db.keeps_room {
                    room::check(&db.connection, plan.verb)?;
                }
            }
            let operation = OperationRecord::accepted(&plan, request.id.clone(), request.caller.clone(), &request.who, now_ms);
            let ended = operation.state.is_final();
            db.change(durability(&plan), |tx, publish| {
                tx.execute(
                    "INSERT INTO operations (id, server, request_id, body_hash, final, created_at, plan, doc)
                     VALUES (?1, ?2, ?3, ?4, ?8, ?5, ?6, ?7)",
                    params![
                        operation.id.to_string(),
                        operation.server.to_string(),
                        request.id,
                        request.body_hash,
                        now_ms,
                        (!ended).then(|| documents::write(plan.as_ref())).transpose()?,
                        documents::write(&operation)?,
                        ended
                    ],
                )?;
                if let (Some(change), Some((order, record))) = (change, &current) {
                    let mut changed = record.clone();
                    change.apply(&mut changed, now_ms);
                    if changed != *record {
                        put_server(tx, publish, *order, changed, now_ms)?;
                    }
                } else if let Some(initial) = &plan.initial {
                    let mut record = ServerRecord::clone(initial);
                    record.task_state = plan.verb.task_state();
                    record.give_lane(Some((plan.id, plan.verb)));
                    insert_server(tx, publish, record, now_ms)?;
                } else if let Some((order, mut record)) = current {
                    record.task_state = plan.verb.task_state();
                    record.give_lane(Some((plan.id, plan.verb)));
                    put_server(tx, publish, order, record, now_ms)?;
                }
                announce(tx, publish, &operation, now_ms)
            })?;
            Ok(Accepted::New(Box::new(operation)))
        })
        .await
    }

    /// Notes how far an operation is. Does not survive a power cut, which costs nothing: the step is
    /// applied again.
    ///
    /// # Errors
    /// If the store fails.
    pub async fn progress(&self, operation: OperationRecord) -> StoreResult<()> {
        self.run(move |db| db.change(Durability::Process, |tx, _| put_operation(tx, &operation)))
            .await
    }

    /// Notes that an operation turned round or that its cancelling was asked for, for good.
    ///
    /// # Errors
    /// If the store fails.
    pub async fn turn(&self, operation: OperationRecord, now_ms: i64) -> StoreResult<()> {
        self.run(move |db| {
            db.change(Durability::Power, |tx, publish| {
                put_operation(tx, &operation)?;
                announce(tx, publish, &operation, now_ms)
            })
        })
        .await
    }

    /// Makes a plan's outcome stand: the record's change, its event and the operation's state in one
    /// transaction that survives a power cut. The lane stays taken while the operation cleans up.
    ///
    /// # Errors
    /// If the store fails.
    pub async fn commit(
        &self,
        plan: Arc<Plan>,
        operation: OperationRecord,
        now_ms: i64,
    ) -> StoreResult<()> {
        let ended = operation.state.is_final();
        self.run(move |db| {
            let current = db.server(plan.server);
            let holds_password =
                plan.holds_password() || current.as_ref().is_some_and(|(_, it)| holds_password(it));
            db.change(durability(&plan), |tx, publish| {
                let lane = (!operation.state.is_final()).then_some((operation.id, operation.verb));
                match (&plan.outcome, current) {
                    (Outcome::Insert(record), None) => {
                        let mut record = ServerRecord::clone(record);
                        record.give_lane(lane);
                        known::stands(tx, plan.server, plan.id)?;
                        insert_server(tx, publish, record, now_ms)?;
                    }
                    (Outcome::Remove, Some(_)) => remove_server(tx, publish, &operation, now_ms)?,
                    // Committed before, and the agent died before it knew.
                    (Outcome::Insert(_), Some(_)) | (Outcome::Remove, None) => {}
                    (
                        Outcome::Change {
                            vm_state,
                            rescue,
                            devices,
                        },
                        Some((order, mut record)),
                    ) => {
                        // What leaves a server in ERROR says nothing about why it is.
                        let fault = record.fault.take();
                        let fault = fault.filter(|_| *vm_state == VmState::Error);
                        stands(&mut record, *vm_state, fault, lane, now_ms);
                        if known::stands(tx, plan.server, plan.id)? {
                            record.drift_since_ms = None;
                        }
                        if plan.power_after().is_some() {
                            record.mismatch = None;
                        }
                        infer_power(&mut record, &plan, &operation, now_ms);
                        change_rescue(&mut record, rescue, now_ms);
                        if let Some(devices) = devices {
                            record.show(devices);
                        }
                        put_server(tx, publish, order, record, now_ms)?;
                    }
                    (Outcome::Keep, Some((order, mut record))) => {
                        record.task_state = None;
                        record.give_lane(lane);
                        record.settled_at_ms = now_ms;
                        put_server(tx, publish, order, record, now_ms)?;
                    }
                    (
                        Outcome::SoftDelete {
                            vm_state,
                            power,
                            fault,
                            reclaim_in_ms,
                        },
                        Some((order, mut record)),
                    ) => {
                        let after = i64::try_from(*reclaim_in_ms).unwrap_or(i64::MAX);
                        record.deletion = Some(SoftDeletion {
                            vm_state: *vm_state,
                            power: *power,
                            fault: fault.clone(),
                            at_ms: now_ms,
                            reclaim_at_ms: now_ms.saturating_add(after),
                        });
                        stands(&mut record, VmState::SoftDeleted, None, lane, now_ms);
                        infer_power(&mut record, &plan, &operation, now_ms);
                        put_server(tx, publish, order, record, now_ms)?;
                    }
                    (Outcome::Restore { vm_state, fault }, Some((order, mut record))) => {
                        record.deletion = None;
                        stands(&mut record, *vm_state, fault.clone(), lane, now_ms);
                        infer_power(&mut record, &plan, &operation, now_ms);
                        put_server(tx, publish, order, record, now_ms)?;
                    }
                    // Made when it was accepted.
                    (Outcome::Record(_), Some(_)) => {}
                    // Nothing is left to be changed; the operation has to end all the same.
                    (
                        Outcome::Change { .. }
                        | Outcome::Keep
                        | Outcome::SoftDelete { .. }
                        | Outcome::Restore { .. }
                        | Outcome::Record(_),
                        None,
                    ) => {}
                }
                put_operation(tx, &operation)?;
                announce(tx, publish, &operation, now_ms)
            })?;
            db.stale_secrets |= holds_password;
            Ok(())
        })
        .await?;
        if ended {
            self.wipe();
        }
        Ok(())
    }

    /// Ends an operation whose outcome stands: it gives the lane back. A power cut may undo that,
    /// which costs nothing: what was cleaned up is cleaned up again.
    ///
    /// # Errors
    /// If the store fails.
    pub async fn finish(
        &self,
        plan: Arc<Plan>,
        operation: OperationRecord,
        now_ms: i64,
    ) -> StoreResult<()> {
        self.end(plan, operation, None, false, Durability::Process, now_ms)
            .await
    }

    /// Ends an operation that was taken back: the record is as before, or gone if the plan made it.
    /// With a fault the roll-back failed too, and the server is in ERROR.
    ///
    /// # Errors
    /// If the store fails.
    pub async fn rolled_back(
        &self,
        plan: Arc<Plan>,
        operation: OperationRecord,
        fault: Option<Fault>,
        now_ms: i64,
    ) -> StoreResult<()> {
        let remove = plan.initial.is_some() && fault.is_none();
        self.end(plan, operation, fault, remove, Durability::Power, now_ms)
            .await
    }

    async fn end(
        &self,
        plan: Arc<Plan>,
        operation: OperationRecord,
        fault: Option<Fault>,
        remove: bool,
        durability: Durability,
        now_ms: i64,
    ) -> StoreResult<()> {
        self.run(move |db| {
            let current = db
                .server(operation.server)
                .filter(|(_, record)| record.operation == Some(operation.id));
            let holds_password =
                plan.holds_password() || current.as_ref().is_some_and(|(_, it)| holds_password(it));
            db.change(durability, |tx, publish| {
                known::taken_back(tx, operation.server, operation.id)?;
                if let Some((order, mut record)) = current {
                    if remove {
                        remove_server(tx, publish, &operation, now_ms)?;
                    } else {
                        record.task_state = None;
                        record.give_lane(None);
                        record.settled_at_ms = now_ms;
                        if operation.verb == Verb::DeliverPassword
                            && operation.error.as_ref().map(|error| error.reason)
                                == Some(Reason::GuestAgentRefused)
                            && let Some(rescue) = &mut record.rescue
                        {
                            rescue.password_refused();
                        }
                        if let Some(fault) = fault {
                            record.vm_state = VmState::Error;
                            record.fault = Some(fault);
                            // What is half removed or half restored waits for nobody.
                            record.deletion = None;
                            // A rescue that is half there, with the way back saved: unrescue takes it.
                            if let Outcome::Change { rescue, .. } = &plan.outcome
                                && saved_by(tx, plan.server)? == Some(plan.id)
                            {
                                change_rescue(&mut record, rescue, now_ms);
                            }
                        }
                        put_server(tx, publish, order, record, now_ms)?;
                    }
                }
                put_operation(tx, &operation)?;
                announce(tx, publish, &operation, now_ms)
            })?;
            db.stale_secrets |= holds_password;
            Ok(())
        })
        .await?;
        self.wipe();
        Ok(())
    }

    /// One operation.
    ///
    /// # Errors
    /// If the store fails.
    pub async fn operation(&self, id: Uuid) -> StoreResult<Option<OperationRecord>> {
        self.run(move |db| {
            let doc: Option<String> = db
                .connection
                .query_row(
                    "SELECT doc FROM operations WHERE id = ?1",
                    [id.to_string()],
                    |row| row.get(0),
                )
                .optional()?;
            doc.map(|doc| documents::OPERATION.read(&id, &doc))
                .transpose()
        })
        .await
    }

    /// Two of the operations whose ids begin with this (hexadecimal digits and hyphens).
    ///
    /// # Errors
    /// If the store fails.
    pub async fn operations_beginning(&self, beginning: String) -> StoreResult<Vec<Uuid>> {
        self.run(move |db| {
            // No digit comes after `g`.
            let mut statement = db.connection.prepare_cached(
                "SELECT id FROM operations WHERE id >= ?1 AND id < ?1 || 'g' ORDER BY id LIMIT 2",
            )?;
            let rows = statement.query_map([beginning], |row| row.get::<_, String>(0))?;
            let ids = rows.collect::<Result<Vec<_>, _>>()?;
            Ok(ids
                .iter()
                .filter_map(|id| Uuid::parse_str(id).ok())
                .collect())
        })
        .await
    }

    /// Operations, newest first, older than the number `before`, with their numbers.
    ///
    /// # Errors
    /// If the store fails.
    pub async fn operations(
        &self,
        server: Option<Uuid>,
        before: i64,
        limit: u32,
    ) -> StoreResult<Vec<(i64, OperationRecord)>> {
        self.run(move |db| {
            let mut statement = db.connection.prepare_cached(
                "SELECT id, doc, ord FROM operations WHERE (?1 IS NULL OR server = ?1) AND ord < ?2 ORDER BY ord DESC LIMIT ?3",
            )?;
            let rows = statement.query_map(params![server.map(|id| id.to_string()), before, limit], |row| {
                Ok((two_texts(row)?, row.get(2)?))
            })?;
            let mut operations = Vec::new();
            for row in rows {
                let ((id, doc), order) = row?;
                operations.push((order, documents::OPERATION.read(&id, &doc)?));
            }
            Ok(operations)
        })
        .await
    }

    /// Does the journal have this operation on the server or, if none is named, its create?
    ///
    /// # Errors
    /// If the store fails.
    pub async fn worked_on(&self, server: Uuid, operation: Option<Uuid>) -> StoreResult<bool> {
        self.run(move |db| {
            Ok(db.connection.query_row(
                "SELECT EXISTS (SELECT 1 FROM operations WHERE server = ?1 AND (id = ?2 OR (?2 IS NULL AND doc ->> 'verb' = ?3)))",
                params![
                    server.to_string(),
                    operation.map(|id| id.to_string()),
                    Verb::Create.name()
                ],
                |row| row.get(0),
            )?)
        })
        .await
    }

    /// Operations that have not ended, oldest first, with their plans.
    ///
    /// # Errors
    /// If the store fails.
    pub async fn under_way(&self) -> StoreResult<Vec<(OperationRecord, Plan)>> {
        self.run(|db| {
            let mut statement = db.connection.prepare_cached(
                "SELECT id, doc, plan FROM operations WHERE final = 0 ORDER BY ord",
            )?;
            let rows =
                statement.query_map([], |row| Ok((two_texts(row)?, row.get::<_, String>(2)?)))?;
            let mut operations = Vec::new();
            for row in rows {
                let ((id, doc), plan) = row?;
                operations.push((
                    documents::OPERATION.read(&id, &doc)?,
                    documents::PLAN.read(&id, &plan)?,
                ));
            }
            Ok(operations)
        })
        .await
    }

    /// Forgets operations that ended and are older than `before_ms`, and as old calls on images; says
    /// how many operations.
    ///
    /// # Errors
    /// If the store fails.
    pub async fn forget_operations(&self, before_ms: i64) -> StoreResult<usize> {
        self.run(move |db| {
            db.change(Durability::Process, |tx, _| {
                images::forget_calls(tx, before_ms)?;
                Ok(tx.execute(
                    "DELETE FROM operations WHERE final = 1 AND created_at < ?1",
                    [before_ms],
                )?)
            })
        })
        .await
    }

    /// Notes that a commit of a rescue's overlays begins: they can no longer be discarded.
    ///
    /// # Errors
    /// [`StoreError::Missing`] if there is no such server.
    pub async fn mark_commit_started(&self, server: Uuid, now_ms: i64) -> StoreResult<()> {
        self.run(move |db| {
            let (order, mut record) = db.server(server).ok_or_else(|| missing_server(server))?;
            match &mut record.rescue {
                Some(rescue) if !rescue.commit_started => rescue.commit_started = true,
                _ => return Ok(()),
            }
            db.change(Durability::Power, |tx, publish| {
                put_server(tx, publish, order, record, now_ms).map(|_| ())
            })
        })
        .await
    }
}

/// What is written of an operation outlives a power cut, unless nothing of what it does can.
fn durability(plan: &Plan) -> Durability {
    if plan.is_memory_only() {
        Durability::Process
    } else {
        Durability::Power
    }
}

/// A server's record is gone when its delete is decided; what it left is removed only after that, and
/// nothing new of the same id may be made before.
fn check_no_remains(connection: &Connection, server: Uuid) -> StoreResult<()> {
    let under_way: Option<String> = connection
        .query_row(
            "SELECT id FROM operations WHERE server = ?1 AND final = 0",
            [server.to_string()],
            |row| row.get(0),
        )
        .optional()?;
    match under_way {
        None => Ok(()),
        Some(operation) => Err(Refusal::new(
            Reason::ServerBusy,
            format!("operations/{operation} is still under way for {server}; wait for it"),
        )
        .into()),
    }
}

/// The outcome of an operation stands: this is what the server is now.
fn stands(
    record: &mut ServerRecord,
    vm_state: VmState,
    fault: Option<Fault>,
    lane: Option<(Uuid, Verb)>,
    now_ms: i64,
) {
    record.vm_state = vm_state;
    record.fault = fault;
    record.task_state = None;
    record.give_lane(lane);
    record.settled_at_ms = now_ms;
}

/// Notes the power state that the plan left the guest in, unless the guest was looked at since.
fn infer_power(record: &mut ServerRecord, plan: &Plan, operation: &OperationRecord, now_ms: i64) {
    let Some((index, state)) = plan.power_after() else {
        return;
    };
    let ended = operation.steps.get(index).and_then(|step| step.ended_at_ms);
    let seen = PowerObservation {
        state,
        reason: String::new(),
        observed_at_ms: ended.unwrap_or(now_ms),
        source: ObservationSource::Inferred,
    };
    if !is_stale(record, &seen) {
        record.power = seen;
        record.last_known_power = None;
    }
}

/// A request id that came before with something else.
pub(super) fn reused(id: &str) -> StoreError {
    Refusal::new(
        Reason::RequestIdReused,
        format!("request id {id} was used before with other content; use a new one"),
    )
    .into()
}

fn repeated(connection: &Connection, request: &Request) -> StoreResult<Option<OperationRecord>> {
    let Some(id) = &request.id else {
        return Ok(None);
    };
    let found: Option<((String, String), String)> = connection
        .query_row(
            "SELECT id, doc, body_hash FROM operations WHERE request_id = ?1",
            [id],
            |row| Ok((two_texts(row)?, row.get(2)?)),
        )
        .optional()?;
    let Some(((operation, doc), body_hash)) = found else {
        // Ids are not of one service: the same one for a call on an image is other content.
        return match images::answered(connection, id)? {
            Some(_) => Err(reused(id)),
            None => Ok(None),
        };
    };
    if body_hash != request.body_hash {
        return Err(reused(id));
    }
    documents::OPERATION.read(&operation, &doc).map(Some)
}

/// Is the server still what was planned for, and its lane free?
fn check_lane(
    connection: &Connection,
    plan: &Plan,
    planned_for: Option<&ServerRecord>,
    current: Option<&ServerRecord>,
) -> StoreResult<()> {
    match (planned_for, current) {
        (None, None) => Ok(()),
        (None, Some(_)) => Err(Refusal::new(
            Reason::ServerExists,
            format!("there is a server {} already", plan.server),
        )
        .into()),
        (Some(_), None) => Err(Refusal::new(
            Reason::ServerNotFound,
            format!("server {} was removed meanwhile", plan.server),
        )
        .into()),
        (Some(planned), Some(current)) => {
            let needs_lane = plan.verb.needs_lane();
            if let Some(operation) = current.operation.filter(|_| needs_lane) {
                return Err(busy(plan.verb, current, operation).into());
            }
            let plan_of = |record: &ServerRecord| record.rescue.as_ref().map(|rescue| rescue.plan);
            let changed = planned.vm_state != current.vm_state
                || planned.settled_at_ms != current.settled_at_ms
                || plan_of(planned) != plan_of(current);
            // Whether a lock allows it was asked before.
            if (changed && needs_lane) || planned.lock != current.lock {
                return Err(overtaken(connection, plan.server)?.into());
            }
            Ok(())
        }
    }
}

/// What the loser of a race is told whose winner has ended already: the last operation of the server.
fn overtaken(connection: &Connection, server: Uuid) -> StoreResult<Refusal> {
    let winner: Option<String> = connection
        .query_row(
            "SELECT id FROM operations WHERE server = ?1 ORDER BY ord DESC LIMIT 1",
            [server.to_string()],
            |row| row.get(0),
        )
        .optional()?;
    let Some(winner) = winner else {
        let changed = format!("server {server} changed while the action was planned; try again");
        return Ok(Refusal::new(Reason::ServerBusy, changed));
    };
    Ok(Refusal::new(
        Reason::ServerBusy,
        format!(
            "server {server} changed while the action was planned: operations/{winner} came first and has ended; look at the server and try again"
        ),
    )
    .about("operation", format!("operations/{winner}")))
}

fn change_rescue(record: &mut ServerRecord, change: &RescueChange, now_ms: i64) {
    match change {
        RescueChange::Keep => {}
        RescueChange::Begin { rescue, timeout_ms } => {
            let ends = |after| now_ms.saturating_add(i64::try_from(after).unwrap_or(i64::MAX));
            record.rescue = Some(RescueRecord {
                started_at_ms: now_ms,
                expires_at_ms: timeout_ms.map(ends),
                ..RescueRecord::clone(rescue)
            });
        }
        RescueChange::End => record.rescue = None,
        RescueChange::Delivered(way) => {
            if let Some(rescue) = &mut record.rescue {
                rescue.password_for_agent = None;
                if !rescue.password_delivered.contains(way) {
                    rescue.password_delivered.push(*way);
                }
            }
        }
    }
}

impl OperationState {
    /// The state of a plan whose outcome stands: it may have to clean up.
    #[must_use]
    pub fn after_commit(plan: &Plan) -> Self {
        if plan.steps_before_commit() == plan.steps.len() {
            Self::Done
        } else {
            Self::CleaningUp
        }
    }
}
