// SPDX-License-Identifier: Apache-2.0
//! What real guests say and show: the log over boots and rescues, the serial port with several clients, the
//! screen, and diagnostics of guests that run, are off, or are frozen.

use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use salvor_proto::v1::{
    self, GetConsoleLogRequest, GetServerDiagnosticsRequest, PowerState,
    attach_console_request::Item as Sent, attach_console_response::Item as Told,
    get_console_log_request::From,
};
use salvor_tests::agent::AgentSettings;
use salvor_tests::client::{assert_refused, reason};
use salvor_tests::guests::{LinuxGuest, TinyGuest, linux_slot};
use salvor_tests::host::TestHost;
use salvor_tests::run_folder::RunFolder;
use salvor_tests::wait::{BOOT, SOON, wait_for};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};
use uuid::Uuid;

use crate::actor::{Actor, FIXER, Kind, tiny};
use crate::ends::ticks;
use crate::scene::Scene;

async fn log(
    scene: &mut Scene<'_>,
    server: Uuid,
    from: From,
    guest: v1::ConsoleGuest,
) -> v1::GetConsoleLogResponse {
    let request = GetConsoleLogRequest {
        server: server.to_string(),
        from: Some(from),
        guest: guest.into(),
        ..GetConsoleLogRequest::default()
    };
    let answer = scene.client.consoles.get_console_log(request).await;
    answer.unwrap().into_inner()
}

fn text(log: &v1::GetConsoleLogResponse) -> String {
    String::from_utf8_lossy(&log.data).replace('\r', "")
}

const SERVER: v1::ConsoleGuest = v1::ConsoleGuest::Server;
const ALL: v1::ConsoleGuest = v1::ConsoleGuest::All;
const USUAL: v1::ConsoleGuest = v1::ConsoleGuest::Unspecified;

#[tokio::test(flavor = "multi_thread")]
async fn a_log_is_gone_on_from_over_boots_and_its_lengths_are_right() {
    let mut scene = Scene::new().await;
    let id = scene.tiny(&TinyGuest::new("told")).await;
    let console = scene.console(id);

    let whole = log(&mut scene, id, From::LastLines(-1), USUAL).await;
    assert_eq!(text(&whole), console.text());
    assert!(text(&whole).contains("TINY-UP told"));
    assert_eq!(
        text(&log(&mut scene, id, From::LastLines(0), USUAL).await),
        ""
    );
    let last = text(&log(&mut scene, id, From::LastLines(1), USUAL).await);
    assert!(last.starts_with("TINY-READY told"), "{last:?}");
    let bytes = log(&mut scene, id, From::LastBytes(5), USUAL).await.data;
    assert_eq!(bytes.len(), 5);
    // Somebody else started it: the agent has noted no boot.
    assert_eq!(whole.boots.len(), 1);
    assert_eq!(whole.boots[0].start_time, None);

    let mark = console.mark();
    scene.client.stop(id, None).await.done();
    scene.client.start(id).await.done();
    console.wait_line(mark, "TINY-READY told", SOON);
    let cursor = From::Cursor(whole.next_cursor);
    let new = log(&mut scene, id, cursor, USUAL).await;
    assert_eq!(text(&new), console.since(mark));
    assert!(!new.gap && !new.more);
    assert_eq!(new.boots.len(), 2, "{:#?}", new.boots);
    assert!(new.boots[1].start_time.is_some());
    let sizes: i64 = new.boots.iter().map(|boot| boot.size).sum();
    let kept = log(&mut scene, id, From::LastBytes(-1), ALL).await.data;
    assert_eq!(usize::try_from(sizes).unwrap(), kept.len());

    // It outlives the agent.
    scene.agent.kill_9();
    scene.restart().await;
    let again = log(&mut scene, id, From::LastBytes(-1), ALL).await;
    assert_eq!((again.boots, again.data), (new.boots, kept));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_words_of_a_rescue_guest_are_apart_from_the_servers_own() {
    let folder = RunFolder::for_this_test();
    let settings = AgentSettings::default();
    let (actor, mut scene) =
        Scene::with_actor(TestHost::shared(), folder.path(), &tiny("own"), settings).await;
    let id = actor.id;
    scene.rescue_actor(&actor).await;
    let rescue = text(&log(&mut scene, id, From::LastBytes(-1), USUAL).await);
    assert!(rescue.contains(&format!("TINY-READY {FIXER}")), "{rescue}");
    assert!(!rescue.contains("TINY-UP own"), "{rescue}");
    let own = text(&log(&mut scene, id, From::LastBytes(-1), SERVER).await);
    assert!(own.contains("TINY-UP own") && !own.contains("TINY-UP fixer"));

    scene.unrescue_actor(&actor).await;
    let now = log(&mut scene, id, From::LastBytes(-1), USUAL).await;
    assert!(!text(&now).contains("TINY-UP fixer"));
    let rescues: Vec<bool> = now.boots.iter().map(|boot| boot.rescue).collect();
    assert_eq!(rescues, [false, true, false]);
    let request = GetConsoleLogRequest {
        server: id.to_string(),
        boot: Some(now.boots[1].number),
        ..GetConsoleLogRequest::default()
    };
    let of = scene.client.consoles.get_console_log(request).await;
    assert!(text(of.unwrap().get_ref()).contains("TINY-UP fixer"));
}

#[tokio::test(flavor = "multi_thread")]
async fn only_so_many_boots_of_a_made_server_are_kept_and_none_outlives_it() {
    let settings = AgentSettings::default().set("console.boots", 2);
    let mut scene = Scene::with(settings).await;
    let actor = Actor::made(&mut scene, "looping", Kind::Made).await;
    for _ in 0..3 {
        let mark = actor.console().mark();
        scene
            .client
            .stop(actor.id, Some(Duration::ZERO))
            .await
            .done();
        scene.client.start(actor.id).await.done();
        actor.wait_ready(mark, "looping");
    }
    let kept = log(&mut scene, actor.id, From::LastBytes(-1), USUAL).await;
    let numbers: Vec<i64> = kept.boots.iter().map(|boot| boot.number).collect();
    assert_eq!(numbers, [3, 4]);
    assert_eq!(text(&kept).matches("TINY-UP looping").count(), 2);
    let note = scene
        .agent
        .state_folder()
        .join(format!("console/{}.json", actor.id));
    assert!(note.exists());
    scene.client.delete(actor.id).await.done();
    let deadline = Instant::now() + SOON;
    while note.exists() {
        assert!(Instant::now() < deadline, "the note stays");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_has_grown_too_long_is_cut_under_a_guest_that_goes_on_writing() {
    const KEPT: u64 = 1 << 20;
    let settings = AgentSettings::default().set("console.max_size", "1MiB");
    let mut scene = Scene::with(settings).await;
    let actor = Actor::made(&mut scene, "chatty", Kind::Made).await;
    let mut console = scene.console(actor.id);
    let number = actor.number();
    let old = log(&mut scene, actor.id, From::LastBytes(-1), USUAL).await;
    // As if the guest had said it: QEMU appends to the same file.
    let is_log = |file: &PathBuf| file.ends_with("console.log");
    let path = scene.files_of(actor.id).into_iter().find(is_log).unwrap();
    let mut file = OpenOptions::new().append(true).open(&path).unwrap();
    let line = "y".repeat(63) + "\n";
    file.write_all(line.repeat(5 << 14).as_bytes()).unwrap();
    ticks(&mut console);
    let length = || fs::metadata(&path).unwrap().len();
    assert!(length() > 5 * KEPT);
    wait_for("the log is cut", SOON, || {
        let held = fs::metadata(&path).unwrap().blocks() * 512;
        (held <= 2 * KEPT).then_some(())
    });
    let before = length();
    ticks(&mut console);
    assert!(length() > before, "it goes on at the end");
    assert_eq!(actor.number(), number, "it is the same QEMU");

    let new = log(&mut scene, actor.id, From::LastBytes(-1), USUAL).await;
    let said = text(&new);
    assert!(
        said.trim_end()
            .rsplit('\n')
            .next()
            .unwrap()
            .contains("TINY-TICK")
    );
    assert!(u64::try_from(said.len()).unwrap() <= KEPT && !said.contains('\0'));
    // Who went on from a place that is gone is told so.
    let rest = log(&mut scene, actor.id, From::Cursor(old.next_cursor), USUAL).await;
    assert!(rest.gap);
    assert!(text(&rest).starts_with('y'), "{:?}", &text(&rest)[..80]);
    scene.client.delete(actor.id).await.done();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_followed_log_tells_what_the_guest_says_over_a_restart() {
    let mut scene = Scene::new().await;
    let id = scene.tiny(&TinyGuest::new("news")).await;
    let request = v1::FollowConsoleLogRequest {
        server: id.to_string(),
        ..v1::FollowConsoleLogRequest::default()
    };
    let stream = scene.client.consoles.follow_console_log(request).await;
    let mut stream = stream.unwrap().into_inner();
    let mut said = String::new();
    let mut boots = Vec::new();
    let mut hear = async |pattern: &str| {
        let deadline = Instant::now() + SOON;
        while !said.contains(pattern) {
            assert!(Instant::now() < deadline, "no {pattern} in {said}");
            let next = timeout(SOON, stream.message()).await.unwrap();
            let next = next.unwrap().unwrap();
            said.push_str(&String::from_utf8_lossy(&next.data));
            boots.extend(next.boot);
        }
        std::mem::take(&mut said)
    };
    let mut console = scene.console(id);
    console.send("t");
    let heard = hear("TINY-TICK").await;
    assert!(!heard.contains("TINY-UP"), "it began before now: {heard}");
    scene.client.stop(id, None).await.done();
    scene.client.start(id).await.done();
    hear("TINY-READY news").await;
    boots.dedup();
    assert_eq!(boots, [0, 1]);
}

struct Line {
    sent: mpsc::Sender<v1::AttachConsoleRequest>,
    told: Streaming<v1::AttachConsoleResponse>,
    heard: String,
}

impl Line {
    async fn attach(scene: &Scene<'_>, open: v1::ConsoleOpen) -> Result<Self, Status> {
        let (sent, requests) = mpsc::channel(8);
        let item = Some(Sent::Open(open));
        sent.send(v1::AttachConsoleRequest { item }).await.unwrap();
        let mut consoles = scene.client.consoles.clone();
        let call = consoles.attach_console(ReceiverStream::new(requests));
        let told = timeout(SOON, call).await.unwrap()?.into_inner();
        let heard = String::new();
        Ok(Self { sent, told, heard })
    }

    async fn types(&self, keys: &str) {
        let item = Some(Sent::Input(keys.as_bytes().to_vec()));
        let request = v1::AttachConsoleRequest { item };
        self.sent.send(request).await.unwrap();
    }

    async fn next(&mut self, within: Duration) -> Told {
        let next = timeout(within, self.told.message()).await;
        let next = next.unwrap_or_else(|_| panic!("nothing more after {:?}", self.heard));
        next.unwrap().unwrap().item.unwrap()
    }

    /// Waits until it has heard this, and returns all up to then.
    async fn hears(&mut self, pattern: &str) -> String {
        while !self.heard.contains(pattern) {
            if let Told::Output(bytes) = self.next(BOOT).await {
                let said = String::from_utf8_lossy(&bytes).replace('\r', "");
                self.heard.push_str(&said);
            }
        }
        std::mem::take(&mut self.heard)
    }

    async fn ends(&mut self) -> String {
        loop {
            if let Told::Ended(ended) = self.next(SOON).await {
                return ended.message;
            }
        }
    }
}

fn open(server: Uuid) -> v1::ConsoleOpen {
    v1::ConsoleOpen {
        server: server.to_string(),
        ..v1::ConsoleOpen::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shell_is_used_over_the_serial_port_and_others_look_on() {
    let mut scene = Scene::new().await;
    let xml = scene.linux_xml(&LinuxGuest::new("shell"));
    let slot = linux_slot();
    let id = scene.running(&xml, "GUEST ready name=shell").await;
    let mut writer = Line::attach(&scene, open(id)).await.unwrap();
    assert!(matches!(writer.next(SOON).await, Told::Attached(a) if a.writer && a.clients == 1));
    let look = v1::ConsoleOpen {
        read_only: true,
        ..open(id)
    };
    let mut viewer = Line::attach(&scene, look).await.unwrap();
    viewer.types("run 0 touch /tmp/never\n").await;

    let begun = Instant::now();
    writer.types("run 7 echo $((6 * 7)) && ls /tmp\n").await;
    let answer = writer.hears("GUEST end 7 0").await;
    println!("a shell answered in {:?}", begun.elapsed());
    assert!(answer.contains("GUEST begin 7\n42\n"), "{answer}");
    assert!(!answer.contains("never"), "a viewer wrote: {answer}");
    let seen = viewer.hears("GUEST end 7 0").await;
    assert!(seen.contains("GUEST begin 7\n42\n"), "{seen}");
    // A long answer comes whole.
    writer.types("run 8 seq 1 5000\n").await;
    let long = writer.hears("GUEST end 8 0").await;
    assert!(long.contains("\n4999\n5000\n") && long.lines().count() >= 5000);

    let refused = Line::attach(&scene, open(id)).await.err().unwrap();
    assert_eq!(reason(&refused), "CONSOLE_BUSY");
    assert!(refused.message().contains("uid:0"), "{refused:?}");
    let force = v1::ConsoleOpen {
        force: true,
        history: true,
        ..open(id)
    };
    let mut other = Line::attach(&scene, force).await.unwrap();
    assert!(other.hears("GUEST end 8 0").await.contains("4999"));
    loop {
        if let Told::TakenOver(by) = writer.next(SOON).await {
            assert_eq!(by.caller, "uid:0");
            break;
        }
    }
    other.types("run 9 echo other\n").await;
    other.hears("GUEST end 9 0").await;

    // What was said is in the log as well, read meanwhile and gone on from over a restart.
    let mine = log(&mut scene, id, From::LastLines(2), USUAL).await;
    assert_eq!(text(&mine), "other\nGUEST end 9 0\n");
    scene.client.stop(id, None).await.done();
    for line in [&mut writer, &mut viewer, &mut other] {
        println!("ended: {}", line.ends().await);
    }
    let stopped = Line::attach(&scene, open(id)).await.err().unwrap();
    assert_eq!(reason(&stopped), "GUEST_NOT_RUNNING");
    let mark = scene.console(id).mark();
    scene.client.start(id).await.done();
    let mut again = Line::attach(&scene, open(id)).await.unwrap();
    scene.console(id).wait_line(mark, "GUEST ready", BOOT);
    again.types("run 10 echo again\n").await;
    again.hears("GUEST end 10 0").await;
    let new = log(&mut scene, id, From::Cursor(mine.next_cursor), USUAL).await;
    assert!(text(&new).contains("GUEST up name=shell") && !new.gap);
    drop(slot);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_line_to_a_serial_port_is_free_again_when_the_last_client_has_gone() {
    let mut scene = Scene::new().await;
    let id = scene.tiny(&TinyGuest::new("free")).await;
    for _ in 0..5 {
        let mut line = Line::attach(&scene, open(id)).await.unwrap();
        line.types("t").await;
        line.hears("TINY-TICK").await;
    }
    let threads = || {
        let pid = scene.agent.machine_pid().unwrap();
        let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
        let names = tasks
            .flatten()
            .filter_map(|task| std::fs::read_to_string(task.path().join("comm")).ok());
        names.filter(|name| name.trim() == "lv-console").count()
    };
    let deadline = Instant::now() + SOON;
    while threads() > 0 {
        assert!(Instant::now() < deadline, "{} threads stay", threads());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Width and height, and the pixels' data whole: every chunk's sum is right.
fn check_png(png: &[u8]) -> (u32, u32) {
    assert!(png.starts_with(b"\x89PNG\r\n\x1a\n"));
    let number = |at: usize| u32::from_be_bytes(png[at..at + 4].try_into().unwrap());
    let mut at = 8;
    let mut names = Vec::new();
    while at < png.len() {
        let length = usize::try_from(number(at)).unwrap();
        names.push(String::from_utf8(png[at + 4..at + 8].to_vec()).unwrap());
        at += 12 + length;
    }
    assert_eq!(at, png.len());
    assert_eq!(names.first().unwrap(), "IHDR");
    assert_eq!(names.last().unwrap(), "IEND");
    (number(16), number(20))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_picture_of_a_screen_is_a_png_of_its_size() {
    let mut scene = Scene::new().await;
    let guest = TinyGuest::new("seen");
    let video = "<video><model type='vga'/></video><graphics type='vnc' port='-1' autoport='yes'/>";
    let xml = scene.tiny_xml(&guest).device(video);
    let id = scene.running(&xml, "TINY-READY seen").await;
    let blind = scene.tiny(&TinyGuest::new("blind")).await;
    let shot = async |consoles: &mut v1::console_service_client::ConsoleServiceClient<_>,
                      server: Uuid| {
        let server = server.to_string();
        let request = v1::GetScreenshotRequest { server };
        consoles.get_screenshot(request).await
    };
    let mut consoles = scene.client.consoles.clone();
    let mut stream = shot(&mut consoles, id).await.unwrap().into_inner();
    let (mut png, mut size) = (Vec::new(), (0, 0));
    while let Some(piece) = stream.message().await.unwrap() {
        size = (size.0 + piece.width, size.1 + piece.height);
        png.extend(piece.data);
    }
    println!("a picture of {size:?} has {} bytes", png.len());
    assert_eq!(check_png(&png), size);
    // A VGA in text mode.
    assert_eq!(size, (720, 400));
    let file = scene.folder.join("screen.png");
    std::fs::write(&file, &png).unwrap();
    let refused = shot(&mut consoles, blind).await;
    assert_refused(
        refused.map(|_| tonic::Response::new(())),
        Code::FailedPrecondition,
        "NO_SCREEN",
    );
    scene.client.stop(id, Some(Duration::ZERO)).await.done();
    let refused = shot(&mut consoles, id).await;
    assert_refused(
        refused.map(|_| tonic::Response::new(())),
        Code::FailedPrecondition,
        "GUEST_NOT_RUNNING",
    );
}

async fn diagnostics(scene: &mut Scene<'_>, server: Uuid) -> v1::GetServerDiagnosticsResponse {
    let request = GetServerDiagnosticsRequest {
        server: server.to_string(),
        definitions: true,
    };
    let answer = scene.client.servers.get_server_diagnostics(request).await;
    answer.unwrap().into_inner()
}

fn missing(read: &v1::GetServerDiagnosticsResponse) -> Vec<&str> {
    read.missing.iter().map(|it| it.part.as_str()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn diagnostics_of_a_linux_guest_have_everything() {
    let mut scene = Scene::new().await;
    let xml = scene
        .linux_xml(&LinuxGuest::new("patient"))
        .nic("52:54:00:00:0c:01")
        .device("<graphics type='vnc' port='-1' passwd='s3cret'/>");
    let slot = linux_slot();
    let id = scene.running(&xml, "GUEST ready name=patient").await;
    let deadline = Instant::now() + SOON;
    let read = loop {
        let read = diagnostics(&mut scene, id).await;
        // The agent in the guest comes up a moment after the guest.
        if missing(&read).is_empty() {
            break read;
        }
        assert!(Instant::now() < deadline, "{:#?}", read.missing);
    };
    println!("{read:#?}");
    assert_eq!(read.domain.unwrap().power_state(), PowerState::Running);
    let process = read.process.unwrap();
    assert!(process.pid > 0 && process.resident_kib > 10_000);
    assert!(process.uptime.unwrap().seconds < 600);
    assert_eq!(read.control.unwrap().state, "ok");
    let counters = read.counters.unwrap();
    assert_eq!(counters.vcpus, 1);
    assert!(counters.cpu_time.unwrap().seconds > 0);
    assert_eq!(counters.memory.unwrap().current_kib, Some(192 << 10));
    assert_eq!(counters.disks[0].target, "vda");
    assert!(counters.disks[0].read_bytes > 1 << 20);
    let agent = read.guest_agent.unwrap();
    assert!(
        !agent.version.is_empty() && !agent.kernel.is_empty(),
        "{agent:?}"
    );
    assert!(read.disk_errors.is_empty() && read.stuck_calls.is_empty());
    assert_eq!(read.operations.len(), 1);
    for definition in [&read.live_definition, &read.inactive_definition] {
        assert!(definition.contains("vda") && !definition.contains("s3cret"));
    }

    scene.client.stop(id, Some(Duration::ZERO)).await.done();
    let off = diagnostics(&mut scene, id).await;
    assert_eq!(missing(&off), Vec::<&str>::new());
    assert!(off.counters.is_none() && off.process.is_none() && off.control.is_none());
    assert!(!off.inactive_definition.is_empty());
    drop(slot);
}

#[tokio::test(flavor = "multi_thread")]
async fn diagnostics_of_a_frozen_guest_say_so_and_hold_nobody_up() {
    let folder = RunFolder::for_this_test();
    let host = TestHost::start(folder.path());
    let settings = AgentSettings::default();
    let (well, mut scene) = Scene::with_actor(&host, folder.path(), &tiny("well"), settings).await;
    let frozen = scene.another_actor(&tiny("stiff")).await;
    host.freeze_qemu(frozen.id);
    for round in 0..4 {
        let begun = Instant::now();
        let read = diagnostics(&mut scene, frozen.id).await;
        let took = begun.elapsed();
        println!("round {round}: {took:?}, not read: {:?}", missing(&read));
        assert!(took < Duration::from_secs(15), "{took:?}");
        // It stops when its turn comes, which may be a moment after the signal.
        if round > 0 {
            assert_eq!(read.process.as_ref().unwrap().state, "T");
        }
        assert!(read.control.is_some() && !read.live_definition.is_empty());
        assert!(missing(&read).contains(&"counters"), "{:#?}", read.missing);
        // Others are as well off as before, also while it hangs.
        let begun = Instant::now();
        let other = diagnostics(&mut scene, well.id).await;
        assert!(other.counters.is_some(), "{:#?}", other.missing);
        println!("another one: {:?}", begun.elapsed());
        assert!(begun.elapsed() < Duration::from_secs(5));
    }
    let read = diagnostics(&mut scene, frozen.id).await;
    assert!(!read.stuck_calls.is_empty());
    println!("{:#?}", (&read.control, &read.stuck_calls));
    // It is ended as if nobody had asked it anything.
    let begun = Instant::now();
    scene
        .client
        .stop(frozen.id, Some(Duration::ZERO))
        .await
        .done();
    println!("a frozen guest was stopped in {:?}", begun.elapsed());
    assert_eq!(host.qemu(frozen.id), None);
    scene.client.start(frozen.id).await.done();
    let deadline = Instant::now() + SOON;
    while diagnostics(&mut scene, frozen.id).await.counters.is_none() {
        assert!(Instant::now() < deadline, "it is not asked again");
    }
}
