// SPDX-License-Identifier: Apache-2.0
//! The harness itself: hosts, guests and consoles do what the other tests rely on.

use std::fs;
use std::path::Path;
use std::time::Instant;

use nix::sys::signal::Signal;
use salvor_tests::agent::{AgentSettings, TestAgent, salvord};
use salvor_tests::console::{Console, Mark};
use salvor_tests::domain::DomainXml;
use salvor_tests::guests::{Format, LinuxGuest, TinyGuest, linux_slot, mark_of, run};
use salvor_tests::host::TestHost;
use salvor_tests::run_folder::RunFolder;
use salvor_tests::tool;
use salvor_tests::wait::{BOOT, SOON, wait_for};
use uuid::Uuid;
use virt::domain::DomainState;

/// Prints how long each part of a test took.
struct Laps {
    test: &'static str,
    last: Instant,
}

impl Laps {
    fn new(test: &'static str) -> Self {
        Self {
            test,
            last: Instant::now(),
        }
    }

    fn lap(&mut self, what: &str) {
        println!(
            "{:>32} {:>7.3} s  {what}",
            self.test,
            self.last.elapsed().as_secs_f64()
        );
        self.last = Instant::now();
    }
}

fn define_tiny(host: &TestHost, folder: &RunFolder, guest: &TinyGuest) -> Uuid {
    let disk = folder.join(format!("{}.qcow2", guest.name));
    guest.build(&disk, Format::Qcow2);
    let xml = DomainXml::tiny(&guest.name, &folder.join(format!("{}.console", guest.name)))
        .disk(&disk, Format::Qcow2, "vda", "virtio", "root", Some(1))
        .xml();
    host.libvirt().define(&xml).unwrap()
}

#[test]
fn a_tiny_guest_boots_obeys_and_honours_the_power_button() {
    let mut laps = Laps::new("tiny guest");
    let folder = RunFolder::for_this_test();
    let host = TestHost::shared();
    let libvirt = host.libvirt();
    laps.lap("shared host up");
    let id = define_tiny(host, &folder, &TinyGuest::new("obedient"));
    laps.lap("image made, domain defined");
    libvirt.start(id).unwrap();
    let mut console = Console::of(&libvirt, id);
    console.wait_line(Mark::START, "TINY-READY obedient", SOON);
    laps.lap("ready");
    assert!(
        console.text().contains("TINY-DISK 80 disk-obedient -"),
        "{}",
        console.text()
    );
    console.send("m");
    console.wait_line(Mark::START, "TINY-MARKED 80", SOON);
    laps.lap("order obeyed");
    libvirt.press_power_button(id).unwrap();
    libvirt.wait_state(id, DomainState::Shutoff, SOON);
    laps.lap("switched itself off");

    let raw = folder.join("after.raw");
    let disk = folder.join("obedient.qcow2");
    run(
        "qemu-img",
        [
            "convert",
            "-O",
            "raw",
            disk.to_str().unwrap(),
            raw.to_str().unwrap(),
        ],
    );
    assert_eq!(mark_of(&raw), "by-obedient");
    libvirt.remove(id);
}

#[test]
fn a_deaf_tiny_guest_notices_the_power_button_and_stays() {
    let folder = RunFolder::for_this_test();
    let host = TestHost::shared();
    let libvirt = host.libvirt();
    let id = define_tiny(host, &folder, &TinyGuest::new("deaf").deaf());
    libvirt.start(id).unwrap();
    let console = Console::of(&libvirt, id);
    console.wait_line(Mark::START, "TINY-READY", SOON);
    libvirt.press_power_button(id).unwrap();
    console.wait_line(Mark::START, "TINY-POWERBUTTON", SOON);
    assert_eq!(libvirt.state(id).unwrap(), DomainState::Running);
    libvirt.remove(id);
}

#[test]
fn a_linux_guest_tells_what_it_sees_and_runs_commands() {
    let mut laps = Laps::new("Linux guest");
    let folder = RunFolder::for_this_test();
    let host = TestHost::shared();
    let libvirt = host.libvirt();
    let disk = folder.join("disk.qcow2");
    let second = folder.join("second.raw");
    LinuxGuest::new("lin")
        .with_all_drivers()
        .with_file("note", "hello")
        .build(&disk, Format::Qcow2);
    salvor_tests::guests::labelled_disk("second", 4, &second, Format::Raw);
    config_drive(&folder.join("config"));
    let config = folder.join("config.iso");
    tool!(
        "genisoimage",
        "-quiet",
        "-J",
        "-R",
        "-V",
        "config-2",
        "-o",
        config,
        folder.join("config")
    );
    laps.lap("images made");
    let xml = DomainXml::linux("lin", &folder.join("console"))
        .disk(&disk, Format::Qcow2, "vda", "virtio", "root-7", Some(1))
        .disk(&second, Format::Raw, "sda", "usb", "usb-7", None)
        .disk(&config, Format::Iso, "hda", "ide", "conf-7", None)
        .device("<controller type='usb' model='qemu-xhci'/>")
        .nic("52:54:00:00:00:07")
        .xml();
    let id = libvirt.define(&xml).unwrap();
    let _slot = linux_slot();
    laps.lap("defined, slot free");
    libvirt.start(id).unwrap();
    let mut console = Console::of(&libvirt, id);
    console.wait_line(Mark::START, "GUEST ready name=lin", BOOT);
    laps.lap("ready");
    println!("{}", console.text());
    let said = console.text();
    for line in [
        "GUEST up name=lin uptime=",
        "GUEST disk vda bytes=",
        "ro=0 serial=root-7",
        "GUEST disk sda bytes=4194304 ro=0 serial=usb-7",
        "GUEST nic eth0 mac=52:54:00:00:00:07",
        "GUEST data lost+found note origin",
        "GUEST password root set from openstack/latest/user_data",
    ] {
        assert!(said.contains(line), "no '{line}' in:\n{said}");
    }
    assert_eq!(console.run_ok("cat /data/note"), "hello\n");
    laps.lap("command run");
    assert_eq!(console.run("sh -c 'exit 3'").0, 3);
    assert!(
        console
            .run_ok("grep root /etc/shadow")
            .starts_with("root:$6$salt$abc")
    );
    let answers = wait_for("the guest agent answers", SOON, || {
        libvirt
            .domain(id, |d| {
                d.qemu_agent_command(r#"{"execute":"guest-ping"}"#, 5, 0)
            })
            .ok()
    });
    assert!(answers.contains("return"), "{answers}");
    laps.lap("guest agent answers");
    libvirt.press_power_button(id).unwrap();
    libvirt.wait_state(id, DomainState::Shutoff, BOOT);
    laps.lap("switched itself off");
    libvirt.remove(id);
}

/// The tree of an OpenStack config drive, with a hash that is none.
fn config_drive(tree: &Path) {
    let latest = tree.join("openstack/latest");
    fs::create_dir_all(&latest).unwrap();
    fs::write(latest.join("meta_data.json"), "{\"uuid\": \"x\"}").unwrap();
    let user_data = "#cloud-config\nchpasswd: {users: [{name: root, password: $6$salt$abc./9}]}\n";
    fs::write(latest.join("user_data"), user_data).unwrap();
}

#[test]
fn a_broken_linux_guest_stops_early() {
    let folder = RunFolder::for_this_test();
    let host = TestHost::shared();
    let libvirt = host.libvirt();
    let disk = folder.join("disk.raw");
    LinuxGuest::new("brk")
        .with_all_drivers()
        .broken("somebody edited fstab")
        .build(&disk, Format::Raw);
    let xml = DomainXml::linux("brk", &folder.join("console"))
        .disk(&disk, Format::Raw, "sda", "sata", "root", Some(1))
        .q35()
        .xml();
    let id = libvirt.define(&xml).unwrap();
    let _slot = linux_slot();
    libvirt.start(id).unwrap();
    let console = Console::of(&libvirt, id);
    console.wait_line(Mark::START, "GUEST broken: somebody edited fstab", BOOT);
    libvirt.remove(id);
}

#[test]
fn a_linux_guest_boots_from_an_iso() {
    let mut laps = Laps::new("Linux guest from ISO");
    let folder = RunFolder::for_this_test();
    let host = TestHost::shared();
    let libvirt = host.libvirt();
    let iso = folder.join("rescue.iso");
    LinuxGuest::new("iso").build(&iso, Format::Iso);
    let config = folder.join("config.fat");
    config_drive(&folder.join("config"));
    fs::File::create(&config).unwrap().set_len(4 << 20).unwrap();
    tool!("mkfs.fat", "-n", "config-2", config);
    tool!(
        "mcopy",
        "-s",
        "-i",
        config,
        folder.join("config/openstack"),
        "::"
    );
    let xml = DomainXml::linux("iso", &folder.join("console"))
        .disk(&config, Format::Raw, "vda", "virtio", "config", None)
        .disk(&iso, Format::Iso, "hda", "ide", "cd", Some(1))
        .xml();
    let id = libvirt.define(&xml).unwrap();
    let _slot = linux_slot();
    laps.lap("image made, slot free");
    libvirt.start(id).unwrap();
    let console = Console::of(&libvirt, id);
    console.wait_line(Mark::START, "GUEST ready name=iso", BOOT);
    laps.lap("ready");
    let said = console.text();
    assert!(
        said.contains("GUEST password root set from openstack/latest/user_data"),
        "{said}"
    );
    assert!(
        console.text().contains("GUEST disk sr0"),
        "{}",
        console.text()
    );
    libvirt.remove(id);
}

#[test]
fn a_linux_guest_boots_under_uefi_and_sees_its_tpm() {
    let mut laps = Laps::new("Linux guest under UEFI");
    let folder = RunFolder::for_this_test();
    let host = TestHost::shared();
    let libvirt = host.libvirt();
    let disk = folder.join("disk.qcow2");
    LinuxGuest::new("efi")
        .deaf()
        .without_agent()
        .build(&disk, Format::Qcow2);
    let xml = DomainXml::linux("efi", &folder.join("console"))
        .disk(&disk, Format::Qcow2, "vda", "virtio", "root", Some(1))
        .uefi()
        .device("<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>")
        .xml();
    let id = libvirt.define(&xml).unwrap();
    let _slot = linux_slot();
    laps.lap("image made, slot free");
    libvirt.start(id).unwrap();
    let mut console = Console::of(&libvirt, id);
    console.wait_line(Mark::START, "GUEST ready name=efi", BOOT);
    laps.lap("ready");
    console.run_ok("test -d /sys/firmware/efi && test -d /sys/class/tpm/tpm0");
    let mark = console.mark();
    libvirt.press_power_button(id).unwrap();
    console.run_ok("sleep 2");
    assert!(
        !console.since(mark).contains("GUEST power button"),
        "a deaf guest heard the button"
    );
    assert_eq!(libvirt.state(id).unwrap(), DomainState::Running);
    libvirt.remove(id);
}

#[test]
fn a_host_survives_the_death_of_libvirtd_and_a_reboot() {
    let mut laps = Laps::new("own host");
    let folder = RunFolder::for_this_test();
    let host = TestHost::start(folder.path());
    let libvirt = host.libvirt();
    laps.lap("up");
    let id = define_tiny(&host, &folder, &TinyGuest::new("survivor"));
    libvirt.start(id).unwrap();
    let mut console = Console::of(&libvirt, id);
    console.wait_line(Mark::START, "TINY-READY survivor", SOON);
    laps.lap("guest ready");

    host.kill_libvirtd();
    assert!(libvirt.list().is_err());
    assert!(host.qemu(id).is_some());
    laps.lap("libvirtd killed");
    host.start_libvirtd();
    assert_eq!(libvirt.state(id).unwrap(), DomainState::Running);
    laps.lap("libvirtd back");
    let mark = console.mark();
    console.send("t");
    console.wait_line(mark, "TINY-TICK", SOON);
    laps.lap("the guest never noticed");

    host.freeze_qemu(id);
    let mark = console.mark();
    console.send("t");
    assert_eq!(console.since(mark), "");
    host.thaw_qemu(id);
    console.wait_line(mark, "TINY-TICK", SOON);
    laps.lap("QEMU frozen and thawed");

    libvirt.destroy(id).unwrap();
    laps.lap("destroyed");
    libvirt.start(id).unwrap();
    laps.lap("started");
    host.kill_qemu(id);
    libvirt.wait_state(id, DomainState::Shutoff, SOON);
    laps.lap("QEMU killed");

    libvirt.start(id).unwrap();
    host.reboot();
    laps.lap("host rebooted");
    assert_eq!(libvirt.state(id).unwrap(), DomainState::Shutoff);
    assert_eq!(host.qemu(id), None);
    drop(host);
    laps.lap("host gone");
}

#[test]
fn a_libvirtd_that_crashes_under_the_shared_host_is_started_again() {
    let mut folder = RunFolder::for_this_test();
    folder.keep();
    let host = Box::leak(Box::new(TestHost::start(folder.path())));
    host.tend_libvirtd();
    let libvirtd = host.with_argument("/usr/sbin/libvirtd");
    assert_eq!(libvirtd.len(), 1);
    host.kill(libvirtd[0], Signal::SIGSEGV);
    host.wait_end(libvirtd[0], SOON);
    wait_for("libvirtd answers again", SOON, || {
        host.libvirt().list().ok()
    });
}

#[test]
fn a_dropped_host_leaves_no_process_and_no_folder_behind() {
    let folder = RunFolder::for_this_test();
    let host = TestHost::start(folder.path());
    let id = define_tiny(&host, &folder, &TinyGuest::new("orphan"));
    host.libvirt().start(id).unwrap();
    let qemu = host.machine_pid(host.qemu(id).unwrap()).unwrap();
    let run = host.uri();
    let run = Path::new(run.split("socket=").nth(1).unwrap())
        .ancestors()
        .nth(2)
        .unwrap()
        .to_owned();
    assert!(run.is_dir());
    drop(host);
    assert!(!Path::new(&format!("/proc/{qemu}")).exists());
    assert!(!run.exists());
}

#[tokio::test]
async fn an_agent_starts_stops_and_survives_kill_9_and_a_reboot_of_its_host() {
    let mut laps = Laps::new("agent");
    let folder = RunFolder::for_this_test();
    let host = TestHost::start(folder.path());
    salvord();
    laps.lap("host up, salvord built");
    let settings = AgentSettings::default().set("shutdown.timeout", "20s");
    let mut agent = TestAgent::start(&host, folder.path(), settings).await;
    laps.lap("serves");
    assert!(agent.machine_pid().is_some());
    assert_eq!(agent.sigterm_and_wait(SOON), "exit 0", "{}", agent.log());
    laps.lap("stopped");
    agent.restart().await;
    agent.kill_9();
    agent.restart().await;
    laps.lap("killed and started twice");
    host.reboot();
    agent.forget_process();
    agent.restart().await;
    laps.lap("host rebooted, serves");
}
