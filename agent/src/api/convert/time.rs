// SPDX-License-Identifier: Apache-2.0
//! Times and durations.

use std::time::Duration;

/// A time in milliseconds since the Unix epoch.
pub(in crate::api) fn timestamp(at_ms: i64) -> prost_types::Timestamp {
    prost_types::Timestamp {
        seconds: at_ms.div_euclid(1_000),
        // 0 to 999,000,000.
        nanos: i32::try_from(at_ms.rem_euclid(1_000) * 1_000_000).unwrap_or_default(),
    }
}

/// A duration.
pub(in crate::api) fn duration(duration: Duration) -> prost_types::Duration {
    prost_types::Duration {
        seconds: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        // Below 1,000,000,000.
        nanos: i32::try_from(duration.subsec_nanos()).unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_before_the_epoch_count_forward() {
        let before = timestamp(-1);
        assert_eq!((before.seconds, before.nanos), (-1, 999_000_000));
        let after = timestamp(1_500);
        assert_eq!((after.seconds, after.nanos), (1, 500_000_000));
    }

    #[test]
    fn durations_keep_their_nanoseconds() {
        let converted = duration(Duration::new(3, 7));
        assert_eq!((converted.seconds, converted.nanos), (3, 7));
    }
}
