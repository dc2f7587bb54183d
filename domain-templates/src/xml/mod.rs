// SPDX-License-Identifier: Apache-2.0
//! A small document tree for libvirt's XML that loses nothing it does not understand.
//!
//! Owns: reading text into [`Element`]s, changing them, printing them. Elements, attributes (in their order), text,
//! CDATA, comments and processing instructions inside the root element survive parse → print; namespace prefixes stay
//! as they were written. Comments *outside* the root element are not kept: libvirt never prints any there.
//!
//! Does not know: what a domain is.
//!
//! Hostile input is bounded: [`MAX_BYTES`], [`MAX_DEPTH`], no document type declarations, no entities beyond the five
//! predefined ones and character references, no characters XML 1.0 cannot carry. Every string that comes in through
//! [`Element::parse`] has been checked, and everything printed is escaped.

mod parse;
mod print;

pub use parse::{MAX_BYTES, MAX_DEPTH, XmlError, check_text};
pub use print::escape;

/// One node inside an element.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Node {
    /// A child element.
    Element(Element),
    /// Character data, unescaped. Never empty, never next to another `Text` when it comes from [`Element::parse`].
    Text(String),
    /// The content of a CDATA section.
    CData(String),
    /// The content of a comment, with its blanks.
    Comment(String),
    /// A processing instruction: target and data.
    Instruction(String),
}

impl Node {
    /// Is this text made of nothing but blanks, as between two indented elements?
    fn is_blank(&self) -> bool {
        matches!(self, Self::Text(text) if text.chars().all(|c| matches!(c, ' ' | '\t' | '\n' | '\r')))
    }
}

/// An element with its attributes and children in document order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Element {
    /// The name as written, prefix included.
    pub name: String,
    /// Attributes as (name as written, unescaped value), in their order.
    pub attributes: Vec<(String, String)>,
    /// Children in their order.
    pub children: Vec<Node>,
}

impl Element {
    /// An empty element. `name` must be an XML name: it is printed as it is.
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            attributes: Vec::new(),
            children: Vec::new(),
        }
    }

    /// The same element with one attribute more (or replaced).
    #[must_use]
    pub fn with(mut self, attribute: &str, value: &str) -> Self {
        self.set_attribute(attribute, value);
        self
    }

    /// The same element holding just this text.
    #[must_use]
    pub fn with_text(mut self, text: &str) -> Self {
        self.set_text(text);
        self
    }

    /// The value of an attribute.
    pub fn attribute(&self, name: &str) -> Option<&str> {
        self.attributes
            .iter()
            .find(|(have, _)| have == name)
            .map(|(_, value)| value.as_str())
    }

    /// Sets an attribute, in its old place if it was there, else at the end.
    pub fn set_attribute(&mut self, name: &str, value: &str) {
        match self.attributes.iter_mut().find(|(have, _)| have == name) {
            Some((_, old)) => value.clone_into(old),
            None => self.attributes.push((name.to_owned(), value.to_owned())),
        }
    }

    /// All child elements.
    pub fn elements(&self) -> impl Iterator<Item = &Element> {
        self.children.iter().filter_map(|node| match node {
            Node::Element(element) => Some(element),
            _ => None,
        })
    }

    /// All child elements of this name (as written, prefix included).
    pub fn elements_named<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Element> {
        self.elements().filter(move |element| element.name == name)
    }

    /// The first child element of this name.
    pub fn child(&self, name: &str) -> Option<&Element> {
        self.elements().find(|element| element.name == name)
    }

    /// The first child element of this name, to change it.
    pub fn child_mut(&mut self, name: &str) -> Option<&mut Element> {
        self.children.iter_mut().find_map(|node| match node {
            Node::Element(element) if element.name == name => Some(element),
            _ => None,
        })
    }

    /// The element's own character data, blanks at both ends removed.
    pub fn text(&self) -> String {
        let mut all = String::new();
        for node in &self.children {
            if let Node::Text(text) | Node::CData(text) = node {
                all.push_str(text);
            }
        }
        all.trim().to_owned()
    }

    /// Replaces everything inside the element by this text.
    pub fn set_text(&mut self, text: &str) {
        self.children.clear();
        if !text.is_empty() {
            self.children.push(Node::Text(text.to_owned()));
        }
    }

    /// Removes the child elements that `unwanted` says yes to, each with the indentation before it.
    pub fn remove_elements(&mut self, unwanted: impl Fn(&Element) -> bool) {
        let mut kept: Vec<Node> = Vec::with_capacity(self.children.len());
        for node in self.children.drain(..) {
            if matches!(&node, Node::Element(element) if unwanted(element)) {
                if kept.last().is_some_and(Node::is_blank) {
                    kept.pop();
                }
            } else {
                kept.push(node);
            }
        }
        // Removing between two runs of text would leave them side by side, which no parser ever returns.
        for node in kept {
            match (self.children.last_mut(), node) {
                (Some(Node::Text(before)), Node::Text(text)) => before.push_str(&text),
                (_, node) => self.children.push(node),
            }
        }
        if matches!(self.children.as_slice(), [only] if only.is_blank()) {
            self.children.clear();
        }
    }

    /// Adds a child element at the end, indented like the first child.
    pub fn append(&mut self, element: Element) {
        let indent = match self.children.as_slice() {
            [first, _, ..] if first.is_blank() => Some(first.clone()),
            _ => None,
        };
        match (indent, self.children.pop()) {
            (Some(indent), Some(end)) if end.is_blank() => {
                self.children.extend([indent, Node::Element(element), end]);
            }
            (_, last) => {
                self.children.extend(last);
                self.children.push(Node::Element(element));
            }
        }
    }

    /// Replaces the first child element of the same name, or adds the element at the end.
    pub fn replace(&mut self, element: Element) {
        match self.child_mut(&element.name) {
            Some(old) => *old = element,
            None => self.append(element),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_removed_element_takes_its_indentation_along() {
        let mut os = Element::parse("<os>\n  <type>hvm</type>\n  <boot dev='hd'/>\n</os>").unwrap();
        os.remove_elements(|e| e.name == "boot");
        assert_eq!(os.to_string(), "<os>\n  <type>hvm</type>\n</os>");
        os.remove_elements(|e| e.name == "type");
        assert_eq!(os.to_string(), "<os/>");
    }

    #[test]
    fn an_added_element_is_indented_like_its_siblings() {
        let mut os = Element::parse("<os>\n  <type>hvm</type>\n</os>").unwrap();
        os.append(Element::new("nvram").with_text("/a&b"));
        assert_eq!(
            os.to_string(),
            "<os>\n  <type>hvm</type>\n  <nvram>/a&amp;b</nvram>\n</os>"
        );
    }

    #[test]
    fn an_element_is_added_to_an_unindented_one_without_blanks() {
        let mut disk = Element::parse("<disk><target dev='vda'/></disk>").unwrap();
        disk.append(Element::new("readonly"));
        assert_eq!(
            disk.to_string(),
            "<disk><target dev='vda'/><readonly/></disk>"
        );
    }
}
