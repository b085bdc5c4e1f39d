//! Counters of inputs, for the status.

use std::sync::atomic::{AtomicU64, Ordering};

use super::reaction::Consumed;

/// Numbers of inputs since the start of the node.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) reacted: AtomicU64,
    pub(super) held: AtomicU64,
    pub(super) parked: AtomicU64,
    pub(super) ignored: AtomicU64,
}

impl Counters {
    pub(super) fn count(&self, consumed: Consumed) {
        let counter = match consumed {
            Consumed::Nothing | Consumed::Duplicate | Consumed::Full => return,
            Consumed::Reacted => &self.reacted,
            Consumed::Held => &self.held,
            Consumed::Parked => &self.parked,
            Consumed::Late | Consumed::Existing | Consumed::Missing => &self.ignored,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }
}
