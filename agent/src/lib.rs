// SPDX-License-Identifier: Apache-2.0
//! The Salvor compute agent as a library: `salvord` is a thin shell round it, and tests use the parts.
//!
//! Arrows point one way: `daemon` → `api` → `dispatch` → `engine` → `steps` → {`libvirt`, `storage`} and
//! everyone → `core`. Nothing in `core` points out. `docs/ARCHITECTURE.md` follows one request through
//! all of it.

pub mod api;
pub mod cancel;
pub mod config;
pub mod console;
pub mod core;
pub mod daemon;
pub mod diagnose;
pub mod dispatch;
pub mod engine;
pub mod hypervisor;
pub mod libvirt;
pub mod observe;
pub mod secret;
pub mod steps;
pub mod storage;
pub mod store;
pub mod telemetry;
mod turns;
