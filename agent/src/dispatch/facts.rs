// SPDX-License-Identifier: Apache-2.0
//! Gathers the facts that planners ask for, by reading only.

use std::{collections::BTreeMap, path::Path};

use salvor_domain_templates::{DiskSource, Domain, Firmware};
use uuid::Uuid;

use super::{Dispatcher, refused};
use crate::{
    core::{
        action::Action,
        facts::{DomainFacts, Facts, HostFacts, ImageFacts},
        image::ImageRecord,
        planners::choose_image,
        reason::{Reason, Refusal},
        record::{Protection, ServerRecord},
    },
    engine::now_ms,
    hypervisor::Definition,
    storage::{disk_size, files::free_space, image_path},
};

impl Dispatcher {
    /// The facts for an action on the server (or domain, or server to be) `id`.
    pub(super) async fn gather(
        &self,
        id: Uuid,
        server: Option<&ServerRecord>,
        action: &Action,
    ) -> Result<Facts, Refusal> {
        let sizes =
            matches!(action, Action::Rescue(args) if args.protection == Protection::Overlay);
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
            _ => self.domain_facts(id, sizes).await?,
        };
        Ok(Facts {
            plan: Uuid::new_v4(),
            host: self.host_facts()?,
            domain,
            image,
            saved_xml,
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

    async fn domain_facts(&self, id: Uuid, sizes: bool) -> Result<Option<DomainFacts>, Refusal> {
        let Some(status) = self.hypervisor.domain(id).await? else {
            return Ok(None);
        };
        let which = if status.persistent {
            Definition::Inactive
        } else {
            Definition::Live
        };
        let xml = self.hypervisor.domain_xml(id, which).await?;
        let mut disk_sizes = BTreeMap::new();
        let mut nvram_present = false;
        // A definition that cannot be read is the planner's to refuse.
        if let Ok(parsed) = Domain::parse(&xml) {
            if let Firmware::Uefi {
                nvram: Some(path), ..
            } = parsed.firmware()
            {
                nvram_present = tokio::fs::try_exists(&path).await.unwrap_or(false);
            }
            if sizes {
                for disk in parsed.disks() {
                    if let DiskSource::File(path) | DiskSource::Block(path) = &disk.source
                        && let Ok(size) =
                            disk_size(Path::new(path), disk.format.as_deref().unwrap_or("raw"))
                                .await
                    {
                        disk_sizes.insert(disk.target.clone(), size);
                    }
                }
            }
        }
        Ok(Some(DomainFacts {
            id: status.id,
            name: status.name,
            xml,
            power: status.power,
            power_reason: status.reason,
            persistent: status.persistent,
            managed_save: status.managed_save,
            nvram_present,
            disk_sizes,
        }))
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
        let images: Vec<ImageRecord> = self
            .store
            .images()
            .await
            .map_err(refused)?
            .into_iter()
            .map(|(image, _)| image)
            .collect();
        let mut found = images
            .iter()
            .filter(|image| image.name == *wanted || image.id.to_string() == *wanted);
        match (found.next(), found.next()) {
            (Some(image), None) => Ok(Some(image.id)),
            (first, _) => {
                let why = if first.is_some() {
                    "several images have this name"
                } else {
                    "there is no such image"
                };
                tracing::warn!(image = %wanted, "rescue.default_image is not used: {why}");
                Ok(None)
            }
        }
    }
}
