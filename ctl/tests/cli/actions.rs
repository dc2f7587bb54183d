// SPDX-License-Identifier: Apache-2.0
//! Actions: what is asked for, the wait with its steps, the password, agents that go away.

use salvor_proto::{
    google::longrunning::Operation,
    v1::{self, OperationState, StepState, plan_action_request::Action},
};
use tokio::process::Command;

use crate::{
    made::{ID, OPERATION, done, failed, operation, running},
    mock::{Mock, State},
    run::{Running, run, salvor},
};

pub fn agent(operation: Operation) -> Mock {
    Mock::new(State {
        operation,
        admin_pass: "pass-WORD-42".into(),
        ..Default::default()
    })
}

/// Sends SIGINT.
pub async fn interrupt(pid: u32) {
    let status = Command::new("kill")
        .args(["-INT", &pid.to_string()])
        .status()
        .await
        .unwrap();
    assert!(status.success());
}

#[tokio::test]
async fn steps_are_told_as_they_change_and_the_result_is_alone_on_standard_output() {
    let mock = agent(running());
    let mut run = Running::start(&mock.socket(), &["server", "stop", "web-1"]);
    run.tells("[1/2] do CreateOverlay: running").await;
    mock.change(|state| {
        state.operation = operation(OperationState::Running, StepState::Done, StepState::Running);
    });
    run.tells("[1/2] do CreateOverlay: done in 2 s").await;
    run.tells("[2/2] do PowerOff: running").await;
    mock.change(|state| state.operation = done());
    let ended = run.end().await.with(0);
    assert_eq!(ended.err.matches("[1/2]").count(), 2, "{}", ended.err);
    assert!(
        ended
            .out
            .starts_with(&format!("server:         web-1 ({ID})\n")),
        "{}",
        ended.out
    );
    assert!(
        ended
            .out
            .contains("\nguest:          shut down by itself\n"),
        "{}",
        ended.out
    );
    assert!(!ended.out.contains('['), "{}", ended.out);
}

#[tokio::test]
async fn a_restart_of_the_agent_is_waited_out() {
    let mut mock = agent(running());
    let mut run = Running::start(&mock.socket(), &["server", "start", "web-1"]);
    mock.until(|state| state.calls.contains(&"wait")).await;
    mock.stop();
    run.tells("trying").await;
    mock.change(|state| state.operation = done());
    mock.start();
    run.tells("the agent is back").await;
    let ended = run.end().await.with(0);
    assert_eq!(
        mock.state()
            .calls
            .iter()
            .filter(|call| **call == "start")
            .count(),
        1
    );
    assert!(ended.out.contains("RESCUE"), "{}", ended.out);
}

#[tokio::test]
async fn an_agent_that_stays_away_is_4_when_the_time_is_over() {
    let mut mock = agent(running());
    let arguments = ["server", "start", "web-1", "--wait-timeout", "2s"];
    let run = Running::start(&mock.socket(), &arguments);
    mock.until(|state| state.calls.contains(&"wait")).await;
    mock.stop();
    let ended = run.end().await.with(4);
    assert!(
        ended.err.contains("the connection to the agent broke"),
        "{}",
        ended.err
    );
}

#[tokio::test]
async fn an_operation_that_takes_too_long_is_1_and_goes_on() {
    let mock = agent(running());
    let arguments = ["server", "start", "web-1", "--wait-timeout", "100ms"];
    let ended = run(&mock.socket(), &arguments).await.with(1);
    let says = format!("{OPERATION} is still under way after 0.10 s; it goes on");
    assert!(ended.err.contains(&says), "{}", ended.err);
    assert!(!mock.state().calls.contains(&"cancel operation"));
}

#[tokio::test]
async fn each_request_has_an_id_of_its_own_unless_one_is_given() {
    let mock = agent(done());
    for _ in 0..2 {
        run(&mock.socket(), &["server", "start", "web-1"])
            .await
            .with(0);
    }
    run(
        &mock.socket(),
        &["server", "delete", "web-1", "--request-id", ID],
    )
    .await
    .with(0);
    let ids = mock.state().request_ids;
    assert_ne!(ids[0], ids[1]);
    assert_eq!(ids[2], ID);
}

#[tokio::test]
async fn ctrl_c_while_waiting_leaves_the_operation_alone_and_says_how_to_go_on() {
    let mock = agent(running());
    let mut run = Running::start(&mock.socket(), &["server", "rescue", "web-1"]);
    run.tells("[1/2]").await;
    interrupt(run.pid()).await;
    let ended = run.end().await.with(130);
    assert!(
        ended
            .err
            .contains(&format!("interrupted; {OPERATION} goes on")),
        "{}",
        ended.err
    );
    assert!(
        ended.err.contains("salvor operation cancel"),
        "{}",
        ended.err
    );
    assert!(
        ended.out.contains("pass-WORD-42"),
        "the password would be lost: {}",
        ended.out
    );
    assert!(!mock.state().calls.contains(&"cancel operation"));
}

#[tokio::test]
async fn ctrl_c_before_the_answer_names_the_request_id() {
    let mock = agent(running());
    mock.change(|state| state.hang = true);
    let run = Running::start(&mock.socket(), &["server", "start", "web-1"]);
    mock.until(|state| !state.calls.is_empty()).await;
    interrupt(run.pid()).await;
    let ended = run.end().await.with(130);
    let id = &mock.state().request_ids[0];
    assert!(
        ended.err.contains(&format!("--request-id {id}")),
        "{}",
        ended.err
    );
}

#[tokio::test]
async fn json_is_the_answer_with_the_operation_as_it_ended() {
    let mock = agent(running());
    let mut run = Running::start(&mock.socket(), &["server", "rescue", "web-1", "-o", "json"]);
    run.tells("[1/2]").await;
    mock.change(|state| state.operation = done());
    let json = run.end().await.with(0).json();
    assert_eq!(json["admin_pass"], "pass-WORD-42");
    assert_eq!(
        json["admin_pass_delivery"][0],
        "ADMIN_PASS_DELIVERY_CONFIG_DRIVE"
    );
    let operation = &json["operation"];
    assert_eq!(operation["done"], true);
    let kind = operation["metadata"]["@type"].as_str().unwrap();
    assert!(
        kind.ends_with("/salvor.compute.v1.OperationMetadata"),
        "{kind}"
    );
    assert_eq!(
        operation["metadata"]["steps"][0]["state"],
        "STEP_STATE_DONE"
    );
    assert_eq!(operation["response"]["server"]["status"], "RESCUE");
    assert_eq!(operation["response"]["guest_stop"], "GUEST_STOP_BY_ITSELF");
}

#[tokio::test]
async fn json_of_a_failed_action_is_the_operation_with_its_error() {
    let mock = agent(failed(OperationState::Failed, 13, "no space"));
    let json = run(&mock.socket(), &["-o", "json", "server", "start", "a"])
        .await
        .with(1)
        .json();
    assert_eq!(json["name"], OPERATION);
    assert_eq!(json["error"]["message"], "no space");
    assert_eq!(json["error"]["details"], serde_json::json!([]));
}

#[tokio::test]
async fn without_waiting_the_operation_is_the_result() {
    let mock = agent(running());
    let ended = run(&mock.socket(), &["server", "start", "web-1", "--no-wait"])
        .await
        .with(0);
    assert_eq!(
        ended.out,
        format!("operation:  {OPERATION}\nserver:     {ID}\n")
    );
    let json = run(
        &mock.socket(),
        &["server", "start", "a", "--no-wait", "-o", "json"],
    )
    .await;
    assert_eq!(json.with(0).json()["name"], OPERATION);
    assert!(!mock.state().calls.contains(&"wait"));
}

#[tokio::test]
async fn quiet_writes_the_result_only() {
    let mock = agent(done());
    let warnings = vec![v1::Warning {
        name: "W".into(),
        message: "look out".into(),
    }];
    mock.change(|state| state.warnings = warnings);
    let loud = run(&mock.socket(), &["server", "rescue", "web-1"])
        .await
        .with(0);
    assert!(loud.err.contains("warning: look out (W)"), "{}", loud.err);
    let quiet = run(&mock.socket(), &["-q", "server", "rescue", "web-1"])
        .await
        .with(0);
    assert_eq!(quiet.err, "");
    assert_eq!(quiet.out, loud.out);
}

#[tokio::test]
async fn arguments_become_the_request() {
    let mock = agent(done());
    let socket = mock.socket();
    let script = mock.folder().join("repair.sh");
    std::fs::write(&script, "#!/bin/sh").unwrap();
    run(
        &socket,
        &[
            "server",
            "rescue",
            "web-1",
            "--user-data",
            script.to_str().unwrap(),
            "--image",
            "fix",
            "--mode",
            "stable",
            "--bus",
            "usb",
            "--device",
            "cdrom",
            "--disks",
            "read-only",
            "--timeout",
            "1h30m",
            "--shutdown-timeout",
            "0",
        ],
    )
    .await
    .with(0);
    run(&socket, &["server", "rescue", "web-1"]).await.with(0);
    run(
        &socket,
        &[
            "server",
            "unrescue",
            "a",
            "--overlay",
            "discard",
            "--power",
            "restore",
        ],
    )
    .await
    .with(0);
    run(
        &socket,
        &["server", "stop", "a", "--shutdown-timeout", "30s"],
    )
    .await
    .with(0);
    let state = mock.state();
    let seconds = |seconds| Some(prost_types::Duration { seconds, nanos: 0 });
    let rescue = &state.rescues[0];
    assert_eq!(rescue.image.as_deref(), Some("fix"));
    assert_eq!(rescue.user_data, b"#!/bin/sh");
    assert_eq!(rescue.mode(), v1::RescueMode::Stable);
    assert_eq!(rescue.bus(), v1::RescueBus::Usb);
    assert_eq!(rescue.device(), v1::RescueDevice::Cdrom);
    assert_eq!(rescue.disk_protection(), v1::DiskProtection::ReadOnly);
    assert_eq!(
        (rescue.timeout, rescue.shutdown_timeout),
        (seconds(5400), seconds(0))
    );
    let plain = &state.rescues[1];
    assert_eq!(
        (plain.image.clone(), plain.mode(), plain.timeout),
        (None, v1::RescueMode::Unspecified, None)
    );
    assert_eq!(
        state.unrescues[0].overlay(),
        v1::OverlayDisposition::Discard
    );
    assert_eq!(state.unrescues[0].power(), v1::UnrescuePower::Restore);
    assert_eq!(state.stops[0].shutdown_timeout, seconds(30));
}

#[tokio::test]
async fn create_sends_size_interfaces_keys_and_user_data() {
    let mock = agent(done());
    let key = mock.folder().join("me.pub");
    std::fs::write(&key, "ssh-ed25519 AAAA me\n").unwrap();
    let data = mock.folder().join("user-data");
    std::fs::write(&data, b"#cloud-config\n\xff").unwrap();
    let (key, data) = (key.to_str().unwrap(), data.to_str().unwrap());
    let named = format!("work={key}");
    let arguments = [
        "server",
        "create",
        "--name",
        "n",
        "--image",
        "i",
        "--vcpus",
        "2",
        "--memory",
        "1GiB",
        "--disk",
        "10GiB",
        "--bridge",
        "br0",
        "--network",
        "default,model=e1000",
        "--key",
        key,
        "--key",
        &named,
        "--user-data",
        data,
        "--metadata",
        "a=b=c",
        "--firmware",
        "uefi",
        "--powered-off",
        "--hostname",
        "h",
        "--machine",
        "q35",
    ];
    let ended = run(&mock.socket(), &arguments).await.with(0);
    assert!(ended.out.contains("pass-WORD-42"), "{}", ended.out);
    let request = &mock.state().creates[0];
    let size = v1::Flavor {
        vcpus: 2,
        memory_mib: 1024,
        disk_gib: 10,
    };
    assert_eq!(request.flavor, Some(size));
    assert_eq!(request.interfaces.len(), 2);
    assert_eq!(request.interfaces[1].model, "e1000");
    assert_eq!(request.public_keys["me"], "ssh-ed25519 AAAA me");
    assert_eq!(request.public_keys["work"], "ssh-ed25519 AAAA me");
    assert_eq!(request.user_data, b"#cloud-config\n\xff");
    assert_eq!(request.metadata["a"], "b=c");
    assert!(request.powered_off && request.firmware() == v1::Firmware::Uefi);

    let twice = [&arguments[..], &["--key", key]].concat();
    run(&mock.socket(), &twice).await.with(2);
    let private = mock.folder().join("id");
    std::fs::write(&private, "-----BEGIN OPENSSH PRIVATE KEY-----\n").unwrap();
    let twice = [&arguments[..], &["--key", private.to_str().unwrap()]].concat();
    run(&mock.socket(), &twice).await.with(2);
    assert_eq!(
        mock.state().creates.len(),
        1,
        "a private key must not leave the machine"
    );
}

#[tokio::test]
async fn a_plan_shows_steps_files_and_the_difference_and_is_3_if_refused() {
    let plan = v1::PlanActionResponse {
        accepted: true,
        steps: vec![v1::PlanStep {
            kind: "PowerOff".into(),
            phase: "switch".into(),
            description: "Stop the guest".into(),
            deadline: Some(prost_types::Duration {
                seconds: 90,
                nanos: 0,
            }),
        }],
        domain_diff: "--- now\n+++ then\n-<a/>\n+<b/>\n".into(),
        files: vec![v1::FileEffect {
            path: "/srv/x".into(),
            effect: "create".into(),
        }],
        changes: vec![v1::RecordEffect {
            field: "vm_state".into(),
            before: "active".into(),
            after: "rescued".into(),
        }],
        overtakes: "operations/1".into(),
        ..Default::default()
    };
    let mock = Mock::new(State {
        plan,
        ..Default::default()
    });
    let socket = mock.socket();
    let ended = run(&socket, &["plan", "rescue", "web-1", "--mode", "classic"])
        .await
        .with(0);
    assert_eq!(
        ended.out,
        "The action would be accepted.\n\
         First operations/1 would be cancelled and taken back.\n\
         \n\
         Steps:\n\
         #  PHASE   STEP      AT MOST     WHAT\n\
         1  switch  PowerOff  1 min 30 s  Stop the guest\n\
         \n\
         The record:\n\
         FIELD     NOW     THEN\n\
         vm_state  active  rescued\n\
         \n\
         Files:\n  \
           create  /srv/x\n\
         \n\
         Domain definition:\n\
         --- now\n\
         +++ then\n\
         -<a/>\n\
         +<b/>\n"
    );
    let Some(Action::Rescue(request)) = mock.state().plans[0].action.clone() else {
        panic!()
    };
    assert_eq!(request.mode(), v1::RescueMode::Classic);

    mock.change(|state| {
        state.plan.accepted = false;
        let message = "it is RESCUED already".into();
        state.plan.refusals.push(v1::Refusal {
            reason: "INVALID_STATE".into(),
            message,
        });
    });
    let ended = run(&socket, &["plan", "start", "web-1"]).await.with(3);
    assert!(
        ended
            .out
            .contains("would be refused:\n  INVALID_STATE: it is RESCUED already\n")
    );
    let ended = run(&socket, &["plan", "stop", "web-1", "-o", "json"])
        .await
        .with(3);
    assert_eq!(ended.json()["accepted"], false);
    let plain = [
        "adopt",
        "release",
        "delete",
        "unrescue",
        "reboot",
        "pause",
        "unpause",
        "suspend",
        "resume",
        "crash-dump",
        "set-password",
    ];
    for verb in plain {
        run(&socket, &["plan", verb, "web-1"]).await.with(3);
    }
    run(&socket, &["plan", "create", "--name", "a", "--image", "b"])
        .await
        .with(3);
    assert_eq!(mock.state().plans.len(), plain.len() + 4);
}

#[tokio::test]
async fn on_a_terminal_the_steps_are_drawn_and_the_result_follows() {
    let mock = agent(done());
    // script(1) gives the program a terminal.
    let command = format!("{} server start web-1", env!("CARGO_BIN_EXE_salvor"));
    let output = Command::new("script")
        .args(["-qec", &command, "/dev/null"])
        .env("SALVOR_SOCKET", mock.socket())
        .env("TERM", "xterm")
        .env("NO_COLOR", "1")
        .output()
        .await
        .unwrap();
    let drawn = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{drawn}");
    assert!(
        drawn.contains("✓  1/2 do CreateOverlay  done in 2 s"),
        "{drawn:?}"
    );
    assert!(drawn.contains("RESCUE"), "{drawn:?}");
}

#[tokio::test]
async fn cancelling_waits_for_the_end_and_is_0_only_if_it_was_cancelled() {
    let mock = agent(running());
    let id = OPERATION.trim_start_matches("operations/");
    let run1 = Running::start(&mock.socket(), &["operation", "cancel", id]);
    mock.until(|state| state.calls.contains(&"wait")).await;
    mock.change(|state| state.operation = failed(OperationState::Cancelled, 1, "cancelled"));
    let ended = run1.end().await.with(0);
    assert!(
        ended.out.contains("state:      CANCELLED\n"),
        "{}",
        ended.out
    );
    mock.change(|state| state.operation = done());
    let ended = run(&mock.socket(), &["operation", "cancel", OPERATION])
        .await
        .with(1);
    assert!(ended.err.contains("ended as asked before"), "{}", ended.err);
    run(&mock.socket(), &["operation", "wait", OPERATION])
        .await
        .with(0);
    mock.change(|state| state.operation = failed(OperationState::Failed, 13, "no space"));
    run(&mock.socket(), &["operation", "wait", OPERATION])
        .await
        .with(1);
    run(&mock.socket(), &["operation", "show", OPERATION])
        .await
        .with(0);
    run(&mock.socket(), &["operation", "show", "operations/other"])
        .await
        .with(1);
}

#[tokio::test]
async fn standard_error_that_is_closed_does_not_hinder_an_action() {
    let mock = agent(done());
    let mut child = salvor(&mock.socket(), &["server", "start", "web-1"])
        .spawn()
        .unwrap();
    drop(child.stderr.take());
    crate::run::ended(child).await.with(0);
}

#[tokio::test]
async fn every_verb_of_power_and_memory_has_a_command() {
    let mock = agent(done());
    let socket = mock.socket();
    for (words, call) in [
        (&["pause"][..], "pause"),
        (&["unpause"], "unpause"),
        (&["suspend"], "suspend"),
        (&["resume"], "resume"),
        (&["crash-dump"], "crash dump"),
        (&["crash-dump", "--to-host"], "dump memory"),
        (&["reboot"], "reboot"),
        (&["reboot", "--hard"], "reboot"),
        (
            &["reboot", "--shutdown-timeout", "5s", "--on-timeout", "fail"],
            "reboot",
        ),
        (&["stop", "--force"], "stop"),
    ] {
        let mut arguments = vec!["server"];
        arguments.extend(words);
        arguments.push("web-1");
        run(&socket, &arguments).await.with(0);
        let calls = mock.state().calls;
        let asked = calls.iter().rev().find(|name| **name != "wait");
        assert_eq!(asked, Some(&call), "{words:?}");
    }
    let seconds = |seconds| Some(prost_types::Duration { seconds, nanos: 0 });
    let state = mock.state();
    let [soft, hard, or_fail] = &state.reboots[..] else {
        panic!("{:?}", state.reboots)
    };
    assert_eq!(soft.r#type(), v1::RebootType::Soft);
    assert_eq!(soft.shutdown_timeout, seconds(120));
    assert_eq!(soft.on_timeout(), v1::RebootOnTimeout::Hard);
    assert_eq!(hard.r#type(), v1::RebootType::Hard);
    assert_eq!((hard.shutdown_timeout, hard.on_timeout), (None, 0));
    assert_eq!(or_fail.on_timeout(), v1::RebootOnTimeout::Fail);
    assert_eq!(state.stops[0].shutdown_timeout, seconds(0));
    for wrong in [
        &["server", "reboot", "a", "--hard", "--on-timeout", "fail"][..],
        &["server", "stop", "a", "--force", "--shutdown-timeout", "5s"],
    ] {
        run(&socket, wrong).await.with(2);
    }
}

#[tokio::test]
async fn a_password_that_the_agent_made_is_shown_once_and_one_that_was_given_is_not() {
    let mock = agent(done());
    let ended = run(
        &mock.socket(),
        &["server", "set-password", "web-1", "--user", "bob"],
    )
    .await
    .with(0);
    assert!(
        ended.out.contains("admin password:  pass-WORD-42\n"),
        "{}",
        ended.out
    );
    assert_eq!(mock.state().passwords[0].user, "bob");
    assert_eq!(mock.state().passwords[0].admin_pass, None);
}
