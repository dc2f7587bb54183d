// SPDX-License-Identifier: Apache-2.0
//! `salvor watch`: the events of the host, taken up again where they broke off.

use std::time::Duration;

use salvor_proto::{
    google::longrunning::{Operation, operation::Result as Outcome},
    v1::{self, event::Change, watch_events_response::Item},
};
use tokio::time::{Instant, timeout};
use tonic::{Request, Status};

use super::Session;
use crate::{
    cli::WatchArgs,
    connect::{BackOff, is_away, is_broken},
    errors::{Failure, broken},
    output::{
        show::{metadata, operation_word, power_word, step_word},
        text::clean,
    },
    units::show_time,
};

/// A stream that is silent for so long is dead: a live agent says every few seconds that there is
/// nothing new.
const SILENCE: Duration = Duration::from_secs(60);

/// Writes events until the agent has been away for too long.
pub(super) async fn run(session: &Session, args: WatchArgs) -> Result<(), Failure> {
    let mut after = args.after;
    // Set while the agent is away.
    let mut away: Option<(Instant, BackOff)> = None;
    loop {
        let mut seen = Seen {
            after,
            heard: false,
        };
        let broke = follow(session, &args.servers, &mut seen).await;
        after = seen.after;
        let status = match broke {
            Ok(never) => match never {},
            Err(Failure::Call(status)) if is_away(&status) => status,
            Err(failure) => return Err(failure),
        };
        if seen.heard {
            away = None;
        }
        let (deadline, pause) = away.get_or_insert_with(|| {
            let why = if is_broken(&status) {
                broken(&status)
            } else {
                format!("the agent is away: {}", status.message())
            };
            session
                .ui
                .note(&format!("{why}; taking the watch up again when it is back"));
            (Instant::now() + args.wait_timeout, BackOff::default())
        });
        if !pause.wait(*deadline).await {
            return Err(status.into());
        }
    }
}

/// How far a stream has come.
struct Seen {
    after: Option<i64>,
    heard: bool,
}

/// There is no such value: a stream ends with an error only.
enum Never {}

/// Writes events until the stream breaks.
async fn follow(session: &Session, servers: &[String], seen: &mut Seen) -> Result<Never, Failure> {
    let request = v1::WatchEventsRequest {
        after_revision: seen.after,
        servers: servers.to_vec(),
    };
    let silent = |_| Status::unavailable("it has been silent for a minute");
    let mut watch = session.agent.watch();
    let call = timeout(SILENCE, watch.watch_events(Request::new(request)));
    let mut stream = call.await.map_err(silent)??.into_inner();
    loop {
        let message = timeout(SILENCE, stream.message()).await.map_err(silent)??;
        let Some(message) = message else {
            return Err(Status::unavailable("it ended the watch").into());
        };
        seen.heard = true;
        let revision = match &message.item {
            Some(Item::Event(event)) => Some(event.revision),
            Some(Item::CaughtUp(caught_up)) => Some(caught_up.revision),
            _ => None,
        };
        // Servers as they are now come with older revisions.
        seen.after = seen.after.max(revision);
        session.ui.item(&message, text)?;
    }
}

/// An event on a line; nothing for what only says that there is nothing new.
fn text(message: &v1::WatchEventsResponse) -> String {
    match &message.item {
        Some(Item::Event(event)) => line(event),
        Some(Item::Gap(gap)) => format!(
            "-- events after {} and before {} are no longer kept; the servers as they are now:\n",
            gap.after_revision, gap.oldest_revision
        ),
        Some(Item::CaughtUp(_)) | None => String::new(),
    }
}

fn line(event: &v1::Event) -> String {
    let what = match &event.change {
        Some(Change::Server(server)) => {
            let task = match server.task_state.as_str() {
                "" => String::new(),
                task => format!(" ({task})"),
            };
            let power = server
                .power
                .as_ref()
                .map(|power| power_word(power.state))
                .unwrap_or_default();
            format!("{}: {}{task}, power {power}", server.name, server.status)
        }
        Some(Change::ServerRemoved(removed)) => format!("removed by {}", removed.action),
        Some(Change::Operation(operation)) => operation_text(operation),
        Some(Change::Guest(guest)) => guest_text(guest),
        None => "a change that this version does not know".to_owned(),
    };
    format!(
        "{}  {}  {}  {}\n",
        show_time(event.time.as_ref()),
        event.revision,
        clean(&event.server_id),
        clean(&what)
    )
}

fn guest_text(guest: &v1::GuestEvent) -> String {
    let mut text = match guest.kind.as_str() {
        "rebooted" => "the guest rebooted".to_owned(),
        "watchdog" => "the guest's watchdog fired".to_owned(),
        "io-error" => "an I/O error".to_owned(),
        "panicked" => "the guest's kernel panicked".to_owned(),
        "memory-lost" => {
            "the guest was paused when its host went down: its memory is lost".to_owned()
        }
        "block-job-failed" => "a job on a disk".to_owned(),
        "device-removed" => "a device is gone".to_owned(),
        "memory-changed" => "the guest has another size of memory".to_owned(),
        other => other.to_owned(),
    };
    let add = |text: &mut String, before: &str, what: &str| {
        if !what.is_empty() {
            text.push_str(&format!("{before}{what}"));
        }
    };
    add(&mut text, " on ", &guest.device);
    add(&mut text, " of ", &guest.source);
    add(&mut text, ": ", &guest.reason);
    add(&mut text, "; done: ", &guest.action);
    if guest.count > 1 {
        text.push_str(&format!(
            " ({} times since {})",
            guest.count,
            show_time(guest.first_time.as_ref())
        ));
    }
    text
}

fn operation_text(operation: &Operation) -> String {
    let metadata = metadata(operation);
    let state = operation_word(metadata.state)
        .to_lowercase()
        .replace('_', " ");
    let mut text = format!("{} {state}", metadata.action);
    if let Some(Outcome::Error(error)) = &operation.result {
        return format!("{text}: {}", error.message);
    }
    // The step that something happened to last.
    let moved = (1_usize..).zip(&metadata.steps).filter(|(_, step)| {
        !matches!(
            step.state(),
            v1::StepState::Pending | v1::StepState::Unspecified
        )
    });
    if let Some((number, step)) = moved.last().filter(|_| !operation.done) {
        text.push_str(&format!(
            ", step {number}/{} {} {}",
            metadata.steps.len(),
            step.kind,
            step_word(step.state)
        ));
    }
    text
}
