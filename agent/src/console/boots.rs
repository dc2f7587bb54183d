// SPDX-License-Identifier: Apache-2.0
//! Which boot began where in a server's console log.
//!
//! A note for each server, in `<state_dir>/console/<server>.json`: at which byte of which file its log
//! stood when the agent was about to start a guest. The log itself is not touched: it may be an
//! operator's, and a marker in it could be forged by the guest. A lost or damaged note costs the
//! borders between boots, never bytes.

use std::{
    fs,
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::PathBuf,
    sync::Arc,
};

use salvor_domain_templates::{Domain, Role};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{files, pieces::Shown};
use crate::{
    core::{errors::chain, layout::Layout},
    engine::now_ms,
    storage::apart,
};

/// The beginning of a boot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Boot {
    /// Its number.
    pub number: i64,
    /// When, in milliseconds since the Unix epoch.
    pub started_at_ms: i64,
    /// Is it a rescue guest?
    pub rescue: bool,
    /// The inode number of the log's file; 0 if there was none yet.
    pub file: u64,
    /// How long that was.
    pub offset: u64,
}

impl Boot {
    pub(super) fn shown(&self) -> Shown {
        Shown {
            number: self.number,
            started_at_ms: Some(self.started_at_ms),
            rescue: self.rescue,
        }
    }
}

/// The boots of a server that are kept, oldest first.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(super) struct Boots {
    /// There were others before, which are not kept.
    #[serde(default)]
    pub(super) dropped: bool,
    pub(super) boots: Vec<Boot>,
}

/// How a log stands when a guest is about to be started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Standing {
    /// Inode number and length, if there is a file.
    file: Option<(u64, u64)>,
    /// The start begins it anew.
    truncates: bool,
}

impl Boots {
    /// Notes the beginning of a boot. A boot before that has said nothing is replaced: it failed to
    /// start, or this is the same start once more.
    fn begin(&mut self, standing: Standing, rescue: bool, now_ms: i64, keep: u32) {
        let (file, length) = standing.file.unwrap_or_default();
        let offset = if standing.truncates { 0 } else { length };
        let last = self.boots.last();
        let silent = |boot: &&Boot| boot.file == file && boot.offset == length;
        let number = match last.filter(silent) {
            Some(last) => last.number,
            None => last.map_or(1, |last| last.number + 1),
        };
        if standing.truncates {
            // What was in it is lost.
            self.boots.retain(|boot| boot.file != file);
            self.dropped = true;
        }
        self.boots.retain(|boot| boot.number < number);
        self.boots.push(Boot {
            number,
            started_at_ms: now_ms,
            rescue,
            file,
            offset,
        });
        let keep = usize::try_from(keep.max(1)).unwrap_or(usize::MAX);
        let over = self.boots.len().saturating_sub(keep);
        self.dropped |= over > 0;
        self.boots.drain(..over);
    }
}

/// The notes of all servers.
#[derive(Debug, Clone)]
pub struct BootNotes {
    layout: Layout,
    keep: u32,
}

impl BootNotes {
    /// The notes in this state folder, of so many boots for each server.
    #[must_use]
    pub fn new(layout: Layout, keep: u32) -> Self {
        Self { layout, keep }
    }

    /// Notes that a guest of the server is about to be started with this definition. A note that cannot
    /// be written is no reason not to start it.
    pub async fn begins(&self, server: Uuid, definition: &str) {
        let Ok(domain) = Domain::parse(definition) else {
            return;
        };
        let Some(log) = domain.console_log() else {
            return;
        };
        let rescue = domain
            .salvor_mark()
            .is_some_and(|mark| mark.role == Role::Rescue);
        let (notes, now) = (self.clone(), now_ms());
        let work = move || {
            let standing = Standing {
                file: files::standing(&log.path)?,
                truncates: !log.append,
            };
            let mut boots = notes.of(server);
            boots.begin(standing, rescue, now, notes.keep);
            notes.write(server, &boots)
        };
        match apart::look(&files::whose(server), work).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::warn!(%server, %error, "where this boot begins in the console log is not known");
            }
            Err(error) => {
                tracing::warn!(%server, error = %chain(&error), "where this boot begins in the console log is not known");
            }
        }
    }

    /// The boots of a server. Blocks.
    pub(super) fn of(&self, server: Uuid) -> Boots {
        let read = fs::read(self.path(server));
        let boots: Option<Boots> = read
            .ok()
            .and_then(|bytes| serde_json::from_slice(&bytes).ok());
        boots.unwrap_or_default()
    }

    /// It takes the place of the one before in one move, and is not synced: a power cut may take it.
    fn write(&self, server: Uuid, boots: &Boots) -> io::Result<()> {
        let path = self.path(server);
        let part = path.with_extension("part");
        // Nobody else is to know when servers boot.
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(self.layout.consoles())?;
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&part)?;
        file.write_all(&serde_json::to_vec(boots).map_err(io::Error::other)?)?;
        fs::rename(part, path)
    }

    fn path(&self, server: Uuid) -> PathBuf {
        PathBuf::from(self.layout.console_boots(server))
    }

    /// Removes the notes of servers that there are no more. Blocks.
    pub(super) fn forget_others(&self, there_is: &dyn Fn(Uuid) -> bool) {
        let Ok(entries) = fs::read_dir(self.layout.consoles()) else {
            return;
        };
        for path in entries.flatten().map(|entry| entry.path()) {
            let stem = path.file_stem().and_then(|stem| stem.to_str());
            let server = stem.and_then(|stem| Uuid::parse_str(stem).ok());
            if server.is_some_and(|server| !there_is(server)) {
                // What cannot be removed now is tried again the next time.
                let _ = fs::remove_file(&path);
            }
        }
    }

    pub(super) fn shared(self) -> Arc<Self> {
        Arc::new(self)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    const KEEP: u32 = 3;

    fn grown(file: Option<(u64, u64)>) -> Standing {
        let truncates = false;
        Standing { file, truncates }
    }

    fn begun(boots: &Boots) -> Vec<(i64, u64, u64)> {
        let boots = boots.boots.iter();
        boots.map(|b| (b.number, b.file, b.offset)).collect()
    }

    #[test]
    fn boots_are_numbered_and_only_so_many_are_kept() {
        let mut boots = Boots::default();
        boots.begin(grown(None), false, 1, KEEP);
        for length in [10, 20] {
            boots.begin(grown(Some((7, length))), false, 2, KEEP);
        }
        assert_eq!(begun(&boots), [(1, 0, 0), (2, 7, 10), (3, 7, 20)]);
        assert!(!boots.dropped);
        boots.begin(grown(Some((7, 30))), true, 3, KEEP);
        assert_eq!(begun(&boots), [(2, 7, 10), (3, 7, 20), (4, 7, 30)]);
        assert!(boots.dropped && boots.boots.last().unwrap().rescue);
    }

    #[test]
    fn a_start_that_is_tried_again_is_one_boot() {
        let mut boots = Boots::default();
        for now in 1..5 {
            boots.begin(grown(None), false, now, KEEP);
        }
        assert_eq!(begun(&boots), [(1, 0, 0)]);
        for now in 5..9 {
            boots.begin(grown(Some((7, 10))), true, now, KEEP);
        }
        assert_eq!(begun(&boots), [(1, 0, 0), (2, 7, 10)]);
        assert_eq!(boots.boots.last().unwrap().started_at_ms, 8);
    }

    #[test]
    fn a_log_that_is_begun_anew_has_one_boot() {
        let mut boots = Boots::default();
        let anew = |length| Standing {
            file: Some((7, length)),
            truncates: true,
        };
        boots.begin(anew(50), false, 1, KEEP);
        assert!(boots.dropped, "what was in it before is lost");
        boots.begin(anew(80), false, 2, KEEP);
        assert_eq!(begun(&boots), [(2, 7, 0)]);
        boots.begin(anew(0), false, 3, KEEP);
        assert_eq!(begun(&boots), [(2, 7, 0)], "it had said nothing");
    }

    #[tokio::test]
    async fn notes_outlive_the_agent_and_go_with_their_server() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::new(dir.path().to_str().unwrap());
        let log = dir.path().join("log");
        let xml = format!(
            "<domain><name>d</name><devices><serial><log file='{}' append='on'/></serial></devices></domain>",
            log.display()
        );
        let (server, other) = (Uuid::from_u128(1), Uuid::from_u128(2));
        BootNotes::new(layout.clone(), KEEP)
            .begins(server, &xml)
            .await;
        fs::write(&log, "said").unwrap();
        let notes = BootNotes::new(layout, KEEP);
        notes.begins(server, &xml).await;
        notes.begins(other, &xml).await;
        let boots = notes.of(server);
        assert_eq!(boots.boots.len(), 2);
        assert_eq!(boots.boots.last().unwrap().offset, 4);

        notes.forget_others(&|id| id == server);
        assert_eq!(notes.of(other), Boots::default());
        assert_eq!(notes.of(server), boots);
        // A note that was damaged costs the borders and nothing else.
        fs::write(notes.path(server), "{").unwrap();
        assert_eq!(notes.of(server), Boots::default());
    }
}
