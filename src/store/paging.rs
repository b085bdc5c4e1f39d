//! How large a page of the log gets.

use std::sync::atomic::{AtomicUsize, Ordering};

use crate::event::RecordedEvent;

/// About how many bytes a page has at most, unless it has a single event.
const BYTES: usize = 4 << 20;

/// How large events were lately, so that not more are asked for than a page has room for.
#[derive(Debug, Default)]
pub(super) struct Paging {
    bytes_an_event: AtomicUsize,
}

impl Paging {
    /// How many events to ask a database for when `limit` would be welcome.
    #[cfg(any(feature = "postgres", feature = "sqlite"))]
    pub(super) fn events(&self, limit: usize) -> usize {
        (BYTES / self.bytes_an_event.load(Ordering::Relaxed).max(1)).clamp(1, limit.max(1))
    }

    /// A page of so many events.
    pub(super) fn page(&self, limit: usize) -> Room<'_> {
        Room { paging: self, events: 0, limit, bytes: 0 }
    }
}

/// The room in a page that is being filled.
pub(super) struct Room<'a> {
    paging: &'a Paging,
    events: usize,
    limit: usize,
    bytes: usize,
}

impl Room<'_> {
    /// Takes one more event.
    pub(super) fn take(&mut self, event: &RecordedEvent) {
        self.events += 1;
        self.bytes += event.size();
    }

    /// Whether there is no room for another event.
    pub(super) fn is_full(&self) -> bool {
        self.events >= self.limit || self.bytes >= BYTES
    }

    /// Whether more events were asked for than there was room for.
    #[cfg(feature = "postgres")]
    pub(super) fn is_cut(&self) -> bool {
        self.events < self.limit && self.is_full()
    }
}

impl Drop for Room<'_> {
    fn drop(&mut self) {
        if let Some(size) = self.bytes.checked_div(self.events) {
            self.paging.bytes_an_event.store(size, Ordering::Relaxed);
        }
    }
}

#[cfg(all(test, feature = "postgres"))]
mod tests {
    use super::*;
    use crate::event::tests::recorded;

    #[test]
    fn events_that_were_large_are_asked_for_a_few_at_a_time() {
        let paging = Paging::default();
        assert_eq!(paging.events(2_000), 2_000);
        let mut room = paging.page(2_000);
        for n in 1..=4 {
            assert!(!room.is_full());
            room.take(&recorded(n, 1 << 20));
        }
        assert!(room.is_full() && room.is_cut());
        drop(room);
        assert_eq!(paging.events(2_000), 3);
        let mut room = paging.page(3);
        for n in 1..=3 {
            room.take(&recorded(n, 0));
        }
        assert!(room.is_full() && !room.is_cut());
        drop(room);
        assert_eq!(paging.events(2_000), 2_000);
        // One that is larger than a page is a page.
        paging.page(2_000).take(&recorded(1, 5 << 20));
        assert_eq!(paging.events(2_000), 1);
        drop(paging.page(2_000));
        assert_eq!(paging.events(2_000), 1);
    }
}
