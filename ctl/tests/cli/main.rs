// SPDX-License-Identifier: Apache-2.0
//! Runs the real `salvor` against an agent that the tests play, and looks at what it writes and how it
//! ends.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    unreachable_pub,
    missing_docs
)]

mod actions;
mod console;
mod drift;
mod exit_codes;
mod images;
mod made;
mod mock;
mod passwords;
mod reading;
mod record;
mod run;
