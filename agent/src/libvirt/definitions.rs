// SPDX-License-Identifier: Apache-2.0
//! Definitions of domains: checked, written, removed.

use std::sync::Arc;

use uuid::Uuid;
use virt::error::ErrorNumber;
use virt::sys;

use super::Libvirt;
use super::connections::Class;
use super::errors::{is, schema_failure};
use super::reads::find;
use crate::hypervisor::HypervisorResult;

/// The flags of an undefine, best first: an older libvirt does not know the later ones, and without
/// that for NVRAM it refuses rather than to choose for us. What it notes of snapshots and checkpoints
/// goes: it would refuse otherwise, and a server with a snapshot could not be deleted.
pub(super) const UNDEFINE_FLAGS: [sys::virDomainUndefineFlagsValues; 3] = {
    let saved = sys::VIR_DOMAIN_UNDEFINE_MANAGED_SAVE | sys::VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA;
    let files =
        saved | sys::VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA | sys::VIR_DOMAIN_UNDEFINE_KEEP_NVRAM;
    [files | sys::VIR_DOMAIN_UNDEFINE_KEEP_TPM, files, saved]
};

/// The same for a domain whose TPM goes with it. A libvirt that does not know the flag (before 8.9) removes
/// the state of a TPM with every definition.
pub(super) const UNDEFINE_FLAGS_WITH_TPM: [sys::virDomainUndefineFlagsValues; 3] = {
    let [_, files, saved] = UNDEFINE_FLAGS;
    [files | sys::VIR_DOMAIN_UNDEFINE_TPM, files, saved]
};

/// Which domain is defined by this? Nobody asks for one without a uuid, which would be a new one.
pub(super) fn uuid_of(xml: &str) -> Option<Uuid> {
    let domain = salvor_domain_templates::Domain::parse(xml).ok()?;
    Uuid::parse_str(&domain.uuid()?).ok()
}

impl Libvirt {
    /// Asks whether libvirt's schema and QEMU's driver would take a definition.
    pub(super) async fn validate_definition(&self, xml: &str) -> HypervisorResult<()> {
        let name = "virConnectDomainXMLToNative";
        let (checks, checked) = (Arc::clone(&self.schema), xml.to_owned());
        let schema = self.call(Class::Mutate, self.call_named(name), move |_| {
            checks
                .check(&checked)
                .map_err(|error| schema_failure(name, &error))
        });
        let asked = xml.to_owned();
        let native = self.call(Class::Mutate, self.call_named(name), move |connect| {
            match connect.domain_xml_to_native("qemu-argv", &asked, 0) {
                Ok(_) => Ok(()),
                // Not QEMU: there is nothing more to ask.
                Err(error) if is(&error, ErrorNumber::NoSupport) => Ok(()),
                Err(error) => Err(error.into()),
            }
        });
        // One works in this process, the other in libvirt's: together they take no longer than one.
        let (schema, native) = tokio::join!(schema, native);
        schema.and(native)
    }

    /// Defines a domain.
    pub(super) async fn define_domain(&self, xml: &str) -> HypervisorResult<()> {
        let mut call = self.call_named("virDomainDefineXML");
        call.domain = uuid_of(xml);
        let xml = xml.to_owned();
        self.call(Class::Mutate, call, move |connect| {
            connect.define_domain_xml(&xml)?;
            Ok(())
        })
        .await
    }

    /// Removes a definition with the first flags that this libvirt knows.
    pub(super) async fn undefine_with(
        &self,
        id: Uuid,
        flags: &'static [sys::virDomainUndefineFlagsValues],
    ) -> HypervisorResult<()> {
        let call = self.call_named("virDomainUndefineFlags").about(id);
        self.call(Class::Mutate, call, move |connect| {
            let Some(domain) = find(connect, id)? else {
                return Ok(());
            };
            if !domain.is_persistent()? {
                return Ok(());
            }
            let mut answer = Ok(());
            for &flags in flags {
                answer = domain.undefine_flags(flags);
                match &answer {
                    Err(error) if is(error, ErrorNumber::InvalidArg) => {}
                    Err(error) if is(error, ErrorNumber::NoDomain) => return Ok(()),
                    _ => break,
                }
            }
            Ok(answer?)
        })
        .await
    }
}
