// SPDX-License-Identifier: Apache-2.0
//! The engine: carries operations on, each in its server's lane.
//!
//! A server's lane is the `operation` of its record: the journal gives it to a plan when it accepts
//! it, and takes it back when the operation ends. So there is at most one operation on a server, also
//! across a restart, and operations on different servers never wait for each other here.
//!
//! The engine knows no verb and no step. Steps are applied by a [`StepRunner`], operations are
//! written to the [`Store`].

mod executor;
mod probe;
mod runner;

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use tokio::sync::watch;
use uuid::Uuid;

use executor::GiveUp;
pub(crate) use executor::now_ms;
#[cfg(feature = "failpoints")]
pub use probe::EnvProbe;
pub use probe::{Event, NoProbe, Point, Probe};
pub use runner::{StepContext, StepError, StepReport, StepRunner};

use crate::{
    core::{
        operation::{OperationRecord, OperationState},
        plan::Plan,
        reason::{Reason, Refusal},
    },
    store::{Accept, Accepted, Store, StoreError, StoreResult},
};

/// An operation as it is now.
#[derive(Debug, Clone)]
pub struct View {
    /// The operation.
    pub operation: Arc<OperationRecord>,
    /// How far the step with this index is, in percent, if it says so.
    pub percent: Option<(usize, u8)>,
}

/// The journal is tried again so long after it could not be written.
const STORE_PAUSE: Duration = Duration::from_secs(2);

/// Giving an operation up takes one transaction; the journal is not waited for longer.
const GIVE_UP_LIMIT: Duration = Duration::from_secs(30);

/// That it cannot be is said so often.
const SAY_EVERY: Duration = Duration::from_secs(60);

#[derive(Clone)]
struct Active {
    cancel: watch::Sender<bool>,
    /// It is no longer waited for.
    given_up: watch::Sender<bool>,
    server_goes: watch::Sender<bool>,
    view: watch::Receiver<View>,
}

/// What an operation under way is told and tells.
#[derive(Clone)]
struct Handles {
    cancel: watch::Sender<bool>,
    given_up: watch::Sender<bool>,
    server_goes: watch::Sender<bool>,
    view: watch::Sender<View>,
}

/// The engine. Cheap to clone.
#[derive(Clone)]
pub struct Engine {
    store: Store,
    runner: Arc<dyn StepRunner>,
    probe: Arc<dyn Probe>,
    active: Arc<Mutex<HashMap<Uuid, Active>>>,
    /// How many operations are under way.
    count: watch::Sender<usize>,
}

impl Engine {
    /// An engine that has not begun anything yet; see [`Engine::recover`].
    #[must_use]
    pub fn new(store: Store, runner: Arc<dyn StepRunner>, probe: Arc<dyn Probe>) -> Self {
        Self {
            store,
            runner,
            probe,
            active: Arc::default(),
            count: watch::channel(0).0,
        }
    }

    /// Takes up every operation that the journal says has not ended, and says how many these are.
    ///
    /// # Errors
    /// If the store fails.
    pub async fn recover(&self) -> StoreResult<usize> {
        let under_way = self.store.under_way().await?;
        let count = under_way.len();
        for (mut operation, plan) in under_way {
            operation.recoveries = operation.recoveries.saturating_add(1);
            tracing::info!(operation = %operation.id, server = %operation.server, verb = %operation.verb,
                state = %operation.state, "taking up an operation that was under way");
            let handles = self.register(&operation);
            self.begin(operation, Arc::new(plan), handles);
        }
        Ok(count)
    }

    /// Accepts a plan and begins it. If the same request was made before, nothing new begins.
    ///
    /// # Errors
    /// See [`Store::accept`].
    pub async fn submit(&self, accept: Accept) -> StoreResult<Accepted> {
        let engine = self.clone();
        // In a task of its own: a caller that goes away in the middle must not leave an accepted
        // plan that nobody carries on.
        tokio::spawn(async move { engine.accept(accept).await })
            .await
            .unwrap_or(Err(StoreError::Closed))
    }

    async fn accept(&self, accept: Accept) -> StoreResult<Accepted> {
        let plan = Arc::clone(&accept.plan);
        let request = accept.request.clone();
        let expected = OperationRecord::accepted(
            &plan,
            request.id,
            request.caller,
            &request.who,
            accept.now_ms,
        );
        // Known before it is accepted: whoever finds it on the server's record can cancel it.
        let handles = self.register(&expected);
        let accepted = self.store.accept(accept).await;
        match &accepted {
            // What changes the record alone has ended already.
            Ok(Accepted::New(operation)) if !operation.state.is_final() => {
                self.begin(OperationRecord::clone(operation), plan, handles);
            }
            Ok(Accepted::New(_) | Accepted::Before(_)) | Err(_) => self.forget(plan.id),
        }
        accepted
    }

    /// An operation as it is now.
    ///
    /// # Errors
    /// If the store fails.
    pub async fn operation(&self, id: Uuid) -> StoreResult<Option<View>> {
        if let Some(view) = self.watch(id) {
            let view = view.borrow().clone();
            return Ok(Some(view));
        }
        let operation = self.store.operation(id).await?;
        Ok(operation.map(|operation| View {
            operation: Arc::new(operation),
            percent: None,
        }))
    }

    /// Follows an operation that is under way.
    #[must_use]
    pub fn watch(&self, id: Uuid) -> Option<watch::Receiver<View>> {
        self.active().get(&id).map(|active| active.view.clone())
    }

    /// Waits until an operation has ended, at most so long, and says how it is then.
    ///
    /// # Errors
    /// If the store fails.
    pub async fn wait(&self, id: Uuid, limit: Duration) -> StoreResult<Option<View>> {
        if let Some(mut view) = self.watch(id) {
            // A time-out or an end of the sender are no errors here: the state is told anyway.
            let _ =
                tokio::time::timeout(limit, view.wait_for(|view| view.operation.state.is_final()))
                    .await;
        }
        self.operation(id).await
    }

    /// Asks for an operation to be cancelled. Returns once that is asked, not once it has ended.
    ///
    /// # Errors
    /// [`Reason::OperationNotFound`]; [`Reason::NotCancellable`] if its outcome stands.
    pub async fn cancel(&self, id: Uuid) -> StoreResult<()> {
        self.stop(id, false).await
    }

    /// As [`Engine::cancel`], because the server is to be deleted: taking back then starts no guest,
    /// also if it was begun already.
    ///
    /// # Errors
    /// Those of [`Engine::cancel`].
    pub async fn abandon(&self, id: Uuid) -> StoreResult<()> {
        self.stop(id, true).await
    }

    /// Cancels an operation, waits so long for its end, and gives it up if it has not ended by then: the
    /// step that hangs is left to itself, the operation is failed and its server in ERROR, with a fault that
    /// says which step that is and what may be left. A call to the hypervisor that is given up so is waited
    /// for when a later operation is taken back, as one that missed its deadline is. Says how it ended.
    ///
    /// # Errors
    /// [`Reason::OperationNotFound`]; [`Reason::NotCancellable`] if it has ended.
    pub async fn give_up(&self, id: Uuid, patience: Duration) -> StoreResult<Option<View>> {
        match self.stop(id, false).await {
            Ok(()) => {}
            // What only cleans up can hang as well.
            Err(StoreError::Refused(refusal))
                if refusal.reason == Reason::NotCancellable && self.watch(id).is_some() => {}
            Err(error) => return Err(error),
        }
        let view = self.wait(id, patience).await?;
        if view
            .as_ref()
            .is_none_or(|view| view.operation.state.is_final())
        {
            return Ok(view);
        }
        if let Some(active) = self.active().get(&id) {
            active.given_up.send_replace(true);
        }
        self.wait(id, GIVE_UP_LIMIT).await
    }

    async fn stop(&self, id: Uuid, server_goes: bool) -> StoreResult<()> {
        let active = self.active().get(&id).cloned();
        if let Some(active) = active {
            let state = active.view.borrow().operation.state;
            if server_goes {
                // First: whoever sees the cancel sees why.
                active.server_goes.send_replace(true);
            }
            return match state {
                OperationState::Running => {
                    active.cancel.send_replace(true);
                    Ok(())
                }
                // It is being taken back already.
                OperationState::Reverting => Ok(()),
                OperationState::CleaningUp
                | OperationState::Done
                | OperationState::Failed
                | OperationState::Cancelled => Err(not_cancellable(id, state)),
            };
        }
        match self.store.operation(id).await? {
            Some(operation) => Err(not_cancellable(id, operation.state)),
            None => Err(Refusal::new(
                Reason::OperationNotFound,
                format!("there is no operations/{id}"),
            )
            .into()),
        }
    }

    /// How many operations are under way.
    #[must_use]
    pub fn under_way(&self) -> usize {
        *self.count.borrow()
    }

    /// Waits until no operation is under way.
    pub async fn at_rest(&self) {
        let mut count = self.count.subscribe();
        // The engine itself keeps the sender, so there is no other end of this wait.
        let _ = count.wait_for(|count| *count == 0).await;
    }

    fn active(&self) -> std::sync::MutexGuard<'_, HashMap<Uuid, Active>> {
        self.active.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn register(&self, operation: &OperationRecord) -> Handles {
        let cancel = watch::Sender::new(operation.cancel_requested);
        let server_goes = watch::Sender::new(operation.server_goes);
        let given_up = watch::Sender::new(false);
        let view = watch::Sender::new(View {
            operation: Arc::new(operation.clone()),
            percent: None,
        });
        let mut active = self.active();
        active.insert(
            operation.id,
            Active {
                cancel: cancel.clone(),
                given_up: given_up.clone(),
                server_goes: server_goes.clone(),
                view: view.subscribe(),
            },
        );
        // Told under the lock, so that counts are told in the order in which they were true.
        self.count.send_replace(active.len());
        Handles {
            cancel,
            given_up,
            server_goes,
            view,
        }
    }

    fn forget(&self, id: Uuid) {
        let mut active = self.active();
        active.remove(&id);
        self.count.send_replace(active.len());
    }

    fn begin(&self, operation: OperationRecord, plan: Arc<Plan>, handles: Handles) {
        let engine = self.clone();
        tokio::spawn(async move {
            let id = operation.id;
            engine.carry_on(operation, plan, handles).await;
            engine.forget(id);
        });
    }

    /// Carries an operation on to its end. After a journal that could not be written (a full
    /// filesystem) and after a panic it is taken up again, from what the journal says: the server
    /// would be busy until a restart otherwise. What panics a second time is given up.
    async fn carry_on(&self, mut operation: OperationRecord, plan: Arc<Plan>, handles: Handles) {
        let id = operation.id;
        // In which states it has panicked, and whether the last one was there for the second time.
        let (mut panicked_in, mut give_up) = (Vec::new(), None);
        let mut given_up = handles.given_up.subscribe();
        let mut said: Option<Instant> = None;
        let mut may_say = || {
            let may = said.is_none_or(|at| at.elapsed() >= SAY_EVERY);
            if may {
                said = Some(Instant::now());
            }
            may
        };
        loop {
            let execution = executor::Execution {
                store: self.store.clone(),
                runner: Arc::clone(&self.runner),
                probe: Arc::clone(&self.probe),
                plan: Arc::clone(&plan),
                operation,
                view: handles.view.clone(),
                cancel: handles.cancel.clone(),
                server_goes: handles.server_goes.clone(),
            };
            let mut panicked = false;
            let mut running = tokio::spawn(execution.run(give_up));
            let abandoned = async {
                let _ = given_up.wait_for(|given_up| *given_up).await;
            };
            let ended = tokio::select! {
                ended = &mut running => Some(ended),
                // Once is enough: what is left to be done then waits for nothing.
                () = abandoned, if give_up != Some(GiveUp::Abandoned) => None,
            };
            let Some(ended) = ended else {
                running.abort();
                // It is gone when this returns, so nothing of it writes after what comes now.
                let _ = running.await;
                tracing::error!(operation = %id, "operation given up");
                give_up = Some(GiveUp::Abandoned);
                operation = match self.read_again(id, &mut may_say).await {
                    Some(operation) => operation,
                    None => return,
                };
                continue;
            };
            match ended {
                Ok(Ok(())) => return,
                Ok(Err(executor::Abandoned::Store(error))) => {
                    if may_say() {
                        tracing::error!(operation = %id, error = &error as &dyn std::error::Error,
                            "the journal cannot be written, so the operation cannot go on; trying again every {} s: is the state folder's filesystem full?", STORE_PAUSE.as_secs());
                    }
                }
                // The journal has it, so the next start takes it up.
                Ok(Err(abandoned @ executor::Abandoned::Died)) => {
                    tracing::error!(operation = %id, error = %abandoned, "operation left for recovery");
                    return;
                }
                // The runtime ends, and the agent with it.
                Err(error) if error.is_cancelled() => return,
                Err(error) => {
                    tracing::error!(operation = %id, %error, "carrying an operation on panicked; trying again");
                    panicked = true;
                }
            }
            tokio::time::sleep(STORE_PAUSE).await;
            operation = match self.read_again(id, &mut may_say).await {
                Some(operation) => operation,
                None => return,
            };
            if give_up != Some(GiveUp::Abandoned) {
                let again = panicked && panicked_in.contains(&operation.state);
                give_up = again.then_some(GiveUp::Panicked);
            }
            if panicked {
                panicked_in.push(operation.state);
            }
        }
    }
}

impl Engine {
    /// What the journal says of an operation; `None` if it says nothing or is closed.
    async fn read_again(
        &self,
        id: Uuid,
        may_say: &mut impl FnMut() -> bool,
    ) -> Option<OperationRecord> {
        loop {
            match self.store.operation(id).await {
                Ok(operation) => return operation,
                Err(StoreError::Closed) => return None,
                Err(error) => {
                    if may_say() {
                        tracing::error!(operation = %id, error = &error as &dyn std::error::Error,
                            "the journal cannot be read; trying again");
                    }
                }
            }
            tokio::time::sleep(STORE_PAUSE).await;
        }
    }
}

fn not_cancellable(id: Uuid, state: OperationState) -> StoreError {
    Refusal::new(
        Reason::NotCancellable,
        format!("operations/{id} cannot be cancelled any more: it is {state}"),
    )
    .into()
}
