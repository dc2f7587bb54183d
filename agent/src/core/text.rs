// SPDX-License-Identifier: Apache-2.0
//! Text that came from outside, made fit for an error, a log line or a header.

/// The longest piece of a caller's text that is repeated to it, in characters.
const ECHO: usize = 64;

/// The longest error message, in bytes. It travels in a header, percent-encoded, together with the
/// details: clients take 16 KiB of headers.
const MESSAGE: usize = 1_024;

/// May this character be in a name? Neither control characters nor what moves or hides text around
/// it (line separators, directional marks and overrides, invisible characters).
#[must_use]
pub fn is_printable(c: char) -> bool {
    !c.is_control()
        && !matches!(c,
            '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff0}'..='\u{fffb}'
            | '\u{e0000}'..='\u{e007f}' | '\u{e000}'..='\u{f8ff}')
}

fn escaped(text: &str, characters: usize, bytes: usize) -> String {
    let mut shown = String::with_capacity(text.len().min(bytes));
    for (index, c) in text.chars().enumerate() {
        if index >= characters || shown.len() >= bytes {
            shown.push('…');
            break;
        }
        if is_printable(c) {
            shown.push(c);
        } else {
            shown.extend(c.escape_default());
        }
    }
    shown
}

/// A caller's text as it may be repeated: one line, printable, short.
#[must_use]
pub fn echo(text: &str) -> String {
    escaped(text, ECHO, 4 * ECHO)
}

/// A message as it may be sent: one line, printable, and short enough for a header.
#[must_use]
pub fn message(text: &str) -> String {
    escaped(text, MESSAGE, MESSAGE)
}

#[cfg(test)]
mod tests {
    use super::{echo, is_printable, message};

    #[test]
    fn what_is_repeated_is_one_short_printable_line() {
        assert_eq!(echo("a\nb\u{1b}[31m\0"), "a\\nb\\u{1b}[31m\\u{0}");
        assert_eq!(echo("\u{202e}evil"), "\\u{202e}evil");
        assert_eq!(echo(&"x".repeat(1_000_000)), format!("{}…", "x".repeat(64)));
        assert!(message(&"é".repeat(1_000_000)).len() <= 1_024 + 6);
        assert!(echo(&"\u{10ffff}".repeat(100)).len() < 1_000);
    }

    #[test]
    fn letters_of_all_scripts_are_printable() {
        assert!("web-1 Größe サーバー 🚀".chars().all(is_printable));
    }
}
