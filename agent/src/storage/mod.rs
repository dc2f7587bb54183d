// SPDX-License-Identifier: Apache-2.0
//! Disks and images on the host's filesystem.

pub mod inspect;
pub mod qemu_img;
mod sizes;

pub use sizes::{disk_size, free_space, image_path};
