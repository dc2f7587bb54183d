// SPDX-License-Identifier: Apache-2.0
//! Gathers the facts that planners ask for, by reading only.

use std::{
    collections::BTreeMap, fs, future::Future, io, os::unix::fs::MetadataExt as _, path::Path,
    time::Duration,
};

use nix::fcntl::OFlag;
use salvor_domain_templates::{Disk, Domain, Firmware};
use tokio::{fs::OpenOptions, task::spawn_blocking, time::timeout};
use uuid::Uuid;

use super::{Dispatcher, refused};
use crate::{
    core::{
        action::Action,
        facts::{CommitSpace, DomainFacts, Facts, HostFacts, ImageFacts, live_only},
        lookup,
        planners::choose_image,
        reason::{Reason, Refusal},
        record::{OverlayDisposition, Protection, ServerRecord},
    },
    engine::now_ms,
    hypervisor::{Definition, HypervisorError},
    storage::{disk_size, files::free_space, image_path},
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
                Some(server) => Some(choose_image(
                    server,
                    args.image,
                    self.default_rescue_image().await?,
                )?),
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
        Ok(Facts {
            plan: Uuid::new_v4(),
            host: self.host_facts()?,
            domain,
            image,
            saved_xml,
            commit_space: match (action, server) {
                (Action::Unrescue(args), Some(server))
                    if args.overlay == Some(OverlayDisposition::Commit) =>
                {
                    commit_space(server).await
                }
                _ => BTreeMap::new(),
            },
        })
    }

    fn host_facts(&self) -> Result<HostFacts, Refusal> {
        let settings = &self.settings;
        let state_dir = settings.layout.state_dir();
        let free_bytes = free_space(Path::new(state_dir)).map_err(|error| {
            Refusal::new(
                Reason::StorageFailed,
                format!("the free space of {state_dir} cannot be told: {error}"),
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
            disk_sizes: BTreeMap::new(),
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
            facts.nvram_present = within(tokio::fs::try_exists(&path)).await.map_err(|why| {
                Refusal::new(
                    Reason::StorageFailed,
                    format!("the UEFI variables {path} cannot be looked for: {why}"),
                )
            })?;
        }
        if rescue.is_some() && facts.persistent && facts.power.is_on() {
            facts.live_only = self.live_only(id, &parsed).await?;
        }
        if rescue == Some(Protection::Overlay) {
            for disk in parsed.disks().iter().filter(|disk| !disk.readonly) {
                look_at(disk, &mut facts).await;
            }
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

    /// The configured rescue image, if it is here. One that is configured but missing is no reason to
    /// refuse a request that does not need it, so it is only noted.
    async fn default_rescue_image(&self) -> Result<Option<Uuid>, Refusal> {
        let Some(wanted) = &self.settings.default_rescue_image else {
            return Ok(None);
        };
        match lookup::image(self.store.images().await.map_err(refused)?, wanted) {
            Ok((image, _)) => Ok(Some(image.id)),
            Err(why) => {
                tracing::warn!(%why, "rescue.default_image is not used");
                Ok(None)
            }
        }
    }
}

/// What a look at a file shows, or why it cannot be told.
async fn within<T>(look: impl Future<Output = io::Result<T>>) -> Result<T, String> {
    match timeout(LOOK, look).await {
        Ok(seen) => seen.map_err(|error| error.to_string()),
        Err(_) => Err(format!(
            "its storage did not answer within {} s",
            LOOK.as_secs()
        )),
    }
}

/// How large a disk is, and whether an overlay could be committed to it.
async fn look_at(disk: &Disk, facts: &mut DomainFacts) {
    let Some(path) = disk.path().map(Path::new) else {
        return;
    };
    let size = within(disk_size(path, disk.format.as_deref().unwrap_or("raw"))).await;
    if size.is_ok()
        && let Err(why) = within(open_for_writing(path)).await
    {
        facts.unwritable.insert(disk.target.clone(), why);
    }
    facts.disk_sizes.insert(disk.target.clone(), size);
}

/// Really opens it: access(2) does not know which devices the agent's unit may use. Writes nothing.
async fn open_for_writing(path: &Path) -> io::Result<()> {
    OpenOptions::new()
        .write(true)
        .custom_flags((OFlag::O_NONBLOCK | OFlag::O_NOCTTY).bits())
        .open(path)
        .await
        .map(drop)
}

/// The room for committing each overlay to its file. What cannot be told is left out: it only warns.
async fn commit_space(server: &ServerRecord) -> BTreeMap<String, CommitSpace> {
    let mut spaces = BTreeMap::new();
    let overlays = server.rescue.iter().flat_map(|rescue| &rescue.overlays);
    for overlay in overlays {
        let (path, base) = (overlay.path.clone(), overlay.base.clone());
        let look = async {
            spawn_blocking(move || space_for(Path::new(&path), Path::new(&base)))
                .await
                .map_err(io::Error::other)?
        };
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
        let hung = std::future::pending::<io::Result<()>>();
        let why = within(hung).await.unwrap_err();
        assert_eq!(why, "its storage did not answer within 10 s");
    }

    #[tokio::test]
    async fn what_cannot_be_written_is_told_without_changing_it() {
        let folder = tempfile::tempdir().unwrap();
        let disk = folder.path().join("disk");
        fs::write(&disk, "content").unwrap();
        open_for_writing(&disk).await.unwrap();
        assert_eq!(fs::read(&disk).unwrap(), b"content");
        // A folder is no disk, for root neither.
        assert!(open_for_writing(folder.path()).await.is_err());
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
