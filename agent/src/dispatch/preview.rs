// SPDX-License-Identifier: Apache-2.0
//! The dry run: what an action would do, without doing any of it.

use salvor_domain_templates::without_secrets;
use similar::TextDiff;
use uuid::Uuid;

use super::{Dispatcher, Target};
use crate::{
    core::{
        action::Action,
        caller::Who,
        effects::{Effect, effects},
        plan::{Plan, Step},
        reason::Refusal,
    },
    engine::now_ms,
};

/// What an action would do.
#[derive(Debug, Clone)]
pub struct Preview {
    /// Its plan.
    pub plan: Plan,
    /// Why it would be refused all the same: libvirt does not take the domain.
    pub refusal: Option<Refusal>,
    /// How the domain's definition would change, as a unified diff without secrets.
    pub domain_diff: String,
    /// What would change in the server's record.
    pub effects: Vec<Effect>,
    /// The operation under way that would first be cancelled, and taken back.
    pub overtakes: Option<Uuid>,
}

impl Dispatcher {
    /// Plans an action as [`Dispatcher::submit`] would, and ends there.
    ///
    /// # Errors
    /// The [`Refusal`] that submitting it would end in, if there is no plan.
    pub async fn preview(
        &self,
        target: Target,
        action: &Action,
        who: &Who,
    ) -> Result<Preview, Refusal> {
        let action = self.meant(target, action.clone());
        let server = self.admitted(target, &action, who)?;
        let plan = self.plan(target, server.as_deref(), &action, who).await?;
        let refusal = self.validate(&plan).await.err();
        let lane = server.as_ref().and_then(|server| server.operation);
        Ok(Preview {
            refusal,
            domain_diff: domain_diff(&plan),
            effects: effects(&plan, server.as_deref(), now_ms()),
            overtakes: lane.filter(|_| plan.verb.needs_lane()),
            plan,
        })
    }
}

fn domain_diff(plan: &Plan) -> String {
    let mut diff = String::new();
    for planned in &plan.steps {
        let (before, after) = match &planned.step {
            Step::DefineDomain { xml, before, .. } => {
                (before.as_deref().unwrap_or_default(), xml.as_str())
            }
            Step::UndefineDomain { before, .. } => (before.as_str(), ""),
            _ => continue,
        };
        diff.push_str(&unified(before, after));
    }
    diff
}

/// The difference of two definitions as a unified diff, without secrets. An empty one is none.
pub(super) fn unified(before: &str, after: &str) -> String {
    let (before, after) = (shown(before), shown(after));
    TextDiff::from_lines(&before, &after)
        .unified_diff()
        .context_radius(3)
        .header("before", "after")
        .to_string()
}

/// A definition as it may be shown.
#[must_use]
pub fn shown(xml: &str) -> String {
    if xml.is_empty() {
        return String::new();
    }
    match without_secrets(xml) {
        Ok(shown) => shown + "\n",
        Err(error) => format!("(not shown: {error}, so nothing in it could be masked)\n"),
    }
}

#[cfg(test)]
mod tests {
    use super::shown;

    #[test]
    fn passwords_do_not_reach_a_diff() {
        let xml = "<domain><graphics type='vnc' passwd='s3cret' port='1'/></domain>";
        assert_eq!(shown(xml), xml.replace("s3cret", "***") + "\n");
        assert_eq!(shown(""), "");
        assert!(!shown("<domain><graphics passwd='s3cret").contains("s3cret"));
    }
}
