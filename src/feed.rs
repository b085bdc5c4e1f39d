//! The feed: the live tail of the log inside one process, in order and without gaps.
//!
//! One subscription to the bus serves all followers. A bus inside the process delivers batches: the
//! feed reads lost batches from the store and drops duplicates. A bus that other processes publish
//! to only wakes the feed, which then reads the store: no message decides what followers receive.
//! Followers read from a bounded ring at their own pace and never wait for the slowest. A slow
//! follower receives `Lagged` and returns to reading the store.

mod log_reader;

use std::fmt;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use tokio::sync::broadcast::error::{RecvError, TryRecvError};
use tokio::sync::{broadcast, watch};
use tokio::time::{Instant, sleep, sleep_until};
use uuid::Uuid;

pub(crate) use self::log_reader::{LogChunk, read as read_chunk};
use crate::backoff::Backoff;
use crate::bus::{BusError, BusItem, BusScope, BusSubscription, EventBus, LogBatch};
use crate::event::Position;
use crate::invalid_option::{InvalidOption, at_least, within};
use crate::panic::panic_text;
use crate::rate_limit::RateLimit;
use crate::store::{BoxFuture, EventStore, StoreError};
use crate::supervised::Task;
use crate::time::after;

/// Options of the feed.
#[derive(Debug, Clone)]
pub struct FeedOptions {
    capacity: usize,
    idle_poll: Duration,
}

impl Default for FeedOptions {
    fn default() -> Self {
        Self { capacity: 128, idle_poll: Duration::from_secs(1) }
    }
}

impl FeedOptions {
    /// Returns the defaults.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the number of batches that a follower may lag before it has to read the store.
    ///
    /// A batch has at most 2,048 events or about 1 MiB. Rounded up to a power of two. Default: 128.
    /// Range: 1 to 65,536.
    #[must_use]
    pub fn capacity(mut self, batches: usize) -> Self {
        self.capacity = batches;
        self
    }

    /// Sets the interval at which the feed polls the store while the bus is silent.
    ///
    /// It bounds the delay of the last event if the bus lost it. Default: 1 s. Range: at least 10
    /// ms.
    #[must_use]
    pub fn idle_poll(mut self, every: Duration) -> Self {
        self.idle_poll = every;
        self
    }

    /// Checks every value against its range.
    pub(crate) fn validate(&self) -> Result<(), InvalidOption> {
        within("FeedOptions::capacity", self.capacity, 1..=65_536)?;
        at_least("FeedOptions::idle_poll", self.idle_poll, Duration::from_millis(10))
    }
}

/// Status of the feed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct FeedStatus {
    /// Position up to which followers have received the log.
    ///
    /// `None` before the first follower and the first successful read of the store.
    pub position: Option<Position>,
    /// Number of reads from the store because the bus lost an event or was late.
    pub repairs: u64,
    /// Last error of the bus or the store; cleared by the next success.
    pub last_error: Option<String>,
}

/// The feed of one process. Cheap to clone.
///
/// It ends with the last clone, or with [`stop`](Self::stop).
#[derive(Clone)]
pub(crate) struct Feed {
    inner: Arc<Inner>,
}

struct Inner {
    /// The task owns the ring, so that followers see its end.
    ring: broadcast::WeakSender<FeedItem>,
    status: watch::Receiver<FeedStatus>,
    /// Whether there was a follower. Before that, the feed queries neither the store nor the bus.
    wanted: watch::Sender<bool>,
    stop: watch::Sender<bool>,
    _task: Task,
}

/// Next item for a follower.
#[derive(Debug, Clone)]
pub(crate) enum FeedItem {
    /// The next part of the log.
    ///
    /// It begins at the end of the previous one, except after [`Lagged`](Self::Lagged). Without
    /// events, it only reports the position.
    Batch(LogBatch),
    /// The follower was too slow, and a batch was overwritten.
    Lagged,
    /// The feed met a permanent error: the follower has to query the store itself.
    Failed,
    /// The feed has ended.
    Closed,
}

/// One reader of the feed.
#[derive(Debug)]
pub(crate) struct FeedFollower {
    ring: Option<broadcast::Receiver<FeedItem>>,
}

impl Feed {
    /// Starts the feed; it follows the log from the high-water mark once there is a follower.
    ///
    /// Must be called within a tokio runtime. Connects to store and bus in the background, without
    /// a time limit.
    pub(crate) fn start(store: Arc<dyn EventStore>, bus: Arc<dyn EventBus>, options: FeedOptions) -> Self {
        let ring = broadcast::Sender::new(options.capacity);
        let (status_sender, status) = watch::channel(FeedStatus::default());
        let (wanted, mut waiting) = watch::channel(false);
        let (stop, mut stopping) = watch::channel(false);
        let weak = ring.downgrade();
        let mut task = FeedTask {
            store,
            bus,
            idle_poll: options.idle_poll,
            reads: RateLimit::of_reads(),
            ring,
            status: status_sender,
            store_backoff: Backoff::new(Duration::from_millis(20), Duration::from_secs(5)),
            bus_backoff: Backoff::new(Duration::from_millis(20), Duration::from_secs(5)),
        };
        let task = Task::spawn(async move {
            tokio::select! {
                biased;
                // An error means that no handle is left that could stop or follow the feed.
                _ = stopping.wait_for(|stop| *stop) => {}
                () = async {
                    if waiting.wait_for(|wanted| *wanted).await.is_ok() {
                        task.run_for_ever().await;
                    }
                } => {}
            }
        });
        Self { inner: Arc::new(Inner { ring: weak, status, wanted, stop, _task: task }) }
    }

    /// Follows the log from the current position of the feed.
    pub(crate) fn follow(&self) -> FeedFollower {
        let ring = self.inner.ring.upgrade().map(|ring| ring.subscribe());
        self.begin();
        FeedFollower { ring }
    }

    /// Starts to follow the log even without a follower: the position alone is useful.
    pub(crate) fn begin(&self) {
        self.inner.wanted.send_replace(true);
    }

    /// Returns the status.
    pub(crate) fn status(&self) -> FeedStatus {
        self.inner.status.borrow().clone()
    }

    /// Returns the known end of the log.
    pub(crate) fn position(&self) -> Position {
        self.inner.status.borrow().position.unwrap_or_default()
    }

    /// Ends the feed: followers receive [`FeedItem::Closed`] after the items not yet read.
    pub(crate) fn stop(&self) {
        self.inner.stop.send_replace(true);
    }
}

impl fmt::Debug for Feed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Feed").field("status", &self.status()).finish_non_exhaustive()
    }
}

impl FeedFollower {
    /// Returns the next item; after `Closed` always `Closed`. Cancel-safe.
    pub(crate) async fn next(&mut self) -> FeedItem {
        let Some(ring) = &mut self.ring else { return FeedItem::Closed };
        match ring.recv().await {
            Ok(item) => item,
            Err(RecvError::Lagged(_)) => FeedItem::Lagged,
            Err(RecvError::Closed) => FeedItem::Closed,
        }
    }

    /// Returns the next item if it is available now.
    pub(crate) fn try_next(&mut self) -> Option<FeedItem> {
        let Some(ring) = &mut self.ring else { return Some(FeedItem::Closed) };
        match ring.try_recv() {
            Ok(item) => Some(item),
            Err(TryRecvError::Lagged(_)) => Some(FeedItem::Lagged),
            Err(TryRecvError::Closed) => Some(FeedItem::Closed),
            Err(TryRecvError::Empty) => None,
        }
    }
}

/// Returns the part of `batch` after `position`; `None` if there is a gap between them.
pub(crate) fn adjacent(batch: LogBatch, position: Position) -> Option<LogBatch> {
    if batch.after > position {
        return None;
    }
    if batch.after == position {
        return Some(batch);
    }
    let events = batch.events.iter().filter(|event| event.position > position).cloned().collect();
    Some(LogBatch { after: position, upto: batch.upto.max(position), events })
}

struct FeedTask {
    store: Arc<dyn EventStore>,
    bus: Arc<dyn EventBus>,
    idle_poll: Duration,
    /// Limits reads for messages after which the store has nothing new.
    reads: RateLimit,
    ring: broadcast::Sender<FeedItem>,
    status: watch::Sender<FeedStatus>,
    store_backoff: Backoff,
    bus_backoff: Backoff,
}

/// The bus side of the feed.
enum Source {
    /// Subscribing, perhaps after a pause.
    ///
    /// The store is polled meanwhile: followers only receive events later.
    Subscribing(BoxFuture<'static, Result<Box<dyn BusSubscription>, BusError>>),
    Listening(Box<dyn BusSubscription>),
}

/// Result of waiting for the bus.
enum Sign {
    Subscribed(Box<dyn BusSubscription>),
    Item(BusItem),
}

impl Source {
    fn subscribe(bus: Arc<dyn EventBus>, store: Uuid, pause: Duration) -> Self {
        Source::Subscribing(Box::pin(async move {
            sleep(pause).await;
            bus.subscribe(store).await
        }))
    }

    /// Waits for the subscription or its next item. Cancel-safe.
    async fn next(&mut self) -> Result<Sign, BusError> {
        match self {
            Source::Subscribing(subscription) => subscription.await.map(Sign::Subscribed),
            Source::Listening(subscription) => subscription.next().await.map(Sign::Item),
        }
    }
}

impl FeedTask {
    /// Runs the feed and restarts it after a panic of a bus or a store.
    ///
    /// A panic leaves a gap, which followers read from the store.
    async fn run_for_ever(&mut self) {
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
