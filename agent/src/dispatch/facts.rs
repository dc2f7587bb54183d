// SPDX-License-Identifier: Apache-2.0
//! Gathers the facts that planners ask for, by reading only.

use std::{
    collections::BTreeMap,
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use salvor_domain_templates::{Disk, Domain, Firmware, Role};
use uuid::Uuid;

use super::{Dispatcher, refused};
use crate::{
    core::{
        action::Action,
        backing::References,
        caller::Who,
        errors::chain,
        facts::{
            AgentLook, CommitSpace, DomainFacts, Facts, HostFacts, ImageFacts, SaveRoom, live_only,
        },
        image::{ImageFormat, ImageRecord},
        operation::{HostReport, OperationRecord, OperationState},
        planners::{HostImage, choose_image, machine},
        reason::{Reason, Refusal},
        record::{OverlayDisposition, Protection, ServerRecord},
        state::PowerState,
    },
    engine::now_ms,
    hypervisor::{Definition, HypervisorError},
    storage::{
        apart, check_writable,
        files::free_space,
        image_path,
        inspect::{self, Unsafe},
        look_at_disk,
    },
};

/// No change of a password takes longer: its step has half a minute, and taking it back is nothing.
const AGENT_AT_MOST: Duration = Duration::from_secs(120);

/// Where libvirt's QEMU driver keeps UEFI variables, in `NAME_VARS.fd` (`qemuDomainNVRAMPathFormat`).
const LIBVIRTS_NVRAM: &str = "/var/lib/libvirt/qemu/nvram";

impl Dispatcher {
    /// The facts for an action on the server (or domain, or server to be) `id`.
    pub(super) async fn gather(
        &self,
        id: Uuid,
        server: Option<&ServerRecord>,
        action: &Action,
        who: &Who,
    ) -> Result<Facts, Refusal> {
        let protection = match action {
            Action::Rescue(args) => Some(args.protection),
            _ => None,
        };
        let image = match action {
            Action::Create(args) => Some(args.image),
            Action::Rescue(args) => match server {
                Some(server) => Some(choose_image(server, args.image, &self.host_image().await?)?),
                None => None,
            },
            Action::Adopt(_)
            | Action::Release
            | Action::Delete
            | Action::Start
            | Action::Stop(_)
            | Action::Unrescue(_)
            | Action::DeliverPassword
            | Action::Reboot(_)
            | Action::HardReboot
            | Action::Pause
            | Action::Unpause
            | Action::Suspend
            | Action::Resume
            | Action::CrashDump
            | Action::DumpMemory
            | Action::Lock(_)
            | Action::Unlock { .. }
            | Action::ResetState(_)
            | Action::SoftDelete
            | Action::Restore
            | Action::ForceDelete
            | Action::Update(_)
            | Action::AcceptDrift
            | Action::RestoreDefinition
            | Action::StartRescue => None,
            // Whose password it is, if the request does not say.
            Action::ChangePassword(args) => match (&args.user, server) {
                (None, Some(server)) => server.image_id,
                _ => None,
            },
        };
        let image = match image {
            Some(image) => self.image_facts(id, image).await?,
            None => None,
        };
        let saved_xml = match server.and_then(|server| server.rescue.as_ref()) {
            Some(_) => self.store.saved_definition(id).await.map_err(refused)?,
            None => None,
        };
        // Giving a domain back needs nothing of libvirt, and must work while it is away; so does what
        // changes the record alone.
        let (domain, host_report) = match action {
            Action::Release | Action::Lock(_) | Action::Unlock { .. } | Action::Update(_) => {
                (None, None)
            }
            // These do one thing to a running QEMU, and ask for nothing that would take longer than it does.
            Action::Pause | Action::Unpause | Action::CrashDump => (None, None),
            Action::ResetState(_) => (None, Some(self.host_report(id).await)),
            _ => (self.domain_facts(id, protection).await?, None),
        };
        let commit_begun =
            |server: &&ServerRecord| server.rescue.as_ref().is_some_and(|r| r.commit_started);
        let committed = match action {
            Action::Unrescue(args) if args.overlay == Some(OverlayDisposition::Commit) => server,
            // What has begun is carried to its end before the overlays go.
            Action::Delete | Action::ForceDelete => server.filter(commit_begun),
            _ => None,
        };
        let undefined = domain.as_ref().is_none_or(|domain| !domain.persistent);
        let asks_for_known = match action {
            Action::RestoreDefinition | Action::HardReboot => true,
            // What would be lost, or is, is defined again.
            Action::Start
            | Action::Stop(_)
            | Action::Reboot(_)
            | Action::SoftDelete
            | Action::Restore => undefined,
            _ => false,
        };
        let known_xml = match asks_for_known {
            true => self.store.known_definition(id).await.map_err(refused)?,
            false => None,
        };
        // Whoever writes no file there is not refused because that place does not answer.
        let host = self.host_facts(match action {
            Action::Create(_) | Action::Rescue(_) | Action::DumpMemory => self.free_bytes().await?,
            _ => 0,
        });
        let capacity = match action {
            Action::Create(args) => {
                let machine = machine(args, &host.arch);
                Some(self.hypervisor.capacity(&host.virt_type, &machine).await?)
            }
            _ => None,
        };
        Ok(Facts {
            plan: Uuid::new_v4(),
            host,
            capacity,
            domain,
            image,
            saved_xml,
            known_xml,
            commit_space: match committed {
                Some(server) => commit_space(server).await,
                None => BTreeMap::new(),
            },
            commit_references: match committed {
                Some(server) => commit_references(server).await,
                None => BTreeMap::new(),
            },
            save_room: match action {
                Action::Suspend => self.save_room(id).await,
                _ => None,
            },
            agent: match action {
                Action::ChangePassword(_) => Some(self.look_at_agent(id).await),
                _ => None,
            },
            who: who.clone(),
            host_report,
        })
    }

    /// What the host shows of a server. What cannot be looked at is said in the report: a state is reset when
    /// something is wrong.
    async fn host_report(&self, id: Uuid) -> HostReport {
        let mut report = HostReport {
            power: PowerState::Unknown,
            power_reason: String::new(),
            defined: false,
            rescue_domain: false,
            saved_memory: false,
            missing_disks: BTreeMap::new(),
            unknown: String::new(),
            at_ms: now_ms(),
        };
        let domain = match self.domain_facts(id, None).await {
            Ok(Some(domain)) => domain,
            Ok(None) => {
                report.power = PowerState::NoState;
                return report;
            }
            Err(refusal) => {
                report.unknown = refusal.message;
                return report;
            }
        };
        report.power = domain.power;
        report.power_reason = domain.power_reason;
        report.defined = domain.persistent;
        report.saved_memory = domain.managed_save;
        let parsed = match Domain::parse(&domain.xml) {
            Ok(parsed) => parsed,
            Err(error) => {
                report.unknown = format!("the definition cannot be read: {error}");
                return report;
            }
        };
        let mark = parsed.salvor_mark();
        report.rescue_domain = mark.is_some_and(|mark| mark.role == Role::Rescue);
        match missing(id, &parsed).await {
            Ok(missing) => report.missing_disks = missing,
            Err(refusal) => report.unknown = refusal.message,
        }
        report
    }

    /// What is free for servers' files: that may be on a file system of its own. It is nobody's own look: a
    /// server whose disks hang must not be held for one whose folder does.
    async fn free_bytes(&self) -> Result<u64, Refusal> {
        let servers = self.settings.layout.servers();
        let asked = PathBuf::from(&servers);
        let free = match apart::look(&servers, move || free_space(&asked)).await {
            Ok(free) => free.map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        };
        free.map_err(|error| {
            Refusal::new(
                Reason::StorageFailed,
                format!("the free space of {servers} cannot be told: {error}"),
            )
        })
    }

    /// Where libvirt saves memory, and what is free there. A folder that the agent cannot look at is
    /// libvirt's to find full.
    async fn save_room(&self, id: Uuid) -> Option<SaveRoom> {
        let folder = &self.settings.saved_memory;
        let asked = folder.clone();
        let free_bytes = look(id, move || free_space(&asked)).await.ok()?;
        Some(SaveRoom {
            folder: folder.display().to_string(),
            free_bytes,
        })
    }

    /// Does the server's guest agent answer?
    async fn look_at_agent(&self, id: Uuid) -> AgentLook {
        if let Some((failures, pause)) = self.agents.given_up(id) {
            return AgentLook::GivenUp {
                failures,
                seconds: pause.as_secs().max(1),
            };
        }
        match self.hypervisor.ping_guest_agent(id).await {
            // Whether it also does what it is asked for shows when it has: see `heed_agent`.
            Ok(()) => AgentLook::Answers,
            Err(error) => {
                self.agents.silent(id);
                AgentLook::Silent(error.to_string())
            }
        }
    }

    /// An agent may answer when it is pinged, and hang in what it is asked for: that counts as silence, too.
    pub(super) fn heed_agent(&self, operation: &OperationRecord) {
        let (engine, agents) = (self.engine.clone(), Arc::clone(&self.agents));
        let (id, server) = (operation.id, operation.server);
        tokio::spawn(async move {
            // It ends by its steps' deadlines; one that does not tells nothing.
            let Ok(Some(view)) = engine.wait(id, AGENT_AT_MOST).await else {
                return;
            };
            match (view.operation.state, &view.operation.error) {
                (OperationState::Done, _) => agents.answered(server),
                (_, Some(error)) if error.reason == Reason::GuestAgentUnavailable => {
                    agents.silent(server);
                }
                (_, Some(error)) if error.reason == Reason::GuestAgentRefused => {
                    agents.answered(server);
                }
                _ => {}
            }
        });
    }

    fn host_facts(&self, free_bytes: u64) -> HostFacts {
        let settings = &self.settings;
        HostFacts {
            layout: settings.layout.clone(),
            virt_type: settings.virt_type.clone(),
            arch: std::env::consts::ARCH.to_owned(),
            free_bytes,
            reserve_bytes: settings.reserve_bytes,
            rescue_timeout_ms: settings.rescue_timeout_ms,
            reclaim_ms: settings.reclaim_ms,
            now_ms: now_ms(),
        }
    }

    /// With what a rescue must know besides, if it is one, for its protection of disks.
    async fn domain_facts(
        &self,
        id: Uuid,
        rescue: Option<Protection>,
    ) -> Result<Option<DomainFacts>, Refusal> {
        let Some(status) = self.hypervisor.domain(id).await? else {
            return Ok(None);
        };
        let which = if status.persistent {
            Definition::Inactive
        } else {
            Definition::Live
        };
        let xml = self.hypervisor.domain_xml(id, which).await?;
        let mut facts = DomainFacts {
            id: status.id,
            name: status.name,
            xml,
            power: status.power,
            power_reason: status.reason,
            persistent: status.persistent,
            managed_save: status.managed_save,
            nvram: None,
            missing: BTreeMap::new(),
            live_only: Vec::new(),
            disks: BTreeMap::new(),
            unwritable: BTreeMap::new(),
        };
        // A definition that cannot be read is the planner's to refuse.
        let Ok(parsed) = Domain::parse(&facts.xml) else {
            return Ok(Some(facts));
        };
        // What only a rescue needs is not looked at for anything else: storage that does not answer must
        // not keep a server from being stopped or deleted.
        if rescue.is_none() {
            return Ok(Some(facts));
        }
        let live = if facts.persistent && facts.power.is_on() {
            self.live(id).await?
        } else {
            None
        };
        if let Some(live) = &live {
            facts.live_only = live_only(&parsed, live);
        }
        facts.nvram = nvram(id, &parsed, live.as_ref(), &facts.name).await?;
        facts.missing = missing(id, &parsed).await?;
        let writable = parsed.disks().iter().filter(|disk| !disk.readonly);
        match rescue {
            Some(Protection::Overlay) => {
                for disk in writable {
                    look_at(id, disk, &mut facts).await;
                }
            }
            Some(Protection::ReadOnly) => {
                for disk in writable {
                    try_to_write(id, disk, &mut facts).await;
                }
            }
            Some(Protection::ReadWrite) | None => {}
        }
        Ok(Some(facts))
    }

    /// What runs; `None` if it went off in this moment.
    async fn live(&self, id: Uuid) -> Result<Option<Domain>, Refusal> {
        match self.hypervisor.domain_xml(id, Definition::Live).await {
            Err(HypervisorError::NoDomain { .. }) => Ok(None),
            live => Ok(Domain::parse(&live?).ok()),
        }
    }

    /// Looked at for the server `id`.
    async fn image_facts(&self, id: Uuid, image: Uuid) -> Result<Option<ImageFacts>, Refusal> {
        let Some(record) = self.store.image(image).await.map_err(refused)? else {
            return Ok(None);
        };
        let path = image_path(&self.settings.layout, &record);
        let (asked, format, size) = (PathBuf::from(&path), record.format, record.size);
        let seen = look(id, move || {
            Ok::<_, io::Error>(look_at_image(&asked, format, size))
        });
        let refuse = |reason, why: &str| {
            Refusal::new(
                reason,
                format!(
                    "the file of image {image} ({path}) {why}; delete the image and import it again"
                ),
            )
        };
        let present = match seen.await {
            Ok(Ok(present)) => present,
            Ok(Err(wrong)) => {
                let (reason, what) = match &wrong {
                    Unsafe::Unreadable { .. } => (Reason::StorageFailed, "cannot be looked at"),
                    _ => (Reason::ImageDamaged, "is not what was imported any more"),
                };
                return Err(refuse(reason, &format!("{what}: {}", chain(&wrong))));
            }
            Err(why) => {
                return Err(refuse(
                    Reason::StorageFailed,
                    &format!("cannot be looked at: {why}"),
                ));
            }
        };
        Ok(Some(ImageFacts {
            record,
            path,
            present,
        }))
    }

    async fn host_image(&self) -> Result<HostImage, Refusal> {
        let images = self.store.images().await.map_err(refused)?;
        let images: Vec<ImageRecord> = images.into_iter().map(|(image, _)| image).collect();
        let wanted = self.settings.default_rescue_image.as_deref();
        Ok(HostImage::find(wanted, &images))
    }
}

/// Is the file of an image there with its size? And does its header say what it said when it was
/// imported? It blocks for milliseconds.
fn look_at_image(path: &Path, format: ImageFormat, size: u64) -> Result<bool, Unsafe> {
    let as_recorded = |metadata: fs::Metadata| metadata.is_file() && metadata.len() == size;
    if !fs::metadata(path).is_ok_and(as_recorded) {
        return Ok(false);
    }
    let file = fs::File::open(path).map_err(|source| Unsafe::Unreadable { offset: 0, source })?;
    // How large it may be was asked when it was imported.
    let limits = inspect::Limits {
        file_size: u64::MAX,
        virtual_size: u64::MAX,
        ..inspect::Limits::default()
    };
    inspect::inspect(&file, format, &limits).map(|_| true)
}

/// What a look at a file shows, or why it cannot be told. It is the server's own look: if its file server
/// is away, nobody else waits for that.
async fn look<T: Send + 'static, E: std::error::Error + Send + 'static>(
    id: Uuid,
    work: impl FnOnce() -> Result<T, E> + Send + 'static,
) -> Result<T, String> {
    match apart::look(&id.to_string(), work).await {
        Ok(seen) => seen.map_err(|error| error.to_string()),
        Err(error) => Err(error.to_string()),
    }
}

/// How large a disk is, and whether an overlay could be committed to it.
async fn look_at(id: Uuid, disk: &Disk, facts: &mut DomainFacts) {
    let Some(path) = disk.path().map(PathBuf::from) else {
        return;
    };
    let format = disk.format.clone().unwrap_or_else(|| "raw".to_owned());
    let seen = look(id, move || look_at_disk(&path, &format)).await;
    if seen.is_ok() {
        try_to_write(id, disk, facts).await;
    }
    facts.disks.insert(disk.target.clone(), seen);
}

/// Whether the agent can change a disk.
async fn try_to_write(id: Uuid, disk: &Disk, facts: &mut DomainFacts) {
    if let Some(path) = disk.path().map(PathBuf::from)
        && let Err(why) = look(id, move || check_writable(&path)).await
    {
        facts.unwritable.insert(disk.target.clone(), why);
    }
}

/// The file with the UEFI variables of a domain, if it is there. A definition need not name it: then
/// that of the running domain does, and without one it is where libvirt's QEMU driver puts it.
async fn nvram(
    id: Uuid,
    parsed: &Domain,
    live: Option<&Domain>,
    name: &str,
) -> Result<Option<String>, Refusal> {
    let named = |domain: &Domain| match domain.firmware() {
        Firmware::Uefi { nvram, .. } => nvram,
        Firmware::Bios => None,
    };
    if parsed.firmware() == Firmware::Bios {
        return Ok(None);
    }
    let path = named(parsed)
        .or_else(|| live.and_then(named))
        .unwrap_or_else(|| format!("{LIBVIRTS_NVRAM}/{name}_VARS.fd"));
    let looked = path.clone();
    match look(id, move || Path::new(&looked).try_exists()).await {
        Ok(there) => Ok(there.then_some(path)),
        Err(why) => Err(Refusal::new(
            Reason::StorageFailed,
            format!("the UEFI variables {path} cannot be looked for: {why}"),
        )),
    }
}

/// Files and devices of disks that are not there, by target. Those that libvirt does without do not count.
async fn missing(id: Uuid, parsed: &Domain) -> Result<BTreeMap<String, String>, Refusal> {
    let mut missing = BTreeMap::new();
    for disk in parsed.disks().iter().filter(|disk| !disk.optional) {
        let Some(path) = disk.path() else {
            continue;
        };
        let looked = PathBuf::from(path);
        match look(id, move || looked.try_exists()).await {
            Ok(true) => {}
            Ok(false) => {
                missing.insert(disk.target.clone(), path.to_owned());
            }
            Err(why) => {
                return Err(Refusal::new(
                    Reason::StorageFailed,
                    format!("disk {} ({path}) cannot be looked at: {why}", disk.target),
                ));
            }
        }
    }
    Ok(missing)
}

/// What the disk under each overlay refers to now. Where one of the two is gone it is left out.
async fn commit_references(server: &ServerRecord) -> BTreeMap<String, Result<References, String>> {
    let mut found = BTreeMap::new();
    for overlay in server.rescue.iter().flat_map(|rescue| &rescue.overlays) {
        let (base, format) = (PathBuf::from(&overlay.base), overlay.base_format.clone());
        let path = PathBuf::from(&overlay.path);
        let gone = |file: &Path| matches!(file.try_exists(), Ok(false));
        let seen = look(server.id, move || {
            if gone(&path) || gone(&base) {
                return Ok(None);
            }
            look_at_disk(&base, &format).map(Some)
        });
        if let Some(seen) = seen.await.transpose() {
            found.insert(overlay.path.clone(), seen.map(|seen| seen.references));
        }
    }
    found
}

/// The room for committing each overlay to its file. What cannot be told is left out: it only warns.
async fn commit_space(server: &ServerRecord) -> BTreeMap<String, CommitSpace> {
    let mut spaces = BTreeMap::new();
    let overlays = server.rescue.iter().flat_map(|rescue| &rescue.overlays);
    for overlay in overlays {
        let (path, base) = (overlay.path.clone(), overlay.base.clone());
        let space = look(server.id, move || {
            space_for(Path::new(&path), Path::new(&base))
        });
        if let Ok(Some(space)) = space.await {
            spaces.insert(overlay.path.clone(), space);
        }
    }
    spaces
}

fn space_for(overlay: &Path, base: &Path) -> io::Result<Option<CommitSpace>> {
    // A block device has its room already.
    if !fs::metadata(base)?.is_file() {
        return Ok(None);
    }
    Ok(Some(CommitSpace {
        // st_blocks counts 512 bytes whatever the filesystem's blocks are.
        allocated: fs::metadata(overlay)?.blocks().saturating_mul(512),
        free: free_space(base).map_err(io::Error::other)?,
    }))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn committing_needs_room_on_a_file_and_none_on_a_device() {
        let folder = tempfile::tempdir().unwrap();
        let (overlay, base) = (folder.path().join("overlay"), folder.path().join("base"));
        fs::write(&overlay, vec![1; 1 << 16]).unwrap();
        fs::write(&base, "").unwrap();
        let space = space_for(&overlay, &base).unwrap().unwrap();
        assert!(space.allocated >= 1 << 16 && space.free > 0, "{space:?}");
        assert_eq!(space_for(&overlay, Path::new("/dev/null")).unwrap(), None);
    }
}
