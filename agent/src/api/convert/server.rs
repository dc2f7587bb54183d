// SPDX-License-Identifier: Apache-2.0
//! Servers as messages.

use std::time::Duration;

use salvor_proto::v1;

use super::{
    states::Wire as _,
    time::{duration, timestamp},
};
use crate::core::{
    record::{DiskSummary, Fault, Lock, NicSummary, RescueRecord, ServerRecord, SoftDeletion},
    state::PowerObservation,
};

/// The name of an operation.
pub(in crate::api) fn operation_name(id: uuid::Uuid) -> String {
    format!("operations/{id}")
}

/// A server. No secret is in the message: not even the hash of a password.
pub(in crate::api) fn server(record: &ServerRecord) -> v1::Server {
    v1::Server {
        id: record.id.to_string(),
        name: record.name.clone(),
        origin: record.origin.wire(),
        domain_name: record.domain_name.clone(),
        status: record.status().name().to_owned(),
        vm_state: record.vm_state.wire(),
        task_state: record
            .task_state
            .map(|task| task.name().to_owned())
            .unwrap_or_default(),
        power: Some(power(&record.power, record.last_known_power.as_ref())),
        image_id: record.image_id.map(|id| id.to_string()).unwrap_or_default(),
        flavor: Some(v1::Flavor {
            vcpus: record.flavor.vcpus,
            memory_mib: record.flavor.memory_mib,
            disk_gib: record.flavor.disk_gib,
        }),
        disks: record.disks.iter().map(disk).collect(),
        interfaces: record.nics.iter().map(interface).collect(),
        rescue: record.rescue.as_ref().map(rescue),
        fault: record.fault.as_ref().map(fault),
        operation: record.operation.map(operation_name).unwrap_or_default(),
        revision: record.revision,
        create_time: Some(timestamp(record.created_at_ms)),
        update_time: Some(timestamp(record.updated_at_ms)),
        metadata: record
            .metadata
            .iter()
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect(),
        hostname: record.hostname.clone(),
        drift_time: record.drift_since_ms.map(timestamp),
        mismatch: record.mismatch.map(|mismatch| v1::Mismatch {
            kind: mismatch.what.name().to_owned(),
            advice: mismatch.what.advice().to_owned(),
            since: Some(timestamp(mismatch.since_ms)),
        }),
        guest_agent: record.agent.map(|seen| v1::GuestAgentObservation {
            connected: seen.connected,
            observe_time: Some(timestamp(seen.at_ms)),
        }),
        project_id: record.owner.project_id.clone(),
        user_id: record.owner.user_id.clone(),
        lock: record.lock.as_ref().map(lock),
        description: record.description.clone().unwrap_or_default(),
        tags: record.tags.clone(),
        access_ipv4: shown(record.access_ipv4),
        access_ipv6: shown(record.access_ipv6),
        shutdown_timeout: record
            .shutdown_timeout_ms
            .map(|ms| duration(Duration::from_millis(ms))),
        autostart: record.autostart,
        autostart_order: record.autostart_order,
        soft_deletion: record.deletion.as_ref().map(deletion),
    }
}

fn shown(address: Option<impl std::fmt::Display>) -> String {
    address
        .map(|address| address.to_string())
        .unwrap_or_default()
}

fn lock(lock: &Lock) -> v1::ServerLock {
    v1::ServerLock {
        locked_by: lock.by.wire(),
        reason: lock.reason.clone().unwrap_or_default(),
        create_time: Some(timestamp(lock.at_ms)),
        expire_time: lock.expires_at_ms.map(timestamp),
    }
}

fn deletion(deletion: &SoftDeletion) -> v1::SoftDeletion {
    v1::SoftDeletion {
        delete_time: Some(timestamp(deletion.at_ms)),
        reclaim_time: Some(timestamp(deletion.reclaim_at_ms)),
        vm_state: deletion.vm_state.wire(),
        power_state: deletion.power.wire(),
    }
}

fn power(seen: &PowerObservation, last_known: Option<&PowerObservation>) -> v1::PowerObservation {
    v1::PowerObservation {
        state: seen.state.wire(),
        reason: seen.reason.clone(),
        observe_time: Some(timestamp(seen.observed_at_ms)),
        source: seen.source.wire(),
        last_known_state: last_known
            .map(|known| known.state.wire())
            .unwrap_or_default(),
        last_known_time: last_known.map(|known| timestamp(known.observed_at_ms)),
    }
}

fn disk(disk: &DiskSummary) -> v1::Disk {
    v1::Disk {
        target: disk.target.clone(),
        bus: disk.bus.clone(),
        device: disk.device.clone(),
        source: disk.source.clone(),
        format: disk.format.clone(),
        read_only: disk.read_only,
        root: disk.root,
    }
}

fn interface(nic: &NicSummary) -> v1::NetworkInterface {
    v1::NetworkInterface {
        mac: nic.mac.clone(),
        kind: nic.kind.clone(),
        source: nic.source.clone(),
        model: nic.model.clone(),
    }
}

fn rescue(rescue: &RescueRecord) -> v1::RescueInfo {
    v1::RescueInfo {
        image_id: rescue.image_id.to_string(),
        mode: rescue.mode.wire(),
        bus: rescue.bus.wire(),
        device: rescue.device.wire(),
        disk_protection: rescue.protection.wire(),
        power_before: rescue.power_before.wire(),
        start_time: Some(timestamp(rescue.started_at_ms)),
        expire_time: rescue.expires_at_ms.map(timestamp),
        admin_pass_delivered: rescue
            .password_delivered
            .iter()
            .map(|way| way.wire())
            .collect(),
        disks: rescue
            .disks
            .iter()
            .map(|disk| v1::RescueDisk {
                target: disk.target.clone(),
                bus: disk.bus.clone(),
                original_target: disk.original_target.clone(),
                role: disk.role.clone(),
                source: disk.source.clone(),
            })
            .collect(),
        commit_started: rescue.commit_started,
    }
}

fn fault(fault: &Fault) -> v1::Fault {
    v1::Fault {
        reason: fault.reason.name().to_owned(),
        message: fault.message.clone(),
        step: fault.step.clone(),
        revert_step: fault.revert_step.clone(),
        left_behind: fault.left_behind.clone(),
        create_time: Some(timestamp(fault.at_ms)),
    }
}

#[cfg(test)]
pub(in crate::api) mod tests {
    use std::collections::BTreeMap;

    use uuid::Uuid;

    use super::*;
    use crate::core::{
        password::CryptHash,
        record::{Flavor, Origin, Owner, Protection, RescueBus, RescueDevice, RescueMode},
        state::{ObservationSource, PowerState, TaskState, VmState},
    };

    /// A record with something in every field.
    pub(in crate::api) fn record() -> ServerRecord {
        let seen = |state, at| PowerObservation {
            state,
            reason: "booted".to_owned(),
            observed_at_ms: at,
            source: ObservationSource::Poll,
        };
        ServerRecord {
            id: Uuid::from_u128(1),
            name: "web".to_owned(),
            origin: Origin::Created,
            domain_name: "salvor-1".to_owned(),
            vm_state: VmState::Rescued,
            task_state: Some(TaskState::Unrescuing),
            power: seen(PowerState::Unknown, 2_000),
            last_known_power: Some(seen(PowerState::Running, 1_000)),
            image_id: Some(Uuid::from_u128(2)),
            flavor: Flavor {
                vcpus: 2,
                memory_mib: 512,
                disk_gib: 10,
            },
            disks: vec![DiskSummary {
                target: "vda".to_owned(),
                bus: "virtio".to_owned(),
                device: "disk".to_owned(),
                source: "/d".to_owned(),
                format: "qcow2".to_owned(),
                read_only: true,
                root: true,
            }],
            nics: vec![NicSummary {
                mac: "52:54:00:00:00:01".to_owned(),
                kind: "network".to_owned(),
                source: "default".to_owned(),
                model: "virtio".to_owned(),
            }],
            rescue: Some(RescueRecord {
                plan: Uuid::from_u128(3),
                image_id: Uuid::from_u128(4),
                mode: RescueMode::Stable,
                bus: RescueBus::Usb,
                device: RescueDevice::Cdrom,
                protection: Protection::Overlay,
                power_before: PowerState::Running,
                started_at_ms: 5_000,
                expires_at_ms: Some(6_000),
                expiry_overlay: None,
                disks: Vec::new(),
                overlays: Vec::new(),
                commit_started: true,
                password_delivered: Vec::new(),
                password_for_agent: Some(CryptHash("$6$secret".to_owned())),
                password_user: "root".to_owned(),
                password_refusals: 0,
            }),
            fault: None,
            operation_verb: Some(crate::core::action::Verb::Unrescue),
            guest_agent: true,
            operation: Some(Uuid::from_u128(5)),
            revision: 9,
            created_at_ms: 1,
            settled_at_ms: 0,
            updated_at_ms: 2,
            metadata: BTreeMap::from([("k".to_owned(), "v".to_owned())]),
            hostname: "web".to_owned(),
            public_keys: BTreeMap::new(),
            mismatch: None,
            owner: Owner::default(),
            lock: None,
            description: None,
            tags: Vec::new(),
            access_ipv4: None,
            access_ipv6: None,
            shutdown_timeout_ms: None,
            autostart: true,
            autostart_order: None,
            deletion: None,
            drift_since_ms: None,
            agent: None,
        }
    }

    #[test]
    fn a_server_says_what_is_seen_and_what_was_seen_last() {
        let shown = server(&record());
        let power = shown.power.unwrap_or_default();
        assert_eq!(power.state, i32::from(v1::PowerState::Unknown));
        assert_eq!(power.last_known_state, i32::from(v1::PowerState::Running));
        assert_eq!(power.last_known_time.map(|time| time.seconds), Some(1));
        assert_eq!(shown.status, "RESCUE");
        assert_eq!(shown.task_state, "unrescuing");
        assert_eq!(
            shown.operation,
            "operations/00000000-0000-0000-0000-000000000005"
        );
        assert!(shown.rescue.is_some_and(|rescue| rescue.commit_started));
    }

    #[test]
    fn no_hash_of_a_password_leaves_the_agent() {
        assert!(!format!("{:?}", server(&record())).contains("secret"));
    }
}
