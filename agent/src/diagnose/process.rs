// SPDX-License-Identifier: Apache-2.0
//! The QEMU of a domain as the kernel shows it in `/proc`. It is seen also when it is frozen, and while
//! libvirt is away.

use std::{fs, path::Path, time::Duration};

use uuid::Uuid;

/// A process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Process {
    /// Its id.
    pub pid: i32,
    /// The kernel's letter for its state.
    pub state: char,
    /// For how long it has run.
    pub uptime: Duration,
    /// CPU time that it has used.
    pub cpu_time: Duration,
    /// Memory that it holds, in KiB.
    pub resident_kib: u64,
}

/// The kernel counts times for programs in hundredths of a second, whatever it does inside
/// (`USER_HZ`, proc(5)).
const TICK: Duration = Duration::from_millis(10);

/// The largest command line that is looked at.
const COMMAND: usize = 128 << 10;

/// The process that has `-uuid` and this uuid among its arguments, as libvirt starts QEMU. Blocks.
pub(super) fn of(domain: Uuid) -> Option<Process> {
    let uuid = domain.to_string();
    let found = fs::read_dir("/proc").ok()?.flatten().find_map(|entry| {
        let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
        let command = fs::read(entry.path().join("cmdline")).ok()?;
        is_of(&command, &uuid).then_some((pid, entry.path()))
    });
    let (pid, folder) = found?;
    read(pid, &folder)
}

fn is_of(command: &[u8], uuid: &str) -> bool {
    let mut arguments = command
        .get(..command.len().min(COMMAND))
        .unwrap_or_default()
        .split(|byte| *byte == 0);
    arguments.any(|argument| argument == b"-uuid") && arguments.next() == Some(uuid.as_bytes())
}

fn read(pid: i32, folder: &Path) -> Option<Process> {
    let stat = fs::read_to_string(folder.join("stat")).ok()?;
    let now = fs::read_to_string("/proc/uptime").ok()?;
    let status = fs::read_to_string(folder.join("status")).ok()?;
    parsed(pid, &stat, &now, &status)
}

/// From `/proc/<pid>/stat`, `/proc/uptime` and `/proc/<pid>/status`.
fn parsed(pid: i32, stat: &str, now: &str, status: &str) -> Option<Process> {
    // The name is in parentheses and may hold anything, parentheses included.
    let (_, behind) = stat.rsplit_once(") ")?;
    let fields: Vec<&str> = behind.split(' ').collect();
    // The state is the third field of the line (proc(5)) and the first of these.
    let ticks = |number: usize| -> Option<u32> { fields.get(number - 3)?.parse().ok() };
    let span = |ticks: u32| TICK.saturating_mul(ticks);
    let begun = span(ticks(22)?);
    let now = Duration::try_from_secs_f64(now.split(' ').next()?.parse().ok()?).ok()?;
    let resident = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .and_then(|rest| rest.split_whitespace().next()?.parse().ok());
    Some(Process {
        pid,
        state: fields.first()?.chars().next()?,
        uptime: now.saturating_sub(begun),
        cpu_time: span(ticks(14)?).saturating_add(span(ticks(15)?)),
        resident_kib: resident.unwrap_or(0),
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_process_is_known_by_its_argument_and_nothing_like_it() {
        let uuid = "6c0e1f2e-0000-4000-8000-000000000001";
        let command = |text: &str| text.replace(' ', "\0").into_bytes();
        assert!(is_of(&command(&format!("qemu -S -uuid {uuid} -m 1")), uuid));
        assert!(!is_of(&command(&format!("qemu -name {uuid}")), uuid));
        assert!(!is_of(&command("qemu -uuid"), uuid));
        assert!(!is_of(b"", uuid));
        assert_eq!(of(Uuid::from_u128(0x1234_5678_9abc)), None);
    }

    #[test]
    fn the_kernels_numbers_are_read() {
        let stat = "77 (qemu) (x) T 1 77 77 0 -1 4 1 0 0 0 250 150 0 0 20 0 4 0 1000 9 9";
        let read = parsed(
            77,
            stat,
            "30.50 100.00\n",
            "Name:\tqemu\nVmRSS:\t  4321 kB\n",
        );
        assert_eq!(
            read,
            Some(Process {
                pid: 77,
                state: 'T',
                uptime: Duration::from_millis(20_500),
                cpu_time: Duration::from_secs(4),
                resident_kib: 4321,
            })
        );
        let own = i32::try_from(std::process::id()).unwrap();
        let me = super::read(own, Path::new("/proc/self")).unwrap();
        assert!(
            me.resident_kib > 0 && me.uptime < Duration::from_secs(3600),
            "{me:?}"
        );
    }
}
