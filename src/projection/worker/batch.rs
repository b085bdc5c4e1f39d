//! Adaptive sizes: the events of a read and of a transaction.

use std::time::Duration;

use crate::event::RecordedEvent;
use crate::projection::ProjectionOptions;

/// Sizes of reads and transactions, and evidence against events.
#[derive(Debug)]
pub(super) struct Batching {
    /// Number of events in a page of the store.
    pub(super) page: PageSize,
    /// Number of events in a transaction.
    pub(super) size: BatchSize,
    /// Number of transactions in a row that became unusable while one without events succeeded.
    pub(super) unusable: u32,
}

impl Batching {
    pub(super) fn new(options: &ProjectionOptions) -> Self {
        Self { page: PageSize::new(options), size: BatchSize::new(options), unusable: 0 }
    }
}

/// Initial size.
const FIRST: usize = 50;

/// Adaptive size of a batch.
///
/// It doubles after a full batch that took at most half of the target time, and halves after one
/// that took longer than the target. So slow applies hold their database for about the target time,
/// and fast applies need few commits.
#[derive(Debug)]
pub(super) struct BatchSize {
    now: usize,
    most: usize,
    target: Duration,
}

impl BatchSize {
    pub(super) fn new(options: &ProjectionOptions) -> Self {
        Self { now: FIRST.min(options.batch), most: options.batch, target: options.batch_time }
    }

    pub(super) fn get(&self) -> usize {
        self.now
    }

    /// Limits the next transaction to one event, after a commit was rejected without naming an
    /// event.
    pub(super) fn one(&mut self) {
        self.now = 1;
    }

    /// Adapts to a committed batch of so many events in that time.
    pub(super) fn took(&mut self, events: usize, time: Duration) {
        if time > self.target {
            // Half of the actual size, not of the allowed one.
            self.now = (events.min(self.now) / 2).max(1);
        } else if events >= self.now && time <= self.target / 2 {
            self.now = self.now.saturating_mul(2).min(self.most);
        }
    }
}

/// Approximate maximum size of a page in bytes: one page is applied while the next one is read.
const PAGE_BYTES: usize = 1 << 20;

/// Maximum size of a page in transactions, if every event matches.
///
/// Pages that partitions share are larger.
const BATCHES: usize = 4;

/// Adaptive size of a page.
///
/// Several transactions of small events share one round trip to the store; large events make small
/// pages.
#[derive(Debug)]
pub(super) struct PageSize {
    now: usize,
    most: usize,
}

impl PageSize {
    pub(super) fn new(options: &ProjectionOptions) -> Self {
        Self { now: options.batch, most: options.batch.saturating_mul(BATCHES) }
    }

    pub(super) fn get(&self) -> usize {
        self.now
    }

    /// Adapts to the size of the events that were read last.
    pub(super) fn saw(&mut self, events: &[RecordedEvent]) {
        let bytes: usize = events.iter().map(RecordedEvent::size).sum();
        if let Some(one) = bytes.checked_div(events.len()) {
            // Small steps up: the next events may be larger than the previous ones.
            self.now = (PAGE_BYTES / one).min(self.now.saturating_mul(2)).clamp(1, self.most);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::tests::recorded;

    #[test]
    fn a_page_has_about_a_mebibyte() {
        let mut page = PageSize::new(&ProjectionOptions::new().batch_size(500));
        assert_eq!(page.get(), 500);
        for (sizes, events) in [
            (&[10, 10][..], 1_000),
            (&[10], 2_000),
            (&[10], 2_000),
            (&[768, 768], 1_024),
            (&[], 1_024),
            (&[0, 3_584], 512),
            (&[3 << 20], 1),
            (&[10], 2),
        ] {
            page.saw(&sizes.iter().map(|size| recorded(1, *size)).collect::<Vec<_>>());
            assert_eq!(page.get(), events, "{sizes:?}");
        }
    }

    fn sizes(options: &ProjectionOptions, of_each: Duration, events: usize) -> Vec<usize> {
        let mut size = BatchSize::new(options);
        let mut sizes = Vec::new();
        let mut left = events;
        while left > 0 {
            let events = size.get().min(left);
            sizes.push(events);
            left -= events;
            size.took(events, of_each * u32::try_from(events).unwrap());
        }
        sizes
    }

    #[test]
    fn grows_while_it_is_quick_and_shrinks_when_it_is_slow() {
        let options = ProjectionOptions::new().batch_size(400).batch_time(Duration::from_millis(100));
        let [zero, one, three, slow] = [0, 1, 3, 150].map(Duration::from_millis);
        assert_eq!(sizes(&options, zero, 1_200), [50, 100, 200, 400, 400, 50]);
        // Full batches of half the time or more keep their size.
        assert_eq!(sizes(&options, one, 300), [50, 100, 100, 50]);
        assert_eq!(sizes(&options, three, 125), [50, 25, 25, 25]);
        assert_eq!(sizes(&options, slow, 100), [50, 25, 12, 6, 3, 1, 1, 1, 1]);
        // A batch that was not full and still too slow.
        let mut size = BatchSize::new(&options);
        size.took(10, slow);
        assert_eq!(size.get(), 5);
        // Never less than one; without a time limit, the size stays constant in the end.
        size.took(1, slow);
        assert_eq!(size.get(), 1);
        let fixed = ProjectionOptions::new().batch_size(100).batch_time(Duration::MAX);
        assert_eq!(sizes(&fixed, slow, 250), [50, 100, 100]);
    }
}
