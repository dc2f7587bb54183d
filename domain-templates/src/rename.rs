// SPDX-License-Identifier: Apache-2.0
//! A definition under another name, every other byte as it was.
//!
//! Owns: where in a text a domain's name stands. Does not know: why a domain has another name.

use quick_xml::Reader;
use quick_xml::events::Event;

use crate::xml::escape;

/// The definition with this name in place of its own, and not another byte changed. `None` if it names none.
pub fn renamed(definition: &str, name: &str) -> Option<String> {
    let mut reader = Reader::from_str(definition);
    let mut depth = 0_usize;
    let mut from = None;
    loop {
        let before = usize::try_from(reader.buffer_position()).ok()?;
        match reader.read_event().ok()? {
            Event::Start(start) => {
                depth += 1;
                if depth == 2 && start.name().into_inner() == "name" {
                    from = Some(usize::try_from(reader.buffer_position()).ok()?);
                }
            }
            Event::End(_) => {
                if let Some(from) = from.filter(|_| depth == 2) {
                    let (head, tail) = (definition.get(..from)?, definition.get(before..)?);
                    return Some(format!("{head}{}{tail}", escape(name)));
                }
                depth = depth.checked_sub(1)?;
            }
            Event::Eof => return None,
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const DOMAIN: &str = "<!-- <name>no</name> -->\n<domain type='kvm' >\n  <metadata><name>no</name></metadata>\n  \
                          <name >web &amp; <!-- c -->1</name >\n  <uuid>u</uuid><os><name>no</name></os>\n</domain>\n";

    #[test]
    fn only_the_domains_own_name_changes() {
        let wanted = DOMAIN.replace("web &amp; <!-- c -->1", "a&lt;b");
        assert_eq!(renamed(DOMAIN, "a<b"), Some(wanted.clone()));
        assert_eq!(renamed(&wanted, "a<b"), Some(wanted));
    }

    #[test]
    fn what_names_no_domain_is_not_renamed() {
        for odd in [
            "",
            "<domain/>",
            "<domain><name/></domain>",
            "<domain><name>x",
            "x",
            "<name>x</name>",
        ] {
            assert_eq!(renamed(odd, "y"), None, "{odd}");
        }
    }
}
