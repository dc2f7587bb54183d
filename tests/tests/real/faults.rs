// SPDX-License-Identifier: Apache-2.0
//! Faults round a rescue: libvirtd dies, QEMU dies, the agent ends, the host reboots. Whatever happens,
//! operations end in "done" or "as before", and records tell the truth, or that they do not know it.

use std::time::{Duration, Instant};

use salvor_proto::google::longrunning::CancelOperationRequest;
use salvor_proto::v1::{
    DiskProtection, GetHostRequest, OperationState, PowerState, StopServerRequest, VmState,
};
use salvor_tests::agent::AgentSettings;
use salvor_tests::client::{Client, Ended, assert_refused};
use salvor_tests::host::TestHost;
use salvor_tests::run_folder::RunFolder;
use salvor_tests::wait::SOON;
use tonic::Code;

use super::stage::{
    Actor, FIXER, begin_rescue, begin_unrescue, power_of, rescue, rescue_of, set_up, tiny,
    unrescue, wait_step,
};

#[tokio::test(flavor = "multi_thread")]
async fn rescue_and_unrescue_survive_the_death_of_libvirtd_in_every_phase() {
    let folder = RunFolder::for_this_test();
    let host = TestHost::start(folder.path());
    let (actor, mut play) = set_up(&host, &folder, &tiny("outage"), AgentSettings::default()).await;
    let mut ends = Vec::new();
    for kind in [
        "HoldImage",
        "CreateOverlay",
        "PowerOff",
        "DefineDomain",
        "StartDomain",
    ] {
        let (mark, number) = (actor.console().mark(), actor.number());
        let operation = begin_rescue(&mut play, &actor).await;
        wait_step(&mut play.client, &operation, kind).await;
        host.kill_libvirtd();
        let dark = play.wait_power(actor.id, PowerState::Unknown).await;
        assert!(dark.fault.is_none(), "{dark:#?}");
        host.start_libvirtd();
        let ended = play.client.wait(&operation).await;
        ends.push((kind, ended.metadata.state()));
        if ended.metadata.state() == OperationState::Done {
            play.assert_rescued(&actor, &operation, mark, number).await;
            unrescue(&mut play, &actor).await;
        } else {
            play.assert_original(&actor, mark, number).await;
            actor.remove_mark();
        }
    }
    for kind in ["PowerOff", "DefineDomain", "StartDomain", "RemoveFolder"] {
        let rescued = rescue(&mut play, &actor).await;
        let (mark, number) = (actor.console().mark(), actor.number());
        let operation = begin_unrescue(&mut play, &actor).await;
        wait_step(&mut play.client, &operation, kind).await;
        host.kill_libvirtd();
        let dark = play.wait_power(actor.id, PowerState::Unknown).await;
        assert!(dark.fault.is_none(), "{dark:#?}");
        host.start_libvirtd();
        let ended = play.client.wait(&operation).await;
        ends.push((kind, ended.metadata.state()));
        if ended.metadata.state() == OperationState::Done {
            play.assert_original(&actor, mark, number).await;
            assert!(actor.is_marked(), "the repair is lost");
            actor.remove_mark();
        } else {
            play.assert_rescued(&actor, &rescued, mark, number).await;
            unrescue(&mut play, &actor).await;
        }
    }
    println!("libvirtd killed at: {ends:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_outage_is_told_as_one_and_the_truth_comes_back_with_libvirtd() {
    let folder = RunFolder::for_this_test();
    let host = TestHost::start(folder.path());
    let (actor, mut play) = set_up(&host, &folder, &tiny("dark"), AgentSettings::default()).await;
    let mortal = Actor::running(&host, folder.path(), &tiny("mortal"));
    play.client.adopt(mortal.id).await;
    let number = actor.number();

    host.kill_libvirtd();
    let since = Instant::now();
    let server = play.wait_power(actor.id, PowerState::Unknown).await;
    println!("told UNKNOWN after {:?}", since.elapsed());
    let power = server.power.clone().unwrap();
    assert_eq!(power.last_known_state(), PowerState::Running);
    assert!(power.last_known_time.unwrap().seconds <= power.observe_time.unwrap().seconds);
    assert_eq!(
        server.vm_state(),
        VmState::Active,
        "an outage is no shut-down"
    );
    assert_eq!(play.client.list().await.len(), 2);
    let host_now = play
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

    let refused = play
        .client
        .servers
        .rescue_server(rescue_of(&actor, DiskProtection::ReadWrite))
        .await;
    assert_refused(refused, Code::Unavailable, "LIBVIRT_UNAVAILABLE");
    let stop = StopServerRequest {
        server: actor.id.to_string(),
        ..StopServerRequest::default()
    };
    let refused = play.client.servers.stop_server(stop).await;
    assert_refused(refused, Code::Unavailable, "LIBVIRT_UNAVAILABLE");
    Client::assert_settled(&play.client.get(actor.id).await, VmState::Active);
    host.kill_qemu(mortal.id);

    host.start_libvirtd();
    let since = Instant::now();
    play.wait_power(actor.id, PowerState::Running).await;
    println!("told RUNNING {:?} after libvirtd answered", since.elapsed());
    assert!(since.elapsed() < Duration::from_secs(10));
    assert_eq!(actor.number(), number, "the guest ran through");
    let what = "the guest that died meanwhile is off";
    let server = play
        .wait_server(mortal.id, what, |server| {
            power_of(server) == PowerState::Shutdown
        })
        .await;
    Client::assert_settled(&server, VmState::Stopped);
    rescue(&mut play, &actor).await;
    unrescue(&mut play, &actor).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_while_libvirtd_is_away_is_refused_and_works_when_it_is_back() {
    let folder = RunFolder::for_this_test();
    let host = TestHost::start(folder.path());
    let (actor, mut play) = set_up(&host, &folder, &tiny("retry"), AgentSettings::default()).await;
    host.kill_libvirtd();
    // Called at once: the agent may not even know yet that libvirtd is gone.
    let request = rescue_of(&actor, DiskProtection::ReadWrite);
    let refused = play.client.servers.rescue_server(request.clone()).await;
    assert_refused(refused, Code::Unavailable, "LIBVIRT_UNAVAILABLE");
    // An agent that starts meanwhile serves what it knows.
    play.agent.kill_9();
    play.agent.spawn();
    play.agent.wait_serving().await;
    play.client = Client::new(play.agent.channel());
    let server = play.wait_power(actor.id, PowerState::Unknown).await;
    assert_eq!(
        server.power.unwrap().last_known_state(),
        PowerState::Running
    );
    let refused = play.client.servers.rescue_server(request.clone()).await;
    assert_refused(refused, Code::Unavailable, "LIBVIRT_UNAVAILABLE");

    host.start_libvirtd();
    play.wait_power(actor.id, PowerState::Running).await;
    let (mark, number) = (actor.console().mark(), actor.number());
    let (answer, ended) = play.client.rescue(request).await;
    ended.done();
    assert!(
        !answer.admin_pass.is_empty(),
        "the refused call used the request id up"
    );
    play.assert_rescued(&actor, &answer.operation.unwrap(), mark, number)
        .await;
    unrescue(&mut play, &actor).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_libvirtd_that_hangs_holds_up_what_needs_it_and_nothing_else() {
    let folder = RunFolder::for_this_test();
    let host = TestHost::start(folder.path());
    let guest = tiny("hang");
    let (actor, mut play) = set_up(&host, &folder, &guest, AgentSettings::default()).await;
    let (mark, number) = (actor.console().mark(), actor.number());
    host.freeze_libvirtd();
    let mut servers = play.client.servers.clone();
    let request = rescue_of(&actor, DiskProtection::ReadWrite);
    let rescuing = tokio::spawn(async move { servers.rescue_server(request).await });
    let mut reads = Vec::new();
    for _ in 0..50 {
        let begun = Instant::now();
        play.client.get(actor.id).await;
        assert_eq!(play.client.list().await.len(), 1);
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
    play.client.hosts.get_host(GetHostRequest {}).await.unwrap();
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
    play.client.wait(&operation).await.done();
    play.assert_rescued(&actor, &operation, mark, number).await;
    unrescue(&mut play, &actor).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_action_that_waits_for_libvirtd_can_be_cancelled_and_survives_the_agent() {
    let folder = RunFolder::for_this_test();
    let host = TestHost::start(folder.path());
    let guest = tiny("waits").deaf();
    let (actor, mut play) = set_up(&host, &folder, &guest, AgentSettings::default()).await;
    let (mark, number) = (actor.console().mark(), actor.number());
    let operation = begin_rescue(&mut play, &actor).await;
    actor.console().wait_line(mark, "TINY-POWERBUTTON", SOON);
    host.kill_libvirtd();
    play.wait_power(actor.id, PowerState::Unknown).await;
    let name = operation.name.clone();
    let request = CancelOperationRequest { name };
    play.client
        .operations
        .cancel_operation(request)
        .await
        .unwrap();
    host.start_libvirtd();
    let ended = play.client.wait(&operation).await;
    assert_eq!(
        ended.metadata.state(),
        OperationState::Cancelled,
        "{ended:#?}"
    );
    play.assert_original(&actor, mark, number).await;

    // Both die, and the agent is back first.
    let operation = begin_rescue(&mut play, &actor).await;
    wait_step(&mut play.client, &operation, "PowerOff").await;
    host.kill_libvirtd();
    play.agent.kill_9();
    play.agent.spawn();
    play.agent.wait_serving().await;
    play.client = Client::new(play.agent.channel());
    let (_, metadata) = play.client.operation(&operation.name).await;
    assert_eq!(metadata.state(), OperationState::Running, "{metadata:#?}");
    host.start_libvirtd();
    let ended = play.client.wait(&operation).await;
    ended.done();
    play.assert_rescued(&actor, &operation, mark, number).await;
    unrescue(&mut play, &actor).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rescue_survives_the_death_of_qemu_in_every_phase() {
    let folder = RunFolder::for_this_test();
    let host = TestHost::shared();
    let (actor, mut play) =
        set_up(host, &folder, &tiny("qemu-dies"), AgentSettings::default()).await;
    let mut ends = Vec::new();
    for kind in [
        "HoldImage",
        "CreateOverlay",
        "PowerOff",
        "DefineDomain",
        "StartDomain",
    ] {
        let mark = actor.console().mark();
        let operation = begin_rescue(&mut play, &actor).await;
        wait_step(&mut play.client, &operation, kind).await;
        let mut killed = false;
        while !killed && !play.client.operation(&operation.name).await.0.done {
            // It may be between two lives just now.
            killed = host.try_kill_qemu(actor.id);
        }
        let ended = play.client.wait(&operation).await;
        ends.push((kind, killed, ended.metadata.state()));
        let server = play.client.get(actor.id).await;
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
                let operation = begin_unrescue(&mut play, &actor).await;
                play.client.wait(&operation).await.done();
                play.assert_original(&actor, back, None).await;
                assert!(actor.is_marked() || !rescued, "the repair is lost");
            }
            OperationState::Failed => match server.vm_state() {
                // Its guest was killed, so it is as before or off.
                VmState::Active => play.assert_original(&actor, mark, None).await,
                VmState::Stopped => {
                    play.client.start(actor.id).await.done();
                    play.assert_original(&actor, mark, None).await;
                }
                other => panic!("{other:?} after {ended:#?}"),
            },
            other => panic!("{other:?}"),
        }
        actor.remove_mark();
    }
    println!("QEMU killed at: {ends:#?}");
    actor.libvirt.remove(actor.id);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rescue_guest_that_dies_leaves_the_server_rescued_and_the_way_back_open() {
    let folder = RunFolder::for_this_test();
    let host = TestHost::shared();
    let (actor, mut play) = set_up(
        host,
        &folder,
        &tiny("rescue-dies"),
        AgentSettings::default(),
    )
    .await;
    rescue(&mut play, &actor).await;
    host.kill_qemu(actor.id);
    let server = play
        .wait_server(actor.id, "the rescue guest is off", |server| {
            matches!(power_of(server), PowerState::Shutdown | PowerState::Crashed)
        })
        .await;
    Client::assert_settled(&server, VmState::Rescued);
    unrescue(&mut play, &actor).await;
    actor.libvirt.remove(actor.id);
}

// libvirt does not define a domain under another name than it has.
#[tokio::test(flavor = "multi_thread")]
async fn a_domain_that_was_renamed_while_rescued_comes_back_under_its_new_name() {
    let folder = RunFolder::for_this_test();
    let host = TestHost::shared();
    let guest = tiny("renamed");
    let (mut actor, mut play) = set_up(host, &folder, &guest, AgentSettings::default()).await;
    rescue(&mut play, &actor).await;
    actor.libvirt.destroy(actor.id).unwrap();
    actor.libvirt.rename(actor.id, "a-new-name").unwrap();
    actor.definition = actor
        .definition
        .replace("<name>renamed</name>", "<name>a-new-name</name>");
    unrescue(&mut play, &actor).await;
    actor.libvirt.remove(actor.id);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_is_restarted_knows_the_rescue_and_the_way_back() {
    let folder = RunFolder::for_this_test();
    let host = TestHost::shared();
    let (actor, mut play) =
        set_up(host, &folder, &tiny("restarted"), AgentSettings::default()).await;
    let mark = actor.console().mark();
    let operation = rescue(&mut play, &actor).await;
    let number = actor.number();

    play.agent.kill_9();
    play.restart().await;
    play.assert_rescued(&actor, &operation, mark, None).await;
    let again = play
        .client
        .servers
        .rescue_server(rescue_of(&actor, DiskProtection::ReadWrite))
        .await;
    assert_refused(again, Code::FailedPrecondition, "ALREADY_RESCUED");

    assert_eq!(play.agent.sigterm_and_wait(SOON), "exit 0");
    play.restart().await;
    play.assert_rescued(&actor, &operation, mark, None).await;
    assert_eq!(
        actor.number(),
        number,
        "a restart of the agent touched the guest"
    );
    unrescue(&mut play, &actor).await;
    actor.libvirt.remove(actor.id);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_reboots_while_rescued_finds_record_and_domain_agreed() {
    let folder = RunFolder::for_this_test();
    let host = TestHost::start(folder.path());
    let (actor, mut play) = set_up(&host, &folder, &tiny("reboot"), AgentSettings::default()).await;
    let operation = rescue(&mut play, &actor).await;
    host.reboot();
    play.agent.forget_process();
    play.restart().await;
    let server = play.wait_power(actor.id, PowerState::Shutdown).await;
    Client::assert_settled(&server, VmState::Rescued);
    let plan = operation.name.strip_prefix("operations/").unwrap();
    assert!(actor.libvirt.inactive_xml(actor.id).unwrap().contains(plan));
    unrescue(&mut play, &actor).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rescue_that_a_reboot_cut_off_is_carried_on() {
    let folder = RunFolder::for_this_test();
    let host = TestHost::start(folder.path());
    let guest = tiny("cut").deaf();
    let (actor, mut play) = set_up(&host, &folder, &guest, AgentSettings::default()).await;
    let mark = actor.console().mark();
    let operation = begin_rescue(&mut play, &actor).await;
    // The guest is deaf, so this step lasts until the power goes.
    wait_step(&mut play.client, &operation, "PowerOff").await;
    host.reboot();
    play.agent.forget_process();
    play.restart().await;
    let ended: Ended = play.client.wait(&operation).await;
    ended.done();
    assert_eq!(ended.metadata.recoveries, 1);
    play.assert_rescued(&actor, &operation, mark, None).await;
    unrescue(&mut play, &actor).await;
}
