// SPDX-License-Identifier: Apache-2.0
//! A hypervisor host of our own: a private libvirtd in its own pid, mount, network, host name and IPC
//! namespaces, invisible to the machine's own libvirt.
//!
//! Most tests share one ([`TestHost::shared`]); a test that kills libvirtd or reboots the host starts its
//! own. What is private: `/etc/libvirt`, `/run`, `/var/lib/libvirt`, `/var/log/libvirt`,
//! `/var/cache/libvirt`, the network. Everything else, `/tmp` and the repository above all, is shared with
//! the machine, so paths mean the same inside and outside.
//!
//! Everything on the host ends when the [`TestHost`] is dropped, and also when the test process dies
//! (see [`crate::init`]).

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Mutex, MutexGuard, Once, OnceLock, PoisonError};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use uuid::Uuid;

use crate::init::{Answer, HostPlan, Order};
use crate::libvirt::Libvirt;
use crate::run_folder::{RunFolder, profile_folder};
use crate::wait::{SOON, try_wait, wait_for};

const LIBVIRTD_CONF: &str = r#"auth_unix_ro = "none"
auth_unix_rw = "none"
unix_sock_group = "root"
unix_sock_rw_perms = "0700"
log_outputs = "2:file:/var/log/libvirt/libvirtd.log"
"#;

// No control groups and no mount namespaces per guest: the host is a namespace already.
const QEMU_CONF: &str = r#"swtpm_user = "root"
swtpm_group = "root"
security_driver = "none"
cgroup_controllers = []
namespaces = []
stdio_handler = "file"
"#;

/// As whom QEMU runs on a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QemuUser {
    /// As root: images may lie below the repository, which other users may have no way into.
    Root,
    /// As on a host that nobody has configured: as [`QEMU_USER`], to whom libvirt gives every file of a
    /// guest while it runs. Folders must let that user pass: [`RunFolder::for_everybody`].
    Packaged,
}

/// The user and group that Debian's libvirt-daemon-system makes for QEMU.
pub const QEMU_USER: &str = "libvirt-qemu";

impl QemuUser {
    fn settings(self) -> String {
        match self {
            Self::Root => "user = \"root\"\ngroup = \"root\"\nremember_owner = 0\n".into(),
            Self::Packaged => format!("user = \"{QEMU_USER}\"\ngroup = \"{QEMU_USER}\"\n"),
        }
    }
}

/// A running test host.
#[derive(Debug)]
pub struct TestHost {
    folder: PathBuf,
    plan: HostPlan,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    boot: Option<Boot>,
    libvirtd: Option<i32>,
}

/// The host's processes between two reboots.
#[derive(Debug)]
struct Boot {
    outer: Child,
    orders: ChildStdin,
    answers: Receiver<String>,
}

/// A program running on a test host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostProcess(i32);

impl TestHost {
    /// The host that all tests of this process share. Nobody may kill its libvirtd or reboot it; domains on
    /// it must have names of their own (put the test's name in).
    pub fn shared() -> &'static Self {
        static SHARED: OnceLock<TestHost> = OnceLock::new();
        static TENDED: Once = Once::new();
        let host = SHARED.get_or_init(|| Self::start_shared("shared-host", QemuUser::Root));
        TENDED.call_once(|| host.tend_libvirtd());
        host
    }

    /// Like [`TestHost::shared`], but QEMU is [`QemuUser::Packaged`].
    pub fn shared_with_packaged_user() -> &'static Self {
        static SHARED: OnceLock<TestHost> = OnceLock::new();
        static TENDED: Once = Once::new();
        let host = SHARED.get_or_init(|| {
            Self::start_shared("shared-host-with-packaged-user", QemuUser::Packaged)
        });
        TENDED.call_once(|| host.tend_libvirtd());
        host
    }

    /// A static is never dropped: the host ends with the process, and its logs stay until the next run.
    fn start_shared(name: &str, user: QemuUser) -> Self {
        let mut folder = RunFolder::named(name);
        folder.keep();
        Self::start_with(folder.path(), user)
    }

    /// From now on a libvirtd that ends by itself is started again, as systemd does on every host
    /// (`Restart=on-failure` in libvirtd.service): libvirt 9.0 was seen to die once in a day of tests, and
    /// all tests after it failed for want of it. Each such end is told on standard error, past the capture
    /// of tests' output, with the end of libvirtd's log.
    pub fn tend_libvirtd(&'static self) {
        let tend = || loop {
            std::thread::sleep(Duration::from_millis(200));
            let libvirtd = HostProcess(self.state().libvirtd.expect("nobody kills it"));
            let Some(how) = self.ended(libvirtd) else {
                continue;
            };
            let log = fs::read_to_string(self.folder.join("log/libvirtd.log")).unwrap_or_default();
            let last: Vec<&str> = log.lines().rev().take(20).collect();
            let told = format!(
                "\nlibvirtd of {} ended by itself ({how}) and is started again; its log, newest first:\n{}\n",
                self.folder.display(),
                last.join("\n")
            );
            let _ = std::io::stderr().write_all(told.as_bytes());
            self.start_libvirtd();
        };
        std::thread::Builder::new()
            .name("tend libvirtd".into())
            .spawn(tend)
            .unwrap();
    }

    /// Starts a host that keeps its configuration, state and logs in `folder/host/`. QEMU is root.
    pub fn start(folder: &Path) -> Self {
        Self::start_with(folder, QemuUser::Root)
    }

    /// Starts a host with QEMU as this user.
    pub fn start_with(folder: &Path, user: QemuUser) -> Self {
        let folder = folder.join("host");
        // Sockets lie in /run, and their paths must be short: 108 bytes at the most.
        let run = tempfile::Builder::new()
            .prefix("salvor-host-")
            .tempdir()
            .unwrap()
            .keep();
        let mut binds = Vec::new();
        for (name, target) in [
            ("etc", "/etc/libvirt"),
            ("lib", "/var/lib/libvirt"),
            ("log", "/var/log/libvirt"),
            ("cache", "/var/cache/libvirt"),
            ("swtpm", "/var/lib/swtpm-localca"),
        ] {
            fs::create_dir_all(folder.join(name)).unwrap();
            binds.push((folder.join(name), PathBuf::from(target)));
        }
        let name = format!(
            "salvor-{}",
            run.to_string_lossy()
                .rsplit('-')
                .next()
                .unwrap()
                .to_lowercase()
        );
        fs::write(
            folder.join("hosts"),
            format!("127.0.0.1 localhost {name}\n::1 localhost\n"),
        )
        .unwrap();
        binds.push((folder.join("hosts"), PathBuf::from("/etc/hosts")));
        // The kernel's id of the boot is another one after each reboot of this host, as on a real one.
        let boot_id = folder.join("boot_id");
        fs::write(&boot_id, "").unwrap();
        binds.push((boot_id, PathBuf::from("/proc/sys/kernel/random/boot_id")));
        fs::write(folder.join("etc/libvirtd.conf"), LIBVIRTD_CONF).unwrap();
        let qemu_conf = format!("{QEMU_CONF}{}", user.settings());
        fs::write(folder.join("etc/qemu.conf"), qemu_conf).unwrap();

        let state = Mutex::new(State {
            boot: None,
            libvirtd: None,
        });
        let host = Self {
            folder,
            plan: HostPlan { name, run, binds },
            state,
        };
        host.boot();
        host.start_libvirtd();
        host
    }

    /// libvirt on this host.
    pub fn libvirt(&self) -> Libvirt {
        Libvirt::new(&self.uri())
    }

    /// The URI under which this host's libvirt is reached, from inside and from outside.
    pub fn uri(&self) -> String {
        format!("qemu+unix:///system?socket={}", self.socket().display())
    }

    /// Where the host keeps its configuration, state and logs.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Where a file of the host is as the machine sees it: only some folders are the host's own.
    pub fn outside(&self, path: &Path) -> PathBuf {
        let own = self.plan.binds.iter().find_map(|(outside, inside)| {
            let rest = path.strip_prefix(inside).ok()?;
            Some(outside.join(rest))
        });
        own.unwrap_or_else(|| path.to_owned())
    }

    fn socket(&self) -> PathBuf {
        self.plan.run.join("libvirt/libvirt-sock")
    }

    /// `kill -9` of libvirtd. Guests go on.
    #[track_caller]
    pub fn kill_libvirtd(&self) {
        let libvirtd = self.state().libvirtd.take().expect("libvirtd runs");
        self.kill(HostProcess(libvirtd), Signal::SIGKILL);
        self.wait_end(HostProcess(libvirtd), SOON);
    }

    /// Starts libvirtd and waits until it answers.
    #[track_caller]
    pub fn start_libvirtd(&self) {
        self.forget_half_started();
        let log = self.folder.join("log/libvirtd.out");
        let libvirtd = self.spawn(Path::new("/usr/sbin/libvirtd"), &[], &BTreeMap::new(), &log);
        self.state().libvirtd = Some(libvirtd.0);
        let libvirt = self.libvirt();
        let answers = try_wait(SOON, || {
            if let Some(how) = self.ended(libvirtd) {
                panic!(
                    "libvirtd ended with {how}: {}",
                    fs::read_to_string(&log).unwrap_or_default()
                );
            }
            libvirt.list().ok()
        });
        if answers.is_none() {
            panic!(
                "libvirtd did not answer: {}",
                fs::read_to_string(&log).unwrap_or_default()
            );
        }
    }

    /// Does what an operator has to do after libvirtd has died in the first moments of a start, before it had
    /// noted QEMU's pid: libvirt (9.0) takes such a guest for one that runs and is being started, for ever, and
    /// nobody can destroy it any more. Its QEMU has ended, because nobody told it to go on.
    fn forget_half_started(&self) {
        let notes = fs::read_dir(self.plan.run.join("libvirt/qemu"));
        for note in notes.into_iter().flatten().flatten() {
            let text = fs::read_to_string(note.path()).unwrap_or_default();
            if text.contains("<domstatus state='paused' reason='starting up' pid='0'>") {
                fs::remove_file(note.path()).unwrap();
            }
        }
    }

    /// Stops libvirtd in its tracks: calls to it hang.
    #[track_caller]
    pub fn freeze_libvirtd(&self) {
        let libvirtd = self.state().libvirtd.expect("libvirtd runs");
        self.kill(HostProcess(libvirtd), Signal::SIGSTOP);
    }

    /// Lets a frozen libvirtd go on.
    #[track_caller]
    pub fn thaw_libvirtd(&self) {
        let libvirtd = self.state().libvirtd.expect("libvirtd runs");
        self.kill(HostProcess(libvirtd), Signal::SIGCONT);
    }

    /// The QEMU of a domain, if it runs.
    #[track_caller]
    pub fn qemu(&self, domain: Uuid) -> Option<HostProcess> {
        self.with_argument(&domain.to_string()).first().copied()
    }

    /// The processes of the host that have this text as an argument of their command line.
    #[track_caller]
    pub fn with_argument(&self, text: &str) -> Vec<HostProcess> {
        match self.order(&Order::WithArgument(text.to_owned())) {
            Answer::Pids(pids) => pids.into_iter().map(HostProcess).collect(),
            other => panic!("pid 1 answered {other:?}"),
        }
    }

    /// `kill -9` of a domain's QEMU.
    #[track_caller]
    pub fn kill_qemu(&self, domain: Uuid) {
        let qemu = self
            .qemu(domain)
            .unwrap_or_else(|| panic!("{domain} has no QEMU"));
        self.kill(qemu, Signal::SIGKILL);
        self.wait_end(qemu, SOON);
    }

    /// `kill -9` of a domain's QEMU, if it has one just now; says whether it had.
    #[track_caller]
    pub fn try_kill_qemu(&self, domain: Uuid) -> bool {
        let Some(qemu) = self.qemu(domain) else {
            return false;
        };
        let signal = Signal::SIGKILL as i32;
        // It may end by itself meanwhile.
        self.order(&Order::Signal {
            pid: qemu.0,
            signal,
        }) == Answer::Done
    }

    /// Stops a domain's QEMU in its tracks: its monitor does not answer any more.
    #[track_caller]
    pub fn freeze_qemu(&self, domain: Uuid) {
        let qemu = self
            .qemu(domain)
            .unwrap_or_else(|| panic!("{domain} has no QEMU"));
        self.kill(qemu, Signal::SIGSTOP);
    }

    /// Lets a frozen QEMU go on.
    #[track_caller]
    pub fn thaw_qemu(&self, domain: Uuid) {
        let qemu = self
            .qemu(domain)
            .unwrap_or_else(|| panic!("{domain} has no QEMU"));
        self.kill(qemu, Signal::SIGCONT);
    }

    /// Cuts the host's power and boots it again: every process on it dies at once, agents too, `/run` is
    /// empty afterwards, and libvirtd is started.
    #[track_caller]
    pub fn reboot(&self) {
        self.power_off();
        self.boot();
        self.start_libvirtd();
    }

    /// Starts a program on the host; its output is appended to `log`.
    #[track_caller]
    pub fn spawn(
        &self,
        program: &Path,
        arguments: &[&str],
        environment: &BTreeMap<String, String>,
        log: &Path,
    ) -> HostProcess {
        let order = Order::Spawn {
            program: program.to_owned(),
            arguments: arguments
                .iter()
                .map(|argument| (*argument).to_owned())
                .collect(),
            environment: environment.clone(),
            log: log.to_owned(),
        };
        match self.order(&order) {
            Answer::Pid(pid) => HostProcess(pid),
            other => panic!("cannot start {}: {other:?}", program.display()),
        }
    }

    /// Sends a signal to a program on the host.
    #[track_caller]
    pub fn kill(&self, process: HostProcess, signal: Signal) {
        let answer = self.order(&Order::Signal {
            pid: process.0,
            signal: signal as i32,
        });
        assert_eq!(answer, Answer::Done, "cannot send {signal} to {process:?}");
    }

    /// How a program on the host has ended (`exit N`, `signal N`), if it has.
    #[track_caller]
    pub fn ended(&self, process: HostProcess) -> Option<String> {
        match self.order(&Order::Status { pid: process.0 }) {
            Answer::Running => None,
            Answer::Ended(how) => Some(how),
            other => panic!("pid 1 answered {other:?}"),
        }
    }

    /// Waits until a program on the host has ended, and returns how.
    #[track_caller]
    pub fn wait_end(&self, process: HostProcess, within: Duration) -> String {
        wait_for(&format!("{process:?} ends"), within, || self.ended(process))
    }

    /// The pid of a program on the host as the machine numbers it, for `/proc`.
    pub fn machine_pid(&self, process: HostProcess) -> Option<u32> {
        let init = self.init()?;
        let namespace = |pid: u32| fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
        let ours = namespace(init)?;
        fs::read_dir("/proc").ok()?.flatten().find_map(|entry| {
            let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
            let status = fs::read_to_string(entry.path().join("status")).ok()?;
            let inside = status
                .lines()
                .find_map(|line| line.strip_prefix("NSpid:"))?;
            let same = inside.split_whitespace().last()? == process.0.to_string();
            (same && namespace(pid)? == ours).then_some(pid)
        })
    }

    /// A path of the host as the machine reaches it, with what was mounted on the host after it came up.
    #[track_caller]
    pub fn inside(&self, path: &Path) -> PathBuf {
        let init = self.init().expect("the host is up");
        PathBuf::from(format!("/proc/{init}/root{}", path.display()))
    }

    /// The host's first process, as the machine numbers it.
    fn init(&self) -> Option<u32> {
        let outer = self.state().boot.as_ref()?.outer.id();
        let children = format!("/proc/{outer}/task/{outer}/children");
        fs::read_to_string(children).ok()?.trim().parse().ok()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[track_caller]
    fn boot(&self) {
        fs::write(self.folder.join("boot_id"), format!("{}\n", Uuid::new_v4())).unwrap();
        let program = profile_folder().join("salvor-test-init");
        let log = fs::File::options()
            .create(true)
            .append(true)
            .open(self.folder.join("init.log"))
            .unwrap();
        let mut outer = Command::new(&program)
            .arg("host")
            .arg(serde_json::to_string(&self.plan).unwrap())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log)
            // An interrupt from the terminal is for the test process: the host ends after it, in order.
            .process_group(0)
            .spawn()
            .unwrap_or_else(|e| {
                panic!(
                    "cannot run {}: {e}; build it with `cargo test`",
                    program.display()
                )
            });
        let orders = outer.stdin.take().unwrap();
        let output = BufReader::new(outer.stdout.take().unwrap());
        let (sender, answers) = channel();
        std::thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        let mut state = self.state();
        state.boot = Some(Boot {
            outer,
            orders,
            answers,
        });
        state.libvirtd = None;
    }

    fn power_off(&self) {
        let Some(Boot {
            mut outer, orders, ..
        }) = self.state().boot.take()
        else {
            return;
        };
        drop(orders);
        if try_wait(SOON, || outer.try_wait().ok().flatten()).is_none() {
            // Pid 1 has asked to die with it.
            if let Ok(pid) = i32::try_from(outer.id()) {
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
            let _ = outer.wait();
        }
    }

    #[track_caller]
    fn order(&self, order: &Order) -> Answer {
        let mut state = self.state();
        let boot = state.boot.as_mut().expect("the host is up");
        let line = serde_json::to_string(order).unwrap();
        let log = self.folder.join("init.log");
        let gone = |e: &dyn std::fmt::Display| -> String {
            format!(
                "the host's pid 1 does not answer ({e}): {}",
                fs::read_to_string(&log).unwrap_or_default()
            )
        };
        writeln!(boot.orders, "{line}").unwrap_or_else(|e| panic!("{}", gone(&e)));
        let answer = boot
            .answers
            .recv_timeout(SOON)
            .unwrap_or_else(|e| panic!("{}", gone(&e)));
        serde_json::from_str(&answer).unwrap()
    }
}

impl Drop for TestHost {
    fn drop(&mut self) {
        self.power_off();
    }
}
