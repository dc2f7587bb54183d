// SPDX-License-Identifier: Apache-2.0
//! libvirt's schema for domains, without a daemon.
//!
//! libvirt's client library carries its test driver, which checks a definition against the same
//! RELAX NG schema and with the same parser as the QEMU driver. Each check gets a test host of its
//! own, described by a file in memory, so that checks see neither each other nor anything else.
//!
//! What it cannot see is what the QEMU driver alone knows: whether this QEMU has the machine type or
//! the device ([`Hypervisor::validate`](crate::hypervisor::Hypervisor::validate) asks for that).

use std::collections::HashSet;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::sync::{Mutex, PoisonError};

use nix::sys::memfd::{MFdFlags, memfd_create};
use salvor_domain_templates::xml::{Element, Node};
use sha2::{Digest as _, Sha256};
use uuid::Uuid;
use virt::connect::Connect;
use virt::enumutil::Enum;
use virt::error::{Error, ErrorNumber};
use virt::sys;

use super::ffi;

/// Why a domain's XML was not found good.
#[derive(Debug, thiserror::Error)]
pub enum SchemaError {
    /// It does not follow libvirt's schema, or not the rules that libvirt has beside it.
    #[error("libvirt cannot take the domain's XML: {message}")]
    Invalid {
        /// libvirt's message.
        message: String,
    },
    /// It could not be checked.
    #[error(
        "the domain's XML cannot be checked; are libvirt's schemas installed beside its client \
         library (/usr/share/libvirt/schemas)? libvirt says: {message}"
    )]
    Unavailable {
        /// libvirt's message.
        message: String,
    },
    /// It could not be checked because the check's test host could not be described.
    #[error("the domain's XML cannot be checked")]
    TestHost(#[source] io::Error),
}

/// Does this domain's XML follow libvirt's schema? Needs no daemon, and blocks for some milliseconds.
///
/// # Errors
/// [`SchemaError::Invalid`] if it does not; the others if that could not be found out.
pub fn check_schema(xml: &str) -> Result<(), SchemaError> {
    let checked = check(xml);
    ffi::give_memory_back();
    checked
}

/// So many shapes are remembered. Servers of a host have few: all that an agent made have the same.
const SHAPES: usize = 256;

/// Schema checks that are not made again for a domain of a shape that has passed: reading the schema
/// takes 10 ms of CPU each time.
///
/// The shape is everything but what tells one server from another: its name, numbers, ids and paths,
/// and the metadata, which the schema leaves to their owners. libvirt's parser reads those values
/// whenever it is given the domain. What only the schema sees, a word where none or another belongs,
/// is part of the shape.
#[derive(Debug, Default)]
pub(super) struct SchemaChecks {
    passed: Mutex<HashSet<Shape>>,
}

type Shape = [u8; 32];

impl SchemaChecks {
    /// As [`check_schema`], unless a domain of this shape has passed before.
    ///
    /// # Errors
    /// Those of [`check_schema`].
    pub(super) fn check(&self, xml: &str) -> Result<(), SchemaError> {
        // What cannot be read is libvirt's to refuse.
        let shape = Element::parse(xml).ok().map(|domain| shape(&domain));
        let passed = || self.passed.lock().unwrap_or_else(PoisonError::into_inner);
        if shape.is_some_and(|shape| passed().contains(&shape)) {
            return Ok(());
        }
        check_schema(xml)?;
        if let Some(shape) = shape {
            let mut passed = passed();
            if passed.len() >= SHAPES {
                passed.clear();
            }
            passed.insert(shape);
        }
        Ok(())
    }
}

fn shape(domain: &Element) -> Shape {
    let mut hash = Sha256::new();
    add(domain, &mut hash, true);
    hash.finalize().into()
}

/// Adds all that is in the element; of a domain's own name and metadata, that they are there.
fn add(element: &Element, hash: &mut Sha256, is_domain: bool) {
    let own = |name: &str| matches!(name, "name" | "metadata");
    word(hash, "<", &element.name);
    for (name, value) in &element.attributes {
        word(hash, "@", name);
        word(hash, "=", common(value));
    }
    for child in &element.children {
        match child {
            Node::Element(child) if is_domain && own(&child.name) => word(hash, "<", &child.name),
            Node::Element(child) => add(child, hash, false),
            Node::Text(text) | Node::CData(text) if text.trim().is_empty() => {}
            Node::Text(text) | Node::CData(text) => word(hash, "'", common(text.trim())),
            Node::Comment(_) | Node::Instruction(_) => {}
        }
    }
    word(hash, ">", "");
}

/// Each word ends in a byte that no XML can hold.
fn word(hash: &mut Sha256, mark: &str, text: &str) {
    hash.update(mark);
    hash.update(text);
    hash.update([0]);
}

/// The value as far as servers of one shape have it in common.
fn common(value: &str) -> &str {
    let number = || match value.strip_prefix("0x") {
        Some(digits) => digits.bytes().all(|digit| digit.is_ascii_hexdigit()),
        None => !value.is_empty() && value.bytes().all(|digit| digit.is_ascii_digit()),
    };
    let mac = || value.len() == 17 && value.split(':').all(|pair| pair.len() == 2);
    if value.starts_with('/') {
        "/"
    } else if number() {
        "0"
    } else if mac() {
        ":"
    } else if Uuid::parse_str(value).is_ok() {
        "-"
    } else {
        value
    }
}

fn check(xml: &str) -> Result<(), SchemaError> {
    // What libvirt says is in the error; it would print it as well.
    virt::error::clear_error_callback();
    let mut host = std::fs::File::from(
        memfd_create(c"salvor-schema-check", MFdFlags::MFD_CLOEXEC)
            .map_err(|errno| SchemaError::TestHost(errno.into()))?,
    );
    host.write_all(b"<node/>").map_err(SchemaError::TestHost)?;
    let uri = format!("test:///proc/self/fd/{}", host.as_raw_fd());
    let connect = Connect::open(Some(&uri)).map_err(unavailable)?;
    match connect.define_domain_xml_flags(xml, sys::VIR_DOMAIN_DEFINE_VALIDATE) {
        Ok(_) => Ok(()),
        Err(error) => judge(error),
    }
}

/// The schema is checked first: what fails later for what the test driver lacks has passed it.
fn judge(error: Error) -> Result<(), SchemaError> {
    match error.code() {
        Enum::Known(
            ErrorNumber::XmlInvalidSchema
            | ErrorNumber::XmlError
            | ErrorNumber::XmlDetail
            | ErrorNumber::InvalidArg,
        ) => Err(SchemaError::Invalid {
            message: error.message().to_owned(),
        }),
        Enum::Known(ErrorNumber::InternalError) => Err(unavailable(error)),
        _ => Ok(()),
    }
}

#[allow(clippy::needless_pass_by_value)] // for map_err
fn unavailable(error: Error) -> SchemaError {
    SchemaError::Unavailable {
        message: error.message().to_owned(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn domain(kind: &str, more: &str) -> String {
        format!(
            "<domain type='{kind}'><name>schema</name><memory>1024</memory>\
             <os><type arch='x86_64'>hvm</type></os>{more}</domain>"
        )
    }

    #[test]
    fn every_domain_type_that_we_render_passes_and_leaves_nothing_behind() {
        virt::error::clear_error_callback();
        for kind in ["kvm", "qemu"] {
            for _ in 0..2 {
                check_schema(&domain(kind, "")).unwrap();
            }
        }
    }

    #[test]
    fn an_element_that_libvirt_does_not_know_is_named() {
        let error = check_schema(&domain("kvm", "<bogus/>")).unwrap_err();
        assert!(error.to_string().contains("bogus"), "{error}");
        let error = check_schema(&domain("kvm", "<devices><disk type='wrong'/></devices>"));
        assert!(matches!(error, Err(SchemaError::Invalid { .. })));
    }

    #[test]
    fn what_is_no_xml_or_no_domain_is_invalid() {
        for xml in ["", "<domain", "<network/>", "a\0b"] {
            let checked = check_schema(xml);
            assert!(
                matches!(checked, Err(SchemaError::Invalid { .. })),
                "{xml:?}: {checked:?}"
            );
        }
    }

    #[test]
    fn foreign_metadata_passes() {
        let metadata = "<metadata><s:plan xmlns:s='https://salvor.example/1'>x</s:plan></metadata>";
        check_schema(&domain("qemu", metadata)).unwrap();
    }

    #[test]
    fn servers_of_one_shape_differ_only_in_what_tells_them_apart() {
        let shape = |xml: &str| shape(&Element::parse(xml).unwrap());
        let disk = |bus: &str, file: &str, more: &str| {
            format!(
                "<domain><name>{file}</name><metadata><a>{file}</a></metadata><disk>\
                 <target bus='{bus}'/><source file='/{file}'/><mac a='52:54:00:00:00:{}'/>\
                 <uuid>deb9ba4c-4eae-4a65-a2bd-{file}{file}</uuid><address slot='0x{file}'/>{more}\
                 </disk></domain>",
                &file[4..]
            )
        };
        let first = shape(&disk("virtio", "000001", ""));
        assert_eq!(first, shape(&disk("virtio", "000002", "")));
        assert_eq!(
            first,
            shape(&disk("virtio", "000002", "<!-- a comment -->"))
        );
        assert_ne!(first, shape(&disk("fdc", "000001", "")));
        for more in [
            "<bogus/>",
            "<name>x</name>",
            "<metadata/>",
            "word",
            "<a b='1'/>",
        ] {
            assert_ne!(first, shape(&disk("virtio", "000001", more)), "{more}");
        }
        let shapes = [
            "<a/>",
            "<a>1</a>",
            "<a b='1'/>",
            "<a c='1'/>",
            "<a><b/></a>",
        ]
        .map(shape);
        assert_eq!(HashSet::from(shapes).len(), shapes.len());
    }

    #[test]
    fn a_shape_that_has_passed_lets_no_other_one_pass() {
        let checks = SchemaChecks::default();
        let good = domain("kvm", "");
        let bad = domain("kvm", "<bogus/>");
        for _ in 0..2 {
            checks.check(&good).unwrap();
            checks.check(&bad).unwrap_err();
            checks.check("no domain").unwrap_err();
        }
        assert_eq!(checks.passed.lock().unwrap().len(), 1);
    }
}
