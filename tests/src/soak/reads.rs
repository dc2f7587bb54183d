// SPDX-License-Identifier: Apache-2.0
//! Calls that change nothing: what they open must be closed again.

use std::time::{Duration, Instant};

use rand::Rng as _;
use rand::seq::IndexedRandom as _;
use salvor_proto::google::longrunning::ListOperationsRequest;
use salvor_proto::v1::attach_console_request::Item;
use salvor_proto::v1::{
    AttachConsoleRequest, ConsoleOpen, GetConsoleLogRequest, GetScreenshotRequest,
    GetServerDiagnosticsRequest, GetServerDriftRequest, ListServersRequest, WatchEventsRequest,
};
use tonic::Status;

use super::life::Life;
use super::tally::Disturbance;

/// So long somebody listens to a console or a watch.
const LISTENS: Duration = Duration::from_millis(300);

/// Looks at something.
pub(super) async fn read(life: &mut Life) {
    let begun = Instant::now();
    let number = life.random.random_range(0..8);
    // Ticks, writes to the disk, resets, and a switch-off by the guest itself.
    let letter = ["t", "t", "d", "r", "q"].choose(&mut life.random);
    let letter = letter.copied().unwrap_or("t");
    loop {
        let (name, answer) = once(life, number, letter).await;
        if life.answer_to(name, answer, begun).await {
            return;
        }
    }
}

async fn once(life: &Life, number: u32, letter: &str) -> (&'static str, Result<(), Status>) {
    let mut client = life.client.clone();
    let server = life.id.to_string();
    match number {
        0 => {
            let request = ListServersRequest::default();
            let answer = client.servers.list_servers(request).await;
            ("list", answer.map(drop))
        }
        1 => {
            let request = GetServerDiagnosticsRequest {
                server,
                definitions: true,
            };
            let answer = client.servers.get_server_diagnostics(request).await;
            ("diagnostics", answer.map(drop))
        }
        2 => {
            let request = GetServerDriftRequest { server };
            let answer = client.servers.get_server_drift(request).await;
            ("drift", answer.map(drop))
        }
        3 => {
            let request = GetConsoleLogRequest {
                server,
                ..GetConsoleLogRequest::default()
            };
            let answer = client.consoles.get_console_log(request).await;
            ("console log", answer.map(drop))
        }
        4 => ("screenshot", screenshot(life, server).await),
        5 => {
            let request = ListOperationsRequest {
                filter: format!("server={server}"),
                page_size: 20,
                ..ListOperationsRequest::default()
            };
            let answer = client.operations.list_operations(request).await;
            ("list operations", answer.map(drop))
        }
        6 => ("watch", watch(life, server).await),
        _ => ("console", console(life, server, letter).await),
    }
}

async fn screenshot(life: &Life, server: String) -> Result<(), Status> {
    let mut client = life.client.clone();
    let request = GetScreenshotRequest { server };
    let mut pieces = client.consoles.get_screenshot(request).await?.into_inner();
    while pieces.message().await?.is_some() {}
    Ok(())
}

/// One more watcher, who goes again soon.
async fn watch(life: &Life, server: String) -> Result<(), Status> {
    let mut client = life.client.clone();
    let request = WatchEventsRequest {
        after_revision: None,
        servers: vec![server],
    };
    let mut events = client.watches.watch_events(request).await?.into_inner();
    let listen = async {
        while events.message().await?.is_some() {}
        Ok(())
    };
    tokio::time::timeout(LISTENS, listen)
        .await
        .unwrap_or(Ok(()))
}

/// Somebody at the serial port, who types a letter.
async fn console(life: &Life, server: String, letter: &str) -> Result<(), Status> {
    let mut client = life.client.clone();
    let typed = matches!(letter, "r" | "q")
        .then(|| life.tally.disturb(Disturbance::Outside(life.id, "letter")));
    let open = ConsoleOpen {
        server,
        ..ConsoleOpen::default()
    };
    let items = [Item::Open(open), Item::Input(letter.into())];
    let input = items.map(|item| AttachConsoleRequest { item: Some(item) });
    let input = tokio_stream::iter(input);
    let mut output = client.consoles.attach_console(input).await?.into_inner();
    let listen = async {
        while output.message().await?.is_some() {}
        Ok(())
    };
    let heard = tokio::time::timeout(LISTENS, listen).await;
    if let Some(number) = typed {
        life.tally.disturbed(number);
    }
    heard.unwrap_or(Ok(()))
}
