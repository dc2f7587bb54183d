// SPDX-License-Identifier: Apache-2.0
//! Domains to try templates on: `salvord check-templates` renders every template with all of them.
//!
//! Owns: definitions as the usual tools write them, and the matrix of what a template must be able to render.
//! Does not know: the host. A schema check of what comes out is the caller's.

use std::collections::BTreeMap;

use uuid::Uuid;

use crate::disk::Bus;
use crate::domain::{Domain, Firmware};
use crate::image::BaseImage;
use crate::rescue::{TemplateError, render_rescue};
use crate::server::{
    DomainKind, NicSource, NicSpec, ServerDisk, ServerFirmware, ServerSpec, render_server,
};
use crate::spec::{Device, DiskChange, DiskFormat, Mode, RescueDisk, RescueSpec};
use crate::templates::Templates;

/// A definition to be rescued.
#[derive(Debug, Clone, Copy)]
pub struct Original {
    /// Its short name.
    pub name: &'static str,
    /// The definition.
    pub xml: &'static str,
    /// Does libvirt's schema accept it? Not the one that holds elements nobody has invented yet.
    pub in_schema: bool,
}

macro_rules! originals {
    ($($name:literal $in_schema:literal),* $(,)?) => {
        &[$(Original {
            name: $name,
            xml: include_str!(concat!("../fixtures/", $name, ".xml")),
            in_schema: $in_schema,
        }),*]
    };
}

/// Definitions as virt-manager, virt-install, Terraform, Nova and a Proxmox import leave them in libvirt, written by
/// hand, and odd ones.
pub const ORIGINALS: &[Original] = originals![
    "virt-manager" true,
    "virt-install" true,
    "terraform" true,
    "nova" true,
    "proxmox" true,
    "minimal" true,
    "three-disks" true,
    "qemu-namespace" true,
    "tpm-uefi" true,
    "cdrom-boot" true,
    "hostile" true,
    "future" false,
];

/// A text made to break out of wherever it is printed.
const HOSTILE: &str = "/srv/a\"b'c&d</source><devices/>]]>{{ 7 * 7 }}\t\u{e9}";

/// The same for a domain's name, in which libvirt allows no slash.
const HOSTILE_NAME: &str = "a\"b'c&d<devices>]]>{{ 7 * 7 }}\u{e9}";

/// One rendering of the matrix.
#[derive(Debug)]
pub struct Rendering {
    /// What was rendered: template, original, options.
    pub name: String,
    /// The definition, or why the template is of no use.
    pub result: Result<String, TemplateError>,
    /// Does libvirt's schema have to accept it?
    pub in_schema: bool,
}

/// Renders every template with everything it must cope with: modes, buses, devices, firmware, protections, hostile
/// names. A result that is an error means that the template is of no use.
///
/// Combinations that Salvor refuses before any template is asked (a bus the machine does not have, a disk that cannot
/// be protected) are left out.
pub fn matrix(templates: &Templates) -> Vec<Rendering> {
    let mut renderings = Vec::new();
    for original in ORIGINALS {
        for (options, spec) in rescue_specs(original.xml) {
            let result =
                render_rescue(templates, original.xml, &spec).map(|rendering| rendering.xml);
            if !matches!(&result, Err(error) if is_refusal(error)) {
                let name = format!("rescue {} {options}", original.name);
                renderings.push(Rendering {
                    name,
                    result,
                    in_schema: original.in_schema,
                });
            }
        }
    }
    for (options, spec) in server_specs() {
        let result = render_server(templates, &spec);
        renderings.push(Rendering {
            name: format!("server {options}"),
            result,
            in_schema: true,
        });
    }
    renderings
}

fn is_refusal(error: &TemplateError) -> bool {
    matches!(
        error,
        TemplateError::Place(_)
            | TemplateError::ReadOnlyUnsupported { .. }
            | TemplateError::OverlayUnsupported { .. }
    )
}

/// Every rescue worth trying on a definition, with a name for it.
fn rescue_specs(original: &str) -> Vec<(String, RescueSpec)> {
    let domain = Domain::parse(original).ok();
    let uefi = domain
        .as_ref()
        .is_some_and(|domain| domain.firmware() != Firmware::Bios);
    let root = domain
        .as_ref()
        .and_then(Domain::root_disk)
        .map(|disk| disk.target.clone());
    let mut specs = Vec::new();
    for mode in [Mode::Classic, Mode::Stable] {
        let plain = RescueSpec {
            plan: "0b54b5f6-0c35-4f0b-9a52-b3a4b8f3a001".to_owned(),
            mode,
            rescue_disk: RescueDisk {
                path: "/var/lib/salvor/servers/s/rescue/disk".to_owned(),
                format: DiskFormat::Qcow2,
                bus: None,
                device: Device::Disk,
                base: Some(BaseImage {
                    path: "/var/lib/salvor/images/i.raw".to_owned(),
                    format: DiskFormat::Raw,
                }),
            },
            protection: BTreeMap::new(),
            nvram: uefi.then(|| "/var/lib/salvor/servers/s/rescue/nvram.fd".to_owned()),
            config_drive: Some("/var/lib/salvor/servers/s/rescue/config".to_owned()),
        };
        let word = if mode == Mode::Classic {
            "classic"
        } else {
            "stable"
        };
        let mut add = |what: &str, change: &dyn Fn(&mut RescueSpec)| {
            let mut spec = plain.clone();
            change(&mut spec);
            specs.push((format!("{word} {what}"), spec));
        };
        add("plain", &|_| {});
        add("bare", &|spec| {
            (spec.config_drive, spec.nvram) = (None, None)
        });
        add("hostile", &|spec| {
            spec.plan = HOSTILE.to_owned();
            spec.rescue_disk.path = HOSTILE.to_owned();
            if let Some(base) = &mut spec.rescue_disk.base {
                base.path = HOSTILE.to_owned();
            }
            spec.config_drive = Some(HOSTILE.to_owned());
            spec.nvram = uefi.then(|| HOSTILE.to_owned());
        });
        for bus in Bus::ALL {
            add(bus.as_str(), &|spec| spec.rescue_disk.bus = Some(bus));
        }
        for bus in [None, Some(Bus::Scsi), Some(Bus::Usb)] {
            add(
                &format!("cdrom {}", bus.map_or("default", Bus::as_str)),
                &|spec| {
                    spec.rescue_disk.device = Device::Cdrom;
                    spec.rescue_disk.format = DiskFormat::Raw;
                    spec.rescue_disk.base = None;
                    spec.rescue_disk.bus = bus;
                },
            );
        }
        for (what, change) in [
            ("read-only", DiskChange::ReadOnly),
            (
                "overlay",
                DiskChange::Overlay {
                    path: "/var/lib/salvor/servers/s/rescue/overlay".to_owned(),
                },
            ),
        ] {
            add(what, &|spec| {
                spec.protection
                    .extend(root.clone().map(|root| (root, change.clone())))
            });
        }
    }
    specs
}

/// Every sort of server worth trying, with a name for it.
fn server_specs() -> Vec<(String, ServerSpec)> {
    let disk = |path: &str, bus| ServerDisk {
        path: path.to_owned(),
        format: DiskFormat::Qcow2,
        base: Some(BaseImage {
            path: "/var/lib/salvor/images/i.qcow2".to_owned(),
            format: DiskFormat::Qcow2,
        }),
        bus,
        serial: Some("root".to_owned()),
    };
    let nic = |source| NicSpec {
        mac: "52:54:00:12:34:56".to_owned(),
        source,
        model: None,
    };
    let plain = ServerSpec {
        uuid: Uuid::from_u128(0x5d1b_4f0e_6f6c_4b0a_9d0e_6f1f_1f6f_0a20),
        name: "salvor-web".to_owned(),
        title: "web".to_owned(),
        plan: "0b54b5f6-0c35-4f0b-9a52-b3a4b8f3a002".to_owned(),
        kind: DomainKind::Qemu,
        arch: "x86_64".to_owned(),
        machine: "pc".to_owned(),
        memory_mib: 512,
        vcpus: 2,
        disks: vec![disk("/var/lib/salvor/servers/s/disk", Bus::Virtio)],
        config_drive: Some("/var/lib/salvor/servers/s/disk.config".to_owned()),
        interfaces: vec![nic(NicSource::Network("default".to_owned()))],
        console_log: "/var/lib/salvor/servers/s/console.log".to_owned(),
        firmware: ServerFirmware::Bios,
        emulator: None,
    };
    let mut specs = Vec::new();
    let mut add = |what: &str, change: &dyn Fn(&mut ServerSpec)| {
        let mut spec = plain.clone();
        change(&mut spec);
        specs.push((what.to_owned(), spec));
    };
    add("plain", &|_| {});
    add("bare", &|spec| {
        spec.disks.clear();
        spec.config_drive = None;
        spec.interfaces.clear();
        spec.title.clear();
    });
    add("kvm q35 uefi", &|spec| {
        spec.kind = DomainKind::Kvm;
        spec.machine = "q35".to_owned();
        spec.firmware = ServerFirmware::Uefi {
            nvram: "/var/lib/salvor/servers/s/nvram.fd".to_owned(),
        };
        spec.emulator = Some("/usr/bin/qemu-system-x86_64".to_owned());
    });
    add("interfaces", &|spec| {
        spec.interfaces = vec![
            nic(NicSource::Bridge("br0".to_owned())),
            nic(NicSource::User),
            NicSpec {
                model: Some("e1000".to_owned()),
                ..nic(NicSource::Network("lab".to_owned()))
            },
        ];
    });
    for bus in Bus::ALL {
        add(bus.as_str(), &|spec| {
            spec.disks = vec![
                disk("/d/0", bus),
                disk("/d/1", bus),
                disk("/d/2", Bus::Virtio),
            ]
        });
    }
    add("hostile", &|spec| {
        HOSTILE_NAME.clone_into(&mut spec.name);
        for text in [&mut spec.title, &mut spec.plan, &mut spec.console_log] {
            HOSTILE.clone_into(text);
        }
        spec.disks = vec![disk(HOSTILE, Bus::Virtio)];
        spec.config_drive = Some(HOSTILE.to_owned());
    });
    specs
}
