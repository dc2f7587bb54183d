// SPDX-License-Identifier: Apache-2.0
//! UEFI variables and TPMs: a rescue boots with the server's firmware and leaves its variables alone.

use std::fs;
use std::path::{Path, PathBuf};

use salvor_proto::v1::{RescueMode, RescueServerRequest, VmState};
use salvor_tests::client::Client;
use salvor_tests::console::Mark;
use salvor_tests::guests::{Format, LinuxGuest, TinyGuest, linux_slot};
use salvor_tests::wait::{BOOT, SOON};

use crate::scene::{Scene, rescue_with, restore_of, sha256, unrescue_of};

/// The file with the UEFI variables that a definition names.
fn nvram_of(xml: &str) -> PathBuf {
    let element = xml.split("<nvram").nth(1).expect("an <nvram>");
    let text = element.split_once('>').unwrap().1;
    text.split("</nvram>").next().unwrap().into()
}

/// Where a UEFI variable of the test's own shows itself in a guest.
pub(crate) fn variable(name: &str) -> String {
    format!("/sys/firmware/efi/efivars/{name}-11111111-2222-3333-4444-555555555555")
}

/// The order that mounts the variables and sets one.
pub(crate) fn setting(name: &str) -> String {
    format!(
        "mount -t efivarfs efivarfs /sys/firmware/efi/efivars; \
         printf '\\007\\0\\0\\0value' > {}; sync",
        variable(name)
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn a_uefi_rescue_reads_the_servers_variables_and_writes_to_its_own() {
    let mut scene = Scene::new().await;
    let system = LinuxGuest::new("resc").without_agent();
    let image = scene.linux_image(&system, Format::Qcow2).await;
    let xml = scene
        .linux_xml(&LinuxGuest::new("orig").without_agent())
        .uefi()
        .xml();
    let nvram = scene.folder.join("orig_VARS.fd");
    let named = format!("</firmware><nvram>{}</nvram>", nvram.display());
    let slot = linux_slot();
    let id = scene.define_xml(&xml.replace("</firmware>", &named));
    scene.libvirt.start(id).unwrap();
    let mut console = scene.console(id);
    console.wait_line(Mark::START, "GUEST ready name=orig", BOOT);
    console.run_ok(&setting("ByTheServer"));
    scene.client.adopt(id).await;
    scene.client.stop(id, None).await.done();
    let definition = scene.libvirt.inactive_xml(id).unwrap();
    let before = sha256(&nvram);
    assert!(holds_variable(&nvram, "ByTheServer"));

    let mark = console.mark();
    scene.rescue(rescue_with(id, &image)).await;
    console.wait_line(mark, "GUEST ready name=resc", BOOT);
    let own = nvram_of(&scene.libvirt.live_xml(id).unwrap());
    assert_ne!(own, nvram);
    console.run_ok(&setting("ByTheRescue"));
    console.run_ok(&format!("test -e {}", variable("ByTheServer")));
    assert!(holds_variable(&own, "ByTheRescue"));
    scene.unrescue(restore_of(id)).await;
    drop(slot);
    assert_eq!(sha256(&nvram), before);
    assert!(!own.exists());
    assert_eq!(scene.libvirt.inactive_xml(id).unwrap(), definition);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_uefi_rescue_leaves_variables_alone_whose_place_only_libvirt_knows() {
    let mut scene = Scene::new().await;
    let system = LinuxGuest::new("resc").without_agent();
    let image = scene.linux_image(&system, Format::Qcow2).await;
    let xml = scene
        .linux_xml(&LinuxGuest::new("orig").without_agent())
        .uefi();
    let slot = linux_slot();
    let id = scene.running(&xml, "GUEST ready name=orig").await;
    let nvram = nvram_of(&scene.libvirt.live_xml(id).unwrap());
    let nvram = scene.host.outside(&nvram);
    scene.console(id).run_ok(&setting("ByTheServer"));
    scene.client.stop(id, None).await.done();
    let definition = scene.libvirt.inactive_xml(id).unwrap();
    assert!(!definition.contains("<nvram"), "{definition}");
    let before = sha256(&nvram);

    let mut console = scene.console(id);
    let mark = console.mark();
    scene.rescue(rescue_with(id, &image)).await;
    console.wait_line(mark, "GUEST ready name=resc", BOOT);
    console.run_ok(&setting("ByTheRescue"));
    console.run_ok(&format!("test -e {}", variable("ByTheServer")));
    let own = nvram_of(&scene.libvirt.live_xml(id).unwrap());
    assert!(holds_variable(&own, "ByTheRescue"));
    scene.unrescue(restore_of(id)).await;
    drop(slot);
    assert_eq!(sha256(&nvram), before);
    assert_eq!(scene.libvirt.inactive_xml(id).unwrap(), definition);
}

/// Is a variable of this name in the file? Names of variables are UTF-16.
fn holds_variable(nvram: &Path, name: &str) -> bool {
    let name: Vec<u8> = name.encode_utf16().flat_map(u16::to_le_bytes).collect();
    let bytes = fs::read(nvram).unwrap();
    bytes.windows(name.len()).any(|window| window == name)
}

// gap 8
#[tokio::test(flavor = "multi_thread")]
async fn a_server_with_a_tpm_is_rescued_and_put_back_with_the_tpms_state() {
    let mut scene = Scene::new().await;
    let xml = scene
        .tiny_xml(&TinyGuest::new("orig"))
        .q35()
        .device("<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>");
    let id = scene.running(&xml, "TINY-READY orig").await;
    let definition = scene.libvirt.inactive_xml(id).unwrap();
    let image = scene.tiny_image("resc").await;
    let state = scene
        .host
        .outside(&PathBuf::from(format!("/var/lib/libvirt/swtpm/{id}/tpm2")));
    // Whoever throws the TPM's state away throws this away, too.
    let witness = state.join("witness");
    fs::write(&witness, "").unwrap();
    let console = scene.console(id);
    for mode in [RescueMode::Classic, RescueMode::Stable] {
        let mark = console.mark();
        let request = RescueServerRequest {
            mode: mode.into(),
            ..rescue_with(id, &image)
        };
        scene.rescue(request).await;
        console.wait_line(mark, "TINY-READY resc", SOON);
        let live = scene.libvirt.live_xml(id).unwrap();
        assert!(live.contains("<tpm model='tpm-crb'>"), "{live}");
        let server = scene.unrescue(unrescue_of(id)).await;
        Client::assert_settled(&server, VmState::Active);
        console.wait_line(mark, "TINY-READY orig", SOON);
        assert_eq!(scene.libvirt.inactive_xml(id).unwrap(), definition);
    }
    assert!(witness.exists());
}
