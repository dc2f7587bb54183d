// SPDX-License-Identifier: Apache-2.0
//! What can be seen and heard of the fake host's guests: a serial port that says what is sent to it and
//! what the test has the guest say, and counters that are always the same.

use std::time::Duration;

use tokio::sync::{broadcast::error::RecvError, mpsc};
use uuid::Uuid;

use super::{FakeHypervisor, lock};
use crate::hypervisor::{
    ConsoleSaid, ConsoleSink, Control, Counters, DiskCounters, GuestInfo, Hypervisor as _,
    InterfaceCounters, MemoryCounters,
};

impl FakeHypervisor {
    /// The guest writes this to its serial port.
    pub fn guest_says(&self, id: Uuid, bytes: &[u8]) {
        // Nobody listening is no error.
        let _ = self.host.said.send((id, bytes.to_vec()));
    }

    /// A line to the serial port of a running domain, until that ends.
    pub(super) fn line(&self, id: Uuid, mut said: ConsoleSink) -> mpsc::Sender<Vec<u8>> {
        let (sender, mut input) = mpsc::channel::<Vec<u8>>(8);
        let (mut guest, mut events) = (self.host.said.subscribe(), self.events());
        let fake = self.clone();
        tokio::spawn(async move {
            let why = loop {
                tokio::select! {
                    bytes = input.recv() => match bytes {
                        Some(bytes) => said(ConsoleSaid::Bytes(&bytes)),
                        None => break "closed",
                    },
                    heard = guest.recv() => match heard {
                        Ok((of, bytes)) if of == id => said(ConsoleSaid::Bytes(&bytes)),
                        Ok(_) | Err(RecvError::Lagged(_)) => {}
                        Err(RecvError::Closed) => break "the host is gone",
                    },
                    _ = events.recv() => {
                        let state = lock(&fake.host.state);
                        if state.domains.get(&id).is_none_or(|d| d.live.is_none()) {
                            break "the guest is off";
                        }
                    },
                }
            };
            said(ConsoleSaid::Ended(why));
        });
        sender
    }
}

pub(super) const fn control() -> Control {
    Control {
        state: "occupied",
        error: "",
        since: Duration::from_secs(7),
    }
}

pub(super) fn counters() -> Counters {
    Counters {
        cpu_time: Duration::from_secs(3),
        vcpus: 2,
        complete: true,
        memory: MemoryCounters {
            current_kib: Some(1024),
            ..MemoryCounters::default()
        },
        disks: vec![DiskCounters {
            target: "vda".to_owned(),
            read_requests: 11,
            ..DiskCounters::default()
        }],
        interfaces: vec![InterfaceCounters {
            device: "vnet0".to_owned(),
            sent_packets: 12,
            ..InterfaceCounters::default()
        }],
    }
}

pub(super) fn info() -> GuestInfo {
    GuestInfo {
        version: "7.2".to_owned(),
        hostname: "evil\u{1b}[2Jhost".to_owned(),
        system: "Some Linux".to_owned(),
        kernel: "6.1".to_owned(),
    }
}
