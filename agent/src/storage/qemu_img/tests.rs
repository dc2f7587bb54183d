// SPDX-License-Identifier: Apache-2.0
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::io::Write as _;
use std::os::unix::ffi::OsStringExt as _;
use std::sync::Mutex;

use tokio::sync::watch;

use super::*;
use crate::storage::overlay;

const MIB: u64 = 1 << 20;

fn job() -> Job<'static> {
    Job {
        deadline: Duration::from_secs(60),
        cancel: Cancel::never(),
        progress: None,
    }
}

fn raw(path: &Path) -> Disk<'_> {
    Disk {
        path,
        format: Format::Raw,
    }
}

fn qcow2(path: &Path) -> Disk<'_> {
    Disk {
        path,
        format: Format::Qcow2,
    }
}

/// Runs one of QEMU's tools, as somebody else would.
fn run(command: &mut std::process::Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Writes to a disk, or reads it, as a guest would.
fn guest(disk: Disk<'_>, command: &str) {
    let mut qemu_io = std::process::Command::new("qemu-io");
    let said = run(qemu_io
        .args(["-f", disk.format.driver(), "-c", command])
        .arg(disk.path));
    assert!(!said.contains("verification failed"), "{said}");
}

/// Makes an empty disk.
fn empty(disk: Disk<'_>, size: u64) {
    let mut qemu_img = std::process::Command::new("qemu-img");
    run(qemu_img
        .args(["create", "-q", "-f", disk.format.driver()])
        .arg(disk.path)
        .arg(size.to_string()));
}

#[tokio::test]
async fn a_commit_can_be_repeated_and_never_writes_old_blocks_over_newer_ones() {
    let dir = tempfile::tempdir().unwrap();
    let (base, overlay) = (dir.path().join("base"), dir.path().join("overlay"));
    let tool = QemuImg::default();
    for format in [Format::Raw, Format::Qcow2] {
        let base = Disk {
            path: &base,
            format,
        };
        empty(base, 4 * MIB);
        guest(base, "write -P 1 0 4M");
        overlay::create(&overlay, base.path, format, 4 * MIB).unwrap();
        guest(qcow2(&overlay), "write -P 2 1M 1M");
        for _ in 0..2 {
            tool.commit(&job(), &overlay, base, 4 * MIB).await.unwrap();
            guest(base, "read -P 2 1M 1M");
            guest(base, "read -P 1 2M 2M");
            guest(qcow2(&overlay), "read -P 2 1M 1M");
        }
        // The server runs on its disk again and writes; then the commit is repeated once more.
        guest(base, "write -P 3 1M 1M");
        tool.commit(&job(), &overlay, base, 4 * MIB).await.unwrap();
        guest(base, "read -P 3 1M 1M");
        guest(qcow2(&overlay), "read -P 3 1M 1M");
    }
}

#[tokio::test]
async fn a_commit_reports_its_progress() {
    let dir = tempfile::tempdir().unwrap();
    let (base, overlay) = (dir.path().join("base"), dir.path().join("overlay"));
    empty(raw(&base), 64 * MIB);
    overlay::create(&overlay, &base, Format::Raw, 64 * MIB).unwrap();
    guest(qcow2(&overlay), "write -P 8 0 64M");
    let seen = Mutex::new(Vec::new());
    let report = |percent| seen.lock().unwrap().push(percent);
    let job = Job {
        progress: Some(&report),
        ..job()
    };
    QemuImg::default()
        .commit(&job, &overlay, raw(&base), 64 * MIB)
        .await
        .unwrap();
    let seen = seen.lock().unwrap().clone();
    assert_eq!(seen.last(), Some(&100));
    assert!(seen.len() > 2 && seen.is_sorted(), "{seen:?}");
}

#[tokio::test]
async fn no_file_name_is_read_as_anything_but_a_file_name() {
    let dir = tempfile::tempdir().unwrap();
    let tool = QemuImg::default();
    let names: [&[u8]; 12] = [
        b"-f",
        b"--help",
        b"nbd:localhost:10809",
        b"json:{\"driver\":\"null-co\"}",
        b"a,backing_file=b,size=1",
        b"with space and 'quotes' \"",
        b"new\nline",
        b"$(touch pwned)",
        "Zürich.qcow2".as_bytes(),
        b"\xff\xfe",
        b"%s%n",
        b"fat:rw:x",
    ];
    for name in names {
        let name = std::ffi::OsString::from_vec(name.to_vec());
        let base = dir.path().join(&name);
        let mut disk = base.clone().into_os_string();
        disk.push(".disk");
        let disk = PathBuf::from(disk);
        std::fs::File::create(&base).unwrap().set_len(MIB).unwrap();
        overlay::create(&disk, &base, Format::Raw, MIB)
            .unwrap_or_else(|error| panic!("{name:?}: {error}"));
        guest(qcow2(&disk), "write -P 7 0 64k");
        // Opens the base through the name that the overlay stores, and by the one that it is given.
        tool.commit(&job(), &disk, raw(&base), MIB)
            .await
            .unwrap_or_else(|error| panic!("{name:?}: {error}"));
        let written = std::fs::read(&base).unwrap();
        assert_eq!(written.len() as u64, MIB);
        assert!(written[..64 << 10].iter().all(|byte| *byte == 7));
    }
    let good = dir.path().join("good");
    for bad in ["relative", "/nul\0byte"].map(Path::new) {
        for (overlay, base) in [(bad, good.as_path()), (good.as_path(), bad)] {
            let refused = tool.commit(&job(), overlay, raw(base), MIB).await;
            assert!(matches!(refused, Err(QemuImgError::Path { .. })));
        }
    }
}

/// A stand-in for qemu-img that does what a script says.
fn script(dir: &Path, body: &str) -> QemuImg {
    let program = dir.join("qemu-img");
    // Written by another process: this one forks in other threads, whose children would keep the
    // file open for writing, and a file that is open for writing cannot be executed.
    let mut install = std::process::Command::new("install")
        .args(["-m", "755", "/dev/stdin"])
        .arg(&program)
        .stdin(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = install.stdin.take().unwrap();
    write!(stdin, "#!/bin/sh\n{body}\n").unwrap();
    drop(stdin);
    assert!(install.wait().unwrap().success());
    QemuImg {
        program,
        ..QemuImg::default()
    }
}

/// The process has ended and was collected.
fn is_gone(pid_file: &Path) -> bool {
    let pid = std::fs::read_to_string(pid_file).unwrap();
    !Path::new("/proc").join(pid.trim()).exists()
}

#[tokio::test]
async fn a_late_qemu_img_is_killed_with_its_children() {
    let dir = tempfile::tempdir().unwrap();
    let (disk, pid) = (dir.path().join("disk"), dir.path().join("pid"));
    let job = Job {
        deadline: Duration::from_secs(4),
        ..job()
    };
    let body = format!("sleep 1000 & echo $! > {}; wait", pid.display());
    let tool = script(dir.path(), &body);
    let error = tool.commit(&job, &disk, raw(&disk), MIB).await.unwrap_err();
    assert!(matches!(
        error,
        QemuImgError::Deadline {
            command: "commit",
            ..
        }
    ));
    let pid = std::fs::read_to_string(&pid).unwrap();
    let stat = Path::new("/proc").join(pid.trim()).join("stat");
    // The grandchild is init's to collect; that it was killed is what counts. A killed process may take
    // its time to die.
    let died = async {
        while std::fs::read_to_string(&stat).is_ok_and(|stat| !stat.contains(") Z ")) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), died)
        .await
        .unwrap();
}

#[tokio::test]
async fn a_cancelled_qemu_img_is_killed_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let pid = dir.path().join("pid");
    let body = format!(
        "echo $$ > {0}.new; mv {0}.new {0}; exec sleep 1000",
        pid.display()
    );
    let tool = script(dir.path(), &body);
    let (stop, signal) = watch::channel(false);
    let job = Job {
        cancel: signal.into(),
        ..job()
    };
    let path = dir.path().join("disk");
    let cancel_when_it_runs = async {
        while !pid.exists() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        stop.send(true).unwrap();
    };
    let (result, ()) = tokio::time::timeout(Duration::from_secs(20), async {
        tokio::join!(
            tool.commit(&job, &path, raw(&path), MIB),
            cancel_when_it_runs
        )
    })
    .await
    .unwrap();
    assert!(matches!(
        result,
        Err(QemuImgError::Cancelled { command: "commit" })
    ));
    assert!(is_gone(&pid));
    // And what was cancelled before it began does not begin.
    std::fs::remove_file(&pid).unwrap();
    assert!(tool.commit(&job, &path, raw(&path), MIB).await.is_err());
    assert!(!pid.exists());
}

/// The agent of the next test, when the test runs itself as another process.
const AGENT: &str = "SALVOR_TEST_QEMU_IMG_OF";

#[tokio::test]
async fn a_killed_agent_takes_its_qemu_img_along() {
    if let Some(dir) = std::env::var_os(AGENT) {
        let tool = script(
            Path::new(&dir),
            "echo $$ > $0.new; mv $0.new $0.pid; exec sleep 300",
        );
        let (overlay, base) = (Path::new(&dir).join("a"), Path::new(&dir).join("b"));
        let ended = tool.commit(&job(), &overlay, raw(&base), MIB).await;
        panic!("it was to be killed: {ended:?}");
    }
    let dir = tempfile::tempdir().unwrap();
    let name = "storage::qemu_img::tests::a_killed_agent_takes_its_qemu_img_along";
    let mut agent = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name])
        .env(AGENT, dir.path())
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let deadline = tokio::time::Instant::now() + Duration::from_secs(30);
    let wait = async |what: &str, is_so: &dyn Fn() -> bool| {
        while !is_so() && tokio::time::Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        (!is_so()).then(|| what.to_owned())
    };
    let pid_file = dir.path().join("qemu-img.pid");
    let begun = wait("qemu-img begins", &|| pid_file.exists()).await;
    agent.kill().unwrap();
    agent.wait().unwrap();
    assert_eq!(begun, None);
    // Whoever collects orphans here may take its time: a zombie is gone as well.
    let pid = std::fs::read_to_string(&pid_file)
        .unwrap()
        .trim()
        .to_owned();
    let stat = format!("/proc/{pid}/stat");
    let gone = || std::fs::read_to_string(&stat).map_or(true, |stat| stat.contains(") Z "));
    let stays = wait("qemu-img ends", &gone).await;
    if stays.is_some() {
        let pid = nix::unistd::Pid::from_raw(pid.parse().unwrap());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
    }
    assert_eq!(stays, None);
}

#[tokio::test]
async fn qemu_img_runs_under_its_limits_and_in_its_own_group() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let body = format!(
        "(prlimit --pid $$ --noheadings --raw --output RESOURCE,SOFT,HARD; \
         env; readlink /proc/$$/fd/0; ps -o pgid= -p $$; echo $$) > {} 2>&1; echo '{{}}'",
        out.display()
    );
    let mut tool = script(dir.path(), &body);
    tool.limits.file_size = 1 << 30;
    let overlay = dir.path().join("overlay");
    tool.commit(&job(), &overlay, raw(&out), MIB).await.unwrap();
    let text = std::fs::read_to_string(&out).unwrap();
    for line in [
        "AS 2147483648 2147483648",
        "CPU 21600 21600",
        "FSIZE 1073741824 1073741824",
        "NOFILE 256 256",
        "CORE 0 0",
        "LC_ALL=C",
        "/dev/null",
    ] {
        assert!(text.lines().any(|found| found == line), "{line} in {text}");
    }
    let numbers: Vec<&str> = text.lines().rev().take(2).map(str::trim).collect();
    assert_eq!(numbers[0], numbers[1], "not the leader of its group");
}

#[tokio::test]
async fn a_commit_that_writes_more_than_its_disk_is_stopped_by_the_limit() {
    let dir = tempfile::tempdir().unwrap();
    let (base, overlay) = (dir.path().join("base"), dir.path().join("overlay"));
    let mut tool = QemuImg::default();
    empty(raw(&base), 8 * MIB);
    overlay::create(&overlay, &base, Format::Raw, 8 * MIB).unwrap();
    guest(qcow2(&overlay), "write -P 7 0 8M");
    tool.limits.file_size = MIB;
    let error = tool
        .commit(&job(), &overlay, raw(&base), MIB)
        .await
        .unwrap_err();
    assert!(matches!(error, QemuImgError::Failed { .. }), "{error}");
    // The overlay still has everything.
    guest(qcow2(&overlay), "read -P 7 0 8M");
}

#[tokio::test]
async fn errors_carry_the_exit_code_and_the_last_lines() {
    let dir = tempfile::tempdir().unwrap();
    let tool = script(
        dir.path(),
        "for line in 1 2 3 4 5 6 7; do echo line $line >&2; done; exit 42",
    );
    let path = Path::new("/x");
    let error = tool.commit(&job(), path, raw(path), MIB).await.unwrap_err();
    let QemuImgError::Failed { status, stderr, .. } = error else {
        panic!("{error}");
    };
    assert_eq!(status.code(), Some(42));
    assert_eq!(stderr, "line 3\nline 4\nline 5\nline 6\nline 7");

    let absent = QemuImg {
        program: dir.path().join("absent"),
        ..QemuImg::default()
    };
    let error = absent
        .commit(&job(), path, raw(path), MIB)
        .await
        .unwrap_err();
    assert!(error.to_string().contains("absent"), "{error}");
}

#[test]
fn the_limit_of_a_commit_is_not_met_before_its_deadline() {
    let commit = crate::core::plan::Step::CommitOverlay {
        path: String::new(),
        base: String::new(),
        base_format: String::new(),
        base_references: Default::default(),
    };
    let limit = Limits::default().cpu_seconds * 1000;
    assert_eq!(limit, commit.deadline_ms());
}
