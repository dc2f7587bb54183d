// SPDX-License-Identifier: Apache-2.0
//! Servers whose every byte is known, for tests of faults: a tiny guest on a disk of its own, a rescue
//! image that marks that disk, and the checks of how things must be when an operation has ended. Most are
//! domains that the agent adopted; [`Actor::made`] are servers that it made itself.

use std::fs;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use salvor_proto::google::longrunning::Operation;
use salvor_proto::v1::{
    CreateServerRequest, DiskProtection, Firmware, Flavor, ImageFormat, OverlayDisposition,
    PowerState, RescueServerRequest, UnrescueServerRequest, VmState,
};
use salvor_tests::agent::AgentSettings;
use salvor_tests::client::Client;
use salvor_tests::console::{Console, Mark};
use salvor_tests::domain::DomainXml;
use salvor_tests::guests::{Format, TinyGuest};
use salvor_tests::host::TestHost;
use salvor_tests::libvirt::Libvirt;
use salvor_tests::tool;
use salvor_tests::wait::{SOON, try_wait};
use uuid::Uuid;

use crate::scene::{AT_ONCE, Scene, files_below, seconds};

/// The name of the rescue image, and of the guest in it.
pub(crate) const FIXER: &str = "fixer";

/// The mark that the rescue guest leaves.
pub(crate) const FIXED: &str = "by-fixer";

/// Where the mark is: sector 5 (see `tests/guests/tiny.S`).
const MARK_AT: usize = 5 * 512;
const MARK_LENGTH: usize = 32;

/// What an actor is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    /// A domain with a tiny guest on a raw disk. An IDE disk: of all buses that is the one whose disks a
    /// BIOS shows to the rescue guest although they have no place in the boot order.
    Adopted,
    /// Made by the agent. The rescue guest does not see its virtio disk.
    Made,
    /// The same with UEFI, whose firmware finds nothing that it could boot: it runs, no guest comes up.
    MadeUefi,
}

/// A server with a tiny guest.
#[derive(Debug)]
pub(crate) struct Actor {
    pub(crate) kind: Kind,
    pub(crate) id: Uuid,
    pub(crate) name: String,
    pub(crate) libvirt: Libvirt,
    pub(crate) disk: PathBuf,
    /// What is on the disk as it was made.
    original: Vec<u8>,
    /// The files that the agent keeps for it while no rescue is in force.
    files: Vec<PathBuf>,
    /// The definition as libvirt prints it.
    pub(crate) definition: String,
    console: Console,
}

impl Actor {
    /// Defines the domain; it is off.
    pub(crate) fn define(host: &TestHost, folder: &Path, guest: &TinyGuest) -> Self {
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
            kind: Kind::Adopted,
            id,
            files: Vec::new(),
            name: guest.name.clone(),
            original: fs::read(&disk).unwrap(),
            definition: libvirt.inactive_xml(id).unwrap(),
            console: Console::of(&libvirt, id),
            libvirt,
            disk,
        }
    }

    /// Defines the domain, starts it and waits until the guest is up.
    pub(crate) fn running(host: &TestHost, folder: &Path, guest: &TinyGuest) -> Self {
        let actor = Self::define(host, folder, guest);
        actor.libvirt.start(actor.id).unwrap();
        actor
            .console()
            .wait_line(Mark::START, &format!("TINY-READY {}", actor.name), SOON);
        actor
    }

    /// A server that the agent makes, and that runs.
    pub(crate) async fn made(scene: &mut Scene<'_>, name: &str, kind: Kind) -> Self {
        let image = scene.folder.join("base.raw");
        let guest = tiny(name);
        guest.build(&image, Format::Raw);
        let base = scene.import(name, Format::Raw, &image).await;
        let (firmware, memory_mib) = match kind {
            Kind::MadeUefi => (Firmware::Uefi, 96),
            Kind::Made | Kind::Adopted => (Firmware::Bios, 16),
        };
        let flavor = Flavor {
            vcpus: 1,
            memory_mib,
            disk_gib: 0,
        };
        let request = CreateServerRequest {
            name: name.into(),
            image: base.id,
            flavor: Some(flavor),
            firmware: firmware.into(),
            ..CreateServerRequest::default()
        };
        let (answer, ended) = scene.client.create(request).await;
        ended.done();
        let id = answer.server_id.parse().unwrap();
        scene.remove_at_end(id);
        let libvirt = scene.libvirt.clone();
        let actor = Self {
            kind,
            id,
            name: name.into(),
            disk: scene
                .agent
                .state_folder()
                .join(format!("servers/{id}/disk")),
            original: fs::read(&image).unwrap(),
            files: scene.files_of(id),
            definition: libvirt.inactive_xml(id).unwrap(),
            console: Console::of(&libvirt, id),
            libvirt,
        };
        actor.wait_ready(Mark::START, name);
        actor
    }

    /// What is on the disk now, or on an overlay of it. What a running guest wrote may not be there yet.
    pub(crate) fn content(&self, disk: &Path) -> Vec<u8> {
        if self.kind == Kind::Adopted && disk == self.disk {
            return fs::read(disk).unwrap();
        }
        let raw = tempfile::NamedTempFile::new().unwrap();
        tool!(
            "qemu-img",
            "convert",
            "-U",
            "-f",
            "qcow2",
            "-O",
            "raw",
            disk,
            raw.path()
        );
        fs::read(raw.path()).unwrap()
    }

    /// Marks the disk as the rescue guest would, by way of the overlay that a rescue has put over it. No
    /// guest runs meanwhile.
    pub(crate) fn mark_overlay(&self, overlay: &Path) {
        let mut mark = FIXED.as_bytes().to_vec();
        mark.resize(MARK_LENGTH, 0);
        let (file, at) = (tempfile::NamedTempFile::new().unwrap(), MARK_AT);
        fs::write(&file, mark).unwrap();
        let write = format!("write -s {} {at} {MARK_LENGTH}", file.path().display());
        tool!("qemu-io", "-f", "qcow2", "-c", write, overlay);
    }

    /// What the guest says. The rescue guest says it in the same place.
    pub(crate) fn console(&self) -> &Console {
        &self.console
    }

    /// libvirt's number of the running domain: another one after every start.
    pub(crate) fn number(&self) -> Option<u32> {
        self.libvirt.number(self.id).unwrap()
    }

    /// Whether the rescue guest marked the disk. Panics if anything else on it changed.
    #[track_caller]
    pub(crate) fn is_marked(&self) -> bool {
        let now = self.content(&self.disk);
        assert_eq!(now.len(), self.original.len(), "the disk has another size");
        assert!(
            now[..MARK_AT] == self.original[..MARK_AT]
                && now[MARK_AT + MARK_LENGTH..] == self.original[MARK_AT + MARK_LENGTH..],
            "the disk of {} changed where nobody wrote",
            self.name
        );
        let mark = now[MARK_AT..MARK_AT + MARK_LENGTH].trim_ascii_end();
        match String::from_utf8_lossy(mark).trim_end_matches('\0') {
            "" => false,
            FIXED => true,
            other => panic!("the disk of {} has the mark {other:?}", self.name),
        }
    }

    /// Takes the mark away. The tiny guest neither reads nor writes the sector unless it is told to.
    pub(crate) fn remove_mark(&self) {
        let mut disk = fs::File::options().write(true).open(&self.disk).unwrap();
        disk.seek(SeekFrom::Start(u64::try_from(MARK_AT).unwrap()))
            .unwrap();
        disk.write_all(&[0; MARK_LENGTH]).unwrap();
    }

    /// The guest that came up last behind `mark`, if one did.
    pub(crate) fn last_ready(&self, mark: Mark) -> Option<String> {
        let said = self.console().since(mark);
        let line = said.lines().rfind(|line| line.starts_with("TINY-READY "))?;
        Some(line["TINY-READY ".len()..].to_owned())
    }

    /// Waits until the guest `name` was the last to come up behind `mark`, where guests come up.
    #[track_caller]
    pub(crate) fn wait_ready(&self, mark: Mark, name: &str) {
        if self.kind == Kind::MadeUefi {
            return;
        }
        let found = try_wait(SOON, || {
            (self.last_ready(mark).as_deref() == Some(name)).then_some(())
        });
        assert!(
            found.is_some(),
            "the guest {name} did not come up last, but:\n{}",
            self.console().since(mark)
        );
    }

    /// How long the guest gets to shut down: a firmware does not listen.
    fn patience(&self) -> Option<prost_types::Duration> {
        match self.kind {
            Kind::Adopted | Kind::Made => seconds(20),
            Kind::MadeUefi => AT_ONCE,
        }
    }

    /// The request to rescue the server with the image that marks its disk.
    pub(crate) fn rescue_request(&self, protection: DiskProtection) -> RescueServerRequest {
        RescueServerRequest {
            request_id: Uuid::new_v4().to_string(),
            server: self.id.to_string(),
            image: Some(FIXER.into()),
            disk_protection: protection.into(),
            shutdown_timeout: self.patience(),
            ..RescueServerRequest::default()
        }
    }

    /// The request to unrescue the server.
    pub(crate) fn unrescue_request(&self, overlay: OverlayDisposition) -> UnrescueServerRequest {
        UnrescueServerRequest {
            request_id: Uuid::new_v4().to_string(),
            server: self.id.to_string(),
            overlay: overlay.into(),
            shutdown_timeout: self.patience(),
            ..UnrescueServerRequest::default()
        }
    }
}

impl<'h> Scene<'h> {
    /// A scene with one actor that runs, adopted, and with the rescue image at hand.
    pub(crate) async fn with_actor(
        host: &'h TestHost,
        folder: &Path,
        guest: &TinyGuest,
        settings: AgentSettings,
    ) -> (Actor, Self) {
        let actor = Actor::running(host, folder, guest);
        let mut scene = Self::on(host, folder, settings).await;
        scene.remove_at_end(actor.id);
        scene.client.adopt(actor.id).await;
        scene.import_fixer().await;
        (actor, scene)
    }

    /// One more actor, adopted like the first.
    pub(crate) async fn another_actor(&mut self, guest: &TinyGuest) -> Actor {
        let actor = Actor::running(self.host, &self.folder, guest);
        self.remove_at_end(actor.id);
        self.client.adopt(actor.id).await;
        actor
    }

    /// Imports the rescue image whose guest marks the first other disk as soon as it is up.
    pub(crate) async fn import_fixer(&mut self) {
        let file = self.folder.join("fixer.raw");
        tiny(FIXER).fixing().build(&file, Format::Raw);
        self.client
            .import_file(FIXER, ImageFormat::Raw, &[], &file)
            .await;
    }

    /// Begins to rescue the server.
    pub(crate) async fn begin_rescue(&mut self, actor: &Actor) -> Operation {
        let request = actor.rescue_request(DiskProtection::ReadWrite);
        let answer = self.client.servers.rescue_server(request).await.unwrap();
        answer.into_inner().operation.unwrap()
    }

    /// Begins to unrescue the server.
    pub(crate) async fn begin_unrescue(&mut self, actor: &Actor) -> Operation {
        let request = actor.unrescue_request(OverlayDisposition::Unspecified);
        let answer = self.client.servers.unrescue_server(request).await.unwrap();
        answer.into_inner().operation.unwrap()
    }

    /// Rescues the server and waits until its rescue guest is up.
    pub(crate) async fn rescue_actor(&mut self, actor: &Actor) -> Operation {
        let (mark, number) = (actor.console().mark(), actor.number());
        let operation = self.begin_rescue(actor).await;
        self.client.wait(&operation).await.done();
        self.assert_rescued(actor, &operation, mark, number).await;
        operation
    }

    /// Unrescues the server and checks that it is the original one again, with the repair in place.
    pub(crate) async fn unrescue_actor(&mut self, actor: &Actor) {
        let (mark, number) = (actor.console().mark(), actor.number());
        let operation = self.begin_unrescue(actor).await;
        self.client.wait(&operation).await.done();
        self.assert_original(actor, mark, number).await;
        assert!(actor.is_marked(), "the repair is lost");
        actor.remove_mark();
    }

    /// Checks everything about a server that is ACTIVE and runs its own guest, with no rescue in force.
    /// `mark` and `number` are from before: the guest runs on, or its own system came up behind the mark.
    pub(crate) async fn assert_original(&mut self, actor: &Actor, mark: Mark, number: Option<u32>) {
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
            !live.contains("<salvor:role>rescue<"),
            "the rescue still runs:\n{live}"
        );
        if actor.number() == number {
            assert_eq!(actor.last_ready(mark), None, "somebody restarted the guest");
        } else {
            actor.wait_ready(mark, &actor.name);
        }
        assert_eq!(
            files_below(&self.agent.state_folder().join("servers")),
            actor.files,
            "files are left behind"
        );
        assert_eq!(
            self.references(FIXER).await,
            0,
            "the rescue image is still held"
        );
    }

    /// Checks everything about a server that is RESCUED by the operation `rescue`, and that the rescue
    /// guest came up behind `mark` (or runs on, if its number is still `number`).
    pub(crate) async fn assert_rescued(
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
        assert_eq!(
            self.references(FIXER).await,
            1,
            "nobody holds the rescue image"
        );
    }
}

/// A guest with a small disk: what is compared often should not be large.
pub(crate) fn tiny(name: &str) -> TinyGuest {
    let mut guest = TinyGuest::new(name);
    guest.size_mib = 1;
    guest
}
