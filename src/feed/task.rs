//! The task of the feed: reads the tail of the log and fills the ring.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use tokio::sync::{Notify, broadcast, watch};
use tokio::time::{Instant, sleep, sleep_until};

use super::item::FeedItem;
use super::log_reader::{self, LogChunk};
use super::source::{Demand, Sign, Source};
use super::status::FeedStatus;
use crate::backoff::Backoff;
use crate::bus::{BusItem, EventBus, LogBatch};
use crate::event::Position;
use crate::panic::panic_text;
use crate::rate_limit::RateLimit;
use crate::store::{EventStore, StoreError};
use crate::time::after;

/// Delay of a read for a message while there is no follower.
const UNFOLLOWED: Duration = Duration::from_millis(100);

/// Announced position of a message that has none.
const UNKNOWN: Position = Position::new(u64::MAX);

/// A read that messages caused, until it is due.
struct DelayedRead {
    /// Time from which the rate limit allows it.
    allowed: Instant,
    /// Time from which it is useful without followers.
    ///
    /// Only the status shows the position then. A durable consumer reads for itself at this moment, and
    /// usually moves the mark of the store to the announced position.
    useful: Instant,
    /// Position that the messages announced.
    upto: Position,
}

impl DelayedRead {
    fn due(&self, ring: &broadcast::Sender<FeedItem>) -> Instant {
        if ring.receiver_count() == 0 { self.allowed.max(self.useful) } else { self.allowed }
    }
}

pub(super) struct FeedTask {
    pub(super) store: Arc<dyn EventStore>,
    pub(super) bus: Option<Arc<dyn EventBus>>,
    pub(super) idle_poll: Duration,
    /// Limits reads for messages after which the store has nothing new.
    pub(super) limit: RateLimit,
    /// Announces such a read to the followers.
    pub(super) reads: watch::Sender<()>,
    pub(super) demand: watch::Receiver<Demand>,
    pub(super) hints: Arc<Notify>,
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
                tracing::error!("{error}");
                self.status.send_modify(|status| status.last_error = Some(error));
                sleep(restarts.next()).await;
            }
        }
    }

    async fn run(&mut self) {
        // Subscribe before the first read, so that an append in between wakes the feed.
        let mut appended = self.store.appended();
        let mut position = self.begin().await;
        let mut source = self.subscribe(Duration::ZERO);
        let mut bus_failed = false;
        let mut poll_at = after(self.idle_poll);
        let mut delayed: Option<DelayedRead> = None;
        loop {
            let before = position;
            let mut announced = None;
            let read_at = delayed.as_ref().map(|read| read.due(&self.ring));
            tokio::select! {
                // An error means that the store is being dropped.
                Ok(()) = appended.changed() => {
                    let upto = *appended.borrow_and_update();
                    if upto > position {
                        position = self.read_on(position, Some(upto)).await;
                    }
                }
                () = sleep_until(read_at.unwrap_or(poll_at)), if read_at.is_some() => {
                    if delayed.take().is_some_and(|read| read.upto > position) {
                        position = self.read_for_a_message(position).await;
                    } else {
                        self.limit.refund();
                    }
                }
                () = sleep_until(poll_at) => {
                    poll_at = after(self.idle_poll);
                    position = match delayed {
                        None => self.repair(position).await,
                        // A message has announced what this read finds.
                        Some(_) => self.read_on(position, None).await,
                    };
                    if !bus_failed {
                        self.succeeded();
                    }
                }
                () = self.hints.notified() => announced = Some(UNKNOWN),
                sign = source.next() => match sign {
                    Ok(Sign::Subscribed(subscription)) => {
                        source = Source::Listening(subscription);
                        bus_failed = false;
                        // Read the events that were published before the subscription.
                        position = self.repair(position).await;
                        self.succeeded();
                    }
                    Ok(Sign::Item(item)) => {
                        self.bus_backoff.succeeded();
                        announced = self.announced(item).filter(|upto| *upto > position);
                    }
                    Err(error) => {
                        bus_failed = true;
                        self.failed("could not subscribe the feed to the bus", &error);
                        let pause = self.bus_backoff.next();
                        source = self.subscribe(pause);
                    }
                }
            }
            // All messages until the read share it.
            match (announced, &mut delayed) {
                (None, _) => {}
                (Some(upto), Some(read)) => read.upto = upto.max(read.upto),
                (Some(upto), None) => {
                    let read = DelayedRead { allowed: self.limit.take(), useful: after(UNFOLLOWED), upto };
                    if read.due(&self.ring) > Instant::now() {
                        delayed = Some(read);
                    } else {
                        position = self.read_for_a_message(position).await;
                    }
                }
            }
            if position > before {
                poll_at = after(self.idle_poll);
            }
        }
    }

    fn subscribe(&self, pause: Duration) -> Source {
        Source::subscribe(self.bus.clone(), self.store.info().id, self.demand.clone(), pause)
    }

    /// Returns the current end of the log; followers receive all later events.
    async fn begin(&mut self) -> Position {
        let head = self.head().await;
        // A follower that read the store before this point receives the current position.
        self.skip_to(head);
        head
    }

    /// Queries the high-water mark; retries without a limit.
    async fn head(&mut self) -> Position {
        loop {
            match self.store.high_water_mark().await {
                Ok(head) => {
                    self.store_backoff.succeeded();
                    return head;
                }
                Err(error) => self.store_failed("the feed could not read the high-water mark", &error).await,
            }
        }
    }

    /// Reads the store because of a message.
    ///
    /// A read that finds events does not count against the limit.
    async fn read_for_a_message(&mut self, position: Position) -> Position {
        self.reads.send_replace(());
        let read = self.read_on(position, None).await;
        if read > position {
            self.limit.refund();
        }
        read
    }

    /// Returns the position that an item of the bus announces.
    ///
    /// Any process may have published the item: it is only a hint.
    fn announced(&self, item: BusItem) -> Option<Position> {
        match item {
            BusItem::Upto(upto) => Some(upto),
            BusItem::Gap => {
                self.status.send_modify(|status| status.repairs += 1);
                Some(UNKNOWN)
            }
        }
    }

    /// Reads events that nothing has announced.
    async fn repair(&mut self, after: Position) -> Position {
        let position = self.read_on(after, None).await;
        if position > after {
            tracing::debug!(%after, upto = %position, "read events without a notification");
            self.status.send_modify(|status| status.repairs += 1);
        }
        position
    }

    /// Reads the store up to `upto` or the end of the log; retries without a limit.
    async fn read_on(&mut self, after: Position, upto: Option<Position>) -> Position {
        let mut position = after;
        if self.ring.receiver_count() == 0 {
            // A follower that subscribes meanwhile receives the position, which shows it the gap.
            let head = match upto {
                Some(upto) => upto,
                None => self.head().await,
            };
            if head > after {
                self.skip_to(head);
            }
            return head.max(after);
        }
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

    /// Sends the position `head` without the events before it.
    fn skip_to(&self, head: Position) {
        self.forward(LogBatch { after: head, upto: head, events: Arc::new([]) });
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
        tracing::warn!(%error, "{what}");
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
