// SPDX-License-Identifier: Apache-2.0
//! Refusals as gRPC errors: a status code, a message, and details that programs can decide by.
//!
//! Every refusal carries an `ErrorInfo` of the domain [`DOMAIN`] with a reason of
//! [`Reason`]; `docs/REASONS.md` is made from that table. The further details
//! follow from the code: `BadRequest` with the field for INVALID_ARGUMENT, `PreconditionFailure` for a state, `ResourceInfo`
//! for what is missing or exists, `RetryInfo` where trying again is worth while.

use std::{collections::HashMap, time::Duration};

use prost::Message as _;
use salvor_proto::google::rpc;
use tonic::Status;
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::core::{
    action::Verb,
    operation::OperationRecord,
    reason::{Code, Reason, Refusal},
    text,
};

/// `ErrorInfo.domain` of every error.
pub const DOMAIN: &str = "salvor.compute";

/// What an error says besides its refusal.
#[derive(Debug, Clone, Default)]
pub(super) struct About {
    /// The call, for `RequestInfo`.
    pub(super) request_id: String,
    /// The action that was asked for.
    pub(super) verb: Option<Verb>,
    /// What it was to be done to, in the caller's word or by id.
    pub(super) subject: String,
}

const fn grpc(code: Code) -> tonic::Code {
    match code {
        Code::InvalidArgument => tonic::Code::InvalidArgument,
        Code::NotFound => tonic::Code::NotFound,
        Code::AlreadyExists => tonic::Code::AlreadyExists,
        Code::FailedPrecondition => tonic::Code::FailedPrecondition,
        Code::Aborted => tonic::Code::Aborted,
        Code::ResourceExhausted => tonic::Code::ResourceExhausted,
        Code::Unavailable => tonic::Code::Unavailable,
        Code::DeadlineExceeded => tonic::Code::DeadlineExceeded,
        Code::Cancelled => tonic::Code::Cancelled,
        Code::Internal => tonic::Code::Internal,
        Code::Unimplemented => tonic::Code::Unimplemented,
        Code::Unauthenticated => tonic::Code::Unauthenticated,
        Code::PermissionDenied => tonic::Code::PermissionDenied,
    }
}

/// When to try again.
const fn retry_after(reason: Reason) -> Option<Duration> {
    match reason {
        // An action takes seconds.
        Reason::ServerBusy => Some(Duration::from_secs(1)),
        // The agent tries to reach libvirt about every second.
        Reason::LibvirtUnavailable => Some(Duration::from_secs(2)),
        // A service manager starts it again.
        Reason::Draining => Some(Duration::from_secs(5)),
        _ => None,
    }
}

/// The type of what is missing, exists or is in use.
const fn resource(reason: Reason) -> Option<&'static str> {
    match reason {
        Reason::ServerNotFound | Reason::ServerExists => Some("salvor.compute.v1.Server"),
        Reason::ImageNotFound | Reason::ImageExists | Reason::ImageInUse => {
            Some("salvor.compute.v1.Image")
        }
        Reason::OperationNotFound => Some("google.longrunning.Operation"),
        Reason::DomainNotFound => Some("libvirt.Domain"),
        _ => None,
    }
}

fn message(refusal: &Refusal) -> String {
    match refusal.reason {
        // What a fault of the agent looks like from inside is for its log.
        Reason::Internal => {
            "the agent failed; its log has the details under this request id".to_owned()
        }
        _ => text::message(&refusal.message),
    }
}

/// The field of the request that a refusal is about: the one that it names, else the one that its
/// reason is usually about. `None` if the request is not what is wrong.
fn field(refusal: &Refusal) -> Option<&str> {
    if refusal.reason.code() != Code::InvalidArgument {
        return None;
    }
    let named = refusal.subject.as_ref().map(|(field, _)| field.as_str());
    Some(named.unwrap_or(match refusal.reason {
        Reason::RequestIdReused => "request_id",
        Reason::OverlayDecisionNeeded | Reason::NoOverlays => "overlay",
        _ => "image",
    }))
}

fn details(code: tonic::Code, refusal: &Refusal, about: &About) -> ErrorDetails {
    let Refusal {
        reason, subject, ..
    } = refusal;
    let message = message(refusal);
    let subject = subject
        .as_ref()
        .map(|(kind, value)| (text::echo(kind), text::message(value)));
    let mut metadata = HashMap::from([("http".to_owned(), reason.http().to_string())]);
    if let Some(verb) = about.verb {
        metadata.insert("action".to_owned(), verb.name().to_owned());
    }
    // What a call itself is about and is missing is no wrong field of it.
    let field = field(refusal)
        .filter(|_| code == tonic::Code::InvalidArgument)
        .map(text::echo);
    if let Some(field) = &field {
        metadata.insert("field".to_owned(), field.clone());
    }
    match (reason, &subject) {
        (Reason::InvalidField, _) => {}
        (Reason::InvalidState, Some((attribute, state))) => {
            metadata.insert("attr".to_owned(), attribute.clone());
            metadata.insert("state".to_owned(), state.clone());
        }
        (_, Some((kind, name))) if !name.is_empty() => {
            metadata.insert(kind.clone(), name.clone());
        }
        _ => {}
    }
    let mut details = ErrorDetails::with_error_info(reason.name(), DOMAIN, metadata);
    let named = match &subject {
        Some((_, name)) if *reason != Reason::InvalidState => name.clone(),
        _ => text::echo(&about.subject),
    };
    if let Some(field) = field {
        let rule = match (reason, &subject) {
            (Reason::InvalidField, Some((_, rule))) => rule,
            _ => &message,
        };
        details.add_bad_request_violation(field, rule.as_str());
    }
    match (reason, &subject) {
        (Reason::InvalidState, Some((attribute, _))) => {
            details.add_precondition_failure_violation(
                attribute.to_uppercase(),
                text::echo(&about.subject),
                message.as_str(),
            );
        }
        _ if reason.code() == Code::FailedPrecondition => {
            details.add_precondition_failure_violation(
                reason.name(),
                named.as_str(),
                message.as_str(),
            );
        }
        _ => {}
    }
    if let Some(kind) = resource(*reason) {
        details.set_resource_info(kind, named, "", message);
    }
    if let Some(delay) = retry_after(*reason) {
        details.set_retry_info(Some(delay));
    }
    if !about.request_id.is_empty() {
        details.set_request_info(about.request_id.as_str(), "");
    }
    details
}

/// The error that a refusal is to the caller.
pub(super) fn status(refusal: &Refusal, about: &About) -> Status {
    coded(grpc(refusal.reason.code()), refusal, about)
}

/// The same with another code, where the reason's own does not fit the call: an image that a call is
/// about is NOT_FOUND, one that a request merely names is INVALID_ARGUMENT.
pub(super) fn coded(code: tonic::Code, refusal: &Refusal, about: &About) -> Status {
    if refusal.reason == Reason::Internal {
        tracing::error!(message = %text::message(&refusal.message), "a request failed");
    }
    Status::with_error_details(code, message(refusal), details(code, refusal, about))
}

/// The refusal that an error without details stands for. Handlers give every error of theirs its details:
/// such a one comes from what is around them, which finds calls and reads requests.
pub(super) fn bare(status: &Status) -> Refusal {
    let reason = match status.code() {
        tonic::Code::Unimplemented => Reason::NotSupported,
        tonic::Code::Cancelled => Reason::Cancelled,
        _ => Reason::InvalidRequest,
    };
    let message = match (reason, status.message()) {
        (Reason::NotSupported, "") => "there is no such call",
        (_, message) => message,
    };
    Refusal::new(reason, message)
}

/// Why an operation failed, as `Operation.error`.
pub(super) fn operation_error(record: &OperationRecord, refusal: &Refusal) -> rpc::Status {
    let about = About {
        request_id: String::new(),
        verb: Some(record.verb),
        subject: record.server.to_string(),
    };
    let status = status(refusal, &about);
    // The details of a status are themselves an encoded google.rpc.Status.
    rpc::Status::decode(status.details()).unwrap_or_else(|_| rpc::Status {
        code: status.code().into(),
        message: status.message().to_owned(),
        details: Vec::new(),
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing)]

    use super::*;

    fn about() -> About {
        About {
            request_id: "req-1".to_owned(),
            verb: Some(Verb::Rescue),
            subject: "web".to_owned(),
        }
    }

    #[test]
    fn every_reason_carries_its_code_its_name_and_the_request() {
        for reason in Reason::ALL {
            let status = status(&Refusal::new(*reason, "why"), &about());
            assert_eq!(status.code(), grpc(reason.code()));
            let details = status.get_error_details();
            let info = details.error_info().unwrap();
            assert_eq!(
                (info.reason.as_str(), info.domain.as_str()),
                (reason.name(), DOMAIN)
            );
            assert_eq!(info.metadata["http"], reason.http().to_string());
            assert_eq!(details.request_info().unwrap().request_id, "req-1");
            assert_eq!(
                details.retry_info().is_some(),
                matches!(reason.code(), Code::Unavailable | Code::Aborted),
                "{reason}"
            );
            let state = reason.code() == Code::FailedPrecondition;
            assert_eq!(
                details.has_precondition_failure_violations(),
                state,
                "{reason}"
            );
            let fields = details
                .bad_request()
                .map_or(&[][..], |bad| &bad.field_violations);
            match reason.code() {
                Code::InvalidArgument => {
                    assert_eq!(fields.len(), 1, "{reason}");
                    assert!(!fields[0].field.is_empty() && !fields[0].description.is_empty());
                    assert_eq!(info.metadata["field"], fields[0].field, "{reason}");
                }
                _ => assert!(fields.is_empty(), "{reason}"),
            }
            if reason.code() == Code::NotFound {
                assert_eq!(details.resource_info().unwrap().resource_name, "web");
            }
        }
    }

    #[test]
    fn a_wrong_field_is_a_bad_request() {
        let status = status(&Refusal::field("name", "1 to 255 characters"), &about());
        let details = status.get_error_details();
        let violation = &details.bad_request().unwrap().field_violations[0];
        assert_eq!(violation.field, "name");
        assert_eq!(violation.description, "1 to 255 characters");
    }

    #[test]
    fn each_reason_names_the_field_that_it_is_about() {
        let field = |refusal: Refusal| {
            let details = status(&refusal, &about()).get_error_details();
            details.bad_request().unwrap().field_violations[0]
                .field
                .clone()
        };
        let plain = |reason| Refusal::new(reason, "why");
        assert_eq!(field(plain(Reason::RequestIdReused)), "request_id");
        assert_eq!(field(plain(Reason::OverlayDecisionNeeded)), "overlay");
        assert_eq!(field(plain(Reason::NoOverlays)), "overlay");
        assert_eq!(field(plain(Reason::ImageNotFound)), "image");
        let several = plain(Reason::AmbiguousName).about("server", "db");
        assert_eq!(field(several), "server");
        let small = plain(Reason::ImageTooLarge).about("flavor.disk_gib", "2");
        assert_eq!(field(small), "flavor.disk_gib");
    }

    #[test]
    fn an_image_that_a_call_is_about_is_no_wrong_field() {
        let missing = Refusal::new(Reason::ImageNotFound, "why").about("image", "debian");
        let status = coded(tonic::Code::NotFound, &missing, &about());
        assert!(status.get_error_details().bad_request().is_none());
    }

    #[test]
    fn a_wrong_state_says_which_and_of_what() {
        let status = status(
            &Refusal::state("vm_state", "rescued", "unrescue it first"),
            &about(),
        );
        let details = status.get_error_details();
        let violation = &details.precondition_failure().unwrap().violations[0];
        assert_eq!(
            (violation.r#type.as_str(), violation.subject.as_str()),
            ("VM_STATE", "web")
        );
        let metadata = &details.error_info().unwrap().metadata;
        assert_eq!(
            (metadata["attr"].as_str(), metadata["state"].as_str()),
            ("vm_state", "rescued")
        );
        assert_eq!(metadata["action"], "rescue");
    }

    #[test]
    fn a_busy_server_names_the_operation() {
        let refusal = Refusal::new(Reason::ServerBusy, "busy").about("operation", "operations/1");
        let details = status(&refusal, &about()).get_error_details();
        assert_eq!(
            details.error_info().unwrap().metadata["operation"],
            "operations/1"
        );
    }

    #[test]
    fn an_internal_error_tells_nothing_of_the_inside() {
        let status = status(
            &Refusal::new(Reason::Internal, "/etc/shadow: line 3"),
            &about(),
        );
        assert!(!status.message().contains("shadow"));
        assert!(!format!("{:?}", status.get_error_details()).contains("shadow"));
    }

    #[test]
    fn an_error_fits_into_headers_whatever_it_quotes() {
        let long = "é\n".repeat(100_000);
        let refusal = Refusal::state("vm_state", &long, long.clone());
        let headers = status(
            &refusal,
            &About {
                subject: long,
                ..about()
            },
        )
        .into_http::<()>()
        .headers()
        .values()
        .map(tonic::codegen::http::HeaderValue::len)
        .sum::<usize>();
        assert!(headers < 12_000, "{headers}");
    }
}
