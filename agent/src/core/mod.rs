// SPDX-License-Identifier: Apache-2.0
//! Pure decisions: records, states, actions, admission, plans.
//!
//! Nothing here waits, reads a file or a clock, or knows that libvirt, SQLite or gRPC exist. What a
//! decision needs of the outside comes in as a value.

pub mod state;
