// SPDX-License-Identifier: Apache-2.0
//! What tests share: an agent with a client on a host, servers to act on, and looks at what is really
//! there. [`crate::actor`] has servers whose every byte is known.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rusqlite::{Connection, OpenFlags};
use salvor_proto::google::longrunning::Operation;
use salvor_proto::v1::{
    DiskProtection, GetImageRequest, Image, ImageFormat, OperationMetadata, OperationStep,
    OverlayDisposition, PowerState, RescueServerRequest, Server, StepState, UnrescuePower,
    UnrescueServerRequest, VmState,
};
use salvor_tests::agent::{AgentSettings, TestAgent};
use salvor_tests::client::Client;
use salvor_tests::console::{Console, Mark};
use salvor_tests::domain::DomainXml;
use salvor_tests::guests::{Format, LinuxGuest, TinyGuest, run};
use salvor_tests::host::TestHost;
use salvor_tests::libvirt::Libvirt;
use salvor_tests::run_folder::RunFolder;
use salvor_tests::wait::{BOOT, SOON};
use sha2::{Digest, Sha256};
use uuid::Uuid;

/// An agent on a host, and a folder for what the test makes. The domains it was told of go with it.
pub(crate) struct Scene<'h> {
    pub(crate) client: Client,
    pub(crate) agent: TestAgent<'h>,
    pub(crate) libvirt: Libvirt,
    pub(crate) host: &'h TestHost,
    domains: Vec<Uuid>,
    pub(crate) folder: PathBuf,
    // Last, so that it goes last.
    own: Option<RunFolder>,
}

impl Drop for Scene<'_> {
    fn drop(&mut self) {
        for id in &self.domains {
            self.libvirt.remove(*id);
        }
    }
}

impl Scene<'static> {
    /// On the shared host, in a folder of the test's own.
    pub(crate) async fn new() -> Self {
        Self::with(AgentSettings::default()).await
    }

    /// The same with an agent that is configured otherwise.
    pub(crate) async fn with(settings: AgentSettings) -> Self {
        Self::in_own(TestHost::shared(), RunFolder::for_this_test(), settings).await
    }

    /// On another host than most, in a folder that goes with the scene.
    pub(crate) async fn in_own(
        host: &'static TestHost,
        folder: RunFolder,
        settings: AgentSettings,
    ) -> Self {
        let mut scene = Self::on(host, folder.path(), settings).await;
        scene.own = Some(folder);
        scene
    }
}

impl<'h> Scene<'h> {
    /// On any host, in any folder. The agent's state and log are in it, too.
    pub(crate) async fn on(host: &'h TestHost, folder: &Path, settings: AgentSettings) -> Self {
        let agent = TestAgent::start(host, folder, settings).await;
        Self {
            client: Client::new(agent.channel()),
            agent,
            libvirt: host.libvirt(),
            host,
            domains: Vec::new(),
            folder: folder.to_owned(),
            own: None,
        }
    }

    /// Starts the agent again after it has ended, and waits until it serves and has reached libvirt.
    pub(crate) async fn restart(&mut self) {
        self.agent.restart().await;
        self.client = Client::new(self.agent.channel());
    }

    /// Kills the agent and starts it again with these failpoints (see the agent's `engine/probe.rs`).
    pub(crate) async fn restart_with(&mut self, failpoints: &str) {
        self.agent.kill_9();
        self.start_with(failpoints).await;
    }

    /// Starts the agent, which has ended, with these failpoints.
    pub(crate) async fn start_with(&mut self, failpoints: &str) {
        self.agent
            .change_settings(|settings| settings.env("SALVOR_FAILPOINT", failpoints));
        self.restart().await;
    }

    /// A domain name that no other test uses.
    pub(crate) fn unique(name: &str) -> String {
        format!("{name}-{:.8}", Uuid::new_v4().simple().to_string())
    }

    /// Defines a domain, to be removed at the end.
    #[track_caller]
    pub(crate) fn define(&mut self, xml: &DomainXml) -> Uuid {
        self.define_xml(&xml.xml())
    }

    /// Defines a domain from any XML, to be removed at the end.
    #[track_caller]
    pub(crate) fn define_xml(&mut self, xml: &str) -> Uuid {
        let id = self.libvirt.define(xml).unwrap();
        self.domains.push(id);
        id
    }

    /// Makes sure that a domain which the agent made is removed at the end.
    pub(crate) fn remove_at_end(&mut self, id: Uuid) {
        self.domains.push(id);
    }

    /// The console log of a domain made here.
    pub(crate) fn log(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{name}.console"))
    }

    /// The XML of a PC with one tiny guest on virtio.
    pub(crate) fn tiny_xml(&self, guest: &TinyGuest) -> DomainXml {
        let disk = self.disk(&guest.name);
        guest.build(&disk, Format::Qcow2);
        let root = (disk.as_path(), Format::Qcow2, "vda", "virtio", "root");
        DomainXml::tiny(&Self::unique(&guest.name), &self.log(&guest.name)).disk(
            root.0,
            root.1,
            root.2,
            root.3,
            root.4,
            Some(1),
        )
    }

    /// The XML of a PC with one Linux guest on virtio.
    pub(crate) fn linux_xml(&self, guest: &LinuxGuest) -> DomainXml {
        let disk = self.disk(&guest.name);
        guest.build(&disk, Format::Qcow2);
        DomainXml::linux(&Self::unique(&guest.name), &self.log(&guest.name)).disk(
            &disk,
            Format::Qcow2,
            "vda",
            "virtio",
            "root",
            Some(1),
        )
    }

    /// The qcow2 file of a guest made here.
    pub(crate) fn disk(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{name}.qcow2"))
    }

    /// Defines, starts and adopts a domain; waits until its guest has said `ready`.
    pub(crate) async fn running(&mut self, xml: &DomainXml, ready: &str) -> Uuid {
        let id = self.define(xml);
        self.libvirt.start(id).unwrap();
        Console::of(&self.libvirt, id).wait_line(Mark::START, ready, BOOT);
        self.client.adopt(id).await;
        id
    }

    /// An adopted server that runs a tiny guest.
    pub(crate) async fn tiny(&mut self, guest: &TinyGuest) -> Uuid {
        let xml = self.tiny_xml(guest);
        self.running(&xml, &format!("TINY-READY {}", guest.name))
            .await
    }

    /// An imported rescue system with shell. It has no business with the original's label.
    pub(crate) async fn linux_image(&mut self, guest: &LinuxGuest, format: Format) -> Image {
        let file = self.folder.join(format!("{}.image", guest.name));
        guest.build(&file, format);
        let image = self.import(&guest.name, format, &file).await;
        fs::remove_file(file).unwrap();
        image
    }

    /// An imported rescue system that only says that it runs.
    pub(crate) async fn tiny_image(&mut self, name: &str) -> Image {
        let file = self.folder.join(format!("{name}.image"));
        TinyGuest::new(name).build(&file, Format::Qcow2);
        self.import(name, Format::Qcow2, &file).await
    }

    pub(crate) async fn import(&mut self, name: &str, format: Format, file: &Path) -> Image {
        let format = match format {
            Format::Qcow2 => ImageFormat::Qcow2,
            Format::Raw => ImageFormat::Raw,
            Format::Iso => ImageFormat::Iso,
        };
        self.client.import_file(name, format, &[], file).await
    }

    pub(crate) fn console(&self, id: Uuid) -> Console {
        Console::of(&self.libvirt, id)
    }

    /// Waits until the record says so of the server's power, and returns the record.
    pub(crate) async fn wait_power(&mut self, id: Uuid, power: PowerState) -> Server {
        let what = format!("its power is {power:?}");
        let is_so = |server: &Server| power_of(server) == power;
        self.client.wait_server(id, &what, is_so).await
    }

    /// Waits until the operation has begun the step of this kind, or has ended.
    pub(crate) async fn wait_step(
        &mut self,
        operation: &Operation,
        kind: &str,
    ) -> OperationMetadata {
        let deadline = Instant::now() + SOON;
        loop {
            let (now, metadata) = self.client.operation(&operation.name).await;
            let begun =
                |step: &OperationStep| step.kind == kind && step.state() != StepState::Pending;
            if now.done || metadata.steps.iter().any(begun) {
                return metadata;
            }
            assert!(
                Instant::now() < deadline,
                "{kind} does not begin: {metadata:#?}"
            );
            tokio::task::yield_now().await;
        }
    }

    /// So many disks stand on an image.
    pub(crate) async fn references(&mut self, image: &str) -> u32 {
        let image = image.to_owned();
        let answer = self
            .client
            .images
            .get_image(GetImageRequest { image })
            .await;
        answer.unwrap().into_inner().image.unwrap().references
    }

    /// Files that the agent keeps for a server.
    pub(crate) fn files_of(&self, id: Uuid) -> Vec<PathBuf> {
        files_below(
            &self
                .agent
                .state_folder()
                .join("servers")
                .join(id.to_string()),
        )
    }

    /// The definition that the agent has saved for the way back.
    pub(crate) fn saved_definition(&self, id: Uuid) -> Option<String> {
        let file = self.agent.state_folder().join("salvor.db");
        let store = Connection::open_with_flags(file, OpenFlags::SQLITE_OPEN_READ_ONLY).unwrap();
        store.busy_timeout(SOON).unwrap();
        let mut query = store
            .prepare("SELECT xml FROM saved_definitions WHERE server = ?1")
            .unwrap();
        let mut rows = query.query([id.to_string()]).unwrap();
        rows.next().unwrap().map(|row| row.get(0).unwrap())
    }

    /// Checks that nothing of a rescue is left.
    #[track_caller]
    pub(crate) fn assert_no_rescue_left(&self, id: Uuid) {
        assert_eq!(self.files_of(id), Vec::<PathBuf>::new());
        assert_eq!(self.saved_definition(id), None);
    }

    /// The file of an image in the agent's store.
    #[track_caller]
    pub(crate) fn stored_file(&self, image: &Image) -> PathBuf {
        let files = files_below(&self.agent.state_folder().join("images"));
        let its = |file: &PathBuf| file.to_string_lossy().contains(&image.id);
        files.into_iter().find(its).unwrap()
    }

    /// Every byte that the agent keeps or has logged.
    pub(crate) fn everything_kept(&self) -> Vec<u8> {
        let mut bytes = self.agent.log().into_bytes();
        for file in files_below(&self.agent.state_folder()) {
            bytes.extend(fs::read(&file).unwrap_or_default());
        }
        bytes
    }

    /// Rescues, checks that the server is rescued and returns it.
    pub(crate) async fn rescue(&mut self, request: RescueServerRequest) -> Server {
        let (_, ended) = self.client.rescue(request).await;
        let server = ended.done().server.unwrap();
        Client::assert_settled(&server, VmState::Rescued);
        assert_eq!(server.status, "RESCUE");
        server
    }

    /// Unrescues, checks that nothing is left of the rescue and returns the server.
    pub(crate) async fn unrescue(&mut self, request: UnrescueServerRequest) -> Server {
        let server = self.client.unrescue(request).await.done().server.unwrap();
        assert!(server.rescue.is_none(), "{server:#?}");
        self.assert_no_rescue_left(server.id.parse().unwrap());
        server
    }
}

/// Every file below a folder.
pub(crate) fn files_below(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten() {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_dir() {
            files.extend(files_below(&entry.path()));
        } else {
            files.push(entry.path());
        }
    }
    files.sort();
    files
}

/// What a record says of the server's power.
pub(crate) fn power_of(server: &Server) -> PowerState {
    let power = server.power.as_ref();
    power.map_or(PowerState::Unspecified, |power| power.state())
}

/// No time for the guest to shut down.
pub(crate) const AT_ONCE: Option<prost_types::Duration> = Some(prost_types::Duration {
    seconds: 0,
    nanos: 0,
});

pub(crate) fn seconds(seconds: u64) -> Option<prost_types::Duration> {
    Some(Duration::from_secs(seconds).try_into().unwrap())
}

/// A rescue with the image that ends the guest at once.
pub(crate) fn rescue_with(server: Uuid, image: &Image) -> RescueServerRequest {
    RescueServerRequest {
        server: server.to_string(),
        image: Some(image.id.clone()),
        shutdown_timeout: AT_ONCE,
        ..RescueServerRequest::default()
    }
}

/// An unrescue that ends the rescue guest at once and starts the server.
pub(crate) fn unrescue_of(server: Uuid) -> UnrescueServerRequest {
    UnrescueServerRequest {
        server: server.to_string(),
        shutdown_timeout: AT_ONCE,
        ..UnrescueServerRequest::default()
    }
}

/// An unrescue that leaves the server as it was before.
pub(crate) fn restore_of(server: Uuid) -> UnrescueServerRequest {
    UnrescueServerRequest {
        power: UnrescuePower::Restore.into(),
        ..unrescue_of(server)
    }
}

/// The ways of treating the original disks, and what becomes of what the rescue writes to them.
pub(crate) const PROTECTIONS: [(DiskProtection, OverlayDisposition); 4] = [
    (DiskProtection::ReadWrite, OverlayDisposition::Unspecified),
    (DiskProtection::Overlay, OverlayDisposition::Discard),
    (DiskProtection::Overlay, OverlayDisposition::Commit),
    (DiskProtection::ReadOnly, OverlayDisposition::Unspecified),
];

/// SHA-256 of a file.
pub(crate) fn sha256(file: &Path) -> String {
    format!("{:x}", Sha256::digest(fs::read(file).unwrap()))
}

/// A password's crypt hash with the salt of another one, by libxcrypt's own hand.
pub(crate) fn crypt(password: &str, like: &str) -> String {
    let salt = like.split('$').nth(2).expect("a salt");
    let perl = ["-e", "print crypt($ARGV[0], $ARGV[1])", "--", password];
    run(
        "perl",
        perl.into_iter().chain([format!("$6${salt}$").as_str()]),
    )
}
