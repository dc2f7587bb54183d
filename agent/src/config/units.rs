// SPDX-License-Identifier: Apache-2.0
//! Durations and sizes as an operator writes them: `"90s"`, `"2h"`, `"4GiB"`.
//!
//! Owns the units and nothing else. Both directions are exact: what `show_duration` and `ByteSize` print is read back as
//! the same value.

use std::fmt;
use std::time::Duration;

use thiserror::Error;

/// Why a text is not an amount with a unit.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum UnitError {
    /// No whole number at the beginning.
    #[error("no whole number at the beginning")]
    Number,
    /// The unit is missing or not one of those allowed.
    #[error("the unit must be one of {allowed}")]
    Unit {
        /// The units that are allowed here.
        allowed: &'static str,
    },
    /// The amount does not fit 64 bits of the smallest unit.
    #[error("too large")]
    TooLarge,
}

/// Milliseconds in each unit, the largest first.
const DURATION_UNITS: [(&str, u64); 5] = [
    ("d", 86_400_000),
    ("h", 3_600_000),
    ("m", 60_000),
    ("s", 1_000),
    ("ms", 1),
];

/// Bytes in each unit, the largest first. Decimal units are left out on purpose: "GB" is read differently by different
/// people, and disks are cut in binary ones.
const SIZE_UNITS: [(&str, u64); 5] = [
    ("TiB", 1 << 40),
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("B", 1),
];

/// A size in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteSize(u64);

impl ByteSize {
    /// `count` bytes.
    #[must_use]
    pub const fn from_bytes(count: u64) -> Self {
        Self(count)
    }

    /// `count` MiB; saturates.
    #[must_use]
    pub const fn from_mib(count: u64) -> Self {
        Self(count.saturating_mul(1 << 20))
    }

    /// `count` GiB; saturates.
    #[must_use]
    pub const fn from_gib(count: u64) -> Self {
        Self(count.saturating_mul(1 << 30))
    }

    /// The size in bytes.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        self.0
    }
    /// Reads `"256MiB"`, `"64GiB"`, `"0"`.
    ///
    /// # Errors
    /// No number, an unknown unit, or too large.
    pub fn parse(text: &str) -> Result<Self, UnitError> {
        amount(text, &SIZE_UNITS, "B, KiB, MiB, GiB, TiB").map(Self)
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&show(self.0, &SIZE_UNITS))
    }
}

/// Reads `"500ms"`, `"60s"`, `"2h"`, `"30d"`, `"0"`.
///
/// # Errors
/// No number, an unknown unit, or too large.
pub(super) fn parse_duration(text: &str) -> Result<Duration, UnitError> {
    amount(text, &DURATION_UNITS, "ms, s, m, h, d").map(Duration::from_millis)
}

/// The shortest text that [`parse_duration`] reads as `duration`. Less than a millisecond is cut off.
#[must_use]
pub(super) fn show_duration(duration: Duration) -> String {
    show(
        u64::try_from(duration.as_millis()).unwrap_or(u64::MAX),
        &DURATION_UNITS,
    )
}

/// Reads a whole number and a unit. Nought needs no unit.
fn amount(text: &str, units: &[(&str, u64)], allowed: &'static str) -> Result<u64, UnitError> {
    let digits = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    if number.is_empty() {
        return Err(UnitError::Number);
    }
    let number: u64 = number.parse().map_err(|_| UnitError::TooLarge)?;
    if unit.is_empty() && number == 0 {
        return Ok(0);
    }
    let (_, factor) = units
        .iter()
        .find(|(name, _)| *name == unit)
        .ok_or(UnitError::Unit { allowed })?;
    number.checked_mul(*factor).ok_or(UnitError::TooLarge)
}

/// The amount in the largest unit that needs no fraction.
fn show(amount: u64, units: &[(&str, u64)]) -> String {
    if amount == 0 {
        return "0".to_owned();
    }
    units
        .iter()
        .find(|(_, factor)| amount.is_multiple_of(*factor))
        .map_or_else(
            || amount.to_string(),
            |(unit, factor)| format!("{}{unit}", amount / factor),
        )
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn amounts_are_read_in_their_unit() {
        for (text, millis) in [
            ("0", 0),
            ("0s", 0),
            ("500ms", 500),
            ("60s", 60_000),
            ("5m", 300_000),
            ("2h", 7_200_000),
            ("30d", 2_592_000_000),
        ] {
            assert_eq!(
                parse_duration(text),
                Ok(Duration::from_millis(millis)),
                "{text}"
            );
        }
        for (text, bytes) in [
            ("0", 0),
            ("7B", 7),
            ("1KiB", 1024),
            ("256MiB", 268_435_456),
            ("1TiB", 1 << 40),
        ] {
            assert_eq!(
                ByteSize::parse(text),
                Ok(ByteSize::from_bytes(bytes)),
                "{text}"
            );
        }
    }

    #[test]
    fn what_is_not_an_amount_is_refused() {
        for text in [
            "", "s", "-1s", "+1s", " 1s", "1 s", "1s ", "1.5h", "60", "1w", "1S", "1h30m",
        ] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
        for text in ["", "MiB", "1GB", "1gib", "1024", "1.5GiB", "1 GiB", "٣B"] {
            assert!(ByteSize::parse(text).is_err(), "{text}");
        }
        assert_eq!(
            parse_duration("99999999999999999999s"),
            Err(UnitError::TooLarge)
        );
        assert_eq!(
            parse_duration("18446744073709551615d"),
            Err(UnitError::TooLarge)
        );
        assert_eq!(ByteSize::parse("16777216TiB"), Err(UnitError::TooLarge));
    }

    proptest! {
        #[test]
        fn what_is_shown_is_read_back(amount: u64) {
            let duration = Duration::from_millis(amount);
            prop_assert_eq!(parse_duration(&show_duration(duration)).unwrap(), duration);
            let size = ByteSize::from_bytes(amount);
            prop_assert_eq!(ByteSize::parse(&size.to_string()).unwrap(), size);
        }
    }
}
