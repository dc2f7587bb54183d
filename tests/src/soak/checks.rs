// SPDX-License-Identifier: Apache-2.0
//! How things must be when nothing is under way any more: the records are what libvirt shows, and every file
//! has somebody to whom it belongs.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use salvor_proto::v1::{DiskProtection, PowerState, Server, ServerOrigin, VmState};
use uuid::Uuid;
use virt::domain::{Domain, DomainState};
use virt::sys;

use super::tally::Tally;
use crate::host::TestHost;
use crate::libvirt::{Libvirt, LibvirtResult, ListedDomain};

/// A domain as it really is.
#[derive(Debug, Clone)]
pub(super) struct Real {
    domain: ListedDomain,
    /// Saved memory waits for the next start.
    saved: bool,
    /// Its definition is a rescue's.
    rescue: bool,
}

/// All domains as they really are.
pub(super) fn reality(libvirt: &Libvirt) -> LibvirtResult<Vec<Real>> {
    let mut all = Vec::new();
    for domain in libvirt.list()? {
        let saved = libvirt.domain(domain.id, |domain: &Domain| domain.has_managed_save(0))?;
        let rescue = libvirt.domain(domain.id, |domain| {
            domain.xml_desc(sys::VIR_DOMAIN_XML_INACTIVE)
        })?;
        all.push(Real {
            saved,
            rescue: rescue.contains("<salvor:role>rescue<"),
            domain,
        });
    }
    Ok(all)
}

/// In what the records are not what is really so.
pub(super) fn differences(servers: &[Server], real: &[Real]) -> Vec<String> {
    let mut differences = Vec::new();
    for one in real {
        let id = one.domain.id.to_string();
        if !servers.iter().any(|server| server.id == id) {
            differences.push(format!("nobody knows of the domain {:?}", one.domain));
        }
    }
    for server in servers {
        let domain = real
            .iter()
            .find(|one| one.domain.id.to_string() == server.id);
        let Some(one) = domain else {
            differences.push(format!("it has no domain: {}", short(server)));
            continue;
        };
        if let Some(what) = difference(server, one) {
            differences.push(format!("{what}: {one:?}, {}", short(server)));
        }
    }
    differences
}

fn difference(server: &Server, real: &Real) -> Option<&'static str> {
    if !server.task_state.is_empty() || !server.operation.is_empty() {
        return Some("a task goes on although no operation does");
    }
    let power = server
        .power
        .as_ref()
        .map_or(PowerState::Unspecified, |power| power.state());
    let shown = match real.domain.state {
        DomainState::Running | DomainState::Blocked => PowerState::Running,
        DomainState::Paused => PowerState::Paused,
        DomainState::Shutoff => PowerState::Shutdown,
        DomainState::Crashed => PowerState::Crashed,
        DomainState::PMSuspended => PowerState::Suspended,
        DomainState::NoState | DomainState::Shutdown => return Some("it passes"),
    };
    if power != shown {
        return Some("the recorded power is another");
    }
    let halted = server.mismatch.is_some();
    let as_meant = match server.vm_state() {
        VmState::Active => power == PowerState::Running || (power == PowerState::Paused && halted),
        VmState::Paused => power == PowerState::Paused,
        VmState::Stopped => power == PowerState::Shutdown,
        VmState::Suspended => power == PowerState::Shutdown && real.saved,
        VmState::SoftDeleted => power == PowerState::Shutdown || halted,
        VmState::Rescued => real.rescue,
        // Its fault says what is the matter.
        VmState::Error => server.fault.is_some(),
        _ => false,
    };
    if !as_meant {
        return Some("the vm state is not what is shown");
    }
    if real.rescue != server.rescue.is_some() {
        return Some("the definition is the rescue's, or the record is, but not both");
    }
    let may_be_saved = matches!(
        server.vm_state(),
        VmState::Suspended | VmState::SoftDeleted | VmState::Error
    );
    if real.saved && !may_be_saved {
        return Some("there is saved memory that no record knows");
    }
    None
}

/// A server in a line.
pub(super) fn short(server: &Server) -> String {
    let power = server.power.as_ref();
    format!(
        "{} {} {:?} {:?} {:?}, task {:?}, rescue {:?}, fault {:?}, mismatch {:?}, soft deletion {:?}",
        server.name,
        server.id,
        server.vm_state(),
        power.map(|power| power.state()),
        power.map(|power| &power.reason),
        server.task_state,
        server
            .rescue
            .as_ref()
            .map(|rescue| rescue.disk_protection()),
        server.fault,
        server.mismatch.as_ref().map(|mismatch| &mismatch.kind),
        server.soft_deletion
    )
}

/// Files and folders below the state folder that belong to nobody, given the ids of all images.
pub(super) fn orphans(state: &Path, servers: &[Server], images: &BTreeSet<String>) -> Vec<PathBuf> {
    let mut orphans = everything_below(state);
    orphans.retain(|path| {
        let inside = path.strip_prefix(state).unwrap_or(path);
        let words: Vec<&str> = inside.iter().filter_map(|word| word.to_str()).collect();
        !is_known(&words, servers, images)
    });
    orphans
}

fn is_known(words: &[&str], servers: &[Server], images: &BTreeSet<String>) -> bool {
    let server = |id: &str| servers.iter().find(|server| server.id == id);
    match words {
        ["salvor.db" | "salvor.db-wal" | "salvor.db-shm" | "salvor.lock"] => true,
        ["images" | "servers" | "console"] => true,
        ["images", file] => images.contains(file.split('.').next().unwrap_or_default()),
        ["console", file] => file
            .strip_suffix(".json")
            .is_some_and(|id| server(id).is_some()),
        ["servers", id, rest @ ..] => server(id).is_some_and(|server| is_its(rest, server)),
        _ => false,
    }
}

/// May a server have this in its folder?
fn is_its(words: &[&str], server: &Server) -> bool {
    let made = server.origin() == ServerOrigin::Created;
    match words {
        [] => true,
        ["disk" | "disk.config" | "nvram.fd" | "console.log"] => made,
        ["dumps"] | ["dumps", _] => true,
        ["dumps", operation, "memory.elf"] => Uuid::parse_str(operation).is_ok(),
        ["rescue", rest @ ..] => is_of_rescue(rest, server),
        _ => false,
    }
}

/// May it have this in the folder of its rescues? Only what is of the one in force.
fn is_of_rescue(words: &[&str], server: &Server) -> bool {
    let Some(rescue) = &server.rescue else {
        return false;
    };
    let folders = format!("/servers/{}/rescue/", server.id);
    let plan = rescue.disks.iter().find_map(|disk| {
        let (_, inside) = disk.source.split_once(&folders)?;
        inside.split('/').next()
    });
    let overlays = rescue.disk_protection() == DiskProtection::Overlay;
    match words {
        [] => true,
        [folder] => Some(*folder) == plan,
        [folder, "disk" | "disk.config" | "nvram.fd" | "owners"] => Some(*folder) == plan,
        [folder, file] => Some(*folder) == plan && overlays && file.ends_with(".overlay"),
        _ => false,
    }
}

/// What libvirt keeps of domains that there are no more, or of saved memory that it does not tell of.
pub(super) fn libvirt_leftovers(host: &TestHost, real: &[Real]) -> Vec<PathBuf> {
    let names: BTreeSet<&str> = real.iter().map(|one| one.domain.name.as_str()).collect();
    let saved: BTreeSet<&str> = real
        .iter()
        .filter(|one| one.saved)
        .map(|one| one.domain.name.as_str())
        .collect();
    let ids: BTreeSet<String> = real.iter().map(|one| one.domain.id.to_string()).collect();
    let mut leftovers = Vec::new();
    let mut look = |folder: &str, is_known: &dyn Fn(&str) -> bool| {
        let entries = fs::read_dir(host.outside(Path::new(folder)));
        for entry in entries.into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if !is_known(&name) {
                leftovers.push(entry.path());
            }
        }
    };
    look("/etc/libvirt/qemu", &|name| {
        let domain = name.strip_suffix(".xml");
        domain.map_or(matches!(name, "networks" | "autostart"), |domain| {
            names.contains(domain)
        })
    });
    look("/var/lib/libvirt/qemu/save", &|name| {
        name.strip_suffix(".save")
            .is_some_and(|domain| saved.contains(domain))
    });
    look("/var/lib/libvirt/qemu/nvram", &|_| false);
    look("/var/lib/libvirt/qemu/dump", &|_| false);
    look("/var/lib/libvirt/swtpm", &|name| ids.contains(name));
    leftovers
}

/// Reports processes that belong to no domain.
pub(super) fn processes(host: &TestHost, real: &[Real], tally: &Tally) {
    let on = |one: &&Real| {
        !matches!(
            one.domain.state,
            DomainState::Shutoff | DomainState::Crashed
        )
    };
    let (guests, running) = (
        host.with_argument("/usr/bin/qemu-system-x86_64").len(),
        real.iter().filter(on).count(),
    );
    if guests != running {
        tally.defect(format!("{guests} QEMUs run, of {running} guests"));
    }
    let images = host.with_argument("qemu-img").len();
    if images > 0 {
        tally.defect(format!("{images} qemu-img are left"));
    }
}

fn everything_below(folder: &Path) -> Vec<PathBuf> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            paths.extend(everything_below(&entry.path()));
        }
        paths.push(entry.path());
    }
    paths.sort();
    paths
}
