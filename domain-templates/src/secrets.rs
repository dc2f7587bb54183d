// SPDX-License-Identifier: Apache-2.0
//! Domain definitions for people to read: with everything in them that is secret, or may be, masked.
//!
//! Owns: where libvirt's domain XML holds secrets in clear. Masked are, by the names of elements and attributes:
//!
//! * passwords of `<graphics>`;
//! * cookies and query strings of disks over HTTP, which carry tokens;
//! * what goes into the guest past its disks: `<sysinfo>` (SMBIOS strings, `fw_cfg` blobs), the kernel's command line,
//!   arguments and environment of a container's init;
//! * the launch blobs of confidential guests;
//! * arguments, environment and properties handed straight to the hypervisor (`<qemu:commandline>` and its kin);
//! * the metadata of everybody but Salvor.
//!
//! Left as they are: references to libvirt's secrets (`<auth>`, `<encryption>`, TPM), which hold uuids and names only;
//! paths, addresses and user names.
//!
//! Does not know: who reads it.

use crate::domain::Domain;
use crate::xml::{Element, Node, XmlError};

/// What stands in a secret's place.
const MASK: &str = "***";

/// The definition with its secrets masked, for people: libvirt must not be given it.
///
/// # Errors
/// [`XmlError`] if it cannot be read: what is secret in it cannot be told then.
pub fn without_secrets(xml: &str) -> Result<String, XmlError> {
    let mut root = Element::parse(xml)?;
    // Whether a piece of metadata is Salvor's depends on the namespaces around it.
    let ours = Domain::parse(xml).ok();
    for node in &mut root.children {
        if let Node::Element(child) = node {
            match child.name.as_str() {
                "metadata" => mask_metadata(child, ours.as_ref()),
                _ => mask(child),
            }
        }
    }
    Ok(root.to_string())
}

fn mask(element: &mut Element) {
    match local_name(&element.name) {
        "graphics" => mask_attribute(element, "passwd"),
        "source" => mask_attribute(element, "query"),
        "cookies" | "sysinfo" | "commandline" | "override" => mask_within(element),
        "cmdline" | "initarg" | "initenv" => mask_text(element),
        "launchSecurity" => {
            for child in elements_mut(element) {
                // Hardware numbers and the policy say what the guest is, not how to get into it.
                if !matches!(
                    child.name.as_str(),
                    "cbitpos" | "reducedPhysBits" | "policy"
                ) {
                    mask_text(child);
                }
            }
        }
        _ => {}
    }
    for child in elements_mut(element) {
        mask(child);
    }
}

fn mask_metadata(metadata: &mut Element, domain: Option<&Domain>) {
    let around = metadata.clone();
    for child in elements_mut(metadata) {
        if !domain.is_some_and(|domain| domain.is_mark(&around, child)) {
            mask_text(child);
            mask_within(child);
            mask_attributes(child);
        }
    }
}

/// Masks everything below the element: it has no shape that we know, or one that says what is what.
fn mask_within(element: &mut Element) {
    for child in elements_mut(element) {
        mask_text(child);
        mask_attributes(child);
        mask_within(child);
    }
}

/// Masks all attributes but those that only say which entry it is.
fn mask_attributes(element: &mut Element) {
    for (name, value) in &mut element.attributes {
        let tells = matches!(name.as_str(), "name" | "type" | "alias") || name.starts_with("xmlns");
        if !tells {
            MASK.clone_into(value);
        }
    }
}

fn mask_attribute(element: &mut Element, name: &str) {
    if element.attribute(name).is_some() {
        element.set_attribute(name, MASK);
    }
}

fn mask_text(element: &mut Element) {
    if element.text().is_empty() {
        return;
    }
    element
        .children
        .retain(|node| matches!(node, Node::Element(_)));
    element.children.insert(0, Node::Text(MASK.to_owned()));
}

fn elements_mut(element: &mut Element) -> impl Iterator<Item = &mut Element> {
    element.children.iter_mut().filter_map(|node| match node {
        Node::Element(element) => Some(element),
        _ => None,
    })
}

fn local_name(name: &str) -> &str {
    name.split_once(':').map_or(name, |(_, local)| local)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::fixtures::ORIGINALS;

    /// A domain with `SECRET` wherever there can be one, and `public` where there is none.
    const SECRETS: &str = "<domain type='qemu' xmlns:q='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>public-name</name>
  <metadata>
    <salvor:salvor xmlns:salvor='https://salvor.example/xmlns/domain/1'><salvor:plan>public-plan</salvor:plan></salvor:salvor>
    <other:thing xmlns:other='urn:other' token='SECRET'>SECRET<other:deep key='SECRET'><![CDATA[SECRET]]></other:deep></other:thing>
  </metadata>
  <sysinfo type='smbios'>
    <system><entry name='serial'>SECRET</entry></system>
    <oemStrings><entry>io.systemd.credential:passwd=SECRET</entry></oemStrings>
  </sysinfo>
  <sysinfo type='fwcfg'>
    <entry name='opt/public-entry'>SECRET</entry>
    <entry name='opt/file' file='/SECRET'/>
  </sysinfo>
  <os>
    <type arch='x86_64'>hvm</type>
    <cmdline>console=ttyS0 password=SECRET</cmdline>
    <initarg>SECRET</initarg>
    <initenv name='public-env'>SECRET</initenv>
  </os>
  <devices>
    <disk type='network' device='cdrom'>
      <source protocol='https' name='public-path' query='token=SECRET'>
        <host name='public-host' port='443'/>
        <cookies><cookie name='public-cookie'>SECRET</cookie></cookies>
      </source>
      <target dev='sda' bus='sata'/>
    </disk>
    <disk type='network' device='disk'>
      <source protocol='rbd' name='pool/public-volume'>
        <auth username='public-user'><secret type='ceph' uuid='9f7b9d0e-0000-4000-8000-00000public0'/></auth>
      </source>
      <target dev='vda' bus='virtio'/>
    </disk>
    <graphics type='vnc' port='-1' passwd='SECRET' passwdValidTo='2026-01-01T00:00:00'>
      <listen type='address' address='public-address'/>
    </graphics>
    <graphics type='spice' passwd=\"SECRET'&gt;\"/>
    <tpm model='tpm-crb'><backend type='emulator'><encryption secret='public-uuid'/></backend></tpm>
  </devices>
  <launchSecurity type='sev'><policy>0x0001</policy><dhCert>SECRET</dhCert><session>SECRET</session></launchSecurity>
  <q:commandline>
    <q:arg value='-object'/>
    <q:arg value='secret,id=a,data=SECRET'/>
    <q:env name='PUBLIC_public' value='SECRET'/>
  </q:commandline>
  <q:override><q:device alias='public-alias'><q:frontend><q:property name='public-prop' type='string' value='SECRET'/></q:frontend></q:device></q:override>
</domain>";

    #[test]
    fn nothing_that_is_secret_is_shown_and_everything_else_is() {
        let shown = without_secrets(SECRETS).unwrap();
        assert!(!shown.contains("SECRET"), "{shown}");
        assert_eq!(
            shown.matches("public").count(),
            SECRETS.matches("public").count(),
            "{shown}"
        );
        assert!(shown.contains("<policy>0x0001</policy>"), "{shown}");
        // The same places, one line each.
        assert_eq!(shown.lines().count(), SECRETS.lines().count());
        // What was masked is masked for good.
        assert_eq!(without_secrets(&shown).unwrap(), shown);
    }

    #[test]
    fn a_definition_without_secrets_is_shown_as_it_is() {
        let plain = ORIGINALS.iter().find(|o| o.name == "minimal").unwrap().xml;
        let shown = without_secrets(plain).unwrap();
        assert_eq!(shown, Element::parse(plain).unwrap().to_string());
        assert!(!shown.contains(MASK));
    }

    #[test]
    fn what_cannot_be_read_is_not_shown() {
        assert!(without_secrets("<domain><graphics passwd='s3cret").is_err());
    }
}
