// SPDX-License-Identifier: Apache-2.0
//! Times: from when they are counted, and what comes back late.

use std::sync::Arc;

use salvor_agent::{
    core::{
        action::{Action, Verb},
        image::{ImageFormat, ImageRecord},
        operation::OperationState,
        reason::Reason,
        state::{PowerState, VmState},
    },
    engine::{NoProbe, Point},
    hypervisor::Hypervisor as _,
};
use uuid::Uuid;

use crate::{
    dispatch::with_server,
    gate::{Gate, until},
    host::{Agent, BASE, Host, ON, RESCUE, SERVER, anonymous, rescue, rescue_action, unrescue},
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

#[tokio::test]
async fn the_file_of_an_image_that_a_crash_left_without_a_record_goes_at_the_next_start() {
    let host = Host::new();
    let first = host.agent(Arc::new(NoProbe)).await;
    host.add_images(&first.store).await;
    let path = |id, format| host.layout().image(id, format);
    // Died between the record and the file of an image that was deleted,
    first
        .store
        .remove_image(BASE, anonymous(), 1)
        .await
        .unwrap();
    // between the file and the record of one that was imported,
    let imported = Uuid::from_u128(1);
    first.store.note_image_file(imported).await.unwrap();
    std::fs::write(path(imported, ImageFormat::Qcow2), "").unwrap();
    // and before the file of another. What a lost store knew is not ours to remove.
    let never = Uuid::from_u128(2);
    first.store.note_image_file(never).await.unwrap();
    let unknown = path(Uuid::from_u128(3), ImageFormat::Raw);
    std::fs::write(&unknown, "").unwrap();
    drop(first);

    let agent = host.agent(Arc::new(NoProbe)).await;
    let gone = [
        path(imported, ImageFormat::Qcow2),
        path(BASE, ImageFormat::Raw),
    ];
    assert_eq!(agent.swept, gone);
    for path in gone {
        assert!(!std::fs::exists(path).unwrap());
    }
    for path in [unknown, path(RESCUE, ImageFormat::Raw)] {
        assert!(std::fs::exists(path).unwrap());
    }
    let noted = agent.store.image_files_without_record().await.unwrap();
    assert_eq!(noted, Vec::<Uuid>::new());
}

#[tokio::test]
async fn an_unrescue_removes_the_files_of_its_own_rescue_only() {
    let host = Host::new();
    let agent = with_server(&host, Arc::new(NoProbe)).await;
    agent.succeed(ON, rescue_action()).await;
    let own = agent.record().rescue.as_ref().unwrap().plan;
    let other = host.layout().rescue(SERVER, Uuid::from_u128(1));
    std::fs::create_dir_all(&other).unwrap();
    agent.succeed(ON, Action::Unrescue(unrescue())).await;
    assert!(std::fs::exists(other).unwrap());
    assert!(!std::fs::exists(host.layout().rescue(SERVER, own)).unwrap());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_guest_that_is_off_while_the_journal_cannot_be_written_comes_back_when_it_can() {
    let host = Host::new();
    let plan_of = with_server(&host, Arc::new(NoProbe)).await;
    let plan = plan_of.plan(ON, &rescue_action()).await;
    let kinds = plan.steps.iter().map(|planned| planned.step.kind());
    let off = kinds.take_while(|kind| *kind != "PowerOff").count();
    drop(plan_of);
    let gate = Gate::new(Verb::Rescue, Point::AfterStep(off));
    let agent = host.agent(Arc::clone(&gate) as _).await;
    let writable = || *agent.store.writable().borrow();
    let rescue = agent.submit(ON, rescue_action()).await.unwrap().operation;
    gate.reached().await;
    let other = rusqlite::Connection::open(host.database()).unwrap();
    other
        .execute_batch(
            "CREATE TRIGGER full BEFORE UPDATE ON operations BEGIN SELECT RAISE(ABORT, 'full'); END",
        )
        .unwrap();
    gate.open();
    until("it is noticed", || !writable()).await;
    let power = async || agent.fake.domain(SERVER).await.unwrap().unwrap().power;
    assert_eq!(power().await, PowerState::Shutdown);
    assert_eq!(agent.record().operation, Some(rescue.id));
    other.execute_batch("DROP TRIGGER full").unwrap();
    assert_eq!(agent.ended(rescue.id).await.state, OperationState::Done);
    assert!(writable());
    assert_eq!(power().await, PowerState::Running);
    assert_eq!(agent.record().vm_state, VmState::Rescued);
}

/// The record of the rescue image.
async fn rescue_image(agent: &Agent) -> ImageRecord {
    agent.store.image(RESCUE).await.unwrap().unwrap()
}

#[tokio::test]
async fn the_file_of_an_image_is_read_again_only_if_it_was_touched() {
    let host = Host::new();
    let agent = with_server(&host, Arc::new(NoProbe)).await;
    let hold = async || {
        let rescue = agent.carry_out(ON, rescue_action()).await;
        agent.succeed(ON, Action::Unrescue(unrescue())).await;
        let hold = rescue
            .steps
            .into_iter()
            .find(|step| step.kind == "HoldImage");
        hold.unwrap().message
    };
    assert_eq!(rescue_image(&agent).await.file, None, "an older record");
    assert!(hold().await.contains("touched"));
    let noted = rescue_image(&agent).await.file;
    assert!(noted.is_some());
    assert_eq!(hold().await, "");
    let path = host.layout().image(RESCUE, ImageFormat::Raw);
    std::fs::copy(&path, format!("{path}.copy")).unwrap();
    std::fs::rename(format!("{path}.copy"), &path).unwrap();
    assert!(hold().await.contains("touched"));
    assert_ne!(rescue_image(&agent).await.file, noted);
    assert_eq!(hold().await, "");
}

#[tokio::test]
async fn an_image_that_is_not_what_was_imported_any_more_leaves_the_guest_untouched() {
    let host = Host::new();
    let agent = with_server(&host, Arc::new(NoProbe)).await;
    agent.fake.clear_calls();
    let path = host.layout().image(RESCUE, ImageFormat::Raw);
    let mut content = std::fs::read(&path).unwrap();
    content[70_000] ^= 1;
    std::fs::write(&path, &content).unwrap();
    let before = host.look(&agent).await;
    let rescue = agent.carry_out(ON, rescue_action()).await;
    assert_eq!(rescue.state, OperationState::Failed);
    let error = rescue.error.unwrap();
    assert_eq!(error.reason, Reason::ImageDamaged, "{error}");
    assert_eq!(
        before.differences(&host.look(&agent).await),
        Vec::<String>::new()
    );
    // What its header shows is refused when it is asked for.
    content[..4].copy_from_slice(b"QFI\xfb");
    std::fs::write(&path, content).unwrap();
    let refusal = agent.submit(ON, rescue_action()).await.unwrap_err();
    assert_eq!(refusal.reason, Reason::ImageDamaged, "{refusal}");
    let changing = ["shutdown", "destroy", "define", "start"];
    let calls = agent.fake.calls();
    let changed = calls
        .iter()
        .find(|call| changing.iter().any(|name| call.starts_with(name)));
    assert_eq!(changed, None);
}
