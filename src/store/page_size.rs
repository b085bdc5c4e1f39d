//! The size of a page of the log.

use std::sync::atomic::{AtomicUsize, Ordering};

use crate::event::RecordedEvent;

/// Approximate maximum size of a page in bytes; a single event may be larger.
const BYTES: usize = 4 << 20;

/// The size of recent events, which limits how many events a query requests.
#[derive(Debug, Default)]
pub(super) struct PageSizer {
    bytes_an_event: AtomicUsize,
}

impl PageSizer {
    /// Returns the number of events to request from a database, at most `limit`.
    #[cfg(any(feature = "postgres", feature = "sqlite"))]
    pub(super) fn events(&self, limit: usize) -> usize {
        (BYTES / self.bytes_an_event.load(Ordering::Relaxed).max(1)).clamp(1, limit.max(1))
    }

    /// Starts a page of at most `limit` events.
    pub(super) fn page(&self, limit: usize) -> PageBudget<'_> {
        PageBudget { page_sizer: self, events: 0, limit, bytes: 0 }
    }
}

/// The remaining budget in a page that is being filled.
pub(super) struct PageBudget<'a> {
    page_sizer: &'a PageSizer,
    events: usize,
    limit: usize,
    bytes: usize,
}

impl PageBudget<'_> {
    /// Counts an event.
    pub(super) fn take(&mut self, event: &RecordedEvent) {
        self.events += 1;
        self.bytes += event.size();
    }

    /// Returns whether the page is full.
    pub(super) fn is_full(&self) -> bool {
        self.events >= self.limit || self.bytes >= BYTES
    }

    /// Returns whether the byte limit ended the page before the event limit.
    #[cfg(feature = "postgres")]
    pub(super) fn is_cut(&self) -> bool {
        self.events < self.limit && self.is_full()
    }
}

impl Drop for PageBudget<'_> {
    fn drop(&mut self) {
        if let Some(size) = self.bytes.checked_div(self.events) {
            self.page_sizer.bytes_an_event.store(size, Ordering::Relaxed);
        }
    }
}

#[cfg(all(test, feature = "postgres"))]
mod tests {
    use super::*;
    use crate::event::tests::recorded;

    #[test]
    fn large_events_are_requested_a_few_at_a_time() {
        let page_sizer = PageSizer::default();
        assert_eq!(page_sizer.events(2_000), 2_000);
        let mut budget = page_sizer.page(2_000);
        for n in 1..=4 {
            assert!(!budget.is_full());
            budget.take(&recorded(n, 1 << 20));
        }
        assert!(budget.is_full() && budget.is_cut());
        drop(budget);
        assert_eq!(page_sizer.events(2_000), 3);
        let mut budget = page_sizer.page(3);
        for n in 1..=3 {
            budget.take(&recorded(n, 0));
        }
        assert!(budget.is_full() && !budget.is_cut());
        drop(budget);
        assert_eq!(page_sizer.events(2_000), 2_000);
        // An event larger than a page gets a page of its own.
        page_sizer.page(2_000).take(&recorded(1, 5 << 20));
        assert_eq!(page_sizer.events(2_000), 1);
        drop(page_sizer.page(2_000));
        assert_eq!(page_sizer.events(2_000), 1);
    }
}
