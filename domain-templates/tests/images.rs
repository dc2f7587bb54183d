// SPDX-License-Identifier: Apache-2.0
//! Images that many domains read: libvirt gives them to nobody.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod common;

use std::collections::BTreeMap;

use common::{disk, domain, render, spec};
use salvor_domain_templates::{
    BaseImage, Device, DiskFormat, Mode, RescueSpec, TemplateError, Templates, render_rescue,
};

const LABEL: &str = "<seclabel model='dac' relabel='no'/>";

fn original() -> String {
    domain("pc", "", &disk("vda", "virtio", ""))
}

fn on_an_image() -> RescueSpec {
    let mut spec = spec(Mode::Stable);
    spec.rescue_disk.base = Some(BaseImage {
        path: "/images/i&1".to_owned(),
        format: DiskFormat::Raw,
    });
    spec
}

fn on_a_cdrom() -> RescueSpec {
    let mut spec = spec(Mode::Stable);
    spec.rescue_disk.path = "/images/i&1".to_owned();
    spec.rescue_disk.device = Device::Cdrom;
    spec.rescue_disk.format = DiskFormat::Raw;
    spec
}

#[test]
fn the_image_below_a_rescue_disk_keeps_its_owner() {
    let xml = render(&original(), &on_an_image()).unwrap().xml;
    let chain = format!(
        "<source file='/srv/rescue/disk'/>\n      <backingStore type='file'><format type='raw'/>\
         <source file='/images/i&amp;1'>{LABEL}</source><backingStore/></backingStore>"
    );
    assert!(xml.contains(&chain), "{xml}");
    assert_eq!(xml.matches(LABEL).count(), 1, "only the image: {xml}");
}

#[test]
fn the_image_in_a_rescues_cdrom_drive_keeps_its_owner() {
    let xml = render(&original(), &on_a_cdrom()).unwrap().xml;
    let source = format!("<source file='/images/i&amp;1'>{LABEL}</source>");
    assert!(xml.contains(&source), "{xml}");
    assert_eq!(xml.matches(LABEL).count(), 1, "only the image: {xml}");
}

// libvirt: "label overrides require relabeling to be enabled at the domain level".
#[test]
fn a_domain_whose_files_keep_their_owners_anyway_is_told_nothing_of_a_single_one() {
    for (label, said) in [
        ("<seclabel type='none' model='dac'/>", 0),
        (
            "<seclabel type='static' model='dac' relabel='no'><label>+7:+7</label></seclabel>",
            0,
        ),
        (
            "<seclabel type='static' model='dac'><label>+7:+7</label></seclabel>",
            0,
        ),
        (
            "<seclabel type='static' model='dac' relabel='yes'><label>+7:+7</label></seclabel>",
            1,
        ),
        ("<seclabel type='dynamic' model='dac' relabel='yes'/>", 1),
        ("<seclabel type='none'/>", 1),
        ("<seclabel type='none' model='none'/>", 1),
        (
            "<seclabel type='static' model='selinux' relabel='no'><label>a</label></seclabel>",
            1,
        ),
    ] {
        let original = original().replace("</devices>", &format!("</devices>{label}"));
        for spec in [on_an_image(), on_a_cdrom()] {
            let xml = render(&original, &spec).unwrap().xml;
            let rendered = xml.replace(label, "");
            assert_eq!(rendered.matches(LABEL).count(), said, "{label}: {xml}");
            assert!(xml.contains("/images/i&amp;1"), "{label}: {xml}");
        }
    }
}

#[test]
fn a_template_that_names_a_disk_without_its_image_is_refused() {
    let text = include_str!("../templates/rescue.xml")
        .replace("{{ disk.source }}", "<source file='{{ disk.path }}'/>")
        .replace("{{ disk.backing }}", "");
    let overrides = BTreeMap::from([("rescue.xml".to_owned(), text)]);
    let templates = Templates::with_overrides(overrides).unwrap();
    for spec in [on_an_image(), on_a_cdrom()] {
        let refused = render_rescue(&templates, &original(), &spec);
        assert!(
            matches!(&refused, Err(TemplateError::Unusable { what, .. }) if what.contains("`backing`")),
            "{refused:?}"
        );
    }
}
