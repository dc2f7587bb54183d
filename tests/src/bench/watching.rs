// SPDX-License-Identifier: Apache-2.0
//! How soon a watcher of the agent hears of what libvirt does: a guest is paused and let run from outside,
//! and its new power state comes down the stream.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use salvor_proto::v1::{
    PowerState, WatchEventsRequest, WatchEventsResponse, event::Change, watch_events_response::Item,
};
use tonic::Streaming;
use uuid::Uuid;
use virt::connect::Connect;

use super::Bench;
use super::peers::{Agent, Peer as _};
use super::report::{Goal, Row};
use super::samples::Samples;
use crate::host::TestHost;
use crate::wait::SOON;

/// The slowest of a hundred events may take so long.
const LATEST: Duration = Duration::from_millis(5);

/// Measures from the moment that libvirt is asked until the watcher has the event. What libvirt itself
/// takes is in it, and stands beside it as the raw call's own time.
pub(super) fn events(bench: &mut Bench, host: &TestHost, ours: &mut Agent) {
    ours.start();
    let outsider = Outsider::on(host, ours.server);
    let request = WatchEventsRequest {
        after_revision: None,
        servers: vec![ours.server.to_string()],
    };
    let stream = bench
        .runtime
        .block_on(ours.client.watches.watch_events(request));
    let mut stream = stream.unwrap().into_inner();
    bench
        .runtime
        .block_on(power_state(&mut stream, PowerState::Running));

    let rounds = (bench.settings.calls / 10).max(10);
    println!("{rounds} pauses from outside, watched");
    let (mut raw, mut watched) = (Samples::default(), Samples::default());
    for _ in 0..rounds {
        for (paused, state) in [(true, PowerState::Paused), (false, PowerState::Running)] {
            outsider.orders.send(paused).unwrap();
            bench.runtime.block_on(power_state(&mut stream, state));
            let heard = Instant::now();
            let (asked, done) = outsider.calls.recv_timeout(SOON).unwrap();
            raw.add(done - asked);
            watched.add(heard - asked);
        }
    }
    drop(stream);
    ours.stop();
    bench.rows.push(Row {
        operation: "outside pause, watched".to_owned(),
        base_is: "raw call alone",
        base: raw,
        agent: watched,
        goal: Goal::TailWithin(LATEST),
    });
}

/// Reads on until the server has this power state.
async fn power_state(stream: &mut Streaming<WatchEventsResponse>, state: PowerState) {
    let told = async {
        loop {
            let item = stream.message().await.unwrap().expect("the stream goes on");
            if let Some(Item::Event(event)) = item.item
                && let Some(Change::Server(server)) = event.change
                && server.power.is_some_and(|power| power.state() == state)
            {
                return;
            }
        }
    };
    let told = tokio::time::timeout(SOON, told).await;
    told.unwrap_or_else(|_| panic!("the watcher heard nothing of {state:?}"));
}

/// Somebody who pauses (`true`) a domain and lets it run (`false`) past the agent, on a thread of its own.
/// It tells of each call when it began and when it returned.
struct Outsider {
    orders: Sender<bool>,
    calls: Receiver<(Instant, Instant)>,
}

impl Outsider {
    fn on(host: &TestHost, domain: Uuid) -> Self {
        let (orders, ordered) = channel();
        let (told, calls) = channel();
        let uri = host.uri();
        std::thread::spawn(move || {
            let connection = Connect::open(Some(&uri)).unwrap();
            let domain = connection.lookup_domain_by_uuid(domain).unwrap();
            for pause in ordered {
                let asked = Instant::now();
                if pause {
                    domain.suspend().unwrap();
                } else {
                    domain.resume().unwrap();
                }
                if told.send((asked, Instant::now())).is_err() {
                    return;
                }
            }
        });
        Self { orders, calls }
    }
}
