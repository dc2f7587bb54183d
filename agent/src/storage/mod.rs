// SPDX-License-Identifier: Apache-2.0
//! Disks and images on the host's filesystem.
//!
//! ```text
//!   inspect         may these foreign bytes be shown to QEMU's tools?
//!   images          imported images: written once, hashed, inspected, then only read
//!   qemu_img        disks: overlays, conversions, commits, under limits
//!   config_drive    the small disk that tells cloud-init who it is
//!   files           durable writing, copying, names that stay in their folder
//! ```
//!
//! Records of images and servers are the store's; here are only the files. Formats come from those
//! records and are never guessed from what a guest wrote.

mod cancel;
pub mod config_drive;
pub mod files;
pub mod images;
pub mod inspect;
pub mod qemu_img;
mod sizes;

pub use cancel::Cancel;
pub use sizes::{disk_size, free_space, image_path};
