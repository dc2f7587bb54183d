// SPDX-License-Identifier: Apache-2.0
//! The gRPC services of the agent: thin handlers over the dispatcher, the engine and the store.
//!
//! ```text
//!  edge (deadline, identity, request id, span, panics)
//!   └─ servers, operations, watch, images, host     handlers
//!       ├─ wish, validate      requests, checked field by field
//!       ├─ resolve             ids, beginnings of ids and names
//!       ├─ actions             to the dispatcher, for real and as a dry run
//!       ├─ convert             records as messages
//!       └─ errors              refusals as errors with details
//! ```
//!
//! Nothing here decides whether an action is allowed or what it does.

mod actions;
mod convert;
mod edge;
mod errors;
mod operations;
mod page;
mod password;
mod resolve;
mod servers;
mod text;
mod validate;
mod wish;

use std::{ops::Deref, sync::Arc};

use salvor_proto::{
    google::longrunning::operations_server::OperationsServer,
    v1::server_service_server::ServerServiceServer,
};
use tonic::{
    server::NamedService,
    service::{Routes, RoutesBuilder},
};

use crate::{dispatch::Dispatcher, engine::Engine, hypervisor::Hypervisor, store::Store};

pub use edge::REQUEST_ID_HEADER;
pub use errors::DOMAIN;

/// The largest request that is read. The largest that makes sense is a CreateServer with every field
/// at its limit; up to this size a request is told which field is too long.
const REQUEST_BYTES: usize = 4 << 20;

/// The largest answer that is sent: what clients take unless told otherwise. Pages end before it.
const ANSWER_BYTES: usize = 4 << 20;

/// The services whose health follows the link to libvirt; the others work without it.
pub const NEED_LIBVIRT: &[&str] = &[<ServerServiceServer<Api> as NamedService>::NAME];

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
}

/// A handle to the parts, which is what the services are implemented for.
#[derive(Clone)]
struct Api(Arc<Parts>);

impl Deref for Api {
    type Target = Parts;

    fn deref(&self) -> &Parts {
        &self.0
    }
}

/// A service with its limits, at the edge.
macro_rules! add {
    ($routes:ident, $server:ident, $api:expr) => {
        $routes.add_service(edge::Edge(
            $server::new($api)
                .max_decoding_message_size(REQUEST_BYTES)
                .max_encoding_message_size(ANSWER_BYTES),
        ))
    };
}

/// The routes to every service.
#[must_use]
pub fn routes(parts: Parts) -> Routes {
    let api = Api(Arc::new(parts));
    let mut routes = RoutesBuilder::default();
    add!(routes, ServerServiceServer, api.clone());
    add!(routes, OperationsServer, api);
    routes.routes()
}
