// SPDX-License-Identifier: Apache-2.0
//! Text into [`Element`]s, with limits. The tokens come from quick-xml; what it leaves unchecked is checked here.

use quick_xml::events::{BytesRef, BytesStart, Event};
use quick_xml::{Reader, XmlVersion};

use super::{Element, Node};

/// The largest document that is read, in bytes. A libvirt domain has a few KiB; libvirt's own limit on one RPC string
/// is 4 MiB.
pub const MAX_BYTES: usize = 1024 * 1024;

/// How deeply elements may nest, the root counted. libvirt's schema needs about ten.
pub const MAX_DEPTH: usize = 64;

/// Why a text is not XML we read.
#[derive(Debug, thiserror::Error)]
pub enum XmlError {
    /// Longer than [`MAX_BYTES`].
    #[error("the XML has {bytes} bytes; at most {MAX_BYTES} are read")]
    TooLarge {
        /// Its length.
        bytes: usize,
    },
    /// Nested deeper than [`MAX_DEPTH`].
    #[error("the XML nests more than {MAX_DEPTH} elements")]
    TooDeep,
    /// A character that XML 1.0 cannot carry, neither as it is nor as a reference.
    #[error("character U+{code:04X} cannot be part of XML; remove it")]
    Character {
        /// The code point.
        code: u32,
    },
    /// Not well-formed.
    #[error("the XML is not well-formed near byte {position}")]
    Syntax {
        /// Where the reader stood.
        position: u64,
        /// What it says.
        #[source]
        source: Box<quick_xml::Error>,
    },
    /// Not well-formed in a way the tokeniser accepts.
    #[error("the XML is not well-formed: {what}")]
    Malformed {
        /// What is wrong.
        what: &'static str,
    },
    /// A name that is not an XML name.
    #[error("`{name}` is not a name XML allows")]
    Name {
        /// The name as written.
        name: String,
    },
    /// A document type declaration.
    #[error("the XML has a document type declaration; these are not read")]
    DocumentType,
    /// A reference to an entity other than the predefined five.
    #[error("the XML refers to the entity `{name}`; only amp, lt, gt, quot and apos are known")]
    Entity {
        /// Its name.
        name: String,
    },
}

/// May XML 1.0 carry this character (its production `Char`)?
fn is_xml_char(c: char) -> bool {
    matches!(c, '\t' | '\n' | '\r' | '\u{20}'..='\u{D7FF}' | '\u{E000}'..='\u{FFFD}' | '\u{10000}'..)
}

/// Refuses text with a character XML 1.0 cannot carry, such as NUL.
///
/// # Errors
/// [`XmlError::Character`] with the first such character.
pub fn check_text(text: &str) -> Result<(), XmlError> {
    match text.chars().find(|c| !is_xml_char(*c)) {
        Some(c) => Err(XmlError::Character { code: u32::from(c) }),
        None => Ok(()),
    }
}

/// XML's `Name`, a little stricter: letters of any script and `_` first, then also digits, `-`, `.`, `:`.
fn check_name(name: &str) -> Result<&str, XmlError> {
    let mut chars = name.chars();
    let first = chars.next().is_some_and(|c| c.is_alphabetic() || c == '_');
    if first && chars.all(|c| c.is_alphanumeric() || matches!(c, '_' | '-' | '.' | ':')) {
        Ok(name)
    } else {
        Err(XmlError::Name {
            name: name.chars().take(64).collect(),
        })
    }
}

impl Element {
    /// Reads one XML document and returns its root element.
    ///
    /// # Errors
    /// [`XmlError`]: the text is not well-formed, over a limit, or uses what we refuse on purpose.
    pub fn parse(text: &str) -> Result<Self, XmlError> {
        if text.len() > MAX_BYTES {
            return Err(XmlError::TooLarge { bytes: text.len() });
        }
        check_text(text)?;
        let mut reader = Reader::from_str(text);
        let config = reader.config_mut();
        config.check_comments = true;
        config.check_end_names = true;
        config.allow_unmatched_ends = false;
        config.allow_dangling_amp = false;
        config.trim_markup_names_in_closing_tags = true;

        let mut tree = Tree::default();
        loop {
            let event = reader.read_event().map_err(|source| XmlError::Syntax {
                position: reader.error_position(),
                source: Box::new(source),
            })?;
            match event {
                Event::Start(start) => tree.open(element(&start)?)?,
                Event::Empty(start) => {
                    tree.open(element(&start)?)?;
                    tree.close()?;
                }
                Event::End(_) => tree.close()?,
                Event::Text(text) => tree.text(&text.xml10_content())?,
                Event::GeneralRef(reference) => tree.character(resolve(&reference)?)?,
                Event::CData(data) => tree.cdata(data.xml10_content().into_owned())?,
                Event::Comment(comment) => tree.comment(comment.xml10_content().into_owned())?,
                Event::PI(instruction) => {
                    check_name(instruction.target())?;
                    let content = instruction.replace("\r\n", "\n").replace('\r', "\n");
                    tree.beside(Node::Instruction(content));
                }
                Event::Decl(_) => tree.declaration()?,
                Event::DocType(_) => return Err(XmlError::DocumentType),
                Event::Eof => return tree.finish(),
            }
        }
    }
}

const fn malformed(what: &'static str) -> XmlError {
    XmlError::Malformed { what }
}

/// A document as far as it is read.
#[derive(Default)]
struct Tree {
    /// Elements without their end yet, the outermost first.
    open: Vec<Element>,
    root: Option<Element>,
}

impl Tree {
    fn open(&mut self, element: Element) -> Result<(), XmlError> {
        if self.open.len() >= MAX_DEPTH {
            return Err(XmlError::TooDeep);
        }
        self.open.push(element);
        Ok(())
    }

    /// Ends the innermost element, and puts it where it belongs.
    fn close(&mut self) -> Result<(), XmlError> {
        let done = self
            .open
            .pop()
            .ok_or(malformed("an end tag without a start tag"))?;
        match self.open.last_mut() {
            Some(parent) => parent.children.push(Node::Element(done)),
            None if self.root.is_none() => self.root = Some(done),
            None => return Err(malformed("a second root element")),
        }
        Ok(())
    }

    /// Adds character data, joining it with text right before it.
    fn text(&mut self, text: &str) -> Result<(), XmlError> {
        let Some(parent) = self.open.last_mut() else {
            return match text.trim_matches(['\u{feff}', ' ', '\t', '\n', '\r']) {
                "" => Ok(()),
                _ => Err(malformed("text outside the root element")),
            };
        };
        match parent.children.last_mut() {
            Some(Node::Text(before)) => before.push_str(text),
            _ if text.is_empty() => {}
            _ => parent.children.push(Node::Text(text.to_owned())),
        }
        Ok(())
    }

    /// Adds the character that a reference stands for.
    fn character(&mut self, c: char) -> Result<(), XmlError> {
        if self.open.is_empty() {
            return Err(malformed("a reference outside the root element"));
        }
        self.text(c.encode_utf8(&mut [0; 4]))
    }

    fn cdata(&mut self, data: String) -> Result<(), XmlError> {
        let parent = self
            .open
            .last_mut()
            .ok_or(malformed("CDATA outside the root element"))?;
        parent.children.push(Node::CData(data));
        Ok(())
    }

    fn comment(&mut self, comment: String) -> Result<(), XmlError> {
        if comment.contains("--") || comment.ends_with('-') {
            return Err(malformed("`--` inside a comment"));
        }
        self.beside(Node::Comment(comment));
        Ok(())
    }

    /// Adds what may also stand outside the root element, where it is dropped.
    fn beside(&mut self, node: Node) {
        if let Some(parent) = self.open.last_mut() {
            parent.children.push(node);
        }
    }

    fn declaration(&self) -> Result<(), XmlError> {
        if self.open.is_empty() && self.root.is_none() {
            return Ok(());
        }
        Err(malformed("an XML declaration that is not at the start"))
    }

    fn finish(self) -> Result<Element, XmlError> {
        if !self.open.is_empty() {
            return Err(malformed("an element is not closed"));
        }
        self.root.ok_or(malformed("there is no element"))
    }
}

/// An element from its start tag.
fn element(start: &BytesStart<'_>) -> Result<Element, XmlError> {
    let mut element = Element::new(check_name(start.name().into_inner())?);
    for attribute in start.attributes() {
        let attribute = attribute.map_err(|source| XmlError::Syntax {
            position: 0,
            source: Box::new(quick_xml::Error::InvalidAttr(source)),
        })?;
        let name = check_name(attribute.key.into_inner())?;
        if attribute.value.contains('<') {
            return Err(malformed("`<` inside an attribute"));
        }
        let value = attribute
            .normalized_value(XmlVersion::Implicit1_0)
            .map_err(|source| XmlError::Syntax {
                position: 0,
                source: Box::new(source),
            })?;
        // References may have brought in what the raw text did not contain.
        check_text(&value)?;
        element
            .attributes
            .push((name.to_owned(), value.into_owned()));
    }
    Ok(element)
}

/// The character a reference stands for.
fn resolve(reference: &BytesRef<'_>) -> Result<char, XmlError> {
    let c = reference
        .resolve_char_ref()
        .map_err(|source| XmlError::Syntax {
            position: 0,
            source: Box::new(source),
        })?;
    let c = match (c, &**reference) {
        (Some(c), _) => c,
        (None, "amp") => '&',
        (None, "lt") => '<',
        (None, "gt") => '>',
        (None, "quot") => '"',
        (None, "apos") => '\'',
        (None, other) => {
            return Err(XmlError::Entity {
                name: other.chars().take(64).collect(),
            });
        }
    };
    if is_xml_char(c) {
        Ok(c)
    } else {
        Err(XmlError::Character { code: u32::from(c) })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn what_we_do_not_model_survives() {
        let text = "<domain type='kvm' xmlns:q='http://x/1'>\n  <!-- a & b -->\n  <q:x y='&lt;&apos;&#10;&amp;'>a&lt;b<![CDATA[<raw>]]></q:x>\n  <?keep me?>\n</domain>";
        let once = Element::parse(text).unwrap();
        assert_eq!(Element::parse(&once.to_string()).unwrap(), once);
        assert_eq!(once.to_string(), text);
    }

    #[test]
    fn declarations_and_comments_round_the_root_are_read_past() {
        let text = "\u{feff}<?xml version='1.0' encoding='utf-8'?>\n<!-- made by hand -->\n<domain/>\n<!-- end -->\n";
        assert_eq!(Element::parse(text).unwrap(), Element::new("domain"));
    }

    #[test]
    fn no_entity_is_ever_expanded() {
        let bomb = "<!DOCTYPE d [<!ENTITY a 'aaaa'>]><d>&a;</d>";
        assert!(matches!(Element::parse(bomb), Err(XmlError::DocumentType)));
        assert!(matches!(
            Element::parse("<d>&a;</d>"),
            Err(XmlError::Entity { .. })
        ));
        assert!(Element::parse("<d a='&a;'/>").is_err());
    }

    #[test]
    fn characters_xml_cannot_carry_are_refused_however_they_are_written() {
        for text in [
            "<d>\0</d>",
            "<d>&#0;</d>",
            "<d>&#1;</d>",
            "<d a='&#x1f;'/>",
            "<d a='\u{b}'/>",
            "<d>\u{ffff}</d>",
        ] {
            assert!(Element::parse(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn broken_documents_are_refused() {
        for text in [
            "",
            "   ",
            "text",
            "<a>",
            "</a>",
            "<a></b>",
            "<a/><b/>",
            "<a/>x",
            "<a b='1' b='2'/>",
            "<a b=1/>",
            "<1a/>",
            "<a ='x'/>",
            "<a b='<'/>",
            "<a><!-- -- --></a>",
            "<a>&</a>",
            "<a>&amp</a>",
            "<![CDATA[x]]><a/>",
            "&amp;<a/>",
            "<a><?xml version='1.0'?></a>",
            "<a:=''/>",
        ] {
            assert!(Element::parse(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn size_and_depth_are_bounded() {
        let deep = format!("{}{}", "<a>".repeat(MAX_DEPTH), "</a>".repeat(MAX_DEPTH));
        assert!(Element::parse(&deep).is_ok());
        let deeper = format!("<a>{deep}</a>");
        assert!(matches!(Element::parse(&deeper), Err(XmlError::TooDeep)));
        let long = format!("<a>{}</a>", "x".repeat(MAX_BYTES));
        assert!(matches!(
            Element::parse(&long),
            Err(XmlError::TooLarge { .. })
        ));
    }
}
