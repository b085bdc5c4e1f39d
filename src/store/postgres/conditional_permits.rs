//! Limits the calls of conditional appends, so that other calls of the store find a connection.

use tokio::sync::{Semaphore, SemaphorePermit};

/// Maximum number of calls at a time that do not wait for tags.
const CALLS: usize = 6;
/// Maximum number of calls at a time that wait for tags; each holds a connection meanwhile.
const WAITING: usize = 2;

#[derive(Debug)]
pub(super) struct ConditionalPermits {
    calls: Semaphore,
    waiting: Semaphore,
}

impl Default for ConditionalPermits {
    fn default() -> Self {
        Self { calls: Semaphore::new(CALLS), waiting: Semaphore::new(WAITING) }
    }
}

impl ConditionalPermits {
    /// Waits for the permit of a call; returns nothing only if there are no permits any more.
    pub(super) async fn acquire(&self, may_wait: bool) -> Option<SemaphorePermit<'_>> {
        let permits = if may_wait { &self.waiting } else { &self.calls };
        permits.acquire().await.ok()
    }
}
