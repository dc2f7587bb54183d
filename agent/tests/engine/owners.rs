// SPDX-License-Identifier: Apache-2.0
//! Disks that a rescue may not write to belong afterwards to whom they belonged before, whatever
//! libvirt does to them in between. Here the test plays libvirt; root may give files away, and so may
//! the agent.

use std::{
    fs,
    os::unix::fs::{MetadataExt as _, chown},
    path::PathBuf,
    sync::Arc,
};

use salvor_agent::{
    core::{
        action::{Action, UnrescueArgs, Verb},
        operation::OperationState,
        plan::Plan,
        record::{OverlayDisposition, Protection},
    },
    engine::{Event, NoProbe, Point, Probe},
    hypervisor::{Boot, Hypervisor as _},
};

use crate::{
    crash::FAIL,
    host::{Agent, Host, NEW, ON, SERVER, adopt, rescue, unrescue},
};

/// To whom the disks belong while the server is off, and the user of QEMU.
const THEIRS: [(u32, u32); 2] = [(7, 8), (0, 9)];
const QEMU: (u32, u32) = (64055, 64055);

fn disks(host: &Host) -> [PathBuf; 2] {
    ["root.raw", "data.qcow2"].map(|name| host.outside().join(name))
}

fn owners(host: &Host) -> [(u32, u32); 2] {
    disks(host).map(|disk| {
        let metadata = fs::metadata(disk).unwrap();
        (metadata.uid(), metadata.gid())
    })
}

fn give(host: &Host, to: [(u32, u32); 2]) {
    for (disk, (uid, gid)) in disks(host).into_iter().zip(to) {
        chown(disk, Some(uid), Some(gid)).unwrap();
    }
}

/// Gives the disks back when the guest is off, as libvirt does; then lets a start fail after libvirt
/// has given them to QEMU again.
struct StartFails {
    disks: [PathBuf; 2],
}

impl Probe for StartFails {
    fn at(&self, plan: &Plan, point: Point) -> Event {
        let (Verb::Rescue, Point::AfterStep(index)) = (plan.verb, point) else {
            return Event::Go;
        };
        let owners = match plan.steps[index].step.kind() {
            "PowerOff" => THEIRS,
            "StartDomain" => [QEMU; 2],
            _ => return Event::Go,
        };
        for (disk, (uid, gid)) in self.disks.iter().zip(owners) {
            chown(disk, Some(uid), Some(gid)).unwrap();
        }
        if owners == THEIRS { Event::Go } else { FAIL }
    }
}

async fn with_server(host: &Host, probe: Arc<dyn Probe>, on: bool) -> Agent {
    let agent = host.agent(probe).await;
    host.add_images(&agent.store).await;
    host.define(&host.foreign_domain(false)).await;
    if on {
        host.fake.start(SERVER, Boot::Resume).await.unwrap();
    }
    agent.succeed(NEW, adopt()).await;
    agent
}

fn rescued(protection: Protection) -> Action {
    let mut args = rescue();
    args.protection = protection;
    Action::Rescue(Box::new(args))
}

const WAYS: [(Protection, Option<OverlayDisposition>); 3] = [
    (Protection::ReadOnly, None),
    (Protection::Overlay, Some(OverlayDisposition::Discard)),
    (Protection::Overlay, Some(OverlayDisposition::Commit)),
];

#[tokio::test]
async fn an_unrescue_gives_protected_disks_back_to_their_owners() {
    for (protection, overlay) in WAYS {
        let host = Host::new();
        let agent = with_server(&host, Arc::new(NoProbe), false).await;
        give(&host, THEIRS);
        agent.succeed(ON, rescued(protection)).await;
        give(&host, [QEMU; 2]);
        let back = UnrescueArgs {
            overlay,
            ..unrescue()
        };
        agent.succeed(ON, Action::Unrescue(back)).await;
        assert_eq!(owners(&host), THEIRS, "{protection} {overlay:?}");
    }
}

#[tokio::test]
async fn a_delete_leaves_the_disks_of_an_adopted_server_to_their_owners() {
    for (protection, _) in WAYS {
        let host = Host::new();
        let agent = with_server(&host, Arc::new(NoProbe), false).await;
        give(&host, THEIRS);
        agent.succeed(ON, rescued(protection)).await;
        give(&host, [QEMU; 2]);
        agent.succeed(ON, Action::Delete).await;
        assert_eq!(owners(&host), THEIRS, "{protection}");
    }
}

#[tokio::test]
async fn a_rescue_that_is_taken_back_gives_the_disks_back_before_the_server_starts() {
    for (protection, _) in WAYS {
        let host = Host::new();
        let disks = disks(&host);
        let agent = with_server(&host, Arc::new(StartFails { disks }), true).await;
        give(&host, [QEMU; 2]);
        let operation = agent.carry_out(ON, rescued(protection)).await;
        assert_eq!(operation.state, OperationState::Failed);
        assert_eq!(owners(&host), THEIRS, "{protection}");
    }
}

#[tokio::test]
async fn what_a_rescue_may_write_to_is_libvirts_alone() {
    let host = Host::new();
    let agent = with_server(&host, Arc::new(NoProbe), false).await;
    agent.succeed(ON, rescued(Protection::ReadWrite)).await;
    give(&host, [QEMU; 2]);
    agent.succeed(ON, Action::Unrescue(unrescue())).await;
    assert_eq!(owners(&host), [QEMU; 2]);
}
