// SPDX-License-Identifier: Apache-2.0
//! The Linux guest; `tests/guests/linux/init` says what it prints and obeys.
//!
//! ```text
//! disk:  MBR | FAT (syslinux, startup.nsh, kernel, initramfs) | ext4, label data-NAME
//! ISO:   isolinux, kernel, initramfs
//! ```
//! A BIOS boots it by syslinux, UEFI firmware by its built-in shell, which runs `startup.nsh`.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::initramfs::{self, Kernel};
use super::{Format, cached, finish};
use crate::tool;

const MIB: u64 = 1 << 20;
const SECTORS_PER_MIB: u64 = MIB / 512;

/// Quiet, on the serial port, and without what only costs time under emulation.
const KERNEL_ARGUMENTS: &str = "console=ttyS0 quiet nokaslr mitigations=off apparmor=0 audit=0 \
    cryptomgr.notests tsc=reliable no_timer_check random.trust_cpu=on panic=-1";

/// What a Linux guest's disk holds.
#[derive(Debug, Clone)]
pub struct LinuxGuest {
    /// The name in its `GUEST up` and `GUEST ready` lines, and in the label `data-NAME` of its ext4
    /// partition. Up to 11 bytes: ext4 labels have 16.
    pub name: String,
    /// Does it power off when the button is pressed? If not, nothing happens at all.
    pub honours_acpi: bool,
    /// Does it run the QEMU guest agent?
    pub guest_agent: bool,
    /// Files of the ext4 partition: name and content. One called `broken` keeps the guest from coming up.
    pub data: Vec<(String, String)>,
    /// Size of the ext4 partition in MiB.
    pub data_mib: u64,
    kernel: Kernel,
}

impl LinuxGuest {
    /// A well-behaved guest with the guest agent and a 16 MiB partition that holds `origin`.
    pub fn new(name: &str) -> Self {
        assert!(name.len() <= 11, "'{name}' is longer than 11 bytes");
        Self {
            name: name.into(),
            honours_acpi: true,
            guest_agent: true,
            data: vec![("origin".into(), format!("made for {name}\n"))],
            data_mib: 16,
            kernel: Kernel::Small,
        }
    }

    /// A guest that ignores the power button.
    #[must_use]
    pub fn deaf(mut self) -> Self {
        self.honours_acpi = false;
        self
    }

    /// A guest without the QEMU guest agent.
    #[must_use]
    pub fn without_agent(mut self) -> Self {
        self.guest_agent = false;
        self
    }

    /// A guest with drivers for USB and SATA disks. Without them it sees those on virtio and IDE only (a
    /// BIOS boots it from any), but boots in half the time.
    #[must_use]
    pub fn with_all_drivers(mut self) -> Self {
        self.kernel = Kernel::Full;
        self
    }

    /// A guest that stops early in its boot, until somebody removes `broken` from its data partition.
    #[must_use]
    pub fn broken(self, why: &str) -> Self {
        self.with_file("broken", why)
    }

    /// One more file in the data partition.
    #[must_use]
    pub fn with_file(mut self, name: &str, content: &str) -> Self {
        self.data.push((name.into(), format!("{content}\n")));
        self
    }

    /// Writes the image.
    #[track_caller]
    pub fn build(&self, image: &Path, format: Format) {
        let name = match self.kernel {
            Kernel::Small => "linux-small",
            Kernel::Full => "linux-full",
        };
        let parts = cached(name, &initramfs::inputs(self.kernel), |folder| {
            initramfs::build(self.kernel, folder);
            boot_partition(folder);
        });
        let scratch = tempfile::tempdir_in(image.parent().unwrap()).unwrap();
        match format {
            Format::Iso => self.build_iso(&parts, scratch.path(), image),
            Format::Qcow2 | Format::Raw => {
                let raw = self.build_disk(&parts, scratch.path());
                finish(&raw, image, format);
            }
        }
    }

    fn kernel_arguments(&self, format: Format) -> String {
        // USB and SATA disks take their time. A small kernel that does not see its own disk never will.
        let patience = match (format, self.kernel) {
            (Format::Iso, _) => 0,
            (_, Kernel::Small) => 20,
            (_, Kernel::Full) => 200,
        };
        let yes_no = |yes| if yes { "yes" } else { "no" };
        format!(
            "{KERNEL_ARGUMENTS} guest.name={} guest.patience={patience} guest.acpi={} guest.agent={}",
            self.name,
            yes_no(self.honours_acpi),
            yes_no(self.guest_agent)
        )
    }

    fn syslinux_config(&self, format: Format) -> String {
        format!(
            "SERIAL 0 115200\nDEFAULT guest\nPROMPT 0\nTIMEOUT 1\nLABEL guest\n LINUX linux.efi\n \
             INITRD initrd\n APPEND {}\n",
            self.kernel_arguments(format)
        )
    }

    fn build_disk(&self, parts: &Path, scratch: &Path) -> PathBuf {
        let boot = scratch.join("boot");
        fs::copy(parts.join("boot.fat"), &boot).unwrap();
        fs::write(
            scratch.join("syslinux.cfg"),
            self.syslinux_config(Format::Raw),
        )
        .unwrap();
        fs::write(
            scratch.join("startup.nsh"),
            format!(
                "fs0:\r\nlinux.efi initrd=\\initrd {}\r\n",
                self.kernel_arguments(Format::Raw)
            ),
        )
        .unwrap();
        tool!(
            "mcopy",
            "-i",
            boot,
            scratch.join("syslinux.cfg"),
            scratch.join("startup.nsh"),
            "::"
        );

        let contents = scratch.join("contents");
        fs::create_dir(&contents).unwrap();
        for (name, content) in &self.data {
            fs::write(contents.join(name), content).unwrap();
        }
        let data = scratch.join("data");
        let label = format!("data-{}", self.name);
        let size = format!("{}M", self.data_mib);
        tool!(
            "mke2fs", "-q", "-t", "ext4", "-L", label, "-d", contents, data, size
        );

        let boot_mib = fs::metadata(&boot).unwrap().len() / MIB;
        let disk = scratch.join("disk.raw");
        let file = fs::File::create(&disk).unwrap();
        file.set_len((1 + boot_mib + self.data_mib) * MIB).unwrap();
        partition(&disk, boot_mib, self.data_mib);
        let boot_code = fs::read("/usr/lib/syslinux/mbr/mbr.bin").unwrap();
        file.write_all_at(&boot_code, 0).unwrap();
        write_sparse(&boot, &file, MIB);
        write_sparse(&data, &file, (1 + boot_mib) * MIB);
        disk
    }

    fn build_iso(&self, parts: &Path, scratch: &Path, image: &Path) {
        let root = scratch.join("iso");
        fs::create_dir_all(root.join("isolinux")).unwrap();
        for (source, name) in [
            (
                Path::new("/usr/lib/ISOLINUX/isolinux.bin"),
                "isolinux/isolinux.bin",
            ),
            (
                Path::new("/usr/lib/syslinux/modules/bios/ldlinux.c32"),
                "isolinux/ldlinux.c32",
            ),
            (&parts.join("vmlinuz"), "isolinux/linux.efi"),
            (&parts.join("initrd"), "isolinux/initrd"),
        ] {
            fs::copy(source, root.join(name)).unwrap();
        }
        fs::write(
            root.join("isolinux/isolinux.cfg"),
            self.syslinux_config(Format::Iso),
        )
        .unwrap();
        let boot = ["-b", "isolinux/isolinux.bin", "-c", "isolinux/boot.cat"];
        tool!(
            "genisoimage",
            "-quiet",
            "-J",
            "-R",
            "-V",
            self.name,
            boot[0],
            boot[1],
            boot[2],
            boot[3],
            "-no-emul-boot",
            "-boot-load-size",
            "4",
            "-boot-info-table",
            "-o",
            image,
            root
        );
    }
}

/// A FAT file system with syslinux, the kernel and the initramfs, still without a configuration.
fn boot_partition(folder: &Path) {
    let fat = folder.join("boot.fat");
    let payload: u64 = ["vmlinuz", "initrd"]
        .iter()
        .map(|name| fs::metadata(folder.join(name)).unwrap().len())
        .sum();
    fs::File::create(&fat)
        .unwrap()
        .set_len((payload / MIB + 2) * MIB)
        .unwrap();
    tool!("mkfs.fat", "-n", "BOOT", fat);
    tool!("mcopy", "-i", fat, folder.join("vmlinuz"), "::linux.efi");
    tool!("mcopy", "-i", fat, folder.join("initrd"), "::initrd");
    tool!("syslinux", "--install", fat);
}

/// Writes an MBR with a bootable FAT partition at 1 MiB and a Linux partition behind it.
fn partition(disk: &Path, boot_mib: u64, data_mib: u64) {
    let table = format!(
        "label: dos\nstart={}, size={}, type=c, bootable\nstart={}, size={}, type=83\n",
        SECTORS_PER_MIB,
        boot_mib * SECTORS_PER_MIB,
        (1 + boot_mib) * SECTORS_PER_MIB,
        data_mib * SECTORS_PER_MIB
    );
    let script = disk.with_extension("sfdisk");
    fs::write(&script, table).unwrap();
    tool!("bash", "-c", "sfdisk --quiet \"$0\" < \"$1\"", disk, script);
}

/// Copies a file to an offset of another one, leaving holes where it has only zeros.
fn write_sparse(source: &Path, target: &fs::File, offset: u64) {
    let bytes = fs::read(source).unwrap();
    let mut at = offset;
    for block in bytes.chunks(1 << 16) {
        if block.iter().any(|byte| *byte != 0) {
            target.write_all_at(block, at).unwrap();
        }
        at += block.len() as u64;
    }
}
