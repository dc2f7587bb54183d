// SPDX-License-Identifier: Apache-2.0
//! Where disks go: target names, buses and the controllers they need.
//!
//! Owns: the rules of the two rescue modes about places. Pure: it reads a domain and answers with a [`Layout`].
//! Does not know: XML of the result, templates, disk contents.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use crate::disk::{Bus, Disk, DiskDevice, target_index, target_name};
use crate::domain::{Domain, MachineFamily};
use crate::spec::{Device, Mode};
use crate::xml::Element;

/// Why a disk has no place.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlaceError {
    /// No virtio CD-ROM exists.
    #[error("a CD-ROM cannot be on the virtio bus; choose sata, ide, scsi or usb")]
    CdromOnVirtio,
    /// The machine type has no such bus.
    #[error("machine type `{machine}` has no {bus} bus; choose virtio, scsi, usb or sata")]
    NoSuchBus {
        /// The bus asked for.
        bus: Bus,
        /// The machine type.
        machine: String,
    },
    /// All places are taken.
    #[error("the {bus} bus of the domain has no free place for another disk; choose another bus")]
    Full {
        /// The bus.
        bus: Bus,
    },
}

/// The place of a disk that we add.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) bus: Bus,
    pub(crate) target: String,
    /// The USB controller it is to be plugged into, where that must be said.
    pub(crate) usb_controller: Option<usize>,
}

/// A controller the domain must get.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Controller {
    #[serde(rename = "type")]
    pub(crate) kind: &'static str,
    pub(crate) index: usize,
    pub(crate) model: &'static str,
    pub(crate) ports: Option<u32>,
}

/// All places of a rescue domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Layout {
    pub(crate) rescue: Place,
    pub(crate) config_drive: Option<Place>,
    /// The root disk's target, its new one if it moves.
    pub(crate) root: Option<String>,
    /// Disks of the original that lose their address: old target → new target (it may be the same).
    pub(crate) moved: BTreeMap<String, String>,
    pub(crate) controllers: Vec<Controller>,
    /// Must `<controller type='usb' model='none'/>` go, because something now needs USB?
    pub(crate) usb_allowed: bool,
}

/// Hands out free target names, one bus place each.
#[derive(Debug, Default)]
pub(crate) struct Places {
    names: BTreeSet<String>,
    units: BTreeSet<(Bus, (usize, usize, usize))>,
}

impl Places {
    /// What is taken in a domain whose disks of `chain` give up their places.
    fn of(domain: &Domain, chain: &[&Disk]) -> Self {
        let mut places = Self::default();
        for (disk, element) in domain
            .disks()
            .iter()
            .zip(domain.devices().filter(|e| e.name == "disk"))
        {
            if !chain.iter().any(|moved| moved.target == disk.target) {
                places.keep(disk, element);
            }
        }
        for hostdev in domain
            .devices()
            .filter(|e| e.name == "hostdev" && e.attribute("type") == Some("scsi"))
        {
            places
                .units
                .extend(drive_address(hostdev).map(|unit| (Bus::Scsi, unit)));
        }
        places
    }

    /// Marks what a disk that stays where it is occupies.
    fn keep(&mut self, disk: &Disk, element: &Element) {
        self.names.insert(disk.target.clone());
        let Some(bus) = disk.known_bus() else { return };
        let unit = drive_address(element)
            .or_else(|| target_index(&disk.target).and_then(|index| bus.unit(index)));
        self.units.extend(unit.map(|unit| (bus, unit)));
    }

    /// The first free number on the bus that is at least `from`, taken.
    fn take_from(&mut self, bus: Bus, from: usize) -> Result<(usize, String), PlaceError> {
        for index in from..bus.capacity() {
            let name = target_name(bus.prefix(), index);
            let unit = bus.unit(index).map(|unit| (bus, unit));
            if self.names.contains(&name) || unit.is_some_and(|unit| self.units.contains(&unit)) {
                continue;
            }
            self.names.insert(name.clone());
            self.units.extend(unit);
            return Ok((index, name));
        }
        Err(PlaceError::Full { bus })
    }

    /// The first free target name on the bus, taken.
    pub(crate) fn take(&mut self, bus: Bus) -> Result<String, PlaceError> {
        self.take_from(bus, 0).map(|(_, name)| name)
    }
}

/// The place an explicit `<address type='drive'>` names.
fn drive_address(element: &Element) -> Option<(usize, usize, usize)> {
    let address = element
        .child("address")
        .filter(|address| address.attribute("type") == Some("drive"))?;
    let part = |name: &str| match address.attribute(name) {
        Some(number) => number.parse().ok(),
        None => Some(0),
    };
    Some((part("controller")?, part("bus")?, part("unit")?))
}

/// Does the machine have this bus? Only i440FX has IDE.
pub(crate) fn check_bus(
    bus: Bus,
    family: MachineFamily,
    machine: Option<&str>,
) -> Result<(), PlaceError> {
    if bus == Bus::Ide && family != MachineFamily::Pc {
        return Err(PlaceError::NoSuchBus {
            bus,
            machine: machine.unwrap_or_default().to_owned(),
        });
    }
    Ok(())
}

/// Decides all places of a rescue domain.
pub(crate) fn lay_out(
    domain: &Domain,
    mode: Mode,
    device: Device,
    wanted: Option<Bus>,
    with_config_drive: bool,
) -> Result<Layout, PlaceError> {
    let root = domain.root_disk();
    let root_bus = root.and_then(Disk::known_bus);
    let bus = choose_bus(domain, mode, device, wanted)?;
    // Only where the rescue disk takes the root's own bus does it push others aside; elsewhere it disturbs nobody.
    let shifted = root.filter(|_| mode == Mode::Classic && root_bus == Some(bus));
    let chain = shifted
        .map(|root| push_order(domain, root))
        .unwrap_or_default();
    let mut places = Places::of(domain, &chain);
    let (target, moved) = push_in(&mut places, bus, &chain)?;
    let root = root.map(|disk| moved.get(&disk.target).unwrap_or(&disk.target).clone());

    let mut usb = Usb::of(domain);
    let rescue = Place {
        bus,
        target,
        usb_controller: usb.plug(bus, true),
    };
    let config_drive = if with_config_drive {
        let (bus, target) = config_drive_place(&mut places, root_bus.unwrap_or(bus), domain)?;
        // A config drive is small: any USB controller is fast enough for it.
        Some(Place {
            bus,
            target,
            usb_controller: usb.plug(bus, false),
        })
    } else {
        None
    };

    let added: Vec<Bus> = [Some(&rescue), config_drive.as_ref()]
        .into_iter()
        .flatten()
        .map(|place| place.bus)
        .collect();
    let mut controllers: Vec<Controller> = usb.added.into_iter().collect();
    if added.contains(&Bus::Scsi) && !has_scsi(domain) {
        controllers.push(Controller {
            kind: "scsi",
            index: 0,
            model: "virtio-scsi",
            ports: None,
        });
    }
    Ok(Layout {
        usb_allowed: added.contains(&Bus::Usb),
        rescue,
        config_drive,
        root,
        moved,
        controllers,
    })
}

/// The rescue disk's bus: the one that is wanted, else what suits the mode and the device.
fn choose_bus(
    domain: &Domain,
    mode: Mode,
    device: Device,
    wanted: Option<Bus>,
) -> Result<Bus, PlaceError> {
    let root_bus = domain.root_disk().and_then(Disk::known_bus);
    let bus = match (device, mode, wanted) {
        (Device::Cdrom, _, Some(Bus::Virtio)) => return Err(PlaceError::CdromOnVirtio),
        (_, _, Some(bus)) => bus,
        (Device::Cdrom, Mode::Classic, None) => root_bus
            .filter(|bus| *bus != Bus::Virtio)
            .unwrap_or_else(|| domain.default_bus(DiskDevice::Cdrom)),
        (Device::Cdrom, Mode::Stable, None) => domain.default_bus(DiskDevice::Cdrom),
        (Device::Disk, Mode::Classic, None) => root_bus.unwrap_or(Bus::Virtio),
        (Device::Disk, Mode::Stable, None) => Bus::Virtio,
    };
    check_bus(bus, domain.machine_family(), domain.machine())?;
    Ok(bus)
}

/// Gives the rescue disk the first place of its bus, and each disk of `chain` one behind the disk before it. Says
/// where the rescue disk is, and who moved whereto.
fn push_in(
    places: &mut Places,
    bus: Bus,
    chain: &[&Disk],
) -> Result<(String, BTreeMap<String, String>), PlaceError> {
    let (mut last, target) = places.take_from(bus, 0)?;
    let mut moved = BTreeMap::new();
    for (number, disk) in chain.iter().enumerate() {
        let own = target_index(&disk.target)
            .filter(|_| number > 0)
            .unwrap_or(0);
        let (index, name) = places.take_from(bus, own.max(last + 1))?;
        moved.insert(disk.target.clone(), name);
        last = index;
    }
    Ok((target, moved))
}

/// The disks on the root's bus in the order they follow the rescue disk: the root, then the others by name.
fn push_order<'a>(domain: &'a Domain, root: &'a Disk) -> Vec<&'a Disk> {
    let mut others: Vec<&Disk> = domain
        .disks()
        .iter()
        .filter(|disk| disk.bus == root.bus && disk.target != root.target)
        .collect();
    others.sort_by_key(|disk| target_index(&disk.target).unwrap_or(usize::MAX));
    std::iter::once(root).chain(others).collect()
}

/// The root's bus suits a config drive best: whatever boots this server can read it. IDE may be full, and then SATA is
/// the nearest thing (libvirt adds an AHCI controller by itself).
fn config_drive_place(
    places: &mut Places,
    bus: Bus,
    domain: &Domain,
) -> Result<(Bus, String), PlaceError> {
    let bus = if check_bus(bus, domain.machine_family(), domain.machine()).is_ok() {
        bus
    } else {
        Bus::Sata
    };
    match places.take(bus) {
        Ok(target) => Ok((bus, target)),
        Err(PlaceError::Full { bus: Bus::Ide }) => Ok((Bus::Sata, places.take(Bus::Sata)?)),
        Err(error) => Err(error),
    }
}

/// Is there a SCSI controller, or will libvirt add one for a disk that is there already?
fn has_scsi(domain: &Domain) -> bool {
    let controller = |e: &Element| e.name == "controller" && e.attribute("type") == Some("scsi");
    domain.devices().any(controller) || domain.disks().iter().any(|disk| disk.bus == "scsi")
}

/// The USB controllers of a domain, and the one we add.
struct Usb {
    /// Index of an xHCI controller with a free port.
    fast: Option<usize>,
    next_index: usize,
    added: Option<Controller>,
    has_disk: bool,
}

impl Usb {
    fn of(domain: &Domain) -> Self {
        let mut fast = None;
        let mut next_index = 0;
        for (number, controller) in domain
            .devices()
            .filter(|e| is_usb_controller(e))
            .enumerate()
        {
            let model = controller.attribute("model");
            if model == Some("none") {
                continue;
            }
            let index = controller
                .attribute("index")
                .and_then(|i| i.parse().ok())
                .unwrap_or(number);
            next_index = next_index.max(index + 1);
            // Four ports is libvirt's default for xHCI.
            let ports = controller
                .attribute("ports")
                .and_then(|p| p.parse().ok())
                .unwrap_or(4_usize);
            let xhci = matches!(model, Some("qemu-xhci" | "nec-xhci"));
            // Two: one for the rescue disk, one for a config drive.
            if fast.is_none() && xhci && used_ports(domain, index) + 2 <= ports {
                fast = Some(index);
            }
        }
        let has_disk = domain.disks().iter().any(|disk| disk.bus == "usb");
        Self {
            fast,
            next_index,
            added: None,
            has_disk,
        }
    }

    /// The controller for a disk on this bus. USB 1.1 and 2.0 controllers are too slow to boot from (20 MB take longer
    /// than 40 s on USB 1.1), so a fast one is added where there is none.
    fn plug(&mut self, bus: Bus, must_be_fast: bool) -> Option<usize> {
        if bus != Bus::Usb || (!must_be_fast && self.has_disk && self.fast.is_none()) {
            return None;
        }
        let index = *self.fast.get_or_insert(self.next_index);
        if index == self.next_index {
            self.added = Some(Controller {
                kind: "usb",
                index,
                model: "qemu-xhci",
                ports: Some(15),
            });
        }
        Some(index)
    }
}

/// Is this element a USB controller?
pub(crate) fn is_usb_controller(element: &Element) -> bool {
    element.name == "controller" && element.attribute("type") == Some("usb")
}

/// How many devices are plugged into a USB controller itself, those behind hubs not counted.
fn used_ports(domain: &Domain, controller: usize) -> usize {
    let controller = controller.to_string();
    domain
        .devices()
        .filter_map(|device| device.child("address"))
        .filter(|address| address.attribute("type") == Some("usb"))
        .filter(|address| address.attribute("bus") == Some(&controller))
        .filter(|address| !address.attribute("port").unwrap_or_default().contains('.'))
        .count()
}
