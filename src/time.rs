//! Points in time, from durations that a caller may have chosen as large as they get.

use std::time::Duration;

use tokio::time::Instant;

/// As good as never, and far enough from every clock's end that the little that is added to it does not get there.
pub(crate) const FAR: Duration = Duration::from_secs(30 * 365 * 24 * 60 * 60);

/// The time in `wait` from now. `Instant + Duration` panics where this answers with thirty years.
pub(crate) fn after(wait: Duration) -> Instant {
    Instant::now() + wait.min(FAR)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_without_end_is_a_time_far_away() {
        let day = Duration::from_secs(24 * 60 * 60);
        assert!(after(Duration::MAX) + day > Instant::now() + FAR);
        let (before, tomorrow) = (Instant::now(), after(day));
        assert!((before + day..=Instant::now() + day).contains(&tomorrow));
    }
}
