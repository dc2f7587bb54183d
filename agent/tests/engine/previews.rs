// SPDX-License-Identifier: Apache-2.0
//! Before anything is done: what a dry run tells, and a guest agent that is not asked any more.

use std::sync::Arc;

use salvor_agent::{
    core::{
        action::{Action, ChangePasswordArgs, ResetTo, Verb},
        caller::Who,
        change::FieldChange,
        operation::OperationState,
        reason::{Reason, Refusal},
        state::PowerState,
    },
    engine::{NoProbe, Point},
    hypervisor::{Boot, Hypervisor as _, HypervisorError},
};

use crate::{
    dispatch::with_server,
    gate::Gate,
    host::{Host, NEW, ON, SERVER, adopt, hash},
};

/// A dry run of what touches nothing on the host says what it changes, and what would be cancelled for it.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_dry_run_tells_of_the_record_of_the_host_and_of_what_is_overtaken() {
    let host = Host::new();
    let gate = Gate::new(Verb::Pause, Point::BeforeStep(0));
    let agent = with_server(&host, Arc::clone(&gate) as _).await;
    let preview = async |action: Action| {
        let who = Who::default();
        agent.dispatcher.preview(ON, &action, &who).await.unwrap()
    };
    let name = FieldChange::Name("db".to_owned());
    let renamed = preview(Action::Update(vec![name])).await;
    let [effect] = renamed.effects.as_slice() else {
        panic!("{renamed:?}")
    };
    assert_eq!(
        (effect.field.as_str(), effect.after.as_str()),
        ("name", "db")
    );
    assert_eq!(renamed.overtakes, None);
    let pause = agent.submit(ON, Action::Pause).await.unwrap();
    gate.reached().await;
    for action in [
        Action::HardReboot,
        Action::Delete,
        Action::ResetState(ResetTo::Error),
    ] {
        let planned = preview(action.clone()).await;
        assert_eq!(planned.overtakes, Some(pause.operation.id), "{action:?}");
        let reset = matches!(action, Action::ResetState(_));
        let report = planned.plan.host_report();
        assert_eq!(
            report.map(|it| it.power),
            reset.then_some(PowerState::Running)
        );
    }
    let update = Action::Update(vec![FieldChange::Autostart(false)]);
    assert_eq!(preview(update).await.overtakes, None);
    gate.open();
    agent.ended(pause.operation.id).await;
    assert_eq!(
        agent.record().name,
        preview(Action::Delete).await.effects[0].before
    );
}

/// One that hangs in what it is asked for costs as much each time as one that does not answer a ping.
#[tokio::test]
async fn an_agent_that_answers_pings_and_hangs_in_the_change_of_a_password_is_given_up_too() {
    let host = Host::new();
    let agent = host.agent(Arc::new(NoProbe)).await;
    host.define(&host.foreign_domain(false)).await;
    host.fake.start(SERVER, Boot::Resume).await.unwrap();
    host.fake.guest_agent(SERVER, true);
    agent.succeed(NEW, adopt()).await;
    let password = || {
        Action::ChangePassword(ChangePasswordArgs {
            user: None,
            password: hash(),
        })
    };
    let given_up = |refusal: &Refusal| refusal.message.contains("3 times in a row");
    // What succeeds between is the end of the row.
    for (hangs, times) in [(true, 2), (false, 1), (true, 3)] {
        for _ in 0..times {
            if hangs {
                agent.fake.fail_next(
                    "set_user_password",
                    HypervisorError::NoGuestAgent {
                        reason: "timed out".to_owned(),
                    },
                );
            }
            let ended = agent.carry_out(ON, password()).await;
            assert_eq!(ended.state == OperationState::Failed, hangs, "{ended:?}");
        }
    }
    // It is counted a moment after the operation has ended.
    let refusal = loop {
        match agent
            .dispatcher
            .preview(ON, &password(), &Who::default())
            .await
        {
            Err(refusal) => break refusal,
            Ok(_) => tokio::task::yield_now().await,
        }
    };
    assert_eq!(refusal.reason, Reason::GuestAgentUnavailable);
    assert!(given_up(&refusal), "{refusal}");
    agent.dispatcher.agent_connected(SERVER);
    agent.succeed(ON, password()).await;
}
