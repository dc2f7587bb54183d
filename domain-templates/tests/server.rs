// SPDX-License-Identifier: Apache-2.0
//! The domain of a server that Salvor made. Its layout is in the golden files.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use salvor_domain_templates::{
    Bus, DiskFormat, Domain, DomainKind, Firmware, NicSource, NicSpec, PlaceError, Role,
    ServerDisk, ServerFirmware, ServerSpec, TemplateError, Templates, render_server,
};

fn spec() -> ServerSpec {
    ServerSpec {
        uuid: "5d1b4f0e-6f6c-4b0a-9d0e-6f1f1f6f0a21".parse().unwrap(),
        name: "web-1".to_owned(),
        title: "web <1>".to_owned(),
        plan: "plan-1".to_owned(),
        kind: DomainKind::Qemu,
        arch: "x86_64".to_owned(),
        machine: "q35".to_owned(),
        memory_mib: 512,
        vcpus: 2,
        disks: vec![ServerDisk {
            path: "/d/root".to_owned(),
            format: DiskFormat::Qcow2,
            base: None,
            bus: Bus::Virtio,
            serial: None,
        }],
        config_drive: None,
        interfaces: vec![NicSpec {
            mac: "52:54:00:00:00:01".to_owned(),
            source: NicSource::Bridge("br0".to_owned()),
            model: None,
        }],
        console_log: "/d/console.log".to_owned(),
        firmware: ServerFirmware::Uefi {
            nvram: "/d/nvram".to_owned(),
        },
        emulator: None,
    }
}

fn render(spec: &ServerSpec) -> Result<String, TemplateError> {
    render_server(&Templates::builtin().unwrap(), spec)
}

#[test]
fn a_rendered_server_reads_back_as_asked() {
    let spec = spec();
    let xml = render(&spec).unwrap();
    let domain = Domain::parse(&xml).unwrap();
    assert_eq!(domain.name(), "web-1");
    assert!(xml.contains("<title>web &lt;1&gt;</title>"), "{xml}");
    assert_eq!(domain.uuid(), Some(spec.uuid.to_string()));
    assert_eq!(
        (domain.memory_kib(), domain.vcpus()),
        (Some(512 * 1024), Some(2))
    );
    assert!(xml.contains("<log file='/d/console.log'"), "{xml}");
    assert!(domain.has_guest_agent_channel());
    let root = domain.root_disk().unwrap();
    assert_eq!(
        (root.path(), root.format.as_deref(), root.boot_order),
        (Some("/d/root"), Some("qcow2"), Some(1))
    );
    assert_eq!(domain.interfaces()[0].kind, "bridge");
    assert!(
        matches!(domain.firmware(), Firmware::Uefi { nvram: Some(path), .. } if path == "/d/nvram")
    );
    let mark = domain.salvor_mark().unwrap();
    assert_eq!(
        (mark.plan.as_str(), mark.role, mark.server),
        ("plan-1", Role::Server, Some(spec.uuid.to_string()))
    );
}

#[test]
fn text_that_xml_cannot_carry_is_refused_in_every_field() {
    type Change = fn(&mut ServerSpec);
    let changes: [Change; 10] = [
        |spec| spec.name.push('\0'),
        |spec| spec.title.push('\u{1b}'),
        |spec| spec.plan.push('\u{8}'),
        |spec| spec.arch.push('\0'),
        |spec| spec.machine.push('\0'),
        |spec| spec.console_log.push('\0'),
        |spec| spec.config_drive = Some("\0".to_owned()),
        |spec| spec.disks[0].path.push('\u{ffff}'),
        |spec| spec.interfaces[0].mac.push('\0'),
        |spec| {
            spec.firmware = ServerFirmware::Uefi {
                nvram: "\u{1}".to_owned(),
            }
        },
    ];
    for (number, change) in changes.into_iter().enumerate() {
        let mut spec = spec();
        change(&mut spec);
        let refused = render(&spec);
        assert!(
            matches!(refused, Err(TemplateError::Text { .. })),
            "change {number}: {refused:?}"
        );
    }
}

#[test]
fn a_bus_the_machine_does_not_have_is_refused() {
    let mut spec = spec();
    spec.disks[0].bus = Bus::Ide;
    let refused = render(&spec);
    assert!(
        matches!(
            refused,
            Err(TemplateError::Place(PlaceError::NoSuchBus { .. }))
        ),
        "{refused:?}"
    );
}
