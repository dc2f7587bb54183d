// SPDX-License-Identifier: Apache-2.0
//! What the tests share: building definitions and requests, and comparing documents.
// Each test file uses its own part of this.
#![allow(dead_code)]
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeMap;

use salvor_domain_templates::xml::{Element, Node};
use salvor_domain_templates::{
    Bus, Device, DiskChange, DiskFormat, DiskRole, Mode, RescueDisk, RescueRendering, RescueSpec,
    TemplateError, Templates, render_rescue,
};

/// Every element, comment and instruction of a document on a line of its own: where it is, what it is, its attributes
/// and its own text. Disks and interfaces are told apart by what no rescue changes.
pub(crate) fn lines(xml: &str) -> Vec<String> {
    let root = Element::parse(xml).expect("XML");
    let mut lines = Vec::new();
    collect("", &root, &mut lines);
    lines
}

fn collect(path: &str, element: &Element, lines: &mut Vec<String>) {
    let mut line = format!("{path}/{}", element.name);
    for (name, value) in &element.attributes {
        line.push_str(&format!(" {name}={value:?}"));
    }
    let text = element.text();
    if !text.is_empty() {
        line.push_str(&format!(" {text:?}"));
    }
    lines.push(line);
    let path = format!("{path}/{}{}", element.name, label(element));
    for node in &element.children {
        match node {
            Node::Element(child) => collect(&path, child, lines),
            Node::Comment(_) | Node::Instruction(_) => lines.push(format!("{path}/ {node}")),
            Node::Text(_) | Node::CData(_) => {}
        }
    }
}

fn label(element: &Element) -> String {
    let source = element.child("source").filter(|_| element.name == "disk");
    let mac = element.child("mac").filter(|_| element.name == "interface");
    source
        .and_then(|source| {
            ["file", "dev", "name", "volume"]
                .iter()
                .find_map(|name| source.attribute(name))
        })
        .or_else(|| mac.and_then(|mac| mac.attribute("address")))
        .map(|label| format!("[{label}]"))
        .unwrap_or_default()
}

/// (lines only in the first, lines only in the second), each as often as it is there more often.
pub(crate) fn difference(before: &[String], after: &[String]) -> (Vec<String>, Vec<String>) {
    let mut counts: BTreeMap<&str, i64> = BTreeMap::new();
    for line in after {
        *counts.entry(line).or_default() += 1;
    }
    let mut gone = Vec::new();
    for line in before {
        let count = counts.entry(line).or_default();
        *count -= 1;
        if *count < 0 {
            gone.push(line.clone());
        }
    }
    let mut came = Vec::new();
    for line in after.iter().rev() {
        let count = counts.entry(line).or_default();
        if *count > 0 {
            *count -= 1;
            came.push(line.clone());
        }
    }
    came.reverse();
    (gone, came)
}

pub(crate) fn spec(mode: Mode) -> RescueSpec {
    RescueSpec {
        plan: "plan-1".to_owned(),
        mode,
        rescue_disk: RescueDisk {
            path: "/srv/rescue/disk".to_owned(),
            format: DiskFormat::Qcow2,
            bus: None,
            device: Device::Disk,
            base: None,
        },
        protection: BTreeMap::new(),
        nvram: None,
        config_drive: None,
    }
}

pub(crate) fn on(mode: Mode, bus: Bus) -> RescueSpec {
    let mut spec = spec(mode);
    spec.rescue_disk.bus = Some(bus);
    spec
}

pub(crate) fn with_config_drive(mut spec: RescueSpec) -> RescueSpec {
    spec.config_drive = Some("/srv/rescue/config".to_owned());
    spec
}

pub(crate) fn protecting(mode: Mode, target: &str, change: DiskChange) -> RescueSpec {
    let mut spec = spec(mode);
    spec.protection.insert(target.to_owned(), change);
    spec
}

pub(crate) fn overlay() -> DiskChange {
    DiskChange::Overlay {
        path: "/srv/rescue/overlay".to_owned(),
    }
}

/// A domain around these parts of `<os>` and `<devices>`.
pub(crate) fn domain(machine: &str, os: &str, devices: &str) -> String {
    format!(
        "<domain type='qemu'><name>d</name><uuid>8a8d2c5c-5c0b-4e0e-9f5e-0a5a3c1f0001</uuid><memory>131072</memory>\
         <os><type arch='x86_64' machine='{machine}'>hvm</type>{os}</os><devices>{devices}</devices></domain>"
    )
}

pub(crate) fn disk(target: &str, bus: &str, more: &str) -> String {
    format!(
        "<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/d/{target}'/>\
         <target dev='{target}' bus='{bus}'/>{more}</disk>"
    )
}

pub(crate) fn cdrom(target: &str, bus: &str) -> String {
    format!(
        "<disk type='file' device='cdrom'><source file='/d/{target}.iso'/><target dev='{target}' bus='{bus}'/></disk>"
    )
}

pub(crate) fn render(xml: &str, spec: &RescueSpec) -> Result<RescueRendering, TemplateError> {
    render_rescue(&Templates::builtin().unwrap(), xml, spec)
}

/// `role:target/bus` of every disk, for short comparisons.
pub(crate) fn places(rendering: &RescueRendering) -> Vec<String> {
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
