// SPDX-License-Identifier: Apache-2.0
//! The form in which a password goes further than the request that brought it.

use serde::{Deserialize, Serialize};

/// A crypt(3) hash of a password (SHA-512, salted). The clear text lives in the request and in its
/// one answer; plans, the journal, config drives and the guest agent get only this.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct CryptHash(pub String);

impl std::fmt::Debug for CryptHash {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("CryptHash(…)")
    }
}
