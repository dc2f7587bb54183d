// SPDX-License-Identifier: Apache-2.0
//! Steps on the domain: power, definition, password.

use std::{borrow::Cow, sync::Arc, time::Duration};

use salvor_domain_templates::{Domain, Role, renamed, same_definition};
use tokio::{
    sync::broadcast::error::RecvError,
    time::{Instant, timeout_at},
};
use uuid::Uuid;

use super::{Applied, Steps};
use crate::{
    core::{
        action::Shutdown,
        operation::GuestStop,
        password::CryptHash,
        plan::{Mark, Plan, PlannedStep, Step},
        reason::Reason,
        state::PowerState,
    },
    engine::{StepContext, StepError, StepReport},
    hypervisor::{
        Ask, Boot, Definition, HypervisorError, HypervisorEvent, HypervisorResult, PowerReading,
    },
};

/// Events say when a guest is off; this is how often it is looked at all the same.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// How long a guest that was asked to shut down, and then no longer should, is watched at most: most
/// guests that obey at all are off by then, and whoever cancels waits for it.
const OBEYS_LATE: Duration = Duration::from_secs(10);

/// How a guest is to be switched off.
#[derive(Debug, Clone, Copy)]
pub(super) struct Way {
    /// How long it may take by itself.
    pub(super) shutdown: Shutdown,
    /// Its agent is asked too.
    pub(super) ask_agent: bool,
    /// When its time is over it goes on.
    pub(super) or_fail: bool,
}

impl Steps {
    /// Asks the guest to shut down, again and again (a guest that is still booting loses the request),
    /// and ends it when its time is over. A guest whose CPUs are stopped cannot answer: it is ended.
    pub(super) async fn power_off(&self, context: &StepContext<'_>, way: Way) -> Applied {
        let (id, shutdown) = (context.plan.server, way.shutdown);
        let report = |guest_stop, message: &str| {
            Ok(Some(StepReport {
                message: message.to_owned(),
                guest_stop: Some(guest_stop),
                untouched: false,
            }))
        };
        let Some(status) = self.on(id).await? else {
            return report(GuestStop::WasOff, "was off already");
        };
        if shutdown.timeout_ms > 0 && status.power == PowerState::Running {
            if self.shut_down(context, id, way).await? {
                return report(GuestStop::ByItself, "shut down by itself");
            }
            if way.or_fail {
                return Err(StepError::new(
                    Reason::GuestStillOn,
                    format!(
                        "the guest did not shut down within {} s and goes on; if it obeys later it goes off and stays off",
                        shutdown.timeout_ms.div_ceil(1000)
                    ),
                ));
            }
            self.end(id).await?;
            return report(GuestStop::Forced, "did not shut down in time and was ended");
        }
        if way.or_fail {
            return Err(StepError::untouched(
                Reason::GuestStillOn,
                format!(
                    "the guest is {} ({}), cannot shut down so, and goes on as it is",
                    status.power, status.reason
                ),
            ));
        }
        self.end(id).await?;
        report(GuestStop::Forced, "ended at once")
    }

    /// Asks until the guest is off (`true`) or its time is over.
    async fn shut_down(
        &self,
        context: &StepContext<'_>,
        id: Uuid,
        way: Way,
    ) -> Result<bool, StepError> {
        let shutdown = way.shutdown;
        // The power button first, then by turns: an agent that does not answer costs time each time.
        let mut ask = Ask::PowerButton;
        let deadline = Instant::now() + Duration::from_millis(shutdown.timeout_ms);
        let retry = Duration::from_millis(shutdown.retry_ms.max(1));
        let mut events = self.hypervisor.events();
        loop {
            match self.ask_to_shut_down(context, id, ask).await? {
                Ok(()) => {}
                // It went off in this very moment, or cannot be asked now (a frozen QEMU lets the
                // call hang): the next look decides, and in the end it is ended anyway.
                Err(
                    HypervisorError::Refused { .. }
                    | HypervisorError::NoDomain { .. }
                    | HypervisorError::NoGuestAgent { .. }
                    | HypervisorError::GuestAgentRefused { .. }
                    | HypervisorError::Deadline { .. },
                ) => {}
                Err(error) => return Err(error.into()),
            }
            ask = match ask {
                Ask::PowerButton if way.ask_agent => Ask::GuestAgent,
                Ask::PowerButton | Ask::GuestAgent => Ask::PowerButton,
            };
            let ask_again = (Instant::now() + retry).min(deadline);
            while Instant::now() < ask_again {
                if self.on(id).await?.is_none() {
                    return Ok(true);
                }
                let look_again = (Instant::now() + LOOK_AGAIN).min(ask_again);
                tokio::select! {
                    // A time-out is the next look's turn.
                    _ = timeout_at(look_again, news_of(&mut events, id)) => {}
                    () = context.cancel.cancelled() => return Err(StepError::cancelled()),
                }
            }
            if Instant::now() >= deadline {
                return Ok(self.on(id).await?.is_none());
            }
        }
    }

    /// A frozen QEMU lets the call hang; nobody who cancels waits for that. The call is left to itself
    /// then: a request that is made in spite of it is what taking back watches for.
    async fn ask_to_shut_down(
        &self,
        context: &StepContext<'_>,
        id: Uuid,
        ask: Ask,
    ) -> Result<HypervisorResult<()>, StepError> {
        let hypervisor = Arc::clone(&self.hypervisor);
        let asked = tokio::spawn(async move { hypervisor.shutdown(id, ask).await });
        tokio::select! {
            asked = asked => asked.map_err(|error| {
                StepError::new(Reason::Internal, format!("asking a guest to shut down panicked: {error}"))
            }),
            () = context.cancel.cancelled() => Err(StepError::cancelled()),
        }
    }

    /// Ends the guest. It is off then.
    async fn end(&self, id: Uuid) -> Result<(), StepError> {
        Ok(self.hypervisor.destroy(id).await?)
    }

    /// The domain's power while it has a QEMU. A crashed one that is kept (`on_crash` preserve) has.
    async fn on(&self, id: Uuid) -> Result<Option<PowerReading>, StepError> {
        Ok(self
            .hypervisor
            .power(id)
            .await?
            .filter(|status| status.power.is_on() || status.power == PowerState::Crashed))
    }

    pub(super) async fn is_off(&self, id: Uuid) -> Result<bool, StepError> {
        Ok(self.on(id).await?.is_none())
    }

    /// Takes a power-off back: the guest that ran runs again.
    ///
    /// A request to shut down cannot be taken back: a guest that is still on may be on its way down.
    /// It is watched for as long as it was to be given, up to [`OBEYS_LATE`]. One that takes longer
    /// goes off after the operation has ended, as if it had been told so from inside: the observer
    /// sees that, and it stays off. A server that is to be deleted stays as it is at once.
    pub(super) async fn power_on_again(
        &self,
        context: &StepContext<'_>,
        shutdown: Shutdown,
        boot: Boot,
    ) -> Result<(), StepError> {
        let is_off = tokio::select! {
            biased;
            () = context.server_goes.cancelled() => return Ok(()),
            is_off = self.obeys_late(context.plan.server, shutdown) => is_off?,
        };
        // Begun, a start has to be waited for, or it would be made after the delete.
        if is_off && !context.server_goes.is_cancelled() {
            self.hypervisor.start(context.plan.server, boot).await?;
        }
        Ok(())
    }

    /// Is the guest off, now or within the time that it is watched for?
    async fn obeys_late(&self, id: Uuid, shutdown: Shutdown) -> Result<bool, StepError> {
        let mut events = self.hypervisor.events();
        let watched = Duration::from_millis(shutdown.timeout_ms).min(OBEYS_LATE);
        let deadline = Instant::now() + watched;
        loop {
            match self.on(id).await? {
                None => return Ok(true),
                Some(status) if status.power == PowerState::Crashed => {
                    self.end(id).await?;
                    return Ok(true);
                }
                // Only a guest that runs was asked, and only such a one can obey.
                Some(status) if status.power != PowerState::Running => return Ok(false),
                Some(_) if Instant::now() >= deadline => return Ok(false),
                Some(_) => {
                    let look_again = (Instant::now() + LOOK_AGAIN).min(deadline);
                    // A time-out is the next look's turn.
                    let _ = timeout_at(look_again, news_of(&mut events, id)).await;
                }
            }
        }
    }

    /// Defines the domain, unless its definition is neither the one that the plan was made for nor
    /// the one that it makes: the change would be lost, and the plan's own way back is not its. Only
    /// another name is no change in this sense ([`named_like`]).
    pub(super) async fn define(
        &self,
        plan: &Plan,
        xml: &str,
        mark: Mark,
        before: Option<&str>,
    ) -> Applied {
        let current = self.is_unchanged(plan.server, xml, mark, before).await?;
        let xml = named_like(xml, current.as_deref());
        self.hypervisor.define(&xml).await?;
        self.know_own(plan, &xml, mark).await?;
        // Where a guest waits to be started, that comes first: the outcome relies on the definition, the
        // guest does not.
        let starts = |step: &PlannedStep| matches!(step.step, Step::StartDomain { .. });
        if !plan.steps.iter().any(starts) {
            self.hypervisor.sync_definitions().await?;
        }
        Ok(None)
    }

    /// What the plan has defined is on the disk: to be called once its guest is on.
    pub(super) async fn sync_defined(&self, plan: &Plan) -> Result<(), StepError> {
        let defines = |step: &PlannedStep| matches!(step.step, Step::DefineDomain { .. });
        if plan.steps.iter().any(defines) {
            self.hypervisor.sync_definitions().await?;
        }
        Ok(())
    }

    /// Is the definition still what the plan's own change of it takes it to be? What would be refused
    /// then is better refused while the guest runs.
    pub(super) async fn expects_definition(&self, plan: &Plan) -> Result<(), StepError> {
        for planned in &plan.steps {
            if let Step::DefineDomain { xml, mark, before } = &planned.step {
                self.is_unchanged(plan.server, xml, *mark, before.as_deref())
                    .await?;
            }
        }
        Ok(())
    }

    /// The definition that there is, if it is the one before the plan or the one that the plan makes.
    async fn is_unchanged(
        &self,
        id: Uuid,
        xml: &str,
        mark: Mark,
        before: Option<&str>,
    ) -> Result<Option<String>, StepError> {
        let current = self.xml(id, Definition::Inactive).await?;
        if let Some(current) = &current
            && !before.is_some_and(|before| same_definition(current, before))
            && !is_of(current, xml, mark)
        {
            return Err(StepError::new(
                Reason::DomainChanged,
                format!(
                    "the definition of domain {id} was changed while the operation ran; ask again"
                ),
            ));
        }
        Ok(current)
    }

    /// Notes how libvirt prints what the plan has just defined, if that is the server's own domain: what
    /// is found later is held against it. One that is restored is known.
    async fn know_own(&self, plan: &Plan, xml: &str, mark: Mark) -> Result<(), StepError> {
        let own = matches!(mark, Mark::Plan(_)) && carries(xml, Mark::Own);
        if own && let Some(printed) = self.xml(plan.server, Definition::Inactive).await? {
            self.store
                .know_definition(plan.server, plan.id, printed)
                .await?;
        }
        Ok(())
    }

    pub(super) async fn is_defined(
        &self,
        plan: &Plan,
        xml: &str,
        mark: Mark,
    ) -> Result<bool, StepError> {
        let id = plan.server;
        let Some(current) = self.xml(id, Definition::Inactive).await? else {
            return Ok(false);
        };
        if !is_of(&current, xml, mark) {
            return Ok(false);
        }
        // It may have been defined by an agent that died before it noted that, or synced it.
        self.know_own(plan, xml, mark).await?;
        self.hypervisor.sync_definitions().await?;
        Ok(true)
    }

    /// Takes a definition back: the one before, or none. What is neither missing nor of this step
    /// was not changed by it, and is left alone.
    pub(super) async fn define_again(
        &self,
        id: Uuid,
        xml: &str,
        mark: Mark,
        before: Option<&str>,
    ) -> Result<(), StepError> {
        let current = self.xml(id, Definition::Inactive).await?;
        match before {
            _ if current
                .as_ref()
                .is_some_and(|current| !is_of(current, xml, mark)) => {}
            Some(before) => {
                let before = named_like(before, current.as_deref());
                self.hypervisor.define(&before).await?;
            }
            // The definition may be the server's own, coming back from a rescue: its NVRAM is too.
            None => self.hypervisor.undefine(id).await?,
        }
        Ok(self.hypervisor.sync_definitions().await?)
    }

    /// Takes it back that the domain was undefined. A definition that is there now is somebody's.
    pub(super) async fn define_removed(&self, id: Uuid, before: &str) -> Result<(), StepError> {
        if self.xml(id, Definition::Inactive).await?.is_none() {
            self.hypervisor.define(before).await?;
        }
        Ok(self.hypervisor.sync_definitions().await?)
    }

    pub(super) async fn undefine(&self, id: Uuid, tpm_goes: bool) -> Applied {
        if tpm_goes {
            self.hypervisor.undefine_with_tpm(id).await?;
        } else {
            self.hypervisor.undefine(id).await?;
        }
        self.hypervisor.sync_definitions().await?;
        Ok(None)
    }

    pub(super) async fn is_undefined(&self, id: Uuid) -> Result<bool, StepError> {
        let status = self.hypervisor.domain(id).await?;
        if status.is_some_and(|status| status.persistent) {
            return Ok(false);
        }
        self.hypervisor.sync_definitions().await?;
        Ok(true)
    }

    /// Starts the guest. One that is on already, as it was to be started, is left as it is; if the plan
    /// did not switch it off itself, somebody else has started it, and it is not this plan's to end.
    pub(super) async fn start(&self, plan: &Plan, mark: Mark, boot: Boot) -> Applied {
        let id = plan.server;
        let switches_off = |step: &PlannedStep| matches!(step.step, Step::PowerOff { .. });
        let was_on = || {
            Ok(Some(StepReport {
                message: "was on already".to_owned(),
                untouched: !plan.steps.iter().any(switches_off),
                ..StepReport::default()
            }))
        };
        match self.on(id).await? {
            None => {}
            Some(status) if status.power == PowerState::Paused => {
                return Err(StepError::untouched(
                    Reason::LibvirtRefused,
                    format!("domain {id} is paused: unpause the server or stop it"),
                ));
            }
            // What is left of a guest that crashed cannot go on, and is in the way of a new start.
            Some(status) if status.power == PowerState::Crashed => self.end(id).await?,
            Some(_) if self.is_started(id, mark).await? => return was_on(),
            Some(_) => {
                return Err(StepError::new(
                    Reason::LibvirtRefused,
                    format!(
                        "domain {id} runs already, but not as it was to be started: somebody else started it"
                    ),
                ));
            }
        }
        if let Some(definition) = self.xml(id, Definition::Inactive).await? {
            self.boots.begins(id, &definition).await;
        }
        match self.hypervisor.start(id, boot).await {
            Ok(()) => {}
            // Of a start that fails nothing stays on: what is on was started by somebody else meanwhile.
            Err(HypervisorError::Refused { .. }) if self.is_started(id, mark).await? => {
                return was_on();
            }
            Err(error) => return Err(error.into()),
        }
        self.check_started(id, mark).await
    }

    /// A guest may be off again already; but what runs has to be what was to be started.
    pub(super) async fn check_started(&self, id: Uuid, mark: Mark) -> Applied {
        match self.xml(id, Definition::Live).await? {
            Some(xml) if !carries(&xml, mark) => {
                self.end(id).await?;
                Err(StepError::new(
                    Reason::LibvirtRefused,
                    format!(
                        "what libvirt started as domain {id} was not what was to be started, but memory that had been saved of something else; it was ended, so ask again"
                    ),
                ))
            }
            _ => Ok(None),
        }
    }

    pub(super) async fn is_started(&self, id: Uuid, mark: Mark) -> Result<bool, StepError> {
        let on = self.hypervisor.power(id).await?;
        if !on.is_some_and(|status| status.power.is_on()) {
            return Ok(false);
        }
        Ok(self
            .xml(id, Definition::Live)
            .await?
            .is_some_and(|xml| carries(&xml, mark)))
    }

    /// Takes a start back. A guest that somebody else started in its place is not ours to end.
    pub(super) async fn stop_started(&self, id: Uuid, mark: Mark) -> Result<(), StepError> {
        if self.is_started(id, mark).await? {
            self.end(id).await?;
        }
        Ok(())
    }

    pub(super) async fn drop_saved_memory(&self, id: Uuid) -> Applied {
        self.hypervisor.drop_saved_memory(id).await?;
        Ok(None)
    }

    pub(super) async fn set_user_password(
        &self,
        id: Uuid,
        user: &str,
        hash: &CryptHash,
    ) -> Applied {
        self.hypervisor.set_user_password(id, user, hash).await?;
        Ok(None)
    }

    async fn xml(&self, id: Uuid, which: Definition) -> Result<Option<String>, StepError> {
        match self.hypervisor.domain_xml(id, which).await {
            Ok(xml) => Ok(Some(xml)),
            Err(HypervisorError::NoDomain { .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

/// The definition under the name that the domain has now. libvirt defines no domain under another
/// name than it has, and who renamed it in the middle of a rescue (`virsh domrename`) meant that.
fn named_like<'a>(xml: &'a str, current: Option<&str>) -> Cow<'a, str> {
    let name = |xml: &str| Some(Domain::parse(xml).ok()?.name().to_owned());
    let now = current.and_then(name);
    match now.filter(|now| name(xml).is_some_and(|planned| planned != *now)) {
        Some(now) => renamed(xml, &now).map_or(Cow::Borrowed(xml), Cow::Owned),
        None => Cow::Borrowed(xml),
    }
}

/// Is this definition the one that a step made of `xml`?
fn is_of(current: &str, xml: &str, mark: Mark) -> bool {
    match mark {
        Mark::Plan(_) => carries(current, mark),
        // Our saved text is libvirt's own, so it prints the same again.
        Mark::Own => same_definition(current, xml),
    }
}

/// Does the definition carry what the plan expects of it?
fn carries(xml: &str, expected: Mark) -> bool {
    let mark = Domain::parse(xml)
        .ok()
        .and_then(|domain| domain.salvor_mark());
    match expected {
        Mark::Plan(plan) => mark.is_some_and(|mark| mark.plan == plan.to_string()),
        Mark::Own => mark.is_none_or(|mark| mark.role != Role::Rescue),
    }
}

/// Returns when there may be something new about a domain.
async fn news_of(events: &mut tokio::sync::broadcast::Receiver<HypervisorEvent>, id: Uuid) {
    loop {
        match events.recv().await {
            Ok(HypervisorEvent::Domain { id: about, .. }) if about == id => return,
            Ok(HypervisorEvent::Link(_) | HypervisorEvent::Resync) | Err(RecvError::Lagged(_)) => {
                return;
            }
            Ok(
                HypervisorEvent::Domain { .. }
                | HypervisorEvent::GuestAgent { .. }
                | HypervisorEvent::Guest { .. }
                | HypervisorEvent::BlockJob { .. }
                | HypervisorEvent::DeviceRemoved { .. }
                | HypervisorEvent::Balloon { .. },
            ) => {}
            // Nobody will tell: the caller's own look has to do.
            Err(RecvError::Closed) => std::future::pending().await,
        }
    }
}
