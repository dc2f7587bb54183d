// SPDX-License-Identifier: Apache-2.0
//! What each command does.

mod action;
mod console;
mod diagnostics;
mod image;
mod operation;
mod plan;
mod server;
mod watch;

use std::{fs, io, path::Path};

use clap::CommandFactory as _;
use clap_complete::Shell as Generator;
use salvor_proto::v1;

use crate::{
    cli::{Cli, Command, HostCommand, Shell},
    connect::{Agent, ForWhom, ask, repeat},
    errors::{DONE, Failure},
    output::{Ui, show, warn},
};

/// The agent, and where to write.
#[derive(Debug)]
struct Session {
    agent: Agent,
    ui: Ui,
}

/// Does what is asked for, tells what went wrong, and returns the exit code.
pub(crate) async fn run(cli: Cli) -> u8 {
    match dispatch(cli).await {
        Ok(()) => DONE,
        Err(failure) => {
            for line in failure.lines() {
                warn(&line);
            }
            failure.exit_code()
        }
    }
}

async fn dispatch(cli: Cli) -> Result<(), Failure> {
    let ui = Ui::new(&cli.global)?;
    let for_whom = ForWhom::new(&cli.global)?;
    let socket = cli.global.socket;
    let connect = async |ui| -> Result<Session, Failure> {
        Ok(Session {
            agent: Agent::connect(&socket, for_whom.clone()).await?,
            ui,
        })
    };
    match cli.command {
        Command::Completion { shell } => completion(&ui, shell),
        Command::Man { out } => man(&out),
        Command::Server(command) => server::run(&connect(ui).await?, command).await,
        Command::Image(command) => image::run(&connect(ui).await?, command).await,
        Command::Operation(command) => operation::run(&connect(ui).await?, command).await,
        Command::Watch(args) => watch::run(&connect(ui).await?, args).await,
        Command::Host(command) => host(&connect(ui).await?, command).await,
        Command::Plan(command) => plan::run(&connect(ui).await?, command).await,
    }
}

/// Has `page` ask for page after page, by the token of each, until there is none left.
async fn pages(
    mut page: impl AsyncFnMut(String) -> Result<String, Failure>,
) -> Result<(), Failure> {
    let mut token = String::new();
    loop {
        let next = page(token.clone()).await?;
        if next.is_empty() {
            return Ok(());
        }
        if next == token {
            return Err(Failure::Protocol("gives the same page again and again"));
        }
        token = next;
    }
}

async fn host(session: &Session, command: HostCommand) -> Result<(), Failure> {
    let agent = &session.agent;
    match command {
        HostCommand::Show => {
            let answer = repeat(&session.ui, async || {
                agent.host().get_host(ask(v1::GetHostRequest {})).await
            });
            let host = answer
                .await?
                .host
                .ok_or(Failure::Protocol("answered without the host"))?;
            session.ui.result(&host, show::host)
        }
        HostCommand::Unmanaged => {
            let answer = repeat(&session.ui, async || {
                agent
                    .host()
                    .list_unmanaged_domains(ask(v1::ListUnmanagedDomainsRequest {}))
                    .await
            });
            session.ui.result(&answer.await?, show::unmanaged)
        }
    }
}

fn completion(ui: &Ui, shell: Shell) -> Result<(), Failure> {
    let generator = match shell {
        Shell::Bash => Generator::Bash,
        Shell::Zsh => Generator::Zsh,
        Shell::Fish => Generator::Fish,
    };
    let mut script = Vec::new();
    clap_complete::generate(generator, &mut Cli::command(), "salvor", &mut script);
    ui.text(&String::from_utf8_lossy(&script))
}

fn man(out: &Path) -> Result<(), Failure> {
    let failed = |cause: io::Error| Failure::File {
        what: format!("cannot write manual pages to {}", out.display()),
        cause,
    };
    fs::create_dir_all(out).map_err(failed)?;
    clap_mangen::generate_to(Cli::command(), out).map_err(failed)
}
