// SPDX-License-Identifier: Apache-2.0
//! The real `salvord`, running on a test host, and a gRPC channel to it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use salvor_proto::v1::server_service_server::SERVICE_NAME as SERVER_SERVICE_NAME;
use tempfile::TempDir;
use toml::Value;
use tonic::transport::{Channel, Endpoint};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use crate::host::{HostProcess, TestHost};
use crate::run_folder::{repository, target_folder};
use crate::wait::SOON;

/// How an agent is configured and started. [`AgentSettings::default`] is right for most tests.
#[derive(Debug, Clone, Default)]
pub struct AgentSettings {
    overrides: Vec<(String, Value)>,
    environment: BTreeMap<String, String>,
    program: Option<PathBuf>,
}

impl AgentSettings {
    /// Runs this `salvord` instead of the debug build with failpoints: a release build, for a bench.
    #[must_use]
    pub fn program(mut self, path: &Path) -> Self {
        self.program = Some(path.to_owned());
        self
    }

    /// Sets a key of the configuration file: `"state_dir"`, `"rescue.timeout"`.
    #[must_use]
    pub fn set(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.overrides.push((key.into(), value.into()));
        self
    }

    /// Sets a variable of the agent's environment, such as one that arms a failpoint.
    #[must_use]
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.environment.insert(name.into(), value.into());
        self
    }
}

/// An agent on a test host. Dropping it kills it.
#[derive(Debug)]
pub struct TestAgent<'h> {
    host: &'h TestHost,
    folder: PathBuf,
    sockets: TempDir,
    settings: AgentSettings,
    process: Option<HostProcess>,
}

impl<'h> TestAgent<'h> {
    /// Starts an agent that keeps its state in `folder/state/` and its log in `folder/salvord.log`, and
    /// waits until it says that it serves and that it has reached libvirt.
    pub async fn start(host: &'h TestHost, folder: &Path, settings: AgentSettings) -> Self {
        let mut agent = Self::prepare(host, folder, settings);
        agent.spawn();
        agent.wait_linked().await;
        agent
    }

    /// An agent that is configured but not started yet.
    pub fn prepare(host: &'h TestHost, folder: &Path, settings: AgentSettings) -> Self {
        // A socket's path must be short: 108 bytes at the most.
        let sockets = tempfile::Builder::new()
            .prefix("salvor-agent-")
            .tempdir()
            .unwrap();
        fs::create_dir_all(folder).unwrap();
        Self {
            host,
            folder: folder.to_owned(),
            sockets,
            settings,
            process: None,
        }
    }

    /// The agent's socket.
    pub fn socket(&self) -> PathBuf {
        self.sockets.path().join("salvor.sock")
    }

    /// The agent's state folder, unless the settings name another one.
    pub fn state_folder(&self) -> PathBuf {
        self.folder.join("state")
    }

    /// The agent's configuration file.
    pub fn config_file(&self) -> PathBuf {
        self.folder.join("salvor.toml")
    }

    /// What the agent has logged, over all its starts.
    pub fn log(&self) -> String {
        fs::read_to_string(self.log_file()).unwrap_or_default()
    }

    fn log_file(&self) -> PathBuf {
        self.folder.join("salvord.log")
    }

    /// Changes the settings of the next start.
    pub fn change_settings(&mut self, change: impl FnOnce(AgentSettings) -> AgentSettings) {
        self.settings = change(std::mem::take(&mut self.settings));
    }

    /// Starts the agent without waiting for it.
    #[track_caller]
    pub fn spawn(&mut self) {
        assert!(self.process.is_none(), "the agent runs already");
        let config = self.config_file();
        fs::write(&config, toml::to_string(&self.config()).unwrap()).unwrap();
        let arguments = ["--config", config.to_str().unwrap()];
        let program = self
            .settings
            .program
            .as_deref()
            .unwrap_or_else(|| salvord());
        let environment = &self.settings.environment;
        let process = self
            .host
            .spawn(program, &arguments, environment, &self.log_file());
        self.process = Some(process);
    }

    fn config(&self) -> toml::Table {
        let mut config = toml::Table::new();
        let path = |path: &Path| Value::String(path.to_str().unwrap().into());
        set(&mut config, "state_dir", path(&self.state_folder()));
        set(
            &mut config,
            "listen",
            format!("unix:{}", self.socket().display()).into(),
        );
        set(&mut config, "virt_type", "qemu".into());
        set(&mut config, "libvirt.uri", self.host.uri().into());
        for (key, value) in &self.settings.overrides {
            set(&mut config, key, value.clone());
        }
        config
    }

    /// Waits until the agent says that it serves, with libvirt or without.
    pub async fn wait_serving(&self) {
        self.wait_health("").await;
    }

    /// Waits until the agent says that it serves what needs libvirt as well.
    pub async fn wait_linked(&self) {
        self.wait_health(SERVER_SERVICE_NAME).await;
    }

    async fn wait_health(&self, service: &str) {
        let deadline = Instant::now() + SOON;
        loop {
            if let Some(how) = self.ended() {
                panic!("salvord ended with {how}:\n{}", self.log());
            }
            let request = HealthCheckRequest {
                service: service.to_owned(),
            };
            let mut health = HealthClient::new(self.channel());
            let answer = tokio::time::timeout(SOON, health.check(request)).await;
            if let Ok(Ok(answer)) = answer
                && answer.get_ref().status() == ServingStatus::Serving
            {
                return;
            }
            assert!(
                Instant::now() < deadline,
                "salvord does not serve '{service}' after {SOON:?}:\n{}",
                self.log()
            );
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// A channel to the agent. It connects when it is used, and again when the agent is back.
    pub fn channel(&self) -> Channel {
        Endpoint::from_shared(format!("unix:{}", self.socket().display()))
            .unwrap()
            .connect_lazy()
    }

    /// How the agent has ended (`exit N`, `signal N`), if it has.
    pub fn ended(&self) -> Option<String> {
        self.host
            .ended(self.process.expect("the agent was started"))
    }

    /// Waits until the agent ends by itself, as at a failpoint; returns how.
    #[track_caller]
    pub fn wait_end(&mut self, within: Duration) -> String {
        let how = self
            .host
            .wait_end(self.process.expect("the agent was started"), within);
        self.process = None;
        how
    }

    /// `kill -9`.
    #[track_caller]
    pub fn kill_9(&mut self) {
        self.host
            .kill(self.process.expect("the agent runs"), Signal::SIGKILL);
        self.wait_end(SOON);
    }

    /// Asks the agent to stop.
    #[track_caller]
    pub fn sigterm(&self) {
        self.host
            .kill(self.process.expect("the agent runs"), Signal::SIGTERM);
    }

    /// Asks the agent to stop and waits until it has; returns how it ended.
    #[track_caller]
    pub fn sigterm_and_wait(&mut self, within: Duration) -> String {
        self.sigterm();
        self.wait_end(within)
    }

    /// Starts the agent again after it has ended, and waits until it serves and has reached libvirt.
    pub async fn restart(&mut self) {
        self.spawn();
        self.wait_linked().await;
    }

    /// Tells the agent's handle that its host was rebooted: the process is gone.
    pub fn forget_process(&mut self) {
        self.process = None;
    }

    /// The agent's pid as the machine numbers it, for `/proc`.
    pub fn machine_pid(&self) -> Option<u32> {
        self.host.machine_pid(self.process?)
    }
}

impl Drop for TestAgent<'_> {
    fn drop(&mut self) {
        // In a failing test the host may be gone already, and a second panic would hide the first one.
        if let Some(process) = self.process.take()
            && !std::thread::panicking()
        {
            self.host.kill(process, Signal::SIGKILL);
            self.host.wait_end(process, SOON);
        }
    }
}

/// Sets `a.b.c` in nested tables.
fn set(table: &mut toml::Table, key: &str, value: Value) {
    match key.split_once('.') {
        None => {
            table.insert(key.into(), value);
        }
        Some((head, rest)) => {
            let inner = table
                .entry(head)
                .or_insert_with(|| Value::Table(toml::Table::new()));
            set(
                inner
                    .as_table_mut()
                    .expect("a section of the configuration"),
                rest,
                value,
            );
        }
    }
}

/// `salvord` with failpoints, built once per test process (which takes no time when it is built already).
///
/// It is copied out of cargo's way: a build without failpoints would put another one in its place.
pub fn salvord() -> &'static Path {
    static SALVORD: OnceLock<PathBuf> = OnceLock::new();
    SALVORD.get_or_init(|| {
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let output = Command::new(cargo)
            .args([
                "build",
                "--quiet",
                "--package",
                "salvor-agent",
                "--bin",
                "salvord",
            ])
            .args(["--features", "failpoints", "--target-dir"])
            .arg(target_folder())
            .current_dir(repository())
            .output()
            .expect("cargo can be run");
        assert!(
            output.status.success(),
            "salvord does not build:\n{}",
            String::from_utf8_lossy(&output.stderr)
        );
        let copy = target_folder().join("salvord-with-failpoints");
        let part = copy.with_extension(std::process::id().to_string());
        fs::copy(target_folder().join("debug/salvord"), &part).unwrap();
        fs::rename(part, &copy).unwrap();
        copy
    })
}
