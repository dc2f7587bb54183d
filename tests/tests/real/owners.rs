// SPDX-License-Identifier: Apache-2.0
//! A host as it is installed: QEMU is a user of its own, and libvirt gives it the files of a guest. What
//! belongs to whom before, during and after a rescue, and that everything still starts.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;

use nix::unistd::User;
use salvor_proto::v1::{
    CreateServerRequest, DiskProtection, Firmware, Image, OverlayDisposition, RescueDevice,
    RescueServerRequest, UnrescueServerRequest, VmState,
};
use salvor_tests::agent::AgentSettings;
use salvor_tests::client::Client;
use salvor_tests::console::Mark;
use salvor_tests::domain::DomainXml;
use salvor_tests::guests::{Format, TinyGuest, labelled_disk, mark_of};
use salvor_tests::host::{QEMU_USER, TestHost};
use salvor_tests::run_folder::RunFolder;
use salvor_tests::wait::SOON;
use uuid::Uuid;
use virt::domain::DomainState;

use crate::create::server_from;
use crate::scene::{PROTECTIONS, Scene, rescue_with, sha256, unrescue_of};

/// A file's owner, group and mode.
type Access = (u32, u32, u32);

/// Images belong to root and nobody writes to them.
const IMAGE: Access = (0, 0, 0o444);

#[track_caller]
fn access(path: &Path) -> Access {
    let metadata = fs::metadata(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let mode = metadata.permissions().mode() & 0o7777;
    (metadata.uid(), metadata.gid(), mode)
}

fn qemu_user() -> User {
    User::from_name(QEMU_USER)
        .unwrap()
        .expect("libvirt-daemon-system is installed")
}

async fn scene() -> Scene<'static> {
    let host = TestHost::shared_with_packaged_user();
    Scene::in_own(host, RunFolder::for_everybody(), AgentSettings::default()).await
}

impl Scene<'_> {
    /// Checks that the guest's QEMU is the user that it should be: without that nothing here shows
    /// anything.
    #[track_caller]
    fn assert_unprivileged(&self, id: Uuid) {
        let qemu = self.host.qemu(id).expect("the guest runs");
        let pid = self.host.machine_pid(qemu).unwrap();
        let owner = fs::metadata(format!("/proc/{pid}")).unwrap().uid();
        assert_eq!(owner, qemu_user().uid.as_raw());
    }

    /// Checks what other users can get at: nothing of a server, nothing but images by their names.
    #[track_caller]
    fn assert_closed(&self) {
        let mut folders = vec![self.agent.state_folder()];
        while let Some(folder) = folders.pop() {
            let (uid, _, mode) = access(&folder);
            assert_eq!((uid, mode & 0o066), (0, 0), "{}", folder.display());
            for entry in fs::read_dir(&folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    folders.push(path);
                } else if folder.ends_with("images") {
                    assert_eq!(access(&path), IMAGE, "{}", path.display());
                } else {
                    assert_eq!(access(&path).2 & 0o077, 0, "{}", path.display());
                }
            }
        }
    }
}

/// A disk of a domain that somebody made by hand, with an owner of its own.
#[track_caller]
fn owned(disk: &Path) -> Access {
    chown(disk, Some(7), Some(8)).unwrap();
    fs::set_permissions(disk, fs::Permissions::from_mode(0o640)).unwrap();
    access(disk)
}

#[tokio::test(flavor = "multi_thread")]
async fn disks_belong_after_every_sort_of_rescue_to_whom_they_did_before() {
    let mut scene = scene().await;
    let file = scene.folder.join("fixer.image");
    TinyGuest::new("fixer").fixing().build(&file, Format::Raw);
    let image = scene.import("fixer", Format::Raw, &file).await;
    let stored = scene.stored_file(&image);
    for (number, (protection, overlay)) in PROTECTIONS.into_iter().enumerate() {
        println!("{protection:?} {overlay:?}");
        // Only of IDE disks a BIOS shows the rescue guest those that do not boot; only virtio disks can
        // be read-only.
        let (target, bus) = match protection {
            DiskProtection::ReadOnly => ("vda", "virtio"),
            _ => ("hda", "ide"),
        };
        let guest = TinyGuest::new(&format!("orig-{number}"));
        let (root, data) = (scene.folder.join(&guest.name), scene.folder.join("data"));
        guest.build(&root, Format::Raw);
        labelled_disk("data", 1, &data, Format::Qcow2);
        let before = [owned(&root), owned(&data)];
        let xml = DomainXml::tiny(&Scene::unique(&guest.name), &scene.log(&guest.name))
            .disk(&root, Format::Raw, target, bus, "root", Some(1))
            .disk(&data, Format::Qcow2, "vdb", "virtio", "data", None);
        let up = format!("TINY-READY {}", guest.name);
        let id = scene.running(&xml, &up).await;
        scene.assert_unprivileged(id);
        let definition = scene.libvirt.inactive_xml(id).unwrap();

        let console = scene.console(id);
        let mark = console.mark();
        let request = RescueServerRequest {
            disk_protection: protection.into(),
            ..rescue_with(id, &image)
        };
        scene.rescue(request).await;
        console.wait_line(mark, "TINY-READY fixer", SOON);
        scene.assert_unprivileged(id);
        scene.assert_closed();
        if protection != DiskProtection::ReadOnly {
            console.wait_line(mark, "TINY-MARKED", SOON);
        }
        let mark = console.mark();
        let request = UnrescueServerRequest {
            overlay: overlay.into(),
            ..unrescue_of(id)
        };
        scene.unrescue(request).await;
        console.wait_line(mark, &up, SOON);
        scene.assert_unprivileged(id);
        assert_eq!(scene.libvirt.inactive_xml(id).unwrap(), definition);

        scene.client.stop(id, None).await.done();
        assert_eq!([access(&root), access(&data)], before);
        let kept = protection == DiskProtection::ReadWrite || overlay == OverlayDisposition::Commit;
        assert_eq!(mark_of(&root), if kept { "by-fixer" } else { "" });
        scene.client.start(id).await.done();
        scene.client.delete(id).await.done();
        assert_eq!([access(&root), access(&data)], before);
        assert_eq!(access(&stored), IMAGE);
        scene.assert_no_rescue_left(id);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rescued_server_that_is_deleted_leaves_its_disks_to_their_owners() {
    let mut scene = scene().await;
    let image = scene.tiny_image("resc").await;
    for protection in [DiskProtection::Overlay, DiskProtection::ReadOnly] {
        let xml = scene.tiny_xml(&TinyGuest::new("orig"));
        let disk = scene.disk("orig");
        let before = owned(&disk);
        let id = scene.running(&xml, "TINY-READY orig").await;
        let request = RescueServerRequest {
            disk_protection: protection.into(),
            ..rescue_with(id, &image)
        };
        scene.rescue(request).await;
        scene.client.delete(id).await.done();
        assert_eq!(access(&disk), before, "{protection:?}");
        scene.assert_no_rescue_left(id);
        fs::remove_file(scene.log("orig")).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn servers_and_rescues_share_an_image_that_stays_roots() {
    let mut scene = scene().await;
    let image = scene.tiny_image("made").await;
    let stored = scene.stored_file(&image);
    let sum = sha256(&stored);
    let [one, other] = [
        make(&mut scene, &image).await,
        make(&mut scene, &image).await,
    ];
    let (console, others) = (scene.console(one), scene.console(other));
    assert_eq!(access(&stored), IMAGE);
    for device in [RescueDevice::Disk, RescueDevice::Cdrom] {
        let mark = console.mark();
        let request = RescueServerRequest {
            device: device.into(),
            ..rescue_with(one, &image)
        };
        scene.rescue(request).await;
        if device == RescueDevice::Disk {
            // The image is no CD that a BIOS boots.
            console.wait_line(mark, "TINY-READY made", SOON);
        }
        assert_eq!(access(&stored), IMAGE, "{device:?}");
        scene.assert_closed();
        let server = scene.client.unrescue(unrescue_of(one)).await.done().server;
        Client::assert_settled(&server.unwrap(), VmState::Active);
        console.wait_line(mark, "TINY-READY made", SOON);
        assert_eq!(access(&stored), IMAGE, "{device:?}");
    }
    // The other one neither noticed nor depends on what ran: it starts again from the same image.
    assert_eq!(scene.libvirt.state(other).unwrap(), DomainState::Running);
    assert_eq!(others.text().matches("TINY-READY").count(), 1);
    scene.client.delete(one).await.done();
    scene.client.stop(other, None).await.done();
    let mark = others.mark();
    scene.client.start(other).await.done();
    others.wait_line(mark, "TINY-READY made", SOON);
    scene.client.delete(other).await.done();
    assert_eq!((access(&stored), sha256(&stored)), (IMAGE, sum));
    for id in [one, other] {
        assert_eq!(scene.files_of(id), Vec::<std::path::PathBuf>::new());
    }
}

async fn make(scene: &mut Scene<'_>, image: &Image) -> Uuid {
    let (answer, ended) = scene.client.create(server_from(image, 16)).await;
    ended.done();
    let id: Uuid = answer.server_id.parse().unwrap();
    scene.remove_at_end(id);
    scene
        .console(id)
        .wait_line(Mark::START, "TINY-READY made", SOON);
    scene.assert_unprivileged(id);
    id
}

// Its QEMU reads and writes the variables: without a way to them it does not start at all.
#[tokio::test(flavor = "multi_thread")]
async fn uefi_variables_are_within_reach_before_during_and_after_a_rescue() {
    let mut scene = scene().await;
    let image = scene.tiny_image("made").await;
    let request = CreateServerRequest {
        firmware: Firmware::Uefi.into(),
        ..server_from(&image, 256)
    };
    let (answer, ended) = scene.client.create(request).await;
    ended.done();
    let id: Uuid = answer.server_id.parse().unwrap();
    scene.remove_at_end(id);
    scene.assert_unprivileged(id);
    for protection in [DiskProtection::ReadWrite, DiskProtection::ReadOnly] {
        let request = RescueServerRequest {
            disk_protection: protection.into(),
            ..rescue_with(id, &image)
        };
        scene.rescue(request).await;
        scene.assert_unprivileged(id);
        scene.assert_closed();
        let server = scene.client.unrescue(unrescue_of(id)).await.done().server;
        Client::assert_settled(&server.unwrap(), VmState::Active);
        scene.assert_unprivileged(id);
        assert_eq!(scene.libvirt.state(id).unwrap(), DomainState::Running);
    }
    scene.client.delete(id).await.done();
    assert_eq!(scene.files_of(id), Vec::<std::path::PathBuf>::new());
}
