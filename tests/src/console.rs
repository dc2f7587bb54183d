// SPDX-License-Identifier: Apache-2.0
//! A guest's serial console: what it has said, and orders to it.
//!
//! What a guest says is read from the log file of the domain's serial port, which holds every boot, whether
//! anybody listened or not. Orders go in by the port's pseudo-terminal.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use nix::fcntl::OFlag;
use uuid::Uuid;

use crate::libvirt::Libvirt;
use crate::tool;
use crate::wait::{BOOT, try_wait};

/// A place in what a guest has said: waits look only behind it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mark(usize);

impl Mark {
    /// Before the first word.
    pub const START: Self = Self(0);
}

/// A disk as a Linux guest sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestDisk {
    /// The kernel's name for it: `vda`.
    pub name: String,
    /// Can the guest not write to it?
    pub read_only: bool,
    /// Its serial number.
    pub serial: String,
}

impl GuestDisk {
    /// Reads `vda bytes=B ro=0 serial=S model=M`.
    fn told(words: &str) -> Option<Self> {
        let (name, rest) = words.split_once(' ')?;
        let value = |key: &str| rest.split(' ').find_map(|word| word.strip_prefix(key));
        Some(Self {
            name: name.to_owned(),
            read_only: value("ro=")? == "1",
            serial: value("serial=")?.to_owned(),
        })
    }
}

/// The console of one domain.
#[derive(Debug)]
pub struct Console {
    libvirt: Libvirt,
    domain: Uuid,
    log: PathBuf,
    terminal: Option<(String, File)>,
}

impl Console {
    /// The console of a domain whose serial port has a log file. The domain need not run yet.
    #[track_caller]
    pub fn of(libvirt: &Libvirt, domain: Uuid) -> Self {
        let xml = libvirt.live_xml(domain).unwrap();
        let log = attribute(serial(&xml), "<log file='")
            .unwrap_or_else(|| panic!("the serial port of {domain} has no log file:\n{xml}"));
        Self {
            libvirt: libvirt.clone(),
            domain,
            log: log.into(),
            terminal: None,
        }
    }

    /// All that the guest has said, over all boots.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).replace('\r', "")
    }

    /// Where the guest is now: what it says from here on is behind the mark.
    pub fn mark(&self) -> Mark {
        Mark(self.text().len())
    }

    /// What the guest has said behind the mark.
    pub fn since(&self, mark: Mark) -> String {
        let text = self.text();
        // A log that is shorter than the mark was begun anew at a boot.
        text.get(mark.0..).unwrap_or(&text).to_owned()
    }

    /// Waits until the guest has said a whole line that holds `pattern` behind the mark; returns the line.
    #[track_caller]
    pub fn wait_line(&self, mark: Mark, pattern: &str, within: Duration) -> String {
        let line = try_wait(within, || {
            let text = self.since(mark);
            let whole = text.rfind('\n').map_or("", |end| &text[..end]);
            whole
                .lines()
                .find(|line| line.contains(pattern))
                .map(str::to_owned)
        });
        line.unwrap_or_else(|| {
            panic!(
                "the guest did not say '{pattern}' within {within:?}, but:\n{}",
                self.since(mark)
            )
        })
    }

    /// The disks of which a Linux guest has told behind the mark.
    pub fn disks(&self, mark: Mark) -> Vec<GuestDisk> {
        let lines = self.since(mark);
        lines
            .lines()
            .filter_map(|line| GuestDisk::told(line.strip_prefix("GUEST disk ")?))
            .collect()
    }

    /// The MAC addresses of which a Linux guest has told behind the mark, in order.
    pub fn macs(&self, mark: Mark) -> Vec<String> {
        let lines = self.since(mark);
        let mut macs: Vec<String> = lines
            .lines()
            .filter(|line| line.starts_with("GUEST nic "))
            .filter_map(|line| Some(line.split_once(" mac=")?.1.to_owned()))
            .collect();
        macs.sort();
        macs
    }

    /// Sends letters to the guest: orders to a tiny guest.
    #[track_caller]
    pub fn send(&mut self, letters: &str) {
        let xml = self.libvirt.live_xml(self.domain).unwrap();
        let path = attribute(serial(&xml), "<source path='")
            .unwrap_or_else(|| panic!("{} has no terminal; does it run?", self.domain));
        if self.terminal.as_ref().is_none_or(|(open, _)| *open != path) {
            self.terminal = Some((path.clone(), open_terminal(&path)));
        }
        let (_, terminal) = self.terminal.as_mut().expect("it was just opened");
        terminal.write_all(letters.as_bytes()).unwrap();
    }

    /// The same over the terminal that [`Self::send`] opened before, without asking libvirt for it.
    #[track_caller]
    pub fn type_on(&mut self, letters: &str) {
        let (_, terminal) = self.terminal.as_mut().expect("something was sent before");
        terminal.write_all(letters.as_bytes()).unwrap();
    }

    /// Runs a shell command in a Linux guest; returns its exit status and what it printed.
    #[track_caller]
    pub fn run(&mut self, command: &str) -> (i32, String) {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        assert!(!command.contains('\n'), "one line, please: {command}");
        let id = format!(
            "{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        );
        let mark = self.mark();
        self.send(&format!("run {id} {command}\n"));
        let end = self.wait_line(mark, &format!("GUEST end {id} "), BOOT);
        let status = end.rsplit(' ').next().unwrap().parse().unwrap();
        let said = self.since(mark);
        let begin = format!("GUEST begin {id}\n");
        let from = said.find(&begin).expect("an end has a beginning") + begin.len();
        let to = said.find(&end).expect("the end was seen");
        (status, said[from..to].to_owned())
    }

    /// Runs a shell command in a Linux guest that must succeed; returns what it printed.
    #[track_caller]
    pub fn run_ok(&mut self, command: &str) -> String {
        let (status, output) = self.run(command);
        assert_eq!(status, 0, "in the guest, `{command}` failed: {output}");
        output
    }
}

/// The first serial port in a domain's XML.
fn serial(xml: &str) -> &str {
    let port = xml.find("<serial ").map_or("", |from| &xml[from..]);
    port.split("</serial>").next().unwrap_or_default()
}

/// The value of an attribute, from how libvirt prints it. Only for paths without XML's special characters.
fn attribute(xml: &str, start: &str) -> Option<String> {
    let from = xml.find(start)? + start.len();
    xml[from..].split('\'').next().map(str::to_owned)
}

/// Opens a pseudo-terminal and keeps it drained. QEMU notices within a second that somebody is there; what
/// is written before waits in the terminal.
#[track_caller]
fn open_terminal(path: &str) -> File {
    let terminal = File::options()
        .read(true)
        .write(true)
        .custom_flags(OFlag::O_NOCTTY.bits())
        .open(path)
        .unwrap_or_else(|e| panic!("cannot open {path}: {e}"));
    // Echo would send the guest's own words back to it.
    tool!("stty", "-F", path, "raw", "-echo");
    let mut reader = terminal.try_clone().unwrap();
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        // Ends with an error when the guest is gone.
        while reader.read(&mut buffer).is_ok_and(|count| count > 0) {}
    });
    terminal
}
