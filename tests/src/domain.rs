// SPDX-License-Identifier: Apache-2.0
//! XML for domains that a test defines by hand, as an operator with virsh would.

use std::path::Path;

use crate::guests::Format;

/// The XML of a domain under construction. A PC with a serial console, everything else as asked for.
#[derive(Debug, Clone)]
pub struct DomainXml {
    name: String,
    memory_mib: u64,
    machine: &'static str,
    uefi: bool,
    devices: String,
}

impl DomainXml {
    /// A domain for a tiny guest: 16 MiB of memory. Its console goes to `log`, one boot after the other.
    pub fn tiny(name: &str, log: &Path) -> Self {
        Self::with_memory(name, 16, log)
    }

    /// A domain for a Linux guest: 192 MiB of memory and a channel for the guest agent.
    pub fn linux(name: &str, log: &Path) -> Self {
        Self::with_memory(name, 192, log).device(
            "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>\
             <rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>",
        )
    }

    fn with_memory(name: &str, memory_mib: u64, log: &Path) -> Self {
        let serial = format!(
            "<serial type='pty'><log file='{}' append='on'/><target port='0'/></serial>",
            escaped(&log.to_string_lossy())
        );
        Self {
            name: name.into(),
            memory_mib,
            machine: "pc",
            uefi: false,
            devices: serial,
        }
    }

    /// With so much memory instead.
    #[must_use]
    pub fn memory(mut self, mib: u64) -> Self {
        self.memory_mib = mib;
        self
    }

    /// A q35 machine instead of an i440fx.
    #[must_use]
    pub fn q35(mut self) -> Self {
        self.machine = "q35";
        self
    }

    /// UEFI firmware, chosen by libvirt, instead of a BIOS. A q35 machine with 256 MiB.
    #[must_use]
    pub fn uefi(mut self) -> Self {
        self.uefi = true;
        self.memory_mib = self.memory_mib.max(256);
        self.q35()
    }

    /// A disk: its image, name in the guest (`vda`), bus (`virtio`) and serial number. `boot` is its place
    /// in the boot order; a BIOS does not even show disks that have none to a guest without an own driver.
    #[must_use]
    pub fn disk(
        self,
        image: &Path,
        format: Format,
        target: &str,
        bus: &str,
        serial: &str,
        boot: Option<u32>,
    ) -> Self {
        let kind = if format == Format::Qcow2 {
            "qcow2"
        } else {
            "raw"
        };
        let (device, read_only) = if format == Format::Iso {
            ("cdrom", "<readonly/>")
        } else {
            ("disk", "")
        };
        let boot = boot
            .map(|order| format!("<boot order='{order}'/>"))
            .unwrap_or_default();
        self.device(&format!(
            "<disk type='file' device='{device}'><driver name='qemu' type='{kind}'/><source file='{}'/>\
             <target dev='{target}' bus='{bus}'/>{read_only}<serial>{}</serial>{boot}</disk>",
            escaped(&image.to_string_lossy()),
            escaped(serial)
        ))
    }

    /// A NIC with the given MAC address on QEMU's user-mode network.
    #[must_use]
    pub fn nic(self, mac: &str) -> Self {
        self.device(&format!(
            "<interface type='user'><mac address='{mac}'/><model type='virtio'/></interface>"
        ))
    }

    /// Any device, as XML.
    #[must_use]
    pub fn device(mut self, xml: &str) -> Self {
        self.devices.push_str(xml);
        self
    }

    /// The finished XML.
    pub fn xml(&self) -> String {
        let firmware = if self.uefi { " firmware='efi'" } else { "" };
        // OVMF's Secure Boot build would refuse the test guest's kernel.
        let features = if self.uefi {
            "<firmware><feature enabled='no' name='secure-boot'/></firmware>"
        } else {
            ""
        };
        format!(
            "<domain type='qemu'><name>{}</name><memory unit='MiB'>{}</memory><vcpu>1</vcpu>\
             <os{firmware}><type arch='x86_64' machine='{}'>hvm</type>{features}</os>\
             <features><acpi/><apic/></features>\
             <on_poweroff>destroy</on_poweroff><on_reboot>restart</on_reboot><on_crash>destroy</on_crash>\
             <devices>{}</devices></domain>",
            escaped(&self.name),
            self.memory_mib,
            self.machine,
            self.devices
        )
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('\'', "&apos;")
}
