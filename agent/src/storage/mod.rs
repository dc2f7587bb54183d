// SPDX-License-Identifier: Apache-2.0
//! Disks and images on the host's filesystem.
//!
//! ```text
//!   inspect         may these foreign bytes be shown to QEMU's tools?
//!   images          imported images: written once, hashed, inspected, then only read
//!   disks           disks of guests, looked at
//!   owners          to whom disks belong, noted and put back
//!   overlay         empty qcow2 overlays
//!   qemu_img        commits of overlays, under limits
//!   config_drive    the small disk that tells cloud-init who it is
//!   apart           threads for work on files that may hang
//!   files           durable writing and copying
//! ```
//!
//! Records of images and servers are the store's; here are only the files. Formats come from those
//! records and are never guessed from what a guest wrote.

pub mod apart;
pub mod config_drive;
mod disks;
pub mod files;
pub mod images;
pub mod inspect;
pub mod overlay;
pub mod owners;
pub mod qemu_img;

pub use disks::{LookError, check_writable, file_identity, image_path, look_at_disk, references};
