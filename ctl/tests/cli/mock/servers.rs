// SPDX-License-Identifier: Apache-2.0
//! ServerService of the agent that the tests play.

use salvor_proto::v1::{self, server_service_server::ServerService};
use tonic::{Request, Response};

use super::{Answer, Services};

/// The role, the user and the project that a call names.
fn for_whom<T>(request: &Request<T>) -> [Option<String>; 3] {
    ["role", "user", "project"].map(|what| {
        let value = request.metadata().get(format!("x-salvor-{what}"))?;
        Some(value.to_str().unwrap().to_owned())
    })
}

#[tonic::async_trait]
impl ServerService for Services {
    async fn get_server_diagnostics(
        &self,
        request: Request<v1::GetServerDiagnosticsRequest>,
    ) -> Answer<v1::GetServerDiagnosticsResponse> {
        let definitions = request.get_ref().definitions;
        let state = self.call("diagnostics", |_| ())?;
        let mut answer = state.console.diagnostics;
        if !definitions {
            answer.inactive_definition.clear();
        }
        Ok(Response::new(answer))
    }

    async fn create_server(
        &self,
        request: Request<v1::CreateServerRequest>,
    ) -> Answer<v1::CreateServerResponse> {
        let request = request.into_inner();
        let id = request.request_id.clone();
        let state = self
            .accept("create", &id, |state| state.creates.push(request))
            .await?;
        Ok(Response::new(v1::CreateServerResponse {
            operation: Some(state.operation),
            server_id: "new".into(),
            admin_pass: state.admin_pass,
            admin_pass_delivery: vec![v1::AdminPassDelivery::ConfigDrive.into()],
            warnings: state.warnings,
        }))
    }

    async fn adopt_server(
        &self,
        request: Request<v1::AdoptServerRequest>,
    ) -> Answer<v1::AdoptServerResponse> {
        let state = self
            .accept("adopt", &request.get_ref().request_id, |_| ())
            .await?;
        Ok(Response::new(v1::AdoptServerResponse {
            operation: Some(state.operation),
            warnings: state.warnings,
        }))
    }

    async fn release_server(
        &self,
        request: Request<v1::ReleaseServerRequest>,
    ) -> Answer<v1::ReleaseServerResponse> {
        let state = self
            .accept("release", &request.get_ref().request_id, |_| ())
            .await?;
        Ok(Response::new(v1::ReleaseServerResponse {
            operation: Some(state.operation),
        }))
    }

    async fn get_server(
        &self,
        request: Request<v1::GetServerRequest>,
    ) -> Answer<v1::GetServerResponse> {
        let state = self.call("get", |_| ())?;
        let name = request.into_inner().server;
        let server = state.servers.into_iter().find(|server| server.name == name);
        Ok(Response::new(v1::GetServerResponse { server }))
    }

    /// Two servers a page.
    async fn list_servers(
        &self,
        request: Request<v1::ListServersRequest>,
    ) -> Answer<v1::ListServersResponse> {
        let request = request.into_inner();
        let from: usize = request.page_token.parse().unwrap_or(0);
        let state = self.call("list", |state| state.lists.push(request))?;
        let next = from + 2;
        Ok(Response::new(v1::ListServersResponse {
            next_page_token: if next < state.servers.len() {
                next.to_string()
            } else {
                String::new()
            },
            servers: state.servers.into_iter().skip(from).take(2).collect(),
        }))
    }

    async fn get_server_drift(
        &self,
        request: Request<v1::GetServerDriftRequest>,
    ) -> Answer<v1::GetServerDriftResponse> {
        let server = request.into_inner().server;
        let state = self.call("drift", |state| state.drifts.push(server))?;
        Ok(Response::new(state.drift))
    }

    async fn accept_server_drift(
        &self,
        request: Request<v1::AcceptServerDriftRequest>,
    ) -> Answer<v1::AcceptServerDriftResponse> {
        let request = request.into_inner();
        let state = self
            .accept("accept drift", &request.request_id, |state| {
                state.drifts.push(request.server);
            })
            .await?;
        Ok(Response::new(v1::AcceptServerDriftResponse {
            operation: Some(state.operation),
        }))
    }

    async fn restore_server_definition(
        &self,
        request: Request<v1::RestoreServerDefinitionRequest>,
    ) -> Answer<v1::RestoreServerDefinitionResponse> {
        let request = request.into_inner();
        let state = self
            .accept("restore definition", &request.request_id, |state| {
                state.drifts.push(request.server);
            })
            .await?;
        Ok(Response::new(v1::RestoreServerDefinitionResponse {
            operation: Some(state.operation),
        }))
    }

    async fn delete_server(
        &self,
        request: Request<v1::DeleteServerRequest>,
    ) -> Answer<v1::DeleteServerResponse> {
        let state = self
            .accept("delete", &request.get_ref().request_id, |_| ())
            .await?;
        Ok(Response::new(v1::DeleteServerResponse {
            operation: Some(state.operation),
            warnings: state.warnings,
        }))
    }

    async fn start_server(
        &self,
        request: Request<v1::StartServerRequest>,
    ) -> Answer<v1::StartServerResponse> {
        let state = self
            .accept("start", &request.get_ref().request_id, |_| ())
            .await?;
        Ok(Response::new(v1::StartServerResponse {
            operation: Some(state.operation),
        }))
    }

    async fn reboot_server(
        &self,
        request: Request<v1::RebootServerRequest>,
    ) -> Answer<v1::RebootServerResponse> {
        let request = request.into_inner();
        let id = request.request_id.clone();
        let state = self
            .accept("reboot", &id, |state| state.reboots.push(request))
            .await?;
        Ok(Response::new(v1::RebootServerResponse {
            operation: Some(state.operation),
            warnings: state.warnings,
        }))
    }

    async fn pause_server(
        &self,
        request: Request<v1::PauseServerRequest>,
    ) -> Answer<v1::PauseServerResponse> {
        let state = self
            .accept("pause", &request.get_ref().request_id, |_| ())
            .await?;
        Ok(Response::new(v1::PauseServerResponse {
            operation: Some(state.operation),
        }))
    }

    async fn unpause_server(
        &self,
        request: Request<v1::UnpauseServerRequest>,
    ) -> Answer<v1::UnpauseServerResponse> {
        let state = self
            .accept("unpause", &request.get_ref().request_id, |_| ())
            .await?;
        Ok(Response::new(v1::UnpauseServerResponse {
            operation: Some(state.operation),
        }))
    }

    async fn suspend_server(
        &self,
        request: Request<v1::SuspendServerRequest>,
    ) -> Answer<v1::SuspendServerResponse> {
        let state = self
            .accept("suspend", &request.get_ref().request_id, |_| ())
            .await?;
        Ok(Response::new(v1::SuspendServerResponse {
            operation: Some(state.operation),
        }))
    }

    async fn resume_server(
        &self,
        request: Request<v1::ResumeServerRequest>,
    ) -> Answer<v1::ResumeServerResponse> {
        let state = self
            .accept("resume", &request.get_ref().request_id, |_| ())
            .await?;
        Ok(Response::new(v1::ResumeServerResponse {
            operation: Some(state.operation),
        }))
    }

    async fn trigger_crash_dump(
        &self,
        request: Request<v1::TriggerCrashDumpRequest>,
    ) -> Answer<v1::TriggerCrashDumpResponse> {
        let state = self
            .accept("crash dump", &request.get_ref().request_id, |_| ())
            .await?;
        Ok(Response::new(v1::TriggerCrashDumpResponse {
            operation: Some(state.operation),
        }))
    }

    async fn dump_server_memory(
        &self,
        request: Request<v1::DumpServerMemoryRequest>,
    ) -> Answer<v1::DumpServerMemoryResponse> {
        let state = self
            .accept("dump memory", &request.get_ref().request_id, |_| ())
            .await?;
        Ok(Response::new(v1::DumpServerMemoryResponse {
            operation: Some(state.operation),
        }))
    }

    async fn change_server_password(
        &self,
        request: Request<v1::ChangeServerPasswordRequest>,
    ) -> Answer<v1::ChangeServerPasswordResponse> {
        let request = request.into_inner();
        let id = request.request_id.clone();
        let state = self
            .accept("set password", &id, |state| state.passwords.push(request))
            .await?;
        Ok(Response::new(v1::ChangeServerPasswordResponse {
            operation: Some(state.operation),
            admin_pass: state.admin_pass,
        }))
    }

    async fn stop_server(
        &self,
        request: Request<v1::StopServerRequest>,
    ) -> Answer<v1::StopServerResponse> {
        let request = request.into_inner();
        let id = request.request_id.clone();
        let state = self
            .accept("stop", &id, |state| state.stops.push(request))
            .await?;
        Ok(Response::new(v1::StopServerResponse {
            operation: Some(state.operation),
        }))
    }

    async fn rescue_server(
        &self,
        request: Request<v1::RescueServerRequest>,
    ) -> Answer<v1::RescueServerResponse> {
        let request = request.into_inner();
        let id = request.request_id.clone();
        let state = self
            .accept("rescue", &id, |state| state.rescues.push(request))
            .await?;
        Ok(Response::new(v1::RescueServerResponse {
            operation: Some(state.operation),
            admin_pass: state.admin_pass,
            admin_pass_delivery: vec![v1::AdminPassDelivery::ConfigDrive.into()],
            warnings: state.warnings,
        }))
    }

    async fn unrescue_server(
        &self,
        request: Request<v1::UnrescueServerRequest>,
    ) -> Answer<v1::UnrescueServerResponse> {
        let request = request.into_inner();
        let id = request.request_id.clone();
        let state = self
            .accept("unrescue", &id, |state| state.unrescues.push(request))
            .await?;
        Ok(Response::new(v1::UnrescueServerResponse {
            operation: Some(state.operation),
        }))
    }

    async fn plan_action(
        &self,
        request: Request<v1::PlanActionRequest>,
    ) -> Answer<v1::PlanActionResponse> {
        let state = self.call("plan", |state| state.plans.push(request.into_inner()))?;
        Ok(Response::new(state.plan))
    }

    async fn abandon_operation(
        &self,
        request: Request<v1::AbandonOperationRequest>,
    ) -> Answer<v1::AbandonOperationResponse> {
        let state = self.call("abandon", |state| state.abandons.push(request.into_inner()))?;
        Ok(Response::new(v1::AbandonOperationResponse {
            operation: Some(state.operation),
        }))
    }

    async fn unlock_server(
        &self,
        request: Request<v1::UnlockServerRequest>,
    ) -> Answer<v1::UnlockServerResponse> {
        let id = &request.get_ref().request_id;
        let state = self.accept("unlock", id, |_| ()).await?;
        Ok(Response::new(v1::UnlockServerResponse {
            operation: Some(state.operation),
        }))
    }

    async fn restore_server(
        &self,
        request: Request<v1::RestoreServerRequest>,
    ) -> Answer<v1::RestoreServerResponse> {
        let id = &request.get_ref().request_id;
        let state = self.accept("restore", id, |_| ()).await?;
        Ok(Response::new(v1::RestoreServerResponse {
            operation: Some(state.operation),
        }))
    }

    async fn force_delete_server(
        &self,
        request: Request<v1::ForceDeleteServerRequest>,
    ) -> Answer<v1::ForceDeleteServerResponse> {
        let id = &request.get_ref().request_id;
        let state = self.accept("force delete", id, |_| ()).await?;
        Ok(Response::new(v1::ForceDeleteServerResponse {
            operation: Some(state.operation),
            warnings: state.warnings,
        }))
    }

    async fn lock_server(
        &self,
        request: Request<v1::LockServerRequest>,
    ) -> Answer<v1::LockServerResponse> {
        let headers = for_whom(&request);
        let request = request.into_inner();
        let id = request.request_id.clone();
        let state = self
            .accept("lock_server", &id, |state| {
                state.locks.push(request);
                state.for_whom.push(headers);
            })
            .await?;
        Ok(Response::new(v1::LockServerResponse {
            operation: Some(state.operation),
        }))
    }

    async fn update_server(
        &self,
        request: Request<v1::UpdateServerRequest>,
    ) -> Answer<v1::UpdateServerResponse> {
        let headers = for_whom(&request);
        let request = request.into_inner();
        let id = request.request_id.clone();
        let state = self
            .accept("update_server", &id, |state| {
                state.updates.push(request);
                state.for_whom.push(headers);
            })
            .await?;
        Ok(Response::new(v1::UpdateServerResponse {
            operation: Some(state.operation),
        }))
    }

    async fn reset_server_state(
        &self,
        request: Request<v1::ResetServerStateRequest>,
    ) -> Answer<v1::ResetServerStateResponse> {
        let headers = for_whom(&request);
        let request = request.into_inner();
        let id = request.request_id.clone();
        let state = self
            .accept("reset_server_state", &id, |state| {
                state.resets.push(request);
                state.for_whom.push(headers);
            })
            .await?;
        Ok(Response::new(v1::ResetServerStateResponse {
            operation: Some(state.operation),
        }))
    }
}
