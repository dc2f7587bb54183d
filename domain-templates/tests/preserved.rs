// SPDX-License-Identifier: Apache-2.0
//! Nothing of a server's definition is lost in its rescue but what a rescue must change: for the whole matrix, every
//! element, comment and instruction that is gone or new is accounted for.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod common;

use salvor_domain_templates::fixtures::{ORIGINALS, Original, matrix};
use salvor_domain_templates::{Domain, RESCUE_SERIAL, Templates};

const OVERLAY: &str = "/var/lib/salvor/servers/s/rescue/overlay";

/// What one rescue of the matrix may change.
struct Case {
    name: String,
    rescue: Domain,
    root: Option<String>,
    /// Sources of the disks that may get another name and lose their address.
    movable: Vec<String>,
}

impl Case {
    fn new(name: &str, original: &Original, xml: &str) -> Self {
        let before = Domain::parse(original.xml).unwrap();
        let rescue = Domain::parse(xml).unwrap();
        let rescue_disk = rescue
            .disks()
            .iter()
            .find(|d| d.serial.as_deref() == Some(RESCUE_SERIAL))
            .unwrap();
        let root = before.root_disk().unwrap();
        let shifts = name.contains(" classic ") && root.bus == rescue_disk.bus;
        let movable = before
            .disks()
            .iter()
            .filter(|d| shifts && d.bus == root.bus);
        Self {
            name: name.to_owned(),
            movable: movable.map(|d| label(d.index, original.xml)).collect(),
            root: Some(label(root.index, original.xml)),
            rescue,
        }
    }

    fn has(&self, word: &str) -> bool {
        self.name.contains(word)
    }

    fn is_movable(&self, line: &str, elements: &[&str]) -> bool {
        self.movable.iter().any(|disk| {
            elements
                .iter()
                .any(|element| line.starts_with(&format!("/domain/devices/disk{disk}/{element}")))
        })
    }

    fn is_of_root(&self, line: &str, elements: &[&str]) -> bool {
        self.root.iter().any(|disk| {
            elements
                .iter()
                .any(|element| line.starts_with(&format!("/domain/devices/disk{disk}/{element}")))
        })
    }

    fn may_go(&self, line: &str) -> bool {
        let os = ["boot", "kernel", "initrd", "cmdline"];
        os.iter()
            .any(|element| line.starts_with(&format!("/domain/os/{element} ")))
            || line.starts_with("/domain/os/nvram") && !self.has(" bare")
            || line.starts_with("/domain/devices/") && line.contains("/boot order=")
            || self.is_movable(line, &["target ", "address ", "alias "])
            || self.has(" overlay") && self.is_of_root(line, &["source", "driver ", "backingStore"])
            || self.has(" overlay") && line == "/domain/devices/disk type=\"block\" device=\"disk\""
            || self.has(" usb")
                && line == "/domain/devices/controller type=\"usb\" index=\"0\" model=\"none\""
    }

    fn may_come(&self, line: &str) -> bool {
        let ours = |disk: &salvor_domain_templates::Disk| {
            disk.serial
                .as_ref()
                .is_some_and(|serial| serial.starts_with("salvor-"))
                && line.starts_with(&format!("/domain/devices/disk[{}]/", disk.path().unwrap()))
        };
        line == "/domain/metadata"
            || line.starts_with("/domain/metadata/salvor:salvor")
            || line.starts_with("/domain/os/nvram ") && !self.has(" bare")
            || self.rescue.disks().iter().any(ours)
            || line == "/domain/devices/disk type=\"file\" device=\"disk\""
            || self.has(" cdrom") && line == "/domain/devices/disk type=\"file\" device=\"cdrom\""
            || self.is_movable(line, &["target "])
            || self.has(" overlay")
                && self.is_of_root(line, &["source ", "driver ", "backingStore"])
            || self.has(" read-only") && self.is_of_root(line, &["readonly"])
            || self.has(" usb")
                && line.contains("/controller type=\"usb\"")
                && line.contains("model=\"qemu-xhci\"")
            || self.has("scsi")
                && line
                    == "/domain/devices/controller type=\"scsi\" index=\"0\" model=\"virtio-scsi\""
    }
}

/// How [`common::lines`] names the disk with this number.
fn label(index: usize, xml: &str) -> String {
    let domain = Domain::parse(xml).unwrap();
    let disk = &domain.disks()[index];
    let own = match &disk.source {
        salvor_domain_templates::DiskSource::Network { name, .. } => name.clone(),
        salvor_domain_templates::DiskSource::Volume { volume, .. } => Some(volume.clone()),
        _ => disk.path().map(str::to_owned),
    };
    own.map(|own| format!("[{own}]")).unwrap_or_default()
}

#[test]
fn only_what_a_rescue_must_change_is_changed() {
    let mut wrong = Vec::new();
    let mut cases = 0;
    for rendering in matrix(&Templates::builtin().unwrap()) {
        let Some(original) = ORIGINALS
            .iter()
            .find(|o| rendering.name.starts_with(&format!("rescue {} ", o.name)))
        else {
            continue;
        };
        cases += 1;
        let xml = rendering.result.unwrap();
        let case = Case::new(&rendering.name, original, &xml);
        // An overlay stands for the disk below it.
        let mut after = common::lines(&xml);
        if let Some(root) = &case.root {
            after
                .iter_mut()
                .for_each(|line| *line = line.replace(&format!("[{OVERLAY}]"), root));
        }
        let (gone, came) = common::difference(&common::lines(original.xml), &after);
        wrong.extend(
            gone.iter()
                .filter(|line| !case.may_go(line))
                .map(|line| format!("{}: - {line}", case.name)),
        );
        wrong.extend(
            came.iter()
                .filter(|line| !case.may_come(line))
                .map(|line| format!("{}: + {line}", case.name)),
        );

        let before = Domain::parse(original.xml).unwrap();
        if case.has(" stable ") {
            for disk in before.disks() {
                let now = case.rescue.disk(&disk.target).unwrap();
                assert_eq!(
                    (&now.bus, now.device),
                    (&disk.bus, disk.device),
                    "{}",
                    case.name
                );
            }
        }
        assert_eq!(
            before.interfaces(),
            case.rescue.interfaces(),
            "{}",
            case.name
        );
        let new_disks = if case.has(" bare") { 1 } else { 2 };
        assert_eq!(
            case.rescue.disks().len(),
            before.disks().len() + new_disks,
            "{}",
            case.name
        );
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(cases > 200, "only {cases} cases");
}

#[test]
fn a_lost_element_would_be_noticed() {
    let original = ORIGINALS.iter().find(|o| o.name == "nova").unwrap();
    let rendering = matrix(&Templates::builtin().unwrap())
        .into_iter()
        .find(|r| r.name == "rescue nova stable plain")
        .unwrap();
    let xml = rendering
        .result
        .unwrap()
        .replace("<vmcoreinfo state='on'/>", "");
    let case = Case::new(&rendering.name, original, &xml);
    let (gone, _) = common::difference(&common::lines(original.xml), &common::lines(&xml));
    assert!(gone.iter().any(|line| !case.may_go(line)));
}
