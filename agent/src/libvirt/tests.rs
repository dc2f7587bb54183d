// SPDX-License-Identifier: Apache-2.0
//! The layer on libvirt's test driver: the whole seam without a daemon. What needs a real one (lost
//! connections, frozen guests) is tested in the workspace's test crate.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

use std::sync::mpsc;
use std::time::Instant;

use tokio::time::timeout;

use super::definitions::uuid_of;
use super::*;

const PATIENCE: Duration = Duration::from_secs(30);

async fn open(config: Config) -> Libvirt {
    let libvirt = Libvirt::open(config).unwrap();
    let mut link = libvirt.link();
    let up = timeout(PATIENCE, link.wait_for(|link| *link == LinkState::Up)).await;
    up.unwrap().unwrap();
    libvirt
}

/// The test driver's default host, which all tests of this process share.
async fn test_host() -> Libvirt {
    open(Config::new("test:///default")).await
}

fn xml(id: Uuid) -> String {
    format!(
        "<domain type='test'><name>t-{id}</name><uuid>{id}</uuid><memory>65536</memory>\
         <os><type>hvm</type></os></domain>"
    )
}

async fn power(libvirt: &Libvirt, id: Uuid) -> (PowerState, String) {
    let status = libvirt.domain(id).await.unwrap().unwrap();
    (status.power, status.reason)
}

fn is_refused<T: std::fmt::Debug>(answer: &HypervisorResult<T>, text: &str) -> bool {
    match answer {
        Err(HypervisorError::Refused { message, .. }) => message.contains(text),
        _ => false,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn definitions_are_synced_where_libvirt_keeps_them() {
    let dir = tempfile::tempdir().unwrap();
    // Whoever opens a pipe to read it waits for somebody to write to it.
    let folder = dir.path().join("definitions");
    nix::unistd::mkfifo(&folder, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let libvirt = Libvirt::open(Config {
        definitions: folder.clone(),
        ..Config::new("test:///default")
    })
    .unwrap();
    let synced = tokio::spawn(async move { libvirt.sync_definitions().await });
    let opened =
        tokio::task::spawn_blocking(move || std::fs::OpenOptions::new().write(true).open(folder));
    let _writer = timeout(PATIENCE, opened).await.unwrap().unwrap().unwrap();
    // A pipe cannot be synced: that is no error, but everything is synced instead.
    timeout(4 * PATIENCE, synced)
        .await
        .unwrap()
        .unwrap()
        .unwrap();
}

#[test]
fn a_folder_that_is_not_there_is_no_reason_not_to_sync() {
    let dir = tempfile::tempdir().unwrap();
    sync_folder(dir.path()).unwrap();
    sync_folder(&dir.path().join("absent")).unwrap();
}

#[tokio::test]
async fn a_domain_goes_through_its_life_and_events_tell_of_it() {
    let libvirt = test_host().await;
    let mut events = libvirt.events();
    let id = Uuid::new_v4();

    libvirt.validate(&xml(id)).await.unwrap();
    assert_eq!(libvirt.domain(id).await, Ok(None));
    libvirt.define(&xml(id)).await.unwrap();
    let status = libvirt.domain(id).await.unwrap().unwrap();
    assert_eq!(status.name, format!("t-{id}"));
    assert_eq!(status.power, PowerState::Shutdown);
    assert!(status.persistent && !status.managed_save);
    let inactive = libvirt.domain_xml(id, Definition::Inactive).await.unwrap();
    assert!(inactive.contains(&id.to_string()));
    let live = libvirt.domain_xml(id, Definition::Live).await;
    assert!(matches!(live, Err(HypervisorError::NoDomain { .. })));
    let off = libvirt.shutdown(id, Ask::PowerButton).await;
    assert!(is_refused(&off, "running"), "{off:?}");

    libvirt.start(id, Boot::Resume).await.unwrap();
    assert_eq!(power(&libvirt, id).await.0, PowerState::Running);
    assert!(is_refused(
        &libvirt.start(id, Boot::Resume).await,
        "already running"
    ));
    libvirt.domain_xml(id, Definition::Live).await.unwrap();

    libvirt.shutdown(id, Ask::PowerButton).await.unwrap();
    assert_eq!(power(&libvirt, id).await.0, PowerState::Shutdown);
    libvirt.start(id, Boot::Resume).await.unwrap();
    libvirt.destroy(id).await.unwrap();
    let off = (PowerState::Shutdown, "destroyed".to_owned());
    assert_eq!(power(&libvirt, id).await, off);
    libvirt.destroy(id).await.unwrap();

    libvirt.undefine(id).await.unwrap();
    assert_eq!(libvirt.domain(id).await, Ok(None));
    libvirt.undefine(id).await.unwrap();
    libvirt.destroy(id).await.unwrap();

    let mut seen = Vec::new();
    while seen.last() != Some(&"undefined") {
        let event = timeout(PATIENCE, events.recv()).await.unwrap().unwrap();
        if let HypervisorEvent::Domain { id: of, what } = event
            && of == id
        {
            seen.push(what);
        }
    }
    // The test driver starts a domain, suspended for a moment or not, as one event.
    let expected = [
        "defined",
        "started",
        "stopped",
        "started",
        "stopped",
        "undefined",
    ];
    assert_eq!(seen, expected);
}

#[tokio::test]
async fn the_listing_of_all_says_the_same_as_asking_for_each() {
    let libvirt = test_host().await;
    let id = Uuid::new_v4();
    libvirt.define(&xml(id)).await.unwrap();
    let all = libvirt.domains().await.unwrap();
    let mine = all.iter().find(|status| status.id == id).unwrap();
    assert_eq!(Some(mine), libvirt.domain(id).await.unwrap().as_ref());
    // The test driver's own domain.
    let own = libvirt.domain_by_name("test").await.unwrap().unwrap();
    assert_eq!(own.power, PowerState::Running);
    assert!(all.contains(&own));
    assert_eq!(libvirt.domain_by_name("nobody").await, Ok(None));
    libvirt.undefine(id).await.unwrap();
}

#[tokio::test]
async fn xml_against_the_schema_and_a_definition_of_a_known_name_are_refused() {
    let libvirt = test_host().await;
    let id = Uuid::new_v4();
    let wrong = xml(id).replace("<os>", "<bogus/><os>");
    assert!(is_refused(&libvirt.validate(&wrong).await, "bogus"));
    let taken = xml(id).replace(&format!("t-{id}"), "test");
    assert!(is_refused(&libvirt.define(&taken).await, "already exists"));
    assert_eq!(libvirt.domain(id).await, Ok(None));
}

#[tokio::test]
async fn a_missing_domain_is_named() {
    let libvirt = test_host().await;
    let id = Uuid::new_v4();
    let domain = id.to_string();
    let missing = HypervisorError::NoDomain { domain };
    assert_eq!(libvirt.start(id, Boot::Resume).await, Err(missing.clone()));
    assert_eq!(
        libvirt.shutdown(id, Ask::PowerButton).await,
        Err(missing.clone())
    );
    let xml = libvirt.domain_xml(id, Definition::Inactive).await;
    assert_eq!(xml, Err(missing));
}

#[tokio::test]
async fn strings_that_c_cannot_hold_are_refused() {
    let libvirt = test_host().await;
    assert!(libvirt.define("<domain/>\0").await.is_err());
    assert!(libvirt.domain_by_name("a\0b").await.is_err());
    let uri = Libvirt::open(Config::new("test:///\0"));
    assert!(matches!(uri, Err(OpenError::Uri { .. })));
}

#[tokio::test]
async fn the_host_describes_itself() {
    let facts = test_host().await.host().await.unwrap();
    assert!(facts.cpus > 0 && facts.memory_kib > 0);
    assert_eq!(facts.hypervisor_version, "0.0.2");
    let [major, ..] = *facts.libvirt_version.split('.').collect::<Vec<_>>() else {
        panic!("{facts:?}");
    };
    assert!(major.parse::<u32>().unwrap() >= 6);
}

#[tokio::test]
async fn without_libvirt_everything_fails_at_once_and_says_why() {
    let config = Config::new("qemu+unix:///system?socket=/nonexistent/libvirt-sock");
    let libvirt = Libvirt::open(config).unwrap();
    let mut link = libvirt.link();
    let told = link.wait_for(
        |link| matches!(link, LinkState::Down { reason } if reason.contains("/nonexistent")),
    );
    timeout(PATIENCE, told).await.unwrap().unwrap();
    let asked = libvirt.domain(Uuid::nil()).await;
    let Err(HypervisorError::LinkDown { reason }) = asked else {
        panic!("{asked:?}");
    };
    assert!(reason.contains("/nonexistent"), "{reason}");
    assert!(libvirt.destroy(Uuid::nil()).await.is_err());
}

/// Stuck calls: their caller is gone and they hang until the sender is dropped.
async fn hang(libvirt: &Libvirt, class: Class, count: usize, about: Uuid) -> mpsc::Sender<()> {
    let (begun, mut has_begun) = tokio::sync::mpsc::unbounded_channel();
    let (end, told) = mpsc::channel::<()>();
    let told = Arc::new(std::sync::Mutex::new(told));
    let calls = (0..count).map(|_| {
        let (begun, told) = (begun.clone(), Arc::clone(&told));
        let call = Call::new("hangs", PATIENCE).about(about);
        libvirt.call(class, call, move |_| {
            begun.send(()).unwrap();
            let _ = told.lock().unwrap().recv();
            Ok(())
        })
    });
    let all_begun = async {
        for _ in 0..count {
            timeout(PATIENCE, has_begun.recv()).await.unwrap();
        }
    };
    tokio::select! {
        answers = futures_util::future::join_all(calls) => panic!("{answers:?}"),
        () = all_begun => end,
    }
}

#[tokio::test]
async fn calls_that_hang_hold_up_their_own_domain_only_and_are_listed_until_they_return() {
    let libvirt = test_host().await;
    let (sick, well) = (Uuid::new_v4(), Uuid::new_v4());
    for id in [sick, well] {
        libvirt.define(&xml(id)).await.unwrap();
        libvirt.start(id, Boot::Resume).await.unwrap();
    }
    for class in [Class::Mutate, Class::Read, Class::Emergency, Class::Probe] {
        let count = class.limit() - 1;
        let end = hang(&libvirt, class, count, sick).await;
        assert_eq!(libvirt.stuck_calls().len(), count);
        assert_eq!(libvirt.stuck_calls()[0].domain, Some(sick));

        libvirt.define(&xml(well)).await.unwrap();
        libvirt.domain(well).await.unwrap();
        libvirt.destroy(well).await.unwrap();
        libvirt.start(well, Boot::Resume).await.unwrap();
        // They were given up on at once; whether they hang takes a while to tell.
        while libvirt.stuck_calls()[0].age < HANGS {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        // What would hang as well takes no thread more.
        let again = match class {
            Class::Mutate => libvirt.start(sick, Boot::Fresh).await,
            Class::Read => libvirt.power(sick).await.map(drop),
            Class::Emergency => libvirt.destroy(sick).await,
            Class::Probe => libvirt.counters(sick).await.map(drop),
        };
        assert!(
            matches!(again, Err(HypervisorError::Deadline { call: "hangs", .. })),
            "{again:?}"
        );
        let asked = libvirt.shutdown(sick, Ask::PowerButton).await;
        assert!(
            matches!(asked, Err(HypervisorError::Deadline { call: "hangs", .. })),
            "{asked:?}"
        );

        drop(end);
        let deadline = Instant::now() + PATIENCE;
        while !libvirt.stuck_calls().is_empty() {
            assert!(Instant::now() < deadline, "they stay listed");
            tokio::task::yield_now().await;
        }
    }
    for id in [sick, well] {
        libvirt.destroy(id).await.unwrap();
        libvirt.undefine(id).await.unwrap();
    }
}

#[tokio::test]
async fn when_all_threads_of_a_class_hang_its_calls_end_at_their_deadline() {
    let mut config = Config::new("test:///default");
    config.call_timeout = Duration::from_millis(100);
    let libvirt = open(config).await;
    let limit = Class::Mutate.limit();
    let end = hang(&libvirt, Class::Mutate, limit, Uuid::nil()).await;
    let id = Uuid::new_v4();
    let late = libvirt.define(&xml(id)).await;
    assert!(matches!(late, Err(HypervisorError::Deadline { .. })));
    assert_eq!(libvirt.stuck_calls().len(), limit, "it never ran");
    drop(end);
    assert_eq!(test_host().await.domain(id).await, Ok(None));
}

#[tokio::test]
async fn a_caller_that_goes_away_leaves_no_thread_behind() {
    let libvirt = test_host().await;
    let (begun, has_begun) = mpsc::channel();
    let (end, told) = mpsc::channel::<()>();
    let call = Call::new("abandoned", PATIENCE);
    let asked = libvirt.call(Class::Mutate, call, move |_| {
        begun.send(()).unwrap();
        let _ = told.recv();
        Ok(())
    });
    let asked = Box::pin(asked);
    drop(timeout(Duration::from_millis(1), asked).await);
    // It may not have begun at all; then it never does and holds nothing.
    if has_begun.recv_timeout(PATIENCE).is_ok() {
        assert_eq!(libvirt.stuck_calls()[0].call, "abandoned");
    }
    drop(end);
}

#[tokio::test]
async fn a_caller_that_goes_away_is_in_nobodys_way() {
    let libvirt = test_host().await;
    let id = libvirt.domain_by_name("test").await.unwrap().unwrap().id;
    let (begun, has_begun) = mpsc::channel();
    let (end, told) = mpsc::channel::<()>();
    let call = Call::new("abandoned", PATIENCE).about(id);
    let asked = libvirt.call(Class::Read, call, move |_| {
        begun.send(()).unwrap();
        let _ = told.recv();
        Ok(())
    });
    let mut asked = Box::pin(asked);
    while has_begun.try_recv().is_err() {
        let _ = timeout(Duration::from_millis(1), &mut asked).await;
    }
    drop(asked);
    assert_eq!(libvirt.stuck_calls()[0].call, "abandoned");
    libvirt.power(id).await.unwrap().unwrap();
    drop(end);
}

fn resident_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:"));
    let number = line.and_then(|line| line.split_whitespace().nth(1));
    number.unwrap().parse().unwrap()
}

#[tokio::test]
async fn asking_twenty_thousand_times_does_not_grow_the_process() {
    const CALLS: usize = 20_000;
    const ALONE: &str = "SALVOR_TEST_ALONE";
    // Other tests of this process grow it too, so this one gets a process of its own.
    if std::env::var_os(ALONE).is_none() {
        let name = "libvirt::tests::asking_twenty_thousand_times_does_not_grow_the_process";
        let alone = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", name, "--nocapture"])
            .env(ALONE, "1")
            .output()
            .unwrap();
        let told = String::from_utf8_lossy(&alone.stdout);
        assert!(alone.status.success(), "{told}{alone:?}");
        assert!(told.contains("1 passed"), "{told}");
        return;
    }
    let libvirt = test_host().await;
    let own = libvirt.domain_by_name("test").await.unwrap().unwrap();
    let ask = async |calls: usize| {
        for _ in 0..calls {
            libvirt.domain(own.id).await.unwrap();
            libvirt.domains().await.unwrap();
        }
    };
    ask(CALLS / 10).await;
    let mut least = u64::MAX;
    // A thread or an allocator may take its share in some round; a leak does in every one.
    for _ in 0..4 {
        let before = resident_kib();
        ask(CALLS / 4).await;
        least = least.min(resident_kib().saturating_sub(before));
    }
    // One leaked state record for each call would be 3.5 MiB a round and more.
    assert!(least < 1024, "{least} KiB");
}

#[test]
fn a_define_is_about_the_domain_that_its_xml_names() {
    let id = Uuid::new_v4();
    assert_eq!(uuid_of(&xml(id)), Some(id));
    assert_eq!(uuid_of("<domain><name>a</name></domain>"), None);
}

#[test]
fn an_undefine_without_flags_for_nvram_is_the_last_resort() {
    let [best, older, oldest] = UNDEFINE_FLAGS;
    assert_eq!(best & older, older);
    assert_eq!(older & oldest, oldest);
    for kept in [
        sys::VIR_DOMAIN_UNDEFINE_KEEP_NVRAM,
        sys::VIR_DOMAIN_UNDEFINE_KEEP_TPM,
    ] {
        assert_eq!((best & kept, oldest & kept), (kept, 0));
    }
    let [wholly, _, _] = UNDEFINE_FLAGS_WITH_TPM;
    let tpm = sys::VIR_DOMAIN_UNDEFINE_TPM | sys::VIR_DOMAIN_UNDEFINE_KEEP_TPM;
    assert_eq!(wholly & tpm, sys::VIR_DOMAIN_UNDEFINE_TPM);
    let noted = sys::VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA;
    assert_eq!(older & noted, noted);
    for removed in [sys::VIR_DOMAIN_UNDEFINE_NVRAM, sys::VIR_DOMAIN_UNDEFINE_TPM] {
        assert_eq!(best & removed, 0);
    }
}

#[tokio::test]
async fn snapshots_are_not_in_the_way_of_an_undefine() {
    let libvirt = test_host().await;
    let id = Uuid::new_v4();
    libvirt.define(&xml(id)).await.unwrap();
    let call = libvirt.call_named("virDomainSnapshotCreateXML");
    libvirt
        .call(Class::Mutate, call, move |connect| {
            let domain = connect.lookup_domain_by_uuid(id)?;
            let xml = "<domainsnapshot><name>before</name></domainsnapshot>";
            domain.create_snapshot_xml(xml, 0)?;
            Ok(())
        })
        .await
        .unwrap();
    libvirt.undefine(id).await.unwrap();
    assert_eq!(libvirt.domain(id).await, Ok(None));
}

#[tokio::test]
async fn saved_memory_is_dropped_and_none_is_no_error() {
    let libvirt = test_host().await;
    let id = Uuid::new_v4();
    libvirt.drop_saved_memory(id).await.unwrap();
    libvirt.define(&xml(id)).await.unwrap();
    libvirt.drop_saved_memory(id).await.unwrap();
    libvirt.start(id, Boot::Resume).await.unwrap();
    let call = libvirt.call_named("virDomainManagedSave");
    libvirt
        .call(Class::Mutate, call, move |connect| {
            Ok(connect.lookup_domain_by_uuid(id)?.managed_save(0)?)
        })
        .await
        .unwrap();
    let saved = async || libvirt.domain(id).await.unwrap().unwrap().managed_save;
    assert!(saved().await);
    libvirt.drop_saved_memory(id).await.unwrap();
    assert!(!saved().await);
    libvirt.undefine(id).await.unwrap();
}
