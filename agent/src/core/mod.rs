// SPDX-License-Identifier: Apache-2.0
//! Pure decisions: records, states, actions, admission, plans.
//!
//! Nothing here waits, reads a file or a clock, or knows that libvirt, SQLite or gRPC exist. What a
//! decision needs of the outside comes in as a value ([`facts`]), and what it decides goes out as one
//! ([`plan::Plan`]).
//!
//! ```text
//!  Action ──> admission::admit ──> planners::plan(record, action, facts) ──> Plan
//!             (verb × states)                                                 (steps, outcome)
//! ```

pub mod action;
pub mod admission;
pub mod autostart;
pub mod backing;
pub mod caller;
pub mod change;
pub mod devices;
pub mod effects;
pub mod errors;
pub mod facts;
pub mod image;
pub mod incident;
pub mod layout;
pub mod lookup;
pub mod operation;
pub mod password;
pub mod plan;
pub mod planners;
pub mod reason;
pub mod reconcile;
pub mod record;
pub mod state;
pub mod text;
