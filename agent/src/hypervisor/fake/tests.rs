// SPDX-License-Identifier: Apache-2.0
//! Where the fake has to behave like libvirt.
#![allow(clippy::unwrap_used, clippy::panic)]

use super::*;

const ID: Uuid = Uuid::from_u128(7);

fn xml(id: Uuid, name: &str) -> String {
    format!("<domain><name>{name}</name><uuid>{id}</uuid></domain>")
}

async fn running() -> FakeHypervisor {
    let fake = FakeHypervisor::new();
    fake.define(&xml(ID, "a")).await.unwrap();
    fake.start(ID, Boot::Resume).await.unwrap();
    fake
}

async fn power(fake: &FakeHypervisor) -> PowerState {
    fake.domain(ID).await.unwrap().unwrap().power
}

#[tokio::test]
async fn redefining_leaves_the_live_definition_alone() {
    let fake = running().await;
    let live = fake.domain_xml(ID, Definition::Live).await.unwrap();
    let other = xml(ID, "a").replace("<name>", "<!-- new --><name>");
    fake.define(&other).await.unwrap();
    let of = |which| fake.domain_xml(ID, which);
    assert_eq!(of(Definition::Live).await.unwrap(), live);
    assert_eq!(of(Definition::Inactive).await.unwrap(), other);
}

#[tokio::test]
async fn a_name_belongs_to_one_uuid() {
    let fake = running().await;
    let taken = fake.define(&xml(Uuid::from_u128(8), "a")).await;
    assert!(matches!(taken, Err(HypervisorError::Refused { .. })));
    let renamed = fake.define(&xml(ID, "b")).await;
    assert!(matches!(renamed, Err(HypervisorError::Refused { .. })));
}

#[tokio::test]
async fn an_undefined_running_domain_is_transient_and_vanishes_when_it_ends() {
    let fake = running().await;
    fake.undefine(ID).await.unwrap();
    assert!(!fake.domain(ID).await.unwrap().unwrap().persistent);
    fake.destroy(ID).await.unwrap();
    assert_eq!(fake.domain(ID).await.unwrap(), None);
    fake.destroy(ID).await.unwrap();
}

#[tokio::test]
async fn starting_twice_is_refused_and_a_managed_save_image_is_used_up() {
    let fake = running().await;
    assert!(fake.start(ID, Boot::Resume).await.is_err());
    fake.managed_save(ID);
    assert!(fake.domain(ID).await.unwrap().unwrap().managed_save);
    fake.start(ID, Boot::Resume).await.unwrap();
    let status = fake.domain(ID).await.unwrap().unwrap();
    assert!(!status.managed_save);
    assert_eq!(status.reason, "restored");
}

#[tokio::test]
async fn what_was_saved_comes_back_unless_the_boot_is_to_be_fresh() {
    let fake = running().await;
    let saved = fake.domain_xml(ID, Definition::Live).await.unwrap();
    let other = saved.replace("</uuid>", "</uuid><title>other</title>");
    for (boot, expected) in [(Boot::Resume, &saved), (Boot::Fresh, &other)] {
        fake.destroy(ID).await.unwrap();
        fake.define(&saved).await.unwrap();
        fake.start(ID, Boot::Resume).await.unwrap();
        fake.managed_save(ID);
        fake.define(&other).await.unwrap();
        fake.start(ID, boot).await.unwrap();
        let live = fake.domain_xml(ID, Definition::Live).await.unwrap();
        assert_eq!(live, *expected);
        assert!(!fake.domain(ID).await.unwrap().unwrap().managed_save);
    }
}

#[tokio::test]
async fn a_guest_that_misses_two_requests_hears_the_third() {
    let fake = running().await;
    fake.guest_misses_acpi(ID, 2);
    fake.shutdown(ID, Ask::PowerButton).await.unwrap();
    fake.shutdown(ID, Ask::PowerButton).await.unwrap();
    assert_eq!(power(&fake).await, PowerState::Running);
    fake.shutdown(ID, Ask::PowerButton).await.unwrap();
    assert_eq!(power(&fake).await, PowerState::Shutdown);
    assert!(fake.shutdown(ID, Ask::PowerButton).await.is_err());
}

#[tokio::test]
async fn a_process_that_died_stays_dead_and_the_next_one_sees_the_host() {
    let fake = running().await;
    fake.stop_within(1);
    let dying = tokio::spawn({
        let fake = fake.clone();
        async move { fake.destroy(ID).await }
    });
    fake.stopped().await;
    let next = fake.attach();
    assert_eq!(power(&next).await, PowerState::Shutdown);
    assert!(!dying.is_finished());
    dying.abort();

    next.stop_after(1);
    next.start(ID, Boot::Resume).await.unwrap();
    let dying = tokio::spawn({
        let next = next.clone();
        async move { next.destroy(ID).await }
    });
    next.stopped().await;
    dying.abort();
    assert_eq!(power(&next.attach()).await, PowerState::Running);
}

#[tokio::test]
async fn planned_failures_have_no_effect_and_lost_answers_do() {
    let fake = running().await;
    let error = HypervisorError::Refused {
        call: "destroy",
        message: "no".to_owned(),
    };
    fake.fail_next("destroy", error.clone());
    assert_eq!(fake.destroy(ID).await, Err(error.clone()));
    assert_eq!(power(&fake).await, PowerState::Running);
    fake.lose_next_answer("destroy", error.clone());
    assert_eq!(fake.destroy(ID).await, Err(error));
    assert_eq!(power(&fake).await, PowerState::Shutdown);
}

#[tokio::test]
async fn while_the_link_is_down_nothing_is_known() {
    let fake = running().await;
    let mut events = fake.events();
    let down = LinkState::Down {
        reason: "socket closed".to_owned(),
    };
    fake.set_link(down.clone());
    assert!(matches!(
        fake.domain(ID).await,
        Err(HypervisorError::LinkDown { .. })
    ));
    fake.set_link(LinkState::Up);
    assert_eq!(power(&fake).await, PowerState::Running);
    assert_eq!(events.recv().await.unwrap(), HypervisorEvent::Link(down));
    let up = HypervisorEvent::Link(LinkState::Up);
    assert_eq!(events.recv().await.unwrap(), up);
    assert_eq!(events.recv().await.unwrap(), HypervisorEvent::Resync);
}

#[tokio::test]
async fn the_guest_agent_answers_only_where_one_is() {
    let fake = running().await;
    let absent = fake.ping_guest_agent(ID).await;
    assert!(matches!(absent, Err(HypervisorError::NoGuestAgent { .. })));
    fake.guest_agent(ID, true);
    let hash = CryptHash("$6$x$y".to_owned());
    fake.set_user_password(ID, "root", &hash).await.unwrap();
    assert_eq!(fake.passwords(ID), [("root".to_owned(), hash)]);
    fake.crash_guest(ID);
    assert!(fake.ping_guest_agent(ID).await.is_err());
    assert_eq!(fake.domain(ID).await.unwrap().unwrap().reason, "crashed");
}
