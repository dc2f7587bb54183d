// SPDX-License-Identifier: Apache-2.0
//! The dry run: what an action would do, without doing any of it.

use similar::TextDiff;

use super::{Dispatcher, Target};
use crate::core::{
    action::Action,
    plan::{Plan, Step},
    reason::Refusal,
};

/// What an action would do.
#[derive(Debug, Clone)]
pub struct Preview {
    /// Its plan.
    pub plan: Plan,
    /// Why it would be refused all the same: libvirt does not take the domain.
    pub refusal: Option<Refusal>,
    /// How the domain's definition would change, as a unified diff without passwords.
    pub domain_diff: String,
}

impl Dispatcher {
    /// Plans an action as [`Dispatcher::submit`] would, and ends there.
    ///
    /// # Errors
    /// The [`Refusal`] that submitting it would end in, if there is no plan.
    pub async fn preview(&self, target: Target, action: &Action) -> Result<Preview, Refusal> {
        let server = self.admitted(target, action)?;
        let plan = self.plan(target, server.as_deref(), action).await?;
        let refusal = self.validate(&plan).await.err();
        let domain_diff = domain_diff(&plan);
        Ok(Preview {
            plan,
            refusal,
            domain_diff,
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
        let (before, after) = (mask_passwords(before), mask_passwords(after));
        diff.push_str(
            &TextDiff::from_lines(&before, &after)
                .unified_diff()
                .context_radius(3)
                .header("before", "after")
                .to_string(),
        );
    }
    diff
}

/// Replaces the values of `passwd` attributes, the only place where a definition has a password in
/// clear (graphics; disk secrets are references).
fn mask_passwords(xml: &str) -> String {
    let mut masked = String::with_capacity(xml.len());
    let mut rest = xml;
    while let Some(at) = rest.find("passwd=") {
        let (head, tail) = rest.split_at(at + "passwd=".len());
        masked.push_str(head);
        let Some(quote) = tail
            .chars()
            .next()
            .filter(|quote| matches!(quote, '\'' | '"'))
        else {
            rest = tail;
            continue;
        };
        let value = tail.get(1..).unwrap_or_default();
        let end = value.find(quote).unwrap_or(value.len());
        masked.push(quote);
        masked.push_str("***");
        rest = value.get(end..).unwrap_or_default();
    }
    masked.push_str(rest);
    masked
}

#[cfg(test)]
mod tests {
    use super::mask_passwords;

    #[test]
    fn passwords_do_not_reach_a_diff() {
        let xml = r#"<graphics type='vnc' passwd='s3cret' port='1'/><graphics passwd="o'ther"/>"#;
        assert_eq!(
            mask_passwords(xml),
            r#"<graphics type='vnc' passwd='***' port='1'/><graphics passwd="***"/>"#
        );
    }

    #[test]
    fn a_definition_that_ends_within_a_password_is_masked_to_its_end() {
        assert_eq!(
            mask_passwords("<graphics passwd='s3cret"),
            "<graphics passwd='***"
        );
    }
}
