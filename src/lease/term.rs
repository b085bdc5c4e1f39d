//! The term of a lease: whether this node holds it right now, and since when.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::watch;
use tokio::time::Instant;

/// The time during which this process has held a lease without a break.
#[derive(Debug, Clone)]
pub(crate) struct LeaseTerm {
    since: Instant,
    until: watch::Receiver<Option<Instant>>,
}

impl LeaseTerm {
    pub(super) fn new(until: watch::Receiver<Option<Instant>>) -> Self {
        Self { since: Instant::now(), until }
    }

    /// Returns the start of the term if no other owner can have the lease yet.
    ///
    /// Compares clocks of this process only, so it is right also just after a pause of the process.
    fn held_since(&self) -> Option<Instant> {
        // The channel closes with a release.
        let held = self.until.has_changed().is_ok()
            && self.until.borrow().is_some_and(|until| Instant::now() < until);
        held.then_some(self.since)
    }
}

/// The current term of a lease with successive terms. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(crate) struct CurrentTerm(Arc<Mutex<Option<LeaseTerm>>>);

impl CurrentTerm {
    pub(crate) fn set(&self, term: LeaseTerm) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(term);
    }

    /// Returns the start of the term if this process holds the lease right now.
    pub(crate) fn held_since(&self) -> Option<Instant> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).as_ref()?.held_since()
    }
}
