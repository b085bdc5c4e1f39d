//! What is between those who receive and the one who reads: bounded, and nobody waits in it for anybody.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use super::super::jetstream::Settle;
use super::{Delivery, Gap, Received, SubscriptionError};

/// How many errors are kept for whoever wants to read them; the oldest go first.
const ERRORS: usize = 256;

/// How a subscription is doing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct SubscriptionStats {
    /// How many events came from the server, those that came again included.
    pub received: u64,
    /// How many of them had come before.
    pub redelivered: u64,
    /// How many events the reader took.
    pub taken: u64,
    /// How many wait for it.
    pub waiting: usize,
    /// How many were lost or given back because it was too slow.
    pub dropped: u64,
    /// How many errors there were.
    pub errors: u64,
    /// How many of them nobody read in time.
    pub errors_lost: u64,
}

/// The queue of one subscription.
pub(super) struct Queue {
    state: Mutex<State>,
    capacity: usize,
    pull_timeout: Option<Duration>,
    eat_errors: bool,
    /// Whoever receives may receive more.
    pub(super) room: Notify,
}

struct State {
    items: VecDeque<Item>,
    reader: Option<Waker>,
    errors: VecDeque<SubscriptionError>,
    error_reader: Option<Waker>,
    stats: SubscriptionStats,
    /// How many still receive.
    receiving: usize,
    /// When the reader last took something, or was last known to be at work.
    taken_at: Instant,
    /// Nobody has read for too long: no more is asked for until somebody does.
    stalled: bool,
}

struct Item {
    received: Received,
    /// When it is to go if nobody takes it.
    due: Option<Instant>,
}

impl Queue {
    pub(super) fn new(
        capacity: usize,
        pull_timeout: Option<Duration>,
        eat_errors: bool,
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
        Self { state: Mutex::new(state), capacity, pull_timeout, eat_errors, room: Notify::new() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Whoever panicked while holding it left whole items.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many more events there is room for; none while nobody reads.
    pub(super) fn free(&self) -> usize {
        let state = self.state();
        if state.stalled { 0 } else { self.capacity.saturating_sub(state.items.len()) }
    }

    /// Takes an event in, or drops it when there is no room.
    pub(super) fn push(&self, delivery: Delivery) {
        let mut state = self.state();
        state.stats.received += 1;
        state.stats.redelivered += u64::from(delivery.attempt > 1);
        if state.items.len() >= self.capacity && delivery.settle.is_none() {
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
            // Nobody could take anything before.
            state.taken_at = Instant::now();
        }
        let due = self.pull_timeout.map(crate::time::after);
        state.items.push_back(Item { received: Received::Event(delivery), due });
        if let Some(reader) = state.reader.take() {
            reader.wake();
        }
    }

    /// Says that something may be missing here. One gap after the other is one.
    pub(super) fn gap(&self, gap: Gap) {
        let mut state = self.state();
        if !matches!(state.items.back(), Some(Item { received: Received::Gap(last), .. }) if *last == gap) {
            state.items.push_back(Item { received: Received::Gap(gap.clone()), due: None });
        }
        // Gaps without a reader are as good as one.
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
        if self.eat_errors {
            return;
        }
        if state.errors.len() >= ERRORS {
            state.errors.pop_front();
            state.stats.errors_lost += 1;
        }
        // Whatever causes errors may cause many.
        if so_far.is_power_of_two() {
            tracing::warn!(%error, so_far, "an error in a subscription to NATS");
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

    /// Takes an error out. `None` when there will be none any more.
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

    /// When the oldest event is to go.
    pub(super) fn due(&self) -> Option<Instant> {
        self.pull_timeout?;
        self.state().items.iter().find_map(|item| item.due)
    }

    /// Removes what nobody took in time. What JetStream delivered is to be given back.
    pub(super) fn expire(&self) -> Vec<Delivery> {
        let Some(timeout) = self.pull_timeout else { return Vec::new() };
        let now = Instant::now();
        let mut state = self.state();
        let mut expired = Vec::new();
        // A gap has no time of its own, and stays: there may be one in front.
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

    /// What is to be settled of that which waits here, for telling the server that it does. When nobody has read for
    /// `patience`, it is taken out, for others, and no more is asked for.
    pub(super) fn held(&self, patience: Duration) -> Held {
        let mut state = self.state();
        let settles = |item: &Item| match &item.received {
            Received::Event(delivery) => delivery.settle.clone(),
            Received::Gap(_) => None,
        };
        if state.items.is_empty() || state.taken_at.elapsed() < patience {
            return Held::Waiting(state.items.iter().filter_map(settles).collect());
        }
        state.stalled = true;
        let held: Vec<_> = state.items.iter().filter_map(settles).collect();
        state.items.retain(|item| matches!(item.received, Received::Gap(_)));
        state.stats.dropped += held.len() as u64;
        drop(state);
        if !held.is_empty() {
            self.error(SubscriptionError::Stalled { events: held.len() });
        }
        Held::Stalled(held)
    }

    /// The reader is at work, although it takes nothing.
    pub(super) fn busy(&self) {
        self.state().taken_at = Instant::now();
    }

    /// No more is asked for, and nothing of what waits will be read.
    pub(super) fn retire(&self) -> Vec<Arc<Settle>> {
        self.state().stalled = true;
        self.clear()
    }

    /// Takes everything out that nobody will read any more.
    pub(super) fn clear(&self) -> Vec<Arc<Settle>> {
        let items = std::mem::take(&mut self.state().items);
        let settles = items.into_iter().filter_map(|item| match item.received {
            Received::Event(delivery) => delivery.settle,
            Received::Gap(_) => None,
        });
        settles.collect()
    }

    /// One of those who received has ended.
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

/// What [`Queue::held`] found.
pub(super) enum Held {
    /// It waits, and that is fine.
    Waiting(Vec<Arc<Settle>>),
    /// Nobody reads; these are to be given back.
    Stalled(Vec<Arc<Settle>>),
}
