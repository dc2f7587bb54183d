// SPDX-License-Identifier: Apache-2.0
//! A hypervisor in memory, for tests of everything above the seam.
//!
//! It is an ordinary public module, so that the workspace's test crate can use it too; the daemon
//! never makes one. It behaves like libvirt where the difference would hide a bug: two definitions
//! per domain, transient domains that vanish when they end, refused double starts, managed save
//! images, events as hints. It knows no XML beyond `<name>` and `<uuid>`, and no guest: what a guest
//! does is told by the test.
//!
//! A [`FakeHypervisor`] is one agent process at a [host](FakeHypervisor::attach). The host outlives
//! the process: a test lets a process die ([`FakeHypervisor::stop_after`]) and attaches the next one.
//! Clones are the same process.

mod guest;
mod host;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::{broadcast, mpsc, watch};
use uuid::Uuid;

use self::host::{HostState, Planned, element, identity, refused};
use super::{
    Ask, Boot, ConsoleSink, Control, Counters, CryptHash, Definition, DiskError, DomainStatus,
    GuestInfo, HostFacts, Hypervisor, HypervisorError, HypervisorEvent, HypervisorResult,
    LinkState, PowerReading, StuckCall,
};
use crate::core::{facts::Capacity, state::PowerState};

/// How many events a receiver may be behind.
const EVENT_BUFFER: usize = 1024;

#[derive(Debug)]
struct Host {
    state: Mutex<HostState>,
    events: broadcast::Sender<HypervisorEvent>,
    link: watch::Sender<LinkState>,
    /// Calls of this name do not come back.
    hangs: watch::Sender<Option<&'static str>>,
    /// What guests say on their serial ports.
    said: broadcast::Sender<(Uuid, Vec<u8>)>,
}

/// What happens to a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Trouble {
    Death,
    LinkLoss,
}

/// When it happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Moment {
    Never,
    /// Before the call after the n-th takes effect.
    After(usize, Trouble),
    /// When the n-th call has taken effect but not answered.
    Within(usize, Trouble),
}

#[derive(Debug)]
struct Process {
    /// With the number of calls since it was said.
    trouble: Mutex<(Moment, usize)>,
    dead: watch::Sender<bool>,
}

impl Process {
    fn new() -> Self {
        Self {
            trouble: Mutex::new((Moment::Never, 0)),
            dead: watch::Sender::new(false),
        }
    }
}

/// What becomes of one call of a process.
enum Fate {
    Lives,
    Before(Trouble),
    After(Trouble),
}

/// A hypervisor in memory. See the module's description.
#[derive(Debug, Clone)]
pub struct FakeHypervisor {
    host: Arc<Host>,
    process: Arc<Process>,
}

impl Default for FakeHypervisor {
    fn default() -> Self {
        Self::new()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl FakeHypervisor {
    /// An empty host with its first agent process.
    #[must_use]
    pub fn new() -> Self {
        Self {
            host: Arc::new(Host {
                state: Mutex::default(),
                events: broadcast::Sender::new(EVENT_BUFFER),
                link: watch::Sender::new(LinkState::Up),
                hangs: watch::Sender::new(None),
                said: broadcast::Sender::new(EVENT_BUFFER),
            }),
            process: Arc::new(Process::new()),
        }
    }

    /// The next agent process at the same host. An earlier one that has died stays dead.
    #[must_use]
    pub fn attach(&self) -> Self {
        Self {
            host: Arc::clone(&self.host),
            process: Arc::new(Process::new()),
        }
    }

    /// This process dies when it has made `n` more calls: the next one has no effect, and neither it
    /// nor any later one ever answers.
    pub fn stop_after(&self, n: usize) {
        *lock(&self.process.trouble) = (Moment::After(n, Trouble::Death), 0);
    }

    /// This process dies in its `n`-th call from now (counted from 1), which takes effect but never
    /// answers; nor does any later one, which has no effect.
    pub fn stop_within(&self, n: usize) {
        *lock(&self.process.trouble) = (Moment::Within(n, Trouble::Death), 0);
    }

    /// The link goes down before the call after the next `n` takes effect. [`Self::set_link`] brings
    /// it back.
    pub fn lose_link_after(&self, n: usize) {
        *lock(&self.process.trouble) = (Moment::After(n, Trouble::LinkLoss), 0);
    }

    /// The link goes down in the `n`-th call from now (counted from 1), which takes effect.
    pub fn lose_link_within(&self, n: usize) {
        *lock(&self.process.trouble) = (Moment::Within(n, Trouble::LinkLoss), 0);
    }

    /// A host like this one, with its first agent process, that goes its own way from here on.
    #[must_use]
    pub fn copy(&self) -> Self {
        let copy = Self::new();
        *lock(&copy.host.state) = lock(&self.host.state).clone();
        copy
    }

    /// Comes back when this process has died of [`Self::stop_after`] or [`Self::stop_within`].
    pub async fn stopped(&self) {
        let mut dead = self.process.dead.subscribe();
        // The sender lives in `self`, so the wait can only end with the value.
        let _ = dead.wait_for(|dead| *dead).await;
    }

    /// The next call of this name (`start`, `domain_xml`, …) fails so and has no effect.
    pub fn fail_next(&self, call: &str, error: HypervisorError) {
        self.plan(call, error, false);
    }

    /// The next call of this name takes effect and then fails so, as a call does whose answer was
    /// lost or came too late.
    pub fn lose_next_answer(&self, call: &str, error: HypervisorError) {
        self.plan(call, error, true);
    }

    fn plan(&self, call: &str, error: HypervisorError, takes_effect: bool) {
        let planned = Planned {
            error,
            takes_effect,
        };
        lock(&self.host.state)
            .planned
            .push((call.to_owned(), planned));
    }

    /// Calls of this name hang, without effect, until it is said that none does.
    pub fn hang(&self, call: Option<&'static str>) {
        self.host.hangs.send_replace(call);
    }

    /// How many calls hang now.
    #[must_use]
    pub fn hanging(&self) -> usize {
        self.host.hangs.receiver_count()
    }

    /// Every call of every process so far, as `name` or `name argument`.
    #[must_use]
    pub fn calls(&self) -> Vec<String> {
        lock(&self.host.state).calls.clone()
    }

    /// Forgets [`Self::calls`].
    pub fn clear_calls(&self) {
        lock(&self.host.state).calls.clear();
    }

    /// The guest does not hear the power button from now on.
    pub fn guest_ignores_acpi(&self, id: Uuid) {
        self.guest_misses_acpi(id, u32::MAX);
    }

    /// The guest misses the next `n` presses of the power button and hears the one after.
    pub fn guest_misses_acpi(&self, id: Uuid, n: u32) {
        lock(&self.host.state)
            .guests
            .entry(id)
            .or_default()
            .acpi_requests_to_ignore = n;
    }

    /// Whether what runs in the domain has a guest agent, from now on.
    pub fn guest_agent(&self, id: Uuid, connected: bool) {
        let mut state = lock(&self.host.state);
        state.guests.entry(id).or_default().agent = connected;
        if state.domains.get(&id).is_some_and(|d| d.power.is_on()) {
            self.emit(HypervisorEvent::GuestAgent { id, connected });
        }
    }

    /// What the host has for new domains, from now on.
    pub fn set_capacity(&self, capacity: Capacity) {
        lock(&self.host.state).capacity = capacity;
    }

    /// Marks a domain to be started with the host, as `virsh autostart` does. A transient one cannot be.
    pub fn set_autostart(&self, id: Uuid) {
        if let Some(domain) = lock(&self.host.state).domains.get_mut(&id) {
            domain.autostart = domain.inactive.is_some();
        }
    }

    /// Is a domain started with the host?
    #[must_use]
    pub fn autostart(&self, id: Uuid) -> bool {
        let state = lock(&self.host.state);
        state
            .domains
            .get(&id)
            .is_some_and(|domain| domain.autostart)
    }

    /// The passwords that were set through the guest agent, in order.
    #[must_use]
    pub fn passwords(&self, id: Uuid) -> Vec<(String, CryptHash)> {
        let state = lock(&self.host.state);
        state.passwords.get(&id).cloned().unwrap_or_default()
    }

    /// Loses the connection to libvirt, or brings it back. While it is down every call fails and
    /// the domains go on.
    pub fn set_link(&self, link: LinkState) {
        if self.host.link.send_replace(link.clone()) == link {
            return;
        }
        let back = link == LinkState::Up;
        self.emit(HypervisorEvent::Link(link));
        if back {
            self.emit(HypervisorEvent::Resync);
        }
    }

    /// What [`Hypervisor::stuck_calls`] says from now on.
    pub fn set_stuck_calls(&self, stuck: Vec<StuckCall>) {
        lock(&self.host.state).stuck = stuck;
    }

    /// The guest powers itself off.
    pub fn guest_powers_off(&self, id: Uuid) {
        self.end(&mut lock(&self.host.state), id, "shutdown");
    }

    /// The domain's QEMU dies: it is off, for the reason `crashed`.
    pub fn crash_guest(&self, id: Uuid) {
        self.end(&mut lock(&self.host.state), id, "crashed");
    }

    /// Puts the domain into a state that no call of the seam leads to (`paused`, `crashed`, …).
    pub fn set_power(&self, id: Uuid, power: PowerState, reason: &'static str) {
        if let Some(domain) = lock(&self.host.state).domains.get_mut(&id) {
            domain.power = power;
            domain.reason = reason;
            if !power.is_on() && power != PowerState::Crashed {
                domain.live = None;
            } else if domain.live.is_none() {
                domain.live.clone_from(&domain.inactive);
            }
        }
        self.emit(HypervisorEvent::Domain {
            id,
            what: "changed",
        });
    }

    /// An event of the hypervisor that changes nothing by itself.
    pub fn tell(&self, event: HypervisorEvent) {
        self.emit(event);
    }

    /// The disk `vda` fails, and the guest is paused for it.
    pub fn disk_fails(&self, id: Uuid, error: &'static str) {
        let mut state = lock(&self.host.state);
        state.guests.entry(id).or_default().disk_error = Some(error);
        drop(state);
        self.set_power(id, PowerState::Paused, "ioerror");
    }

    /// Gives the domain a managed save image; it is off then.
    pub fn managed_save(&self, id: Uuid) {
        self.save_memory(&mut lock(&self.host.state), id);
    }

    fn save_memory(&self, state: &mut HostState, id: Uuid) {
        let saved = state.domains.get(&id).and_then(|d| d.live.clone());
        self.end(state, id, "saved");
        if let Some(domain) = state.domains.get_mut(&id) {
            domain.managed_save = saved;
        }
    }

    /// Renames a domain that is off, as `virsh domrename` does.
    ///
    /// # Errors
    /// [`HypervisorError::Refused`] if it is on or another domain has the name.
    pub fn rename(&self, id: Uuid, name: &str) -> HypervisorResult<()> {
        let call = "rename";
        let mut state = lock(&self.host.state);
        if state.domains.values().any(|domain| domain.name == name) {
            return refused(call, format!("domain '{name}' already exists"));
        }
        let domain = state.known(id)?;
        if domain.live.is_some() {
            return refused(call, "cannot rename active domain");
        }
        let inactive = domain.inactive.as_deref();
        domain.inactive = inactive.and_then(|xml| salvor_domain_templates::renamed(xml, name));
        // Names are kept here as XML writes them.
        domain.name = salvor_domain_templates::xml::escape(name).into_owned();
        drop(state);
        for what in ["undefined", "defined"] {
            self.emit(HypervisorEvent::Domain { id, what });
        }
        Ok(())
    }

    /// The domain's definition as a power cut would leave it.
    #[must_use]
    pub fn definition_on_disk(&self, id: Uuid) -> Option<String> {
        lock(&self.host.state).on_disk.get(&id).cloned()
    }

    /// The host goes down and comes up: every domain is off, transient ones are gone, and no event
    /// tells of it.
    pub fn host_reboot(&self) {
        let mut state = lock(&self.host.state);
        state.domains.retain(|_, domain| domain.inactive.is_some());
        for domain in state.domains.values_mut() {
            domain.live = None;
            domain.power = PowerState::Shutdown;
            domain.reason = "unknown";
        }
    }

    fn emit(&self, event: HypervisorEvent) {
        // Nobody listening is no error.
        let _ = self.host.events.send(event);
    }

    /// The domain's guest ends: off if persistent, gone if not.
    fn end(&self, state: &mut HostState, id: Uuid, reason: &'static str) {
        let Some(domain) = state.domains.get_mut(&id) else {
            return;
        };
        if domain.live.take().is_none() {
            return;
        }
        domain.power = PowerState::Shutdown;
        domain.reason = reason;
        if domain.inactive.is_none() {
            state.domains.remove(&id);
        }
        if state.guests.get(&id).is_some_and(|guest| guest.agent) {
            self.emit(HypervisorEvent::GuestAgent {
                id,
                connected: false,
            });
        }
        self.emit(HypervisorEvent::Domain {
            id,
            what: "stopped",
        });
    }

    fn fate(&self) -> Fate {
        let mut trouble = lock(&self.process.trouble);
        trouble.1 = trouble.1.saturating_add(1);
        match *trouble {
            (Moment::After(n, Trouble::Death) | Moment::Within(n, Trouble::Death), call)
                if call > n =>
            {
                Fate::Before(Trouble::Death)
            }
            // A link that was lost can come back.
            (Moment::After(n, Trouble::LinkLoss), call) if call == n + 1 => {
                Fate::Before(Trouble::LinkLoss)
            }
            (Moment::Within(n, trouble), call) if call == n => Fate::After(trouble),
            _ => Fate::Lives,
        }
    }

    /// Every call goes through here: it is logged, may die or fail as planned, and works on the state.
    async fn call<T: Send>(
        &self,
        call: &'static str,
        argument: &str,
        effect: impl FnOnce(&Self, &mut HostState) -> HypervisorResult<T> + Send,
    ) -> HypervisorResult<T> {
        let mut hangs = self.host.hangs.subscribe();
        // The sender lives in `self`, so the wait can only end with the value.
        let _ = hangs.wait_for(|hangs| *hangs != Some(call)).await;
        let fate = self.fate();
        match fate {
            Fate::Before(Trouble::Death) => return self.die().await,
            Fate::Before(Trouble::LinkLoss) => self.lose_link(),
            Fate::Lives | Fate::After(_) => {}
        }
        let answer = self.run(call, argument, effect);
        match fate {
            Fate::After(Trouble::Death) => return self.die().await,
            Fate::After(Trouble::LinkLoss) => {
                self.lose_link();
                return Err(HypervisorError::LinkDown {
                    reason: "the connection was lost".to_owned(),
                });
            }
            Fate::Lives | Fate::Before(_) => {}
        }
        answer
    }

    fn lose_link(&self) {
        self.set_link(LinkState::Down {
            reason: "the connection was lost".to_owned(),
        });
    }

    fn run<T>(
        &self,
        call: &'static str,
        argument: &str,
        effect: impl FnOnce(&Self, &mut HostState) -> HypervisorResult<T>,
    ) -> HypervisorResult<T> {
        let mut state = lock(&self.host.state);
        state
            .calls
            .push(format!("{call} {argument}").trim_end().to_owned());
        let planned = state.planned.iter().position(|(name, _)| name == call);
        let planned = planned.map(|at| state.planned.remove(at).1);
        if let LinkState::Down { reason } = &*self.host.link.borrow() {
            return Err(HypervisorError::LinkDown {
                reason: reason.clone(),
            });
        }
        match planned {
            Some(planned) if planned.takes_effect => {
                effect(self, &mut state)?;
                Err(planned.error)
            }
            Some(planned) => Err(planned.error),
            None => effect(self, &mut state),
        }
    }

    async fn die<T>(&self) -> T {
        self.process.dead.send_replace(true);
        std::future::pending().await
    }
}

#[async_trait]
impl Hypervisor for FakeHypervisor {
    async fn host(&self) -> HypervisorResult<HostFacts> {
        self.call("host", "", |_, _| {
            Ok(HostFacts {
                hostname: "fake-host".to_owned(),
                arch: "x86_64".to_owned(),
                cpus: 8,
                memory_kib: 32 * 1024 * 1024,
                libvirt_version: "9.0.0".to_owned(),
                hypervisor_version: "7.2.0".to_owned(),
            })
        })
        .await
    }

    async fn capacity(&self, _virt_type: &str, machine: &str) -> HypervisorResult<Capacity> {
        self.call("capacity", machine, |_, state| Ok(state.capacity.clone()))
            .await
    }

    async fn domains(&self) -> HypervisorResult<Vec<DomainStatus>> {
        self.call("domains", "", |_, state| {
            Ok(state.domains.iter().map(|(id, d)| d.status(*id)).collect())
        })
        .await
    }

    async fn domain(&self, id: Uuid) -> HypervisorResult<Option<DomainStatus>> {
        self.call("domain", &id.to_string(), |_, state| {
            Ok(state.domains.get(&id).map(|d| d.status(id)))
        })
        .await
    }

    async fn power(&self, id: Uuid) -> HypervisorResult<Option<PowerReading>> {
        self.call("power", &id.to_string(), |_, state| {
            Ok(state.domains.get(&id).map(|d| PowerReading {
                power: d.power,
                reason: d.reason.to_owned(),
            }))
        })
        .await
    }

    async fn disk_errors(&self, id: Uuid) -> HypervisorResult<Vec<DiskError>> {
        self.call("disk_errors", &id.to_string(), |_, state| {
            let guest = state.guests.get(&id).copied().unwrap_or_default();
            let error = guest.disk_error.map(|error| DiskError {
                disk: "vda".to_owned(),
                error,
            });
            Ok(error.into_iter().collect())
        })
        .await
    }

    async fn domain_by_name(&self, name: &str) -> HypervisorResult<Option<DomainStatus>> {
        self.call("domain_by_name", name, |_, state| {
            let found = state.domains.iter().find(|(_, d)| d.name == name);
            Ok(found.map(|(id, d)| d.status(*id)))
        })
        .await
    }

    async fn domain_xml(&self, id: Uuid, which: Definition) -> HypervisorResult<String> {
        self.call("domain_xml", &id.to_string(), |_, state| {
            let domain = state.known(id)?;
            let xml = match which {
                Definition::Live => &domain.live,
                Definition::Inactive => &domain.inactive,
            };
            xml.clone().ok_or(HypervisorError::NoDomain {
                domain: id.to_string(),
            })
        })
        .await
    }

    async fn validate(&self, xml: &str) -> HypervisorResult<()> {
        self.call("validate", "", |_, _| identity("validate", xml).map(drop))
            .await
    }

    async fn define(&self, xml: &str) -> HypervisorResult<()> {
        let argument = element(xml, "uuid").unwrap_or_default();
        self.call("define", argument, |fake, state| {
            let id = state.define(xml)?;
            fake.emit(HypervisorEvent::Domain {
                id,
                what: "defined",
            });
            Ok(())
        })
        .await
    }

    async fn sync_definitions(&self) -> HypervisorResult<()> {
        self.call("sync_definitions", "", |_, state| {
            let domains = state.domains.iter();
            let defined = domains.filter_map(|(id, d)| Some((*id, d.inactive.clone()?)));
            state.on_disk = defined.collect();
            Ok(())
        })
        .await
    }

    async fn undefine_with_tpm(&self, id: Uuid) -> HypervisorResult<()> {
        // No TPM here has a state.
        self.undefine(id).await
    }

    async fn undefine(&self, id: Uuid) -> HypervisorResult<()> {
        self.call("undefine", &id.to_string(), |fake, state| {
            if state.undefine(id) {
                fake.emit(HypervisorEvent::Domain {
                    id,
                    what: "undefined",
                });
            }
            Ok(())
        })
        .await
    }

    async fn start(&self, id: Uuid, boot: Boot) -> HypervisorResult<()> {
        self.call("start", &id.to_string(), |fake, state| {
            let domain = state.known(id)?;
            if domain.live.is_some() {
                return refused("start", "domain is already running");
            }
            domain.power = PowerState::Running;
            match (domain.managed_save.take(), boot) {
                (Some(saved), Boot::Resume) => {
                    domain.live = Some(saved);
                    domain.reason = "restored";
                }
                (Some(_), Boot::Fresh) | (None, _) => {
                    domain.live.clone_from(&domain.inactive);
                    domain.reason = "booted";
                }
            }
            fake.emit(HypervisorEvent::Domain {
                id,
                what: "started",
            });
            if state.guests.get(&id).is_some_and(|guest| guest.agent) {
                fake.emit(HypervisorEvent::GuestAgent {
                    id,
                    connected: true,
                });
            }
            Ok(())
        })
        .await
    }

    async fn drop_saved_memory(&self, id: Uuid) -> HypervisorResult<()> {
        self.call("drop_saved_memory", &id.to_string(), |_, state| {
            if let Some(domain) = state.domains.get_mut(&id) {
                domain.managed_save = None;
            }
            Ok(())
        })
        .await
    }

    async fn shutdown(&self, id: Uuid, how: Ask) -> HypervisorResult<()> {
        self.call("shutdown", &id.to_string(), |fake, state| {
            state.running("shutdown", id)?;
            if how == Ask::GuestAgent {
                state.agent("shutdown", id)?;
                fake.end(state, id, "shutdown");
                return Ok(());
            }
            let guest = state.guests.entry(id).or_default();
            if guest.acpi_requests_to_ignore == 0 {
                fake.end(state, id, "shutdown");
            } else if guest.acpi_requests_to_ignore != u32::MAX {
                guest.acpi_requests_to_ignore -= 1;
            }
            Ok(())
        })
        .await
    }

    async fn pause(&self, id: Uuid) -> HypervisorResult<()> {
        self.call("pause", &id.to_string(), |fake, state| {
            let domain = state.running("pause", id)?;
            if domain.power != PowerState::Paused {
                (domain.power, domain.reason) = (PowerState::Paused, "user");
                fake.emit(HypervisorEvent::Domain {
                    id,
                    what: "suspended",
                });
            }
            Ok(())
        })
        .await
    }

    async fn unpause(&self, id: Uuid) -> HypervisorResult<()> {
        self.call("unpause", &id.to_string(), |fake, state| {
            let domain = state.running("unpause", id)?;
            if domain.power == PowerState::Running {
                return refused("unpause", "domain is already running");
            }
            (domain.power, domain.reason) = (PowerState::Running, "unpaused");
            fake.emit(HypervisorEvent::Domain {
                id,
                what: "resumed",
            });
            Ok(())
        })
        .await
    }

    async fn save(&self, id: Uuid, _limit: Duration) -> HypervisorResult<()> {
        self.call("save", &id.to_string(), |fake, state| {
            state.running("save", id)?;
            fake.save_memory(state, id);
            Ok(())
        })
        .await
    }

    async fn restore(&self, id: Uuid, _limit: Duration) -> HypervisorResult<()> {
        self.start(id, Boot::Resume).await
    }

    async fn dump(&self, id: Uuid, path: &str, _limit: Duration) -> HypervisorResult<()> {
        self.call("dump", &id.to_string(), |_, state| {
            let live = state.running("dump", id)?.live.clone();
            std::fs::write(path, live.unwrap_or_default())
                .or_else(|error| refused("dump", error.to_string()))
        })
        .await
    }

    async fn job_percent(&self, id: Uuid) -> HypervisorResult<Option<u8>> {
        self.call("job_percent", &id.to_string(), |_, _| Ok(None))
            .await
    }

    async fn abort_job(&self, id: Uuid) -> HypervisorResult<()> {
        self.call("abort_job", &id.to_string(), |_, _| Ok(())).await
    }

    async fn inject_nmi(&self, id: Uuid) -> HypervisorResult<()> {
        self.call("inject_nmi", &id.to_string(), |_, state| {
            state.running("inject_nmi", id).map(|_| ())
        })
        .await
    }

    async fn set_guest_time(&self, id: Uuid) -> HypervisorResult<()> {
        self.call("set_guest_time", &id.to_string(), |_, state| {
            state.agent("set_guest_time", id)
        })
        .await
    }

    async fn destroy(&self, id: Uuid) -> HypervisorResult<()> {
        self.call("destroy", &id.to_string(), |fake, state| {
            fake.end(state, id, "destroyed");
            Ok(())
        })
        .await
    }

    async fn set_user_password(
        &self,
        id: Uuid,
        user: &str,
        hash: &CryptHash,
    ) -> HypervisorResult<()> {
        self.call("set_user_password", &id.to_string(), |_, state| {
            state.agent("set_user_password", id)?;
            let passwords = state.passwords.entry(id).or_default();
            passwords.push((user.to_owned(), hash.clone()));
            Ok(())
        })
        .await
    }

    async fn ping_guest_agent(&self, id: Uuid) -> HypervisorResult<()> {
        self.call("ping_guest_agent", &id.to_string(), |_, state| {
            state.agent("ping_guest_agent", id)
        })
        .await
    }

    fn events(&self) -> broadcast::Receiver<HypervisorEvent> {
        self.host.events.subscribe()
    }

    fn link(&self) -> watch::Receiver<LinkState> {
        self.host.link.subscribe()
    }

    fn stuck_calls(&self) -> Vec<StuckCall> {
        lock(&self.host.state).stuck.clone()
    }

    async fn open_console(
        &self,
        id: Uuid,
        _take_over: bool,
        said: ConsoleSink,
    ) -> HypervisorResult<mpsc::Sender<Vec<u8>>> {
        self.call("open_console", &id.to_string(), |fake, state| {
            state.running("open_console", id)?;
            Ok(fake.line(id, said))
        })
        .await
    }

    async fn screenshot(&self, id: Uuid) -> HypervisorResult<Vec<u8>> {
        self.call("screenshot", &id.to_string(), |_, state| {
            state.running("screenshot", id)?;
            Ok(b"P6\n2 1\n255\nabcdef".to_vec())
        })
        .await
    }

    async fn control(&self, id: Uuid) -> HypervisorResult<Control> {
        self.call("control", &id.to_string(), |_, state| {
            state.running("control", id)?;
            Ok(guest::control())
        })
        .await
    }

    async fn counters(&self, id: Uuid) -> HypervisorResult<Counters> {
        self.call("counters", &id.to_string(), |_, state| {
            state.running("counters", id)?;
            Ok(guest::counters())
        })
        .await
    }

    async fn domain_messages(&self, id: Uuid) -> HypervisorResult<Vec<String>> {
        self.call("domain_messages", &id.to_string(), |_, state| {
            state.known(id)?;
            Ok(vec!["tainted: a test".to_owned()])
        })
        .await
    }

    async fn guest_info(&self, id: Uuid) -> HypervisorResult<GuestInfo> {
        self.call("guest_info", &id.to_string(), |_, state| {
            state.agent("guest_info", id)?;
            Ok(guest::info())
        })
        .await
    }
}
