// SPDX-License-Identifier: Apache-2.0
//! Disks under overlays whose headers somebody changes.

use std::{path::PathBuf, sync::Arc};

use salvor_agent::{
    core::{
        action::{Action, UnrescueArgs, Verb},
        operation::OperationState,
        plan::{Plan, Step},
        reason::Reason,
        record::{OverlayDisposition, Protection},
        state::VmState,
    },
    engine::{NoProbe, Point, Probe},
    hypervisor::{Boot, Hypervisor as _},
};

use crate::{
    gate::Gate,
    host::{Agent, Host, NEW, ON, SERVER, adopt, qemu, rescue, unrescue},
};

async fn with_server(host: &Host, probe: Arc<dyn Probe>) -> Agent {
    let agent = host.agent(probe).await;
    host.add_images(&agent.store).await;
    host.fake.define(&host.foreign_domain(false)).await.unwrap();
    host.fake.start(SERVER, Boot::Resume).await.unwrap();
    agent.succeed(NEW, adopt()).await;
    agent
}

fn overlays() -> Action {
    let mut args = rescue();
    args.protection = Protection::Overlay;
    Action::Rescue(Box::new(args))
}

fn back(overlay: OverlayDisposition) -> Action {
    Action::Unrescue(UnrescueArgs {
        overlay: Some(overlay),
        ..unrescue()
    })
}

/// The adopted server's qcow2.
fn data(host: &Host) -> PathBuf {
    host.outside().join("data.qcow2")
}

/// Has the disk stand on another file, or on none.
fn rebase(host: &Host, backing: &str) {
    let data = data(host);
    let data = data.to_str().unwrap();
    qemu(
        "qemu-img",
        &[
            "rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", backing, data,
        ],
    );
}

fn step(plan: &Plan, wanted: impl Fn(&Step) -> bool) -> usize {
    let found = plan.steps.iter().position(|planned| wanted(&planned.step));
    found.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn an_overlay_is_not_made_on_a_disk_that_names_another_file_than_when_it_was_planned() {
    let host = Host::new();
    let agent = with_server(&host, Arc::new(NoProbe)).await;
    let plan = agent.plan(ON, &overlays()).await;
    let on_data = |step: &Step| matches!(step, Step::CreateOverlay { backing, .. } if backing.ends_with("data.qcow2"));
    let index = step(&plan, on_data);
    drop(agent);

    let gate = Gate::new(Verb::Rescue, Point::BeforeStep(index));
    let agent = host.agent(Arc::clone(&gate) as _).await;
    let before = host.look(&agent).await;
    let rescue = agent.submit(ON, overlays()).await.unwrap();
    gate.reached().await;
    rebase(&host, "/etc/shadow");
    gate.open();
    let operation = agent.ended(rescue.operation.id).await;
    assert_eq!(operation.state, OperationState::Failed);
    let error = operation.error.unwrap();
    assert_eq!(error.reason, Reason::DiskChanged);
    assert!(error.message.contains("/etc/shadow"), "{error}");
    rebase(&host, "");
    let after = host.look(&agent).await;
    assert_eq!(before.inactive, after.inactive);
    assert_eq!((before.live, before.power), (after.live, after.power));
    assert_eq!(agent.record().vm_state, VmState::Active);
    agent.succeed(ON, overlays()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn an_overlay_is_not_committed_to_a_disk_that_names_another_file_than_before() {
    let host = Host::new();
    let agent = with_server(&host, Arc::new(NoProbe)).await;
    agent.succeed(ON, overlays()).await;
    let commit = back(OverlayDisposition::Commit);
    let plan = agent.plan(ON, &commit).await;
    let last = |step: &Step| matches!(step, Step::CommitOverlay { base, .. } if base.ends_with("data.qcow2"));
    let index = step(&plan, last);
    let before = host.look(&agent).await;
    rebase(&host, "/etc/shadow");
    let refusal = agent.submit(ON, commit.clone()).await.unwrap_err();
    assert_eq!(refusal.reason, Reason::DiskChanged);
    assert!(refusal.message.contains("/etc/shadow"), "{refusal}");
    let after = host.look(&agent).await;
    assert_eq!(
        (&before.inactive, &before.live),
        (&after.inactive, &after.live)
    );
    // What is discarded follows nothing.
    agent.plan(ON, &back(OverlayDisposition::Discard)).await;
    rebase(&host, "");
    drop(agent);

    // At the last moment.
    let gate = Gate::new(Verb::Unrescue, Point::BeforeStep(index));
    let agent = host.agent(Arc::clone(&gate) as _).await;
    let unrescue = agent.submit(ON, commit.clone()).await.unwrap();
    gate.reached().await;
    rebase(&host, "/etc/shadow");
    gate.open();
    let operation = agent.ended(unrescue.operation.id).await;
    assert_eq!(operation.error.unwrap().reason, Reason::DiskChanged);
    assert_eq!(agent.record().vm_state, VmState::Rescued);
    rebase(&host, "");
    agent.succeed(ON, commit).await;
    assert_eq!(agent.record().vm_state, VmState::Active);
}
