// SPDX-License-Identifier: Apache-2.0
//! An agent that the tests play. It says what its [`State`] holds and notes what it is asked.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    thread::JoinHandle,
    time::Duration,
};

use salvor_proto::{
    google::longrunning::{
        CancelOperationRequest, DeleteOperationRequest, GetOperationRequest, ListOperationsRequest,
        ListOperationsResponse, Operation, WaitOperationRequest,
        operations_server::{Operations, OperationsServer},
    },
    v1::{
        self,
        console_service_server::ConsoleServiceServer,
        host_service_server::{HostService, HostServiceServer},
        image_service_server::{ImageService, ImageServiceServer},
        import_image_request::Part,
        server_service_server::{ServerService, ServerServiceServer},
        watch_service_server::{WatchService, WatchServiceServer},
    },
};
use tempfile::TempDir;
use tokio::{
    net::UnixListener,
    sync::{oneshot, watch},
    time::timeout,
};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{Code, Request, Response, Status, Streaming};
use tonic_types::{ErrorDetails, StatusExt as _};

/// What the agent says, and what it was asked.
#[derive(Debug, Clone, Default)]
pub struct State {
    pub servers: Vec<v1::Server>,
    pub images: Vec<v1::Image>,
    pub host: v1::Host,
    pub unmanaged: Vec<v1::UnmanagedDomain>,
    pub operation: Operation,
    pub admin_pass: String,
    pub warnings: Vec<v1::Warning>,
    pub plan: v1::PlanActionResponse,
    pub drift: v1::GetServerDriftResponse,
    pub events: Vec<v1::WatchEventsResponse>,
    pub console: crate::console::Says,
    /// Every call on a server, and imports, are refused with this.
    pub refusal: Option<(Code, String, ErrorDetails)>,
    /// Actions are taken but never answered.
    pub hang: bool,
    /// So many actions are taken, and the agent says that it has no answer in time.
    pub late: usize,
    /// The methods called, in order.
    pub calls: Vec<&'static str>,
    pub request_ids: Vec<String>,
    pub rescues: Vec<v1::RescueServerRequest>,
    pub creates: Vec<v1::CreateServerRequest>,
    pub stops: Vec<v1::StopServerRequest>,
    pub unrescues: Vec<v1::UnrescueServerRequest>,
    pub reboots: Vec<v1::RebootServerRequest>,
    pub passwords: Vec<v1::ChangeServerPasswordRequest>,
    pub plans: Vec<v1::PlanActionRequest>,
    pub locks: Vec<v1::LockServerRequest>,
    pub updates: Vec<v1::UpdateServerRequest>,
    pub resets: Vec<v1::ResetServerStateRequest>,
    /// The servers whose drift was asked for or dealt with.
    pub drifts: Vec<String>,
    pub abandons: Vec<v1::AbandonOperationRequest>,
    /// Role, user and project of calls that change a record.
    pub for_whom: Vec<[Option<String>; 3]>,
    pub lists: Vec<v1::ListServersRequest>,
    /// The filters of the lists of operations that were asked for.
    pub filters: Vec<String>,
    pub watches: Vec<v1::WatchEventsRequest>,
    /// Imports that came to their end.
    pub imports: Vec<(v1::ImageSpec, Vec<u8>)>,
    /// An import has begun to arrive.
    pub import_begun: bool,
    /// Imports that broke off.
    pub broken_imports: usize,
}

#[derive(Clone, Debug)]
pub struct Services(Arc<watch::Sender<State>>);

/// The agent.
#[derive(Debug)]
pub struct Mock {
    folder: TempDir,
    state: Arc<watch::Sender<State>>,
    running: Option<(oneshot::Sender<()>, JoinHandle<()>)>,
}

impl Mock {
    /// An agent with this state that listens.
    pub fn new(state: State) -> Self {
        let mut mock = Self {
            folder: TempDir::new().unwrap(),
            state: Arc::new(watch::Sender::new(state)),
            running: None,
        };
        mock.start();
        mock
    }

    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("salvor.sock")
    }

    /// A folder for files of the test.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Listens. A runtime of its own makes it possible to break every connection at once.
    pub fn start(&mut self) {
        let socket = self.socket();
        let services = Services(self.state.clone());
        let (stop, stopped) = oneshot::channel();
        let (ready, is_ready) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async move {
                let listener = UnixListener::bind(&socket).unwrap();
                ready.send(()).unwrap();
                let serve = tonic::transport::Server::builder()
                    .add_service(ServerServiceServer::new(services.clone()))
                    .add_service(ImageServiceServer::new(services.clone()))
                    .add_service(HostServiceServer::new(services.clone()))
                    .add_service(WatchServiceServer::new(services.clone()))
                    .add_service(ConsoleServiceServer::new(services.clone()))
                    .add_service(OperationsServer::new(services))
                    .serve_with_incoming(UnixListenerStream::new(listener));
                tokio::select! {
                    served = serve => served.unwrap(),
                    _ = stopped => {}
                }
            });
        });
        is_ready.recv().unwrap();
        self.running = Some((stop, thread));
    }

    /// Goes away as a killed agent does: every connection breaks, and the socket is gone.
    pub fn stop(&mut self) {
        if let Some((stop, thread)) = self.running.take() {
            stop.send(()).unwrap();
            thread.join().unwrap();
            std::fs::remove_file(self.socket()).unwrap();
        }
    }

    pub fn change(&self, change: impl FnOnce(&mut State)) {
        self.state.send_modify(change);
    }

    pub fn state(&self) -> State {
        self.state.borrow().clone()
    }

    /// Waits until the agent's state is like this.
    pub async fn until(&self, like: impl FnMut(&State) -> bool) -> State {
        let mut state = self.state.subscribe();
        let found = timeout(Duration::from_secs(30), state.wait_for(like)).await;
        found
            .expect("the agent was not asked what it should be")
            .unwrap()
            .clone()
    }
}

impl Drop for Mock {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Services {
    fn state(&self) -> State {
        self.0.borrow().clone()
    }

    /// Notes a call and refuses it if calls are to be refused.
    pub fn call(&self, name: &'static str, note: impl FnOnce(&mut State)) -> Result<State, Status> {
        self.0.send_modify(|state| {
            state.calls.push(name);
            note(state);
        });
        let state = self.state();
        match &state.refusal {
            Some((code, message, details)) => Err(Status::with_error_details(
                *code,
                message.clone(),
                details.clone(),
            )),
            None => Ok(state),
        }
    }

    /// Accepts an action.
    async fn accept(
        &self,
        name: &'static str,
        request_id: &str,
        note: impl FnOnce(&mut State),
    ) -> Result<State, Status> {
        let state = self.call(name, |state| {
            state.request_ids.push(request_id.to_owned());
            note(state);
        })?;
        if state.hang {
            std::future::pending::<()>().await;
        }
        if state.late > 0 {
            self.0.send_modify(|state| state.late -= 1);
            return Err(late());
        }
        Ok(state)
    }
}

/// What the agent says at the deadline of a call.
fn late() -> Status {
    Status::with_error_details(
        Code::DeadlineExceeded,
        "what was begun goes on",
        ErrorDetails::with_error_info(
            "DEADLINE_EXCEEDED",
            "salvor.compute",
            [] as [(String, String); 0],
        ),
    )
}

/// The role, the user and the project that a call names.
fn for_whom<T>(request: &Request<T>) -> [Option<String>; 3] {
    ["role", "user", "project"].map(|what| {
        let value = request.metadata().get(format!("x-salvor-{what}"))?;
        Some(value.to_str().unwrap().to_owned())
    })
}

pub type Answer<T> = Result<Response<T>, Status>;

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

#[tonic::async_trait]
impl Operations for Services {
    async fn list_operations(
        &self,
        request: Request<ListOperationsRequest>,
    ) -> Answer<ListOperationsResponse> {
        let filter = request.into_inner().filter;
        let state = self.call("list operations", |state| state.filters.push(filter))?;
        Ok(Response::new(ListOperationsResponse {
            operations: vec![state.operation],
            ..Default::default()
        }))
    }

    async fn get_operation(&self, request: Request<GetOperationRequest>) -> Answer<Operation> {
        let state = self.call("get operation", |_| ())?;
        if state.operation.name == request.get_ref().name {
            Ok(Response::new(state.operation))
        } else {
            Err(Status::not_found("no such operation"))
        }
    }

    async fn delete_operation(&self, _: Request<DeleteOperationRequest>) -> Answer<()> {
        Err(Status::unimplemented("not played"))
    }

    async fn cancel_operation(&self, _: Request<CancelOperationRequest>) -> Answer<()> {
        self.call("cancel operation", |_| ())?;
        Ok(Response::new(()))
    }

    /// Answers when the operation is done or the time is over.
    async fn wait_operation(&self, request: Request<WaitOperationRequest>) -> Answer<Operation> {
        self.call("wait", |_| ())?;
        let time = Duration::try_from(request.into_inner().timeout.unwrap_or_default()).unwrap();
        let mut state = self.0.subscribe();
        let _ = timeout(time, state.wait_for(|state| state.operation.done)).await;
        Ok(Response::new(self.state().operation))
    }
}

type Sent<T> = tokio_stream::Iter<std::vec::IntoIter<Result<T, Status>>>;

#[tonic::async_trait]
impl ImageService for Services {
    async fn import_image(
        &self,
        request: Request<Streaming<v1::ImportImageRequest>>,
    ) -> Answer<v1::ImportImageResponse> {
        self.call("import", |_| ())?;
        let mut stream = request.into_inner();
        let mut found = (v1::ImageSpec::default(), Vec::new());
        loop {
            match stream.message().await {
                Ok(Some(message)) => match message.part {
                    Some(Part::Spec(spec)) => {
                        found.0 = spec;
                        self.0
                            .send_modify(|state| state.request_ids.push(message.request_id));
                    }
                    Some(Part::Chunk(chunk)) => {
                        assert!(chunk.len() <= 1 << 20);
                        found.1.extend(chunk);
                        self.0.send_if_modified(|state| {
                            !std::mem::replace(&mut state.import_begun, true)
                        });
                    }
                    None => {}
                },
                // The end never comes to an answer.
                Ok(None) if self.state().hang => std::future::pending::<()>().await,
                Ok(None) if self.state().late > 0 => {
                    self.0.send_modify(|state| state.late -= 1);
                    return Err(late());
                }
                Ok(None) => break,
                Err(broken) => {
                    self.0.send_modify(|state| state.broken_imports += 1);
                    return Err(broken);
                }
            }
        }
        let image = v1::Image {
            id: "image-1".into(),
            name: found.0.name.clone(),
            size_bytes: found.1.len() as u64,
            ..Default::default()
        };
        self.0.send_modify(|state| state.imports.push(found));
        Ok(Response::new(v1::ImportImageResponse {
            image: Some(image),
        }))
    }

    type ImportImageFromPathStream = Sent<v1::ImportImageFromPathResponse>;

    async fn import_image_from_path(
        &self,
        request: Request<v1::ImportImageFromPathRequest>,
    ) -> Answer<Self::ImportImageFromPathStream> {
        let request = request.into_inner();
        self.accept("import from path", &request.request_id, |_| ())
            .await?;
        let name = request.path;
        let messages = vec![
            Ok(v1::ImportImageFromPathResponse {
                copied_bytes: 1,
                total_bytes: 2,
                image: None,
            }),
            Ok(v1::ImportImageFromPathResponse {
                copied_bytes: 2,
                total_bytes: 2,
                image: Some(v1::Image {
                    name,
                    ..Default::default()
                }),
            }),
        ];
        Ok(Response::new(tokio_stream::iter(messages)))
    }

    async fn list_images(
        &self,
        _: Request<v1::ListImagesRequest>,
    ) -> Answer<v1::ListImagesResponse> {
        let state = self.call("list images", |_| ())?;
        Ok(Response::new(v1::ListImagesResponse {
            images: state.images,
            ..Default::default()
        }))
    }

    async fn get_image(&self, _: Request<v1::GetImageRequest>) -> Answer<v1::GetImageResponse> {
        let state = self.call("get image", |_| ())?;
        Ok(Response::new(v1::GetImageResponse {
            image: state.images.first().cloned(),
        }))
    }

    async fn delete_image(
        &self,
        request: Request<v1::DeleteImageRequest>,
    ) -> Answer<v1::DeleteImageResponse> {
        self.accept("delete image", &request.get_ref().request_id, |_| ())
            .await?;
        Ok(Response::new(v1::DeleteImageResponse {}))
    }
}

#[tonic::async_trait]
impl HostService for Services {
    async fn get_host(&self, _: Request<v1::GetHostRequest>) -> Answer<v1::GetHostResponse> {
        let state = self.call("host", |_| ())?;
        Ok(Response::new(v1::GetHostResponse {
            host: Some(state.host),
        }))
    }

    async fn list_unmanaged_domains(
        &self,
        _: Request<v1::ListUnmanagedDomainsRequest>,
    ) -> Answer<v1::ListUnmanagedDomainsResponse> {
        let state = self.call("unmanaged", |_| ())?;
        Ok(Response::new(v1::ListUnmanagedDomainsResponse {
            domains: state.unmanaged,
        }))
    }
}

#[tonic::async_trait]
impl WatchService for Services {
    type WatchEventsStream = std::pin::Pin<
        Box<dyn futures_util::Stream<Item = Result<v1::WatchEventsResponse, Status>> + Send>,
    >;

    /// Sends the events there are and stays.
    async fn watch_events(
        &self,
        request: Request<v1::WatchEventsRequest>,
    ) -> Answer<Self::WatchEventsStream> {
        use futures_util::StreamExt as _;
        let state = self.call("watch", |state| state.watches.push(request.into_inner()))?;
        let events = futures_util::stream::iter(state.events.into_iter().map(Ok));
        Ok(Response::new(
            events.chain(futures_util::stream::pending()).boxed(),
        ))
    }
}
