// SPDX-License-Identifier: Apache-2.0
//! The plans that the crash test tries, and what happens before each.

use std::{path::Path, sync::Arc};

use salvor_agent::{
    core::{
        action::{Action, ChangePasswordArgs, LockArgs, RebootArgs, ResetTo},
        change::FieldChange,
        operation::OperationState,
        record::{OverlayDisposition, Protection, RescueMode},
        state::{ObservationSource, PowerObservation, PowerState},
    },
    dispatch::Target,
    engine::{NoProbe, Point},
    hypervisor::{Boot, Definition, Hypervisor as _},
};

use crate::{
    crash::{FAIL, Plot},
    host::{
        AT_ONCE, Host, NEW, ON, PROMPT, SERVER, adopt, create, hash, qemu_io, rescue, unrescue,
    },
};

/// What happens before the plan that is tried.
#[derive(Clone)]
pub(crate) enum Prior {
    /// A server made from an image.
    Created { powered_off: bool },
    /// A domain that somebody else made.
    Foreign { uefi: bool, on: bool },
    /// An action that succeeds.
    Done(Target, Action),
    /// An action that fails, and cannot be taken back: the server is in ERROR.
    Fault(Action),
    /// The guest does not hear the power button.
    IgnoresPowerButton,
    /// The guest has an agent.
    GuestAgent,
    /// The rescue guest writes to the overlays.
    Writes,
    /// Somebody removes the domain.
    Undefined,
    /// Somebody undefines it while it runs.
    UndefinedRunning,
    /// A full disk halts the guest, and that is seen.
    DiskFull,
    /// Somebody has the guest's memory saved.
    MemorySaved,
    /// Somebody changes the definition.
    Changed,
    /// The host goes down, and comes up with everything off.
    HostRebooted,
}

/// A plan to be tried.
pub(crate) struct Variant {
    pub(crate) name: &'static str,
    pub(crate) prior: Vec<Prior>,
    pub(crate) target: Target,
    pub(crate) action: Action,
    /// It writes overlays to original disks: these then show what the overlays showed, all the time.
    pub(crate) commits: bool,
}

fn variant(name: &'static str, prior: &[Prior], target: Target, action: Action) -> Variant {
    Variant {
        name,
        prior: prior.to_vec(),
        target,
        action,
        commits: false,
    }
}

/// Every plan of every verb.
pub(crate) fn variants() -> Vec<Variant> {
    let running = [Prior::Created { powered_off: false }];
    let off = [Prior::Created { powered_off: true }];
    let foreign = |uefi, on| [Prior::Foreign { uefi, on }, Prior::Done(NEW, adopt())];
    let rescued = |change: &dyn Fn(&mut salvor_agent::core::action::RescueArgs)| {
        let mut args = rescue();
        change(&mut args);
        Action::Rescue(Box::new(args))
    };
    let plain = rescued(&|_| {});
    let overlay = rescued(&|args| {
        args.mode = Some(RescueMode::Stable);
        args.protection = Protection::Overlay;
    });
    let back = |overlay, restore_power| {
        Action::Unrescue(salvor_agent::core::action::UnrescueArgs {
            overlay,
            restore_power,
            ..unrescue()
        })
    };
    let after = |prior: &[Prior], more: &[Prior]| [prior, more].concat();
    let in_rescue =
        |prior: &[Prior], action: &Action| after(prior, &[Prior::Done(ON, action.clone())]);
    let in_overlays = |prior: &[Prior]| after(&in_rescue(prior, &overlay), &[Prior::Writes]);
    let mut all = vec![
        variant("create, powered on", &[], NEW, create(false)),
        variant("create, powered off", &[], NEW, create(true)),
        variant(
            "adopt, running",
            &[Prior::Foreign {
                uefi: false,
                on: true,
            }],
            NEW,
            adopt(),
        ),
        variant(
            "adopt, off",
            &[Prior::Foreign {
                uefi: true,
                on: false,
            }],
            NEW,
            adopt(),
        ),
        variant("release", &foreign(false, true), ON, Action::Release),
        variant("start", &off, ON, Action::Start),
        variant("stop, by itself", &running, ON, Action::Stop(PROMPT)),
        variant(
            "stop, ignored",
            &after(&running, &[Prior::IgnoresPowerButton]),
            ON,
            Action::Stop(PROMPT),
        ),
        variant("stop, at once", &running, ON, Action::Stop(AT_ONCE)),
        variant("rescue, classic, running", &running, ON, plain.clone()),
        variant(
            "rescue, classic, off",
            &foreign(false, false),
            ON,
            plain.clone(),
        ),
        variant(
            "rescue, from error",
            &after(&running, &[Prior::Fault(Action::Stop(AT_ONCE))]),
            ON,
            plain.clone(),
        ),
        variant(
            "rescue, stable, overlays, uefi",
            &foreign(true, true),
            ON,
            overlay.clone(),
        ),
        variant(
            "rescue, classic, read-only",
            &foreign(false, true),
            ON,
            rescued(&|args| {
                args.mode = Some(RescueMode::Classic);
                args.protection = Protection::ReadOnly;
            }),
        ),
        variant(
            "rescue, cd",
            &running,
            ON,
            rescued(&|args| args.image = Some(crate::host::CD)),
        ),
        variant(
            "unrescue, started",
            &in_rescue(&foreign(true, true), &plain),
            ON,
            back(None, false),
        ),
        variant(
            "unrescue, power restored",
            &in_rescue(&off, &plain),
            ON,
            back(None, true),
        ),
        variant(
            "unrescue, discard",
            &in_overlays(&foreign(false, true)),
            ON,
            back(Some(OverlayDisposition::Discard), false),
        ),
        Variant {
            commits: true,
            ..variant(
                "unrescue, commit",
                &in_overlays(&foreign(false, true)),
                ON,
                back(Some(OverlayDisposition::Commit), false),
            )
        },
        variant(
            "unrescue, domain gone",
            &after(
                &in_rescue(&foreign(true, true), &plain),
                &[Prior::Undefined],
            ),
            ON,
            back(None, false),
        ),
        variant("delete, created", &running, ON, Action::Delete),
        variant("delete, adopted", &foreign(true, true), ON, Action::Delete),
        variant(
            "delete, created, rescued",
            &in_rescue(&running, &plain),
            ON,
            Action::Delete,
        ),
        variant(
            "delete, adopted, overlays",
            &in_overlays(&foreign(false, true)),
            ON,
            Action::Delete,
        ),
        variant(
            "delete, domain gone",
            &after(&running, &[Prior::Undefined]),
            ON,
            Action::Delete,
        ),
    ];
    all.push(variant(
        "deliverPassword",
        &after(
            &in_rescue(&foreign(false, true), &plain),
            &[Prior::GuestAgent],
        ),
        ON,
        Action::DeliverPassword,
    ));
    let update = vec![FieldChange::Name("db".to_owned())];
    all.extend([
        variant("lock", &running, ON, lock()),
        variant(
            "unlock",
            &after(&running, &[Prior::Done(ON, lock())]),
            ON,
            Action::Unlock {
                only_expired: false,
            },
        ),
        variant("update", &running, ON, Action::Update(update)),
        variant(
            "reset to active, rescued",
            &in_rescue(&running, &plain),
            ON,
            Action::ResetState(ResetTo::Active),
        ),
        variant(
            "reset to error",
            &running,
            ON,
            Action::ResetState(ResetTo::Error),
        ),
        variant("soft delete, running", &running, ON, Action::SoftDelete),
        variant(
            "soft delete, off",
            &foreign(true, false),
            ON,
            Action::SoftDelete,
        ),
        variant(
            "soft delete, rescued",
            &in_rescue(&running, &plain),
            ON,
            Action::SoftDelete,
        ),
        variant(
            "soft delete, domain gone",
            &after(&running, &[Prior::Undefined]),
            ON,
            Action::SoftDelete,
        ),
        variant(
            "restore, it ran",
            &in_rescue(&running, &Action::SoftDelete),
            ON,
            Action::Restore,
        ),
        variant(
            "restore, it was off",
            &in_rescue(&foreign(true, false), &Action::SoftDelete),
            ON,
            Action::Restore,
        ),
        variant(
            "restore, rescued",
            &in_rescue(&in_rescue(&running, &plain), &Action::SoftDelete),
            ON,
            Action::Restore,
        ),
        variant(
            "restore, in error",
            &after(
                &running,
                &[
                    Prior::Fault(Action::Stop(AT_ONCE)),
                    Prior::Done(ON, Action::SoftDelete),
                ],
            ),
            ON,
            Action::Restore,
        ),
        variant(
            "force delete",
            &foreign(true, true),
            ON,
            Action::ForceDelete,
        ),
        variant(
            "force delete, soft-deleted",
            &in_rescue(&running, &Action::SoftDelete),
            ON,
            Action::ForceDelete,
        ),
    ]);
    all.extend(power());
    let drifted = after(&running, &[Prior::Changed]);
    let restore = || Action::RestoreDefinition;
    all.extend([
        variant("accept drift", &drifted, ON, Action::AcceptDrift),
        variant("restore definition", &drifted, ON, restore()),
        variant(
            "restore definition, domain gone",
            &after(&foreign(true, false), &[Prior::Undefined]),
            ON,
            restore(),
        ),
        variant(
            "restore, domain gone",
            &after(
                &in_rescue(&foreign(true, true), &Action::SoftDelete),
                &[Prior::Undefined],
            ),
            ON,
            Action::Restore,
        ),
        variant(
            "start rescue",
            &after(&in_rescue(&running, &plain), &[Prior::HostRebooted]),
            ON,
            Action::StartRescue,
        ),
    ]);
    let undefined = after(&foreign(true, true), &[Prior::UndefinedRunning]);
    let soft = Action::Reboot(RebootArgs {
        shutdown: PROMPT,
        or_fail: false,
    });
    all.push(variant(
        "unpause, rescued, its disk was full",
        &after(&in_rescue(&running, &plain), &[Prior::DiskFull]),
        ON,
        Action::Unpause,
    ));
    let gone = after(&running, &[Prior::Undefined]);
    let stopped = [Prior::Done(ON, Action::Stop(AT_ONCE)), Prior::Undefined];
    all.extend([
        variant("hard reboot, domain gone", &gone, ON, Action::HardReboot),
        variant(
            "start, domain gone",
            &after(&running, &stopped),
            ON,
            Action::Start,
        ),
        variant("stop, undefined", &undefined, ON, Action::Stop(PROMPT)),
        variant("reboot, undefined", &undefined, ON, soft),
        variant("hard reboot, undefined", &undefined, ON, Action::HardReboot),
        variant("soft delete, undefined", &undefined, ON, Action::SoftDelete),
    ]);
    all
}

fn lock() -> Action {
    Action::Lock(LockArgs {
        reason: Some("audit".to_owned()),
        expires_in_ms: None,
    })
}

/// The plans of power and memory.
fn power() -> Vec<Variant> {
    let running = [Prior::Created { powered_off: false }];
    let after = |more: &[Prior]| [&running, more].concat();
    let foreign = [
        Prior::Foreign {
            uefi: false,
            on: true,
        },
        Prior::Done(NEW, adopt()),
        Prior::GuestAgent,
    ];
    let with_agent = |more: &[Prior]| [&foreign, more].concat();
    let soft = |or_fail| {
        Action::Reboot(RebootArgs {
            shutdown: PROMPT,
            or_fail,
        })
    };
    let paused = [Prior::Done(ON, Action::Pause)];
    let suspended = [Prior::Done(ON, Action::Suspend)];
    let password = Action::ChangePassword(ChangePasswordArgs {
        user: None,
        password: hash(),
    });
    vec![
        variant("reboot, by itself", &running, ON, soft(false)),
        variant(
            "reboot, ignored, hard",
            &after(&[Prior::IgnoresPowerButton]),
            ON,
            soft(false),
        ),
        variant(
            "reboot, by its agent",
            &with_agent(&[Prior::IgnoresPowerButton]),
            ON,
            soft(true),
        ),
        variant("hard reboot", &running, ON, Action::HardReboot),
        variant(
            "hard reboot, drifted",
            &after(&[Prior::Changed]),
            ON,
            Action::HardReboot,
        ),
        variant(
            "hard reboot, suspended",
            &after(&suspended),
            ON,
            Action::HardReboot,
        ),
        variant(
            "hard reboot, paused",
            &after(&paused),
            ON,
            Action::HardReboot,
        ),
        variant(
            "start, with saved memory",
            &after(&[Prior::MemorySaved, Prior::Done(ON, Action::Stop(AT_ONCE))]),
            ON,
            Action::Start,
        ),
        variant(
            "stop, in error",
            &after(&[Prior::Done(ON, Action::ResetState(ResetTo::Error))]),
            ON,
            Action::Stop(PROMPT),
        ),
        variant("pause", &running, ON, Action::Pause),
        variant(
            "unpause, with an agent",
            &with_agent(&paused),
            ON,
            Action::Unpause,
        ),
        variant(
            "unpause, active, its disk was full",
            &after(&[Prior::DiskFull]),
            ON,
            Action::Unpause,
        ),
        variant("suspend", &running, ON, Action::Suspend),
        variant("resume", &after(&suspended), ON, Action::Resume),
        variant(
            "resume, with an agent",
            &with_agent(&suspended),
            ON,
            Action::Resume,
        ),
        variant("delete, suspended", &after(&suspended), ON, Action::Delete),
        variant("delete, paused", &after(&paused), ON, Action::Delete),
        variant("crash dump", &running, ON, Action::CrashDump),
        variant("memory dump", &running, ON, Action::DumpMemory),
        variant(
            "delete, adopted, dumped",
            &with_agent(&[Prior::Done(ON, Action::DumpMemory)]),
            ON,
            Action::Delete,
        ),
        variant("change password", &with_agent(&[]), ON, password),
    ]
}

/// Brings a host to where a plan begins.
pub(crate) async fn prepare(host: &Host, prior: &[Prior]) {
    let agent = host.agent(Arc::new(NoProbe)).await;
    host.add_images(&agent.store).await;
    for prior in prior {
        match prior {
            Prior::Created { powered_off } => agent.succeed(NEW, create(*powered_off)).await,
            Prior::Foreign { uefi, on } => {
                let xml = host.foreign_domain(*uefi);
                host.define(&xml).await;
                if *on {
                    host.fake.start(SERVER, Boot::Resume).await.unwrap();
                }
            }
            Prior::Done(target, action) => agent.succeed(*target, action.clone()).await,
            Prior::Fault(action) => {
                let plot =
                    Plot::new(&[(Point::BeforeCommit, FAIL), (Point::BeforeRevert(0), FAIL)]);
                let agent = host.agent(plot).await;
                let operation = agent.carry_out(ON, action.clone()).await;
                assert_eq!(operation.state, OperationState::Failed);
            }
            Prior::IgnoresPowerButton => host.fake.guest_ignores_acpi(SERVER),
            Prior::GuestAgent => host.fake.guest_agent(SERVER, true),
            Prior::Writes => {
                let rescue = agent.record().rescue.clone().unwrap();
                for overlay in rescue.overlays {
                    qemu_io(Path::new(&overlay.path), "qcow2", "write -q -P 0x77 64k 4k");
                }
            }
            Prior::Changed => {
                let xml = host.fake.domain_xml(SERVER, Definition::Inactive).await;
                let changed = xml
                    .unwrap()
                    .replace("</devices>", "<input type='tablet' bus='usb'/></devices>");
                host.define(&changed).await;
                host.fake.sync_definitions().await.unwrap();
            }
            Prior::MemorySaved => host.fake.managed_save(SERVER),
            Prior::UndefinedRunning => {
                host.fake.undefine(SERVER).await.unwrap();
                host.fake.sync_definitions().await.unwrap();
            }
            Prior::DiskFull => {
                host.fake.disk_fails(SERVER, "no space");
                let now = std::time::UNIX_EPOCH.elapsed().unwrap();
                let seen = PowerObservation {
                    state: PowerState::Paused,
                    reason: "ioerror".to_owned(),
                    observed_at_ms: i64::try_from(now.as_millis()).unwrap(),
                    source: ObservationSource::Poll,
                };
                agent.store.observe(SERVER, seen).await.unwrap();
            }
            Prior::HostRebooted => host.fake.host_reboot(),
            Prior::Undefined => {
                host.fake.destroy(SERVER).await.unwrap();
                host.fake.undefine(SERVER).await.unwrap();
                host.fake.sync_definitions().await.unwrap();
            }
        }
    }
    host.fake.set_autostart(SERVER);
}
