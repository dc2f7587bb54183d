// SPDX-License-Identifier: Apache-2.0
//! What the rescue guest may do to the original disks.

use std::collections::BTreeMap;

use salvor_domain_templates::{Disk, DiskChange, DiskDevice, DiskSource, Domain};

use crate::core::{
    backing::{LARGEST, check_name},
    facts::DomainFacts,
    plan::Step,
    reason::{Reason, Refusal, Warning, WarningName},
    record::{Overlay, Protection, RescueRecord},
};

/// Overlays to be made: each with its disk's target, and the virtual size in bytes.
pub(super) type Overlays = Vec<((String, Overlay), u64)>;

/// The overlays that the protection asks for.
///
/// # Errors
/// A [`Refusal`] that names the disk which can have none.
pub(super) fn overlays(
    parsed: &Domain,
    wanted: Protection,
    domain: &DomainFacts,
    folder: &str,
) -> Result<Overlays, Refusal> {
    if wanted != Protection::Overlay {
        return Ok(Vec::new());
    }
    let mut overlays = Vec::new();
    for disk in parsed.disks() {
        if !matches!(disk.device, DiskDevice::Disk | DiskDevice::Lun)
            || disk.readonly
            || disk.source == DiskSource::None
        {
            continue;
        }
        let refuse = |why: &str| {
            Refusal::new(
                Reason::DomainUnsupported,
                format!(
                    "disk {} cannot have an overlay: {why}; use READ_WRITE or READ_ONLY",
                    disk.target
                ),
            )
        };
        if disk.device == DiskDevice::Lun {
            return Err(refuse("it is a LUN passed through"));
        }
        let base = match &disk.source {
            DiskSource::File(path) | DiskSource::Block(path) => path.clone(),
            DiskSource::Network { .. }
            | DiskSource::Volume { .. }
            | DiskSource::Other(_)
            | DiskSource::None => {
                return Err(refuse(
                    "it is neither a file nor a block device of this host",
                ));
            }
        };
        if let Err(rule) = check_name(base.as_bytes()) {
            return Err(refuse(rule));
        }
        if disk.shareable {
            return Err(refuse("it is shared with other domains"));
        }
        let base_format = disk.format.clone().unwrap_or_else(|| "raw".to_owned());
        if base_format != "raw" && base_format != "qcow2" {
            return Err(refuse(&format!("its format is {base_format}")));
        }
        let look = match domain.disks.get(&disk.target) {
            Some(Ok(look)) => look,
            Some(Err(why)) => return Err(refuse(&format!("its size cannot be told ({why})"))),
            None => return Err(refuse("its size cannot be told")),
        };
        if look.size > LARGEST {
            return Err(refuse(&format!(
                "it has {} bytes, and {LARGEST} are possible",
                look.size
            )));
        }
        if let Some(why) = domain.unwritable.get(&disk.target) {
            return Err(refuse(&format!(
                "{base} cannot be written by the agent ({why}), so repairs could not be committed to it; if salvord.service is in the way, add its folder to ReadWritePaths (a device to DeviceAllow) of the unit"
            )));
        }
        let path = format!("{folder}/{}.overlay", disk.target);
        overlays.push((
            (
                disk.target.clone(),
                Overlay {
                    path,
                    base,
                    base_format,
                    base_references: look.references.clone(),
                },
            ),
            look.size,
        ));
    }
    Ok(overlays)
}

/// What becomes of each original disk.
pub(super) fn changes(
    parsed: &Domain,
    wanted: Protection,
    overlays: &Overlays,
) -> BTreeMap<String, DiskChange> {
    match wanted {
        Protection::ReadWrite => BTreeMap::new(),
        Protection::Overlay => overlays
            .iter()
            .map(|((target, overlay), _)| {
                (
                    target.clone(),
                    DiskChange::Overlay {
                        path: overlay.path.clone(),
                    },
                )
            })
            .collect(),
        Protection::ReadOnly => parsed
            .disks()
            .iter()
            .filter(|disk| {
                matches!(
                    disk.device,
                    DiskDevice::Disk | DiskDevice::Lun | DiskDevice::Floppy
                ) && !disk.readonly
            })
            .map(|disk| (disk.target.clone(), DiskChange::ReadOnly))
            .collect(),
    }
}

/// Disks that libvirt gives to QEMU's user for the rescue and does not give back: those that the
/// server writes to, and the rescue may not. Not those that domains share: others may be at them.
fn guarded<'a>(
    parsed: &'a Domain,
    changes: &'a BTreeMap<String, DiskChange>,
) -> impl Iterator<Item = &'a Disk> {
    let disks = parsed.disks().iter();
    disks.filter(|disk| changes.contains_key(&disk.target) && !disk.shareable)
}

/// Notes the owners of the disks that are protected, if there are any: the room for it is made before
/// the guest is stopped, the note after that, for until then they are QEMU's.
pub(super) fn note_owners(
    parsed: &Domain,
    changes: &BTreeMap<String, DiskChange>,
    folder: &str,
) -> Option<(Step, Step)> {
    let paths = guarded(parsed, changes).filter_map(Disk::path);
    let disks: Vec<String> = paths.map(str::to_owned).collect();
    let note = owners_note(folder);
    (!disks.is_empty()).then(|| {
        let reserve = Step::ReserveNote {
            disks: disks.clone(),
            note: note.clone(),
        };
        (reserve, Step::NoteOwners { disks, note })
    })
}

/// Writes an overlay to its disk.
pub(super) fn commit_overlay(overlay: &Overlay) -> Step {
    Step::CommitOverlay {
        path: overlay.path.clone(),
        base: overlay.base.clone(),
        base_format: overlay.base_format.clone(),
        base_references: overlay.base_references.clone(),
    }
}

/// Puts the owners back that the rescue noted.
pub(super) fn put_owners_back(rescue: &RescueRecord, folder: &str) -> Option<Step> {
    (rescue.protection != Protection::ReadWrite).then(|| Step::PutOwnersBack {
        note: owners_note(folder),
    })
}

fn owners_note(folder: &str) -> String {
    format!("{folder}/owners")
}

/// Disks whose owners the agent will not be able to put back.
pub(super) fn owners_lost(
    parsed: &Domain,
    changes: &BTreeMap<String, DiskChange>,
    domain: &DomainFacts,
) -> Option<Warning> {
    let lost: Vec<String> = guarded(parsed, changes)
        .filter_map(|disk| {
            let why = match (&disk.source, domain.unwritable.get(&disk.target)) {
                (_, Some(why)) => format!("{}: {why}", disk.path().unwrap_or_default()),
                (DiskSource::Volume { pool, volume }, None) => {
                    format!("volume {volume} of pool {pool}: only libvirt knows its file")
                }
                _ => return None,
            };
            Some(format!("{} ({why})", disk.target))
        })
        .collect();
    (!lost.is_empty()).then(|| Warning {
        name: WarningName::OwnersNotKept,
        message: format!(
            "libvirt gives these disks to QEMU's user, and the agent cannot put their owners back after the rescue: {}",
            lost.join("; ")
        ),
    })
}

/// What the guest can write to although its disks are protected.
pub(super) fn unprotected(parsed: &Domain, wanted: Protection) -> Option<Warning> {
    if wanted == Protection::ReadWrite {
        return None;
    }
    let floppies = parsed.disks().iter().filter(|disk| {
        wanted == Protection::Overlay
            && disk.device == DiskDevice::Floppy
            && !disk.readonly
            && disk.source != DiskSource::None
    });
    let open: Vec<String> = floppies
        .map(|disk| format!("floppy {}", disk.target))
        .chain(parsed.other_storage())
        .collect();
    (!open.is_empty()).then(|| Warning {
        name: WarningName::NotProtected,
        message: format!(
            "the protection of disks ({wanted}) does not cover these, which the rescue guest can write to: {}",
            open.join("; ")
        ),
    })
}
