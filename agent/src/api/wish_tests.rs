// SPDX-License-Identifier: Apache-2.0
//! Tests of requests for actions.

#![allow(clippy::unwrap_used, clippy::panic)]

use super::*;

const USUAL: Shutdown = Shutdown {
    timeout_ms: 60_000,
    retry_ms: 10_000,
};
const ID: &str = "7f0c1a52-3d9e-4b6f-8a21-5c0e9d7b4f13";

fn create() -> v1::CreateServerRequest {
    v1::CreateServerRequest {
        request_id: ID.to_owned(),
        name: "Web 1".to_owned(),
        image: "cirros".to_owned(),
        flavor: Some(v1::Flavor {
            vcpus: 1,
            memory_mib: 64,
            disk_gib: 0,
        }),
        metadata: (0..20)
            .map(|i| (format!("k{i}"), format!("v{i}")))
            .collect(),
        ..v1::CreateServerRequest::default()
    }
}

fn rescue() -> v1::RescueServerRequest {
    v1::RescueServerRequest {
        server: "web".to_owned(),
        ..v1::RescueServerRequest::default()
    }
}

fn hash(ask: impl Ask) -> String {
    ask.wish(USUAL).unwrap().body_hash
}

#[test]
fn a_repeated_create_means_the_same_server() {
    let (one, two) = (create().wish(USUAL).unwrap(), create().wish(USUAL).unwrap());
    assert_eq!(one.subject, two.subject);
    assert_eq!(one.body_hash, two.body_hash);
    let mut other = create();
    other.request_id = ID.replace('7', "8");
    assert_ne!(other.wish(USUAL).unwrap().subject, one.subject);
}

#[test]
fn the_hash_tells_requests_apart_but_not_their_ids() {
    let base = hash(create());
    let mut other = create();
    other.request_id.clear();
    other.server_id = String::new();
    assert_eq!(hash(other), base);
    let mut other = create();
    other.metadata.insert("k1".to_owned(), "changed".to_owned());
    assert_ne!(hash(other), base);
    let mut other = create();
    (other.public_keys, other.metadata) = (other.metadata, HashMap::new());
    assert_ne!(hash(other), base);
    let start = v1::StartServerRequest {
        server: "web".to_owned(),
        ..Default::default()
    };
    let delete = v1::DeleteServerRequest {
        server: "web".to_owned(),
        ..Default::default()
    };
    assert_ne!(hash(start), hash(delete));
}

#[test]
fn the_hash_knows_that_a_password_was_given_but_not_which() {
    let with = |password: Option<&str>| v1::RescueServerRequest {
        admin_pass: password.map(str::to_owned),
        ..rescue()
    };
    assert_eq!(hash(with(Some("one"))), hash(with(Some("two"))));
    assert_ne!(hash(with(Some("one"))), hash(with(None)));
}

#[test]
fn a_password_is_not_in_what_is_logged_of_a_wish() {
    let wish = v1::RescueServerRequest {
        admin_pass: Some("s3cret".to_owned()),
        ..rescue()
    }
    .wish(USUAL)
    .unwrap();
    assert!(!format!("{wish:?}").contains("s3cret"));
}

#[test]
fn a_rescue_has_user_data_of_its_own() {
    let with = |user_data: &[u8]| {
        let wish = v1::RescueServerRequest {
            user_data: user_data.to_vec(),
            ..rescue()
        }
        .wish(USUAL)?;
        match wish.action {
            Action::Rescue(args) => Ok(args.user_data),
            other => panic!("no rescue: {other:?}"),
        }
    };
    assert_eq!(with(b"").unwrap(), None);
    assert_eq!(with(b"#!/bin/sh").unwrap().unwrap(), b"#!/bin/sh");
    let refusal: Refusal = with(&[0; 50_000]).unwrap_err();
    assert_eq!(refusal.subject.unwrap().0, "user_data");
}

#[test]
fn a_rescue_without_words_is_the_usual_one() {
    let Action::Rescue(args) = rescue().wish(USUAL).unwrap().action else {
        panic!("no rescue")
    };
    assert_eq!(args.protection, Protection::ReadWrite);
    assert_eq!((args.mode, args.bus, args.device), (None, None, None));
    assert_eq!(args.shutdown, USUAL);
    assert_eq!(args.timeout_ms, None);
}

#[test]
fn times_that_are_given_replace_the_usual_ones() {
    let given = v1::RescueServerRequest {
        timeout: Some(prost_types::Duration {
            seconds: 0,
            nanos: 0,
        }),
        shutdown_timeout: Some(prost_types::Duration {
            seconds: 1,
            nanos: 500_000_000,
        }),
        ..rescue()
    };
    let Action::Rescue(args) = given.wish(USUAL).unwrap().action else {
        panic!("no rescue")
    };
    assert_eq!(args.timeout_ms, Some(0));
    assert_eq!(
        (args.shutdown.timeout_ms, args.shutdown.retry_ms),
        (1_500, 10_000)
    );
}

#[test]
fn what_becomes_of_overlays_when_time_is_over_is_heeded() {
    let given = |timeout_overlay| v1::RescueServerRequest {
        timeout_overlay,
        ..rescue()
    };
    let heard = |request: v1::RescueServerRequest| match request.wish(USUAL).unwrap().action {
        Action::Rescue(args) => args.timeout_overlay,
        other => panic!("no rescue: {other:?}"),
    };
    let wire = |value: v1::OverlayDisposition| i32::from(value);
    assert_eq!(heard(given(0)), None);
    assert_eq!(
        heard(given(wire(v1::OverlayDisposition::Commit))),
        Some(OverlayDisposition::Commit)
    );
    assert_eq!(
        heard(given(wire(v1::OverlayDisposition::Discard))),
        Some(OverlayDisposition::Discard)
    );
    let refused = given(9).wish(USUAL).unwrap_err();
    assert_eq!(refused.subject.unwrap().0, "timeout_overlay");
}

#[test]
fn each_wrong_field_is_named() {
    let field = |refusal: Refusal| refusal.subject.unwrap().0;
    let refuse = |change: fn(&mut v1::CreateServerRequest)| {
        let mut request = create();
        change(&mut request);
        field(request.wish(USUAL).unwrap_err())
    };
    assert_eq!(refuse(|r| r.request_id = "x".into()), "request_id");
    assert_eq!(refuse(|r| r.server_id = "x".into()), "server_id");
    assert_eq!(refuse(|r| r.name = "a\0".into()), "name");
    assert_eq!(refuse(|r| r.image = String::new()), "image");
    assert_eq!(refuse(|r| r.flavor = None), "flavor");
    assert_eq!(refuse(|r| r.hostname = "a_b".into()), "hostname");
    assert_eq!(refuse(|r| r.machine = "pc'/>".into()), "machine");
    assert_eq!(refuse(|r| r.firmware = 9), "firmware");
    assert_eq!(refuse(|r| r.admin_pass = Some("a\nb".into())), "admin_pass");
    assert_eq!(refuse(|r| r.user_data = vec![0; 49_150]), "user_data");
    assert_eq!(
        refuse(|r| r.interfaces = vec![Default::default()]),
        "interfaces[0]"
    );
    let refuse = |change: fn(&mut v1::RescueServerRequest)| {
        let mut request = rescue();
        change(&mut request);
        field(request.wish(USUAL).unwrap_err())
    };
    assert_eq!(refuse(|r| r.server = String::new()), "server");
    assert_eq!(refuse(|r| r.image = Some(String::new())), "image");
    assert_eq!(refuse(|r| r.mode = 3), "mode");
    assert_eq!(refuse(|r| r.bus = -1), "bus");
    assert_eq!(refuse(|r| r.device = 99), "device");
    assert_eq!(refuse(|r| r.disk_protection = 4), "disk_protection");
    let long = Some(prost_types::Duration {
        seconds: 31 * 86_400,
        nanos: 0,
    });
    let request = v1::RescueServerRequest {
        timeout: long,
        ..rescue()
    };
    assert_eq!(field(request.wish(USUAL).unwrap_err()), "timeout");
    let unrescue = v1::UnrescueServerRequest {
        server: "web".to_owned(),
        power: 7,
        ..Default::default()
    };
    assert_eq!(field(unrescue.wish(USUAL).unwrap_err()), "power");
}
