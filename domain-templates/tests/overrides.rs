// SPDX-License-Identifier: Apache-2.0
//! Templates an operator wrote.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod common;

use std::collections::BTreeMap;

use common::{disk, domain, spec};
use salvor_domain_templates::{
    LayoutError, Mode, TemplateError, Templates, TemplatesError, render_rescue,
};

fn overridden(name: &str, text: &str) -> Result<Templates, TemplatesError> {
    Templates::with_overrides(BTreeMap::from([(name.to_owned(), text.to_owned())]))
}

const RESCUE: &str = include_str!("../templates/rescue.xml");

#[test]
fn an_operators_template_may_add_a_device() {
    let text = RESCUE.replace(
        "  </devices>",
        "    <watchdog model='i6300esb' action='{{ mode }}'/>\n  </devices>",
    );
    let templates = overridden("rescue.xml", &text).unwrap();
    let xml = render_rescue(
        &templates,
        &domain("pc", "", &disk("vda", "virtio", "")),
        &spec(Mode::Stable),
    )
    .unwrap()
    .xml;
    assert!(xml.contains("<watchdog model='i6300esb' action='stable'/>"));
}

#[test]
fn a_template_cannot_print_a_value_unescaped() {
    let original = domain("pc", "", &disk("vda", "virtio", ""));
    let mut hostile = spec(Mode::Stable);
    hostile.plan = "</domain>".to_owned();
    for attempt in [
        "{{ plan }}",
        "{% autoescape false %}{{ plan }}{% endautoescape %}",
        "{{ plan|e }}",
        "{% set p = plan %}{{ p }}",
    ] {
        let text = RESCUE.replace(
            "  <devices>",
            &format!("  <description>{attempt}</description>\n  <devices>"),
        );
        let xml = render_rescue(
            &overridden("rescue.xml", &text).unwrap(),
            &original,
            &hostile,
        )
        .unwrap()
        .xml;
        assert!(
            xml.contains("<description>&lt;/domain&gt;</description>"),
            "{attempt}: {xml}"
        );
    }
    let text = RESCUE.replace("{{ disk.serial }}", "{{ disk.serial|safe }}");
    let refused = overridden("rescue.xml", &text)
        .map_err(|_| ())
        .and_then(|templates| {
            render_rescue(&templates, &original, &spec(Mode::Stable)).map_err(|_| ())
        });
    assert!(refused.is_err(), "there is no filter `safe`");
}

#[test]
fn templates_that_are_of_no_use_are_refused() {
    assert!(matches!(
        overridden("resuce.xml", "x"),
        Err(TemplatesError::Unknown { .. })
    ));
    assert!(matches!(
        overridden("rescue.xml", "{% if %}"),
        Err(TemplatesError::Syntax { .. })
    ));
    let original = domain("pc", "", &disk("vda", "virtio", ""));
    let render = |text: &str| {
        render_rescue(
            &overridden("rescue.xml", text).unwrap(),
            &original,
            &spec(Mode::Classic),
        )
    };
    for (from, to) in [
        ("{{ metadata }}", "{{ metadatta }}"),
        ("{{ disk.serial }}", "{{ disk.was }}"),
    ] {
        assert!(RESCUE.contains(from), "{from}");
        let refused = render(&RESCUE.replace(from, to));
        let failed = matches!(
            refused,
            Err(TemplateError::Layout(LayoutError::Failed { .. }))
        );
        assert!(failed, "{refused:?}");
    }
    assert!(matches!(
        render("<domain>"),
        Err(TemplateError::Layout(LayoutError::NotXml { .. }))
    ));
    for (from, to) in [
        ("{{ metadata }}", ""),
        ("{%- for part in settings %}", "{%- for part in [] %}"),
        ("      <boot order='1'/>", ""),
        ("{{ disk.xml }}", ""),
        ("{{ os }}", "<os><type>hvm</type><boot dev='hd'/></os>"),
        (
            "  </devices>",
            "<interface type='user'><boot order='2'/></interface></devices>",
        ),
    ] {
        assert!(RESCUE.contains(from), "{from}");
        let refused = render(&RESCUE.replace(from, to));
        assert!(
            matches!(refused, Err(TemplateError::Unusable { .. })),
            "{from}: {refused:?}"
        );
    }
}
