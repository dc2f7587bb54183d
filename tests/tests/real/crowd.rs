// SPDX-License-Identifier: Apache-2.0
//! Two hundred servers on one host: listed, watched, and stopped all at once. Their guests are started with
//! their CPUs stopped, so that they cost memory and nothing else.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use salvor_proto::v1::{
    Event, GetHostRequest, GuestStop, PowerState, ResetServerStateRequest, Server, StepState,
    VmState, WatchEventsRequest, event::Change, watch_events_response::Item,
};
use salvor_tests::agent::AgentSettings;
use salvor_tests::client::{Client, metadata_of};
use salvor_tests::host::TestHost;
use salvor_tests::libvirt::Libvirt;
use salvor_tests::run_folder::RunFolder;
use salvor_tests::wait::SOON;
use uuid::Uuid;
use virt::domain::DomainState;
use virt::sys;

use crate::scene::{Scene, power_of};

const SERVERS: usize = 200;

/// So many are defined and started one after the other, and so many such groups at a time.
const GROUP: usize = 10;
const GROUPS: usize = 4;

/// As small a machine as can be.
fn definition(number: usize) -> String {
    format!(
        "<domain type='qemu'><name>crowd-{number:03}</name><memory unit='MiB'>8</memory>\
         <os><type arch='x86_64' machine='pc'>hvm</type></os>\
         <devices><controller type='usb' model='none'/><memballoon model='none'/></devices></domain>"
    )
}

/// Defines and starts them, as an operator with `virsh start --paused` would.
async fn gather(libvirt: &Libvirt) -> Vec<Uuid> {
    let numbers: Vec<usize> = (0..SERVERS).collect();
    let mut ids = Vec::new();
    for groups in numbers.chunks(GROUP * GROUPS) {
        let started = groups.chunks(GROUP).map(|group| {
            let (group, libvirt) = (group.to_vec(), libvirt.clone());
            tokio::task::spawn_blocking(move || {
                let started = libvirt.call(move |connection| {
                    let start = |number: usize| {
                        let domain = connection.define_domain_xml(&definition(number))?;
                        domain.create_with_flags(sys::VIR_DOMAIN_START_PAUSED)?;
                        domain.uuid()
                    };
                    group.into_iter().map(start).collect::<Result<Vec<_>, _>>()
                });
                started.unwrap()
            })
        });
        for started in join_all(started).await {
            ids.extend(started.unwrap());
        }
    }
    ids
}

/// Checks that all are listed, and are so.
async fn assert_all(client: &mut Client, vm_state: VmState, power: PowerState) -> Vec<Server> {
    let servers = client.list().await;
    assert_eq!(servers.len(), SERVERS);
    for server in &servers {
        Client::assert_settled(server, vm_state);
        assert_eq!(power_of(server), power, "{server:#?}");
    }
    servers
}

async fn reset(client: &mut Client, id: Uuid) {
    let request = ResetServerStateRequest {
        server: id.to_string(),
        state: VmState::Error.into(),
        ..ResetServerStateRequest::default()
    };
    let answer = client.servers.reset_server_state(request).await.unwrap();
    let reset = client.wait(&answer.into_inner().operation.unwrap()).await;
    let host = reset.done().host.unwrap();
    assert_eq!(host.power_state(), PowerState::Paused, "{host:?}");
}

/// Everything that happens after `after`, until the end of a stop was told of so many servers.
async fn watch(mut client: Client, after: i64, stops: usize) -> Vec<Event> {
    let request = WatchEventsRequest {
        after_revision: Some(after),
        servers: Vec::new(),
    };
    let answer = client.watches.watch_events(request).await.unwrap();
    let (mut stream, mut events, mut ended) = (answer.into_inner(), Vec::new(), 0);
    while ended < stops {
        let item = tokio::time::timeout(SOON, stream.message()).await;
        let item = item.expect("the stream fell silent").unwrap().unwrap().item;
        match item.unwrap() {
            Item::Event(event) => {
                if let Some(Change::Operation(operation)) = &event.change {
                    let stop = metadata_of(operation).action == "stop";
                    ended += usize::from(stop && operation.done);
                }
                events.push(event);
            }
            Item::Gap(gap) => panic!("{gap:?}"),
            Item::CaughtUp(_) => {}
        }
    }
    events
}

#[tokio::test(flavor = "multi_thread")]
async fn two_hundred_servers_are_listed_watched_and_stopped_all_at_once() {
    let folder = RunFolder::for_this_test();
    let host = TestHost::start(folder.path());
    let mut begun = Instant::now();
    let mut lap = |what: &str| {
        println!("{what}: {:.1} s", begun.elapsed().as_secs_f64());
        begun = Instant::now();
    };
    let ids = gather(&host.libvirt()).await;
    lap("started");
    let mut scene = Scene::on(&host, folder.path(), AgentSettings::default()).await;
    let adopted = ids.iter().map(|id| {
        let mut client = scene.client.clone();
        async move { client.adopt(*id).await }
    });
    join_all(adopted).await;
    lap("adopted");
    assert_all(&mut scene.client, VmState::Paused, PowerState::Paused).await;
    lap("listed");

    let hosts = scene.client.hosts.get_host(GetHostRequest {}).await;
    let revision = hosts.unwrap().into_inner().host.unwrap().revision;
    let watching = tokio::spawn(watch(scene.client.clone(), revision, SERVERS));
    let stopped = ids.iter().map(|id| {
        let mut client = scene.client.clone();
        async move {
            // As in Nova a PAUSED server is not stopped, but one of which the administrator says that it
            // is in ERROR is.
            reset(&mut client, *id).await;
            // With as long as is usual, which is a minute: none of them could answer.
            client.stop(*id, Some(Duration::from_secs(60))).await
        }
    });
    for stopped in join_all(stopped).await {
        assert_eq!(stopped.done().guest_stop(), GuestStop::Forced);
        let [step] = stopped.metadata.steps.as_slice() else {
            panic!("{stopped:?}");
        };
        assert_eq!(
            (step.state(), step.message.as_str()),
            (StepState::Done, "ended at once"),
            "it was asked to shut down"
        );
    }
    lap("stopped");
    let servers = assert_all(&mut scene.client, VmState::Stopped, PowerState::Shutdown).await;
    let events = tokio::time::timeout(SOON, watching).await.unwrap().unwrap();
    let revisions: Vec<i64> = events.iter().map(|event| event.revision).collect();
    assert!(revisions.is_sorted_by(|one, next| one < next));
    let mut told = BTreeMap::new();
    for event in events {
        if let Some(Change::Server(server)) = event.change {
            told.insert(server.id.clone(), server.vm_state());
        }
    }
    assert_eq!(told.len(), SERVERS);
    for server in servers {
        assert_eq!(told.get(&server.id), Some(&VmState::Stopped));
    }
    let domains = scene.libvirt.list().unwrap();
    assert_eq!(domains.len(), SERVERS);
    assert!(
        domains
            .iter()
            .all(|domain| domain.state == DomainState::Shutoff),
        "{domains:?}"
    );
    lap("checked");
}
