// SPDX-License-Identifier: Apache-2.0
//! What can be seen and heard of a running guest: its serial port, and numbers for whoever looks for
//! what is wrong.

use std::time::Duration;

/// What a serial port says. It is told on a thread of the port's own, which the receiver must not
/// hold up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConsoleSaid<'a> {
    /// The guest wrote this.
    Bytes(&'a [u8]),
    /// The connection with the port has ended, for this reason. Nothing follows.
    Ended(&'a str),
}

/// Where a serial port says it to.
pub type ConsoleSink = Box<dyn FnMut(ConsoleSaid<'_>) + Send>;

/// How libvirt stands with a domain's QEMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Control {
    /// `ok`, `job`, `occupied` or `error`.
    pub state: &'static str,
    /// What kind of error; empty if none.
    pub error: &'static str,
    /// For how long it has been so; zero if ok.
    pub since: Duration,
}

/// Counters of one disk; see the message of the same name in `server_service.proto`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[allow(
    missing_docs,
    reason = "the fields are the message's, which says what they are"
)]
pub struct DiskCounters {
    pub target: String,
    pub read_requests: u64,
    pub read_bytes: u64,
    pub write_requests: u64,
    pub write_bytes: u64,
    pub flush_requests: u64,
    pub capacity_bytes: u64,
    pub allocation_bytes: u64,
}

/// Counters of one interface; see the message of the same name in `server_service.proto`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[allow(
    missing_docs,
    reason = "the fields are the message's, which says what they are"
)]
pub struct InterfaceCounters {
    pub device: String,
    pub received_bytes: u64,
    pub received_packets: u64,
    pub receive_errors: u64,
    pub receive_drops: u64,
    pub sent_bytes: u64,
    pub sent_packets: u64,
    pub send_errors: u64,
    pub send_drops: u64,
}

/// What a guest's balloon driver tells, in KiB; see `MemoryCounters` in `server_service.proto`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[allow(
    missing_docs,
    reason = "the fields are the message's, which says what they are"
)]
pub struct MemoryCounters {
    pub current_kib: Option<u64>,
    pub maximum_kib: Option<u64>,
    pub available_kib: Option<u64>,
    pub unused_kib: Option<u64>,
    pub usable_kib: Option<u64>,
    pub swap_in_kib: Option<u64>,
    pub swap_out_kib: Option<u64>,
    /// When it told this, in seconds since the Unix epoch.
    pub at: Option<u64>,
}

/// Counters of a running guest.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Counters {
    /// CPU time of the guest and of QEMU.
    pub cpu_time: Duration,
    /// CPUs that the guest has now.
    pub vcpus: u32,
    /// Was QEMU asked? If not, because something else was being asked of it, what only it knows is
    /// missing: the counters of disks, and of memory.
    pub complete: bool,
    /// Memory.
    pub memory: MemoryCounters,
    /// Disks, in the definition's order.
    pub disks: Vec<DiskCounters>,
    /// Interfaces, in the definition's order.
    pub interfaces: Vec<InterfaceCounters>,
}

/// What a guest agent says of itself and its system. The guest wrote it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct GuestInfo {
    /// Version of the agent.
    pub version: String,
    /// Host name; empty if the agent does not say.
    pub hostname: String,
    /// The system's name; empty if the agent does not say.
    pub system: String,
    /// The kernel's version; empty if the agent does not say.
    pub kernel: String,
}
