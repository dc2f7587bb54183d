// SPDX-License-Identifier: Apache-2.0
//! Golden plans of what changes the record alone, and of soft delete and restore.

use salvor_agent::core::{
    action::{Action, LockArgs, ResetTo},
    change::FieldChange,
    operation::HostReport,
    record::{Lock, LockOwner, Origin, ServerRecord, SoftDeletion},
    state::{PowerState, VmState},
};

use crate::{
    bench::{created_xml, domain, facts, record, rescue_args, rescued},
    golden::{Book, check},
};

#[test]
fn plans_of_the_record() {
    let mut book = Book::new();
    let xml = created_xml(false);
    let active = record(Origin::Created, VmState::Active);
    let (rescued_server, in_rescue) = rescued(&active, &xml, rescue_args());
    let none = facts(None, None);
    let mut owner = none.clone();
    owner.who.project = "p".to_owned();
    let mut owned = active.clone();
    owned.owner.project_id = "p".to_owned();
    let mut locked = owned.clone();
    locked.lock = Some(Lock {
        by: LockOwner::Admin,
        reason: None,
        at_ms: 1,
        expires_at_ms: None,
    });
    let mut expired = owned.clone();
    expired.lock = Some(Lock {
        by: LockOwner::Owner,
        reason: None,
        at_ms: 1,
        expires_at_ms: Some(crate::bench::NOW),
    });
    let lock = Action::Lock(LockArgs {
        reason: Some("audit".to_owned()),
        expires_in_ms: Some(60_000),
    });
    let unlock = |only_expired| Action::Unlock { only_expired };
    book.add("lock, by its owner", Some(&owned), &lock, &owner);
    book.add("lock, by an administrator", Some(&owned), &lock, &none);
    book.add("lock, no project anywhere", Some(&active), &lock, &none);
    book.add("lock again, by its owner", Some(&locked), &lock, &owner);
    book.add(
        "lock again, by an administrator",
        Some(&locked),
        &lock,
        &none,
    );
    book.add(
        "lock, by its owner, the last one is over",
        Some(&expired),
        &lock,
        &owner,
    );
    book.add("unlock", Some(&locked), &unlock(false), &none);
    book.add("unlock, not locked", Some(&active), &unlock(false), &none);
    book.add(
        "unlock, due, it is over",
        Some(&expired),
        &unlock(true),
        &none,
    );
    book.add(
        "unlock, due, locked anew",
        Some(&locked),
        &unlock(true),
        &none,
    );
    let update = Action::Update(vec![
        FieldChange::Name("db".to_owned()),
        FieldChange::Description(None),
    ]);
    book.add("update", Some(&active), &update, &none);
    let mut looked = none.clone();
    looked.host_report = Some(HostReport {
        power: PowerState::Shutdown,
        power_reason: "crashed".to_owned(),
        defined: true,
        rescue_domain: false,
        saved_memory: true,
        missing_disks: [("vda".to_owned(), "/d/disk".to_owned())].into(),
        unknown: String::new(),
        at_ms: crate::bench::NOW,
    });
    let reset = |to| Action::ResetState(to);
    book.add(
        "reset to active",
        Some(&active),
        &reset(ResetTo::Active),
        &looked,
    );
    book.add(
        "reset to active, rescued",
        Some(&rescued_server),
        &reset(ResetTo::Active),
        &looked,
    );
    book.add(
        "reset to error",
        Some(&active),
        &reset(ResetTo::Error),
        &looked,
    );
    let mut on = facts(Some(domain(&xml, PowerState::Running)), None);
    on.host.reclaim_ms = 3_600_000;
    let mut gone = none.clone();
    gone.host.reclaim_ms = 3_600_000;
    book.add("soft delete", Some(&active), &Action::SoftDelete, &on);
    book.add(
        "soft delete, domain gone",
        Some(&active),
        &Action::SoftDelete,
        &gone,
    );
    let deleted = |server: &ServerRecord, vm_state, power| {
        let mut server = server.clone();
        server.vm_state = VmState::SoftDeleted;
        server.deletion = Some(SoftDeletion {
            vm_state,
            power,
            fault: None,
            at_ms: 1,
            reclaim_at_ms: 2,
        });
        server
    };
    let off = facts(Some(domain(&xml, PowerState::Shutdown)), None);
    let mut off_in_rescue = in_rescue.clone();
    if let Some(domain) = &mut off_in_rescue.domain {
        domain.power = PowerState::Shutdown;
    }
    for (title, server, facts) in [
        (
            "restore, it ran",
            deleted(&active, VmState::Active, PowerState::Running),
            &off,
        ),
        (
            "restore, it was paused",
            deleted(&active, VmState::Paused, PowerState::Paused),
            &off,
        ),
        (
            "restore, it was off",
            deleted(&active, VmState::Stopped, PowerState::Shutdown),
            &off,
        ),
        (
            "restore, somebody started it",
            deleted(&active, VmState::Active, PowerState::Running),
            &on,
        ),
        (
            "restore, domain gone",
            deleted(&active, VmState::Active, PowerState::Running),
            &none,
        ),
        (
            "restore, rescued",
            deleted(&rescued_server, VmState::Rescued, PowerState::Running),
            &off_in_rescue,
        ),
    ] {
        book.add(title, Some(&server), &Action::Restore, facts);
    }
    book.add("force delete", Some(&active), &Action::ForceDelete, &on);
    check("record.txt", &book.0);
}
