// SPDX-License-Identifier: Apache-2.0
//! What the agent takes while nobody asks it anything: alone, and with guests that run.

use futures_util::StreamExt as _;
use uuid::Uuid;

use super::Bench;
use super::calls::AT_ONCE;
use super::process;
use crate::console::{Console, Mark};
use crate::domain::DomainXml;
use crate::guests::{Format, TinyGuest};
use crate::host::TestHost;
use crate::wait::SOON;

/// Watches the agent for a while. `cpu` is the goal in seconds a minute, `rss` the one in MiB.
pub(super) fn idle(bench: &mut Bench, pid: u32, whose: &str, cpu: f64, rss: Option<f64>) {
    let watched = bench.settings.idle;
    println!("the agent {whose} idles for {watched:?}");
    let before = process::cpu(pid);
    std::thread::sleep(watched);
    let minutes = watched.as_secs_f64() / 60.0;
    let taken = (process::cpu(pid) - before).as_secs_f64() / minutes;
    bench.rss(&format!("RSS of the idle agent {whose}"), pid, rss);
    let what = format!("CPU of the idle agent {whose} in a minute");
    bench.figure(&what, taken, "s", Some(cpu));
}

/// The same with guests that run, on a host of their own.
pub(super) fn idle_with_guests(bench: &mut Bench) {
    let folder = bench.folder.join("guests");
    let host = TestHost::start(&folder);
    let libvirt = host.libvirt();
    let count = bench.settings.guests;
    println!("{count} guests are started");
    let guests: Vec<Uuid> = (0..count)
        .map(|number| {
            let name = format!("idle-{number}");
            let disk = folder.join(format!("{name}.qcow2"));
            TinyGuest::new(&name).build(&disk, Format::Qcow2);
            let xml = DomainXml::tiny(&name, &folder.join(format!("{name}.console")))
                .disk(&disk, Format::Qcow2, "vda", "virtio", "root", Some(1))
                .xml();
            let id = libvirt.define(&xml).unwrap();
            libvirt.start(id).unwrap();
            Console::of(&libvirt, id).wait_line(Mark::START, &format!("TINY-READY {name}"), SOON);
            id
        })
        .collect();
    let agent = bench.agent(&host, &folder);
    let client = bench.client(&agent);
    let adopted = futures_util::stream::iter(guests).map(|domain| {
        let mut client = client.clone();
        async move { client.adopt(domain).await }
    });
    let adopted = adopted.buffer_unordered(AT_ONCE).count();
    assert_eq!(bench.runtime.block_on(adopted), count);
    let pid = agent.machine_pid().unwrap();
    idle(bench, pid, &format!("with {count} guests"), 0.1, None);
}
