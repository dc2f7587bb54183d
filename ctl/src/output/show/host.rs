// SPDX-License-Identifier: Apache-2.0
//! Images, the host and what it has that nobody manages, as text for people.

use salvor_proto::v1;

use super::words::{pairs, power_word, word, words};
use crate::{
    output::table::{Fields, Table},
    units::{from_api, show_age, show_bytes, show_duration, show_time},
};

/// `salvor image list`.
pub(crate) fn images(list: &v1::ListImagesResponse) -> String {
    let mut table = Table::new(&["ID", "NAME", "FORMAT", "SIZE", "DISK SIZE", "USED BY"]);
    for image in &list.images {
        table.row([
            image.id.clone(),
            image.name.clone(),
            word!(ImageFormat, "IMAGE_FORMAT_", image.format).to_lowercase(),
            show_bytes(image.size_bytes),
            show_bytes(image.virtual_size_bytes),
            image.references.to_string(),
        ]);
    }
    table.render()
}

/// `salvor image show`.
pub(crate) fn image(image: &v1::Image) -> String {
    let mut fields = Fields::new();
    fields
        .add("id", &image.id)
        .add("name", &image.name)
        .add(
            "format",
            word!(ImageFormat, "IMAGE_FORMAT_", image.format).to_lowercase(),
        )
        .add("size", show_bytes(image.size_bytes))
        .add("disk size", show_bytes(image.virtual_size_bytes))
        .add("sha256", &image.sha256);
    for pair in pairs(&image.properties) {
        fields.add("property", pair);
    }
    fields
        .add("used by", format!("{} disks", image.references))
        .add("imported", show_time(image.create_time.as_ref()));
    fields.render()
}

/// `salvor host show`.
pub(crate) fn host(host: &v1::Host) -> String {
    let mut fields = Fields::new();
    fields
        .add("host", &host.hostname)
        .add("id", &host.id)
        .add(
            "agent",
            format!(
                "salvord {}, up since {}",
                host.agent_version,
                show_time(host.start_time.as_ref())
            ),
        )
        .add("boot id", &host.boot_id);
    if let Some(link) = &host.libvirt {
        let since = format!(
            "since {} ({})",
            show_time(link.since.as_ref()),
            show_age(link.since.as_ref())
        );
        let state = if link.up {
            format!("up {since}")
        } else {
            format!(
                "DOWN {since}: {}",
                if link.reason.is_empty() {
                    "no reason known"
                } else {
                    &link.reason
                }
            )
        };
        fields.add("libvirt", state).add("libvirt uri", &link.uri);
    }
    fields
        .add("libvirt version", &host.libvirt_version)
        .add(
            "hypervisor",
            words(&["QEMU", &host.hypervisor_version, &host.virt_type]),
        )
        .add(
            "capacity",
            format!(
                "{} CPUs ({}), memory {} MiB",
                host.cpus, host.arch, host.memory_mib
            ),
        )
        .add(
            "disk",
            format!(
                "{} free of {}",
                show_bytes(host.disk_free_bytes),
                show_bytes(host.disk_total_bytes)
            ),
        )
        .add("servers", host.servers.to_string())
        .add(
            "operations",
            format!("{} under way", host.running_operations),
        );
    for call in &host.stuck_calls {
        let age = call
            .age
            .as_ref()
            .and_then(from_api)
            .map(show_duration)
            .unwrap_or_default();
        let about = if call.domain_id.is_empty() {
            String::new()
        } else {
            format!("for {}", call.domain_id)
        };
        fields.add(
            "stuck call",
            words(&[&call.call, &about, &format!("({age})")]),
        );
    }
    if let Some(autostart) = &host.autostart {
        fields.add(
            "after reboot",
            format!(
                "{} started, {} waiting, {} left alone, {} failed",
                autostart.started, autostart.waiting, autostart.left_alone, autostart.failed
            ),
        );
        for note in &autostart.notes {
            let note = format!("{} {}: {}", note.server_id, note.state, note.message);
            fields.add("", note);
        }
    }
    fields.add("revision", host.revision.to_string());
    fields.render()
}

/// `salvor host unmanaged`.
pub(crate) fn unmanaged(list: &v1::ListUnmanagedDomainsResponse) -> String {
    let mut table = Table::new(&["ID", "NAME", "POWER", "CAN BE ADOPTED"]);
    for domain in &list.domains {
        table.row([
            domain.id.clone(),
            domain.name.clone(),
            power_word(domain.power_state),
            if domain.persistent {
                "yes"
            } else {
                "no: transient"
            }
            .to_owned(),
        ]);
    }
    table.render()
}
