// SPDX-License-Identifier: Apache-2.0
//! Compiles the protocol buffers with protox, so that no `protoc` is needed, and keeps the
//! descriptor set for reflection and for the command line's JSON.

use std::{env, fs, path::PathBuf};

use prost::Message as _;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = [
        "salvor/compute/v1/console_service.proto",
        "salvor/compute/v1/host_service.proto",
        "salvor/compute/v1/image_service.proto",
        "salvor/compute/v1/operation.proto",
        "salvor/compute/v1/server.proto",
        "salvor/compute/v1/server_service.proto",
        "salvor/compute/v1/watch_service.proto",
        "google/longrunning/operations.proto",
        "google/rpc/status.proto",
    ];
    let includes = ["proto", "../third_party/googleapis"];
    for include in includes {
        println!("cargo:rerun-if-changed={include}");
    }
    let descriptors = protox::compile(files, includes)?;
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    fs::write(out.join("descriptors.binpb"), descriptors.encode_to_vec())?;
    // Type names are what `google.protobuf.Any` is packed with.
    let mut config = prost_build::Config::new();
    config.enable_type_names();
    config.type_name_domain(["."], "type.googleapis.com");
    tonic_prost_build::configure().compile_fds_with_config(descriptors, config)?;
    Ok(())
}
