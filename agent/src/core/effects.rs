// SPDX-License-Identifier: Apache-2.0
//! What a plan would change in the record of its server, for a dry run: the fields that people know, before and
//! after. It knows no step; what happens on the host is told by these.

use super::{
    change::RecordChange,
    plan::{Outcome, Plan, RescueChange},
    record::ServerRecord,
    state::VmState,
};

/// A field of the record that would change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Effect {
    /// The field.
    pub field: String,
    /// Its value now; empty if it has none.
    pub before: String,
    /// Its value then.
    pub after: String,
}

/// What the plan changes in the record, if it is carried out now.
#[must_use]
pub fn effects(plan: &Plan, server: Option<&ServerRecord>, now_ms: i64) -> Vec<Effect> {
    let before = server.map(shown).unwrap_or_default();
    let after = after(plan, server, now_ms);
    let after = after.as_ref().map(shown).unwrap_or_default();
    let value = |of: &Shown, field: &str| {
        let found = of.iter().find(|(name, _)| name == field);
        found.map(|(_, value)| value.clone()).unwrap_or_default()
    };
    let mut fields: Vec<&String> = before.iter().chain(&after).map(|(name, _)| name).collect();
    let mut seen = std::collections::BTreeSet::new();
    fields.retain(|field| seen.insert(*field));
    let effects = fields.into_iter().map(|field| Effect {
        field: field.clone(),
        before: value(&before, field),
        after: value(&after, field),
    });
    effects
        .filter(|effect| effect.before != effect.after)
        .collect()
}

/// The record as the plan leaves it; `None` if it goes.
fn after(plan: &Plan, server: Option<&ServerRecord>, now_ms: i64) -> Option<ServerRecord> {
    let mut record = server.or(plan.initial.as_deref()).cloned();
    match (&plan.outcome, &mut record) {
        (Outcome::Insert(made), _) => return Some(ServerRecord::clone(made)),
        (Outcome::Remove, _) => return None,
        (Outcome::Keep, _) | (_, None) => {}
        (Outcome::Record(change), Some(record)) => change.apply(record, now_ms),
        (
            Outcome::Change {
                vm_state, rescue, ..
            },
            Some(record),
        ) => {
            record.vm_state = *vm_state;
            if *vm_state != VmState::Error {
                record.fault = None;
            }
            match rescue {
                RescueChange::Begin { rescue, .. } => {
                    record.rescue = Some(rescue.as_ref().clone());
                }
                RescueChange::End => record.rescue = None,
                RescueChange::Keep | RescueChange::Delivered(_) => {}
            }
        }
        (Outcome::SoftDelete { .. }, Some(record)) => {
            record.vm_state = VmState::SoftDeleted;
            record.fault = None;
        }
        (Outcome::Restore { vm_state, fault }, Some(record)) => {
            record.vm_state = *vm_state;
            record.fault.clone_from(fault);
        }
    }
    record
}

/// Fields with their values, in the order in which they are shown.
type Shown = Vec<(String, String)>;

fn shown(record: &ServerRecord) -> Shown {
    let text = |value: Option<&dyn std::fmt::Display>| {
        value.map_or_else(String::new, |value| value.to_string())
    };
    let lock = record.lock.as_ref().map(|lock| {
        let why = lock.reason.as_ref().map(|why| format!(": {why}"));
        format!("{}{}", lock.by, why.unwrap_or_default())
    });
    let rescue = record
        .rescue
        .as_ref()
        .map(|rescue| format!("image {}", rescue.image_id));
    let shutdown = record
        .shutdown_timeout_ms
        .map(|ms| format!("{} s", ms.div_ceil(1000)));
    let fields: [(&str, String); 12] = [
        ("name", record.name.clone()),
        ("vm_state", record.vm_state.to_string()),
        (
            "fault",
            record
                .fault
                .as_ref()
                .map(|fault| fault.message.clone())
                .unwrap_or_default(),
        ),
        ("rescue", rescue.unwrap_or_default()),
        ("lock", lock.unwrap_or_default()),
        (
            "description",
            record.description.clone().unwrap_or_default(),
        ),
        ("tags", record.tags.join(", ")),
        (
            "access_ipv4",
            text(record.access_ipv4.as_ref().map(|it| it as _)),
        ),
        (
            "access_ipv6",
            text(record.access_ipv6.as_ref().map(|it| it as _)),
        ),
        ("shutdown_timeout", shutdown.unwrap_or_default()),
        ("autostart", record.autostart.to_string()),
        (
            "autostart_order",
            text(record.autostart_order.as_ref().map(|it| it as _)),
        ),
    ];
    let metadata = record
        .metadata
        .iter()
        .map(|(key, value)| (format!("metadata.{key}"), value.clone()));
    fields
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value))
        .chain(metadata)
        .collect()
}

impl Plan {
    /// What the host shows, if the plan resets the state.
    #[must_use]
    pub fn host_report(&self) -> Option<&super::operation::HostReport> {
        match self.record_change() {
            Some(RecordChange::Reset { host, .. }) => Some(host),
            _ => None,
        }
    }
}
