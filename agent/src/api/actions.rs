// SPDX-License-Identifier: Apache-2.0
//! From a checked request to the dispatcher, for real and as a dry run.

use salvor_proto::google::longrunning::Operation;
use tonic::Status;
use tracing::Instrument as _;

use super::{
    Api,
    convert::operation::operation,
    edge::Call,
    errors::{About, status},
    password::Password,
    resolve,
    wish::{Ask, Subject, Wish},
};
use crate::{
    core::{
        action::Action,
        operation::OperationRecord,
        password::CryptHash,
        reason::{Code, Reason, Refusal},
        record::PasswordDelivery,
    },
    dispatch::{self, Submitted, Target, refused},
    secret::AdminPass,
    store::Request,
};

/// What only the first answer to a request tells.
pub(super) struct First {
    /// The password, if the action has one.
    pub(super) password: Option<AdminPass>,
    /// The ways by which it will be delivered.
    pub(super) delivery: Vec<PasswordDelivery>,
}

/// An accepted action.
pub(super) struct Done {
    /// Its operation.
    pub(super) operation: Operation,
    /// The operation's record.
    pub(super) record: OperationRecord,
    /// `None` if the same request was made before.
    pub(super) first: Option<First>,
}

/// A dry run.
pub(super) struct Preview {
    /// What would be done, if there is a plan.
    pub(super) planned: Option<dispatch::Preview>,
    /// Why the action would be refused, plan or not.
    pub(super) refusal: Option<Refusal>,
}

impl Api {
    /// Does what is asked for.
    pub(super) async fn perform<A: Ask>(&self, call: &Call, ask: A) -> Result<Done, Status> {
        let about = about(call, &ask);
        self.begin(call, ask)
            .await
            .map_err(|refusal| status(&refusal, &about))
    }

    async fn begin<A: Ask>(&self, call: &Call, ask: A) -> Result<Done, Refusal> {
        let mut wish = self.wish(ask)?;
        let request = Request {
            id: wish.request_id.take(),
            body_hash: std::mem::take(&mut wish.body_hash),
            caller: call.caller.to_string(),
            who: call.who.clone(),
        };
        // A call that is made again before it was answered waits for the first one, and does not overtake
        // what that has begun.
        let turn = match &request.id {
            Some(id) => Some(self.turns.of(id).lock_owned().await),
            None => None,
        };
        // First of all: what a repeated request names may be gone by now, by its own doing.
        if request.id.is_some()
            && let Some(record) = self
                .store
                .repeated(request.clone())
                .await
                .map_err(refused)?
        {
            return Ok(self.done(record, None));
        }
        let target = self.target(&wish).await?;
        let (action, password) = self.action(wish, Hash::Made).await?;
        // Between the journal and the engine there is no place to stop: a caller that goes away must
        // not take the task with it that has just given an operation its lane.
        let dispatcher = self.dispatcher.clone();
        let work = async move {
            let submitted = dispatcher.submit(target, action, request).await;
            drop(turn);
            submitted
        };
        let Submitted {
            operation: record,
            plan,
        } = tokio::spawn(work.in_current_span())
            .await
            .map_err(|_| Refusal::new(Reason::Internal, "submitting an action panicked"))??;
        let first = plan.map(|plan| First {
            password,
            delivery: plan.password_delivery.clone(),
        });
        Ok(self.done(record, first))
    }

    fn done(&self, record: OperationRecord, first: Option<First>) -> Done {
        let server = self.store.server(record.server);
        Done {
            operation: operation(&record, None, server.as_deref()),
            record,
            first,
        }
    }

    /// What an action would do. That it would be refused is an answer, not an error; that the
    /// request makes no sense or names nothing is an error.
    pub(super) async fn preview<A: Ask>(&self, call: &Call, ask: A) -> Result<Preview, Status> {
        let about = about(call, &ask);
        match self.try_preview(call, ask).await {
            Ok(preview) => Ok(preview),
            Err(refusal)
                if matches!(
                    refusal.reason.code(),
                    Code::InvalidArgument | Code::NotFound | Code::Internal
                ) =>
            {
                Err(status(&refusal, &about))
            }
            Err(refusal) => Ok(Preview {
                planned: None,
                refusal: Some(refusal),
            }),
        }
    }

    /// The request, checked. Where it does not say how long the guest may take to shut down, its server's
    /// property does, and else the configuration.
    fn wish<A: Ask>(&self, ask: A) -> Result<Wish, Refusal> {
        let settings = self.dispatcher.settings();
        let shutdown = match resolve::server(&self.store, ask.subject()) {
            Ok(server) => settings.shutdown_of(&server),
            // That there is no such server is said when it is looked for.
            Err(_) => settings.shutdown,
        };
        ask.wish(shutdown)
    }

    async fn try_preview<A: Ask>(&self, call: &Call, ask: A) -> Result<Preview, Refusal> {
        let wish = self.wish(ask)?;
        let target = self.target(&wish).await?;
        let (action, _) = self.action(wish, Hash::Omitted).await?;
        let preview = self.dispatcher.preview(target, &action, &call.who).await?;
        Ok(Preview {
            refusal: preview.refusal.clone(),
            planned: Some(preview),
        })
    }

    /// What the action is to be done to.
    async fn target(&self, wish: &Wish) -> Result<Target, Refusal> {
        match &wish.subject {
            Subject::Server(word) => Ok(Target::Server(resolve::server(&self.store, word)?.id)),
            Subject::Domain(word) => Ok(Target::New(
                resolve::domain(self.hypervisor.as_ref(), word).await?.id,
            )),
            Subject::New(id) => Ok(Target::New(*id)),
        }
    }

    /// The action with everything that was still to be filled in, and the password in clear.
    async fn action(&self, wish: Wish, hash: Hash) -> Result<(Action, Option<AdminPass>), Refusal> {
        let image = match &wish.image {
            Some(word) => Some(resolve::image(&self.store, word).await?.0.id),
            None => None,
        };
        let given = matches!(wish.password, Password::Given(_));
        let (password, hashed) = match hash {
            Hash::Made => wish.password.hashed().await?.unzip(),
            Hash::Omitted => (None, None),
        };
        let mut action = wish.action;
        fill(&mut action, image, hashed);
        // Nova answers a create and a rescue with the password whoever chose it, and a change with none.
        let told = !given || !matches!(action, Action::ChangePassword(_));
        Ok((action, password.filter(|_| told)))
    }
}

/// Is the password to be hashed? A dry run needs no hash, and making one takes time.
#[derive(Debug, Clone, Copy)]
enum Hash {
    Made,
    Omitted,
}

fn fill(action: &mut Action, image: Option<uuid::Uuid>, password: Option<CryptHash>) {
    let (image_field, password_field) = match action {
        Action::Create(args) => {
            if let Some(image) = image {
                args.image = image;
            }
            (None, &mut args.password)
        }
        Action::Rescue(args) => (Some(&mut args.image), &mut args.password),
        Action::ChangePassword(args) => (None, &mut args.password),
        Action::Adopt(_)
        | Action::Release
        | Action::Delete
        | Action::Start
        | Action::Stop(_)
        | Action::Unrescue(_)
        | Action::DeliverPassword
        | Action::Reboot(_)
        | Action::HardReboot
        | Action::Pause
        | Action::Unpause
        | Action::Suspend
        | Action::Resume
        | Action::CrashDump
        | Action::DumpMemory
        | Action::Lock(_)
        | Action::Unlock { .. }
        | Action::ResetState(_)
        | Action::SoftDelete
        | Action::Restore
        | Action::ForceDelete
        | Action::Update(_)
        | Action::AcceptDrift
        | Action::RestoreDefinition
        | Action::StartRescue => return,
    };
    if let Some(field) = image_field {
        *field = image;
    }
    if let Some(password) = password {
        *password_field = password;
    }
}

fn about<A: Ask>(call: &Call, ask: &A) -> About {
    About {
        verb: Some(A::VERB),
        subject: ask.subject().chars().take(256).collect(),
        ..call.about()
    }
}
