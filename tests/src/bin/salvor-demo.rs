// SPDX-License-Identifier: Apache-2.0
//! `make demo`: one rescue from end to end, for people to look at.
//!
//! Real libvirt, QEMU, `salvord` and `salvor`, on a test host of their own. A server that was made with
//! virsh is broken, adopted, rescued, repaired from inside the rescue system, and put back. It ends with 0
//! only if the repaired server has come up, with the definition that it had before.

// As in the harness: where an expectation fails, the demo must fail.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use salvor_tests::agent::{AgentSettings, TestAgent};
use salvor_tests::console::{Console, Mark};
use salvor_tests::domain::DomainXml;
use salvor_tests::guests::{Format, LinuxGuest};
use salvor_tests::host::TestHost;
use salvor_tests::run_folder::{RunFolder, profile_folder};
use salvor_tests::wait::BOOT;
use uuid::Uuid;

/// Where lines are folded.
const COLUMNS: usize = 96;
/// The length of a uuid as text, and how much of it is shown.
const UUID: usize = 36;
const SHOWN: usize = 8;

fn main() -> ExitCode {
    // What went wrong is said once, and where to look (by the folder, when it is dropped).
    std::panic::set_hook(Box::new(|panic| {
        let why = panic.payload_as_str().unwrap_or("for no known reason");
        println!("\nThe demo FAILED: {why}");
    }));
    let demo = catch_unwind(AssertUnwindSafe(|| {
        let begun = Instant::now();
        note(
            "A hypervisor host of its own: libvirtd in namespaces, invisible to this machine's. Uuids are \
             shown by their first 8 digits, which salvor takes as well.",
        );
        let folder = RunFolder::named("salvor-demo");
        let host = TestHost::start(folder.path());
        Demo::begin(begun, &folder, &host).play();
    }));
    match demo {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

/// The stage: a host, its libvirt, and a shell that people look over the shoulder of.
struct Demo<'f> {
    folder: &'f RunFolder,
    host: &'f TestHost,
    environment: Vec<(&'static str, String)>,
    begun: Instant,
    laps: Vec<(&'static str, Duration)>,
}

impl<'f> Demo<'f> {
    fn begin(begun: Instant, folder: &'f RunFolder, host: &'f TestHost) -> Self {
        let mut demo = Self {
            folder,
            host,
            environment: Vec::new(),
            begun,
            laps: Vec::new(),
        };
        demo.export("DEMO", folder.path().display().to_string());
        demo.export("LIBVIRT_DEFAULT_URI", host.uri());
        LinuxGuest::new("web-1")
            .broken("an upgrade stopped half-way")
            .build(&folder.join("web-1.qcow2"), Format::Qcow2);
        LinuxGuest::new("rescue").build(&folder.join("rescue.qcow2"), Format::Qcow2);
        let xml = DomainXml::linux("web-1", &folder.join("web-1.console"))
            .disk(
                &folder.join("web-1.qcow2"),
                Format::Qcow2,
                "vda",
                "virtio",
                "root",
                Some(1),
            )
            .nic("52:54:00:00:00:01")
            .xml();
        fs::write(folder.join("web-1.xml"), xml).unwrap();
        demo.lap("host and disk images made");
        demo
    }

    fn play(mut self) {
        let libvirt = self.host.libvirt();

        title("Somebody's server does not come up");
        self.shell("virsh -q define $DEMO/web-1.xml");
        self.shell("virsh -q start web-1");
        let id = match libvirt.list().unwrap().as_slice() {
            [domain] => domain.id,
            domains => panic!("not one domain, but {domains:?}"),
        };
        let mut console = Console::of(&libvirt, id);
        let mut seen = Mark::START;
        console.wait_line(seen, "GUEST broken", BOOT);
        show_console("web-1", &console, &mut seen);
        let definition = libvirt.inactive_xml(id).unwrap();
        self.lap("the server boots and stops half-way");

        title("The agent takes it over: it is neither changed nor restarted");
        let agent = self.start_agent();
        self.export("SALVOR_SOCKET", agent.socket().display().to_string());
        self.shell("salvor server adopt web-1");
        self.shell("salvor image import $DEMO/rescue.qcow2 --name rescue");
        self.lap("agent started, server adopted, image imported");

        title("What a rescue would do");
        self.shell("salvor plan rescue web-1 --image rescue --shutdown-timeout 2s");

        title("Rescue: the rescue system boots in the server's place, with the server's disks");
        self.shell("salvor server rescue web-1 --image rescue --shutdown-timeout 2s");
        self.lap("salvor server rescue");
        console.wait_line(seen, "GUEST ready name=rescue", BOOT);
        show_console("web-1", &console, &mut seen);
        self.lap("the rescue system boots");

        title("Repair, on the serial console of the rescue system");
        for command in [
            "mount /dev/vdb2 /mnt",
            "cat /mnt/broken",
            "rm /mnt/broken",
            "echo 'finished by hand' > /mnt/upgrade",
            "umount /mnt",
        ] {
            println!("rescue# {command}");
            let output = console.run_ok(command);
            if !output.is_empty() {
                print_folded(&output);
            }
        }
        seen = console.mark();
        self.lap("repair");
        self.shell("salvor server list");

        title("Unrescue: the server's own definition comes back");
        self.shell("salvor server unrescue web-1");
        self.lap("salvor server unrescue");
        let line = console.wait_line(seen, "GUEST ready", BOOT);
        show_console("web-1", &console, &mut seen);
        assert!(
            line.contains("name=web-1"),
            "something else has booted: {line}"
        );
        self.lap("the repaired server boots");

        title("What is left");
        self.shell("salvor server show web-1");
        self.shell("salvor operation list");
        println!("web-1# cat /data/upgrade");
        let upgrade = console.run_ok("cat /data/upgrade");
        print_folded(&upgrade);
        assert_eq!(upgrade, "finished by hand\n", "the repair is not there");
        assert_eq!(
            console.run("test -e /data/broken").0,
            1,
            "the server is as broken as it was"
        );
        assert_eq!(
            libvirt.inactive_xml(id).unwrap(),
            definition,
            "the server's definition is not the one that it had before"
        );
        let left = files_of(&agent.state_folder().join("servers"));
        assert!(left.is_empty(), "the rescue has left files: {left:?}");
        self.end();
    }

    fn end(&self) {
        title(
            "Done: the server is repaired, its definition is the same byte for byte, no file is left",
        );
        for (what, took) in &self.laps {
            println!("  {what:<46} {:>6.2} s", took.as_secs_f64());
        }
        println!(
            "  {:<46} {:>6.2} s",
            "together",
            self.begun.elapsed().as_secs_f64()
        );
        println!("  (guests are emulated here; with KVM they boot many times faster)");
    }

    fn start_agent(&self) -> TestAgent<'f> {
        let settings = AgentSettings::default().program(&program("salvord"));
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        println!("$ salvord --config $DEMO/salvor.toml &");
        runtime.block_on(TestAgent::start(self.host, self.folder.path(), settings))
    }

    /// Sets a variable for the commands, so that somebody who reads along can use it in another terminal.
    fn export(&mut self, name: &'static str, value: String) {
        println!("$ export {name}={value}");
        self.environment.push((name, value));
    }

    fn lap(&mut self, what: &'static str) {
        let before: Duration = self.laps.iter().map(|(_, took)| *took).sum();
        self.laps.push((what, self.begun.elapsed() - before));
    }

    /// Runs a command as a shell would show it. It must succeed.
    fn shell(&self, command: &str) {
        println!("$ {command}");
        let (output, both) = std::io::pipe().unwrap();
        let path = format!(
            "{}:{}",
            profile_folder().display(),
            std::env::var("PATH").unwrap_or_default()
        );
        let mut child = Command::new("sh")
            .args(["-c", command])
            .env("PATH", path)
            .envs(self.environment.iter().cloned())
            .stdin(Stdio::null())
            .stdout(both.try_clone().unwrap())
            .stderr(both)
            .spawn()
            .unwrap();
        let mut table = Vec::new();
        for line in BufReader::new(output).lines() {
            let line = self.with_variables(&line.unwrap());
            // A table is shown when it is whole, for its columns become narrower.
            if is_heading(&line) || !table.is_empty() && !line.is_empty() {
                table.push(line);
                continue;
            }
            print_table(std::mem::take(&mut table));
            print_folded(&shorten(&line));
        }
        print_table(table);
        let status = child.wait().unwrap();
        assert!(status.success(), "`{command}` ended with {status}");
    }

    /// Puts the names of the variables where their values stand.
    fn with_variables(&self, line: &str) -> String {
        self.environment
            .iter()
            .fold(line.to_owned(), |line, (name, value)| {
                line.replace(value, &format!("${name}"))
            })
    }
}

/// A program of ours. `make demo` builds it.
fn program(name: &str) -> PathBuf {
    let path = profile_folder().join(name);
    assert!(
        path.is_file(),
        "{} is not there: run `make demo`",
        path.display()
    );
    path
}

fn title(text: &str) {
    println!("\n== {text}");
}

fn note(text: &str) {
    for line in fold(text) {
        println!("# {}", line.trim_start());
    }
}

/// Shows what a guest has said since it was looked at last.
fn show_console(domain: &str, console: &Console, seen: &mut Mark) {
    let said = console.since(*seen);
    *seen = console.mark();
    println!("# the serial console of {domain}:");
    // The BIOS and the boot loader talk, too, in escape sequences; the names of all files of the config
    // drive are of no interest here.
    for line in said.lines() {
        if line.starts_with("GUEST ") && !line.starts_with("GUEST config-drive ") {
            print_folded(line);
        }
    }
}

fn print_folded(text: &str) {
    for line in text.trim_end_matches('\n').split('\n') {
        for part in fold(line) {
            println!("{part}");
        }
    }
    // Shown as it happens, also to a pipe.
    std::io::stdout().flush().unwrap();
}

/// Folds a line at blanks; what follows is indented.
fn fold(line: &str) -> Vec<String> {
    let mut lines = Vec::new();
    let mut rest = line.to_owned();
    while rest.chars().count() > COLUMNS {
        let limit = rest
            .char_indices()
            .nth(COLUMNS)
            .map_or(rest.len(), |(at, _)| at);
        let indent = rest.len() - rest.trim_start().len();
        let Some(at) = rest[..limit].rfind(' ').filter(|at| *at > indent) else {
            break;
        };
        let tail = format!("      {}", rest[at..].trim_start());
        rest.truncate(at);
        lines.push(std::mem::replace(&mut rest, tail));
    }
    lines.push(rest);
    lines
}

/// The places in a line where uuids begin.
fn uuids(line: &str) -> Vec<usize> {
    let mut found = Vec::new();
    let mut at = 0;
    while let Some(text) = line.get(at..) {
        let Some(next) = text.char_indices().nth(1) else {
            break;
        };
        let is_uuid = text
            .get(..UUID)
            .is_some_and(|word| word.contains('-') && Uuid::try_parse(word).is_ok());
        if is_uuid {
            found.push(at);
        }
        at += if is_uuid { UUID } else { next.0 };
    }
    found
}

fn shorten(line: &str) -> String {
    let mut line = line.to_owned();
    for at in uuids(&line).into_iter().rev() {
        line.replace_range(at + SHOWN..at + UUID, "");
    }
    line
}

/// Several words in capitals, far apart.
fn is_heading(line: &str) -> bool {
    line.contains("  ")
        && line
            .chars()
            .all(|c| c.is_ascii_uppercase() || c == ' ' || c == '#')
}

/// Shows a table with its uuids cut: where each row has one (or nothing), the column becomes narrower.
fn print_table(mut lines: Vec<String>) {
    let mut columns: Vec<usize> = lines.iter().flat_map(|line| uuids(line)).collect();
    columns.sort_unstable();
    columns.dedup();
    for at in columns.into_iter().rev() {
        let cut = at + SHOWN..at + UUID;
        let fits = lines.iter().all(|line| {
            uuids(line).contains(&at)
                || line
                    .get(cut.start.min(line.len())..cut.end.min(line.len()))
                    .is_some_and(|cell| cell.trim().is_empty())
        });
        if fits {
            for line in &mut lines {
                let end = cut.end.min(line.len());
                if cut.start < end {
                    line.replace_range(cut.start..end, "");
                }
            }
        }
    }
    for line in &lines {
        print_folded(&shorten(line));
    }
}

/// All files below a folder that may not exist.
fn files_of(folder: &std::path::Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(folder) else {
        return Vec::new();
    };
    entries
        .flatten()
        .flat_map(|entry| {
            let path = entry.path();
            if path.is_dir() {
                files_of(&path)
            } else {
                vec![path]
            }
        })
        .collect()
}
