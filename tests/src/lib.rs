// SPDX-License-Identifier: Apache-2.0
//! The harness for tests with real libvirt and real guests.
//!
//! | module | gives |
//! |---|---|
//! | [`host`] | a hypervisor host of our own: libvirtd in namespaces, to be killed and rebooted at will |
//! | [`agent`] | the real `salvord` on such a host, and a gRPC channel to it |
//! | [`guests`] | images of two kinds of guests |
//! | [`console`] | what a guest says on its serial port, and orders to it |
//! | [`libvirt`] | the test's own view of libvirt |
//! | [`domain`] | domain XML for domains made by hand |
//! | [`run_folder`] | a folder per test, kept when it fails |
//! | [`bench`] | `make bench` |
//! | [`soak`] | `make soak` |
//! | [`wait`] | waits with deadlines |
//!
//! `CONTRIBUTING.md` says how to write a test with it.

// All of this crate is test code: where an expectation fails, the test must fail, at that line.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

pub mod agent;
pub mod bench;
pub mod client;
pub mod console;
pub mod domain;
pub mod guests;
pub mod host;
pub mod init;
pub mod libvirt;
pub mod run_folder;
pub mod soak;
pub mod wait;
