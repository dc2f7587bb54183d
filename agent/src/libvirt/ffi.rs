// SPDX-License-Identifier: Apache-2.0
//! All of Salvor's `unsafe` code: the libvirt functions that the `virt` crate does not wrap, or wraps
//! so that they leak or never fail; and two of the C library.
//!
//! Whatever libvirt allocates for us is owned by a type here and freed when that is dropped.
//!
//! [`events`] has the callbacks.
#![allow(unsafe_code)]

mod events;

use std::collections::HashMap;
use std::ffi::{CStr, c_char, c_int, c_uint};
use std::ptr;

use uuid::Uuid;
use virt::connect::Connect;
use virt::domain::Domain;
use virt::error::Error;
use virt::sys;

pub(super) use self::events::{CloseWatch, DomainEvents, EventKind, Sink, Told};

/// A domain's state and the reason for it, as libvirt numbers them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RawState {
    /// One of `VIR_DOMAIN_RUNNING`, ….
    pub(super) state: c_int,
    /// Which numbers there are depends on the state.
    pub(super) reason: c_int,
}

/// One domain in the listing of a whole host.
#[derive(Debug)]
pub(super) struct ListedDomain {
    pub(super) id: Uuid,
    pub(super) name: String,
    pub(super) state: RawState,
}

/// `virDomainGetState`, which `virt` 0.5 answers with `Ok` even when it fails.
pub(super) fn domain_state(domain: &Domain) -> Result<RawState, Error> {
    let mut raw = RawState {
        state: 0,
        reason: 0,
    };
    // SAFETY: `domain` keeps its handle alive for the call, and both out pointers are valid for it.
    let answer = unsafe {
        sys::virDomainGetState(domain.as_ptr(), &raw mut raw.state, &raw mut raw.reason, 0)
    };
    if answer < 0 {
        return Err(Error::last_error());
    }
    Ok(raw)
}

/// A save, dump or migration that is under way, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RunningJob {
    /// How much there is to do.
    pub(super) total: u64,
    /// How much is done.
    pub(super) processed: u64,
}

/// `virDomainGetJobInfo`; `None` if no job is under way.
pub(super) fn job(domain: &Domain) -> Result<Option<RunningJob>, Error> {
    let mut info = std::mem::MaybeUninit::<sys::virDomainJobInfo>::zeroed();
    // SAFETY: `domain` keeps its handle alive for the call, and the out pointer is to a whole struct.
    let answer = unsafe { sys::virDomainGetJobInfo(domain.as_ptr(), info.as_mut_ptr()) };
    if answer < 0 {
        return Err(Error::last_error());
    }
    // SAFETY: it is a struct of integers, zeroed before and written by libvirt.
    let info = unsafe { info.assume_init() };
    let running = [
        sys::VIR_DOMAIN_JOB_BOUNDED.cast_signed(),
        sys::VIR_DOMAIN_JOB_UNBOUNDED.cast_signed(),
    ];
    Ok(running.contains(&info.type_).then_some(RunningJob {
        total: info.dataTotal,
        processed: info.dataProcessed,
    }))
}

/// `virDomainAbortJob`.
pub(super) fn abort_job(domain: &Domain) -> Result<(), Error> {
    // SAFETY: `domain` keeps its handle alive for the call.
    let answer = unsafe { sys::virDomainAbortJob(domain.as_ptr()) };
    if answer < 0 {
        return Err(Error::last_error());
    }
    Ok(())
}

/// `virDomainInjectNMI`.
pub(super) fn inject_nmi(domain: &Domain) -> Result<(), Error> {
    // SAFETY: `domain` keeps its handle alive for the call.
    let answer = unsafe { sys::virDomainInjectNMI(domain.as_ptr(), 0) };
    if answer < 0 {
        return Err(Error::last_error());
    }
    Ok(())
}

/// The records of `virConnectGetAllDomainStats`, freed on drop (`virt` 0.5 never frees them).
struct StatsRecords {
    list: *mut sys::virDomainStatsRecordPtr,
    count: usize,
}

impl Drop for StatsRecords {
    fn drop(&mut self) {
        // SAFETY: `list` came from virConnectGetAllDomainStats and is freed here alone, once.
        unsafe { sys::virDomainStatsRecordListFree(self.list) };
    }
}

impl StatsRecords {
    fn all(connect: &Connect) -> Result<Self, Error> {
        let mut list = ptr::null_mut();
        // SAFETY: `connect` keeps its handle alive for the call, and `list` is a valid out pointer.
        let count = unsafe {
            sys::virConnectGetAllDomainStats(
                connect.as_ptr(),
                sys::VIR_DOMAIN_STATS_STATE,
                &raw mut list,
                0,
            )
        };
        let count = usize::try_from(count).map_err(|_| Error::last_error())?;
        Ok(Self { list, count })
    }

    /// Of one domain: counters. What cannot be had at once is left out.
    fn counters(domain: &Domain) -> Result<Self, Error> {
        let mut list = ptr::null_mut();
        // SAFETY: the handle is used only in this function, which `domain` outlives.
        let handle = unsafe { domain.as_ptr() };
        let mut domains = [handle, ptr::null_mut()];
        let wanted = sys::VIR_DOMAIN_STATS_CPU_TOTAL
            | sys::VIR_DOMAIN_STATS_BALLOON
            | sys::VIR_DOMAIN_STATS_VCPU
            | sys::VIR_DOMAIN_STATS_INTERFACE
            | sys::VIR_DOMAIN_STATS_BLOCK;
        // SAFETY: `domains` is an array of live handles that a null pointer ends, and `list` is a
        // valid out pointer.
        let count = unsafe {
            sys::virDomainListGetStats(
                domains.as_mut_ptr(),
                wanted,
                &raw mut list,
                sys::VIR_CONNECT_GET_ALL_DOMAINS_STATS_NOWAIT,
            )
        };
        let count = usize::try_from(count).map_err(|_| Error::last_error())?;
        Ok(Self { list, count })
    }

    fn records(&self) -> impl Iterator<Item = &sys::virDomainStatsRecord> {
        (0..self.count).filter_map(|at| {
            // SAFETY: libvirt returned `count` pointers to records that live until the list is
            // freed, which `self` outlives.
            unsafe { (*self.list.add(at)).as_ref() }
        })
    }
}

/// Name, uuid and state of every domain in one call that takes no domain's job lock and asks no
/// monitor.
pub(super) fn all_domain_states(connect: &Connect) -> Result<Vec<ListedDomain>, Error> {
    let records = StatsRecords::all(connect)?;
    records
        .records()
        .map(|record| {
            let (id, name) = identity(record.dom)?;
            let number = |field| int_parameter(record, field).unwrap_or_default();
            let state = RawState {
                state: number(c"state.state"),
                reason: number(c"state.reason"),
            };
            Ok(ListedDomain { id, name, state })
        })
        .collect()
}

/// The integer parameter of this name in a record.
fn int_parameter(record: &sys::virDomainStatsRecord, field: &CStr) -> Option<c_int> {
    let count = usize::try_from(record.nparams).ok()?;
    (0..count).find_map(|at| {
        // SAFETY: libvirt returned `nparams` parameters that live as long as the record.
        let parameter = unsafe { record.params.add(at).as_ref() }?;
        // SAFETY: libvirt ends the name of a parameter with a NUL inside its array.
        let name = unsafe { CStr::from_ptr(parameter.field.as_ptr()) };
        if name != field || parameter.type_ != sys::VIR_TYPED_PARAM_INT.cast_signed() {
            return None;
        }
        // SAFETY: the type says that `i` is the member of the union that was written.
        Some(unsafe { parameter.value.i })
    })
}

/// The value of a statistic, as far as we look at it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Stat {
    /// Not negative.
    Number(u64),
    Text(String),
}

/// Counters of a domain, by libvirt's names. Its monitor is asked.
pub(super) fn domain_stats(domain: &Domain) -> Result<HashMap<String, Stat>, Error> {
    let records = StatsRecords::counters(domain)?;
    Ok(records.records().flat_map(stats_of).collect())
}

/// The parameters of a record that are numbers or text.
fn stats_of(record: &sys::virDomainStatsRecord) -> impl Iterator<Item = (String, Stat)> {
    let count = usize::try_from(record.nparams).unwrap_or(0);
    (0..count).filter_map(|at| {
        // SAFETY: libvirt returned `nparams` parameters that live as long as the record.
        let parameter = unsafe { record.params.add(at).as_ref() }?;
        // SAFETY: libvirt ends the name of a parameter with a NUL inside its array.
        let name = unsafe { CStr::from_ptr(parameter.field.as_ptr()) };
        let kind = u32::try_from(parameter.type_).ok()?;
        let value = match kind {
            sys::VIR_TYPED_PARAM_INT => {
                // SAFETY: the type says that `i` is the member of the union that was written.
                Stat::Number(u64::try_from(unsafe { parameter.value.i }).ok()?)
            }
            sys::VIR_TYPED_PARAM_UINT => {
                // SAFETY: the type says that `ui` is the member of the union that was written.
                Stat::Number(u64::from(unsafe { parameter.value.ui }))
            }
            sys::VIR_TYPED_PARAM_LLONG => {
                // SAFETY: the type says that `l` is the member of the union that was written.
                Stat::Number(u64::try_from(unsafe { parameter.value.l }).ok()?)
            }
            sys::VIR_TYPED_PARAM_ULLONG => {
                // SAFETY: the type says that `ul` is the member of the union that was written.
                Stat::Number(unsafe { parameter.value.ul })
            }
            sys::VIR_TYPED_PARAM_STRING => {
                // SAFETY: the type says that `s` is the member of the union that was written.
                let text = unsafe { parameter.value.s };
                if text.is_null() {
                    return None;
                }
                // SAFETY: it is a C string that belongs to the record.
                let text = unsafe { CStr::from_ptr(text) };
                Stat::Text(text.to_string_lossy().into_owned())
            }
            _ => return None,
        };
        Some((name.to_string_lossy().into_owned(), value))
    })
}

/// How libvirt stands with a domain's QEMU, as libvirt numbers it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RawControl {
    /// One of `VIR_DOMAIN_CONTROL_OK`, ….
    pub(super) state: c_uint,
    /// One of `VIR_DOMAIN_CONTROL_ERROR_REASON_NONE`, ….
    pub(super) details: c_uint,
    /// For how long, in milliseconds.
    pub(super) since_ms: u64,
}

/// `virDomainGetControlInfo`, which asks no monitor.
pub(super) fn control_info(domain: &Domain) -> Result<RawControl, Error> {
    let mut info = sys::virDomainControlInfo {
        state: 0,
        details: 0,
        stateTime: 0,
    };
    // SAFETY: `domain` keeps its handle alive for the call, and `info` is a valid out pointer.
    let answer = unsafe { sys::virDomainGetControlInfo(domain.as_ptr(), &raw mut info, 0) };
    if answer < 0 {
        return Err(Error::last_error());
    }
    Ok(RawControl {
        state: info.state,
        details: info.details,
        since_ms: info.stateTime,
    })
}

/// A C string that libvirt allocated for us, freed here. Null gives an empty one.
fn owned_text(text: *mut c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: libvirt gives a C string, which nobody else has.
    let copy = unsafe { CStr::from_ptr(text) }
        .to_string_lossy()
        .into_owned();
    // SAFETY: libvirt allocates with malloc, and hands this string over to us.
    unsafe { nix::libc::free(text.cast()) };
    copy
}

/// `virDomainGetDiskErrors` of up to `most` disks: target name and `virDomainDiskErrorCode`.
pub(super) fn disk_errors(domain: &Domain, most: usize) -> Result<Vec<(String, c_int)>, Error> {
    let empty = || sys::virDomainDiskError {
        disk: ptr::null_mut(),
        error: 0,
    };
    let mut errors: Vec<_> = std::iter::repeat_with(empty).take(most).collect();
    let room = c_uint::try_from(most).unwrap_or(0);
    // SAFETY: `domain` keeps its handle alive for the call, and `errors` has `room` elements.
    let count =
        unsafe { sys::virDomainGetDiskErrors(domain.as_ptr(), errors.as_mut_ptr(), room, 0) };
    let count = usize::try_from(count).map_err(|_| Error::last_error())?;
    errors.truncate(count);
    let told = errors.into_iter();
    Ok(told
        .map(|error| (owned_text(error.disk), error.error))
        .collect())
}

/// `virDomainGetMessages`: deprecations and taints. It asks no monitor.
pub(super) fn messages(domain: &Domain) -> Result<Vec<String>, Error> {
    let mut list: *mut *mut c_char = ptr::null_mut();
    // SAFETY: `domain` keeps its handle alive for the call, and `list` is a valid out pointer.
    let count = unsafe { sys::virDomainGetMessages(domain.as_ptr(), &raw mut list, 0) };
    let count = usize::try_from(count).map_err(|_| Error::last_error())?;
    if list.is_null() {
        return Ok(Vec::new());
    }
    let messages = (0..count)
        // SAFETY: libvirt returned `count` strings, each of which is read, and freed, once.
        .map(|at| owned_text(unsafe { *list.add(at) }))
        .collect();
    // SAFETY: libvirt allocates with malloc, and hands the list over to us.
    unsafe { nix::libc::free(list.cast()) };
    Ok(messages)
}

/// Uuid and name of a domain handle that somebody else owns. Both are fields of the handle: neither
/// asks the daemon.
fn identity(domain: sys::virDomainPtr) -> Result<(Uuid, String), Error> {
    let id = domain_uuid(domain).ok_or_else(Error::last_error)?;
    // SAFETY: the caller's handle is valid; a null one makes libvirt return null.
    let name = unsafe { sys::virDomainGetName(domain) };
    if name.is_null() {
        return Err(Error::last_error());
    }
    // SAFETY: libvirt's name is a C string that belongs to the handle, which is still alive.
    let name = unsafe { CStr::from_ptr(name) };
    Ok((id, name.to_string_lossy().into_owned()))
}

fn domain_uuid(domain: sys::virDomainPtr) -> Option<Uuid> {
    let mut bytes = [0; 16];
    // SAFETY: the handle is valid (a null one makes libvirt return -1), and libvirt writes
    // VIR_UUID_BUFLEN = 16 bytes.
    let answer = unsafe { sys::virDomainGetUUID(domain, bytes.as_mut_ptr()) };
    (answer == 0).then(|| Uuid::from_bytes(bytes))
}

/// Gives the memory that was freed back to the host, where the C library keeps it (glibc does).
///
/// libvirt builds its whole schema in memory for each check and frees it again: some 10 MB, which
/// would stay with each thread that ever made a check.
pub(super) fn give_memory_back() {
    #[cfg(target_env = "gnu")]
    {
        unsafe extern "C" {
            fn malloc_trim(pad: usize) -> c_int;
        }
        // SAFETY: glibc's function has this type, may be called at any time from any thread, and
        // touches only what is free.
        unsafe { malloc_trim(0) };
    }
}

/// Ends the process at once, without the C library's exit handlers.
///
/// Those free what libvirt and the libraries under it keep, while threads of ours are still in their
/// calls: there is no telling a call that hangs to return. Such a thread then meets freed memory, and
/// the process that was to end well ends by a signal (seen: SIGSEGV, on a busy host).
pub(super) fn exit_at_once(code: u8) -> ! {
    unsafe extern "C" {
        fn _exit(code: c_int) -> !;
    }
    // SAFETY: POSIX's function has this type, may be called at any time from any thread, and does not
    // come back.
    unsafe { _exit(c_int::from(code)) }
}
