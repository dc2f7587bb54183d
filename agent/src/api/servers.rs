// SPDX-License-Identifier: Apache-2.0
//! ServerService: reads come from the record, actions go to the dispatcher.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use prost::Message as _;
use salvor_proto::{google::longrunning::Operation, v1};
use tonic::{Request, Response, Status};

use super::{
    Api,
    actions::{Done, Preview},
    convert::{
        operation::{host_report, warnings},
        server::{operation_name, server},
        states::Wire,
        time::{duration, timestamp},
    },
    edge::Call,
    page::{self, PAGE_BYTES},
    resolve,
    validate::{self, Checked},
};
use crate::{
    core::{
        plan::Plan,
        reason::Refusal,
        record::{Origin, PasswordDelivery, ServerRecord},
        state::{PowerState, Status as ServerStatus, VmState},
        text,
    },
    engine::now_ms,
};

/// The filters of ListServers, checked.
#[derive(Debug, Default)]
struct Filter {
    name_contains: String,
    statuses: Vec<ServerStatus>,
    vm_states: Vec<VmState>,
    power_states: Vec<PowerState>,
    origin: Option<Origin>,
    tags: Vec<String>,
    locked: Option<bool>,
    project_id: String,
    metadata: BTreeMap<String, String>,
}

/// Each value once, so that a long list costs no more than a short one.
fn distinct<T: Ord>(values: impl Iterator<Item = Checked<T>>) -> Checked<Vec<T>> {
    let distinct: BTreeSet<T> = values.collect::<Checked<_>>()?;
    Ok(distinct.into_iter().collect())
}

/// The values behind the numbers of a repeated field; the unspecified one is none to look for.
fn values<T: Wire + Ord>(field: &str, numbers: &[i32]) -> Checked<Vec<T>> {
    distinct(numbers.iter().map(|number| {
        T::from_wire(field, *number)?
            .ok_or_else(|| Refusal::field(field, "must not hold the unspecified value"))
    }))
}

impl Filter {
    fn read(request: &v1::ListServersRequest) -> Checked<Self> {
        validate::text("name_contains", &request.name_contains)?;
        validate::text("project_id", &request.project_id)?;
        let status = |name: &String| {
            ServerStatus::from_name(name).ok_or_else(|| {
                let all: Vec<&str> = ServerStatus::ALL
                    .iter()
                    .map(|status| status.name())
                    .collect();
                Refusal::field(
                    "statuses",
                    format!(
                        "must be of {}, and one is {:?}",
                        all.join(", "),
                        text::echo(name)
                    ),
                )
            })
        };
        Ok(Self {
            name_contains: request.name_contains.clone(),
            statuses: distinct(request.statuses.iter().map(status))?,
            vm_states: values("vm_states", &request.vm_states)?,
            power_states: values("power_states", &request.power_states)?,
            origin: Origin::from_wire("origin", request.origin)?,
            tags: validate::tags("tags", &request.tags)?,
            locked: request.locked,
            project_id: request.project_id.clone(),
            metadata: validate::metadata("metadata", request.metadata.clone())?,
        })
    }

    fn matches(&self, server: &ServerRecord) -> bool {
        let any = |wanted: bool, found: bool| !wanted || found;
        server.name.contains(&self.name_contains)
            && any(
                !self.statuses.is_empty(),
                self.statuses.contains(&server.status()),
            )
            && any(
                !self.vm_states.is_empty(),
                self.vm_states.contains(&server.vm_state),
            )
            && any(
                !self.power_states.is_empty(),
                self.power_states.contains(&server.power.state),
            )
            && self.origin.is_none_or(|origin| origin == server.origin)
            && self.tags.iter().all(|tag| server.tags.contains(tag))
            && self
                .locked
                .is_none_or(|locked| locked == server.lock_at(now_ms()).is_some())
            && any(
                !self.project_id.is_empty(),
                self.project_id == server.owner.project_id,
            )
            && self
                .metadata
                .iter()
                .all(|(key, value)| server.metadata.get(key) == Some(value))
    }
}

fn list(api: &Api, request: &v1::ListServersRequest) -> Checked<v1::ListServersResponse> {
    let size = validate::page_size(request.page_size)?;
    let filter = Filter::read(request)?;
    let mut last =
        page::place('s', &request.page_token, |place| place.parse().ok())?.unwrap_or(i64::MIN);
    let (mut servers, mut bytes) = (Vec::with_capacity(size), 0);
    let mut next_page_token = String::new();
    for (order, record) in api.store.servers_after(last) {
        if !filter.matches(&record) {
            continue;
        }
        // A page says that there is a next one only if that is not empty.
        if servers.len() == size || bytes >= PAGE_BYTES {
            next_page_token = page::token('s', &last.to_string());
            break;
        }
        let shown = server(&record);
        bytes += shown.encoded_len();
        servers.push(shown);
        last = order;
    }
    Ok(v1::ListServersResponse {
        servers,
        next_page_token,
    })
}

fn deliveries(ways: &[PasswordDelivery]) -> Vec<i32> {
    ways.iter().map(|way| way.wire()).collect()
}

fn plan_response(preview: &Preview) -> v1::PlanActionResponse {
    let planned = preview.planned.as_ref();
    let plan = planned.map(|planned| &planned.plan);
    let steps = plan.map(|plan| plan.steps.as_slice()).unwrap_or_default();
    v1::PlanActionResponse {
        accepted: preview.refusal.is_none(),
        refusals: preview
            .refusal
            .iter()
            .map(|refusal| v1::Refusal {
                reason: refusal.reason.name().to_owned(),
                message: refusal.message.clone(),
            })
            .collect(),
        steps: steps
            .iter()
            .map(|planned| v1::PlanStep {
                kind: planned.step.kind().to_owned(),
                phase: planned.phase.name().to_owned(),
                description: planned.step.describe(),
                deadline: Some(duration(Duration::from_millis(planned.step.deadline_ms()))),
            })
            .collect(),
        domain_diff: planned
            .map(|planned| planned.domain_diff.clone())
            .unwrap_or_default(),
        changes: planned
            .iter()
            .flat_map(|planned| &planned.effects)
            .map(|effect| v1::RecordEffect {
                field: effect.field.clone(),
                before: effect.before.clone(),
                after: effect.after.clone(),
            })
            .collect(),
        overtakes: planned
            .and_then(|planned| planned.overtakes)
            .map(operation_name)
            .unwrap_or_default(),
        host: plan.and_then(Plan::host_report).map(host_report),
        files: steps
            .iter()
            .flat_map(|planned| planned.step.files())
            .map(|(path, effect)| v1::FileEffect {
                path,
                effect: effect.to_owned(),
            })
            .collect(),
        warnings: plan
            .map(|plan| warnings(&plan.warnings))
            .unwrap_or_default(),
    }
}

async fn drift(api: &Api, word: &str) -> Checked<v1::GetServerDriftResponse> {
    let server = resolve::server(&api.store, word)?;
    let drift = api.dispatcher.drift(&server).await?;
    let drifted = !drift.diff.is_empty();
    Ok(v1::GetServerDriftResponse {
        drifted,
        diff: drift.diff,
        since: server.drift_since_ms.filter(|_| drifted).map(timestamp),
        unknown: !drift.known,
    })
}

/// What every action answers besides what is its own.
struct Answer {
    operation: Option<Operation>,
    warnings: Vec<v1::Warning>,
    server_id: String,
    admin_pass: String,
    admin_pass_delivery: Vec<i32>,
}

impl From<Done> for Answer {
    fn from(done: Done) -> Self {
        let (admin_pass, admin_pass_delivery) = match &done.first {
            Some(first) => (
                first
                    .password
                    .as_ref()
                    .map(|password| password.expose().to_owned()),
                deliveries(&first.delivery),
            ),
            None => (None, Vec::new()),
        };
        Self {
            warnings: warnings(&done.record.warnings),
            server_id: done.record.server.to_string(),
            operation: Some(done.operation),
            admin_pass: admin_pass.unwrap_or_default(),
            admin_pass_delivery,
        }
    }
}

/// Actions whose answer is made of the fields of [`Answer`].
macro_rules! actions {
    ($($method:ident: $request:ident -> $response:ident { $($field:ident),* })+) => {
        #[tonic::async_trait]
        impl v1::server_service_server::ServerService for Api {
            $(async fn $method(&self, request: Request<v1::$request>) -> Result<Response<v1::$response>, Status> {
                let (call, message) = Call::open(request)?;
                let answer = Answer::from(self.perform(&call, message).await?);
                Ok(Response::new(v1::$response { $($field: answer.$field),* }))
            })+

            async fn get_server(
                &self,
                request: Request<v1::GetServerRequest>,
            ) -> Result<Response<v1::GetServerResponse>, Status> {
                let (call, message) = Call::open(request)?;
                match resolve::server(&self.store, &message.server) {
                    Ok(record) => Ok(Response::new(v1::GetServerResponse {
                        server: Some(server(&record)),
                    })),
                    Err(refusal) => Err(call.refuse(&refusal)),
                }
            }

            async fn list_servers(
                &self,
                request: Request<v1::ListServersRequest>,
            ) -> Result<Response<v1::ListServersResponse>, Status> {
                let (call, message) = Call::open(request)?;
                list(self, &message).map(Response::new).map_err(|refusal| call.refuse(&refusal))
            }

            async fn abandon_operation(
                &self,
                request: Request<v1::AbandonOperationRequest>,
            ) -> Result<Response<v1::AbandonOperationResponse>, Status> {
                let (call, message) = Call::open(request)?;
                let operation = self.abandon(&call, message).await;
                let operation = operation.map_err(|refusal| call.refuse(&refusal))?;
                Ok(Response::new(v1::AbandonOperationResponse {
                    operation: Some(operation),
                }))
            }

            async fn get_server_drift(
                &self,
                request: Request<v1::GetServerDriftRequest>,
            ) -> Result<Response<v1::GetServerDriftResponse>, Status> {
                let (call, message) = Call::open(request)?;
                let drift = drift(self, &message.server).await;
                drift.map(Response::new).map_err(|refusal| call.refuse(&refusal))
            }

            async fn plan_action(
                &self,
                request: Request<v1::PlanActionRequest>,
            ) -> Result<Response<v1::PlanActionResponse>, Status> {
                use v1::plan_action_request::Action as A;
                let (call, message) = Call::open(request)?;
                let preview = match message.action {
                    Some(A::Create(ask)) => self.preview(&call, ask).await,
                    Some(A::Adopt(ask)) => self.preview(&call, ask).await,
                    Some(A::Release(ask)) => self.preview(&call, ask).await,
                    Some(A::Delete(ask)) => self.preview(&call, ask).await,
                    Some(A::Start(ask)) => self.preview(&call, ask).await,
                    Some(A::Stop(ask)) => self.preview(&call, ask).await,
                    Some(A::Rescue(ask)) => self.preview(&call, ask).await,
                    Some(A::Unrescue(ask)) => self.preview(&call, ask).await,
                    Some(A::Reboot(ask)) => self.preview(&call, ask).await,
                    Some(A::Pause(ask)) => self.preview(&call, ask).await,
                    Some(A::Unpause(ask)) => self.preview(&call, ask).await,
                    Some(A::Suspend(ask)) => self.preview(&call, ask).await,
                    Some(A::Resume(ask)) => self.preview(&call, ask).await,
                    Some(A::TriggerCrashDump(ask)) => self.preview(&call, ask).await,
                    Some(A::DumpMemory(ask)) => self.preview(&call, ask).await,
                    Some(A::ChangePassword(ask)) => self.preview(&call, ask).await,
                    Some(A::Lock(ask)) => self.preview(&call, ask).await,
                    Some(A::Unlock(ask)) => self.preview(&call, ask).await,
                    Some(A::Update(ask)) => self.preview(&call, ask).await,
                    Some(A::ResetState(ask)) => self.preview(&call, ask).await,
                    Some(A::Restore(ask)) => self.preview(&call, ask).await,
                    Some(A::ForceDelete(ask)) => self.preview(&call, ask).await,
                    Some(A::AcceptDrift(ask)) => self.preview(&call, ask).await,
                    Some(A::RestoreDefinition(ask)) => self.preview(&call, ask).await,
                    None => Err(call.refuse(&Refusal::field("action", "must be given"))),
                };
                preview.map(|preview| Response::new(plan_response(&preview)))
            }

            async fn get_server_diagnostics(
                &self,
                request: Request<v1::GetServerDiagnosticsRequest>,
            ) -> Result<Response<v1::GetServerDiagnosticsResponse>, Status> {
                let (call, message) = Call::open(request)?;
                match Box::pin(self.diagnostics(&message)).await {
                    Ok(answer) => Ok(Response::new(answer)),
                    Err(refusal) => Err(call.refuse(&refusal)),
                }
            }
        }
    };
}

actions! {
    create_server: CreateServerRequest -> CreateServerResponse {
        operation, server_id, admin_pass, admin_pass_delivery, warnings
    }
    adopt_server: AdoptServerRequest -> AdoptServerResponse { operation, warnings }
    release_server: ReleaseServerRequest -> ReleaseServerResponse { operation }
    delete_server: DeleteServerRequest -> DeleteServerResponse { operation, warnings }
    start_server: StartServerRequest -> StartServerResponse { operation }
    stop_server: StopServerRequest -> StopServerResponse { operation }
    rescue_server: RescueServerRequest -> RescueServerResponse {
        operation, admin_pass, admin_pass_delivery, warnings
    }
    unrescue_server: UnrescueServerRequest -> UnrescueServerResponse { operation }
    reboot_server: RebootServerRequest -> RebootServerResponse { operation, warnings }
    pause_server: PauseServerRequest -> PauseServerResponse { operation }
    unpause_server: UnpauseServerRequest -> UnpauseServerResponse { operation }
    suspend_server: SuspendServerRequest -> SuspendServerResponse { operation }
    resume_server: ResumeServerRequest -> ResumeServerResponse { operation }
    trigger_crash_dump: TriggerCrashDumpRequest -> TriggerCrashDumpResponse { operation }
    dump_server_memory: DumpServerMemoryRequest -> DumpServerMemoryResponse { operation }
    change_server_password: ChangeServerPasswordRequest -> ChangeServerPasswordResponse {
        operation, admin_pass
    }
    lock_server: LockServerRequest -> LockServerResponse { operation }
    unlock_server: UnlockServerRequest -> UnlockServerResponse { operation }
    update_server: UpdateServerRequest -> UpdateServerResponse { operation }
    reset_server_state: ResetServerStateRequest -> ResetServerStateResponse { operation }
    restore_server: RestoreServerRequest -> RestoreServerResponse { operation }
    force_delete_server: ForceDeleteServerRequest -> ForceDeleteServerResponse { operation, warnings }
    accept_server_drift: AcceptServerDriftRequest -> AcceptServerDriftResponse { operation }
    restore_server_definition: RestoreServerDefinitionRequest -> RestoreServerDefinitionResponse { operation }
}
