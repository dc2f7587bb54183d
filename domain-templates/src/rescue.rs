// SPDX-License-Identifier: Apache-2.0
//! The rescue domain: the server's own domain, booting another disk.
//!
//! Owns: what a rescue changes in a domain and that nothing else changes. Name, uuid, memory, CPU, machine, firmware,
//! network, TPM, consoles and every element we do not know stay as they are. What changes: disks (see [`crate::Mode`]), what
//! boots, the NVRAM file, and Salvor's mark in the metadata.
//!
//! Does not know: whether the files exist, libvirt, plans beyond their id.
//!
//! Only the rescue disk is bootable: a rescue image that cannot boot must fail where somebody sees it, never fall
//! through to the broken system. So every other boot order, `<boot dev>`, and a kernel given from outside go.

use serde::Serialize;

use crate::disk::{Bus, Disk};
use crate::domain::{Domain, DomainError, Firmware, Mark, Role};
use crate::image::{Made, is_relabelled};
use crate::place::{Controller, Layout, Place, PlaceError, is_usb_controller, lay_out};
use crate::protect::{by_overlay, by_readonly};
use crate::spec::{
    CONFIG_DRIVE_SERIAL, Device, DiskChange, DiskFormat, DiskRole, Mode, PlacedDisk, RESCUE_SERIAL,
    RescueRendering, RescueSpec,
};
use crate::templates::{LayoutError, OwnXml, TemplateName, Templates};
use crate::xml::{Element, Node, XmlError, check_text};

/// Why a domain cannot be rendered.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// The original definition cannot be used.
    #[error(transparent)]
    Domain(#[from] DomainError),
    /// A disk has no place.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// A template failed.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// A given text cannot be part of XML.
    #[error("{field} cannot be part of a domain definition")]
    Text {
        /// Which of the given texts.
        field: &'static str,
        /// Why.
        #[source]
        source: XmlError,
    },
    /// A protection names a disk the domain does not have.
    #[error("the domain has no disk `{target}` to protect")]
    NoSuchDisk {
        /// The name.
        target: String,
    },
    /// QEMU has no read-only disk on this bus.
    #[error(
        "disk `{target}` is on the {bus} bus, where no disk can be read-only; protect it with OVERLAY instead"
    )]
    ReadOnlyUnsupported {
        /// The disk.
        target: String,
        /// Its bus.
        bus: Bus,
    },
    /// The disk cannot have an overlay.
    #[error("disk `{target}` cannot have an overlay: {why}")]
    OverlayUnsupported {
        /// The disk.
        target: String,
        /// The reason, and what works instead.
        why: &'static str,
    },
    /// A copy of the UEFI variables was given for a domain that has none.
    #[error("a private NVRAM copy was given, but the domain does not boot by UEFI")]
    NvramWithoutUefi,
    /// The template left out or changed something a definition must have.
    #[error("template `{name}` rendered a domain Salvor cannot use: {what}")]
    Unusable {
        /// The template.
        name: &'static str,
        /// What is wrong.
        what: String,
    },
}

/// Renders the rescue domain of a server.
///
/// `original` is the server's inactive definition, security information included.
///
/// # Errors
/// [`TemplateError`]. Everything that libvirt would not accept and that can be known here is refused here, before a
/// guest is touched.
pub fn render_rescue(
    templates: &Templates,
    original: &str,
    spec: &RescueSpec,
) -> Result<RescueRendering, TemplateError> {
    check_texts(spec)?;
    let domain = Domain::parse(original)?;
    if let Some(target) = spec
        .protection
        .keys()
        .find(|target| domain.disk(target).is_none())
    {
        return Err(TemplateError::NoSuchDisk {
            target: target.clone(),
        });
    }
    let disk = &spec.rescue_disk;
    let layout = lay_out(
        &domain,
        spec.mode,
        disk.device,
        disk.bus,
        spec.config_drive.is_some(),
    )?;
    let (context, disks) = context(&domain, spec, &layout)?;
    let xml = templates.render(TemplateName::Rescue, context)?;
    check_rendering(&xml, &domain, spec, &disks)?;
    Ok(RescueRendering { xml, disks })
}

fn check_texts(spec: &RescueSpec) -> Result<(), TemplateError> {
    let overlays = spec.protection.values().filter_map(|change| match change {
        DiskChange::Overlay { path } => Some(("the overlay's path", path)),
        DiskChange::ReadOnly => None,
    });
    let texts = [
        ("the plan's id", &spec.plan),
        ("the rescue disk's path", &spec.rescue_disk.path),
    ];
    let base = spec.rescue_disk.base.iter();
    let base = base.map(|base| ("the rescue image's path", &base.path));
    let nvram = spec.nvram.iter().map(|path| ("the NVRAM path", path));
    let config_drive = spec
        .config_drive
        .iter()
        .map(|path| ("the config drive's path", path));
    for (field, text) in texts
        .into_iter()
        .chain(base)
        .chain(overlays)
        .chain(nvram)
        .chain(config_drive)
    {
        check_text(text).map_err(|source| TemplateError::Text { field, source })?;
    }
    Ok(())
}

/// A piece of the original, as the template sees it.
#[derive(Debug, Serialize)]
struct Part {
    /// Element name, or `#comment`, `#text`, `#instruction`.
    name: String,
    /// The element's `type` attribute, or nothing.
    #[serde(rename = "type")]
    kind: String,
    xml: OwnXml,
}

/// An attribute of `<domain>`.
#[derive(Debug, Serialize)]
struct Attribute {
    name: String,
    value: String,
}

/// A disk, as the template sees it.
#[derive(Debug, Serialize)]
struct DiskView {
    role: &'static str,
    target: String,
    bus: String,
    device: &'static str,
    path: Option<String>,
    format: Option<String>,
    readonly: bool,
    boots: bool,
    serial: Option<String>,
    usb_controller: Option<usize>,
    /// Original disks only: the target name in the server's own definition, and the whole element, changed as needed.
    was: Option<String>,
    xml: Option<OwnXml>,
    /// Salvor's own disks only: the elements that say what the disk is made of.
    source: Option<OwnXml>,
    backing: Option<OwnXml>,
}

/// What Salvor's own disks are made of.
struct OwnDisks {
    rescue: Made,
    config_drive: Option<Made>,
}

impl OwnDisks {
    fn of(domain: &Domain, spec: &RescueSpec) -> Self {
        let relabelled = is_relabelled(&domain.root);
        let disk = &spec.rescue_disk;
        Self {
            rescue: match disk.device {
                Device::Cdrom => Made::image(&disk.path, relabelled),
                Device::Disk => Made::own(&disk.path, disk.base.as_ref(), relabelled),
            },
            config_drive: spec
                .config_drive
                .as_ref()
                .map(|path| Made::own(path, None, relabelled)),
        }
    }

    /// What the disk of this role is made of, if it is one of these.
    fn get(&self, role: &DiskRole) -> Option<&Made> {
        match role {
            DiskRole::Rescue => Some(&self.rescue),
            DiskRole::ConfigDrive => self.config_drive.as_ref(),
            DiskRole::Original { .. } => None,
        }
    }
}

/// What `rescue.xml` is given. The template's header explains each.
#[derive(Debug, Serialize)]
struct Context {
    plan: String,
    mode: Mode,
    attributes: Vec<Attribute>,
    settings: Vec<Part>,
    metadata: OwnXml,
    os: OwnXml,
    leading_devices: Vec<Part>,
    disks: Vec<DiskView>,
    controllers: Vec<Controller>,
    devices: Vec<Part>,
    extensions: Vec<Part>,
}

fn context(
    domain: &Domain,
    spec: &RescueSpec,
    layout: &Layout,
) -> Result<(Context, Vec<PlacedDisk>), TemplateError> {
    let mut settings = Vec::new();
    let mut extensions = Vec::new();
    let mut leading_devices = Vec::new();
    let mut devices = Vec::new();
    let mut originals = Vec::new();
    let mut past_devices = false;
    let mut numbers = domain.disks().iter();
    for node in &domain.root.children {
        match node {
            Node::Element(element) if element.name == "devices" => {
                past_devices = true;
                for node in &element.children {
                    if matches!(node, Node::Element(device) if device.name == "disk") {
                        if let (Node::Element(element), Some(disk)) = (node, numbers.next()) {
                            originals.push(original_disk(disk, element, spec, layout)?);
                        }
                    } else if let Some(part) = device_part(node, layout) {
                        let list = if originals.is_empty() {
                            &mut leading_devices
                        } else {
                            &mut devices
                        };
                        list.push(part);
                    }
                }
            }
            Node::Element(element) if element.name == "metadata" || element.name == "os" => {}
            node => {
                let list = if past_devices {
                    &mut extensions
                } else {
                    &mut settings
                };
                list.extend(part(node));
            }
        }
    }
    let disks = place_disks(spec, layout, originals, &OwnDisks::of(domain, spec));
    let placed = disks.iter().map(DiskView::placed).collect();
    let attributes = domain.root.attributes.iter();
    let context = Context {
        plan: spec.plan.clone(),
        mode: spec.mode,
        attributes: attributes
            .map(|(name, value)| Attribute {
                name: name.clone(),
                value: value.clone(),
            })
            .collect(),
        settings,
        metadata: OwnXml::from(&metadata(domain, spec)),
        os: OwnXml::from(&os(domain, spec)?),
        leading_devices,
        disks,
        controllers: layout.controllers.clone(),
        devices,
        extensions,
    };
    Ok((context, placed))
}

/// All disks in the order they are printed.
fn place_disks(
    spec: &RescueSpec,
    layout: &Layout,
    originals: Vec<DiskView>,
    made: &OwnDisks,
) -> Vec<DiskView> {
    let own = |role, place: &Place, path: &str| DiskView {
        role,
        target: place.target.clone(),
        bus: place.bus.to_string(),
        device: "disk",
        path: Some(path.to_owned()),
        format: Some("raw".to_owned()),
        readonly: false,
        boots: false,
        serial: None,
        usb_controller: place.usb_controller,
        was: None,
        xml: None,
        source: None,
        backing: None,
    };
    let cdrom = spec.rescue_disk.device == Device::Cdrom;
    let rescue = DiskView {
        device: if cdrom { "cdrom" } else { "disk" },
        format: Some(
            if spec.rescue_disk.format == DiskFormat::Raw {
                "raw"
            } else {
                "qcow2"
            }
            .to_owned(),
        ),
        readonly: cdrom,
        boots: true,
        serial: Some(RESCUE_SERIAL.to_owned()),
        source: Some(OwnXml::from(&made.rescue.source)),
        backing: made.rescue.backing.as_ref().map(OwnXml::from),
        ..own("rescue", &layout.rescue, &spec.rescue_disk.path)
    };
    let config_drive = layout
        .config_drive
        .as_ref()
        .zip(spec.config_drive.as_ref())
        .map(|(place, path)| DiskView {
            // Where QEMU cannot make it read-only it is writable: it is this rescue's own file and is thrown away.
            readonly: place.bus.has_readonly_disks(),
            serial: Some(CONFIG_DRIVE_SERIAL.to_owned()),
            source: made
                .config_drive
                .as_ref()
                .map(|made| OwnXml::from(&made.source)),
            ..own("config_drive", place, path)
        });
    let mut disks = originals;
    match spec.mode {
        Mode::Classic => {
            // The root comes right after the rescue disk, then the others in their old order.
            disks.sort_by_key(|view| layout.root.as_ref() != Some(&view.target));
            disks.insert(0, rescue);
        }
        Mode::Stable => disks.push(rescue),
    }
    disks.extend(config_drive);
    disks
}

impl DiskView {
    fn placed(&self) -> PlacedDisk {
        let role = match (self.role, &self.was) {
            (_, Some(was)) => DiskRole::Original { was: was.clone() },
            ("rescue", None) => DiskRole::Rescue,
            _ => DiskRole::ConfigDrive,
        };
        PlacedDisk {
            role,
            target: self.target.clone(),
            bus: self.bus.clone(),
            path: self.path.clone(),
        }
    }
}

fn part(node: &Node) -> Option<Part> {
    let (name, kind) = match node {
        Node::Element(element) => (
            element.name.clone(),
            element.attribute("type").unwrap_or_default().to_owned(),
        ),
        Node::Text(text) if text.trim().is_empty() => return None,
        Node::Text(_) | Node::CData(_) => ("#text".to_owned(), String::new()),
        Node::Comment(_) => ("#comment".to_owned(), String::new()),
        Node::Instruction(_) => ("#instruction".to_owned(), String::new()),
    };
    Some(Part {
        name,
        kind,
        xml: OwnXml::from(node),
    })
}

/// A device other than a disk: as it was, but not bootable.
fn device_part(node: &Node, layout: &Layout) -> Option<Part> {
    match node {
        Node::Element(device)
            if layout.usb_allowed
                && is_usb_controller(device)
                && device.attribute("model") == Some("none") =>
        {
            None
        }
        Node::Element(device) if device.child("boot").is_some() => {
            let mut device = device.clone();
            device.remove_elements(|child| child.name == "boot");
            part(&Node::Element(device))
        }
        node => part(node),
    }
}

/// A disk of the original, moved and protected as asked.
fn original_disk(
    disk: &Disk,
    element: &Element,
    spec: &RescueSpec,
    layout: &Layout,
) -> Result<DiskView, TemplateError> {
    let mut element = element.clone();
    let mut path = disk.path().map(str::to_owned);
    let mut readonly = disk.readonly;
    element.remove_elements(|child| child.name == "boot");
    let target = match layout.moved.get(&disk.target) {
        Some(target) => {
            // A user's own alias (`ua-…`) is no place; qemu:commandline may refer to it.
            let made_by_libvirt = |alias: &Element| {
                !alias
                    .attribute("name")
                    .unwrap_or_default()
                    .starts_with("ua-")
            };
            element.remove_elements(|e| {
                e.name == "address" || (e.name == "alias" && made_by_libvirt(e))
            });
            if let Some(element) = element.child_mut("target") {
                element.set_attribute("dev", target);
                // Written down, as another name may stand for another bus.
                element.set_attribute("bus", &disk.bus);
            }
            target.clone()
        }
        None => disk.target.clone(),
    };
    match spec.protection.get(&disk.target) {
        Some(DiskChange::ReadOnly) => {
            by_readonly(disk, &mut element)?;
            readonly = true;
        }
        Some(DiskChange::Overlay { path: overlay }) => {
            by_overlay(disk, &mut element, overlay)?;
            path = Some(overlay.clone());
        }
        None => {}
    }
    Ok(DiskView {
        role: "original",
        target,
        bus: disk.bus.clone(),
        device: disk.device.as_str(),
        path,
        format: element
            .child("driver")
            .and_then(|driver| driver.attribute("type"))
            .map(str::to_owned),
        readonly,
        boots: false,
        serial: disk.serial.clone(),
        usb_controller: None,
        was: Some(disk.target.clone()),
        xml: Some(OwnXml::from(&element)),
        source: None,
        backing: None,
    })
}

/// The original's metadata with the mark of this rescue in place of any other.
fn metadata(domain: &Domain, spec: &RescueSpec) -> Element {
    let mark = Mark {
        plan: spec.plan.clone(),
        role: Role::Rescue,
        server: domain.uuid(),
    };
    let mut metadata = domain
        .root
        .child("metadata")
        .cloned()
        .unwrap_or_else(|| Element::new("metadata"));
    let outer = metadata.clone();
    metadata.remove_elements(|element| domain.is_mark(&outer, element));
    metadata.append(mark.to_element());
    metadata
}

/// The original's `<os>`, with nothing left that boots the original system.
fn os(domain: &Domain, spec: &RescueSpec) -> Result<Element, TemplateError> {
    let mut os = domain
        .root
        .child("os")
        .cloned()
        .unwrap_or_else(|| Element::new("os"));
    os.remove_elements(|child| {
        matches!(
            child.name.as_str(),
            "boot" | "kernel" | "initrd" | "cmdline" | "shim"
        )
    });
    if let Some(path) = &spec.nvram {
        if domain.firmware() == Firmware::Bios {
            return Err(TemplateError::NvramWithoutUefi);
        }
        match os.child_mut("nvram") {
            Some(nvram) => {
                // `type` announces a <source> child, which the path replaces.
                nvram.attributes.retain(|(name, _)| name != "type");
                nvram.set_text(path);
            }
            None => os.append(Element::new("nvram").with_text(path)),
        }
    }
    Ok(os)
}

/// What is wrong with a disk that a template printed in its own way.
pub(crate) fn made_of_something_else(target: &str) -> String {
    format!(
        "disk `{target}` is missing or made of something else; print its `source` and `backing` as they are"
    )
}

/// Holds what the template rendered against what a rescue domain must be, since an operator may have written it.
fn check_rendering(
    xml: &str,
    original: &Domain,
    spec: &RescueSpec,
    disks: &[PlacedDisk],
) -> Result<(), TemplateError> {
    let unusable = |what: String| TemplateError::Unusable {
        name: TemplateName::Rescue.file_name(),
        what,
    };
    let domain = Domain::parse(xml).map_err(|error| unusable(error.to_string()))?;
    if domain.name() != original.name() || domain.uuid() != original.uuid() {
        return Err(unusable("name or uuid is not the server's".to_owned()));
    }
    let mark = domain.salvor_mark();
    if !mark.is_some_and(|mark| mark.plan == spec.plan && mark.role == Role::Rescue) {
        return Err(unusable(
            "the metadata does not carry this plan's mark".to_owned(),
        ));
    }
    let own = OwnDisks::of(original, spec);
    for placed in disks {
        if let Some(made) = own.get(&placed.role)
            && !domain
                .disk_element(&placed.target)
                .is_some_and(|disk| made.is_in(disk))
        {
            return Err(unusable(made_of_something_else(&placed.target)));
        }
        let right = domain.disk(&placed.target).is_some_and(|disk| {
            let boots = placed.role == DiskRole::Rescue;
            disk.bus == placed.bus
                && disk.path() == placed.path.as_deref()
                && disk.boot_order == boots.then_some(1)
        });
        if !right {
            let target = &placed.target;
            return Err(unusable(format!(
                "disk `{target}` is missing, or its bus, source or boot order is another"
            )));
        }
    }
    let boot_dev = domain
        .root
        .child("os")
        .is_some_and(|os| os.child("boot").is_some());
    let bootable = domain
        .devices()
        .filter(|device| device.child("boot").is_some())
        .count();
    if boot_dev || bootable != 1 {
        return Err(unusable(
            "something else than the rescue disk is bootable".to_owned(),
        ));
    }
    Ok(())
}
