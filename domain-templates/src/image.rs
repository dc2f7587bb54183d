// SPDX-License-Identifier: Apache-2.0
//! Disks that are, or stand on, an image which many domains read.
//!
//! Owns: how a definition names such a file. libvirt gives every file of a disk to the user that QEMU runs as, backing
//! files too, and never takes those back that it holds for shared. An owner may make a file writable: a QEMU that was
//! broken into could then change the image under every other server. So libvirt is told to leave the image's owner
//! alone, and the chain is stated down to it, as only what is stated can be told so.
//!
//! Does not know: where images are, or that every user may read them.

use serde::{Deserialize, Serialize};

use crate::spec::DiskFormat;
use crate::xml::Element;

/// An image that a disk stands on. It has no backing file itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BaseImage {
    /// File on this host.
    pub path: String,
    /// Its format; never guessed.
    pub format: DiskFormat,
}

/// Does libvirt give files of this domain to QEMU's user? A domain that says it must not may not say it again of a
/// single disk.
pub(crate) fn is_relabelled(domain: &Element) -> bool {
    !domain.elements_named("seclabel").any(|label| {
        let by_default = || matches!(label.attribute("type"), Some("static" | "none"));
        label.attribute("model") == Some("dac")
            && label
                .attribute("relabel")
                .map_or_else(by_default, |relabel| relabel == "no")
    })
}

/// The user that QEMU of this domain runs as, if the domain names one and keeps libvirt from giving that user its files.
pub(crate) fn left_alone_for(domain: &Element) -> Option<String> {
    let mut labels = domain.elements_named("seclabel");
    let label = labels.find(|label| label.attribute("model") == Some("dac"))?;
    let owner = label.child("label")?.text();
    (!is_relabelled(domain) && !owner.is_empty()).then_some(owner)
}

/// What a disk of Salvor's own is made of.
#[derive(Debug)]
pub(crate) struct Made {
    pub(crate) source: Element,
    pub(crate) backing: Option<Element>,
}

impl Made {
    /// A file of one server's, which may stand on an image.
    pub(crate) fn own(path: &str, base: Option<&BaseImage>, relabelled: bool) -> Self {
        Self {
            source: Element::new("source").with("file", path),
            backing: base.map(|image| standing_on(image, relabelled)),
        }
    }

    /// An image.
    pub(crate) fn image(path: &str, relabelled: bool) -> Self {
        Self {
            source: shared(path, relabelled),
            backing: None,
        }
    }

    /// Is this `<disk>` made of it?
    pub(crate) fn is_in(&self, disk: &Element) -> bool {
        disk.child("source") == Some(&self.source)
            && disk.child("backingStore") == self.backing.as_ref()
    }
}

fn shared(path: &str, relabelled: bool) -> Element {
    let mut source = Element::new("source").with("file", path);
    if relabelled {
        let label = Element::new("seclabel").with("model", "dac");
        source.append(label.with("relabel", "no"));
    }
    source
}

fn standing_on(image: &BaseImage, relabelled: bool) -> Element {
    let mut backing = Element::new("backingStore").with("type", "file");
    backing.append(Element::new("format").with("type", image.format.as_str()));
    backing.append(shared(&image.path, relabelled));
    // The chain ends here.
    backing.append(Element::new("backingStore"));
    backing
}
