// SPDX-License-Identifier: Apache-2.0
//! Times: from when they are counted, and what comes back late.

use std::sync::Arc;

use salvor_agent::{
    core::{
        action::{Action, Verb},
        operation::OperationState,
    },
    engine::Point,
};

use crate::{
    dispatch::with_server,
    gate::{Gate, until},
    host::{Host, ON, rescue},
};

fn now_ms() -> i64 {
    let since = std::time::UNIX_EPOCH.elapsed().unwrap();
    i64::try_from(since.as_millis()).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_rescue_lasts_as_long_as_was_asked_however_long_its_beginning_took() {
    let host = Host::new();
    let gate = Gate::new(Verb::Rescue, Point::BeforeCommit);
    let agent = with_server(&host, Arc::clone(&gate) as _).await;
    let mut args = rescue();
    args.timeout_ms = Some(3_600_000);
    let submitted = agent.submit(ON, Action::Rescue(Box::new(args))).await;
    let operation = submitted.unwrap().operation;
    gate.reached().await;
    let ready = operation.created_at_ms + 50;
    until("time goes by", || now_ms() >= ready).await;
    gate.open();
    assert_eq!(agent.ended(operation.id).await.state, OperationState::Done);
    let begun = agent.record().rescue.clone().unwrap();
    assert!(begun.started_at_ms >= ready, "{begun:?}");
    assert_eq!(begun.expires_at_ms, Some(begun.started_at_ms + 3_600_000));
}
