// SPDX-License-Identifier: Apache-2.0
//! `salvor operation`.

use salvor_proto::{
    google::longrunning::{
        CancelOperationRequest, GetOperationRequest, ListOperationsRequest, ListOperationsResponse,
        Operation,
    },
    v1::OperationState,
};
use uuid::Uuid;

use super::{Session, pages};
use crate::{
    cli::{OperationCommand, Patience},
    connect::{ask, repeat},
    errors::Failure,
    output::show,
    wait::until_done,
};

/// Operations that are asked for at once.
const PAGE: i32 = 500;

/// Does what is asked for.
pub(super) async fn run(session: &Session, command: OperationCommand) -> Result<(), Failure> {
    match command {
        OperationCommand::List { server, filter } => {
            let filter = match server {
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
