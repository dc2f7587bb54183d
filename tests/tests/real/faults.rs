// SPDX-License-Identifier: Apache-2.0
//! Faults round a rescue: libvirtd dies, QEMU dies, the agent ends, the host reboots. Whatever happens,
//! operations end in "done" or "as before", and records tell the truth, or that they do not know it.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use salvor_proto::google::longrunning::CancelOperationRequest;
use salvor_proto::v1::{
    DiskProtection, GetHostRequest, OperationState, OverlayDisposition, PowerState,
    StopServerRequest, UnrescuePower, VmState,
};
use salvor_tests::agent::AgentSettings;
use salvor_tests::client::{Client, Ended, assert_refused};
use salvor_tests::guests::TinyGuest;
use salvor_tests::host::TestHost;
use salvor_tests::run_folder::RunFolder;
use salvor_tests::wait::SOON;
use tonic::Code;

use crate::actor::{Actor, FIXER, tiny};
use crate::scene::{Scene, power_of, rescue_with, unrescue_of};

#[tokio::test(flavor = "multi_thread")]
async fn rescue_and_unrescue_survive_the_death_of_libvirtd_in_every_phase() {
    let folder = RunFolder::for_this_test();
    let host = TestHost::start(folder.path());
    let (actor, mut scene) = Scene::with_actor(
        &host,
        folder.path(),
        &tiny("outage"),
        AgentSettings::default(),
    )
    .await;
    let mut ends = Vec::new();
    for kind in [
        "HoldImage",
        "CreateOverlay",
        "PowerOff",
        "DefineDomain",
        "StartDomain",
    ] {
        let (mark, number) = (actor.console().mark(), actor.number());
        let operation = scene.begin_rescue(&actor).await;
        scene.wait_step(&operation, kind).await;
        host.kill_libvirtd();
        let dark = scene.wait_power(actor.id, PowerState::Unknown).await;
        assert!(dark.fault.is_none(), "{dark:#?}");
        host.start_libvirtd();
        let ended = scene.client.wait(&operation).await;
        ends.push((kind, ended.metadata.state()));
        if ended.metadata.state() == OperationState::Done {
            scene.assert_rescued(&actor, &operation, mark, number).await;
            scene.unrescue_actor(&actor).await;
        } else {
            scene.assert_original(&actor, mark, number).await;
            actor.remove_mark();
        }
    }
    for kind in ["PowerOff", "DefineDomain", "StartDomain", "RemoveFolder"] {
        let rescued = scene.rescue_actor(&actor).await;
        let (mark, number) = (actor.console().mark(), actor.number());
        let operation = scene.begin_unrescue(&actor).await;
        scene.wait_step(&operation, kind).await;
        host.kill_libvirtd();
        let dark = scene.wait_power(actor.id, PowerState::Unknown).await;
        assert!(dark.fault.is_none(), "{dark:#?}");
        host.start_libvirtd();
        let ended = scene.client.wait(&operation).await;
        ends.push((kind, ended.metadata.state()));
        if ended.metadata.state() == OperationState::Done {
            scene.assert_original(&actor, mark, number).await;
            assert!(actor.is_marked(), "the repair is lost");
            actor.remove_mark();
        } else {
            scene.assert_rescued(&actor, &rescued, mark, number).await;
            scene.unrescue_actor(&actor).await;
        }
    }
    println!("libvirtd killed at: {ends:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_outage_is_told_as_one_and_the_truth_comes_back_with_libvirtd() {
    let folder = RunFolder::for_this_test();
    let host = TestHost::start(folder.path());
    let (actor, mut scene) = Scene::with_actor(
        &host,
        folder.path(),
        &tiny("dark"),
        AgentSettings::default(),
    )
    .await;
    let mortal = scene.another_actor(&tiny("mortal")).await;
    let number = actor.number();

    host.kill_libvirtd();
    let since = Instant::now();
    let server = scene.wait_power(actor.id, PowerState::Unknown).await;
    println!("told UNKNOWN after {:?}", since.elapsed());
    let power = server.power.clone().unwrap();
    assert_eq!(power.last_known_state(), PowerState::Running);
    assert!(power.last_known_time.unwrap().seconds <= power.observe_time.unwrap().seconds);
    assert_eq!(
        server.vm_state(),
        VmState::Active,
        "an outage is no shut-down"
    );
    assert_eq!(scene.client.list().await.len(), 2);
    let host_now = scene
        .client
        .hosts
        .get_host(GetHostRequest {})
        .await
        .unwrap()
        .into_inner()
        .host
        .unwrap();
    let link = host_now.libvirt.unwrap();
    assert!(!link.up && !link.reason.is_empty(), "{link:#?}");

    let refused = scene
        .client
        .servers
        .rescue_server(actor.rescue_request(DiskProtection::ReadWrite))
        .await;
    assert_refused(refused, Code::Unavailable, "LIBVIRT_UNAVAILABLE");
    let stop = StopServerRequest {
        server: actor.id.to_string(),
        ..StopServerRequest::default()
    };
    let refused = scene.client.servers.stop_server(stop).await;
    assert_refused(refused, Code::Unavailable, "LIBVIRT_UNAVAILABLE");
    Client::assert_settled(&scene.client.get(actor.id).await, VmState::Active);
    host.kill_qemu(mortal.id);

    host.start_libvirtd();
    let since = Instant::now();
    scene.wait_power(actor.id, PowerState::Running).await;
    println!("told RUNNING {:?} after libvirtd answered", since.elapsed());
    assert!(since.elapsed() < Duration::from_secs(10));
    assert_eq!(actor.number(), number, "the guest ran through");
    let what = "the guest that died meanwhile is off";
    let server = scene
        .client
        .wait_server(mortal.id, what, |server| {
            power_of(server) == PowerState::Shutdown
        })
        .await;
    Client::assert_settled(&server, VmState::Stopped);
    scene.rescue_actor(&actor).await;
    scene.unrescue_actor(&actor).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_while_libvirtd_is_away_is_refused_and_works_when_it_is_back() {
    let folder = RunFolder::for_this_test();
    let host = TestHost::start(folder.path());
    let (actor, mut scene) = Scene::with_actor(
        &host,
        folder.path(),
        &tiny("retry"),
        AgentSettings::default(),
    )
    .await;
    host.kill_libvirtd();
    // Called at once: the agent may not even know yet that libvirtd is gone.
    let request = actor.rescue_request(DiskProtection::ReadWrite);
    let refused = scene.client.servers.rescue_server(request.clone()).await;
    assert_refused(refused, Code::Unavailable, "LIBVIRT_UNAVAILABLE");
    // An agent that starts meanwhile serves what it knows.
    scene.agent.kill_9();
    scene.agent.spawn();
    scene.agent.wait_serving().await;
    scene.client = Client::new(scene.agent.channel());
    let server = scene.wait_power(actor.id, PowerState::Unknown).await;
    assert_eq!(
        server.power.unwrap().last_known_state(),
        PowerState::Running
    );
    let refused = scene.client.servers.rescue_server(request.clone()).await;
    assert_refused(refused, Code::Unavailable, "LIBVIRT_UNAVAILABLE");

    host.start_libvirtd();
    scene.wait_power(actor.id, PowerState::Running).await;
    let (mark, number) = (actor.console().mark(), actor.number());
    let (answer, ended) = scene.client.rescue(request).await;
    ended.done();
    assert!(
        !answer.admin_pass.is_empty(),
        "the refused call used the request id up"
    );
    scene
        .assert_rescued(&actor, &answer.operation.unwrap(), mark, number)
        .await;
    scene.unrescue_actor(&actor).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_libvirtd_that_hangs_holds_up_what_needs_it_and_nothing_else() {
    let folder = RunFolder::for_this_test();
    let host = TestHost::start(folder.path());
    let guest = tiny("hang");
    let (actor, mut scene) =
        Scene::with_actor(&host, folder.path(), &guest, AgentSettings::default()).await;
    let (mark, number) = (actor.console().mark(), actor.number());
    host.freeze_libvirtd();
    let mut servers = scene.client.servers.clone();
    let request = actor.rescue_request(DiskProtection::ReadWrite);
    let rescuing = tokio::spawn(async move { servers.rescue_server(request).await });
    let mut reads = Vec::new();
    for _ in 0..50 {
        let begun = Instant::now();
        scene.client.get(actor.id).await;
        assert_eq!(scene.client.list().await.len(), 1);
        reads.push(begun.elapsed());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    reads.sort();
    println!(
        "get and list while libvirtd hangs: {:?} (median)",
        reads[reads.len() / 2]
    );
    assert!(reads[reads.len() / 2] < Duration::from_millis(50));
    let begun = Instant::now();
    scene
        .client
        .hosts
        .get_host(GetHostRequest {})
        .await
        .unwrap();
    println!("GetHost while libvirtd hangs: {:?}", begun.elapsed());
    assert!(begun.elapsed() < Duration::from_secs(5));
    assert!(!rescuing.is_finished(), "libvirtd was not asked at all");
    host.thaw_libvirtd();
    let operation = rescuing
        .await
        .unwrap()
        .unwrap()
        .into_inner()
        .operation
        .unwrap();
    scene.client.wait(&operation).await.done();
    scene.assert_rescued(&actor, &operation, mark, number).await;
    scene.unrescue_actor(&actor).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_action_that_waits_for_libvirtd_can_be_cancelled_and_survives_the_agent() {
    let folder = RunFolder::for_this_test();
    let host = TestHost::start(folder.path());
    let guest = tiny("waits").deaf();
    let (actor, mut scene) =
        Scene::with_actor(&host, folder.path(), &guest, AgentSettings::default()).await;
    let (mark, number) = (actor.console().mark(), actor.number());
    let operation = scene.begin_rescue(&actor).await;
    actor.console().wait_line(mark, "TINY-POWERBUTTON", SOON);
    host.kill_libvirtd();
    scene.wait_power(actor.id, PowerState::Unknown).await;
    let name = operation.name.clone();
    let request = CancelOperationRequest { name };
    scene
        .client
        .operations
        .cancel_operation(request)
        .await
        .unwrap();
    host.start_libvirtd();
    let ended = scene.client.wait(&operation).await;
    assert_eq!(
        ended.metadata.state(),
        OperationState::Cancelled,
        "{ended:#?}"
    );
    scene.assert_original(&actor, mark, number).await;

    // Both die, and the agent is back first.
    let operation = scene.begin_rescue(&actor).await;
    scene.wait_step(&operation, "PowerOff").await;
    host.kill_libvirtd();
    scene.agent.kill_9();
    scene.agent.spawn();
    scene.agent.wait_serving().await;
    scene.client = Client::new(scene.agent.channel());
    let (_, metadata) = scene.client.operation(&operation.name).await;
    assert_eq!(metadata.state(), OperationState::Running, "{metadata:#?}");
    host.start_libvirtd();
    let ended = scene.client.wait(&operation).await;
    ended.done();
    scene.assert_rescued(&actor, &operation, mark, number).await;
    scene.unrescue_actor(&actor).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rescue_survives_the_death_of_qemu_in_every_phase() {
    let folder = RunFolder::for_this_test();
    let host = TestHost::shared();
    let (actor, mut scene) = Scene::with_actor(
        host,
        folder.path(),
        &tiny("qemu-dies"),
        AgentSettings::default(),
    )
    .await;
    let mut ends = Vec::new();
    for kind in [
        "HoldImage",
        "CreateOverlay",
        "PowerOff",
        "DefineDomain",
        "StartDomain",
    ] {
        let mark = actor.console().mark();
        let operation = scene.begin_rescue(&actor).await;
        scene.wait_step(&operation, kind).await;
        let mut killed = false;
        while !killed && !scene.client.operation(&operation.name).await.0.done {
            // It may be between two lives just now.
            killed = host.try_kill_qemu(actor.id);
        }
        let ended = scene.client.wait(&operation).await;
        ends.push((kind, killed, ended.metadata.state()));
        let server = scene.client.get(actor.id).await;
        assert_eq!(
            (server.task_state.as_str(), &server.fault),
            ("", &None),
            "{server:#?}"
        );
        match ended.metadata.state() {
            OperationState::Done => {
                assert_eq!(server.vm_state(), VmState::Rescued);
                // Dead or alive, unrescue brings the server back.
                let rescued = actor.last_ready(mark).as_deref() == Some(FIXER);
                let back = actor.console().mark();
                let operation = scene.begin_unrescue(&actor).await;
                scene.client.wait(&operation).await.done();
                scene.assert_original(&actor, back, None).await;
                assert!(actor.is_marked() || !rescued, "the repair is lost");
            }
            OperationState::Failed => match server.vm_state() {
                // Its guest was killed, so it is as before or off.
                VmState::Active => scene.assert_original(&actor, mark, None).await,
                VmState::Stopped => {
                    scene.client.start(actor.id).await.done();
                    scene.assert_original(&actor, mark, None).await;
                }
                other => panic!("{other:?} after {ended:#?}"),
            },
            other => panic!("{other:?}"),
        }
        actor.remove_mark();
    }
    println!("QEMU killed at: {ends:#?}");
}

/// A QEMU that is killed when it is to run a guest, as often as there are lines in the second file.
fn mortal_qemu(folder: &Path) -> (PathBuf, PathBuf) {
    let (program, deaths) = (folder.join("qemu"), folder.join("deaths"));
    let text = format!(
        "#!/bin/sh\n\
         case \"$*\" in *guest=*) [ -s '{0}' ] && sed -i 1d '{0}' && kill -9 $$;; esac\n\
         exec /usr/bin/qemu-system-x86_64 \"$@\"\n",
        deaths.display()
    );
    fs::write(&program, text).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    (program, deaths)
}

// libvirtd 9.0 itself does that now and then: late work about the guest before ends the new one.
#[tokio::test(flavor = "multi_thread")]
async fn a_guest_whose_qemu_is_killed_as_it_starts_is_started_again_once() {
    let mut scene = Scene::new().await;
    let (qemu, deaths) = mortal_qemu(&scene.folder);
    let xml = scene
        .tiny_xml(&TinyGuest::new("orig"))
        .device(&format!("<emulator>{}</emulator>", qemu.display()));
    let id = scene.running(&xml, "TINY-READY orig").await;
    let image = scene.tiny_image("resc").await;
    let console = scene.console(id);

    let mark = console.mark();
    fs::write(&deaths, "once\n").unwrap();
    scene.rescue(rescue_with(id, &image)).await;
    assert_eq!(fs::read_to_string(&deaths).unwrap(), "");
    console.wait_line(mark, "TINY-READY resc", SOON);
    fs::write(&deaths, "once\n").unwrap();
    let server = scene.unrescue(unrescue_of(id)).await;
    Client::assert_settled(&server, VmState::Active);
    console.wait_line(mark, "TINY-READY orig", SOON);

    // Twice is no accident: the rescue is taken back.
    let mark = console.mark();
    fs::write(&deaths, "once\ntwice\n").unwrap();
    let (_, ended) = scene.client.rescue(rescue_with(id, &image)).await;
    let error = ended.error();
    assert!(error.message.contains("monitor"), "{}", error.message);
    assert_eq!(fs::read_to_string(&deaths).unwrap(), "");
    Client::assert_settled(&scene.client.get(id).await, VmState::Active);
    scene.assert_no_rescue_left(id);
    console.wait_line(mark, "TINY-READY orig", SOON);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rescue_guest_that_dies_leaves_the_server_rescued_and_the_way_back_open() {
    let folder = RunFolder::for_this_test();
    let host = TestHost::shared();
    let (actor, mut scene) = Scene::with_actor(
        host,
        folder.path(),
        &tiny("rescue-dies"),
        AgentSettings::default(),
    )
    .await;
    scene.rescue_actor(&actor).await;
    host.kill_qemu(actor.id);
    let server = scene
        .client
        .wait_server(actor.id, "the rescue guest is off", |server| {
            matches!(power_of(server), PowerState::Shutdown | PowerState::Crashed)
        })
        .await;
    Client::assert_settled(&server, VmState::Rescued);
    scene.unrescue_actor(&actor).await;
}

// libvirt does not define a domain under another name than it has.
#[tokio::test(flavor = "multi_thread")]
async fn a_domain_that_was_renamed_while_rescued_comes_back_under_its_new_name() {
    let folder = RunFolder::for_this_test();
    let host = TestHost::shared();
    let guest = tiny("renamed");
    let settings = AgentSettings::default();
    let (mut actor, mut scene) = Scene::with_actor(host, folder.path(), &guest, settings).await;
    scene.rescue_actor(&actor).await;
    actor.libvirt.destroy(actor.id).unwrap();
    actor.libvirt.rename(actor.id, "a-new-name").unwrap();
    actor.definition = actor
        .definition
        .replace("<name>renamed</name>", "<name>a-new-name</name>");
    scene.unrescue_actor(&actor).await;
    actor.libvirt.remove(actor.id);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_is_restarted_knows_the_rescue_and_the_way_back() {
    let folder = RunFolder::for_this_test();
    let host = TestHost::shared();
    let (actor, mut scene) = Scene::with_actor(
        host,
        folder.path(),
        &tiny("restarted"),
        AgentSettings::default(),
    )
    .await;
    let mark = actor.console().mark();
    let operation = scene.rescue_actor(&actor).await;
    let number = actor.number();

    scene.agent.kill_9();
    scene.restart().await;
    scene.assert_rescued(&actor, &operation, mark, None).await;
    let again = scene
        .client
        .servers
        .rescue_server(actor.rescue_request(DiskProtection::ReadWrite))
        .await;
    assert_refused(again, Code::FailedPrecondition, "ALREADY_RESCUED");

    assert_eq!(scene.agent.sigterm_and_wait(SOON), "exit 0");
    scene.restart().await;
    scene.assert_rescued(&actor, &operation, mark, None).await;
    assert_eq!(
        actor.number(),
        number,
        "a restart of the agent touched the guest"
    );
    scene.unrescue_actor(&actor).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_reboots_while_rescued_finds_record_and_domain_agreed() {
    let folder = RunFolder::for_this_test();
    let host = TestHost::start(folder.path());
    let (actor, mut scene) = Scene::with_actor(
        &host,
        folder.path(),
        &tiny("reboot"),
        AgentSettings::default(),
    )
    .await;
    let operation = scene.rescue_actor(&actor).await;
    host.reboot();
    scene.agent.forget_process();
    scene.restart().await;
    let server = scene.wait_power(actor.id, PowerState::Shutdown).await;
    Client::assert_settled(&server, VmState::Rescued);
    let plan = operation.name.strip_prefix("operations/").unwrap();
    assert!(actor.libvirt.inactive_xml(actor.id).unwrap().contains(plan));
    scene.unrescue_actor(&actor).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_starts_with_its_host_comes_up_in_its_rescue_after_a_reboot() {
    let folder = RunFolder::for_this_test();
    let host = TestHost::start(folder.path());
    let settings = AgentSettings::default();
    let (actor, mut scene) = Scene::with_actor(&host, folder.path(), &tiny("auto"), settings).await;
    actor.libvirt.set_autostart(actor.id).unwrap();
    let operation = scene.rescue_actor(&actor).await;
    let mark = actor.console().mark();
    host.reboot();
    scene.agent.forget_process();
    scene.restart().await;
    actor.wait_ready(mark, FIXER);
    scene.assert_rescued(&actor, &operation, mark, None).await;
    scene.unrescue_actor(&actor).await;
    assert!(actor.libvirt.autostart(actor.id).unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rescue_that_a_reboot_cut_off_is_carried_on() {
    let folder = RunFolder::for_this_test();
    let host = TestHost::start(folder.path());
    let guest = tiny("cut").deaf();
    let (actor, mut scene) =
        Scene::with_actor(&host, folder.path(), &guest, AgentSettings::default()).await;
    let mark = actor.console().mark();
    let operation = scene.begin_rescue(&actor).await;
    // The guest is deaf, so this step lasts until the power goes.
    scene.wait_step(&operation, "PowerOff").await;
    host.reboot();
    scene.agent.forget_process();
    scene.restart().await;
    let ended: Ended = scene.client.wait(&operation).await;
    ended.done();
    assert_eq!(ended.metadata.recoveries, 1);
    scene.assert_rescued(&actor, &operation, mark, None).await;
    scene.unrescue_actor(&actor).await;
}

/// Has a stop fail and so does taking it back: the server is in ERROR, its guest is off.
async fn into_error(scene: &mut Scene<'_>, actor: &Actor) {
    let twice = "stop:before-commit:fail,stop:before-revert:0:fail";
    scene.restart_with(twice).await;
    let ended = scene.client.stop(actor.id, None).await;
    assert_eq!(ended.metadata.state(), OperationState::Failed, "{ended:#?}");
    scene.restart_with("").await;
    let broken = scene.client.get(actor.id).await;
    Client::assert_settled(&broken, VmState::Error);
    assert_eq!(broken.status, "ERROR");
    let fault = broken.fault.unwrap();
    assert_eq!(
        (fault.step.as_str(), fault.reason.as_str()),
        ("PowerOff", "ROLLBACK_FAILED")
    );
    assert_eq!(actor.number(), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_in_error_is_rescued_repaired_and_comes_back_without_its_fault() {
    let folder = RunFolder::for_this_test();
    let host = TestHost::shared();
    let settings = AgentSettings::default();
    let (actor, mut scene) =
        Scene::with_actor(host, folder.path(), &tiny("broken"), settings).await;
    into_error(&mut scene, &actor).await;
    let fault = scene.client.get(actor.id).await.fault;

    // A rescue that fails leaves it as it was: in ERROR, with the fault of the stop.
    scene.restart_with("rescue:before-commit:fail").await;
    let operation = scene.begin_rescue(&actor).await;
    scene.client.wait(&operation).await.error();
    let broken = scene.client.get(actor.id).await;
    Client::assert_settled(&broken, VmState::Error);
    assert_eq!((broken.fault, broken.rescue), (fault, None));
    assert_eq!(
        actor.libvirt.inactive_xml(actor.id).unwrap(),
        actor.definition
    );
    assert_eq!(actor.number(), None);
    assert_eq!(scene.files_of(actor.id), Vec::<PathBuf>::new());
    actor.remove_mark();

    // The whole way: RESCUED without a fault, the repair made, ACTIVE with the repair, booted.
    scene.restart_with("").await;
    scene.rescue_actor(&actor).await;
    scene.unrescue_actor(&actor).await;

    // Its guest was off when it was rescued, and off it is again where that is asked for.
    into_error(&mut scene, &actor).await;
    scene.rescue_actor(&actor).await;
    let mut request = actor.unrescue_request(OverlayDisposition::Unspecified);
    request.power = UnrescuePower::Restore.into();
    let stopped = scene.client.unrescue(request).await.done().server.unwrap();
    Client::assert_settled(&stopped, VmState::Stopped);
    assert_eq!((stopped.fault, stopped.rescue), (None, None));
    assert_eq!(actor.number(), None);
    assert!(actor.is_marked(), "the repair is lost");
    let mark = actor.console().mark();
    scene.client.start(actor.id).await.done();
    scene.assert_original(&actor, mark, None).await;
}
