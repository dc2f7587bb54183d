// SPDX-License-Identifier: Apache-2.0
//! The domain of a server that Salvor made.
//!
//! Owns: which hardware such a server has. Everything is virtio; the guest gets an entropy source, a balloon, a serial
//! console that is logged, a channel for the guest agent and a VNC screen on the loopback interface.
//! Does not know: flavors, images, ports; it is told paths, sizes and addresses.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::disk::Bus;
use crate::domain::{Domain, MachineFamily, Mark, Role};
use crate::image::{BaseImage, Made};
use crate::place::{Controller, Places, check_bus};
use crate::rescue::{TemplateError, made_of_something_else};
use crate::spec::{CONFIG_DRIVE_SERIAL, DiskFormat};
use crate::templates::{OwnXml, TemplateName, Templates};
use crate::xml::check_text;

/// Which accelerator runs the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DomainKind {
    /// Hardware virtualisation.
    Kvm,
    /// Emulation.
    Qemu,
}

/// What the guest starts from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ServerFirmware {
    /// The machine type's BIOS.
    Bios,
    /// UEFI; libvirt chooses the loader.
    Uefi {
        /// The file with this guest's own variables.
        nvram: String,
    },
}

/// A disk of a server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServerDisk {
    /// File on this host.
    pub path: String,
    /// Its format.
    pub format: DiskFormat,
    /// The image that it stands on.
    pub base: Option<BaseImage>,
    /// Its bus.
    pub bus: Bus,
    /// Serial number shown to the guest; virtio cuts it after 20 bytes.
    pub serial: Option<String>,
}

/// What a network interface connects to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NicSource {
    /// A bridge of this host.
    Bridge(String),
    /// A libvirt network.
    Network(String),
    /// QEMU's own user-mode network.
    User,
}

/// A network interface of a server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NicSpec {
    /// Its MAC address.
    pub mac: String,
    /// What it connects to.
    pub source: NicSource,
    /// Device model; `None` is virtio.
    pub model: Option<String>,
}

/// What a server's domain is made from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServerSpec {
    /// The server's id, which is the domain's uuid.
    pub uuid: Uuid,
    /// The domain's name.
    pub name: String,
    /// The server's display name.
    pub title: String,
    /// Id of the plan; it goes into the domain's mark.
    pub plan: String,
    /// Accelerator.
    pub kind: DomainKind,
    /// Architecture, for example `x86_64`.
    pub arch: String,
    /// Machine type, for example `pc` or `q35`.
    pub machine: String,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Number of virtual CPUs.
    pub vcpus: u32,
    /// The disks; the first one boots.
    pub disks: Vec<ServerDisk>,
    /// A raw image with a FAT file system labelled config-2.
    pub config_drive: Option<String>,
    /// The network interfaces.
    pub interfaces: Vec<NicSpec>,
    /// The file that keeps what the guest writes on its serial port, over all its boots.
    pub console_log: String,
    /// What the guest starts from.
    pub firmware: ServerFirmware,
    /// Path of the QEMU binary; `None` lets libvirt choose.
    pub emulator: Option<String>,
}

#[derive(Debug, Serialize)]
struct DiskView<'a> {
    path: &'a str,
    source: OwnXml,
    backing: Option<OwnXml>,
    #[serde(skip)]
    made: Made,
    format: DiskFormat,
    target: String,
    bus: &'static str,
    serial: Option<&'a str>,
    readonly: bool,
    boots: bool,
}

#[derive(Debug, Serialize)]
struct NicView<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    source: Option<&'a str>,
    mac: &'a str,
    model: &'a str,
}

/// What `server.xml` is given. The template's header explains each.
#[derive(Debug, Serialize)]
struct Context<'a> {
    uuid: String,
    name: &'a str,
    title: &'a str,
    plan: &'a str,
    mark: OwnXml,
    kind: DomainKind,
    arch: &'a str,
    machine: &'a str,
    memory_mib: u64,
    vcpus: u32,
    nvram: Option<&'a str>,
    emulator: Option<&'a str>,
    console_log: &'a str,
    disks: Vec<DiskView<'a>>,
    controllers: Vec<Controller>,
    interfaces: Vec<NicView<'a>>,
}

/// Renders the domain of a server.
///
/// # Errors
/// [`TemplateError`]: a text that XML cannot carry, a bus the machine does not have or that is full, or a template that
/// renders something else than this server.
pub fn render_server(templates: &Templates, spec: &ServerSpec) -> Result<String, TemplateError> {
    check_texts(spec)?;
    let uuid = spec.uuid.to_string();
    let mark = Mark {
        plan: spec.plan.clone(),
        role: Role::Server,
        server: Some(uuid.clone()),
    };
    let disks = place(spec)?;
    let mut controllers = Vec::new();
    let on = |bus: Bus| disks.iter().any(|disk| disk.bus == bus.as_str());
    controllers.push(if on(Bus::Usb) {
        Controller {
            kind: "usb",
            index: 0,
            model: "qemu-xhci",
            ports: Some(15),
        }
    } else {
        // Without this libvirt adds a slow one that costs the host CPU time for nothing.
        Controller {
            kind: "usb",
            index: 0,
            model: "none",
            ports: None,
        }
    });
    if on(Bus::Scsi) {
        controllers.push(Controller {
            kind: "scsi",
            index: 0,
            model: "virtio-scsi",
            ports: None,
        });
    }
    let context = Context {
        name: &spec.name,
        title: &spec.title,
        plan: &spec.plan,
        mark: OwnXml::from(&mark.to_element()),
        kind: spec.kind,
        arch: &spec.arch,
        machine: &spec.machine,
        memory_mib: spec.memory_mib,
        vcpus: spec.vcpus,
        nvram: match &spec.firmware {
            ServerFirmware::Bios => None,
            ServerFirmware::Uefi { nvram } => Some(nvram),
        },
        emulator: spec.emulator.as_deref(),
        console_log: &spec.console_log,
        disks,
        controllers,
        interfaces: spec.interfaces.iter().map(NicView::of).collect(),
        uuid,
    };
    let xml = templates.render(TemplateName::Server, &context)?;
    let unusable = |what: String| TemplateError::Unusable {
        name: TemplateName::Server.file_name(),
        what,
    };
    let domain = Domain::parse(&xml).map_err(|error| unusable(error.to_string()))?;
    if domain.uuid().as_deref() != Some(&context.uuid) || domain.name() != spec.name.trim() {
        return Err(unusable("name or uuid is not the server's".to_owned()));
    }
    if domain.salvor_mark() != Some(mark) {
        return Err(unusable(
            "the metadata does not carry this plan's mark".to_owned(),
        ));
    }
    for disk in &context.disks {
        let found = domain.disk_element(&disk.target);
        if !found.is_some_and(|found| disk.made.is_in(found)) {
            return Err(unusable(made_of_something_else(&disk.target)));
        }
    }
    Ok(xml)
}

/// All disks with their places, the config drive last.
fn place(spec: &ServerSpec) -> Result<Vec<DiskView<'_>>, TemplateError> {
    let family = MachineFamily::of(Some(&spec.arch), Some(&spec.machine));
    let mut places = Places::default();
    let mut disks = Vec::new();
    for (number, disk) in spec.disks.iter().enumerate() {
        check_bus(disk.bus, family, Some(&spec.machine))?;
        let made = Made::own(&disk.path, disk.base.as_ref(), true);
        disks.push(DiskView {
            path: &disk.path,
            source: OwnXml::from(&made.source),
            backing: made.backing.as_ref().map(OwnXml::from),
            made,
            format: disk.format,
            target: places.take(disk.bus)?,
            bus: disk.bus.as_str(),
            serial: disk.serial.as_deref(),
            readonly: false,
            boots: number == 0,
        });
    }
    if let Some(path) = &spec.config_drive {
        let bus = spec.disks.first().map_or(Bus::Virtio, |disk| disk.bus);
        let made = Made::own(path, None, true);
        disks.push(DiskView {
            path,
            source: OwnXml::from(&made.source),
            backing: None,
            made,
            format: DiskFormat::Raw,
            target: places.take(bus)?,
            bus: bus.as_str(),
            serial: Some(CONFIG_DRIVE_SERIAL),
            readonly: bus.has_readonly_disks(),
            boots: false,
        });
    }
    Ok(disks)
}

impl<'a> NicView<'a> {
    fn of(nic: &'a NicSpec) -> Self {
        let (kind, source) = match &nic.source {
            NicSource::Bridge(name) => ("bridge", Some(name.as_str())),
            NicSource::Network(name) => ("network", Some(name.as_str())),
            NicSource::User => ("user", None),
        };
        Self {
            kind,
            source,
            mac: &nic.mac,
            model: nic.model.as_deref().unwrap_or("virtio"),
        }
    }
}

fn check_texts(spec: &ServerSpec) -> Result<(), TemplateError> {
    let mut texts = vec![
        ("the domain's name", spec.name.as_str()),
        ("the display name", &spec.title),
        ("the plan's id", &spec.plan),
        ("the architecture", &spec.arch),
        ("the machine type", &spec.machine),
        ("the console log's path", &spec.console_log),
    ];
    texts.extend(
        spec.emulator
            .iter()
            .map(|text| ("the emulator's path", text.as_str())),
    );
    texts.extend(
        spec.config_drive
            .iter()
            .map(|text| ("the config drive's path", text.as_str())),
    );
    if let ServerFirmware::Uefi { nvram } = &spec.firmware {
        texts.push(("the NVRAM path", nvram));
    }
    for disk in &spec.disks {
        texts.push(("a disk's path", &disk.path));
        let base = disk.base.iter();
        texts.extend(base.map(|base| ("an image's path", base.path.as_str())));
        texts.extend(
            disk.serial
                .iter()
                .map(|text| ("a disk's serial number", text.as_str())),
        );
    }
    for nic in &spec.interfaces {
        let nic = NicView::of(nic);
        texts.extend([("a MAC address", nic.mac), ("a network model", nic.model)]);
        texts.extend(nic.source.map(|text| ("a network or bridge name", text)));
    }
    for (field, text) in texts {
        check_text(text).map_err(|source| TemplateError::Text { field, source })?;
    }
    Ok(())
}
