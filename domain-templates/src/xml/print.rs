// SPDX-License-Identifier: Apache-2.0
//! [`Element`]s into text: nothing is added or re-indented, everything is escaped.

use std::borrow::Cow;
use std::fmt::{self, Display, Formatter, Write};

use super::{Element, Node};

/// Escapes text for either place it may stand in: character data or an attribute in any quotes.
///
/// Tabs and line ends become character references, or a reader would turn them into blanks.
pub fn escape(text: &str) -> Cow<'_, str> {
    if !text.contains(['&', '<', '>', '\'', '"', '\t', '\n', '\r']) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        match c {
            '\'' => out.push_str("&apos;"),
            '"' => out.push_str("&quot;"),
            '\t' => out.push_str("&#9;"),
            '\n' => out.push_str("&#10;"),
            c => push_escaped(&mut out, c),
        }
    }
    Cow::Owned(out)
}

/// Escapes what must not stand in character data, and keeps the rest readable.
fn push_escaped(out: &mut String, c: char) {
    match c {
        '&' => out.push_str("&amp;"),
        '<' => out.push_str("&lt;"),
        '>' => out.push_str("&gt;"),
        '\r' => out.push_str("&#13;"),
        c => out.push(c),
    }
}

impl Display for Element {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "<{}", self.name)?;
        for (name, value) in &self.attributes {
            write!(f, " {name}='{}'", escape(value))?;
        }
        if self.children.is_empty() {
            return f.write_str("/>");
        }
        f.write_char('>')?;
        for node in &self.children {
            node.fmt(f)?;
        }
        write!(f, "</{}>", self.name)
    }
}

impl Display for Node {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Element(element) => element.fmt(f),
            Self::Text(text) => {
                let mut out = String::with_capacity(text.len() + 16);
                text.chars().for_each(|c| push_escaped(&mut out, c));
                f.write_str(&out)
            }
            Self::CData(data) => write!(f, "<![CDATA[{data}]]>"),
            Self::Comment(comment) => write!(f, "<!--{comment}-->"),
            Self::Instruction(content) => write!(f, "<?{content}?>"),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use proptest::prelude::*;

    use super::*;

    /// Text with everything that needs escaping likely in it.
    fn text() -> impl Strategy<Value = String> {
        prop::collection::vec(
            prop_oneof![
                Just('&'),
                Just('<'),
                Just('>'),
                Just('\''),
                Just('"'),
                Just('\n'),
                Just('\t'),
                Just('\r'),
                Just(']'),
                Just(' '),
                Just('-'),
                prop::char::range('a', 'z'),
                prop::char::range('\u{a0}', '\u{d7ff}'),
                prop::char::range('\u{10000}', '\u{1ffff}'),
            ],
            1..12,
        )
        .prop_map(|chars| chars.into_iter().collect())
    }

    fn leaf() -> impl Strategy<Value = Node> {
        prop_oneof![
            text().prop_map(Node::Text),
            text().prop_map(|t| Node::CData(t.replace([']', '\r'], "."))),
            text().prop_map(|t| Node::Comment(t.replace(['-', '\r'], "."))),
            text().prop_map(|t| Node::Instruction(format!("pi {}", t.replace(['?', '\r'], ".")))),
        ]
    }

    fn named(children: impl Strategy<Value = Vec<Node>>) -> impl Strategy<Value = Element> {
        let attributes =
            prop::collection::btree_map("[a-z_][a-zé0-9.-]{0,4}(:[a-z]{1,3})?", text(), 0..4);
        ("[a-z_][a-zé0-9.-]{0,6}(:[a-z]{1,4})?", attributes, children).prop_map(
            |(name, attributes, nodes)| {
                let mut element = Element {
                    name,
                    attributes: attributes.into_iter().collect(),
                    children: Vec::new(),
                };
                for node in nodes {
                    match (element.children.last_mut(), node) {
                        (Some(Node::Text(before)), Node::Text(text)) => before.push_str(&text),
                        (_, node) => element.children.push(node),
                    }
                }
                element
            },
        )
    }

    fn tree() -> impl Strategy<Value = Element> {
        let inner = leaf().prop_recursive(5, 40, 6, |inner| {
            named(prop::collection::vec(inner, 0..6)).prop_map(Node::Element)
        });
        named(prop::collection::vec(inner, 0..6))
    }

    proptest! {
        #[test]
        fn a_printed_tree_reads_back_as_itself(tree in tree()) {
            prop_assert_eq!(Element::parse(&tree.to_string()).unwrap(), tree);
        }

        #[test]
        fn escaped_text_reads_back_in_both_places(text in text()) {
            let read = Element::parse(&format!("<a b=\"{0}\" c='{0}'>{0}</a>", escape(&text))).unwrap();
            prop_assert_eq!(read.attribute("b"), Some(text.as_str()));
            prop_assert_eq!(read.attribute("c"), Some(text.as_str()));
            prop_assert_eq!(read.children, vec![Node::Text(text)]);
        }

        #[test]
        fn no_text_makes_the_reader_panic(text in "[<>/!?&;#\\[\\]a-c='\" \\-]{0,40}") {
            if let Ok(tree) = Element::parse(&text) {
                prop_assert_eq!(Element::parse(&tree.to_string()).unwrap(), tree);
            }
        }
    }
}
