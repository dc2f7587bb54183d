// SPDX-License-Identifier: Apache-2.0
//! Durations, sizes and times as people write and read them.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use prost_types::Timestamp;

/// Longest duration that is taken: ten years. It keeps every sum within range.
const LONGEST: u64 = 10 * 365 * 24 * 3600;

/// Why a text is no duration or size.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum UnitError {
    /// There is nothing.
    #[error("it is empty")]
    Empty,
    /// A number is missing before a unit, or it is too large.
    #[error("'{0}' does not begin with a whole number; write for instance {1}")]
    NoNumber(String, &'static str),
    /// A number without a unit.
    #[error("{0} needs a unit; write for instance {0}{1}")]
    NoUnit(u64, &'static str),
    /// A unit that does not exist.
    #[error("unknown unit '{0}'; units are {1}")]
    Unit(String, &'static str),
    /// A part that is repeated or out of order, such as `5s1h`.
    #[error("units go from large to small and each occurs once")]
    Order,
    /// More than is taken.
    #[error("it is too large")]
    TooLarge,
    /// A size between two units.
    #[error("it must be a whole number of {0}")]
    NotWhole(&'static str),
}

/// Takes the number and the unit that `text` begins with; the rest is the third value.
fn number_and_unit<'a>(
    text: &'a str,
    example: &'static str,
) -> Result<(u64, &'a str, &'a str), UnitError> {
    let end = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (digits, rest) = text.split_at(end);
    if digits.is_empty() {
        return Err(UnitError::NoNumber(text.to_owned(), example));
    }
    let number = digits.parse().map_err(|_| UnitError::TooLarge)?;
    let end = rest
        .find(|c: char| c.is_ascii_digit())
        .unwrap_or(rest.len());
    let (unit, rest) = rest.split_at(end);
    Ok((number, unit, rest))
}

/// Reads `90s`, `2h`, `1h30m`, `1d`, `500ms` or `0`.
///
/// # Errors
/// [`UnitError`], which says what to write instead.
pub(crate) fn duration(text: &str) -> Result<Duration, UnitError> {
    const UNITS: &str = "d, h, m, s and ms";
    let mut rest = text.trim();
    if rest.is_empty() {
        return Err(UnitError::Empty);
    }
    if rest == "0" {
        return Ok(Duration::ZERO);
    }
    let mut total = Duration::ZERO;
    let mut before = u64::MAX;
    while !rest.is_empty() {
        let (number, unit, after) = number_and_unit(rest, "90s, 2h or 1h30m")?;
        let milliseconds: u64 = match unit {
            "d" => 24 * 3_600_000,
            "h" => 3_600_000,
            "m" | "min" => 60_000,
            "s" => 1000,
            "ms" => 1,
            "" => return Err(UnitError::NoUnit(number, "s")),
            other => return Err(UnitError::Unit(other.to_owned(), UNITS)),
        };
        if milliseconds >= before {
            return Err(UnitError::Order);
        }
        before = milliseconds;
        let part = number
            .checked_mul(milliseconds)
            .ok_or(UnitError::TooLarge)?;
        total = total
            .checked_add(Duration::from_millis(part))
            .filter(|total| total.as_secs() <= LONGEST)
            .ok_or(UnitError::TooLarge)?;
        rest = after;
    }
    Ok(total)
}

/// Reads a size in bytes: `512M`, `512MiB`, `2g`, `1TiB`. Units are powers of 1024.
fn bytes(text: &str) -> Result<u64, UnitError> {
    const UNITS: &str = "KiB, MiB, GiB and TiB, short K, M, G and T (powers of 1024)";
    let text = text.trim();
    if text.is_empty() {
        return Err(UnitError::Empty);
    }
    let (number, unit, rest) = number_and_unit(text, "512MiB or 10GiB")?;
    if !rest.is_empty() {
        return Err(UnitError::Unit(format!("{unit}{rest}"), UNITS));
    }
    let factor: u64 = match unit.to_ascii_lowercase().as_str() {
        "k" | "kib" => 1 << 10,
        "m" | "mib" => 1 << 20,
        "g" | "gib" => 1 << 30,
        "t" | "tib" => 1 << 40,
        "" if number == 0 => 1,
        "" => return Err(UnitError::NoUnit(number, "MiB")),
        // MB and GB are left out on purpose: half of those who write them mean MiB and GiB.
        _ => return Err(UnitError::Unit(unit.to_owned(), UNITS)),
    };
    number.checked_mul(factor).ok_or(UnitError::TooLarge)
}

/// Reads a size that must be a whole number of MiB.
///
/// # Errors
/// [`UnitError`].
pub(crate) fn mebibytes(text: &str) -> Result<u64, UnitError> {
    whole(text, 20, "MiB")
}

/// Reads a size that must be a whole number of GiB.
///
/// # Errors
/// [`UnitError`].
pub(crate) fn gibibytes(text: &str) -> Result<u64, UnitError> {
    whole(text, 30, "GiB")
}

fn whole(text: &str, shift: u32, unit: &'static str) -> Result<u64, UnitError> {
    let bytes = bytes(text)?;
    if bytes.trailing_zeros() < shift && bytes != 0 {
        return Err(UnitError::NotWhole(unit));
    }
    Ok(bytes >> shift)
}

/// A size for people: `1.5 GiB`, cut to one place.
pub(crate) fn show_bytes(bytes: u64) -> String {
    let units = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut shift = 0_u32;
    let mut name = "B";
    for unit in units {
        if bytes >> shift < 1024 {
            break;
        }
        shift += 10;
        name = unit;
    }
    let whole = bytes >> shift;
    let rest = bytes - (whole << shift);
    // The rest is below 2^60, so ten times it fits.
    let tenth = (rest * 10) >> shift;
    if shift == 0 || tenth == 0 {
        format!("{whole} {name}")
    } else {
        format!("{whole}.{tenth} {name}")
    }
}

/// A duration for people, in its two largest units: `3 s`, `1 min 30 s`, `2 h`, `0.12 s`.
pub(crate) fn show_duration(duration: Duration) -> String {
    let seconds = duration.as_secs();
    if seconds < 10 {
        let hundredths = duration.subsec_millis() / 10;
        return match (seconds, hundredths) {
            (0, 0) if duration.is_zero() => "0 s".to_owned(),
            (0, 0) => "under 0.01 s".to_owned(),
            (_, 0) => format!("{seconds} s"),
            _ => format!("{seconds}.{hundredths:02} s"),
        };
    }
    let parts = [
        (seconds / 86_400, "d"),
        (seconds / 3600 % 24, "h"),
        (seconds / 60 % 60, "min"),
        (seconds % 60, "s"),
    ];
    let mut shown = parts.iter().skip_while(|(number, _)| *number == 0).take(2);
    let mut text = String::new();
    if let Some((number, unit)) = shown.next() {
        text = format!("{number} {unit}");
    }
    if let Some((number, unit)) = shown.next().filter(|(number, _)| *number != 0) {
        text.push_str(&format!(" {number} {unit}"));
    }
    text
}

/// A point in time as RFC 3339 in UTC, to the second; `-` if it is absent or out of range.
pub(crate) fn show_time(time: Option<&Timestamp>) -> String {
    match time {
        // Years 0001 to 9999, the range that protocol buffers define.
        Some(time) if (-62_135_596_800..=253_402_300_799).contains(&time.seconds) => Timestamp {
            seconds: time.seconds,
            nanos: 0,
        }
        .to_string(),
        _ => "-".to_owned(),
    }
}

/// How long ago `time` was; `None` if it is out of range. What lies ahead counts as now: clocks differ.
fn since(time: &Timestamp, now: SystemTime) -> Option<Duration> {
    let at = UNIX_EPOCH.checked_add(Duration::new(
        u64::try_from(time.seconds).ok()?,
        u32::try_from(time.nanos).ok()?,
    ))?;
    Some(now.duration_since(at).unwrap_or_default())
}

/// An age for people: `3 s ago`; `-` if the time is absent.
pub(crate) fn show_age(time: Option<&Timestamp>) -> String {
    match time.and_then(|time| since(time, SystemTime::now())) {
        Some(age) => format!("{} ago", show_duration(Duration::from_secs(age.as_secs()))),
        None => "-".to_owned(),
    }
}

/// The time from `start` to `end`; `None` if either is absent or they are in the wrong order.
pub(crate) fn between(start: Option<&Timestamp>, end: Option<&Timestamp>) -> Option<Duration> {
    let at = |time: &Timestamp| -> Option<Duration> {
        Some(Duration::new(
            u64::try_from(time.seconds).ok()?,
            u32::try_from(time.nanos).ok()?,
        ))
    };
    at(end?)?.checked_sub(at(start?)?)
}

/// A duration of the API as one of the standard library; `None` if it is negative.
pub(crate) fn from_api(duration: &prost_types::Duration) -> Option<Duration> {
    Some(Duration::new(
        u64::try_from(duration.seconds).ok()?,
        u32::try_from(duration.nanos).ok()?,
    ))
}

/// A duration as the API has it.
pub(crate) fn to_api(duration: Duration) -> prost_types::Duration {
    prost_types::Duration {
        seconds: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(duration.subsec_nanos()).unwrap_or(0),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn durations_are_read_with_their_units() {
        for (text, milliseconds) in [
            ("0", 0),
            ("0s", 0),
            ("90s", 90_000),
            ("2h", 7_200_000),
            ("1h30m", 5_400_000),
            ("1d2h3m4s5ms", 93_784_005),
            ("250ms", 250),
            (" 5min ", 300_000),
        ] {
            assert_eq!(
                duration(text).unwrap(),
                Duration::from_millis(milliseconds),
                "{text}"
            );
        }
    }

    #[test]
    fn what_is_no_duration_is_refused_with_what_to_write() {
        for text in [
            "", "s", "-5s", "1.5h", "5", "1h30", "5y", "5s1h", "1s1s", "1s 2ms",
        ] {
            assert!(duration(text).is_err(), "{text}");
        }
        assert_eq!(
            duration("30").unwrap_err().to_string(),
            "30 needs a unit; write for instance 30s"
        );
        assert_eq!(duration("99999999999999999999s"), Err(UnitError::TooLarge));
        assert_eq!(duration("18446744073709551615d"), Err(UnitError::TooLarge));
        assert_eq!(duration("4000d"), Err(UnitError::TooLarge));
    }

    #[test]
    fn sizes_are_powers_of_1024() {
        assert_eq!(mebibytes("512M"), Ok(512));
        assert_eq!(mebibytes("512MiB"), Ok(512));
        assert_eq!(mebibytes("2gib"), Ok(2048));
        assert_eq!(gibibytes("10GiB"), Ok(10));
        assert_eq!(gibibytes("1T"), Ok(1024));
        assert_eq!(gibibytes("0"), Ok(0));
        assert_eq!(mebibytes("2048K"), Ok(2));
    }

    #[test]
    fn a_size_that_is_unclear_or_not_whole_is_refused() {
        assert_eq!(gibibytes("512M"), Err(UnitError::NotWhole("GiB")));
        assert_eq!(mebibytes("1000K"), Err(UnitError::NotWhole("MiB")));
        assert_eq!(mebibytes("512"), Err(UnitError::NoUnit(512, "MiB")));
        assert!(matches!(mebibytes("512MB"), Err(UnitError::Unit(..))));
        assert!(matches!(mebibytes("1G512M"), Err(UnitError::Unit(..))));
        assert_eq!(mebibytes("99999999T"), Err(UnitError::TooLarge));
        assert!(mebibytes("").is_err());
        assert!(mebibytes("-1G").is_err());
    }

    #[test]
    fn sizes_are_shown_in_the_unit_that_fits() {
        for (bytes, shown) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (10 << 30, "10 GiB"),
            (u64::MAX, "15.9 EiB"),
        ] {
            assert_eq!(show_bytes(bytes), shown);
        }
    }

    #[test]
    fn durations_are_shown_in_their_two_largest_units() {
        for (milliseconds, shown) in [
            (0, "0 s"),
            (3, "under 0.01 s"),
            (120, "0.12 s"),
            (3000, "3 s"),
            (9_500, "9.50 s"),
            (42_900, "42 s"),
            (90_000, "1 min 30 s"),
            (7_200_000, "2 h"),
            (7_205_000, "2 h"),
            (90_061_000, "1 d 1 h"),
        ] {
            assert_eq!(show_duration(Duration::from_millis(milliseconds)), shown);
        }
    }

    #[test]
    fn times_are_utc_to_the_second() {
        let time = Timestamp {
            seconds: 1_700_000_000,
            nanos: 5,
        };
        assert_eq!(show_time(Some(&time)), "2023-11-14T22:13:20Z");
        assert_eq!(show_time(None), "-");
        assert_eq!(
            show_time(Some(&Timestamp {
                seconds: i64::MAX,
                nanos: 0
            })),
            "-"
        );
        assert_eq!(
            show_age(Some(&Timestamp {
                seconds: i64::MAX,
                nanos: -1
            })),
            "-"
        );
        let now = UNIX_EPOCH + Duration::from_secs(1_700_000_003);
        assert_eq!(since(&time, now).map(|age| age.as_secs()), Some(2));
        assert_eq!(since(&time, UNIX_EPOCH), Some(Duration::ZERO));
    }
}
