// SPDX-License-Identifier: Apache-2.0
//! What somebody changed in a server's definition: shown, accepted, put back.

use salvor_proto::v1::{self, plan_action_request::Action};
use tonic::Code;
use tonic_types::ErrorDetails;

use crate::{
    actions::agent,
    made::{ID, OPERATION, at, done, server},
    run::run,
};

fn changed() -> v1::GetServerDriftResponse {
    v1::GetServerDriftResponse {
        drifted: true,
        diff: "--- before\n+++ after\n@@ -1 +1 @@\n-  <vcpu>1</vcpu>\n+  <vcpu>2</vcpu>\n".into(),
        since: at(0),
        unknown: false,
    }
}

#[tokio::test]
async fn a_change_is_shown_with_its_time_and_its_difference() {
    let mock = agent(done());
    mock.change(|state| state.drift = changed());
    let shown = run(&mock.socket(), &["server", "drift", "web-1"]).await;
    let shown = shown.with(0);
    assert!(
        shown.out.starts_with("Changed since 2023-11-14T22:13:20Z"),
        "{}",
        shown.out
    );
    assert!(
        shown
            .out
            .ends_with("-  <vcpu>1</vcpu>\n+  <vcpu>2</vcpu>\n"),
        "{}",
        shown.out
    );
    // Seen only now.
    mock.change(|state| state.drift.since = None);
    let shown = run(&mock.socket(), &["server", "drift", "web-1"]).await;
    assert!(shown.with(0).out.starts_with("Changed:\n"));
    let state = mock.state();
    assert_eq!(state.calls, ["drift", "drift"]);
    assert_eq!(state.drifts, ["web-1", "web-1"]);
}

#[tokio::test]
async fn no_change_and_nothing_known_are_told_apart() {
    let mock = agent(done());
    let shown = run(&mock.socket(), &["server", "drift", "web-1"]).await;
    assert_eq!(shown.with(0).out, "The definition is as it is known.\n");
    mock.change(|state| state.drift.unknown = true);
    let shown = run(&mock.socket(), &["server", "drift", "web-1"]).await;
    assert!(shown.with(0).out.starts_with("Nothing is known yet"));
}

#[tokio::test]
async fn drift_in_json_is_the_agents_answer_and_nothing_else() {
    let mock = agent(done());
    mock.change(|state| state.drift = changed());
    let arguments = ["server", "drift", "web-1", "-o", "json"];
    let json = run(&mock.socket(), &arguments).await.with(0).json();
    assert_eq!(
        json,
        serde_json::json!({
            "drifted": true,
            "diff": changed().diff,
            "since": "2023-11-14T22:13:20Z",
            "unknown": false,
        })
    );
    mock.change(|state| state.drift = v1::GetServerDriftResponse::default());
    let json = run(&mock.socket(), &arguments).await.with(0).json();
    assert_eq!(
        (&json["drifted"], &json["diff"]),
        (&false.into(), &"".into())
    );

    let arguments = ["server", "drift", "web-1", "--accept", "-o", "json"];
    let json = run(&mock.socket(), &arguments).await.with(0).json();
    assert_eq!(json["name"], OPERATION);
}

#[tokio::test]
async fn a_change_is_accepted_or_put_back_and_never_both() {
    let mock = agent(done());
    for how in ["--accept", "--restore"] {
        let ended = run(&mock.socket(), &["server", "drift", "web-1", how]).await;
        ended.with(0);
    }
    let both = ["server", "drift", "web-1", "--accept", "--restore"];
    run(&mock.socket(), &both).await.with(2);
    let state = mock.state();
    let actions: Vec<_> = state
        .calls
        .iter()
        .filter(|call| call.contains("drift") || call.contains("definition"))
        .collect();
    assert_eq!(actions, [&"accept drift", &"restore definition"]);
    assert_eq!(state.drifts, ["web-1", "web-1"]);
    assert!(state.request_ids.iter().all(|id| !id.is_empty()));

    mock.change(|state| state.plan.accepted = true);
    for verb in ["accept-drift", "restore-definition"] {
        run(&mock.socket(), &["plan", verb, "web-1"]).await.with(0);
    }
    let plans = mock.state().plans.into_iter();
    let actions: Vec<_> = plans.map(|plan| plan.action.unwrap()).collect();
    assert!(
        matches!(
            actions.as_slice(),
            [Action::AcceptDrift(_), Action::RestoreDefinition(_)]
        ),
        "{actions:?}"
    );
}

#[tokio::test]
async fn a_refusal_is_told_and_ends_with_its_code() {
    let mock = agent(done());
    mock.change(|state| {
        let details = ErrorDetails::with_error_info(
            "INVALID_STATE",
            "salvor.compute",
            [] as [(String, String); 0],
        );
        let message = "cannot acceptDrift: unrescue it".to_owned();
        state.refusal = Some((Code::FailedPrecondition, message, details));
    });
    let arguments = ["server", "drift", "web-1", "--accept"];
    let ended = run(&mock.socket(), &arguments).await.with(3);
    assert!(ended.err.contains("unrescue it"), "{}", ended.err);
}

#[tokio::test]
async fn a_server_shows_that_its_definition_was_changed() {
    let mock = agent(done());
    mock.change(|state| {
        let mut server = server("web-1");
        server.drift_time = at(0);
        state.servers = vec![server];
    });
    let shown = run(&mock.socket(), &["server", "show", "web-1"]).await;
    let shown = shown.with(0).out;
    assert!(shown.contains("changed past the agent"), "{shown}");
    assert!(
        shown.contains(&format!("salvor server drift {ID}")),
        "{shown}"
    );
    let arguments = ["server", "show", "web-1", "-o", "json"];
    let json = run(&mock.socket(), &arguments).await.with(0).json();
    assert_eq!(json["drift_time"], "2023-11-14T22:13:20Z");
}
