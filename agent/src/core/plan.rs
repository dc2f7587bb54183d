// SPDX-License-Identifier: Apache-2.0
//! Plans: what an accepted action will do, as data.
//!
//! A plan is a list of [`Step`]s in four phases and the change of the record that they lead to. It is
//! written to the journal before anything is touched, so it holds values only: no clock, no closure,
//! and no secret but crypt hashes (a domain's XML carries what libvirt itself keeps in its XML).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{
    action::{Shutdown, Verb},
    backing::References,
    change::RecordChange,
    password::CryptHash,
    reason::Warning,
    record::{Devices, Fault, PasswordDelivery, RescueRecord, ServerRecord},
    state::{PowerState, VmState, named_states},
};

/// How long a step that works through a guest's memory may wait for its turn, in milliseconds: few are worked
/// through at a time.
pub const TURN_WAIT_MS: u64 = 600_000;

named_states! {
    /// The phases of a plan, in order.
    pub enum Phase {
        /// Everything that can fail without the guest noticing.
        Prepare = "prepare",
        /// The guest is stopped, changed, started.
        Switch = "switch",
        /// After the outcome stands: what is no longer needed goes. Never taken back.
        CleanUp = "clean-up",
    }
}

/// What a config drive tells the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigDriveSpec {
    /// The instance id that cloud-init sees. A new one makes it configure anew.
    pub instance_id: Uuid,
    /// Host name.
    pub hostname: String,
    /// Name of the server.
    pub name: String,
    /// SSH public keys by name.
    pub public_keys: BTreeMap<String, String>,
    /// Hash of the administrator's password.
    pub password: Option<CryptHash>,
    /// The administrator.
    pub password_user: String,
    /// User data.
    pub user_data: Option<Vec<u8>>,
    /// Metadata.
    pub metadata: BTreeMap<String, String>,
}

/// What is to be found in a domain's metadata.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Mark {
    /// The mark of this plan.
    Plan(Uuid),
    /// Anything but a rescue: the server's own domain.
    Own,
}

/// One step. Every kind can be applied, taken back and observed, each as often as one likes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Step {
    /// The image is there as recorded, and cannot be deleted while `holder` stands on it.
    HoldImage {
        /// The image.
        image: Uuid,
        /// Its file.
        path: String,
        /// Its size in bytes.
        size: u64,
        /// Who stands on it.
        holder: String,
    },
    /// A folder.
    MakeFolder {
        /// Its path.
        path: String,
    },
    /// A qcow2 overlay.
    CreateOverlay {
        /// Its path.
        path: String,
        /// What it stands on.
        backing: String,
        /// Format of that: recorded, never probed.
        backing_format: String,
        /// The other files that it refers to: more are not followed.
        #[serde(default)]
        backing_references: References,
        /// Virtual size in bytes.
        size: u64,
    },
    /// A private copy of a file.
    CopyFile {
        /// The original.
        from: String,
        /// The copy.
        to: String,
    },
    /// A config drive.
    BuildConfigDrive {
        /// Its path.
        path: String,
        /// What it tells.
        drive: Box<ConfigDriveSpec>,
    },
    /// The definition of the server's own domain, stored once: the way back.
    SaveDefinition {
        /// As libvirt printed it, with security info.
        xml: String,
    },
    /// The guest is off.
    PowerOff {
        /// How long it may take by itself.
        shutdown: Shutdown,
        /// It was on before: taking the step back starts it again.
        was_on: bool,
        /// The guest agent is asked as well, should the guest not hear the power button.
        #[serde(default)]
        ask_agent: bool,
        /// A guest that does not shut down in time goes on, and the step fails.
        #[serde(default)]
        or_fail: bool,
    },
    /// There is room for a note of so many owners: it is written while the guest is off.
    ReserveNote {
        /// The disks.
        disks: Vec<String>,
        /// The note.
        note: String,
    },
    /// To whom these disks belong while the guest is off is noted, once. libvirt gives them to QEMU's user
    /// for a guest that may not write to them, and does not put that back.
    NoteOwners {
        /// The disks.
        disks: Vec<String>,
        /// Where it is noted.
        note: String,
    },
    /// The disks belong again to whom the note says.
    PutOwnersBack {
        /// Where it is noted; without a note there is nothing to do.
        note: String,
    },
    /// Overlays are about to be written to the originals: from now on discarding them is impossible.
    MarkCommitStarted,
    /// An overlay is written to the disk under it.
    CommitOverlay {
        /// The overlay.
        path: String,
        /// The disk under it.
        base: String,
        /// Format of that: recorded, never probed.
        base_format: String,
        /// The other files that it refers to: more are not followed.
        #[serde(default)]
        base_references: References,
    },
    /// What a discarded overlay holds is gone: the disk under it is about to change, and must not be
    /// mixed with it if the plan is taken back after that.
    EmptyOverlay {
        /// The overlay.
        path: String,
        /// The disk under it.
        base: String,
        /// Format of that: recorded, never probed.
        base_format: String,
    },
    /// The persistent domain.
    DefineDomain {
        /// The XML.
        xml: String,
        /// What the XML carries in its metadata.
        mark: Mark,
        /// The definition before, which taking back restores; without one it undefines.
        before: Option<String>,
    },
    /// The persistent domain is gone, and with it what libvirt keeps beside a definition: the autostart flag, what it notes
    /// of snapshots and checkpoints, saved memory. See [`Step::is_final`]. Its NVRAM file stays: that of a created server goes with the server's folder, and any other
    /// is not ours to remove.
    UndefineDomain {
        /// The definition before.
        before: String,
        /// The state of its TPM goes as well: it was made for this server, and nobody else wants it.
        #[serde(default)]
        tpm_goes: bool,
    },
    /// The guest is started.
    StartDomain {
        /// What the running domain carries in its metadata.
        mark: Mark,
        /// The plan has changed the definition: memory that was saved before is not brought back.
        #[serde(default)]
        fresh: bool,
    },
    /// Memory that was saved of the domain goes: it is of a definition that is no longer its own.
    DropSavedMemory,
    /// The guest agent sets a password.
    SetUserPassword {
        /// The user.
        user: String,
        /// The hash.
        hash: CryptHash,
    },
    /// A folder of the server goes with everything in it.
    RemoveFolder {
        /// Its path.
        path: String,
    },
    /// Nobody stands on the image any more.
    ReleaseImage {
        /// The image.
        image: Uuid,
        /// Who stood on it.
        holder: String,
    },
    /// The saved definition is no longer needed.
    DropSavedDefinition,
    /// The guest's CPUs are stopped.
    Pause {
        /// They ran before: taking the step back lets them run again.
        was_running: bool,
    },
    /// The guest's CPUs run.
    Unpause,
    /// The guest's memory is saved, and the guest is off.
    SaveMemory {
        /// The file that libvirt writes; empty if it is not known.
        #[serde(default)]
        file: String,
        /// Memory of the guest in KiB.
        memory_kib: u64,
    },
    /// The guest is started from its saved memory. See [`Step::is_final`]: ending it would lose that.
    RestoreMemory {
        /// Memory of the guest in KiB.
        memory_kib: u64,
    },
    /// The guest's clock is right again, if its guest agent sets it.
    SetGuestTime,
    /// The guest got an NMI.
    InjectNmi,
    /// The guest's memory is in a file.
    DumpMemory {
        /// The file.
        path: String,
        /// Memory of the guest in KiB.
        memory_kib: u64,
    },
    /// This definition is known to be the server's own, once the outcome stands.
    KnowDefinition {
        /// As libvirt printed it, with security info.
        xml: String,
    },
}

impl Step {
    /// The guest is off, whatever it takes.
    #[must_use]
    pub const fn power_off(shutdown: Shutdown, was_on: bool) -> Self {
        Self::PowerOff {
            shutdown,
            was_on,
            ask_agent: false,
            or_fail: false,
        }
    }

    /// The kind's stable name.
    #[must_use]
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::HoldImage { .. } => "HoldImage",
            Self::MakeFolder { .. } => "MakeFolder",
            Self::CreateOverlay { .. } => "CreateOverlay",
            Self::CopyFile { .. } => "CopyFile",
            Self::BuildConfigDrive { .. } => "BuildConfigDrive",
            Self::SaveDefinition { .. } => "SaveDefinition",
            Self::PowerOff { .. } => "PowerOff",
            Self::ReserveNote { .. } => "ReserveNote",
            Self::NoteOwners { .. } => "NoteOwners",
            Self::PutOwnersBack { .. } => "PutOwnersBack",
            Self::MarkCommitStarted => "MarkCommitStarted",
            Self::CommitOverlay { .. } => "CommitOverlay",
            Self::EmptyOverlay { .. } => "EmptyOverlay",
            Self::DefineDomain { .. } => "DefineDomain",
            Self::UndefineDomain { .. } => "UndefineDomain",
            Self::StartDomain { .. } => "StartDomain",
            Self::DropSavedMemory => "DropSavedMemory",
            Self::SetUserPassword { .. } => "SetUserPassword",
            Self::RemoveFolder { .. } => "RemoveFolder",
            Self::ReleaseImage { .. } => "ReleaseImage",
            Self::DropSavedDefinition => "DropSavedDefinition",
            Self::Pause { .. } => "Pause",
            Self::Unpause => "Unpause",
            Self::SaveMemory { .. } => "SaveMemory",
            Self::RestoreMemory { .. } => "RestoreMemory",
            Self::SetGuestTime => "SetGuestTime",
            Self::InjectNmi => "InjectNmi",
            Self::DumpMemory { .. } => "DumpMemory",
            Self::KnowDefinition { .. } => "KnowDefinition",
        }
    }

    /// What it does, for people.
    #[must_use]
    pub fn describe(&self) -> String {
        match self {
            Self::HoldImage { image, .. } => {
                format!("check image {image} and keep it from being deleted")
            }
            Self::MakeFolder { path } => format!("make the folder {path}"),
            Self::CreateOverlay { path, backing, .. } => {
                format!("create the overlay {path} on {backing}")
            }
            Self::CopyFile { from, to } => format!("copy {from} to {to}"),
            Self::BuildConfigDrive { path, .. } => format!("build the config drive {path}"),
            Self::SaveDefinition { .. } => "save the server's definition".to_owned(),
            Self::PowerOff {
                shutdown: Shutdown { timeout_ms: 0, .. },
                ..
            } => "power the guest off at once".to_owned(),
            Self::PowerOff {
                shutdown,
                or_fail: true,
                ..
            } => {
                format!(
                    "shut the guest down within {} s, or leave it as it is",
                    shutdown.timeout_ms.div_ceil(1000)
                )
            }
            Self::PowerOff { shutdown, .. } => {
                format!(
                    "shut the guest down, and end it after {} s",
                    shutdown.timeout_ms.div_ceil(1000)
                )
            }
            Self::ReserveNote { .. } => "make room for a note of the disks' owners".to_owned(),
            Self::NoteOwners { disks, .. } => {
                format!("note the owners of {}", disks.join(", "))
            }
            Self::PutOwnersBack { .. } => "give the disks back to their owners".to_owned(),
            Self::MarkCommitStarted => "note that the overlays are being committed".to_owned(),
            Self::CommitOverlay { path, base, .. } => format!("write the overlay {path} to {base}"),
            Self::EmptyOverlay { path, .. } => format!("discard what the overlay {path} holds"),
            Self::DefineDomain {
                mark: Mark::Plan(_),
                ..
            } => "define the domain".to_owned(),
            Self::DefineDomain {
                mark: Mark::Own, ..
            } => "restore the server's definition".to_owned(),
            Self::UndefineDomain { .. } => "remove the domain's definition".to_owned(),
            Self::StartDomain { .. } => "start the guest".to_owned(),
            Self::DropSavedMemory => "forget memory that was saved of the rescue".to_owned(),
            Self::SetUserPassword { user, .. } => {
                format!("have the guest agent set the password of {user}")
            }
            Self::RemoveFolder { path } => format!("remove {path}"),
            Self::ReleaseImage { image, .. } => format!("let go of image {image}"),
            Self::DropSavedDefinition => "forget the saved definition".to_owned(),
            Self::Pause { .. } => "stop the guest's CPUs".to_owned(),
            Self::Unpause => "let the guest's CPUs run".to_owned(),
            Self::SaveMemory { memory_kib, .. } => {
                format!("save the guest's memory ({} MiB)", memory_kib / 1024)
            }
            Self::RestoreMemory { .. } => "start the guest from its saved memory".to_owned(),
            Self::SetGuestTime => "have the guest agent set the guest's clock".to_owned(),
            Self::InjectNmi => "inject an NMI into the guest".to_owned(),
            Self::DumpMemory { path, .. } => format!("write the guest's memory to {path}"),
            Self::KnowDefinition { .. } => "note the definition as the server's own".to_owned(),
        }
    }

    /// The longest time it may take, in milliseconds; waiting for libvirt to come back included.
    ///
    /// Measured on a loaded host a define takes milliseconds, a start 0.3 s and a destroy 0.2 s; what
    /// is allowed here is what a sick host may take before the agent gives up.
    #[must_use]
    pub const fn deadline_ms(&self) -> u64 {
        match self {
            // Where the file is not known to be the one that was imported, it is read: at 10 MB/s at least.
            Self::HoldImage { size, .. } => 30_000 + *size / 10_000,
            Self::MakeFolder { .. }
            | Self::SaveDefinition { .. }
            | Self::ReserveNote { .. }
            | Self::NoteOwners { .. }
            | Self::PutOwnersBack { .. }
            | Self::MarkCommitStarted
            | Self::ReleaseImage { .. }
            | Self::DropSavedDefinition
            | Self::KnowDefinition { .. } => 30_000,
            Self::CreateOverlay { .. }
            | Self::EmptyOverlay { .. }
            | Self::BuildConfigDrive { .. }
            | Self::RemoveFolder { .. } => 60_000,
            Self::CopyFile { .. } => 600_000,
            // libvirt itself waits up to 15 s for a QEMU that ignores SIGTERM, then kills it.
            Self::PowerOff { shutdown, .. } => shutdown.timeout_ms.saturating_add(120_000),
            // A big overlay on a slow disk.
            Self::CommitOverlay { .. } => 6 * 3_600_000,
            Self::DefineDomain { .. } | Self::UndefineDomain { .. } | Self::DropSavedMemory => {
                60_000
            }
            Self::StartDomain { .. } => 180_000,
            Self::SetUserPassword { .. } | Self::SetGuestTime => 30_000,
            Self::Pause { .. } | Self::Unpause | Self::InjectNmi => 60_000,
            // At 10 MB/s at least, which is what a disk gives that many guests use.
            Self::SaveMemory { memory_kib, .. }
            | Self::RestoreMemory { memory_kib }
            | Self::DumpMemory { memory_kib, .. } => TURN_WAIT_MS + 180_000 + *memory_kib / 10,
        }
    }

    /// Can what it did not be taken back whole? Once such a step took effect the plan only goes forward, whatever happens:
    /// nothing but clean-up comes after it.
    #[must_use]
    pub const fn is_final(&self) -> bool {
        matches!(
            self,
            Self::UndefineDomain { .. } | Self::RestoreMemory { .. }
        )
    }

    /// Does it change nothing but the state of a running QEMU? A power cut undoes that anyway.
    #[must_use]
    pub const fn is_memory_only(&self) -> bool {
        matches!(
            self,
            Self::Pause { .. } | Self::Unpause | Self::SetGuestTime
        )
    }

    /// The power state that it leaves the guest in, if it is about that.
    #[must_use]
    pub const fn power_after(&self) -> Option<PowerState> {
        match self {
            Self::PowerOff { .. } | Self::SaveMemory { .. } => Some(PowerState::Shutdown),
            Self::StartDomain { .. } | Self::RestoreMemory { .. } | Self::Unpause => {
                Some(PowerState::Running)
            }
            Self::Pause { .. } => Some(PowerState::Paused),
            Self::HoldImage { .. }
            | Self::MakeFolder { .. }
            | Self::CreateOverlay { .. }
            | Self::CopyFile { .. }
            | Self::BuildConfigDrive { .. }
            | Self::SaveDefinition { .. }
            | Self::ReserveNote { .. }
            | Self::NoteOwners { .. }
            | Self::PutOwnersBack { .. }
            | Self::MarkCommitStarted
            | Self::CommitOverlay { .. }
            | Self::EmptyOverlay { .. }
            | Self::DefineDomain { .. }
            | Self::UndefineDomain { .. }
            | Self::DropSavedMemory
            | Self::SetUserPassword { .. }
            | Self::RemoveFolder { .. }
            | Self::ReleaseImage { .. }
            | Self::DropSavedDefinition
            | Self::SetGuestTime
            | Self::InjectNmi
            | Self::DumpMemory { .. }
            | Self::KnowDefinition { .. } => None,
        }
    }

    /// The files it makes, writes or removes, with `create`, `write` or `remove`.
    #[must_use]
    pub fn files(&self) -> Vec<(String, &'static str)> {
        match self {
            Self::MakeFolder { path }
            | Self::CreateOverlay { path, .. }
            | Self::BuildConfigDrive { path, .. } => {
                vec![(path.clone(), "create")]
            }
            Self::CopyFile { to, .. } => vec![(to.clone(), "create")],
            Self::NoteOwners { note, .. } => vec![(note.clone(), "create")],
            Self::DumpMemory { path, .. } => vec![(path.clone(), "create")],
            Self::SaveMemory { file, .. } if !file.is_empty() => vec![(file.clone(), "create")],
            Self::ReserveNote { .. } => Vec::new(),
            Self::CommitOverlay { base, .. } => vec![(base.clone(), "write")],
            Self::EmptyOverlay { path, .. } => vec![(path.clone(), "write")],
            Self::RemoveFolder { path } => vec![(path.clone(), "remove")],
            Self::HoldImage { .. }
            | Self::SaveDefinition { .. }
            | Self::PowerOff { .. }
            | Self::PutOwnersBack { .. }
            | Self::MarkCommitStarted
            | Self::DefineDomain { .. }
            | Self::UndefineDomain { .. }
            | Self::StartDomain { .. }
            | Self::DropSavedMemory
            | Self::SetUserPassword { .. }
            | Self::ReleaseImage { .. }
            | Self::DropSavedDefinition
            | Self::Pause { .. }
            | Self::Unpause
            | Self::SaveMemory { .. }
            | Self::RestoreMemory { .. }
            | Self::SetGuestTime
            | Self::InjectNmi
            | Self::KnowDefinition { .. } => Vec::new(),
        }
    }
}

/// A step in its place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedStep {
    /// Phase.
    pub phase: Phase,
    /// Step.
    pub step: Step,
}

/// What becomes of the rescue in the record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum RescueChange {
    /// It stays as it is.
    Keep,
    /// It begins, when the outcome stands: its times are counted from then.
    Begin {
        /// What is known before. Its times are not.
        rescue: Box<RescueRecord>,
        /// The agent ends it by itself after so many milliseconds.
        timeout_ms: Option<u64>,
    },
    /// It ends.
    End,
    /// Its password was delivered.
    Delivered(PasswordDelivery),
}

/// The change of the record, made in one transaction with the event and the end of the operation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// A new record.
    Insert(Box<ServerRecord>),
    /// The record goes on.
    Change {
        /// The vm state.
        vm_state: VmState,
        /// The rescue.
        rescue: RescueChange,
        /// The devices of the server's own definition, as planning saw it: somebody may have changed them.
        devices: Option<Devices>,
    },
    /// The record goes.
    Remove,
    /// The record stays as it is, a fault included.
    Keep,
    /// The record changes, and nothing else: there are no steps, and the lane is left to whom it belongs.
    Record(RecordChange),
    /// The server waits to be removed, and remembers what it was.
    SoftDelete {
        /// vm state before.
        vm_state: VmState,
        /// Power state before.
        power: PowerState,
        /// Why it was in ERROR, if it was.
        fault: Option<Fault>,
        /// It is removed after so many milliseconds.
        reclaim_in_ms: u64,
    },
    /// A soft-deleted server is what it was.
    Restore {
        /// The vm state.
        vm_state: VmState,
        /// Why it is in ERROR, if it is.
        fault: Option<Fault>,
    },
}

/// A plan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// Its id, which is the operation's.
    pub id: Uuid,
    /// Server.
    pub server: Uuid,
    /// Verb.
    pub verb: Verb,
    /// The record to begin with, if the verb makes one. It goes if the plan is taken back.
    pub initial: Option<Box<ServerRecord>>,
    /// Steps in order.
    pub steps: Vec<PlannedStep>,
    /// The change of the record, after the last step that is not of [`Phase::CleanUp`].
    pub outcome: Outcome,
    /// Warnings.
    pub warnings: Vec<Warning>,
    /// The ways by which a password will be delivered.
    pub password_delivery: Vec<PasswordDelivery>,
}

impl Plan {
    /// The change of the record, if that is all there is to do.
    #[must_use]
    pub fn record_change(&self) -> Option<&RecordChange> {
        match &self.outcome {
            Outcome::Record(change) if self.steps.is_empty() => Some(change),
            _ => None,
        }
    }

    /// How many steps come before the outcome.
    #[must_use]
    pub fn steps_before_commit(&self) -> usize {
        self.steps
            .iter()
            .filter(|step| step.phase != Phase::CleanUp)
            .count()
    }

    /// Does it change nothing but the state of a running QEMU? Then nothing of it has to outlive a power
    /// cut: the guest does not either.
    #[must_use]
    pub fn is_memory_only(&self) -> bool {
        !self.steps.is_empty()
            && self
                .steps
                .iter()
                .all(|planned| planned.step.is_memory_only())
    }

    /// Does it hold a password's hash?
    #[must_use]
    pub fn holds_password(&self) -> bool {
        self.steps.iter().any(|planned| {
            matches!(
                planned.step,
                Step::BuildConfigDrive { .. } | Step::SetUserPassword { .. }
            )
        })
    }

    /// The power state that it leaves the guest in, with the index of the step that does; `None` if
    /// it leaves it alone.
    #[must_use]
    pub fn power_after(&self) -> Option<(usize, PowerState)> {
        self.steps
            .iter()
            .enumerate()
            .rev()
            .find_map(|(index, planned)| Some((index, planned.step.power_after()?)))
    }
}
