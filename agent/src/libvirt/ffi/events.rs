// SPDX-License-Identifier: Apache-2.0
//! Registrations for what libvirt tells, and the callbacks in which it does. They run on libvirt's threads,
//! and a close callback even on whichever thread happens to read the socket: they do nothing but send on a
//! channel, and a panic never crosses into C.

use std::ffi::{CStr, c_char, c_int, c_ulonglong, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;

use uuid::Uuid;
use virt::connect::Connect;
use virt::error::Error;
use virt::sys;

use super::domain_uuid;

/// What libvirt tells through a callback.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::libvirt) enum Told {
    /// A `virDomainEventType` of a domain.
    Lifecycle { id: Uuid, event: c_int },
    /// A `virConnectDomainEventAgentLifecycleState` of a domain.
    GuestAgent { id: Uuid, state: c_int },
    /// A guest was reset.
    Reboot { id: Uuid },
    /// A guest's watchdog fired, with this `virDomainEventWatchdogAction`.
    Watchdog { id: Uuid, action: c_int },
    /// A disk failed, with this `virDomainEventIOErrorAction`.
    IoError {
        id: Uuid,
        source: String,
        device: String,
        action: c_int,
        reason: String,
    },
    /// A job on a disk has this `virConnectDomainEventBlockJobStatus`.
    BlockJob {
        id: Uuid,
        disk: String,
        status: c_int,
    },
    /// A device is gone.
    DeviceRemoved { id: Uuid, device: String },
    /// A guest has so much memory now.
    Balloon { id: Uuid, memory_kib: u64 },
    /// The connection has ended, for this `virConnectCloseReason`.
    Closed { reason: c_int },
}

/// Where callbacks deliver. It runs on libvirt's threads: it may only send on a channel.
pub(in crate::libvirt) type Sink = Box<dyn Fn(Told) + Send + Sync>;

/// A registration for domain events. It ends when this is dropped.
pub(in crate::libvirt) struct DomainEvents {
    connect: Connect,
    callback: c_int,
}

/// What can be registered for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::libvirt) enum EventKind {
    /// [`Told::Lifecycle`]
    Lifecycle,
    /// [`Told::GuestAgent`]
    GuestAgent,
    /// [`Told::Reboot`]
    Reboot,
    /// [`Told::Watchdog`]
    Watchdog,
    /// [`Told::IoError`]
    IoError,
    /// [`Told::BlockJob`]
    BlockJob,
    /// [`Told::DeviceRemoved`]
    DeviceRemoved,
    /// [`Told::Balloon`]
    Balloon,
}

impl EventKind {
    /// Those that a driver need not have.
    pub(in crate::libvirt) const OPTIONAL: &'static [Self] = &[
        Self::GuestAgent,
        Self::Reboot,
        Self::Watchdog,
        Self::IoError,
        Self::BlockJob,
        Self::DeviceRemoved,
        Self::Balloon,
    ];

    /// libvirt's number of the event, and the function that it is to call.
    fn callback(self) -> (sys::virDomainEventID, GenericCallback) {
        use std::mem::transmute;
        // SAFETY: libvirt calls the function with the arguments that belong to the event of the number,
        // and converts it in the same way (VIR_DOMAIN_EVENT_CALLBACK). Each function here has those of
        // the type that libvirt-domain.h names for its number.
        unsafe {
            match self {
                Self::Lifecycle => (
                    sys::VIR_DOMAIN_EVENT_ID_LIFECYCLE,
                    transmute::<LifecycleCallback, GenericCallback>(on_lifecycle),
                ),
                Self::GuestAgent => (
                    sys::VIR_DOMAIN_EVENT_ID_AGENT_LIFECYCLE,
                    transmute::<AgentCallback, GenericCallback>(on_guest_agent),
                ),
                Self::Reboot => (
                    sys::VIR_DOMAIN_EVENT_ID_REBOOT,
                    on_reboot as GenericCallback,
                ),
                Self::Watchdog => (
                    sys::VIR_DOMAIN_EVENT_ID_WATCHDOG,
                    transmute::<WatchdogCallback, GenericCallback>(on_watchdog),
                ),
                Self::IoError => (
                    sys::VIR_DOMAIN_EVENT_ID_IO_ERROR_REASON,
                    transmute::<IoErrorCallback, GenericCallback>(on_io_error),
                ),
                Self::BlockJob => (
                    sys::VIR_DOMAIN_EVENT_ID_BLOCK_JOB_2,
                    transmute::<BlockJobCallback, GenericCallback>(on_block_job),
                ),
                Self::DeviceRemoved => (
                    sys::VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED,
                    transmute::<DeviceCallback, GenericCallback>(on_device_removed),
                ),
                Self::Balloon => (
                    sys::VIR_DOMAIN_EVENT_ID_BALLOON_CHANGE,
                    transmute::<BalloonCallback, GenericCallback>(on_balloon),
                ),
            }
        }
    }
}

impl DomainEvents {
    /// Registers for events of every domain.
    pub(in crate::libvirt) fn register(
        connect: &Connect,
        kind: EventKind,
        sink: Sink,
    ) -> Result<Self, Error> {
        let (event, callback) = kind.callback();
        let opaque = Box::into_raw(Box::new(sink)).cast::<c_void>();
        // SAFETY: the connection is alive, the callback fits the event (see EventKind), and
        // `opaque` is a boxed sink that libvirt hands to `free_sink` when it needs it no more.
        let callback = unsafe {
            sys::virConnectDomainEventRegisterAny(
                connect.as_ptr(),
                ptr::null_mut(),
                event.cast_signed(),
                Some(callback),
                opaque,
                Some(free_sink),
            )
        };
        if callback < 0 {
            let error = Error::last_error();
            // SAFETY: libvirt does not call the free function when it refuses a registration, so
            // the box is still ours.
            unsafe { free_sink(opaque) };
            return Err(error);
        }
        Ok(Self {
            connect: connect.clone(),
            callback,
        })
    }
}

impl Drop for DomainEvents {
    fn drop(&mut self) {
        // SAFETY: the connection is alive and the id is of a registration of it that only this drop
        // ends. On a broken connection it still ends our side, so the answer does not matter.
        unsafe {
            sys::virConnectDomainEventDeregisterAny(self.connect.as_ptr(), self.callback);
        }
    }
}

/// A registration for the end of a connection. It ends when this is dropped.
pub(in crate::libvirt) struct CloseWatch {
    connect: Connect,
}

impl CloseWatch {
    /// Registers; fails with `NoSupport` for drivers that have no connection to lose.
    pub(in crate::libvirt) fn new(connect: &Connect, sink: Sink) -> Result<Self, Error> {
        let opaque = Box::into_raw(Box::new(sink)).cast::<c_void>();
        // SAFETY: the connection is alive, `on_close` is a virConnectCloseFunc, and `opaque` is a
        // boxed sink that libvirt hands to `free_sink` when it needs it no more.
        let answer = unsafe {
            sys::virConnectRegisterCloseCallback(
                connect.as_ptr(),
                Some(on_close),
                opaque,
                Some(free_sink),
            )
        };
        if answer < 0 {
            let error = Error::last_error();
            // SAFETY: libvirt does not call the free function when it refuses a registration, so
            // the box is still ours.
            unsafe { free_sink(opaque) };
            return Err(error);
        }
        Ok(Self {
            connect: connect.clone(),
        })
    }
}

impl Drop for CloseWatch {
    fn drop(&mut self) {
        // SAFETY: the connection is alive and this is the function it was registered with.
        unsafe { sys::virConnectUnregisterCloseCallback(self.connect.as_ptr(), Some(on_close)) };
    }
}

type GenericCallback = unsafe extern "C" fn(sys::virConnectPtr, sys::virDomainPtr, *mut c_void);
type LifecycleCallback =
    unsafe extern "C" fn(sys::virConnectPtr, sys::virDomainPtr, c_int, c_int, *mut c_void) -> c_int;
type AgentCallback =
    unsafe extern "C" fn(sys::virConnectPtr, sys::virDomainPtr, c_int, c_int, *mut c_void);
type WatchdogCallback =
    unsafe extern "C" fn(sys::virConnectPtr, sys::virDomainPtr, c_int, *mut c_void);
type IoErrorCallback = unsafe extern "C" fn(
    sys::virConnectPtr,
    sys::virDomainPtr,
    *const c_char,
    *const c_char,
    c_int,
    *const c_char,
    *mut c_void,
);
type BlockJobCallback = unsafe extern "C" fn(
    sys::virConnectPtr,
    sys::virDomainPtr,
    *const c_char,
    c_int,
    c_int,
    *mut c_void,
);
type DeviceCallback =
    unsafe extern "C" fn(sys::virConnectPtr, sys::virDomainPtr, *const c_char, *mut c_void);
type BalloonCallback =
    unsafe extern "C" fn(sys::virConnectPtr, sys::virDomainPtr, c_ulonglong, *mut c_void);

unsafe extern "C" fn on_lifecycle(
    _connect: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    event: c_int,
    _detail: c_int,
    opaque: *mut c_void,
) -> c_int {
    // SAFETY: libvirt passes the sink that was registered, and frees it only after the last call.
    unsafe {
        deliver(opaque, || {
            Some(Told::Lifecycle {
                id: domain_uuid(domain)?,
                event,
            })
        })
    };
    0
}

unsafe extern "C" fn on_guest_agent(
    _connect: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    state: c_int,
    _reason: c_int,
    opaque: *mut c_void,
) {
    // SAFETY: libvirt passes the sink that was registered, and frees it only after the last call.
    unsafe {
        deliver(opaque, || {
            Some(Told::GuestAgent {
                id: domain_uuid(domain)?,
                state,
            })
        })
    };
}

unsafe extern "C" fn on_reboot(
    _connect: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    opaque: *mut c_void,
) {
    // SAFETY: libvirt passes the sink that was registered, and frees it only after the last call.
    unsafe {
        deliver(opaque, || {
            Some(Told::Reboot {
                id: domain_uuid(domain)?,
            })
        })
    };
}

unsafe extern "C" fn on_watchdog(
    _connect: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    action: c_int,
    opaque: *mut c_void,
) {
    // SAFETY: libvirt passes the sink that was registered, and frees it only after the last call.
    unsafe {
        deliver(opaque, || {
            Some(Told::Watchdog {
                id: domain_uuid(domain)?,
                action,
            })
        })
    };
}

unsafe extern "C" fn on_io_error(
    _connect: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    source: *const c_char,
    device: *const c_char,
    action: c_int,
    reason: *const c_char,
    opaque: *mut c_void,
) {
    // SAFETY: libvirt passes the sink that was registered, and frees it only after the last call; its
    // texts are C strings or null, and live as long as this call.
    unsafe {
        deliver(opaque, || {
            Some(Told::IoError {
                id: domain_uuid(domain)?,
                source: text(source),
                device: text(device),
                action,
                reason: text(reason),
            })
        })
    };
}

unsafe extern "C" fn on_block_job(
    _connect: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    disk: *const c_char,
    _kind: c_int,
    status: c_int,
    opaque: *mut c_void,
) {
    // SAFETY: as in `on_io_error`.
    unsafe {
        deliver(opaque, || {
            Some(Told::BlockJob {
                id: domain_uuid(domain)?,
                disk: text(disk),
                status,
            })
        })
    };
}

unsafe extern "C" fn on_device_removed(
    _connect: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    device: *const c_char,
    opaque: *mut c_void,
) {
    // SAFETY: as in `on_io_error`.
    unsafe {
        deliver(opaque, || {
            Some(Told::DeviceRemoved {
                id: domain_uuid(domain)?,
                device: text(device),
            })
        })
    };
}

unsafe extern "C" fn on_balloon(
    _connect: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    memory_kib: c_ulonglong,
    opaque: *mut c_void,
) {
    // SAFETY: libvirt passes the sink that was registered, and frees it only after the last call.
    unsafe {
        deliver(opaque, || {
            Some(Told::Balloon {
                id: domain_uuid(domain)?,
                memory_kib,
            })
        })
    };
}

/// A text of libvirt's; empty if there is none.
///
/// # Safety
/// `text` must be null or a C string that lives as long as the call.
unsafe fn text(text: *const c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: see above.
    let text = unsafe { CStr::from_ptr(text) };
    text.to_string_lossy().into_owned()
}

unsafe extern "C" fn on_close(_connect: sys::virConnectPtr, reason: c_int, opaque: *mut c_void) {
    // SAFETY: libvirt passes the sink that was registered, and frees it only after the last call.
    unsafe { deliver(opaque, || Some(Told::Closed { reason })) };
}

/// Hands to the sink what `told` makes, if anything.
///
/// # Safety
/// `opaque` must point to a live, boxed [`Sink`].
unsafe fn deliver(opaque: *mut c_void, told: impl FnOnce() -> Option<Told>) {
    // SAFETY: see above.
    let sink = unsafe { &*opaque.cast::<Sink>() };
    // A panic must not unwind into libvirt; there is nobody to tell of it here but the panic hook.
    let _ = catch_unwind(AssertUnwindSafe(|| {
        if let Some(told) = told() {
            sink(told);
        }
    }));
}

/// Frees a boxed [`Sink`].
///
/// # Safety
/// `opaque` must come from `Box::into_raw` of a boxed [`Sink`] and not be used again.
unsafe extern "C" fn free_sink(opaque: *mut c_void) {
    // SAFETY: see above.
    drop(unsafe { Box::from_raw(opaque.cast::<Sink>()) });
}
