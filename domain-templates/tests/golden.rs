// SPDX-License-Identifier: Apache-2.0
//! Golden files: the whole rescue domain of every fixture, and beside it exactly what changed.
//!
//! `UPDATE_GOLDEN=1 cargo test -p salvor-domain-templates --test golden` writes them anew; read the difference before
//! you commit it.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use salvor_domain_templates::Templates;
use salvor_domain_templates::fixtures::{ORIGINALS, matrix};

/// What is kept of the matrix for every original, in words of [`matrix`].
const EVERYWHERE: &[&str] = &["classic plain", "stable bare"];

/// Beyond that: one special case for each original.
const BESIDES: &[(&str, &str)] = &[
    ("virt-manager", "stable usb"),
    ("virt-install", "classic overlay"),
    ("virt-install", "stable usb"),
    ("virt-install", "stable scsi"),
    ("terraform", "stable cdrom default"),
    ("nova", "stable usb"),
    ("nova", "classic read-only"),
    ("proxmox", "stable overlay"),
    ("proxmox", "stable usb"),
    ("minimal", "classic overlay"),
    ("three-disks", "stable cdrom default"),
    ("qemu-namespace", "stable ide"),
    ("tpm-uefi", "stable usb"),
    ("tpm-uefi", "stable plain"),
    ("cdrom-boot", "stable overlay"),
    ("hostile", "stable hostile"),
    ("future", "classic overlay"),
];

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

fn is_golden(name: &str) -> bool {
    name.starts_with("server ")
        || ORIGINALS.iter().any(|original| {
            EVERYWHERE
                .iter()
                .any(|options| name == format!("rescue {} {options}", original.name))
        })
        || BESIDES
            .iter()
            .any(|(original, options)| name == format!("rescue {original} {options}"))
}

/// What changed between an original and its rescue, one element a line.
fn changes(name: &str, xml: &str) -> Option<String> {
    let original = ORIGINALS
        .iter()
        .find(|original| name.starts_with(&format!("rescue {} ", original.name)))?;
    let (gone, came) = common::difference(&common::lines(original.xml), &common::lines(xml));
    let gone = gone.iter().map(|line| format!("- {line}\n"));
    Some(
        gone.chain(came.iter().map(|line| format!("+ {line}\n")))
            .collect(),
    )
}

#[test]
fn renderings_are_as_in_the_golden_files() {
    let update = std::env::var_os("UPDATE_GOLDEN").is_some();
    let mut wanted = Vec::new();
    for rendering in matrix(&Templates::builtin().unwrap())
        .into_iter()
        .filter(|r| is_golden(&r.name))
    {
        let xml = rendering.result.unwrap();
        let file = rendering.name.replace(' ', "-");
        let mut texts = vec![(format!("{file}.xml"), xml.clone())];
        texts.extend(changes(&rendering.name, &xml).map(|text| (format!("{file}.changes"), text)));
        wanted.extend(texts);
    }
    let expected = ORIGINALS.len() * EVERYWHERE.len() + BESIDES.len();
    assert_eq!(
        wanted
            .iter()
            .filter(|(file, _)| file.ends_with(".changes"))
            .count(),
        expected,
        "a golden case has no rendering"
    );

    let mut wrong = Vec::new();
    if update {
        for entry in fs::read_dir(folder()).unwrap() {
            fs::remove_file(entry.unwrap().path()).unwrap();
        }
    }
    for (file, text) in &wanted {
        let path = folder().join(file);
        if update {
            fs::write(path, text).unwrap();
        } else if fs::read_to_string(&path).ok().as_ref() != Some(text) {
            wrong.push(file.clone());
        }
    }
    for entry in fs::read_dir(folder()).unwrap() {
        let file = entry.unwrap().file_name().into_string().unwrap();
        if !wanted.iter().any(|(name, _)| *name == file) {
            wrong.push(format!("{file} (belongs to no rendering)"));
        }
    }
    assert!(
        wrong.is_empty(),
        "differ from the golden files (UPDATE_GOLDEN=1 writes them anew): {wrong:#?}"
    );
}

#[test]
fn every_rendering_is_accepted_by_libvirts_schema() {
    const SCHEMA: &str = "/usr/share/libvirt/schemas/domain.rng";
    assert!(
        Path::new(SCHEMA).exists(),
        "{SCHEMA} is missing: install libvirt0 (apt-get install libvirt0)"
    );
    let folder = tempfile::tempdir().unwrap();
    let mut files = Vec::new();
    for rendering in matrix(&Templates::builtin().unwrap())
        .into_iter()
        .filter(|r| r.in_schema)
    {
        let file = folder.path().join(rendering.name.replace(' ', "-"));
        fs::write(&file, rendering.result.unwrap()).unwrap();
        files.push(file);
    }
    assert!(files.len() > 200, "only {} renderings", files.len());
    let output = Command::new("xmllint")
        .args(["--noout", "--nonet", "--relaxng", SCHEMA])
        .args(&files)
        .output()
        .expect("xmllint cannot be run: install libxml2-utils (apt-get install libxml2-utils)");
    let said = String::from_utf8_lossy(&output.stderr);
    let complaints: Vec<&str> = said
        .lines()
        .filter(|line| !line.ends_with(" validates"))
        .take(30)
        .collect();
    assert!(
        output.status.success() && complaints.is_empty(),
        "{complaints:#?}"
    );
}
