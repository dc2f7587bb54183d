// SPDX-License-Identifier: Apache-2.0
//! What a caller's word refers to, looked up in the store and at the hypervisor.

use std::sync::Arc;

use super::validate::reference;
use crate::{
    core::{
        image::ImageRecord,
        lookup::{self, find, not_found, whole_id},
        reason::{Reason, Refusal},
        record::ServerRecord,
    },
    dispatch::refused,
    hypervisor::{DomainStatus, Hypervisor},
    store::Store,
};

/// The server that `word` names.
///
/// # Errors
/// [`Reason::InvalidField`], [`Reason::ServerNotFound`] or [`Reason::AmbiguousName`].
pub(super) fn server(store: &Store, word: &str) -> Result<Arc<ServerRecord>, Refusal> {
    if let Some(server) = whole_id(word).and_then(|id| store.server(id)) {
        return Ok(server);
    }
    reference("server", word)?;
    find(
        "server",
        Reason::ServerNotFound,
        word,
        store
            .servers_after(i64::MIN)
            .into_iter()
            .map(|(_, server)| server),
        |server| server.id,
        |server| &server.name,
    )
}

/// The image that `word` names, with the number of its holders.
///
/// # Errors
/// [`Reason::InvalidField`], [`Reason::ImageNotFound`] or [`Reason::AmbiguousName`].
pub(super) async fn image(store: &Store, word: &str) -> Result<(ImageRecord, u32), Refusal> {
    reference("image", word)?;
    lookup::image(store.images().await.map_err(refused)?, word)
}

/// The domain of libvirt that `word` names: by uuid, else by name.
///
/// # Errors
/// [`Reason::InvalidField`], [`Reason::DomainNotFound`], or what the hypervisor says.
pub(super) async fn domain(
    hypervisor: &dyn Hypervisor,
    word: &str,
) -> Result<DomainStatus, Refusal> {
    reference("domain", word)?;
    if let Some(id) = whole_id(word)
        && let Some(domain) = hypervisor.domain(id).await?
    {
        return Ok(domain);
    }
    hypervisor
        .domain_by_name(word)
        .await?
        .ok_or_else(|| not_found("domain", Reason::DomainNotFound, word))
}
