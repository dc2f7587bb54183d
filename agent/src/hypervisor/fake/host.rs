// SPDX-License-Identifier: Apache-2.0
//! The fake host: its domains and what may be done to them. It knows no calls and no processes.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use uuid::Uuid;

use crate::core::{facts::Capacity, state::PowerState};
use crate::hypervisor::{CryptHash, DomainStatus, HypervisorError, HypervisorResult, StuckCall};

/// One domain of the fake host.
#[derive(Debug, Clone)]
pub(super) struct Domain {
    pub(super) name: String,
    pub(super) inactive: Option<String>,
    pub(super) live: Option<String>,
    pub(super) power: PowerState,
    pub(super) reason: &'static str,
    /// What ran when its memory was saved.
    pub(super) managed_save: Option<String>,
    /// Is it started with the host? Goes with the definition, and is not in it.
    pub(super) autostart: bool,
}

impl Domain {
    pub(super) fn status(&self, id: Uuid) -> DomainStatus {
        DomainStatus {
            id,
            name: self.name.clone(),
            power: self.power,
            reason: self.reason.to_owned(),
            persistent: self.inactive.is_some(),
            managed_save: self.managed_save.is_some(),
        }
    }
}

/// What a test has said of the guest that runs in a domain.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Guest {
    pub(super) acpi_requests_to_ignore: u32,
    pub(super) agent: bool,
    /// Why its disk `vda` failed.
    pub(super) disk_error: Option<&'static str>,
}

/// What is to happen to the next call of one name.
#[derive(Debug, Clone)]
pub(super) struct Planned {
    pub(super) error: HypervisorError,
    pub(super) takes_effect: bool,
}

/// A host of 32 GiB with a network and a bridge.
fn usual_capacity() -> Capacity {
    Capacity {
        memory_mib: 32 * 1024,
        max_vcpus: Some(255),
        networks: Some(BTreeMap::from([("default".to_owned(), true)])),
        interfaces: Some(BTreeSet::from(["br0".to_owned()])),
    }
}

#[derive(Debug, Clone)]
pub(super) struct HostState {
    pub(super) domains: BTreeMap<Uuid, Domain>,
    pub(super) guests: HashMap<Uuid, Guest>,
    pub(super) passwords: HashMap<Uuid, Vec<(String, CryptHash)>>,
    pub(super) planned: Vec<(String, Planned)>,
    pub(super) calls: Vec<String>,
    pub(super) stuck: Vec<StuckCall>,
    /// Definitions as they were when they were synced last.
    pub(super) on_disk: BTreeMap<Uuid, String>,
    pub(super) capacity: Capacity,
}

impl Default for HostState {
    fn default() -> Self {
        Self {
            domains: BTreeMap::new(),
            guests: HashMap::new(),
            passwords: HashMap::new(),
            planned: Vec::new(),
            calls: Vec::new(),
            stuck: Vec::new(),
            on_disk: BTreeMap::new(),
            capacity: usual_capacity(),
        }
    }
}

pub(super) fn element<'a>(xml: &'a str, name: &str) -> Option<&'a str> {
    let (_, rest) = xml.split_once(&format!("<{name}>"))?;
    let (text, _) = rest.split_once(&format!("</{name}>"))?;
    Some(text.trim())
}

pub(super) fn refused<T>(call: &'static str, message: impl Into<String>) -> HypervisorResult<T> {
    Err(HypervisorError::Refused {
        call,
        message: message.into(),
    })
}

pub(super) fn identity(call: &'static str, xml: &str) -> HypervisorResult<(Uuid, String)> {
    let id = element(xml, "uuid").and_then(|text| Uuid::parse_str(text).ok());
    match (id, element(xml, "name")) {
        (Some(id), Some(name)) if !name.is_empty() => Ok((id, name.to_owned())),
        _ => refused(call, "XML error: give the domain a <name> and a <uuid>"),
    }
}

impl HostState {
    pub(super) fn known(&mut self, id: Uuid) -> HypervisorResult<&mut Domain> {
        let missing = HypervisorError::NoDomain {
            domain: id.to_string(),
        };
        self.domains.get_mut(&id).ok_or(missing)
    }

    pub(super) fn running(
        &mut self,
        call: &'static str,
        id: Uuid,
    ) -> HypervisorResult<&mut Domain> {
        let domain = self.known(id)?;
        if domain.live.is_none() {
            return refused(call, "domain is not running");
        }
        Ok(domain)
    }

    pub(super) fn agent(&mut self, call: &'static str, id: Uuid) -> HypervisorResult<()> {
        self.running(call, id)?;
        if self.guests.get(&id).is_some_and(|guest| guest.agent) {
            return Ok(());
        }
        Err(HypervisorError::NoGuestAgent {
            reason: "QEMU guest agent is not connected".to_owned(),
        })
    }

    pub(super) fn define(&mut self, xml: &str) -> HypervisorResult<Uuid> {
        let call = "define";
        let (id, name) = identity(call, xml)?;
        if let Some((other, _)) = self
            .domains
            .iter()
            .find(|(i, d)| **i != id && d.name == name)
        {
            return refused(
                call,
                format!("domain '{name}' already exists with uuid {other}"),
            );
        }
        let domain = self.domains.entry(id).or_insert_with(|| Domain {
            name: name.clone(),
            inactive: None,
            live: None,
            power: PowerState::Shutdown,
            reason: "unknown",
            managed_save: None,
            autostart: false,
        });
        if domain.name != name {
            let old = &domain.name;
            return refused(
                call,
                format!("domain '{old}' is already defined with uuid {id}"),
            );
        }
        domain.inactive = Some(xml.to_owned());
        Ok(id)
    }

    pub(super) fn undefine(&mut self, id: Uuid) -> bool {
        let Some(domain) = self.domains.get_mut(&id) else {
            return false;
        };
        domain.managed_save = None;
        domain.autostart = false;
        let was = domain.inactive.take().is_some();
        if domain.live.is_none() {
            self.domains.remove(&id);
        }
        was
    }
}
