// SPDX-License-Identifier: Apache-2.0
//! `salvor`, the command line of the Salvor compute agent: it turns arguments into calls of
//! `salvor.compute.v1` over the agent's Unix socket and answers into text or JSON.
//!
//! It knows the API and terminals. It knows neither libvirt nor the agent's rules: names of servers
//! and images are resolved, and requests are judged, by the agent.
#![forbid(unsafe_code)]

mod cli;
mod commands;
mod connect;
mod errors;
mod output;
mod requests;
mod terminal;
mod units;
mod wait;

use std::process::ExitCode;

use clap::Parser as _;

fn main() -> ExitCode {
    let cli = match cli::Cli::try_parse() {
        Ok(cli) => cli,
        Err(refused) => {
            // Nothing is left to tell if the terminal is gone.
            let _ = refused.print();
            return ExitCode::from(if refused.use_stderr() {
                errors::USAGE
            } else {
                errors::DONE
            });
        }
    };
    // One thread: the command line waits for one answer at a time.
    match tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => {
            let code = runtime.block_on(commands::run(cli));
            // A read of a slow file must not hold up the end.
            runtime.shutdown_background();
            ExitCode::from(code)
        }
        Err(cause) => {
            eprintln!("salvor: cannot start: {cause}");
            ExitCode::from(errors::FAILED)
        }
    }
}
