//! Live sources of events.

use std::time::Duration;

use futures_util::FutureExt;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until};

use super::log_source::LogSource;
use crate::bus::{DurableItem, DurableSubscription, LogBatch};
use crate::event::Position;
use crate::feed::{FeedFollower, FeedItem};
use crate::projection::interruption::Interruption;
use crate::rate_limit::RateLimit;
use crate::store::{Filter, LogPage, ReadLog};

/// Poll interval of a durable follower without messages: the bus or the publisher may be down.
const POLL_INTERVAL: Duration = Duration::from_secs(2);

/// A position that no page reaches: forces a read from the store.
const UNKNOWN: Position = Position::new(u64::MAX);

/// A live source.
pub(super) enum Follower {
    /// The feed of the node.
    Feed(FeedFollower),
    /// The durable consumer of this projection.
    Durable(Box<DurableFollower>),
}

impl Follower {
    pub(super) fn is_durable(&self) -> bool {
        matches!(self, Self::Durable(_))
    }

    /// Returns the next item for a projection that has everything up to `after`. Cancel-safe.
    ///
    /// Calls `on_read` when the store begins to be read for a message.
    pub(super) async fn next(&mut self, after: Position, on_read: impl Fn()) -> FeedItem {
        match self {
            Self::Feed(follower) => follower.next_announced(on_read).await,
            Self::Durable(follower) => follower.next(after, on_read).await,
        }
    }

    /// Returns the next item if it is available now.
    pub(super) fn try_next(&mut self, after: Position) -> Option<FeedItem> {
        match self {
            Self::Feed(follower) => follower.try_next(),
            Self::Durable(follower) => follower.next(after, || ()).now_or_never(),
        }
    }

    /// Acknowledges that everything up to `upto` is durably applied.
    pub(super) fn applied(&mut self, upto: Position) {
        if let Self::Durable(follower) = self {
            follower.subscription.applied(upto);
        }
    }
}

/// A reader of the store that the bus wakes.
pub(super) struct DurableFollower {
    subscription: Box<dyn DurableSubscription>,
    log: LogSource,
    filter: Filter,
    /// Number of events in a page.
    limit: usize,
    /// Time of the next read for a message.
    due: Option<Instant>,
    /// Time of the next read without a message.
    poll_at: Instant,
    /// Position that the next page must reach; if unset, the page is read after the position is
    /// known.
    reach: Position,
    /// The read in progress: a page after that position.
    reading: Option<(Position, JoinHandle<Result<LogPage, Interruption>>)>,
    /// Limits reads that find nothing.
    reads: RateLimit,
}

impl DurableFollower {
    pub(super) fn new(
        subscription: Box<dyn DurableSubscription>,
        log: LogSource,
        filter: Filter,
        limit: usize,
    ) -> Self {
        Self {
            subscription,
            log,
            filter,
            limit,
            due: None,
            poll_at: Instant::now() + POLL_INTERVAL,
            reach: UNKNOWN,
            reading: None,
            reads: RateLimit::of_reads(),
        }
    }

    /// Returns the next item. Cancel-safe: keeps a page that is being read.
    async fn next(&mut self, after: Position, on_read: impl Fn()) -> FeedItem {
        loop {
            if let Some((from, reading)) = &mut self.reading {
                let (from, page) = (*from, reading.await);
                self.reading = None;
                let Ok(Ok(LogPage { events, scanned_to, head })) = page else {
                    // The projection reads the store itself and handles the failure.
                    return FeedItem::Lagged;
                };
                if !events.is_empty() {
                    self.reads.refund();
                }
                if scanned_to > from && scanned_to < head.min(self.reach) {
                    self.read(scanned_to);
                } else {
                    self.subscription.ended(head);
                    self.reach = Position::START;
                }
                return FeedItem::Batch(LogBatch { after: from, upto: scanned_to, events: events.into() });
            }
            let (due, at) = (self.due, self.due.unwrap_or(self.poll_at).min(self.poll_at));
            tokio::select! {
                item = self.subscription.next() => match item {
                    // The projection has this event already.
                    Ok(DurableItem::Wake(position)) if position <= after => {}
                    Ok(item @ (DurableItem::Wake(_) | DurableItem::Gap(_))) if due.is_some() => self.must_reach(&item),
                    Ok(item @ (DurableItem::Wake(_) | DurableItem::Gap(_))) => {
                        self.must_reach(&item);
                        let due = self.reads.take();
                        if due > Instant::now() {
                            self.due = Some(due);
                        } else {
                            self.read(after);
                            on_read();
                        }
                    }
                    Err(_) => return FeedItem::Closed,
                },
                () = sleep_until(at) => {
                    if self.poll_at <= at {
                        self.reach = UNKNOWN;
                    }
                    self.read(after);
                }
            }
        }
    }

    /// Records the position that the next page must reach.
    fn must_reach(&mut self, item: &DurableItem) {
        self.reach = match item {
            DurableItem::Wake(position) => self.reach.max(*position),
            DurableItem::Gap(_) => UNKNOWN,
        };
    }

    fn read(&mut self, after: Position) {
        self.due = None;
        self.poll_at = Instant::now() + POLL_INTERVAL;
        // The same page answers all messages that have arrived so far.
        while let Some(Ok(item)) = self.subscription.next().now_or_never() {
            self.must_reach(&item);
        }
        let mut read = ReadLog::after(after).filter(self.filter.clone()).limit(self.limit);
        if after < self.reach && self.reach != UNKNOWN {
            // Needs no query of the high-water mark if the mark is known to be there.
            read = read.upto(self.reach);
        }
        // In a separate task: while the projection applies events, nothing polls this future. A
        // stalled read would hold a connection and block other readers that share its query.
        self.reading = Some((after, tokio::spawn(self.log.read(read, self.reach))));
    }
}
