// SPDX-License-Identifier: Apache-2.0
//! Create: a server from an image.

use salvor_domain_templates::{
    BaseImage, Bus, DiskFormat, Domain, DomainKind, NicSource, NicSpec, ServerDisk, ServerFirmware,
    ServerSpec, Templates, render_server,
};
use uuid::Uuid;

use super::{Builder, disk_holder};
use crate::core::{
    action::{CreateArgs, NicConnection, Verb},
    backing::{References, check_name},
    devices::devices,
    facts::{Capacity, Facts, ImageFacts},
    image::{ImageFormat, Understood},
    plan::{ConfigDriveSpec, Mark, Phase, Plan, RescueChange, Step},
    reason::{Reason, Refusal, Warning, WarningName},
    record::{Devices, Origin, PasswordDelivery, ServerRecord},
    state::{ObservationSource, PowerObservation, PowerState, VmState},
};

const GIB: u64 = 1 << 30;

/// What the files of a new server take at once; its disk grows as the guest writes.
const FILES_NEED: u64 = 16 << 20;

pub(super) fn plan(
    args: &CreateArgs,
    facts: &Facts,
    templates: &Templates,
) -> Result<Plan, Refusal> {
    if let Some(domain) = &facts.domain {
        return Err(Refusal::new(
            Reason::ServerExists,
            format!(
                "libvirt has a domain {} with uuid {} already",
                domain.name, domain.id
            ),
        ));
    }
    let image = image(facts)?;
    let size = disk_size(args, image)?;
    if let Some(capacity) = &facts.capacity {
        check_capacity(args, capacity)?;
    }
    let understood = properties(image)?;
    check_space(facts, FILES_NEED)?;
    let xml = render_server(templates, &spec(args, facts, image)).map_err(|error| {
        Refusal::new(
            Reason::DomainInvalid,
            format!("the domain cannot be rendered: {error}"),
        )
    })?;
    let rendered = Domain::parse(&xml).map_err(|error| {
        Refusal::new(
            Reason::DomainInvalid,
            format!("the rendered domain cannot be read: {error}"),
        )
    })?;

    let mut builder = Builder::new(Verb::Create, args.id, facts);
    builder.plan.initial = Some(Box::new(ServerRecord {
        // Nova reads it of the image, too; an update of the server says otherwise.
        shutdown_timeout_ms: understood.shutdown_timeout_ms,
        ..record(args, facts, &rendered)
    }));
    builder
        .plan
        .password_delivery
        .push(PasswordDelivery::ConfigDrive);
    if facts.host.free_bytes < size {
        builder.plan.warnings.push(Warning {
            name: WarningName::SpaceMayRunOut,
            message: format!(
                "the disk may grow to {size} bytes, and {} are free",
                facts.host.free_bytes
            ),
        });
    }
    let drive = drive(args, understood.admin_user);
    prepare(&mut builder, drive, facts, image, size);
    builder.step(
        Phase::Switch,
        Step::DefineDomain {
            xml,
            mark: Mark::Plan(facts.plan),
            before: None,
        },
    );
    if args.powered_off {
        return Ok(builder.becomes(VmState::Stopped, RescueChange::Keep));
    }
    builder.step(
        Phase::Switch,
        Step::StartDomain {
            mark: Mark::Plan(facts.plan),
            fresh: true,
        },
    );
    Ok(builder.becomes(VmState::Active, RescueChange::Keep))
}

/// The machine type.
#[must_use]
pub fn machine(args: &CreateArgs, arch: &str) -> String {
    args.machine.clone().unwrap_or_else(|| {
        let default = if arch == "x86_64" { "q35" } else { "virt" };
        default.to_owned()
    })
}

/// Has the host what the server is to run on? libvirt looks for most of it only when the guest starts.
fn check_capacity(args: &CreateArgs, capacity: &Capacity) -> Result<(), Refusal> {
    let flavor = &args.flavor;
    if flavor.memory_mib > capacity.memory_mib {
        return Err(Refusal::field(
            "flavor.memory_mib",
            format!(
                "the host has {} MiB, and {} were asked for",
                capacity.memory_mib, flavor.memory_mib
            ),
        ));
    }
    if let Some(most) = capacity.max_vcpus
        && flavor.vcpus > most
    {
        return Err(Refusal::field(
            "flavor.vcpus",
            format!(
                "a guest of this machine type has at most {most} CPUs here, and {} were asked for",
                flavor.vcpus
            ),
        ));
    }
    for (index, nic) in args.nics.iter().enumerate() {
        check_connection(index, &nic.connection, capacity)?;
    }
    Ok(())
}

fn check_connection(
    index: usize,
    connection: &NicConnection,
    capacity: &Capacity,
) -> Result<(), Refusal> {
    let field = |kind: &str| format!("interfaces[{index}].{kind}");
    match connection {
        NicConnection::Network(name) => {
            match capacity
                .networks
                .as_ref()
                .map(|networks| networks.get(name))
            {
                Some(None) => Err(Refusal::field(
                    field("network"),
                    format!("libvirt has no network {name:?}; `virsh net-list --all` shows them"),
                )),
                Some(Some(false)) => Err(Refusal::field(
                    field("network"),
                    format!(
                        "libvirt's network {name:?} is not active; `virsh net-start {name}` starts it"
                    ),
                )),
                Some(Some(true)) | None => Ok(()),
            }
        }
        NicConnection::Bridge(name) => match &capacity.interfaces {
            Some(interfaces) if !interfaces.contains(name) => Err(Refusal::field(
                field("bridge"),
                format!(
                    "the host has no bridge {name:?}; `virsh iface-list --all` shows what it has"
                ),
            )),
            Some(_) | None => Ok(()),
        },
        NicConnection::User => Ok(()),
    }
}

/// The size of the server's disk in bytes.
fn disk_size(args: &CreateArgs, image: &ImageFacts) -> Result<u64, Refusal> {
    if image.record.format == ImageFormat::Iso {
        return Err(Refusal::field(
            "image",
            format!(
                "image {} is an ISO; a server is made from a disk image (raw or qcow2)",
                image.record.id
            ),
        ));
    }
    let size = match args.flavor.disk_gib {
        0 => image.record.virtual_size,
        gib => gib.saturating_mul(GIB),
    };
    if size < image.record.virtual_size {
        return Err(Refusal::new(
            Reason::ImageTooLarge,
            format!(
                "flavor.disk_gib: {} GiB is less than the {} bytes of image {}; give at least {} GiB, or 0",
                args.flavor.disk_gib,
                image.record.virtual_size,
                image.record.id,
                image.record.virtual_size.div_ceil(GIB)
            ),
        )
        .about("flavor.disk_gib", args.flavor.disk_gib.to_string()));
    }
    Ok(size)
}

/// What is asked of the template.
fn spec(args: &CreateArgs, facts: &Facts, image: &ImageFacts) -> ServerSpec {
    let host = &facts.host;
    let layout = &host.layout;
    ServerSpec {
        uuid: args.id,
        name: domain_name(args.id),
        title: args.name.clone(),
        plan: facts.plan.to_string(),
        kind: if host.virt_type == "kvm" {
            DomainKind::Kvm
        } else {
            DomainKind::Qemu
        },
        arch: host.arch.clone(),
        machine: machine(args, &host.arch),
        memory_mib: args.flavor.memory_mib,
        vcpus: args.flavor.vcpus,
        disks: vec![ServerDisk {
            path: layout.disk(args.id),
            format: DiskFormat::Qcow2,
            base: Some(base_image(image)),
            bus: Bus::Virtio,
            serial: Some("salvor-root".to_owned()),
        }],
        config_drive: Some(layout.config_drive(args.id)),
        interfaces: interfaces(args),
        console_log: layout.console_log(args.id),
        firmware: if args.uefi {
            ServerFirmware::Uefi {
                nvram: layout.nvram(args.id),
            }
        } else {
            ServerFirmware::Bios
        },
        emulator: None,
    }
}

/// The files of the server.
fn prepare(
    builder: &mut Builder,
    drive: ConfigDriveSpec,
    facts: &Facts,
    image: &ImageFacts,
    size: u64,
) {
    let layout = &facts.host.layout;
    let id = builder.plan.server;
    builder.step(
        Phase::Prepare,
        Step::HoldImage {
            image: image.record.id,
            path: image.path.clone(),
            size: image.record.size,
            holder: disk_holder(id),
        },
    );
    builder.step(
        Phase::Prepare,
        Step::MakeFolder {
            path: layout.server(id),
        },
    );
    builder.step(
        Phase::Prepare,
        Step::CreateOverlay {
            path: layout.disk(id),
            backing: image.path.clone(),
            backing_format: image.record.format.driver().to_owned(),
            // One that does was not imported.
            backing_references: References::default(),
            size,
        },
    );
    builder.step(
        Phase::Prepare,
        Step::BuildConfigDrive {
            path: layout.config_drive(id),
            drive: Box::new(drive),
        },
    );
}

/// What the config drive tells the new guest.
fn drive(args: &CreateArgs, admin_user: String) -> ConfigDriveSpec {
    ConfigDriveSpec {
        instance_id: args.id,
        hostname: args.hostname.clone(),
        name: args.name.clone(),
        public_keys: args.public_keys.clone(),
        password: Some(args.password.clone()),
        password_user: admin_user,
        user_data: args.user_data.clone(),
        metadata: args.metadata.clone(),
    }
}

/// The image, which must be there with its file.
pub(super) fn image(facts: &Facts) -> Result<&ImageFacts, Refusal> {
    let Some(image) = &facts.image else {
        return Err(Refusal::new(
            Reason::ImageNotFound,
            "the image store has no such image",
        ));
    };
    if !image.present {
        return Err(Refusal::new(
            Reason::ImageNotFound,
            format!(
                "the file of image {} ({}) is missing or has another size; import it again",
                image.record.id, image.path
            ),
        ));
    }
    check_name(image.path.as_bytes()).map_err(|rule| {
        Refusal::new(
            Reason::StorageFailed,
            format!(
                "no disk can stand on {}: {rule}; choose a shorter state_dir",
                image.path
            ),
        )
    })?;
    Ok(image)
}

/// The image as what a disk stands on.
pub(super) fn base_image(image: &ImageFacts) -> BaseImage {
    BaseImage {
        path: image.path.clone(),
        format: match image.record.format {
            ImageFormat::Qcow2 => DiskFormat::Qcow2,
            ImageFormat::Raw | ImageFormat::Iso => DiskFormat::Raw,
        },
    }
}

/// Is there room for `need` bytes beside what must stay free?
pub(super) fn check_space(facts: &Facts, need: u64) -> Result<(), Refusal> {
    let host = &facts.host;
    if host.free_bytes < host.reserve_bytes.saturating_add(need) {
        return Err(Refusal::new(
            Reason::NoSpace,
            format!(
                "{} needs {need} bytes besides the {} that must stay free (storage.reserve), and has {}",
                host.layout.servers(),
                host.reserve_bytes,
                host.free_bytes
            ),
        ));
    }
    Ok(())
}

/// What the image's properties say. They were checked when it was imported, unless an older agent did that.
pub(super) fn properties(image: &ImageFacts) -> Result<Understood, Refusal> {
    Understood::read(&image.record.properties).map_err(|error| {
        let id = image.record.id;
        Refusal::field("image", format!("{id}: {error}; import it again"))
    })
}

/// The domain of a created server: found by eye in a list, and never the name of somebody's domain.
fn domain_name(id: Uuid) -> String {
    format!("salvor-{id}")
}

fn interfaces(args: &CreateArgs) -> Vec<NicSpec> {
    args.nics
        .iter()
        .zip(0u8..)
        .map(|(nic, index)| NicSpec {
            mac: nic
                .mac
                .clone()
                .unwrap_or_else(|| derived_mac(args.id, index)),
            source: match &nic.connection {
                NicConnection::Bridge(name) => NicSource::Bridge(name.clone()),
                NicConnection::Network(name) => NicSource::Network(name.clone()),
                NicConnection::User => NicSource::User,
            },
            model: Some(nic.model.clone()),
        })
        .collect()
}

/// A MAC address in QEMU's range that follows from the server's id.
fn derived_mac(id: Uuid, index: u8) -> String {
    let derived = Uuid::new_v5(&id, format!("mac-{index}").as_bytes());
    let [a, b, c, ..] = *derived.as_bytes();
    format!("52:54:00:{a:02x}:{b:02x}:{c:02x}")
}

fn record(args: &CreateArgs, facts: &Facts, rendered: &Domain) -> ServerRecord {
    let Devices {
        disks,
        nics,
        guest_agent,
        ..
    } = devices(rendered);
    let now = facts.host.now_ms;
    ServerRecord {
        id: args.id,
        name: args.name.clone(),
        origin: Origin::Created,
        domain_name: domain_name(args.id),
        vm_state: VmState::Building,
        task_state: None,
        power: PowerObservation {
            state: PowerState::NoState,
            reason: String::new(),
            observed_at_ms: now,
            source: ObservationSource::Inferred,
        },
        last_known_power: None,
        image_id: Some(args.image),
        flavor: args.flavor,
        disks,
        nics,
        rescue: None,
        fault: None,
        operation: None,
        operation_verb: None,
        revision: 0,
        created_at_ms: now,
        updated_at_ms: now,
        settled_at_ms: now,
        metadata: args.metadata.clone(),
        hostname: args.hostname.clone(),
        public_keys: args.public_keys.clone(),
        guest_agent,
        mismatch: None,
        owner: facts.owner(),
        lock: None,
        description: None,
        tags: Vec::new(),
        access_ipv4: None,
        access_ipv6: None,
        shutdown_timeout_ms: None,
        autostart: true,
        autostart_order: None,
        deletion: None,
        drift_since_ms: None,
        agent: None,
    }
}
