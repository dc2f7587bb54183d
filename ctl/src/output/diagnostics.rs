// SPDX-License-Identifier: Apache-2.0
//! Diagnostics as text.

use prost_types::Duration;
use salvor_proto::v1;

use super::{
    show::{self, metadata, operation_word, power_word},
    table::{Fields, Table},
};
use crate::units::{from_api, show_bytes, show_duration, show_time};

fn span(duration: Option<&Duration>) -> String {
    let duration = duration.and_then(from_api);
    duration.map(show_duration).unwrap_or_default()
}

fn kib(size: Option<u64>) -> String {
    size.map(|kib| show_bytes(kib.saturating_mul(1024)))
        .unwrap_or_default()
}

/// Everything that was read: the server, then its guest, then what could not be read.
pub(crate) fn text(read: &v1::GetServerDiagnosticsResponse) -> String {
    let mut text = read.server.as_ref().map(show::server).unwrap_or_default();
    text.push('\n');
    text.push_str(&guest(read));
    if let Some(counters) = &read.counters {
        text.push_str(&tables(counters));
    }
    if !read.operations.is_empty() {
        let mut table = Table::new(&["OPERATION", "ACTION", "STATE"]);
        for operation in &read.operations {
            let metadata = metadata(operation);
            let state = operation_word(metadata.state);
            table.row([operation.name.clone(), metadata.action, state]);
        }
        text.push('\n');
        text.push_str(&table.render());
    }
    if !read.missing.is_empty() {
        let mut table = Table::new(&["NOT READ", "REASON", "MESSAGE"]);
        for missing in &read.missing {
            table.row([
                missing.part.clone(),
                missing.reason.clone(),
                missing.message.clone(),
            ]);
        }
        text.push('\n');
        text.push_str(&table.render());
    }
    text
}

fn guest(read: &v1::GetServerDiagnosticsResponse) -> String {
    let mut fields = Fields::new();
    fields.add("read at", show_time(read.time.as_ref()));
    if let Some(domain) = &read.domain {
        let mut seen = format!("{} ({})", power_word(domain.power_state), domain.reason);
        if domain.managed_save {
            seen.push_str(", with saved memory");
        }
        if !domain.persistent {
            seen.push_str(", without a definition that outlives it");
        }
        fields.add("libvirt says", seen);
    }
    if let Some(process) = &read.process {
        let state = match process.state.as_str() {
            "R" => "running",
            "S" => "sleeping",
            "D" => "waits for a device",
            "T" | "t" => "stopped: frozen",
            "Z" | "X" => "ended",
            other => other,
        };
        fields
            .add("QEMU", format!("process {}, {state}", process.pid))
            .add("uptime", span(process.uptime.as_ref()))
            .add("CPU time", span(process.cpu_time.as_ref()))
            .add("resident memory", kib(Some(process.resident_kib)));
    }
    if let Some(control) = &read.control {
        let mut told = control.state.clone();
        if !control.error.is_empty() {
            told.push_str(&format!(" ({})", control.error));
        }
        if let Some(since) = &control.since {
            told.push_str(&format!(" for {}", span(Some(since))));
        }
        fields.add("control", told);
    }
    if let Some(memory) = read.counters.as_ref().and_then(|it| it.memory.as_ref()) {
        fields
            .add("memory", kib(memory.current_kib))
            .add("memory at most", kib(memory.maximum_kib))
            .add("memory unused", kib(memory.unused_kib))
            .add("memory usable", kib(memory.usable_kib))
            .add("swapped in", kib(memory.swap_in_kib))
            .add("swapped out", kib(memory.swap_out_kib));
    }
    for error in &read.disk_errors {
        fields.add("disk error", format!("{}: {}", error.target, error.error));
    }
    for message in &read.messages {
        fields.add("libvirt's word", message.clone());
    }
    if let Some(agent) = &read.guest_agent {
        fields
            .add("guest agent", agent.version.clone())
            .add("guest's host name", agent.hostname.clone())
            .add("guest's system", agent.system.clone())
            .add("guest's kernel", agent.kernel.clone());
    }
    for call in &read.stuck_calls {
        let stuck = format!("{} for {}", call.call, span(call.age.as_ref()));
        fields.add("stuck call", stuck);
    }
    fields.render()
}

fn tables(counters: &v1::GuestCounters) -> String {
    let mut text = String::new();
    if !counters.disks.is_empty() {
        let header = [
            "DISK", "READS", "READ", "WRITES", "WRITTEN", "FLUSHES", "SIZE", "HELD",
        ];
        let mut table = Table::new(&header);
        for disk in &counters.disks {
            table.row([
                disk.target.clone(),
                disk.read_requests.to_string(),
                show_bytes(disk.read_bytes),
                disk.write_requests.to_string(),
                show_bytes(disk.write_bytes),
                disk.flush_requests.to_string(),
                show_bytes(disk.capacity_bytes),
                show_bytes(disk.allocation_bytes),
            ]);
        }
        text.push('\n');
        text.push_str(&table.render());
    }
    if !counters.interfaces.is_empty() {
        let header = [
            "INTERFACE",
            "RECEIVED",
            "PACKETS",
            "ERRORS",
            "DROPPED",
            "SENT",
            "PACKETS",
            "ERRORS",
            "DROPPED",
        ];
        let mut table = Table::new(&header);
        for nic in &counters.interfaces {
            table.row([
                nic.device.clone(),
                show_bytes(nic.received_bytes),
                nic.received_packets.to_string(),
                nic.receive_errors.to_string(),
                nic.receive_drops.to_string(),
                show_bytes(nic.sent_bytes),
                nic.sent_packets.to_string(),
                nic.send_errors.to_string(),
                nic.send_drops.to_string(),
            ]);
        }
        text.push('\n');
        text.push_str(&table.render());
    }
    text
}
