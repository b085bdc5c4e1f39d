//! Where events come from at the tip of the log.

use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use tokio::time::{Instant, sleep_until};

use crate::bus::{DurableItem, DurableSubscription, LogBatch};
use crate::event::Position;
use crate::feed::{FeedFollower, FeedItem};
use crate::rate_limit::RateLimit;
use crate::store::{BoxFuture, EventStore, Filter, LogPage, ReadLog, StoreError};

/// How often a durable follower reads the store without a message: when the bus is down, or the publisher is.
const LOOK_EVERY: Duration = Duration::from_secs(2);

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
    store: Arc<dyn EventStore>,
    filter: Filter,
    /// Number of events in a page.
    limit: usize,
    /// When the store is read next for a message, …
    due: Option<Instant>,
    /// … and without one.
    look_at: Instant,
    /// A page after that position.
    reading: Option<(Position, BoxFuture<'static, Result<LogPage, StoreError>>)>,
    /// Limits reads that find nothing.
    reads: RateLimit,
}

impl DurableFollower {
    pub(super) fn new(
        subscription: Box<dyn DurableSubscription>,
        store: Arc<dyn EventStore>,
        filter: Filter,
        limit: usize,
    ) -> Self {
        Self {
            subscription,
            store,
            filter,
            limit,
            due: None,
            look_at: Instant::now() + LOOK_EVERY,
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
                }
                return FeedItem::Batch(LogBatch { after: from, upto: scanned_to, events: events.into() });
            }
            let (due, at) = (self.due, self.due.unwrap_or(self.look_at).min(self.look_at));
            tokio::select! {
                item = self.subscription.next() => match item {
                    // What the projection has already is no news.
                    Ok(DurableItem::Wake(position)) if position <= after => {}
                    Ok(DurableItem::Wake(_) | DurableItem::Gap(_)) if due.is_some() => {}
                    Ok(DurableItem::Wake(_) | DurableItem::Gap(_)) => {
                        let due = self.reads.take();
                        if due > Instant::now() {
                            self.due = Some(due);
                        } else {
                            self.read(after);
                        }
                    }
                    Err(_) => return FeedItem::Closed,
                },
                () = sleep_until(at) => self.read(after),
            }
        }
    }

    fn read(&mut self, after: Position) {
        self.due = None;
        self.look_at = Instant::now() + LOOK_EVERY;
        // What has come until now is answered by the same page.
        while let Some(Ok(_)) = self.subscription.next().now_or_never() {}
        let read = ReadLog::after(after).filter(self.filter.clone()).limit(self.limit);
        let store = self.store.clone();
        // A task of its own: while the projection applies what it has, nothing polls this, and a read that stood still would keep
        // a connection, and others that share its question, waiting.
        let page = tokio::spawn(async move { store.read_log(read).await });
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
