// SPDX-License-Identifier: Apache-2.0
//! Reading a libvirt domain: the few facts Salvor needs, over the tree that keeps all the rest.
//!
//! Owns: what the elements of `<domain>` mean to us, and libvirt's defaults where an element leaves something out.
//! Does not know: rescue, templates, files.

use crate::disk::{Bus, Disk, DiskDevice, bus_from_target, target_index};
use crate::xml::{Element, XmlError};

/// The namespace of Salvor's mark in a domain's metadata.
pub const MARK_NAMESPACE: &str = "https://salvor.example/xmlns/domain/1";

/// Why a text is not a domain we can work with.
#[derive(Debug, thiserror::Error)]
pub enum DomainError {
    /// Not XML we read.
    #[error("the domain definition cannot be read")]
    Xml(#[from] XmlError),
    /// Some other document.
    #[error("the document is a `{root}`, not a `domain`")]
    NotADomain {
        /// Name of its root element.
        root: String,
    },
    /// `<name>` is missing or empty.
    #[error("the domain has no name")]
    NoName,
    /// A disk without `<target dev=…>`.
    #[error("disk number {number} of the domain has no target device name")]
    DiskWithoutTarget {
        /// Counted from 1, in document order.
        number: usize,
    },
    /// Two disks with one name.
    #[error("the domain has two disks named `{target}`")]
    DuplicateTarget {
        /// The name.
        target: String,
    },
}

/// A network interface, as far as we look at it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// What it connects to: `network`, `bridge`, `user`, `direct` …
    pub kind: String,
    /// Its MAC address; libvirt makes one up where it is missing.
    pub mac: Option<String>,
    /// Its device model, for example `virtio`.
    pub model: Option<String>,
    /// The network, bridge or device it connects to, if it names one.
    pub source: Option<String>,
}

/// What the guest starts from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Firmware {
    /// SeaBIOS, or whatever the machine type brings.
    Bios,
    /// UEFI.
    Uefi {
        /// The file with the guest's own variables. `None`: not named (libvirt picks one at the first start), not a
        /// local file, or a firmware that keeps none.
        nvram: Option<String>,
        /// The file that libvirt fills a missing variables file from.
        template: Option<String>,
        /// Does libvirt choose the loader (`<os firmware='efi'>`)?
        auto_selected: bool,
    },
}

/// What a domain that Salvor defined says about itself, in its metadata.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mark {
    /// The id of the plan that wrote the definition.
    pub plan: String,
    /// What the definition is for.
    pub role: Role,
    /// The server's id, if written.
    pub server: Option<String>,
}

/// What a definition of a server's domain is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// The server itself.
    Server,
    /// The rescue of a server.
    Rescue,
}

impl Role {
    /// As it is written in the metadata.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Server => "server",
            Self::Rescue => "rescue",
        }
    }
}

impl Mark {
    /// The element that carries this mark inside `<metadata>`.
    pub(crate) fn to_element(&self) -> Element {
        let mut mark = Element::new("salvor:salvor").with("xmlns:salvor", MARK_NAMESPACE);
        let server = self.server.as_deref();
        for (name, text) in [
            ("plan", Some(self.plan.as_str())),
            ("role", Some(self.role.as_str())),
            ("server", server),
        ] {
            if let Some(text) = text {
                mark.append(Element::new(&format!("salvor:{name}")).with_text(text));
            }
        }
        mark
    }
}

/// The sort of machine, as far as it decides which disk buses there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MachineFamily {
    /// i440FX: PCI, IDE built in.
    Pc,
    /// Q35: PCI Express, SATA built in, no IDE.
    Q35,
    /// Anything else.
    Other,
}

impl MachineFamily {
    /// From architecture and machine type. A missing machine type means libvirt's default: i440FX on x86.
    pub(crate) fn of(arch: Option<&str>, machine: Option<&str>) -> Self {
        let x86 = matches!(arch, None | Some("x86_64" | "i686"));
        match machine {
            None if x86 => Self::Pc,
            Some(machine) if machine == "q35" || machine.starts_with("pc-q35-") => Self::Q35,
            // `pc-1.2` and the like are old i440FX types.
            Some(machine) if machine == "pc" || machine.starts_with("pc-") => Self::Pc,
            _ => Self::Other,
        }
    }
}

/// A domain definition that was read.
#[derive(Debug, Clone)]
pub struct Domain {
    pub(crate) root: Element,
    name: String,
    disks: Vec<Disk>,
}

impl Domain {
    /// Reads a domain definition, as `virsh dumpxml --inactive` prints it or as somebody wrote it.
    ///
    /// # Errors
    /// [`DomainError`]: it is not a domain, or one that libvirt would not take either.
    pub fn parse(xml: &str) -> Result<Self, DomainError> {
        let root = Element::parse(xml)?;
        if root.name != "domain" {
            return Err(DomainError::NotADomain { root: root.name });
        }
        let name = root
            .child("name")
            .map(Element::text)
            .filter(|name| !name.is_empty());
        let name = name.ok_or(DomainError::NoName)?;
        let mut disks: Vec<Disk> = Vec::new();
        for (index, element) in devices_of(&root).filter(|e| e.name == "disk").enumerate() {
            let disk = Disk::read(element, index)
                .ok_or(DomainError::DiskWithoutTarget { number: index + 1 })?;
            if disks.iter().any(|other| other.target == disk.target) {
                return Err(DomainError::DuplicateTarget {
                    target: disk.target,
                });
            }
            disks.push(disk);
        }
        Ok(Self { root, name, disks })
    }

    /// The domain's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The domain's uuid as written; libvirt always prints one.
    pub fn uuid(&self) -> Option<String> {
        self.text_at(&["uuid"])
    }

    /// The guest's architecture, for example `x86_64`, if written.
    pub fn arch(&self) -> Option<&str> {
        self.os_type()?.attribute("arch")
    }

    /// The machine type, for example `pc-q35-7.2`, if written.
    pub fn machine(&self) -> Option<&str> {
        self.os_type()?.attribute("machine")
    }

    /// The sort of machine.
    pub fn machine_family(&self) -> MachineFamily {
        MachineFamily::of(self.arch(), self.machine())
    }

    /// Maximum memory in KiB; `None` if it is missing or not a number libvirt reads.
    pub fn memory_kib(&self) -> Option<u64> {
        let memory = self.root.child("memory")?;
        let value: u64 = memory.text().parse().ok()?;
        let bytes_per_unit: u64 = match memory.attribute("unit").unwrap_or("KiB") {
            "b" | "bytes" => 1,
            "KB" => 1_000,
            "k" | "KiB" => 1 << 10,
            "MB" => 1_000_000,
            "M" | "MiB" => 1 << 20,
            "GB" => 1_000_000_000,
            "G" | "GiB" => 1 << 30,
            "TB" => 1_000_000_000_000,
            "T" | "TiB" => 1 << 40,
            _ => return None,
        };
        // libvirt rounds up to whole KiB too.
        Some(value.checked_mul(bytes_per_unit)?.div_ceil(1024))
    }

    /// Maximum number of virtual CPUs; 1 if it is not written.
    pub fn vcpus(&self) -> Option<u32> {
        match self.text_at(&["vcpu"]) {
            Some(text) => text.parse().ok(),
            None => Some(1),
        }
    }

    /// All disks, CD-ROMs and floppies, in document order.
    pub fn disks(&self) -> &[Disk] {
        &self.disks
    }

    /// The disk with this target device name.
    pub fn disk(&self, target: &str) -> Option<&Disk> {
        self.disks.iter().find(|disk| disk.target == target)
    }

    /// The disk the domain boots from as a rule: the one that holds the system.
    ///
    /// Only disks and LUNs count; a CD-ROM or a floppy is never the system, even where it boots first.
    /// The one with the lowest `<boot order>` wins. Without any, it is what libvirt takes for `<boot dev='hd'>`: the
    /// lowest target name on the bus of the first disk.
    pub fn root_disk(&self) -> Option<&Disk> {
        let disks = || {
            self.disks
                .iter()
                .filter(|disk| matches!(disk.device, DiskDevice::Disk | DiskDevice::Lun))
        };
        let ordered = disks()
            .filter_map(|disk| Some((disk.boot_order?, disk)))
            .min_by_key(|(order, _)| *order);
        if let Some((_, disk)) = ordered {
            return Some(disk);
        }
        let first = disks().next()?;
        disks()
            .filter(|disk| disk.bus == first.bus)
            .min_by_key(|disk| target_index(&disk.target).unwrap_or(usize::MAX))
    }

    /// All network interfaces, in document order.
    pub fn interfaces(&self) -> Vec<Interface> {
        let attribute = |element: &Element, child: &str, name: &str| {
            element
                .child(child)
                .and_then(|c| c.attribute(name))
                .map(str::to_owned)
        };
        devices_of(&self.root)
            .filter(|device| device.name == "interface")
            .map(|device| Interface {
                kind: device.attribute("type").unwrap_or_default().to_owned(),
                mac: attribute(device, "mac", "address"),
                model: attribute(device, "model", "type"),
                source: ["network", "bridge", "dev"]
                    .into_iter()
                    .find_map(|name| attribute(device, "source", name)),
            })
            .collect()
    }

    /// What the guest can write to besides its disks: host devices, shared folders and NVDIMMs, each in words.
    pub fn other_storage(&self) -> Vec<String> {
        devices_of(&self.root)
            .filter(|device| device.child("readonly").is_none())
            .filter_map(|device| {
                let source = device.child("source");
                let kind = match device.name.as_str() {
                    "hostdev" => device.attribute("type").unwrap_or("device"),
                    "filesystem" => device
                        .child("target")
                        .and_then(|target| target.attribute("dir"))
                        .unwrap_or_default(),
                    "memory" if device.attribute("model") == Some("nvdimm") => "nvdimm",
                    _ => return None,
                };
                let at: Vec<String> = source
                    .into_iter()
                    .flat_map(|source| std::iter::once(source).chain(source.elements()))
                    .flat_map(|element| {
                        let attributes = element.attributes.iter();
                        let told = attributes.map(|(name, value)| format!("{name}={value}"));
                        let text = Some(element.text())
                            .filter(|text| element.name == "path" && !text.is_empty());
                        told.chain(text)
                    })
                    .collect();
                Some(format!("{} {kind} ({})", device.name, at.join(" ")))
            })
            .collect()
    }

    /// What the guest starts from.
    pub fn firmware(&self) -> Firmware {
        let Some(os) = self.root.child("os") else {
            return Firmware::Bios;
        };
        let auto_selected = os.attribute("firmware") == Some("efi");
        let flash = os
            .child("loader")
            .is_some_and(|loader| loader.attribute("type") == Some("pflash"));
        if !auto_selected && !flash {
            return Firmware::Bios;
        }
        let nvram = os.child("nvram");
        let path = nvram.and_then(|nvram| match nvram.child("source") {
            Some(source) => source.attribute("file").map(str::to_owned),
            None => Some(nvram.text()).filter(|text| !text.is_empty()),
        });
        let template = nvram
            .and_then(|nvram| nvram.attribute("template"))
            .map(str::to_owned);
        Firmware::Uefi {
            nvram: path,
            template,
            auto_selected,
        }
    }

    /// Has it a TPM?
    pub fn has_tpm(&self) -> bool {
        devices_of(&self.root).any(|device| device.name == "tpm")
    }

    /// Is there a channel for the QEMU guest agent?
    pub fn has_guest_agent_channel(&self) -> bool {
        devices_of(&self.root)
            .filter(|device| device.name == "channel")
            .filter_map(|channel| channel.child("target"))
            .any(|target| {
                target.attribute("type") == Some("virtio")
                    && target.attribute("name") == Some("org.qemu.guest_agent.0")
            })
    }

    /// Is a guest agent connected to its channel? Only a running domain says so.
    pub fn guest_agent_connected(&self) -> Option<bool> {
        devices_of(&self.root)
            .filter(|device| device.name == "channel")
            .filter_map(|channel| channel.child("target"))
            .find(|target| target.attribute("name") == Some("org.qemu.guest_agent.0"))
            .and_then(|target| match target.attribute("state") {
                Some("connected") => Some(true),
                Some("disconnected") => Some(false),
                _ => None,
            })
    }

    /// Salvor's mark, if the domain carries one. Found by its namespace, whatever the prefix.
    pub fn salvor_mark(&self) -> Option<Mark> {
        let metadata = self.root.child("metadata")?;
        let mark = metadata
            .elements()
            .find(|element| self.is_mark(metadata, element))?;
        let prefix = mark.name.strip_suffix("salvor")?;
        let text = |name: &str| {
            mark.child(&format!("{prefix}{name}"))
                .map(Element::text)
                .filter(|text| !text.is_empty())
        };
        let role = match text("role")?.as_str() {
            "server" => Role::Server,
            "rescue" => Role::Rescue,
            _ => return None,
        };
        Some(Mark {
            plan: text("plan")?,
            role,
            server: text("server"),
        })
    }

    /// Is this child of `<metadata>` Salvor's mark?
    pub(crate) fn is_mark(&self, metadata: &Element, element: &Element) -> bool {
        let (prefix, local) = element.name.split_once(':').unwrap_or(("", &element.name));
        let declaration = if prefix.is_empty() {
            "xmlns".to_owned()
        } else {
            format!("xmlns:{prefix}")
        };
        let namespace = [element, metadata, &self.root]
            .iter()
            .find_map(|e| e.attribute(&declaration));
        local == "salvor" && namespace == Some(MARK_NAMESPACE)
    }

    /// Every device element, in document order.
    pub(crate) fn devices(&self) -> impl Iterator<Item = &Element> {
        devices_of(&self.root)
    }

    /// The bus disks of this domain would use if nobody said otherwise, for a device of this sort.
    pub fn default_bus(&self, device: DiskDevice) -> Bus {
        match (device, self.machine_family()) {
            (DiskDevice::Cdrom, MachineFamily::Q35) => Bus::Sata,
            (DiskDevice::Cdrom, MachineFamily::Pc) => Bus::Ide,
            (DiskDevice::Cdrom, MachineFamily::Other) => Bus::Scsi,
            _ => Bus::Virtio,
        }
    }

    /// The owner (`user:group`) that QEMU runs as and that libvirt is told to give no file to, if the domain says both.
    pub fn keeps_files_from(&self) -> Option<String> {
        crate::image::left_alone_for(&self.root)
    }

    /// The element of the disk with this target name.
    pub(crate) fn disk_element(&self, target: &str) -> Option<&Element> {
        self.devices().find(|device| {
            let name = device.child("target").and_then(|t| t.attribute("dev"));
            device.name == "disk" && name == Some(target)
        })
    }

    fn os_type(&self) -> Option<&Element> {
        self.root.child("os")?.child("type")
    }

    fn text_at(&self, path: &[&str]) -> Option<String> {
        let mut element = &self.root;
        for name in path {
            element = element.child(name)?;
        }
        Some(element.text()).filter(|text| !text.is_empty())
    }
}

fn devices_of(root: &Element) -> impl Iterator<Item = &Element> {
    // libvirt's schema allows one <devices>; its parser reads them all.
    root.elements_named("devices").flat_map(Element::elements)
}

impl Disk {
    /// Reads a `<disk>`; `None` without a target name.
    fn read(element: &Element, index: usize) -> Option<Self> {
        let target_element = element.child("target")?;
        let target = target_element
            .attribute("dev")
            .filter(|dev| !dev.is_empty())?
            .to_owned();
        let device = DiskDevice::from_attribute(element.attribute("device"));
        let bus = match target_element.attribute("bus") {
            Some(bus) => bus.to_owned(),
            None => bus_from_target(&target, device).to_owned(),
        };
        Some(Self {
            index,
            bus,
            device,
            source: crate::disk::read_source(element),
            format: element
                .child("driver")
                .and_then(|d| d.attribute("type"))
                .map(str::to_owned),
            readonly: element.child("readonly").is_some() || device == DiskDevice::Cdrom,
            shareable: element.child("shareable").is_some(),
            boot_order: element
                .child("boot")
                .and_then(|b| b.attribute("order")?.parse().ok()),
            serial: element
                .child("serial")
                .map(Element::text)
                .filter(|text| !text.is_empty()),
            optional: element
                .child("source")
                .is_some_and(|source| source.attribute("startupPolicy") == Some("optional")),
            target,
        })
    }
}
