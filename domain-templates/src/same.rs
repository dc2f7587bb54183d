// SPDX-License-Identifier: Apache-2.0
//! Whether two definitions say the same, as libvirt prints them.
//!
//! Owns: what may differ between two prints of one definition. libvirt adds controllers at the end of their list when
//! it gives a domain its addresses, and puts each beside the others of its type when it reads that again (at the next
//! start, or at its own): the text is another, the machine is the same, for every controller has its number and address.
//!
//! Does not know: why anybody asks.

use crate::xml::{Element, Node};

/// The definition with its controllers in the order of their types and numbers. `None` if it cannot be read.
pub fn in_order(definition: &str) -> Option<String> {
    let mut root = Element::parse(definition).ok()?;
    sort_controllers(&mut root);
    Some(root.to_string())
}

/// Are these one definition, whatever the domain's name and in whatever order its controllers stand?
pub fn same_definition(one: &str, other: &str) -> bool {
    let nameless = |definition| {
        let mut root = Element::parse(definition).ok()?;
        sort_controllers(&mut root);
        root.child_mut("name")?.set_text("");
        Some(root)
    };
    one == other || nameless(one).is_some_and(|one| nameless(other) == Some(one))
}

fn sort_controllers(root: &mut Element) {
    let Some(devices) = root.child_mut("devices") else {
        return;
    };
    let mut places: Vec<&mut Element> = devices
        .children
        .iter_mut()
        .filter_map(|node| match node {
            Node::Element(element) if element.name == "controller" => Some(element),
            _ => None,
        })
        .collect();
    let mut sorted: Vec<Element> = places.iter().map(|place| (**place).clone()).collect();
    sorted.sort_by_cached_key(|controller| {
        let number = |text: &str| text.parse::<u32>().ok();
        (
            controller.attribute("type").unwrap_or_default().to_owned(),
            controller.attribute("index").and_then(number),
            controller.to_string(),
        )
    });
    for (place, controller) in places.iter_mut().zip(sorted) {
        **place = controller;
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const DOMAIN: &str = "<domain type='kvm'>\n  <name>web</name>\n  <devices>\n    <disk>a</disk>\n    \
        <controller type='pci' index='0'/>\n    <controller type='virtio-serial' index='0'>\n      <address bus='1'/>\n    \
        </controller>\n    <controller type='pci' index='10'/>\n    <controller type='pci' index='2'/>\n    \
        <disk>b</disk>\n  </devices>\n</domain>\n";

    /// The same with the lines of its controllers in another order.
    fn read_again() -> String {
        let serial = "    <controller type='virtio-serial' index='0'>\n      <address bus='1'/>\n    </controller>\n";
        let without = DOMAIN.replace(serial, "");
        assert_ne!(without, DOMAIN);
        without.replace("    <disk>b", &format!("{serial}    <disk>b"))
    }

    #[test]
    fn the_name_and_the_order_of_controllers_are_no_difference() {
        let other = read_again().replace("<name>web", "<name>db &amp; co");
        assert!(same_definition(DOMAIN, &other));
        assert!(same_definition(&other, DOMAIN));
        assert!(same_definition("x", "x"));
    }

    #[test]
    fn everything_else_is_a_difference() {
        for (what, other) in [
            ("kvm", "qemu"),
            ("bus='1'", "bus='2'"),
            ("index='10'", "index='11'"),
            ("'pci' index='2'", "'usb' index='2'"),
            ("<disk>a", "<disk>b"),
            ("    <controller type='pci' index='2'/>\n", ""),
        ] {
            let changed = read_again().replace(what, other);
            assert_ne!(changed, read_again(), "{what}");
            assert!(!same_definition(DOMAIN, &changed), "{what}");
        }
        for odd in ["", "x", "<domain/>", "<domain><name>web</name>"] {
            assert!(!same_definition(DOMAIN, odd), "{odd}");
            assert!(!same_definition("y", odd), "{odd}");
        }
    }

    #[test]
    fn controllers_are_put_in_order_and_nothing_else_moves() {
        let ordered = in_order(&read_again()).unwrap();
        assert_eq!(in_order(DOMAIN).unwrap(), ordered);
        let numbers: Vec<_> = ordered.split("index='").skip(1).collect();
        let numbers: Vec<_> = numbers
            .iter()
            .filter_map(|rest| rest.split('\'').next())
            .collect();
        assert_eq!(numbers, ["0", "2", "10", "0"]);
        assert!(
            ordered.contains("<disk>a</disk>\n    <controller"),
            "{ordered}"
        );
        assert_eq!(in_order("x"), None);
    }
}
