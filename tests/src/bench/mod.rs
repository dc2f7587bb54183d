// SPDX-License-Identifier: Apache-2.0
//! `make bench`: the agent measured against raw libvirt calls.
//!
//! Both are driven from this one process and take turns in shuffled order, so that whatever else the
//! machine does falls on both alike. What counts are the ratios; absolute times are those of this
//! machine, today. Waiting for a guest to boot lies outside all times.
//!
//! | module | owns |
//! |---|---|
//! | [`peers`] | what raw and agent do for each operation |
//! | [`calls`] | the fast calls: get, lock, empty RPC, list; start-up with many servers |
//! | [`life`] | start, stop, rescue, unrescue, pause, unpause, suspend, resume, hard reboot |
//! | [`down_time`] | how long the guest is down in a rescue |
//! | [`watching`] | how soon a watcher hears of what happens |
//! | [`rest`] | what the agent takes while nothing happens |
//! | [`samples`], [`process`], [`report`] | the numbers, where they come from, how they are told |

pub mod calls;
pub mod down_time;
pub mod life;
pub mod peers;
pub mod process;
pub mod report;
pub mod rest;
pub mod samples;
pub mod watching;

use std::fs;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use rand::SeedableRng as _;
use rand::rngs::StdRng;
use serde_json::json;
use tokio::runtime::Runtime;
use virt::connect::Connect;

use self::report::{Figure, Row};
use crate::agent::{AgentSettings, TestAgent};
use crate::client::Client;
use crate::host::TestHost;
use crate::run_folder::{RunFolder, profile_folder, repository};
use crate::tool;

/// How much is measured.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Seed of the order of turns.
    pub seed: u64,
    /// Rounds of the fast calls.
    pub calls: u32,
    /// Rounds of a guest's life.
    pub lives: u32,
    /// Sizes of the lists, ascending.
    pub lists: Vec<usize>,
    /// So many guests run while the agent idles.
    pub guests: usize,
    /// For how long the idle agent is watched.
    pub idle: Duration,
    /// Is the run's folder, with the agents' stores and logs, to be kept?
    pub keep: bool,
}

impl Settings {
    /// What `make bench` measures.
    pub fn full(seed: u64) -> Self {
        Self {
            seed,
            calls: 3000,
            lives: 40,
            lists: vec![1, 100, 1000],
            guests: 30,
            idle: Duration::from_secs(60),
            keep: false,
        }
    }

    /// Everything once, to see that it works: the figures are worth nothing.
    pub fn quick(seed: u64) -> Self {
        Self {
            seed,
            calls: 50,
            lives: 1,
            lists: vec![1, 20],
            guests: 2,
            idle: Duration::from_secs(1),
            keep: false,
        }
    }
}

/// What all parts need.
struct Bench {
    settings: Settings,
    runtime: Rc<Runtime>,
    random: StdRng,
    folder: RunFolder,
    rows: Vec<Row>,
    figures: Vec<Figure>,
}

impl Bench {
    /// Starts the released agent on `host`, with its state in `folder`.
    fn agent<'h>(&self, host: &'h TestHost, folder: &Path) -> TestAgent<'h> {
        let settings = AgentSettings::default().program(&profile_folder().join("salvord"));
        self.runtime
            .block_on(TestAgent::start(host, folder, settings))
    }

    /// A client whose connection lives on this bench's runtime.
    fn client(&self, agent: &TestAgent<'_>) -> Client {
        let _entered = self.runtime.enter();
        Client::new(agent.channel())
    }

    fn figure(&mut self, what: &str, value: f64, unit: &'static str, goal: Option<f64>) {
        let what = what.to_owned();
        self.figures.push(Figure {
            what,
            value,
            unit,
            goal,
        });
    }

    fn rss(&mut self, what: &str, pid: u32, goal: Option<f64>) {
        let kib = u32::try_from(process::rss_kib(pid)).unwrap();
        self.figure(what, f64::from(kib) / 1024.0, "MiB", goal);
    }
}

/// Runs everything, prints the table and writes `bench-results/<time>.json`.
pub fn run(settings: Settings) {
    virt::error::clear_error_callback();
    let load_before = process::load();
    // One thread does all of this side's work, as in a simple client.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let runtime = Rc::new(runtime);
    let mut bench = Bench {
        random: StdRng::seed_from_u64(settings.seed),
        folder: RunFolder::named("bench"),
        runtime,
        settings,
        rows: Vec::new(),
        figures: Vec::new(),
    };
    if bench.settings.keep {
        bench.folder.keep();
        println!("everything stays in {}", bench.folder.path().display());
    }
    let libvirt = one_guest(&mut bench);
    rest::idle_with_guests(&mut bench);
    calls::lists(&mut bench);
    let load_after = process::load();

    let time = tool!("date", "-u", "+%Y-%m-%dT%H%M%SZ").trim().to_owned();
    println!("\n{}", report::table(&bench.rows, &bench.figures));
    println!(
        "load before {load_before}, after {load_after}; seed {}",
        bench.settings.seed
    );
    let document = json!({
        "time": time,
        "machine": process::machine(),
        "load_before": load_before,
        "load_after": load_after,
        "versions": {
            "salvord": tool!(profile_folder().join("salvord").to_str().unwrap(), "--version").trim(),
            "libvirt": libvirt,
            "qemu": tool!("qemu-img", "--version").lines().next(),
        },
        "commit": tool!("git", "-C", repository(), "describe", "--always", "--dirty").trim(),
        "seed": bench.settings.seed,
        "results": report::json(&bench.rows, &bench.figures),
    });
    let results = repository().join("bench-results");
    fs::create_dir_all(&results).unwrap();
    let file = results.join(format!("{time}.json"));
    fs::write(&file, serde_json::to_vec_pretty(&document).unwrap()).unwrap();
    println!("written to {}", file.display());
}

/// Everything that needs one guest for each peer. Returns libvirt's version.
fn one_guest(bench: &mut Bench) -> String {
    let host = TestHost::start(&bench.folder.join("one"));
    let version = Connect::open(Some(&host.uri()))
        .unwrap()
        .lib_version()
        .unwrap();
    let agent = bench.agent(&host, &bench.folder.join("one"));
    let pid = agent.machine_pid().unwrap();
    rest::idle(bench, pid, "alone", 0.02, Some(30.0));
    let client = bench.client(&agent);
    let (mut raw, mut ours) = life::prepare(bench, &host, client, pid);
    calls::gets(bench, &agent, &raw, &mut ours);
    calls::locks(bench, &agent, &mut ours);
    watching::events(bench, &host, &mut ours);
    life::lives(bench, &host, &mut raw, &mut ours);
    bench.rss("RSS of the agent after all that", pid, None);
    format!(
        "{}.{}.{}",
        version / 1_000_000,
        version / 1000 % 1000,
        version % 1000
    )
}
