//! Detection of leases that their holders do not renew, by this process's own clock.

use std::collections::HashMap;
use std::time::Duration;

use chrono::{DateTime, Utc};
use tokio::time::Instant;

use crate::store::LeaseInfo;

/// Time at which each lease was first seen in its current state.
///
/// `expires_at` comes from a clock that may have been wrong: a lease written by a clock that was
/// ahead looks live for that much longer. A holder renews its lease several times within the TTL,
/// and each renewal changes the row. If the row stays the same for longer than the TTL, by a
/// monotonic clock, nothing renews it. A holder that was only suspended may return; it is fenced
/// (I7).
#[derive(Debug, Default)]
pub(crate) struct Renewals {
    seen: HashMap<String, (u64, DateTime<Utc>, Instant)>,
}

impl Renewals {
    /// Records the current state of the lease; returns whether it was unchanged for too long.
    pub(crate) fn is_abandoned(&mut self, info: &LeaseInfo) -> bool {
        let now = Instant::now();
        let as_now = (info.lease.epoch, info.expires_at);
        let Some((epoch, expires_at, since)) = self.seen.get_mut(&info.lease.name) else {
            self.seen.insert(info.lease.name.clone(), (as_now.0, as_now.1, now));
            return false;
        };
        if (*epoch, *expires_at) != as_now {
            (*epoch, *expires_at, *since) = (as_now.0, as_now.1, now);
            return false;
        }
        // A renewal may be in flight: allow one more renewal interval.
        let patience = info.ttl.saturating_add(info.ttl / 3).max(Duration::from_millis(100));
        info.live && now.duration_since(*since) > patience
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::store::Lease;

    #[tokio::test(start_paused = true)]
    async fn a_lease_that_is_not_renewed_for_its_ttl_is_abandoned() {
        let ttl = Duration::from_secs(6);
        let lease = Lease { name: "l".into(), owner: Uuid::nil(), epoch: 1 };
        let far = |days| Utc::now() + chrono::TimeDelta::days(days);
        let mut info = LeaseInfo { lease, expires_at: far(1), ttl, live: true };
        let mut renewals = Renewals::default();
        for step in 0..20 {
            assert!(!renewals.is_abandoned(&info), "it is renewed, although its clock is wrong");
            tokio::time::sleep(ttl / 2).await;
            info.expires_at = far(step % 3 - 1);
        }
        assert!(!renewals.is_abandoned(&info));
        tokio::time::sleep(ttl).await;
        assert!(!renewals.is_abandoned(&info));
        tokio::time::sleep(ttl / 2).await;
        assert!(renewals.is_abandoned(&info));
        // Another holder, or the same holder in time.
        info.lease.epoch += 1;
        assert!(!renewals.is_abandoned(&info));
    }
}
