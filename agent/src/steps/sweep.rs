// SPDX-License-Identifier: Apache-2.0
//! Removes at start-up what no server and no operation knows of any more.
//!
//! Operations leave nothing behind but where removing failed: then it is tried again here, before
//! operations are taken up. Only what the journal knows to be the agent's own work is removed. With a
//! store that was lost, or put back from a backup, disks that nobody knows are somebody's servers: they
//! are named in the log and left alone.

use std::{collections::BTreeSet, path::Path};

use uuid::Uuid;

use super::files::remove_tree;
use crate::{
    core::{
        errors::chain, image::ImageFormat, layout::Layout, operation::OperationState,
        reason::Reason,
    },
    engine::StepError,
    storage::apart,
    store::{Store, StoreResult},
};

/// Removes folders of servers and rescues that only the journal knows, and files of images that only a
/// note knows, and says which; lets go of
/// images and forgets saved definitions that nobody knows.
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
    let mut removed = Vec::new();
    for (server, folder) in unknown_folders(layout, known).await {
        let (path, plan) = match folder {
            Folder::Whole => (layout.server(server), None),
            Folder::Rescue(plan) => (layout.rescue(server, plan), Some(plan)),
            Folder::Dump(plan) => {
                // That of a server that is there stays, unless it was taken back.
                let kept = store.server(server).is_some() && !was_taken_back(store, plan).await?;
                if kept {
                    continue;
                }
                (layout.dump(server, plan), Some(plan))
            }
        };
        if store.worked_on(server, plan).await? {
            remove(path, layout.servers(), &mut removed).await;
        } else if Path::new(&path).exists() {
            tracing::error!(
                path,
                "a folder that neither a server nor the journal knows is left alone"
            );
        }
    }
    for image in store.image_files_without_record().await? {
        if remove_image_files(layout, image, &mut removed).await {
            store.forget_image_file(image).await?;
        }
    }
    Ok(removed)
}

/// Removes the files of an image that has no record: an import ended before it had one, or a removal
/// after it was gone. Are they gone?
async fn remove_image_files(layout: &Layout, image: Uuid, removed: &mut Vec<String>) -> bool {
    let mut gone = true;
    for format in [ImageFormat::Raw, ImageFormat::Qcow2, ImageFormat::Iso] {
        let path = layout.image(image, format);
        match tokio::fs::remove_file(&path).await {
            Ok(()) => {
                tracing::warn!(path, "removed the file of an image that has no record");
                removed.push(path);
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => {
                gone = false;
                tracing::error!(path, %error, "the file of an image that has no record cannot be removed");
            }
        }
    }
    gone
}

/// Holders are named `servers/<server>/disk` and `servers/<server>/rescue/<plan>`.
fn holder_is_known(holder: &str, known: &BTreeSet<(Uuid, Option<Uuid>)>) -> bool {
    let mut words = holder.split('/').skip(1);
    let server = words.next().and_then(|id| Uuid::parse_str(id).ok());
    let plan = words.nth(1).map(Uuid::parse_str).transpose().ok().flatten();
    server.is_some_and(|server| known.contains(&(server, plan)))
}

/// Did the operation end without doing what it was to do?
async fn was_taken_back(store: &Store, operation: Uuid) -> StoreResult<bool> {
    let operation = store.operation(operation).await?;
    Ok(operation.is_some_and(|operation| {
        matches!(
            operation.state,
            OperationState::Failed | OperationState::Cancelled
        )
    }))
}

/// A folder of a server.
enum Folder {
    /// The server's own, with everything in it.
    Whole,
    /// That of a rescue.
    Rescue(Uuid),
    /// That of a memory dump.
    Dump(Uuid),
}

/// Folders of servers and of rescues that no record and no operation under way knows, and of dumps that
/// none under way makes.
async fn unknown_folders(
    layout: &Layout,
    known: BTreeSet<(Uuid, Option<Uuid>)>,
) -> Vec<(Uuid, Folder)> {
    let layout = layout.clone();
    let look = move || {
        let mut unknown = Vec::new();
        for server in uuids_in(Path::new(&layout.servers())) {
            // The folder of a server that was created goes with everything in it; in that of an
            // adopted one only rescues and dumps are the agent's, and the rest goes if nothing is left.
            let mut add = |folders: String, of: fn(Uuid) -> Folder| {
                for plan in uuids_in(Path::new(&folders)) {
                    if !known.contains(&(server, Some(plan))) {
                        unknown.push((server, of(plan)));
                    }
                }
            };
            add(layout.rescues(server), Folder::Rescue);
            add(layout.dumps(server), Folder::Dump);
            if !known.contains(&(server, None)) {
                unknown.push((server, Folder::Whole));
            }
        }
        unknown
    };
    tokio::task::spawn_blocking(look).await.unwrap_or_default()
}

async fn remove(path: String, servers: String, removed: &mut Vec<String>) {
    let target = path.clone();
    let work = move || remove_tree(Path::new(&target), Path::new(&servers));
    let done = apart::run("sweep", work).await;
    match done.unwrap_or_else(|error| Err(StepError::new(Reason::Internal, chain(&error)))) {
        Ok(()) => {
            tracing::warn!(path, "removed a folder that no server knows of");
            removed.push(path);
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
