// SPDX-License-Identifier: Apache-2.0
//! Each exit code, and what is told with it.

use std::os::unix::fs::PermissionsExt as _;

use salvor_proto::v1::OperationState;
use tonic::Code;
use tonic_types::ErrorDetails;

use crate::{
    made::{done, failed, running},
    mock::{Mock, State},
    run::{run, salvor},
};

async fn refused(code: Code, details: ErrorDetails) -> crate::run::Ended {
    let refusal = Some((code, "the agent says no".to_owned(), details));
    let mock = Mock::new(State {
        refusal,
        ..Default::default()
    });
    let ended = run(&mock.socket(), &["server", "start", "web-1"]).await;
    assert_eq!(ended.out, "");
    assert!(
        ended.err.starts_with("salvor: the agent says no\n"),
        "{}",
        ended.err
    );
    ended
}

#[tokio::test]
async fn an_action_that_ended_as_asked_is_0() {
    let mock = Mock::new(State {
        operation: done(),
        ..Default::default()
    });
    run(&mock.socket(), &["server", "start", "web-1"])
        .await
        .with(0);
}

#[tokio::test]
async fn an_operation_that_failed_is_1_whatever_its_code() {
    for code in [
        Code::Internal,
        Code::FailedPrecondition,
        Code::InvalidArgument,
        Code::Unavailable,
    ] {
        let operation = failed(OperationState::Failed, code as i32, "the disk is full");
        let mock = Mock::new(State {
            operation,
            ..Default::default()
        });
        let ended = run(&mock.socket(), &["server", "start", "web-1"])
            .await
            .with(1);
        assert_eq!(ended.out, "");
        assert!(
            ended.err.contains("salvor: the disk is full"),
            "{}",
            ended.err
        );
        assert!(
            ended.err.contains("salvor operation show operations/"),
            "{}",
            ended.err
        );
    }
}

#[tokio::test]
async fn an_invalid_argument_is_2_and_names_the_field() {
    let details = ErrorDetails::with_bad_request_violation("timeout", "must be below a year");
    let ended = refused(Code::InvalidArgument, details).await.with(2);
    assert!(
        ended
            .err
            .contains("\n  field timeout: must be below a year\n"),
        "{}",
        ended.err
    );
}

#[tokio::test]
async fn a_field_whose_rule_is_the_message_is_named_and_the_rule_said_once() {
    let details = ErrorDetails::with_bad_request_violation("overlay", "the agent says no");
    let ended = refused(Code::InvalidArgument, details).await.with(2);
    assert_eq!(ended.err, "salvor: the agent says no\n  field overlay\n");
}

#[tokio::test]
async fn arguments_that_the_program_cannot_read_are_2() {
    let mock = Mock::new(State::default());
    for arguments in [
        &["server"][..],
        &["server", "rescue"],
        &["server", "rescue", "a", "--mode", "other"],
        &["server", "rescue", "a", "--timeout", "5"],
        &["server", "start", "a", "--request-id", "no-uuid"],
        &[
            "server", "create", "--name", "a", "--image", "b", "--memory", "512MB",
        ],
        &["--socket", "tcp://host:1", "server", "list"],
        &["nonsense"],
    ] {
        let ended = run(&mock.socket(), arguments).await.with(2);
        assert!(
            ended.err.contains("error:") || ended.err.contains("Usage:"),
            "{}",
            ended.err
        );
    }
    assert!(mock.state().calls.is_empty());
}

#[tokio::test]
async fn a_refusal_by_state_is_3_and_says_which() {
    let mut details = ErrorDetails::with_precondition_failure_violation(
        "VM_STATE",
        "web-1",
        "it is RESCUED; unrescue it first",
    );
    details.set_error_info(
        "INVALID_STATE",
        "salvor",
        [
            ("state".to_owned(), "rescued".to_owned()),
            ("action".to_owned(), "start".to_owned()),
        ],
    );
    let ended = refused(Code::FailedPrecondition, details).await.with(3);
    assert_eq!(
        ended.err,
        "salvor: the agent says no\n  \
         VM_STATE of web-1: it is RESCUED; unrescue it first\n  \
         reason: INVALID_STATE (action=start, state=rescued)\n"
    );
}

#[tokio::test]
async fn a_busy_server_is_3_and_says_how_to_wait() {
    let details = ErrorDetails::with_error_info(
        "BUSY",
        "salvor",
        [("operation".to_owned(), "operations/9".to_owned())],
    );
    let ended = refused(Code::Aborted, details).await.with(3);
    assert!(
        ended.err.contains("salvor operation wait operations/9"),
        "{}",
        ended.err
    );
}

#[tokio::test]
async fn libvirt_that_is_away_is_1_and_an_agent_that_stops_is_4() {
    let info =
        |reason| ErrorDetails::with_error_info(reason, "salvor", [] as [(String, String); 0]);
    let ended = refused(Code::Unavailable, info("LIBVIRT_UNAVAILABLE"))
        .await
        .with(1);
    assert!(ended.err.contains("salvor host show"), "{}", ended.err);
    refused(Code::Unavailable, info("STOPPING")).await.with(4);
    refused(Code::Unavailable, ErrorDetails::new())
        .await
        .with(4);
}

#[tokio::test]
async fn anything_else_is_1() {
    for code in [Code::NotFound, Code::Internal, Code::ResourceExhausted] {
        refused(code, ErrorDetails::new()).await.with(1);
    }
}

#[tokio::test]
async fn no_agent_is_4_and_says_what_to_check() {
    let mut mock = Mock::new(State::default());
    let socket = mock.socket();
    mock.stop();
    let ended = run(&socket, &["server", "list"]).await.with(4);
    let shown = socket.display();
    assert!(
        ended.err.starts_with(&format!(
            "salvor: cannot reach the agent at {shown}: there is no such socket\n  hint: Is salvord running"
        )),
        "{}",
        ended.err
    );

    // A socket that a dead agent left behind.
    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    let ended = run(&socket, &["server", "start", "web-1"]).await.with(4);
    assert!(
        ended.err.contains("nobody listens on the socket"),
        "{}",
        ended.err
    );
    std::fs::remove_file(&socket).unwrap();

    // A file that is no socket.
    std::fs::write(&socket, "").unwrap();
    run(&socket, &["server", "list"]).await.with(4);
    std::fs::remove_file(&socket).unwrap();
    mock.start();
}

#[tokio::test]
async fn a_socket_of_others_is_4_and_names_the_group() {
    let mock = Mock::new(State::default());
    let socket = mock.socket();
    // Root may use every socket, so the program runs as nobody, from where nobody may read.
    let open = tempfile::TempDir::new().unwrap();
    let program = open.path().join("salvor");
    std::fs::copy(env!("CARGO_BIN_EXE_salvor"), &program).unwrap();
    for (path, mode) in [
        (open.path(), 0o755),
        (mock.folder(), 0o755),
        (&socket, 0o660),
    ] {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    }
    let is_root = std::fs::metadata(&socket)
        .map(|file| std::os::unix::fs::MetadataExt::uid(&file) == 0)
        .unwrap();
    if !is_root {
        // Another user's own socket cannot be told apart from this user's without root's help.
        std::fs::set_permissions(&socket, std::fs::Permissions::from_mode(0o000)).unwrap();
    }
    let mut command = tokio::process::Command::new(&program);
    command
        .env_clear()
        .env("SALVOR_SOCKET", &socket)
        .args(["server", "list"]);
    if is_root {
        command.uid(65534).gid(65534);
    }
    let output = command.output().await.unwrap();
    let err = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(4), "{err}");
    assert!(err.contains("you may not use the socket"), "{err}");
    assert!(err.contains("become a member"), "{err}");
    assert!(!is_root || err.contains("root and group root"), "{err}");
}

#[tokio::test]
async fn a_reader_that_has_read_enough_is_no_failure() {
    let mut mock = Mock::new(State {
        operation: running(),
        ..Default::default()
    });
    let mut child = salvor(&mock.socket(), &["server", "list"]).spawn().unwrap();
    drop(child.stdout.take());
    let ended = crate::run::ended(child).await.with(0);
    assert_eq!(ended.err, "");
    mock.stop();
}

#[tokio::test]
async fn help_and_version_are_0_and_help_names_the_exit_codes() {
    let mock = Mock::new(State::default());
    let help = run(&mock.socket(), &["--help"]).await.with(0);
    assert!(
        help.out.contains("Exit codes:") && help.out.contains("130"),
        "{}",
        help.out
    );
    let version = run(&mock.socket(), &["--version"]).await.with(0);
    assert_eq!(
        version.out,
        format!("salvor {}\n", env!("CARGO_PKG_VERSION"))
    );
}
