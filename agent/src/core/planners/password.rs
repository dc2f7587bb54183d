// SPDX-License-Identifier: Apache-2.0
//! Change of a password in the guest, by its guest agent.

use super::{Builder, need_domain, power::need_on, read_domain};
use crate::core::{
    action::{ChangePasswordArgs, Verb},
    facts::{AgentLook, Facts},
    image::Understood,
    plan::{Outcome, Phase, Plan, Step},
    reason::{Reason, Refusal},
    record::ServerRecord,
    state::PowerState,
};

/// Has the guest agent set the password. Whether there is one that answers is known before.
pub(super) fn change(
    server: &ServerRecord,
    args: &ChangePasswordArgs,
    facts: &Facts,
) -> Result<Plan, Refusal> {
    need_on(server, "change a password of")?;
    let domain = need_domain(server, facts)?;
    if matches!(domain.power, PowerState::Paused | PowerState::Suspended) {
        return Err(Refusal::state(
            "power_state",
            domain.power.name(),
            format!(
                "cannot change a password of server {}: its guest is {} ({}), and its agent cannot answer; let it run first",
                server.id, domain.power, domain.power_reason
            ),
        ));
    }
    if !read_domain(&domain.xml)?.has_guest_agent_channel() {
        return Err(Refusal::new(
            Reason::GuestAgentUnavailable,
            format!(
                "domain {} has no channel for a guest agent; add one named org.qemu.guest_agent.0 and run qemu-guest-agent in the guest",
                domain.name
            ),
        ));
    }
    match &facts.agent {
        Some(AgentLook::Silent(why)) => {
            return Err(Refusal::new(
                Reason::GuestAgentUnavailable,
                format!(
                    "the guest agent of server {} does not answer ({why}); is qemu-guest-agent running in the guest?",
                    server.id
                ),
            ));
        }
        Some(AgentLook::GivenUp { failures, seconds }) => {
            return Err(Refusal::new(
                Reason::GuestAgentUnavailable,
                format!(
                    "the guest agent of server {} did not answer {failures} times in a row and is not asked again for {seconds} s, or until it connects anew",
                    server.id
                ),
            ));
        }
        Some(AgentLook::Answers) | None => {}
    }
    let user = match (&args.user, &facts.image) {
        (Some(user), _) => user.clone(),
        (None, Some(image)) => Understood::read(&image.record.properties)
            .map(|understood| understood.admin_user)
            .unwrap_or_else(|_| "root".to_owned()),
        (None, None) => "root".to_owned(),
    };
    let mut builder = Builder::new(Verb::ChangePassword, server.id, facts);
    builder.step(
        Phase::Switch,
        Step::SetUserPassword {
            user,
            hash: args.password.clone(),
        },
    );
    Ok(builder.ends(Outcome::Keep))
}
