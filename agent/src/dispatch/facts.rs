// SPDX-License-Identifier: Apache-2.0
//! Gathers the facts that planners ask for, by reading only.

use std::{
    collections::BTreeMap,
    fs,
    future::Future,
    io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use salvor_domain_templates::{Disk, Domain, Firmware};
use tokio::{task::spawn_blocking, time::timeout};
use uuid::Uuid;

use super::{Dispatcher, refused};
use crate::{
    core::{
        action::Action,
        backing::References,
        facts::{CommitSpace, DomainFacts, Facts, HostFacts, ImageFacts, live_only},
        image::ImageRecord,
        planners::{HostImage, choose_image, machine},
        reason::{Reason, Refusal},
        record::{OverlayDisposition, Protection, ServerRecord},
    },
    engine::now_ms,
    hypervisor::{Definition, HypervisorError},
    storage::{check_writable, files::free_space, image_path, look_at_disk},
};

/// A look at a file takes no longer than this: a file server that is away would hold it for ever.
const LOOK: Duration = Duration::from_secs(10);

impl Dispatcher {
    /// The facts for an action on the server (or domain, or server to be) `id`.
    pub(super) async fn gather(
        &self,
        id: Uuid,
        server: Option<&ServerRecord>,
        action: &Action,
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
            | Action::DeliverPassword => None,
        };
        let image = match image {
            Some(image) => self.image_facts(image).await?,
            None => None,
        };
        let saved_xml = match server.and_then(|server| server.rescue.as_ref()) {
            Some(_) => self.store.saved_definition(id).await.map_err(refused)?,
            None => None,
        };
        // Giving a domain back needs nothing of libvirt, and must work while it is away.
        let domain = match action {
            Action::Release => None,
            _ => self.domain_facts(id, protection).await?,
        };
        let committed = match action {
            Action::Unrescue(args) if args.overlay == Some(OverlayDisposition::Commit) => server,
            _ => None,
        };
        let host = self.host_facts()?;
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
            commit_space: match committed {
                Some(server) => commit_space(server).await,
                None => BTreeMap::new(),
            },
            commit_references: match committed {
                Some(server) => commit_references(server).await,
                None => BTreeMap::new(),
            },
        })
    }

    fn host_facts(&self) -> Result<HostFacts, Refusal> {
        let settings = &self.settings;
        // What servers need may be on a file system of its own.
        let servers = settings.layout.servers();
        let free_bytes = free_space(Path::new(&servers)).map_err(|error| {
            Refusal::new(
                Reason::StorageFailed,
                format!("the free space of {servers} cannot be told: {error}"),
            )
        })?;
        Ok(HostFacts {
            layout: settings.layout.clone(),
            virt_type: settings.virt_type.clone(),
            arch: std::env::consts::ARCH.to_owned(),
            free_bytes,
            reserve_bytes: settings.reserve_bytes,
            rescue_timeout_ms: settings.rescue_timeout_ms,
            now_ms: now_ms(),
        })
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
            nvram_present: false,
            live_only: Vec::new(),
            disks: BTreeMap::new(),
            unwritable: BTreeMap::new(),
        };
        // A definition that cannot be read is the planner's to refuse.
        let Ok(parsed) = Domain::parse(&facts.xml) else {
            return Ok(Some(facts));
        };
        if let Firmware::Uefi {
            nvram: Some(path), ..
        } = parsed.firmware()
        {
            let nvram = path.clone();
            let look = within(spawned(move || Path::new(&path).try_exists()));
            facts.nvram_present = look.await.map_err(|why| {
                Refusal::new(
                    Reason::StorageFailed,
                    format!("the UEFI variables {nvram} cannot be looked for: {why}"),
                )
            })?;
        }
        if rescue.is_some() && facts.persistent && facts.power.is_on() {
            facts.live_only = self.live_only(id, &parsed).await?;
        }
        let writable = parsed.disks().iter().filter(|disk| !disk.readonly);
        match rescue {
            Some(Protection::Overlay) => {
                for disk in writable {
                    look_at(disk, &mut facts).await;
                }
            }
            Some(Protection::ReadOnly) => {
                for disk in writable {
                    try_to_write(disk, &mut facts).await;
                }
            }
            Some(Protection::ReadWrite) | None => {}
        }
        Ok(Some(facts))
    }

    /// What the running domain has and its definition has not.
    async fn live_only(&self, id: Uuid, persistent: &Domain) -> Result<Vec<String>, Refusal> {
        let live = match self.hypervisor.domain_xml(id, Definition::Live).await {
            // It went off in this moment.
            Err(HypervisorError::NoDomain { .. }) => return Ok(Vec::new()),
            live => live?,
        };
        Ok(Domain::parse(&live).map_or_else(|_| Vec::new(), |live| live_only(persistent, &live)))
    }

    async fn image_facts(&self, id: Uuid) -> Result<Option<ImageFacts>, Refusal> {
        let Some(record) = self.store.image(id).await.map_err(refused)? else {
            return Ok(None);
        };
        let path = image_path(&self.settings.layout, &record);
        let present = tokio::fs::metadata(&path)
            .await
            .is_ok_and(|metadata| metadata.is_file() && metadata.len() == record.size);
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

/// What a look at a file shows, or why it cannot be told.
async fn within<T>(look: impl Future<Output = Result<T, String>>) -> Result<T, String> {
    match timeout(LOOK, look).await {
        Ok(seen) => seen,
        Err(_) => Err(format!(
            "its storage did not answer within {} s",
            LOOK.as_secs()
        )),
    }
}

/// How large a disk is, and whether an overlay could be committed to it.
async fn look_at(disk: &Disk, facts: &mut DomainFacts) {
    let Some(path) = disk.path().map(PathBuf::from) else {
        return;
    };
    let format = disk.format.clone().unwrap_or_else(|| "raw".to_owned());
    let look = within(spawned(move || look_at_disk(&path, &format))).await;
    if look.is_ok() {
        try_to_write(disk, facts).await;
    }
    facts.disks.insert(disk.target.clone(), look);
}

/// Whether the agent can change a disk.
async fn try_to_write(disk: &Disk, facts: &mut DomainFacts) {
    if let Some(path) = disk.path().map(PathBuf::from)
        && let Err(why) = within(spawned(move || check_writable(&path))).await
    {
        facts.unwritable.insert(disk.target.clone(), why);
    }
}

/// Does what blocks on a thread that may.
async fn spawned<T: Send + 'static, E: std::error::Error + Send + 'static>(
    work: impl FnOnce() -> Result<T, E> + Send + 'static,
) -> Result<T, String> {
    match spawn_blocking(work).await {
        Ok(done) => done.map_err(|error| error.to_string()),
        Err(panicked) => Err(panicked.to_string()),
    }
}

/// What the disk under each overlay refers to now.
async fn commit_references(server: &ServerRecord) -> BTreeMap<String, Result<References, String>> {
    let mut found = BTreeMap::new();
    for overlay in server.rescue.iter().flat_map(|rescue| &rescue.overlays) {
        let (base, format) = (PathBuf::from(&overlay.base), overlay.base_format.clone());
        let look = within(spawned(move || look_at_disk(&base, &format))).await;
        found.insert(overlay.path.clone(), look.map(|look| look.references));
    }
    found
}

/// The room for committing each overlay to its file. What cannot be told is left out: it only warns.
async fn commit_space(server: &ServerRecord) -> BTreeMap<String, CommitSpace> {
    let mut spaces = BTreeMap::new();
    let overlays = server.rescue.iter().flat_map(|rescue| &rescue.overlays);
    for overlay in overlays {
        let (path, base) = (overlay.path.clone(), overlay.base.clone());
        let look = spawned(move || space_for(Path::new(&path), Path::new(&base)));
        if let Ok(Some(space)) = within(look).await {
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

    #[tokio::test(start_paused = true)]
    async fn a_hung_file_server_is_not_waited_for() {
        let hung = std::future::pending::<Result<(), String>>();
        let why = within(hung).await.unwrap_err();
        assert_eq!(why, "its storage did not answer within 10 s");
    }

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
