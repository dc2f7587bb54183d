// SPDX-License-Identifier: Apache-2.0
//! `make soak`: random verbs on real tiny guests, while the agent and libvirtd are killed at random.
//!
//! ```text
//! 8 lives ──> verbs, reads, dry runs, cancels ──> agent ──> libvirtd ──> guests
//! 1 watcher <── events, over all restarts ───────┘  ^          ^           ^
//! chaos ────────────────────── kill -9 ─────────────┴──────────┴───────────┘
//! ```
//! When its time is over, everything is left to settle, and then nothing may be left: no task, no file of
//! nobody's, no descriptor, no thread, no difference between the record and what is really so, and no event
//! that the watcher has not heard of.
//!
//! | module | owns |
//! |---|---|
//! | [`life`] | one server after the other in one place, and when what is asked of it |
//! | [`asking`] | calls: made until they are heard, followed to their end, judged |
//! | [`verbs`], [`reads`] | what can be asked |
//! | [`chaos`] | kills, and hands laid on guests past the agent |
//! | [`watcher`] | the events |
//! | [`checks`] | records and files against what is really so |
//! | [`resources`] | what the agent holds |
//! | [`tally`] | the account, and what is wrong |

mod asking;
mod chaos;
mod checks;
mod life;
mod reads;
mod resources;
mod tally;
mod verbs;
mod watcher;

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use salvor_proto::google::longrunning::{ListOperationsRequest, operation};
use salvor_proto::v1::plan_action_request::Action;
use salvor_proto::v1::{
    DiskProtection, ForceDeleteServerRequest, GetHostRequest, Image, ImageFormat,
    ListImagesRequest, OverlayDisposition, RebootServerRequest, RebootType,
    ResetServerStateRequest, ResumeServerRequest, Server, StartServerRequest, UnlockServerRequest,
    UnpauseServerRequest, UnrescueServerRequest, VmState,
};
use tokio::sync::watch;
use tokio::task::JoinSet;
use uuid::Uuid;

use self::asking::brief;
use self::chaos::{Chaos, Now};
use self::checks::{Real, short};
use self::life::{Kind, Life};
use self::resources::{Resources, held_by};
use self::tally::Tally;
use self::verbs::{Caller, RESCUE, submit};
use self::watcher::Told;
use crate::agent::{AgentSettings, TestAgent};
use crate::client::Client;
use crate::console::{Console, Mark};
use crate::guests::{Format, TinyGuest};
use crate::host::TestHost;
use crate::libvirt::Libvirt;
use crate::run_folder::RunFolder;
use crate::wait::{BOOT, SOON, try_wait};

/// Who lives where.
const KINDS: [Kind; 8] = [
    Kind::Made,
    Kind::Adopted,
    Kind::MadeDeaf,
    Kind::AdoptedDeaf,
    Kind::MadeUefi,
    Kind::Adopted,
    Kind::MadeTpm,
    Kind::Adopted,
];

/// What is soaked.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Where chance begins. Time goes its own way, so the same seed is not the same run.
    pub seed: u64,
    /// For how long.
    pub length: Duration,
    /// Is the run's folder to be kept?
    pub keep: bool,
}

/// What came of it.
#[derive(Debug)]
pub struct Outcome {
    /// Figures, for people.
    pub report: String,
    /// What should not have happened; empty if all is well.
    pub defects: Vec<String>,
}

/// Soaks in `folder`, which is kept if anything is wrong.
pub fn run(settings: &Settings, folder: &mut RunFolder) -> Outcome {
    virt::error::clear_error_callback();
    println!("soak with seed {} for {:?}", settings.seed, settings.length);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime can be made");
    let host = TestHost::start(folder.path());
    let outcome = runtime.block_on(Box::pin(Soak::run(settings, folder, &host)));
    if settings.keep || !outcome.defects.is_empty() {
        folder.keep();
        println!("everything is in {}", folder.path().display());
    }
    outcome
}

/// What all parts need.
struct Soak<'h> {
    host: &'h TestHost,
    agent: TestAgent<'h>,
    client: Client,
    libvirt: Libvirt,
    tally: Tally,
    now: Now,
}

impl<'h> Soak<'h> {
    async fn run(settings: &Settings, folder: &RunFolder, host: &'h TestHost) -> Outcome {
        let agent_settings = AgentSettings::default()
            .set("delete.reclaim_interval", "10s")
            .set("shutdown.timeout", "3s")
            .set("shutdown.retry_interval", "1s")
            .set("drain.timeout", "3s")
            .set("libvirt.resync_interval", "10s")
            .set("events.keep", 10_000_000)
            .set("log.level", "info");
        let agent = TestAgent::start(host, folder.path(), agent_settings).await;
        let mut soak = Self {
            host,
            client: Client::new(agent.channel()),
            agent,
            libvirt: host.libvirt(),
            tally: Tally::default(),
            now: Arc::new(Mutex::new(vec![Uuid::nil(); KINDS.len()])),
        };
        soak.import(folder).await;
        let before = Resources::of(soak.pid()).expect("the agent runs");
        println!("before: {before}");
        let (tell, until) = watch::channel(None);
        let client = Client::new(soak.agent.channel());
        let watcher = tokio::spawn(watcher::follow(client, until, soak.tally.clone()));

        let mut random = StdRng::seed_from_u64(settings.seed);
        let lives = soak.populate(folder, &mut random).await;
        let begun = Instant::now();
        let lives = soak.let_loose(lives, settings.length, random).await;
        let loose = begun.elapsed();
        soak.settle(lives).await;
        let after = soak.after(before);
        println!("after:  {after}");
        let (servers, revision) = soak.agree().await;
        let told = soak.end_watch(revision, &tell, watcher).await;
        soak.compare(&servers, &told);
        soak.revive().await;
        soak.remove_all().await;
        if soak.agent.log().contains("panicked") {
            soak.tally.defect("the agent's log tells of a panic");
        }
        let report = format!(
            "{}\n{} events in {} streams\nbefore: {before}\nafter:  {after}\n\
             seed {}, {:.0} s of verbs, {:.0} s in all",
            soak.tally.table(),
            told.events,
            told.streams,
            settings.seed,
            loose.as_secs_f64(),
            begun.elapsed().as_secs_f64(),
        );
        Outcome {
            report,
            defects: soak.tally.defects(),
        }
    }

    async fn import(&mut self, folder: &RunFolder) {
        for (name, deaf) in [
            (Kind::Made.image(), false),
            (Kind::MadeDeaf.image(), true),
            (RESCUE, false),
        ] {
            let file = folder.join(format!("{name}.image"));
            let mut guest = TinyGuest::new(name);
            guest.honours_acpi = !deaf;
            guest.size_mib = 1;
            guest.build(&file, Format::Qcow2);
            self.client
                .import_file(name, ImageFormat::Qcow2, &[], &file)
                .await;
        }
    }

    /// A server in each place.
    async fn populate(&self, folder: &RunFolder, random: &mut StdRng) -> Vec<Life> {
        let mut lives = Vec::new();
        for (place, kind) in KINDS.into_iter().enumerate() {
            let mut life = Life::new(
                (place, kind),
                Client::new(self.agent.channel()),
                self.libvirt.clone(),
                folder.path().to_owned(),
                (self.tally.clone(), Arc::clone(&self.now)),
                StdRng::seed_from_u64(random.random()),
            );
            life.begin().await;
            lives.push(life);
        }
        lives
    }

    /// Verbs and chaos, for that long. The last third of the time is one life of the agent, or there would
    /// be nothing to tell leaks by.
    async fn let_loose(&mut self, lives: Vec<Life>, length: Duration, random: StdRng) -> Vec<Life> {
        let begin = Instant::now();
        let (stop, stopped) = watch::channel(false);
        let mut tasks = JoinSet::new();
        for life in lives {
            tasks.spawn(Box::pin(life.live(stopped.clone())));
        }
        let mut chaos = Chaos {
            host: self.host,
            agent: &mut self.agent,
            libvirt: self.libvirt.clone(),
            now: Arc::clone(&self.now),
            tally: self.tally.clone(),
            random,
        };
        let spare_agent = begin + length * 2 / 3;
        chaos.reign(begin, spare_agent, begin + length).await;
        stop.send_replace(true);
        let ended = tokio::time::timeout(2 * BOOT, tasks.join_all()).await;
        ended.unwrap_or_else(|_| {
            self.tally.defect("verbs do not come to an end");
            Vec::new()
        })
    }

    /// Takes all locks off, and waits until nothing is under way or due.
    async fn settle(&mut self, lives: Vec<Life>) {
        for server in self.client.list().await {
            if !lives.iter().any(|life| life.id.to_string() == server.id) {
                self.tally
                    .defect(format!("nobody asked for {}", short(&server)));
            }
            if server.lock.is_some() {
                let request = UnlockServerRequest {
                    server: server.id.clone(),
                    ..UnlockServerRequest::default()
                };
                self.finish(&server, Action::Unlock(request)).await;
            }
        }
        let deadline = Instant::now() + BOOT;
        loop {
            let restless = self.restless().await;
            if restless.is_empty() {
                break;
            }
            if Instant::now() > deadline {
                self.tally
                    .defect(format!("things do not come to an end: {restless:#?}"));
                break;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        for mut life in lives {
            // It says if one is lost.
            life.look().await;
        }
    }

    /// What is under way, or will be by itself.
    async fn restless(&mut self) -> Vec<String> {
        let request = ListOperationsRequest {
            filter: "done=false".to_owned(),
            ..ListOperationsRequest::default()
        };
        let open = self.client.operations.list_operations(request).await;
        let open = open.expect("nobody kills the agent now").into_inner();
        let mut restless: Vec<String> = open.operations.iter().map(brief).collect();
        for server in self.client.list().await {
            let reclaimed = server.vm_state() == VmState::SoftDeleted;
            let rescue = server.rescue.as_ref();
            let unrescued = rescue.is_some_and(|rescue| rescue.expire_time.is_some());
            if reclaimed || unrescued {
                restless.push(short(&server));
            }
        }
        restless
    }

    fn pid(&self) -> u32 {
        self.agent.machine_pid().expect("the agent runs")
    }

    /// What the agent holds, once it has come to rest and let go of what it took since `before`.
    fn after(&self, before: Resources) -> Resources {
        let pid = self.pid();
        let mut last = before;
        let rested = try_wait(2 * SOON, || {
            last = Resources::of(pid)?;
            last.is_fine_after(before).then_some(())
        });
        if rested.is_none() {
            self.tally.defect(format!(
                "the agent has leaked: before {before}, after {last}: {}",
                held_by(pid)
            ));
        }
        last
    }

    /// Waits until the records are what is really so, and looks for what belongs to nobody. Returns the
    /// servers, and the revision up to which that is so.
    async fn agree(&mut self) -> (Vec<Server>, i64) {
        let deadline = Instant::now() + 2 * SOON;
        let (servers, revision, real) = loop {
            let revision = self.revision().await;
            let servers = self.client.list().await;
            let real = checks::reality(&self.libvirt).expect("libvirtd is there");
            let differences = checks::differences(&servers, &real);
            if differences.is_empty() && self.revision().await == revision {
                break (servers, revision, real);
            }
            if Instant::now() > deadline {
                for difference in differences {
                    self.tally.defect(difference);
                }
                break (servers, revision, real);
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        };
        let images = self.client.images.list_images(ListImagesRequest::default());
        let images = images.await.expect("images are listed").into_inner().images;
        self.look_for_leftovers(&servers, &real, images);
        (servers, revision)
    }

    async fn revision(&mut self) -> i64 {
        let host = self.client.hosts.get_host(GetHostRequest {}).await;
        let host = host.expect("the host is told of").into_inner().host;
        host.expect("there is one").revision
    }

    /// Lets the watcher hear of everything up to this revision.
    async fn end_watch(
        &mut self,
        revision: i64,
        tell: &watch::Sender<Option<i64>>,
        watcher: tokio::task::JoinHandle<Told>,
    ) -> Told {
        tell.send_replace(Some(revision));
        let told = tokio::time::timeout(SOON, watcher).await;
        told.expect("the watcher catches up")
            .expect("the watcher does not panic")
    }

    /// What the watcher was told must add up to what GetServer says.
    fn compare(&self, servers: &[Server], told: &Told) {
        let plain = |server: &Server| {
            let mut server = server.clone();
            if let Some(power) = &mut server.power {
                // When and how it was last seen may change, not what was seen.
                power.observe_time = None;
                power.source = 0;
            }
            server
        };
        for server in servers {
            let heard = told.servers.get(&server.id).map(plain);
            if heard != Some(plain(server)) {
                self.tally.defect(format!(
                    "the watcher heard of {heard:#?}, and it is {server:#?}"
                ));
            }
        }
        if told.servers.len() != servers.len() {
            let heard: Vec<_> = told.servers.keys().collect();
            self.tally
                .defect(format!("the watcher knows of {heard:?}, not of the same"));
        }
        if !told.open.is_empty() {
            self.tally.defect(format!(
                "the watcher has not heard of the end of {:?}",
                told.open
            ));
        }
    }

    /// Does an action that must succeed.
    async fn finish(&mut self, server: &Server, action: Action) {
        let about = format!("{action:?}");
        let accepted = submit(&mut self.client, action, Caller::Admin).await;
        let ended = match accepted {
            Ok(operation) => self.client.wait(&operation).await.operation,
            Err(status) => {
                self.tally
                    .defect(format!("{about} of {}: {status:?}", short(server)));
                return;
            }
        };
        if let Some(operation::Result::Error(error)) = &ended.result {
            self.tally
                .defect(format!("{about} of {}: {}", short(server), error.message));
        }
    }

    /// No server is lost for good: each is brought back to where it runs, and its guest boots.
    async fn revive(&mut self) {
        for server in self.client.list().await {
            let id: Uuid = server.id.parse().expect("a uuid");
            let Some(server) = self.bring_back(server).await else {
                continue;
            };
            let mark = Console::of(&self.libvirt, id).mark();
            let request = RebootServerRequest {
                server: server.id.clone(),
                r#type: RebootType::Hard.into(),
                ..RebootServerRequest::default()
            };
            self.finish(&server, Action::Reboot(request)).await;
            self.expect_boot(&server, id, mark);
        }
    }

    fn expect_boot(&self, server: &Server, id: Uuid, mark: Mark) {
        let xml = self.libvirt.inactive_xml(id).expect("it is defined");
        // Its firmware finds nothing that it could boot.
        if xml.contains("nvram.fd") {
            return;
        }
        let console = Console::of(&self.libvirt, id);
        let booted = try_wait(SOON, || {
            console.since(mark).contains("TINY-READY").then_some(())
        });
        if booted.is_none() {
            self.tally.defect(format!(
                "the guest does not come up: {}\n{}",
                short(server),
                console.since(mark)
            ));
        }
    }

    /// The server when it is ACTIVE; `None` if it cannot be brought there.
    async fn bring_back(&mut self, server: Server) -> Option<Server> {
        let mut now = server;
        for _ in 0..6 {
            let server = now.id.clone();
            let request_id = String::new();
            let action = match now.vm_state() {
                VmState::Active => return Some(now),
                VmState::Error => Action::ResetState(ResetServerStateRequest {
                    request_id,
                    server,
                    state: VmState::Active.into(),
                }),
                VmState::Rescued => Action::Unrescue(UnrescueServerRequest {
                    request_id,
                    server,
                    overlay: disposition(&now).into(),
                    shutdown_timeout: Some(prost_types::Duration::default()),
                    ..UnrescueServerRequest::default()
                }),
                VmState::Suspended => Action::Resume(ResumeServerRequest { request_id, server }),
                VmState::Paused => Action::Unpause(UnpauseServerRequest { request_id, server }),
                _ => Action::Start(StartServerRequest { request_id, server }),
            };
            self.finish(&now, action).await;
            now = self.client.get(now.id.parse().expect("a uuid")).await;
        }
        self.tally
            .defect(format!("cannot be brought back: {}", short(&now)));
        None
    }

    /// Removes every server, and looks for what is left of them.
    async fn remove_all(&mut self) {
        for server in self.client.list().await {
            let request = ForceDeleteServerRequest {
                server: server.id.clone(),
                ..ForceDeleteServerRequest::default()
            };
            self.finish(&server, Action::ForceDelete(request)).await;
        }
        let images = self.client.images.list_images(ListImagesRequest::default());
        let images = images.await.expect("images are listed").into_inner().images;
        for image in &images {
            if image.references > 0 {
                self.tally
                    .defect(format!("nobody is left, and somebody holds {image:?}"));
            }
        }
        let real = checks::reality(&self.libvirt).expect("libvirtd is there");
        self.look_for_leftovers(&[], &real, images);
        for one in real {
            self.tally.defect(format!("{one:?} is left"));
        }
    }

    /// Files, folders and processes that belong to nobody. What the agent removes with its next look at
    /// everything is waited for.
    fn look_for_leftovers(&self, servers: &[Server], real: &[Real], images: Vec<Image>) {
        let images: BTreeSet<String> = images.into_iter().map(|image| image.id).collect();
        let mut left = Vec::new();
        let gone = try_wait(SOON, || {
            left = checks::orphans(&self.agent.state_folder(), servers, &images);
            left.extend(checks::libvirt_leftovers(self.host, real));
            left.is_empty().then_some(())
        });
        if gone.is_none() {
            self.tally
                .defect(format!("these belong to nobody: {left:?}"));
        }
        checks::processes(self.host, real, &self.tally);
    }
}

/// What becomes of a rescue's overlays.
fn disposition(server: &Server) -> OverlayDisposition {
    match &server.rescue {
        Some(rescue) if rescue.commit_started => OverlayDisposition::Commit,
        Some(rescue) if rescue.disk_protection() == DiskProtection::Overlay => {
            OverlayDisposition::Discard
        }
        _ => OverlayDisposition::Unspecified,
    }
}
