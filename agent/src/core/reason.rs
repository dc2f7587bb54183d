// SPDX-License-Identifier: Apache-2.0
//! Why something is refused or failed: the one list of reasons that every error of the API carries.
//!
//! A reason is stable: clients may decide by it. `docs/REASONS.md` is made from this table, and a
//! test holds the two together.

use super::state::named_states;

named_states! {
    /// A reason (`ErrorInfo.reason` of an error, `Fault.reason` of a server).
    pub enum Reason {
        /// See [`Reason::explanation`].
        InvalidField = "INVALID_FIELD",
        /// See [`Reason::explanation`].
        InvalidRequest = "INVALID_REQUEST",
        /// See [`Reason::explanation`].
        NotSupported = "NOT_SUPPORTED",
        /// See [`Reason::explanation`].
        UnknownCaller = "UNKNOWN_CALLER",
        /// See [`Reason::explanation`].
        RequestIdReused = "REQUEST_ID_REUSED",
        /// See [`Reason::explanation`].
        ServerNotFound = "SERVER_NOT_FOUND",
        /// See [`Reason::explanation`].
        AmbiguousName = "AMBIGUOUS_NAME",
        /// See [`Reason::explanation`].
        DomainNotFound = "DOMAIN_NOT_FOUND",
        /// See [`Reason::explanation`].
        ImageNotFound = "IMAGE_NOT_FOUND",
        /// See [`Reason::explanation`].
        ImageUnsafe = "IMAGE_UNSAFE",
        /// See [`Reason::explanation`].
        ImageDamaged = "IMAGE_DAMAGED",
        /// See [`Reason::explanation`].
        ImageInUse = "IMAGE_IN_USE",
        /// See [`Reason::explanation`].
        ImageExists = "IMAGE_EXISTS",
        /// See [`Reason::explanation`].
        ImageChecksum = "IMAGE_CHECKSUM",
        /// See [`Reason::explanation`].
        ImageTooLarge = "IMAGE_TOO_LARGE",
        /// See [`Reason::explanation`].
        OperationNotFound = "OPERATION_NOT_FOUND",
        /// See [`Reason::explanation`].
        InvalidState = "INVALID_STATE",
        /// See [`Reason::explanation`].
        ServerBusy = "SERVER_BUSY",
        /// See [`Reason::explanation`].
        ServerExists = "SERVER_EXISTS",
        /// See [`Reason::explanation`].
        AlreadyRescued = "ALREADY_RESCUED",
        /// See [`Reason::explanation`].
        NotRescued = "NOT_RESCUED",
        /// See [`Reason::explanation`].
        NoRescueImage = "NO_RESCUE_IMAGE",
        /// See [`Reason::explanation`].
        SavedMemory = "SAVED_MEMORY",
        /// See [`Reason::explanation`].
        NoSavedMemory = "NO_SAVED_MEMORY",
        /// See [`Reason::explanation`].
        GuestStillOn = "GUEST_STILL_ON",
        /// See [`Reason::explanation`].
        DomainTransient = "DOMAIN_TRANSIENT",
        /// See [`Reason::explanation`].
        NotAdopted = "NOT_ADOPTED",
        /// See [`Reason::explanation`].
        DomainUnsupported = "DOMAIN_UNSUPPORTED",
        /// See [`Reason::explanation`].
        DomainInvalid = "DOMAIN_INVALID",
        /// See [`Reason::explanation`].
        DomainChanged = "DOMAIN_CHANGED",
        /// See [`Reason::explanation`].
        DiskChanged = "DISK_CHANGED",
        /// See [`Reason::explanation`].
        DiskMissing = "DISK_MISSING",
        /// See [`Reason::explanation`].
        OverlayDecisionNeeded = "OVERLAY_DECISION_NEEDED",
        /// See [`Reason::explanation`].
        NoOverlays = "NO_OVERLAYS",
        /// See [`Reason::explanation`].
        CommitStarted = "COMMIT_STARTED",
        /// See [`Reason::explanation`].
        NoSpace = "NO_SPACE",
        /// See [`Reason::explanation`].
        LibvirtUnavailable = "LIBVIRT_UNAVAILABLE",
        /// See [`Reason::explanation`].
        LibvirtRefused = "LIBVIRT_REFUSED",
        /// See [`Reason::explanation`].
        DeadlineExceeded = "DEADLINE_EXCEEDED",
        /// See [`Reason::explanation`].
        GuestAgentUnavailable = "GUEST_AGENT_UNAVAILABLE",
        /// See [`Reason::explanation`].
        GuestAgentRefused = "GUEST_AGENT_REFUSED",
        /// See [`Reason::explanation`].
        StorageFailed = "STORAGE_FAILED",
        /// See [`Reason::explanation`].
        Cancelled = "CANCELLED",
        /// See [`Reason::explanation`].
        NotCancellable = "NOT_CANCELLABLE",
        /// See [`Reason::explanation`].
        RollbackFailed = "ROLLBACK_FAILED",
        /// See [`Reason::explanation`].
        Draining = "DRAINING",
        /// See [`Reason::explanation`].
        Internal = "INTERNAL",
        /// The server's serial port has no log, or it cannot be read.
        ConsoleLogUnavailable = "CONSOLE_LOG_UNAVAILABLE",
        /// The domain has no serial port.
        NoConsole = "NO_CONSOLE",
        /// The domain has no screen.
        NoScreen = "NO_SCREEN",
        /// Somebody else writes to the serial port.
        ConsoleBusy = "CONSOLE_BUSY",
        /// Too many consoles are open.
        ConsoleLimit = "CONSOLE_LIMIT",
        /// The guest does not run.
        GuestNotRunning = "GUEST_NOT_RUNNING",
        /// See [`Reason::explanation`].
        ServerLocked = "SERVER_LOCKED",
        /// See [`Reason::explanation`].
        PermissionDenied = "PERMISSION_DENIED",
        /// See [`Reason::explanation`].
        StateReset = "STATE_RESET",
        /// See [`Reason::explanation`].
        Abandoned = "ABANDONED",
    }
}

/// The gRPC status codes that the agent uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    /// The request itself is wrong.
    InvalidArgument,
    /// What it names does not exist.
    NotFound,
    /// What it would make exists.
    AlreadyExists,
    /// The state does not allow it; retrying is useless until the state was changed.
    FailedPrecondition,
    /// It lost a race; it may be retried.
    Aborted,
    /// There is not enough of something.
    ResourceExhausted,
    /// It cannot be served now; it may be retried.
    Unavailable,
    /// It took too long.
    DeadlineExceeded,
    /// It was cancelled.
    Cancelled,
    /// A fault of the agent or of the host.
    Internal,
    /// There is no such call.
    Unimplemented,
    /// It is not known who calls.
    Unauthenticated,
    /// Who calls may not do it.
    PermissionDenied,
}

impl Code {
    /// The code's name in the gRPC documentation.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::InvalidArgument => "INVALID_ARGUMENT",
            Self::NotFound => "NOT_FOUND",
            Self::AlreadyExists => "ALREADY_EXISTS",
            Self::FailedPrecondition => "FAILED_PRECONDITION",
            Self::Aborted => "ABORTED",
            Self::ResourceExhausted => "RESOURCE_EXHAUSTED",
            Self::Unavailable => "UNAVAILABLE",
            Self::DeadlineExceeded => "DEADLINE_EXCEEDED",
            Self::Cancelled => "CANCELLED",
            Self::Internal => "INTERNAL",
            Self::Unimplemented => "UNIMPLEMENTED",
            Self::Unauthenticated => "UNAUTHENTICATED",
            Self::PermissionDenied => "PERMISSION_DENIED",
        }
    }
}

impl Reason {
    /// The gRPC code, the HTTP code that a Nova-compatible front answers, and what the reason means
    /// and what to do about it.
    const fn table(self) -> (Code, u16, &'static str) {
        use Code::{
            Aborted, AlreadyExists, Cancelled, DeadlineExceeded, FailedPrecondition, Internal,
            InvalidArgument, NotFound, PermissionDenied, ResourceExhausted, Unauthenticated,
            Unavailable, Unimplemented,
        };
        match self {
            Self::InvalidField => (
                InvalidArgument,
                400,
                "A field of the request breaks a rule. BadRequest names the field and the rule.",
            ),
            Self::InvalidRequest => (
                InvalidArgument,
                400,
                "The request could not be read: it is no message of the call's type, or larger than 4 MiB.",
            ),
            Self::NotSupported => (
                Unimplemented,
                501,
                "The agent has no such call. The message says what there is instead, if there is something.",
            ),
            Self::UnknownCaller => (
                Unauthenticated,
                401,
                "The kernel did not tell who is at the other end of the connection.",
            ),
            Self::RequestIdReused => (
                InvalidArgument,
                400,
                "The request id was used before with other content. Use a new one.",
            ),
            Self::ServerNotFound => (
                NotFound,
                404,
                "No server of this host has this id or name. `salvor server list` shows them.",
            ),
            Self::AmbiguousName => (
                InvalidArgument,
                400,
                "Several have this name or begin with this id. Use the whole id.",
            ),
            Self::DomainNotFound => (
                NotFound,
                404,
                "libvirt has no such domain. `salvor host unmanaged` shows what can be adopted.",
            ),
            Self::ImageNotFound => (
                InvalidArgument,
                400,
                "The image store has no such image. `salvor image list` shows them.",
            ),
            Self::ImageUnsafe => (
                InvalidArgument,
                400,
                "The image was not accepted: its format is not allowed, or it refers to files outside itself, or it is damaged. The message says which.",
            ),
            Self::ImageDamaged => (
                FailedPrecondition,
                400,
                "The stored file of the image is not what was imported any more. The guest was not touched. Delete the image and import it again.",
            ),
            Self::ImageInUse => (
                FailedPrecondition,
                409,
                "Disks of servers stand on the image. Delete or unrescue them first.",
            ),
            Self::ImageExists => (AlreadyExists, 409, "Another image has this id."),
            Self::ImageChecksum => (
                InvalidArgument,
                400,
                "The content does not have the SHA-256 or the size that was named. Fetch it again.",
            ),
            Self::ImageTooLarge => (
                InvalidArgument,
                400,
                "The image is larger than `storage.max_image_size`, or than the disk it is to become.",
            ),
            Self::OperationNotFound => (
                NotFound,
                404,
                "There is no such operation, or it is no longer kept.",
            ),
            Self::InvalidState => (
                FailedPrecondition,
                409,
                "The server's state does not allow the action. PreconditionFailure says which state and what would help.",
            ),
            Self::ServerBusy => (
                Aborted,
                409,
                "Another operation runs on the server. The message names it; wait for it or cancel it.",
            ),
            Self::ServerExists => (
                AlreadyExists,
                409,
                "A server or a domain with this id or name exists already.",
            ),
            Self::AlreadyRescued => (
                FailedPrecondition,
                409,
                "A rescue is in force, with the way back saved. Unrescue first.",
            ),
            Self::NotRescued => (FailedPrecondition, 409, "No rescue is in force."),
            Self::NoRescueImage => (
                FailedPrecondition,
                409,
                "No rescue image was named, the server was made from none that is still here, and the host has no default that can be used. Name one; the message says what is the matter with the default.",
            ),
            Self::SavedMemory => (
                FailedPrecondition,
                409,
                "The domain has saved memory that the action would lose. Start it first, or remove it with `virsh managedsave-remove`.",
            ),
            Self::NoSavedMemory => (
                FailedPrecondition,
                409,
                "The server is suspended, but libvirt has no saved memory of it any more. Boot it anew with a hard reboot.",
            ),
            Self::GuestStillOn => (
                DeadlineExceeded,
                409,
                "The guest did not shut down in time, and was not to be ended: it goes on. If it obeys the request later after all it goes off and stays off. Ask for a hard reboot, or look into the guest.",
            ),
            Self::DomainTransient => (
                FailedPrecondition,
                409,
                "The domain has no persistent definition, so there would be no way back. Have it defined again as it was known (`salvor server drift --restore`), or define it.",
            ),
            Self::NotAdopted => (
                FailedPrecondition,
                409,
                "Only an adopted server can be released: the disks of a created one are the agent's. Delete it instead.",
            ),
            Self::DomainUnsupported => (
                FailedPrecondition,
                409,
                "The domain has something that the action cannot be done with. The message says what, and what can be done instead.",
            ),
            Self::DomainInvalid => (
                FailedPrecondition,
                409,
                "libvirt or its QEMU does not take the domain that would be defined. The message is libvirt's.",
            ),
            Self::DomainChanged => (
                FailedPrecondition,
                409,
                "Somebody else changed the domain's definition, and the action would have lost that. Look at the domain, then ask again.",
            ),
            Self::DiskChanged => (
                FailedPrecondition,
                409,
                "The header of a disk names other files than when the action was planned or the rescue began. The message says which; nothing followed them.",
            ),
            Self::DiskMissing => (
                FailedPrecondition,
                409,
                "A disk or medium of the domain is not there, so nothing could start with it, not even the server itself. The message says which, and how to take it out of the definition.",
            ),
            Self::OverlayDecisionNeeded => (
                InvalidArgument,
                400,
                "The rescue wrote to overlays: say whether to commit or to discard them.",
            ),
            Self::NoOverlays => (
                InvalidArgument,
                400,
                "The rescue has no overlays to commit or to discard.",
            ),
            Self::CommitStarted => (
                FailedPrecondition,
                409,
                "A commit of the overlays has begun and did not end: discarding would leave half of it. Commit again.",
            ),
            Self::NoSpace => (
                ResourceExhausted,
                507,
                "The filesystem has not enough free space. The message says how much is needed and where.",
            ),
            Self::LibvirtUnavailable => (
                Unavailable,
                503,
                "libvirt cannot be reached. What was last known can still be read. Retry.",
            ),
            Self::LibvirtRefused => (
                Internal,
                500,
                "libvirt refused a step. The message is libvirt's.",
            ),
            Self::DeadlineExceeded => (
                DeadlineExceeded,
                504,
                "A step did not end within its deadline.",
            ),
            Self::GuestAgentUnavailable => {
                (FailedPrecondition, 409, "The guest agent does not answer.")
            }
            Self::GuestAgentRefused => (
                FailedPrecondition,
                409,
                "The guest agent answered that it does not do it. The message is its own.",
            ),
            Self::StorageFailed => (
                Internal,
                500,
                "A file or disk operation failed. The message says which.",
            ),
            Self::Cancelled => (
                Cancelled,
                409,
                "The operation was cancelled, and the server is as before.",
            ),
            Self::NotCancellable => (
                FailedPrecondition,
                409,
                "The operation's outcome stands already; it only cleans up.",
            ),
            Self::RollbackFailed => (
                Internal,
                500,
                "A step failed and so did taking back what was done before. The fault says what is left on the host.",
            ),
            Self::Draining => (
                Unavailable,
                503,
                "The agent is stopping and takes no new work. Retry when it is back.",
            ),
            Self::Internal => (
                Internal,
                500,
                "A fault of the agent. Its log has the details.",
            ),
            Self::ConsoleLogUnavailable => (
                FailedPrecondition,
                404,
                "The domain's serial port has no log, or its file cannot be read. The message says which, and what to add to the domain.",
            ),
            Self::NoConsole => (
                FailedPrecondition,
                404,
                "The domain has no serial port. Add <serial type='pty'/> to it, then stop and start the server.",
            ),
            Self::NoScreen => (
                FailedPrecondition,
                404,
                "The domain has no video device, so there is no screen to take a picture of.",
            ),
            Self::ConsoleBusy => (
                FailedPrecondition,
                409,
                "Another client writes to the serial port; the message says since when. Attach read-only, or take over with `force`.",
            ),
            Self::ConsoleLimit => (
                ResourceExhausted,
                429,
                "So many consoles are open that no other is opened. Close one.",
            ),
            Self::GuestNotRunning => (
                FailedPrecondition,
                409,
                "The guest does not run, so there is nothing to connect with. Start the server.",
            ),
            Self::ServerLocked => (
                FailedPrecondition,
                409,
                "The server is locked. The message says by whom and why; the owner's lock its owner takes off, any other the administrator.",
            ),
            Self::PermissionDenied => (
                PermissionDenied,
                403,
                "The role or the project that the call was made for may not do this. The message says who may.",
            ),
            Self::StateReset => (
                FailedPrecondition,
                409,
                "Of a fault: the administrator said that the server is in ERROR. The message says what the host showed then.",
            ),
            Self::Abandoned => (
                Internal,
                500,
                "The operation did not end when it was cancelled, and was given up. The server's fault says which step hung and what may be left.",
            ),
        }
    }

    /// The gRPC code.
    #[must_use]
    pub const fn code(self) -> Code {
        self.table().0
    }

    /// The HTTP code that a Nova-compatible front answers.
    #[must_use]
    pub const fn http(self) -> u16 {
        self.table().1
    }

    /// What it means and what to do about it.
    #[must_use]
    pub const fn explanation(self) -> &'static str {
        self.table().2
    }
}

/// A refusal: a reason, and a sentence about this very case.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, serde::Serialize, serde::Deserialize)]
#[error("{message}")]
pub struct Refusal {
    /// The reason.
    pub reason: Reason,
    /// What is the matter and what would help, for people.
    pub message: String,
    /// What it is about: the field of the request and its rule (INVALID_FIELD) or its value (what else
    /// has the code INVALID_ARGUMENT), the attribute and its
    /// value (INVALID_STATE: `vm_state`, `rescued`), or a kind of thing and its name (SERVER_BUSY:
    /// `operation`, `operations/…`).
    pub subject: Option<(String, String)>,
}

impl Refusal {
    /// A refusal without a subject.
    pub fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self {
            reason,
            message: message.into(),
            subject: None,
        }
    }

    /// A refusal for a field of the request.
    pub fn field(field: impl Into<String>, rule: impl Into<String>) -> Self {
        let (field, rule) = (field.into(), rule.into());
        Self {
            reason: Reason::InvalidField,
            message: format!("{field}: {rule}"),
            subject: Some((field, rule)),
        }
    }

    /// Says what it is about.
    #[must_use]
    pub fn about(mut self, kind: &str, name: impl Into<String>) -> Self {
        self.subject = Some((kind.to_owned(), name.into()));
        self
    }

    /// A refusal for a state.
    pub fn state(attribute: &str, value: &str, message: impl Into<String>) -> Self {
        Self {
            reason: Reason::InvalidState,
            message: message.into(),
            subject: Some((attribute.to_owned(), value.to_owned())),
        }
    }
}

named_states! {
    /// What is worth knowing but no reason to refuse (`Warning.name`).
    pub enum WarningName {
        /// The rescue image is the image the server was made from: filesystems with the same UUIDs.
        RescueImageIsServerImage = "RESCUE_IMAGE_IS_SERVER_IMAGE",
        /// The rescue disk may grow beyond the free space.
        SpaceMayRunOut = "SPACE_MAY_RUN_OUT",
        /// The configured rescue timeout does not apply, for nobody said what becomes of the overlays.
        TimeoutNotApplied = "TIMEOUT_NOT_APPLIED",
        /// The disks of an adopted server stay where they are when it is deleted, with its UEFI variables and
        /// its TPM's state.
        DisksKept = "DISKS_KEPT",
        /// The protection of disks does not cover everything that the rescue guest can write to.
        NotProtected = "NOT_PROTECTED",
        /// The owners of protected disks cannot be put back after the rescue.
        OwnersNotKept = "OWNERS_NOT_KEPT",
        /// Repairs in overlays go with the server.
        RepairsLost = "REPAIRS_LOST",
        /// Memory that was saved of the guest is lost.
        SavedMemoryLost = "SAVED_MEMORY_LOST",
        /// A file or folder could not be removed and is left behind.
        LeftBehind = "LEFT_BEHIND",
    }
}

impl WarningName {
    /// What it means.
    #[must_use]
    pub const fn explanation(self) -> &'static str {
        match self {
            Self::RescueImageIsServerImage => {
                "The rescue image is the one that the server was made from: both disks have filesystems with the same UUIDs. The stable mode with the rescue disk booting first is safer."
            }
            Self::SpaceMayRunOut => "A disk may grow beyond the space that is free now.",
            Self::TimeoutNotApplied => {
                "The configured rescue timeout does not apply, for nobody said what becomes of the overlays when it is over."
            }
            Self::DisksKept => {
                "The disks of an adopted server stay where they are when it is deleted, and so do its UEFI variables and the state of its TPM. The message names them."
            }
            Self::NotProtected => {
                "The protection of disks does not cover everything that the rescue guest can write to: host devices passed through, shared folders, and floppies beside overlays. The message names what stays writable."
            }
            Self::OwnersNotKept => {
                "libvirt gives disks that a rescue may only read to QEMU's user, and the agent will not be able to put their owners back. The message names the disks, and why."
            }
            Self::RepairsLost => {
                "The server is deleted with overlays that were not committed, so what was repaired in them is lost. The message says which disk a commit that did not end may have left half written."
            }
            Self::SavedMemoryLost => {
                "The guest boots anew: memory that was saved of it before is lost."
            }
            Self::LeftBehind => {
                "A file or folder could not be removed and is left behind. The message says which."
            }
        }
    }
}

/// A warning.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Warning {
    /// Its stable name.
    pub name: WarningName,
    /// About this very case, for people.
    pub message: String,
}
