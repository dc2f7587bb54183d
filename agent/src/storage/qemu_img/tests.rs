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
    Job::within(Duration::from_secs(60))
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

/// Runs qemu-io on a disk, as a guest would write to it.
fn guest(disk: Disk<'_>, command: &str) {
    let output = std::process::Command::new("qemu-io")
        .args(["-f", disk.format.driver(), "-c", command])
        .arg(disk.path)
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(!text.contains("verification failed"), "{text}");
}

#[tokio::test]
async fn nobody_else_can_read_what_is_made() {
    use std::os::unix::fs::PermissionsExt as _;
    let dir = tempfile::tempdir().unwrap();
    let (base, disk) = (dir.path().join("base"), dir.path().join("disk"));
    let tool = QemuImg::default();
    tool.create_empty(&job(), raw(&base), MIB, IfExists::Fail)
        .await
        .unwrap();
    tool.convert(&job(), raw(&base), qcow2(&disk), IfExists::Fail)
        .await
        .unwrap();
    for path in [&base, &disk] {
        let mode = std::fs::metadata(path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{}", path.display());
    }
}

#[tokio::test]
async fn an_existing_file_is_kept_unless_it_is_to_be_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    std::fs::write(&path, "precious").unwrap();
    let tool = QemuImg::default();
    let refused = tool
        .create_empty(&job(), qcow2(&path), MIB, IfExists::Fail)
        .await;
    assert!(matches!(refused, Err(QemuImgError::Exists { .. })));
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");

    let open = std::fs::File::open(&path).unwrap();
    tool.create_empty(&job(), qcow2(&path), MIB, IfExists::Replace)
        .await
        .unwrap();
    assert_eq!(std::io::read_to_string(open).unwrap(), "precious");
    assert_eq!(
        tool.info(&job(), qcow2(&path)).await.unwrap().virtual_size,
        MIB
    );
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
        tool.create_empty(&job(), base, 4 * MIB, IfExists::Replace)
            .await
            .unwrap();
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
async fn convert_reports_its_progress_and_flattens_chains() {
    let dir = tempfile::tempdir().unwrap();
    let (base, overlay) = (dir.path().join("base"), dir.path().join("overlay"));
    let flat = dir.path().join("flat");
    let tool = QemuImg::default();
    tool.create_empty(&job(), raw(&base), 64 * MIB, IfExists::Fail)
        .await
        .unwrap();
    guest(raw(&base), "write -P 7 0 64M");
    overlay::create(&overlay, &base, Format::Raw, 64 * MIB).unwrap();
    guest(qcow2(&overlay), "write -P 8 0 1M");
    let seen = Mutex::new(Vec::new());
    let report = |percent| seen.lock().unwrap().push(percent);
    let job = Job {
        progress: Some(&report),
        ..job()
    };
    tool.convert(&job, qcow2(&overlay), qcow2(&flat), IfExists::Fail)
        .await
        .unwrap();
    let seen = seen.lock().unwrap().clone();
    assert_eq!(seen.last(), Some(&100));
    assert!(seen.len() > 2 && seen.is_sorted(), "{seen:?}");
    guest(qcow2(&flat), "read -P 8 0 1M");
    guest(qcow2(&flat), "read -P 7 1M 63M");
    let info = tool.info(&job, qcow2(&flat)).await.unwrap();
    assert_eq!(info.backing_path, None);
}

#[tokio::test]
async fn resize_grows_and_never_shrinks() {
    let dir = tempfile::tempdir().unwrap();
    let tool = QemuImg::default();
    for format in [Format::Raw, Format::Qcow2] {
        let path = dir.path().join(format.name());
        let disk = Disk {
            path: &path,
            format,
        };
        tool.create_empty(&job(), disk, MIB, IfExists::Fail)
            .await
            .unwrap();
        tool.resize(&job(), disk, 2 * MIB).await.unwrap();
        assert!(tool.resize(&job(), disk, MIB).await.is_err());
        assert_eq!(tool.info(&job(), disk).await.unwrap().virtual_size, 2 * MIB);
    }
}

#[tokio::test]
async fn check_tells_a_sound_file_from_a_broken_one() {
    use std::os::unix::fs::FileExt as _;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    let tool = QemuImg::default();
    tool.create_empty(&job(), qcow2(&path), 4 * MIB, IfExists::Fail)
        .await
        .unwrap();
    guest(qcow2(&path), "write -P 1 0 1M");
    let report = tool.check(&job(), &path).await.unwrap();
    assert!(report.is_sound() && report.leaks == 0, "{report:?}");

    // The second cluster holds the refcount table; with none, every cluster is in error.
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    file.write_all_at(&[0; 8], 0x10000).unwrap();
    let report = tool.check(&job(), &path).await.unwrap();
    assert!(!report.is_sound() && report.corruptions > 0, "{report:?}");

    std::fs::write(&path, "no qcow2").unwrap();
    let error = tool.check(&job(), &path).await.unwrap_err();
    assert!(matches!(error, QemuImgError::Failed { .. }), "{error}");
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
        tool.create_empty(&job(), raw(&base), MIB, IfExists::Fail)
            .await
            .unwrap();
        overlay::create(&disk, &base, Format::Raw, MIB)
            .unwrap_or_else(|error| panic!("{name:?}: {error}"));
        // Opens the base through the name that the overlay stores.
        let flat = dir.path().join("flat");
        tool.convert(&job(), qcow2(&disk), raw(&flat), IfExists::Replace)
            .await
            .unwrap_or_else(|error| panic!("{name:?}: {error}"));
        tool.commit(&job(), &disk, raw(&base), MIB)
            .await
            .unwrap_or_else(|error| panic!("{name:?}: {error}"));
        assert_eq!(std::fs::metadata(&base).unwrap().len(), MIB);
        // A name that is not UTF-8 cannot be told in JSON; everything else comes back as it is.
        let info = tool.info(&job(), qcow2(&disk)).await;
        if name.to_str().is_some() {
            assert_eq!(info.unwrap().backing_path.as_deref(), Some(base.as_path()));
        }
    }
    let refused = tool.info(&job(), raw(Path::new("relative"))).await;
    assert!(matches!(refused, Err(QemuImgError::Path { .. })));
    let refused = tool.info(&job(), raw(Path::new("/nul\0byte"))).await;
    assert!(matches!(refused, Err(QemuImgError::Path { .. })));
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
async fn a_late_qemu_img_is_killed_with_its_children_and_its_file_removed() {
    let dir = tempfile::tempdir().unwrap();
    let (disk, pid) = (dir.path().join("disk"), dir.path().join("pid"));
    let body = format!(
        "echo half > {}; sleep 1000 & echo $! > {}; wait",
        disk.display(),
        pid.display()
    );
    let tool = script(dir.path(), &body);
    let error = tool
        .create_empty(
            &Job::within(Duration::from_secs(2)),
            qcow2(&disk),
            MIB,
            IfExists::Fail,
        )
        .await
        .unwrap_err();
    assert!(matches!(
        error,
        QemuImgError::Deadline {
            command: "create",
            ..
        }
    ));
    assert!(!disk.exists());
    // The grandchild is init's to collect; that it was killed is what counts.
    let stat = std::fs::read_to_string(
        Path::new("/proc")
            .join(std::fs::read_to_string(&pid).unwrap().trim())
            .join("stat"),
    );
    assert!(stat.is_err() || stat.unwrap().contains(") Z "));
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
    // A command that writes: one that reads may not even write its pid.
    let (result, ()) = tokio::time::timeout(Duration::from_secs(20), async {
        tokio::join!(tool.resize(&job, raw(&path), MIB), cancel_when_it_runs)
    })
    .await
    .unwrap();
    assert!(matches!(
        result,
        Err(QemuImgError::Cancelled { command: "resize" })
    ));
    assert!(is_gone(&pid));
    // And what was cancelled before it began does not begin.
    std::fs::remove_file(&pid).unwrap();
    assert!(tool.resize(&job, raw(&path), MIB).await.is_err());
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
    tool.resize(&job(), raw(&out), 1).await.unwrap();
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
async fn an_oversized_result_is_stopped_by_the_limit_and_removed() {
    let dir = tempfile::tempdir().unwrap();
    let (from, to) = (dir.path().join("from"), dir.path().join("to"));
    let mut tool = QemuImg::default();
    tool.create_empty(&job(), raw(&from), 8 * MIB, IfExists::Fail)
        .await
        .unwrap();
    guest(raw(&from), "write -P 7 0 8M");
    tool.limits.file_size = MIB;
    let error = tool
        .convert(&job(), raw(&from), qcow2(&to), IfExists::Fail)
        .await
        .unwrap_err();
    assert!(matches!(error, QemuImgError::Failed { .. }), "{error}");
    assert!(!to.exists());
}

#[tokio::test]
async fn errors_carry_the_exit_code_and_the_last_lines() {
    let dir = tempfile::tempdir().unwrap();
    let tool = script(
        dir.path(),
        "for line in 1 2 3 4 5 6 7; do echo line $line >&2; done; exit 42",
    );
    let error = tool.info(&job(), raw(Path::new("/x"))).await.unwrap_err();
    let QemuImgError::Failed { status, stderr, .. } = error else {
        panic!("{error}");
    };
    assert_eq!(status.code(), Some(42));
    assert_eq!(stderr, "line 3\nline 4\nline 5\nline 6\nline 7");

    let absent = QemuImg {
        program: dir.path().join("absent"),
        ..QemuImg::default()
    };
    let error = absent.info(&job(), raw(Path::new("/x"))).await.unwrap_err();
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
    let limit = Limits::default().cpu_seconds_writing * 1000;
    assert_eq!(limit, commit.deadline_ms());
}
