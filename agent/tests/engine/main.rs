// SPDX-License-Identifier: Apache-2.0
//! Store, engine, dispatch, steps and observer together: real files, real qemu-img, a real store, and
//! a hypervisor in memory.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod autostart;
mod crash;
mod disks;
mod dispatch;
mod documents;
mod drift;
mod gate;
mod give_up;
mod host;
mod memory;
mod observe;
mod overtake;
mod owners;
mod panics;
mod policy;
mod power_off;
mod previews;
mod record;
mod secrets;
mod soft_delete;
mod store;
mod switch;
mod variants;
mod waits;
