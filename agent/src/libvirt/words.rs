// SPDX-License-Identifier: Apache-2.0
//! libvirt's numbers in our words: power states, reasons, events, why a connection ended.
//!
//! Pure tables, after libvirt's `libvirt-domain.h` and `libvirt-common.h`.

use std::ffi::c_int;

use virt::sys;

use super::ffi::RawState;
use crate::core::state::PowerState;
use crate::hypervisor::{DEFINED, UNDEFINED};

/// The power state and the reason for it.
///
/// As Nova has it (`LIBVIRT_POWER_STATE`), but for one state: a domain that is "in shutdown" still
/// has its QEMU process and holds its disks, for up to some seconds. Nova calls that off. Here it is
/// `Running` for the reason `shutting-down`, so that whoever waits for a guest to be off waits until
/// its disks are free.
pub(super) fn power(raw: RawState) -> (PowerState, &'static str) {
    let RawState { state, reason } = raw;
    match state.cast_unsigned() {
        sys::VIR_DOMAIN_RUNNING | sys::VIR_DOMAIN_BLOCKED => {
            (PowerState::Running, word(RUNNING, reason))
        }
        sys::VIR_DOMAIN_PAUSED => (PowerState::Paused, word(PAUSED, reason)),
        sys::VIR_DOMAIN_SHUTDOWN => (PowerState::Running, SHUTTING_DOWN),
        sys::VIR_DOMAIN_SHUTOFF => (PowerState::Shutdown, word(SHUTOFF, reason)),
        sys::VIR_DOMAIN_CRASHED => (PowerState::Crashed, word(CRASHED, reason)),
        sys::VIR_DOMAIN_PMSUSPENDED => (PowerState::Suspended, UNKNOWN),
        _ => (PowerState::NoState, UNKNOWN),
    }
}

const UNKNOWN: &str = "unknown";
const SHUTTING_DOWN: &str = "shutting-down";

/// `virDomainRunningReason`; `VIR_DOMAIN_BLOCKED` knows only the first.
const RUNNING: &[&str] = &[
    UNKNOWN,
    "booted",
    "migrated",
    "restored",
    "from-snapshot",
    "unpaused",
    "migration-canceled",
    "save-canceled",
    "wakeup",
    "crashed",
    "postcopy",
    "postcopy-failed",
];

/// `virDomainPausedReason`.
const PAUSED: &[&str] = &[
    UNKNOWN,
    "user",
    "migration",
    "save",
    "dump",
    "ioerror",
    "watchdog",
    "from-snapshot",
    SHUTTING_DOWN,
    "snapshot",
    "crashed",
    "starting-up",
    "postcopy",
    "postcopy-failed",
    "api-error",
];

/// `virDomainShutoffReason`.
const SHUTOFF: &[&str] = &[
    UNKNOWN,
    "shutdown",
    "destroyed",
    "crashed",
    "migrated",
    "saved",
    "failed",
    "from-snapshot",
    "daemon",
];

/// `virDomainCrashedReason`.
const CRASHED: &[&str] = &[UNKNOWN, "panicked"];

/// `virDomainEventType`.
const LIFECYCLE: &[&str] = &[
    DEFINED,
    UNDEFINED,
    "started",
    "suspended",
    "resumed",
    "stopped",
    "shutdown",
    "pmsuspended",
    "crashed",
];

/// `virDomainEventWatchdogAction`.
const WATCHDOG: &[&str] = &[
    "",
    "pause",
    "reset",
    "poweroff",
    "shutdown",
    "debug",
    "inject-nmi",
];

/// `virDomainEventIOErrorAction`.
const IO_ERROR_ACTION: &[&str] = &["", "pause", "report"];

/// `virDomainDiskErrorCode`.
const DISK_ERROR: &[&str] = &["", "failed", "no space"];

/// `virConnectDomainEventBlockJobStatus`.
const BLOCK_JOB: &[&str] = &["completed", "failed", "canceled", "ready"];

/// `virConnectCloseReason`.
const CLOSED: &[&str] = &[
    "the connection broke",
    "libvirt closed the connection",
    "libvirt stopped answering",
    "the connection was closed on this side",
];

fn word(words: &[&'static str], number: c_int) -> &'static str {
    let word = usize::try_from(number).ok().and_then(|at| words.get(at));
    word.copied().unwrap_or(UNKNOWN)
}

/// The word for a lifecycle event; one that a newer libvirt has is `changed`.
pub(super) fn lifecycle(event: c_int) -> &'static str {
    match word(LIFECYCLE, event) {
        UNKNOWN => "changed",
        word => word,
    }
}

/// Is it the event of a guest whose kernel panicked?
pub(super) fn is_panic(event: c_int) -> bool {
    event.cast_unsigned() == sys::VIR_DOMAIN_EVENT_CRASHED
}

/// What a watchdog does when it fires.
pub(super) fn watchdog(action: c_int) -> &'static str {
    word(WATCHDOG, action)
}

/// What QEMU does about a disk that fails.
pub(super) fn io_error_action(action: c_int) -> &'static str {
    word(IO_ERROR_ACTION, action)
}

/// Why a disk failed, by what an event says: libvirt knows but one word (`qemuMonitorJSONHandleIOError`).
pub(super) fn io_error_reason(reason: &str) -> &str {
    match reason {
        "enospc" => "no space",
        reason => reason,
    }
}

/// What is wrong with a disk.
pub(super) fn disk_error(error: c_int) -> &'static str {
    word(DISK_ERROR, error)
}

/// What became of a job on a disk.
pub(super) fn block_job(status: c_int) -> &'static str {
    word(BLOCK_JOB, status)
}

/// Why a connection ended, as a sentence.
pub(super) fn closed(reason: c_int) -> &'static str {
    match word(CLOSED, reason) {
        UNKNOWN => "the connection ended",
        word => word,
    }
}

/// Is the guest agent connected after this agent lifecycle event?
pub(super) fn agent_connected(state: c_int) -> bool {
    state.cast_unsigned() == sys::VIR_CONNECT_DOMAIN_EVENT_AGENT_LIFECYCLE_STATE_CONNECTED
}

/// `major.minor.release` of a version that libvirt gives as one number.
pub(super) fn version(number: u32) -> String {
    let (major, minor, release) = (number / 1_000_000, number / 1_000 % 1_000, number % 1_000);
    format!("{major}.{minor}.{release}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(state: u32, reason: u32) -> (PowerState, &'static str) {
        power(RawState {
            state: state.cast_signed(),
            reason: reason.cast_signed(),
        })
    }

    #[test]
    fn a_domain_is_off_only_when_its_process_is_gone() {
        let shutting_down = of(sys::VIR_DOMAIN_SHUTDOWN, sys::VIR_DOMAIN_SHUTDOWN_USER);
        assert_eq!(shutting_down, (PowerState::Running, "shutting-down"));
        let off = of(sys::VIR_DOMAIN_SHUTOFF, sys::VIR_DOMAIN_SHUTOFF_SHUTDOWN);
        assert_eq!(off, (PowerState::Shutdown, "shutdown"));
    }

    #[test]
    fn the_last_word_of_each_table_is_that_of_libvirts_last_number() {
        for (state, reason, word) in [
            (
                sys::VIR_DOMAIN_RUNNING,
                sys::VIR_DOMAIN_RUNNING_POSTCOPY_FAILED,
                "postcopy-failed",
            ),
            (
                sys::VIR_DOMAIN_PAUSED,
                sys::VIR_DOMAIN_PAUSED_API_ERROR,
                "api-error",
            ),
            (
                sys::VIR_DOMAIN_PAUSED,
                sys::VIR_DOMAIN_PAUSED_IOERROR,
                "ioerror",
            ),
            (
                sys::VIR_DOMAIN_SHUTOFF,
                sys::VIR_DOMAIN_SHUTOFF_DAEMON,
                "daemon",
            ),
            (
                sys::VIR_DOMAIN_CRASHED,
                sys::VIR_DOMAIN_CRASHED_PANICKED,
                "panicked",
            ),
        ] {
            assert_eq!(of(state, reason).1, word);
        }
        let crashed = sys::VIR_DOMAIN_EVENT_CRASHED.cast_signed();
        assert_eq!(lifecycle(crashed), "crashed");
        assert!(is_panic(crashed) && !is_panic(crashed - 1));
        let nmi = sys::VIR_DOMAIN_EVENT_WATCHDOG_INJECTNMI.cast_signed();
        assert_eq!(watchdog(nmi), "inject-nmi");
        let report = sys::VIR_DOMAIN_EVENT_IO_ERROR_REPORT.cast_signed();
        assert_eq!(io_error_action(report), "report");
        let no_space = sys::VIR_DOMAIN_DISK_ERROR_NO_SPACE.cast_signed();
        assert_eq!(disk_error(no_space), "no space");
        let ready = sys::VIR_DOMAIN_BLOCK_JOB_READY.cast_signed();
        assert_eq!(block_job(ready), "ready");
    }

    #[test]
    fn numbers_that_no_table_knows_have_a_word_too() {
        assert_eq!(of(99, 0), (PowerState::NoState, "unknown"));
        let running = of(sys::VIR_DOMAIN_RUNNING, 99);
        assert_eq!(running, (PowerState::Running, "unknown"));
        assert_eq!(lifecycle(99), "changed");
        assert_eq!(lifecycle(-1), "changed");
        assert_eq!(closed(99), "the connection ended");
    }

    #[test]
    fn versions_read_as_people_write_them() {
        assert_eq!(version(9_000_000), "9.0.0");
        assert_eq!(version(7_002_022), "7.2.22");
    }
}
