// SPDX-License-Identifier: Apache-2.0
//! Pages of lists: tokens, and how much a page may hold.

use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD as BASE64};

use super::validate::Checked;
use crate::core::reason::Refusal;

/// A page ends before its messages take more than this: clients take 4 MiB unless told otherwise.
pub(super) const PAGE_BYTES: usize = 3 << 20;

/// The token of the page that begins after `place` in the list `kind`.
pub(super) fn token(kind: char, place: &str) -> String {
    BASE64.encode(format!("{kind}{place}"))
}

/// The place behind a token of the list `kind`; `None` for the first page.
pub(super) fn place<T>(
    kind: char,
    token: &str,
    read: impl Fn(&str) -> Option<T>,
) -> Checked<Option<T>> {
    if token.is_empty() {
        return Ok(None);
    }
    let place = (token.len() <= 1_024)
        .then(|| BASE64.decode(token).ok())
        .flatten()
        .and_then(|bytes| String::from_utf8(bytes).ok())
        .and_then(|text| read(text.strip_prefix(kind)?));
    place.map(Some).ok_or_else(|| {
        Refusal::field(
            "page_token",
            "must be the next_page_token of a page of this list",
        )
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_token_leads_back_to_its_place_in_its_own_list() {
        let number = |text: &str| text.parse::<i64>().ok();
        assert_eq!(place('s', "", number).unwrap(), None);
        assert_eq!(place('s', &token('s', "42"), number).unwrap(), Some(42));
        assert!(place('o', &token('s', "42"), number).is_err());
        for wrong in ["42", "\0", "é", "====", &"A".repeat(1 << 20)] {
            assert!(place('s', wrong, number).is_err());
        }
    }
}
