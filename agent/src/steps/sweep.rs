// SPDX-License-Identifier: Apache-2.0
//! Removes at start-up what no server and no operation knows of any more.
//!
//! Operations leave nothing behind but where removing failed: then it is tried again here. Only
//! folders named by a uuid are looked at, and only before operations are taken up.

use std::{collections::BTreeSet, path::Path};

use uuid::Uuid;

use super::files::remove_tree;
use crate::{
    core::layout::Layout,
    store::{Store, StoreResult},
};

/// Removes folders of servers and rescues that nobody knows, and says which; lets go of images and
/// forgets saved definitions that nobody knows.
///
/// # Errors
/// If the store fails. What cannot be removed is logged, and tried again at the next start.
pub async fn sweep(store: &Store, layout: &Layout) -> StoreResult<Vec<String>> {
    let mut known: BTreeSet<(Uuid, Option<Uuid>)> = BTreeSet::new();
    for (operation, _) in store.under_way().await? {
        known.insert((operation.server, None));
        known.insert((operation.server, Some(operation.id)));
    }
    for (_, server) in store.servers_after(i64::MIN) {
        known.insert((server.id, None));
        if let Some(rescue) = &server.rescue {
            known.insert((server.id, Some(rescue.plan)));
        }
    }
    for (image, holder) in store.image_holders().await? {
        if !holder_is_known(&holder, &known) {
            store.release_image(image, holder).await?;
        }
    }
    for (server, plan) in store.saved_definitions().await? {
        if !known.contains(&(server, Some(plan))) {
            tracing::warn!(%server, %plan, "forgetting a saved definition of a rescue that is over");
            store.drop_definition(server, Some(plan)).await?;
        }
    }
    let images = store
        .images()
        .await?
        .into_iter()
        .map(|(image, _)| image.id)
        .collect();
    let layout = layout.clone();
    let removed = tokio::task::spawn_blocking(move || {
        let mut removed = remove_unknown(&layout, &known);
        removed.extend(remove_unknown_images(&layout, &images));
        removed
    });
    Ok(removed.await.unwrap_or_default())
}

/// Images whose import ended before they had a record, or whose removal ended after it.
fn remove_unknown_images(layout: &Layout, known: &BTreeSet<Uuid>) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(layout.images()) else {
        return Vec::new();
    };
    let mut removed = Vec::new();
    for path in entries.flatten().map(|entry| entry.path()) {
        let id = path
            .file_stem()
            .and_then(|stem| Uuid::parse_str(stem.to_str()?).ok());
        if id.is_none_or(|id| known.contains(&id)) {
            continue;
        }
        match std::fs::remove_file(&path) {
            Ok(()) => {
                tracing::warn!(path = %path.display(), "removed an image that has no record");
                removed.push(path.display().to_string());
            }
            Err(error) => {
                tracing::error!(path = %path.display(), %error, "an image that has no record cannot be removed");
            }
        }
    }
    removed
}

/// Holders are named `servers/<server>/disk` and `servers/<server>/rescue/<plan>`.
fn holder_is_known(holder: &str, known: &BTreeSet<(Uuid, Option<Uuid>)>) -> bool {
    let mut words = holder.split('/').skip(1);
    let server = words.next().and_then(|id| Uuid::parse_str(id).ok());
    let plan = words.nth(1).map(Uuid::parse_str).transpose().ok().flatten();
    server.is_some_and(|server| known.contains(&(server, plan)))
}

fn remove_unknown(layout: &Layout, known: &BTreeSet<(Uuid, Option<Uuid>)>) -> Vec<String> {
    let mut removed = Vec::new();
    let servers = layout.servers();
    for server in uuids_in(Path::new(&servers)) {
        if !known.contains(&(server, None)) {
            remove(&layout.server(server), &servers, &mut removed);
            continue;
        }
        for plan in uuids_in(Path::new(&layout.rescues(server))) {
            if !known.contains(&(server, Some(plan))) {
                remove(&layout.rescue(server, plan), &servers, &mut removed);
            }
        }
    }
    removed
}

fn remove(path: &str, servers: &str, removed: &mut Vec<String>) {
    match remove_tree(Path::new(path), Path::new(servers)) {
        Ok(()) => {
            tracing::warn!(path, "removed a folder that no server knows of");
            removed.push(path.to_owned());
        }
        Err(error) => {
            tracing::error!(path, %error, "a folder that no server knows of cannot be removed")
        }
    }
}

fn uuids_in(folder: &Path) -> Vec<Uuid> {
    let Ok(entries) = std::fs::read_dir(folder) else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| Uuid::parse_str(entry.file_name().to_str()?).ok())
        .collect()
}
