// SPDX-License-Identifier: Apache-2.0
//! The calls that touch no guest: get and lock, the empty RPC they are compared with, and lists; and how
//! soon an agent with many servers serves.

use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use rand::seq::SliceRandom as _;
use salvor_proto::v1::{ListServersRequest, LockServerRequest, UnlockServerRequest};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;
use uuid::Uuid;
use virt::connect::Connect;

use super::Bench;
use super::peers::{Agent, Peer as _, Raw};
use super::process;
use super::report::{Goal, Row};
use super::samples::Samples;
use crate::agent::TestAgent;
use crate::domain::DomainXml;
use crate::guests::{Format, TinyGuest};
use crate::host::TestHost;
use crate::wait::SOON;

/// So many servers are adopted at a time.
pub(super) const AT_ONCE: usize = 16;

#[derive(Debug, Clone, Copy)]
enum Turn {
    Empty,
    Raw,
    Agent,
}

/// Get of one server, against an empty RPC on the same connection and against libvirt's own answer.
///
/// The empty RPC is `grpc.health.v1.Health/Check`, which answers from memory what it is told there.
pub(super) fn gets(bench: &mut Bench, agent: &TestAgent<'_>, raw: &Raw, ours: &mut Agent) {
    let mut health = {
        let _entered = bench.runtime.enter();
        HealthClient::new(agent.channel())
    };
    let (mut empty, mut looked_up, mut get) =
        (Samples::default(), Samples::default(), Samples::default());
    let mut turns = [Turn::Empty, Turn::Raw, Turn::Agent];
    let (domain, server) = (raw.domain(), ours.server);
    println!("{} rounds of get", bench.settings.calls);
    for round in 0..bench.settings.calls + WARM_UP {
        turns.shuffle(&mut bench.random);
        for turn in turns {
            let began = Instant::now();
            let samples = match turn {
                Turn::Empty => {
                    let request = HealthCheckRequest::default();
                    bench.runtime.block_on(health.check(request)).unwrap();
                    &mut empty
                }
                Turn::Raw => {
                    raw.get(domain);
                    &mut looked_up
                }
                Turn::Agent => {
                    bench.runtime.block_on(ours.client.get(server));
                    &mut get
                }
            };
            let took = began.elapsed();
            if round >= WARM_UP {
                samples.add(took);
            }
        }
    }
    let same_gets = get.clone();
    // CPU is told in ticks that are longer than a call, so it is taken of many calls in a row.
    let before = ours.cpu();
    for _ in 0..bench.settings.calls {
        bench.runtime.block_on(ours.client.get(server));
    }
    get.add_cpu(ours.cpu() - before, bench.settings.calls);
    bench.rows.push(Row {
        operation: "get".to_owned(),
        base_is: "empty RPC",
        base: empty,
        agent: get,
        goal: Goal::Ratio(1.5),
    });
    bench.rows.push(Row {
        operation: "get".to_owned(),
        base_is: "raw lookup + info",
        base: looked_up,
        agent: same_gets,
        goal: Goal::None,
    });
}

/// Lock and unlock, plans without steps, against an empty RPC: what it costs to admit an action, to write
/// down that it is done (synced), and to tell of it.
pub(super) fn locks(bench: &mut Bench, agent: &TestAgent<'_>, ours: &mut Agent) {
    let mut health = {
        let _entered = bench.runtime.enter();
        HealthClient::new(agent.channel())
    };
    let (mut empty, mut lock) = (Samples::default(), Samples::default());
    let rounds = bench.settings.calls / 10;
    println!("{rounds} rounds of lock and unlock");
    let server = ours.server.to_string();
    for round in 0..rounds + WARM_UP {
        for locks in [true, false] {
            let request = HealthCheckRequest::default();
            let began = Instant::now();
            bench.runtime.block_on(health.check(request)).unwrap();
            let nothing = began.elapsed();
            let (server, servers) = (server.clone(), &mut ours.client.servers);
            let began = Instant::now();
            let operation = bench.runtime.block_on(async {
                if locks {
                    let request = LockServerRequest {
                        server,
                        ..LockServerRequest::default()
                    };
                    servers
                        .lock_server(request)
                        .await
                        .unwrap()
                        .into_inner()
                        .operation
                } else {
                    let request = UnlockServerRequest {
                        server,
                        ..UnlockServerRequest::default()
                    };
                    servers
                        .unlock_server(request)
                        .await
                        .unwrap()
                        .into_inner()
                        .operation
                }
            });
            let took = began.elapsed();
            assert!(operation.unwrap().done, "it is done when it is answered");
            if round >= WARM_UP {
                empty.add(nothing);
                lock.add(took);
            }
        }
    }
    bench.rows.push(Row {
        operation: "lock (an empty plan)".to_owned(),
        base_is: "empty RPC",
        base: empty,
        agent: lock,
        goal: Goal::Excess(Duration::from_millis(1)),
    });
}

/// Calls that are made before the measured ones, for connections to be opened and caches to fill.
const WARM_UP: u32 = 20;

/// Lists of servers that are off, on a host of their own, against libvirt's list of the same domains
/// with their uuids and names. (libvirt's list does not tell states: raw does less than the agent.)
pub(super) fn lists(bench: &mut Bench) {
    let folder = bench.folder.join("many");
    let host = TestHost::start(&folder);
    let connection = Connect::open(Some(&host.uri())).unwrap();
    let mut agent = bench.agent(&host, &folder);
    let pid = agent.machine_pid().unwrap();
    let client = bench.client(&agent);
    let disk = folder.join("disk.qcow2");
    TinyGuest::new("list").build(&disk, Format::Qcow2);
    let mut defined = 0;
    for size in bench.settings.lists.clone() {
        println!("lists of {size} servers");
        let domains: Vec<Uuid> = (defined..size)
            .map(|number| {
                let name = format!("list-{number}");
                let xml = DomainXml::tiny(&name, &folder.join(format!("{name}.console")))
                    .disk(&disk, Format::Qcow2, "vda", "virtio", "root", Some(1))
                    .xml();
                connection.define_domain_xml(&xml).unwrap().uuid().unwrap()
            })
            .collect();
        let adopted = futures_util::stream::iter(domains).map(|domain| {
            let mut client = client.clone();
            async move { client.adopt(domain).await }
        });
        bench
            .runtime
            .block_on(adopted.buffer_unordered(AT_ONCE).count());
        defined = size;

        let (mut raw, mut ours) = (Samples::default(), Samples::default());
        let rounds = (bench.settings.calls / 10).max(10);
        let mut turns = [Turn::Raw, Turn::Agent];
        let mut client = client.clone();
        let runtime = &bench.runtime;
        let mut list_ours = || {
            let request = ListServersRequest {
                page_size: 1000,
                ..ListServersRequest::default()
            };
            let page = runtime.block_on(client.servers.list_servers(request));
            page.unwrap().into_inner().servers.len()
        };
        for round in 0..rounds + WARM_UP {
            turns.shuffle(&mut bench.random);
            for turn in turns {
                let began = Instant::now();
                let (samples, listed) = match turn {
                    Turn::Raw | Turn::Empty => (&mut raw, list_raw(&connection)),
                    Turn::Agent => (&mut ours, list_ours()),
                };
                let took = began.elapsed();
                assert_eq!(listed, size, "not all are in the list");
                if round >= WARM_UP {
                    samples.add(took);
                }
            }
        }
        // CPU is told in ticks that may be longer than a call, so it is taken of many calls in a row.
        let calls = bench.settings.calls;
        let before = process::own_cpu();
        for _ in 0..calls {
            list_raw(&connection);
        }
        raw.add_cpu(process::own_cpu() - before, calls);
        let before = process::cpu(pid);
        for _ in 0..calls {
            list_ours();
        }
        ours.add_cpu(process::cpu(pid) - before, calls);
        bench.rows.push(Row {
            operation: format!("list of {size}"),
            base_is: "raw list",
            base: raw,
            agent: ours,
            goal: match size {
                1000 => Goal::Within(Duration::from_millis(8)),
                _ => Goal::None,
            },
        });
    }
    bench.rss(
        &format!("RSS of an agent with {defined} servers"),
        pid,
        Some(45.0),
    );
    start_up(bench, &mut agent, defined);
}

/// From the start of the process to its first answer with all servers, the slowest of some starts.
fn start_up(bench: &mut Bench, agent: &mut TestAgent<'_>, servers: usize) {
    let slowest = (0..STARTS).map(|_| {
        agent.sigterm_and_wait(SOON);
        let mut client = bench.client(agent);
        let began = Instant::now();
        agent.spawn();
        let listed = bench.runtime.block_on(async {
            loop {
                let request = ListServersRequest {
                    page_size: 1000,
                    ..ListServersRequest::default()
                };
                if let Ok(page) = client.servers.list_servers(request).await {
                    return page.into_inner().servers.len();
                }
                assert!(began.elapsed() < SOON, "the agent does not serve");
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        });
        let took = began.elapsed();
        assert_eq!(listed, servers, "not all are in the list");
        bench.runtime.block_on(agent.wait_linked());
        took
    });
    let slowest = slowest.max().unwrap_or_default();
    bench.figure(
        &format!("start-up to serving with {servers} servers, slowest of {STARTS}"),
        slowest.as_secs_f64(),
        "s",
        Some(1.0),
    );
}

/// So many starts of an agent are measured.
const STARTS: u32 = 5;

fn list_raw(connection: &Connect) -> usize {
    let domains = connection.list_all_domains(0).unwrap();
    for domain in &domains {
        domain.uuid().unwrap();
        domain.name().unwrap();
    }
    domains.len()
}
