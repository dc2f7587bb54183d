// SPDX-License-Identifier: Apache-2.0
//! Records, facts and arguments for the tests of the core. Every id is fixed.

use std::{
    collections::BTreeMap,
    sync::{Arc, OnceLock},
};

use salvor_agent::core::{
    action::{Action, CreateArgs, NicArgs, NicConnection, RescueArgs, Shutdown, UnrescueArgs},
    backing::References,
    caller::Who,
    facts::{DiskLook, DomainFacts, Facts, HostFacts, ImageFacts},
    image::{ImageFormat, ImageRecord},
    layout::Layout,
    password::CryptHash,
    plan::{Outcome, Plan, RescueChange, Step},
    planners::plan,
    record::{Flavor, Origin, Overlay, Owner, Protection, RescueRecord, ServerRecord},
    state::{ObservationSource, PowerObservation, PowerState, VmState},
};
use salvor_domain_templates::{Templates, fixtures::ORIGINALS};
use uuid::Uuid;

pub(crate) const SERVER: Uuid = Uuid::from_u128(0x5e71_0000_0000_4000_8000_0000_0000_0001);
pub(crate) const BASE: Uuid = Uuid::from_u128(0xba5e_0000_0000_4000_8000_0000_0000_0001);
pub(crate) const RESCUE: Uuid = Uuid::from_u128(0x7e5c_0000_0000_4000_8000_0000_0000_0001);
pub(crate) const PLAN: Uuid = Uuid::from_u128(0x91a0_0000_0000_4000_8000_0000_0000_0001);

/// The time of every fact.
pub(crate) const NOW: i64 = 1_700_000_000_000;

pub(crate) const NOVA: Shutdown = Shutdown {
    timeout_ms: 60_000,
    retry_ms: 10_000,
};

pub(crate) fn templates() -> &'static Templates {
    static TEMPLATES: OnceLock<Templates> = OnceLock::new();
    TEMPLATES.get_or_init(|| Templates::builtin().unwrap())
}

pub(crate) fn fixture(name: &str) -> &'static str {
    let found = ORIGINALS.iter().find(|original| original.name == name);
    found.unwrap().xml
}

pub(crate) fn record(origin: Origin, vm_state: VmState) -> ServerRecord {
    ServerRecord {
        id: SERVER,
        name: "web".to_owned(),
        origin,
        domain_name: "web".to_owned(),
        vm_state,
        task_state: None,
        power: PowerObservation {
            state: PowerState::Running,
            reason: String::new(),
            observed_at_ms: 1_000,
            source: ObservationSource::Poll,
        },
        last_known_power: None,
        image_id: (origin == Origin::Created).then_some(BASE),
        flavor: Flavor {
            vcpus: 1,
            memory_mib: 512,
            disk_gib: 0,
        },
        disks: Vec::new(),
        nics: Vec::new(),
        rescue: None,
        fault: None,
        operation: None,
        operation_verb: None,
        revision: 1,
        created_at_ms: 1_000,
        updated_at_ms: 1_000,
        settled_at_ms: 1_000,
        metadata: BTreeMap::new(),
        hostname: String::new(),
        public_keys: BTreeMap::new(),
        guest_agent: false,
        mismatch: None,
        owner: Owner::default(),
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

pub(crate) fn image(id: Uuid, name: &str, format: ImageFormat) -> ImageFacts {
    ImageFacts {
        record: ImageRecord {
            id,
            name: name.to_owned(),
            format,
            size: 64 << 20,
            virtual_size: 1 << 30,
            sha256: String::new(),
            file: None,
            properties: BTreeMap::new(),
            created_at_ms: 1,
        },
        path: format!("/var/lib/salvor/images/{id}.{format}"),
        present: true,
    }
}

/// A disk of 10 GiB that stands on another file.
pub(crate) fn look() -> DiskLook {
    DiskLook {
        size: 10 << 30,
        references: References {
            backing: Some("/under".to_owned()),
            backing_format: Some("raw".to_owned()),
            data_file: None,
        },
    }
}

pub(crate) fn domain(xml: &str, power: PowerState) -> DomainFacts {
    let parsed = salvor_domain_templates::Domain::parse(xml).unwrap();
    DomainFacts {
        id: SERVER,
        name: "web".to_owned(),
        xml: xml.to_owned(),
        power,
        power_reason: "booted".to_owned(),
        persistent: true,
        managed_save: false,
        nvram: match parsed.firmware() {
            salvor_domain_templates::Firmware::Uefi { nvram, .. } => nvram,
            salvor_domain_templates::Firmware::Bios => None,
        },
        missing: BTreeMap::new(),
        disks: parsed
            .disks()
            .iter()
            .map(|disk| (disk.target.clone(), Ok(look())))
            .collect(),
        live_only: Vec::new(),
        unwritable: BTreeMap::new(),
    }
}

pub(crate) fn facts(domain: Option<DomainFacts>, image: Option<ImageFacts>) -> Facts {
    Facts {
        plan: PLAN,
        host: HostFacts {
            layout: Layout::new("/var/lib/salvor"),
            virt_type: "qemu".to_owned(),
            arch: "x86_64".to_owned(),
            free_bytes: 100 << 30,
            reserve_bytes: 1 << 30,
            rescue_timeout_ms: 0,
            reclaim_ms: 0,
            now_ms: NOW,
        },
        capacity: None,
        domain,
        image,
        saved_xml: None,
        known_xml: None,
        commit_space: BTreeMap::new(),
        commit_references: BTreeMap::new(),
        save_room: None,
        agent: None,
        who: Who::default(),
        host_report: None,
    }
}

pub(crate) fn create_args() -> CreateArgs {
    CreateArgs {
        id: SERVER,
        name: "web".to_owned(),
        image: BASE,
        flavor: Flavor {
            vcpus: 1,
            memory_mib: 512,
            disk_gib: 0,
        },
        nics: vec![NicArgs {
            connection: NicConnection::Bridge("br0".to_owned()),
            mac: None,
            model: "virtio".to_owned(),
        }],
        password: hash(),
        hostname: "web".to_owned(),
        public_keys: BTreeMap::new(),
        user_data: None,
        metadata: BTreeMap::new(),
        machine: None,
        uefi: false,
        powered_off: false,
    }
}

pub(crate) fn hash() -> CryptHash {
    CryptHash("$6$salt$hash".to_owned())
}

pub(crate) fn rescue_args() -> RescueArgs {
    RescueArgs {
        image: Some(RESCUE),
        mode: None,
        bus: None,
        device: None,
        protection: Protection::ReadWrite,
        password: hash(),
        user_data: None,
        timeout_ms: None,
        timeout_overlay: None,
        shutdown: NOVA,
    }
}

pub(crate) fn unrescue_args() -> UnrescueArgs {
    UnrescueArgs {
        overlay: None,
        restore_power: false,
        shutdown: NOVA,
    }
}

/// The definition that a plan gives the domain.
pub(crate) fn defined(plan: &Plan) -> String {
    let xml = plan.steps.iter().find_map(|planned| match &planned.step {
        Step::DefineDomain { xml, .. } => Some(xml.clone()),
        _ => None,
    });
    xml.unwrap()
}

/// A server made by the agent: its definition.
pub(crate) fn created_xml(uefi: bool) -> Arc<str> {
    let mut args = create_args();
    args.uefi = uefi;
    let facts = facts(None, Some(image(BASE, "base", ImageFormat::Qcow2)));
    let plan = plan(None, &Action::Create(Box::new(args)), &facts, templates()).unwrap();
    defined(&plan).into()
}

/// The disks under the overlays refer to what they did.
pub(crate) fn same_references(
    rescue: &RescueRecord,
) -> BTreeMap<String, Result<References, String>> {
    let same = |overlay: &Overlay| (overlay.path.clone(), Ok(overlay.base_references.clone()));
    rescue.overlays.iter().map(same).collect()
}

/// A rescued server: its record, and the facts while the rescue runs.
pub(crate) fn rescued(server: &ServerRecord, xml: &str, args: RescueArgs) -> (ServerRecord, Facts) {
    let rescue_image = image(RESCUE, "rescue", ImageFormat::Qcow2);
    let before = facts(Some(domain(xml, PowerState::Running)), Some(rescue_image));
    let plan = plan(
        Some(server),
        &Action::Rescue(Box::new(args)),
        &before,
        templates(),
    )
    .unwrap();
    let Outcome::Change {
        vm_state,
        rescue: RescueChange::Begin { rescue, .. },
        ..
    } = &plan.outcome
    else {
        panic!("a rescue begins: {plan:?}");
    };
    let mut server = server.clone();
    server.vm_state = *vm_state;
    server.rescue = Some(rescue.as_ref().clone());
    let mut after = facts(Some(domain(&defined(&plan), PowerState::Running)), None);
    after.plan = Uuid::from_u128(PLAN.as_u128() + 1);
    after.saved_xml = Some(xml.to_owned());
    after.commit_references = same_references(rescue);
    (server, after)
}
