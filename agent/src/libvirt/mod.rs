// SPDX-License-Identifier: Apache-2.0
//! libvirt: the only place that names the `virt` crate.
