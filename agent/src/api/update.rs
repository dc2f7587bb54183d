// SPDX-License-Identifier: Apache-2.0
//! The request to update a server: which fields its mask names, and what they become. Pure.

use std::{collections::HashMap, mem::take, net::IpAddr, str::FromStr};

use salvor_proto::v1;

use super::{
    validate::{self, Checked},
    wish::{Ask, Wish, identify, millis, plain},
};
use crate::core::{
    action::{Action, Shutdown, Verb},
    change::FieldChange,
    reason::Refusal,
    text::echo,
};

/// The fields that can be changed, as a mask names them.
const FIELDS: &[&str] = &[
    "name",
    "description",
    "metadata",
    "tags",
    "access_ipv4",
    "access_ipv6",
    "shutdown_timeout",
    "autostart",
    "autostart_order",
];

impl Ask for v1::UpdateServerRequest {
    const VERB: Verb = Verb::Update;

    fn subject(&self) -> &str {
        &self.server
    }

    fn wish(mut self, _shutdown: Shutdown) -> Checked<Wish> {
        let metadata = take(&mut self.metadata);
        let (request_id, body_hash) = identify(take(&mut self.request_id), &self, &[&metadata])?;
        let server = take(&mut self.server);
        let fields = fields(&self, &metadata)?;
        plain(request_id, body_hash, server, Action::Update(fields))
    }
}

fn fields(
    request: &v1::UpdateServerRequest,
    metadata: &HashMap<String, String>,
) -> Checked<Vec<FieldChange>> {
    let paths = request
        .update_mask
        .as_ref()
        .map_or(&[][..], |mask| &mask.paths);
    if paths.is_empty() {
        return Err(wrong_mask("must name what is to be changed"));
    }
    let mut changes = Vec::new();
    for (index, path) in paths.iter().enumerate() {
        // Named twice is named once.
        if !paths.iter().take(index).any(|before| before == path) {
            changes.push(field(path, request, metadata)?);
        }
    }
    Ok(changes)
}

fn wrong_mask(what: &str) -> Refusal {
    Refusal::field(
        "update_mask",
        format!("{what}; there are {}", FIELDS.join(", ")),
    )
}

fn field(
    path: &str,
    request: &v1::UpdateServerRequest,
    metadata: &HashMap<String, String>,
) -> Checked<FieldChange> {
    Ok(match path {
        "name" => {
            validate::name("name", &request.name)?;
            FieldChange::Name(request.name.clone())
        }
        "description" => {
            validate::text("description", &request.description)?;
            let text = Some(request.description.clone());
            FieldChange::Description(text.filter(|text| !text.is_empty()))
        }
        "metadata" => FieldChange::Metadata(validate::metadata("metadata", metadata.clone())?),
        "tags" => FieldChange::Tags(validate::tags("tags", &request.tags)?),
        "access_ipv4" => FieldChange::AccessIpv4(address("access_ipv4", &request.access_ipv4)?),
        "access_ipv6" => FieldChange::AccessIpv6(address("access_ipv6", &request.access_ipv6)?),
        "shutdown_timeout" => {
            let time = validate::duration(
                "shutdown_timeout",
                request.shutdown_timeout,
                validate::SHUTDOWN,
            )?;
            FieldChange::ShutdownTimeout(time.map(millis))
        }
        "autostart" => FieldChange::Autostart(request.autostart),
        "autostart_order" => FieldChange::AutostartOrder(request.autostart_order),
        unknown => {
            return Err(wrong_mask(&format!("has no field {:?}", echo(unknown))));
        }
    })
}

/// An address of one family, or none.
fn address<A: FromStr + Into<IpAddr>>(field: &str, text: &str) -> Checked<Option<A>> {
    if text.is_empty() {
        return Ok(None);
    }
    text.parse().map(Some).map_err(|_| {
        let family = if field.ends_with('4') { "IPv4" } else { "IPv6" };
        Refusal::field(
            field,
            format!("must be an {family} address, and is {:?}", echo(text)),
        )
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

    use super::*;
    use crate::core::reason::Reason;

    const USUAL: Shutdown = Shutdown {
        timeout_ms: 60_000,
        retry_ms: 10_000,
    };

    fn request(paths: &[&str]) -> v1::UpdateServerRequest {
        v1::UpdateServerRequest {
            server: "web".to_owned(),
            update_mask: Some(prost_types::FieldMask {
                paths: paths.iter().map(|path| (*path).to_owned()).collect(),
            }),
            ..v1::UpdateServerRequest::default()
        }
    }

    fn changes(request: v1::UpdateServerRequest) -> Checked<Vec<FieldChange>> {
        match request.wish(USUAL)?.action {
            Action::Update(changes) => Ok(changes),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn only_what_the_mask_names_is_changed() {
        let all = v1::UpdateServerRequest {
            name: "db".to_owned(),
            description: "text".to_owned(),
            tags: vec!["a".to_owned()],
            ..request(&["description", "description"])
        };
        let text = Some("text".to_owned());
        assert_eq!(changes(all).unwrap(), [FieldChange::Description(text)]);
    }

    #[test]
    fn what_is_named_and_not_given_is_cleared_if_it_can_be() {
        let cleared = changes(request(&FIELDS[1..])).unwrap();
        let expected = [
            FieldChange::Description(None),
            FieldChange::Metadata(Default::default()),
            FieldChange::Tags(Vec::new()),
            FieldChange::AccessIpv4(None),
            FieldChange::AccessIpv6(None),
            FieldChange::ShutdownTimeout(None),
            FieldChange::Autostart(false),
            FieldChange::AutostartOrder(None),
        ];
        assert_eq!(cleared, expected);
        assert!(changes(request(&["name"])).is_err(), "it has to have one");
    }

    #[test]
    fn a_mask_that_names_nothing_or_something_unknown_is_refused_with_what_there_is() {
        let mut without = request(&[]);
        without.update_mask = None;
        for wrong in [
            without,
            request(&[]),
            request(&["nmae"]),
            request(&["*"]),
            request(&["name", "metadata.k"]),
            request(&["flavor.vcpus\0"]),
        ] {
            let mut wrong = wrong;
            wrong.name = "web".to_owned();
            let refusal = changes(wrong).unwrap_err();
            assert_eq!(refusal.reason, Reason::InvalidField);
            assert!(refusal.message.contains("autostart_order"), "{refusal}");
        }
    }

    #[test]
    fn each_field_has_its_rule() {
        let long = |count| "x".repeat(count);
        let mut cases = Vec::new();
        for address in ["1.2.3", "::1", "1.2.3.4/8", " 1.2.3.4"] {
            cases.push(v1::UpdateServerRequest {
                access_ipv4: address.to_owned(),
                ..request(&["access_ipv4"])
            });
        }
        cases.push(v1::UpdateServerRequest {
            access_ipv6: "1.2.3.4".to_owned(),
            ..request(&["access_ipv6"])
        });
        for tag in ["", "a,b", "a/b", "a\nb", &long(61)] {
            cases.push(v1::UpdateServerRequest {
                tags: vec![tag.to_owned()],
                ..request(&["tags"])
            });
        }
        cases.push(v1::UpdateServerRequest {
            tags: (0..51).map(|tag| tag.to_string()).collect(),
            ..request(&["tags"])
        });
        cases.push(v1::UpdateServerRequest {
            description: long(256),
            ..request(&["description"])
        });
        cases.push(v1::UpdateServerRequest {
            metadata: HashMap::from([("a/b".to_owned(), String::new())]),
            ..request(&["metadata"])
        });
        cases.push(v1::UpdateServerRequest {
            metadata: (0..129).map(|i| (i.to_string(), String::new())).collect(),
            ..request(&["metadata"])
        });
        for seconds in [-1, 3_601] {
            cases.push(v1::UpdateServerRequest {
                shutdown_timeout: Some(prost_types::Duration { seconds, nanos: 0 }),
                ..request(&["shutdown_timeout"])
            });
        }
        for case in cases {
            assert!(changes(case.clone()).is_err(), "{case:?}");
        }
        let tags = ["a".to_owned(), long(60), "a".to_owned()];
        let fine = v1::UpdateServerRequest {
            tags: tags.to_vec(),
            ..request(&["tags"])
        };
        let once = vec!["a".to_owned(), long(60)];
        assert_eq!(changes(fine).unwrap(), [FieldChange::Tags(once)]);
    }

    #[test]
    fn metadata_counts_when_a_request_is_known_again() {
        let with = |value: &str| v1::UpdateServerRequest {
            metadata: HashMap::from([("k".to_owned(), value.to_owned())]),
            ..request(&["metadata"])
        };
        let hash = |request: v1::UpdateServerRequest| request.wish(USUAL).unwrap().body_hash;
        assert_eq!(hash(with("a")), hash(with("a")));
        assert_ne!(hash(with("a")), hash(with("b")));
    }
}
