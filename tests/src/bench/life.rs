// SPDX-License-Identifier: Apache-2.0
//! A guest's life, by both peers in turn: start, rescue, unrescue, stop, start, pauses, suspend and resume,
//! hard reboot, shut down.

use std::fs;
use std::path::Path;
use std::rc::Rc;
use std::time::{Duration, Instant};

use rand::seq::SliceRandom as _;
use salvor_proto::v1::ImageFormat;
use uuid::Uuid;
use virt::connect::Connect;

use super::Bench;
use super::down_time::{Starts, watch_end};
use super::peers::{Agent, Peer, Raw, RescueParts};
use super::report::{Goal, Row};
use super::samples::Samples;
use crate::client::Client;
use crate::console::Console;
use crate::domain::DomainXml;
use crate::guests::{Format, TinyGuest};
use crate::host::TestHost;
use crate::wait::SOON;

// Neither name is part of the other, so that one can be put in the other's place in a definition.
const RAW: &str = "bench-raw";
const OURS: &str = "bench-agent";
const RESCUE: &str = "bench-rescue";

/// More than raw that a rescue or unrescue may take.
const EXCESS: Duration = Duration::from_millis(15);

/// Defines a guest for each peer, and has the agent rescue its own once: the definition that it makes
/// for that, with names and paths changed, is the one that raw uses, so that both start the same machine.
pub(super) fn prepare(
    bench: &Bench,
    host: &TestHost,
    mut client: Client,
    pid: u32,
) -> (Raw, Agent) {
    let image = bench.folder.join("rescue.qcow2");
    TinyGuest::new(RESCUE).build(&image, Format::Qcow2);
    let bytes = fs::read(&image).unwrap();
    let runtime = Rc::clone(&bench.runtime);
    let imported = runtime.block_on(client.import(RESCUE, ImageFormat::Qcow2, &[], bytes));
    let (raws, server) = (define(bench, host, RAW), define(bench, host, OURS));
    runtime.block_on(client.adopt(server));
    let mut ours = Agent {
        runtime,
        client,
        pid,
        server,
        image: imported.id,
    };

    let libvirt = host.libvirt();
    ours.start();
    ours.rescue();
    let rescued = libvirt.inactive_xml(server).unwrap();
    let (before, _) = rescued
        .split_once("/disk.config'")
        .expect("there is a config drive");
    let (_, agents_folder) = before.rsplit_once('\'').unwrap();
    let folder = bench.folder.join("raw-rescue");
    fs::create_dir_all(&folder).unwrap();
    let drive = Path::new(agents_folder).join("disk.config");
    fs::copy(drive, folder.join("disk.config")).unwrap();
    let parts = RescueParts {
        original_xml: libvirt.inactive_xml(raws).unwrap(),
        rescue_xml: rescued
            .replace(agents_folder, folder.to_str().unwrap())
            .replace(&server.to_string(), &raws.to_string())
            .replace(OURS, RAW),
        overlay: folder.join("disk"),
        base: image,
        size: imported.virtual_size_bytes,
    };
    ours.unrescue();
    ours.stop();
    let connection = Connect::open(Some(&host.uri())).unwrap();
    (Raw::new(connection, raws, parts), ours)
}

fn define(bench: &Bench, host: &TestHost, name: &str) -> Uuid {
    let disk = bench.folder.join(format!("{name}.qcow2"));
    TinyGuest::new(name).build(&disk, Format::Qcow2);
    let xml = DomainXml::tiny(name, &bench.folder.join(format!("{name}.console")))
        .disk(&disk, Format::Qcow2, "vda", "virtio", "root", Some(1))
        .xml();
    host.libvirt().define(&xml).unwrap()
}

/// What is measured of one peer.
#[derive(Debug, Default)]
struct Life {
    start: Samples,
    stop: Samples,
    shut_down: Samples,
    rescue: Samples,
    unrescue: Samples,
    down: Samples,
    pause: Samples,
    unpause: Samples,
    suspend: Samples,
    resume: Samples,
    hard_reboot: Samples,
}

/// Measures lives.
struct Measuring<'a> {
    host: &'a TestHost,
    starts: Starts,
}

impl Measuring<'_> {
    /// One life. The guest is off before and after.
    fn live(&self, peer: &mut dyn Peer, name: &str, life: &mut Life) {
        let console = Console::of(&self.host.libvirt(), peer.domain());
        // An operation after which the guest `up` is to come up, and the wait for that.
        let boots = |peer: &mut dyn Peer, samples: &mut Samples, up: &str, act: Act| {
            let mark = console.mark();
            timed(peer, samples, act);
            console.wait_line(mark, &format!("TINY-READY {up}"), SOON);
        };
        boots(peer, &mut life.start, name, |peer| peer.start());

        let qemu = self.host.qemu(peer.domain()).unwrap();
        let ends = watch_end(self.host.machine_pid(qemu).unwrap());
        self.starts.forget();
        boots(peer, &mut life.rescue, RESCUE, |peer| peer.rescue());
        let gone = ends.join().unwrap();
        life.down.add(self.starts.after(gone, name));

        boots(peer, &mut life.unrescue, name, |peer| peer.unrescue());
        timed(peer, &mut life.stop, |peer| peer.stop());
        boots(peer, &mut life.start, name, |peer| peer.start());
        for _ in 0..PAUSES {
            timed(peer, &mut life.pause, |peer| peer.pause());
            timed(peer, &mut life.unpause, |peer| peer.unpause());
        }
        timed(peer, &mut life.suspend, |peer| peer.suspend());
        timed(peer, &mut life.resume, |peer| peer.resume());
        boots(peer, &mut life.hard_reboot, name, |peer| peer.hard_reboot());
        timed(peer, &mut life.shut_down, |peer| peer.shut_down());
    }
}

/// So many pauses in a life: they are short, and the slowest in a hundred of them counts.
const PAUSES: usize = 10;

type Act = fn(&mut dyn Peer);

fn timed(peer: &mut dyn Peer, samples: &mut Samples, act: Act) {
    let cpu = peer.cpu();
    let began = Instant::now();
    act(peer);
    samples.add(began.elapsed());
    samples.add_cpu(peer.cpu().saturating_sub(cpu), 1);
}

/// Lives of both guests, in turns.
pub(super) fn lives(bench: &mut Bench, host: &TestHost, raw: &mut Raw, ours: &mut Agent) {
    let measuring = Measuring {
        host,
        starts: Starts::of(&host.uri()),
    };
    // One life each that does not count.
    measuring.live(raw, RAW, &mut Life::default());
    measuring.live(ours, OURS, &mut Life::default());
    let (mut raws, mut agents) = (Life::default(), Life::default());
    let mut raw_first = [true, false];
    println!("{} rounds of a guest's life", bench.settings.lives);
    for _ in 0..bench.settings.lives {
        raw_first.shuffle(&mut bench.random);
        for raw_turn in raw_first {
            if raw_turn {
                measuring.live(raw, RAW, &mut raws);
            } else {
                measuring.live(ours, OURS, &mut agents);
            }
        }
    }
    let as_long = Goal::RatioAndExcess(1.03, EXCESS);
    let as_quick = Goal::ExcessAndTail(Duration::from_micros(300), 2.0);
    for (operation, base, agent, goal) in [
        ("start", raws.start, agents.start, Goal::Ratio(1.05)),
        ("stop (destroy)", raws.stop, agents.stop, Goal::Ratio(1.03)),
        (
            "stop (power button)",
            raws.shut_down,
            agents.shut_down,
            Goal::Ratio(1.03),
        ),
        ("pause", raws.pause, agents.pause, as_quick),
        ("unpause", raws.unpause, agents.unpause, as_quick),
        ("suspend", raws.suspend, agents.suspend, Goal::Ratio(1.03)),
        ("resume", raws.resume, agents.resume, Goal::Ratio(1.03)),
        (
            "hard reboot",
            raws.hard_reboot,
            agents.hard_reboot,
            Goal::Ratio(1.05),
        ),
        ("rescue", raws.rescue, agents.rescue, as_long),
        ("unrescue", raws.unrescue, agents.unrescue, as_long),
        (
            "down time in rescue",
            raws.down,
            agents.down,
            Goal::Ratio(1.0),
        ),
    ] {
        bench.rows.push(Row {
            operation: operation.to_owned(),
            base_is: "raw",
            base,
            agent,
            goal,
        });
    }
}
