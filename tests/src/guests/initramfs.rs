// SPDX-License-Identifier: Apache-2.0
//! The Linux guest's kernel and initramfs, made of Debian packages that `tools/setup` downloaded.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::sources;
use crate::run_folder::repository;
use crate::tool;

/// What the guest loads always, and what it loads when the PCI bus shows the controller.
const MODULES: &[(&str, &[&str])] = &[
    (
        "base",
        &[
            "virtio_pci",
            "virtio_blk",
            "virtio_net",
            "virtio_console",
            "virtio_balloon",
            "virtio_scsi",
            "sd_mod",
            "sr_mod",
            "button",
            "evdev",
            "ext4",
            "crc32c_generic",
            "isofs",
            "vfat",
            "nls_cp437",
            "nls_ascii",
            "nls_utf8",
            "nls_iso8859-1",
            "efivarfs",
        ],
    ),
    ("ata_piix", &["ata_piix"]),
    ("ahci", &["ahci"]),
    ("uhci_hcd", &["uhci_hcd", "usb_storage"]),
    ("ehci_pci", &["ehci_pci", "usb_storage"]),
    ("xhci_pci", &["xhci_pci", "usb_storage", "uas"]),
];

/// Where each file of `tests/guests/linux/` goes in the guest.
const SCRIPTS: &[(&str, &str)] = &[
    ("init", "init"),
    ("config-drive", "sbin/config-drive"),
    ("chpasswd", "sbin/chpasswd"),
    ("guest-agent", "sbin/guest-agent"),
    ("power-button", "etc/acpi/PWRF/00000080"),
    ("shutdown", "sbin/shutdown"),
];

/// Which of Debian's kernels a guest runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kernel {
    /// The one for clouds: virtio and IDE only. Boots in half the time.
    Small,
    /// The one for everything: USB and SATA, too.
    Full,
}

impl Kernel {
    /// Is this the name of its package's file?
    fn is_in(self, file: &str) -> bool {
        file.starts_with("linux-image-") && file.contains("-cloud-") == (self == Self::Small)
    }
}

/// Everything that the initramfs is made of: when one of them changes, it is made anew.
pub(super) fn inputs(kernel: Kernel) -> Vec<PathBuf> {
    let mut inputs: Vec<PathBuf> = SCRIPTS
        .iter()
        .map(|(source, _)| sources().join("linux").join(source))
        .collect();
    inputs.push(repository().join("tests/src/guests/initramfs.rs"));
    inputs.extend(packages(kernel));
    inputs
}

/// The downloaded packages that a guest is made of.
fn packages(kernel: Kernel) -> [PathBuf; 3] {
    [
        package("a kernel", |file| kernel.is_in(file)),
        package("busybox", |file| file.starts_with("busybox-static_")),
        package("the guest agent", |file| {
            file.starts_with("qemu-guest-agent_")
        }),
    ]
}

fn package(what: &str, is_it: impl Fn(&str) -> bool) -> PathBuf {
    let folder = repository().join(".tools/guest-packages");
    fs::read_dir(&folder)
        .into_iter()
        .flatten()
        .map(|entry| entry.unwrap().path())
        .find(|path| is_it(&path.file_name().unwrap().to_string_lossy()))
        .unwrap_or_else(|| {
            panic!(
                "no package with {what} in {}: run tools/setup",
                folder.display()
            )
        })
}

/// Makes `vmlinuz` and `initrd` in `folder`.
pub(super) fn build(kernel: Kernel, folder: &Path) {
    let debian = folder.join("debian");
    for package in packages(kernel) {
        tool!("dpkg-deb", "--extract", package, debian);
    }
    let kernel = only_entry(&debian.join("boot"), "vmlinuz-");
    fs::copy(kernel, folder.join("vmlinuz")).unwrap();

    let root = folder.join("root");
    for directory in [
        "bin",
        "sbin",
        "etc/acpi/PWRF",
        "lib/guest",
        "proc",
        "sys",
        "dev",
        "root",
        "run",
        "tmp",
        "var",
    ] {
        fs::create_dir_all(root.join(directory)).unwrap();
    }
    symlink("../run", root.join("var/run")).unwrap();
    add_busybox(&debian, &root);
    // Where the guest agent looks for it when it sets the time.
    symlink("../bin/busybox", root.join("sbin/hwclock")).unwrap();
    add_guest_agent(&debian, &root);
    add_modules(&debian, &root);
    for (source, destination) in SCRIPTS {
        add_program(
            &sources().join("linux").join(source),
            &root.join(destination),
        );
    }
    fs::write(root.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\n").unwrap();
    fs::write(root.join("etc/group"), "root:x:0:\n").unwrap();
    fs::write(root.join("etc/shadow"), "root:*:19000:0:99999:7:::\n").unwrap();
    fs::write(
        root.join("etc/os-release"),
        "ID=guest\nNAME=\"Test guest\"\nVERSION_ID=1\n",
    )
    .unwrap();

    pack(&root, &folder.join("initrd"));
    fs::remove_dir_all(root).unwrap();
    fs::remove_dir_all(debian).unwrap();
}

fn add_program(source: &Path, destination: &Path) {
    fs::copy(source, destination)
        .unwrap_or_else(|e| panic!("cannot copy {}: {e}", source.display()));
    fs::set_permissions(destination, fs::Permissions::from_mode(0o755)).unwrap();
}

fn add_busybox(debian: &Path, root: &Path) {
    let busybox = debian.join("bin/busybox");
    add_program(&busybox, &root.join("bin/busybox"));
    for applet in tool!(busybox.to_str().unwrap(), "--list").lines() {
        let link = root.join("bin").join(applet);
        // busybox lists itself, and chpasswd and shutdown are ours.
        if !link.exists() && !SCRIPTS.iter().any(|(script, _)| *script == applet) {
            symlink("busybox", link).unwrap();
        }
    }
}

/// The guest agent with the libraries of this machine that it is linked to.
fn add_guest_agent(debian: &Path, root: &Path) {
    let agent = debian.join("usr/sbin/qemu-ga");
    add_program(&agent, &root.join("sbin/qemu-ga"));
    let libraries = tool!("ldd", agent);
    assert!(
        !libraries.contains("not found"),
        "a library of qemu-ga is missing: {libraries}"
    );
    for library in libraries
        .split_whitespace()
        .filter(|word| word.starts_with('/'))
    {
        let destination = root.join(library.trim_start_matches('/'));
        fs::create_dir_all(destination.parent().unwrap()).unwrap();
        add_program(Path::new(library), &destination);
    }
}

/// The kernel modules, and for each group a list in the order in which they must be loaded.
fn add_modules(debian: &Path, root: &Path) {
    let modules = all_modules(&only_entry(&debian.join("lib/modules"), ""));
    for (group, wanted) in MODULES {
        let mut order = Vec::new();
        for module in *wanted {
            append_with_needs(module, &modules, &mut order);
        }
        for module in &order {
            fs::copy(
                &modules[module],
                root.join(format!("lib/guest/{module}.ko")),
            )
            .unwrap();
        }
        fs::write(
            root.join(format!("lib/guest/{group}.list")),
            order.join("\n") + "\n",
        )
        .unwrap();
    }
}

/// Name (with `_` for `-`, as the kernel has it) and file of every module of the kernel.
fn all_modules(folder: &Path) -> BTreeMap<String, PathBuf> {
    let mut modules = BTreeMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let entry = entry.unwrap();
            let path = entry.path();
            if entry.file_type().unwrap().is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "ko") {
                let name = path
                    .file_stem()
                    .unwrap()
                    .to_string_lossy()
                    .replace('-', "_");
                modules.insert(name, path);
            }
        }
    }
    modules
}

/// `module` behind all that it needs, as its `depends=` line says. What is built into the kernel has no
/// file and is left out.
fn append_with_needs(module: &str, modules: &BTreeMap<String, PathBuf>, order: &mut Vec<String>) {
    let module = module.replace('-', "_");
    let Some(file) = modules.get(&module) else {
        return;
    };
    if order.contains(&module) {
        return;
    }
    let bytes = fs::read(file).unwrap();
    let key = b"\0depends=";
    if let Some(at) = bytes.windows(key.len()).position(|window| window == key) {
        let needs = bytes[at + key.len()..]
            .split(|byte| *byte == 0)
            .next()
            .unwrap_or_default();
        for need in String::from_utf8_lossy(needs)
            .split(',')
            .filter(|need| !need.is_empty())
        {
            append_with_needs(need, modules, order);
        }
    }
    order.push(module);
}

/// The one entry of `folder` whose name begins with `prefix`.
fn only_entry(folder: &Path, prefix: &str) -> PathBuf {
    fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .find(|path| {
            path.file_name()
                .unwrap()
                .to_string_lossy()
                .starts_with(prefix)
        })
        .unwrap_or_else(|| panic!("no {prefix}* in {}", folder.display()))
}

/// Packs `root` as the kernel wants it: a cpio archive, compressed lightly because the guest's CPU is slow.
fn pack(root: &Path, archive: &Path) {
    let script = "find . | LC_ALL=C sort | cpio --quiet --create --format=newc --owner=0:0 --reproducible | gzip -1n";
    let status = Command::new("bash")
        .args(["-o", "pipefail", "-c", script])
        .current_dir(root)
        .stdin(Stdio::null())
        .stdout(fs::File::create(archive).unwrap())
        .status()
        .unwrap();
    assert!(status.success(), "packing the initramfs failed: {status}");
}
