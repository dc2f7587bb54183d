// SPDX-License-Identifier: Apache-2.0
//! Values as words: states, ways, pairs.

use std::collections::HashMap;

use salvor_proto::v1;

use crate::units::{show_age, show_time};

/// The API's word for a value of an enum, without the enum's name; empty if it was not given.
macro_rules! word {
    ($enum:ident, $prefix:literal, $value:expr) => {
        match v1::$enum::try_from($value) {
            Ok(v1::$enum::Unspecified) => String::new(),
            Ok(value) => {
                let name = value.as_str_name();
                name.strip_prefix($prefix).unwrap_or(name).to_owned()
            }
            // A newer agent's.
            Err(_) => $value.to_string(),
        }
    };
}
pub(super) use word;

/// A power state's word.
pub(crate) fn power_word(state: i32) -> String {
    word!(PowerState, "POWER_STATE_", state)
}

/// An operation state's word.
pub(crate) fn operation_word(state: i32) -> String {
    word!(OperationState, "OPERATION_STATE_", state)
}

/// A step state's word.
pub(crate) fn step_word(state: i32) -> String {
    word!(StepState, "STEP_STATE_", state)
        .to_lowercase()
        .replace('_', " ")
}

/// The ways by which a password is delivered.
pub(crate) fn deliveries(ways: &[i32]) -> String {
    let ways: Vec<_> = ways
        .iter()
        .map(|&way| {
            word!(AdminPassDelivery, "ADMIN_PASS_DELIVERY_", way)
                .to_lowercase()
                .replace('_', " ")
        })
        .collect();
    ways.join(", ")
}

/// The power state in a table: `RUNNING`, `UNKNOWN (was RUNNING)`.
pub(super) fn power_cell(power: Option<&v1::PowerObservation>) -> String {
    let Some(power) = power else {
        return String::new();
    };
    let word = power_word(power.state);
    if power.state == i32::from(v1::PowerState::Unknown) {
        match power_word(power.last_known_state) {
            last if last.is_empty() => word,
            last => format!("{word} (was {last})"),
        }
    } else {
        word
    }
}

/// Everything about a power observation.
pub(super) fn power_line(power: &v1::PowerObservation) -> String {
    let word = power_word(power.state);
    if power.state == i32::from(v1::PowerState::Unknown) {
        let last = power_word(power.last_known_state);
        let why = if power.reason.is_empty() {
            "libvirt cannot be asked"
        } else {
            &power.reason
        };
        return if last.is_empty() {
            format!("{word} ({why}); never seen")
        } else {
            let age = show_age(power.last_known_time.as_ref());
            let time = show_time(power.last_known_time.as_ref());
            format!("{word} ({why}); last known {last}, {age} ({time})")
        };
    }
    let reason = match power.reason.strip_prefix("ioerror") {
        _ if power.reason.is_empty() => String::new(),
        // libvirt's word, and what the agent has asked besides.
        Some(disks) => format!(" (I/O error{disks})"),
        None => format!(" ({})", power.reason),
    };
    let how = match v1::ObservationSource::try_from(power.source) {
        Ok(v1::ObservationSource::Event) => ", reported by libvirt",
        Ok(v1::ObservationSource::Poll) => ", asked of libvirt",
        Ok(v1::ObservationSource::Inferred) => ", inferred",
        _ => "",
    };
    format!(
        "{word}{reason}, seen {}{how}",
        show_age(power.observe_time.as_ref())
    )
}

/// Pairs in order of their keys.
pub(super) fn pairs(map: &HashMap<String, String>) -> Vec<String> {
    let mut pairs: Vec<_> = map
        .iter()
        .map(|(key, value)| format!("{key}={value}"))
        .collect();
    pairs.sort();
    pairs
}

/// Words with blanks between them; empty ones are left out.
pub(super) fn words(words: &[&str]) -> String {
    words
        .iter()
        .filter(|word| !word.is_empty())
        .copied()
        .collect::<Vec<_>>()
        .join(" ")
}
