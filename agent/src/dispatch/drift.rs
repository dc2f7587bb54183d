// SPDX-License-Identifier: Apache-2.0
//! How a server's definition differs from the one that is known to be its own.

use salvor_domain_templates::in_order;

use super::{Dispatcher, preview::unified, refused};
use crate::{
    core::{devices::drifted, reason::Refusal, record::ServerRecord},
    hypervisor::{Definition, HypervisorError},
};

/// What is said where two definitions differ only in what is not shown.
const MASKED: &str = "(what differs is or may be secret, and is not shown)\n";

/// A look at a definition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Drift {
    /// From the definition that is known to that which libvirt has, as a unified diff without secrets;
    /// empty without drift.
    pub diff: String,
    /// Is it known how the server was defined? Without that there is nothing to compare with.
    pub known: bool,
}

impl Dispatcher {
    /// Compares the server's own definition with what is known of it. While a rescue is in force its own
    /// is the one that it goes back to.
    ///
    /// # Errors
    /// If libvirt cannot be asked, or the store fails.
    pub async fn drift(&self, server: &ServerRecord) -> Result<Drift, Refusal> {
        let id = server.id;
        let Some(known) = self.store.known_definition(id).await.map_err(refused)? else {
            return Ok(Drift {
                diff: String::new(),
                known: false,
            });
        };
        let saved = match &server.rescue {
            Some(_) => self.store.saved_definition(id).await.map_err(refused)?,
            None => None,
        };
        let current = match saved {
            Some(saved) => saved,
            None => match self.hypervisor.domain_xml(id, Definition::Inactive).await {
                Ok(xml) => xml,
                Err(HypervisorError::NoDomain { .. }) => String::new(),
                Err(error) => return Err(error.into()),
            },
        };
        let diff = match drifted(&known, &current) {
            true => {
                let ordered = |xml: &str| in_order(xml).unwrap_or_else(|| xml.to_owned());
                Some(unified(&ordered(&known), &ordered(&current))).filter(|diff| !diff.is_empty())
            }
            false => Some(String::new()),
        };
        Ok(Drift {
            diff: diff.unwrap_or_else(|| MASKED.to_owned()),
            known: true,
        })
    }
}
