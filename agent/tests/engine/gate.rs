// SPDX-License-Identifier: Apache-2.0
//! Holds an operation at a point until the test lets it go on.

use std::{
    sync::{Arc, Condvar, Mutex},
    time::Duration,
};

use salvor_agent::{
    core::{action::Verb, plan::Plan},
    engine::{Event, Point, Probe},
};
use tokio::sync::watch;

use crate::host::PATIENCE;

/// A point that operations of one verb do not pass. It blocks a thread of the runtime, which needs
/// several.
pub(crate) struct Gate {
    verb: Verb,
    point: Point,
    open: Mutex<bool>,
    opened: Condvar,
    reached: watch::Sender<bool>,
}

impl Gate {
    pub(crate) fn new(verb: Verb, point: Point) -> Arc<Self> {
        Arc::new(Self {
            verb,
            point,
            open: Mutex::new(false),
            opened: Condvar::new(),
            reached: watch::Sender::new(false),
        })
    }

    /// Waits until an operation stands at the gate.
    pub(crate) async fn reached(&self) {
        let mut reached = self.reached.subscribe();
        let wait = reached.wait_for(|reached| *reached);
        tokio::time::timeout(PATIENCE, wait).await.unwrap().unwrap();
    }

    /// Lets everybody pass from now on.
    pub(crate) fn open(&self) {
        *self.open.lock().unwrap() = true;
        self.opened.notify_all();
    }
}

impl Probe for Gate {
    fn at(&self, plan: &Plan, point: Point) -> Event {
        if plan.verb == self.verb && point == self.point {
            self.reached.send_replace(true);
            let open = self.open.lock().unwrap();
            let wait = self
                .opened
                .wait_timeout_while(open, PATIENCE, |open| !*open);
            assert!(!wait.unwrap().1.timed_out(), "nobody opened the gate");
        }
        Event::Go
    }
}

/// Waits until something is so.
pub(crate) async fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    while !is_so() {
        assert!(tokio::time::Instant::now() < deadline, "{what}: in vain");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// Watches that something stays so for a while.
pub(crate) async fn stays(what: &str, mut is_so: impl FnMut() -> bool) {
    let end = tokio::time::Instant::now() + Duration::from_millis(300);
    while tokio::time::Instant::now() < end {
        assert!(is_so(), "{what}: no longer");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}
