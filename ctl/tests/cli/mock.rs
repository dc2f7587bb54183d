// SPDX-License-Identifier: Apache-2.0
//! An agent that the tests play. It says what its [`State`] holds and notes what it is asked.

mod servers;

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
        server_service_server::ServerServiceServer,
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

pub type Answer<T> = Result<Response<T>, Status>;

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
