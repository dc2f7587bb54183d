// SPDX-License-Identifier: Apache-2.0
//! What is read of running guests for people who look for what is wrong. Most of it asks the guest's
//! QEMU or its agent, and hangs if they do: it has threads of its own, few of them.

use std::time::Duration;

use serde_json::Value;
use virt::connect::Connect;
use virt::domain::Domain;
use virt::stream::Stream;
use virt::sys;

use super::errors::{Failure, agent_failure};
use super::ffi::{self, Stat};
use super::words;
use crate::hypervisor::{
    Control, Counters, DiskCounters, DiskError, GuestInfo, HypervisorError, InterfaceCounters,
    MemoryCounters,
};

/// The largest picture that is taken: 8K, three bytes for each pixel.
const LARGEST_PICTURE: usize = 96 << 20;

/// What an agent says is looked at up to this length.
const LARGEST_ANSWER: usize = 64 << 10;

/// Disks with errors that are told of.
const DISKS: usize = 256;

/// `virDomainScreenshot` of the first screen.
pub(super) fn screenshot(connect: &Connect, domain: &Domain) -> Result<Vec<u8>, Failure> {
    let stream = Stream::new(connect, 0)?;
    domain.screenshot(&stream, 0, 0)?;
    let mut picture = Vec::new();
    let mut piece = vec![0; 256 << 10];
    loop {
        #[allow(
            clippy::disallowed_methods,
            reason = "this thread may block, and negative numbers are looked for"
        )]
        let length = stream.recv(&mut piece)?;
        match usize::try_from(length) {
            Ok(0) => break,
            Ok(length) => picture.extend_from_slice(piece.get(..length).unwrap_or_default()),
            Err(_) => {}
        }
        if picture.len() > LARGEST_PICTURE {
            let _ = stream.abort();
            return Err(Failure::Said(HypervisorError::Refused {
                call: "virDomainScreenshot",
                message: format!("the picture is larger than {} MiB", LARGEST_PICTURE >> 20),
            }));
        }
    }
    stream.finish()?;
    Ok(picture)
}

/// `virDomainGetControlInfo`.
pub(super) fn control(domain: &Domain) -> Result<Control, Failure> {
    let raw = ffi::control_info(domain)?;
    Ok(Control {
        state: match raw.state {
            sys::VIR_DOMAIN_CONTROL_OK => "ok",
            sys::VIR_DOMAIN_CONTROL_JOB => "job",
            sys::VIR_DOMAIN_CONTROL_OCCUPIED => "occupied",
            _ => "error",
        },
        error: match raw.details {
            sys::VIR_DOMAIN_CONTROL_ERROR_REASON_NONE => "",
            sys::VIR_DOMAIN_CONTROL_ERROR_REASON_MONITOR => "monitor",
            sys::VIR_DOMAIN_CONTROL_ERROR_REASON_INTERNAL => "internal",
            _ => "unknown",
        },
        since: Duration::from_millis(raw.since_ms),
    })
}

/// `virDomainListGetStats` of one domain. What cannot be had at once, because something else is being
/// asked, is left out.
pub(super) fn counters(domain: &Domain) -> Result<Counters, Failure> {
    let stats = ffi::domain_stats(domain)?;
    let number = |name: &str| match stats.get(name) {
        Some(Stat::Number(number)) => Some(*number),
        _ => None,
    };
    let text = |name: &str| match stats.get(name) {
        Some(Stat::Text(text)) => text.clone(),
        _ => String::new(),
    };
    let disks = (0..number("block.count").unwrap_or(0)).map(|at| {
        let of = |name: &str| number(&format!("block.{at}.{name}")).unwrap_or(0);
        DiskCounters {
            target: text(&format!("block.{at}.name")),
            read_requests: of("rd.reqs"),
            read_bytes: of("rd.bytes"),
            write_requests: of("wr.reqs"),
            write_bytes: of("wr.bytes"),
            flush_requests: of("fl.reqs"),
            capacity_bytes: of("capacity"),
            allocation_bytes: of("allocation"),
        }
    });
    let interfaces = (0..number("net.count").unwrap_or(0)).map(|at| {
        let of = |name: &str| number(&format!("net.{at}.{name}")).unwrap_or(0);
        InterfaceCounters {
            device: text(&format!("net.{at}.name")),
            received_bytes: of("rx.bytes"),
            received_packets: of("rx.pkts"),
            receive_errors: of("rx.errs"),
            receive_drops: of("rx.drop"),
            sent_bytes: of("tx.bytes"),
            sent_packets: of("tx.pkts"),
            send_errors: of("tx.errs"),
            send_drops: of("tx.drop"),
        }
    });
    let disk_count = number("block.count").unwrap_or(0);
    let told = (0..disk_count).any(|at| number(&format!("block.{at}.rd.reqs")).is_some());
    let balloon = |name: &str| number(&format!("balloon.{name}"));
    Ok(Counters {
        cpu_time: Duration::from_nanos(number("cpu.time").unwrap_or(0)),
        vcpus: u32::try_from(number("vcpu.current").unwrap_or(0)).unwrap_or(u32::MAX),
        complete: disk_count == 0 || told,
        memory: MemoryCounters {
            current_kib: balloon("current"),
            maximum_kib: balloon("maximum"),
            available_kib: balloon("available"),
            unused_kib: balloon("unused"),
            usable_kib: balloon("usable"),
            swap_in_kib: balloon("swap_in"),
            swap_out_kib: balloon("swap_out"),
            // 0 from a driver that has told nothing yet.
            at: balloon("last-update").filter(|at| *at > 0),
        },
        disks: disks.collect(),
        interfaces: interfaces.collect(),
    })
}

/// `virDomainGetDiskErrors`.
pub(super) fn disk_errors(domain: &Domain) -> Result<Vec<DiskError>, Failure> {
    let errors = ffi::disk_errors(domain, DISKS)?.into_iter();
    let failed = errors
        .filter(|(_, error)| u32::try_from(*error).ok() != Some(sys::VIR_DOMAIN_DISK_ERROR_NONE));
    let told = failed.map(|(disk, error)| DiskError {
        disk,
        error: words::disk_error(error),
    });
    Ok(told.collect())
}

/// What the guest agent says, in up to three answers. Only the first must come: older agents do not
/// know the others.
pub(super) fn guest_info(domain: &Domain, seconds: i32) -> Result<GuestInfo, Failure> {
    let ask = |command: &str| -> Result<Value, Failure> {
        let command = format!(r#"{{"execute":"{command}"}}"#);
        let answer = domain
            .qemu_agent_command(&command, seconds, 0)
            .map_err(agent_failure)?;
        if answer.len() > LARGEST_ANSWER {
            return Ok(Value::Null);
        }
        Ok(serde_json::from_str(&answer).unwrap_or_default())
    };
    let text = |answer: &Value, name: &str| {
        let said = answer.get("return").and_then(|it| it.get(name));
        said.and_then(Value::as_str).unwrap_or_default().to_owned()
    };
    let version = text(&ask("guest-info")?, "version");
    let mut info = GuestInfo {
        version,
        ..GuestInfo::default()
    };
    if let Ok(answer) = ask("guest-get-host-name") {
        info.hostname = text(&answer, "host-name");
    }
    if let Ok(answer) = ask("guest-get-osinfo") {
        info.system = text(&answer, "pretty-name");
        info.kernel = text(&answer, "kernel-release");
    }
    Ok(info)
}
