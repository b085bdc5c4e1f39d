//! Deadlines from durations of any size.

use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use tokio::time::Instant;

/// A wait in place of "no limit": 30 years, which every clock can represent.
pub(crate) const FAR: Duration = Duration::from_secs(30 * 365 * 24 * 60 * 60);

/// Returns the time `wait` from now, at most 30 years ahead.
///
/// `Instant + Duration` would panic instead.
pub(crate) fn after(wait: Duration) -> Instant {
    Instant::now() + wait.min(FAR)
}

/// Returns the time `wait` after `now`, at most `DateTime::<Utc>::MAX_UTC`.
pub(crate) fn later(now: DateTime<Utc>, wait: Duration) -> DateTime<Utc> {
    TimeDelta::from_std(wait)
        .ok()
        .and_then(|wait| now.checked_add_signed(wait))
        .unwrap_or(DateTime::<Utc>::MAX_UTC)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unlimited_wait_is_thirty_years() {
        let day = Duration::from_secs(24 * 60 * 60);
        assert!(after(Duration::MAX) + day > Instant::now() + FAR);
        let (before, tomorrow) = (Instant::now(), after(day));
        assert!((before + day..=Instant::now() + day).contains(&tomorrow));
    }
}
