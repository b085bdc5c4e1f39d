//! The task of the feed: follows the bus, reads lost events from the store, and fills the ring.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use tokio::sync::{broadcast, watch};
use tokio::time::{Instant, sleep, sleep_until};

use super::item::{FeedItem, adjacent};
use super::log_reader::{self, LogChunk};
use super::source::{Sign, Source};
use super::status::FeedStatus;
use crate::backoff::Backoff;
use crate::bus::{BusItem, BusScope, EventBus, LogBatch};
use crate::event::Position;
use crate::panic::panic_text;
use crate::rate_limit::RateLimit;
use crate::store::{EventStore, StoreError};
use crate::time::after;

pub(super) struct FeedTask {
    pub(super) store: Arc<dyn EventStore>,
    pub(super) bus: Arc<dyn EventBus>,
    pub(super) idle_poll: Duration,
    /// Limits reads for messages after which the store has nothing new.
    pub(super) reads: RateLimit,
    pub(super) ring: broadcast::Sender<FeedItem>,
    pub(super) status: watch::Sender<FeedStatus>,
    pub(super) store_backoff: Backoff,
    pub(super) bus_backoff: Backoff,
}

impl FeedTask {
    /// Runs the feed and restarts it after a panic of a bus or a store.
    ///
    /// A panic leaves a gap, which followers read from the store.
    pub(super) async fn run_for_ever(&mut self) {
        let mut restarts = Backoff::new(Duration::from_millis(100), Duration::from_secs(10));
        loop {
            if let Err(panic) = AssertUnwindSafe(self.run()).catch_unwind().await {
                let error = format!("the feed panicked: {}", panic_text(&*panic));
                tracing::error!(bus = self.bus.name(), "{error}");
                self.status.send_modify(|status| status.last_error = Some(error));
                sleep(restarts.next()).await;
            }
        }
    }

    async fn run(&mut self) {
        let store = self.store.info().id;
        let mut position = self.begin().await;
        let mut source = Source::subscribe(self.bus.clone(), store, Duration::ZERO);
        let mut poll_at = after(self.idle_poll);
        let only_wakes = self.bus.scope() == BusScope::Shared;
        let mut appended = self.store.appended();
        // Time of the delayed read that a bus message caused.
        let mut read_at: Option<Instant> = None;
        loop {
            let sign = tokio::select! {
                sign = source.next() => Some(sign),
                // Commits of this process arrive without a message. An error means that the store
                // is being dropped.
                Ok(()) = appended.changed(), if only_wakes => {
                    let upto = *appended.borrow_and_update();
                    if upto > position {
                        position = self.read_on(position, Some(upto)).await;
                        poll_at = after(self.idle_poll);
                    }
                    continue;
                }
                () = sleep_until(read_at.unwrap_or(poll_at)), if read_at.is_some() => {
                    read_at = None;
                    position = self.read_for_a_message(position, &mut poll_at).await;
                    continue;
                }
                () = sleep_until(poll_at) => None,
            };
            let before = position;
            match sign {
                Some(Ok(Sign::Subscribed(subscription))) => {
                    source = Source::Listening(subscription);
                    // Read the events that were published before the subscription.
                    position = self.repair(position, None).await;
                    self.succeeded();
                }
                Some(Ok(Sign::Item(item))) if only_wakes => {
                    self.bus_backoff.succeeded();
                    // All messages until then share one read.
                    if read_at.is_none() && self.wakes(&item, position) {
                        let due = self.reads.take();
                        if due > Instant::now() {
                            read_at = Some(due);
                        } else {
                            position = self.read_for_a_message(position, &mut poll_at).await;
                        }
                    }
                    continue;
                }
                Some(Ok(Sign::Item(item))) => {
                    self.bus_backoff.succeeded();
                    position = self.take(item, position).await;
                }
                Some(Err(error)) => {
                    self.failed("could not subscribe the feed to the bus", &error);
                    source = Source::subscribe(self.bus.clone(), store, self.bus_backoff.next());
                }
                None => {
                    poll_at = after(self.idle_poll);
                    match self.store.high_water_mark().await {
                        Ok(head) if head > position => position = self.repair(position, None).await,
                        Ok(_) if matches!(source, Source::Listening(_)) => self.succeeded(),
                        Ok(_) => {}
                        Err(error) => {
                            self.failed("the feed could not read the high-water mark", &error);
                            self.send_back(&error);
                        }
                    }
                }
            }
            if position > before {
                poll_at = after(self.idle_poll);
            }
        }
    }

    /// Returns the current end of the log; followers receive all later events.
    async fn begin(&mut self) -> Position {
        loop {
            match self.store.high_water_mark().await {
                Ok(position) => {
                    self.store_backoff.succeeded();
                    // A follower that read the store before this point receives the current
                    // position.
                    self.forward(LogBatch { after: position, upto: position, events: Arc::new([]) });
                    return position;
                }
                Err(error) => self.store_failed("the feed could not read the high-water mark", &error).await,
            }
        }
    }

    /// Reads the store because of a message.
    ///
    /// A read that finds events does not count against the limit.
    async fn read_for_a_message(&mut self, position: Position, poll_at: &mut Instant) -> Position {
        let read = self.read_on(position, None).await;
        if read > position {
            self.reads.refund();
            *poll_at = after(self.idle_poll);
        }
        read
    }

    /// Returns whether an item from a shared bus requires a read of the store.
    ///
    /// Any process may have published the item: it is only a hint.
    fn wakes(&self, item: &BusItem, position: Position) -> bool {
        match item {
            BusItem::Batch(batch) => batch.upto > position,
            BusItem::Head(head) => *head > position,
            BusItem::Gap => {
                self.status.send_modify(|status| status.repairs += 1);
                true
            }
        }
    }

    /// Forwards an item from a bus inside this process to the followers; returns the new position.
    async fn take(&mut self, item: BusItem, mut position: Position) -> Position {
        match item {
            BusItem::Batch(batch) => {
                if batch.after > position {
                    position = self.repair(position, Some(batch.after)).await;
                }
                // A batch that is still ahead belongs to another log and is not forwarded.
                if let Some(batch) = adjacent(batch, position).filter(|batch| batch.upto > position) {
                    position = batch.upto;
                    self.forward(batch);
                }
                position
            }
            BusItem::Head(head) if head <= position => position,
            BusItem::Head(_) | BusItem::Gap => self.repair(position, None).await,
        }
    }

    /// Reads the events that the bus did not deliver.
    async fn repair(&mut self, after: Position, upto: Option<Position>) -> Position {
        let position = self.read_on(after, upto).await;
        if position > after {
            tracing::debug!(bus = self.bus.name(), %after, upto = %position, "read from the store, not from the bus");
            self.status.send_modify(|status| status.repairs += 1);
        }
        position
    }

    /// Reads the store up to `upto` or the end of the log; retries without a limit.
    async fn read_on(&mut self, after: Position, upto: Option<Position>) -> Position {
        let mut position = after;
        loop {
            match log_reader::read(&*self.store, position, upto).await {
                Ok(LogChunk { batches, upto: reached, head }) => {
                    self.store_backoff.succeeded();
                    batches.into_iter().for_each(|batch| self.forward(batch));
                    let done = reached == position || reached >= upto.unwrap_or(head);
                    position = reached;
                    if done {
                        break;
                    }
                }
                Err(error) => self.store_failed("the feed could not read the log", &error).await,
            }
        }
        position
    }

    fn forward(&self, batch: LogBatch) {
        // Before the batch is sent: a follower that begins between the two steps reads the store up
        // to this position.
        self.status.send_modify(|status| status.position = Some(batch.upto));
        // An error means that there is no follower.
        let _ = self.ring.send(FeedItem::Batch(batch));
    }

    fn succeeded(&self) {
        self.status.send_if_modified(|status| status.last_error.take().is_some());
    }

    fn failed(&self, what: &str, error: &(dyn std::error::Error + Send + Sync)) {
        tracing::warn!(bus = self.bus.name(), %error, "{what}");
        self.status.send_modify(|status| status.last_error = Some(format!("{what}: {error}")));
    }

    async fn store_failed(&mut self, what: &str, error: &StoreError) {
        self.failed(what, error);
        self.send_back(error);
        sleep(self.store_backoff.next()).await;
    }

    /// Makes followers read the store themselves after a permanent error.
    ///
    /// A projection that has applied events which a failover lost must stop (I3).
    fn send_back(&self, error: &StoreError) {
        if !error.is_transient() {
            // An error means that there is no follower.
            let _ = self.ring.send(FeedItem::Failed);
        }
    }
}
