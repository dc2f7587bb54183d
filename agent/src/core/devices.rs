// SPDX-License-Identifier: Apache-2.0
//! What a record shows of a definition's devices.

use salvor_domain_templates::{DiskSource, Domain, Role};

use super::{
    record::{Devices, DiskSummary, NicSummary, ServerRecord},
    state::VmState,
};

/// The devices of a server's own definition; `None` of what cannot be read or is that of a rescue.
#[must_use]
pub fn own_devices(xml: &str) -> Option<Devices> {
    let domain = Domain::parse(xml).ok()?;
    let rescue = domain
        .salvor_mark()
        .is_some_and(|mark| mark.role == Role::Rescue);
    (!rescue).then(|| devices(&domain))
}

/// The devices of a definition.
#[must_use]
pub fn devices(domain: &Domain) -> Devices {
    let root = domain.root_disk().map(|disk| disk.index);
    let disks = domain
        .disks()
        .iter()
        .map(|disk| DiskSummary {
            target: disk.target.clone(),
            bus: disk.bus.clone(),
            device: disk.device.as_str().to_owned(),
            source: source_name(&disk.source),
            format: disk.format.clone().unwrap_or_default(),
            read_only: disk.readonly,
            root: Some(disk.index) == root,
        })
        .collect();
    let nics = domain
        .interfaces()
        .into_iter()
        .map(|nic| NicSummary {
            mac: nic.mac.unwrap_or_default(),
            kind: nic.kind,
            source: nic.source.unwrap_or_default(),
            model: nic.model.unwrap_or_default(),
        })
        .collect();
    Devices {
        disks,
        nics,
        guest_agent: domain.has_guest_agent_channel(),
        flavor: None,
    }
}

fn source_name(source: &DiskSource) -> String {
    match source {
        DiskSource::File(path) | DiskSource::Block(path) => path.clone(),
        DiskSource::Network { protocol, name } => {
            format!("{protocol}:{}", name.as_deref().unwrap_or_default())
        }
        DiskSource::Volume { pool, volume } => format!("{pool}/{volume}"),
        DiskSource::Other(kind) => kind.clone(),
        DiskSource::None => String::new(),
    }
}

/// May the record show what the definition has now? Not while an operation or a rescue makes another
/// definition of it.
#[must_use]
pub fn may_follow(server: &ServerRecord) -> bool {
    server.operation.is_none() && server.rescue.is_none() && server.vm_state != VmState::Rescued
}

/// Is the definition another than the one that is known to be the server's own? Both are as libvirt
/// prints them, so what libvirt adds is in both. Another name is no drift: records follow names. Nor is
/// another order of controllers: libvirt changes it by itself.
#[must_use]
pub fn drifted(known: &str, current: &str) -> bool {
    !salvor_domain_templates::same_definition(known, current)
}
