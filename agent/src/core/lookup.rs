// SPDX-License-Identifier: Apache-2.0
//! What a word refers to: an exact id, the unique beginning of one, or a unique name.

use uuid::Uuid;

use super::{
    image::ImageRecord,
    reason::{Reason, Refusal},
    text::echo,
};

/// The shortest beginning of an id that is taken for one.
pub const SHORTEST: usize = 4;

/// How many candidates an error names.
const NAMED: usize = 5;

/// The one of `all` that `word` names. `what` says what they are, `missing` that there is none.
///
/// # Errors
/// `missing`, or [`Reason::AmbiguousName`] naming some that could be meant.
pub fn find<T>(
    what: &'static str,
    missing: Reason,
    word: &str,
    all: impl Iterator<Item = T>,
    id: impl Fn(&T) -> Uuid,
    name: impl Fn(&T) -> &str,
) -> Result<T, Refusal> {
    let prefix = word.to_ascii_lowercase();
    let is_prefix = may_begin_an_id(word);
    let mut found: Vec<T> = all
        .filter(|candidate| {
            name(candidate) == word || (is_prefix && id(candidate).to_string().starts_with(&prefix))
        })
        .take(NAMED + 1)
        .collect();
    if found.len() > 1 {
        let named: Vec<String> = found
            .iter()
            .take(NAMED)
            .map(|candidate| id(candidate).to_string())
            .collect();
        let more = if found.len() > NAMED {
            " and others"
        } else {
            ""
        };
        return Err(Refusal::new(
            Reason::AmbiguousName,
            format!(
                "{:?} is the name or the beginning of the id of several {what}s: {}{more}; use the whole id",
                echo(word),
                named.join(", ")
            ),
        )
        .about(what, word));
    }
    found.pop().ok_or_else(|| not_found(what, missing, word))
}

/// There is no such thing.
pub fn not_found(what: &'static str, missing: Reason, word: &str) -> Refusal {
    Refusal::new(missing, format!("there is no {what} {:?}", echo(word))).about(what, word)
}

/// Is `word` long enough, and of the digits, for a beginning of an id?
#[must_use]
pub fn may_begin_an_id(word: &str) -> bool {
    word.len() >= SHORTEST
        && word
            .bytes()
            .all(|byte| byte.is_ascii_hexdigit() || byte == b'-')
}

/// The id, if `word` is a whole one.
#[must_use]
pub fn whole_id(word: &str) -> Option<Uuid> {
    (word.len() == 36)
        .then(|| Uuid::try_parse(word).ok())
        .flatten()
}

/// The image that `word` names, with the number of its holders.
///
/// # Errors
/// [`Reason::ImageNotFound`] or [`Reason::AmbiguousName`].
pub fn image(images: Vec<(ImageRecord, u32)>, word: &str) -> Result<(ImageRecord, u32), Refusal> {
    if let Some(id) = whole_id(word)
        && let Some(image) = images.iter().find(|(image, _)| image.id == id)
    {
        return Ok(image.clone());
    }
    find(
        "image",
        Reason::ImageNotFound,
        word,
        images.into_iter(),
        |(image, _)| image.id,
        |(image, _)| &image.name,
    )
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    const A: &str = "aaaa1111-0000-4000-8000-000000000001";
    const B: &str = "aaaa2222-0000-4000-8000-000000000002";

    fn look(word: &str) -> Result<Uuid, Reason> {
        let all = [
            (A, "web"),
            (B, "db"),
            ("bbbb0000-0000-4000-8000-000000000003", "db"),
            ("cccc0000-0000-4000-8000-000000000004", "aaaa1"),
        ];
        find(
            "server",
            Reason::ServerNotFound,
            word,
            all.into_iter(),
            |(id, _)| Uuid::parse_str(id).unwrap(),
            |(_, name)| name,
        )
        .map(|(id, _)| Uuid::parse_str(id).unwrap())
        .map_err(|refusal| refusal.reason)
    }

    #[test]
    fn ids_beginnings_and_names_find_the_one_that_has_them() {
        let a = Uuid::parse_str(A).unwrap();
        assert_eq!(look("aaaa1111"), Ok(a));
        assert_eq!(look("AAAA1111-0000"), Ok(a));
        assert_eq!(look("web"), Ok(a));
        assert_eq!(look(A), Ok(a));
    }

    #[test]
    fn what_several_have_is_refused() {
        assert_eq!(look("aaaa"), Err(Reason::AmbiguousName));
        assert_eq!(look("db"), Err(Reason::AmbiguousName));
        // One server's name is the beginning of another's id.
        assert_eq!(look("aaaa1"), Err(Reason::AmbiguousName));
    }

    #[test]
    fn too_short_a_beginning_is_taken_for_a_name() {
        assert_eq!(look("bbb"), Err(Reason::ServerNotFound));
        assert!(look("bbbb").is_ok());
    }
}
