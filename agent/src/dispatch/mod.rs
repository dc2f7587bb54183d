// SPDX-License-Identifier: Apache-2.0
//! Takes an action from the edge to the journal: request id, admission, facts, plan, acceptance.
//!
//! This is the one way in. The API, the timers and the observers all submit their actions here, so
//! that each is admitted, planned and journaled alike. It knows no step and makes no change itself.

mod agents;
mod drift;
mod facts;
mod preview;

use std::{path::PathBuf, sync::Arc, time::Duration};

use salvor_domain_templates::Templates;
use tokio::sync::watch;
use uuid::Uuid;

use agents::Agents;
pub use drift::Drift;
pub use preview::{Preview, shown};

use crate::{
    core::{
        action::{Action, Shutdown, Verb},
        admission::{Allowed, admit, allowed, permit},
        caller::Who,
        layout::Layout,
        operation::OperationRecord,
        plan::{Mark, Plan, Step},
        planners,
        reason::{Reason, Refusal},
        record::ServerRecord,
        state::VmState,
    },
    engine::{Engine, now_ms},
    hypervisor::{Hypervisor, HypervisorError},
    store::{Accept, Accepted, Request, Store, StoreError},
};

/// An overtaking verb waits so long for the operation in flight to be taken back. Taking back is
/// mostly a destroy and a start, which take about half a second each on a healthy host.
const OVERTAKE_LIMIT: Duration = Duration::from_secs(300);

/// What is to be abandoned is given so long to be taken back in good order, if nobody says how long.
pub const ABANDON_AFTER: Duration = Duration::from_secs(60);

/// What the configuration says about actions.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Where things are.
    pub layout: Layout,
    /// Domain type of new domains: `kvm` or `qemu`.
    pub virt_type: String,
    /// Bytes that must stay free on the filesystem that servers' files are made on.
    pub reserve_bytes: u64,
    /// Rescues end by themselves after this time in milliseconds; 0 never.
    pub rescue_timeout_ms: u64,
    /// The host's rescue image: an id or a unique name.
    pub default_rescue_image: Option<String>,
    /// How guests are shut down, if neither the request nor the server says.
    pub shutdown: Shutdown,
    /// Where libvirt saves the memory of guests.
    pub saved_memory: PathBuf,
    /// Soft-deleted servers are removed after this time in milliseconds; 0: a delete removes at once.
    pub reclaim_ms: u64,
}

impl Settings {
    /// How this server's guest is shut down, if the request does not say.
    #[must_use]
    pub fn shutdown_of(&self, server: &ServerRecord) -> Shutdown {
        Shutdown {
            timeout_ms: server
                .shutdown_timeout_ms
                .unwrap_or(self.shutdown.timeout_ms),
            ..self.shutdown
        }
    }
}

/// What an action is to be done to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// A server.
    Server(Uuid),
    /// A server that is to be made, with this id: that of the domain, if it is to be adopted.
    New(Uuid),
}

impl Target {
    const fn id(self) -> Uuid {
        match self {
            Self::Server(id) | Self::New(id) => id,
        }
    }
}

/// What became of an action.
#[derive(Debug, Clone)]
pub struct Submitted {
    /// The operation.
    pub operation: OperationRecord,
    /// The plan; `None` if the same request was made before, and this is the operation it began.
    pub plan: Option<Arc<Plan>>,
}

/// The way in. Cheap to clone.
#[derive(Clone)]
pub struct Dispatcher {
    store: Store,
    engine: Engine,
    hypervisor: Arc<dyn Hypervisor>,
    templates: Arc<Templates>,
    settings: Arc<Settings>,
    agents: Arc<Agents>,
    draining: watch::Receiver<bool>,
}

impl Dispatcher {
    /// A dispatcher that takes actions until `draining` is true.
    #[must_use]
    pub fn new(
        store: Store,
        engine: Engine,
        hypervisor: Arc<dyn Hypervisor>,
        templates: Arc<Templates>,
        settings: Settings,
        draining: watch::Receiver<bool>,
    ) -> Self {
        Self {
            store,
            engine,
            hypervisor,
            templates,
            settings: Arc::new(settings),
            agents: Arc::default(),
            draining,
        }
    }

    /// The guest agent of a server has connected: it is worth asking again.
    pub fn agent_connected(&self, server: Uuid) {
        self.agents.answered(server);
    }

    /// What the configuration says about actions.
    #[must_use]
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Admits, plans and begins an action. Nothing has been touched if this fails.
    ///
    /// # Errors
    /// A [`Refusal`].
    pub async fn submit(
        &self,
        target: Target,
        action: Action,
        request: Request,
    ) -> Result<Submitted, Refusal> {
        if let Some(operation) = self
            .store
            .repeated(request.clone())
            .await
            .map_err(refused)?
        {
            return Ok(Submitted {
                operation,
                plan: None,
            });
        }
        if *self.draining.borrow() {
            return Err(Refusal::new(
                Reason::Draining,
                "the agent is stopping and takes no new work; retry when it is back",
            ));
        }
        let who = request.who.clone();
        let action = self.meant(target, action);
        let mut server = self.admitted(target, &action, &who)?;
        if action.verb().needs_lane()
            && let Some(operation) = server.as_ref().and_then(|server| server.operation)
        {
            self.overtake(operation, action.verb()).await?;
            server = self.admitted(target, &action, &who).map_err(|refusal| {
                if refusal.reason == Reason::ServerNotFound {
                    let gone = format!(
                        "server {} is gone: operations/{operation}, which was to make it or to remove it, has ended",
                        target.id()
                    );
                    return Refusal::new(refusal.reason, gone);
                }
                refusal
            })?;
        }
        let plan = self.plan(target, server.as_deref(), &action, &who).await?;
        self.validate(&plan).await?;
        let plan = Arc::new(plan);
        let accept = Accept {
            plan: Arc::clone(&plan),
            request,
            planned_for: server,
            now_ms: now_ms(),
        };
        match self.engine.submit(accept).await.map_err(refused)? {
            Accepted::New(operation) => {
                if operation.verb == Verb::ChangePassword {
                    self.heed_agent(&operation);
                }
                Ok(Submitted {
                    operation: *operation,
                    plan: Some(plan),
                })
            }
            Accepted::Before(operation) => Ok(Submitted {
                operation: *operation,
                plan: None,
            }),
        }
    }

    /// What a delete means here: where there is a time in which it can be undone, the server waits. One that
    /// was never built has nothing to come back to (Nova: `_delete` of
    /// `nova/api/openstack/compute/servers.py`).
    fn meant(&self, target: Target, action: Action) -> Action {
        let waits = self.settings.reclaim_ms > 0;
        match (&action, self.store.server(target.id())) {
            (Action::Delete, Some(server))
                if waits
                    && (server.vm_state == VmState::SoftDeleted
                        || allowed(Verb::SoftDelete, server.vm_state) != Allowed::No) =>
            {
                Action::SoftDelete
            }
            _ => action,
        }
    }

    /// The record, if the verb may be done to it now; `None` for verbs that make one.
    fn admitted(
        &self,
        target: Target,
        action: &Action,
        who: &Who,
    ) -> Result<Option<Arc<ServerRecord>>, Refusal> {
        let id = target.id();
        match (target, self.store.server(id)) {
            (Target::New(_), None) => permit(action.verb(), None, who).map(|()| None),
            (Target::New(_), Some(server)) => Err(Refusal::new(
                Reason::ServerExists,
                format!("{id} is a server already ({})", server.name),
            )),
            (Target::Server(_), Some(server)) => {
                admit(action.verb(), &server, who, now_ms())?;
                Ok(Some(server))
            }
            (Target::Server(_), None) => Err(Refusal::new(
                Reason::ServerNotFound,
                format!("there is no server {id}"),
            )),
        }
    }

    /// Cancels what is under way and waits until it has ended. Before a delete no guest is started
    /// again, only to be ended. A reset of the state waits for nothing that hangs.
    async fn overtake(&self, operation: Uuid, by: Verb) -> Result<(), Refusal> {
        let cancelled = match by {
            Verb::Delete | Verb::ForceDelete => self.engine.abandon(operation).await,
            Verb::ResetState => self
                .engine
                .give_up(operation, ABANDON_AFTER)
                .await
                .map(|_| ()),
            _ => self.engine.cancel(operation).await,
        };
        match cancelled {
            Ok(()) => {}
            // It only cleans up, or has just ended.
            Err(StoreError::Refused(refusal)) if refusal.reason == Reason::NotCancellable => {}
            Err(error) => return Err(refused(error)),
        }
        let view = self
            .engine
            .wait(operation, OVERTAKE_LIMIT)
            .await
            .map_err(refused)?;
        if view.is_some_and(|view| !view.operation.state.is_final()) {
            return Err(Refusal::new(
                Reason::ServerBusy,
                format!(
                    "operations/{operation} was cancelled but has not ended within {} s; try again",
                    OVERTAKE_LIMIT.as_secs()
                ),
            )
            .about("operation", format!("operations/{operation}")));
        }
        Ok(())
    }

    async fn plan(
        &self,
        target: Target,
        server: Option<&ServerRecord>,
        action: &Action,
        who: &Who,
    ) -> Result<Plan, Refusal> {
        let facts = self.gather(target.id(), server, action, who).await?;
        planners::plan(server, action, &facts, &self.templates)
    }

    /// Asks libvirt whether it would take the domains that the plan makes. Those that it gave us it
    /// takes back.
    async fn validate(&self, plan: &Plan) -> Result<(), Refusal> {
        for planned in &plan.steps {
            if let Step::DefineDomain {
                xml,
                mark: Mark::Plan(_),
                ..
            } = &planned.step
            {
                self.hypervisor
                    .validate(xml)
                    .await
                    .map_err(|error| match error {
                        HypervisorError::Refused { message, .. } => Refusal::new(
                            Reason::DomainInvalid,
                            format!(
                                "libvirt does not take the domain that would be defined: {message}"
                            ),
                        ),
                        error => Refusal::from(error),
                    })?;
            }
        }
        Ok(())
    }
}

/// A refusal from what the store says.
pub(crate) fn refused(error: StoreError) -> Refusal {
    match error {
        StoreError::Refused(refusal) => refusal,
        error => {
            tracing::error!(error = &error as &dyn std::error::Error, "the store failed");
            Refusal::new(
                Reason::Internal,
                "the agent's store failed; its log has the details",
            )
        }
    }
}
