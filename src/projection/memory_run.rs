//! Unfinished runs of in-memory projections in this process.
//!
//! A runtime that is dropped, or exceeds its shutdown timeout, cannot interrupt an `apply` that
//! blocks its thread. The next run of the same projection may share the memory with it, so it
//! waits.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, Weak};

use tokio::sync::watch;
use uuid::Uuid;

static RUNNING: Mutex<Vec<Running>> = Mutex::new(Vec::new());

static NEXT: AtomicU64 = AtomicU64::new(0);

struct Running {
    number: u64,
    store: Uuid,
    projection: String,
    stop: watch::Receiver<bool>,
    /// Dropped together with the runtime.
    alive: Weak<()>,
}

impl Running {
    /// Returns whether the run must end but its task still exists.
    fn is_ending(&self) -> bool {
        *self.stop.borrow() || self.stop.has_changed().is_err() || self.alive.strong_count() == 0
    }
}

/// A run of a projection in memory; ends on drop.
pub(super) struct MemoryRun(u64);

impl MemoryRun {
    pub(super) fn begin(store: Uuid, projection: &str, stop: watch::Receiver<bool>, alive: Weak<()>) -> Self {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        running().push(Running { number, store, projection: projection.to_owned(), stop, alive });
        Self(number)
    }

    /// Returns whether an earlier run of the same projection over the same store is still ending.
    pub(super) fn is_ending(store: Uuid, projection: &str) -> bool {
        let same = |run: &&Running| run.store == store && run.projection == projection;
        running().iter().filter(same).any(Running::is_ending)
    }
}

impl Drop for MemoryRun {
    fn drop(&mut self) {
        running().retain(|run| run.number != self.0);
    }
}

fn running() -> MutexGuard<'static, Vec<Running>> {
    // A push or a retain is complete even after a panic.
    RUNNING.lock().unwrap_or_else(PoisonError::into_inner)
}
