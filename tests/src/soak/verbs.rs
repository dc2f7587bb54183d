// SPDX-License-Identifier: Apache-2.0
//! What can be asked of a server: which verbs make sense in which state, and requests with arguments by
//! chance.

use std::time::Duration;

use prost_types::FieldMask;
use rand::Rng as _;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use salvor_proto::google::longrunning::Operation;
use salvor_proto::v1::plan_action_request::Action;
use salvor_proto::v1::{
    AcceptServerDriftRequest, ChangeServerPasswordRequest, DeleteServerRequest, DiskProtection,
    DumpServerMemoryRequest, ForceDeleteServerRequest, LockServerRequest, OverlayDisposition,
    PauseServerRequest, RebootOnTimeout, RebootServerRequest, RebootType, ReleaseServerRequest,
    RescueMode, RescueServerRequest, ResetServerStateRequest, RestoreServerDefinitionRequest,
    RestoreServerRequest, ResumeServerRequest, Server, StartServerRequest, StopServerRequest,
    SuspendServerRequest, TriggerCrashDumpRequest, UnlockServerRequest, UnpauseServerRequest,
    UnrescuePower, UnrescueServerRequest, UpdateServerRequest, VmState,
};
use tonic::{Request, Status};
use uuid::Uuid;

use crate::client::Client;

/// The image that rescues boot.
pub(super) const RESCUE: &str = "soak-rescue";

/// The project that all servers of the soak belong to.
const PROJECT: &str = "soak";

/// Everything that is asked of a server, create and adopt apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Verb {
    Start,
    Stop,
    StopForce,
    RebootSoft,
    RebootHard,
    Pause,
    Unpause,
    Suspend,
    Resume,
    Rescue,
    Unrescue,
    Lock,
    Unlock,
    Update,
    ResetActive,
    ResetError,
    Delete,
    Restore,
    ForceDelete,
    Release,
    CrashDump,
    DumpMemory,
    SetPassword,
    AcceptDrift,
    RestoreDefinition,
}

/// All of them.
const VERBS: &[Verb] = &[
    Verb::Start,
    Verb::Stop,
    Verb::StopForce,
    Verb::RebootSoft,
    Verb::RebootHard,
    Verb::Pause,
    Verb::Unpause,
    Verb::Suspend,
    Verb::Resume,
    Verb::Rescue,
    Verb::Unrescue,
    Verb::Lock,
    Verb::Unlock,
    Verb::Update,
    Verb::ResetActive,
    Verb::ResetError,
    Verb::Delete,
    Verb::Restore,
    Verb::ForceDelete,
    Verb::Release,
    Verb::CrashDump,
    Verb::DumpMemory,
    Verb::SetPassword,
    Verb::AcceptDrift,
    Verb::RestoreDefinition,
];

impl Verb {
    /// Its name in the table.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Stop => "stop",
            Self::StopForce => "stop --force",
            Self::RebootSoft => "reboot soft",
            Self::RebootHard => "reboot hard",
            Self::Pause => "pause",
            Self::Unpause => "unpause",
            Self::Suspend => "suspend",
            Self::Resume => "resume",
            Self::Rescue => "rescue",
            Self::Unrescue => "unrescue",
            Self::Lock => "lock",
            Self::Unlock => "unlock",
            Self::Update => "update",
            Self::ResetActive => "reset-state active",
            Self::ResetError => "reset-state error",
            Self::Delete => "soft delete",
            Self::Restore => "restore",
            Self::ForceDelete => "force-delete",
            Self::Release => "release",
            Self::CrashDump => "crash dump",
            Self::DumpMemory => "memory dump",
            Self::SetPassword => "set-password",
            Self::AcceptDrift => "accept drift",
            Self::RestoreDefinition => "restore definition",
        }
    }

    /// Is the server gone when this is done, now or a while later?
    pub(super) const fn removes(self) -> bool {
        matches!(self, Self::Delete | Self::ForceDelete | Self::Release)
    }

    /// One for a server in this state: mostly one that makes sense, now and then any.
    pub(super) fn choose(random: &mut StdRng, state: VmState) -> Self {
        let of: &[Self] = match random.random_range(0..100) {
            0..15 => VERBS,
            15..25 => &[Self::Lock, Self::Unlock, Self::Unlock, Self::Update],
            // A server that goes is made anew, which takes longer than most verbs.
            25..28 => &[Self::Delete, Self::Delete, Self::ForceDelete, Self::Release],
            28..31 => &[
                Self::ResetActive,
                Self::ResetError,
                Self::DumpMemory,
                Self::AcceptDrift,
                Self::RestoreDefinition,
            ],
            _ => Self::sensible(state),
        };
        of.choose(random).copied().unwrap_or(Self::Update)
    }

    fn sensible(state: VmState) -> &'static [Self] {
        match state {
            VmState::Active => &[
                Self::Stop,
                Self::StopForce,
                Self::RebootSoft,
                Self::RebootHard,
                Self::Pause,
                Self::Pause,
                Self::Suspend,
                Self::Suspend,
                Self::Rescue,
                Self::CrashDump,
            ],
            VmState::Paused => &[
                Self::Unpause,
                Self::Unpause,
                Self::Unpause,
                Self::RebootHard,
                Self::CrashDump,
            ],
            VmState::Suspended => &[Self::Resume, Self::Resume, Self::Resume, Self::RebootHard],
            VmState::Stopped => &[Self::Start, Self::Start, Self::RebootHard, Self::Rescue],
            VmState::Rescued => &[Self::Unrescue, Self::Unrescue, Self::CrashDump],
            VmState::SoftDeleted => &[Self::Restore, Self::Restore, Self::ForceDelete],
            VmState::Error => &[
                Self::ResetActive,
                Self::ResetActive,
                Self::Unrescue,
                Self::RebootHard,
                Self::Stop,
            ],
            _ => &[Self::Update],
        }
    }

    /// The request, with arguments by chance.
    pub(super) fn action(self, random: &mut StdRng, known: &Server) -> Action {
        let server = known.id.clone();
        let request_id = Uuid::from_u128(random.random()).to_string();
        macro_rules! plain {
            ($arm:ident, $request:ident) => {
                Action::$arm($request { request_id, server })
            };
        }
        match self {
            Self::Start => plain!(Start, StartServerRequest),
            Self::Pause => plain!(Pause, PauseServerRequest),
            Self::Unpause => plain!(Unpause, UnpauseServerRequest),
            Self::Suspend => plain!(Suspend, SuspendServerRequest),
            Self::Resume => plain!(Resume, ResumeServerRequest),
            Self::Unlock => plain!(Unlock, UnlockServerRequest),
            Self::Delete => plain!(Delete, DeleteServerRequest),
            Self::Restore => plain!(Restore, RestoreServerRequest),
            Self::ForceDelete => plain!(ForceDelete, ForceDeleteServerRequest),
            Self::Release => plain!(Release, ReleaseServerRequest),
            Self::CrashDump => plain!(TriggerCrashDump, TriggerCrashDumpRequest),
            Self::DumpMemory => plain!(DumpMemory, DumpServerMemoryRequest),
            Self::AcceptDrift => plain!(AcceptDrift, AcceptServerDriftRequest),
            Self::RestoreDefinition => plain!(RestoreDefinition, RestoreServerDefinitionRequest),
            Self::Stop => Action::Stop(StopServerRequest {
                request_id,
                server,
                shutdown_timeout: random.random_bool(0.5).then(|| millis(random, 1..3000)),
            }),
            Self::StopForce => Action::Stop(StopServerRequest {
                request_id,
                server,
                shutdown_timeout: Some(prost_types::Duration::default()),
            }),
            Self::RebootSoft => Action::Reboot(RebootServerRequest {
                request_id,
                server,
                r#type: RebootType::Soft.into(),
                on_timeout: one(random, &[RebootOnTimeout::Hard, RebootOnTimeout::Fail]).into(),
                shutdown_timeout: Some(millis(random, 500..4000)),
            }),
            Self::RebootHard => Action::Reboot(RebootServerRequest {
                request_id,
                server,
                r#type: RebootType::Hard.into(),
                ..RebootServerRequest::default()
            }),
            Self::ResetActive | Self::ResetError => Action::ResetState(ResetServerStateRequest {
                request_id,
                server,
                state: if self == Self::ResetActive {
                    VmState::Active.into()
                } else {
                    VmState::Error.into()
                },
            }),
            Self::SetPassword => Action::ChangePassword(ChangeServerPasswordRequest {
                request_id,
                server,
                ..ChangeServerPasswordRequest::default()
            }),
            Self::Lock => Action::Lock(LockServerRequest {
                request_id,
                server,
                reason: random.random_bool(0.5).then(|| "soak".to_owned()),
                // Mostly short: a locked server has little to do.
                expires_in: random.random_bool(0.9).then(|| millis(random, 1000..5000)),
            }),
            Self::Update => Action::Update(update(random, request_id, server)),
            Self::Rescue => Action::Rescue(rescue(random, request_id, server)),
            Self::Unrescue => Action::Unrescue(unrescue(random, request_id, known)),
        }
    }
}

fn rescue(random: &mut StdRng, request_id: String, server: String) -> RescueServerRequest {
    let protection = one(
        random,
        &[
            DiskProtection::ReadWrite,
            DiskProtection::Overlay,
            DiskProtection::Overlay,
            DiskProtection::ReadOnly,
        ],
    );
    let timeout = random.random_bool(0.2).then(|| millis(random, 1000..6000));
    let timeout_overlay = if timeout.is_some() && protection == DiskProtection::Overlay {
        one(
            random,
            &[OverlayDisposition::Commit, OverlayDisposition::Discard],
        )
    } else {
        OverlayDisposition::Unspecified
    };
    let modes = [
        RescueMode::Unspecified,
        RescueMode::Classic,
        RescueMode::Stable,
    ];
    RescueServerRequest {
        request_id,
        server,
        image: Some(RESCUE.to_owned()),
        mode: one(random, &modes).into(),
        disk_protection: protection.into(),
        timeout,
        timeout_overlay: timeout_overlay.into(),
        shutdown_timeout: Some(millis(random, 0..1500)),
        ..RescueServerRequest::default()
    }
}

/// An unrescue that says mostly what the rescue in force needs to be told.
fn unrescue(random: &mut StdRng, request_id: String, known: &Server) -> UnrescueServerRequest {
    let overlays = known
        .rescue
        .as_ref()
        .is_some_and(|rescue| rescue.disk_protection() == DiskProtection::Overlay);
    let overlay = if overlays != random.random_bool(0.1) {
        one(
            random,
            &[OverlayDisposition::Commit, OverlayDisposition::Discard],
        )
    } else {
        OverlayDisposition::Unspecified
    };
    UnrescueServerRequest {
        request_id,
        server: known.id.clone(),
        overlay: overlay.into(),
        power: one(random, &[UnrescuePower::Start, UnrescuePower::Restore]).into(),
        shutdown_timeout: Some(millis(random, 0..1500)),
    }
}

fn update(random: &mut StdRng, request_id: String, server: String) -> UpdateServerRequest {
    let fields = [
        "description",
        "metadata",
        "tags",
        "access_ipv4",
        "shutdown_timeout",
        "autostart",
    ];
    let count = random.random_range(1..=fields.len());
    let paths = fields.choose_multiple(random, count);
    let number: u8 = random.random();
    UpdateServerRequest {
        request_id,
        server,
        update_mask: Some(FieldMask {
            paths: paths.map(|path| (*path).to_owned()).collect(),
        }),
        description: format!("number {number}"),
        metadata: [("number".to_owned(), number.to_string())].into(),
        tags: vec![format!("tag-{number}")],
        access_ipv4: format!("192.0.2.{number}"),
        shutdown_timeout: Some(millis(random, 0..3000)),
        autostart: random.random(),
        ..UpdateServerRequest::default()
    }
}

/// One of several.
fn one<T: Copy>(random: &mut StdRng, of: &[T]) -> T {
    *of.choose(random).expect("there is one to choose")
}

fn millis(random: &mut StdRng, range: std::ops::Range<u64>) -> prost_types::Duration {
    let chosen = Duration::from_millis(random.random_range(range));
    chosen.try_into().expect("a short time")
}

/// For whom a call is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Caller {
    /// The administrator of the host.
    Admin,
    /// The administrator on behalf of the project.
    ForProject,
    /// A member of the project.
    Member,
}

impl Caller {
    /// Anybody.
    pub(super) fn choose(random: &mut StdRng) -> Self {
        one(
            random,
            &[Self::Admin, Self::ForProject, Self::Member, Self::Member],
        )
    }

    /// The message as a call for this one.
    pub(super) fn says<T>(self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        let headers = request.metadata_mut();
        if self == Self::Member {
            headers.insert("x-salvor-role", "member".parse().expect("ASCII"));
        }
        if self != Self::Admin {
            headers.insert("x-salvor-project", PROJECT.parse().expect("ASCII"));
        }
        request
    }
}

/// Asks for an action.
pub(super) async fn submit(
    client: &mut Client,
    action: Action,
    caller: Caller,
) -> Result<Operation, Status> {
    let servers = &mut client.servers;
    macro_rules! ask {
        ($method:ident, $request:expr) => {
            servers
                .$method(caller.says($request))
                .await?
                .into_inner()
                .operation
        };
    }
    let operation = match action {
        Action::Create(request) => ask!(create_server, request),
        Action::Adopt(request) => ask!(adopt_server, request),
        Action::Release(request) => ask!(release_server, request),
        Action::Delete(request) => ask!(delete_server, request),
        Action::Start(request) => ask!(start_server, request),
        Action::Stop(request) => ask!(stop_server, request),
        Action::Rescue(request) => ask!(rescue_server, request),
        Action::Unrescue(request) => ask!(unrescue_server, request),
        Action::Reboot(request) => ask!(reboot_server, request),
        Action::Pause(request) => ask!(pause_server, request),
        Action::Unpause(request) => ask!(unpause_server, request),
        Action::Suspend(request) => ask!(suspend_server, request),
        Action::Resume(request) => ask!(resume_server, request),
        Action::TriggerCrashDump(request) => ask!(trigger_crash_dump, request),
        Action::DumpMemory(request) => ask!(dump_server_memory, request),
        Action::ChangePassword(request) => ask!(change_server_password, request),
        Action::Lock(request) => ask!(lock_server, request),
        Action::Unlock(request) => ask!(unlock_server, request),
        Action::Update(request) => ask!(update_server, request),
        Action::ResetState(request) => ask!(reset_server_state, request),
        Action::Restore(request) => ask!(restore_server, request),
        Action::ForceDelete(request) => ask!(force_delete_server, request),
        Action::AcceptDrift(request) => ask!(accept_server_drift, request),
        Action::RestoreDefinition(request) => ask!(restore_server_definition, request),
    };
    Ok(operation.expect("an action's answer has an operation"))
}
