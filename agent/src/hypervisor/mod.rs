// SPDX-License-Identifier: Apache-2.0
//! The seam to the hypervisor: what the agent may ask of it, in the agent's words.
//!
//! [`crate::libvirt`] implements it with real libvirt, [`fake`] in memory for tests. Every call has a
//! deadline of its own behind this trait; a call that does not come back ends in
//! [`HypervisorError::Deadline`] and is counted in [`Hypervisor::stuck_calls`].

pub mod fake;
mod guest;

use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::{broadcast, mpsc, watch};
use uuid::Uuid;

pub use self::guest::{
    ConsoleSaid, ConsoleSink, Control, Counters, DiskCounters, GuestInfo, InterfaceCounters,
    MemoryCounters,
};

pub use crate::core::password::CryptHash;
use crate::core::{
    facts::Capacity,
    incident::Incident,
    reason::{Reason, Refusal},
    state::PowerState,
};

/// What can go wrong when the hypervisor is asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HypervisorError {
    /// There is no connection to libvirt. Nothing is known of any domain until it is back.
    #[error("libvirt cannot be reached: {reason}")]
    LinkDown {
        /// What the connection said when it ended or could not be opened.
        reason: String,
    },
    /// The call did not come back in time. It may still take effect.
    #[error("libvirt call {call} did not answer within {after:?}")]
    Deadline {
        /// The libvirt function.
        call: &'static str,
        /// How long it was waited for.
        after: Duration,
    },
    /// The domain does not exist.
    #[error("there is no domain {domain}")]
    NoDomain {
        /// Its uuid or name.
        domain: String,
    },
    /// The guest agent did not answer, is not connected, or there is no channel for one.
    #[error("the guest agent does not answer: {reason}")]
    NoGuestAgent {
        /// libvirt's message.
        reason: String,
    },
    /// The guest agent answered that it does not do it.
    #[error("the guest agent refused: {reason}")]
    GuestAgentRefused {
        /// Its message, as libvirt tells it.
        reason: String,
    },
    /// libvirt refused.
    #[error("libvirt refused {call}: {message}")]
    Refused {
        /// The libvirt function.
        call: &'static str,
        /// libvirt's message.
        message: String,
    },
    /// What libvirt wrote may not be on the disk.
    #[error("{folder}, where libvirt keeps definitions, could not be synced: {message}")]
    NotSynced {
        /// The folder.
        folder: String,
        /// The system's message.
        message: String,
    },
    /// Somebody else holds the serial port.
    #[error("another client of libvirt is connected with the serial port of {domain}")]
    ConsoleTaken {
        /// The domain.
        domain: Uuid,
    },
    /// No more serial ports are connected with at once.
    #[error("the agent is connected with {limit} serial ports already, and with no more at once")]
    TooManyConsoles {
        /// So many.
        limit: usize,
    },
}

impl From<HypervisorError> for Refusal {
    fn from(error: HypervisorError) -> Self {
        let reason = match &error {
            HypervisorError::LinkDown { .. } => Reason::LibvirtUnavailable,
            HypervisorError::Deadline { .. } => Reason::DeadlineExceeded,
            HypervisorError::NoDomain { .. } => Reason::DomainNotFound,
            HypervisorError::NoGuestAgent { .. } => Reason::GuestAgentUnavailable,
            HypervisorError::GuestAgentRefused { .. } => Reason::GuestAgentRefused,
            HypervisorError::Refused { .. } => Reason::LibvirtRefused,
            HypervisorError::NotSynced { .. } => Reason::StorageFailed,
            HypervisorError::ConsoleTaken { .. } => Reason::ConsoleBusy,
            HypervisorError::TooManyConsoles { .. } => Reason::ConsoleLimit,
        };
        Refusal::new(reason, error.to_string())
    }
}

/// The answer of a call to the hypervisor.
pub type HypervisorResult<T> = Result<T, HypervisorError>;

/// What libvirt says of one domain at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DomainStatus {
    /// The domain's uuid, which is the server's.
    pub id: Uuid,
    /// The domain's name.
    pub name: String,
    /// Its power state in Nova's words. `Shutdown` only when the guest's process is gone: a domain
    /// that libvirt calls "in shutdown" is `Running` for the reason `shutting-down`.
    pub power: PowerState,
    /// libvirt's reason for the state, in its word (`booted`, `user`, `crashed`, `ioerror`, …).
    pub reason: String,
    /// Has it a persistent definition?
    pub persistent: bool,
    /// Is there a managed save image that the next start would restore?
    pub managed_save: bool,
}

/// What a guest's power is, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PowerReading {
    /// As in [`DomainStatus::power`].
    pub power: PowerState,
    /// As in [`DomainStatus::reason`].
    pub reason: String,
}

/// A disk of a running domain that could not be read or written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskError {
    /// Target of the disk (`vda`).
    pub disk: String,
    /// What is wrong, in words (`no space`, `failed`).
    pub error: &'static str,
}

/// Which of a domain's two definitions is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Definition {
    /// The running guest's.
    Live,
    /// The persistent one: what the next start will use.
    Inactive,
}

/// What a start does with saved memory (a managed save image).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Boot {
    /// It is brought back, with the domain as it was when it was saved.
    Resume,
    /// It is dropped: what boots is the persistent definition, whatever was saved before.
    Fresh,
}

/// How a guest is asked to shut down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ask {
    /// By the power button (ACPI).
    PowerButton,
    /// By its guest agent.
    GuestAgent,
}

/// The host as libvirt describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostFacts {
    /// libvirt's host name.
    pub hostname: String,
    /// CPU architecture (`x86_64`, …).
    pub arch: String,
    /// CPUs of the host.
    pub cpus: u32,
    /// Memory of the host in KiB.
    pub memory_kib: u64,
    /// The version of the libvirt daemon, `major.minor.release`.
    pub libvirt_version: String,
    /// The version of the hypervisor, `major.minor.release`.
    pub hypervisor_version: String,
}

/// The word of [`HypervisorEvent::Domain`] for a definition that is new or was changed.
pub const DEFINED: &str = "defined";

/// Its word for a definition that is gone. The guest may go on without one.
pub const UNDEFINED: &str = "undefined";

/// Something that happened at the hypervisor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HypervisorEvent {
    /// A domain changed its state, or was defined or undefined. The receiver asks for the state:
    /// an event is a hint that something is to be seen, never the truth itself.
    Domain {
        /// Which domain.
        id: Uuid,
        /// libvirt's word for the event (`started`, `stopped`, `defined`, …).
        what: &'static str,
    },
    /// The guest agent of a domain connected to its channel (`true`) or left it.
    GuestAgent {
        /// Which domain.
        id: Uuid,
        /// Is it there now?
        connected: bool,
    },
    /// Something happened in or to a guest besides its power.
    Guest {
        /// Which domain.
        id: Uuid,
        /// What happened.
        incident: Incident,
    },
    /// A job on a domain's disk ended, or waits to be told to end.
    BlockJob {
        /// Which domain.
        id: Uuid,
        /// Target of the disk (`vda`).
        disk: String,
        /// libvirt's word (`completed`, `failed`, `canceled`, `ready`).
        state: &'static str,
    },
    /// A device of a running domain is gone.
    DeviceRemoved {
        /// Which domain.
        id: Uuid,
        /// libvirt's alias of the device.
        device: String,
    },
    /// A guest has more or less memory than before.
    Balloon {
        /// Which domain.
        id: Uuid,
        /// How much, in KiB.
        memory_kib: u64,
    },
    /// The connection was lost or is back; after it is back everything has to be looked at anew.
    Link(LinkState),
    /// The receiver was too slow and events were dropped: look at everything anew.
    Resync,
}

/// The connection to libvirt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LinkState {
    /// All connections are open.
    Up,
    /// At least one of them is not.
    Down {
        /// Why.
        reason: String,
    },
}

/// A call that was given up on but has not come back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StuckCall {
    /// The libvirt function.
    pub call: &'static str,
    /// The domain it is about, if it is about one.
    pub domain: Option<Uuid>,
    /// How long ago it began.
    pub age: Duration,
}

impl StuckCall {
    /// Would it change a definition or a guest's power if it took effect now? Reads would not. A
    /// request to a guest may hang for as long as its QEMU does, and the guest may ignore it anyway.
    #[must_use]
    pub fn changes_domain(&self) -> bool {
        matches!(
            self.call,
            "virDomainDefineXML"
                | "virDomainUndefineFlags"
                | "virDomainManagedSaveRemove"
                | "virDomainCreate"
                | "virDomainDestroy"
                | "virDomainManagedSave"
                | "virDomainSuspend"
                | "virDomainResume"
        )
    }
}

/// What the agent may ask of a hypervisor.
#[async_trait]
pub trait Hypervisor: Send + Sync + 'static {
    /// The host's identity, versions and size.
    async fn host(&self) -> HypervisorResult<HostFacts>;

    /// What the host has for a new domain of this type (`kvm`, `qemu`) and machine.
    async fn capacity(&self, virt_type: &str, machine: &str) -> HypervisorResult<Capacity>;

    /// Every domain of the host, active or not.
    async fn domains(&self) -> HypervisorResult<Vec<DomainStatus>>;

    /// One domain by uuid; `None` if there is none.
    async fn domain(&self, id: Uuid) -> HypervisorResult<Option<DomainStatus>>;

    /// Only the power of one domain, which takes half the time of [`Hypervisor::domain`]; `None` if
    /// there is no such domain.
    async fn power(&self, id: Uuid) -> HypervisorResult<Option<PowerReading>>;

    /// One domain by name; `None` if there is none.
    async fn domain_by_name(&self, name: &str) -> HypervisorResult<Option<DomainStatus>>;

    /// A domain's XML. The inactive one comes with security info, so that defining it again gives
    /// back exactly the same domain. [`HypervisorError::NoDomain`] if there is no such domain or it
    /// has no such definition.
    async fn domain_xml(&self, id: Uuid, which: Definition) -> HypervisorResult<String>;

    /// Would libvirt and this QEMU take this XML? Nothing is changed on the host.
    async fn validate(&self, xml: &str) -> HypervisorResult<()>;

    /// Defines (or redefines) the persistent domain. Not held against the schema once more: what we
    /// made is, before its plan is accepted ([`Hypervisor::validate`]), and what libvirt gave us goes
    /// back whatever a schema says. A server may be down meanwhile.
    async fn define(&self, xml: &str) -> HypervisorResult<()>;

    /// Removes the persistent definition, with a managed save image and what libvirt notes of
    /// snapshots and checkpoints, which would stand in the way. NVRAM and TPM state stay: the
    /// definition may come back. No such domain is success.
    async fn undefine(&self, id: Uuid) -> HypervisorResult<()>;

    /// The same, and the state of its TPM goes as well.
    async fn undefine_with_tpm(&self, id: Uuid) -> HypervisorResult<()>;

    /// When this returns, all that was defined and undefined before outlives a power cut. libvirt syncs
    /// the file of a definition, but not the folder that says which file it is.
    async fn sync_definitions(&self) -> HypervisorResult<()>;

    /// Starts the domain: with its saved memory, or with its persistent definition.
    async fn start(&self, id: Uuid, boot: Boot) -> HypervisorResult<()>;

    /// Removes a managed save image. Without one, or without such a domain, it is success.
    async fn drop_saved_memory(&self, id: Uuid) -> HypervisorResult<()>;

    /// Asks the guest to shut down. Returns once asked, not once off.
    async fn shutdown(&self, id: Uuid, how: Ask) -> HypervisorResult<()>;

    /// Stops the guest's CPUs. A guest whose CPUs are stopped already is success.
    async fn pause(&self, id: Uuid) -> HypervisorResult<()>;

    /// Lets the guest's CPUs run. A guest whose CPUs run is success.
    async fn unpause(&self, id: Uuid) -> HypervisorResult<()>;

    /// Saves the guest's memory where the next start brings it back ([`Boot::Resume`]), and ends it. It takes as
    /// long as writing the memory does, and may be ended before ([`Hypervisor::abort_job`]): then the guest
    /// goes on.
    async fn save(&self, id: Uuid, limit: Duration) -> HypervisorResult<()>;

    /// Starts the domain with its saved memory, which stays where it is if that fails.
    async fn restore(&self, id: Uuid, limit: Duration) -> HypervisorResult<()>;

    /// Writes the guest's memory to a new file, in the ELF format of crash dumps. The guest stands still
    /// meanwhile, and nothing ends a dump before but the end of the guest: QEMU knows no such order.
    async fn dump(&self, id: Uuid, path: &str, limit: Duration) -> HypervisorResult<()>;

    /// How far a save or a dump is, in percent; `None` if there is none.
    async fn job_percent(&self, id: Uuid) -> HypervisorResult<Option<u8>>;

    /// Ends a save that is under way: the guest goes on. Without one it is success.
    async fn abort_job(&self, id: Uuid) -> HypervisorResult<()>;

    /// Injects an NMI.
    async fn inject_nmi(&self, id: Uuid) -> HypervisorResult<()>;

    /// Sets the guest's clock to the host's, through the guest agent.
    async fn set_guest_time(&self, id: Uuid) -> HypervisorResult<()>;

    /// Ends the guest at once; it is off when this returns. A domain that is off already is success.
    /// Goes over a connection of its own, so that it works while other calls hang.
    async fn destroy(&self, id: Uuid) -> HypervisorResult<()>;

    /// Sets a user's password in the guest through the guest agent.
    async fn set_user_password(
        &self,
        id: Uuid,
        user: &str,
        hash: &CryptHash,
    ) -> HypervisorResult<()>;

    /// Does the guest agent answer?
    async fn ping_guest_agent(&self, id: Uuid) -> HypervisorResult<()>;

    /// Events from now on.
    fn events(&self) -> broadcast::Receiver<HypervisorEvent>;

    /// The state of the connection.
    fn link(&self) -> watch::Receiver<LinkState>;

    /// Calls that were given up on but have not come back.
    fn stuck_calls(&self) -> Vec<StuckCall>;

    /// Connects with the running guest's serial port, over a connection and a thread of its own. What
    /// it says goes to `said` from now on, until that was told of the end; bytes for it go into the
    /// channel. Dropping the channel's sender ends the connection. Only one client at a time can be
    /// connected; `take_over` ends the other's connection.
    async fn open_console(
        &self,
        id: Uuid,
        take_over: bool,
        said: ConsoleSink,
    ) -> HypervisorResult<mpsc::Sender<Vec<u8>>>;

    /// A picture of the running guest's screen, as QEMU gives it: PNG or PPM.
    async fn screenshot(&self, id: Uuid) -> HypervisorResult<Vec<u8>>;

    /// How libvirt stands with the running guest's QEMU. That is not asked.
    async fn control(&self, id: Uuid) -> HypervisorResult<Control>;

    /// Counters of the running guest. Its QEMU is asked.
    async fn counters(&self, id: Uuid) -> HypervisorResult<Counters>;

    /// The disks that the running guest was stopped for, each with the error's word. Its QEMU is asked.
    async fn disk_errors(&self, id: Uuid) -> HypervisorResult<Vec<DiskError>>;

    /// What libvirt has to say about a domain.
    async fn domain_messages(&self, id: Uuid) -> HypervisorResult<Vec<String>>;

    /// What the guest agent says of itself and its system.
    async fn guest_info(&self, id: Uuid) -> HypervisorResult<GuestInfo>;
}
