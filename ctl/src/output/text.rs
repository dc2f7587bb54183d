// SPDX-License-Identifier: Apache-2.0
//! Text that is safe to put on a terminal, and how wide it is there.
//!
//! What an agent sends can have been written by anybody (a domain's name, a guest's reason): an
//! escape sequence in it must never be obeyed by the operator's terminal.

use std::borrow::Cow;

use unicode_width::UnicodeWidthStr as _;

/// Can `c` change what a terminal does or how the text around it reads? Control characters can (C1
/// too: U+009B begins an escape sequence), and so can marks that change direction, break lines or
/// take no room.
pub(crate) fn is_harmful(c: char) -> bool {
    c.is_control()
        || matches!(c,
            '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}'
            | '\u{e0000}'..='\u{e007f}')
}

/// `text` on one line, with what could harm a terminal written out as `\u{…}`.
pub(crate) fn clean(text: &str) -> Cow<'_, str> {
    if !text.contains(is_harmful) {
        return Cow::Borrowed(text);
    }
    let mut shown = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        if is_harmful(c) {
            shown.extend(c.escape_default());
        } else {
            shown.push(c);
        }
    }
    Cow::Owned(shown)
}

/// Columns that `text` takes on a terminal.
pub(crate) fn width(text: &str) -> usize {
    text.width()
}

/// `text`, cleaned, and blanks up to `columns`.
pub(crate) fn pad(text: &str, columns: usize) -> String {
    let text = clean(text);
    let blanks = columns.saturating_sub(width(&text));
    format!("{text}{}", " ".repeat(blanks))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_a_terminal_obeys_remains() {
        assert_eq!(clean("\x1b[31mred\x07\r\n"), "\\u{1b}[31mred\\u{7}\\r\\n");
        assert_eq!(clean("\u{9b}2J"), "\\u{9b}2J");
        assert_eq!(clean("a\u{202e}b\u{200b}"), "a\\u{202e}b\\u{200b}");
        assert_eq!(clean("Zoë 東京"), "Zoë 東京");
    }

    #[test]
    fn padding_counts_columns_and_not_characters() {
        assert_eq!(pad("東京", 6), "東京  ");
        assert_eq!(pad("Zoë", 6), "Zoë   ");
        assert_eq!(pad("longer", 3), "longer");
    }
}
