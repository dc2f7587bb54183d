// SPDX-License-Identifier: Apache-2.0
//! Whether guests run on KVM or on QEMU's own emulation (TCG).
//!
//! Owns the choice behind `virt_type = "auto"`. Knows nothing of libvirt: what libvirt says of its domain types is looked
//! at where it is asked.

use std::fs::OpenOptions;
use std::path::Path;

use super::kinds::Choice;

/// The setting `virt_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VirtType {
    /// KVM if the host can, else emulation.
    Auto,
    /// KVM, always.
    Kvm,
    /// Emulation, always.
    Qemu,
}

impl Choice for VirtType {
    const ALL: &'static [(&'static str, Self)] = &[
        ("auto", Self::Auto),
        ("kvm", Self::Kvm),
        ("qemu", Self::Qemu),
    ];
}

/// The `type` of the domains that the agent makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DomainType {
    /// Hardware virtualisation.
    Kvm,
    /// Emulation.
    Qemu,
}

impl DomainType {
    /// The word in `<domain type='…'>`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Qemu => "qemu",
        }
    }
}

/// A domain type and why it was chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chosen {
    /// The type to use.
    pub domain_type: DomainType,
    /// The reason, for the log.
    pub why: &'static str,
}

impl VirtType {
    /// Decides for this host.
    #[must_use]
    pub fn choose(self) -> Chosen {
        self.choose_from(Path::new("/dev/kvm"), Path::new("/proc/cpuinfo"))
    }

    /// Decides from a KVM device and a cpuinfo file. The device alone is not enough: in a container or a guest without
    /// nested virtualisation it can be there and open, and every start would then fail.
    #[must_use]
    pub fn choose_from(self, kvm_device: &Path, cpuinfo: &Path) -> Chosen {
        let (domain_type, why) = match self {
            Self::Kvm => (DomainType::Kvm, "configured"),
            Self::Qemu => (DomainType::Qemu, "configured"),
            Self::Auto if !cpu_virtualises(cpuinfo) => {
                (DomainType::Qemu, "the CPU shows neither vmx nor svm")
            }
            Self::Auto
                if OpenOptions::new()
                    .read(true)
                    .write(true)
                    .open(kvm_device)
                    .is_err() =>
            {
                (
                    DomainType::Qemu,
                    "the KVM device cannot be opened for reading and writing",
                )
            }
            Self::Auto => (
                DomainType::Kvm,
                "the CPU virtualises and the KVM device opens",
            ),
        };
        Chosen { domain_type, why }
    }
}

fn cpu_virtualises(cpuinfo: &Path) -> bool {
    std::fs::read_to_string(cpuinfo).is_ok_and(|text| {
        text.lines()
            .filter_map(|line| line.split_once(':'))
            .filter(|(key, _)| key.trim_end() == "flags")
            .flat_map(|(_, flags)| flags.split_ascii_whitespace())
            .any(|flag| flag == "vmx" || flag == "svm")
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::fs;

    use super::*;

    fn chosen(cpuinfo: &str, device: bool) -> DomainType {
        let dir = tempfile::tempdir().unwrap();
        let (kvm, cpu) = (dir.path().join("kvm"), dir.path().join("cpuinfo"));
        fs::write(&cpu, cpuinfo).unwrap();
        if device {
            fs::write(&kvm, "").unwrap();
        }
        VirtType::Auto.choose_from(&kvm, &cpu).domain_type
    }

    #[test]
    fn kvm_needs_both_the_device_and_the_cpu() {
        let intel = "processor\t: 0\nflags\t\t: fpu vme vmx ssse3\n";
        let amd = "processor\t: 0\nflags\t\t: fpu svm\n";
        assert_eq!(chosen(intel, true), DomainType::Kvm);
        assert_eq!(chosen(amd, true), DomainType::Kvm);
        assert_eq!(chosen(intel, false), DomainType::Qemu);
        assert_eq!(chosen("flags\t\t: fpu vme\n", true), DomainType::Qemu);
    }

    #[test]
    fn only_the_flags_count_and_only_as_whole_words() {
        assert_eq!(
            chosen("flags : fpu svm_lock xvmx\n", true),
            DomainType::Qemu
        );
        assert_eq!(
            chosen("vmx flags\t: ept vmx\nmodel name : svm\n", true),
            DomainType::Qemu
        );
        assert_eq!(chosen("", true), DomainType::Qemu);
    }

    #[test]
    fn a_kvm_path_that_does_not_open_for_writing_does_not_count() {
        let dir = tempfile::tempdir().unwrap();
        let cpu = dir.path().join("cpuinfo");
        fs::write(&cpu, "flags : vmx\n").unwrap();
        // A directory opens for reading only, for root too.
        assert_eq!(
            VirtType::Auto.choose_from(dir.path(), &cpu).domain_type,
            DomainType::Qemu
        );
    }

    #[test]
    fn a_forced_type_asks_nobody() {
        let nowhere = Path::new("/nonexistent");
        assert_eq!(
            VirtType::Kvm.choose_from(nowhere, nowhere).domain_type,
            DomainType::Kvm
        );
        assert_eq!(
            VirtType::Qemu.choose_from(nowhere, nowhere).domain_type,
            DomainType::Qemu
        );
    }
}
