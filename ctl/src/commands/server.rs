// SPDX-License-Identifier: Apache-2.0
//! `salvor server`.

use salvor_proto::{google::longrunning::Operation, v1};

use super::{
    Session,
    action::{Password, Reply, finish, unless_interrupted},
    console, diagnostics, pages,
    plan::diff,
};
use crate::{
    cli::{ListServers, ServerCommand},
    connect::{ACTION_TIMEOUT, ask, ask_within, repeat, repeat_for},
    errors::Failure,
    output::show,
    requests,
    units::show_time,
};

/// Servers that are asked for at once.
const PAGE: i32 = 500;

/// Sends a request with its id until there is an answer.
macro_rules! send {
    ($session:expr, $how:expr, $method:ident, $request:expr) => {{
        let id = $how.repeatable.request_id();
        let mut request = $request;
        request.request_id.clone_from(&id);
        let limit = $how.patience.wait_timeout;
        let call = repeat_for(&$session.ui, limit, async || {
            let request = ask_within(request.clone(), ACTION_TIMEOUT);
            $session.agent.servers().$method(request).await
        });
        // On the heap: one of these for each verb would make the program's own future large.
        unless_interrupted(&id, Box::pin(async { Ok(call.await?) })).await
    }};
}

/// The server that is meant.
pub(super) async fn get(session: &Session, server: String) -> Result<v1::Server, Failure> {
    let request = v1::GetServerRequest { server };
    let answer = repeat(&session.ui, async || {
        session
            .agent
            .servers()
            .get_server(ask(request.clone()))
            .await
    });
    let server = answer.await?.server;
    server.ok_or(Failure::Protocol("answered without the server"))
}

/// Does what is asked for.
pub(super) async fn run(session: &Session, command: ServerCommand) -> Result<(), Failure> {
    let (how, reply, password) = match command {
        ServerCommand::List(args) => return list(session, args).await,
        ServerCommand::Show(args) => {
            let server = get(session, args.server).await?;
            return session.ui.result(&server, show::server);
        }
        ServerCommand::ConsoleLog(args) => return Box::pin(console::log(session, args)).await,
        ServerCommand::Console(args) => return Box::pin(console::attach(session, args)).await,
        ServerCommand::Screenshot(args) => {
            return Box::pin(console::screenshot(session, args)).await;
        }
        ServerCommand::Diagnostics(args) => {
            return Box::pin(diagnostics::run(session, args)).await;
        }
        ServerCommand::Create { args, how } => {
            let request = requests::create(&args)?;
            let password = known(request.admin_pass.as_ref());
            (
                how,
                Reply::Create(send!(session, how, create_server, request)?),
                password,
            )
        }
        ServerCommand::Rescue { args, how } => {
            let request = requests::rescue(&args)?;
            let password = known(request.admin_pass.as_ref());
            (
                how,
                Reply::Rescue(send!(session, how, rescue_server, request)?),
                password,
            )
        }
        ServerCommand::Adopt { args, how } => {
            let answer = send!(session, how, adopt_server, requests::adopt(&args))?;
            (
                how,
                action(answer.operation, answer.warnings)?,
                Password::Known,
            )
        }
        ServerCommand::Delete { args, how } => {
            let answer = send!(session, how, delete_server, requests::delete(&args))?;
            (
                how,
                action(answer.operation, answer.warnings)?,
                Password::Known,
            )
        }
        ServerCommand::Release { args, how } => {
            let answer = send!(session, how, release_server, requests::release(&args))?;
            (how, action(answer.operation, Vec::new())?, Password::Known)
        }
        ServerCommand::Start { args, how } => {
            let answer = send!(session, how, start_server, requests::start(&args))?;
            (how, action(answer.operation, Vec::new())?, Password::Known)
        }
        ServerCommand::Stop { args, how } => {
            let answer = send!(session, how, stop_server, requests::stop(&args))?;
            (how, action(answer.operation, Vec::new())?, Password::Known)
        }
        ServerCommand::Drift { args, how } if args.accept => {
            let request = requests::accept_drift(args.server);
            let answer = send!(session, how, accept_server_drift, request)?;
            (how, action(answer.operation, Vec::new())?, Password::Known)
        }
        ServerCommand::Drift { args, how } if args.restore => {
            let request = requests::restore_definition(args.server);
            let answer = send!(session, how, restore_server_definition, request)?;
            (how, action(answer.operation, Vec::new())?, Password::Known)
        }
        ServerCommand::Drift { args, .. } => return drift(session, args.server).await,
        ServerCommand::Unrescue { args, how } => {
            let answer = send!(session, how, unrescue_server, requests::unrescue(&args))?;
            (how, action(answer.operation, Vec::new())?, Password::Known)
        }
        ServerCommand::Reboot { args, how } => {
            let answer = send!(session, how, reboot_server, requests::reboot(&args))?;
            (
                how,
                action(answer.operation, answer.warnings)?,
                Password::Known,
            )
        }
        ServerCommand::Pause { args, how } => {
            let answer = send!(session, how, pause_server, requests::pause(&args.server))?;
            (how, action(answer.operation, Vec::new())?, Password::Known)
        }
        ServerCommand::Unpause { args, how } => {
            let request = requests::unpause(&args.server);
            let answer = send!(session, how, unpause_server, request)?;
            (how, action(answer.operation, Vec::new())?, Password::Known)
        }
        ServerCommand::Suspend { args, how } => {
            let request = requests::suspend(&args.server);
            let answer = send!(session, how, suspend_server, request)?;
            (how, action(answer.operation, Vec::new())?, Password::Known)
        }
        ServerCommand::Resume { args, how } => {
            let answer = send!(session, how, resume_server, requests::resume(&args.server))?;
            (how, action(answer.operation, Vec::new())?, Password::Known)
        }
        ServerCommand::CrashDump { args, how } if args.to_host => {
            let request = requests::dump_memory(&args.server);
            let answer = send!(session, how, dump_server_memory, request)?;
            (how, action(answer.operation, Vec::new())?, Password::Known)
        }
        ServerCommand::CrashDump { args, how } => {
            let request = requests::crash_dump(&args.server);
            let answer = send!(session, how, trigger_crash_dump, request)?;
            (how, action(answer.operation, Vec::new())?, Password::Known)
        }
        ServerCommand::SetPassword { args, how } => {
            let request = requests::set_password(&args)?;
            let password = known(request.admin_pass.as_ref());
            (
                how,
                Reply::SetPassword(send!(session, how, change_server_password, request)?),
                password,
            )
        }
        ServerCommand::Lock { args, how } => {
            let answer = send!(session, how, lock_server, requests::lock(&args))?;
            (how, action(answer.operation, Vec::new())?, Password::Known)
        }
        ServerCommand::Unlock { args, how } => {
            let answer = send!(session, how, unlock_server, requests::unlock(&args))?;
            (how, action(answer.operation, Vec::new())?, Password::Known)
        }
        ServerCommand::Update { args, how } => {
            let answer = send!(session, how, update_server, requests::update(&args)?)?;
            (how, action(answer.operation, Vec::new())?, Password::Known)
        }
        ServerCommand::ResetState { args, how } => {
            let request = requests::reset_state(&args);
            let answer = send!(session, how, reset_server_state, request)?;
            (how, action(answer.operation, Vec::new())?, Password::Known)
        }
        ServerCommand::Restore { args, how } => {
            let answer = send!(session, how, restore_server, requests::restore(&args))?;
            (how, action(answer.operation, Vec::new())?, Password::Known)
        }
        ServerCommand::ForceDelete { args, how } => {
            let request = requests::force_delete(&args);
            let answer = send!(session, how, force_delete_server, request)?;
            let reply = action(answer.operation, answer.warnings)?;
            (how, reply, Password::Known)
        }
    };
    finish(session, &how, reply, password).await
}

fn known(given: Option<&String>) -> Password {
    if given.is_some() {
        Password::Known
    } else {
        Password::Generated
    }
}

fn action(operation: Option<Operation>, warnings: Vec<v1::Warning>) -> Result<Reply, Failure> {
    let operation = operation.ok_or(Failure::Protocol("answered without an operation"))?;
    Ok(Reply::Action(operation, warnings))
}

/// What somebody changed in a server's definition.
async fn drift(session: &Session, server: String) -> Result<(), Failure> {
    let request = v1::GetServerDriftRequest { server };
    let answer = repeat(&session.ui, async || {
        session
            .agent
            .servers()
            .get_server_drift(ask(request.clone()))
            .await
    });
    session.ui.result(&answer.await?, |drift| {
        if drift.unknown {
            return "Nothing is known yet of how it was defined.\n".to_owned();
        }
        if !drift.drifted {
            return "The definition is as it is known.\n".to_owned();
        }
        let since = match &drift.since {
            Some(since) => format!("Changed since {} at the latest:\n", show_time(Some(since))),
            None => "Changed:\n".to_owned(),
        };
        since + &diff(&drift.diff, session.ui.colour())
    })
}

/// Every page as one answer.
async fn list(session: &Session, args: ListServers) -> Result<(), Failure> {
    let mut request = v1::ListServersRequest {
        page_size: PAGE,
        page_token: String::new(),
        name_contains: args.name,
        statuses: args.statuses,
        vm_states: args.vm_states.iter().map(|state| state.api()).collect(),
        power_states: args.power_states.iter().map(|state| state.api()).collect(),
        origin: args.origin.map_or(0, |origin| origin.api()),
        tags: args.tags,
        locked: args.locked,
        project_id: args.project,
        metadata: requests::map("--metadata", &args.metadata)?,
    };
    let mut all = v1::ListServersResponse::default();
    pages(async |page_token| {
        request.page_token = page_token;
        let page = repeat(&session.ui, async || {
            session
                .agent
                .servers()
                .list_servers(ask(request.clone()))
                .await
        })
        .await?;
        all.servers.extend(page.servers);
        Ok(page.next_page_token)
    })
    .await?;
    session.ui.result(&all, show::servers)
}
