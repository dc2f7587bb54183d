// SPDX-License-Identifier: Apache-2.0
//! Messages that tests have in common.

use prost_types::{Any, Timestamp};
use salvor_proto::{
    google::{
        longrunning::{Operation, operation::Result as Outcome},
        rpc,
    },
    v1,
};

pub const ID: &str = "5b4c0f5e-0a53-4c0e-9d0a-6a1c3f1f2b11";
pub const OPERATION: &str = "operations/7d9b2c1a-55aa-4d1e-8d7f-0b6f0a9c3e42";

/// A time that does not move.
pub fn at(seconds: i64) -> Option<Timestamp> {
    Some(Timestamp {
        seconds: 1_700_000_000 + seconds,
        nanos: 0,
    })
}

pub fn server(name: &str) -> v1::Server {
    v1::Server {
        id: ID.into(),
        name: name.into(),
        status: "ACTIVE".into(),
        vm_state: v1::VmState::Active.into(),
        domain_name: format!("dom-{name}"),
        origin: v1::ServerOrigin::Adopted.into(),
        power: Some(v1::PowerObservation {
            state: v1::PowerState::Running.into(),
            reason: "booted".into(),
            source: v1::ObservationSource::Event.into(),
            ..Default::default()
        }),
        flavor: Some(v1::Flavor {
            vcpus: 2,
            memory_mib: 512,
            disk_gib: 10,
        }),
        disks: vec![v1::Disk {
            target: "vda".into(),
            bus: "virtio".into(),
            device: "disk".into(),
            source: "/srv/a b.qcow2".into(),
            format: "qcow2".into(),
            root: true,
            ..Default::default()
        }],
        create_time: at(0),
        update_time: at(60),
        revision: 7,
        ..Default::default()
    }
}

pub fn step(kind: &str, state: v1::StepState) -> v1::OperationStep {
    v1::OperationStep {
        kind: kind.into(),
        phase: "prepare".into(),
        description: format!("do {kind}"),
        state: state.into(),
        start_time: at(1),
        end_time: at(3),
        ..Default::default()
    }
}

/// An operation with two steps.
pub fn operation(
    state: v1::OperationState,
    first: v1::StepState,
    second: v1::StepState,
) -> Operation {
    let metadata = v1::OperationMetadata {
        server_id: ID.into(),
        action: "rescue".into(),
        state: state.into(),
        steps: vec![step("CreateOverlay", first), step("PowerOff", second)],
        create_time: at(0),
        ..Default::default()
    };
    Operation {
        name: OPERATION.into(),
        metadata: Some(Any::from_msg(&metadata).unwrap()),
        ..Default::default()
    }
}

pub fn running() -> Operation {
    use v1::StepState::{Pending, Running};
    operation(v1::OperationState::Running, Running, Pending)
}

pub fn done() -> Operation {
    let mut server = server("web-1");
    server.status = "RESCUE".into();
    server.rescue = Some(v1::RescueInfo {
        admin_pass_delivered: vec![
            v1::AdminPassDelivery::ConfigDrive.into(),
            v1::AdminPassDelivery::GuestAgent.into(),
        ],
        start_time: at(4),
        ..Default::default()
    });
    let result = v1::ActionResult {
        server: Some(server),
        guest_stop: v1::GuestStop::ByItself.into(),
        host: None,
    };
    ended_with(&result)
}

/// An operation that ended with this result.
pub fn ended_with(result: &v1::ActionResult) -> Operation {
    use v1::StepState::Done;
    Operation {
        done: true,
        result: Some(Outcome::Response(Any::from_msg(result).unwrap())),
        ..operation(v1::OperationState::Done, Done, Done)
    }
}

pub fn failed(state: v1::OperationState, code: i32, message: &str) -> Operation {
    use v1::StepState::{Failed, Reverted};
    Operation {
        done: true,
        result: Some(Outcome::Error(rpc::Status {
            code,
            message: message.into(),
            details: vec![Any {
                type_url: "type.googleapis.com/newer.Detail".into(),
                value: vec![1, 2],
            }],
        })),
        ..operation(state, Reverted, Failed)
    }
}
