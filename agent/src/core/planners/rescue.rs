// SPDX-License-Identifier: Apache-2.0
//! Rescue: everything is prepared while the server runs, then the domain is switched.

use std::collections::BTreeMap;

use salvor_domain_templates::{
    Bus, Device, DiskChange, DiskFormat, DiskRole, Domain, Firmware, Mode, RescueDisk as DiskSpec,
    RescueRendering, RescueSpec, Role, TemplateError, Templates, render_rescue,
};
use uuid::Uuid;

use super::{
    Builder,
    create::{base_image, check_space, image, properties},
    need_domain,
    protect::{Overlays, changes, note_owners, overlays, owners_lost, unprotected},
    read_domain, rescue_holder,
};
use crate::core::{
    action::{RescueArgs, Verb},
    backing::References,
    errors::chain,
    facts::{DomainFacts, Facts, ImageFacts},
    image::{ImageFormat, ImageRecord, Understood},
    plan::{ConfigDriveSpec, Mark, Phase, Plan, RescueChange, Step},
    reason::{Reason, Refusal, Warning, WarningName},
    record::{
        PasswordDelivery, Protection, RescueBus, RescueDevice, RescueDisk, RescueMode,
        RescueRecord, ServerRecord,
    },
    state::VmState,
};

/// What a rescue's files take at once: config drive, NVRAM and the tables of empty overlays.
const FILES_NEED: u64 = 16 << 20;

/// The host's rescue image: what the configuration says, and what the store has of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HostImage {
    /// `rescue.default_image` is not set.
    NotSet,
    /// It is set, and the store has no such image.
    Missing(String),
    /// It is set to a name that several images have.
    Ambiguous(String, Vec<Uuid>),
    /// It is this one.
    Image(Uuid),
}

impl HostImage {
    /// What `rescue.default_image` names, an id or a unique name, among the images of the store.
    #[must_use]
    pub fn find(wanted: Option<&str>, images: &[ImageRecord]) -> Self {
        let Some(wanted) = wanted else {
            return Self::NotSet;
        };
        let is_it = |image: &&ImageRecord| image.name == wanted || image.id.to_string() == wanted;
        let found: Vec<Uuid> = images.iter().filter(is_it).map(|image| image.id).collect();
        match found.as_slice() {
            [] => Self::Missing(wanted.to_owned()),
            [image] => Self::Image(*image),
            _ => Self::Ambiguous(wanted.to_owned(), found),
        }
    }
}

/// Which image: the request's, else the one that the server was made from, else the host's default.
///
/// # Errors
/// [`Reason::NoRescueImage`] if there is none of the three.
pub fn choose_image(
    server: &ServerRecord,
    requested: Option<Uuid>,
    host: &HostImage,
) -> Result<Uuid, Refusal> {
    let wrong = match (requested.or(server.image_id), host) {
        (Some(image), _) => return Ok(image),
        (None, HostImage::Image(image)) => return Ok(*image),
        (None, HostImage::NotSet) => {
            "rescue.default_image is not set; name an image, or set it".to_owned()
        }
        (None, HostImage::Missing(name)) => format!(
            "rescue.default_image is {name:?}, which is no image of the store; name an image, or import that one"
        ),
        (None, HostImage::Ambiguous(name, images)) => {
            let ids: Vec<String> = images.iter().map(Uuid::to_string).collect();
            format!(
                "rescue.default_image is {name:?}, which is the name of several images ({}); name an image, or set it to an id",
                ids.join(", ")
            )
        }
    };
    Err(Refusal::new(
        Reason::NoRescueImage,
        format!(
            "no rescue image: none was named, server {} was made from none, and {wrong}",
            server.id
        ),
    ))
}

/// What was decided about the rescue disk.
struct Choice {
    mode: RescueMode,
    bus: Option<RescueBus>,
    device: RescueDevice,
}

/// What a rescue is made of: what was asked, what is there, and what was decided from both.
struct Rescue<'a> {
    server: &'a ServerRecord,
    args: &'a RescueArgs,
    facts: &'a Facts,
    domain: &'a DomainFacts,
    image: &'a ImageFacts,
    parsed: Domain,
    choice: Choice,
    overlays: Overlays,
    /// The rescue boots with a copy of the UEFI variables, so that it cannot change the server's.
    nvram: Option<String>,
    folder: String,
    rescue_disk: String,
    config_drive: String,
    password_user: String,
}

pub(super) fn plan(
    server: &ServerRecord,
    args: &RescueArgs,
    facts: &Facts,
    templates: &Templates,
) -> Result<Plan, Refusal> {
    let rescue = Rescue::new(server, args, facts)?;
    let mut builder = Builder::new(Verb::Rescue, server.id, facts);
    let warnings = &mut builder.plan.warnings;
    rescue.warn(warnings);
    let timeout_ms = timeout(args, facts, warnings)?;
    let rendering = render_rescue(templates, &rescue.domain.xml, &rescue.spec())
        .map_err(|error| unrenderable(&error))?;
    let bus = placed_bus(&rendering)?;

    rescue.prepare(&mut builder);
    rescue.switch(&mut builder, rendering.xml);
    let delivery = &mut builder.plan.password_delivery;
    delivery.push(PasswordDelivery::ConfigDrive);
    let has_agent_channel = rescue.parsed.has_guest_agent_channel();
    if has_agent_channel {
        delivery.push(PasswordDelivery::GuestAgent);
    }
    let record = RescueRecord {
        plan: facts.plan,
        image_id: rescue.image.record.id,
        mode: rescue.choice.mode,
        bus,
        device: rescue.choice.device,
        protection: args.protection,
        power_before: rescue.domain.power,
        started_at_ms: 0,
        expires_at_ms: None,
        expiry_overlay: args.timeout_overlay,
        disks: rendering.disks.into_iter().map(placed_disk).collect(),
        overlays: rescue
            .overlays
            .into_iter()
            .map(|((_, overlay), _)| overlay)
            .collect(),
        commit_started: false,
        password_delivered: vec![PasswordDelivery::ConfigDrive],
        password_for_agent: has_agent_channel.then(|| args.password.clone()),
        password_user: rescue.password_user,
        password_refusals: 0,
    };
    let begins = RescueChange::Begin {
        rescue: Box::new(record),
        timeout_ms,
    };
    Ok(builder.becomes(VmState::Rescued, begins))
}

impl<'a> Rescue<'a> {
    /// Decides, or refuses what the facts show to be impossible.
    fn new(
        server: &'a ServerRecord,
        args: &'a RescueArgs,
        facts: &'a Facts,
    ) -> Result<Self, Refusal> {
        let domain = need_domain(server, facts)?;
        let image = image(facts)?;
        check_domain(server, domain)?;
        check_space(facts, FILES_NEED)?;
        let parsed = read_domain(&domain.xml)?;
        check_owner(domain, &parsed)?;
        let properties = properties(image)?;
        let choice = choose(server, args, image, &properties)?;
        let folder = facts.host.layout.rescue(server.id, facts.plan);
        Ok(Self {
            server,
            args,
            facts,
            domain,
            image,
            overlays: overlays(&parsed, args.protection, domain, &folder)?,
            nvram: match parsed.firmware() {
                Firmware::Bios => None,
                Firmware::Uefi { .. } => Some(format!("{folder}/nvram.fd")),
            },
            rescue_disk: match choice.device {
                // A CD cannot be written, so the image itself is the medium.
                RescueDevice::Cdrom => image.path.clone(),
                RescueDevice::Disk => format!("{folder}/disk"),
            },
            config_drive: format!("{folder}/disk.config"),
            password_user: properties.admin_user,
            parsed,
            choice,
            folder,
        })
    }

    /// What becomes of the original disks.
    fn changes(&self) -> BTreeMap<String, DiskChange> {
        changes(&self.parsed, self.args.protection, &self.overlays)
    }

    /// What is asked of the templates.
    fn spec(&self) -> RescueSpec {
        let choice = &self.choice;
        RescueSpec {
            plan: self.facts.plan.to_string(),
            mode: match choice.mode {
                RescueMode::Classic => Mode::Classic,
                RescueMode::Stable => Mode::Stable,
            },
            rescue_disk: DiskSpec {
                path: self.rescue_disk.clone(),
                format: match (choice.device, self.image.record.format) {
                    (RescueDevice::Disk, _) | (RescueDevice::Cdrom, ImageFormat::Qcow2) => {
                        DiskFormat::Qcow2
                    }
                    (RescueDevice::Cdrom, ImageFormat::Raw | ImageFormat::Iso) => DiskFormat::Raw,
                },
                bus: choice.bus.map(template_bus),
                device: match choice.device {
                    RescueDevice::Disk => Device::Disk,
                    RescueDevice::Cdrom => Device::Cdrom,
                },
                base: match choice.device {
                    RescueDevice::Disk => Some(base_image(self.image)),
                    RescueDevice::Cdrom => None,
                },
            },
            protection: self.changes(),
            nvram: self.nvram.clone(),
            config_drive: Some(self.config_drive.clone()),
        }
    }

    /// Everything that can fail while the server still runs.
    fn prepare(&self, builder: &mut Builder) {
        let image = &self.image.record;
        let mut prepare = |step| builder.step(Phase::Prepare, step);
        prepare(Step::HoldImage {
            image: image.id,
            path: self.image.path.clone(),
            size: image.size,
            holder: rescue_holder(self.server.id, self.facts.plan),
        });
        prepare(Step::MakeFolder {
            path: self.folder.clone(),
        });
        if self.choice.device == RescueDevice::Disk {
            prepare(Step::CreateOverlay {
                path: self.rescue_disk.clone(),
                backing: self.image.path.clone(),
                backing_format: image.format.driver().to_owned(),
                // One that does was not imported.
                backing_references: References::default(),
                size: image.virtual_size,
            });
        }
        for ((_, overlay), size) in &self.overlays {
            prepare(Step::CreateOverlay {
                path: overlay.path.clone(),
                backing: overlay.base.clone(),
                backing_format: overlay.base_format.clone(),
                backing_references: overlay.base_references.clone(),
                size: *size,
            });
        }
        if let (Some(from), Some(copy)) = (&self.domain.nvram, &self.nvram) {
            prepare(Step::CopyFile {
                from: from.clone(),
                to: copy.clone(),
            });
        }
        if let Some((reserve, _)) = note_owners(&self.parsed, &self.changes(), &self.folder) {
            prepare(reserve);
        }
        prepare(Step::BuildConfigDrive {
            path: self.config_drive.clone(),
            drive: Box::new(self.drive()),
        });
        prepare(Step::SaveDefinition {
            xml: self.domain.xml.clone(),
        });
    }

    /// What the config drive tells the rescue guest.
    fn drive(&self) -> ConfigDriveSpec {
        let server = self.server;
        ConfigDriveSpec {
            // A new id for each rescue: cloud-init configures a disk anew only for a new instance.
            instance_id: self.facts.plan,
            hostname: if server.hostname.is_empty() {
                "rescue".to_owned()
            } else {
                server.hostname.clone()
            },
            name: server.name.clone(),
            public_keys: server.public_keys.clone(),
            password: Some(self.args.password.clone()),
            password_user: self.password_user.clone(),
            user_data: self.args.user_data.clone(),
            metadata: server.metadata.clone(),
        }
    }

    /// From the server to its rescue.
    fn switch(&self, builder: &mut Builder, xml: String) {
        let mark = Mark::Plan(self.facts.plan);
        let mut switch = |step| builder.step(Phase::Switch, step);
        switch(Step::power_off(
            self.args.shutdown,
            self.domain.power.is_on(),
        ));
        if let Some((_, note)) = note_owners(&self.parsed, &self.changes(), &self.folder) {
            switch(note);
        }
        switch(Step::DefineDomain {
            xml,
            mark,
            before: Some(self.domain.xml.clone()),
        });
        switch(Step::StartDomain { mark, fresh: true });
    }

    fn warn(&self, warnings: &mut Vec<Warning>) {
        let (image, mode) = (&self.image.record, self.choice.mode);
        if self.server.image_id == Some(image.id) {
            warnings.push(Warning {
                name: WarningName::RescueImageIsServerImage,
                message: format!(
                    "the rescue image is the one the server was made from, so both have filesystems with the same ids; the rescue disk boots first ({mode} mode), but mount the original by device name"
                ),
            });
        }
        let (may_need, free) = (image.virtual_size, self.facts.host.free_bytes);
        // A CD is the image itself.
        if self.choice.device == RescueDevice::Disk && free < may_need {
            warnings.push(Warning {
                name: WarningName::SpaceMayRunOut,
                message: format!(
                    "the rescue disk may grow to {may_need} bytes, and {free} are free"
                ),
            });
        }
        warnings.extend(unprotected(&self.parsed, self.args.protection));
        warnings.extend(owners_lost(&self.parsed, &self.changes(), self.domain));
    }
}

/// Hands the rescue's password to the guest agent.
pub(super) fn deliver_password(server: &ServerRecord, facts: &Facts) -> Result<Plan, Refusal> {
    let Some((rescue, hash)) = server
        .rescue
        .as_ref()
        .and_then(|rescue| Some((rescue, rescue.password_for_agent.clone()?)))
    else {
        return Err(Refusal::new(
            Reason::NotRescued,
            format!(
                "no rescue of server {} waits for its password to be delivered",
                server.id
            ),
        ));
    };
    let mut builder = Builder::new(Verb::DeliverPassword, server.id, facts);
    builder.step(
        Phase::Switch,
        Step::SetUserPassword {
            user: rescue.password_user.clone(),
            hash,
        },
    );
    Ok(builder.becomes(
        server.vm_state,
        RescueChange::Delivered(PasswordDelivery::GuestAgent),
    ))
}

/// Is there a way back, and would the rescue boot what it is meant to?
fn check_domain(server: &ServerRecord, domain: &DomainFacts) -> Result<(), Refusal> {
    if !domain.persistent {
        return Err(Refusal::new(
            Reason::DomainTransient,
            format!(
                "domain {} is transient: there would be no way back; have it defined again as it was known (server drift --restore)",
                domain.name
            ),
        ));
    }
    if domain.managed_save {
        return Err(Refusal::new(
            Reason::SavedMemory,
            format!(
                "domain {} has saved memory, which the next start would bring back instead of the rescue; start server {} first, or remove it with `virsh managedsave-remove {}`",
                domain.name, server.id, domain.name
            ),
        ));
    }
    if !domain.missing.is_empty() {
        let missing = |(target, path): (&String, &String)| format!("{target} ({path})");
        let missing: Vec<String> = domain.missing.iter().map(missing).collect();
        return Err(Refusal::new(
            Reason::DiskMissing,
            format!(
                "disks of domain {} are not there: {}; neither a rescue nor the server itself could start with them: put them back, or take them out of the definition (a medium with `virsh change-media {} TARGET --eject --config`, a disk with `virsh detach-disk {} TARGET --config`)",
                domain.name,
                missing.join(", "),
                domain.name,
                domain.name
            ),
        ));
    }
    if !domain.live_only.is_empty() {
        return Err(Refusal::new(
            Reason::DomainUnsupported,
            format!(
                "domain {} runs with what its definition does not have, so the rescue and the server after it would be without: {}; keep it (attach it with `virsh attach-device {} FILE --config`) or detach it first",
                domain.name,
                domain.live_only.join(", "),
                domain.name
            ),
        ));
    }
    if let Some(mark) = read_domain(&domain.xml)?.salvor_mark()
        && mark.role == Role::Rescue
    {
        return Err(Refusal::new(
            Reason::DomainUnsupported,
            format!(
                "the definition of domain {} is that of a rescue (plan {}), not the server's own, which would be no way back; restore that first",
                domain.name, mark.plan
            ),
        ));
    }
    Ok(())
}

/// The rescue's files are made for root, and libvirt gives them to the user that QEMU runs as.
fn check_owner(domain: &DomainFacts, parsed: &Domain) -> Result<(), Refusal> {
    let root = |owner: &str| matches!(owner.split(':').next(), Some("root" | "0" | "+0"));
    match parsed.keeps_files_from().filter(|owner| !root(owner)) {
        None => Ok(()),
        Some(owner) => Err(Refusal::new(
            Reason::DomainUnsupported,
            format!(
                "the definition of domain {} keeps libvirt from giving files to its QEMU, which runs as {owner} and could not read those of a rescue; set relabel='yes' in its <seclabel model='dac'> (virsh edit {})",
                domain.name, domain.name
            ),
        )),
    }
}

/// The request's words come first, then the image's properties, then what suits the image.
fn choose(
    server: &ServerRecord,
    args: &RescueArgs,
    image: &ImageFacts,
    properties: &Understood,
) -> Result<Choice, Refusal> {
    let iso = image.record.format == ImageFormat::Iso;
    let device = args.device.or(properties.rescue_device).unwrap_or(if iso {
        RescueDevice::Cdrom
    } else {
        RescueDevice::Disk
    });
    // A medium that cannot be moved about, or a system with the same filesystem ids as the original:
    // both are better kept apart from the original disks' places.
    let apart = properties.rescue_bus.is_some()
        || properties.rescue_device.is_some()
        || device == RescueDevice::Cdrom
        || server.image_id == Some(image.record.id);
    let mode = args.mode.unwrap_or(if apart {
        RescueMode::Stable
    } else {
        RescueMode::Classic
    });
    let bus = args.bus.or(properties.rescue_bus);
    if device == RescueDevice::Cdrom && bus == Some(RescueBus::Virtio) {
        return Err(Refusal::field(
            "bus",
            "virtio has no cdrom; use sata, scsi, ide or usb",
        ));
    }
    Ok(Choice { mode, bus, device })
}

/// After how many milliseconds the rescue ends by itself.
fn timeout(
    args: &RescueArgs,
    facts: &Facts,
    warnings: &mut Vec<Warning>,
) -> Result<Option<u64>, Refusal> {
    let undecided = args.protection == Protection::Overlay && args.timeout_overlay.is_none();
    let timeout_ms = match args.timeout_ms {
        Some(timeout) if timeout > 0 && undecided => {
            return Err(Refusal::field(
                "timeout_overlay",
                "with a timeout and overlays, say whether they are committed or discarded when it is over",
            ));
        }
        Some(timeout) => timeout,
        None if facts.host.rescue_timeout_ms > 0 && undecided => {
            warnings.push(Warning {
                name: WarningName::TimeoutNotApplied,
                message: "the configured rescue.timeout does not apply: nobody said what becomes of the overlays (timeout_overlay)"
                    .to_owned(),
            });
            0
        }
        None => facts.host.rescue_timeout_ms,
    };
    Ok((timeout_ms > 0).then_some(timeout_ms))
}

fn template_bus(bus: RescueBus) -> Bus {
    match bus {
        RescueBus::Virtio => Bus::Virtio,
        RescueBus::Scsi => Bus::Scsi,
        RescueBus::Usb => Bus::Usb,
        RescueBus::Sata => Bus::Sata,
        RescueBus::Ide => Bus::Ide,
    }
}

fn placed_bus(rendering: &RescueRendering) -> Result<RescueBus, Refusal> {
    rendering
        .disks
        .iter()
        .find(|disk| disk.role == DiskRole::Rescue)
        .and_then(|disk| RescueBus::from_name(&disk.bus))
        .ok_or_else(|| {
            Refusal::new(
                Reason::DomainInvalid,
                "the rescue template places no rescue disk on a known bus",
            )
        })
}

fn placed_disk(disk: salvor_domain_templates::PlacedDisk) -> RescueDisk {
    let (role, original_target) = match disk.role {
        DiskRole::Rescue => ("rescue", String::new()),
        DiskRole::Original { was } => ("original", was),
        DiskRole::ConfigDrive => ("config-drive", String::new()),
    };
    RescueDisk {
        target: disk.target,
        bus: disk.bus,
        original_target,
        role: role.to_owned(),
        source: disk.path.unwrap_or_default(),
    }
}

fn unrenderable(error: &TemplateError) -> Refusal {
    let reason = match error {
        TemplateError::Domain(_)
        | TemplateError::Place(_)
        | TemplateError::ReadOnlyUnsupported { .. }
        | TemplateError::OverlayUnsupported { .. }
        | TemplateError::NvramWithoutUefi
        | TemplateError::NoSuchDisk { .. } => Reason::DomainUnsupported,
        TemplateError::Layout(_) | TemplateError::Text { .. } | TemplateError::Unusable { .. } => {
            Reason::DomainInvalid
        }
    };
    Refusal::new(
        reason,
        format!("the rescue domain cannot be made: {}", chain(error)),
    )
}
