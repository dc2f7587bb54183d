// SPDX-License-Identifier: Apache-2.0
//! Protecting an original disk while its server is rescued.
//!
//! Owns: which disks can be read-only or have an overlay, and what changes in their elements.
//! Does not know: where disks go, or how overlays are made.

use crate::disk::{Disk, DiskDevice, DiskSource};
use crate::rescue::TemplateError;
use crate::xml::Element;

/// Makes the disk read-only.
pub(crate) fn by_readonly(disk: &Disk, element: &mut Element) -> Result<(), TemplateError> {
    if let Some(bus) = disk
        .known_bus()
        .filter(|bus| disk.device == DiskDevice::Disk && !bus.has_readonly_disks())
    {
        return Err(TemplateError::ReadOnlyUnsupported {
            target: disk.target.clone(),
            bus,
        });
    }
    if element.child("readonly").is_none() && disk.device != DiskDevice::Cdrom {
        element.append(Element::new("readonly"));
    }
    Ok(())
}

/// Puts the overlay in the disk's place; its target, serial number, cache mode and the like stay.
pub(crate) fn by_overlay(
    disk: &Disk,
    element: &mut Element,
    overlay: &str,
) -> Result<(), TemplateError> {
    let source = element.child("source");
    let has = |name: &str| {
        element.child(name).is_some() || source.is_some_and(|source| source.child(name).is_some())
    };
    let why = match (&disk.source, disk.device) {
        (_, DiskDevice::Cdrom | DiskDevice::Floppy) => Some("it is removable media; leave it out"),
        (_, DiskDevice::Lun) => Some("it is a LUN passed through; use READ_ONLY or READ_WRITE"),
        (DiskSource::None, _) => Some("it has no source"),
        (DiskSource::File(_) | DiskSource::Block(_), _) if has("encryption") => {
            Some("it is encrypted by QEMU; use READ_ONLY or READ_WRITE")
        }
        (DiskSource::File(_) | DiskSource::Block(_), _) if has("slices") => {
            Some("it is a slice of a file; use READ_ONLY or READ_WRITE")
        }
        (DiskSource::File(_) | DiskSource::Block(_), _) => None,
        _ => Some(
            "it is neither a file nor a block device of this host; use READ_ONLY or READ_WRITE",
        ),
    };
    if let Some(why) = why {
        return Err(TemplateError::OverlayUnsupported {
            target: disk.target.clone(),
            why,
        });
    }
    element.set_attribute("type", "file");
    // A chain that the definition states stays stated, one longer: libvirt need not read formats from the files then.
    // And whom the old file belongs to can only be said where it is named.
    let chain = element.child("backingStore").cloned();
    let source = element.child("source");
    let labels: Vec<Element> = source
        .map(|source| source.elements_named("seclabel").cloned().collect())
        .unwrap_or_default();
    if chain.is_some() || !labels.is_empty() {
        element.replace(as_backing(disk, labels, chain));
    }
    // A new <source>: labels, locks and reservations of the old one belong to the old file.
    element.replace(Element::new("source").with("file", overlay));
    match element.child_mut("driver") {
        Some(driver) => driver.set_attribute("type", "qcow2"),
        None => element.append(
            Element::new("driver")
                .with("name", "qemu")
                .with("type", "qcow2"),
        ),
    }
    Ok(())
}

/// The original disk as what the overlay stands on, with what it stands on itself.
fn as_backing(disk: &Disk, labels: Vec<Element>, chain: Option<Element>) -> Element {
    let (kind, attribute) = match disk.source {
        DiskSource::Block(_) => ("block", "dev"),
        _ => ("file", "file"),
    };
    let format = disk.format.as_deref().unwrap_or("raw");
    let mut source = Element::new("source").with(attribute, disk.path().unwrap_or_default());
    for label in labels {
        source.append(label);
    }
    let mut backing = Element::new("backingStore").with("type", kind);
    backing.append(Element::new("format").with("type", format));
    backing.append(source);
    // Without a chain libvirt reads on from here by itself.
    if let Some(chain) = chain {
        backing.append(chain);
    }
    backing
}
