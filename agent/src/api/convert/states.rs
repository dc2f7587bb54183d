// SPDX-License-Identifier: Apache-2.0
//! The enums of the core as those of the API and back.
//!
//! Both directions are exhaustive: a value that is added on one side does not compile until the other
//! has it.

use salvor_proto::v1;

use crate::core::{
    image::ImageFormat,
    operation::{GuestStop, OperationState, StepState},
    reason::Refusal,
    record::{
        LockOwner, Origin, OverlayDisposition, PasswordDelivery, Protection, RescueBus,
        RescueDevice, RescueMode,
    },
    state::{ObservationSource, PowerState, VmState},
};

/// An enum that the API has as well.
pub(in crate::api) trait Wire: Sized {
    /// The number that the API has for it.
    fn wire(self) -> i32;

    /// The value behind a number of field `field`; `None` if it is the unspecified one.
    ///
    /// # Errors
    /// If the API has no such number.
    fn from_wire(field: &str, number: i32) -> Result<Option<Self>, Refusal>;
}

macro_rules! wire {
    ($($core:ident = $proto:ident { $($ours:ident = $theirs:ident),+ $(,)? })+) => {
        $(impl Wire for $core {
            fn wire(self) -> i32 {
                match self { $(Self::$ours => v1::$proto::$theirs.into(),)+ }
            }

            fn from_wire(field: &str, number: i32) -> Result<Option<Self>, Refusal> {
                match v1::$proto::try_from(number) {
                    Ok(v1::$proto::Unspecified) => Ok(None),
                    $(Ok(v1::$proto::$theirs) => Ok(Some(Self::$ours)),)+
                    Err(_) => Err(Refusal::field(
                        field,
                        format!("{number} is no value of {}", stringify!($proto)),
                    )),
                }
            }
        })+

        #[cfg(test)]
        mod tests {
            use super::*;

            #[test]
            fn every_value_survives_the_way_there_and_back() {
                $(for value in $core::ALL {
                    assert_ne!(value.wire(), 0, "{value}");
                    assert_eq!($core::from_wire("f", value.wire()).unwrap_or_default(), Some(*value));
                }
                assert_eq!($core::from_wire("f", 0), Ok(None));
                // As many values there as here, and none beyond.
                let count = (1..100).filter(|number| v1::$proto::try_from(*number).is_ok()).count();
                assert_eq!(count, $core::ALL.len(), stringify!($proto));
                for unknown in [-1, 100, i32::MIN, i32::MAX] {
                    assert!($core::from_wire("f", unknown).is_err());
                })+
            }
        }
    };
}

wire! {
    VmState = VmState {
        Building = Building, Active = Active, Paused = Paused, Suspended = Suspended, Stopped = Stopped,
        Rescued = Rescued, Resized = Resized, SoftDeleted = SoftDeleted, Deleted = Deleted, Error = Error,
        Shelved = Shelved, ShelvedOffloaded = ShelvedOffloaded,
    }
    PowerState = PowerState {
        NoState = Nostate, Running = Running, Paused = Paused, Shutdown = Shutdown, Crashed = Crashed,
        Suspended = Suspended, Unknown = Unknown,
    }
    ObservationSource = ObservationSource { Event = Event, Poll = Poll, Inferred = Inferred }
    Origin = ServerOrigin { Created = Created, Adopted = Adopted }
    RescueMode = RescueMode { Classic = Classic, Stable = Stable }
    RescueBus = RescueBus { Virtio = Virtio, Scsi = Scsi, Usb = Usb, Sata = Sata, Ide = Ide }
    RescueDevice = RescueDevice { Disk = Disk, Cdrom = Cdrom }
    Protection = DiskProtection { ReadWrite = ReadWrite, Overlay = Overlay, ReadOnly = ReadOnly }
    OverlayDisposition = OverlayDisposition { Commit = Commit, Discard = Discard }
    PasswordDelivery = AdminPassDelivery { ConfigDrive = ConfigDrive, GuestAgent = GuestAgent }
    OperationState = OperationState {
        Running = Running, Reverting = Reverting, CleaningUp = CleaningUp, Done = Done, Failed = Failed,
        Cancelled = Cancelled,
    }
    StepState = StepState {
        Pending = Pending, Running = Running, Done = Done, Failed = Failed, Reverting = Reverting,
        Reverted = Reverted, RevertFailed = RevertFailed,
    }
    GuestStop = GuestStop { WasOff = WasOff, ByItself = ByItself, Forced = Forced }
    ImageFormat = ImageFormat { Raw = Raw, Qcow2 = Qcow2, Iso = Iso }
    LockOwner = LockOwner { Owner = Owner, Admin = Admin }
}
