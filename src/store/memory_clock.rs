//! The clock of the store in memory, which tests can move.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use chrono::{DateTime, TimeDelta, Utc};

/// The clock of a store in memory. Clones are handles to the same clock.
#[derive(Debug, Clone, Default)]
pub(super) struct MemoryClock {
    /// Milliseconds ahead of the machine's clock.
    ahead: Arc<AtomicI64>,
}

impl MemoryClock {
    pub(super) fn now(&self) -> DateTime<Utc> {
        let ahead = TimeDelta::try_milliseconds(self.ahead.load(Ordering::Relaxed)).unwrap_or_default();
        Utc::now().checked_add_signed(ahead).unwrap_or(DateTime::<Utc>::MAX_UTC)
    }

    #[cfg(feature = "testing")]
    pub(super) fn advance(&self, by: std::time::Duration) {
        let by = i64::try_from(by.as_millis()).unwrap_or(i64::MAX);
        // The result is the value before, which nobody needs.
        let _ = self
            .ahead
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |ahead| Some(ahead.saturating_add(by)));
    }
}
