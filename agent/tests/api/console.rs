// SPDX-License-Identifier: Apache-2.0
//! ConsoleService.

use std::{
    fs::{self, OpenOptions},
    io::Write as _,
    path::PathBuf,
    time::Duration,
};

use salvor_agent::hypervisor::{Boot, Hypervisor as _};
use salvor_proto::google::longrunning::Operation;
use salvor_proto::v1::{
    self, attach_console_request::Item as Sent, attach_console_response::Item as Told,
    get_console_log_request::From,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Streaming};
use uuid::Uuid;

use crate::harness::{Agent, of, refusal, stop};

const SOON: Duration = Duration::from_secs(20);

/// An adopted server of the project `p` that runs and has these devices.
pub(crate) async fn server(agent: &Agent, name: &str, devices: &str) -> Uuid {
    let id = Uuid::new_v4();
    let xml = format!(
        "<domain type='qemu'><name>{name}</name><uuid>{id}</uuid><memory unit='KiB'>65536</memory>\
         <vcpu>1</vcpu><os><type arch='x86_64' machine='pc-q35-7.2'>hvm</type><boot dev='hd'/></os>\
         <devices><disk type='file' device='disk'><driver name='qemu' type='qcow2'/>\
         <source file='/dev/null'/><target dev='vda' bus='virtio'/></disk>{devices}</devices></domain>"
    );
    agent.hypervisor.define(&xml).await.unwrap();
    agent.hypervisor.start(id, Boot::Resume).await.unwrap();
    let request = v1::AdoptServerRequest {
        domain: id.to_string(),
        ..v1::AdoptServerRequest::default()
    };
    let request = of("admin", "p", request);
    let adopted = agent.servers().adopt_server(request).await.unwrap();
    agent.ended(adopted.into_inner().operation).await;
    id
}

fn log_of(agent: &Agent) -> PathBuf {
    agent.dir.path().join("console.log")
}

async fn with_log(agent: &Agent, name: &str) -> Uuid {
    let log = log_of(agent);
    let serial = format!(
        "<serial type='pty'><log file='{}' append='on'/></serial>",
        log.display()
    );
    server(agent, name, &serial).await
}

fn say(agent: &Agent, text: &str) {
    let log = OpenOptions::new()
        .create(true)
        .append(true)
        .open(log_of(agent));
    log.unwrap().write_all(text.as_bytes()).unwrap();
}

fn from(server: &str, from: Option<From>) -> v1::GetConsoleLogRequest {
    v1::GetConsoleLogRequest {
        server: server.to_owned(),
        from,
        ..v1::GetConsoleLogRequest::default()
    }
}

async fn log(agent: &Agent, request: v1::GetConsoleLogRequest) -> v1::GetConsoleLogResponse {
    let answer = agent.consoles().get_console_log(request).await;
    answer.unwrap().into_inner()
}

#[tokio::test]
async fn a_log_is_read_from_its_end_and_gone_on_from_a_cursor() {
    let agent = Agent::start().await;
    with_log(&agent, "web").await;
    assert!(log(&agent, from("web", None)).await.data.is_empty());
    say(&agent, "one\ntwo\nthree\n");
    for (lines, expected) in [(-1, "one\ntwo\nthree\n"), (0, ""), (1, "three\n")] {
        let answer = log(&agent, from("web", Some(From::LastLines(lines)))).await;
        assert_eq!(answer.data, expected.as_bytes(), "{lines} lines");
    }
    let mut request = from("web", Some(From::LastBytes(-1)));
    request.max_bytes = 5;
    let answer = log(&agent, request).await;
    assert_eq!(
        (answer.data.as_slice(), answer.more),
        (b"one\nt".as_slice(), true)
    );
    assert_eq!(answer.boots.len(), 1);
    assert_eq!(answer.boots[0].size, 14);
    let rest = log(&agent, from("web", Some(From::Cursor(answer.next_cursor)))).await;
    assert_eq!(
        (rest.data.as_slice(), rest.more),
        (b"wo\nthree\n".as_slice(), false)
    );
    say(&agent, "four");
    let new = log(&agent, from("web", Some(From::Cursor(rest.next_cursor)))).await;
    assert_eq!(new.data, b"four");
    let newest = log(&agent, from("web", None)).await;
    assert_eq!(newest.data.len(), 18);
}

#[tokio::test]
async fn a_log_that_cannot_be_read_says_why_and_what_would_help() {
    let agent = Agent::start().await;
    agent.server("mute").await;
    let refused = agent.consoles().get_console_log(from("mute", None)).await;
    let message = refused.as_ref().unwrap_err().message().to_owned();
    let (code, reason, _) = refusal(refused);
    assert_eq!(
        (code, reason.as_str()),
        (Code::FailedPrecondition, "CONSOLE_LOG_UNAVAILABLE")
    );
    assert!(message.contains("<log file="), "{message}");

    with_log(&agent, "link").await;
    fs::write(agent.dir.path().join("secret"), "secret").unwrap();
    std::os::unix::fs::symlink(agent.dir.path().join("secret"), log_of(&agent)).unwrap();
    let refused = agent.consoles().get_console_log(from("link", None)).await;
    assert_eq!(refusal(refused).1, "CONSOLE_LOG_UNAVAILABLE");
}

#[tokio::test]
async fn what_makes_no_sense_is_refused_by_field() {
    let agent = Agent::start().await;
    with_log(&agent, "web").await;
    let get = |change: fn(&mut v1::GetConsoleLogRequest)| {
        let mut request = from("web", None);
        change(&mut request);
        request
    };
    for (request, field) in [
        (get(|r| r.from = Some(From::LastLines(-2))), "last_lines"),
        (
            get(|r| r.from = Some(From::LastBytes(i64::MIN))),
            "last_bytes",
        ),
        (
            get(|r| r.from = Some(From::Cursor("\0".to_owned()))),
            "cursor",
        ),
        (
            get(|r| r.from = Some(From::Cursor("9".repeat(1_000)))),
            "cursor",
        ),
        (get(|r| r.guest = 77), "guest"),
        (get(|r| r.max_bytes = -1), "max_bytes"),
        (get(|r| r.max_bytes = 2 << 20), "max_bytes"),
    ] {
        let refused = agent.consoles().get_console_log(request).await;
        let (code, reason, details) = refusal(refused);
        assert_eq!(
            (code, reason.as_str()),
            (Code::InvalidArgument, "INVALID_FIELD")
        );
        let violation = &details.bad_request().unwrap().field_violations[0];
        assert_eq!(violation.field, field);
    }
    // One that is none of this log's is no mistake: it may be an old one.
    let old = log(&agent, from("web", Some(From::Cursor("7-ff-9".to_owned())))).await;
    assert!(old.data.is_empty());
    let refused = agent.consoles().get_console_log(from("none", None)).await;
    assert_eq!(refusal(refused).1, "SERVER_NOT_FOUND");
}

#[tokio::test]
async fn a_followed_log_tells_what_is_added_and_ends_with_the_agent() {
    let agent = Agent::start().await;
    with_log(&agent, "web").await;
    say(&agent, "before\n");
    let request = v1::FollowConsoleLogRequest {
        server: "web".to_owned(),
        from: Some(v1::follow_console_log_request::From::LastLines(1)),
        ..v1::FollowConsoleLogRequest::default()
    };
    let stream = agent.consoles().follow_console_log(request).await;
    let mut stream = stream.unwrap().into_inner();
    let mut heard = Vec::new();
    let mut cursor = String::new();
    for (text, expected) in [
        ("", "before\n"),
        ("a", "before\na"),
        ("b\n", "before\nab\n"),
    ] {
        say(&agent, text);
        while heard != expected.as_bytes() {
            let next = tokio::time::timeout(SOON, stream.message()).await;
            let next = next.unwrap().unwrap().unwrap();
            assert!(!next.gap);
            heard.extend(next.data);
            cursor = next.cursor;
        }
    }
    say(&agent, "later");
    agent.draining.send_replace(true);
    let end = loop {
        match tokio::time::timeout(SOON, stream.message()).await.unwrap() {
            Ok(Some(_)) => {}
            Ok(None) => panic!("it ends with a reason"),
            Err(status) => break status,
        }
    };
    assert_eq!(refusal::<()>(Err(end)).1, "DRAINING");
    let rest = log(&agent, from("web", Some(From::Cursor(cursor)))).await;
    assert!(b"later".ends_with(&rest.data));
}

struct Line {
    sent: mpsc::Sender<v1::AttachConsoleRequest>,
    told: Streaming<v1::AttachConsoleResponse>,
}

impl Line {
    async fn attach(agent: &Agent, open: v1::ConsoleOpen) -> Result<Self, tonic::Status> {
        Self::attach_as("admin", "p", agent, open).await
    }

    async fn attach_as(
        role: &str,
        project: &str,
        agent: &Agent,
        open: v1::ConsoleOpen,
    ) -> Result<Self, tonic::Status> {
        let (sent, requests) = mpsc::channel(8);
        let first = v1::AttachConsoleRequest {
            item: Some(Sent::Open(open)),
        };
        sent.send(first).await.unwrap();
        let answer = agent
            .consoles()
            .attach_console(of(role, project, ReceiverStream::new(requests)))
            .await?;
        let told = answer.into_inner();
        Ok(Self { sent, told })
    }

    async fn send(&self, text: &str) {
        let item = Some(Sent::Input(text.as_bytes().to_vec()));
        let request = v1::AttachConsoleRequest { item };
        self.sent.send(request).await.unwrap();
    }

    async fn next(&mut self) -> Told {
        let next = tokio::time::timeout(SOON, self.told.message()).await;
        next.unwrap().unwrap().unwrap().item.unwrap()
    }
}

fn open(server: &str) -> v1::ConsoleOpen {
    v1::ConsoleOpen {
        server: server.to_owned(),
        ..v1::ConsoleOpen::default()
    }
}

fn output(text: &str) -> Told {
    Told::Output(text.as_bytes().to_vec())
}

#[tokio::test]
async fn one_client_of_a_serial_port_writes_and_others_look_on() {
    let agent = Agent::start().await;
    let id = server(&agent, "web", "<serial type='pty'/>").await;
    let mut writer = Line::attach(&agent, open("web")).await.unwrap();
    let Told::Attached(attached) = writer.next().await else {
        panic!("the greeting comes first");
    };
    assert_eq!((attached.writer, attached.clients), (true, 1));
    let look = || v1::ConsoleOpen {
        read_only: true,
        ..open("web")
    };
    let mut viewer = Line::attach(&agent, look()).await.unwrap();
    assert!(matches!(viewer.next().await, Told::Attached(a) if !a.writer && a.clients == 2));
    writer.send("ls\n").await;
    assert_eq!(writer.next().await, output("ls\n"));
    assert_eq!(viewer.next().await, output("ls\n"));
    // What a viewer sends goes nowhere.
    viewer.send("rm -rf /\n").await;

    let second = Line::attach(&agent, open("web")).await.err().unwrap();
    assert!(second.message().contains("uid:"), "{}", second.message());
    assert_eq!(refusal::<()>(Err(second)).1, "CONSOLE_BUSY");
    let force = v1::ConsoleOpen {
        force: true,
        history: true,
        ..open("web")
    };
    let mut third = Line::attach(&agent, force).await.unwrap();
    assert!(matches!(third.next().await, Told::Attached(a) if a.writer));
    assert_eq!(third.next().await, output("ls\n"));
    assert!(matches!(writer.next().await, Told::TakenOver(_)));
    writer.send("mine?\n").await;
    third.send("x").await;
    for line in [&mut writer, &mut viewer, &mut third] {
        assert_eq!(line.next().await, output("x"));
    }

    agent.hypervisor.guest_powers_off(id);
    for line in [&mut writer, &mut viewer, &mut third] {
        assert!(matches!(line.next().await, Told::Ended(_)));
        assert_eq!(line.told.message().await.unwrap(), None);
    }
    let off = Line::attach(&agent, open("web")).await.err().unwrap();
    assert!(off.message().contains("start it"), "{}", off.message());
    assert_eq!(refusal::<()>(Err(off)).1, "GUEST_NOT_RUNNING");
}

#[tokio::test]
async fn a_client_that_ends_makes_room_for_another_writer() {
    let agent = Agent::start().await;
    server(&agent, "web", "<serial type='pty'/>").await;
    let mut first = Line::attach(&agent, open("web")).await.unwrap();
    first.next().await;
    // It sends no more, and looks on.
    let (closed, _) = mpsc::channel(1);
    first.sent = closed;
    let mut second = loop {
        match Line::attach(&agent, open("web")).await {
            Ok(line) => break line,
            Err(status) => assert_eq!(refusal::<()>(Err(status)).1, "CONSOLE_BUSY"),
        }
    };
    second.next().await;
    second.send("hello").await;
    assert_eq!(first.next().await, output("hello"));
}

#[tokio::test]
async fn how_to_attach_comes_first_and_what_is_not_agreed_is_refused() {
    let agent = Agent::start().await;
    agent.server("mute").await;
    let none = Line::attach(&agent, open("mute")).await.err().unwrap();
    assert_eq!(refusal::<()>(Err(none)).1, "NO_CONSOLE");
    for item in [None, Some(Sent::Input(b"ls\n".to_vec()))] {
        let requests = tokio_stream::iter([v1::AttachConsoleRequest { item }]);
        let answer = agent.consoles().attach_console(requests).await;
        assert_eq!(refusal(answer).1, "INVALID_FIELD");
    }
}

#[tokio::test]
async fn a_picture_is_a_png_and_needs_a_screen_and_a_guest() {
    let agent = Agent::start().await;
    let video = "<video><model type='vga'/></video>";
    let id = server(&agent, "web", video).await;
    agent.server("blind").await;
    let shot = async |server: &str| {
        let server = server.to_owned();
        let request = v1::GetScreenshotRequest { server };
        agent.consoles().get_screenshot(request).await
    };
    let mut stream = shot("web").await.unwrap().into_inner();
    let first = stream.message().await.unwrap().unwrap();
    assert_eq!((first.width, first.height), (2, 1));
    assert!(first.data.starts_with(b"\x89PNG"));
    assert_eq!(stream.message().await.unwrap(), None);
    assert_eq!(refusal(shot("blind").await).1, "NO_SCREEN");
    agent.hypervisor.guest_powers_off(id);
    assert_eq!(refusal(shot("web").await).1, "GUEST_NOT_RUNNING");
}

#[tokio::test]
async fn whoever_may_not_change_a_server_reads_all_of_it_and_writes_nothing() {
    let agent = Agent::start().await;
    let log = log_of(&agent);
    let devices = format!(
        "<serial type='pty'><log file='{}' append='on'/></serial>\
         <video><model type='vga'/></video>",
        log.display()
    );
    let id = server(&agent, "web", &devices).await;
    say(&agent, "booted\n");
    for force in [false, true] {
        let open = v1::ConsoleOpen {
            force,
            ..open("web")
        };
        let refused = Line::attach_as("member", "q", &agent, open).await;
        let refused = refused.err().unwrap();
        let advice = refused.message().to_owned();
        assert!(advice.ends_with("look on (read-only)"), "{advice}");
        let (code, reason, _) = refusal::<()>(Err(refused));
        assert_eq!(
            (code, reason.as_str()),
            (Code::PermissionDenied, "PERMISSION_DENIED")
        );
    }
    let read_only = v1::ConsoleOpen {
        read_only: true,
        ..open("web")
    };
    let viewer = Line::attach_as("member", "q", &agent, read_only).await;
    let mut viewer = viewer.unwrap();
    assert!(matches!(viewer.next().await, Told::Attached(a) if !a.writer));
    viewer.send("rm -rf /\n").await;

    // A lock is no obstacle for its own project.
    let lock = v1::LockServerRequest {
        server: id.to_string(),
        ..v1::LockServerRequest::default()
    };
    agent.servers().lock_server(lock).await.unwrap();
    let writer = Line::attach_as("member", "p", &agent, open("web")).await;
    let mut writer = writer.unwrap();
    assert!(matches!(writer.next().await, Told::Attached(a) if a.writer));
    writer.send("ls\n").await;
    assert_eq!(viewer.next().await, output("ls\n"));

    let request = of("member", "q", from("web", None));
    let log = agent.consoles().get_console_log(request).await.unwrap();
    assert_eq!(log.into_inner().data, b"booted\n");
    let request = v1::FollowConsoleLogRequest {
        server: "web".to_owned(),
        from: Some(v1::follow_console_log_request::From::LastLines(-1)),
        ..v1::FollowConsoleLogRequest::default()
    };
    let request = of("member", "q", request);
    let followed = agent.consoles().follow_console_log(request).await.unwrap();
    let first = followed.into_inner().message().await.unwrap().unwrap();
    assert_eq!(first.data, b"booted\n");
    let server = "web".to_owned();
    let request = of("member", "q", v1::GetScreenshotRequest { server });
    let picture = agent.consoles().get_screenshot(request).await.unwrap();
    assert!(picture.into_inner().message().await.unwrap().is_some());
    let request = v1::GetServerDiagnosticsRequest {
        server: "web".to_owned(),
        definitions: true,
    };
    let request = of("member", "q", request);
    let diagnostics = agent.servers().get_server_diagnostics(request).await;
    assert!(diagnostics.unwrap().into_inner().domain.is_some());
}

#[tokio::test]
async fn of_a_server_that_is_off_there_is_the_log_and_nothing_to_attach_to() {
    let agent = Agent::start().await;
    let id = with_log(&agent, "web").await;
    say(&agent, "last words\n");
    agent.ended(stopped(&agent, id).await).await;
    for read_only in [false, true] {
        let open = v1::ConsoleOpen {
            read_only,
            ..open("web")
        };
        let refused = Line::attach(&agent, open).await.err().unwrap();
        let message = refused.message().to_owned();
        assert!(message.contains("it is SHUTOFF); start it"), "{message}");
        let (code, reason, _) = refusal::<()>(Err(refused));
        assert_eq!(
            (code, reason.as_str()),
            (Code::FailedPrecondition, "GUEST_NOT_RUNNING")
        );
    }
    assert_eq!(log(&agent, from("web", None)).await.data, b"last words\n");
}

/// Stops a server whose steps do nothing: its guest goes by itself.
async fn stopped(agent: &Agent, id: Uuid) -> Option<Operation> {
    agent.hypervisor.guest_powers_off(id);
    let stopped = agent.servers().stop_server(stop(id)).await.unwrap();
    stopped.into_inner().operation
}
