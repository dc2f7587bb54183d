// SPDX-License-Identifier: Apache-2.0
//! libvirt: the only place that names the `virt` crate.
//!
//! [`Libvirt`] implements the seam. Reads, changes and destroys each have threads of their own, and
//! every thread a connection (`connections`, `threads`), so that a QEMU that hangs holds up its own
//! domain only. Events are hints; the truth is asked for. Nothing here knows a server, a plan or a
//! record.
//!
//! Rules that are easily broken:
//! * As reads only calls are made that neither take a domain's job lock nor ask its monitor:
//!   `virDomainGetState`, `virDomainGetXMLDesc`, lookups and listings.
//! * libvirtd holds a domain's own lock while it destroys it: 0.2 s as a rule, 10 s if its QEMU hangs.
//!   Who looks that domain up meanwhile waits, and while waiting keeps everybody from defining
//!   domains. So reads of a domain wait for our destroy of it on this side (`turns.rs`), and for each
//!   other.
//! * Guest agents are asked with a time limit that libvirt itself keeps, because a guest could
//!   otherwise hold a thread for as long as it likes.

mod call;
mod connections;
mod console;
mod definitions;
mod errors;
mod ffi;
mod guests;
mod link;
mod probes;
mod reads;
mod schema;
mod setup;
#[cfg(test)]
mod tests;
mod threads;
mod words;

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use async_trait::async_trait;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use nix::errno::Errno;
use tokio::sync::{Semaphore, broadcast, mpsc as channel, oneshot, watch};
use uuid::Uuid;
use virt::connect::Connect;
use virt::domain::Domain;
use virt::error::ErrorNumber;
use virt::sys;

use self::schema::SchemaChecks;
pub use self::schema::{SchemaError, check_schema};
use self::setup::start_event_loop;
pub use self::setup::{Config, OpenError};

use self::call::{Call, Waiting, link_down, panicked};
use self::connections::{Class, Connections, Notice, Supervisor, is_alive};
use self::definitions::{UNDEFINE_FLAGS, UNDEFINE_FLAGS_WITH_TPM};
use self::errors::{Failure, is, is_silent_end, refusal};
use self::reads::{all, capacity, facts, find, power, status};
use self::threads::{Job, Ticket};
use crate::core::{facts::Capacity, state::PowerState};
use crate::hypervisor::{
    Ask, Boot, ConsoleSink, Control, Counters, CryptHash, Definition, DiskError, DomainStatus,
    GuestInfo, HostFacts, Hypervisor, HypervisorError, HypervisorEvent, HypervisorResult,
    LinkState, PowerReading, StuckCall,
};
use crate::turns::Turns;

/// How many events a receiver may be behind before it has to look at everything anew.
const EVENT_BUFFER: usize = 4096;

/// How long a question that nothing depends on may take.
const PROBE: Duration = Duration::from_secs(4);

/// How long a picture of a screen may take: QEMU writes it to a file first.
const PICTURE: Duration = Duration::from_secs(20);

/// How long libvirt waits for each answer of a guest agent that nothing depends on.
const PROBE_AGENT_SECONDS: i32 = 2;

/// A libvirt as a hypervisor.
pub struct Libvirt {
    shared: Arc<Connections>,
    turns: Turns,
    schema: Arc<SchemaChecks>,
    /// One for each line to a serial port that may still be opened.
    lines: Arc<Semaphore>,
}

impl Libvirt {
    /// Sets the layer up and begins to connect. It does not wait for libvirt, which may come later:
    /// [`Hypervisor::link`] says when it is there.
    ///
    /// The first call in a process starts the thread of libvirt's event loop, which never ends, and
    /// ends libvirt's habit of printing every error to stderr.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn open(config: Config) -> Result<Self, OpenError> {
        if config.uri.contains('\0') {
            return Err(OpenError::Uri { uri: config.uri });
        }
        start_event_loop()?;
        let (notices, supervised) = mpsc::channel();
        let events = broadcast::Sender::new(EVENT_BUFFER);
        let shared = Arc::new(Connections::new(config, events, notices));
        let supervisor = Supervisor::new(Arc::clone(&shared), supervised);
        std::thread::Builder::new()
            .name("lv-supervisor".to_owned())
            .spawn(move || supervisor.run())
            .map_err(OpenError::Thread)?;
        let turns = Turns::default();
        Ok(Self {
            shared,
            turns,
            schema: Arc::default(),
            lines: Arc::new(Semaphore::new(console::LINES)),
        })
    }

    /// Does `work` with a connection on one of the threads of the class. While an earlier call of the
    /// class about the domain hangs, a further one would only take another thread and hang too.
    async fn call<T, F>(&self, class: Class, call: Call, work: F) -> HypervisorResult<T>
    where
        T: Send + 'static,
        F: FnOnce(&Connect) -> Result<T, Failure> + Send + 'static,
    {
        if let LinkState::Down { reason } = &*self.shared.link.borrow() {
            let reason = reason.clone();
            return Err(HypervisorError::LinkDown { reason });
        }
        if let Some(stuck) = call
            .domain
            .and_then(|domain| self.shared.stuck.in_the_way(class.name(), domain))
            .filter(|stuck| self.hangs(stuck))
        {
            return Err(HypervisorError::Deadline {
                call: stuck.call,
                after: stuck.age,
            });
        }
        let (answer, answered) = oneshot::channel();
        let ticket = Ticket::new(call.name, class.name(), call.domain);
        let shared = Arc::clone(&self.shared);
        let job = Job::new(&ticket, move |connect| {
            // Nobody may wait for it any more.
            let _ = answer.send(match connect {
                Ok(connect) => work(connect).map_err(|failure| match failure {
                    Failure::Said(error) => error,
                    Failure::Libvirt(error) if is_alive(connect) => refusal(&call, &error),
                    Failure::Libvirt(error) => link_down(&shared, &error),
                }),
                Err(error) => Err(link_down(&shared, &error)),
            });
        });
        let mut waiting = Waiting {
            shared: &self.shared,
            ticket: Some(&ticket),
        };
        self.shared.submit(class, job);
        match tokio::time::timeout(call.deadline, answered).await {
            Ok(answer) => {
                waiting.ticket = None;
                answer.unwrap_or_else(|_| Err(panicked(call.name)))
            }
            Err(_) => Err(call.too_late()),
        }
    }

    /// Like [`Self::call`], for reads: those of one subject wait for each other, and for our destroy
    /// of it, on this side.
    async fn read<T, F>(&self, subject: &str, call: Call, work: F) -> HypervisorResult<T>
    where
        T: Send + 'static,
        F: FnOnce(&Connect) -> Result<T, Failure> + Send + 'static,
    {
        let turn = self.turns.of(subject);
        let answer = tokio::time::timeout(call.deadline, async {
            let _turn = turn.lock_owned().await;
            self.call(Class::Read, call, work).await
        });
        answer.await.unwrap_or_else(|_| Err(call.too_late()))
    }

    /// Like [`Self::call`], for questions that nothing depends on: they have few threads, and while one
    /// about the domain hangs no other is asked.
    async fn probe<T, F>(&self, id: Uuid, call: Call, work: F) -> HypervisorResult<T>
    where
        T: Send + 'static,
        F: FnOnce(&Connect, &Domain) -> Result<T, Failure> + Send + 'static,
    {
        self.call(Class::Probe, call.about(id), move |connect| {
            work(connect, &connect.lookup_domain_by_uuid(id)?)
        })
        .await
    }

    /// Does a call that was given up on hang? One whose caller just went away may be about to come back.
    fn hangs(&self, stuck: &StuckCall) -> bool {
        stuck.age >= (self.shared.config.call_timeout / 2).min(HANGS)
    }

    fn call_named(&self, name: &'static str) -> Call {
        Call::new(name, self.shared.config.call_timeout)
    }
}

impl Drop for Libvirt {
    fn drop(&mut self) {
        self.shared.notify(Notice::Stop);
    }
}

/// Ends the process while calls to libvirt may be under way, which cannot be told to return. Whatever is to
/// outlive the process must be written before.
pub fn leave(code: u8) -> ! {
    ffi::exit_at_once(code)
}

/// A call that was given up on and is as old as this hangs.
const HANGS: Duration = Duration::from_secs(1);

/// Syncs a folder, or everything if that cannot be done for this one.
fn sync_folder(folder: &Path) -> io::Result<()> {
    match File::open(folder).and_then(|folder| folder.sync_all()) {
        // The disk is sick: syncing more does not help.
        Err(error) if error.raw_os_error() == Some(Errno::EIO as i32) => Err(error),
        // It is elsewhere, or its file system cannot sync a folder.
        Err(_) => {
            nix::unistd::sync();
            Ok(())
        }
        Ok(()) => Ok(()),
    }
}

/// How much of a job is done; `None` while its size is not known.
fn percent(processed: u64, total: u64) -> Option<u8> {
    let percent = processed
        .min(total)
        .saturating_mul(100)
        .checked_div(total)?;
    u8::try_from(percent).ok()
}

#[async_trait]
impl Hypervisor for Libvirt {
    async fn host(&self) -> HypervisorResult<HostFacts> {
        let call = self.call_named("virConnectGetCapabilities");
        self.read("host", call, facts).await
    }

    async fn capacity(&self, virt_type: &str, machine: &str) -> HypervisorResult<Capacity> {
        let call = self.call_named("virConnectGetDomainCapabilities");
        let (virt_type, machine) = (virt_type.to_owned(), machine.to_owned());
        let work = move |connect: &Connect| capacity(connect, &virt_type, &machine);
        self.read("capacity", call, work).await
    }

    async fn domains(&self) -> HypervisorResult<Vec<DomainStatus>> {
        let call = self.call_named("virConnectGetAllDomainStats");
        self.read("all", call, all).await
    }

    async fn domain(&self, id: Uuid) -> HypervisorResult<Option<DomainStatus>> {
        let call = self.call_named("virDomainGetState").about(id);
        self.read(&id.to_string(), call, move |connect| {
            find(connect, id)?.map_or(Ok(None), |domain| status(&domain))
        })
        .await
    }

    async fn power(&self, id: Uuid) -> HypervisorResult<Option<PowerReading>> {
        let call = self.call_named("virDomainGetState").about(id);
        self.read(&id.to_string(), call, move |connect| {
            find(connect, id)?.map_or(Ok(None), |domain| power(&domain))
        })
        .await
    }

    async fn domain_by_name(&self, name: &str) -> HypervisorResult<Option<DomainStatus>> {
        let call = self.call_named("virDomainLookupByName");
        let sought = name.to_owned();
        self.read(name, call, move |connect| {
            match connect.lookup_domain_by_name(&sought) {
                Ok(domain) => status(&domain),
                Err(error) if is(&error, ErrorNumber::NoDomain) => Ok(None),
                Err(error) => Err(error.into()),
            }
        })
        .await
    }

    async fn domain_xml(&self, id: Uuid, which: Definition) -> HypervisorResult<String> {
        let call = self.call_named("virDomainGetXMLDesc").about(id);
        self.read(&id.to_string(), call, move |connect| {
            let domain = connect.lookup_domain_by_uuid(id)?;
            // libvirt gives the other definition where the one asked for is missing.
            let (there, flags) = match which {
                Definition::Live => (domain.is_active()?, sys::VIR_DOMAIN_XML_SECURE),
                Definition::Inactive => (
                    domain.is_persistent()?,
                    sys::VIR_DOMAIN_XML_SECURE | sys::VIR_DOMAIN_XML_INACTIVE,
                ),
            };
            if !there {
                let domain = id.to_string();
                return Err(HypervisorError::NoDomain { domain }.into());
            }
            Ok(domain.xml_desc(flags)?)
        })
        .await
    }

    async fn validate(&self, xml: &str) -> HypervisorResult<()> {
        self.validate_definition(xml).await
    }

    async fn define(&self, xml: &str) -> HypervisorResult<()> {
        self.define_domain(xml).await
    }

    async fn undefine(&self, id: Uuid) -> HypervisorResult<()> {
        self.undefine_with(id, &UNDEFINE_FLAGS).await
    }

    async fn undefine_with_tpm(&self, id: Uuid) -> HypervisorResult<()> {
        self.undefine_with(id, &UNDEFINE_FLAGS_WITH_TPM).await
    }

    async fn sync_definitions(&self) -> HypervisorResult<()> {
        let folder = self.shared.config.definitions.clone();
        let told = folder.display().to_string();
        let work = tokio::task::spawn_blocking(move || sync_folder(&folder));
        let synced = work
            .await
            .unwrap_or_else(|error| Err(io::Error::other(error)));
        synced.map_err(|error| HypervisorError::NotSynced {
            folder: told,
            message: error.to_string(),
        })
    }

    async fn start(&self, id: Uuid, boot: Boot) -> HypervisorResult<()> {
        let call = Call::new("virDomainCreate", self.shared.config.start_timeout).about(id);
        self.call(Class::Mutate, call, move |connect| {
            let domain = connect.lookup_domain_by_uuid(id)?;
            let start = || match boot {
                Boot::Resume => domain.create(),
                Boot::Fresh => match domain.create_with_flags(sys::VIR_DOMAIN_START_FORCE_BOOT) {
                    // A driver that knows no saved memory, such as the test driver.
                    Err(error) if is(&error, ErrorNumber::InvalidArg) => domain.create(),
                    answer => answer,
                },
            };
            match start() {
                // libvirtd may still have work to do about the end of the guest before, and do it to
                // this one: it ends the new QEMU, which had no chance to say anything (seen with 9.0,
                // where shutting down and starting follow at once and several domains do so). That
                // work is done now.
                Err(error) if is_silent_end(&error) => {
                    tracing::warn!(domain = %id, %error, "starting the domain again");
                    Ok(start()?)
                }
                answer => Ok(answer?),
            }
        })
        .await
    }

    async fn drop_saved_memory(&self, id: Uuid) -> HypervisorResult<()> {
        let call = self.call_named("virDomainManagedSaveRemove").about(id);
        self.call(Class::Mutate, call, move |connect| {
            let Some(domain) = find(connect, id)? else {
                return Ok(());
            };
            if domain.has_managed_save(0)? {
                domain.managed_save_remove(0)?;
            }
            Ok(())
        })
        .await
    }

    async fn shutdown(&self, id: Uuid, how: Ask) -> HypervisorResult<()> {
        self.ask_to_shut_down(id, how).await
    }

    async fn pause(&self, id: Uuid) -> HypervisorResult<()> {
        // libvirt takes it for success where the CPUs are stopped already.
        self.ask_guest(id, "virDomainSuspend", |domain| Ok(domain.suspend()?))
            .await
    }

    async fn unpause(&self, id: Uuid) -> HypervisorResult<()> {
        self.ask_guest(id, "virDomainResume", |domain| Ok(domain.resume()?))
            .await
    }

    async fn save(&self, id: Uuid, limit: Duration) -> HypervisorResult<()> {
        let call = Call::new("virDomainManagedSave", limit).about(id);
        self.call(Class::Mutate, call, move |connect| {
            Ok(connect.lookup_domain_by_uuid(id)?.managed_save(0)?)
        })
        .await
    }

    async fn restore(&self, id: Uuid, limit: Duration) -> HypervisorResult<()> {
        let call = Call::new("virDomainCreate", limit).about(id);
        self.call(Class::Mutate, call, move |connect| {
            Ok(connect.lookup_domain_by_uuid(id)?.create()?)
        })
        .await
    }

    async fn dump(&self, id: Uuid, path: &str, limit: Duration) -> HypervisorResult<()> {
        let call = Call::new("virDomainCoreDumpWithFormat", limit).about(id);
        let path = path.to_owned();
        self.call(Class::Mutate, call, move |connect| {
            let domain = connect.lookup_domain_by_uuid(id)?;
            let format = sys::VIR_DOMAIN_CORE_DUMP_FORMAT_RAW;
            domain.core_dump_with_format(&path, format, sys::VIR_DUMP_MEMORY_ONLY)?;
            Ok(())
        })
        .await
    }

    async fn job_percent(&self, id: Uuid) -> HypervisorResult<Option<u8>> {
        let call = self.call_named("virDomainGetJobInfo").about(id);
        self.call(Class::Mutate, call, move |connect| {
            let Some(domain) = find(connect, id)? else {
                return Ok(None);
            };
            let job = ffi::job(&domain)?;
            Ok(job.and_then(|job| percent(job.processed, job.total)))
        })
        .await
    }

    async fn abort_job(&self, id: Uuid) -> HypervisorResult<()> {
        let call = Call::new("virDomainAbortJob", self.shared.config.guest_timeout).about(id);
        self.call(Class::Mutate, call, move |connect| {
            let Some(domain) = find(connect, id)? else {
                return Ok(());
            };
            match ffi::abort_job(&domain) {
                // There is none.
                Err(error) if is(&error, ErrorNumber::OperationInvalid) => Ok(()),
                answer => Ok(answer?),
            }
        })
        .await
    }

    async fn inject_nmi(&self, id: Uuid) -> HypervisorResult<()> {
        self.ask_guest(id, "virDomainInjectNMI", |domain| {
            Ok(ffi::inject_nmi(domain)?)
        })
        .await
    }

    async fn set_guest_time(&self, id: Uuid) -> HypervisorResult<()> {
        let now = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap_or_default();
        let command = serde_json::json!({
            "execute": "guest-set-time",
            "arguments": { "time": u64::try_from(now.as_nanos()).unwrap_or(u64::MAX) },
        });
        self.ask_agent(id, command.to_string()).await
    }

    async fn destroy(&self, id: Uuid) -> HypervisorResult<()> {
        // Reads that come now wait; one that is under way does not hold this up.
        let _turn = self.turns.of(&id.to_string()).try_lock_owned();
        let timeout = self.shared.config.destroy_timeout;
        let call = Call::new("virDomainDestroy", timeout).about(id);
        self.call(Class::Emergency, call, move |connect| {
            let Some(domain) = find(connect, id)? else {
                return Ok(());
            };
            let Err(error) = domain.destroy() else {
                return Ok(());
            };
            // It may have ended by itself; only what libvirt says of it now tells.
            match ffi::domain_state(&domain) {
                Ok(raw) if words::power(raw).0 == PowerState::Shutdown => Ok(()),
                Err(gone) if is(&gone, ErrorNumber::NoDomain) => Ok(()),
                _ => Err(error.into()),
            }
        })
        .await
    }

    async fn set_user_password(
        &self,
        id: Uuid,
        user: &str,
        hash: &CryptHash,
    ) -> HypervisorResult<()> {
        let command = serde_json::json!({
            "execute": "guest-set-user-password",
            "arguments": {
                "username": user,
                "password": BASE64_STANDARD.encode(&hash.0),
                "crypted": true,
            },
        });
        self.ask_agent(id, command.to_string()).await
    }

    async fn ping_guest_agent(&self, id: Uuid) -> HypervisorResult<()> {
        let command = r#"{"execute":"guest-ping"}"#;
        self.ask_agent(id, command.to_owned()).await
    }

    fn events(&self) -> broadcast::Receiver<HypervisorEvent> {
        self.shared.events.subscribe()
    }

    fn link(&self) -> watch::Receiver<LinkState> {
        self.shared.link.subscribe()
    }

    fn stuck_calls(&self) -> Vec<StuckCall> {
        self.shared.stuck.list()
    }

    async fn open_console(
        &self,
        id: Uuid,
        take_over: bool,
        said: ConsoleSink,
    ) -> HypervisorResult<channel::Sender<Vec<u8>>> {
        if let LinkState::Down { reason } = &*self.shared.link.borrow() {
            let reason = reason.clone();
            return Err(HypervisorError::LinkDown { reason });
        }
        console::open(&self.shared.config, &self.lines, id, take_over, said).await
    }

    async fn screenshot(&self, id: Uuid) -> HypervisorResult<Vec<u8>> {
        let call = Call::new("virDomainScreenshot", PICTURE);
        self.probe(id, call, probes::screenshot).await
    }

    async fn control(&self, id: Uuid) -> HypervisorResult<Control> {
        let call = Call::new("virDomainGetControlInfo", PROBE).about(id);
        self.read(&id.to_string(), call, move |connect| {
            probes::control(&connect.lookup_domain_by_uuid(id)?)
        })
        .await
    }

    async fn counters(&self, id: Uuid) -> HypervisorResult<Counters> {
        let call = Call::new("virDomainListGetStats", PROBE);
        self.probe(id, call, |_, domain| probes::counters(domain))
            .await
    }

    async fn disk_errors(&self, id: Uuid) -> HypervisorResult<Vec<DiskError>> {
        let call = Call::new("virDomainGetDiskErrors", PROBE);
        self.probe(id, call, |_, domain| probes::disk_errors(domain))
            .await
    }

    async fn domain_messages(&self, id: Uuid) -> HypervisorResult<Vec<String>> {
        let call = Call::new("virDomainGetMessages", PROBE).about(id);
        self.read(&id.to_string(), call, move |connect| {
            Ok(ffi::messages(&connect.lookup_domain_by_uuid(id)?)?)
        })
        .await
    }

    async fn guest_info(&self, id: Uuid) -> HypervisorResult<GuestInfo> {
        let each = Duration::from_secs(u64::from(PROBE_AGENT_SECONDS.unsigned_abs()));
        let call = Call::new("virDomainQemuAgentCommand", 4 * each);
        self.probe(id, call, |_, domain| {
            probes::guest_info(domain, PROBE_AGENT_SECONDS)
        })
        .await
    }
}
