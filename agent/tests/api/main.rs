// SPDX-License-Identifier: Apache-2.0
//! The API over a real socket: every call, with the hypervisor in memory and steps that only wait.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::needless_update,
    missing_docs,
    unreachable_pub
)]

mod bad_input;
mod console;
mod diagnostics;
mod error_info;
mod harness;
mod host;
mod hostile;
mod image_requests;
mod images;
mod lists;
mod operations;
mod reasons;
mod record;
mod servers;
mod watch;
