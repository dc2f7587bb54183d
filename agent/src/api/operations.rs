// SPDX-License-Identifier: Apache-2.0
//! google.longrunning.Operations over the engine and the journal.

use std::time::Duration;

use prost::Message as _;
use salvor_proto::{
    google::longrunning::{
        CancelOperationRequest, DeleteOperationRequest, GetOperationRequest, ListOperationsRequest,
        ListOperationsResponse, Operation, WaitOperationRequest, operations_server::Operations,
    },
    v1,
};
use tonic::{Request, Response, Status};
use uuid::Uuid;

use super::{
    Api,
    convert::operation::operation,
    edge::Call,
    page::{self, PAGE_BYTES},
    validate::{self, Checked},
};
use crate::{
    core::{
        admission::admit_cancel,
        lookup,
        reason::{Reason, Refusal},
        text,
    },
    dispatch::{ABANDON_AFTER, refused},
    engine::{View, now_ms},
};

/// The longest a WaitOperation waits; also if it does not say.
const WAIT: Duration = Duration::from_secs(600);

/// So many records are read from the journal at a time.
const BATCH: u32 = 200;

/// So many records are looked at for one page; a filter that few of them meet makes a short page.
const SCANNED: usize = 2_000;

/// An operation's uuid or the beginning of one.
#[derive(Debug, PartialEq, Eq)]
enum Named {
    Id(Uuid),
    Beginning(String),
}

/// What is behind `operations/`.
fn named(name: &str) -> Checked<Named> {
    let word = name.strip_prefix("operations/").unwrap_or_default();
    if let Some(id) = lookup::whole_id(word) {
        return Ok(Named::Id(id));
    }
    if word.len() < 36 && lookup::may_begin_an_id(word) {
        return Ok(Named::Beginning(word.to_ascii_lowercase()));
    }
    Err(Refusal::field(
        "name",
        format!(
            "must be operations/ and a uuid or at least {} digits that one begins with, and is {:?}",
            lookup::SHORTEST,
            text::echo(name)
        ),
    ))
}

fn not_found(id: impl std::fmt::Display) -> Refusal {
    Refusal::new(
        Reason::OperationNotFound,
        format!("there is no operations/{id}, or it is no longer kept"),
    )
    .about("operation", format!("operations/{id}"))
}

/// The filter of ListOperations.
#[derive(Debug, Default, PartialEq, Eq)]
struct Filter {
    server: Option<Uuid>,
    done: Option<bool>,
}

impl Filter {
    fn read(filter: &str) -> Checked<Self> {
        let mut read = Self::default();
        if filter.trim().is_empty() {
            return Ok(read);
        }
        let wrong = || {
            Refusal::field(
                "filter",
                format!(
                    "must be server=UUID, done=true or done=false, or two of them joined by AND, and is {:?}",
                    text::echo(filter)
                ),
            )
        };
        for term in filter.split(" AND ") {
            let (key, value) = term.split_once('=').ok_or_else(wrong)?;
            let value = value.trim();
            let value = value
                .strip_prefix('"')
                .and_then(|value| value.strip_suffix('"'))
                .unwrap_or(value);
            match key.trim() {
                "server" | "server_id" if read.server.is_none() => {
                    read.server = Some(validate::uuid("filter", value).map_err(|_| wrong())?);
                }
                "done" if read.done.is_none() => {
                    read.done = Some(value.parse().map_err(|_| wrong())?);
                }
                _ => return Err(wrong()),
            }
        }
        Ok(read)
    }
}

impl Api {
    fn show(&self, view: &View) -> Operation {
        let server = self.store.server(view.operation.server);
        operation(&view.operation, view.percent, server.as_deref())
    }

    /// The operation that a name means.
    async fn operation_id(&self, name: &str) -> Checked<Uuid> {
        let beginning = match named(name)? {
            Named::Id(id) => return Ok(id),
            Named::Beginning(beginning) => beginning,
        };
        let found = self.store.operations_beginning(beginning.clone()).await;
        match found.map_err(refused)?.as_slice() {
            [] => Err(not_found(beginning)),
            [id] => Ok(*id),
            several => {
                let several: Vec<_> = several.iter().map(ToString::to_string).collect();
                Err(Refusal::new(
                    Reason::AmbiguousName,
                    format!(
                        "several operations begin with {beginning}, {} among them; use the whole uuid",
                        several.join(" and ")
                    ),
                )
                .about("name", name))
            }
        }
    }

    /// Ends an operation that hangs, and says how it ended.
    pub(super) async fn abandon(
        &self,
        call: &Call,
        message: v1::AbandonOperationRequest,
    ) -> Checked<Operation> {
        if !call.who.is_admin() {
            return Err(Refusal::new(
                Reason::PermissionDenied,
                "only the administrator may abandon an operation",
            ));
        }
        let patience = validate::duration("patience", message.patience, validate::PATIENCE)?;
        let id = self.operation_id(&message.name).await?;
        // In a task of its own: it is given up when its time is over, also if the caller has gone away.
        let engine = self.engine.clone();
        let patience = patience.unwrap_or(ABANDON_AFTER);
        let given_up = tokio::spawn(async move { engine.give_up(id, patience).await })
            .await
            .map_err(|_| Refusal::new(Reason::Internal, "abandoning an operation panicked"))?;
        let about = |error| refused(error).about("operation", format!("operations/{id}"));
        let view = given_up.map_err(about)?;
        view.map(|view| self.show(&view))
            .ok_or_else(|| not_found(id))
    }

    /// May this caller cancel it? Who may change its server may, and of one that is gone whose it was.
    async fn may_cancel(&self, call: &Call, id: Uuid) -> Checked<()> {
        if call.who.is_admin() {
            return Ok(());
        }
        let view = self.engine.operation(id).await.map_err(refused)?;
        let Some(view) = view else {
            return Err(not_found(id));
        };
        match self.store.server(view.operation.server) {
            Some(server) => admit_cancel(&server, &call.who, now_ms()),
            None if view.operation.project == call.who.project => Ok(()),
            None => Err(Refusal::new(
                Reason::PermissionDenied,
                format!("operations/{id} is not one of project {}", call.who.project),
            )),
        }
    }

    async fn get(&self, name: &str) -> Checked<Operation> {
        let id = self.operation_id(name).await?;
        let view = self.engine.operation(id).await.map_err(refused)?;
        view.map(|view| self.show(&view))
            .ok_or_else(|| not_found(id))
    }

    async fn list(&self, request: &ListOperationsRequest) -> Checked<ListOperationsResponse> {
        if !matches!(request.name.as_str(), "" | "operations") {
            return Err(Refusal::field(
                "name",
                format!("must be operations, and is {:?}", text::echo(&request.name)),
            ));
        }
        let size = validate::page_size(request.page_size)?;
        let filter = Filter::read(&request.filter)?;
        let first = page::place('o', &request.page_token, |place| place.parse().ok())?;
        let mut before: i64 = first.unwrap_or(i64::MAX);
        let mut response = ListOperationsResponse::default();
        let (mut bytes, mut scanned) = (0, 0);
        loop {
            let batch = self
                .store
                .operations(filter.server, before, BATCH)
                .await
                .map_err(refused)?;
            if batch.is_empty() {
                return Ok(response);
            }
            for (order, record) in batch {
                if response.operations.len() == size || bytes >= PAGE_BYTES || scanned >= SCANNED {
                    response.next_page_token = page::token('o', &before.to_string());
                    return Ok(response);
                }
                scanned += 1;
                before = order;
                if filter
                    .done
                    .is_some_and(|done| done != record.state.is_final())
                {
                    continue;
                }
                // Progress is in the engine's memory only.
                let percent = self
                    .engine
                    .watch(record.id)
                    .and_then(|view| view.borrow().percent);
                let server = self.store.server(record.server);
                let shown = operation(&record, percent, server.as_deref());
                bytes += shown.encoded_len();
                response.operations.push(shown);
            }
        }
    }

    async fn wait(&self, call: &Call, request: WaitOperationRequest) -> Checked<Operation> {
        let id = self.operation_id(&request.name).await?;
        // More than the longest wait is the longest wait.
        let century = Duration::from_secs(100 * 366 * 86_400);
        let wanted = validate::duration("timeout", request.timeout, century)?.unwrap_or(WAIT);
        let limit = call.patience(wanted.min(WAIT));
        let view = self.engine.wait(id, limit).await.map_err(refused)?;
        view.map(|view| self.show(&view))
            .ok_or_else(|| not_found(id))
    }
}

#[tonic::async_trait]
impl Operations for Api {
    async fn get_operation(
        &self,
        request: Request<GetOperationRequest>,
    ) -> Result<Response<Operation>, Status> {
        let (call, message) = Call::open(request)?;
        let found = self.get(&message.name).await;
        found
            .map(Response::new)
            .map_err(|refusal| call.refuse(&refusal))
    }

    async fn list_operations(
        &self,
        request: Request<ListOperationsRequest>,
    ) -> Result<Response<ListOperationsResponse>, Status> {
        let (call, message) = Call::open(request)?;
        let page = self.list(&message).await;
        page.map(Response::new)
            .map_err(|refusal| call.refuse(&refusal))
    }

    /// The end of the wait is not the end of the operation: the answer says how it is then.
    async fn wait_operation(
        &self,
        request: Request<WaitOperationRequest>,
    ) -> Result<Response<Operation>, Status> {
        let (call, message) = Call::open(request)?;
        let view = self.wait(&call, message).await;
        view.map(Response::new)
            .map_err(|refusal| call.refuse(&refusal))
    }

    async fn cancel_operation(
        &self,
        request: Request<CancelOperationRequest>,
    ) -> Result<Response<()>, Status> {
        let (call, message) = Call::open(request)?;
        let cancelled = async {
            let id = self.operation_id(&message.name).await?;
            self.may_cancel(&call, id).await?;
            let cancelled = self.engine.cancel(id).await;
            cancelled.map_err(|error| refused(error).about("operation", format!("operations/{id}")))
        };
        cancelled
            .await
            .map(Response::new)
            .map_err(|refusal| call.refuse(&refusal))
    }

    async fn delete_operation(
        &self,
        request: Request<DeleteOperationRequest>,
    ) -> Result<Response<()>, Status> {
        let (call, _) = Call::open(request)?;
        Err(call.refuse(&Refusal::new(
            Reason::NotSupported,
            "operations are the record of what was done and cannot be deleted; the agent itself forgets them when \
             they are old. To stop one, use CancelOperation",
        )))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    const ID: &str = "7f0c1a52-3d9e-4b6f-8a21-5c0e9d7b4f13";

    #[test]
    fn filters_are_the_simple_forms_and_nothing_else() {
        let server = Some(Uuid::parse_str(ID).unwrap());
        let read = |filter: &str| Filter::read(filter);
        assert_eq!(read("").unwrap(), Filter::default());
        assert_eq!(
            read(&format!("server={ID}")).unwrap(),
            Filter { server, done: None }
        );
        let done = Some(true);
        assert_eq!(
            read(&format!("done=true AND server = \"{ID}\"")).unwrap(),
            Filter { server, done }
        );
        for wrong in [
            "server=web",
            "done=yes",
            "done",
            "done=true done=true",
            "done=true AND done=false",
            "state=done",
            "done!=true",
            "server=' OR 1=1 --",
            "\0",
        ] {
            assert!(read(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn names_are_operations_with_a_uuid_or_its_beginning() {
        let id = Uuid::parse_str(ID).unwrap();
        assert_eq!(named(&format!("operations/{ID}")), Ok(Named::Id(id)));
        let beginning = Named::Beginning("7f0c1a52-3d".to_owned());
        assert_eq!(named("operations/7F0C1a52-3d"), Ok(beginning));
        for wrong in [
            "",
            ID,
            "operations/",
            "operations/x",
            "operations/7f0",
            "operations/7f0_%",
            &format!("operations/{ID}0"),
            &format!("operations/{ID}/x"),
            "../x",
        ] {
            assert!(named(wrong).is_err(), "{wrong}");
        }
    }
}
