// SPDX-License-Identifier: Apache-2.0
//! All tests with real libvirt and real guests, in one binary so that they share a host.
//!
//! Each module is about one thing; `salvor_tests` has what they stand on. They need root.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod actor;
mod adopted;
mod autostart;
mod console;
mod crash;
mod create;
mod crowd;
mod deploy;
mod drift;
mod ends;
mod faults;
mod firmware;
mod frozen;
mod fuzz;
mod harness;
mod images;
mod lifecycle;
mod observe;
mod owners;
mod password;
mod power;
mod record;
mod rescue;
mod rescue_modes;
mod scene;
mod soak;
mod timing;
mod watch;
