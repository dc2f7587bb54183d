// SPDX-License-Identifier: Apache-2.0
//! Disks and images on the host's filesystem.

mod cancel;
pub mod inspect;
pub mod qemu_img;

pub use cancel::Cancel;
