// SPDX-License-Identifier: Apache-2.0
//! A watcher that follows all events from the first on, over all restarts of the agent. What it was told
//! must add up to what the agent says at the end.

use std::collections::BTreeMap;
use std::time::Duration;

use salvor_proto::v1::{
    Event, Server, WatchEventsRequest, event::Change, watch_events_response::Item,
};
use tokio::sync::watch;

use super::tally::Tally;
use crate::client::{Client, metadata_of};
use crate::wait::SOON;

/// What was told.
#[derive(Debug, Default)]
pub(super) struct Told {
    /// The servers as they are by what was told.
    pub(super) servers: BTreeMap<String, Server>,
    /// Operations of which no end was told: their names and actions.
    pub(super) open: BTreeMap<String, String>,
    /// How many events there were.
    pub(super) events: u64,
    /// In how many streams.
    pub(super) streams: u32,
    newest: i64,
}

/// Follows until everything up to the revision in `until` was told.
pub(super) async fn follow(
    mut client: Client,
    until: watch::Receiver<Option<i64>>,
    tally: Tally,
) -> Told {
    let mut told = Told::default();
    while !pass(&mut client, &until, &tally, &mut told).await {
        // The agent is away: its socket is tried again, not hammered.
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    told
}

/// One stream, until it breaks off or all was told (`true`).
async fn pass(
    client: &mut Client,
    until: &watch::Receiver<Option<i64>>,
    tally: &Tally,
    told: &mut Told,
) -> bool {
    let request = WatchEventsRequest {
        after_revision: Some(told.newest),
        servers: Vec::new(),
    };
    let Ok(answer) = client.watches.watch_events(request).await else {
        return false;
    };
    told.streams += 1;
    let mut stream = answer.into_inner();
    loop {
        let Ok(message) = tokio::time::timeout(SOON, stream.message()).await else {
            tally.defect("the watch fell silent");
            return false;
        };
        let Ok(Some(message)) = message else {
            return false;
        };
        match message.item {
            Some(Item::Event(event)) => note(event, tally, told),
            Some(Item::Gap(gap)) => {
                tally.defect(format!("the watcher missed events: {gap:?}"));
            }
            Some(Item::CaughtUp(caught_up)) => {
                let revision = caught_up.revision;
                if until.borrow().is_some_and(|until| revision >= until) {
                    return true;
                }
            }
            None => tally.defect("the watch told of nothing"),
        }
    }
}

fn note(event: Event, tally: &Tally, told: &mut Told) {
    told.events += 1;
    if event.revision <= told.newest {
        tally.defect(format!(
            "event {} was told after {}",
            event.revision, told.newest
        ));
    }
    told.newest = told.newest.max(event.revision);
    match event.change {
        Some(Change::Server(server)) => {
            told.servers.insert(event.server_id, server);
        }
        Some(Change::ServerRemoved(_)) => {
            if told.servers.remove(&event.server_id).is_none() {
                tally.defect(format!(
                    "the watcher was told of the end of {}, of which it had not heard",
                    event.server_id
                ));
            }
        }
        Some(Change::Operation(operation)) => {
            if operation.done {
                told.open.remove(&operation.name);
            } else {
                let action = metadata_of(&operation).action;
                told.open.insert(operation.name, action);
            }
        }
        Some(Change::Guest(_)) => {}
        None => tally.defect("an event without a change"),
    }
}
