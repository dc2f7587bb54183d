// SPDX-License-Identifier: Apache-2.0
//! Disks and images on the host's filesystem.

pub mod inspect;
