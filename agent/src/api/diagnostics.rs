// SPDX-License-Identifier: Apache-2.0
//! GetServerDiagnostics: what was read of a server, as a message. What a guest wrote is cut to size and
//! made printable here.

use salvor_proto::v1;

use super::{
    Api,
    convert::{
        operation::operation,
        server::server,
        states::Wire as _,
        time::{duration, timestamp},
    },
    host::stuck_calls,
    resolve,
    validate::Checked,
};
use crate::{
    core::{
        reason::{Reason, Refusal},
        text,
    },
    diagnose::{Diagnosis, Part, Process, diagnose},
    dispatch::{refused, shown},
    engine::now_ms,
    hypervisor::{Control, Counters, DomainStatus, GuestInfo},
};

/// So many operations are told of.
const OPERATIONS: u32 = 10;

/// The longest text of a guest that is passed on, in characters.
const GUEST_TEXT: usize = 256;

/// The parts that could not be read.
#[derive(Default)]
struct Missing(Vec<v1::MissingPart>);

impl Missing {
    /// The part, if there is one; notes why there is not.
    fn unless<T>(&mut self, name: &str, part: Part<T>) -> Option<T> {
        part.unwrap_or_else(|refusal| {
            self.note(name, &refusal);
            None
        })
    }

    fn note(&mut self, name: &str, refusal: &Refusal) {
        self.0.push(v1::MissingPart {
            part: name.to_owned(),
            reason: refusal.reason.name().to_owned(),
            message: text::message(&refusal.message),
        });
    }
}

fn domain(status: DomainStatus) -> v1::DomainReading {
    v1::DomainReading {
        power_state: status.power.wire(),
        reason: status.reason,
        persistent: status.persistent,
        managed_save: status.managed_save,
    }
}

fn process(process: Process) -> v1::QemuProcess {
    v1::QemuProcess {
        pid: process.pid,
        state: process.state.to_string(),
        uptime: Some(duration(process.uptime)),
        cpu_time: Some(duration(process.cpu_time)),
        resident_kib: process.resident_kib,
    }
}

fn control(control: Control) -> v1::ControlReading {
    v1::ControlReading {
        state: control.state.to_owned(),
        error: control.error.to_owned(),
        since: (control.state != "ok").then(|| duration(control.since)),
    }
}

fn counters(read: Counters) -> v1::GuestCounters {
    let memory = read.memory;
    let seconds = memory.at.and_then(|at| i64::try_from(at).ok());
    v1::GuestCounters {
        cpu_time: Some(duration(read.cpu_time)),
        vcpus: read.vcpus,
        memory: Some(v1::MemoryCounters {
            current_kib: memory.current_kib,
            maximum_kib: memory.maximum_kib,
            available_kib: memory.available_kib,
            unused_kib: memory.unused_kib,
            usable_kib: memory.usable_kib,
            swap_in_kib: memory.swap_in_kib,
            swap_out_kib: memory.swap_out_kib,
            time: seconds.map(|seconds| timestamp(seconds.saturating_mul(1_000))),
        }),
        disks: read
            .disks
            .into_iter()
            .map(|disk| v1::DiskCounters {
                target: disk.target,
                read_requests: disk.read_requests,
                read_bytes: disk.read_bytes,
                write_requests: disk.write_requests,
                write_bytes: disk.write_bytes,
                flush_requests: disk.flush_requests,
                capacity_bytes: disk.capacity_bytes,
                allocation_bytes: disk.allocation_bytes,
            })
            .collect(),
        interfaces: read
            .interfaces
            .into_iter()
            .map(|nic| v1::InterfaceCounters {
                device: nic.device,
                received_bytes: nic.received_bytes,
                received_packets: nic.received_packets,
                receive_errors: nic.receive_errors,
                receive_drops: nic.receive_drops,
                sent_bytes: nic.sent_bytes,
                sent_packets: nic.sent_packets,
                send_errors: nic.send_errors,
                send_drops: nic.send_drops,
            })
            .collect(),
    }
}

/// What a guest said of itself: short, and nothing in it that a terminal obeys.
fn said(by_guest: &str) -> String {
    let short: String = by_guest.chars().take(GUEST_TEXT).collect();
    text::message(&short)
}

fn guest_agent(info: &GuestInfo) -> v1::GuestAgentReading {
    v1::GuestAgentReading {
        version: said(&info.version),
        hostname: said(&info.hostname),
        system: said(&info.system),
        kernel: said(&info.kernel),
    }
}

impl Api {
    /// Everything about a server.
    pub(super) async fn diagnostics(
        &self,
        request: &v1::GetServerDiagnosticsRequest,
    ) -> Checked<v1::GetServerDiagnosticsResponse> {
        let id = resolve::server(&self.store, &request.server)?.id;
        let (read, operations) = tokio::join!(
            diagnose(&*self.hypervisor, id, request.definitions),
            self.store.operations(Some(id), i64::MAX, OPERATIONS),
        );
        let Diagnosis {
            domain: seen,
            process: found,
            control: stands,
            counters: counted,
            disk_errors,
            messages,
            guest_agent: answered,
            live,
            inactive,
        } = read;
        let mut missing = Missing::default();
        let operations = operations.map_err(refused).map(Some);
        let operations = missing.unless("operations", operations).unwrap_or_default();
        let mut stuck = self.hypervisor.stuck_calls();
        stuck.retain(|call| call.domain == Some(id));
        let errors = missing.unless("disk_errors", disk_errors);
        let messages = missing.unless("messages", messages).unwrap_or_default();
        if matches!(&counted, Ok(Some(counters)) if !counters.complete) {
            let message =
                "without what only QEMU knows (disks, memory): something else is being asked of it";
            missing.note("counters", &Refusal::new(Reason::DeadlineExceeded, message));
        }
        // The record as it is now: what was read may have taken seconds.
        let record = resolve::server(&self.store, &id.to_string())?;
        Ok(v1::GetServerDiagnosticsResponse {
            time: Some(timestamp(now_ms())),
            server: Some(server(&record)),
            domain: missing.unless("domain", seen).map(domain),
            process: missing.unless("process", found).map(process),
            control: missing.unless("control", stands).map(control),
            counters: missing.unless("counters", counted).map(counters),
            disk_errors: errors
                .into_iter()
                .flatten()
                .map(|failed| v1::DiskErrorReading {
                    target: failed.disk,
                    error: failed.error.to_owned(),
                })
                .collect(),
            messages: messages
                .iter()
                .map(|message| text::message(message))
                .collect(),
            guest_agent: missing
                .unless("guest_agent", answered)
                .as_ref()
                .map(guest_agent),
            stuck_calls: stuck_calls(&stuck),
            operations: operations
                .iter()
                .map(|(_, record)| operation(record, None, None))
                .collect(),
            live_definition: definition(missing.unless("live_definition", live)),
            inactive_definition: definition(missing.unless("inactive_definition", inactive)),
            missing: missing.0,
        })
    }
}

/// With what is secret in it masked.
fn definition(xml: Option<String>) -> String {
    xml.as_deref().map(shown).unwrap_or_default()
}
