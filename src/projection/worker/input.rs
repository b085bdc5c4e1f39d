//! Where events come from at the tip of the log.

use std::time::Duration;

use futures_util::FutureExt;
use tokio::time::{Instant, sleep_until};

use super::log_source::LogSource;
use crate::bus::{DurableItem, DurableSubscription, LogBatch};
use crate::event::Position;
use crate::feed::{FeedFollower, FeedItem};
use crate::rate_limit::RateLimit;
use crate::store::{BoxFuture, Filter, LogPage, ReadLog, StoreError};

/// How often a durable follower reads the store without a message: when the bus is down, or the publisher is.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// Reached by no page: what is there now is read from the store.
const UNKNOWN: Position = Position::new(u64::MAX);

/// One that is read from.
pub(super) enum Follower {
    /// What the node sees of the log.
    Feed(FeedFollower),
    /// What the bus keeps for this projection.
    Durable(Box<DurableFollower>),
}

impl Follower {
    pub(super) fn is_durable(&self) -> bool {
        matches!(self, Self::Durable(_))
    }

    /// The next item for a projection that has everything up to `after`. Cancel-safe.
    pub(super) async fn next(&mut self, after: Position) -> FeedItem {
        match self {
            Self::Feed(follower) => follower.next().await,
            Self::Durable(follower) => follower.next(after).await,
        }
    }

    /// The next item, if there is one already.
    pub(super) fn try_next(&mut self, after: Position) -> Option<FeedItem> {
        match self {
            Self::Feed(follower) => follower.try_next(),
            Self::Durable(_) => self.next(after).now_or_never(),
        }
    }

    /// Everything up to here is applied for good.
    pub(super) fn applied(&mut self, upto: Position) {
        if let Self::Durable(follower) = self {
            follower.subscription.applied(upto);
        }
    }
}

/// Reads the store when the bus says that there may be an event.
pub(super) struct DurableFollower {
    subscription: Box<dyn DurableSubscription>,
    log: LogSource,
    filter: Filter,
    /// Number of events in a page.
    limit: usize,
    /// When the store is read next for a message, …
    due: Option<Instant>,
    /// … and without one.
    look_at: Instant,
    /// The position that the next page must reach; without one, the page is read after that is known.
    reach: Position,
    /// A page after that position.
    reading: Option<(Position, BoxFuture<'static, Result<LogPage, StoreError>>)>,
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
            look_at: Instant::now() + LOOK_EVERY,
            reach: UNKNOWN,
            reading: None,
            reads: RateLimit::of_reads(),
        }
    }

    /// Cancel-safe: a page that is being read is kept.
    async fn next(&mut self, after: Position) -> FeedItem {
        loop {
            if let Some((from, reading)) = &mut self.reading {
                let (from, page) = (*from, reading.await);
                self.reading = None;
                let Ok(LogPage { events, scanned_to, head }) = page else {
                    // The projection reads itself, and deals with the failure.
                    return FeedItem::Lagged;
                };
                if !events.is_empty() {
                    self.reads.refund();
                }
                if scanned_to > from && scanned_to < head {
                    self.read(scanned_to);
                } else {
                    self.subscription.ended(head);
                    self.reach = Position::START;
                }
                return FeedItem::Batch(LogBatch { after: from, upto: scanned_to, events: events.into() });
            }
            let (due, at) = (self.due, self.due.unwrap_or(self.look_at).min(self.look_at));
            tokio::select! {
                item = self.subscription.next() => match item {
                    // What the projection has already is no news.
                    Ok(DurableItem::Wake(position)) if position <= after => {}
                    Ok(item @ (DurableItem::Wake(_) | DurableItem::Gap(_))) if due.is_some() => self.must_reach(&item),
                    Ok(item @ (DurableItem::Wake(_) | DurableItem::Gap(_))) => {
                        self.must_reach(&item);
                        let due = self.reads.take();
                        if due > Instant::now() {
                            self.due = Some(due);
                        } else {
                            self.read(after);
                        }
                    }
                    Err(_) => return FeedItem::Closed,
                },
                () = sleep_until(at) => {
                    if self.look_at <= at {
                        self.reach = UNKNOWN;
                    }
                    self.read(after);
                }
            }
        }
    }

    /// What the next page must have.
    fn must_reach(&mut self, item: &DurableItem) {
        self.reach = match item {
            DurableItem::Wake(position) => self.reach.max(*position),
            DurableItem::Gap(_) => UNKNOWN,
        };
    }

    fn read(&mut self, after: Position) {
        self.due = None;
        self.look_at = Instant::now() + LOOK_EVERY;
        // What has come until now is answered by the same page.
        while let Some(Ok(item)) = self.subscription.next().now_or_never() {
            self.must_reach(&item);
        }
        let read = ReadLog::after(after).filter(self.filter.clone()).limit(self.limit);
        // A task of its own: while the projection applies what it has, nothing polls this, and a read that stood still would keep
        // a connection, and others that share its question, waiting.
        let page = tokio::spawn(self.log.read(read, self.reach));
        self.reading = Some((
            after,
            Box::pin(async move {
                page.await.unwrap_or_else(|error| {
                    Err(StoreError::Unavailable {
                        reason: format!("reading the log ended: {error}"),
                        source: None,
                    })
                })
            }),
        ));
    }
}
