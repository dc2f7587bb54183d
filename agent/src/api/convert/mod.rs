// SPDX-License-Identifier: Apache-2.0
//! The agent's records as messages of the API, and the enums both ways. Pure.

pub(super) mod image;
pub(super) mod operation;
pub(super) mod server;
pub(super) mod states;
pub(super) mod time;
