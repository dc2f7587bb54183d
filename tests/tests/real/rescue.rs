// SPDX-License-Identifier: Apache-2.0
//! Rescue and unrescue from every state, refusals that leave the guest alone, and what a rescue never changes.

use std::fs;

use salvor_proto::v1::{
    DiskProtection, ImageFormat, OverlayDisposition, PlanActionRequest, PowerState, RescueBus,
    RescueDevice, RescueMode, RescueServerRequest, VmState,
    plan_action_request::Action as PlannedAction,
};
use salvor_tests::agent::AgentSettings;
use salvor_tests::client::{Client, assert_refused};
use salvor_tests::console::Mark;
use salvor_tests::domain::DomainXml;
use salvor_tests::guests::{Format, LinuxGuest, TinyGuest, linux_slot, run};
use salvor_tests::run_folder::repository;
use salvor_tests::wait::{BOOT, SOON};
use tonic::Code;
use uuid::Uuid;
use virt::domain::{Domain, DomainState};

use crate::scene::{Scene, rescue_with, restore_of, sha256, unrescue_of};

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_linux_server_is_repaired_from_inside_the_rescue_and_boots_again() {
    let mut scene = Scene::new().await;
    let broken = LinuxGuest::new("orig").broken("somebody edited fstab");
    let xml = scene.linux_xml(&broken);
    let slot = linux_slot();
    let id = scene
        .running(&xml, "GUEST broken: somebody edited fstab")
        .await;
    let definition = scene.libvirt.inactive_xml(id).unwrap();
    let system = LinuxGuest::new("resc").without_agent();
    let image = scene.linux_image(&system, Format::Qcow2).await;

    let mut console = scene.console(id);
    let mark = console.mark();
    scene.rescue(rescue_with(id, &image)).await;
    console.wait_line(mark, "GUEST ready name=resc", BOOT);
    let disks = console.disks(mark);
    let root = disks.iter().find(|disk| disk.serial == "root").unwrap();
    // A guest that was ended at once left a journal behind, which this mount replays.
    console.run_ok(&format!("mount -t ext4 /dev/{}2 /mnt", root.name));
    assert_eq!(
        console.run_ok("cat /mnt/origin /mnt/broken"),
        "made for orig\nsomebody edited fstab\n"
    );
    console.run_ok("rm /mnt/broken && echo repaired > /mnt/note && umount /mnt");

    let mark = console.mark();
    let server = scene.unrescue(unrescue_of(id)).await;
    Client::assert_settled(&server, VmState::Active);
    console.wait_line(mark, "GUEST ready name=orig", BOOT);
    assert_eq!(console.run_ok("cat /data/note"), "repaired\n");
    drop(slot);
    assert_eq!(scene.libvirt.inactive_xml(id).unwrap(), definition);
}

// gap 12
#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_server_is_rescued_and_put_back_stopped_until_somebody_starts_it() {
    let mut scene = Scene::new().await;
    let xml = scene.tiny_xml(&TinyGuest::new("orig"));
    let id = scene.define(&xml);
    let server = scene.client.adopt(id).await;
    Client::assert_settled(&server, VmState::Stopped);
    rescue_and_restore_a_server_that_is_off(&mut scene, id).await;
}

// gap 12
#[tokio::test(flavor = "multi_thread")]
async fn a_crashed_server_is_rescued_and_put_back_off_until_somebody_starts_it() {
    let mut scene = Scene::new().await;
    let id = scene.tiny(&TinyGuest::new("orig")).await;
    scene.host.kill_qemu(id);
    let server = scene
        .client
        .wait_server(id, "the crash is seen", |server| {
            server.vm_state() == VmState::Stopped
        })
        .await;
    assert_eq!(server.power.unwrap().reason, "crashed");
    rescue_and_restore_a_server_that_is_off(&mut scene, id).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_saved_of_a_rescue_does_not_outlast_it() {
    let mut scene = Scene::new().await;
    let xml = scene.tiny_xml(&TinyGuest::new("orig"));
    let id = scene.define(&xml);
    scene.client.adopt(id).await;
    let image = scene.tiny_image("resc").await;
    scene.rescue(rescue_with(id, &image)).await;
    let console = scene.console(id);
    console.wait_line(Mark::START, "TINY-READY resc", SOON);
    let has_saved = |domain: &Domain| domain.has_managed_save(0);
    scene
        .libvirt
        .domain(id, |domain| domain.managed_save(0))
        .unwrap();
    assert!(scene.libvirt.domain(id, has_saved).unwrap());

    let restored = scene.unrescue(restore_of(id)).await;
    Client::assert_settled(&restored, VmState::Stopped);
    assert!(!scene.libvirt.domain(id, has_saved).unwrap());
    let mark = console.mark();
    scene.client.start(id).await.done();
    console.wait_line(mark, "TINY-READY orig", SOON);
}

async fn rescue_and_restore_a_server_that_is_off(scene: &mut Scene<'_>, id: Uuid) {
    let definition = scene.libvirt.inactive_xml(id).unwrap();
    let image = scene.tiny_image("resc").await;
    let rescued = scene.rescue(rescue_with(id, &image)).await;
    assert_eq!(rescued.rescue.unwrap().power_before(), PowerState::Shutdown);
    let console = scene.console(id);
    console.wait_line(Mark::START, "TINY-READY resc", SOON);

    let mark = console.mark();
    let restored = scene.unrescue(restore_of(id)).await;
    Client::assert_settled(&restored, VmState::Stopped);
    assert_eq!(scene.libvirt.state(id).unwrap(), DomainState::Shutoff);
    assert_eq!(scene.libvirt.inactive_xml(id).unwrap(), definition);
    assert_eq!(console.since(mark), "", "nothing has booted");

    let started = scene.client.start(id).await.done().server.unwrap();
    Client::assert_settled(&started, VmState::Active);
    console.wait_line(mark, "TINY-READY orig", SOON);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_server_is_put_back_running_and_a_stopped_one_is_started_when_asked() {
    let mut scene = Scene::new().await;
    let id = scene.tiny(&TinyGuest::new("orig")).await;
    let image = scene.tiny_image("resc").await;
    let console = scene.console(id);
    let rescued = scene.rescue(rescue_with(id, &image)).await;
    assert_eq!(rescued.rescue.unwrap().power_before(), PowerState::Running);
    let mark = console.mark();
    let restored = scene.unrescue(restore_of(id)).await;
    Client::assert_settled(&restored, VmState::Active);
    console.wait_line(mark, "TINY-READY orig", SOON);

    scene.client.stop(id, None).await.done();
    scene.rescue(rescue_with(id, &image)).await;
    let mark = console.mark();
    let started = scene.unrescue(unrescue_of(id)).await;
    Client::assert_settled(&started, VmState::Active);
    console.wait_line(mark, "TINY-READY orig", SOON);
}

// gap 3
#[tokio::test(flavor = "multi_thread")]
async fn a_second_rescue_is_refused_and_the_first_one_and_its_way_back_stay() {
    let mut scene = Scene::new().await;
    let id = scene.tiny(&TinyGuest::new("orig")).await;
    let definition = scene.libvirt.inactive_xml(id).unwrap();
    let image = scene.tiny_image("resc").await;
    let other = scene.tiny_image("other").await;
    let mut console = scene.console(id);
    let mark = console.mark();
    let rescued = scene.rescue(rescue_with(id, &image)).await;
    console.wait_line(mark, "TINY-READY resc", SOON);
    assert_eq!(scene.saved_definition(id).as_ref(), Some(&definition));
    let (run, files) = (scene.libvirt.number(id).unwrap(), scene.files_of(id));
    let mark = console.mark();

    let second = scene.client.servers.rescue_server(rescue_with(id, &other));
    assert_refused(second.await, Code::FailedPrecondition, "ALREADY_RESCUED");

    console.send("t");
    console.wait_line(mark, "TINY-TICK", SOON);
    assert!(!console.since(mark).contains("TINY-UP"));
    assert_eq!(scene.libvirt.number(id).unwrap(), run);
    assert_eq!(scene.files_of(id), files);
    assert_eq!(scene.saved_definition(id).as_ref(), Some(&definition));
    assert_eq!(scene.client.get(id).await.rescue, rescued.rescue);
    scene.unrescue(unrescue_of(id)).await;
    assert_eq!(scene.libvirt.inactive_xml(id).unwrap(), definition);
    console.wait_line(mark, "TINY-READY orig", SOON);
}

// gap 2, gap 3: only a roll-back that fails leaves ERROR behind, and even then the way back is not lost.
#[tokio::test(flavor = "multi_thread")]
async fn a_rescue_that_cannot_be_taken_back_says_what_failed_and_unrescue_is_the_way_back() {
    let mut scene = Scene::new().await;
    let id = scene.tiny(&TinyGuest::new("orig")).await;
    let definition = scene.libvirt.inactive_xml(id).unwrap();
    let image = scene.tiny_image("resc").await;
    // QEMU has the disk open; no guest can be started with what is there now, neither to go on nor to
    // go back.
    let (disk, away) = (scene.disk("orig"), scene.folder.join("away"));
    fs::rename(&disk, &away).unwrap();
    fs::write(&disk, "no qcow2").unwrap();
    let (_, ended) = scene.client.rescue(rescue_with(id, &image)).await;
    let told = &ended.error().message;
    assert!(told.contains("not in qcow2 format"), "{ended:#?}");
    let failed = scene.client.get(id).await;
    Client::assert_settled(&failed, VmState::Error);
    let fault = failed.fault.unwrap();
    assert!(
        !fault.step.is_empty() && !fault.left_behind.is_empty(),
        "{fault:#?}"
    );
    assert_eq!(scene.libvirt.inactive_xml(id).unwrap(), definition);
    assert_eq!(scene.saved_definition(id).as_ref(), Some(&definition));
    let again = scene.client.servers.rescue_server(rescue_with(id, &image));
    assert_refused(again.await, Code::FailedPrecondition, "ALREADY_RESCUED");
    assert_eq!(scene.saved_definition(id).as_ref(), Some(&definition));
    fs::rename(&away, &disk).unwrap();

    let console = scene.console(id);
    let mark = console.mark();
    let server = scene.unrescue(unrescue_of(id)).await;
    Client::assert_settled(&server, VmState::Active);
    assert!(server.fault.is_none(), "{server:#?}");
    assert_eq!(scene.libvirt.inactive_xml(id).unwrap(), definition);
    console.wait_line(mark, "TINY-READY orig", SOON);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_whose_domain_has_a_snapshot_can_be_deleted() {
    let mut scene = Scene::new().await;
    let id = scene.tiny(&TinyGuest::new("orig")).await;
    let snapshot = "<domainsnapshot><name>s</name></domainsnapshot>";
    let made = scene.libvirt.domain(id, move |domain| {
        domain.create_snapshot_xml(snapshot, 0).map(drop)
    });
    made.unwrap();
    scene.client.delete(id).await.done();
    assert!(scene.libvirt.state(id).is_err());
    assert!(scene.disk("orig").exists());
}

// gap 2
#[tokio::test(flavor = "multi_thread")]
async fn a_rescue_that_cannot_start_is_taken_back_and_the_server_runs_again() {
    // A source of random numbers that is not there: libvirt takes the domain, and QEMU does not start.
    let device = "    <rng model='virtio'><backend model='random'>/dev/salvor-none</backend></rng>\n  </devices>";
    let templates = rescue_template("a-rescue-that-cannot-start", device);
    let folder = templates.path().to_str().unwrap();
    let settings = AgentSettings::default().set("templates_dir", folder);
    let mut scene = Scene::with(settings).await;
    let id = scene.tiny(&TinyGuest::new("orig")).await;
    let definition = scene.libvirt.inactive_xml(id).unwrap();
    let image = scene.tiny_image("resc").await;
    let run = scene.libvirt.number(id).unwrap();

    let console = scene.console(id);
    let mark = console.mark();
    let (_, ended) = scene.client.rescue(rescue_with(id, &image)).await;
    ended.error();
    let server = scene.client.get(id).await;
    Client::assert_settled(&server, VmState::Active);
    scene.assert_no_rescue_left(id);
    assert_eq!(scene.libvirt.inactive_xml(id).unwrap(), definition);
    assert_eq!(scene.libvirt.state(id).unwrap(), DomainState::Running);
    console.wait_line(mark, "TINY-READY orig", SOON);
    assert_ne!(
        scene.libvirt.number(id).unwrap(),
        run,
        "it was started again"
    );
}

/// A folder with a rescue template that has `device` at the end of the devices.
fn rescue_template(name: &str, device: &str) -> salvor_tests::run_folder::RunFolder {
    let templates = salvor_tests::run_folder::RunFolder::named(name);
    let built_in = repository().join("domain-templates/templates/rescue.xml");
    let built_in = fs::read_to_string(built_in).unwrap();
    let changed = built_in.replacen("  </devices>", device, 1);
    assert_ne!(changed, built_in);
    fs::write(templates.join("rescue.xml"), changed).unwrap();
    templates
}

// gap 13: whatever is wrong with the image is found while the guest runs.
#[tokio::test(flavor = "multi_thread")]
async fn a_rescue_from_an_image_that_was_damaged_leaves_the_guest_running() {
    let mut scene = Scene::new().await;
    let id = scene.tiny(&TinyGuest::new("orig")).await;
    let image = scene.tiny_image("resc").await;
    let run = scene.libvirt.number(id).unwrap();
    let mark = scene.console(id).mark();
    let stored = scene.stored_file(&image);
    let mut content = fs::read(&stored).unwrap();
    *content.last_mut().unwrap() ^= 1;
    fs::write(&stored, content).unwrap();
    let (_, ended) = scene.client.rescue(rescue_with(id, &image)).await;
    let error = ended.error();
    assert!(error.message.contains("its SHA-256 is"), "{error:?}");
    assert_untouched(&mut scene, id, run, mark).await;
}

/// Checks that a refused rescue has not touched the server.
async fn assert_untouched(scene: &mut Scene<'_>, id: Uuid, run: Option<u32>, mark: Mark) {
    let mut console = scene.console(id);
    let now = console.mark();
    console.send("t");
    console.wait_line(now, "TINY-TICK", SOON);
    assert!(!console.since(mark).contains("TINY-UP"), "it has booted");
    assert!(
        !console.since(mark).contains("TINY-POWERBUTTON"),
        "it was asked to stop"
    );
    assert_eq!(scene.libvirt.number(id).unwrap(), run);
    let server = scene.client.get(id).await;
    Client::assert_settled(&server, VmState::Active);
    assert!(server.rescue.is_none() && server.fault.is_none());
    scene.assert_no_rescue_left(id);
}

// gap 13, gap 2: what can be known is refused before the guest is touched.
#[tokio::test(flavor = "multi_thread")]
async fn a_rescue_that_cannot_be_is_refused_while_the_guest_runs_on_untouched() {
    let mut scene = Scene::new().await;
    let disk = scene.disk("orig");
    TinyGuest::new("orig").build(&disk, Format::Qcow2);
    let name = Scene::unique("orig");
    let xml = DomainXml::tiny(&name, &scene.log("orig"))
        .disk(&disk, Format::Qcow2, "sda", "sata", "root", Some(1))
        .q35();
    let id = scene.running(&xml, "TINY-READY orig").await;
    let definition = scene.libvirt.inactive_xml(id).unwrap();
    let good = scene.tiny_image("resc").await;
    let missing = scene.tiny_image("missing").await;
    fs::remove_file(scene.stored_file(&missing)).unwrap();
    let short = scene.tiny_image("short").await;
    fs::write(scene.stored_file(&short), "QFI").unwrap();

    let run = scene.libvirt.number(id).unwrap();
    let mark = scene.console(id).mark();
    let with = |image: &str| RescueServerRequest {
        image: Some(image.into()),
        ..rescue_with(id, &good)
    };
    let (invalid, state) = (Code::InvalidArgument, Code::FailedPrecondition);
    let cases = [
        (with("no-such-image"), invalid, "IMAGE_NOT_FOUND"),
        (
            with(&Uuid::new_v4().to_string()),
            invalid,
            "IMAGE_NOT_FOUND",
        ),
        (with(&missing.id), invalid, "IMAGE_NOT_FOUND"),
        (with(&short.id), invalid, "IMAGE_NOT_FOUND"),
        (
            RescueServerRequest {
                image: None,
                ..with("")
            },
            state,
            "NO_RESCUE_IMAGE",
        ),
        (
            RescueServerRequest {
                bus: RescueBus::Ide.into(),
                ..with(&good.id)
            },
            state,
            "DOMAIN_UNSUPPORTED",
        ),
        (
            RescueServerRequest {
                bus: RescueBus::Virtio.into(),
                device: RescueDevice::Cdrom.into(),
                ..with(&good.id)
            },
            invalid,
            "INVALID_FIELD",
        ),
        // QEMU has no read-only disks on SATA.
        (
            RescueServerRequest {
                disk_protection: DiskProtection::ReadOnly.into(),
                ..with(&good.id)
            },
            state,
            "DOMAIN_UNSUPPORTED",
        ),
        (
            RescueServerRequest {
                mode: 77,
                ..with(&good.id)
            },
            invalid,
            "INVALID_FIELD",
        ),
    ];
    for (request, code, reason) in cases {
        let shown = format!("{request:?}");
        println!("{shown}");
        assert_refused(
            scene.client.servers.rescue_server(request).await,
            code,
            reason,
        );
        assert_untouched(&mut scene, id, run, mark).await;
        assert_eq!(
            scene.libvirt.inactive_xml(id).unwrap(),
            definition,
            "{shown}"
        );
    }
}

// gap 15: what a guest or a stranger wrote is never probed.
#[tokio::test(flavor = "multi_thread")]
async fn an_unsafe_image_never_becomes_one_and_a_raw_disk_with_a_qcow2_header_stays_raw() {
    let mut scene = Scene::new().await;
    // A secret of the host, and a qcow2 that stands on it.
    let secret = scene.folder.join("secret");
    fs::write(&secret, vec![b's'; 1 << 20]).unwrap();
    let trap = scene.folder.join("trap.qcow2");
    let [secret, trap] = [&secret, &trap].map(|path| path.to_str().unwrap().to_owned());
    run(
        "qemu-img",
        [
            "create", "-q", "-f", "qcow2", "-F", "raw", "-b", &secret, &trap,
        ],
    );
    let answer = scene
        .client
        .try_import("trap", ImageFormat::Qcow2, fs::read(&trap).unwrap())
        .await;
    assert_refused(answer, Code::InvalidArgument, "IMAGE_UNSAFE");

    // The server's own raw disk: its guest writes that header over it.
    let disk = scene.folder.join("data.raw");
    fs::write(&disk, vec![0; 1 << 20]).unwrap();
    let guest = TinyGuest::new("orig");
    let name = Scene::unique("orig");
    let root = scene.disk("orig");
    guest.build(&root, Format::Qcow2);
    let xml = DomainXml::linux(&name, &scene.log("orig"))
        .disk(&root, Format::Qcow2, "vda", "virtio", "root", Some(1))
        .disk(&disk, Format::Raw, "vdb", "virtio", "data", None);
    let id = scene.running(&xml, "TINY-READY orig").await;
    scene.client.stop(id, None).await.done();
    fs::write(&disk, {
        let mut bytes = fs::read(&trap).unwrap();
        bytes.resize(1 << 20, 0);
        bytes
    })
    .unwrap();
    let before = sha256(&disk);
    let system = LinuxGuest::new("resc").without_agent();
    let image = scene.linux_image(&system, Format::Qcow2).await;
    for protection in [DiskProtection::ReadWrite, DiskProtection::Overlay] {
        let _slot = linux_slot();
        let mut console = scene.console(id);
        let mark = console.mark();
        let request = RescueServerRequest {
            disk_protection: protection.into(),
            mode: RescueMode::Stable.into(),
            ..rescue_with(id, &image)
        };
        scene.rescue(request).await;
        console.wait_line(mark, "GUEST ready name=resc", BOOT);
        let read = "dd if=/dev/vdb bs=3 count=1 2> /dev/null; echo";
        assert_eq!(
            console.run_ok(read),
            "QFI\n",
            "the header, not what it names"
        );
        assert_eq!(console.run_ok("cat /sys/block/vdb/size"), "2048\n");
        let mut request = restore_of(id);
        if protection == DiskProtection::Overlay {
            request.overlay = OverlayDisposition::Commit.into();
        }
        scene.unrescue(request).await;
        assert_eq!(sha256(&disk), before);
    }
}

// gap 14, gap 9
#[tokio::test(flavor = "multi_thread")]
async fn a_rescue_changes_neither_machine_type_nor_consoles_nor_nics_during_or_after_it() {
    let mut scene = Scene::new().await;
    let xml = scene
        .tiny_xml(&TinyGuest::new("orig"))
        .q35()
        .nic("52:54:00:00:09:01")
        .device("<serial type='null'><target port='1'/></serial>")
        .device("<console type='pty'><target type='virtio' port='1'/></console>")
        .device("<graphics type='vnc' autoport='yes' passwd='sesame'/>");
    let id = scene.running(&xml, "TINY-READY orig").await;
    let definition = scene.libvirt.inactive_xml(id).unwrap();
    let parts = |xml: &str| {
        let kept = [
            "<type arch=",
            "<serial ",
            "<console ",
            "<graphics ",
            "<mac ",
            "<vcpu",
            "<memory",
        ];
        let line = |line: &&str| kept.iter().any(|start| line.trim().starts_with(start));
        xml.lines()
            .filter(line)
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    assert!(parts(&definition).len() >= 9, "{definition}");
    // An image without a word about machines: what Nova takes for "change it to the host's default".
    let image = scene.tiny_image("resc").await;
    for mode in [RescueMode::Classic, RescueMode::Stable] {
        let console = scene.console(id);
        let mark = console.mark();
        let request = RescueServerRequest {
            mode: mode.into(),
            ..rescue_with(id, &image)
        };
        scene.rescue(request).await;
        console.wait_line(mark, "TINY-READY resc", SOON);
        let rescue = scene.libvirt.inactive_xml(id).unwrap();
        assert_eq!(parts(&rescue), parts(&definition));
        scene.unrescue(unrescue_of(id)).await;
        console.wait_line(mark, "TINY-READY orig", SOON);
        assert_eq!(scene.libvirt.inactive_xml(id).unwrap(), definition);
        let server = scene.client.get(id).await;
        assert_eq!(server.interfaces[0].mac, "52:54:00:00:09:01");
    }
    scene.client.stop(id, None).await.done();
    scene.client.start(id).await.done();
    assert_eq!(scene.libvirt.inactive_xml(id).unwrap(), definition);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operators_template_adds_a_device_to_rescues_and_to_nothing_else() {
    let device = "    <watchdog model='i6300esb' action='none'/>\n  </devices>";
    let templates = rescue_template("an-operators-templates", device);
    let folder = templates.path().to_str().unwrap();
    let settings = AgentSettings::default().set("templates_dir", folder);
    let mut scene = Scene::with(settings).await;
    let id = scene.tiny(&TinyGuest::new("orig")).await;
    let definition = scene.libvirt.inactive_xml(id).unwrap();
    let image = scene.tiny_image("resc").await;
    let console = scene.console(id);
    let mark = console.mark();
    scene.rescue(rescue_with(id, &image)).await;
    console.wait_line(mark, "TINY-READY resc", SOON);
    let live = scene.libvirt.live_xml(id).unwrap();
    assert!(
        live.contains("<watchdog model='i6300esb' action='none'>"),
        "{live}"
    );
    scene.unrescue(unrescue_of(id)).await;
    assert_eq!(scene.libvirt.inactive_xml(id).unwrap(), definition);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dry_run_tells_what_a_rescue_would_do_and_does_none_of_it() {
    let mut scene = Scene::new().await;
    let xml = scene
        .tiny_xml(&TinyGuest::new("orig"))
        .device("<graphics type='vnc' autoport='yes' passwd='sesame'/>");
    let id = scene.running(&xml, "TINY-READY orig").await;
    let definition = scene.libvirt.inactive_xml(id).unwrap();
    let image = scene.tiny_image("resc").await;
    let (run, mark) = (scene.libvirt.number(id).unwrap(), scene.console(id).mark());
    let dry = |request: RescueServerRequest| PlanActionRequest {
        action: Some(PlannedAction::Rescue(request)),
    };
    let answer = scene
        .client
        .servers
        .plan_action(dry(rescue_with(id, &image)));
    let plan = answer.await.unwrap().into_inner();
    assert!(plan.accepted && plan.refusals.is_empty(), "{plan:#?}");
    let kinds: Vec<_> = plan.steps.iter().map(|step| step.kind.as_str()).collect();
    for kind in ["SaveDefinition", "PowerOff", "DefineDomain", "StartDomain"] {
        assert!(kinds.contains(&kind), "{kinds:?}");
    }
    assert!(
        plan.domain_diff
            .contains("+      <serial>salvor-rescue</serial>")
            || plan.domain_diff.contains("salvor-rescue"),
        "{}",
        plan.domain_diff
    );
    assert!(!plan.domain_diff.contains("sesame"), "{}", plan.domain_diff);
    assert!(!plan.files.is_empty());
    assert_untouched(&mut scene, id, run, mark).await;

    // What is told is what happens.
    let (_, ended) = scene.client.rescue(rescue_with(id, &image)).await;
    ended.done();
    let done: Vec<_> = ended
        .metadata
        .steps
        .iter()
        .map(|step| step.kind.as_str())
        .collect();
    assert_eq!(done, kinds);
    let answer = scene
        .client
        .servers
        .plan_action(dry(rescue_with(id, &image)));
    let plan = answer.await.unwrap().into_inner();
    assert!(!plan.accepted);
    assert_eq!(plan.refusals[0].reason, "ALREADY_RESCUED");
    scene.unrescue(unrescue_of(id)).await;
    assert_eq!(scene.libvirt.inactive_xml(id).unwrap(), definition);
}
