// SPDX-License-Identifier: Apache-2.0
//! `salvor operation`.

use std::time::Duration;

use salvor_proto::{
    google::longrunning::{
        CancelOperationRequest, GetOperationRequest, ListOperationsRequest, ListOperationsResponse,
        Operation,
    },
    v1::{AbandonOperationRequest, OperationState},
};
use uuid::Uuid;

use super::{Session, pages};
use crate::{
    cli::{OperationCommand, Patience},
    connect::{ANSWER_TIMEOUT, ask, ask_within, repeat},
    errors::Failure,
    output::show,
    units::to_api,
    wait::until_done,
};

/// Operations that are asked for at once.
const PAGE: i32 = 500;

/// Does what is asked for.
pub(super) async fn run(session: &Session, command: OperationCommand) -> Result<(), Failure> {
    match command {
        OperationCommand::List {
            server,
            of_server: named,
            filter,
        } => {
            let filter = match server.or(named) {
                Some(server) => of_server(&server_id(session, server).await?, &filter),
                None => filter,
            };
            list(session, filter).await
        }
        OperationCommand::Show { operation } => session
            .ui
            .result(&get(session, &operation).await?, show::operation),
        OperationCommand::Wait {
            operation,
            patience,
        } => {
            let operation = get(session, &operation).await?;
            let waited = until_done(
                &session.agent,
                &session.ui,
                operation,
                patience.wait_timeout,
            )
            .await;
            if waited.end.is_ok() || session.ui.is_json() {
                session.ui.result(&waited.operation, show::outcome)?;
            }
            waited.end
        }
        OperationCommand::Cancel {
            operation,
            no_wait,
            patience,
        } => cancel(session, full_name(&operation), no_wait, patience).await,
        OperationCommand::Abandon { operation, after } => {
            abandon(session, full_name(&operation), after).await
        }
    }
}

/// The name of an operation, of which the constant beginning may be left out.
fn full_name(operation: &str) -> String {
    if operation.contains('/') {
        operation.to_owned()
    } else {
        format!("operations/{operation}")
    }
}

async fn get(session: &Session, operation: &str) -> Result<Operation, Failure> {
    let request = GetOperationRequest {
        name: full_name(operation),
    };
    let call = repeat(&session.ui, async || {
        session
            .agent
            .operations()
            .get_operation(ask(request.clone()))
            .await
    });
    Ok(call.await?)
}

async fn cancel(
    session: &Session,
    name: String,
    no_wait: bool,
    patience: Patience,
) -> Result<(), Failure> {
    let request = CancelOperationRequest { name: name.clone() };
    repeat(&session.ui, async || {
        session
            .agent
            .operations()
            .cancel_operation(ask(request.clone()))
            .await
    })
    .await?;
    let operation = get(session, &name).await?;
    if no_wait {
        return session.ui.result(&operation, show::operation);
    }
    let waited = until_done(
        &session.agent,
        &session.ui,
        operation,
        patience.wait_timeout,
    )
    .await;
    session.ui.result(&waited.operation, show::operation)?;
    match waited.end {
        Err(Failure::Operation { .. })
            if show::metadata(&waited.operation).state() == OperationState::Cancelled =>
        {
            Ok(())
        }
        Ok(()) => Err(Failure::TooLate { name }),
        end => end,
    }
}

/// Has the agent end an operation, and says how it ended.
async fn abandon(session: &Session, name: String, after: Duration) -> Result<(), Failure> {
    let request = AbandonOperationRequest {
        name,
        patience: Some(to_api(after)),
    };
    // The agent answers when it has ended.
    let limit = after.saturating_add(ANSWER_TIMEOUT);
    let answer = repeat(&session.ui, async || {
        session
            .agent
            .servers()
            .abandon_operation(ask_within(request.clone(), limit))
            .await
    });
    let operation = answer.await?.operation;
    let operation = operation.ok_or(Failure::Protocol("answered without an operation"))?;
    session.ui.result(&operation, show::operation)
}

/// The id of the server that is meant. A whole one is taken as it is: the server may be gone.
async fn server_id(session: &Session, server: String) -> Result<String, Failure> {
    if let Ok(id) = Uuid::try_parse(&server) {
        return Ok(id.to_string());
    }
    Ok(super::server::get(session, server).await?.id)
}

/// The agent's filter for operations of a server that another filter selects too.
fn of_server(id: &str, filter: &str) -> String {
    if filter.trim().is_empty() {
        format!("server={id}")
    } else {
        format!("server={id} AND {filter}")
    }
}

/// Every page as one answer.
async fn list(session: &Session, filter: String) -> Result<(), Failure> {
    let mut request = ListOperationsRequest {
        filter,
        page_size: PAGE,
        ..Default::default()
    };
    let mut all = ListOperationsResponse::default();
    pages(async |page_token| {
        request.page_token = page_token;
        let page = repeat(&session.ui, async || {
            session
                .agent
                .operations()
                .list_operations(ask(request.clone()))
                .await
        })
        .await?;
        all.operations.extend(page.operations);
        all.unreachable.extend(page.unreachable);
        Ok(page.next_page_token)
    })
    .await?;
    session.ui.result(&all, show::operations)
}
