// SPDX-License-Identifier: Apache-2.0
//! The store: what it keeps when an agent dies, what it refuses, and the order of its events.

use std::{collections::BTreeMap, path::Path, sync::Arc};

use proptest::prelude::*;
use salvor_agent::{
    core::{
        action::Verb,
        caller::Who,
        image::ImageFormat,
        operation::{OperationRecord, OperationState},
        plan::{Outcome, Plan, RescueChange},
        reason::Reason,
        record::{Flavor, Origin, Owner, ServerRecord},
        state::{ObservationSource, PowerObservation, PowerState, VmState},
    },
    store::{Accept, Accepted, Change, Request, Store, StoreError, StoredEvent},
};
use tempfile::TempDir;
use uuid::Uuid;

fn folder() -> TempDir {
    tempfile::tempdir_in("/dev/shm")
        .or_else(|_| tempfile::tempdir())
        .unwrap()
}

fn open(folder: &TempDir) -> Store {
    Store::open(&folder.path().join("salvor.db"), 1_000).unwrap()
}

fn server(id: Uuid) -> ServerRecord {
    ServerRecord {
        id,
        name: format!("server-{id}"),
        origin: Origin::Adopted,
        domain_name: "domain".to_owned(),
        vm_state: VmState::Active,
        task_state: None,
        power: seen(PowerState::Running, 1),
        last_known_power: None,
        image_id: None,
        flavor: Flavor {
            vcpus: 1,
            memory_mib: 1,
            disk_gib: 0,
        },
        disks: Vec::new(),
        nics: Vec::new(),
        rescue: None,
        fault: None,
        operation: None,
        operation_verb: None,
        revision: 0,
        created_at_ms: 1,
        updated_at_ms: 1,
        settled_at_ms: 1,
        metadata: BTreeMap::new(),
        hostname: String::new(),
        public_keys: BTreeMap::new(),
        guest_agent: false,
        mismatch: None,
        owner: Owner::default(),
        lock: None,
        description: None,
        tags: Vec::new(),
        access_ipv4: None,
        access_ipv6: None,
        shutdown_timeout_ms: None,
        autostart: true,
        autostart_order: None,
        deletion: None,
        drift_since_ms: None,
        agent: None,
    }
}

fn seen(state: PowerState, observed_at_ms: i64) -> PowerObservation {
    PowerObservation {
        state,
        reason: String::new(),
        observed_at_ms,
        source: ObservationSource::Poll,
    }
}

fn plan(verb: Verb, server: Uuid, outcome: Outcome) -> Arc<Plan> {
    Arc::new(Plan {
        id: Uuid::new_v4(),
        server,
        verb,
        initial: None,
        steps: Vec::new(),
        outcome,
        warnings: Vec::new(),
        password_delivery: Vec::new(),
    })
}

fn becomes(vm_state: VmState) -> Outcome {
    Outcome::Change {
        vm_state,
        rescue: RescueChange::Keep,
        devices: None,
    }
}

fn request(id: Option<&str>, body: &str) -> Request {
    Request {
        id: id.map(str::to_owned),
        body_hash: body.to_owned(),
        caller: "test".to_owned(),
        who: Who::default(),
    }
}

async fn accept(
    store: &Store,
    plan: &Arc<Plan>,
    request: Request,
) -> Result<OperationRecord, StoreError> {
    let accept = Accept {
        plan: Arc::clone(plan),
        request,
        planned_for: store.server(plan.server),
        now_ms: 10,
    };
    store.accept(accept).await.map(|accepted| match accepted {
        Accepted::New(operation) | Accepted::Before(operation) => *operation,
    })
}

async fn commit(store: &Store, plan: &Arc<Plan>, mut operation: OperationRecord) {
    operation.state = OperationState::Done;
    store.commit(Arc::clone(plan), operation, 20).await.unwrap();
}

/// Accepts a plan and lets it be done.
async fn done(store: &Store, plan: &Arc<Plan>) {
    let operation = accept(store, plan, request(None, "")).await.unwrap();
    commit(store, plan, operation).await;
}

async fn adopt(store: &Store, id: Uuid) {
    done(
        store,
        &plan(Verb::Adopt, id, Outcome::Insert(Box::new(server(id)))),
    )
    .await;
}

fn reason<T: std::fmt::Debug>(result: Result<T, StoreError>) -> Reason {
    match result {
        Err(StoreError::Refused(refusal)) => refusal.reason,
        other => panic!("{other:?}"),
    }
}

const A: Uuid = Uuid::from_u128(1);

#[tokio::test]
async fn an_accepted_operation_and_its_lane_survive_the_agent_together() {
    let folder = folder();
    let store = open(&folder);
    adopt(&store, A).await;
    let stop = plan(Verb::Stop, A, becomes(VmState::Stopped));
    accept(&store, &stop, request(None, "")).await.unwrap();
    let before = store.server(A).unwrap();
    let host = store.host_id();
    drop(store);

    let store = open(&folder);
    assert_eq!(store.host_id(), host);
    assert_eq!(store.server(A).unwrap(), before);
    assert_eq!(before.operation, Some(stop.id));
    assert_eq!(before.task_state.unwrap().name(), "powering-off");
    let under_way = store.under_way().await.unwrap();
    assert_eq!(under_way.len(), 1);
    assert_eq!(under_way[0].1, *stop);
    assert_eq!(store.server_count(), 1);
}

#[tokio::test]
async fn old_operations_are_forgotten_but_not_those_that_are_under_way() {
    let folder = folder();
    let store = open(&folder);
    adopt(&store, A).await;
    let ended = plan(Verb::Stop, A, becomes(VmState::Stopped));
    done(&store, &ended).await;
    let under_way = plan(Verb::Start, A, becomes(VmState::Active));
    accept(&store, &under_way, request(None, "")).await.unwrap();
    let kept = async |id| store.operation(id).await.unwrap().is_some();

    // Made at 10 ms: what began before that is old, and nothing did.
    assert_eq!(store.forget_operations(10).await.unwrap(), 0);
    assert!(kept(ended.id).await && kept(under_way.id).await);
    // The adoption and the stop.
    assert_eq!(store.forget_operations(11).await.unwrap(), 2);
    assert!(!kept(ended.id).await && kept(under_way.id).await);
}

#[tokio::test]
async fn a_request_id_begins_one_operation_also_after_a_restart() {
    let folder = folder();
    let store = open(&folder);
    adopt(&store, A).await;
    let stop = plan(Verb::Stop, A, becomes(VmState::Stopped));
    let first = accept(&store, &stop, request(Some("r1"), "stop"))
        .await
        .unwrap();
    commit(&store, &stop, first.clone()).await;
    drop(store);

    let store = open(&folder);
    let again = plan(Verb::Stop, A, becomes(VmState::Stopped));
    let second = accept(&store, &again, request(Some("r1"), "stop"))
        .await
        .unwrap();
    assert_eq!(second.id, first.id);
    assert_eq!(second.state, OperationState::Done);
    assert_eq!(store.operation(again.id).await.unwrap(), None);
    let repeated = store.repeated(request(Some("r1"), "stop")).await.unwrap();
    assert_eq!(repeated.unwrap().id, first.id);
}

#[tokio::test]
async fn a_request_id_with_another_body_is_refused() {
    let folder = folder();
    let store = open(&folder);
    adopt(&store, A).await;
    let stop = plan(Verb::Stop, A, becomes(VmState::Stopped));
    accept(&store, &stop, request(Some("r1"), "stop"))
        .await
        .unwrap();
    let other = plan(Verb::Start, A, becomes(VmState::Active));
    let refused = accept(&store, &other, request(Some("r1"), "start")).await;
    assert_eq!(reason(refused), Reason::RequestIdReused);
    let refused = store.repeated(request(Some("r1"), "start")).await;
    assert_eq!(reason(refused), Reason::RequestIdReused);
}

#[tokio::test]
async fn of_plans_accepted_at_once_for_one_server_exactly_one_wins() {
    let folder = folder();
    let store = open(&folder);
    adopt(&store, A).await;
    let planned_for = store.server(A);
    let mut tasks = Vec::new();
    for _ in 0..16 {
        let (store, planned_for) = (store.clone(), planned_for.clone());
        tasks.push(tokio::spawn(async move {
            let accept = Accept {
                plan: plan(Verb::Stop, A, becomes(VmState::Stopped)),
                request: request(None, ""),
                planned_for,
                now_ms: 10,
            };
            store.accept(accept).await
        }));
    }
    let mut won = 0;
    for task in tasks {
        match task.await.unwrap() {
            Ok(_) => won += 1,
            refused => assert_eq!(reason(refused), Reason::ServerBusy),
        }
    }
    assert_eq!(won, 1);
    assert_eq!(store.under_way().await.unwrap().len(), 1);
}

#[tokio::test]
async fn a_plan_for_what_is_no_longer_so_is_refused() {
    let folder = folder();
    let store = open(&folder);
    adopt(&store, A).await;
    let planned_for = store.server(A);
    // There and back again: the state is as it was, the host is not.
    done(&store, &plan(Verb::Stop, A, becomes(VmState::Stopped))).await;
    let refused = |store: &Store, planned_for: Option<Arc<ServerRecord>>| {
        let accept = Accept {
            plan: plan(Verb::Stop, A, becomes(VmState::Stopped)),
            request: request(None, ""),
            planned_for,
            now_ms: 10,
        };
        let store = store.clone();
        async move { reason(store.accept(accept).await) }
    };
    assert_eq!(
        refused(&store, planned_for.clone()).await,
        Reason::ServerBusy
    );
    done(&store, &plan(Verb::Start, A, becomes(VmState::Active))).await;
    assert_eq!(store.server(A).unwrap().vm_state, VmState::Active);
    assert_eq!(
        refused(&store, planned_for.clone()).await,
        Reason::ServerBusy
    );
    assert_eq!(refused(&store, None).await, Reason::ServerExists);
    done(&store, &plan(Verb::Release, A, Outcome::Remove)).await;
    assert_eq!(refused(&store, planned_for).await, Reason::ServerNotFound);
}

#[tokio::test]
async fn nothing_new_is_made_before_a_delete_of_the_same_id_has_cleaned_up() {
    let folder = folder();
    let store = open(&folder);
    adopt(&store, A).await;
    let delete = plan(Verb::Delete, A, Outcome::Remove);
    let mut operation = accept(&store, &delete, request(None, "")).await.unwrap();
    operation.state = OperationState::CleaningUp;
    store
        .commit(Arc::clone(&delete), operation.clone(), 20)
        .await
        .unwrap();
    assert_eq!(store.server(A), None);

    let adopt_again = plan(Verb::Adopt, A, Outcome::Insert(Box::new(server(A))));
    let refused = accept(&store, &adopt_again, request(None, "")).await;
    assert_eq!(reason(refused), Reason::ServerBusy);
    operation.state = OperationState::Done;
    store
        .finish(Arc::clone(&delete), operation, 30)
        .await
        .unwrap();
    accept(&store, &adopt_again, request(None, ""))
        .await
        .unwrap();
}

#[tokio::test]
async fn a_domain_is_adopted_once_although_two_ask_for_it_at_once() {
    let folder = folder();
    let store = open(&folder);
    let first = plan(Verb::Adopt, A, Outcome::Insert(Box::new(server(A))));
    let operation = accept(&store, &first, request(None, "")).await.unwrap();
    let second = plan(Verb::Adopt, A, Outcome::Insert(Box::new(server(A))));
    let refused = accept(&store, &second, request(None, "")).await;
    assert_eq!(reason(refused), Reason::ServerBusy);
    commit(&store, &first, operation).await;
    let late = Accept {
        plan: second,
        request: request(None, ""),
        planned_for: None,
        now_ms: 10,
    };
    assert_eq!(reason(store.accept(late).await), Reason::ServerExists);
}

#[tokio::test]
async fn a_saved_definition_is_written_once() {
    let folder = folder();
    let store = open(&folder);
    let (first, second) = (Uuid::new_v4(), Uuid::new_v4());
    let save = |plan, xml: &str| store.save_definition(A, plan, xml.to_owned());
    save(first, "<original/>").await.unwrap();
    save(first, "<changed/>").await.unwrap();
    assert_eq!(
        reason(save(second, "<rescue/>").await),
        Reason::AlreadyRescued
    );
    store.drop_definition(A, Some(second)).await.unwrap();
    let saved = store.saved_definition(A).await.unwrap();
    assert_eq!(saved.as_deref(), Some("<original/>"));
    assert_eq!(store.saved_definitions().await.unwrap(), [(A, first)]);
    store.drop_definition(A, Some(first)).await.unwrap();
    save(second, "<rescue/>").await.unwrap();
    store.drop_definition(A, None).await.unwrap();
    assert_eq!(store.saved_definition(A).await.unwrap(), None);
}

#[tokio::test]
async fn a_store_of_a_newer_agent_is_refused_and_left_alone() {
    let folder = folder();
    let path = folder.path().join("salvor.db");
    drop(open(&folder));
    set_version(&path, 99);
    let refused = Store::open(&path, 1_000);
    assert!(
        matches!(refused, Err(StoreError::Newer { found: 99, .. })),
        "{refused:?}"
    );
}

fn set_version(path: &Path, version: i64) {
    let connection = rusqlite::Connection::open(path).unwrap();
    connection
        .pragma_update(None, "user_version", version)
        .unwrap();
}

#[tokio::test]
async fn two_of_the_operations_that_begin_alike_are_found() {
    let folder = folder();
    let store = open(&folder);
    let ids = [
        uuid::uuid!("aaaa1111-0000-4000-8000-000000000001"),
        uuid::uuid!("aaaa2222-0000-4000-8000-000000000002"),
        uuid::uuid!("aaaaffff-ffff-4000-8000-000000000003"),
        uuid::uuid!("aaab0000-0000-4000-8000-000000000004"),
    ];
    for id in ids {
        let made = server(Uuid::new_v4());
        let plan = plan(Verb::Adopt, made.id, Outcome::Insert(Box::new(made)));
        let plan = Arc::new(Plan {
            id,
            ..Plan::clone(&plan)
        });
        done(&store, &plan).await;
    }
    let beginning = async |word: &str| store.operations_beginning(word.to_owned()).await.unwrap();
    assert_eq!(beginning("aaaa2").await, ids[1..2]);
    assert_eq!(beginning("aaaaf").await, ids[2..3]);
    assert_eq!(beginning("aaaaffff-").await, ids[2..3]);
    assert_eq!(beginning("aaaa").await, ids[..2]);
    assert!(beginning("aaac").await.is_empty());
}

#[tokio::test]
async fn an_image_that_somebody_stands_on_is_not_removed() {
    let folder = folder();
    let store = open(&folder);
    let image = crate::host::BASE;
    let record = crate::host::image(image, "base", ImageFormat::Raw);
    store
        .add_image(record.clone(), Request::default())
        .await
        .unwrap();
    assert_eq!(
        reason(store.add_image(record, Request::default()).await),
        Reason::ImageExists
    );
    let hold = || store.hold_image(image, "servers/a/disk".to_owned());
    hold().await.unwrap();
    hold().await.unwrap();
    let refused = store.remove_image(image, Request::default(), 1).await;
    assert_eq!(reason(refused), Reason::ImageInUse);
    store
        .release_image(image, "servers/a/disk".to_owned())
        .await
        .unwrap();
    store
        .remove_image(image, Request::default(), 1)
        .await
        .unwrap();
    assert!(matches!(
        hold().await,
        Err(StoreError::Missing { what: "image", .. })
    ));
    assert_eq!(
        reason(store.remove_image(image, Request::default(), 1).await),
        Reason::ImageNotFound
    );
    assert!(store.image_holders().await.unwrap().is_empty());
}

#[tokio::test]
async fn what_was_looked_at_since_a_step_is_not_overwritten_by_what_the_step_implies() {
    use salvor_agent::core::plan::{Mark, Phase, PlannedStep, Step};
    let folder = folder();
    let store = open(&folder);
    adopt(&store, A).await;
    let mut start = Plan::clone(&plan(Verb::Start, A, becomes(VmState::Active)));
    start.steps.push(PlannedStep {
        phase: Phase::Switch,
        step: Step::StartDomain {
            mark: Mark::Own,
            fresh: false,
        },
    });
    let start = Arc::new(start);
    let mut operation = accept(&store, &start, request(None, "")).await.unwrap();
    operation.steps[0].ended_at_ms = Some(100);
    // It started, and crashed at once.
    store
        .observe(A, seen(PowerState::Shutdown, 101))
        .await
        .unwrap();
    commit(&store, &start, operation).await;
    assert_eq!(store.server(A).unwrap().power.state, PowerState::Shutdown);
}

#[tokio::test]
async fn an_answer_that_comes_late_does_not_overwrite_a_newer_one() {
    let folder = folder();
    let store = open(&folder);
    adopt(&store, A).await;
    assert!(
        store
            .observe(A, seen(PowerState::Shutdown, 5_000))
            .await
            .unwrap()
    );
    assert!(
        !store
            .observe(A, seen(PowerState::Running, 4_999))
            .await
            .unwrap()
    );
    let record = store.server(A).unwrap();
    assert_eq!(record.power.state, PowerState::Shutdown);
    assert_eq!(record.power.observed_at_ms, 5_000);
    // But a clock that was set back does not make the agent blind.
    store
        .observe(A, seen(PowerState::Running, 5_000_000))
        .await
        .unwrap();
    assert!(
        store
            .observe(A, seen(PowerState::Shutdown, 6_000))
            .await
            .unwrap()
    );
    assert_eq!(store.server(A).unwrap().power.state, PowerState::Shutdown);
}

/// One change of the store.
#[derive(Debug, Clone)]
enum Do {
    Adopt(u8),
    Accept(u8),
    End(u8, bool),
    Observe(u8, bool),
    Release(u8),
    Reopen,
}

fn changes() -> impl Strategy<Value = Vec<Do>> {
    let one = prop_oneof![
        (0u8..3).prop_map(Do::Adopt),
        (0u8..3).prop_map(Do::Accept),
        ((0u8..3), any::<bool>()).prop_map(|(server, well)| Do::End(server, well)),
        ((0u8..3), any::<bool>()).prop_map(|(server, on)| Do::Observe(server, on)),
        (0u8..3).prop_map(Do::Release),
        Just(Do::Reopen),
    ];
    proptest::collection::vec(one, 1..40)
}

/// What the events say of servers.
fn replay(events: &[StoredEvent]) -> BTreeMap<Uuid, ServerRecord> {
    let mut servers = BTreeMap::new();
    for event in events {
        match &event.change {
            Change::Server(record) => {
                assert_eq!(
                    record.revision, event.revision,
                    "a record knows its revision"
                );
                servers.insert(event.server, ServerRecord::clone(record));
            }
            Change::Removed(_) => {
                servers.remove(&event.server);
            }
            Change::Operation(_) | Change::Guest(_) => {}
        }
    }
    servers
}

async fn events_are_the_history(changes: Vec<Do>) {
    let folder = folder();
    let mut store = open(&folder);
    let mut clock = 1_000;
    let mut model: Vec<i64> = Vec::new();
    let mut pending: BTreeMap<Uuid, (Arc<Plan>, OperationRecord)> = BTreeMap::new();
    for change in changes {
        clock += 1;
        let id = |server: u8| Uuid::from_u128(u128::from(server) + 1);
        match change {
            Do::Adopt(server) if store.server(id(server)).is_none() => {
                adopt(&store, id(server)).await;
            }
            Do::Accept(server) if store.server(id(server)).is_some() => {
                let stop = plan(Verb::Stop, id(server), becomes(VmState::Stopped));
                let accepted = accept(&store, &stop, request(None, "")).await;
                assert_eq!(accepted.is_ok(), !pending.contains_key(&id(server)));
                if let Ok(operation) = accepted {
                    pending.insert(id(server), (stop, operation));
                }
            }
            Do::End(server, well) => {
                if let Some((plan, mut operation)) = pending.remove(&id(server)) {
                    if well {
                        commit(&store, &plan, operation).await;
                    } else {
                        operation.state = OperationState::Failed;
                        store
                            .rolled_back(plan, operation, None, clock)
                            .await
                            .unwrap();
                    }
                    let record = store.server(id(server)).unwrap();
                    assert_eq!((record.task_state, record.operation), (None, None));
                }
            }
            Do::Observe(server, on) => {
                let state = if on {
                    PowerState::Running
                } else {
                    PowerState::Shutdown
                };
                store.observe(id(server), seen(state, clock)).await.unwrap();
            }
            Do::Release(server)
                if store.server(id(server)).is_some() && !pending.contains_key(&id(server)) =>
            {
                done(&store, &plan(Verb::Release, id(server), Outcome::Remove)).await;
            }
            Do::Reopen => {
                drop(store);
                store = open(&folder);
            }
            Do::Adopt(_) | Do::Accept(_) | Do::Release(_) => {}
        }
        let newest = *store.revision().borrow();
        model.push(newest);
    }
    assert!(model.is_sorted(), "revisions only grow: {model:?}");
    let page = store.events_after(0, 10_000).await.unwrap();
    let revisions: Vec<i64> = page.events.iter().map(|event| event.revision).collect();
    assert!(revisions.windows(2).all(|pair| pair[0] < pair[1]));
    assert_eq!(page.newest, *model.last().unwrap());
    assert_eq!(revisions.last().copied().unwrap_or(0), page.newest);

    let mut current = BTreeMap::new();
    for (_, record) in store.servers_after(i64::MIN) {
        current.insert(record.id, ServerRecord::clone(&record));
    }
    let mut replayed = replay(&page.events);
    for (id, record) in &mut replayed {
        // The age of an observation that told nothing new is no event.
        if let Some(now) = current.get(id) {
            record.power.observed_at_ms = now.power.observed_at_ms;
            record.power.source = now.power.source;
        }
    }
    assert_eq!(replayed, current);

    // In pieces it is the same.
    let (mut pieces, mut after) = (Vec::new(), 0);
    loop {
        let page = store.events_after(after, 3).await.unwrap();
        let Some(last) = page.events.last() else {
            break;
        };
        after = last.revision;
        pieces.extend(page.events);
    }
    assert_eq!(pieces, page.events);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn replaying_the_events_gives_the_servers(changes in changes()) {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap()
            .block_on(events_are_the_history(changes));
    }
}

#[tokio::test]
async fn a_trimmed_log_keeps_its_newest_revision() {
    let folder = folder();
    let path = folder.path().join("salvor.db");
    let store = Store::open(&path, 10).unwrap();
    adopt(&store, A).await;
    for at in 0..1_200 {
        let state = if at % 2 == 0 {
            PowerState::Paused
        } else {
            PowerState::Running
        };
        store.observe(A, seen(state, at + 100)).await.unwrap();
    }
    let page = store.events_after(0, 10_000).await.unwrap();
    assert!(page.oldest > 1, "it was trimmed");
    assert_eq!(page.events.first().unwrap().revision, page.oldest);
    assert_eq!(page.newest, *store.revision().borrow());
    let newest = page.newest;
    drop(store);

    let store = Store::open(&path, 10).unwrap();
    assert_eq!(*store.revision().borrow(), newest);
    store
        .observe(A, seen(PowerState::Shutdown, 5_000))
        .await
        .unwrap();
    assert_eq!(*store.revision().borrow(), newest + 1);
}

/// What is known of a server while libvirt is away.
async fn last_known(store: &Store, id: Uuid) -> PowerObservation {
    let away = PowerObservation {
        source: ObservationSource::Inferred,
        ..seen(PowerState::Unknown, 9_000_000)
    };
    assert!(store.observe(id, away).await.unwrap());
    store.server(id).unwrap().last_known_power.clone().unwrap()
}

#[tokio::test]
async fn when_a_server_was_seen_last_outlives_the_agent() {
    let folder = folder();
    let (first, second) = (Uuid::new_v4(), Uuid::new_v4());
    let store = open(&folder);
    for id in [first, second] {
        adopt(&store, id).await;
        store
            .observe(id, seen(PowerState::Paused, 1_000_000))
            .await
            .unwrap();
    }
    let newest = *store.revision().borrow();
    store
        .observe(first, seen(PowerState::Paused, 2_000_000))
        .await
        .unwrap();
    assert_eq!(store.save_observations().await.unwrap(), 1);
    assert_eq!(store.save_observations().await.unwrap(), 0);
    // Of a state that is over by the time of the restart, nothing is told.
    store
        .observe(second, seen(PowerState::Paused, 3_000_000))
        .await
        .unwrap();
    assert_eq!(store.save_observations().await.unwrap(), 1);
    assert_eq!(*store.revision().borrow(), newest, "no event");
    store
        .observe(second, seen(PowerState::Running, 4_000_000))
        .await
        .unwrap();
    drop(store);

    let store = open(&folder);
    let seen_first = last_known(&store, first).await;
    assert_eq!(seen_first, seen(PowerState::Paused, 2_000_000));
    let power = &store.server(second).unwrap().power;
    assert_eq!(*power, seen(PowerState::Running, 4_000_000));
}
