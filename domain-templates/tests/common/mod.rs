// SPDX-License-Identifier: Apache-2.0
//! What the golden and the preservation tests share.
#![allow(dead_code)]

use std::collections::BTreeMap;

use salvor_domain_templates::xml::{Element, Node};

/// Every element, comment and instruction of a document on a line of its own: where it is, what it is, its attributes
/// and its own text. Disks and interfaces are told apart by what no rescue changes.
pub(crate) fn lines(xml: &str) -> Vec<String> {
    let root = Element::parse(xml).expect("XML");
    let mut lines = Vec::new();
    collect("", &root, &mut lines);
    lines
}

fn collect(path: &str, element: &Element, lines: &mut Vec<String>) {
    let mut line = format!("{path}/{}", element.name);
    for (name, value) in &element.attributes {
        line.push_str(&format!(" {name}={value:?}"));
    }
    let text = element.text();
    if !text.is_empty() {
        line.push_str(&format!(" {text:?}"));
    }
    lines.push(line);
    let path = format!("{path}/{}{}", element.name, label(element));
    for node in &element.children {
        match node {
            Node::Element(child) => collect(&path, child, lines),
            Node::Comment(_) | Node::Instruction(_) => lines.push(format!("{path}/ {node}")),
            Node::Text(_) | Node::CData(_) => {}
        }
    }
}

fn label(element: &Element) -> String {
    let source = element.child("source").filter(|_| element.name == "disk");
    let mac = element.child("mac").filter(|_| element.name == "interface");
    source
        .and_then(|source| {
            ["file", "dev", "name", "volume"]
                .iter()
                .find_map(|name| source.attribute(name))
        })
        .or_else(|| mac.and_then(|mac| mac.attribute("address")))
        .map(|label| format!("[{label}]"))
        .unwrap_or_default()
}

/// (lines only in the first, lines only in the second), each as often as it is there more often.
pub(crate) fn difference(before: &[String], after: &[String]) -> (Vec<String>, Vec<String>) {
    let mut counts: BTreeMap<&str, i64> = BTreeMap::new();
    for line in after {
        *counts.entry(line).or_default() += 1;
    }
    let mut gone = Vec::new();
    for line in before {
        let count = counts.entry(line).or_default();
        *count -= 1;
        if *count < 0 {
            gone.push(line.clone());
        }
    }
    let mut came = Vec::new();
    for line in after.iter().rev() {
        let count = counts.entry(line).or_default();
        if *count > 0 {
            *count -= 1;
            came.push(line.clone());
        }
    }
    came.reverse();
    (gone, came)
}
