// SPDX-License-Identifier: Apache-2.0
//! A guest's words on an operator's terminal: lines and tabs as they are, and everything that a terminal
//! could obey written out.

use super::text::is_harmful;

/// Makes a stream of bytes fit to be shown, piece by piece.
#[derive(Debug, Default)]
pub(crate) struct Shown {
    /// The beginning of a character whose end is in the next piece.
    begun: Vec<u8>,
    /// The last piece ended in a carriage return.
    returned: bool,
}

impl Shown {
    /// The next piece. Guests end lines with a carriage return and a line feed: the line feed is enough.
    pub(crate) fn piece(&mut self, bytes: &[u8]) -> String {
        let mut all = std::mem::take(&mut self.begun);
        all.extend_from_slice(bytes);
        let mut shown = String::with_capacity(all.len());
        let mut rest = all.as_slice();
        loop {
            match std::str::from_utf8(rest) {
                Ok(text) => {
                    self.text(text, &mut shown);
                    return shown;
                }
                Err(error) => {
                    let (text, behind) = rest.split_at(error.valid_up_to());
                    // It was just found to be UTF-8.
                    self.text(&String::from_utf8_lossy(text), &mut shown);
                    let Some(length) = error.error_len() else {
                        self.begun = behind.to_vec();
                        return shown;
                    };
                    let (wrong, behind) = behind.split_at(length.min(behind.len()));
                    self.bytes(wrong, &mut shown);
                    rest = behind;
                }
            }
        }
    }

    /// What is left at the end.
    pub(crate) fn end(&mut self) -> String {
        let mut shown = String::new();
        let begun = std::mem::take(&mut self.begun);
        self.bytes(&begun, &mut shown);
        if std::mem::take(&mut self.returned) {
            shown.push_str("\\r");
        }
        shown
    }

    fn text(&mut self, text: &str, shown: &mut String) {
        for c in text.chars() {
            if std::mem::take(&mut self.returned) && c != '\n' {
                shown.push_str("\\r");
            }
            match c {
                '\r' => self.returned = true,
                '\n' | '\t' => shown.push(c),
                c if is_harmful(c) => shown.extend(c.escape_default()),
                c => shown.push(c),
            }
        }
    }

    fn bytes(&mut self, bytes: &[u8], shown: &mut String) {
        for byte in bytes {
            if std::mem::take(&mut self.returned) {
                shown.push_str("\\r");
            }
            shown.push_str(&format!("\\x{byte:02x}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn whole(pieces: &[&[u8]]) -> String {
        let mut shown = Shown::default();
        let mut text: String = pieces.iter().map(|piece| shown.piece(piece)).collect();
        text.push_str(&shown.end());
        text
    }

    #[test]
    fn lines_and_tabs_stay_and_nothing_that_a_terminal_obeys_does() {
        let said = b"a\tb\r\n\x1b[2J\x07\xffend\rx \xc2\x9b31m\r";
        let expected = "a\tb\n\\u{1b}[2J\\u{7}\\xffend\\rx \\u{9b}31m\\r";
        assert_eq!(whole(&[said]), expected);
        // Wherever it is cut.
        for cut in 0..said.len() {
            let (one, two) = said.split_at(cut);
            assert_eq!(whole(&[one, two]), expected, "cut at {cut}");
        }
    }

    #[test]
    fn letters_stay_also_if_they_are_cut() {
        let said = "Zoë 東京\n".as_bytes();
        for cut in 0..said.len() {
            let (one, two) = said.split_at(cut);
            assert_eq!(whole(&[one, two]), "Zoë 東京\n");
        }
        assert_eq!(whole(&[b"x\xe6\x9d"]), "x\\xe6\\x9d");
    }
}
