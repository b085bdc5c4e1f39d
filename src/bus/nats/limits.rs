//! Ranges of options.

use std::fmt::Debug;
use std::ops::RangeInclusive;
use std::time::Duration;

use crate::bus::BusError;

const MILLISECOND: Duration = Duration::from_millis(1);
const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// Range of waits and timeouts in this process.
pub(super) const WAIT: RangeInclusive<Duration> = Duration::from_millis(10)..=DAY;

/// Range of pauses between two attempts.
pub(super) const PAUSE: RangeInclusive<Duration> = MILLISECOND..=DAY;

/// Range of retention times of the server.
pub(super) const KEPT: RangeInclusive<Duration> = Duration::from_millis(100)..=DAY.saturating_mul(36_500);

/// Range of waits of the server.
pub(super) const SERVER_WAIT: RangeInclusive<Duration> = Duration::from_millis(10)..=DAY.saturating_mul(365);

/// Limits a redelivery wait to the maximum of the server.
pub(super) fn redelivery(wait: Duration) -> Duration {
    wait.min(*SERVER_WAIT.end())
}

/// Refuses a value outside its range.
pub(super) fn within<T: PartialOrd + Debug>(
    option: &str,
    value: &T,
    range: &RangeInclusive<T>,
) -> Result<(), BusError> {
    if range.contains(value) {
        return Ok(());
    }
    let (least, most) = (range.start(), range.end());
    Err(BusError::Incompatible {
        reason: format!("{option} is {value:?}; it must be between {least:?} and {most:?}"),
    })
}
