// SPDX-License-Identifier: Apache-2.0
//! The real `salvord` as a process: its arguments, its configuration, its socket and its end.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;
use tonic::transport::{Channel, Endpoint};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_reflection::pb::v1::ServerReflectionRequest;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;

/// The deadline of everything here that should take a moment.
const PATIENCE: Duration = Duration::from_secs(30);

fn salvord() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_salvord"));
    command
        .env_remove("SALVOR_LOG")
        .env_remove("NOTIFY_SOCKET")
        .env_remove("WATCHDOG_USEC")
        .stdin(Stdio::null());
    command
}

/// Runs `salvord` to its end, which must come soon.
fn finished(command: &mut Command) -> Output {
    let child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let child = Reaped(Some(child));
    child.output()
}

/// A child that does not outlive its test.
struct Reaped(Option<Child>);

impl Reaped {
    fn pid(&self) -> Pid {
        Pid::from_raw(self.0.as_ref().unwrap().id().try_into().unwrap())
    }

    fn wait(&mut self) -> ExitStatus {
        let child = self.0.as_mut().unwrap();
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = child.try_wait().unwrap() {
                return status;
            }
            assert!(
                Instant::now() < deadline,
                "salvord did not end within {PATIENCE:?}"
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn output(mut self) -> Output {
        self.wait();
        self.0.take().unwrap().wait_with_output().unwrap()
    }
}

impl Drop for Reaped {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// A folder with a configuration, and the agents started with it.
struct Host {
    dir: TempDir,
}

impl Host {
    fn new(more: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let host = Self { dir };
        let (state, socket) = (host.path("state"), host.socket());
        let config = format!(
            "state_dir = {state:?}\nlisten = \"unix:{}\"\n{more}",
            socket.display()
        );
        fs::write(host.path("salvor.toml"), config).unwrap();
        host
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn socket(&self) -> PathBuf {
        self.path("run/salvor.sock")
    }

    fn command(&self) -> Command {
        let mut command = salvord();
        command.arg("--config").arg(self.path("salvor.toml"));
        command
    }

    /// Starts an agent and waits until it says that it is ready.
    fn start(&self, prepare: impl FnOnce(&mut Command)) -> Agent {
        let notify = self.path("notify");
        let _ = fs::remove_file(&notify);
        let manager = UnixDatagram::bind(&notify).unwrap();
        manager.set_read_timeout(Some(PATIENCE)).unwrap();
        let log = self.path("log");
        let mut command = self.command();
        command
            .env("NOTIFY_SOCKET", &notify)
            .stderr(fs::File::create(&log).unwrap());
        prepare(&mut command);
        let agent = Agent {
            process: Reaped(Some(command.spawn().unwrap())),
            manager,
            log,
        };
        let first = agent.told();
        assert!(first.starts_with("READY=1\n"), "{first}");
        agent
    }
}

struct Agent {
    process: Reaped,
    manager: UnixDatagram,
    log: PathBuf,
}

impl Agent {
    /// The next message to the service manager.
    fn told(&self) -> String {
        let mut buffer = [0; 1024];
        let length = loop {
            match self.manager.recv(&mut buffer) {
                Ok(length) => break length,
                // A socket with a timeout is interrupted whenever the process was stopped (signal(7)).
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => panic!("{error}; the log:\n{}", self.log()),
            }
        };
        String::from_utf8_lossy(buffer.get(..length).unwrap()).into_owned()
    }

    fn signal(&self, signal: Signal) {
        kill(self.process.pid(), signal).unwrap();
    }

    fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }
}

async fn channel(socket: &Path) -> Channel {
    let endpoint = Endpoint::from_shared(format!("unix:{}", socket.display())).unwrap();
    let endpoint = endpoint.connect_timeout(PATIENCE).timeout(PATIENCE);
    endpoint.connect().await.unwrap()
}

async fn client(socket: &Path) -> HealthClient<Channel> {
    HealthClient::new(channel(socket).await)
}

/// The names of the services that the API says it has.
async fn described(socket: &Path) -> Result<Vec<String>, tonic::Status> {
    let question = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut client = ServerReflectionClient::new(channel(socket).await);
    let mut answers = client
        .server_reflection_info(tokio_stream::iter([question]))
        .await?
        .into_inner();
    match answers
        .message()
        .await?
        .and_then(|answer| answer.message_response)
    {
        Some(MessageResponse::ListServicesResponse(list)) => Ok(list
            .service
            .into_iter()
            .map(|service| service.name)
            .collect()),
        other => panic!("{other:?}"),
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn check_config_prints_what_is_in_effect_and_where_it_came_from() {
    let host = Host::new("[rescue]\ntimeout = \"2h\"\n");
    let output = finished(host.command().arg("check-config"));
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let printed = text(&output.stdout);
    let line = |start: &str| {
        printed
            .lines()
            .find(|line| line.starts_with(start))
            .unwrap()
    };
    assert!(
        line("timeout = \"2h\"").ends_with("/salvor.toml:4"),
        "{printed}"
    );
    assert!(
        line("virt_type = \"auto\"").ends_with("# default"),
        "{printed}"
    );
    // The argument may stand after the command too, and nothing was made or opened.
    let after = finished(
        salvord()
            .arg("check-config")
            .arg("--config")
            .arg(host.path("salvor.toml")),
    );
    assert_eq!(text(&after.stdout), printed);
    assert!(!host.path("state").exists());
}

#[test]
fn a_wrong_configuration_ends_with_78_and_names_every_mistake_once() {
    let host = Host::new("[libvirt]\nurl = \"qemu:///system\"\ncall_timeout = \"soon\"\n");
    for command in [&mut host.command(), host.command().arg("check-config")] {
        let output = finished(command);
        assert_eq!(output.status.code(), Some(78));
        let printed = text(&output.stderr);
        assert_eq!(printed.lines().count(), 2, "{printed}");
        assert!(
            printed.contains(
                "salvor.toml:4: unknown key \"libvirt.url\"; did you mean \"libvirt.uri\"?"
            ),
            "{printed}"
        );
        assert!(
            printed.contains("salvor.toml:5: libvirt.call_timeout: "),
            "{printed}"
        );
    }
    assert!(!host.path("state").exists());
}

#[test]
fn a_named_configuration_must_exist() {
    let output = finished(salvord().arg("--config").arg("/nonexistent/salvor.toml"));
    assert_eq!(output.status.code(), Some(78));
    let printed = text(&output.stderr);
    assert!(printed.contains("/nonexistent/salvor.toml") && printed.contains("No such file"));
}

#[test]
fn wrong_arguments_end_with_64_and_questions_with_0() {
    for (arguments, code) in [
        (vec!["--colour"], 64),
        (vec!["serve"], 64),
        (vec!["--config"], 64),
        (vec!["--help"], 0),
        (vec!["--version"], 0),
    ] {
        let output = finished(salvord().args(&arguments));
        assert_eq!(output.status.code(), Some(code), "{arguments:?}");
    }
    let version = text(&finished(salvord().arg("--version")).stdout);
    assert!(
        version.starts_with(concat!("salvord ", env!("CARGO_PKG_VERSION"))),
        "{version}"
    );
}

#[test]
fn a_filter_that_is_none_is_refused() {
    let host = Host::new("");
    let output = finished(host.command().env("SALVOR_LOG", "salvor=loud"));
    assert_eq!(output.status.code(), Some(78));
    assert!(
        text(&output.stderr).contains("SALVOR_LOG"),
        "{}",
        text(&output.stderr)
    );
}

#[tokio::test]
async fn it_serves_on_its_socket_until_it_is_asked_to_end() {
    let host = Host::new("[drain]\ntimeout = \"20s\"\n");
    let mut agent = host.start(|_| {});
    let found = fs::symlink_metadata(host.socket()).unwrap();
    assert!(found.file_type().is_socket());
    assert_eq!(found.permissions().mode() & 0o777, 0o660);

    let mut client = client(&host.socket()).await;
    let request = HealthCheckRequest {
        service: String::new(),
    };
    let answer = client.check(request.clone()).await.unwrap().into_inner();
    assert_eq!(answer.status(), ServingStatus::Serving);

    // A hang-up changes nothing, and an open stream does not keep the agent for long.
    agent.signal(Signal::SIGHUP);
    let mut watch = client.watch(request).await.unwrap().into_inner();
    assert_eq!(
        watch.message().await.unwrap().unwrap().status(),
        ServingStatus::Serving
    );

    let asked = Instant::now();
    agent.signal(Signal::SIGTERM);
    assert_eq!(
        watch.message().await.unwrap().unwrap().status(),
        ServingStatus::NotServing
    );
    assert!(agent.told().starts_with("STOPPING=1\n"));
    assert_eq!(agent.process.wait().code(), Some(0), "{}", agent.log());
    assert!(
        asked.elapsed() < Duration::from_secs(20),
        "{:?}",
        asked.elapsed()
    );
    assert!(!host.socket().exists());
    assert!(agent.log().contains("SIGHUP is ignored"), "{}", agent.log());
}

#[test]
fn its_log_is_json_when_nobody_watches() {
    let host = Host::new("");
    let mut agent = host.start(|_| {});
    agent.signal(Signal::SIGINT);
    assert_eq!(agent.process.wait().code(), Some(0));
    let log = agent.log();
    assert!(log.lines().count() >= 3, "{log}");
    for line in log.lines() {
        let event: serde_json::Value = serde_json::from_str(line).expect(line);
        assert!(
            event.get("message").is_some() && event.get("level").is_some(),
            "{line}"
        );
    }
}

#[test]
fn a_second_agent_on_the_same_state_folder_is_refused() {
    let host = Host::new("");
    let mut agent = host.start(|_| {});
    let output = finished(&mut host.command());
    assert_eq!(output.status.code(), Some(1));
    let printed = text(&output.stderr);
    assert!(
        printed.contains(&format!("pid {}", agent.process.pid())),
        "{printed}"
    );
    // The first one was not disturbed.
    assert!(host.socket().exists());
    agent.signal(Signal::SIGTERM);
    assert_eq!(agent.process.wait().code(), Some(0));
}

#[test]
fn a_store_that_it_cannot_read_is_named_and_left_as_it_is() {
    let host = Host::new("");
    let mut agent = host.start(|_| {});
    agent.signal(Signal::SIGTERM);
    assert_eq!(agent.process.wait().code(), Some(0));
    let store = host.path("state/salvor.db");
    let refused = |change: &str, undo: &str, says: &str| {
        let execute = |sql: &str| {
            let connection = rusqlite::Connection::open(&store).unwrap();
            connection.execute_batch(sql).unwrap();
        };
        execute(change);
        let before = fs::read(&store).unwrap();
        let output = finished(&mut host.command());
        assert_eq!(output.status.code(), Some(1));
        let printed = text(&output.stderr);
        assert!(printed.contains(says), "{printed}");
        assert!(fs::read(&store).unwrap() == before, "{change}");
        execute(undo);
    };
    refused(
        "PRAGMA user_version = 99",
        "PRAGMA user_version = 1",
        "the store has schema version 99, newer than the 1 that this agent knows; use the newer agent",
    );
    refused(
        "INSERT INTO servers (id, doc) VALUES ('web', '{')",
        "DELETE FROM servers",
        "salvor.db is damaged: doc of web in the table servers cannot be read",
    );
    let mut agent = host.start(|_| {});
    agent.signal(Signal::SIGTERM);
    assert_eq!(agent.process.wait().code(), Some(0));
}

#[tokio::test]
async fn after_a_crash_the_next_agent_takes_over() {
    let host = Host::new("");
    let mut agent = host.start(|_| {});
    agent.signal(Signal::SIGKILL);
    agent.process.wait();
    assert!(host.socket().exists());

    let mut agent = host.start(|_| {});
    let request = HealthCheckRequest {
        service: String::new(),
    };
    let answer = client(&host.socket())
        .await
        .check(request)
        .await
        .unwrap()
        .into_inner();
    assert_eq!(answer.status(), ServingStatus::Serving);
    agent.signal(Signal::SIGTERM);
    assert_eq!(agent.process.wait().code(), Some(0), "{}", agent.log());
}

#[tokio::test]
async fn a_second_signal_ends_it_at_once() {
    let host = Host::new("[drain]\ntimeout = \"1h\"\n");
    let mut agent = host.start(|_| {});
    // An open stream keeps it for a second; the second signal is not later than that.
    let mut client = client(&host.socket()).await;
    let request = HealthCheckRequest {
        service: String::new(),
    };
    let _watch = client.watch(request).await.unwrap();
    agent.signal(Signal::SIGTERM);
    agent.signal(Signal::SIGINT);
    assert_eq!(agent.process.wait().code(), Some(0));
    assert!(agent.log().contains("asked again"), "{}", agent.log());
}

#[test]
fn the_watchdog_is_answered() {
    let host = Host::new("");
    let mut agent = host.start(|command| {
        command
            .env("WATCHDOG_USEC", "200000")
            .env_remove("WATCHDOG_PID");
    });
    assert_eq!(agent.told(), "WATCHDOG=1");
    assert_eq!(agent.told(), "WATCHDOG=1");
    agent.signal(Signal::SIGTERM);
    assert_eq!(agent.process.wait().code(), Some(0));
}

#[tokio::test]
async fn the_api_describes_itself_unless_told_not_to() {
    let host = Host::new("");
    let _agent = host.start(|_| {});
    let services = described(&host.socket()).await.unwrap();
    for expected in ["grpc.health.v1.Health", "salvor.compute.v1.ServerService"] {
        assert!(services.iter().any(|name| name == expected), "{services:?}");
    }

    let silent = Host::new("[api]\nreflection = false\n");
    let _agent = silent.start(|_| {});
    let refused = described(&silent.socket()).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::Unimplemented);
}

/// A configuration with its own `rescue.xml`, whose text `change` makes of the built-in one.
fn with_rescue_template(change: impl Fn(&str) -> String) -> Host {
    let builtin = include_str!("../../domain-templates/templates/rescue.xml");
    let host = Host::new("");
    let folder = host.path("templates");
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("rescue.xml"), change(builtin)).unwrap();
    let config = host.path("salvor.toml");
    let text = fs::read_to_string(&config).unwrap();
    fs::write(&config, format!("{text}templates_dir = {folder:?}\n")).unwrap();
    host
}

fn check_templates(host: &Host) -> Output {
    let config = host.path("salvor.toml");
    finished(salvord().arg("check-templates").arg("--config").arg(config))
}

#[test]
fn the_built_in_templates_are_good_and_so_is_an_override_that_adds_a_device() {
    let said = |output: Output| {
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    assert!(said(check_templates(&Host::new(""))).starts_with("built-in templates: "));
    let extra = "<watchdog model='i6300esb' action='reset'/>\n  </devices>";
    let host = with_rescue_template(|text| text.replacen("</devices>", extra, 1));
    let said = said(check_templates(&host));
    assert!(
        said.contains("held against libvirt's schema: all good"),
        "{said}"
    );
}

#[test]
fn the_built_in_templates_are_held_against_the_hosts_libvirt_at_the_start_too() {
    let host = Host::new("");
    let agent = host.start(|_| {});
    let deadline = Instant::now() + PATIENCE;
    while !fs::read_to_string(&agent.log)
        .unwrap()
        .contains("built-in templates checked")
    {
        assert!(Instant::now() < deadline, "they were not checked");
        std::thread::yield_now();
    }
}

#[test]
fn an_override_that_gives_unusable_domains_is_refused_by_the_check_and_at_the_start() {
    for (wrong, named) in [
        // libvirt's schema knows no such element.
        ("<no-such-device/>\n  </devices>", "against schema"),
        // Not XML any more.
        ("<watchdog>\n  </devices>", "rescue.xml"),
        // A variable that does not exist.
        ("{{ no_such_variable }}\n  </devices>", "rescue.xml"),
    ] {
        let host = with_rescue_template(|text| text.replacen("</devices>", wrong, 1));
        let output = check_templates(&host);
        assert_eq!(output.status.code(), Some(78), "{output:?}");
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(said.contains(named), "{said}");

        let config = host.path("salvor.toml");
        let output = finished(salvord().arg("--config").arg(config));
        // Not worth a restart: the unit has RestartPreventExitStatus=78.
        assert_eq!(output.status.code(), Some(78), "{output:?}");
        assert!(!host.socket().exists());
    }
}
