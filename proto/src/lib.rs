// SPDX-License-Identifier: Apache-2.0
//! Salvor's API as generated from `proto/proto`: messages, clients, servers and the descriptor set.
//! There is no logic here.

// The generated code is what the generator makes of it.
#![allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic)]

/// Google's API types that Salvor's API uses.
pub mod google {
    /// Annotations that the vendored files refer to.
    pub mod api {
        tonic::include_proto!("google.api");
    }
    /// Long-running operations (AIP-151).
    pub mod longrunning {
        tonic::include_proto!("google.longrunning");
    }
    /// The error model.
    pub mod rpc {
        tonic::include_proto!("google.rpc");
    }
}

/// Salvor's own packages; the nesting is the packages'.
pub mod salvor {
    /// What runs servers.
    pub mod compute {
        /// The API that a control plane drives.
        pub mod v1 {
            tonic::include_proto!("salvor.compute.v1");
        }
    }
}

pub use salvor::compute::v1;

/// The descriptors of everything above, as an encoded `FileDescriptorSet`.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.binpb"));
