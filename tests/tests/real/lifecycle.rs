// SPDX-License-Identifier: Apache-2.0
//! Reboot, pause, suspend, dumps and passwords on real guests, seen from inside the guest.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use salvor_proto::v1::{
    ChangeServerPasswordRequest, GuestStop, OperationState, PowerState, RebootOnTimeout,
    RebootServerRequest, RebootType, Server, VmState,
};
use salvor_tests::agent::AgentSettings;
use salvor_tests::client::{Client, Plain, assert_refused, reason};
use salvor_tests::console::{Console, Mark};
use salvor_tests::guests::{LinuxGuest, TinyGuest, linux_slot};
use salvor_tests::run_folder::RunFolder;
use salvor_tests::wait::{BOOT, SOON, try_wait, wait_for};
use tonic::Code;
use uuid::Uuid;
use virt::domain::DomainState;

use crate::actor::{Actor, tiny};
use crate::crash::cases::points;
use crate::ends::{cancel, ticks};
use crate::scene::{Scene, crypt};

/// A scene with a tiny guest that runs.
async fn with_tiny<'h>(folder: &RunFolder, guest: &TinyGuest) -> (Actor, Scene<'h>) {
    let host = salvor_tests::host::TestHost::shared();
    Scene::with_actor(host, folder.path(), guest, AgentSettings::default()).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_guest_stands_still_and_goes_on_where_it_was() {
    let folder = RunFolder::for_this_test();
    let (actor, mut scene) = with_tiny(&folder, &tiny("stands")).await;
    let mut console = scene.console(actor.id);
    let (before, number, mark) = (ticks(&mut console), actor.number(), console.mark());

    let paused = scene.client.act(Plain::Pause, actor.id).await.done();
    let server = paused.server.unwrap();
    Client::assert_settled(&server, VmState::Paused);
    assert_eq!(server.status, "PAUSED");
    assert_eq!(server.power.unwrap().state(), PowerState::Paused);
    // What is not for a paused server is refused, and says what would help.
    let refused = scene.client.begin(Plain::Suspend, actor.id).await;
    let refused = refused.unwrap_err();
    assert_eq!(reason(&refused), "INVALID_STATE");
    assert!(refused.message().contains("unpause it"), "{refused:?}");
    // The agent that comes next finds it paused.
    scene.agent.kill_9();
    scene.restart().await;
    let server = scene.wait_power(actor.id, PowerState::Paused).await;
    Client::assert_settled(&server, VmState::Paused);

    let active = scene.client.act(Plain::Unpause, actor.id).await.done();
    Client::assert_settled(&active.server.unwrap(), VmState::Active);
    let after = ticks(&mut console);
    assert!(after >= before, "{after} < {before}: it was restarted");
    assert_eq!(actor.number(), number);
    assert_eq!(actor.last_ready(mark), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_suspended_guest_is_off_and_its_memory_comes_back() {
    let folder = RunFolder::for_this_test();
    let (actor, mut scene) = with_tiny(&folder, &tiny("sleeps")).await;
    let mut console = scene.console(actor.id);
    let (before, mark) = (ticks(&mut console), console.mark());

    let suspended = scene.client.act(Plain::Suspend, actor.id).await.done();
    let server = suspended.server.unwrap();
    Client::assert_settled(&server, VmState::Suspended);
    assert_eq!(server.status, "SUSPENDED");
    assert_eq!(server.power.unwrap().state(), PowerState::Shutdown);
    assert_eq!(actor.number(), None);
    let has_memory = |actor: &Actor| {
        actor
            .libvirt
            .domain(actor.id, |domain| domain.has_managed_save(0))
            .unwrap()
    };
    assert!(has_memory(&actor));

    let resumed = scene.client.act(Plain::Resume, actor.id).await.done();
    Client::assert_settled(&resumed.server.unwrap(), VmState::Active);
    let after = ticks(&mut console);
    assert!(after >= before, "{after} < {before}: it was restarted");
    assert_eq!(actor.last_ready(mark), None, "it booted anew");
    assert!(!has_memory(&actor));

    // Without the memory there is nothing to resume: that is said, and the way out is.
    scene.client.act(Plain::Suspend, actor.id).await.done();
    actor
        .libvirt
        .domain(actor.id, |domain| domain.managed_save_remove(0))
        .unwrap();
    let refused = scene.client.begin(Plain::Resume, actor.id).await;
    let refused = refused.unwrap_err();
    assert_eq!(reason(&refused), "NO_SAVED_MEMORY");
    let mark = console.mark();
    scene.client.act(Plain::HardReboot, actor.id).await.done();
    actor.wait_ready(mark, "sleeps");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_resume_that_fails_keeps_the_saved_memory() {
    let folder = RunFolder::for_this_test();
    let (actor, mut scene) = with_tiny(&folder, &tiny("keeps")).await;
    let mut console = scene.console(actor.id);
    let (before, mark) = (ticks(&mut console), console.mark());
    scene.client.act(Plain::Suspend, actor.id).await.done();
    // Its disk is away, as after a mount that is missing.
    let away = actor.disk.with_extension("away");
    fs::rename(&actor.disk, &away).unwrap();
    let failed = scene.client.act(Plain::Resume, actor.id).await;
    assert_eq!(failed.metadata.state(), OperationState::Failed);
    let server = scene.client.get(actor.id).await;
    Client::assert_settled(&server, VmState::Suspended);
    fs::rename(&away, &actor.disk).unwrap();

    scene.client.act(Plain::Resume, actor.id).await.done();
    let after = ticks(&mut console);
    assert!(after >= before, "{after} < {before}: it was restarted");
    assert_eq!(actor.last_ready(mark), None, "it booted anew");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_soft_reboot_is_the_guests_own_or_is_reported_as_forced_or_fails_as_asked() {
    let folder = RunFolder::for_this_test();
    let (actor, mut scene) = with_tiny(&folder, &tiny("hears")).await;
    let mark = actor.console().mark();
    let hard = RebootOnTimeout::Hard;
    let by_itself = scene.client.reboot(actor.id, SOON, hard).await.done();
    assert_eq!(by_itself.guest_stop(), GuestStop::ByItself);
    Client::assert_settled(&by_itself.server.unwrap(), VmState::Active);
    actor.wait_ready(mark, "hears");

    let deaf = scene.another_actor(&tiny("deaf").deaf()).await;
    let mut console = scene.console(deaf.id);
    let (before, number, mark) = (ticks(&mut console), deaf.number(), console.mark());
    let patience = Duration::from_secs(2);
    let fail = RebootOnTimeout::Fail;
    let failed = scene.client.reboot(deaf.id, patience, fail).await;
    assert_eq!(failed.reason(), "GUEST_STILL_ON");
    assert_eq!(deaf.number(), number, "it was touched");
    assert!(ticks(&mut console) >= before);
    let server = scene.client.get(deaf.id).await;
    Client::assert_settled(&server, VmState::Active);

    let since = Instant::now();
    let forced = scene.client.reboot(deaf.id, patience, hard).await.done();
    assert!(since.elapsed() >= patience, "it was ended before its time");
    assert_eq!(forced.guest_stop(), GuestStop::Forced);
    deaf.wait_ready(mark, "deaf");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hard_reboot_boots_anew_from_every_state_that_it_is_for() {
    let folder = RunFolder::for_this_test();
    let (actor, mut scene) = with_tiny(&folder, &tiny("again")).await;
    for first in [None, Some(Plain::Pause), Some(Plain::Suspend)] {
        if let Some(first) = first {
            scene.client.act(first, actor.id).await.done();
        }
        let mark = actor.console().mark();
        let rebooted = scene.client.act(Plain::HardReboot, actor.id).await;
        let lost = rebooted
            .metadata
            .warnings
            .iter()
            .any(|warning| warning.name == "SAVED_MEMORY_LOST");
        assert_eq!(lost, first == Some(Plain::Suspend), "{first:?}");
        Client::assert_settled(&rebooted.done().server.unwrap(), VmState::Active);
        actor.wait_ready(mark, "again");
    }
    scene
        .client
        .stop(actor.id, Some(Duration::ZERO))
        .await
        .done();
    let mark = actor.console().mark();
    scene.client.act(Plain::HardReboot, actor.id).await.done();
    actor.wait_ready(mark, "again");
    let without_type = RebootServerRequest {
        server: actor.id.to_string(),
        ..RebootServerRequest::default()
    };
    let answer = scene.client.servers.reboot_server(without_type).await;
    assert_refused(answer, Code::InvalidArgument, "INVALID_FIELD");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hard_reboot_overtakes_a_stop_that_waits_and_two_at_once_have_one_winner() {
    let folder = RunFolder::for_this_test();
    let (actor, mut scene) = with_tiny(&folder, &tiny("hurried").deaf()).await;
    let stop = salvor_proto::v1::StopServerRequest {
        server: actor.id.to_string(),
        shutdown_timeout: crate::scene::seconds(300),
        ..salvor_proto::v1::StopServerRequest::default()
    };
    let answer = scene.client.servers.stop_server(stop).await.unwrap();
    let stop = answer.into_inner().operation.unwrap();
    let refused = scene.client.begin(Plain::Pause, actor.id).await;
    let refused = refused.unwrap_err();
    assert_eq!(
        (refused.code(), reason(&refused)),
        (Code::Aborted, "SERVER_BUSY".into())
    );
    assert!(refused.message().contains(&stop.name), "{refused:?}");
    let mark = actor.console().mark();
    let kind = RebootType::Hard;
    let request = RebootServerRequest {
        server: actor.id.to_string(),
        r#type: kind.into(),
        ..RebootServerRequest::default()
    };
    let answer = scene.client.servers.reboot_server(request).await.unwrap();
    scene
        .client
        .wait(&answer.into_inner().operation.unwrap())
        .await
        .done();
    actor.wait_ready(mark, "hurried");
    let ended = scene.client.wait(&stop).await;
    assert_eq!(ended.metadata.state(), OperationState::Cancelled);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_memory_dump_is_whole_private_and_goes_with_the_server() {
    let folder = RunFolder::for_this_test();
    let (actor, mut scene) = with_tiny(&folder, &tiny("dumped")).await;
    let mut console = scene.console(actor.id);
    let before = ticks(&mut console);
    let dumped = scene.client.act(Plain::DumpMemory, actor.id).await;
    dumped.done();
    let step = dumped.metadata.steps.last().unwrap();
    let path = PathBuf::from(step.message.split(',').next().unwrap());
    let dump = fs::read(&path).unwrap();
    assert_eq!(&dump[..4], b"\x7fELF");
    assert!(dump.len() >= 16 << 20, "{} bytes", dump.len());
    let mode = fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o077, 0, "others can read it: {mode:o}");
    assert!(ticks(&mut console) >= before, "it was restarted");
    // It survives a restart of the agent, which removes what nobody knows.
    scene.agent.kill_9();
    scene.restart().await;
    assert!(path.exists());
    scene.client.act(Plain::Delete, actor.id).await.done();
    assert!(!path.exists());
    assert_eq!(scene.files_of(actor.id), Vec::<PathBuf>::new());
}

/// So much that working through it takes a while.
const LARGE_MIB: u64 = 2048;

#[tokio::test(flavor = "multi_thread")]
async fn a_suspend_or_dump_that_is_cancelled_leaves_a_guest_that_goes_on_and_no_file() {
    let mut scene = Scene::new().await;
    let guest = tiny("large");
    let id = scene.define(&scene.tiny_xml(&guest).memory(LARGE_MIB));
    scene.libvirt.start(id).unwrap();
    let mut console = scene.console(id);
    console.wait_line(Mark::START, "TINY-READY large", SOON);
    scene.client.adopt(id).await;
    let number = scene.libvirt.number(id).unwrap();
    for verb in [Plain::DumpMemory, Plain::Suspend] {
        let before = ticks(&mut console);
        let mark = console.mark();
        let operation = scene.client.begin(verb, id).await.unwrap();
        wait_for("its memory is worked through", SOON, || {
            (scene.libvirt.state(id).unwrap() == DomainState::Paused).then_some(())
        });
        cancel(&mut scene, &operation).await.unwrap();
        let ended = scene.client.wait(&operation).await;
        assert_eq!(
            ended.metadata.state(),
            OperationState::Cancelled,
            "{verb:?}"
        );
        let server = scene.client.get(id).await;
        Client::assert_settled(&server, VmState::Active);
        assert!(ticks(&mut console) >= before, "{verb:?}: it was restarted");
        assert!(!console.since(mark).contains("TINY-READY"), "{verb:?}");
        assert_eq!(scene.files_of(id), Vec::<PathBuf>::new(), "{verb:?}");
        let saved = scene
            .libvirt
            .domain(id, |domain| domain.has_managed_save(0));
        assert!(!saved.unwrap(), "{verb:?}");
    }
    // The save was ended, not carried through and taken back.
    assert_eq!(scene.libvirt.number(id).unwrap(), number);
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_that_was_saved_before_the_agent_came_is_resumed_not_lost() {
    let folder = RunFolder::for_this_test();
    let host = salvor_tests::host::TestHost::shared();
    let mut scene = Scene::on(host, folder.path(), AgentSettings::default()).await;
    let id = scene.define(&scene.tiny_xml(&tiny("saved")));
    scene.libvirt.start(id).unwrap();
    let mut console = scene.console(id);
    console.wait_line(Mark::START, "TINY-READY saved", SOON);
    let (before, mark) = (ticks(&mut console), console.mark());
    scene
        .libvirt
        .domain(id, |domain| domain.managed_save(0))
        .unwrap();
    let adopted = scene.client.adopt(id).await;
    Client::assert_settled(&adopted, VmState::Suspended);
    // As with any suspended server a start is refused, and says what there is to do.
    let refused = scene.client.begin(Plain::Start, id).await.unwrap_err();
    assert_eq!(reason(&refused), "INVALID_STATE");
    assert!(refused.message().contains("resume"), "{refused:?}");
    scene.client.act(Plain::Resume, id).await.done();
    assert!(ticks(&mut console) >= before);
    assert!(
        !console.since(mark).contains("TINY-READY"),
        "it booted anew"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_soft_reboot_asks_the_guest_agent_where_the_power_button_is_not_heard() {
    let settings = AgentSettings::default().set("shutdown.retry_interval", "1s");
    let mut scene = Scene::with(settings).await;
    let _slot = linux_slot();
    let (id, console) = linux(&mut scene, &LinuxGuest::new("agent").deaf()).await;
    let mark = console.mark();
    let fail = RebootOnTimeout::Fail;
    let rebooted = scene.client.reboot(id, BOOT, fail).await.done();
    assert_eq!(rebooted.guest_stop(), GuestStop::ByItself);
    console.wait_line(mark, "GUEST ready name=agent", BOOT);
}

/// A server with a Linux guest that has an agent.
async fn linux(scene: &mut Scene<'_>, guest: &LinuxGuest) -> (Uuid, Console) {
    let xml = scene.linux_xml(guest);
    let id = scene
        .running(&xml, &format!("GUEST ready name={}", guest.name))
        .await;
    // The guest says that it is ready before its agent has connected.
    if guest.guest_agent {
        let connected = try_wait(SOON, || {
            let live = scene.libvirt.live_xml(id).unwrap();
            live.contains("state='connected'").then_some(())
        });
        assert!(connected.is_some(), "the guest agent does not connect");
    }
    let console = scene.console(id);
    (id, console)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_in_memory_survives_and_the_clock_is_right_afterwards() {
    let mut scene = Scene::new().await;
    let _slot = linux_slot();
    let (id, mut console) = linux(&mut scene, &LinuxGuest::new("clock")).await;
    console.run_ok("mkdir -p /mem && mount -t tmpfs none /mem && echo kept > /mem/note");
    for (there, back) in [
        (Plain::Pause, Plain::Unpause),
        (Plain::Suspend, Plain::Resume),
    ] {
        scene.client.act(there, id).await.done();
        // The guest's clock stands still meanwhile, unless somebody sets it.
        console.mark();
        let off = Duration::from_secs(3);
        tokio::time::sleep(off).await;
        let ended = scene.client.act(back, id).await;
        ended.done();
        let set = ended.metadata.steps.last().unwrap();
        assert_eq!(
            (set.kind.as_str(), set.message.as_str()),
            ("SetGuestTime", "set")
        );
        assert_eq!(console.run_ok("cat /mem/note").trim(), "kept");
        let guest: u64 = console.run_ok("date +%s").trim().parse().unwrap();
        let host = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap()
            .as_secs();
        assert!(
            host.abs_diff(guest) <= 2,
            "{there:?}: the guest has {guest}, the host {host}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_nmi_reaches_the_guest() {
    let mut scene = Scene::new().await;
    let _slot = linux_slot();
    let (id, mut console) = linux(&mut scene, &LinuxGuest::new("nmi").without_agent()).await;
    let before: u32 = nmis(&mut console);
    scene.client.act(Plain::CrashDump, id).await.done();
    let deadline = Instant::now() + BOOT;
    while nmis(&mut console) == before {
        assert!(Instant::now() < deadline, "no NMI came");
    }
    let server = scene.client.get(id).await;
    Client::assert_settled(&server, VmState::Active);
}

/// How many NMIs the guest's first CPU has had.
fn nmis(console: &mut Console) -> u32 {
    let line = console.run_ok("grep NMI: /proc/interrupts");
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_password_is_set_by_the_guest_agent_and_a_refusal_says_why() {
    let mut scene = Scene::new().await;
    let _slot = linux_slot();
    let (id, mut console) = linux(&mut scene, &LinuxGuest::new("pass")).await;
    let ask = |user: &str, password: Option<&str>| ChangeServerPasswordRequest {
        server: id.to_string(),
        user: user.into(),
        admin_pass: password.map(str::to_owned),
        ..ChangeServerPasswordRequest::default()
    };
    let connected = |server: &Server| server.guest_agent.is_some_and(|seen| seen.connected);
    scene
        .client
        .wait_server(id, "its agent is there", connected)
        .await;
    let request = ask("", None);
    let answer = scene.client.servers.change_server_password(request).await;
    let answer = answer.unwrap().into_inner();
    scene.client.wait(&answer.operation.unwrap()).await.done();
    let line = console.run_ok("grep ^root: /etc/shadow");
    let hash = line.split(':').nth(1).unwrap();
    assert_eq!(hash, crypt(&answer.admin_pass, hash));
    let is_kept = |text: &str| String::from_utf8_lossy(&scene.everything_kept()).contains(text);
    assert!(!is_kept(&answer.admin_pass));
    // Nor is its hash, as soon as nobody needs it.
    wait_for("its hash is gone", SOON, || (!is_kept(hash)).then_some(()));

    // The guest's own refusal.
    let request = ask("nobody-has-this-name", Some("s3cret-enough"));
    let answer = scene.client.servers.change_server_password(request).await;
    let ended = scene
        .client
        .wait(&answer.unwrap().into_inner().operation.unwrap())
        .await;
    assert_eq!(ended.reason(), "GUEST_AGENT_REFUSED");
    for bad in ["", "a\nb", "a\u{7}b", "a:b"] {
        let request = ask("", Some(bad));
        let answer = scene.client.servers.change_server_password(request).await;
        assert_refused(answer, Code::InvalidArgument, "INVALID_FIELD");
    }
    let request = ask("a b", None);
    let answer = scene.client.servers.change_server_password(request).await;
    assert_refused(answer, Code::InvalidArgument, "INVALID_FIELD");

    // No agent that answers, and then no channel at all.
    console.run_ok("killall qemu-ga");
    let mut tries = 1;
    let request = ask("", None);
    let answer = scene.client.servers.change_server_password(request).await;
    let refused = assert_refused(answer, Code::FailedPrecondition, "GUEST_AGENT_UNAVAILABLE");
    assert!(refused.message().contains("does not answer"), "{refused:?}");
    // After three tries it is not asked any more, until it connects.
    let given_up = loop {
        let answer = scene
            .client
            .servers
            .change_server_password(ask("", None))
            .await;
        let refused = assert_refused(answer, Code::FailedPrecondition, "GUEST_AGENT_UNAVAILABLE");
        if !refused.message().contains("does not answer") {
            break refused;
        }
        tries += 1;
    };
    assert_eq!(tries, 3, "{given_up:?}");
    assert!(given_up.message().contains("asked again"), "{given_up:?}");
    console.run_ok("guest-agent > /dev/null 2>&1 &");
    let deadline = Instant::now() + BOOT;
    while let Err(refused) = scene
        .client
        .servers
        .change_server_password(ask("", None))
        .await
    {
        assert!(Instant::now() < deadline, "{refused:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let id = scene.tiny(&TinyGuest::new("none")).await;
    let request = ChangeServerPasswordRequest {
        server: id.to_string(),
        ..ChangeServerPasswordRequest::default()
    };
    let answer = scene.client.servers.change_server_password(request).await;
    let refused = assert_refused(answer, Code::FailedPrecondition, "GUEST_AGENT_UNAVAILABLE");
    assert!(refused.message().contains("no channel"), "{refused:?}");
}

/// What becomes of a server whose agent is killed at each point of an action.
#[tokio::test(flavor = "multi_thread")]
async fn an_agent_killed_anywhere_in_suspend_resume_and_reboot_leaves_a_server_that_goes_on() {
    let folder = RunFolder::for_this_test();
    let (actor, mut scene) = with_tiny(&folder, &tiny("killed")).await;
    let mut console = scene.console(actor.id);
    let mut cases = 0;
    for (verb, name, steps) in [
        (Plain::Suspend, "suspend", 1),
        (Plain::Resume, "resume", 1),
        (Plain::HardReboot, "hardReboot", 2),
        (Plain::SoftReboot, "reboot", 2),
    ] {
        for point in points(steps, steps) {
            let state = scene.client.get(actor.id).await.vm_state();
            if verb == Plain::Resume && state != VmState::Suspended {
                scene.client.act(Plain::Suspend, actor.id).await.done();
            } else if verb != Plain::Resume && state == VmState::Suspended {
                scene.client.act(Plain::Resume, actor.id).await.done();
            }
            let before = match verb {
                Plain::Resume => 0,
                _ => ticks(&mut console),
            };
            let mark = console.mark();
            scene.agent.kill_9();
            scene.start_with(&format!("{name}:{point}:kill")).await;
            // The answer may die with the agent.
            let _ = scene.client.begin(verb, actor.id).await;
            scene.agent.wait_end(SOON);
            scene.start_with("").await;
            let server = scene
                .client
                .wait_server(actor.id, "it is settled", |server| {
                    server.task_state.is_empty() && server.operation.is_empty()
                })
                .await;
            assert_eq!(server.fault, None, "{name} {point}: {server:#?}");
            match (verb, server.vm_state()) {
                (Plain::Suspend, VmState::Suspended) => {
                    scene.client.act(Plain::Resume, actor.id).await.done();
                    assert!(ticks(&mut console) >= before, "{point}: memory is lost");
                    assert_eq!(actor.last_ready(mark), None, "{point}");
                }
                (Plain::Resume | Plain::Suspend, VmState::Active) => {
                    assert!(ticks(&mut console) >= before, "{point}: memory is lost");
                    assert_eq!(actor.last_ready(mark), None, "{name} {point}");
                }
                (Plain::HardReboot | Plain::SoftReboot, VmState::Active) => {
                    actor.wait_ready(mark, "killed")
                }
                (_, state) => panic!("{name} {point}: {state:?}"),
            }
            cases += 1;
        }
    }
    println!("killed at {cases} points");
}
