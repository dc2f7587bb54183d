// SPDX-License-Identifier: Apache-2.0
//! Lists, single things, the watch, and what is generated.

use salvor_proto::v1::{self, event::Change, watch_events_response::Item};

use crate::{
    made::{ID, OPERATION, at, done, running, server},
    mock::{Mock, State},
    run::{Running, run},
};

fn servers(names: &[&str]) -> Mock {
    let servers = names.iter().map(|name| server(name)).collect();
    Mock::new(State {
        servers,
        operation: done(),
        ..Default::default()
    })
}

#[tokio::test]
async fn a_list_is_every_page_in_aligned_columns() {
    let mock = servers(&["web-1", "東京", "db"]);
    mock.change(|state| {
        let power = state.servers[2].power.as_mut().unwrap();
        power.set_state(v1::PowerState::Unknown);
        power.set_last_known_state(v1::PowerState::Running);
        state.servers[1].task_state = "rescuing".into();
    });
    let ended = run(&mock.socket(), &["server", "ls"]).await.with(0);
    assert_eq!(
        ended.out,
        format!(
            "ID                                    NAME   STATUS  TASK      POWER                  SEEN\n\
             {ID}  web-1  ACTIVE  -         RUNNING                -\n\
             {ID}  東京   ACTIVE  rescuing  RUNNING                -\n\
             {ID}  db     ACTIVE  -         UNKNOWN (was RUNNING)  -\n"
        )
    );
    let json = run(&mock.socket(), &["server", "list", "-o", "json"])
        .await
        .with(0)
        .json();
    assert_eq!(json["servers"].as_array().unwrap().len(), 3);
    assert_eq!(json["next_page_token"], "");
    assert_eq!(json["servers"][0]["domain_name"], "dom-web-1");
}

#[tokio::test]
async fn filters_are_the_agents() {
    let mock = servers(&[]);
    let arguments = [
        "server",
        "list",
        "--name",
        "web",
        "--status",
        "ACTIVE",
        "--status",
        "ERROR",
        "--power",
        "unknown",
        "--vm-state",
        "soft-deleted",
        "--origin",
        "adopted",
    ];
    run(&mock.socket(), &arguments).await.with(0);
    let list = &mock.state().lists[0];
    assert_eq!(list.name_contains, "web");
    assert_eq!(list.statuses, ["ACTIVE", "ERROR"]);
    assert_eq!(list.power_states, [i32::from(v1::PowerState::Unknown)]);
    assert_eq!(list.vm_states, [i32::from(v1::VmState::SoftDeleted)]);
    assert_eq!(list.origin(), v1::ServerOrigin::Adopted);
}

#[tokio::test]
async fn operations_of_a_server_are_listed_by_any_word_for_it() {
    const GONE: &str = "0a1b2c3d-0000-4000-8000-000000000001";
    let mock = servers(&["web-1"]);
    for (arguments, filter) in [
        (vec![], String::new()),
        (vec!["web-1"], format!("server={ID}")),
        (
            vec!["web-1", "--filter", "done=false"],
            format!("server={ID} AND done=false"),
        ),
        // Nobody is asked about this one.
        (vec![GONE], format!("server={GONE}")),
        (vec!["--filter", "done=true"], "done=true".to_owned()),
    ] {
        let arguments = [vec!["operation", "list"], arguments].concat();
        run(&mock.socket(), &arguments).await.with(0);
        assert_eq!(mock.state().filters.last(), Some(&filter), "{arguments:?}");
    }
}

#[tokio::test]
async fn a_server_is_shown_as_a_block() {
    let mock = servers(&["web-1"]);
    let ended = run(&mock.socket(), &["server", "show", "web-1"])
        .await
        .with(0);
    assert_eq!(
        ended.out,
        format!(
            "id:        {ID}\n\
             name:      web-1\n\
             status:    ACTIVE\n\
             vm state:  ACTIVE\n\
             power:     RUNNING (booted), seen -, reported by libvirt\n\
             origin:    adopted\n\
             domain:    dom-web-1\n\
             size:      vcpus 2, memory 512 MiB, disk 10 GiB\n\
             disk:      vda virtio disk /srv/a b.qcow2 qcow2 root\n\
             revision:  7\n\
             created:   2023-11-14T22:13:20Z\n\
             changed:   2023-11-14T22:14:20Z\n"
        )
    );
    let json = run(&mock.socket(), &["server", "show", "web-1", "-o", "json"])
        .await
        .with(0)
        .json();
    assert_eq!(json["create_time"], "2023-11-14T22:13:20Z");
    assert_eq!(json["vm_state"], "VM_STATE_ACTIVE");
    assert_eq!(json["task_state"], "");
}

#[tokio::test]
async fn unknown_power_shows_what_was_seen_last_and_when() {
    let mock = servers(&["web-1"]);
    mock.change(|state| {
        let now = std::time::SystemTime::now() - std::time::Duration::from_secs(7200);
        state.servers[0].power = Some(v1::PowerObservation {
            state: v1::PowerState::Unknown.into(),
            last_known_state: v1::PowerState::Running.into(),
            last_known_time: Some(now.into()),
            ..Default::default()
        });
    });
    let ended = run(&mock.socket(), &["server", "show", "web-1"])
        .await
        .with(0);
    let says = "UNKNOWN (libvirt cannot be asked); last known RUNNING, 2 h ago (";
    assert!(ended.out.contains(says), "{}", ended.out);
}

#[tokio::test]
async fn no_name_reaches_the_terminal_raw() {
    let evil = "x\x1b]0;owned\x07\u{9b}31m\r\u{202e}\nname:  fake";
    let mock = servers(&[evil]);
    mock.change(|state| {
        let host = &mut state.host;
        host.hostname = evil.into();
        host.libvirt = Some(v1::LibvirtLink {
            reason: evil.into(),
            ..Default::default()
        });
        state.images = vec![v1::Image {
            name: evil.into(),
            properties: [(evil.to_owned(), evil.to_owned())].into(),
            ..Default::default()
        }];
        state.unmanaged = vec![v1::UnmanagedDomain {
            name: evil.into(),
            ..Default::default()
        }];
        state.warnings = vec![v1::Warning {
            name: evil.into(),
            message: evil.into(),
        }];
        state.admin_pass = evil.into();
        state.plan = v1::PlanActionResponse {
            accepted: true,
            refusals: vec![v1::Refusal {
                reason: evil.into(),
                message: evil.into(),
            }],
            steps: vec![v1::PlanStep {
                kind: evil.into(),
                description: evil.into(),
                ..Default::default()
            }],
            files: vec![v1::FileEffect {
                path: evil.into(),
                effect: evil.into(),
            }],
            // Its lines are its own.
            domain_diff: format!("+<name>{}</name>\n", evil.replace('\n', "")),
            warnings: state.warnings.clone(),
            changes: vec![v1::RecordEffect {
                field: evil.into(),
                before: evil.into(),
                after: evil.into(),
            }],
            overtakes: evil.into(),
            host: Some(v1::HostReport {
                power_reason: evil.into(),
                unknown: evil.into(),
                ..Default::default()
            }),
        };
        let mut metadata: v1::OperationMetadata =
            state.operation.metadata.as_ref().unwrap().to_msg().unwrap();
        metadata.steps[0].description = evil.into();
        metadata.steps[0].message = evil.into();
        metadata.warnings = state.warnings.clone();
        state.operation.metadata = Some(prost_types::Any::from_msg(&metadata).unwrap());
    });
    for arguments in [
        &["server", "list"][..],
        &["server", "show", evil],
        &["image", "list"],
        &["image", "show", "i"],
        &["host", "show"],
        &["host", "unmanaged"],
        &["operation", "list"],
        &["operation", "show", OPERATION],
        &["server", "rescue", "a"],
        &["server", "delete", "a"],
        &["plan", "rescue", "a"],
    ] {
        for format in ["table", "json"] {
            let ended = run(&mock.socket(), &[arguments, &["-o", format]].concat())
                .await
                .with(0);
            for text in [&ended.out, &ended.err] {
                let raw = |c: char| (c.is_control() && c != '\n') || c == '\u{202e}';
                assert!(!text.contains(raw), "{arguments:?}: {text:?}");
                assert!(
                    !text.lines().any(|line| line.starts_with("name:  fake")),
                    "{text}"
                );
            }
        }
    }
    // An error's text is no safer.
    mock.change(|state| {
        state.refusal = Some((
            tonic::Code::Internal,
            evil.into(),
            tonic_types::ErrorDetails::new(),
        ));
    });
    let ended = run(&mock.socket(), &["server", "start", "a"]).await.with(1);
    assert_eq!(ended.err.lines().count(), 1, "{:?}", ended.err);
    assert!(!ended.err.contains('\x1b'));
}

#[tokio::test]
async fn operations_are_listed_and_shown_with_their_steps() {
    let mock = Mock::new(State {
        operation: running(),
        ..Default::default()
    });
    let ended = run(&mock.socket(), &["op", "list"]).await.with(0);
    let line = ended.out.lines().nth(1).unwrap();
    assert!(
        line.starts_with(&format!("{OPERATION}  rescue  {ID}  RUNNING  0/2")),
        "{line}"
    );
    let ended = run(&mock.socket(), &["operation", "show", OPERATION])
        .await
        .with(0);
    let steps = "\n#  PHASE    STEP           STATE    TOOK  WHAT\n\
                 1  prepare  CreateOverlay  running  2 s   do CreateOverlay\n\
                 2  prepare  PowerOff       pending  2 s   do PowerOff\n";
    assert!(ended.out.ends_with(steps), "{}", ended.out);
}

#[tokio::test]
async fn the_host_says_that_libvirt_is_down_and_which_calls_are_stuck() {
    let host = v1::Host {
        hostname: "node-1".into(),
        libvirt: Some(v1::LibvirtLink {
            reason: "no daemon".into(),
            since: at(0),
            ..Default::default()
        }),
        stuck_calls: vec![v1::StuckCall {
            call: "virDomainDestroy".into(),
            domain_id: ID.into(),
            age: Some(prost_types::Duration {
                seconds: 90,
                nanos: 0,
            }),
        }],
        ..Default::default()
    };
    let mock = Mock::new(State {
        host,
        ..Default::default()
    });
    let ended = run(&mock.socket(), &["host", "show"]).await.with(0);
    assert!(
        ended.out.contains("DOWN since 2023-11-14T22:13:20Z ("),
        "{}",
        ended.out
    );
    assert!(ended.out.contains("): no daemon\n"), "{}", ended.out);
    assert!(
        ended
            .out
            .contains(&format!("virDomainDestroy for {ID} (1 min 30 s)")),
        "{}",
        ended.out
    );
}

fn event(revision: i64, change: Change) -> v1::WatchEventsResponse {
    let event = v1::Event {
        revision,
        time: at(0),
        server_id: ID.into(),
        change: Some(change),
    };
    v1::WatchEventsResponse {
        item: Some(Item::Event(event)),
    }
}

#[tokio::test]
async fn the_watch_writes_a_line_for_each_event() {
    let mut second = server("web-1");
    second.task_state = "rescuing".into();
    let events = vec![
        event(3, Change::Server(server("web-1"))),
        v1::WatchEventsResponse {
            item: Some(Item::CaughtUp(v1::CaughtUp { revision: 5 })),
        },
        event(6, Change::Server(second)),
        event(7, Change::Operation(running())),
        event(
            8,
            Change::ServerRemoved(v1::ServerRemoved {
                action: "delete".into(),
            }),
        ),
    ];
    let mock = Mock::new(State {
        events,
        ..Default::default()
    });
    let mut run = Running::start(&mock.socket(), &["watch", "web-1"]);
    let begin = |revision| format!("2023-11-14T22:13:20Z  {revision}  {ID}  ");
    assert_eq!(
        run.writes().await,
        begin(3) + "web-1: ACTIVE, power RUNNING\n"
    );
    assert_eq!(
        run.writes().await,
        begin(6) + "web-1: ACTIVE (rescuing), power RUNNING\n"
    );
    assert_eq!(
        run.writes().await,
        begin(7) + "rescue running, step 1/2 CreateOverlay running\n"
    );
    assert_eq!(run.writes().await, begin(8) + "removed by delete\n");
    assert_eq!(mock.state().watches[0].servers, ["web-1"]);
}

#[tokio::test]
async fn the_watch_is_taken_up_after_the_last_revision_when_the_agent_is_back() {
    let events = vec![event(6, Change::Server(server("web-1")))];
    let mut mock = Mock::new(State {
        events,
        ..Default::default()
    });
    let mut run = Running::start(&mock.socket(), &["watch", "--after", "2", "-o", "json"]);
    let first: serde_json::Value = serde_json::from_str(&run.writes().await).unwrap();
    assert_eq!(first["event"]["revision"], "6");
    mock.stop();
    run.tells("taking the watch up again").await;
    mock.change(|state| {
        let gap = v1::Gap {
            after_revision: 6,
            oldest_revision: 9,
        };
        state.events = vec![v1::WatchEventsResponse {
            item: Some(Item::Gap(gap)),
        }];
    });
    mock.start();
    let second: serde_json::Value = serde_json::from_str(&run.writes().await).unwrap();
    assert_eq!(second["gap"]["oldest_revision"], "9");
    let after: Vec<_> = mock
        .state()
        .watches
        .iter()
        .map(|watch| watch.after_revision)
        .collect();
    assert_eq!(after, [Some(2), Some(6)]);
}

#[tokio::test]
async fn completion_scripts_name_the_commands_and_need_no_agent() {
    let nowhere = std::path::Path::new("/nowhere/salvor.sock");
    for (shell, mark) in [
        ("bash", "complete -F"),
        ("zsh", "#compdef salvor"),
        ("fish", "complete -c salvor"),
    ] {
        let ended = run(nowhere, &["completion", shell]).await.with(0);
        assert!(ended.out.contains(mark), "{shell}");
        assert!(
            ended.out.contains("unrescue") && ended.out.contains("admin-pass-stdin"),
            "{shell}"
        );
    }
}

#[tokio::test]
async fn there_is_a_manual_page_for_each_command() {
    let folder = tempfile::TempDir::new().unwrap();
    let out = folder.path().join("man/man1");
    let nowhere = std::path::Path::new("/nowhere/salvor.sock");
    run(nowhere, &["man", "--out", out.to_str().unwrap()])
        .await
        .with(0);
    for page in [
        "salvor",
        "salvor-server-rescue",
        "salvor-server-unrescue",
        "salvor-image-import",
        "salvor-operation-wait",
        "salvor-watch",
        "salvor-host-unmanaged",
        "salvor-plan-create",
    ] {
        assert!(out.join(format!("{page}.1")).is_file(), "{page}");
    }
    let text = std::fs::read_to_string(out.join("salvor.1")).unwrap();
    assert!(text.contains("the agent cannot be reached"), "{text}");
}
