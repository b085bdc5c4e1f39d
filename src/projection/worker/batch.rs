//! How many events are read at once, and how many go into one transaction.

use std::time::Duration;

use crate::event::RecordedEvent;
use crate::projection::ProjectionOptions;

/// With how many it begins.
const FIRST: usize = 50;

/// The size of a batch: twice as large when a full one took less than half of what it may, half as large when one took longer than
/// that. So what is slow to apply holds its database for about as long as it may, and what is quick pays for few commits.
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

    /// The next transaction has one event: this one was refused at its commit, which names none.
    pub(super) fn one(&mut self) {
        self.now = 1;
    }

    /// So many were applied and committed, in that time.
    pub(super) fn took(&mut self, events: usize, time: Duration) {
        if time > self.target {
            // Of what it was, not of what it might have been.
            self.now = (events.min(self.now) / 2).max(1);
        } else if events >= self.now && time <= self.target / 2 {
            self.now = self.now.saturating_mul(2).min(self.most);
        }
    }
}

/// How much a page of the log may have, roughly: one is applied while the next one is read.
const PAGE_BYTES: usize = 1 << 20;

/// How many transactions' worth a page has at most, if nothing is passed over. Pages that partitions share are larger.
const BATCHES: usize = 4;

/// The size of a page: some transactions of small events, so that the time on the way to the store and back is shared; few of large
/// ones.
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

    /// What was read last says how large events are.
    pub(super) fn saw(&mut self, events: &[RecordedEvent]) {
        let bytes: usize = events.iter().map(RecordedEvent::size).sum();
        if let Some(one) = bytes.checked_div(events.len()) {
            // Small steps up: what comes next may be larger than what came before.
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
        // Full batches of half the time or more are left as they are.
        assert_eq!(sizes(&options, one, 300), [50, 100, 100, 50]);
        assert_eq!(sizes(&options, three, 125), [50, 25, 25, 25]);
        assert_eq!(sizes(&options, slow, 100), [50, 25, 12, 6, 3, 1, 1, 1, 1]);
        // One that was not full and still too slow.
        let mut size = BatchSize::new(&options);
        size.took(10, slow);
        assert_eq!(size.get(), 5);
        // Never less than one; a time without end is a fixed size in the end.
        size.took(1, slow);
        assert_eq!(size.get(), 1);
        let fixed = ProjectionOptions::new().batch_size(100).batch_time(Duration::MAX);
        assert_eq!(sizes(&fixed, slow, 250), [50, 100, 100]);
    }
}
