// SPDX-License-Identifier: Apache-2.0
//! Runs `salvor`.

use std::{path::Path, process::Stdio, time::Duration};

use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    process::{Child, Command},
    time::timeout,
};

/// No run of the program takes longer.
const LIMIT: Duration = Duration::from_secs(60);

/// How the program ended and what it wrote.
#[derive(Debug)]
pub struct Ended {
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl Ended {
    /// Asserts the exit code and shows what was written if it is another.
    #[track_caller]
    pub fn with(self, code: i32) -> Self {
        assert_eq!(self.code, code, "{self:#?}");
        self
    }

    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.out).unwrap_or_else(|error| panic!("{error}: {self:#?}"))
    }
}

/// The program, about to run in a clean environment.
pub fn salvor(socket: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_salvor"));
    command
        .env_clear()
        .env("SALVOR_SOCKET", socket)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    command
}

/// Runs the program to its end.
pub async fn run(socket: &Path, arguments: &[&str]) -> Ended {
    ended(salvor(socket, arguments).spawn().unwrap()).await
}

/// Runs the program to its end with something on standard input.
pub async fn run_with_input(socket: &Path, arguments: &[&str], input: &str) -> Ended {
    let mut child = salvor(socket, arguments)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(input.as_bytes())
        .await
        .unwrap();
    ended(child).await
}

/// Waits for the end.
pub async fn ended(child: Child) -> Ended {
    let output = timeout(LIMIT, child.wait_with_output())
        .await
        .expect("it hangs")
        .unwrap();
    Ended {
        code: output.status.code().unwrap_or(-1),
        out: String::from_utf8(output.stdout).unwrap(),
        err: String::from_utf8(output.stderr).unwrap(),
    }
}

/// The program while it runs.
#[derive(Debug)]
pub struct Running {
    child: Child,
    err: BufReader<tokio::process::ChildStderr>,
    told: String,
}

impl Running {
    pub fn start(socket: &Path, arguments: &[&str]) -> Self {
        let mut child = salvor(socket, arguments).spawn().unwrap();
        let err = BufReader::new(child.stderr.take().unwrap());
        Self {
            child,
            err,
            told: String::new(),
        }
    }

    pub fn pid(&self) -> u32 {
        self.child.id().unwrap()
    }

    /// Reads standard error until a line holds `text`.
    pub async fn tells(&mut self, text: &str) {
        let found = async {
            loop {
                let mut line = String::new();
                let read = self.err.read_line(&mut line).await.unwrap();
                assert_ne!(read, 0, "it ended without telling {text:?}: {}", self.told);
                self.told.push_str(&line);
                if line.contains(text) {
                    return;
                }
            }
        };
        timeout(LIMIT, found)
            .await
            .expect("it does not tell what it should");
    }

    /// Reads a line of standard output.
    pub async fn writes(&mut self) -> String {
        let mut line = Vec::new();
        let out = self.child.stdout.as_mut().unwrap();
        timeout(LIMIT, async {
            while line.last() != Some(&b'\n') {
                line.push(out.read_u8().await.expect("it ended without a line"));
            }
        })
        .await
        .expect("it writes nothing");
        String::from_utf8(line).unwrap()
    }

    pub async fn end(mut self) -> Ended {
        let mut told = self.told;
        timeout(LIMIT, self.err.read_to_string(&mut told))
            .await
            .expect("it hangs")
            .unwrap();
        self.child.stderr = None;
        let mut ended = ended(self.child).await;
        ended.err = told;
        ended
    }
}
