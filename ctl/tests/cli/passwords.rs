// SPDX-License-Identifier: Apache-2.0
//! The administrator's password: written once, to standard output only, and never lost unsaid.

use crate::{
    actions::{agent, interrupt},
    made::{done, running},
    run::{Running, run, run_with_input},
};

#[tokio::test]
async fn a_request_whose_answer_was_lost_is_repeated_with_the_same_id() {
    let mut mock = agent(done());
    mock.change(|state| state.hang = true);
    let run = Running::start(&mock.socket(), &["server", "rescue", "web-1"]);
    mock.until(|state| state.calls.contains(&"rescue")).await;
    mock.stop();
    // The agent remembers the request, but no password.
    mock.change(|state| {
        state.hang = false;
        state.admin_pass = String::new();
    });
    mock.start();
    let ended = run.end().await.with(0);
    let ids = mock.state().request_ids;
    assert_eq!(ids.len(), 2);
    assert_eq!(ids[0], ids[1]);
    assert!(uuid::Uuid::parse_str(&ids[0]).is_ok());
    assert!(ended.err.contains("broke; asking again"), "{}", ended.err);
    assert!(
        ended.err.contains("the password is not in this answer"),
        "{}",
        ended.err
    );
    assert!(
        ended
            .err
            .contains("hint: To set another, unrescue the server and rescue it again"),
        "{}",
        ended.err
    );
}

#[tokio::test]
async fn an_answer_that_comes_late_is_asked_for_again_with_the_same_id() {
    let mock = agent(done());
    mock.change(|state| {
        state.late = 2;
        state.admin_pass = String::new();
    });
    let ended = run(&mock.socket(), &["server", "rescue", "web-1"])
        .await
        .with(0);
    let ids = mock.state().request_ids;
    assert_eq!(ids.len(), 3);
    assert!(ids.iter().all(|id| *id == ids[0]));
    let note = "the agent has no answer yet: what was begun goes on; asking again";
    assert!(ended.err.contains(note), "{}", ended.err);
    assert!(
        ended.err.contains("nobody can tell it any more"),
        "{}",
        ended.err
    );
}

#[tokio::test]
async fn an_answer_that_never_comes_is_1_and_names_the_request_id() {
    let mock = agent(done());
    mock.change(|state| state.late = usize::MAX);
    let arguments = ["server", "rescue", "web-1", "--wait-timeout", "300ms"];
    let ended = run(&mock.socket(), &arguments).await.with(1);
    let ids = mock.state().request_ids;
    assert!(ids.len() > 1 && ids.iter().all(|id| *id == ids[0]));
    assert!(
        ended.err.contains("salvor: what was begun goes on\n"),
        "{}",
        ended.err
    );
    assert!(
        ended.err.contains(&format!("--request-id {}", ids[0])),
        "{}",
        ended.err
    );
    assert!(!ended.err.contains("Is salvord running"), "{}", ended.err);
}

#[tokio::test]
async fn ctrl_c_in_json_still_writes_the_answer_with_the_password() {
    let mock = agent(running());
    let mut run = Running::start(&mock.socket(), &["-o", "json", "server", "rescue", "web-1"]);
    run.tells("[1/2]").await;
    interrupt(run.pid()).await;
    let json = run.end().await.with(130).json();
    assert_eq!(json["admin_pass"], "pass-WORD-42");
    assert_eq!(json["operation"]["done"], false);
}

#[tokio::test]
async fn a_generated_password_is_written_once_on_standard_output_only() {
    let mock = agent(done());
    let ended = run(&mock.socket(), &["server", "rescue", "web-1"])
        .await
        .with(0);
    assert!(
        ended
            .out
            .starts_with("admin password:  pass-WORD-42\ndelivered by:    config drive\n"),
        "{}",
        ended.out
    );
    assert_eq!(ended.out.matches("pass-WORD-42").count(), 1);
    assert!(
        ended
            .out
            .contains("password by:    config drive, guest agent\n"),
        "{}",
        ended.out
    );
    assert!(!ended.err.contains("pass-WORD-42"), "{}", ended.err);
}

#[tokio::test]
async fn a_password_from_standard_input_is_sent_and_not_written() {
    let mock = agent(done());
    for input in ["s3 cret\n", "s3 cret\r\nnext line\n", "s3 cret"] {
        let arguments = ["server", "rescue", "web-1", "--admin-pass-stdin"];
        let ended = run_with_input(&mock.socket(), &arguments, input)
            .await
            .with(0);
        assert!(
            !ended.out.contains("cret") && !ended.out.contains("WORD"),
            "{}",
            ended.out
        );
    }
    for rescue in mock.state().rescues {
        assert_eq!(rescue.admin_pass.as_deref(), Some("s3 cret"));
    }
    let arguments = ["server", "rescue", "a", "--admin-pass-stdin"];
    run_with_input(&mock.socket(), &arguments, "\n")
        .await
        .with(2);
    assert_eq!(mock.state().rescues.len(), 3);
}
