// SPDX-License-Identifier: Apache-2.0
//! libvirt's schema for domains, without a daemon.
//!
//! libvirt's client library carries its test driver, which checks a definition against the same
//! RELAX NG schema and with the same parser as the QEMU driver. Each check gets a test host of its
//! own, described by a file in memory, so that checks see neither each other nor anything else.
//!
//! What it cannot see is what the QEMU driver alone knows: whether this QEMU has the machine type or
//! the device ([`Hypervisor::validate`](crate::hypervisor::Hypervisor::validate) asks for that).

use std::io::{self, Write};
use std::os::fd::AsRawFd;

use nix::sys::memfd::{MFdFlags, memfd_create};
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
}
