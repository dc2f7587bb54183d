// SPDX-License-Identifier: Apache-2.0
//! What an observation of the hypervisor means for a record.
//!
//! Observations are recorded, never fought: nothing is stopped because somebody else started it. Where
//! a guest is not as it should be the record says so ([`Mismatch`]); whether something is done about it
//! is the configuration's business ([`Policy`]). What is told besides a guest's power has a table of its own
//! ([`respond`]).

use serde::{Deserialize, Serialize};

use super::{
    incident::{Incident, IncidentKind},
    record::{AgentSeen, ServerRecord},
    state::{PowerObservation, PowerState, VmState, named_states},
};

named_states! {
    /// How a guest is not as it should be.
    pub enum Mismatch {
        /// It should run, and shut itself down (or somebody asked it to, past the agent).
        StoppedByItself = "stopped-by-itself",
        /// It should run, and its QEMU or its kernel crashed.
        Crashed = "crashed",
        /// It is halted because a disk could not be read or written.
        IoError = "io-error",
        /// It is halted for another reason of its own: a watchdog, a panic, a QEMU that failed.
        Halted = "halted",
        /// libvirt has no domain of it.
        Vanished = "vanished",
        /// It runs although it was deleted and waits to be reclaimed.
        RunsAlthoughDeleted = "runs-although-deleted",
    }
}

impl Mismatch {
    /// What an operator can do.
    #[must_use]
    pub const fn advice(self) -> &'static str {
        match self {
            Self::StoppedByItself | Self::Crashed => {
                "start it; [policy] of the configuration says whether the agent does"
            }
            Self::IoError => "make room or mend the disk, then unpause it",
            Self::Halted => {
                "look at its console, then unpause it, reboot it hard, or unrescue it if it is rescued"
            }
            Self::Vanished => {
                "somebody removed its domain; have it defined again as it was known (server drift --restore), or unrescue it if it is rescued"
            }
            Self::RunsAlthoughDeleted => {
                "somebody started it; stop the domain, or restore the server"
            }
        }
    }
}

/// A mismatch that the record shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mismatched {
    /// What.
    pub what: Mismatch,
    /// Since when, in milliseconds since the Unix epoch.
    pub since_ms: i64,
}

/// What was seen of a domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// Its power.
    pub power: PowerObservation,
    /// Whether the next start brings saved memory back; `None` if that was not asked.
    pub saved_memory: Option<bool>,
}

impl From<PowerObservation> for Seen {
    fn from(power: PowerObservation) -> Self {
        Self {
            power,
            saved_memory: None,
        }
    }
}

/// What to change in the record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reconciled {
    /// The new observation.
    pub power: PowerObservation,
    /// What was seen last, while the new observation is that nothing can be seen.
    pub last_known_power: Option<PowerObservation>,
    /// The vm state that follows.
    pub vm_state: VmState,
    /// How the guest is not as it should be.
    pub mismatch: Option<Mismatched>,
    /// Whether its guest agent is connected.
    pub agent: Option<AgentSeen>,
}

/// What becomes of the mismatch that a record shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Told {
    /// It stays, if there is one: the observation says nothing about it.
    Keep,
    /// The guest is off as before: why it went stays, anything else is over.
    StillOff,
    /// There is none any more.
    Clear,
    /// This is one.
    Is(Mismatch),
}

/// libvirt's word for CPUs that are stopped because a disk failed.
pub const IO_ERROR: &str = "ioerror";

/// Why CPUs are stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Halt {
    /// Somebody wanted it, and it stays so until somebody does not.
    Asked,
    /// A disk failed.
    IoError,
    /// Something else went wrong with the guest or its QEMU.
    Fault,
    /// libvirt is at something, and it passes.
    Passing,
}

/// By libvirt's word (`virDomainPausedReason`).
fn halt(reason: &str) -> Halt {
    match reason {
        "user" | "from-snapshot" => Halt::Asked,
        "watchdog" | "crashed" | "postcopy-failed" | "api-error" => Halt::Fault,
        "migration" | "save" | "dump" | "shutting-down" | "snapshot" | "starting-up"
        | "postcopy" => Halt::Passing,
        reason if reason.starts_with(IO_ERROR) => Halt::IoError,
        // A word that is not known says nothing about what anybody wanted.
        _ => Halt::Passing,
    }
}

/// Why a guest is off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Off {
    /// It went by itself, or was asked to.
    ByItself,
    /// It crashed.
    Crashed,
    /// Its memory was saved.
    Saved,
    /// Somebody ended it, moved it away, or nobody knows any more (libvirt itself was away).
    Otherwise,
}

/// By libvirt's word (`virDomainShutoffReason`).
fn off(reason: &str) -> Off {
    match reason {
        "shutdown" => Off::ByItself,
        "crashed" | "failed" => Off::Crashed,
        "saved" => Off::Saved,
        _ => Off::Otherwise,
    }
}

/// The table: what a settled server becomes when its domain is seen so. `saved_memory` as in [`Seen`].
///
/// Nova's table is `_sync_instance_power_state` of `nova/compute/manager.py`; `docs/STATES.md` has the
/// differences.
#[must_use]
pub fn follow(
    vm_state: VmState,
    power: PowerState,
    reason: &str,
    saved_memory: Option<bool>,
) -> (VmState, Told) {
    use PowerState as P;
    use Told::{Clear, Is, Keep};
    use VmState as S;
    match vm_state {
        // No domain is expected, or its operation has not ended.
        S::Building | S::Deleted | S::ShelvedOffloaded => (vm_state, Keep),
        S::Active | S::Paused | S::Stopped | S::Suspended => match power {
            P::Unknown => (vm_state, Keep),
            P::NoState if reason == NO_DOMAIN => (vm_state, Is(Mismatch::Vanished)),
            P::NoState => (vm_state, Keep),
            // Asleep is as good as running: the guest wanted it.
            P::Running | P::Suspended => (S::Active, Clear),
            // What is left of it cannot go on (Nova stops it, too).
            P::Crashed => (S::Stopped, Is(Mismatch::Crashed)),
            P::Paused => match halt(reason) {
                Halt::Asked => (S::Paused, Clear),
                Halt::IoError => (unless_paused(vm_state), Is(Mismatch::IoError)),
                Halt::Fault => (unless_paused(vm_state), Is(Mismatch::Halted)),
                Halt::Passing => (vm_state, Keep),
            },
            P::Shutdown => when_off(vm_state, off(reason), saved_memory),
        },
        // The domain is not the server's own, or the state is not to be left by itself.
        S::Rescued | S::Resized | S::Error | S::Shelved => match power {
            P::Unknown => (vm_state, Keep),
            P::NoState if reason == NO_DOMAIN => (vm_state, Is(Mismatch::Vanished)),
            P::NoState => (vm_state, Keep),
            P::Running | P::Suspended | P::Shutdown => (vm_state, Clear),
            P::Crashed => (vm_state, Is(Mismatch::Halted)),
            P::Paused => match halt(reason) {
                Halt::Asked => (vm_state, Clear),
                Halt::IoError => (vm_state, Is(Mismatch::IoError)),
                Halt::Fault => (vm_state, Is(Mismatch::Halted)),
                Halt::Passing => (vm_state, Keep),
            },
        },
        S::SoftDeleted => match power {
            P::Unknown => (vm_state, Keep),
            P::NoState if reason == NO_DOMAIN => (vm_state, Is(Mismatch::Vanished)),
            P::NoState => (vm_state, Keep),
            P::Running | P::Suspended | P::Paused | P::Crashed => {
                (vm_state, Is(Mismatch::RunsAlthoughDeleted))
            }
            P::Shutdown => (vm_state, Clear),
        },
    }
}

/// A guest that was paused on purpose and then failed is still to be unpaused.
const fn unless_paused(vm_state: VmState) -> VmState {
    match vm_state {
        VmState::Paused => VmState::Paused,
        _ => VmState::Active,
    }
}

fn when_off(vm_state: VmState, off: Off, saved_memory: Option<bool>) -> (VmState, Told) {
    match (vm_state, off, saved_memory) {
        (VmState::Suspended, _, None | Some(true)) => (VmState::Suspended, Told::Clear),
        // Its memory is gone: it would boot.
        (VmState::Suspended, _, Some(false)) => (VmState::Stopped, Told::Clear),
        (_, Off::Saved, Some(true)) => (VmState::Suspended, Told::Clear),
        // It was off before, and why was told when it went.
        (VmState::Stopped, _, _) => (VmState::Stopped, Told::StillOff),
        (_, Off::ByItself, _) => (VmState::Stopped, Told::Is(Mismatch::StoppedByItself)),
        (_, Off::Crashed, _) => (VmState::Stopped, Told::Is(Mismatch::Crashed)),
        (_, Off::Saved | Off::Otherwise, _) => (VmState::Stopped, Told::Clear),
    }
}

/// The reason of [`PowerState::NoState`] for a server whose domain is missing.
pub const NO_DOMAIN: &str = "no domain";

/// Is it worth asking whether memory was saved of a domain that is off?
#[must_use]
pub fn needs_saved_memory(server: &ServerRecord, power: PowerState, reason: &str) -> bool {
    power == PowerState::Shutdown
        && (server.vm_state == VmState::Suspended || off(reason) == Off::Saved)
}

/// No call to the hypervisor takes longer, in milliseconds. An observation that seems older than that
/// was made after the host's clock was set back.
const SLOWEST_ANSWER_MS: i64 = 60_000;

/// Was `seen` asked for before `known` was learned? Answers may come in another order than they were
/// asked for.
fn is_before(seen: i64, known: i64) -> bool {
    seen < known && known.saturating_sub(seen) <= SLOWEST_ANSWER_MS
}

/// Is the observation older than what the record knows already?
#[must_use]
pub fn is_stale(server: &ServerRecord, seen: &PowerObservation) -> bool {
    is_before(seen.observed_at_ms, server.power.observed_at_ms)
}

/// For how many milliseconds a look that begins now would tell nothing of the vm state, because an operation
/// has just ended: what such a look sees may be that operation's own work.
#[must_use]
pub fn too_early(server: &ServerRecord, now_ms: i64) -> Option<u64> {
    let early = now_ms == server.settled_at_ms || is_before(now_ms, server.settled_at_ms);
    let left = server
        .settled_at_ms
        .saturating_sub(now_ms)
        .saturating_add(1);
    u64::try_from(left).ok().filter(|_| early)
}

/// Folds an observation into a record; `None` if it tells nothing new.
///
/// While an operation is under way the vm state is the operation's business; what [`follow`] says counts
/// otherwise.
#[must_use]
pub fn reconcile(server: &ServerRecord, seen: impl Into<Seen>) -> Option<Reconciled> {
    let Seen {
        power: mut seen,
        saved_memory,
    } = seen.into();
    // Which disk failed and why is asked once; the next look shows libvirt's one word again.
    if seen.state == server.power.state
        && seen.reason == IO_ERROR
        && server.power.reason.starts_with(IO_ERROR)
    {
        seen.reason.clone_from(&server.power.reason);
    }
    // Seen before the last operation ended: what it saw may be that operation's own work.
    let settled = server.operation.is_none() && too_early(server, seen.observed_at_ms).is_none();
    let (vm_state, told) = if settled {
        follow(server.vm_state, seen.state, &seen.reason, saved_memory)
    } else {
        (server.vm_state, Told::Keep)
    };
    let mismatch = match (told, server.mismatch) {
        (Told::Keep, before) => before,
        (Told::StillOff, before) => before
            .filter(|before| matches!(before.what, Mismatch::StoppedByItself | Mismatch::Crashed)),
        (Told::Clear, _) => None,
        (Told::Is(what), Some(before)) if before.what == what => Some(before),
        (Told::Is(what), _) => Some(Mismatched {
            what,
            since_ms: seen.observed_at_ms,
        }),
    };
    let last_known_power = if seen.state == PowerState::Unknown {
        // An outage that goes on does not make the last observation older or newer.
        if server.power.state == PowerState::Unknown {
            server.last_known_power.clone()
        } else {
            Some(server.power.clone())
        }
    } else {
        None
    };
    let same = server.power.state == seen.state && server.power.reason == seen.reason;
    // A guest that is off has no agent.
    let agent = server
        .agent
        .filter(|_| seen.state.is_on() || seen.state == PowerState::Unknown);
    if same && server.vm_state == vm_state && server.mismatch == mismatch && server.agent == agent {
        return None;
    }
    Some(Reconciled {
        agent,
        power: seen,
        last_known_power,
        vm_state,
        mismatch,
    })
}

/// What is done about a guest that should run and is off.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Policy {
    /// One that crashed is started again.
    pub start_crashed: bool,
    /// One that shut itself down is started again.
    pub start_stopped_by_itself: bool,
}

/// Whether to act: is the guest off, and is it the configuration's wish that it is then started again?
#[must_use]
pub fn is_to_be_started(server: &ServerRecord, policy: Policy) -> bool {
    let wanted = match server.mismatch.map(|mismatch| mismatch.what) {
        Some(Mismatch::Crashed) => policy.start_crashed,
        Some(Mismatch::StoppedByItself) => policy.start_stopped_by_itself,
        Some(
            Mismatch::IoError
            | Mismatch::Halted
            | Mismatch::Vanished
            | Mismatch::RunsAlthoughDeleted,
        )
        | None => false,
    };
    wanted
        && server.vm_state == VmState::Stopped
        && server.operation.is_none()
        && matches!(
            server.power.state,
            PowerState::Shutdown | PowerState::Crashed
        )
}

/// What the hypervisor tells of a guest besides its power.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum News {
    /// Its guest agent connected to its channel, or left it.
    Agent {
        /// Is it there now?
        connected: bool,
    },
    /// It was defined, or undefined.
    Definition,
    /// A job on a disk ended, or waits to be told to end.
    BlockJob {
        /// Target of the disk.
        disk: String,
        /// libvirt's word (`completed`, `failed`, `canceled`, `ready`).
        state: &'static str,
    },
    /// A device is gone from it.
    DeviceRemoved {
        /// libvirt's alias of the device.
        device: String,
    },
    /// It has more or less memory than before.
    Balloon {
        /// How much, in KiB.
        memory_kib: u64,
    },
    /// Something happened in it.
    Happened(Incident),
}

/// What follows from news: what is recorded, told and asked.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Response {
    /// Recorded: whether the guest agent is connected.
    pub agent: Option<bool>,
    /// Told to watchers, as often as that may be.
    pub incident: Option<Incident>,
    /// Asked: the definition may be another now.
    pub read_definition: bool,
    /// Asked: the guest agent, if a rescue's password waits for it.
    pub ask_agent: bool,
}

/// The table of news. None of it changes what is meant or starts anything; what is not about a server of ours is
/// nothing.
#[must_use]
pub fn respond(server: Option<&ServerRecord>, news: News) -> Response {
    let nothing = Response::default();
    let Some(server) = server else {
        return nothing;
    };
    match news {
        News::Agent { connected } => Response {
            agent: Some(connected),
            ask_agent: connected && server.rescue.is_some(),
            ..nothing
        },
        News::Definition => Response {
            read_definition: true,
            ..nothing
        },
        // A disk may have another file now. One that ended as it should is nobody's trouble.
        News::BlockJob { disk, state } => Response {
            read_definition: true,
            incident: (state == "failed").then(|| {
                let kind = IncidentKind::BlockJobFailed;
                Incident::told(kind, &disk, "", state, "")
            }),
            ..nothing
        },
        News::DeviceRemoved { device } => Response {
            read_definition: true,
            incident: Some(Incident::told(
                IncidentKind::DeviceRemoved,
                &device,
                "",
                "",
                "",
            )),
            ..nothing
        },
        News::Balloon { memory_kib } => {
            let size = format!("{memory_kib} KiB");
            Response {
                incident: Some(Incident::told(
                    IncidentKind::MemoryChanged,
                    "",
                    "",
                    &size,
                    "",
                )),
                ..nothing
            }
        }
        News::Happened(incident) => Response {
            incident: Some(incident),
            ..nothing
        },
    }
}
