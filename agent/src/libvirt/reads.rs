// SPDX-License-Identifier: Apache-2.0
//! What is read of libvirt, with calls that take no domain's job lock and ask no monitor.

use std::collections::HashSet;

use uuid::Uuid;
use virt::connect::Connect;
use virt::domain::Domain;
use virt::error::{Error, ErrorNumber};
use virt::sys;

use super::errors::{Failure, is};
use super::{ffi, words};
use crate::hypervisor::{DomainStatus, HostFacts, PowerReading};

/// The domain, or `None` if there is none of this uuid.
pub(super) fn find(connect: &Connect, id: Uuid) -> Result<Option<Domain>, Failure> {
    match connect.lookup_domain_by_uuid(id) {
        Ok(domain) => Ok(Some(domain)),
        Err(error) if is(&error, ErrorNumber::NoDomain) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// The power, or `None` if the domain has gone meanwhile.
pub(super) fn power(domain: &Domain) -> Result<Option<PowerReading>, Failure> {
    match ffi::domain_state(domain) {
        Ok(raw) => {
            let (power, reason) = words::power(raw);
            let reason = reason.to_owned();
            Ok(Some(PowerReading { power, reason }))
        }
        Err(error) if is(&error, ErrorNumber::NoDomain) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// The status, or `None` if the domain has gone meanwhile.
pub(super) fn status(domain: &Domain) -> Result<Option<DomainStatus>, Failure> {
    let asked = (|| {
        let (power, reason) = words::power(ffi::domain_state(domain)?);
        Ok(DomainStatus {
            id: domain.uuid()?,
            name: domain.name()?,
            power,
            reason: reason.to_owned(),
            persistent: domain.is_persistent()?,
            managed_save: domain.has_managed_save(0)?,
        })
    })();
    match asked {
        Ok(status) => Ok(Some(status)),
        Err(error) if is(&error, ErrorNumber::NoDomain) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// The uuids of the domains that a filter of `virConnectListAllDomains` lets through.
fn uuids(
    connect: &Connect,
    filter: sys::virConnectListAllDomainsFlags,
) -> Result<HashSet<Uuid>, Failure> {
    let domains = connect.list_all_domains(filter)?;
    let uuids: Result<_, Error> = domains.iter().map(Domain::uuid).collect();
    Ok(uuids?)
}

/// Every domain with three calls in all, instead of three calls for each.
pub(super) fn all(connect: &Connect) -> Result<Vec<DomainStatus>, Failure> {
    let persistent = uuids(connect, sys::VIR_CONNECT_LIST_DOMAINS_PERSISTENT)?;
    let saved = uuids(connect, sys::VIR_CONNECT_LIST_DOMAINS_MANAGEDSAVE)?;
    let listed = ffi::all_domain_states(connect)?.into_iter();
    Ok(listed
        .map(|domain| {
            let (power, reason) = words::power(domain.state);
            DomainStatus {
                id: domain.id,
                name: domain.name,
                power,
                reason: reason.to_owned(),
                persistent: persistent.contains(&domain.id),
                managed_save: saved.contains(&domain.id),
            }
        })
        .collect())
}

/// The text of the first element of this name, which has no attributes and only text.
fn text_of<'a>(xml: &'a str, element: &str) -> Option<&'a str> {
    let (_, rest) = xml.split_once(&format!("<{element}>"))?;
    rest.split_once('<').map(|(text, _)| text)
}

/// What libvirt says of the host. Its capabilities are printed by libvirt, so looking for
/// a string in them is safe; the host's part comes first.
pub(super) fn facts(connect: &Connect) -> Result<HostFacts, Failure> {
    let capabilities = connect.capabilities()?;
    let node = connect.node_info()?;
    Ok(HostFacts {
        hostname: connect.hostname()?,
        arch: text_of(&capabilities, "arch")
            .unwrap_or_default()
            .to_owned(),
        cpus: node.cpus,
        memory_kib: node.memory,
        libvirt_version: words::version(connect.lib_version()?),
        hypervisor_version: words::version(connect.hyp_version()?),
    })
}
