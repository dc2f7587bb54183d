// SPDX-License-Identifier: Apache-2.0
//! How operations come to an end before their time: they are cancelled, the agent is asked to stop, the
//! disk is full.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use salvor_proto::google::longrunning::{CancelOperationRequest, Operation};
use salvor_proto::v1::{
    DiskProtection, GuestStop, OperationState, OverlayDisposition, PlanActionRequest, StepState,
    StopServerRequest, VmState, plan_action_request::Action,
};
use salvor_tests::agent::AgentSettings;
use salvor_tests::client::{Client, assert_refused, reason};
use salvor_tests::console::Console;
use salvor_tests::host::TestHost;
use salvor_tests::run_folder::RunFolder;
use salvor_tests::wait::SOON;
use tonic::{Code, Status};
use uuid::Uuid;

use crate::actor::{Actor, tiny};
use crate::scene::{Scene, files_below};

async fn begin_stop(scene: &mut Scene<'_>, server: Uuid, within: Duration) -> Operation {
    let request = StopServerRequest {
        server: server.to_string(),
        shutdown_timeout: Some(within.try_into().unwrap()),
        ..StopServerRequest::default()
    };
    let answer = scene.client.servers.stop_server(request).await.unwrap();
    answer.into_inner().operation.unwrap()
}

/// Begins to rescue or to unrescue; the guest is given no time. One that was asked to shut down may do so
/// after a cancel as well: the request cannot be taken back.
async fn begin_at_once(scene: &mut Scene<'_>, actor: &Actor, rescue: bool) -> Operation {
    let at_once = Some(prost_types::Duration::default());
    let servers = &mut scene.client.servers;
    let operation = if rescue {
        let mut request = actor.rescue_request(DiskProtection::ReadWrite);
        request.shutdown_timeout = at_once;
        servers
            .rescue_server(request)
            .await
            .unwrap()
            .into_inner()
            .operation
    } else {
        let mut request = actor.unrescue_request(OverlayDisposition::Unspecified);
        request.shutdown_timeout = at_once;
        servers
            .unrescue_server(request)
            .await
            .unwrap()
            .into_inner()
            .operation
    };
    operation.unwrap()
}

pub(crate) async fn cancel(scene: &mut Scene<'_>, operation: &Operation) -> Result<(), Status> {
    let name = operation.name.clone();
    let request = CancelOperationRequest { name };
    scene
        .client
        .operations
        .cancel_operation(request)
        .await
        .map(|_| ())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_that_is_cancelled_leaves_the_guest_running() {
    let folder = RunFolder::for_this_test();
    let host = TestHost::shared();
    let guest = tiny("undecided").deaf();
    let (actor, mut scene) =
        Scene::with_actor(host, folder.path(), &guest, AgentSettings::default()).await;
    let (mark, number) = (actor.console().mark(), actor.number());
    let operation = begin_stop(&mut scene, actor.id, Duration::from_secs(600)).await;
    actor.console().wait_line(mark, "TINY-POWERBUTTON", SOON);
    let since = Instant::now();
    cancel(&mut scene, &operation).await.unwrap();
    let ended = scene.client.wait(&operation).await;
    println!("a stop was cancelled in {:?}", since.elapsed());
    assert_eq!(ended.metadata.state(), OperationState::Cancelled);
    assert_eq!(ended.error().code, Code::Cancelled as i32);
    assert!(since.elapsed() < Duration::from_secs(30));
    scene.assert_original(&actor, mark, number).await;
    assert_refused(
        scene
            .client
            .operations
            .cancel_operation(CancelOperationRequest {
                name: operation.name,
            })
            .await,
        Code::FailedPrecondition,
        "NOT_CANCELLABLE",
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_delete_is_taken_back_whole_or_carried_through() {
    let folder = RunFolder::for_this_test();
    let host = TestHost::shared();
    let settings = AgentSettings::default();
    let (actor, mut scene) = Scene::with_actor(host, folder.path(), &tiny("kept"), settings).await;
    let libvirt = actor.libvirt.clone();
    libvirt.set_autostart(actor.id).unwrap();
    libvirt.note_snapshot(actor.id, "before").unwrap();
    let (mark, number) = (actor.console().mark(), actor.number());
    // Before the definition goes, everything is taken back.
    scene.restart_with("delete:before-step:1:fail").await;
    let ended = scene.client.delete(actor.id).await;
    assert_eq!(ended.metadata.state(), OperationState::Failed, "{ended:#?}");
    assert_eq!(ended.metadata.steps[1].kind, "UndefineDomain");
    scene.assert_original(&actor, mark, number).await;
    assert!(libvirt.autostart(actor.id).unwrap());
    assert_eq!(libvirt.snapshots(actor.id).unwrap(), ["before"]);
    // After that it could not be: libvirt keeps neither with the definition that is given back.
    for failpoint in ["delete:after-step:1:fail", "delete:before-commit:fail"] {
        let other = scene.another_actor(&tiny(&Scene::unique("gone"))).await;
        libvirt.note_snapshot(other.id, "before").unwrap();
        scene.restart_with(failpoint).await;
        scene.client.delete(other.id).await.done();
        libvirt.inactive_xml(other.id).unwrap_err();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn rescue_and_unrescue_can_be_cancelled_in_every_phase() {
    let folder = RunFolder::for_this_test();
    let host = TestHost::shared();
    let (actor, mut scene) = Scene::with_actor(
        host,
        folder.path(),
        &tiny("cancelled"),
        AgentSettings::default(),
    )
    .await;
    let mut ends = Vec::new();
    for kind in [
        "HoldImage",
        "CreateOverlay",
        "SaveDefinition",
        "PowerOff",
        "DefineDomain",
        "StartDomain",
    ] {
        let (mark, number) = (actor.console().mark(), actor.number());
        let operation = begin_at_once(&mut scene, &actor, true).await;
        scene.wait_step(&operation, kind).await;
        let asked = cancel(&mut scene, &operation).await;
        let state = scene.client.wait(&operation).await.metadata.state();
        ends.push(("rescue", kind, state));
        match state {
            OperationState::Cancelled => {
                asked.unwrap();
                scene.assert_original(&actor, mark, number).await;
            }
            // It came too late, and nothing else.
            OperationState::Done => {
                scene.assert_rescued(&actor, &operation, mark, number).await;
                scene.unrescue_actor(&actor).await;
            }
            other => panic!("{other:?}"),
        }
        actor.remove_mark();
    }
    for kind in ["PowerOff", "DefineDomain", "StartDomain", "RemoveFolder"] {
        let rescued = scene.rescue_actor(&actor).await;
        let (mark, number) = (actor.console().mark(), actor.number());
        let operation = begin_at_once(&mut scene, &actor, false).await;
        scene.wait_step(&operation, kind).await;
        let asked = cancel(&mut scene, &operation).await;
        let state = scene.client.wait(&operation).await.metadata.state();
        ends.push(("unrescue", kind, state));
        match state {
            OperationState::Cancelled => {
                asked.unwrap();
                scene.assert_rescued(&actor, &rescued, mark, number).await;
                scene.unrescue_actor(&actor).await;
            }
            OperationState::Done => {
                if let Err(refused) = asked {
                    assert_eq!(reason(&refused), "NOT_CANCELLABLE");
                }
                scene.assert_original(&actor, mark, number).await;
                assert!(actor.is_marked(), "the repair is lost");
            }
            other => panic!("{other:?}"),
        }
        actor.remove_mark();
    }
    println!("cancelled at: {ends:?}");
    let cancelled = ends
        .iter()
        .filter(|(_, _, state)| *state == OperationState::Cancelled)
        .count();
    assert!(cancelled >= 4, "hardly a cancel came in time: {ends:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_is_asked_to_end_lets_a_running_stop_end_and_takes_no_new_work() {
    let folder = RunFolder::for_this_test();
    let host = TestHost::shared();
    let guest = tiny("draining").deaf();
    let (actor, mut scene) =
        Scene::with_actor(host, folder.path(), &guest, AgentSettings::default()).await;
    let mark = actor.console().mark();
    let operation = begin_stop(&mut scene, actor.id, Duration::from_secs(4)).await;
    actor.console().wait_line(mark, "TINY-POWERBUTTON", SOON);
    scene.agent.sigterm();
    // It may take a moment until it has heard.
    let deadline = Instant::now() + SOON;
    loop {
        let request = actor.rescue_request(DiskProtection::ReadWrite);
        let refused = scene.client.servers.rescue_server(request).await;
        let refused = refused.unwrap_err();
        if reason(&refused) == "DRAINING" {
            assert_eq!(refused.code(), Code::Unavailable);
            break;
        }
        assert!(
            Instant::now() < deadline,
            "new work is not refused: {refused:?}"
        );
    }
    assert_eq!(scene.client.get(actor.id).await.task_state, "powering-off");
    assert_eq!(scene.agent.wait_end(SOON), "exit 0");

    scene.restart().await;
    let ended = scene.client.wait(&operation).await;
    let stopped = ended.done();
    assert_eq!(ended.metadata.recoveries, 0, "it was not let end");
    assert_eq!(stopped.guest_stop(), GuestStop::Forced);
    Client::assert_settled(&stopped.server.unwrap(), VmState::Stopped);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_end_in_time_for_a_drain_is_carried_on_by_the_next_start() {
    let folder = RunFolder::for_this_test();
    let host = TestHost::shared();
    let guest = tiny("left").deaf();
    let settings = AgentSettings::default().set("drain.timeout", "500ms");
    let (actor, mut scene) = Scene::with_actor(host, folder.path(), &guest, settings).await;
    let mark = actor.console().mark();
    let operation = begin_stop(&mut scene, actor.id, Duration::from_secs(4)).await;
    actor.console().wait_line(mark, "TINY-POWERBUTTON", SOON);
    let since = Instant::now();
    assert_eq!(scene.agent.sigterm_and_wait(SOON), "exit 0");
    assert!(
        since.elapsed() < Duration::from_secs(4),
        "{:?}",
        since.elapsed()
    );
    assert!(actor.number().is_some(), "the stop has ended already");

    scene.restart().await;
    let ended = scene.client.wait(&operation).await;
    assert_eq!(ended.metadata.recoveries, 1);
    Client::assert_settled(&ended.done().server.unwrap(), VmState::Stopped);
}

/// How long the guest has been up, in the BIOS's ticks, of which it makes 18 a second.
pub(crate) fn ticks(console: &mut Console) -> u16 {
    let mark = console.mark();
    console.send("t");
    let line = console.wait_line(mark, "TINY-TICK ", SOON);
    u16::from_str_radix(line.rsplit(' ').next().unwrap(), 16).unwrap()
}

/// A small file system on the host, as the machine sees it: the host's mounts are its own.
pub(crate) struct SmallDisk {
    pub(crate) outside: PathBuf,
}

impl SmallDisk {
    pub(crate) fn mount(host: &TestHost, at: &Path, options: &str) -> Self {
        fs::create_dir_all(at).unwrap();
        let log = at.with_extension("mount.log");
        let arguments = ["-t", "tmpfs", "-o", options, "tmpfs", at.to_str().unwrap()];
        let mount = host.spawn(
            Path::new("/bin/mount"),
            &arguments,
            &Default::default(),
            &log,
        );
        assert_eq!(
            host.wait_end(mount, SOON),
            "exit 0",
            "{}",
            fs::read_to_string(&log).unwrap()
        );
        Self {
            outside: host.inside(at),
        }
    }

    /// Takes every byte that is left.
    pub(crate) fn use_up_bytes(&self) -> PathBuf {
        let path = self.outside.join("filler");
        let mut filler = fs::File::create(&path).unwrap();
        for size in [1 << 20, 1 << 12, 1] {
            while filler.write(&vec![1; size]).is_ok_and(|count| count > 0) {}
        }
        path
    }

    /// Makes empty files until no more can be made but `spare`.
    fn use_up_files(&self, spare: usize) -> Vec<PathBuf> {
        let mut made = Vec::new();
        while made.len() < 100_000 {
            let path = self.outside.join(format!("filler-{}", made.len()));
            if fs::File::create(&path).is_err() {
                break;
            }
            made.push(path);
        }
        for path in made.drain(made.len() - spare..) {
            fs::remove_file(path).unwrap();
        }
        made
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_is_full_leaves_the_guest_untouched_and_no_file_behind() {
    let folder = RunFolder::for_this_test();
    let host = TestHost::start(folder.path());
    let state = folder.join("small");
    let disk = SmallDisk::mount(&host, &state, "size=64m,nr_inodes=200");
    let settings = AgentSettings::default()
        .set("state_dir", state.to_str().unwrap())
        .set("storage.reserve", "0B");
    let (actor, mut scene) = Scene::with_actor(&host, folder.path(), &tiny("full"), settings).await;
    let servers = disk.outside.join("servers");
    let number = actor.number();

    // Not enough to begin with: refused at once.
    let filler = disk.outside.join("filler");
    fs::write(&filler, vec![0; 44 << 20]).unwrap();
    let refused = scene
        .client
        .servers
        .rescue_server(actor.rescue_request(DiskProtection::Overlay))
        .await;
    let refused = assert_refused(refused, Code::ResourceExhausted, "NO_SPACE");
    println!("{}", refused.message());
    fs::remove_file(&filler).unwrap();

    // Enough bytes, but a file too many: found out on the way, one step later each time.
    let mut failed_at = Vec::new();
    for spare in 0.. {
        let fillers = disk.use_up_files(spare);
        let (mark, before) = (actor.console().mark(), actor.number());
        let (answer, ended) = scene
            .client
            .rescue(actor.rescue_request(DiskProtection::Overlay))
            .await;
        for filler in fillers {
            fs::remove_file(filler).unwrap();
        }
        if ended.metadata.state() == OperationState::Done {
            scene
                .assert_rescued(&actor, &answer.operation.unwrap(), mark, before)
                .await;
            break;
        }
        let error = ended.error();
        let step = ended
            .metadata
            .steps
            .iter()
            .find(|step| step.state() != StepState::Pending && step.message == error.message);
        let step = step.unwrap_or_else(|| panic!("{ended:#?}"));
        assert_eq!(step.phase, "prepare", "{ended:#?}");
        assert_eq!(error.code, Code::ResourceExhausted as i32, "{ended:#?}");
        failed_at.push(step.kind.clone());
        assert_eq!(actor.number(), number, "the guest was touched");
        assert_eq!(actor.last_ready(mark), None, "the guest was restarted");
        scene.assert_original(&actor, mark, number).await;
        assert_eq!(
            files_below(&servers),
            Vec::<PathBuf>::new(),
            "files are left behind"
        );
        assert!(spare < 20, "the rescue never succeeds");
    }
    println!("no space at: {failed_at:?}");
    assert!(failed_at.len() >= 3, "{failed_at:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_fills_up_during_the_preparation_is_told_of_and_the_guest_runs_on() {
    let folder = RunFolder::for_this_test();
    let host = TestHost::start(folder.path());
    let servers = folder.join("state/servers");
    let disk = SmallDisk::mount(&host, &servers, "size=32m");
    let settings = AgentSettings::default().set("storage.reserve", "0B");
    let (actor, mut scene) =
        Scene::with_actor(&host, folder.path(), &tiny("filling"), settings).await;
    let number = actor.number();
    let mut console = Console::of(&actor.libvirt, actor.id);
    let mut up = ticks(&mut console);

    let request = actor.rescue_request(DiskProtection::Overlay);
    let plan = PlanActionRequest {
        action: Some(Action::Rescue(request)),
    };
    let plan = scene.client.servers.plan_action(plan).await.unwrap();
    let writes = |kind: &str| matches!(kind, "CreateOverlay" | "BuildConfigDrive");
    let steps = plan.into_inner().steps;
    let steps: Vec<(usize, String)> = steps
        .into_iter()
        .map(|step| step.kind)
        .enumerate()
        .collect();
    let of_files: Vec<_> = steps.iter().filter(|(_, kind)| writes(kind)).collect();
    assert_eq!(of_files.len(), 3, "{steps:?}");
    for (index, kind) in of_files {
        // The agent dies before the step, and while it is away somebody takes all the room there is.
        scene
            .restart_with(&format!("rescue:before-step:{index}:kill"))
            .await;
        let request = actor.rescue_request(DiskProtection::Overlay);
        let mark = actor.console().mark();
        // It may die before it has answered.
        let _ = scene.client.servers.rescue_server(request.clone()).await;
        assert_eq!(scene.agent.wait_end(SOON), "signal 9");
        let filler = disk.use_up_bytes();
        scene.start_with("").await;
        let (_, ended) = scene.client.rescue(request).await;

        assert_eq!(ended.metadata.state(), OperationState::Failed, "{ended:#?}");
        let error = ended.error();
        println!("no room at step {index} ({kind}): {}", error.message);
        assert_eq!(error.code, Code::ResourceExhausted as i32, "{ended:#?}");
        let step = &ended.metadata.steps[*index];
        assert_eq!((&step.kind, &step.message), (kind, &error.message));
        for part in [servers.to_str().unwrap(), "it takes ", " bytes", " free"] {
            assert!(error.message.contains(part), "{}", error.message);
        }
        // The guest was neither touched nor held up.
        assert_eq!(actor.number(), number, "the guest was touched");
        let now = ticks(&mut console);
        assert!(now > up, "the guest was restarted: {up} ticks, then {now}");
        up = now;
        fs::remove_file(filler).unwrap();
        scene.assert_original(&actor, mark, number).await;
        assert_eq!(files_below(&disk.outside), Vec::<PathBuf>::new());
    }

    // Too little to begin with is refused at once, with the place, the need and what there is.
    let filler = disk.outside.join("filler");
    fs::write(&filler, vec![1; 24 << 20]).unwrap();
    let refused = scene
        .client
        .servers
        .rescue_server(actor.rescue_request(DiskProtection::Overlay))
        .await;
    let refused = assert_refused(refused, Code::ResourceExhausted, "NO_SPACE");
    let place = servers.to_str().unwrap();
    for part in [place, "needs 16777216 bytes", "has 8388608"] {
        assert!(refused.message().contains(part), "{}", refused.message());
    }
    assert!(ticks(&mut console) > up);
    fs::remove_file(filler).unwrap();
    scene.rescue_actor(&actor).await;
}
