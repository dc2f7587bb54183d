// SPDX-License-Identifier: Apache-2.0
//! What is read of libvirt, with calls that take no domain's job lock and ask no monitor.

use std::collections::HashSet;

use uuid::Uuid;
use virt::connect::Connect;
use virt::domain::Domain;
use virt::error::{Error, ErrorNumber};
use virt::interface::Interface;
use virt::network::Network;
use virt::sys;

use super::errors::{Failure, is};
use super::{ffi, words};
use crate::core::facts::Capacity;
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

/// What libvirt says, or `None` if it cannot tell: a driver that it was built without, a daemon that
/// is not there, a machine type that QEMU does not know (which is said when the domain is validated).
fn if_told<T>(answer: Result<T, Error>) -> Result<Option<T>, Failure> {
    match answer {
        Ok(told) => Ok(Some(told)),
        Err(error)
            if [
                ErrorNumber::NoSupport,
                ErrorNumber::NoConnect,
                ErrorNumber::SystemError,
                ErrorNumber::InvalidArg,
            ]
            .iter()
            .any(|number| is(&error, *number)) =>
        {
            Ok(None)
        }
        Err(error) => Err(error.into()),
    }
}

/// The most CPUs in domain capabilities, as libvirt prints them.
pub(super) fn max_vcpus(capabilities: &str) -> Option<u32> {
    let (_, rest) = capabilities.split_once("<vcpu max='")?;
    rest.split_once('\'')?.0.parse().ok()
}

/// What the host has for a new domain.
pub(super) fn capacity(
    connect: &Connect,
    virt_type: &str,
    machine: &str,
) -> Result<Capacity, Failure> {
    let capabilities = connect.domain_capabilities(None, None, Some(machine), Some(virt_type), 0);
    let networks = connect.list_all_networks(0).and_then(|networks| {
        let named = |network: &Network| Ok((network.name()?, network.is_active()?));
        networks.iter().map(named).collect()
    });
    let interfaces = connect
        .list_all_interfaces(0)
        .and_then(|interfaces| interfaces.iter().map(Interface::name).collect());
    Ok(Capacity {
        memory_mib: connect.node_info()?.memory / 1024,
        max_vcpus: if_told(capabilities)?.as_deref().and_then(max_vcpus),
        networks: if_told(networks)?,
        interfaces: if_told(interfaces)?,
    })
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
