// SPDX-License-Identifier: Apache-2.0
//! The gRPC services of the agent: thin handlers over the dispatcher, the engine and the store.
//!
//! ```text
//!  edge (deadline, identity, request id, span, panics)
//!   └─ servers, operations, watch, images, host     handlers
//!       ├─ console, diagnostics  reads of guests
//!       ├─ wish, validate      requests, checked field by field
//!       ├─ resolve             ids, beginnings of ids and names
//!       ├─ actions             to the dispatcher, for real and as a dry run
//!       ├─ convert             records as messages
//!       └─ errors              refusals as errors with details
//! ```
//!
//! Nothing here decides whether an action is allowed or what it does.

mod actions;
mod console;
mod convert;
mod diagnostics;
mod edge;
mod errors;
mod host;
mod images;
mod import;
mod operations;
mod page;
mod password;
mod resolve;
mod servers;
mod update;
mod validate;
mod watch;
mod wish;

use std::{ops::Deref, path::PathBuf, sync::Arc};

use salvor_proto::{
    google::longrunning::operations_server::OperationsServer,
    v1::{
        console_service_server::ConsoleServiceServer,
        host_service_server::HostServiceServer,
        image_service_server::ImageServiceServer,
        server_service_server::{self, ServerServiceServer},
        watch_service_server::WatchServiceServer,
    },
};
use tonic::service::{Routes, RoutesBuilder};

use crate::{
    console::{Logs, Ports},
    dispatch::Dispatcher,
    engine::Engine,
    hypervisor::Hypervisor,
    storage::images::ImageFiles,
    store::Store,
    turns::Turns,
};

pub use errors::DOMAIN;

/// The services that cannot do their work while libvirt is away, for grpc.health.v1. The others
/// answer from the records.
pub const NEED_LINK: &[&str] = &[server_service_server::SERVICE_NAME];

/// The largest request that is read. The largest that makes sense is a CreateServer with every field
/// at its limit; up to this size a request is told which field is too long.
const REQUEST_BYTES: usize = 4 << 20;

/// The largest answer that is sent: what clients take unless told otherwise. Pages end before it.
const ANSWER_BYTES: usize = 4 << 20;

/// What the services work on.
pub struct Parts {
    /// Takes actions.
    pub dispatcher: Dispatcher,
    /// Carries them on.
    pub engine: Engine,
    /// Remembers.
    pub store: Store,
    /// Is asked for domains and the host.
    pub hypervisor: Arc<dyn Hypervisor>,
    /// What guests have said on their serial ports.
    pub logs: Logs,
    /// Their serial ports.
    pub ports: Ports,
    /// The files of images.
    pub images: ImageFiles,
    /// What the configuration and the host say.
    pub host: HostSettings,
    /// The agent is stopping: streams end, and nothing new begins.
    pub draining: tokio::sync::watch::Receiver<bool>,
}

/// What the configuration and the host say about themselves.
#[derive(Debug, Clone)]
pub struct HostSettings {
    /// Where the connection to libvirt goes.
    pub libvirt_uri: String,
    /// The kernel's id of this boot.
    pub boot_id: String,
    /// Folders from which images may be imported.
    pub import_dirs: Vec<PathBuf>,
    /// Describe the API to clients (grpc.reflection, v1 and v1alpha).
    pub reflection: bool,
}

struct Shared {
    parts: Parts,
    known: host::Known,
    importing: import::Importing,
    /// One at a time of the calls with the same request id.
    turns: Turns,
}

/// A handle to the parts, which is what the services are implemented for.
#[derive(Clone)]
struct Api(Arc<Shared>);

impl Deref for Api {
    type Target = Shared;

    fn deref(&self) -> &Shared {
        &self.0
    }
}

impl Deref for Shared {
    type Target = Parts;

    fn deref(&self) -> &Parts {
        &self.parts
    }
}

/// A service with its limits, at the edge.
macro_rules! add {
    ($routes:ident, $server:ident, $api:expr) => {
        $routes.add_service(edge::Edge(
            $server::new($api.clone())
                .max_decoding_message_size(REQUEST_BYTES)
                .max_encoding_message_size(ANSWER_BYTES),
        ))
    };
}

/// The routes to every service but health, which the daemon answers. To be called in a runtime.
///
/// # Errors
/// If the descriptors of the API cannot be read.
pub fn routes(parts: Parts) -> Result<Routes, tonic_reflection::server::Error> {
    let reflection = parts.host.reflection;
    let api = Api(Arc::new(Shared {
        known: host::Known::follow(&parts.hypervisor),
        importing: import::Importing::default(),
        turns: Turns::default(),
        parts,
    }));
    let mut routes = RoutesBuilder::default();
    add!(routes, ServerServiceServer, api);
    add!(routes, OperationsServer, api);
    add!(routes, WatchServiceServer, api);
    add!(routes, ImageServiceServer, api);
    add!(routes, HostServiceServer, api);
    add!(routes, ConsoleServiceServer, api);
    if reflection {
        // Some tools know the older name only.
        routes.add_service(edge::Edge(describe().build_v1()?));
        routes.add_service(edge::Edge(describe().build_v1alpha()?));
    }
    Ok(routes.routes())
}

fn describe() -> tonic_reflection::server::Builder<'static> {
    tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(salvor_proto::DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
}
