// SPDX-License-Identifier: Apache-2.0
//! Skeleton.
fn main() {}
