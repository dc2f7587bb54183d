// SPDX-License-Identifier: Apache-2.0
//! `salvor server diagnostics`.

use std::{
    fs::OpenOptions,
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
};

use salvor_proto::v1;

use super::Session;
use crate::{
    cli::DiagnosticsArgs,
    connect::{ask, repeat},
    errors::Failure,
    output::{diagnostics, json::Json},
};

/// Asks, shows, and writes the bundle if one is wanted.
pub(super) async fn run(session: &Session, args: DiagnosticsArgs) -> Result<(), Failure> {
    let request = v1::GetServerDiagnosticsRequest {
        server: args.server,
        definitions: args.bundle.is_some(),
    };
    let answer = repeat(&session.ui, async || {
        let request = ask(request.clone());
        session
            .agent
            .servers()
            .get_server_diagnostics(request)
            .await
    });
    let answer = answer.await?;
    if let Some(file) = &args.bundle {
        let host = repeat(&session.ui, async || {
            let request = ask(v1::GetHostRequest {});
            session.agent.host().get_host(request).await
        });
        let host = host.await?.host.unwrap_or_default();
        let json = Json::new()?;
        let bundle = format!(
            "{{\n\"salvor_version\": {:?},\n\"host\": {},\n\"diagnostics\": {}\n}}\n",
            env!("CARGO_PKG_VERSION"),
            json.write(&host, false)?,
            json.write(&answer, false)?
        );
        keep(file, &bundle).map_err(|cause| Failure::File {
            what: format!("cannot write {}", file.display()),
            cause,
        })?;
        session.ui.note(&format!("written to {}", file.display()));
    }
    session.ui.result(&answer, diagnostics::text)
}

/// Into a new file that only its owner can read: it tells a lot about a server.
fn keep(file: &Path, bundle: &str) -> io::Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(file)?;
    file.write_all(bundle.as_bytes())
}
