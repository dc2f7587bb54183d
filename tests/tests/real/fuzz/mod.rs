// SPDX-License-Identifier: Apache-2.0
//! Two thousand calls with random and hostile arguments, and bytes that are no calls at all: the agent
//! answers each with a reason or not at all, and no server, domain, image or file changes.

mod calls;
mod state;
mod values;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use prost::bytes::{Buf as _, BufMut as _};
use rand::rngs::StdRng;
use rand::{Rng as _, RngCore as _, SeedableRng as _};
use salvor_proto::google::longrunning::ListOperationsRequest;
use salvor_proto::v1::{
    GetHostRequest, Image, ListImagesRequest, ListUnmanagedDomainsRequest, Server, UnmanagedDomain,
    VmState,
};
use salvor_tests::agent::AgentSettings;
use salvor_tests::client::Client;
use salvor_tests::host::TestHost;
use salvor_tests::run_folder::{RunFolder, repository};
use salvor_tests::wait::SOON;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::codegen::http::uri::PathAndQuery;
use tonic::metadata::{AsciiMetadataKey, AsciiMetadataValue};
use tonic::transport::Channel;
use tonic::{Code, Request, Status};
use tonic_types::StatusExt as _;

use calls::Call;
use values::{Fuzz, Known};

use crate::actor::{Actor, FIXER, tiny};
use crate::scene::{Scene, files_below, sha256};

const CALLS: usize = 2_000;

/// Messages as plain bytes.
#[derive(Debug, Default)]
struct Raw;

impl Codec for Raw {
    type Encode = Vec<u8>;
    type Decode = Vec<u8>;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;

    fn encode(&mut self, item: Vec<u8>, to: &mut EncodeBuf<'_>) -> Result<(), Status> {
        to.put_slice(&item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Vec<u8>>, Status> {
        let mut bytes = vec![0; from.remaining()];
        from.copy_to_slice(&mut bytes);
        Ok(Some(bytes))
    }
}

/// Makes a call and takes at most one message of its answer.
async fn make(channel: &Channel, call: &Call) -> Result<Option<Vec<u8>>, Status> {
    let mut grpc = tonic::client::Grpc::new(channel.clone());
    grpc.ready()
        .await
        .map_err(|error| Status::unknown(error.to_string()))?;
    let mut request = Request::new(tokio_stream::iter(call.messages.clone()));
    for (name, value) in &call.headers {
        // What no header can hold, no client can send.
        if let Ok(value) = AsciiMetadataValue::try_from(value.as_bytes()) {
            let name = AsciiMetadataKey::from_static(name);
            request.metadata_mut().insert(name, value);
        }
    }
    let path = PathAndQuery::try_from(call.path.as_str()).unwrap();
    let mut answer = grpc.streaming(request, path, Raw).await?.into_inner();
    let first = answer.message().await?;
    // A unary call's status comes behind its message; a stream may go on for long.
    let streams = ["/WatchEvents", "/FollowConsoleLog", "/AttachConsole"];
    if first.is_some() && !streams.iter().any(|name| call.path.ends_with(name)) {
        answer.message().await?;
    }
    Ok(first)
}

/// The reasons that the documentation lists.
fn known_reasons() -> BTreeSet<String> {
    let page = fs::read_to_string(repository().join("docs/REASONS.md")).unwrap();
    let reasons = page
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split('`').next());
    reasons.map(str::to_owned).collect()
}

/// Everything that must stay as it is.
#[derive(Debug, PartialEq)]
struct World {
    servers: Vec<Server>,
    images: Vec<Image>,
    operations: Vec<String>,
    unmanaged: Vec<UnmanagedDomain>,
    definitions: Vec<String>,
    numbers: Vec<Option<u32>>,
    consoles: Vec<String>,
    /// Sums of the disks. No guest here writes without being told.
    disks: Vec<String>,
    files: Vec<PathBuf>,
}

async fn world(scene: &mut Scene<'_>, actors: &[&Actor]) -> World {
    let mut servers = scene.client.list().await;
    for server in &mut servers {
        let power = server.power.as_mut().unwrap();
        // When and how it was last seen may change, not what was seen.
        power.observe_time = None;
        power.source = 0;
    }
    let images = scene
        .client
        .images
        .list_images(ListImagesRequest::default())
        .await
        .unwrap();
    let operations = ListOperationsRequest {
        page_size: 1000,
        ..Default::default()
    };
    let operations = scene
        .client
        .operations
        .list_operations(operations)
        .await
        .unwrap()
        .into_inner();
    let request = ListUnmanagedDomainsRequest {};
    let unmanaged = scene
        .client
        .hosts
        .list_unmanaged_domains(request)
        .await
        .unwrap()
        .into_inner();
    World {
        servers,
        images: images.into_inner().images,
        operations: operations
            .operations
            .into_iter()
            .map(|operation| operation.name)
            .collect(),
        unmanaged: unmanaged.domains,
        definitions: actors
            .iter()
            .map(|actor| actor.libvirt.inactive_xml(actor.id).unwrap())
            .collect(),
        numbers: actors.iter().map(|actor| actor.number()).collect(),
        consoles: actors.iter().map(|actor| actor.console().text()).collect(),
        disks: actors.iter().map(|actor| sha256(&actor.disk)).collect(),
        files: files_below(&scene.agent.state_folder())
            .into_iter()
            .filter(|file| !file.to_string_lossy().contains("salvor.db"))
            .collect(),
    }
}

/// The agent lives, nothing panicked, and nothing that a caller sent stands raw in the log.
#[track_caller]
fn assert_healthy(scene: &Scene<'_>) {
    assert_eq!(scene.agent.ended(), None, "{}", scene.agent.log());
    let log = scene.agent.log();
    assert!(!log.contains("panicked"), "{log}");
    for line in log.lines() {
        let parsed: Result<serde_json::Value, _> = serde_json::from_str(line);
        assert!(parsed.is_ok(), "a line of the log is no JSON: {line:?}");
        assert!(
            line.len() < 20_000,
            "a line of the log has {} bytes",
            line.len()
        );
    }
}

/// One server that runs, one that is rescued, and a domain that nobody adopted; on a host of their own.
async fn set_the_stage<'h>(host: &'h TestHost, folder: &RunFolder) -> (Scene<'h>, [Actor; 3]) {
    let (plain, mut scene) = Scene::with_actor(
        host,
        folder.path(),
        &tiny("plain"),
        AgentSettings::default(),
    )
    .await;
    let rescued = scene.another_actor(&tiny("rescued")).await;
    scene.rescue_actor(&rescued).await;
    Client::assert_settled(&scene.client.get(rescued.id).await, VmState::Rescued);
    let wild = Actor::running(host, folder.path(), &tiny("wild"));
    (scene, [plain, rescued, wild])
}

/// Checks how a call was answered; says in a word how.
fn judge(
    call: &Call,
    answer: Result<Option<Vec<u8>>, Status>,
    reasons: &BTreeSet<String>,
) -> String {
    let status = match answer {
        Ok(_) => {
            assert!(!call.must_fail, "a change was accepted: {call:?}");
            return "OK".into();
        }
        Err(status) => status,
    };
    assert!(
        status.message().len() < 4_000,
        "a long message: {} bytes",
        status.message().len()
    );
    assert!(
        !status.message().chars().any(char::is_control),
        "{status:?}"
    );
    if call.path.ends_with("/DeleteOperation") && status.code() == Code::Unimplemented {
        return "(Unimplemented)".into();
    }
    let details = status.get_error_details();
    let Some(info) = details.error_info() else {
        // Not a message of the protocol, or out of time before a handler saw it.
        let in_time = call.headers.iter().all(|(name, _)| *name != "grpc-timeout");
        assert!(
            call.tampered || !in_time,
            "an error without ErrorInfo: {status:?} to {}",
            call.path
        );
        return format!("({:?})", status.code());
    };
    assert_eq!(info.domain, "salvor.compute");
    assert!(
        reasons.contains(&info.reason),
        "an unknown reason: {}",
        info.reason
    );
    assert!(
        !matches!(
            info.reason.as_str(),
            "INTERNAL" | "ROLLBACK_FAILED" | "STORAGE_FAILED"
        ),
        "{status:?} to {}",
        call.path
    );
    info.reason.clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn two_thousand_hostile_calls_change_nothing() {
    let seed = match std::env::var("SALVOR_FUZZ_SEED") {
        Ok(seed) => seed.parse().unwrap(),
        Err(_) => rand::rng().random::<u64>(),
    };
    println!("SALVOR_FUZZ_SEED={seed}");
    let folder = RunFolder::for_this_test();
    let host = TestHost::start(folder.path());
    let (mut scene, actors) = set_the_stage(&host, &folder).await;
    let actors: Vec<&Actor> = actors.iter().collect();
    let before = world(&mut scene, &actors).await;
    let mut known = Known {
        operations: before.operations.clone(),
        ..Known::default()
    };
    for server in &before.servers {
        known
            .servers
            .extend([server.id.clone(), server.name.clone()]);
    }
    known.domains = actors.iter().map(|actor| actor.id.to_string()).collect();
    known.images = before.images.iter().map(|image| image.id.clone()).collect();
    known.images.push(FIXER.into());

    let reasons = known_reasons();
    assert!(reasons.len() > 20, "{reasons:?}");
    let mut fuzz = Fuzz {
        rng: StdRng::seed_from_u64(seed),
        known: &known,
    };
    let mut answers = BTreeMap::<String, usize>::new();
    let mut paths = BTreeSet::new();
    let mut slowest = (Duration::ZERO, String::new());
    let channel = scene.agent.channel();
    for number in 0..CALLS {
        let call = fuzz.call();
        paths.insert(call.path.clone());
        let begun = Instant::now();
        let answer = tokio::time::timeout(SOON, make(&channel, &call)).await;
        let answer = answer.unwrap_or_else(|_| panic!("no answer to call {number} {}", call.path));
        slowest = slowest.max((begun.elapsed(), call.path.clone()));
        *answers.entry(judge(&call, answer, &reasons)).or_default() += 1;
        if number % 500 == 499 {
            assert_eq!(
                world(&mut scene, &actors).await,
                before,
                "after {number} calls"
            );
            assert_healthy(&scene);
        }
    }
    println!(
        "{CALLS} calls of {} methods; slowest {slowest:?}",
        paths.len()
    );
    for (answer, count) in &answers {
        println!("{count:>6} {answer}");
    }
    assert_eq!(paths.len(), 47, "{paths:?}");
    println!("the agent has {} KiB", resident_kib(&scene));
}

fn resident_kib(scene: &Scene<'_>) -> u64 {
    let pid = scene.agent.machine_pid().unwrap();
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .unwrap();
    line.trim_end_matches("kB").trim().parse().unwrap()
}

/// Bytes that are no calls.
fn noise(rng: &mut StdRng) -> Vec<u8> {
    const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    let mut random = vec![0; rng.random_range(1..5_000)];
    rng.fill_bytes(&mut random);
    let framed = |kind: u8, flags: u8, stream: u32, body: &[u8]| {
        let length = u32::try_from(body.len()).unwrap().to_be_bytes();
        let mut frame = length[1..].to_vec();
        frame.extend([kind, flags]);
        frame.extend(stream.to_be_bytes());
        frame.extend(body);
        frame
    };
    let mut bytes = PREFACE.to_vec();
    match rng.random_range(0..7) {
        0 => return random,
        1 => return b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(),
        2 => return b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".to_vec(),
        // Behind a sound beginning: noise, a frame with absurd length, headers that are none, a flood.
        3 => bytes.extend(random),
        4 => bytes.extend([0xff, 0xff, 0xff, 0x01, 0x05, 0xff, 0xff, 0xff, 0xff]),
        5 => {
            bytes.extend(framed(4, 0, 0, &[]));
            bytes.extend(framed(1, 5, 1, &random));
        }
        _ => {
            bytes.extend(framed(4, 0, 0, &[]));
            for _ in 0..2_000 {
                bytes.extend(framed(6, 0, 0, b"pingping"));
            }
        }
    }
    bytes
}

#[tokio::test(flavor = "multi_thread")]
async fn noise_on_the_socket_and_crowds_of_connections_change_nothing() {
    let folder = RunFolder::for_this_test();
    let host = TestHost::start(folder.path());
    let (mut scene, actors) = set_the_stage(&host, &folder).await;
    let actors: Vec<&Actor> = actors.iter().collect();
    let before = world(&mut scene, &actors).await;
    let mut rng = StdRng::seed_from_u64(5);
    for _ in 0..200 {
        let mut stream = UnixStream::connect(scene.agent.socket()).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_millis(20)))
            .unwrap();
        // It may hang up on us before we are done, which is its right.
        let _ = stream.write_all(&noise(&mut rng));
        let _ = stream.read(&mut [0; 1024]);
    }
    assert_healthy(&scene);

    // Many that say nothing, and many that call at once.
    let silent: Vec<UnixStream> = (0..500)
        .map(|_| UnixStream::connect(scene.agent.socket()).unwrap())
        .collect();
    let begun = Instant::now();
    scene.client = Client::new(scene.agent.channel());
    scene.client.list().await;
    println!(
        "with {} silent connections a list took {:?}",
        silent.len(),
        begun.elapsed()
    );
    assert!(begun.elapsed() < Duration::from_secs(5));
    drop(silent);

    let begun = Instant::now();
    let calls: Vec<_> = (0..500)
        .map(|_| {
            let mut client = Client::new(scene.agent.channel());
            tokio::spawn(async move { client.hosts.get_host(GetHostRequest {}).await })
        })
        .collect();
    for call in calls {
        let answer = tokio::time::timeout(SOON, call).await.unwrap().unwrap();
        assert!(
            answer
                .as_ref()
                .is_ok_and(|answer| answer.get_ref().host.is_some()),
            "{answer:?}"
        );
    }
    println!(
        "500 connections with a call each took {:?}",
        begun.elapsed()
    );
    assert_eq!(world(&mut scene, &actors).await, before);
    assert_healthy(&scene);
    println!("the agent has {} KiB", resident_kib(&scene));
}
