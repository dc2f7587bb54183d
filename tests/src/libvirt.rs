// SPDX-License-Identifier: Apache-2.0
//! A test's own way to libvirt, beside the agent's: to define domains by hand and to see what is really so.
//!
//! Each call opens a connection of its own on a thread of its own and has a deadline, so that neither a
//! killed libvirtd nor a frozen guest can hold a test up.

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use uuid::Uuid;
use virt::connect::Connect;
use virt::domain::{Domain, DomainState};
use virt::domain_snapshot::DomainSnapshot;
use virt::enumutil::Enum;
use virt::sys;

use crate::wait::wait_for;

const DEADLINE: Duration = Duration::from_secs(60);

/// Why a call to libvirt failed.
#[derive(Debug)]
pub enum LibvirtError {
    /// libvirt said no, or could not be reached.
    Refused(virt::error::Error),
    /// It did not come back in time.
    Late(Duration),
}

impl std::fmt::Display for LibvirtError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Refused(error) => write!(f, "libvirt refused: {error}"),
            Self::Late(after) => write!(f, "libvirt did not answer within {after:?}"),
        }
    }
}

impl std::error::Error for LibvirtError {}

/// The answer of a call to libvirt.
pub type LibvirtResult<T> = Result<T, LibvirtError>;

/// A domain as it is listed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedDomain {
    /// Its uuid.
    pub id: Uuid,
    /// Its name.
    pub name: String,
    /// Its state.
    pub state: DomainState,
}

/// libvirt under one URI.
#[derive(Debug, Clone)]
pub struct Libvirt {
    uri: String,
}

impl Libvirt {
    /// libvirt under `uri`. Nothing is opened yet.
    pub fn new(uri: &str) -> Self {
        // Errors come back as values; libvirt would also print them.
        virt::error::clear_error_callback();
        Self { uri: uri.into() }
    }

    /// Any call, with a connection of its own.
    pub fn call<T: Send + 'static>(
        &self,
        call: impl FnOnce(&Connect) -> Result<T, virt::error::Error> + Send + 'static,
    ) -> LibvirtResult<T> {
        let (sender, receiver) = channel();
        let uri = self.uri.clone();
        std::thread::Builder::new()
            .name("test-libvirt".into())
            .spawn(move || {
                let answer = Connect::open(Some(&uri)).and_then(|connection| call(&connection));
                // Nobody waits for an answer that is late.
                let _ = sender.send(answer);
            })
            .expect("a thread can be started");
        match receiver.recv_timeout(DEADLINE) {
            Ok(answer) => answer.map_err(LibvirtError::Refused),
            Err(RecvTimeoutError::Timeout) => Err(LibvirtError::Late(DEADLINE)),
            Err(RecvTimeoutError::Disconnected) => panic!("the call to libvirt panicked"),
        }
    }

    /// Any call about one domain.
    pub fn domain<T: Send + 'static>(
        &self,
        id: Uuid,
        call: impl FnOnce(&Domain) -> Result<T, virt::error::Error> + Send + 'static,
    ) -> LibvirtResult<T> {
        self.call(move |connection| {
            connection
                .lookup_domain_by_uuid(id)
                .and_then(|domain| call(&domain))
        })
    }

    /// All domains, by name.
    pub fn list(&self) -> LibvirtResult<Vec<ListedDomain>> {
        self.call(|connection| {
            let mut domains = Vec::new();
            for domain in connection.list_all_domains(0)? {
                domains.push(ListedDomain {
                    id: domain.uuid()?,
                    name: domain.name()?,
                    state: known(domain.info()?.state),
                });
            }
            domains.sort_by(|a, b| a.name.cmp(&b.name));
            Ok(domains)
        })
    }

    /// Defines a persistent domain and returns its uuid.
    pub fn define(&self, xml: &str) -> LibvirtResult<Uuid> {
        let xml = xml.to_owned();
        self.call(move |connection| connection.define_domain_xml(&xml)?.uuid())
    }

    /// Starts a domain.
    pub fn start(&self, id: Uuid) -> LibvirtResult<()> {
        self.domain(id, Domain::create)
    }

    /// Presses the power button.
    pub fn press_power_button(&self, id: Uuid) -> LibvirtResult<()> {
        self.domain(id, |domain| {
            domain.shutdown_flags(sys::VIR_DOMAIN_SHUTDOWN_ACPI_POWER_BTN)
        })
    }

    /// Pulls the plug.
    pub fn destroy(&self, id: Uuid) -> LibvirtResult<()> {
        self.domain(id, Domain::destroy)
    }

    /// Gives a domain that is off another name.
    pub fn rename(&self, id: Uuid, name: &str) -> LibvirtResult<()> {
        let name = name.to_owned();
        self.domain(id, move |domain| domain.rename(&name, 0))
    }

    /// Is a domain started with its host?
    pub fn autostart(&self, id: Uuid) -> LibvirtResult<bool> {
        self.domain(id, Domain::autostart)
    }

    /// Has a domain started with its host.
    pub fn set_autostart(&self, id: Uuid) -> LibvirtResult<()> {
        self.domain(id, |domain| domain.set_autostart(true))
    }

    /// The names of a domain's snapshots.
    pub fn snapshots(&self, id: Uuid) -> LibvirtResult<Vec<String>> {
        self.domain(id, |domain| {
            let snapshots = domain.list_all_snapshots(0)?;
            snapshots.iter().map(DomainSnapshot::name).collect()
        })
    }

    /// Has libvirt note a snapshot of a domain, as of one that was taken while it was off.
    pub fn note_snapshot(&self, id: Uuid, name: &str) -> LibvirtResult<()> {
        let name = name.to_owned();
        self.domain(id, move |domain| {
            let definition = domain.xml_desc(sys::VIR_DOMAIN_XML_INACTIVE)?;
            let xml = format!(
                "<domainsnapshot><name>{name}</name><state>shutoff</state>\
                 <creationTime>1700000000</creationTime>{definition}</domainsnapshot>"
            );
            let redefine = sys::VIR_DOMAIN_SNAPSHOT_CREATE_REDEFINE;
            domain.create_snapshot_xml(&xml, redefine).map(drop)
        })
    }

    /// Pauses a domain.
    pub fn suspend(&self, id: Uuid) -> LibvirtResult<()> {
        self.domain(id, Domain::suspend)
    }

    /// Removes a domain's definition, and its NVRAM, managed save image and snapshots' records with it.
    pub fn undefine(&self, id: Uuid) -> LibvirtResult<()> {
        self.domain(id, |domain| {
            domain.undefine_flags(
                sys::VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
                    | sys::VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
                    | sys::VIR_DOMAIN_UNDEFINE_NVRAM,
            )
        })
    }

    /// The XML of what runs (of the definition, if nothing does), with secrets.
    pub fn live_xml(&self, id: Uuid) -> LibvirtResult<String> {
        self.domain(id, |domain| domain.xml_desc(sys::VIR_DOMAIN_XML_SECURE))
    }

    /// The XML of the persistent definition, with secrets.
    pub fn inactive_xml(&self, id: Uuid) -> LibvirtResult<String> {
        self.domain(id, |domain| {
            domain.xml_desc(sys::VIR_DOMAIN_XML_SECURE | sys::VIR_DOMAIN_XML_INACTIVE)
        })
    }

    /// A domain's state.
    pub fn state(&self, id: Uuid) -> LibvirtResult<DomainState> {
        self.domain(id, |domain| Ok(known(domain.info()?.state)))
    }

    /// libvirt's number of a running domain: another one after every start.
    pub fn number(&self, id: Uuid) -> LibvirtResult<Option<u32>> {
        self.domain(id, |domain| Ok(domain.id()))
    }

    /// Waits until a domain is in the given state.
    #[track_caller]
    pub fn wait_state(&self, id: Uuid, state: DomainState, within: Duration) {
        wait_for(&format!("domain {id} is {state:?}"), within, || {
            (self.state(id).ok()? == state).then_some(())
        });
    }

    /// Removes a domain whatever its state. For the end of a test on a shared host.
    pub fn remove(&self, id: Uuid) {
        let _ = self.destroy(id);
        let _ = self.undefine(id);
    }
}

fn known(state: Enum<DomainState, sys::virDomainState>) -> DomainState {
    match state {
        Enum::Known(state) => state,
        Enum::Unknown(number) => panic!("libvirt told of a domain state {number}"),
    }
}
