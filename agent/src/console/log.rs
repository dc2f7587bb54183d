// SPDX-License-Identifier: Apache-2.0
//! Reading the console log of a server, once or on and on.

use std::{
    collections::HashSet, fs, io, os::unix::fs::MetadataExt as _, sync::Arc, time::Duration,
};

use salvor_domain_templates::Domain;
use tokio::sync::watch;
use uuid::Uuid;

use super::{
    Limits,
    boots::BootNotes,
    files::{self, LogFiles, whose},
    pieces::{Cursor, Piece, Place, Shown, before_end, end, find, pieces},
};
use crate::{
    core::{
        errors::chain,
        layout::Layout,
        reason::{Reason, Refusal},
        record::{Origin, ServerRecord},
    },
    hypervisor::{Definition, Hypervisor, HypervisorError},
    storage::apart,
    store::Store,
};

/// Lines are looked for in pieces of this size, from the end.
const SEARCH: usize = 64 << 10;

/// Logs are trimmed so often.
const TRIM_EVERY: Duration = Duration::from_secs(10);

/// Where to begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum From {
    /// So many lines from the end; with the oldest if `None`.
    LastLines(Option<u64>),
    /// So many bytes from the end; with the oldest if `None`.
    LastBytes(Option<u64>),
    /// Where an earlier read ended.
    Cursor(Cursor),
}

/// Whose words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Whose {
    /// The server's own guest's.
    Server,
    /// Rescue guests'.
    Rescue,
    /// Everybody's.
    All,
}

/// What to read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogRequest {
    /// Where to begin.
    pub from: From,
    /// Whose words.
    pub whose: Whose,
    /// Of this boot only.
    pub boot: Option<i64>,
    /// The most bytes.
    pub most: usize,
    /// Not beyond the end of a boot.
    pub one_boot: bool,
}

impl LogRequest {
    fn wants(&self, piece: &Piece) -> bool {
        let whose = match self.whose {
            Whose::Server => !piece.boot.rescue,
            Whose::Rescue => piece.boot.rescue,
            Whose::All => true,
        };
        whose && self.boot.is_none_or(|boot| boot == piece.boot.number)
    }
}

/// What was read.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LogRead {
    /// The bytes.
    pub data: Vec<u8>,
    /// Where they end.
    pub next: Cursor,
    /// Is there more of what was asked for?
    pub more: bool,
    /// Something between the cursor and the bytes is no longer kept.
    pub gap: bool,
    /// The boot of the first byte.
    pub boot: Option<i64>,
    /// All boots of which something is kept, with how much, oldest first.
    pub boots: Vec<(Shown, u64)>,
}

/// The console logs of the servers of this host.
#[derive(Clone)]
pub struct Logs {
    hypervisor: Arc<dyn Hypervisor>,
    store: Store,
    layout: Layout,
    notes: Arc<BootNotes>,
    limits: Limits,
}

impl Logs {
    /// Logs under these limits.
    #[must_use]
    pub fn new(
        hypervisor: Arc<dyn Hypervisor>,
        store: Store,
        layout: Layout,
        limits: Limits,
    ) -> Self {
        Self {
            notes: BootNotes::new(layout.clone(), limits.boots).shared(),
            hypervisor,
            store,
            layout,
            limits,
        }
    }

    /// The file that keeps what the server's guest says.
    ///
    /// # Errors
    /// [`Reason::ConsoleLogUnavailable`] if there is none, or what the hypervisor says.
    pub async fn file(&self, server: &ServerRecord) -> Result<String, Refusal> {
        let of = |which| self.hypervisor.domain_xml(server.id, which);
        let xml = match of(Definition::Live).await {
            Err(HypervisorError::NoDomain { .. }) => of(Definition::Inactive).await,
            answer => answer,
        };
        let xml = match xml {
            Ok(xml) => xml,
            // It is where we put it.
            Err(HypervisorError::LinkDown { .. }) if server.origin == Origin::Created => {
                return Ok(self.layout.console_log(server.id));
            }
            Err(error) => return Err(error.into()),
        };
        let log = Domain::parse(&xml).ok().and_then(|it| it.console_log());
        log.map(|log| log.path).ok_or_else(|| {
            Refusal::new(
                Reason::ConsoleLogUnavailable,
                format!(
                    "the serial port of {} has no log; with `virsh edit {}` put <log file='/var/log/libvirt/qemu/{}-console.log' append='on'/> into its <serial>, then stop and start it",
                    server.name, server.domain_name, server.domain_name
                ),
            )
        })
    }

    /// Reads the log at `path` (see [`Self::file`]).
    ///
    /// # Errors
    /// [`Reason::ConsoleLogUnavailable`] if it cannot be read.
    pub async fn read(
        &self,
        server: Uuid,
        path: String,
        request: LogRequest,
    ) -> Result<LogRead, Refusal> {
        let (notes, most) = (Arc::clone(&self.notes), self.limits.bytes);
        let work = move || read(&notes, server, &path, most, request);
        let unavailable = |message: String| Refusal::new(Reason::ConsoleLogUnavailable, message);
        match apart::look(&whose(server), work).await {
            Ok(read) => read.map_err(|error| unavailable(error.to_string())),
            Err(error) => Err(unavailable(chain(&error))),
        }
    }

    /// Something that is another value when the log at `path` may have changed.
    pub async fn version(&self, server: Uuid, path: &str) -> Option<(u64, u64)> {
        let path = path.to_owned();
        let work = move || {
            let metadata = fs::symlink_metadata(path).ok()?;
            Some((metadata.ino(), metadata.len()))
        };
        apart::look(&whose(server), work).await.ok().flatten()
    }

    /// Keeps the logs of the agent's own servers within their limits until it is told to stop.
    pub async fn keep_within_limits(self, mut stop: watch::Receiver<bool>) {
        let mut told = false;
        while tokio::time::timeout(TRIM_EVERY, stop.wait_for(|stop| *stop))
            .await
            .is_err()
        {
            if let Err(error) = self.trim().await
                && !std::mem::replace(&mut told, true)
            {
                // Once: it would be the same every time.
                tracing::warn!(%error, "console logs cannot be kept within `console.max_size`");
            }
        }
    }

    async fn trim(&self) -> io::Result<()> {
        let servers = self.store.servers_after(i64::MIN).into_iter();
        let (all, own): (HashSet<Uuid>, Vec<Option<Uuid>>) = servers
            .map(|(_, server)| {
                let own = server.origin == Origin::Created;
                (server.id, own.then_some(server.id))
            })
            .unzip();
        let (notes, layout, most) = (
            Arc::clone(&self.notes),
            self.layout.clone(),
            self.limits.bytes,
        );
        let work = move || {
            notes.forget_others(&|server| all.contains(&server));
            for server in own.into_iter().flatten() {
                trim(&notes, server, &layout.console_log(server), most)?;
            }
            Ok(())
        };
        // All of them are in the state folder, on one filesystem.
        match apart::run("console logs", work).await {
            Ok(trimmed) => trimmed,
            Err(error) => Err(io::Error::other(error)),
        }
    }
}

fn trim(notes: &BootNotes, server: Uuid, path: &str, most: u64) -> io::Result<()> {
    // Most are small, and a look is cheap.
    if fs::symlink_metadata(path).is_ok_and(|file| file.blocks() * 512 <= most / 4) {
        return Ok(());
    }
    let files = files::open_to_trim(path)?;
    let kept = pieces(&files.parts, &notes.of(server), most);
    let given = files.give_back(&kept)?;
    if given > 0 {
        tracing::info!(%server, bytes = given, "the oldest of a console log was dropped");
    }
    Ok(())
}

fn read(
    notes: &BootNotes,
    server: Uuid,
    path: &str,
    most: u64,
    request: LogRequest,
) -> io::Result<LogRead> {
    let files = LogFiles::open(path)?;
    let all = pieces(&files.parts, &notes.of(server), most);
    let mut boots: Vec<(Shown, u64)> = Vec::new();
    for piece in &all {
        match boots.last_mut() {
            Some((boot, size)) if *boot == piece.boot => *size += piece.len(),
            _ => boots.push((piece.boot.clone(), piece.len())),
        }
    }
    let (wanted, place) = match request.from {
        // Found among all, so that a place in what is not wanted is one, too.
        From::Cursor(cursor) => (all.clone(), find(&all, cursor)),
        From::LastBytes(_) | From::LastLines(_) => {
            let wanted: Vec<Piece> = all.into_iter().filter(|p| request.wants(p)).collect();
            let place = match request.from {
                From::LastBytes(Some(bytes)) => before_end(&wanted, bytes),
                From::LastLines(Some(lines)) => before_lines(&files, &wanted, lines)?,
                _ => before_end(&wanted, u64::MAX),
            };
            (wanted, place)
        }
    };
    let mut answer = take(&files, &wanted, place, &request)?;
    if wanted.get(place.piece).is_none()
        && let From::Cursor(cursor) = request.from
    {
        // Nothing has been said since, or the log is gone.
        answer.next = cursor;
    }
    answer.boots = boots;
    Ok(answer)
}

/// Reads on from a place.
fn take(
    files: &LogFiles,
    pieces: &[Piece],
    place: Place,
    request: &LogRequest,
) -> io::Result<LogRead> {
    let mut answer = LogRead {
        gap: place.gap,
        ..LogRead::default()
    };
    let mut offset = place.offset;
    for (index, piece) in pieces.iter().enumerate().skip(place.piece) {
        if index > place.piece {
            offset = piece.from;
        }
        let wanted = request.wants(piece) && offset < piece.to;
        let other = answer.boot.is_some_and(|boot| boot != piece.boot.number);
        let left = request.most.saturating_sub(answer.data.len());
        if wanted && (left == 0 || (request.one_boot && other)) {
            answer.more = true;
            return Ok(answer);
        }
        if !wanted {
            // Where what was wanted ends stays where it was, but before it there is nothing to keep.
            if answer.data.is_empty() {
                answer.next = Cursor::at(piece, piece.to);
            }
            continue;
        }
        let bytes = files.read(piece, offset, left)?;
        let end = offset.saturating_add(u64::try_from(bytes.len()).unwrap_or(u64::MAX));
        answer.boot = answer.boot.or(Some(piece.boot.number));
        answer.data.extend(bytes);
        answer.next = Cursor::at(piece, end);
        if end < piece.to {
            // The limit, or a file that has become shorter meanwhile.
            answer.more = answer.data.len() >= request.most;
            return Ok(answer);
        }
    }
    Ok(answer)
}

/// The beginning of the last `lines` lines. The newline at the very end ends the last one.
fn before_lines(files: &LogFiles, pieces: &[Piece], lines: u64) -> io::Result<Place> {
    if lines == 0 {
        return Ok(end(pieces));
    }
    let mut ends = 0;
    let mut last = true;
    for (index, piece) in pieces.iter().enumerate().rev() {
        let mut to = piece.to;
        while to > piece.from {
            let step = u64::try_from(SEARCH).unwrap_or(u64::MAX);
            let from = to.saturating_sub(step).max(piece.from);
            let within = Piece {
                to,
                ..piece.clone()
            };
            let bytes = files.read(&within, from, SEARCH)?;
            for (at, byte) in bytes.iter().enumerate().rev() {
                let is_last = std::mem::replace(&mut last, false);
                if *byte != b'\n' || is_last {
                    continue;
                }
                ends += 1;
                if ends == lines {
                    let behind = u64::try_from(at).unwrap_or(u64::MAX).saturating_add(1);
                    return Ok(Place {
                        piece: index,
                        offset: from.saturating_add(behind),
                        gap: false,
                    });
                }
            }
            to = from;
        }
    }
    Ok(before_end(pieces, u64::MAX))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    const SERVER: Uuid = Uuid::from_u128(1);

    struct Log {
        dir: tempfile::TempDir,
        notes: BootNotes,
    }

    impl Log {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let layout = Layout::new(dir.path().to_str().unwrap());
            Self {
                notes: BootNotes::new(layout, 5),
                dir,
            }
        }

        fn path(&self) -> String {
            self.dir.path().join("log").to_str().unwrap().to_owned()
        }

        fn says(&self, text: &str) {
            let mut said = fs::read(self.path()).unwrap_or_default();
            said.extend(text.as_bytes());
            fs::write(self.path(), said).unwrap();
        }

        async fn boots(&self, rescue: bool) {
            let mark = if rescue {
                "<metadata><s:salvor xmlns:s='https://salvor.example/xmlns/domain/1'><s:plan>p</s:plan><s:role>rescue</s:role></s:salvor></metadata>"
            } else {
                ""
            };
            let xml = format!(
                "<domain><name>d</name>{mark}<devices><serial><log file='{}' append='on'/></serial></devices></domain>",
                self.path()
            );
            self.notes.begins(SERVER, &xml).await;
        }

        fn read(&self, request: LogRequest) -> LogRead {
            read(&self.notes, SERVER, &self.path(), u64::MAX, request).unwrap()
        }

        fn text(&self, request: LogRequest) -> String {
            String::from_utf8(self.read(request).data).unwrap()
        }
    }

    fn from(from: From) -> LogRequest {
        LogRequest {
            from,
            whose: Whose::All,
            boot: None,
            most: 1 << 20,
            one_boot: false,
        }
    }

    fn lines(lines: u64) -> LogRequest {
        from(From::LastLines(Some(lines)))
    }

    // Nova answers "l2\nl3\n", "", "" and "l3\n" for -1, 0, 1 and 2.
    #[test]
    fn lines_are_counted_from_the_end_and_the_last_newline_ends_the_last_line() {
        let log = Log::new();
        assert_eq!(log.text(lines(1)), "");
        log.says("l1\nl2\nl3\n");
        for (count, expected) in [
            (0, ""),
            (1, "l3\n"),
            (2, "l2\nl3\n"),
            (3, "l1\nl2\nl3\n"),
            (4, "l1\nl2\nl3\n"),
            (u64::MAX, "l1\nl2\nl3\n"),
        ] {
            assert_eq!(log.text(lines(count)), expected, "{count} lines");
        }
        assert_eq!(log.text(from(From::LastLines(None))), "l1\nl2\nl3\n");
        log.says("half");
        assert_eq!(log.text(lines(1)), "half");
        assert_eq!(log.text(lines(2)), "l3\nhalf");
        assert_eq!(log.text(from(From::LastBytes(Some(5)))), "\nhalf");
        assert_eq!(log.text(from(From::LastBytes(Some(0)))), "");
        assert_eq!(log.text(from(From::LastBytes(None))), "l1\nl2\nl3\nhalf");
        log.says("\n\n");
        assert_eq!(log.text(lines(1)), "\n");
        assert_eq!(log.text(lines(2)), "half\n\n");
    }

    #[test]
    fn lines_longer_than_what_is_searched_at_once_are_found() {
        let log = Log::new();
        let long = "x".repeat(3 * SEARCH);
        log.says(&format!("first\n{long}\nlast\n"));
        assert_eq!(log.text(lines(2)), format!("{long}\nlast\n"));
        assert_eq!(log.text(lines(3)).len(), 3 * SEARCH + 12);
    }

    #[tokio::test]
    async fn a_cursor_goes_on_over_boots_and_limits() {
        let log = Log::new();
        log.boots(false).await;
        log.says("one\n");
        let mut request = from(From::LastBytes(None));
        request.most = 3;
        let first = log.read(request);
        assert_eq!(
            (first.data.as_slice(), first.more),
            (b"one".as_slice(), true)
        );
        log.boots(true).await;
        log.says("two\n");
        log.boots(false).await;
        log.says("three\n");

        let mut said = String::new();
        let mut cursor = first.next;
        loop {
            request.from = From::Cursor(cursor.to_string().parse().unwrap());
            let read = log.read(request);
            assert!(!read.gap && read.data.len() <= 3);
            said.push_str(std::str::from_utf8(&read.data).unwrap());
            cursor = read.next;
            if !read.more {
                break;
            }
        }
        assert_eq!(said, "\ntwo\nthree\n");
        request.from = From::Cursor(cursor);
        assert_eq!(log.read(request).data, b"");
        log.says("4");
        assert_eq!(log.read(request).data, b"4");
    }

    #[tokio::test]
    async fn the_words_of_rescue_guests_are_apart() {
        let log = Log::new();
        for (rescue, said) in [(false, "a\n"), (true, "R\n"), (false, "b\n")] {
            log.boots(rescue).await;
            log.says(said);
        }
        let of = |whose| LogRequest {
            whose,
            ..from(From::LastBytes(None))
        };
        assert_eq!(log.text(of(Whose::Server)), "a\nb\n");
        assert_eq!(log.text(of(Whose::Rescue)), "R\n");
        assert_eq!(log.text(of(Whose::All)), "a\nR\nb\n");
        let boots = log.read(of(Whose::Rescue)).boots;
        let told: Vec<_> = boots
            .iter()
            .map(|(b, size)| (b.number, b.rescue, *size))
            .collect();
        assert_eq!(told, [(1, false, 2), (2, true, 2), (3, false, 2)]);
        let second = LogRequest {
            boot: Some(2),
            ..of(Whose::All)
        };
        assert_eq!(log.text(second), "R\n");
        // A cursor may stand in what is not wanted.
        let mut request = of(Whose::Server);
        request.from = From::Cursor(log.read(second).next);
        assert_eq!(log.text(request), "b\n");
        request.one_boot = true;
        request.from = From::LastBytes(None);
        let first = log.read(request);
        assert_eq!(
            (first.data.as_slice(), first.more),
            (b"a\n".as_slice(), true)
        );
        request.from = From::Cursor(first.next);
        assert_eq!(log.text(request), "b\n");
    }

    #[test]
    fn a_log_that_is_not_there_yet_is_empty_and_can_be_gone_on_from() {
        let log = Log::new();
        let read = log.read(from(From::LastBytes(Some(0))));
        assert_eq!((read.data.len(), read.more, read.gap), (0, false, false));
        log.says("first");
        assert_eq!(log.text(from(From::Cursor(read.next))), "first");
    }
}
