// SPDX-License-Identifier: Apache-2.0
//! Runs one qemu-img under limits, until it ends, is cancelled or is too late.

use std::ffi::OsString;
use std::process::Stdio;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio::process::{Child, Command};
use tokio::time::Instant;

use super::{Job, Limits, QemuImg, QemuImgError};

/// How much of an output is kept, in bytes: the last lines are all that is told.
const OUTPUT: usize = 64 << 10;
/// How many lines of stderr an error quotes.
const LINES: usize = 5;

impl QemuImg {
    /// Runs `qemu-img COMMAND ARGUMENTS`; only exit status 0 is a success.
    pub(super) async fn run(
        &self,
        job: &Job<'_>,
        command: &'static str,
        arguments: Vec<OsString>,
    ) -> Result<(), QemuImgError> {
        if job.cancel.is_cancelled() {
            return Err(QemuImgError::Cancelled { command });
        }
        // An agent that is killed takes its qemu-img along: an orphan would go on to write, and its
        // lock on the image would make the next agent's attempt fail. The kernel sends the signal when
        // the thread that forked ends; the runtime's workers end only with the runtime, as long as
        // nobody blocks in place.
        let mut process = Command::new("setpriv");
        process
            .args(["--pdeathsig", "KILL", "--", "prlimit"])
            .args(limits(&self.limits))
            .arg("--")
            .arg(&self.program)
            .arg(command)
            .args(arguments)
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("LC_ALL", "C")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true);
        let started = Instant::now();
        let cannot_run = |source| QemuImgError::Spawn {
            program: self.program.clone(),
            source,
        };
        let mut child = process.spawn().map_err(cannot_run)?;
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let outcome = {
            let whole = async {
                tokio::join!(
                    collect(stdout, |bytes| report(job, bytes)),
                    collect(stderr, |_| {}),
                    child.wait(),
                )
            };
            tokio::select! {
                biased;
                () = job.cancel.cancelled() => Err(QemuImgError::Cancelled { command }),
                () = tokio::time::sleep_until(started + job.deadline) => {
                    Err(QemuImgError::Deadline { command, after: job.deadline })
                }
                whole = whole => Ok(whole),
            }
        };
        let (_, stderr, status) = match outcome {
            Ok(whole) => whole,
            Err(error) => {
                end(&mut child).await;
                return Err(error);
            }
        };
        let status = status.map_err(cannot_run)?;
        if status.success() {
            return Ok(());
        }
        Err(QemuImgError::Failed {
            command,
            status,
            stderr: last_lines(&stderr),
        })
    }
}

fn limits(limits: &Limits) -> [String; 5] {
    [
        format!("--as={}", limits.address_space),
        format!("--cpu={}", limits.cpu_seconds),
        format!("--fsize={}", limits.file_size),
        format!("--nofile={}", limits.open_files),
        "--core=0".to_owned(),
    ]
}

/// Kills what is left of the process group and collects the child, so that no zombie stays.
async fn end(child: &mut Child) {
    let group = child.id().and_then(|pid| i32::try_from(pid).ok());
    if let Some(group) = group {
        // It may have ended in this moment; then there is nobody to kill.
        let _ = killpg(Pid::from_raw(group), Signal::SIGKILL);
    }
    // A process in an uninterruptible read (a dead NFS server) stays until the kernel lets it go;
    // tokio reaps it then. It is not waited for here, because nobody can say how long that takes.
    let _ = tokio::time::timeout(std::time::Duration::from_secs(5), child.wait()).await;
}

/// Reads everything, so that the child never blocks on a full pipe, and keeps the last part.
async fn collect(pipe: Option<impl AsyncRead + Unpin>, mut seen: impl FnMut(&[u8])) -> Vec<u8> {
    let mut kept = Vec::new();
    let Some(mut pipe) = pipe else { return kept };
    let mut chunk = [0; 4096];
    // A pipe that cannot be read tells no more: what counts is the exit status.
    while let Ok(count) = pipe.read(&mut chunk).await {
        let Some(bytes) = chunk.get(..count).filter(|bytes| !bytes.is_empty()) else {
            break;
        };
        seen(bytes);
        kept.extend_from_slice(bytes);
        if kept.len() > OUTPUT {
            kept.drain(..kept.len() - OUTPUT);
        }
    }
    kept
}

/// qemu-img -p writes `    (12.34/100%)` and a carriage return, each time in one write.
fn report(job: &Job<'_>, bytes: &[u8]) {
    let Some(progress) = job.progress else { return };
    let text = String::from_utf8_lossy(bytes);
    let percent = text
        .rsplit('(')
        .find_map(|part| part.split_once("/100%"))
        .and_then(|(number, _)| number.split('.').next()?.parse::<u8>().ok());
    if let Some(percent) = percent {
        progress(percent.min(100));
    }
}

fn last_lines(stderr: &[u8]) -> String {
    let text = String::from_utf8_lossy(stderr);
    let lines: Vec<&str> = text.lines().filter(|line| !line.is_empty()).collect();
    let from = lines.len().saturating_sub(LINES);
    lines.get(from..).unwrap_or_default().join("\n")
}
