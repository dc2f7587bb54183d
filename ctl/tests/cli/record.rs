// SPDX-License-Identifier: Apache-2.0
//! Actions that change the record: what is asked for, for whom, and what is told.

use salvor_proto::v1::{self, plan_action_request::Action};

use crate::{
    actions::agent,
    made::{OPERATION, done, server},
    mock::{Mock, State},
    run::run,
};

#[tokio::test]
async fn a_lock_has_a_reason_and_an_end_if_they_are_given() {
    let mock = agent(done());
    let plain = ["server", "lock", "web-1"];
    run(&mock.socket(), &plain).await.with(0);
    let full = [
        "server",
        "lock",
        "web-1",
        "--reason",
        "audit",
        "--expires-in",
        "8h",
    ];
    run(&mock.socket(), &full).await.with(0);
    let state = mock.state();
    let [plain, full] = state.locks.as_slice() else {
        panic!("{:?}", state.locks);
    };
    assert_eq!((&plain.reason, &plain.expires_in), (&None, &None));
    assert_eq!(full.reason.as_deref(), Some("audit"));
    assert_eq!(full.expires_in.map(|time| time.seconds), Some(28_800));
}

#[tokio::test]
async fn an_update_names_what_is_given_or_cleared_and_nothing_else() {
    let mock = agent(done());
    let arguments = [
        "server",
        "update",
        "web-1",
        "--description",
        "text",
        "--tag",
        "a",
        "--tag",
        "b",
        "--metadata",
        "k=v",
        "--autostart",
        "false",
        "--clear",
        "access-ipv4",
        "--shutdown-timeout",
        "90s",
    ];
    run(&mock.socket(), &arguments).await.with(0);
    let update = mock.state().updates.remove(0);
    let mask = update.update_mask.clone().unwrap().paths;
    let named = [
        "description",
        "metadata",
        "tags",
        "access_ipv4",
        "shutdown_timeout",
        "autostart",
    ];
    assert_eq!(mask, named);
    assert_eq!(
        (update.description.as_str(), update.tags.join(" ").as_str()),
        ("text", "a b")
    );
    assert_eq!(update.metadata["k"], "v");
    assert!(!update.autostart && update.name.is_empty());
    for wrong in [
        &["server", "update", "web-1"][..],
        &["server", "update", "web-1", "--tag", "a", "--clear", "tags"],
        &[
            "server",
            "update",
            "web-1",
            "--metadata",
            "k=a",
            "--metadata",
            "k=b",
        ],
        &["server", "update", "web-1", "--autostart", "perhaps"],
    ] {
        run(&mock.socket(), wrong).await.with(2);
    }
    assert_eq!(mock.state().updates.len(), 1);
}

#[tokio::test]
async fn a_call_says_for_whom_it_is_made_and_nothing_unless_told() {
    let mock = agent(done());
    run(&mock.socket(), &["server", "lock", "web-1"])
        .await
        .with(0);
    let member = [
        "--as-role",
        "member",
        "--as-user",
        "u 1",
        "--as-project",
        "p",
        "server",
        "lock",
        "web-1",
    ];
    run(&mock.socket(), &member).await.with(0);
    let of = |text: &str| Some(text.to_owned());
    let said = mock.state().for_whom;
    assert_eq!(
        said,
        [[None, None, None], [of("member"), of("u 1"), of("p")]]
    );
    for wrong in [
        &["--as-role", "member", "server", "lock", "web-1"][..],
        &["--as-role", "root", "server", "lock", "web-1"],
        &["--as-user", "a\nb", "server", "lock", "web-1"],
        &["--as-project", "", "server", "lock", "web-1"],
    ] {
        run(&mock.socket(), wrong).await.with(2);
    }
    assert_eq!(mock.state().locks.len(), 2);
}

#[tokio::test]
async fn a_reset_tells_what_the_host_shows() {
    let result = v1::ActionResult {
        server: Some(server("web-1")),
        host: Some(v1::HostReport {
            power_state: v1::PowerState::Shutdown.into(),
            power_reason: "crashed".into(),
            defined: true,
            rescue_domain: true,
            missing_disks: vec![v1::MissingDisk {
                target: "vda".into(),
                source: "/d/\x1b[2Jdisk".into(),
            }],
            ..Default::default()
        }),
        ..Default::default()
    };
    let mock = agent(crate::made::ended_with(&result));
    let arguments = ["server", "reset-state", "web-1", "error"];
    let ended = run(&mock.socket(), &arguments).await.with(0);
    assert_eq!(mock.state().resets[0].state, i32::from(v1::VmState::Error));
    for line in [
        "host shows:    SHUTDOWN (crashed)",
        "definition:    there, a rescue's",
        "missing disk:  vda /d/\\u{1b}[2Jdisk",
    ] {
        assert!(ended.out.contains(line), "{}", ended.out);
    }
    run(&mock.socket(), &["server", "reset-state", "web-1"])
        .await
        .with(2);
    run(
        &mock.socket(),
        &["server", "reset-state", "web-1", "stopped"],
    )
    .await
    .with(2);
}

#[tokio::test]
async fn the_other_actions_ask_for_what_they_say_and_so_do_their_plans() {
    let mock = agent(done());
    for verb in ["unlock", "restore", "force-delete"] {
        run(&mock.socket(), &["server", verb, "web-1"])
            .await
            .with(0);
    }
    mock.change(|state| state.plan.accepted = true);
    for arguments in [
        &["plan", "lock", "web-1"][..],
        &["plan", "unlock", "web-1"],
        &["plan", "update", "web-1", "--name", "db"],
        &["plan", "reset-state", "web-1", "active"],
        &["plan", "restore", "web-1"],
        &["plan", "force-delete", "web-1"],
    ] {
        run(&mock.socket(), arguments).await.with(0);
    }
    let state = mock.state();
    for call in ["unlock", "restore", "force delete"] {
        assert!(state.calls.contains(&call), "{:?}", state.calls);
    }
    let actions: Vec<_> = state
        .plans
        .into_iter()
        .map(|plan| plan.action.unwrap())
        .collect();
    assert!(matches!(
        actions.as_slice(),
        [
            Action::Lock(_),
            Action::Unlock(_),
            Action::Update(_),
            Action::ResetState(_),
            Action::Restore(_),
            Action::ForceDelete(_)
        ]
    ));
}

#[tokio::test]
async fn an_operation_is_abandoned_after_the_time_that_is_given() {
    let mock = agent(done());
    let arguments = ["operation", "abandon", OPERATION, "--after", "5s"];
    let ended = run(&mock.socket(), &arguments).await.with(0);
    let abandon = mock.state().abandons.remove(0);
    assert_eq!(abandon.name, OPERATION);
    assert_eq!(abandon.patience.map(|time| time.seconds), Some(5));
    assert!(ended.out.contains(OPERATION), "{}", ended.out);
}

#[tokio::test]
async fn a_server_shows_its_lock_what_people_say_of_it_and_until_when_it_waits() {
    let shown = v1::Server {
        description: "the first".into(),
        project_id: "p".into(),
        tags: vec!["a".into(), "b".into()],
        autostart: true,
        autostart_order: Some(3),
        lock: Some(v1::ServerLock {
            locked_by: v1::LockOwner::Admin.into(),
            reason: "audit".into(),
            create_time: crate::made::at(0),
            expire_time: crate::made::at(60),
        }),
        soft_deletion: Some(v1::SoftDeletion {
            delete_time: crate::made::at(0),
            reclaim_time: crate::made::at(3_600),
            vm_state: v1::VmState::Active.into(),
            power_state: v1::PowerState::Running.into(),
        }),
        ..server("web-1")
    };
    let mock = Mock::new(State {
        servers: vec![shown],
        ..State::default()
    });
    let ended = run(&mock.socket(), &["server", "show", "web-1"])
        .await
        .with(0);
    for part in [
        "by admin, since",
        "audit",
        "a, b",
        "yes, place 3",
        "ACTIVE RUNNING",
        "(restore it before)",
    ] {
        assert!(ended.out.contains(part), "{part}: {}", ended.out);
    }
    let filters = [
        "server",
        "list",
        "--tag",
        "a",
        "--locked",
        "true",
        "--project",
        "p",
        "--metadata",
        "k=v",
    ];
    run(&mock.socket(), &filters).await.with(0);
    let list = mock.state().lists.remove(0);
    assert_eq!(
        (list.tags, list.locked, list.project_id.as_str()),
        (vec!["a".to_owned()], Some(true), "p")
    );
    assert_eq!(list.metadata["k"], "v");
}

#[tokio::test]
async fn the_operations_of_a_server_are_found_by_the_option_too() {
    let mock = agent(done());
    mock.change(|state| state.servers = vec![server("web-1")]);
    for arguments in [
        &["operation", "list", "--server", "web-1"][..],
        &["operation", "list", "web-1"],
    ] {
        run(&mock.socket(), arguments).await.with(0);
    }
    let filters = mock.state().filters;
    assert_eq!(filters[0], filters[1]);
    assert!(filters[0].starts_with("server="), "{filters:?}");
    let both = ["operation", "list", "web-1", "--server", "web-1"];
    run(&mock.socket(), &both).await.with(2);
}
