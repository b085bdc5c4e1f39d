//! The feed: the only reader of the tail of the log in a process, in order and without gaps.
//!
//! The feed reads the store when the store announces an append, when a message of the bus arrives,
//! and by its own poll. Without followers, it reads 100 ms after a message. A message only wakes the
//! feed: it does not decide what followers receive.
//!
//! Followers are the projections of the process and its publisher. They read from a bounded ring at
//! their own pace and never wait for the slowest. A slow follower receives `Lagged` and returns to
//! reading the store.

mod follower;
mod item;
mod log_reader;
mod options;
mod source;
mod status;
mod task;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Notify, broadcast, watch};

pub(crate) use self::follower::FeedFollower;
pub(crate) use self::item::{FeedItem, adjacent};
pub(crate) use self::log_reader::{LogChunk, read as read_chunk};
pub use self::options::FeedOptions;
use self::source::Demand;
pub use self::status::FeedStatus;
use self::task::FeedTask;
use crate::backoff::Backoff;
use crate::bus::EventBus;
use crate::event::Position;
use crate::rate_limit::RateLimit;
use crate::store::EventStore;
use crate::supervised::Task;

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
    demand: watch::Sender<Demand>,
    /// Changes when the feed begins to read the store for a message.
    reads: watch::Receiver<()>,
    /// Hints that the log has new events.
    hints: Arc<Notify>,
    stop: watch::Sender<bool>,
    _task: Task,
}

impl Feed {
    /// Starts the feed; it follows the log from the high-water mark once there is a follower.
    ///
    /// Must be called within a tokio runtime. Connects to store and bus in the background, without
    /// a time limit.
    pub(crate) fn start(
        store: Arc<dyn EventStore>,
        bus: Option<Arc<dyn EventBus>>,
        options: FeedOptions,
    ) -> Self {
        let ring = broadcast::Sender::new(options.capacity);
        let (status_sender, status) = watch::channel(FeedStatus::default());
        let (demand, mut demanded) = watch::channel(Demand::Nothing);
        let (reads_sender, reads) = watch::channel(());
        let hints = Arc::new(Notify::new());
        let (stop, mut stopping) = watch::channel(false);
        let weak = ring.downgrade();
        let mut task = FeedTask {
            store,
            bus,
            idle_poll: options.idle_poll,
            limit: RateLimit::of_reads(),
            reads: reads_sender,
            demand: demanded.clone(),
            hints: hints.clone(),
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
                    if demanded.wait_for(|demand| *demand > Demand::Nothing).await.is_ok() {
                        task.run_for_ever().await;
                    }
                } => {}
            }
        });
        Self { inner: Arc::new(Inner { ring: weak, status, demand, reads, hints, stop, _task: task }) }
    }

    /// Follows the log from the current position of the feed.
    pub(crate) fn follow(&self) -> FeedFollower {
        self.subscribe(Demand::Bus)
    }

    /// As [`follow`](Self::follow), without a subscription to the bus.
    pub(crate) fn follow_without_bus(&self) -> FeedFollower {
        self.subscribe(Demand::Store)
    }

    fn subscribe(&self, demand: Demand) -> FeedFollower {
        let ring = self.inner.ring.upgrade().map(|ring| ring.subscribe());
        self.demand(demand);
        let mut reads = self.inner.reads.clone();
        reads.mark_unchanged();
        FeedFollower { ring, reads }
    }

    /// Starts to follow the log even without a follower: the position alone is useful.
    pub(crate) fn begin(&self) {
        self.demand(Demand::Bus);
    }

    fn demand(&self, demand: Demand) {
        self.inner.demand.send_if_modified(|now| {
            let more = demand > *now;
            *now = demand.max(*now);
            more
        });
    }

    /// Reads the store soon: another process may have appended. Rate limited.
    pub(crate) fn hint(&self) {
        self.inner.hints.notify_one();
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
