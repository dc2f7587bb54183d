// SPDX-License-Identifier: Apache-2.0
//! A log as pieces: which bytes of which file are of which boot, and places in them.
//!
//! A log is one file that is only ever added to, or several: virtlogd renames a file that has grown
//! and begins a new one. Files are told apart by their inode numbers, which renaming does not change.
//! Where each boot began is noted (see `boots`); from both follows whose each byte is.
//!
//! Pure: it opens nothing.

use std::str::FromStr;

use super::boots::Boots;

/// A file of a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Part {
    /// Its inode number.
    pub(super) file: u64,
    /// From where on there is something: what is before was given back to the filesystem.
    pub(super) from: u64,
    /// How long it is.
    pub(super) len: u64,
}

/// Bytes of one file that are of one boot. Never empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Piece {
    /// Which part.
    pub(super) part: usize,
    /// Its inode number.
    pub(super) file: u64,
    /// The first byte.
    pub(super) from: u64,
    /// The byte behind the last one.
    pub(super) to: u64,
    /// The boot.
    pub(super) boot: Shown,
}

impl Piece {
    pub(super) const fn len(&self) -> u64 {
        self.to.saturating_sub(self.from)
    }
}

/// A boot as it is told of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shown {
    /// Its number.
    pub number: i64,
    /// When the agent started it, in milliseconds since the Unix epoch, if it did.
    pub started_at_ms: Option<i64>,
    /// Was it a rescue guest?
    pub rescue: bool,
}

/// A place in a log. It stays the same place while the log grows, is rotated, or loses its beginning.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Cursor {
    boot: i64,
    /// 0: before everything.
    file: u64,
    offset: u64,
}

/// A text is no cursor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("must be a cursor that an earlier answer gave")]
pub struct BadCursor;

impl std::fmt::Display for Cursor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}-{:x}-{}", self.boot, self.file, self.offset)
    }
}

impl FromStr for Cursor {
    type Err = BadCursor;

    fn from_str(text: &str) -> Result<Self, BadCursor> {
        let mut words = text.splitn(3, '-');
        let mut word = || words.next().filter(|word| !word.starts_with('+'));
        let cursor = (|| {
            Some(Self {
                boot: word()?.parse().ok()?,
                file: u64::from_str_radix(word()?, 16).ok()?,
                offset: word()?.parse().ok()?,
            })
        })();
        cursor.ok_or(BadCursor)
    }
}

impl Cursor {
    pub(super) const fn at(piece: &Piece, offset: u64) -> Self {
        Self {
            boot: piece.boot.number,
            file: piece.file,
            offset,
        }
    }
}

/// Cuts a log into the pieces of its boots: what is kept of it, oldest first. Not more than the newest
/// `most` bytes, and nothing of boots that are no longer kept.
pub(super) fn pieces(parts: &[Part], noted: &Boots, most: u64) -> Vec<Piece> {
    let begins = located(parts, noted);
    // What is before the first boot that was found is of the one before that.
    let before = match begins.first() {
        Some((_, _, first)) => first.checked_sub(1),
        None => noted.boots.len().checked_sub(1),
    };
    let unknown = Shown {
        number: noted.boots.first().map_or(0, |first| first.number - 1),
        started_at_ms: None,
        rescue: false,
    };
    let mut boot = match before.and_then(|at| noted.boots.get(at)) {
        Some(before) => Some(before.shown()),
        None if noted.dropped => None,
        None => Some(unknown),
    };
    let mut found = Vec::new();
    for (part, it) in parts.iter().enumerate() {
        let mut at = it.from;
        let here = begins.iter().filter(|(of, _, _)| *of == part);
        let ends = here.map(|(_, offset, index)| (*offset, noted.boots.get(*index)));
        for (to, next) in ends.chain([(it.len, None)]) {
            let to = to.clamp(at, it.len.max(at));
            if let Some(boot) = boot.clone().filter(|_| to > at) {
                found.push(Piece {
                    part,
                    file: it.file,
                    from: at,
                    to,
                    boot,
                });
            }
            at = to;
            if let Some(next) = next {
                boot = Some(next.shown());
            }
        }
    }
    clip(found, most)
}

/// Where boots began: part, offset, and which boot; in order.
fn located(parts: &[Part], noted: &Boots) -> Vec<(usize, u64, usize)> {
    let mut found: Vec<(usize, u64, usize)> = Vec::new();
    for (index, boot) in noted.boots.iter().enumerate() {
        let last = found.last().map(|(part, offset, _)| (*part, *offset));
        let place = if boot.file == 0 {
            // There was no file: it is the first one that no earlier boot knew.
            Some((last.map_or(0, |(part, _)| part + 1), 0))
        } else {
            let part = parts.iter().position(|part| part.file == boot.file);
            part.map(|part| (part, boot.offset))
        };
        let place = place.filter(|place| place.0 < parts.len() && last.is_none_or(|l| l <= *place));
        if let Some((part, offset)) = place {
            found.push((part, offset, index));
        }
    }
    found
}

/// Leaves the newest `most` bytes.
fn clip(mut pieces: Vec<Piece>, most: u64) -> Vec<Piece> {
    let mut left = most;
    for piece in pieces.iter_mut().rev() {
        let len = piece.len().min(left);
        piece.from = piece.to - len;
        left -= len;
    }
    pieces.retain(|piece| piece.len() > 0);
    pieces
}

/// A place in pieces: which one (all of them: behind the last), and the offset in its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) piece: usize,
    pub(super) offset: u64,
    /// Something between the cursor and here is missing.
    pub(super) gap: bool,
}

/// Where a cursor points to now.
pub(super) fn find(pieces: &[Piece], cursor: Cursor) -> Place {
    let holds = |piece: &Piece| {
        piece.boot.number == cursor.boot
            && piece.file == cursor.file
            && (piece.from..=piece.to).contains(&cursor.offset)
    };
    if let Some(piece) = pieces.iter().rposition(holds) {
        let (offset, gap) = (cursor.offset, false);
        return Place { piece, offset, gap };
    }
    let after = |piece: &Piece| match piece.boot.number.cmp(&cursor.boot) {
        std::cmp::Ordering::Less => false,
        std::cmp::Ordering::Equal => piece.file != cursor.file || piece.from >= cursor.offset,
        std::cmp::Ordering::Greater => true,
    };
    match pieces.iter().enumerate().find(|(_, piece)| after(piece)) {
        Some((at, piece)) => Place {
            piece: at,
            offset: piece.from,
            // A boot that said nothing leaves no piece, and no gap.
            gap: cursor.file != 0 && (piece.file, piece.from) != (cursor.file, cursor.offset),
        },
        None => Place {
            piece: pieces.len(),
            offset: 0,
            gap: false,
        },
    }
}

/// The place so many bytes before the end.
pub(super) fn before_end(pieces: &[Piece], bytes: u64) -> Place {
    let mut left = bytes;
    let mut place = end(pieces);
    for (piece, it) in pieces.iter().enumerate().rev() {
        if left == 0 {
            break;
        }
        let len = it.len().min(left);
        left -= len;
        place.piece = piece;
        place.offset = it.to - len;
    }
    place
}

/// Behind everything.
pub(super) fn end(pieces: &[Piece]) -> Place {
    Place {
        piece: pieces.len().saturating_sub(1),
        offset: pieces.last().map_or(0, |last| last.to),
        gap: false,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing)]

    use super::super::boots::Boot;
    use super::*;

    const ALL: u64 = u64::MAX;

    fn part(file: u64, len: u64) -> Part {
        let from = 0;
        Part { file, from, len }
    }

    fn boots(dropped: bool, begun: &[(i64, u64, u64)]) -> Boots {
        let boots = begun.iter().map(|(number, file, offset)| Boot {
            number: *number,
            started_at_ms: 10 * number,
            rescue: number % 2 == 0,
            file: *file,
            offset: *offset,
        });
        Boots {
            dropped,
            boots: boots.collect(),
        }
    }

    /// Boot, file, from, to.
    fn cut(parts: &[Part], noted: &Boots, most: u64) -> Vec<(i64, u64, u64, u64)> {
        let pieces = pieces(parts, noted, most).into_iter();
        pieces
            .map(|p| (p.boot.number, p.file, p.from, p.to))
            .collect()
    }

    #[test]
    fn each_byte_is_of_the_boot_that_began_last_before_it() {
        let noted = boots(false, &[(1, 7, 100), (2, 7, 150)]);
        assert_eq!(
            cut(&[part(7, 200)], &noted, ALL),
            [(0, 7, 0, 100), (1, 7, 100, 150), (2, 7, 150, 200)]
        );
        // A boot that has said nothing yet has no piece.
        assert_eq!(
            cut(&[part(7, 150)], &noted, ALL),
            [(0, 7, 0, 100), (1, 7, 100, 150)]
        );
        assert_eq!(cut(&[], &noted, ALL), []);
        assert_eq!(cut(&[part(7, 9)], &boots(false, &[]), ALL), [(0, 7, 0, 9)]);
    }

    #[test]
    fn a_first_boot_begins_the_file_that_was_not_there_yet() {
        let noted = boots(false, &[(1, 0, 0), (2, 7, 50)]);
        assert_eq!(
            cut(&[part(7, 80)], &noted, ALL),
            [(1, 7, 0, 50), (2, 7, 50, 80)]
        );
    }

    #[test]
    fn a_boot_goes_on_in_the_file_that_a_rotation_began() {
        let noted = boots(false, &[(1, 5, 0), (2, 6, 30)]);
        assert_eq!(
            cut(&[part(5, 100), part(6, 100), part(7, 10)], &noted, ALL),
            [
                (1, 5, 0, 100),
                (1, 6, 0, 30),
                (2, 6, 30, 100),
                (2, 7, 0, 10)
            ]
        );
        // The files in which the boots began are rotated away.
        assert_eq!(cut(&[part(8, 10)], &noted, ALL), [(2, 8, 0, 10)]);
        assert_eq!(
            cut(&[part(6, 40)], &noted, ALL),
            [(1, 6, 0, 30), (2, 6, 30, 40)]
        );
    }

    #[test]
    fn what_is_not_kept_is_not_shown() {
        let noted = boots(true, &[(5, 7, 100), (6, 7, 150)]);
        let all = [part(7, 200)];
        assert_eq!(cut(&all, &noted, ALL), [(5, 7, 100, 150), (6, 7, 150, 200)]);
        assert_eq!(cut(&all, &noted, 60), [(5, 7, 140, 150), (6, 7, 150, 200)]);
        assert_eq!(cut(&all, &noted, 50), [(6, 7, 150, 200)]);
        assert_eq!(cut(&all, &noted, 0), []);
        let given_back = Part {
            file: 7,
            from: 120,
            len: 200,
        };
        assert_eq!(
            cut(&[given_back], &noted, ALL),
            [(5, 7, 120, 150), (6, 7, 150, 200)]
        );
    }

    #[test]
    fn a_file_that_became_shorter_is_no_trouble() {
        let noted = boots(false, &[(1, 7, 100), (2, 7, 150)]);
        assert_eq!(cut(&[part(7, 120)], &noted, ALL).len(), 2);
        assert_eq!(cut(&[part(7, 20)], &noted, ALL), [(0, 7, 0, 20)]);
    }

    #[test]
    fn a_cursor_finds_its_place_again() {
        let noted = boots(false, &[(1, 7, 100), (2, 7, 150)]);
        let now = pieces(&[part(7, 200)], &noted, ALL);
        let place = |piece, offset, gap| Place { piece, offset, gap };
        let cursor = |text: &str| text.parse::<Cursor>().unwrap();
        assert_eq!(find(&now, cursor("1-7-120")), place(1, 120, false));
        assert_eq!(find(&now, cursor("2-7-200")), place(2, 200, false));
        // The end of a boot that another one follows.
        assert_eq!(find(&now, cursor("1-7-150")), place(1, 150, false));
        // The log was empty.
        assert_eq!(find(&now, Cursor::default()), place(0, 0, false));
        assert_eq!(find(&[], cursor("2-7-200")), place(0, 0, false));

        // Of another file, such as one that was removed: after a gap.
        let other = pieces(&[part(9, 40)], &boots(true, &[(3, 9, 0)]), ALL);
        assert_eq!(find(&other, cursor("2-7-200")), place(0, 0, true));
        // Its beginning is gone.
        let clipped = pieces(&[part(7, 200)], &noted, 20);
        assert_eq!(find(&clipped, cursor("1-7-120")), place(0, 180, true));
        assert_eq!(find(&clipped, cursor("2-7-190")), place(0, 190, false));
        // A boot that said nothing lies between.
        let quiet = pieces(&[part(7, 200)], &boots(true, &[(4, 7, 150)]), ALL);
        assert_eq!(find(&quiet, cursor("3-7-150")), place(0, 150, false));
    }

    #[test]
    fn places_are_counted_from_the_end() {
        let now = pieces(&[part(7, 200)], &boots(false, &[(1, 7, 150)]), ALL);
        let at = |bytes| {
            let place = before_end(&now, bytes);
            (place.piece, place.offset)
        };
        assert_eq!(at(0), (1, 200));
        assert_eq!(at(50), (1, 150));
        assert_eq!(at(51), (0, 149));
        assert_eq!(at(u64::MAX), (0, 0));
    }

    #[test]
    fn a_cursor_is_read_as_it_is_written_and_nothing_else_is() {
        let noted = boots(false, &[(1, 0xabc, 0)]);
        let now = pieces(&[part(0xabc, 20)], &noted, ALL);
        let cursor = Cursor::at(&now[0], 17);
        assert_eq!(cursor.to_string(), "1-abc-17");
        assert_eq!("1-abc-17".parse(), Ok(cursor));
        for text in [
            "", "1", "1-2", "1-x-3", "1-2-3-4", "+1-2-3", "1-2--3", "1-2-3 ",
        ] {
            assert_eq!(text.parse::<Cursor>(), Err(BadCursor), "{text:?}");
        }
    }
}
