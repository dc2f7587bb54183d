// SPDX-License-Identifier: Apache-2.0
//! The Salvor compute agent as a library: `salvord` is a thin shell round it, and tests use the parts.
//!
//! Arrows point one way: `api` → `engine` → `steps` → {`libvirt`, `storage`} and everyone → `core`.
//! Nothing in `core` points out. `docs/ARCHITECTURE.md` follows one request through all of it.

pub mod core;
pub mod hypervisor;
pub mod libvirt;
pub mod secret;
pub mod storage;
