// SPDX-License-Identifier: Apache-2.0
//! The agent is killed while its qemu-img writes an overlay back: qemu-img dies with it, and whoever takes
//! the operation up again ends with the bytes that were to be written.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use salvor_proto::google::longrunning::Operation;
use salvor_proto::v1::{DiskProtection, OverlayDisposition, PowerState};
use salvor_tests::agent::AgentSettings;
use salvor_tests::host::TestHost;
use salvor_tests::run_folder::RunFolder;
use salvor_tests::tool;
use salvor_tests::wait::{SOON, wait_for};

use crate::actor::tiny;
use crate::scene::Scene;

/// What is committed: so many bytes, from here on.
const AT: usize = 8 << 20;
const LENGTH: usize = 40 << 20;
const BYTE: u8 = 0xa5;

/// A qemu-img that commits no more than so many bytes a second, in a folder to be put before the real one.
fn slow_qemu_img(folder: &Path, rate: &str) -> String {
    fs::create_dir_all(folder).unwrap();
    let script = folder.join("qemu-img");
    let text = format!(
        "#!/bin/sh\n\
         [ \"$1\" = commit ] || exec /usr/bin/qemu-img \"$@\"\n\
         shift\n\
         exec /usr/bin/qemu-img commit -r {rate} \"$@\"\n"
    );
    fs::write(&script, text).unwrap();
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
    let path = std::env::var("PATH").unwrap();
    format!("{}:{path}", folder.display())
}

/// Waits until the commit is under way and some of it is written.
async fn wait_halfway(scene: &mut Scene<'_>, operation: &Operation) {
    let deadline = Instant::now() + SOON;
    loop {
        let (now, metadata) = scene.client.operation(&operation.name).await;
        let commit = metadata.steps.iter().find(|s| s.kind == "CommitOverlay");
        let percent = commit.unwrap().progress_percent.unwrap_or(0);
        if percent >= 30 {
            assert!(percent < 80, "{metadata:#?}");
            return;
        }
        assert!(!now.done && Instant::now() < deadline, "{metadata:#?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_dies_with_the_agent_and_is_done_by_the_next_one() {
    let folder = RunFolder::for_this_test();
    let path = slow_qemu_img(&folder.join("tools"), "8M");
    let settings = AgentSettings::default().env("PATH", &path);
    let host = TestHost::shared();
    let mut guest = tiny("commits");
    guest.size_mib = 64;
    let (actor, mut scene) = Scene::with_actor(host, folder.path(), &guest, settings).await;
    let mark = actor.console().mark();
    let request = actor.rescue_request(DiskProtection::Overlay);
    scene.client.rescue(request).await.1.done();
    actor.console().wait_line(mark, "TINY-MARKED ", SOON);

    // The rescue guest is too small to write much, so that is done for it.
    scene.libvirt.destroy(actor.id).unwrap();
    scene.wait_power(actor.id, PowerState::Shutdown).await;
    let is_overlay = |file: &PathBuf| file.ends_with("hda.overlay");
    let overlay = scene
        .files_of(actor.id)
        .into_iter()
        .find(is_overlay)
        .unwrap();
    let write = format!("write -P {BYTE} {AT} {LENGTH}");
    tool!("qemu-io", "-f", "qcow2", "-c", write, overlay);
    let before = fs::read(&actor.disk).unwrap();
    let wanted = actor.content(&overlay);
    assert!(wanted[AT..AT + LENGTH].iter().all(|byte| *byte == BYTE));
    assert!(before[AT..AT + LENGTH].iter().all(|byte| *byte == 0));

    let request = actor.unrescue_request(OverlayDisposition::Commit);
    let answer = scene.client.servers.unrescue_server(request).await.unwrap();
    let operation = answer.into_inner().operation.unwrap();
    for death in 1..=2 {
        wait_halfway(&mut scene, &operation).await;
        let name = overlay.to_str().unwrap();
        assert_eq!(host.with_argument(name).len(), 1, "one qemu-img");
        scene.agent.kill_9();
        wait_for("qemu-img is gone", Duration::from_secs(5), || {
            host.with_argument(name).is_empty().then_some(())
        });
        let half = fs::read(&actor.disk).unwrap();
        let written = half[AT..AT + LENGTH].iter().filter(|byte| **byte == BYTE);
        let written = written.count();
        println!("death {death} with {written} of {LENGTH} bytes written");
        assert!(written > 0 && written < LENGTH, "{written}");
        assert!(overlay.exists(), "what is not yet written is lost");
        if death == 2 {
            // As fast as it can.
            let path = std::env::var("PATH").unwrap();
            let change = |settings: AgentSettings| settings.env("PATH", &path);
            scene.agent.change_settings(change);
        }
        scene.restart().await;
    }
    let ended = scene.client.wait(&operation).await;
    ended.done();
    assert_eq!(ended.metadata.recoveries, 2);
    assert!(
        fs::read(&actor.disk).unwrap() == wanted,
        "the disk is not what was to be committed"
    );
    scene.assert_original(&actor, mark, None).await;
}
