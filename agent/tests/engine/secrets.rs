// SPDX-License-Identifier: Apache-2.0
//! How long the hash of a password is in the store's files: with the operation, and no longer.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use rusqlite::{Connection, Transaction};
use salvor_agent::{
    core::{
        action::{Action, ChangePasswordArgs},
        operation::OperationState,
        plan::Plan,
    },
    engine::{Event, NoProbe, Point, Probe},
    store::Store,
};

use crate::{
    crash::{FAIL, Plot},
    host::{
        Agent, Host, NEW, ON, SERVER, adopt, create, hash, password_kept, rescue_action, unrescue,
    },
    variants::{Prior, prepare},
};

/// Looks for the hash when an operation has begun.
struct Look {
    database: PathBuf,
    kept: AtomicBool,
    plot: Arc<Plot>,
}

impl Look {
    fn new(host: &Host, events: &[(Point, Event)]) -> Arc<Self> {
        Arc::new(Self {
            database: host.database(),
            kept: AtomicBool::new(false),
            plot: Plot::new(events),
        })
    }

    /// Was it there while the operation was under way?
    fn was_kept(&self) -> bool {
        self.kept.load(Ordering::SeqCst)
    }
}

impl Probe for Look {
    fn at(&self, plan: &Plan, point: Point) -> Event {
        if point == Point::BeforeStep(0) {
            let kept = password_kept(&self.database);
            self.kept.store(kept, Ordering::SeqCst);
        }
        self.plot.at(plan, point)
    }
}

/// Is it there now? What the end of an operation left to do is done before the store answers.
async fn kept(host: &Host, agent: &Agent) -> bool {
    agent.store.under_way().await.unwrap();
    password_kept(&host.database())
}

fn adopted() -> [Prior; 3] {
    let domain = Prior::Foreign {
        uefi: false,
        on: true,
    };
    [domain, Prior::Done(NEW, adopt()), Prior::GuestAgent]
}

fn change_password() -> Action {
    Action::ChangePassword(ChangePasswordArgs {
        user: None,
        password: hash(),
    })
}

#[tokio::test]
async fn a_hash_goes_with_its_operation_however_that_ends() {
    let running = [Prior::Created { powered_off: false }];
    for (prior, target, action) in [
        (&[][..], NEW, create(false)),
        (&running, ON, rescue_action()),
        (&adopted(), ON, change_password()),
    ] {
        for (event, state) in [
            (Event::Go, OperationState::Done),
            (FAIL, OperationState::Failed),
            (Event::Cancel, OperationState::Cancelled),
        ] {
            let host = Host::new();
            prepare(&host, prior).await;
            let look = Look::new(&host, &[(Point::BeforeStep(0), event)]);
            let agent = host.agent(Arc::clone(&look) as _).await;
            agent.store.keep_room().await.unwrap();
            assert!(!kept(&host, &agent).await, "that of the operation before");
            let ended = agent.carry_out(target, action.clone()).await;
            assert_eq!(ended.state, state, "{ended:#?}");
            assert!(look.was_kept(), "it is needed after a crash");
            // That of a rescue waits in its record for the guest agent: see below.
            let rescue = agent.store.server(SERVER).and_then(|it| it.rescue.clone());
            let waits = rescue.is_some_and(|rescue| rescue.password_for_agent.is_some());
            assert_eq!(kept(&host, &agent).await, waits, "{} {state}", ended.verb);
        }
    }
}

#[tokio::test]
async fn a_hash_that_waits_for_the_guest_agent_goes_when_it_is_given_or_the_rescue_ends() {
    for (action, delivered) in [
        (Action::DeliverPassword, true),
        (Action::Unrescue(unrescue()), false),
    ] {
        let host = Host::new();
        let [domain, adopted, agent] = adopted();
        let rescued = Prior::Done(ON, rescue_action());
        prepare(&host, &[domain, adopted, rescued, agent]).await;
        let agent = host.agent(Arc::new(NoProbe)).await;
        assert!(kept(&host, &agent).await, "the guest agent gets it later");
        agent.succeed(ON, action).await;
        assert_eq!(agent.record().rescue.is_some(), delivered);
        assert!(!kept(&host, &agent).await);
    }
}

#[tokio::test]
async fn a_hash_that_is_left_in_the_log_goes_at_the_next_start_or_with_the_next_operation() {
    let host = Host::new();
    prepare(&host, &adopted()).await;
    let mut reader = Connection::open(host.database()).unwrap();
    let agent = host.agent(Arc::new(NoProbe)).await;
    // Who reads keeps the log as it is, and is not waited for.
    let reading = begin_to_read(&mut reader);
    agent.succeed(ON, change_password()).await;
    assert!(kept(&host, &agent).await, "the log was taken from a reader");
    // What an agent leaves that dies now, and the next one.
    let left = host.dir.path().join("left.db");
    for suffix in ["", "-wal"] {
        let name = |path: &Path| format!("{}{suffix}", path.display());
        fs::copy(name(&host.database()), name(&left)).unwrap();
    }
    assert!(password_kept(&left));
    let next = Store::open(&left, 1_000).unwrap();
    assert!(!password_kept(&left));
    assert!(next.server(SERVER).is_some());

    reading.finish().unwrap();
    agent.succeed(ON, Action::Pause).await;
    assert!(!kept(&host, &agent).await);
}

fn begin_to_read(reader: &mut Connection) -> Transaction<'_> {
    let reading = reader.transaction().unwrap();
    let count = "SELECT count(*) FROM operations";
    let count = reading.query_row(count, [], |row| row.get::<_, i64>(0));
    assert!(count.unwrap() > 0);
    reading
}
