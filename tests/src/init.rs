// SPDX-License-Identifier: Apache-2.0
//! The first process of a test host: what `salvor-test-init` runs.
//!
//! ```text
//! test process ──stdin/stdout: one JSON line each way──┐
//!   └─ salvor-test-init host    new namespaces; waits  │
//!        └─ salvor-test-init init   pid 1 in there <───┘
//!             ├─ libvirtd
//!             ├─ qemu-system-x86_64 …   (they daemonise, and become pid 1's)
//!             └─ salvord
//! ```
//! Pid 1 takes orders from its standard input and reaps whatever dies, at once. (libvirt waits for QEMU's
//! zombie when it destroys a guest; a machine's own pid 1 may take seconds.) It returns when its input
//! ends, because the host was dropped or because the test process died in whatever way, and with it the
//! kernel ends everything in the namespace. Nothing can stay behind.
//!
//! It knows processes, not libvirt.

use std::collections::BTreeMap;
use std::error::Error;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};
use nix::unistd::{Pid, sethostname};
use serde::{Deserialize, Serialize};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// What a host needs to come up.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct HostPlan {
    /// The host name.
    pub name: String,
    /// What becomes `/run`, emptied first and removed at the end.
    pub run: PathBuf,
    /// Folders or files of the machine (second) that are replaced by others (first) inside.
    pub binds: Vec<(PathBuf, PathBuf)>,
}

/// An order to the first process.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Order {
    /// Start a program. Answer: [`Answer::Pid`].
    Spawn {
        /// Its path.
        program: PathBuf,
        /// Its arguments.
        arguments: Vec<String>,
        /// Variables added to the environment.
        environment: BTreeMap<String, String>,
        /// The file that its output is appended to.
        log: PathBuf,
    },
    /// Send a signal. Answer: [`Answer::Done`].
    Signal {
        /// To which process, as numbered inside.
        pid: i32,
        /// The signal's number.
        signal: i32,
    },
    /// How does a process fare? Answer: [`Answer::Running`] or [`Answer::Ended`].
    Status {
        /// Which process.
        pid: i32,
    },
    /// Which processes have this text as an argument of their command line? Answer: [`Answer::Pids`].
    WithArgument(String),
}

/// The answer to an [`Order`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// It is done.
    Done,
    /// The new process, as numbered inside.
    Pid(i32),
    /// These processes, as numbered inside.
    Pids(Vec<i32>),
    /// The process runs.
    Running,
    /// The process has ended: `exit N` or `signal N`; `unknown` if it was never this one's child.
    Ended(String),
    /// It could not be done.
    Failed(String),
}

/// `salvor-test-init MODE PLAN`: `host` makes the namespaces, `init` is pid 1 inside.
pub fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    let outcome = match arguments
        .iter()
        .map(String::as_str)
        .collect::<Vec<_>>()
        .as_slice()
    {
        [program, "host", plan] => host(program, plan),
        [_, "init", plan] => init(plan),
        _ => Err("usage: salvor-test-init host|init PLAN (the test harness runs it)".into()),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("salvor-test-init: {error}");
            ExitCode::FAILURE
        }
    }
}

fn host(program: &str, plan: &str) -> Result<()> {
    let parsed: HostPlan = serde_json::from_str(plan)?;
    let _ = fs::remove_dir_all(&parsed.run);
    // libvirt locks the terminal of a serial port that it connects somebody with, in /var/lock.
    fs::create_dir_all(parsed.run.join("lock"))?;
    unshare(
        CloneFlags::CLONE_NEWNS
            | CloneFlags::CLONE_NEWPID
            | CloneFlags::CLONE_NEWNET
            | CloneFlags::CLONE_NEWUTS
            | CloneFlags::CLONE_NEWIPC,
    )
    .map_err(|e| format!("cannot make namespaces ({e}): real tests need root"))?;
    let status = Command::new(program).args(["init", plan]).status()?;
    // By now the kernel has ended everything in the namespace.
    fs::remove_dir_all(&parsed.run)?;
    if status.success() {
        Ok(())
    } else {
        Err(format!("pid 1 ended with {status}").into())
    }
}

fn init(plan: &str) -> Result<()> {
    let plan: HostPlan = serde_json::from_str(plan)?;
    prctl::set_pdeathsig(Signal::SIGKILL)?;
    mount_all(&plan)?;
    sethostname(&plan.name)?;
    let status = Command::new("ip")
        .args(["link", "set", "lo", "up"])
        .status()?;
    if !status.success() {
        return Err(format!("ip link set lo up: {status}").into());
    }

    let ended = Arc::new(Mutex::new(BTreeMap::new()));
    let reaper = Arc::clone(&ended);
    std::thread::Builder::new()
        .name("reaper".into())
        .spawn(move || reap(&reaper))?;

    let mut output = std::io::stdout();
    for line in std::io::stdin().lines() {
        let answer = match serde_json::from_str(&line?) {
            Ok(order) => obey(order, &ended).unwrap_or_else(|e| Answer::Failed(e.to_string())),
            Err(error) => Answer::Failed(error.to_string()),
        };
        writeln!(output, "{}", serde_json::to_string(&answer)?)?;
    }
    Ok(())
}

fn mount_all(plan: &HostPlan) -> Result<()> {
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    mount(Some("proc"), "/proc", Some("proc"), MsFlags::empty(), none)?;
    // A fresh sysfs shows the devices of the new network namespace. It also has no control groups below
    // it: libvirt would otherwise move guests into those of the machine.
    umount2("/sys", MntFlags::MNT_DETACH)?;
    mount(Some("sysfs"), "/sys", Some("sysfs"), MsFlags::empty(), none)?;
    let run = (plan.run.clone(), PathBuf::from("/run"));
    for (inside, target) in plan.binds.iter().chain([&run]) {
        if inside.is_dir() {
            fs::create_dir_all(target)?;
        }
        mount(Some(inside), target, none, MsFlags::MS_BIND, none).map_err(|e| {
            format!(
                "cannot bind {} to {}: {e}",
                inside.display(),
                target.display()
            )
        })?;
    }
    Ok(())
}

type Ended = Mutex<BTreeMap<i32, String>>;

fn reap(ended: &Ended) {
    loop {
        // Noted first, reaped then: who finds no note still finds the process.
        let (pid, how) = match waitid(Id::All, WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT) {
            Ok(WaitStatus::Exited(pid, code)) => (pid, format!("exit {code}")),
            Ok(WaitStatus::Signaled(pid, signal, _)) => (pid, format!("signal {}", signal as i32)),
            // No child at the moment: there is nothing to block on, so look again soon.
            Err(Errno::ECHILD) => {
                std::thread::sleep(Duration::from_millis(10));
                continue;
            }
            _ => continue,
        };
        ended
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(pid.as_raw(), how);
        let _ = waitpid(pid, None);
    }
}

/// The state letter of a process (`Z` for a zombie), if there is one.
fn state(pid: i32) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, fields) = stat.rsplit_once(')')?;
    fields.trim_start().chars().next()
}

fn obey(order: Order, ended: &Ended) -> Result<Answer> {
    match order {
        Order::Spawn {
            program,
            arguments,
            environment,
            log,
        } => {
            // Left to spawn(), a missing program would end in a race with the reaper.
            fs::metadata(&program).map_err(|e| format!("{}: {e}", program.display()))?;
            let log = File::options().create(true).append(true).open(log)?;
            let child = Command::new(program)
                .args(arguments)
                .envs(environment)
                .stdin(Stdio::null())
                .stdout(log.try_clone()?)
                .stderr(log)
                .process_group(0)
                .spawn()?;
            let pid = i32::try_from(child.id())?;
            Ok(Answer::Pid(pid))
        }
        Order::Signal { pid, signal } => {
            kill(Pid::from_raw(pid), Signal::try_from(signal)?)?;
            Ok(Answer::Done)
        }
        Order::Status { pid } => {
            // What lives comes before what was noted: its number may have been another's before (the kernel
            // begins anew at 32,768, and every thread takes one).
            let state = state(pid);
            if state.is_some_and(|state| state != 'Z') {
                return Ok(Answer::Running);
            }
            let ended = ended.lock().unwrap_or_else(PoisonError::into_inner);
            Ok(match (ended.get(&pid), state) {
                (Some(how), _) => Answer::Ended(how.clone()),
                // Dead, but not noted yet.
                (None, Some(_)) => Answer::Running,
                (None, None) => Answer::Ended("unknown".into()),
            })
        }
        Order::WithArgument(text) => {
            let mut pids = Vec::new();
            for entry in fs::read_dir("/proc")? {
                let entry = entry?;
                let Some(pid) = entry
                    .file_name()
                    .to_str()
                    .and_then(|name| name.parse().ok())
                else {
                    continue;
                };
                // A process may be gone by the time we look.
                let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
                if command
                    .split(|byte| *byte == 0)
                    .any(|argument| argument == text.as_bytes())
                {
                    pids.push(pid);
                }
            }
            Ok(Answer::Pids(pids))
        }
    }
}
