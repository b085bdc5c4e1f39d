//! Times of a task on standby, and the lease that it gives back.

use std::time::Duration;

use tokio::time::Instant;

use crate::lease::HeldLease;

/// Maximum pause before the next attempt to acquire a lease that is taken or was lost.
const LEAVE_ALONE: Duration = Duration::from_millis(250);

/// Lease handling of a task that is no owner.
pub(super) struct Takeover {
    /// Earliest time of the next attempt to acquire the lease, after a lost race or a loss.
    pub(super) acquire_at: Instant,
    /// Time of the next read of the owner's checkpoint, on standby.
    pub(super) read_owner_at: Instant,
    /// The lease to release with the next step.
    pub(super) released: Option<HeldLease>,
}

impl Takeover {
    pub(super) fn new() -> Self {
        let now = Instant::now();
        Self { acquire_at: now, read_owner_at: now, released: None }
    }

    /// Leaves a lease with this time to live to other nodes for a while.
    pub(super) fn leave_alone(&mut self, ttl: Duration) {
        self.acquire_at = Instant::now() + LEAVE_ALONE.min(ttl / 6);
    }
}
