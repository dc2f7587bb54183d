// SPDX-License-Identifier: Apache-2.0
//! The API as tests use it: calls that must succeed, calls that must be refused, operations to their end.

use std::path::Path;
use std::time::{Duration, Instant};

use prost::{Message as _, Name as _};
use salvor_proto::{
    google::longrunning::{
        GetOperationRequest, Operation, WaitOperationRequest, operation,
        operations_client::OperationsClient,
    },
    google::rpc::Status as RpcStatus,
    v1::{
        ActionResult, AdoptServerRequest, CreateServerRequest, CreateServerResponse,
        DeleteServerRequest, DumpServerMemoryRequest, GetServerRequest, Image, ImageFormat,
        ImageSpec, ImportImageRequest, ImportImageResponse, ListServersRequest, OperationMetadata,
        OperationState, PauseServerRequest, RebootOnTimeout, RebootServerRequest, RebootType,
        RescueServerRequest, RescueServerResponse, ResumeServerRequest, Server, StartServerRequest,
        StopServerRequest, SuspendServerRequest, TriggerCrashDumpRequest, UnpauseServerRequest,
        UnrescueServerRequest, VmState, console_service_client::ConsoleServiceClient,
        host_service_client::HostServiceClient, image_service_client::ImageServiceClient,
        import_image_request::Part, server_service_client::ServerServiceClient,
        watch_service_client::WatchServiceClient,
    },
};
use tonic::{Code, Status, transport::Channel};
use tonic_types::StatusExt as _;
use uuid::Uuid;

use crate::wait::{BOOT, SOON};

/// A client of one agent. Its calls panic with what the agent said when they fail.
#[derive(Debug, Clone)]
pub struct Client {
    /// Calls of `ServerService`, for what the functions here do not do.
    pub servers: ServerServiceClient<Channel>,
    /// Calls of `google.longrunning.Operations`.
    pub operations: OperationsClient<Channel>,
    /// Calls of `ImageService`.
    pub images: ImageServiceClient<Channel>,
    /// Calls of `HostService`.
    pub hosts: HostServiceClient<Channel>,
    /// Calls of `WatchService`.
    pub watches: WatchServiceClient<Channel>,
    /// Calls of `ConsoleService`.
    pub consoles: ConsoleServiceClient<Channel>,
}

/// An action whose request says no more than which server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plain {
    /// StartServer.
    Start,
    /// PauseServer.
    Pause,
    /// UnpauseServer.
    Unpause,
    /// SuspendServer.
    Suspend,
    /// ResumeServer.
    Resume,
    /// TriggerCrashDump.
    CrashDump,
    /// DumpServerMemory.
    DumpMemory,
    /// DeleteServer.
    Delete,
    /// RebootServer, hard.
    HardReboot,
    /// RebootServer, soft, with the time that is usual.
    SoftReboot,
}

/// An operation that has ended.
#[derive(Clone)]
pub struct Ended {
    /// The operation.
    pub operation: Operation,
    /// Its metadata.
    pub metadata: OperationMetadata,
}

// The encoded bytes in the operation tell nobody anything.
impl std::fmt::Debug for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let error = match &self.operation.result {
            Some(operation::Result::Error(status)) => Some(&status.message),
            _ => None,
        };
        f.debug_struct("Ended")
            .field("name", &self.operation.name)
            .field("error", &error)
            .field("metadata", &self.metadata)
            .finish()
    }
}

impl Ended {
    /// The result of an operation that ended as asked.
    #[track_caller]
    pub fn done(&self) -> ActionResult {
        match &self.operation.result {
            Some(operation::Result::Response(any)) => {
                assert_eq!(self.metadata.state(), OperationState::Done, "{self:#?}");
                assert!(
                    any.type_url.ends_with(&ActionResult::full_name()),
                    "{}",
                    any.type_url
                );
                ActionResult::decode(any.value.as_slice()).unwrap()
            }
            Some(operation::Result::Error(status)) => panic!(
                "the operation did not end as asked: {}\n{:#?}",
                status.message, self.metadata
            ),
            None => panic!("the operation has not ended: {:#?}", self.metadata),
        }
    }

    /// The reason for which an operation failed or was cancelled.
    #[track_caller]
    pub fn reason(&self) -> String {
        let error = self.error();
        let status = tonic_types::pb::Status {
            code: error.code,
            message: error.message,
            details: error.details,
        };
        use tonic_types::RpcStatusExt as _;
        status.get_details_error_info().unwrap().reason
    }

    /// The error of an operation that failed or was cancelled.
    #[track_caller]
    pub fn error(&self) -> RpcStatus {
        match &self.operation.result {
            Some(operation::Result::Error(status)) => status.clone(),
            _ => panic!("the operation did not fail: {:#?}", self.metadata),
        }
    }
}

/// The reason that an error of the API carries.
#[track_caller]
pub fn reason(status: &Status) -> String {
    status
        .get_error_details()
        .error_info()
        .unwrap_or_else(|| panic!("an error without ErrorInfo: {status:?}"))
        .reason
        .clone()
}

/// Checks a refusal: its code and its reason.
#[track_caller]
pub fn assert_refused<T: std::fmt::Debug>(
    answer: Result<tonic::Response<T>, Status>,
    code: Code,
    expected: &str,
) -> Status {
    let status = answer.expect_err("the call was to be refused");
    assert_eq!(
        (status.code(), reason(&status).as_str()),
        (code, expected),
        "{status:?}"
    );
    status
}

impl Client {
    /// A client over `channel`.
    pub fn new(channel: Channel) -> Self {
        Self {
            servers: ServerServiceClient::new(channel.clone()),
            operations: OperationsClient::new(channel.clone()),
            images: ImageServiceClient::new(channel.clone()),
            hosts: HostServiceClient::new(channel.clone()),
            watches: WatchServiceClient::new(channel.clone()),
            consoles: ConsoleServiceClient::new(channel),
        }
    }

    /// Imports an image from its bytes.
    pub async fn import(
        &mut self,
        name: &str,
        format: ImageFormat,
        properties: &[(&str, &str)],
        bytes: Vec<u8>,
    ) -> Image {
        let mut spec = spec(name, format);
        spec.properties = properties
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect();
        let answer = self.send_image(spec, bytes).await;
        answer.unwrap().into_inner().image.unwrap()
    }

    /// Imports an image that may well be refused.
    pub async fn try_import(
        &mut self,
        name: &str,
        format: ImageFormat,
        bytes: Vec<u8>,
    ) -> Result<tonic::Response<ImportImageResponse>, Status> {
        self.send_image(spec(name, format), bytes).await
    }

    /// Sends an image, whatever the agent may say about it.
    pub async fn send_image(
        &mut self,
        spec: ImageSpec,
        bytes: Vec<u8>,
    ) -> Result<tonic::Response<ImportImageResponse>, Status> {
        let mut parts = vec![ImportImageRequest {
            part: Some(Part::Spec(spec)),
            ..ImportImageRequest::default()
        }];
        for chunk in bytes.chunks(1 << 20) {
            parts.push(ImportImageRequest {
                part: Some(Part::Chunk(chunk.to_vec())),
                ..ImportImageRequest::default()
            });
        }
        let parts = futures_util::stream::iter(parts);
        self.images.import_image(parts).await
    }

    /// Imports the image in a file.
    pub async fn import_file(
        &mut self,
        name: &str,
        format: ImageFormat,
        properties: &[(&str, &str)],
        file: &Path,
    ) -> Image {
        let bytes = std::fs::read(file).unwrap();
        self.import(name, format, properties, bytes).await
    }

    /// Creates a server and waits for the end.
    pub async fn create(&mut self, request: CreateServerRequest) -> (CreateServerResponse, Ended) {
        let answer = self.servers.create_server(request).await;
        let answer = answer.unwrap().into_inner();
        let ended = self.wait(answer.operation.as_ref().unwrap()).await;
        (answer, ended)
    }

    /// Deletes a server and waits for the end.
    pub async fn delete(&mut self, server: Uuid) -> Ended {
        let request = DeleteServerRequest {
            server: server.to_string(),
            ..DeleteServerRequest::default()
        };
        let answer = self.servers.delete_server(request).await;
        let answer = answer.unwrap().into_inner();
        self.wait(&answer.operation.unwrap()).await
    }

    /// Looks at a server until `is_so`; returns it.
    pub async fn wait_server(
        &mut self,
        server: Uuid,
        what: &str,
        is_so: impl Fn(&Server) -> bool,
    ) -> Server {
        let deadline = Instant::now() + SOON;
        loop {
            let found = self.get(server).await;
            if is_so(&found) {
                return found;
            }
            assert!(
                Instant::now() < deadline,
                "waited {SOON:?} in vain until {what}: {found:#?}"
            );
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Adopts a domain.
    pub async fn adopt(&mut self, domain: Uuid) -> Server {
        let request = AdoptServerRequest {
            domain: domain.to_string(),
            ..AdoptServerRequest::default()
        };
        let answer = self
            .servers
            .adopt_server(request)
            .await
            .unwrap()
            .into_inner();
        self.wait(&answer.operation.unwrap())
            .await
            .done()
            .server
            .unwrap()
    }

    /// A server as the agent knows it now.
    pub async fn get(&mut self, server: Uuid) -> Server {
        let request = GetServerRequest {
            server: server.to_string(),
        };
        self.servers
            .get_server(request)
            .await
            .unwrap()
            .into_inner()
            .server
            .unwrap()
    }

    /// Every server.
    pub async fn list(&mut self) -> Vec<Server> {
        let request = ListServersRequest {
            page_size: 1000,
            ..ListServersRequest::default()
        };
        self.servers
            .list_servers(request)
            .await
            .unwrap()
            .into_inner()
            .servers
    }

    /// Starts a server.
    pub async fn start(&mut self, server: Uuid) -> Ended {
        let request = StartServerRequest {
            server: server.to_string(),
            ..StartServerRequest::default()
        };
        let answer = self
            .servers
            .start_server(request)
            .await
            .unwrap()
            .into_inner();
        self.wait(&answer.operation.unwrap()).await
    }

    /// Stops a server.
    pub async fn stop(&mut self, server: Uuid, within: Option<Duration>) -> Ended {
        let request = StopServerRequest {
            server: server.to_string(),
            shutdown_timeout: within.map(|within| within.try_into().unwrap()),
            ..StopServerRequest::default()
        };
        let answer = self
            .servers
            .stop_server(request)
            .await
            .unwrap()
            .into_inner();
        self.wait(&answer.operation.unwrap()).await
    }

    /// Begins an action that needs no words but the server's.
    pub async fn begin(&mut self, verb: Plain, server: Uuid) -> Result<Operation, Status> {
        let server = server.to_string();
        let request_id = String::new();
        macro_rules! ask {
            ($method:ident, $request:ident) => {{
                let request = $request { request_id, server };
                let answer = self.servers.$method(request).await?;
                answer.into_inner().operation
            }};
        }
        let operation = match verb {
            Plain::Start => ask!(start_server, StartServerRequest),
            Plain::Pause => ask!(pause_server, PauseServerRequest),
            Plain::Unpause => ask!(unpause_server, UnpauseServerRequest),
            Plain::Suspend => ask!(suspend_server, SuspendServerRequest),
            Plain::Resume => ask!(resume_server, ResumeServerRequest),
            Plain::CrashDump => ask!(trigger_crash_dump, TriggerCrashDumpRequest),
            Plain::DumpMemory => ask!(dump_server_memory, DumpServerMemoryRequest),
            Plain::Delete => ask!(delete_server, DeleteServerRequest),
            Plain::HardReboot | Plain::SoftReboot => {
                let kind = match verb {
                    Plain::HardReboot => RebootType::Hard,
                    _ => RebootType::Soft,
                };
                let request = RebootServerRequest {
                    server,
                    r#type: kind.into(),
                    ..RebootServerRequest::default()
                };
                self.servers
                    .reboot_server(request)
                    .await?
                    .into_inner()
                    .operation
            }
        };
        Ok(operation.unwrap())
    }

    /// Does such an action and waits for the end.
    pub async fn act(&mut self, verb: Plain, server: Uuid) -> Ended {
        let operation = self.begin(verb, server).await.unwrap();
        self.wait(&operation).await
    }

    /// Reboots a server softly.
    pub async fn reboot(
        &mut self,
        server: Uuid,
        within: Duration,
        on_timeout: RebootOnTimeout,
    ) -> Ended {
        let request = RebootServerRequest {
            server: server.to_string(),
            r#type: RebootType::Soft.into(),
            on_timeout: on_timeout.into(),
            shutdown_timeout: Some(within.try_into().unwrap()),
            ..RebootServerRequest::default()
        };
        let answer = self.servers.reboot_server(request).await.unwrap();
        self.wait(&answer.into_inner().operation.unwrap()).await
    }

    /// Rescues a server and waits for the end.
    pub async fn rescue(&mut self, request: RescueServerRequest) -> (RescueServerResponse, Ended) {
        let answer = self
            .servers
            .rescue_server(request)
            .await
            .unwrap()
            .into_inner();
        let ended = self.wait(answer.operation.as_ref().unwrap()).await;
        (answer, ended)
    }

    /// Unrescues a server and waits for the end.
    pub async fn unrescue(&mut self, request: UnrescueServerRequest) -> Ended {
        let answer = self
            .servers
            .unrescue_server(request)
            .await
            .unwrap()
            .into_inner();
        self.wait(&answer.operation.unwrap()).await
    }

    /// Waits for the end of an operation.
    pub async fn wait(&mut self, operation: &Operation) -> Ended {
        let request = WaitOperationRequest {
            name: operation.name.clone(),
            timeout: Some(BOOT.try_into().unwrap()),
        };
        let operation = self
            .operations
            .wait_operation(request)
            .await
            .unwrap()
            .into_inner();
        assert!(
            operation.done,
            "the operation has not ended within {BOOT:?}: {operation:#?}"
        );
        ended(operation)
    }

    /// An operation as it is now.
    pub async fn operation(&mut self, name: &str) -> (Operation, OperationMetadata) {
        let request = GetOperationRequest {
            name: name.to_owned(),
        };
        let operation = self
            .operations
            .get_operation(request)
            .await
            .unwrap()
            .into_inner();
        let metadata = metadata_of(&operation);
        (operation, metadata)
    }

    /// Checks that a server is as said, with nothing under way.
    #[track_caller]
    pub fn assert_settled(server: &Server, vm_state: VmState) {
        assert_eq!(server.vm_state(), vm_state, "{server:#?}");
        assert_eq!(server.task_state, "", "{server:#?}");
        assert_eq!(server.operation, "", "{server:#?}");
    }
}

fn spec(name: &str, format: ImageFormat) -> ImageSpec {
    ImageSpec {
        name: name.to_owned(),
        format: format.into(),
        ..ImageSpec::default()
    }
}

/// The metadata of an operation.
pub fn metadata_of(operation: &Operation) -> OperationMetadata {
    let any = operation.metadata.as_ref().unwrap();
    OperationMetadata::decode(any.value.as_slice()).unwrap()
}

fn ended(operation: Operation) -> Ended {
    let metadata = metadata_of(&operation);
    Ended {
        operation,
        metadata,
    }
}
