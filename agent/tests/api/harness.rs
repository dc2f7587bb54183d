// SPDX-License-Identifier: Apache-2.0
//! An agent without libvirt and without steps, and clients of it.

use std::{path::PathBuf, sync::Arc, time::Duration};

use salvor_agent::{
    api::{self, HostSettings, Parts},
    console::{Limits as ConsoleLimits, Logs, Ports},
    core::{action::Shutdown, layout::Layout, plan::Step},
    dispatch::{Dispatcher, Settings},
    engine::{Engine, NoProbe, StepContext, StepError, StepReport, StepRunner},
    hypervisor::{Boot, Hypervisor as _, fake::FakeHypervisor},
    storage::{images::ImageFiles, inspect::Limits},
    store::Store,
};
use salvor_domain_templates::Templates;
use salvor_proto::{
    google::longrunning::{Operation, WaitOperationRequest, operations_client::OperationsClient},
    v1::{
        self, console_service_client::ConsoleServiceClient, host_service_client::HostServiceClient,
        image_service_client::ImageServiceClient, server_service_client::ServerServiceClient,
        watch_service_client::WatchServiceClient,
    },
};
use tokio::{net::UnixListener, sync::watch, task::JoinHandle};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{
    Code, Request, Status,
    transport::{Channel, Endpoint, Server},
};
use tonic_types::{ErrorDetails, StatusExt as _};
use uuid::Uuid;

/// Steps that do nothing but wait until the gate is open.
struct Gate(watch::Receiver<bool>);

#[tonic::async_trait]
impl StepRunner for Gate {
    async fn apply(&self, context: StepContext<'_>, _step: &Step) -> Result<StepReport, StepError> {
        (context.progress)(42);
        let _ = self.0.clone().wait_for(|open| *open).await;
        Ok(StepReport::default())
    }

    async fn revert(&self, _context: StepContext<'_>, _step: &Step) -> Result<(), StepError> {
        Ok(())
    }

    async fn observe(&self, _context: StepContext<'_>, _step: &Step) -> Result<bool, StepError> {
        Ok(false)
    }

    async fn ready(&self) {}

    async fn settled(&self, _server: Uuid) {}
}

/// An agent and what a test can do to it.
pub struct Agent {
    pub dir: Arc<tempfile::TempDir>,
    pub hypervisor: FakeHypervisor,
    pub store: Store,
    /// Whether steps go on.
    pub gate: watch::Sender<bool>,
    pub draining: watch::Sender<bool>,
    channel: Channel,
    server: JoinHandle<()>,
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl Agent {
    pub async fn start() -> Self {
        Self::start_in(
            Arc::new(tempfile::tempdir().unwrap()),
            FakeHypervisor::new(),
            1_000,
        )
        .await
    }

    /// An agent that keeps so many events.
    pub async fn start_keeping(events: u32) -> Self {
        Self::start_in(
            Arc::new(tempfile::tempdir().unwrap()),
            FakeHypervisor::new(),
            events,
        )
        .await
    }

    /// Another agent on the same folder and host, after this one has ended.
    pub async fn restart(self) -> Self {
        let (dir, hypervisor) = (Arc::clone(&self.dir), self.hypervisor.clone());
        self.server.abort();
        drop(self);
        Self::start_in(dir, hypervisor, 1_000).await
    }

    async fn start_in(
        dir: Arc<tempfile::TempDir>,
        hypervisor: FakeHypervisor,
        events: u32,
    ) -> Self {
        let state = dir.path().join("state");
        for folder in ["images", "servers", "../import"] {
            std::fs::create_dir_all(state.join(folder)).unwrap();
        }
        let store = Store::open(&state.join("salvor.db"), events).unwrap();
        let (gate, opened) = watch::channel(true);
        let (draining, drains) = watch::channel(false);
        let engine = Engine::new(store.clone(), Arc::new(Gate(opened)), Arc::new(NoProbe));
        engine.recover().await.unwrap();
        let shared: Arc<dyn salvor_agent::hypervisor::Hypervisor> = Arc::new(hypervisor.clone());
        let layout = Layout::new(state.to_str().unwrap());
        let dispatcher = Dispatcher::new(
            store.clone(),
            engine.clone(),
            Arc::clone(&shared),
            Arc::new(Templates::builtin().unwrap()),
            Settings {
                layout: layout.clone(),
                virt_type: "qemu".to_owned(),
                reserve_bytes: 0,
                rescue_timeout_ms: 0,
                default_rescue_image: None,
                shutdown: Shutdown {
                    timeout_ms: 60_000,
                    retry_ms: 10_000,
                },
                saved_memory: dir.path().to_owned(),
                reclaim_ms: 0,
            },
            drains.clone(),
        );
        let routes = api::routes(Parts {
            dispatcher,
            engine,
            store: store.clone(),
            logs: Logs::new(
                Arc::clone(&shared),
                store.clone(),
                layout.clone(),
                ConsoleLimits {
                    boots: 10,
                    bytes: 1 << 20,
                },
            ),
            ports: Ports::new(Arc::clone(&shared)),
            hypervisor: shared,
            images: ImageFiles::new(layout.images().into(), Limits::default(), 0).unwrap(),
            host: HostSettings {
                libvirt_uri: "qemu:///system".to_owned(),
                boot_id: "boot".to_owned(),
                import_dirs: vec![dir.path().join("import")],
                reflection: true,
            },
            draining: drains,
        })
        .unwrap();
        let socket = dir.path().join(format!("{}.sock", Uuid::new_v4()));
        let listener = UnixListener::bind(&socket).unwrap();
        let server = tokio::spawn(async move {
            let incoming = UnixListenerStream::new(listener);
            let _ = Server::builder()
                .add_routes(routes)
                .serve_with_incoming(incoming)
                .await;
        });
        let channel = Endpoint::from_shared(format!("unix://{}", socket.display()))
            .unwrap()
            .timeout(Duration::from_secs(30))
            .connect()
            .await
            .unwrap();
        Self {
            dir,
            hypervisor,
            store,
            gate,
            draining,
            channel,
            server,
        }
    }

    pub fn channel(&self) -> Channel {
        self.channel.clone()
    }

    pub fn servers(&self) -> ServerServiceClient<Channel> {
        ServerServiceClient::new(self.channel())
    }

    pub fn operations(&self) -> OperationsClient<Channel> {
        OperationsClient::new(self.channel())
    }

    pub fn watch(&self) -> WatchServiceClient<Channel> {
        WatchServiceClient::new(self.channel())
    }

    pub fn images(&self) -> ImageServiceClient<Channel> {
        ImageServiceClient::new(self.channel())
    }

    pub fn consoles(&self) -> ConsoleServiceClient<Channel> {
        ConsoleServiceClient::new(self.channel())
    }

    pub fn host(&self) -> HostServiceClient<Channel> {
        HostServiceClient::new(self.channel())
    }

    /// A file in the import folder.
    pub fn importable(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.dir.path().join("import").join(name);
        std::fs::write(&path, content).unwrap();
        path
    }

    /// Waits until an operation has ended.
    pub async fn ended(&self, operation: Option<Operation>) -> Operation {
        let request = WaitOperationRequest {
            name: operation.unwrap().name,
            timeout: Some(prost_types::Duration {
                seconds: 20,
                nanos: 0,
            }),
        };
        let ended = self
            .operations()
            .wait_operation(request)
            .await
            .unwrap()
            .into_inner();
        assert!(ended.done, "{ended:?}");
        ended
    }

    /// A domain that runs on the host.
    pub async fn domain(&self, name: &str) -> Uuid {
        let id = Uuid::new_v4();
        let xml = format!(
            "<domain type='qemu'><name>{name}</name><uuid>{id}</uuid><memory unit='KiB'>65536</memory>\
             <vcpu>1</vcpu><os><type arch='x86_64' machine='pc-q35-7.2'>hvm</type><boot dev='hd'/></os>\
             <devices><disk type='file' device='disk'><driver name='qemu' type='qcow2'/>\
             <source file='/dev/null'/><target dev='vda' bus='virtio'/></disk></devices></domain>"
        );
        self.hypervisor.define(&xml).await.unwrap();
        self.hypervisor.start(id, Boot::Resume).await.unwrap();
        id
    }

    /// An adopted server that runs.
    pub async fn server(&self, name: &str) -> Uuid {
        let id = self.domain(name).await;
        let request = v1::AdoptServerRequest {
            domain: id.to_string(),
            ..v1::AdoptServerRequest::default()
        };
        let adopted = self
            .servers()
            .adopt_server(request)
            .await
            .unwrap()
            .into_inner();
        self.ended(adopted.operation).await;
        id
    }

    /// A raw image of 1 KiB.
    pub async fn image(&self, name: &str) -> v1::Image {
        let messages = upload(name, &[7; 1024]);
        let stream = tokio_stream::iter(messages);
        self.images()
            .import_image(stream)
            .await
            .unwrap()
            .into_inner()
            .image
            .unwrap()
    }

    pub async fn get(&self, server: &str) -> Result<v1::Server, Status> {
        let request = v1::GetServerRequest {
            server: server.to_owned(),
        };
        let answer = self.servers().get_server(request).await?;
        Ok(answer.into_inner().server.unwrap())
    }
}

/// The messages of an upload.
pub fn upload(name: &str, content: &[u8]) -> Vec<v1::ImportImageRequest> {
    use v1::import_image_request::Part;
    let spec = v1::ImageSpec {
        name: name.to_owned(),
        format: v1::ImageFormat::Raw.into(),
        ..v1::ImageSpec::default()
    };
    [Part::Spec(spec)]
        .into_iter()
        .chain(content.chunks(600).map(|chunk| Part::Chunk(chunk.to_vec())))
        .map(|part| v1::ImportImageRequest {
            part: Some(part),
            ..Default::default()
        })
        .collect()
}

pub fn rescue(server: impl ToString, image: &v1::Image) -> v1::RescueServerRequest {
    v1::RescueServerRequest {
        server: server.to_string(),
        image: Some(image.id.clone()),
        ..v1::RescueServerRequest::default()
    }
}

pub fn start(server: impl ToString) -> v1::StartServerRequest {
    v1::StartServerRequest {
        server: server.to_string(),
        ..v1::StartServerRequest::default()
    }
}

pub fn stop(server: impl ToString) -> v1::StopServerRequest {
    v1::StopServerRequest {
        server: server.to_string(),
        ..v1::StopServerRequest::default()
    }
}

pub fn delete(server: impl ToString) -> v1::DeleteServerRequest {
    v1::DeleteServerRequest {
        server: server.to_string(),
        ..v1::DeleteServerRequest::default()
    }
}

/// The code, reason and details of an error.
pub fn refusal<T: std::fmt::Debug>(answer: Result<T, Status>) -> (Code, String, ErrorDetails) {
    let status = answer.unwrap_err();
    let details = status.get_error_details();
    let info = details
        .error_info()
        .unwrap_or_else(|| panic!("no ErrorInfo in {status:?}"));
    assert_eq!(info.domain, "salvor.compute");
    assert!(details.request_info().is_some(), "{status:?}");
    (status.code(), info.reason.clone(), details)
}

pub fn metadata(operation: &Operation) -> v1::OperationMetadata {
    operation.metadata.as_ref().unwrap().to_msg().unwrap()
}

/// A call that is made for somebody.
pub fn of<T>(role: &str, project: &str, message: T) -> Request<T> {
    let mut request = Request::new(message);
    let headers = request.metadata_mut();
    headers.insert("x-salvor-role", role.parse().unwrap());
    headers.insert("x-salvor-user", "u-1".parse().unwrap());
    headers.insert("x-salvor-project", project.parse().unwrap());
    request
}
