// SPDX-License-Identifier: Apache-2.0
//! A definition that somebody changed past the agent: seen, shown, accepted, put back.

use salvor_agent::{
    core::{
        action::{Action, RebootArgs, ResetTo},
        reason::Reason,
        reconcile::Mismatch,
        state::{PowerState, VmState},
    },
    dispatch::Target,
    hypervisor::{Definition, Hypervisor as _},
};

use crate::{
    gate::until,
    host::{AT_ONCE, ON, SERVER, anonymous, unrescue},
    observe::Watched,
};

/// The definition that the hypervisor has.
async fn definition(watched: &Watched) -> String {
    let fake = &watched.host.fake;
    fake.domain_xml(SERVER, Definition::Inactive).await.unwrap()
}

/// Somebody changes it: a device more, and a password in it.
async fn edit(watched: &Watched) -> String {
    let device = "<graphics type='vnc' passwd='s3cret'/></devices>";
    let edited = definition(watched).await.replacen("</devices>", device, 1);
    watched.host.define(&edited).await;
    edited
}

fn drifted(watched: &Watched) -> bool {
    watched.agent.record().drift_since_ms.is_some()
}

async fn diff(watched: &Watched) -> String {
    let server = watched.agent.record();
    watched.agent.dispatcher.drift(&server).await.unwrap().diff
}

#[tokio::test]
async fn a_changed_definition_is_drift_until_it_is_accepted() {
    let watched = Watched::new().await;
    assert_eq!(diff(&watched).await, "");
    let edited = edit(&watched).await;
    until("it is drift", || drifted(&watched)).await;
    let shown = diff(&watched).await;
    assert!(shown.contains("+") && shown.contains("<graphics type='vnc'"));
    assert!(!shown.contains("s3cret"), "{shown}");
    watched.agent.succeed(ON, Action::AcceptDrift).await;
    assert!(!drifted(&watched));
    assert_eq!(diff(&watched).await, "");
    assert_eq!(definition(&watched).await, edited);
    // The same again is no drift any more, and a password alone is one that is not shown.
    watched.host.define(&edited).await;
    let other = edited.replace("s3cret", "0ther");
    watched.host.define(&other).await;
    until("it is drift", || drifted(&watched)).await;
    let shown = diff(&watched).await;
    assert!(shown.contains("not shown") && !shown.contains("0ther"));
    watched.end().await;
}

#[tokio::test]
async fn a_changed_definition_is_put_back_while_the_guest_runs() {
    let watched = Watched::new().await;
    let own = definition(&watched).await;
    edit(&watched).await;
    until("it is drift", || drifted(&watched)).await;
    watched.agent.succeed(ON, Action::RestoreDefinition).await;
    assert!(!drifted(&watched));
    assert_eq!(definition(&watched).await, own);
    assert_eq!(watched.agent.record().power.state, PowerState::Running);
    // Somebody who puts it back himself needs nobody.
    edit(&watched).await;
    until("it is drift", || drifted(&watched)).await;
    watched.host.define(&own).await;
    until("it is none", || !drifted(&watched)).await;
    watched.end().await;
}

#[tokio::test]
async fn a_domain_that_somebody_removed_comes_back_as_it_is_known() {
    let watched = Watched::new().await;
    let own = definition(&watched).await;
    let fake = &watched.host.fake;
    fake.destroy(SERVER).await.unwrap();
    fake.undefine(SERVER).await.unwrap();
    watched.sees(PowerState::NoState).await;
    let mismatch = || watched.agent.record().mismatch.map(|it| it.what);
    until("it is gone", || mismatch() == Some(Mismatch::Vanished)).await;
    assert!(diff(&watched).await.contains("-<domain"));
    watched.agent.succeed(ON, Action::RestoreDefinition).await;
    assert_eq!(definition(&watched).await, own);
    watched.sees(PowerState::Shutdown).await;
    watched.becomes(VmState::Stopped).await;
    assert_eq!(mismatch(), None);
    watched.agent.succeed(ON, Action::Start).await;
    watched.end().await;
}

#[tokio::test]
async fn a_domain_that_is_undefined_while_it_runs_is_shown_and_not_lost_with_its_guest() {
    let soft = Action::Reboot(RebootArgs {
        shutdown: AT_ONCE,
        or_fail: false,
    });
    for action in [
        soft,
        Action::HardReboot,
        Action::Stop(AT_ONCE),
        Action::SoftDelete,
    ] {
        let watched = Watched::with(|settings| settings.reclaim_ms = 3_600_000).await;
        let own = definition(&watched).await;
        watched.host.fake.undefine(SERVER).await.unwrap();
        until("it is drift", || drifted(&watched)).await;
        assert!(diff(&watched).await.contains("-<domain"));
        assert_eq!(watched.agent.record().vm_state, VmState::Active);
        watched.agent.succeed(ON, action.clone()).await;
        assert_eq!(definition(&watched).await, own, "{action:?}");
        if action == Action::SoftDelete {
            watched.agent.succeed(ON, Action::Restore).await;
        }
        until("it is drift no more", || !drifted(&watched)).await;
        watched.end().await;
    }
}

#[tokio::test]
async fn a_server_in_error_gets_its_definition_back_and_keeps_its_fault() {
    let watched = Watched::new().await;
    let own = definition(&watched).await;
    let reset = Action::ResetState(ResetTo::Error);
    watched.agent.succeed(ON, reset).await;
    let fault = watched.agent.record().fault.clone();
    assert!(fault.is_some());
    watched.host.fake.undefine(SERVER).await.unwrap();
    until("it is drift", || drifted(&watched)).await;
    watched.agent.succeed(ON, Action::RestoreDefinition).await;
    assert_eq!(definition(&watched).await, own);
    let record = watched.agent.record();
    assert_eq!((record.vm_state, &record.fault), (VmState::Error, &fault));
    watched.agent.succeed(ON, Action::HardReboot).await;
    assert_eq!(watched.agent.record().vm_state, VmState::Active);
    assert_eq!(watched.agent.record().fault, None);
    watched.end().await;
}

#[tokio::test]
async fn a_rescue_is_no_drift_and_does_not_hide_one() {
    let watched = Watched::new().await;
    let rescue = crate::host::rescue_action;
    watched.agent.succeed(ON, rescue()).await;
    assert_eq!(diff(&watched).await, "");
    for action in [Action::AcceptDrift, Action::RestoreDefinition] {
        let refused = watched
            .agent
            .dispatcher
            .submit(Target::Server(SERVER), action, anonymous())
            .await;
        assert_eq!(refused.unwrap_err().reason, Reason::InvalidState);
    }
    watched
        .agent
        .succeed(ON, Action::Unrescue(unrescue()))
        .await;
    assert!(!drifted(&watched));
    let edited = edit(&watched).await;
    until("it is drift", || drifted(&watched)).await;
    watched.agent.succeed(ON, rescue()).await;
    assert!(drifted(&watched));
    assert!(diff(&watched).await.contains("<graphics"));
    watched
        .agent
        .succeed(ON, Action::Unrescue(unrescue()))
        .await;
    assert_eq!(definition(&watched).await, edited);
    assert!(drifted(&watched));
    assert!(diff(&watched).await.contains("<graphics"));
    watched.end().await;
}

#[tokio::test]
async fn a_renamed_domain_has_not_drifted_and_keeps_its_name() {
    let watched = Watched::new().await;
    edit(&watched).await;
    until("it is drift", || drifted(&watched)).await;
    let fake = &watched.host.fake;
    fake.guest_powers_off(SERVER);
    watched.becomes(VmState::Stopped).await;
    fake.rename(SERVER, "renamed").unwrap();
    watched.agent.succeed(ON, Action::RestoreDefinition).await;
    assert!(definition(&watched).await.contains("<name>renamed</name>"));
    assert_eq!(diff(&watched).await, "");
    watched.end().await;
}
