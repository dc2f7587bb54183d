// SPDX-License-Identifier: Apache-2.0
//! The rules of a rescue domain, one by one.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::collections::BTreeMap;

use salvor_domain_templates::{
    Bus, Device, DiskChange, DiskFormat, DiskRole, Domain, Firmware, LayoutError, Mode, PlaceError, RescueDisk,
    RescueRendering, RescueSpec, Role, TemplateError, Templates, TemplatesError, render_rescue,
};

fn spec(mode: Mode) -> RescueSpec {
    RescueSpec {
        plan: "plan-1".to_owned(),
        mode,
        rescue_disk: RescueDisk {
            path: "/srv/rescue/disk".to_owned(),
            format: DiskFormat::Qcow2,
            bus: None,
            device: Device::Disk,
        },
        protection: BTreeMap::new(),
        nvram: None,
        config_drive: None,
    }
}

fn on(mode: Mode, bus: Bus) -> RescueSpec {
    let mut spec = spec(mode);
    spec.rescue_disk.bus = Some(bus);
    spec
}

fn with_config_drive(mut spec: RescueSpec) -> RescueSpec {
    spec.config_drive = Some("/srv/rescue/config".to_owned());
    spec
}

fn protecting(mode: Mode, target: &str, change: DiskChange) -> RescueSpec {
    let mut spec = spec(mode);
    spec.protection.insert(target.to_owned(), change);
    spec
}

fn overlay() -> DiskChange {
    DiskChange::Overlay {
        path: "/srv/rescue/overlay".to_owned(),
    }
}

/// A domain around these parts of `<os>` and `<devices>`.
fn domain(machine: &str, os: &str, devices: &str) -> String {
    format!(
        "<domain type='qemu'><name>d</name><uuid>8a8d2c5c-5c0b-4e0e-9f5e-0a5a3c1f0001</uuid><memory>131072</memory>\
         <os><type arch='x86_64' machine='{machine}'>hvm</type>{os}</os><devices>{devices}</devices></domain>"
    )
}

fn disk(target: &str, bus: &str, more: &str) -> String {
    format!(
        "<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/d/{target}'/>\
         <target dev='{target}' bus='{bus}'/>{more}</disk>"
    )
}

fn cdrom(target: &str, bus: &str) -> String {
    format!(
        "<disk type='file' device='cdrom'><source file='/d/{target}.iso'/><target dev='{target}' bus='{bus}'/></disk>"
    )
}

fn render(xml: &str, spec: &RescueSpec) -> Result<RescueRendering, TemplateError> {
    render_rescue(&Templates::builtin().unwrap(), xml, spec)
}

/// `role:target/bus` of every disk, for short comparisons.
fn places(rendering: &RescueRendering) -> Vec<String> {
    let place = |disk: &salvor_domain_templates::PlacedDisk| {
        let role = match &disk.role {
            DiskRole::Rescue => "rescue",
            DiskRole::Original { was } => was,
            DiskRole::ConfigDrive => "config",
        };
        format!("{role}:{}/{}", disk.target, disk.bus)
    };
    rendering.disks.iter().map(place).collect()
}

#[test]
fn classic_puts_the_rescue_disk_first_and_the_root_second() {
    let devices = [
        disk("vda", "virtio", ""),
        disk("vdb", "virtio", ""),
        disk("vdd", "virtio", ""),
    ]
    .concat();
    let rendering = render(
        &domain("pc", "<boot dev='hd'/>", &devices),
        &with_config_drive(spec(Mode::Classic)),
    )
    .unwrap();
    assert_eq!(
        places(&rendering),
        [
            "rescue:vda/virtio",
            "vda:vdb/virtio",
            "vdb:vdc/virtio",
            "vdd:vdd/virtio",
            "config:vde/virtio"
        ]
    );
}
