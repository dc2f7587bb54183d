// SPDX-License-Identifier: Apache-2.0
//! Console logs, consoles, pictures and diagnostics, from an agent that the tests play.

use std::{
    fs::File,
    io::Write as _,
    os::unix::fs::PermissionsExt as _,
    pin::Pin,
    time::{Duration, Instant},
};

use futures_util::{Stream, StreamExt as _, stream};
use nix::{
    pty::openpty,
    sys::termios::{LocalFlags, tcgetattr},
};
use salvor_proto::v1::{
    self, attach_console_request::Item as Sent, attach_console_response::Item as Told,
    console_service_server::ConsoleService, get_console_log_request::From,
};
use tonic::{Request, Response, Status, Streaming};

use crate::{
    made::server,
    mock::{Answer, Mock, Services, State},
    run::{Running, ended, run, run_with_input, salvor},
};

/// What the agent that is played says here, and what it was asked.
#[derive(Debug, Clone, Default)]
pub struct Says {
    pub diagnostics: v1::GetServerDiagnosticsResponse,
    /// Pages of a log.
    pub log: Vec<v1::GetConsoleLogResponse>,
    pub logs: Vec<v1::GetConsoleLogRequest>,
    /// A guest's words; `Ended` follows if this says so.
    pub followed: Vec<v1::FollowConsoleLogResponse>,
    pub ends: Option<String>,
    pub opens: Vec<v1::ConsoleOpen>,
    /// What was typed.
    pub typed: Vec<u8>,
}

type Items<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

fn told(item: Told) -> Result<v1::AttachConsoleResponse, Status> {
    Ok(v1::AttachConsoleResponse { item: Some(item) })
}

#[tonic::async_trait]
impl ConsoleService for Services {
    type FollowConsoleLogStream = Items<v1::FollowConsoleLogResponse>;
    type AttachConsoleStream = Items<v1::AttachConsoleResponse>;
    type GetScreenshotStream = Items<v1::GetScreenshotResponse>;

    async fn get_console_log(
        &self,
        request: Request<v1::GetConsoleLogRequest>,
    ) -> Answer<v1::GetConsoleLogResponse> {
        let mut page = v1::GetConsoleLogResponse::default();
        self.call("log", |state| {
            state.console.logs.push(request.into_inner());
            if !state.console.log.is_empty() {
                page = state.console.log.remove(0);
            }
        })?;
        Ok(Response::new(page))
    }

    async fn follow_console_log(
        &self,
        _: Request<v1::FollowConsoleLogRequest>,
    ) -> Answer<Self::FollowConsoleLogStream> {
        let state = self.call("follow", |_| ())?;
        let items = stream::iter(state.console.followed.into_iter().map(Ok));
        Ok(Response::new(items.chain(stream::pending()).boxed()))
    }

    /// Says what is typed, in capitals.
    async fn attach_console(
        &self,
        request: Request<Streaming<v1::AttachConsoleRequest>>,
    ) -> Answer<Self::AttachConsoleStream> {
        let mut sent = request.into_inner();
        let open = sent.message().await?.and_then(|first| first.item);
        let Some(Sent::Open(open)) = open else {
            return Err(Status::invalid_argument("no open"));
        };
        let writer = !open.read_only;
        let state = self.call("attach", |state| state.console.opens.push(open))?;
        let greeting = told(Told::Attached(v1::ConsoleAttached { writer, clients: 3 }));
        let services = self.clone();
        let echo = sent.filter_map(move |request| {
            let services = services.clone();
            async move {
                let Sent::Input(bytes) = request.ok()?.item? else {
                    return None;
                };
                let _ = services.call("input", |state| state.console.typed.extend(&bytes));
                Some(told(Told::Output(bytes.to_ascii_uppercase())))
            }
        });
        let end = state.console.ends.map(|message| {
            let ended = v1::ConsoleEnded { message };
            told(Told::Ended(ended))
        });
        let greeting = stream::iter([greeting].into_iter().chain(end));
        let items = greeting.chain(echo).chain(stream::pending());
        Ok(Response::new(items.boxed()))
    }

    async fn get_screenshot(
        &self,
        _: Request<v1::GetScreenshotRequest>,
    ) -> Answer<Self::GetScreenshotStream> {
        self.call("screenshot", |_| ())?;
        let piece = |data: &[u8], width, height| {
            let data = data.to_vec();
            Ok(v1::GetScreenshotResponse {
                data,
                width,
                height,
            })
        };
        let pieces = stream::iter([piece(b"one", 640, 480), piece(b"two", 0, 0)]);
        Ok(Response::new(pieces.boxed()))
    }
}

fn mock(console: Says) -> Mock {
    Mock::new(State {
        console,
        ..State::default()
    })
}

fn page(data: &[u8], cursor: &str, more: bool) -> v1::GetConsoleLogResponse {
    v1::GetConsoleLogResponse {
        data: data.to_vec(),
        next_cursor: cursor.to_owned(),
        more,
        boots: vec![v1::ConsoleBoot {
            number: 4,
            rescue: true,
            size: 2048,
            ..v1::ConsoleBoot::default()
        }],
        ..v1::GetConsoleLogResponse::default()
    }
}

fn log() -> Mock {
    mock(Says {
        log: vec![
            page(b"one\r\n\x1b[2Jtw\xc3", "1-a-10", true),
            page(b"\xabo\n", "1-a-12", false),
        ],
        ..Says::default()
    })
}

#[tokio::test]
async fn a_log_is_every_page_with_nothing_that_a_terminal_obeys() {
    let mock = log();
    let arguments = ["server", "console-log", "web", "-n", "-1", "--show-cursor"];
    let ended = run(&mock.socket(), &arguments).await.with(0);
    assert_eq!(ended.out, "one\n\\u{1b}[2Jtwëo\n");
    assert!(ended.err.contains("cursor: 1-a-12"), "{}", ended.err);
    let asked = mock.state().console.logs;
    let from: Vec<_> = asked.into_iter().map(|request| request.from).collect();
    assert_eq!(
        from,
        [
            Some(From::LastLines(-1)),
            Some(From::Cursor("1-a-10".to_owned()))
        ]
    );

    let again = log();
    let json = run(&again.socket(), &["server", "log", "web", "-o", "json"]).await;
    let json = json.with(0).json();
    assert_eq!(json["next_cursor"], "1-a-12");
    assert_eq!(json["data"], "b25lDQobWzJKdHfDq28K");
    assert_eq!(json["boots"][0]["rescue"], true);
}

#[tokio::test]
async fn boots_are_a_table_and_a_followed_log_goes_on() {
    let ended = run(&log().socket(), &["server", "log", "web", "--boots"]).await;
    let out = ended.with(0).out;
    assert!(out.contains("BOOT") && out.contains("rescue"), "{out}");
    let said = |data: &str| v1::FollowConsoleLogResponse {
        data: data.as_bytes().to_vec(),
        ..v1::FollowConsoleLogResponse::default()
    };
    let mock = mock(Says {
        followed: vec![said("half"), said(""), said(" a line\nnext\n")],
        ..Says::default()
    });
    let mut running = Running::start(&mock.socket(), &["server", "log", "web", "--follow"]);
    assert_eq!(running.writes().await, "half a line\n");
    assert_eq!(running.writes().await, "next\n");
}

#[tokio::test]
async fn what_is_piped_in_is_typed_and_the_answer_is_shown() {
    let mock = mock(Says::default());
    let arguments = ["server", "console", "web", "--force", "--linger", "500ms"];
    let ended = run_with_input(&mock.socket(), &arguments, "ls -l\n").await;
    let ended = ended.with(0);
    assert_eq!(ended.out, "LS -L\n");
    assert!(ended.err.contains("3 attached"), "{}", ended.err);
    let says = mock.state().console;
    assert_eq!(says.typed, b"ls -l\n");
    let open = &says.opens[0];
    assert!(open.force && open.history && !open.read_only);
    let wrong = ["server", "console", "web", "--force", "--read-only"];
    run(&mock.socket(), &wrong).await.with(2);
}

#[tokio::test]
async fn a_terminal_is_the_guests_until_the_escape_key_and_then_as_before() {
    let mock = mock(Says::default());
    let terminal = openpty(None, None).unwrap();
    let before = tcgetattr(&terminal.slave).unwrap();
    let child = salvor(&mock.socket(), &["server", "console", "web"])
        .stdin(terminal.slave.try_clone().unwrap())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let now = tcgetattr(&terminal.slave).unwrap().local_flags;
        if !now.intersects(LocalFlags::ICANON | LocalFlags::ECHO | LocalFlags::ISIG) {
            break;
        }
        assert!(
            Instant::now() < deadline,
            "the terminal does not become raw"
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let mut keys = File::from(terminal.master);
    // Ctrl-C and return are the guest's.
    keys.write_all(b"ls\x03\r").unwrap();
    mock.until(|state| state.console.typed == b"ls\x03\r").await;
    keys.write_all(b"x\x1dnever").unwrap();
    let ended = ended(child).await.with(0);
    assert!(ended.err.contains("Ctrl-] leaves"), "{}", ended.err);
    assert!(!mock.state().console.typed.ends_with(b"never"));
    let after = tcgetattr(&terminal.slave).unwrap();
    assert_eq!(after.local_flags, before.local_flags);
    assert_eq!(after.input_flags, before.input_flags);
    assert_eq!(after.output_flags, before.output_flags);
}

#[tokio::test]
async fn a_console_that_ends_by_itself_says_why() {
    let mock = mock(Says {
        ends: Some("the guest is off".to_owned()),
        ..Says::default()
    });
    let ended = run(&mock.socket(), &["server", "console", "web", "--read-only"]).await;
    let ended = ended.with(1);
    assert!(ended.err.contains("the guest is off"), "{}", ended.err);
}

#[tokio::test]
async fn a_picture_goes_into_the_file() {
    let mock = mock(Says::default());
    let file = mock.folder().join("screen.png");
    let arguments = [
        "server",
        "screenshot",
        "web",
        "--file",
        file.to_str().unwrap(),
    ];
    let ended = run(&mock.socket(), &arguments).await.with(0);
    assert_eq!(std::fs::read(&file).unwrap(), b"onetwo");
    assert!(ended.out.contains("640 x 480"), "{}", ended.out);
}

#[tokio::test]
async fn diagnostics_are_text_and_a_bundle_is_a_new_file_for_its_owner_only() {
    let mock = mock(Says {
        diagnostics: v1::GetServerDiagnosticsResponse {
            server: Some(server("web")),
            process: Some(v1::QemuProcess {
                pid: 7,
                state: "T".into(),
                ..v1::QemuProcess::default()
            }),
            guest_agent: Some(v1::GuestAgentReading {
                hostname: "evil\u{1b}[2J".into(),
                ..v1::GuestAgentReading::default()
            }),
            missing: vec![v1::MissingPart {
                part: "counters".into(),
                reason: "DEADLINE_EXCEEDED".into(),
                message: "it hangs".into(),
            }],
            inactive_definition: "<domain/>".into(),
            ..v1::GetServerDiagnosticsResponse::default()
        },
        ..Says::default()
    });
    let file = mock.folder().join("bundle.json");
    let arguments = [
        "server",
        "diagnostics",
        "web",
        "--bundle",
        file.to_str().unwrap(),
    ];
    let ended = run(&mock.socket(), &arguments).await.with(0);
    for words in ["process 7, stopped: frozen", "it hangs", "evil\\u{1b}[2J"] {
        assert!(ended.out.contains(words), "no {words} in {}", ended.out);
    }
    let bundle = std::fs::read_to_string(&file).unwrap();
    let bundle: serde_json::Value = serde_json::from_str(&bundle).unwrap();
    assert_eq!(bundle["diagnostics"]["inactive_definition"], "<domain/>");
    assert!(bundle["host"].is_object());
    let mode = std::fs::metadata(&file).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    // What is there is not replaced.
    run(&mock.socket(), &arguments).await.with(1);

    let arguments = ["server", "diagnostics", "web", "-o", "json"];
    let json = run(&mock.socket(), &arguments).await.with(0).json();
    assert_eq!(json["inactive_definition"], "");
}
