// SPDX-License-Identifier: Apache-2.0
//! The administrator's password on its way through a call: given or generated, hashed, and told once.

use super::validate::Checked;
use crate::{
    core::{
        password::CryptHash,
        reason::{Reason, Refusal},
    },
    secret::{AdminPass, PasswordError},
};

/// What a request says about the password.
#[derive(Debug)]
pub(super) enum Password {
    /// The action has none.
    None,
    /// It is to be generated.
    Generated,
    /// The caller chose it.
    Given(AdminPass),
}

impl Password {
    /// Takes the password of a request. Only whether there was one is left in the request.
    pub(super) fn take(field: &mut Option<String>) -> Checked<Self> {
        match field {
            None => Ok(Self::Generated),
            Some(clear) => AdminPass::new(std::mem::take(clear))
                .map(Self::Given)
                .map_err(|error| Refusal::field("admin_pass", error.to_string())),
        }
    }

    /// The password, and its hash, which takes milliseconds and so runs on a thread of its own.
    pub(super) async fn hashed(self) -> Result<Option<(AdminPass, CryptHash)>, Refusal> {
        let password = match self {
            Self::None => return Ok(None),
            Self::Generated => AdminPass::generate(),
            Self::Given(password) => password,
        };
        let work = tokio::task::spawn_blocking(move || {
            password.crypt_sha512().map(|hash| (password, hash))
        });
        match work.await {
            Ok(Ok(hashed)) => Ok(Some(hashed)),
            Ok(Err(error @ (PasswordError::Length { .. } | PasswordError::Characters))) => {
                Err(Refusal::field("admin_pass", error.to_string()))
            }
            Ok(Err(PasswordError::Hash)) | Err(_) => Err(Refusal::new(
                Reason::Internal,
                "the password could not be hashed",
            )),
        }
    }
}

/// Stands in for a hash where none is needed: crypt(3) makes it from no password.
pub(super) fn no_hash() -> CryptHash {
    CryptHash("*".to_owned())
}
