// SPDX-License-Identifier: Apache-2.0
//! Operations as google.longrunning operations.

use prost::Name;
use salvor_proto::{
    google::longrunning::{self, operation::Result as Outcome},
    v1,
};

use super::{
    server::{operation_name, server},
    states::Wire as _,
    time::timestamp,
};
use crate::{
    api::errors::operation_error,
    core::{
        operation::{HostReport, OperationRecord, OperationState, StepRecord},
        reason::{Reason, Refusal, Warning},
        record::ServerRecord,
    },
};

/// A message with its type, as every resolver of protocol buffers knows it.
fn any<M: Name>(message: &M) -> prost_types::Any {
    prost_types::Any {
        type_url: format!("type.googleapis.com/{}", M::full_name()),
        value: message.encode_to_vec(),
    }
}

/// Warnings.
pub(in crate::api) fn warnings(warnings: &[Warning]) -> Vec<v1::Warning> {
    warnings
        .iter()
        .map(|warning| v1::Warning {
            name: warning.name.name().to_owned(),
            message: warning.message.clone(),
        })
        .collect()
}

/// An operation; `percent` says how far the step with this index is, `now` is the server as it is.
pub(in crate::api) fn operation(
    record: &OperationRecord,
    percent: Option<(usize, u8)>,
    now: Option<&ServerRecord>,
) -> longrunning::Operation {
    let metadata = v1::OperationMetadata {
        server_id: record.server.to_string(),
        action: record.verb.name().to_owned(),
        request_id: record.request_id.clone().unwrap_or_default(),
        state: record.state.wire(),
        steps: record
            .steps
            .iter()
            .enumerate()
            .map(|(index, step)| {
                let percent = percent
                    .filter(|(of, _)| *of == index)
                    .map(|(_, percent)| percent);
                self::step(step, percent)
            })
            .collect(),
        create_time: Some(timestamp(record.created_at_ms)),
        end_time: record.ended_at_ms.map(timestamp),
        cancel_requested: record.cancel_requested,
        warnings: warnings(&record.warnings),
        recoveries: record.recoveries,
        caller: record.caller.clone(),
        user_id: record.user.clone(),
        project_id: record.project.clone(),
        instance_action: record.verb.action_name().to_owned(),
        instance_event: record.verb.event_name().unwrap_or_default().to_owned(),
    };
    longrunning::Operation {
        name: operation_name(record.id),
        metadata: Some(any(&metadata)),
        done: record.state.is_final(),
        result: outcome(record, now),
    }
}

fn outcome(record: &OperationRecord, now: Option<&ServerRecord>) -> Option<Outcome> {
    match record.state {
        OperationState::Running | OperationState::Reverting | OperationState::CleaningUp => None,
        OperationState::Done => Some(Outcome::Response(any(&v1::ActionResult {
            server: now.filter(|_| !record.verb.removes_record()).map(server),
            guest_stop: record
                .guest_stop
                .map(|stop| stop.wire())
                .unwrap_or_default(),
            host: record.host.as_ref().map(host_report),
        }))),
        OperationState::Failed | OperationState::Cancelled => {
            // Each of these is written with its reason; a record without one still gets an error.
            let unknown = Refusal::new(
                match record.state {
                    OperationState::Cancelled => Reason::Cancelled,
                    _ => Reason::Internal,
                },
                "the operation ended without a reason",
            );
            Some(Outcome::Error(operation_error(
                record,
                record.error.as_ref().unwrap_or(&unknown),
            )))
        }
    }
}

/// What the host shows of a server.
pub(in crate::api) fn host_report(report: &HostReport) -> v1::HostReport {
    v1::HostReport {
        power_state: report.power.wire(),
        power_reason: report.power_reason.clone(),
        defined: report.defined,
        rescue_domain: report.rescue_domain,
        saved_memory: report.saved_memory,
        missing_disks: report
            .missing_disks
            .iter()
            .map(|(target, source)| v1::MissingDisk {
                target: target.clone(),
                source: source.clone(),
            })
            .collect(),
        unknown: report.unknown.clone(),
    }
}

fn step(step: &StepRecord, percent: Option<u8>) -> v1::OperationStep {
    v1::OperationStep {
        kind: step.kind.clone(),
        phase: step.phase.clone(),
        description: step.description.clone(),
        state: step.state.wire(),
        start_time: step.started_at_ms.map(timestamp),
        end_time: step.ended_at_ms.map(timestamp),
        progress_percent: percent.map(u32::from),
        message: step.message.clone(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]

    use uuid::Uuid;

    use super::*;
    use crate::{
        api::convert::server::tests::record as server_record,
        core::{action::Verb, operation::StepState},
    };

    fn record(verb: Verb, state: OperationState) -> OperationRecord {
        let step = StepRecord {
            untouched: false,
            kind: "PowerOff".to_owned(),
            phase: "switch".to_owned(),
            description: "power off".to_owned(),
            state: StepState::Running,
            started_at_ms: Some(1),
            ended_at_ms: None,
            message: String::new(),
        };
        OperationRecord {
            id: Uuid::from_u128(7),
            server: Uuid::from_u128(1),
            verb,
            request_id: None,
            caller: "uid:0".to_owned(),
            state,
            steps: vec![step.clone(), step],
            created_at_ms: 1,
            ended_at_ms: state.is_final().then_some(2),
            error: None,
            guest_stop: None,
            cancel_requested: false,
            server_goes: false,
            recoveries: 0,
            warnings: Vec::new(),
            user: "u".to_owned(),
            project: "p".to_owned(),
            host: None,
        }
    }

    #[test]
    fn an_operation_has_a_result_exactly_when_it_is_done() {
        for verb in Verb::ALL {
            for state in OperationState::ALL {
                let shown = operation(&record(*verb, *state), None, Some(&server_record()));
                assert_eq!(shown.done, state.is_final());
                assert_eq!(shown.result.is_some(), shown.done, "{verb} {state}");
            }
        }
    }

    #[test]
    fn the_server_is_in_the_response_unless_the_action_removed_it() {
        for verb in Verb::ALL {
            let shown = operation(
                &record(*verb, OperationState::Done),
                None,
                Some(&server_record()),
            );
            let Some(Outcome::Response(response)) = shown.result else {
                panic!("{verb}")
            };
            let result: v1::ActionResult = response.to_msg().unwrap();
            let removes = [Verb::Delete, Verb::ForceDelete, Verb::Release];
            assert_eq!(result.server.is_none(), removes.contains(verb), "{verb}");
        }
    }

    #[test]
    fn a_failed_operation_carries_its_reason() {
        let mut failed = record(Verb::Rescue, OperationState::Failed);
        failed.error = Some(Refusal::new(Reason::LibvirtRefused, "no such device"));
        let Some(Outcome::Error(error)) = operation(&failed, None, None).result else {
            panic!("no error")
        };
        assert_eq!(error.message, "no such device");
        let info = error
            .details
            .iter()
            .find(|detail| detail.type_url == "type.googleapis.com/google.rpc.ErrorInfo");
        assert!(info.is_some());
    }

    #[test]
    fn progress_is_that_of_its_step() {
        let shown = operation(
            &record(Verb::Rescue, OperationState::Running),
            Some((1, 42)),
            None,
        );
        let metadata: v1::OperationMetadata = shown.metadata.unwrap().to_msg().unwrap();
        let progress: Vec<_> = metadata
            .steps
            .iter()
            .map(|step| step.progress_percent)
            .collect();
        assert_eq!(progress, [None, Some(42)]);
        assert_eq!(metadata.caller, "uid:0");
    }
}
