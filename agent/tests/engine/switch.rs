// SPDX-License-Identifier: Apache-2.0
//! What somebody else does to a domain while it is rescued, or while it is being switched.

use std::{path::Path, sync::Arc};

use salvor_agent::{
    core::{
        action::{Action, UnrescueArgs, Verb},
        operation::OperationState,
        reason::{Reason, WarningName},
        record::{OverlayDisposition, Protection},
        state::{PowerState, VmState},
    },
    engine::{NoProbe, Point, Probe},
    hypervisor::{Boot, Definition, Hypervisor as _, HypervisorError},
};

use crate::{
    crash::{FAIL, Plot},
    gate::Gate,
    host::{
        AT_ONCE, Agent, BASE, Host, NEW, ON, SERVER, adopt, qemu_io, rescue, rescue_action,
        unrescue,
    },
};

/// An agent with an adopted server that runs.
async fn with_server(host: &Host, probe: Arc<dyn Probe>) -> Agent {
    let agent = host.agent(probe).await;
    host.add_images(&agent.store).await;
    host.define(&host.foreign_domain(false)).await;
    host.fake.start(SERVER, Boot::Resume).await.unwrap();
    agent.succeed(NEW, adopt()).await;
    agent
}

#[tokio::test]
async fn memory_saved_of_a_rescue_does_not_come_back_as_the_server() {
    let host = Host::new();
    let agent = with_server(&host, Arc::new(NoProbe)).await;
    let original = host.look(&agent).await;
    agent.succeed(ON, rescue_action()).await;
    host.fake.managed_save(SERVER);
    agent.succeed(ON, Action::Unrescue(unrescue())).await;
    let seen = host.look(&agent).await;
    assert_eq!(seen.live, original.live);
    assert_eq!(seen.inactive, original.inactive);
}

#[tokio::test]
async fn what_a_server_wrote_survives_the_commit_of_an_overlay_that_was_to_be_discarded() {
    let host = Host::new();
    let agent = with_server(&host, Arc::new(NoProbe)).await;
    let mut args = rescue();
    args.protection = Protection::Overlay;
    agent.succeed(ON, Action::Rescue(Box::new(args))).await;
    let overlays = agent.record().rescue.clone().unwrap().overlays;
    for overlay in &overlays {
        qemu_io(Path::new(&overlay.path), "qcow2", "write -q -P 0x77 64k 4k");
    }
    drop(agent);
    let agent = host.agent(Plot::new(&[(Point::BeforeCommit, FAIL)])).await;
    let ends = |overlay| {
        Action::Unrescue(UnrescueArgs {
            overlay: Some(overlay),
            ..unrescue()
        })
    };
    let operation = agent.carry_out(ON, ends(OverlayDisposition::Discard)).await;
    assert_eq!(operation.state, OperationState::Failed);
    assert_eq!(agent.record().vm_state, VmState::Rescued);
    // The server ran in between, and wrote where the rescue had written.
    for overlay in &overlays {
        let base = Path::new(&overlay.base);
        qemu_io(base, &overlay.base_format, "write -q -P 0x11 64k 4k");
    }
    agent.succeed(ON, ends(OverlayDisposition::Commit)).await;
    for overlay in &overlays {
        let base = Path::new(&overlay.base);
        qemu_io(base, &overlay.base_format, "read -q -P 0x11 64k 4k");
    }
}

#[tokio::test]
async fn memory_saved_of_a_rescue_does_not_outlast_it_where_the_server_stays_off() {
    let host = Host::new();
    let agent = with_server(&host, Arc::new(NoProbe)).await;
    let original = host.look(&agent).await;
    agent.succeed(ON, Action::Stop(AT_ONCE)).await;
    agent.succeed(ON, rescue_action()).await;
    host.fake.managed_save(SERVER);
    let mut back = unrescue();
    back.restore_power = true;
    agent.succeed(ON, Action::Unrescue(back)).await;
    let status = host.fake.domain(SERVER).await.unwrap().unwrap();
    assert!(!status.managed_save, "{status:?}");
    assert_eq!(status.power, PowerState::Shutdown);
    // The next start is the server's own, and the next rescue is not refused for it.
    agent.plan(ON, &rescue_action()).await;
    agent.succeed(ON, Action::Start).await;
    assert_eq!(host.look(&agent).await.live, original.live);
}

#[tokio::test]
async fn memory_saved_of_a_server_comes_back_when_it_is_started() {
    let host = Host::new();
    let agent = with_server(&host, Arc::new(NoProbe)).await;
    host.fake.managed_save(SERVER);
    agent.succeed(ON, Action::Stop(AT_ONCE)).await;
    agent.succeed(ON, Action::Start).await;
    let status = host.fake.domain(SERVER).await.unwrap().unwrap();
    assert_eq!(status.reason, "restored");
}

#[tokio::test]
async fn a_start_that_brings_back_a_rescue_is_not_taken_for_the_server() {
    let host = Host::new();
    let agent = with_server(&host, Arc::new(NoProbe)).await;
    agent.succeed(ON, Action::Stop(AT_ONCE)).await;
    agent.succeed(ON, rescue_action()).await;
    let rescue = host.look(&agent).await.inactive.unwrap();
    let mut back = unrescue();
    back.restore_power = true;
    agent.succeed(ON, Action::Unrescue(back)).await;
    // Somebody runs the rescue once more, saves it and puts the server's definition back.
    let own = host.look(&agent).await.inactive.unwrap();
    host.fake.define(&rescue).await.unwrap();
    host.fake.start(SERVER, Boot::Fresh).await.unwrap();
    host.fake.managed_save(SERVER);
    host.fake.define(&own).await.unwrap();
    let operation = agent.carry_out(ON, Action::Start).await;
    assert_eq!(operation.state, OperationState::Failed);
    assert_eq!(operation.error.unwrap().reason, Reason::LibvirtRefused);
    let seen = host.look(&agent).await;
    assert_eq!(seen.power, Some(PowerState::Shutdown));
    assert_eq!(seen.record.unwrap().vm_state, VmState::Stopped);
    agent.succeed(ON, Action::Start).await;
    assert_eq!(host.look(&agent).await.live, seen.inactive);
}

/// Changes the domain's definition as an administrator would, and says what it is then.
async fn edit(host: &Host) -> String {
    let xml = host.fake.domain_xml(SERVER, Definition::Inactive).await;
    let changed = xml
        .unwrap()
        .replace("</uuid>", "</uuid><title>changed</title>");
    host.fake.define(&changed).await.unwrap();
    changed
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_definition_that_was_changed_meanwhile_is_not_overwritten() {
    for (verb, rescued) in [(Verb::Rescue, false), (Verb::Unrescue, true)] {
        let host = Host::new();
        // The guest is off, the definition is not yet looked at.
        let power_off = if rescued { 0 } else { 5 };
        let gate = Gate::new(verb, Point::AfterStep(power_off));
        let agent = with_server(&host, Arc::clone(&gate) as _).await;
        let action = if rescued {
            agent.succeed(ON, rescue_action()).await;
            Action::Unrescue(unrescue())
        } else {
            rescue_action()
        };
        let plan = agent.plan(ON, &action).await;
        let power_off = plan
            .steps
            .iter()
            .position(|planned| planned.step.kind() == "PowerOff");
        let before = host.look(&agent).await;
        let submitted = agent.submit(ON, action).await.unwrap();
        gate.reached().await;
        let changed = edit(&host).await;
        gate.open();
        let operation = agent.ended(submitted.operation.id).await;
        assert_eq!(power_off, Some(if rescued { 0 } else { 5 }));
        assert_eq!(operation.state, OperationState::Failed, "{operation:#?}");
        assert_eq!(operation.error.unwrap().reason, Reason::DomainChanged);
        let seen = host.look(&agent).await;
        assert_eq!(seen.inactive.as_ref(), Some(&changed));
        // The guest that was on is on again, with the definition that there is now.
        assert_eq!(seen.live.as_ref(), Some(&changed));
        assert_eq!((seen.saved, seen.files), (before.saved, before.files));
        let record = agent.record();
        assert_eq!(record.vm_state, before.record.unwrap().vm_state);
        assert_eq!(record.fault, None);
    }
}

#[tokio::test]
async fn a_domain_that_was_renamed_while_rescued_comes_back_under_its_new_name() {
    for other_takes_the_name in [false, true] {
        let host = Host::new();
        let agent = with_server(&host, Arc::new(NoProbe)).await;
        let original = host.look(&agent).await.inactive.unwrap();
        agent.succeed(ON, rescue_action()).await;
        host.fake.guest_powers_off(SERVER);
        host.fake.rename(SERVER, "new & old").unwrap();
        if other_takes_the_name {
            let other = original.replace(&SERVER.to_string(), &BASE.to_string());
            host.fake.define(&other).await.unwrap();
        }
        // What fails half-way is taken back under the new name as well.
        let no = HypervisorError::Refused {
            call: "virDomainCreate",
            message: "no".to_owned(),
        };
        host.fake.fail_next("start", no);
        let operation = agent.carry_out(ON, Action::Unrescue(unrescue())).await;
        assert_eq!(operation.error.unwrap().reason, Reason::LibvirtRefused);
        assert_eq!(agent.record().vm_state, VmState::Rescued);
        assert_eq!(agent.record().fault, None);

        agent.succeed(ON, Action::Unrescue(unrescue())).await;
        let seen = host.look(&agent).await;
        let wanted = original.replace("<name>foreign</name>", "<name>new &amp; old</name>");
        assert_eq!(seen.inactive.as_ref(), Some(&wanted));
        assert_eq!(seen.live, seen.inactive);
        assert_eq!(seen.saved, None);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_domain_that_is_renamed_while_it_is_switched_goes_on_under_its_new_name() {
    for (verb, end) in [
        (Verb::Rescue, "done"),
        (Verb::Rescue, "taken back"),
        (Verb::Unrescue, "done"),
        (Verb::Unrescue, "taken back"),
    ] {
        let host = Host::new();
        let power_off = if verb == Verb::Rescue { 5 } else { 0 };
        // The guest is off. Before and after the definition is switched.
        for point in [power_off, power_off + 1] {
            let host = if point == power_off {
                &host
            } else {
                &Host::new()
            };
            let gate = Gate::new(verb, Point::AfterStep(point));
            let agent = with_server(host, Arc::clone(&gate) as _).await;
            let original = host.look(&agent).await.inactive.unwrap();
            let action = if verb == Verb::Rescue {
                rescue_action()
            } else {
                agent.succeed(ON, rescue_action()).await;
                Action::Unrescue(unrescue())
            };
            let submitted = agent.submit(ON, action).await.unwrap();
            gate.reached().await;
            host.fake.rename(SERVER, "renamed").unwrap();
            if end == "taken back" {
                let no = HypervisorError::Refused {
                    call: "virDomainCreate",
                    message: "no".to_owned(),
                };
                host.fake.fail_next("start", no);
            }
            gate.open();
            let operation = agent.ended(submitted.operation.id).await;
            let done = operation.state == OperationState::Done;
            assert_eq!(done, end == "done", "{verb} {point}: {operation:#?}");
            assert_eq!(agent.record().fault, None, "{verb} {point}");
            if agent.record().vm_state == VmState::Rescued {
                agent.succeed(ON, Action::Unrescue(unrescue())).await;
            }
            let wanted = original.replace("<name>foreign</name>", "<name>renamed</name>");
            let seen = host.look(&agent).await;
            assert_eq!(seen.inactive.as_ref(), Some(&wanted), "{verb} {point}");
            assert_eq!(seen.live, seen.inactive, "{verb} {point}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_delete_that_removed_the_definition_goes_on_and_leaves_alone_what_somebody_else_made() {
    let host = Host::new();
    let gate = Gate::new(Verb::Delete, Point::AfterStep(1));
    let agent = with_server(&host, Arc::clone(&gate) as _).await;
    let delete = agent.submit(ON, Action::Delete).await.unwrap().operation.id;
    gate.reached().await;
    let mine = host
        .foreign_domain(false)
        .replace("</uuid>", "</uuid><title>mine</title>");
    host.fake.define(&mine).await.unwrap();
    agent.engine.cancel(delete).await.unwrap();
    gate.open();
    let operation = agent.ended(delete).await;
    assert_eq!(operation.state, OperationState::Done);
    let seen = host.look(&agent).await;
    assert_eq!((seen.inactive, seen.record), (Some(mine), None));
}

#[tokio::test]
async fn a_delete_goes_on_if_removing_the_definition_failed_but_took_effect() {
    let host = Host::new();
    let agent = with_server(&host, Arc::new(NoProbe)).await;
    let late = HypervisorError::Deadline {
        call: "virDomainUndefineFlags",
        after: std::time::Duration::from_secs(30),
    };
    host.fake.lose_next_answer("undefine", late);
    agent.succeed(ON, Action::Delete).await;
    assert!(host.look(&agent).await.power.is_none());
}

#[tokio::test]
async fn a_delete_that_may_not_remove_the_definition_leaves_the_domain_as_it_was() {
    let host = Host::new();
    let agent = with_server(&host, Arc::new(NoProbe)).await;
    host.fake.set_autostart(SERVER);
    let before = host.look(&agent).await;
    let no = HypervisorError::Refused {
        call: "virDomainUndefineFlags",
        message: "no".to_owned(),
    };
    host.fake.fail_next("undefine", no);
    let operation = agent.carry_out(ON, Action::Delete).await;
    assert_eq!(operation.state, OperationState::Failed);
    let differences = host.look(&agent).await.differences(&before);
    assert!(
        differences.is_empty() && before.autostart,
        "{differences:?}"
    );
}

#[tokio::test]
async fn a_delete_keeps_what_is_not_of_the_agent_in_the_folder_of_an_adopted_server() {
    let host = Host::new();
    let agent = with_server(&host, Arc::new(NoProbe)).await;
    agent.succeed(ON, rescue_action()).await;
    // The agent made the disk in an earlier life, of which its store knows nothing.
    let disk = host.layout().disk(SERVER);
    std::fs::write(&disk, "precious").unwrap();
    agent.succeed(ON, Action::Delete).await;
    assert!(std::fs::exists(&disk).unwrap());
    assert!(!std::fs::exists(host.layout().rescues(SERVER)).unwrap());
    drop(agent);
    let agent = host.agent(Arc::new(NoProbe)).await;
    assert_eq!(agent.swept, Vec::<String>::new());
    assert!(std::fs::exists(&disk).unwrap());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_delete_ends_a_commit_that_was_cut_off() {
    let host = Host::new();
    // The commit is noted, and not yet made.
    let gate = Gate::new(Verb::Unrescue, Point::BeforeStep(2));
    let agent = with_server(&host, Arc::clone(&gate) as _).await;
    let mut args = rescue();
    args.protection = Protection::Overlay;
    agent.succeed(ON, Action::Rescue(Box::new(args))).await;
    let overlays = agent.record().rescue.clone().unwrap().overlays;
    for overlay in &overlays {
        qemu_io(Path::new(&overlay.path), "qcow2", "write -q -P 0x77 64k 4k");
    }
    let commit = Action::Unrescue(UnrescueArgs {
        overlay: Some(OverlayDisposition::Commit),
        ..unrescue()
    });
    let unrescue = agent.submit(ON, commit).await.unwrap().operation.id;
    gate.reached().await;
    agent.engine.cancel(unrescue).await.unwrap();
    gate.open();
    let operation = agent.ended(unrescue).await;
    assert_eq!(operation.state, OperationState::Cancelled);
    assert!(agent.record().rescue.as_ref().unwrap().commit_started);
    agent.succeed(ON, Action::Delete).await;
    for overlay in &overlays {
        let base = Path::new(&overlay.base);
        qemu_io(base, &overlay.base_format, "read -q -P 0x77 64k 4k");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_start_that_is_taken_back_leaves_on_what_somebody_else_has_started() {
    let host = Host::new();
    let gate = Gate::new(Verb::Start, Point::AfterStep(0));
    let agent = host.agent(Arc::clone(&gate) as _).await;
    host.fake.define(&host.foreign_domain(false)).await.unwrap();
    agent.succeed(NEW, adopt()).await;
    host.fake.start(SERVER, Boot::Resume).await.unwrap();
    let start = agent.submit(ON, Action::Start).await.unwrap().operation.id;
    gate.reached().await;
    agent.engine.cancel(start).await.unwrap();
    gate.open();
    let operation = agent.ended(start).await;
    assert_eq!(operation.state, OperationState::Cancelled);
    let status = host.fake.domain(SERVER).await.unwrap().unwrap();
    assert_eq!(status.power, PowerState::Running);
}

#[tokio::test]
async fn a_domain_that_is_paused_is_not_called_started() {
    let host = Host::new();
    let agent = host.agent(Arc::new(NoProbe)).await;
    host.fake.define(&host.foreign_domain(false)).await.unwrap();
    agent.succeed(NEW, adopt()).await;
    host.fake.start(SERVER, Boot::Resume).await.unwrap();
    host.fake.set_power(SERVER, PowerState::Paused, "user");
    let operation = agent.carry_out(ON, Action::Start).await;
    assert_eq!(operation.state, OperationState::Failed);
    let error = operation.error.unwrap();
    assert!(error.message.contains("unpause the server"), "{error}");
    let status = host.fake.domain(SERVER).await.unwrap().unwrap();
    assert_eq!(status.power, PowerState::Paused);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_guest_is_not_stopped_for_a_plan_that_its_definition_has_left_behind() {
    let host = Host::new();
    let gate = Gate::new(Verb::Rescue, Point::BeforeStep(3));
    let agent = with_server(&host, Arc::clone(&gate) as _).await;
    let before = host.look(&agent).await;
    let rescue = agent.submit(ON, rescue_action()).await.unwrap();
    gate.reached().await;
    let changed = edit(&host).await;
    host.fake.clear_calls();
    gate.open();
    let operation = agent.ended(rescue.operation.id).await;
    assert_eq!(operation.error.unwrap().reason, Reason::DomainChanged);
    let stopped = |call: &String| call.starts_with("shutdown") || call.starts_with("destroy");
    assert!(!host.fake.calls().iter().any(stopped));
    let seen = host.look(&agent).await;
    assert_eq!(seen.inactive.as_ref(), Some(&changed));
    assert_eq!((seen.live, seen.saved), (before.live, before.saved));
}

#[tokio::test]
async fn variables_that_cannot_be_looked_at_keep_no_server_from_being_stopped_or_deleted() {
    let host = Host::new();
    let agent = host.agent(Arc::new(NoProbe)).await;
    host.add_images(&agent.store).await;
    let file = host.outside().join("file");
    std::fs::write(&file, "").unwrap();
    // No folder, so that looking ends in an error that is not "there is none".
    let nvram = format!(
        "<loader readonly='yes' type='pflash'>/x</loader><nvram>{}/x</nvram></os>",
        file.display()
    );
    let uefi = host.foreign_domain(false).replace("</os>", &nvram);
    host.fake.define(&uefi).await.unwrap();
    host.fake.start(SERVER, Boot::Resume).await.unwrap();
    agent.succeed(NEW, adopt()).await;
    let refusal = agent.submit(ON, rescue_action()).await.unwrap_err();
    assert_eq!(refusal.reason, Reason::StorageFailed);
    agent.succeed(ON, Action::Stop(AT_ONCE)).await;
    agent.succeed(ON, Action::Delete).await;
}

#[tokio::test]
async fn a_rescue_that_could_not_start_for_want_of_a_disk_is_refused() {
    let host = Host::new();
    let agent = with_server(&host, Arc::new(NoProbe)).await;
    let before = host.look(&agent).await;
    let record = agent.record();
    let disk = Path::new(&record.disks[0].source);
    std::fs::rename(disk, disk.with_extension("away")).unwrap();
    let refusal = agent.submit(ON, rescue_action()).await.unwrap_err();
    assert_eq!(refusal.reason, Reason::DiskMissing, "{refusal}");
    std::fs::rename(disk.with_extension("away"), disk).unwrap();
    assert_eq!(
        before.differences(&host.look(&agent).await),
        Vec::<String>::new()
    );
}

#[tokio::test]
async fn a_preparation_that_cannot_be_removed_is_left_behind_and_the_server_is_as_before() {
    let host = Host::new();
    // The folder of the rescue; nothing was switched yet.
    let plot = Plot::new(&[(Point::BeforeStep(4), FAIL), (Point::BeforeRevert(1), FAIL)]);
    let agent = with_server(&host, plot).await;
    let before = host.look(&agent).await;
    let operation = agent.carry_out(ON, rescue_action()).await;
    assert_eq!(operation.state, OperationState::Failed);
    assert_eq!(operation.error.unwrap().reason, Reason::StorageFailed);
    let warnings: Vec<_> = operation.warnings.iter().map(|w| w.name).collect();
    assert_eq!(
        warnings,
        [WarningName::LeftBehind],
        "{:?}",
        operation.warnings
    );
    let seen = host.look(&agent).await;
    assert_eq!(seen.record, before.record);
    assert_eq!(seen.holders, before.holders);
    drop(agent);
    let agent = host.agent(Arc::new(NoProbe)).await;
    assert_eq!(agent.swept.len(), 1);
    assert_eq!(host.look(&agent).await.files, before.files);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn an_unpause_of_a_guest_that_somebody_let_run_is_done_and_taking_it_back_pauses_nothing() {
    let host = Host::new();
    let gate = Gate::new(Verb::Unpause, Point::AfterStep(0));
    let agent = with_server(&host, Arc::clone(&gate) as _).await;
    agent.succeed(ON, Action::Pause).await;
    host.fake.set_power(SERVER, PowerState::Running, "unpaused");
    let unpause = agent
        .submit(ON, Action::Unpause)
        .await
        .unwrap()
        .operation
        .id;
    gate.reached().await;
    agent.engine.cancel(unpause).await.unwrap();
    gate.open();
    let cancelled = agent.ended(unpause).await;
    assert_eq!(cancelled.state, OperationState::Cancelled);
    agent.succeed(ON, Action::Unpause).await;
    assert_eq!(agent.record().vm_state, VmState::Active);
    let status = host.fake.domain(SERVER).await.unwrap().unwrap();
    assert_eq!(
        (status.power, status.reason.as_str()),
        (PowerState::Running, "unpaused")
    );
    let calls = host.fake.calls();
    assert_eq!(
        calls
            .iter()
            .filter(|call| call.starts_with("pause "))
            .count(),
        1
    );
}
