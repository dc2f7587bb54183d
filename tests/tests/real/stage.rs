// SPDX-License-Identifier: Apache-2.0
//! What tests of faults play with: a server with a tiny guest, an agent that looks after it, a rescue
//! image that marks the server's disk, and the checks of how things must be when an operation has ended.

use std::fs;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use salvor_proto::google::longrunning::Operation;
use salvor_proto::v1::{
    DiskProtection, GetImageRequest, ImageFormat, OperationMetadata, OperationStep,
    OverlayDisposition, PowerState, RescueServerRequest, Server, StepState, UnrescueServerRequest,
    VmState,
};
use salvor_tests::agent::{AgentSettings, TestAgent};
use salvor_tests::client::Client;
use salvor_tests::console::{Console, Mark};
use salvor_tests::domain::DomainXml;
use salvor_tests::guests::{Format, TinyGuest, mark_of};
use salvor_tests::host::TestHost;
use salvor_tests::libvirt::Libvirt;
use salvor_tests::run_folder::RunFolder;
use salvor_tests::wait::{SOON, try_wait};
use uuid::Uuid;

/// The name of the rescue image, and of the guest in it.
pub(super) const FIXER: &str = "fixer";

/// The mark that the rescue guest leaves.
pub(super) const FIXED: &str = "by-fixer";

/// Where the mark is: sector 5 (see `tests/guests/tiny.S`).
const MARK_AT: usize = 5 * 512;
const MARK_LENGTH: usize = 32;

/// A domain with a tiny guest on a raw disk. An IDE disk: of all buses that is the one whose disks a BIOS
/// shows to the rescue guest although they have no place in the boot order.
#[derive(Debug)]
pub(super) struct Actor {
    pub(super) id: Uuid,
    pub(super) name: String,
    pub(super) libvirt: Libvirt,
    pub(super) disk: PathBuf,
    /// The disk as it was made.
    original: Vec<u8>,
    /// The definition as libvirt prints it.
    pub(super) definition: String,
    console: Console,
}

impl Actor {
    /// Defines the domain; it is off.
    pub(super) fn define(host: &TestHost, folder: &Path, guest: &TinyGuest) -> Self {
        fs::create_dir_all(folder).unwrap();
        let disk = folder.join(format!("{}.raw", guest.name));
        guest.build(&disk, Format::Raw);
        let console = folder.join(format!("{}.console", guest.name));
        let xml = DomainXml::tiny(&guest.name, &console)
            .disk(&disk, Format::Raw, "hda", "ide", "root", Some(1))
            .xml();
        let libvirt = host.libvirt();
        let id = libvirt.define(&xml).unwrap();
        Self {
            id,
            name: guest.name.clone(),
            original: fs::read(&disk).unwrap(),
            definition: libvirt.inactive_xml(id).unwrap(),
            console: Console::of(&libvirt, id),
            libvirt,
            disk,
        }
    }

    /// Defines the domain, starts it and waits until the guest is up.
    pub(super) fn running(host: &TestHost, folder: &Path, guest: &TinyGuest) -> Self {
        let actor = Self::define(host, folder, guest);
        actor.libvirt.start(actor.id).unwrap();
        actor
            .console()
            .wait_line(Mark::START, &format!("TINY-READY {}", actor.name), SOON);
        actor
    }

    /// What the guest says. The rescue guest says it in the same place.
    pub(super) fn console(&self) -> &Console {
        &self.console
    }

    /// libvirt's number of the running domain: another one after every start.
    pub(super) fn number(&self) -> Option<u32> {
        self.libvirt
            .domain(self.id, |domain| Ok(domain.id()))
            .unwrap()
    }

    /// Whether the rescue guest marked the disk. Panics if anything else on it changed.
    #[track_caller]
    pub(super) fn is_marked(&self) -> bool {
        let now = fs::read(&self.disk).unwrap();
        assert_eq!(now.len(), self.original.len(), "the disk has another size");
        assert!(
            now[..MARK_AT] == self.original[..MARK_AT]
                && now[MARK_AT + MARK_LENGTH..] == self.original[MARK_AT + MARK_LENGTH..],
            "the disk of {} changed where nobody wrote",
            self.name
        );
        match mark_of(&self.disk).as_str() {
            "" => false,
            FIXED => true,
            other => panic!("the disk of {} has the mark {other:?}", self.name),
        }
    }

    /// Takes the mark away. The tiny guest neither reads nor writes the sector unless it is told to.
    pub(super) fn remove_mark(&self) {
        let mut disk = fs::File::options().write(true).open(&self.disk).unwrap();
        disk.seek(SeekFrom::Start(u64::try_from(MARK_AT).unwrap()))
            .unwrap();
        disk.write_all(&[0; MARK_LENGTH]).unwrap();
    }

    /// The guest that came up last behind `mark`, if one did.
    pub(super) fn last_ready(&self, mark: Mark) -> Option<String> {
        let said = self.console().since(mark);
        let line = said.lines().rfind(|line| line.starts_with("TINY-READY "))?;
        Some(line["TINY-READY ".len()..].to_owned())
    }

    /// Waits until the guest `name` was the last to come up behind `mark`.
    #[track_caller]
    pub(super) fn wait_ready(&self, mark: Mark, name: &str) {
        let found = try_wait(SOON, || {
            (self.last_ready(mark).as_deref() == Some(name)).then_some(())
        });
        assert!(
            found.is_some(),
            "the guest {name} did not come up last, but:\n{}",
            self.console().since(mark)
        );
    }
}

/// An agent that looks after actors.
pub(super) struct Play<'h> {
    pub(super) agent: TestAgent<'h>,
    pub(super) client: Client,
}

impl<'h> Play<'h> {
    /// Starts an agent with its state in `folder`.
    pub(super) async fn start(host: &'h TestHost, folder: &Path, settings: AgentSettings) -> Self {
        let agent = TestAgent::start(host, folder, settings).await;
        let client = Client::new(agent.channel());
        Self { agent, client }
    }

    /// Starts the agent again after it has ended, and waits until it serves and has reached libvirt.
    pub(super) async fn restart(&mut self) {
        self.agent.restart().await;
        self.client = Client::new(self.agent.channel());
    }

    /// Imports the rescue image whose guest marks the first other disk as soon as it is up.
    pub(super) async fn import_fixer(&mut self, folder: &Path) {
        let file = folder.join("fixer.raw");
        tiny(FIXER).fixing().build(&file, Format::Raw);
        let bytes = fs::read(&file).unwrap();
        self.client
            .import(FIXER, ImageFormat::Raw, &[], bytes)
            .await;
    }

    /// Files of servers in the state folder.
    pub(super) fn server_files(&self) -> Vec<PathBuf> {
        files_below(&self.agent.state_folder().join("servers"))
    }

    /// So many disks stand on the rescue image.
    pub(super) async fn references(&mut self) -> u32 {
        let request = GetImageRequest {
            image: FIXER.into(),
        };
        let image = self
            .client
            .images
            .get_image(request)
            .await
            .unwrap()
            .into_inner();
        image.image.unwrap().references
    }

    /// Waits until the record says so of the server's power, and returns the record.
    pub(super) async fn wait_power(&mut self, id: Uuid, power: PowerState) -> Server {
        self.wait_server(id, &format!("its power is {power:?}"), |server| {
            server
                .power
                .as_ref()
                .is_some_and(|seen| seen.state() == power)
        })
        .await
    }

    /// Waits until the record is as `so` says.
    pub(super) async fn wait_server(
        &mut self,
        id: Uuid,
        what: &str,
        so: impl Fn(&Server) -> bool,
    ) -> Server {
        let deadline = Instant::now() + SOON;
        loop {
            let server = self.client.get(id).await;
            if so(&server) {
                return server;
            }
            assert!(
                Instant::now() < deadline,
                "waited in vain: {what}: {server:#?}"
            );
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Checks everything about a server that is ACTIVE and runs its own guest, with no rescue in force.
    /// `mark` and `number` are from before: the guest runs on, or its own system came up behind the mark.
    pub(super) async fn assert_original(&mut self, actor: &Actor, mark: Mark, number: Option<u32>) {
        let server = self.wait_power(actor.id, PowerState::Running).await;
        Client::assert_settled(&server, VmState::Active);
        assert_eq!(
            (&server.rescue, &server.fault),
            (&None, &None),
            "{server:#?}"
        );
        assert_eq!(server.status, "ACTIVE");
        assert_eq!(
            actor.libvirt.inactive_xml(actor.id).unwrap(),
            actor.definition
        );
        let live = actor.libvirt.live_xml(actor.id).unwrap();
        assert!(
            !live.contains("role='rescue'"),
            "the rescue still runs:\n{live}"
        );
        if actor.number() == number {
            assert_eq!(actor.last_ready(mark), None, "somebody restarted the guest");
        } else {
            actor.wait_ready(mark, &actor.name);
        }
        assert_eq!(
            self.server_files(),
            Vec::<PathBuf>::new(),
            "files are left behind"
        );
        assert_eq!(self.references().await, 0, "the rescue image is still held");
    }

    /// Checks everything about a server that is RESCUED by the operation `rescue`, and that the rescue
    /// guest came up behind `mark` (or runs on, if its number is still `number`).
    pub(super) async fn assert_rescued(
        &mut self,
        actor: &Actor,
        rescue: &Operation,
        mark: Mark,
        number: Option<u32>,
    ) {
        let server = self.wait_power(actor.id, PowerState::Running).await;
        Client::assert_settled(&server, VmState::Rescued);
        assert_eq!(server.fault, None, "{server:#?}");
        assert!(server.rescue.is_some(), "{server:#?}");
        let plan = rescue.name.strip_prefix("operations/").unwrap();
        for xml in [
            actor.libvirt.inactive_xml(actor.id),
            actor.libvirt.live_xml(actor.id),
        ] {
            let xml = xml.unwrap();
            assert!(
                xml.contains(plan),
                "not the domain of {}:\n{xml}",
                rescue.name
            );
        }
        if actor.number() == number {
            assert_eq!(actor.last_ready(mark), None, "somebody restarted the guest");
        } else {
            actor.wait_ready(mark, FIXER);
        }
        assert_eq!(self.references().await, 1, "nobody holds the rescue image");
    }
}

/// A guest with a small disk: what is compared often should not be large.
pub(super) fn tiny(name: &str) -> TinyGuest {
    let mut guest = TinyGuest::new(name);
    guest.size_mib = 1;
    guest
}

/// The request to rescue a server with the image that marks its disk.
pub(super) fn rescue_of(actor: &Actor, protection: DiskProtection) -> RescueServerRequest {
    RescueServerRequest {
        request_id: Uuid::new_v4().to_string(),
        server: actor.id.to_string(),
        image: Some(FIXER.into()),
        disk_protection: protection.into(),
        shutdown_timeout: Some(Duration::from_secs(20).try_into().unwrap()),
        ..RescueServerRequest::default()
    }
}

/// The request to unrescue a server.
pub(super) fn unrescue_of(actor: &Actor, overlay: OverlayDisposition) -> UnrescueServerRequest {
    UnrescueServerRequest {
        request_id: Uuid::new_v4().to_string(),
        server: actor.id.to_string(),
        overlay: overlay.into(),
        shutdown_timeout: Some(Duration::from_secs(20).try_into().unwrap()),
        ..UnrescueServerRequest::default()
    }
}

/// Every file below a folder.
pub(super) fn files_below(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if entry.file_type().unwrap().is_dir() {
            files.extend(files_below(&path));
        } else {
            files.push(path);
        }
    }
    files.sort();
    files
}

/// An actor that runs, adopted, with the rescue image at hand.
pub(super) async fn set_up<'h>(
    host: &'h TestHost,
    folder: &RunFolder,
    guest: &TinyGuest,
    settings: AgentSettings,
) -> (Actor, Play<'h>) {
    let actor = Actor::running(host, folder.path(), guest);
    let mut play = Play::start(host, folder.path(), settings).await;
    play.client.adopt(actor.id).await;
    play.import_fixer(folder.path()).await;
    (actor, play)
}

/// Waits until the operation has begun the step of this kind, or has ended.
pub(super) async fn wait_step(
    client: &mut Client,
    operation: &Operation,
    kind: &str,
) -> OperationMetadata {
    let deadline = Instant::now() + SOON;
    loop {
        let (now, metadata) = client.operation(&operation.name).await;
        let begun = |step: &&OperationStep| step.kind == kind && step.state() != StepState::Pending;
        if now.done || metadata.steps.iter().any(|step| begun(&step)) {
            return metadata;
        }
        assert!(
            Instant::now() < deadline,
            "{kind} does not begin: {metadata:#?}"
        );
        tokio::task::yield_now().await;
    }
}

/// Begins to rescue the server.
pub(super) async fn begin_rescue(play: &mut Play<'_>, actor: &Actor) -> Operation {
    let request = rescue_of(actor, DiskProtection::ReadWrite);
    let answer = play.client.servers.rescue_server(request).await.unwrap();
    answer.into_inner().operation.unwrap()
}

/// Begins to unrescue the server.
pub(super) async fn begin_unrescue(play: &mut Play<'_>, actor: &Actor) -> Operation {
    let request = unrescue_of(actor, OverlayDisposition::Unspecified);
    let answer = play.client.servers.unrescue_server(request).await.unwrap();
    answer.into_inner().operation.unwrap()
}

/// Rescues the server and waits until its rescue guest is up.
pub(super) async fn rescue(play: &mut Play<'_>, actor: &Actor) -> Operation {
    let (mark, number) = (actor.console().mark(), actor.number());
    let operation = begin_rescue(play, actor).await;
    play.client.wait(&operation).await.done();
    play.assert_rescued(actor, &operation, mark, number).await;
    operation
}

/// Unrescues the server and checks that it is the original one again, with the repair in place.
pub(super) async fn unrescue(play: &mut Play<'_>, actor: &Actor) {
    let (mark, number) = (actor.console().mark(), actor.number());
    let operation = begin_unrescue(play, actor).await;
    play.client.wait(&operation).await.done();
    play.assert_original(actor, mark, number).await;
    assert!(actor.is_marked(), "the repair is lost");
    actor.remove_mark();
}

/// What a record says of the server's power.
pub(super) fn power_of(server: &Server) -> PowerState {
    server
        .power
        .as_ref()
        .map_or(PowerState::Unspecified, |power| power.state())
}
