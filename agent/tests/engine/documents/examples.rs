// SPDX-License-Identifier: Apache-2.0
//! One document of every kind with every field set.

use salvor_agent::{
    core::{
        action::{Shutdown, Verb},
        backing::References,
        change::{FieldChange, RecordChange},
        image::{FileIdentity, ImageFormat, ImageRecord},
        incident::{Incident, IncidentKind, IncidentReport},
        operation::{
            GuestStop, HostReport, OperationRecord, OperationState, StepRecord, StepState,
        },
        password::CryptHash,
        plan::{ConfigDriveSpec, Mark, Outcome, Phase, Plan, PlannedStep, RescueChange, Step},
        reason::{Reason, Refusal, Warning, WarningName},
        reconcile::{Mismatch, Mismatched},
        record::{
            AgentSeen, Devices, DiskSummary, Fault, Flavor, Lock, LockOwner, NicSummary, Origin,
            Overlay, OverlayDisposition, Owner, PasswordDelivery, Protection, RescueBus,
            RescueDevice, RescueDisk, RescueMode, RescueRecord, ServerRecord, SoftDeletion,
        },
        state::{ObservationSource, PowerObservation, PowerState, TaskState, VmState},
    },
    store::Change,
};
use uuid::Uuid;

const SERVER: Uuid = Uuid::from_u128(0x5e71_0000_0000_4000_8000_0000_0000_0001);
const IMAGE: Uuid = Uuid::from_u128(0x1a6e_0000_0000_4000_8000_0000_0000_0001);
const PLAN: Uuid = Uuid::from_u128(0x91a0_0000_0000_4000_8000_0000_0000_0001);

fn text(text: &str) -> String {
    text.to_owned()
}

fn seen(state: PowerState, observed_at_ms: i64) -> PowerObservation {
    PowerObservation {
        state,
        reason: text("booted"),
        observed_at_ms,
        source: ObservationSource::Event,
    }
}

fn disks() -> Vec<DiskSummary> {
    vec![DiskSummary {
        target: text("vda"),
        bus: text("virtio"),
        device: text("disk"),
        source: text("/d/disk"),
        format: text("qcow2"),
        read_only: false,
        root: true,
    }]
}

fn nics() -> Vec<NicSummary> {
    vec![NicSummary {
        mac: text("52:54:00:00:00:01"),
        kind: text("network"),
        source: text("default"),
        model: text("virtio"),
    }]
}

fn hash() -> CryptHash {
    CryptHash(text("$6$salt$hash"))
}

fn rescue() -> RescueRecord {
    RescueRecord {
        plan: PLAN,
        image_id: IMAGE,
        mode: RescueMode::Stable,
        bus: RescueBus::Usb,
        device: RescueDevice::Cdrom,
        protection: Protection::Overlay,
        power_before: PowerState::Running,
        started_at_ms: 1_700_000_001_000,
        expires_at_ms: Some(1_700_000_002_000),
        expiry_overlay: Some(OverlayDisposition::Commit),
        disks: vec![RescueDisk {
            target: text("vdb"),
            bus: text("virtio"),
            original_target: text("vda"),
            role: text("original"),
            source: text("/d/vda.overlay"),
        }],
        overlays: vec![Overlay {
            path: text("/d/vda.overlay"),
            base: text("/d/disk"),
            base_format: text("qcow2"),
            base_references: references(),
        }],
        commit_started: true,
        password_delivered: vec![PasswordDelivery::ConfigDrive],
        password_for_agent: Some(hash()),
        password_user: text("root"),
        password_refusals: 2,
    }
}

fn references() -> References {
    References {
        backing: Some(text("/d/base")),
        backing_format: Some(text("raw")),
        data_file: Some(text("/d/data")),
    }
}

pub(super) fn server() -> ServerRecord {
    ServerRecord {
        id: SERVER,
        name: text("web-1"),
        origin: Origin::Created,
        domain_name: text("salvor-5e710000"),
        vm_state: VmState::Error,
        task_state: Some(TaskState::Unrescuing),
        power: seen(PowerState::Unknown, 1_700_000_003_000),
        last_known_power: Some(seen(PowerState::Running, 1_700_000_002_000)),
        image_id: Some(IMAGE),
        flavor: Flavor {
            vcpus: 2,
            memory_mib: 512,
            disk_gib: 10,
        },
        disks: disks(),
        nics: nics(),
        rescue: Some(rescue()),
        fault: Some(fault()),
        operation: Some(PLAN),
        operation_verb: Some(Verb::Rescue),
        revision: 7,
        created_at_ms: 1_700_000_000_000,
        updated_at_ms: 1_700_000_005_000,
        settled_at_ms: 1_700_000_004_500,
        metadata: [(text("role"), text("db"))].into(),
        hostname: text("web-1"),
        public_keys: [(text("laptop"), text("ssh-ed25519 AAAA"))].into(),
        guest_agent: true,
        mismatch: Some(Mismatched {
            what: Mismatch::IoError,
            since_ms: 1_700_000_000_400,
        }),
        drift_since_ms: Some(1_700_000_000_500),
        agent: Some(AgentSeen {
            connected: true,
            at_ms: 1_700_000_000_600,
        }),
        owner: Owner {
            project_id: text("p-1"),
            user_id: text("u-1"),
        },
        lock: Some(lock()),
        description: Some(text("the first one")),
        tags: vec![text("blue")],
        access_ipv4: Some([192, 0, 2, 1].into()),
        access_ipv6: Some([0x2001, 0xdb8, 0, 0, 0, 0, 0, 1].into()),
        shutdown_timeout_ms: Some(90_000),
        autostart: true,
        autostart_order: Some(3),
        deletion: Some(SoftDeletion {
            vm_state: VmState::Error,
            power: PowerState::Running,
            fault: Some(fault()),
            at_ms: 1_700_000_006_000,
            reclaim_at_ms: 1_700_000_007_000,
        }),
    }
}

fn lock() -> Lock {
    Lock {
        by: LockOwner::Admin,
        reason: Some(text("audit")),
        at_ms: 1_700_000_001_000,
        expires_at_ms: Some(1_700_000_009_000),
    }
}

fn fault() -> Fault {
    Fault {
        reason: Reason::RollbackFailed,
        message: text("the disk is full"),
        step: text("DefineDomain"),
        revert_step: text("PowerOff"),
        left_behind: vec![text("/d/rescue")],
        at_ms: 1_700_000_004_000,
    }
}

fn host() -> HostReport {
    HostReport {
        power: PowerState::Shutdown,
        power_reason: text("destroyed"),
        defined: true,
        rescue_domain: true,
        saved_memory: true,
        missing_disks: [(text("vda"), text("/d/disk"))].into(),
        unknown: text("disk vdb cannot be looked at"),
        at_ms: 1_700_000_003_000,
    }
}

fn warning() -> Warning {
    Warning {
        name: WarningName::SpaceMayRunOut,
        message: text("the disk may grow"),
    }
}

pub(super) fn operation() -> OperationRecord {
    OperationRecord {
        id: PLAN,
        server: SERVER,
        verb: Verb::Rescue,
        request_id: Some(text("req-1")),
        caller: text("uid 0"),
        state: OperationState::Reverting,
        steps: vec![StepRecord {
            kind: text("PowerOff"),
            phase: text("switch"),
            description: text("shut the guest down"),
            state: StepState::RevertFailed,
            started_at_ms: Some(1_700_000_001_000),
            ended_at_ms: Some(1_700_000_002_000),
            message: text("it does not answer"),
            untouched: true,
        }],
        created_at_ms: 1_700_000_000_000,
        ended_at_ms: Some(1_700_000_003_000),
        error: Some(
            Refusal::new(Reason::ServerBusy, "it is busy").about("operation", "operations/1"),
        ),
        guest_stop: Some(GuestStop::Forced),
        cancel_requested: true,
        server_goes: true,
        recoveries: 1,
        warnings: vec![warning()],
        user: text("u-1"),
        project: text("p-1"),
        host: Some(host()),
    }
}

pub(super) fn image() -> ImageRecord {
    ImageRecord {
        id: IMAGE,
        name: text("rescue"),
        format: ImageFormat::Iso,
        size: 4_096,
        virtual_size: 8_192,
        sha256: text("ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
        file: Some(FileIdentity {
            inode: 11,
            size: 12,
            modified: (13, 14),
        }),
        properties: [(text("hw_rescue_bus"), text("usb"))].into(),
        created_at_ms: 1_700_000_000_000,
    }
}

fn prepare() -> Vec<Step> {
    vec![
        Step::HoldImage {
            image: IMAGE,
            path: text("/i/image.iso"),
            size: 4_096,
            holder: text("servers/5e710000/rescue/91a00000"),
        },
        Step::MakeFolder { path: text("/d") },
        Step::CreateOverlay {
            path: text("/d/disk"),
            backing: text("/i/image.qcow2"),
            backing_format: text("qcow2"),
            backing_references: references(),
            size: 1 << 30,
        },
        Step::CopyFile {
            from: text("/n/nvram.fd"),
            to: text("/d/nvram.fd"),
        },
        Step::BuildConfigDrive {
            path: text("/d/disk.config"),
            drive: Box::new(ConfigDriveSpec {
                instance_id: PLAN,
                hostname: text("web-1"),
                name: text("web-1"),
                public_keys: [(text("laptop"), text("ssh-ed25519 AAAA"))].into(),
                password: Some(hash()),
                password_user: text("root"),
                user_data: Some(vec![35, 255]),
                metadata: [(text("role"), text("db"))].into(),
            }),
        },
        Step::ReserveNote {
            disks: vec![text("/d/disk")],
            note: text("/d/owners"),
        },
        Step::SaveDefinition {
            xml: text("<domain/>"),
        },
    ]
}

fn switch() -> Vec<Step> {
    vec![
        Step::PowerOff {
            shutdown: Shutdown {
                timeout_ms: 60_000,
                retry_ms: 10_000,
            },
            was_on: true,
            ask_agent: true,
            or_fail: true,
        },
        Step::Pause { was_running: true },
        Step::Unpause,
        Step::SaveMemory {
            file: text("/save/web.save"),
            memory_kib: 1 << 20,
        },
        Step::InjectNmi,
        Step::DumpMemory {
            path: text("/d/dumps/1.elf"),
            memory_kib: 1 << 20,
        },
        Step::MarkCommitStarted,
        Step::CommitOverlay {
            path: text("/d/vda.overlay"),
            base: text("/d/disk"),
            base_format: text("qcow2"),
            base_references: references(),
        },
        Step::EmptyOverlay {
            path: text("/d/vda.overlay"),
            base: text("/d/disk"),
            base_format: text("qcow2"),
        },
        Step::NoteOwners {
            disks: vec![text("/d/disk")],
            note: text("/d/owners"),
        },
        Step::PutOwnersBack {
            note: text("/d/owners"),
        },
        Step::DropSavedMemory,
        Step::DefineDomain {
            xml: text("<domain/>"),
            mark: Mark::Plan(PLAN),
            before: Some(text("<domain/>")),
        },
        Step::UndefineDomain {
            before: text("<domain/>"),
            tpm_goes: true,
        },
        Step::StartDomain {
            mark: Mark::Own,
            fresh: true,
        },
        Step::SetUserPassword {
            user: text("root"),
            hash: hash(),
        },
        Step::RestoreMemory {
            memory_kib: 1 << 20,
        },
    ]
}

fn clean_up() -> Vec<Step> {
    vec![
        Step::RemoveFolder {
            path: text("/d/rescue"),
        },
        Step::ReleaseImage {
            image: IMAGE,
            holder: text("servers/5e710000/rescue/91a00000"),
        },
        Step::DropSavedDefinition,
        Step::SetGuestTime,
        Step::KnowDefinition {
            xml: text("<domain/>"),
        },
    ]
}

/// The first plan has every step and every field; the others have the other outcomes.
pub(super) fn plans() -> Vec<(&'static str, Plan)> {
    let phases = [
        (Phase::Prepare, prepare()),
        (Phase::Switch, switch()),
        (Phase::CleanUp, clean_up()),
    ];
    let planned = |(phase, steps): (Phase, Vec<Step>)| {
        steps
            .into_iter()
            .map(move |step| PlannedStep { phase, step })
    };
    let change = |rescue| Outcome::Change {
        vm_state: VmState::Rescued,
        rescue,
        devices: Some(Devices {
            disks: disks(),
            nics: nics(),
            guest_agent: true,
            flavor: Some(server().flavor),
        }),
    };
    let every_step = Plan {
        id: PLAN,
        server: SERVER,
        verb: Verb::Rescue,
        initial: Some(Box::new(server())),
        steps: phases.into_iter().flat_map(planned).collect(),
        outcome: change(RescueChange::Begin {
            rescue: Box::new(rescue()),
            timeout_ms: Some(7_200_000),
        }),
        warnings: vec![warning()],
        password_delivery: vec![PasswordDelivery::ConfigDrive, PasswordDelivery::GuestAgent],
    };
    let with = |outcome| Plan {
        initial: None,
        steps: Vec::new(),
        outcome,
        ..every_step.clone()
    };
    let others = [
        ("insert", with(Outcome::Insert(Box::new(server())))),
        ("keep", with(Outcome::Keep)),
        ("remove", with(Outcome::Remove)),
        ("rescue-stays", with(change(RescueChange::Keep))),
        ("rescue-ends", with(change(RescueChange::End))),
        (
            "password-delivered",
            with(change(RescueChange::Delivered(
                PasswordDelivery::GuestAgent,
            ))),
        ),
        ("nothing", with(Outcome::Record(RecordChange::Nothing))),
        ("lock", with(Outcome::Record(RecordChange::Lock(lock())))),
        ("unlock", with(Outcome::Record(RecordChange::Unlock))),
        (
            "update",
            with(Outcome::Record(RecordChange::Update(vec![
                FieldChange::Name(text("db-1")),
                FieldChange::Description(Some(text("the first one"))),
                FieldChange::Metadata([(text("role"), text("db"))].into()),
                FieldChange::Tags(vec![text("blue")]),
                FieldChange::AccessIpv4(Some([192, 0, 2, 1].into())),
                FieldChange::AccessIpv6(None),
                FieldChange::ShutdownTimeout(Some(90_000)),
                FieldChange::Autostart(false),
                FieldChange::AutostartOrder(Some(3)),
            ]))),
        ),
        (
            "reset",
            with(Outcome::Record(RecordChange::Reset {
                vm_state: VmState::Error,
                fault: Some(fault()),
                host: host(),
            })),
        ),
        (
            "soft-delete",
            with(Outcome::SoftDelete {
                vm_state: VmState::Active,
                power: PowerState::Running,
                fault: Some(fault()),
                reclaim_in_ms: 3_600_000,
            }),
        ),
        (
            "restore",
            with(Outcome::Restore {
                vm_state: VmState::Active,
                fault: Some(fault()),
            }),
        ),
    ];
    [("every-step", every_step)]
        .into_iter()
        .chain(others)
        .collect()
}

pub(super) fn changes() -> [(&'static str, Change); 4] {
    [
        ("server", Change::Server(Box::new(server()))),
        ("removed", Change::Removed(Verb::Delete)),
        (
            "guest",
            Change::Guest(IncidentReport {
                incident: Incident::told(
                    IncidentKind::IoError,
                    "virtio-disk0",
                    "/d",
                    "no space",
                    "pause",
                ),
                count: 2,
                first_at_ms: 1_700_000_000_600,
                last_at_ms: 1_700_000_000_700,
            }),
        ),
        ("operation", Change::Operation(Box::new(operation()))),
    ]
}
