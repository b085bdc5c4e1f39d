//! The limit of commands in flight to one target, and the end of their admission.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;
use uuid::Uuid;

use super::NotExecutedKind;
use crate::time::after;

/// The permits of commands in flight to one target.
#[derive(Debug)]
pub(super) struct Admission {
    permits: Arc<Semaphore>,
    /// Maximum number of commands in flight.
    limit: usize,
    /// Time that a command waits for a permit.
    timeout: Duration,
    /// Items that the limit counts, for an error.
    what: &'static str,
    /// Set at the start of a shutdown. No command is admitted afterwards.
    closing: AtomicBool,
}

impl Admission {
    pub(super) fn new(limit: usize, timeout: Duration, what: &'static str) -> Self {
        let (permits, closing) = (Arc::new(Semaphore::new(limit)), AtomicBool::new(false));
        Self { permits, limit, timeout, what, closing }
    }

    /// Acquires a permit for the command `id` within the limit of commands in flight.
    ///
    /// Waits for the timeout, or until `deadline` if that is earlier.
    pub(super) async fn admit(
        &self,
        id: Uuid,
        deadline: Instant,
    ) -> Result<OwnedSemaphorePermit, NotExecutedKind> {
        NotExecutedKind::check_id(id)?;
        if self.is_closing() {
            return Err(NotExecutedKind::ShuttingDown);
        }
        if let Ok(permit) = self.permits.clone().try_acquire_owned() {
            return Ok(permit);
        }
        let until = deadline.min(after(self.timeout));
        match tokio::time::timeout_at(until, self.permits.clone().acquire_owned()).await {
            Ok(Ok(permit)) => Ok(permit),
            Ok(Err(_closed)) => Err(NotExecutedKind::ShuttingDown),
            Err(_elapsed) => Err(NotExecutedKind::Overloaded { what: self.what.into(), limit: self.limit }),
        }
    }

    pub(super) fn in_flight(&self) -> usize {
        self.limit.saturating_sub(self.permits.available_permits())
    }

    pub(super) fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Acquire)
    }

    /// Stops admission, and waits for the commands in flight, until `deadline` at most.
    ///
    /// Returns the number of unanswered commands.
    pub(super) async fn shut_down(&self, deadline: Instant) -> usize {
        self.closing.store(true, Ordering::Release);
        // Holding all permits means that no command is in flight. Closing then rejects waiting
        // callers.
        let all = u32::try_from(self.limit).unwrap_or(u32::MAX);
        let drained = tokio::time::timeout_at(deadline, self.permits.acquire_many(all)).await;
        let unanswered = if drained.is_ok() { 0 } else { self.in_flight() };
        self.permits.close();
        unanswered
    }
}
