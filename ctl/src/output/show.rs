// SPDX-License-Identifier: Apache-2.0
//! The API's messages as text for people. Cells are cleaned by [`super::table`].

use salvor_proto::{
    google::longrunning::{Operation, operation::Result as Outcome},
    v1,
};

mod host;
mod words;

pub(crate) use self::host::{host, image, images, unmanaged};
pub(crate) use self::words::{deliveries, operation_word, power_word, step_word};
use self::words::{pairs, power_cell, power_line, word, words};
use super::table::{Fields, Table};
use crate::units::{between, from_api, show_age, show_bytes, show_duration, show_time};

/// The boots in a console log.
pub(crate) fn boots(log: &v1::GetConsoleLogResponse) -> String {
    let mut table = Table::new(&["BOOT", "STARTED", "GUEST", "SIZE"]);
    for boot in &log.boots {
        let guest = if boot.rescue { "rescue" } else { "server" };
        table.row([
            boot.number.to_string(),
            show_time(boot.start_time.as_ref()),
            guest.to_owned(),
            show_bytes(u64::try_from(boot.size).unwrap_or(0)),
        ]);
    }
    table.render()
}

/// `salvor server list`.
pub(crate) fn servers(list: &v1::ListServersResponse) -> String {
    let mut table = Table::new(&["ID", "NAME", "STATUS", "TASK", "POWER", "SEEN"]);
    for server in &list.servers {
        let power = server.power.as_ref();
        table.row([
            server.id.clone(),
            server.name.clone(),
            server.status.clone(),
            server.task_state.clone(),
            power_cell(power),
            match power.filter(|power| power.state == i32::from(v1::PowerState::Unknown)) {
                Some(power) => show_age(power.last_known_time.as_ref()),
                None => show_age(power.and_then(|power| power.observe_time.as_ref())),
            },
        ]);
    }
    table.render()
}

/// `salvor server show`.
pub(crate) fn server(server: &v1::Server) -> String {
    let mut fields = Fields::new();
    fields
        .add("id", &server.id)
        .add("name", &server.name)
        .add("status", &server.status)
        .add("task", &server.task_state)
        .add("operation", &server.operation)
        .add("vm state", word!(VmState, "VM_STATE_", server.vm_state))
        .add(
            "power",
            server.power.as_ref().map(power_line).unwrap_or_default(),
        );
    if let Some(mismatch) = &server.mismatch {
        fields.add(
            "mismatch",
            format!(
                "{} since {}: {}",
                mismatch.kind.replace('-', " "),
                show_time(mismatch.since.as_ref()),
                mismatch.advice
            ),
        );
    }
    if let Some(agent) = &server.guest_agent {
        let word = if agent.connected {
            "connected"
        } else {
            "not connected"
        };
        fields.add("guest agent", word);
    }
    if let Some(since) = &server.drift_time {
        fields.add(
            "drift",
            format!(
                "the definition was changed past the agent, since {} at the latest (salvor server drift {})",
                show_time(Some(since)),
                server.id
            ),
        );
    }
    fields
        .add(
            "origin",
            word!(ServerOrigin, "SERVER_ORIGIN_", server.origin).to_lowercase(),
        )
        .add("domain", &server.domain_name)
        .add("image", &server.image_id)
        .add("host name", &server.hostname);
    record_fields(&mut fields, server);
    hardware_fields(&mut fields, server);
    if let Some(rescue) = &server.rescue {
        rescue_fields(&mut fields, rescue);
    }
    if let Some(fault) = &server.fault {
        fault_fields(&mut fields, fault);
    }
    for pair in pairs(&server.metadata) {
        fields.add("metadata", pair);
    }
    fields
        .add("revision", server.revision.to_string())
        .add("created", show_time(server.create_time.as_ref()))
        .add("changed", show_time(server.update_time.as_ref()));
    fields.render()
}

/// What people say of a server.
fn record_fields(fields: &mut Fields, server: &v1::Server) {
    let timeout = server.shutdown_timeout.as_ref().and_then(from_api);
    let autostart = match (server.autostart, server.autostart_order) {
        (false, _) => String::new(),
        (true, None) => "yes".to_owned(),
        (true, Some(order)) => format!("yes, place {order}"),
    };
    fields
        .add("description", &server.description)
        .add("project", &server.project_id)
        .add("user", &server.user_id)
        .add("tags", server.tags.join(", "))
        .add(
            "address",
            words(&[&server.access_ipv4, &server.access_ipv6]),
        )
        .add(
            "shutdown time",
            timeout.map(show_duration).unwrap_or_default(),
        )
        .add("autostart", autostart);
    if let Some(lock) = &server.lock {
        let by = word!(LockOwner, "LOCK_OWNER_", lock.locked_by).to_lowercase();
        let until = match &lock.expire_time {
            Some(time) => format!(", until {}", show_time(Some(time))),
            None => String::new(),
        };
        let since = show_time(lock.create_time.as_ref());
        fields
            .add("locked", format!("by {by}, since {since}{until}"))
            .add("locked because", &lock.reason);
    }
    if let Some(deletion) = &server.soft_deletion {
        fields
            .add("deleted", show_time(deletion.delete_time.as_ref()))
            .add(
                "removed at",
                format!(
                    "{} (restore it before)",
                    show_time(deletion.reclaim_time.as_ref())
                ),
            )
            .add(
                "comes back",
                words(&[
                    &word!(VmState, "VM_STATE_", deletion.vm_state),
                    &power_word(deletion.power_state),
                ]),
            );
    }
}

/// What the host shows of a server, on its own.
pub(crate) fn host_report(report: &v1::HostReport) -> String {
    let mut fields = Fields::new();
    report_fields(&mut fields, report);
    fields.render()
}

/// What the host shows of a server whose state was reset.
fn report_fields(fields: &mut Fields, report: &v1::HostReport) {
    let reason = match report.power_reason.as_str() {
        "" => String::new(),
        reason => format!("({reason})"),
    };
    let definition = match (report.defined, report.rescue_domain) {
        (true, true) => "there, a rescue's",
        (true, false) => "there",
        (false, _) if report.unknown.is_empty() => "not there",
        (false, _) => "",
    };
    fields
        .add(
            "host shows",
            words(&[&power_word(report.power_state), &reason]),
        )
        .add("definition", definition);
    if report.saved_memory {
        fields.add("saved memory", "waits for the next start");
    }
    for disk in &report.missing_disks {
        fields.add("missing disk", words(&[&disk.target, &disk.source]));
    }
    fields.add("not known", &report.unknown);
}

/// Size, disks and interfaces.
fn hardware_fields(fields: &mut Fields, server: &v1::Server) {
    if let Some(flavor) = &server.flavor {
        let disk = match flavor.disk_gib {
            0 => String::new(),
            disk => format!(", disk {disk} GiB"),
        };
        fields.add(
            "size",
            format!(
                "vcpus {}, memory {} MiB{disk}",
                flavor.vcpus, flavor.memory_mib
            ),
        );
    }
    for disk in &server.disks {
        let source = if disk.source.is_empty() {
            "no medium"
        } else {
            &disk.source
        };
        let marks = words(&[
            if disk.root { "root" } else { "" },
            if disk.read_only { "read-only" } else { "" },
        ]);
        fields.add(
            "disk",
            words(&[
                &disk.target,
                &disk.bus,
                &disk.device,
                source,
                &disk.format,
                &marks,
            ]),
        );
    }
    for interface in &server.interfaces {
        fields.add(
            "interface",
            words(&[
                &interface.mac,
                &interface.kind,
                &interface.source,
                &interface.model,
            ]),
        );
    }
}

fn fault_fields(fields: &mut Fields, fault: &v1::Fault) {
    fields
        .add("fault", format!("{}: {}", fault.reason, fault.message))
        .add("fault at", show_time(fault.create_time.as_ref()))
        .add("fault in step", &fault.step)
        .add("not taken back", &fault.revert_step);
    for left in &fault.left_behind {
        fields.add("left behind", left);
    }
}

fn rescue_fields(fields: &mut Fields, rescue: &v1::RescueInfo) {
    let lower = |word: String| word.to_lowercase().replace('_', "-");
    fields
        .add("rescue image", &rescue.image_id)
        .add(
            "rescue",
            words(&[
                &lower(word!(RescueMode, "RESCUE_MODE_", rescue.mode)),
                &lower(word!(RescueBus, "RESCUE_BUS_", rescue.bus)),
                &lower(word!(RescueDevice, "RESCUE_DEVICE_", rescue.device)),
            ]),
        )
        .add(
            "rescue disks",
            lower(word!(
                DiskProtection,
                "DISK_PROTECTION_",
                rescue.disk_protection
            )),
        )
        .add("rescued at", show_time(rescue.start_time.as_ref()))
        .add(
            "rescued until",
            match &rescue.expire_time {
                Some(time) => format!("{} (unrescues by itself)", show_time(Some(time))),
                None => "unrescued by hand".to_owned(),
            },
        )
        .add("power before", power_word(rescue.power_before))
        .add("password by", deliveries(&rescue.admin_pass_delivered));
    if rescue.commit_started {
        fields.add(
            "overlays",
            "a commit has begun and failed; only --overlay commit is possible",
        );
    }
    for disk in &rescue.disks {
        let origin = match disk.original_target.as_str() {
            "" => String::new(),
            target => format!("(original {target})"),
        };
        fields.add(
            "rescue disk",
            words(&[&disk.target, &disk.bus, &disk.role, &origin, &disk.source]),
        );
    }
}

/// The metadata of an operation on a server; default if it has none.
pub(crate) fn metadata(operation: &Operation) -> v1::OperationMetadata {
    operation
        .metadata
        .as_ref()
        .and_then(|any| any.to_msg().ok())
        .unwrap_or_default()
}

/// The result of an operation on a server that ended as asked.
pub(crate) fn action_result(operation: &Operation) -> Option<v1::ActionResult> {
    match operation.result.as_ref()? {
        Outcome::Response(any) => any.to_msg().ok(),
        Outcome::Error(_) => None,
    }
}

/// `salvor operation list`.
pub(crate) fn operations(
    list: &salvor_proto::google::longrunning::ListOperationsResponse,
) -> String {
    let mut table = Table::new(&[
        "OPERATION",
        "ACTION",
        "SERVER",
        "STATE",
        "STEPS",
        "BEGAN",
        "TOOK",
        "FOR",
        "ERROR",
    ]);
    for operation in &list.operations {
        let metadata = metadata(operation);
        let done = i32::from(v1::StepState::Done);
        table.row([
            operation.name.clone(),
            metadata.action,
            metadata.server_id,
            operation_word(metadata.state),
            format!(
                "{}/{}",
                metadata
                    .steps
                    .iter()
                    .filter(|step| step.state == done)
                    .count(),
                metadata.steps.len()
            ),
            show_time(metadata.create_time.as_ref()),
            between(metadata.create_time.as_ref(), metadata.end_time.as_ref())
                .map(show_duration)
                .unwrap_or_default(),
            for_whom(&metadata.user_id, &metadata.project_id),
            match &operation.result {
                Some(Outcome::Error(error)) => error.message.clone(),
                _ => String::new(),
            },
        ]);
    }
    table.render()
}

/// A user and a project, as far as they are known.
fn for_whom(user: &str, project: &str) -> String {
    match (user, project) {
        (user, "") => user.to_owned(),
        ("", project) => format!("project {project}"),
        (user, project) => format!("{user} of {project}"),
    }
}

/// `salvor operation show`.
pub(crate) fn operation(operation: &Operation) -> String {
    let metadata = metadata(operation);
    let mut fields = Fields::new();
    fields
        .add("operation", &operation.name)
        .add("action", &metadata.action)
        .add(
            "Nova's name",
            Some(&metadata.instance_action)
                .filter(|name| **name != metadata.action)
                .cloned()
                .unwrap_or_default(),
        )
        .add("Nova's event", &metadata.instance_event)
        .add("server", &metadata.server_id)
        .add("state", operation_word(metadata.state))
        .add("request id", &metadata.request_id)
        .add("asked by", &metadata.caller)
        .add(
            "asked for",
            for_whom(&metadata.user_id, &metadata.project_id),
        )
        .add("began", show_time(metadata.create_time.as_ref()));
    if metadata.end_time.is_some() {
        fields.add("ended", show_time(metadata.end_time.as_ref()));
    }
    if metadata.cancel_requested {
        fields.add("cancel", "asked for");
    }
    if metadata.recoveries > 0 {
        fields.add("agent restarts", metadata.recoveries.to_string());
    }
    for warning in &metadata.warnings {
        fields.add("warning", format!("{}: {}", warning.name, warning.message));
    }
    if let Some(Outcome::Error(error)) = &operation.result {
        fields.add("error", &error.message);
    }
    let mut text = fields.render();
    if !metadata.steps.is_empty() {
        text.push('\n');
        let mut table = Table::new(&["#", "PHASE", "STEP", "STATE", "TOOK", "WHAT"]);
        for (number, step) in (1_usize..).zip(&metadata.steps) {
            let state = match step.progress_percent {
                Some(percent) if step.state == i32::from(v1::StepState::Running) => {
                    format!("{} {percent}%", step_word(step.state))
                }
                _ => step_word(step.state),
            };
            let what = match step.message.as_str() {
                "" => step.description.clone(),
                message => format!("{}: {message}", step.description),
            };
            table.row([
                number.to_string(),
                step.phase.clone(),
                step.kind.clone(),
                state,
                between(step.start_time.as_ref(), step.end_time.as_ref())
                    .map(show_duration)
                    .unwrap_or_default(),
                what,
            ]);
        }
        text.push_str(&table.render());
    }
    text
}

/// What an action that ended as asked has led to. `verb` stands for servers that are gone.
pub(crate) fn outcome(operation: &Operation) -> String {
    let metadata = metadata(operation);
    let Some(result) = action_result(operation) else {
        return format!("{}\n", super::text::clean(&operation.name));
    };
    let mut fields = Fields::new();
    match &result.server {
        Some(server) => {
            fields
                .add("server", format!("{} ({})", server.name, server.id))
                .add("status", &server.status)
                .add(
                    "power",
                    server.power.as_ref().map(power_line).unwrap_or_default(),
                );
            if let Some(rescue) = &server.rescue {
                rescue_fields(&mut fields, rescue);
            }
        }
        None => {
            fields.add("server", &metadata.server_id).add(
                "status",
                match metadata.action.as_str() {
                    "release" => "released",
                    _ => "deleted",
                },
            );
        }
    }
    if let Some(report) = &result.host {
        report_fields(&mut fields, report);
    }
    fields.add(
        "guest",
        match v1::GuestStop::try_from(result.guest_stop) {
            Ok(v1::GuestStop::WasOff) => "was off already",
            Ok(v1::GuestStop::ByItself) => "shut down by itself",
            Ok(v1::GuestStop::Forced) => "did not shut down in time and was ended",
            _ => "",
        },
    );
    fields.render()
}
