// SPDX-License-Identifier: Apache-2.0
//! The pure core: admission, states, observations, plans.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod admission;
mod bench;
mod golden;
mod golden_record;
mod model;
mod overlays;
mod reconcile;
mod refusals;
mod states;
