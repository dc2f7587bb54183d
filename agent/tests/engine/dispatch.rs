// SPDX-License-Identifier: Apache-2.0
//! From the edge to the journal: what is refused, what overtakes, and what happens to a caller that
//! does not wait.

use std::{sync::Arc, time::Duration};

use salvor_agent::{
    core::{
        action::{Action, Shutdown, Verb},
        caller::Who,
        operation::OperationState,
        plan::{PlannedStep, Step},
        reason::Reason,
        state::{PowerState, TaskState, VmState},
    },
    engine::{NoProbe, Point, Probe},
    hypervisor::{Boot, Hypervisor as _, HypervisorError, StuckCall},
    store::Request,
};

use crate::{
    gate::{Gate, stays, until},
    host::{
        AT_ONCE, Agent, BASE, Host, NEW, ON, PATIENCE, SERVER, adopt, anonymous, create,
        rescue_action, unrescue,
    },
};

/// Long enough for a test to do something meanwhile.
const LONG: Shutdown = Shutdown {
    timeout_ms: 20_000,
    retry_ms: 10_000,
};

async fn agent(host: &Host, probe: Arc<dyn Probe>) -> Agent {
    let agent = host.agent(probe).await;
    host.add_images(&agent.store).await;
    agent
}

/// An agent with an adopted server that runs.
pub(crate) async fn with_server(host: &Host, probe: Arc<dyn Probe>) -> Agent {
    let agent = agent(host, probe).await;
    host.define(&host.foreign_domain(false)).await;
    host.fake.start(SERVER, Boot::Resume).await.unwrap();
    agent.succeed(NEW, adopt()).await;
    agent
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_busy_server_is_refused_and_the_refusal_names_the_operation() {
    let host = Host::new();
    let gate = Gate::new(Verb::Stop, Point::BeforeStep(0));
    let agent = with_server(&host, Arc::clone(&gate) as _).await;
    let stop = agent.submit(ON, Action::Stop(AT_ONCE)).await.unwrap();
    gate.reached().await;
    for action in [
        Action::Stop(AT_ONCE),
        rescue_action(),
        Action::Release,
        Action::DeliverPassword,
    ] {
        let refusal = agent.submit(ON, action).await.unwrap_err();
        assert_eq!(refusal.reason, Reason::ServerBusy);
        let name = format!("operations/{}", stop.operation.id);
        assert!(refusal.message.contains(&name), "{refusal}");
        assert!(refusal.message.contains("powering-off"), "{refusal}");
    }
    gate.open();
    let stop = agent.ended(stop.operation.id).await;
    assert_eq!(stop.state, OperationState::Done);
    agent.succeed(ON, Action::Start).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_delete_overtakes_a_stop_and_a_rescue() {
    for action in [Action::Stop(LONG), rescue_action()] {
        let host = Host::new();
        let agent = with_server(&host, Arc::new(NoProbe)).await;
        let action = match action {
            Action::Rescue(mut args) => {
                args.shutdown = LONG;
                Action::Rescue(args)
            }
            action => action,
        };
        host.fake.guest_ignores_acpi(SERVER);
        let overtaken = agent.submit(ON, action).await.unwrap().operation.id;
        let asked = || {
            host.fake
                .calls()
                .iter()
                .any(|call| call.starts_with("shutdown"))
        };
        until("the guest is asked", asked).await;
        agent.succeed(ON, Action::Delete).await;
        let overtaken = agent.ended(overtaken).await;
        assert_eq!(overtaken.state, OperationState::Cancelled);
        let seen = host.look(&agent).await;
        assert_eq!((seen.record, seen.power), (None, None));
        assert!(seen.holders.is_empty() && seen.saved.is_none());
        assert!(
            !seen
                .files
                .keys()
                .any(|name| name.contains(&SERVER.to_string()))
        );
        assert!(seen.files.contains_key("outside/root.raw"));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_delete_overtakes_a_create_and_nothing_is_left_to_delete() {
    let host = Host::new();
    let gate = Gate::new(Verb::Create, Point::BeforeStep(2));
    let agent = agent(&host, Arc::clone(&gate) as _).await;
    let before = host.look(&agent).await;
    let made = agent.submit(NEW, create(false)).await.unwrap().operation.id;
    gate.reached().await;
    let dispatcher = agent.dispatcher.clone();
    let delete =
        tokio::spawn(async move { dispatcher.submit(ON, Action::Delete, anonymous()).await });
    let cancelled = || {
        let view = agent.engine.watch(made).map(|view| view.borrow().clone());
        view.is_none_or(|view| view.operation.cancel_requested)
    };
    gate.open();
    until("the create is cancelled", cancelled).await;
    let refusal = delete.await.unwrap().unwrap_err();
    assert_eq!(refusal.reason, Reason::ServerNotFound);
    assert!(refusal.message.contains("is gone"), "{refusal}");
    assert_eq!(agent.ended(made).await.state, OperationState::Cancelled);
    assert_eq!(
        host.look(&agent).await.differences(&before),
        Vec::<String>::new()
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_delete_does_not_overtake_a_delete() {
    let host = Host::new();
    let gate = Gate::new(Verb::Delete, Point::BeforeStep(1));
    let agent = with_server(&host, Arc::clone(&gate) as _).await;
    let first = agent.submit(ON, Action::Delete).await.unwrap().operation.id;
    gate.reached().await;
    let refusal = agent.submit(ON, Action::Delete).await.unwrap_err();
    assert_eq!(refusal.reason, Reason::ServerBusy);
    gate.open();
    assert_eq!(agent.ended(first).await.state, OperationState::Done);
    let refusal = agent.submit(ON, Action::Delete).await.unwrap_err();
    assert_eq!(refusal.reason, Reason::ServerNotFound);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_the_agent_does_of_its_own_stands_in_nobodys_way() {
    let host = Host::new();
    let gate = Gate::new(Verb::DeliverPassword, Point::BeforeStep(0));
    let agent = with_server(&host, Arc::clone(&gate) as _).await;
    agent.succeed(ON, rescue_action()).await;
    host.fake.guest_agent(SERVER, true);
    let delivery = agent.submit(ON, Action::DeliverPassword).await.unwrap();
    gate.reached().await;
    assert_eq!(agent.record().task_state, Some(TaskState::UpdatingPassword));
    let dispatcher = agent.dispatcher.clone();
    let unrescue = tokio::spawn(async move {
        dispatcher
            .submit(ON, Action::Unrescue(unrescue()), anonymous())
            .await
    });
    let id = delivery.operation.id;
    gate.open();
    let unrescue = unrescue.await.unwrap().unwrap();
    assert_eq!(
        agent.ended(unrescue.operation.id).await.state,
        OperationState::Done
    );
    assert!(agent.ended(id).await.state.is_final());
    assert_eq!(agent.record().vm_state, VmState::Active);
}

#[tokio::test]
async fn an_agent_that_drains_takes_no_new_work_but_knows_the_old() {
    let host = Host::new();
    let agent = with_server(&host, Arc::new(NoProbe)).await;
    let request = Request {
        id: Some("once".to_owned()),
        ..anonymous()
    };
    let stop = || {
        agent
            .dispatcher
            .submit(ON, Action::Stop(AT_ONCE), request.clone())
    };
    let first = stop().await.unwrap();
    assert!(first.plan.is_some());
    agent.ended(first.operation.id).await;
    agent.draining.send_replace(true);
    let refusal = agent.submit(ON, Action::Start).await.unwrap_err();
    assert_eq!(refusal.reason, Reason::Draining);
    let repeated = stop().await.unwrap();
    assert_eq!(repeated.operation.id, first.operation.id);
    assert!(repeated.plan.is_none());
    let at_rest = agent.engine.at_rest();
    tokio::time::timeout(Duration::from_secs(5), at_rest)
        .await
        .unwrap();
}

#[tokio::test]
async fn what_libvirt_would_not_take_is_refused_before_anything_is_touched() {
    let host = Host::new();
    let agent = with_server(&host, Arc::new(NoProbe)).await;
    let before = host.look(&agent).await;
    let operations = agent.store.operations(None, i64::MAX, 100).await.unwrap();
    let no = HypervisorError::Refused {
        call: "virDomainDefineXML",
        message: "unsupported configuration".to_owned(),
    };
    host.fake.fail_next("validate", no);
    let refusal = agent.submit(ON, rescue_action()).await.unwrap_err();
    assert_eq!(refusal.reason, Reason::DomainInvalid);
    assert!(refusal.message.contains("unsupported configuration"));
    assert_eq!(host.look(&agent).await, before);
    let after = agent.store.operations(None, i64::MAX, 100).await.unwrap();
    assert_eq!(after, operations);
}

#[tokio::test]
async fn a_dry_run_changes_nothing() {
    let host = Host::new();
    let agent = with_server(&host, Arc::new(NoProbe)).await;
    agent.succeed(ON, rescue_action()).await;
    let before = host.look(&agent).await;
    let revision = *agent.store.revision().borrow();
    host.fake.clear_calls();
    for action in [Action::Unrescue(unrescue()), Action::Delete] {
        let preview = agent
            .dispatcher
            .preview(ON, &action, &Who::default())
            .await
            .unwrap();
        assert!(!preview.plan.steps.is_empty());
        assert!(
            preview.domain_diff.contains("--- before"),
            "{}",
            preview.domain_diff
        );
    }
    let new = uuid::Uuid::from_u128(77);
    let Action::Create(mut args) = create(false) else {
        panic!("create is a create");
    };
    args.id = new;
    let preview = agent
        .dispatcher
        .preview(
            salvor_agent::dispatch::Target::New(new),
            &Action::Create(args),
            &Who::default(),
        )
        .await
        .unwrap();
    assert_eq!(preview.refusal, None);
    let reads = ["domain ", "domain_xml", "validate", "capacity"];
    for call in host.fake.calls() {
        assert!(reads.iter().any(|read| call.starts_with(read)), "{call}");
    }
    assert_eq!(host.look(&agent).await, before);
    assert_eq!(*agent.store.revision().borrow(), revision);
}

#[tokio::test]
async fn a_second_rescue_is_refused_and_does_no_harm() {
    let host = Host::new();
    let agent = with_server(&host, Arc::new(NoProbe)).await;
    agent.succeed(ON, rescue_action()).await;
    let before = host.look(&agent).await;
    let refusal = agent.submit(ON, rescue_action()).await.unwrap_err();
    assert_eq!(refusal.reason, Reason::AlreadyRescued);
    assert_eq!(host.look(&agent).await, before);
    agent.succeed(ON, Action::Unrescue(unrescue())).await;
    agent.succeed(ON, rescue_action()).await;
}

#[tokio::test]
async fn a_caller_that_goes_away_leaves_no_server_busy() {
    let host = Host::new();
    let agent = with_server(&host, Arc::new(NoProbe)).await;
    let mut answered = 0;
    for polls in 0..80 {
        let action = if agent.record().vm_state == VmState::Active {
            Action::Stop(AT_ONCE)
        } else {
            Action::Start
        };
        tokio::select! {
            biased;
            submitted = agent.submit(ON, action) => match submitted {
                Ok(_) => answered += 1,
                // What an earlier caller asked for has only now begun, or ended.
                Err(refusal) => {
                    let late = [Reason::ServerBusy, Reason::InvalidState];
                    assert!(late.contains(&refusal.reason), "{refusal}");
                }
            },
            () = async { for _ in 0..polls { tokio::task::yield_now().await; } } => {}
        }
        let free = || agent.record().operation.is_none() && agent.engine.under_way() == 0;
        until("nothing is under way", free).await;
    }
    let deadline = tokio::time::Instant::now() + PATIENCE;
    while !agent.store.under_way().await.unwrap().is_empty() {
        assert!(
            tokio::time::Instant::now() < deadline,
            "an operation is stuck"
        );
    }
    assert_eq!(agent.record().operation, None);
    let operations = agent
        .store
        .operations(Some(SERVER), i64::MAX, 1_000)
        .await
        .unwrap();
    // Some were accepted although their callers did not wait for that.
    assert!(operations.len() > answered, "{answered}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_journal_that_cannot_be_written_is_tried_again() {
    let host = Host::new();
    let gate = Gate::new(Verb::Stop, Point::AfterStep(0));
    let agent = with_server(&host, Arc::clone(&gate) as _).await;
    let stop = agent
        .submit(ON, Action::Stop(AT_ONCE))
        .await
        .unwrap()
        .operation
        .id;
    gate.reached().await;
    let other = rusqlite::Connection::open(host.database()).unwrap();
    other
        .execute_batch(
            "CREATE TRIGGER full BEFORE UPDATE ON operations BEGIN SELECT RAISE(ABORT, 'full'); END",
        )
        .unwrap();
    gate.open();
    // The commit has failed by now, or will before the trigger is gone; either way it ends.
    let failed = || agent.record().vm_state == VmState::Active;
    crate::gate::stays("the outcome does not stand", failed).await;
    assert_eq!(agent.record().operation, Some(stop));
    other.execute_batch("DROP TRIGGER full").unwrap();
    assert_eq!(agent.ended(stop).await.state, OperationState::Done);
    let record = agent.record();
    assert_eq!(
        (record.vm_state, record.operation),
        (VmState::Stopped, None)
    );
    assert_eq!(record.power.state, PowerState::Shutdown);
}

#[tokio::test]
async fn a_leftover_of_a_rescue_that_is_over_is_swept_and_hinders_no_other() {
    let host = Host::new();
    let first = with_server(&host, Arc::new(NoProbe)).await;
    let old = first.carry_out(ON, rescue_action()).await.id;
    first.succeed(ON, Action::Unrescue(unrescue())).await;
    first
        .store
        .save_definition(SERVER, old, "<old/>".to_owned())
        .await
        .unwrap();
    let folder = host.layout().rescue(SERVER, old);
    std::fs::create_dir_all(&folder).unwrap();
    // Of a rescue that a store put back from a backup would not know: not the agent's to remove.
    let unknown = host.layout().rescue(SERVER, uuid::Uuid::new_v4());
    std::fs::create_dir_all(&unknown).unwrap();
    let holder = format!("servers/{SERVER}/rescue/{old}");
    first
        .store
        .hold_image(crate::host::BASE, holder)
        .await
        .unwrap();
    drop(first);

    let agent = host.agent(Arc::new(NoProbe)).await;
    assert_eq!(agent.swept, [folder]);
    assert!(std::path::Path::new(&unknown).exists());
    assert!(agent.store.image_holders().await.unwrap().is_empty());
    agent.succeed(ON, rescue_action()).await;
}

#[tokio::test]
async fn a_rescue_that_cannot_be_taken_back_says_what_is_left_and_unrescue_gets_it_out() {
    let host = Host::new();
    let agent = with_server(&host, Arc::new(NoProbe)).await;
    let original = host.look(&agent).await;
    let no = |message: &str| HypervisorError::Refused {
        call: "virDomainDefineXML",
        message: message.to_owned(),
    };
    // The definition is changed, but libvirt says it is not; and then it does not take the old one.
    host.fake.lose_next_answer("define", no("out of memory"));
    host.fake.fail_next("define", no("still out of memory"));
    let operation = agent.carry_out(ON, rescue_action()).await;
    assert_eq!(operation.state, OperationState::Failed);
    assert_eq!(operation.error.unwrap().reason, Reason::RollbackFailed);
    let record = agent.record();
    assert_eq!((record.vm_state, record.task_state), (VmState::Error, None));
    let fault = record.fault.clone().unwrap();
    assert_eq!(
        (fault.step.as_str(), fault.revert_step.as_str()),
        ("DefineDomain", "DefineDomain")
    );
    assert!(
        fault.message.contains("out of memory") && fault.message.contains("still out of memory")
    );
    assert!(
        fault
            .left_behind
            .iter()
            .any(|left| left.contains("define the domain")),
        "{fault:?}"
    );
    assert!(
        fault
            .left_behind
            .iter()
            .any(|left| left.contains("shut the guest down")),
        "{fault:?}"
    );
    // Neither of these could be done without harm.
    for action in [rescue_action(), Action::Stop(AT_ONCE), Action::Release] {
        agent.submit(ON, action).await.unwrap_err();
    }
    agent.succeed(ON, Action::Unrescue(unrescue())).await;
    let seen = host.look(&agent).await;
    assert_eq!(seen.inactive, original.inactive);
    assert_eq!(seen.live, original.live);
    assert_eq!(seen.files, original.files);
    assert_eq!((seen.saved, seen.holders), (None, Vec::new()));
    let record = agent.record();
    assert_eq!(
        (record.vm_state, &record.fault, &record.rescue),
        (VmState::Active, &None, &None)
    );
}

#[tokio::test]
async fn a_definition_that_was_not_changed_is_not_written_again() {
    let host = Host::new();
    let agent = with_server(&host, Arc::new(NoProbe)).await;
    let before = host.look(&agent).await;
    host.fake.clear_calls();
    let no = HypervisorError::Refused {
        call: "virDomainDefineXML",
        message: "no".to_owned(),
    };
    host.fake.fail_next("define", no);
    let operation = agent.carry_out(ON, rescue_action()).await;
    assert_eq!(operation.error.unwrap().reason, Reason::LibvirtRefused);
    let calls = host.fake.calls();
    let defines = calls
        .iter()
        .filter(|call| call.starts_with("define"))
        .count();
    assert_eq!(defines, 1, "{calls:?}");
    assert_eq!(
        host.look(&agent).await.differences(&before),
        Vec::<String>::new()
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_disk_attached_to_the_running_guest_only_keeps_a_rescue_from_losing_it() {
    let host = Host::new();
    let agent = with_server(&host, Arc::new(NoProbe)).await;
    let whole = host.foreign_domain(false);
    let from = whole.find("<disk type='file' device='disk'><driver name='qemu' type='qcow2'/>");
    let from = from.unwrap();
    let to = from + whole[from..].find('\n').unwrap();
    // The guest runs with vdb, the definition is without.
    let without = format!("{}{}", &whole[..from], &whole[to..]);
    host.fake.define(&without).await.unwrap();
    let refusal = agent.submit(ON, rescue_action()).await.unwrap_err();
    assert_eq!(refusal.reason, Reason::DomainUnsupported);
    assert!(refusal.message.contains("disk vdb"), "{refusal}");
    host.fake.define(&whole).await.unwrap();
    agent.succeed(ON, rescue_action()).await;
}

#[tokio::test]
async fn a_call_that_missed_its_deadline_does_not_take_effect_after_the_roll_back() {
    let host = Host::new();
    let agent = with_server(&host, Arc::new(NoProbe)).await;
    let before = host.look(&agent).await;
    let stuck = |domain| StuckCall {
        call: "virDomainDefineXML",
        domain: Some(domain),
        age: Duration::from_secs(31),
    };
    let late = HypervisorError::Deadline {
        call: "virDomainDefineXML",
        after: Duration::from_secs(30),
    };
    host.fake.set_stuck_calls(vec![stuck(SERVER)]);
    host.fake.fail_next("define", late);
    let rescue = agent.submit(ON, rescue_action()).await.unwrap();
    let id = rescue.operation.id;
    let state = || {
        let view = agent.engine.watch(id);
        view.map(|view| view.borrow().operation.state)
    };
    until("the define is too late", || {
        state() == Some(OperationState::Reverting)
    })
    .await;
    stays("it waits", || state() == Some(OperationState::Reverting)).await;
    // Now libvirt does what it was asked for, and the call is over.
    let plan = rescue.plan.unwrap();
    let define = |planned: &PlannedStep| match &planned.step {
        Step::DefineDomain { xml, .. } => Some(xml.clone()),
        _ => None,
    };
    let changed = plan.steps.iter().find_map(define).unwrap();
    host.fake.define(&changed).await.unwrap();
    // That of another server is of no concern.
    host.fake.set_stuck_calls(vec![stuck(BASE)]);
    let operation = agent.ended(id).await;
    assert_eq!(operation.error.unwrap().reason, Reason::DeadlineExceeded);
    let after = host.look(&agent).await;
    assert_eq!(before.differences(&after), Vec::<String>::new());
}

#[tokio::test]
async fn a_fault_names_the_step_that_failed_and_the_one_that_could_not_be_taken_back() {
    let host = Host::new();
    let agent = with_server(&host, Arc::new(NoProbe)).await;
    let no = |call: &'static str| HypervisorError::Refused {
        call,
        message: "no".to_owned(),
    };
    host.fake.fail_next("define", no("virDomainDefineXML"));
    host.fake.fail_next("start", no("virDomainCreate"));
    let operation = agent.carry_out(ON, rescue_action()).await;
    assert_eq!(operation.state, OperationState::Failed);
    let fault = agent.record().fault.clone().unwrap();
    assert_eq!(
        (fault.step.as_str(), fault.revert_step.as_str()),
        ("DefineDomain", "PowerOff")
    );
}
