//! The bounded queue between receivers and reader. Neither side blocks the other.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use super::super::jetstream::Acker;
use super::delivery::{Delivery, Gap, Received};
use super::error::SubscriptionError;

/// Number of unread errors that are kept. The oldest are dropped first.
const ERRORS: usize = 256;

/// The counters of a subscription.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct SubscriptionStats {
    /// Number of received events, including redeliveries.
    pub received: u64,
    /// Number of redelivered events.
    pub redelivered: u64,
    /// Number of events that the reader took.
    pub taken: u64,
    /// Number of queued events.
    pub waiting: usize,
    /// Number of events lost or returned because the reader was too slow.
    pub dropped: u64,
    /// Number of errors.
    pub errors: u64,
    /// Number of errors that were dropped unread.
    pub errors_lost: u64,
}

/// The queue of one subscription.
pub(super) struct Queue {
    state: Mutex<State>,
    capacity: usize,
    pull_timeout: Option<Duration>,
    discard_errors: bool,
    /// Notifies receivers about free capacity.
    pub(super) room: Notify,
}

struct State {
    items: VecDeque<Item>,
    reader: Option<Waker>,
    errors: VecDeque<SubscriptionError>,
    error_reader: Option<Waker>,
    stats: SubscriptionStats,
    /// Number of active receivers.
    receiving: usize,
    /// Time of the reader's last take or last report of work.
    taken_at: Instant,
    /// Whether the reader is stalled. Nothing is requested until the next read.
    stalled: bool,
}

struct Item {
    received: Received,
    /// Time at which the item expires if it is not taken.
    due: Option<Instant>,
}

impl Queue {
    pub(super) fn new(
        capacity: usize,
        pull_timeout: Option<Duration>,
        discard_errors: bool,
        receiving: usize,
    ) -> Self {
        let state = State {
            items: VecDeque::new(),
            reader: None,
            errors: VecDeque::new(),
            error_reader: None,
            stats: SubscriptionStats::default(),
            receiving,
            taken_at: Instant::now(),
            stalled: false,
        };
        Self { state: Mutex::new(state), capacity, pull_timeout, discard_errors, room: Notify::new() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A panic while locked leaves complete items.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Number of events that may be received; 0 while the reader is stalled.
    pub(super) fn free(&self) -> usize {
        let state = self.state();
        if state.stalled { 0 } else { self.capacity.saturating_sub(state.items.len()) }
    }

    /// Queues an event, or drops it if the queue is full.
    pub(super) fn push(&self, delivery: Delivery) {
        let mut state = self.state();
        state.stats.received += 1;
        state.stats.redelivered += u64::from(delivery.attempt > 1);
        if state.items.len() >= self.capacity && delivery.acker.is_none() {
            state.stats.dropped += 1;
            match state.items.back_mut().map(|item| &mut item.received) {
                Some(Received::Gap(Gap::Overflow { lost })) => *lost += 1,
                _ => {
                    drop(state);
                    self.gap(Gap::Overflow { lost: 1 });
                }
            }
            return;
        }
        if state.items.is_empty() {
            // The queue was empty, so the reader could not take anything before.
            state.taken_at = Instant::now();
        }
        let due = self.pull_timeout.map(crate::time::after);
        state.items.push_back(Item { received: Received::Event(delivery), due });
        if let Some(reader) = state.reader.take() {
            reader.wake();
        }
    }

    /// Queues a gap. Consecutive gaps are merged.
    pub(super) fn gap(&self, gap: Gap) {
        let mut state = self.state();
        if !matches!(state.items.back(), Some(Item { received: Received::Gap(last), .. }) if *last == gap) {
            state.items.push_back(Item { received: Received::Gap(gap.clone()), due: None });
        }
        // Gaps without a reader in between are equivalent to one.
        if state.items.len() > self.capacity.saturating_mul(2) + 8 {
            state.items.retain(|item| matches!(item.received, Received::Event(_)));
            state.items.push_back(Item { received: Received::Gap(gap.clone()), due: None });
        }
        if let Some(reader) = state.reader.take() {
            reader.wake();
        }
        drop(state);
        self.error(SubscriptionError::Gap(gap));
    }

    pub(super) fn error(&self, error: SubscriptionError) {
        let mut state = self.state();
        state.stats.errors += 1;
        let so_far = state.stats.errors;
        if self.discard_errors {
            return;
        }
        if state.errors.len() >= ERRORS {
            state.errors.pop_front();
            state.stats.errors_lost += 1;
        }
        // A repeated cause may produce many errors.
        if so_far.is_power_of_two() {
            tracing::warn!(%error, so_far, "reporting an error of a NATS subscription");
        }
        state.errors.push_back(error);
        if let Some(reader) = state.error_reader.take() {
            reader.wake();
        }
    }

    pub(super) fn poll_next(&self, cx: &Context<'_>) -> Poll<Option<Received>> {
        let mut state = self.state();
        state.taken_at = Instant::now();
        let was_stalled = std::mem::take(&mut state.stalled);
        let Some(item) = state.items.pop_front() else {
            if was_stalled {
                self.room.notify_waiters();
            }
            if state.receiving == 0 {
                return Poll::Ready(None);
            }
            match &mut state.reader {
                Some(reader) => reader.clone_from(cx.waker()),
                reader => *reader = Some(cx.waker().clone()),
            }
            return Poll::Pending;
        };
        state.stats.taken += u64::from(matches!(item.received, Received::Event(_)));
        let left = state.items.len();
        if was_stalled || left == 0 || left == self.capacity / 2 {
            self.room.notify_waiters();
        }
        Poll::Ready(Some(item.received))
    }

    /// Takes an error; `None` after the last error.
    pub(super) fn poll_error(&self, cx: &Context<'_>) -> Poll<Option<SubscriptionError>> {
        let mut state = self.state();
        match state.errors.pop_front() {
            Some(error) => Poll::Ready(Some(error)),
            None if state.receiving == 0 => Poll::Ready(None),
            None => {
                state.error_reader = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }

    /// Expiry time of the oldest event.
    pub(super) fn due(&self) -> Option<Instant> {
        self.pull_timeout?;
        self.state().items.iter().find_map(|item| item.due)
    }

    /// Removes expired events. JetStream deliveries among them have to be returned.
    pub(super) fn expire(&self) -> Vec<Delivery> {
        let Some(timeout) = self.pull_timeout else { return Vec::new() };
        let now = Instant::now();
        let mut state = self.state();
        let mut expired = Vec::new();
        // Gaps do not expire, and a gap may precede an expired event.
        for item in std::mem::take(&mut state.items) {
            match item {
                Item { received: Received::Event(delivery), due: Some(due), .. } if due <= now => {
                    expired.push(delivery);
                }
                item => state.items.push_back(item),
            }
        }
        state.stats.dropped += expired.len() as u64;
        drop(state);
        for delivery in &expired {
            let (event, position) = (delivery.event.name.clone(), delivery.event.position);
            self.error(SubscriptionError::PullTimeout { event, position, timeout });
        }
        if !expired.is_empty() {
            self.room.notify_waiters();
        }
        expired
    }

    /// The queued JetStream deliveries, for progress reports.
    /// If the reader is stalled for `patience`, removes and returns them, and requests stop.
    pub(super) fn held(&self, patience: Duration) -> Held {
        let mut state = self.state();
        let acker_of = |item: &Item| match &item.received {
            Received::Event(delivery) => delivery.acker.clone(),
            Received::Gap(_) => None,
        };
        if state.items.is_empty() || state.taken_at.elapsed() < patience {
            return Held::Waiting(state.items.iter().filter_map(acker_of).collect());
        }
        state.stalled = true;
        let held: Vec<_> = state.items.iter().filter_map(acker_of).collect();
        state.items.retain(|item| matches!(item.received, Received::Gap(_)));
        state.stats.dropped += held.len() as u64;
        drop(state);
        if !held.is_empty() {
            self.error(SubscriptionError::Stalled { events: held.len() });
        }
        Held::Stalled(held)
    }

    /// Records that the reader is working, although it takes nothing.
    pub(super) fn busy(&self) {
        self.state().taken_at = Instant::now();
    }

    /// Stops requests, and returns the queued deliveries.
    pub(super) fn retire(&self) -> Vec<Arc<Acker>> {
        self.state().stalled = true;
        self.clear()
    }

    /// Removes the items that no reader will take.
    pub(super) fn clear(&self) -> Vec<Arc<Acker>> {
        let items = std::mem::take(&mut self.state().items);
        let ackers = items.into_iter().filter_map(|item| match item.received {
            Received::Event(delivery) => delivery.acker,
            Received::Gap(_) => None,
        });
        ackers.collect()
    }

    /// Records that a receiver has ended.
    pub(super) fn ended(&self) {
        let mut state = self.state();
        state.receiving = state.receiving.saturating_sub(1);
        for reader in [state.reader.take(), state.error_reader.take()].into_iter().flatten() {
            reader.wake();
        }
    }

    pub(super) fn stats(&self) -> SubscriptionStats {
        let state = self.state();
        let waiting = state.items.iter().filter(|item| matches!(item.received, Received::Event(_))).count();
        SubscriptionStats { waiting, ..state.stats }
    }
}

/// The result of [`Queue::held`].
pub(super) enum Held {
    /// The deliveries stay queued.
    Waiting(Vec<Arc<Acker>>),
    /// The reader is stalled: the deliveries have to be returned.
    Stalled(Vec<Arc<Acker>>),
}
