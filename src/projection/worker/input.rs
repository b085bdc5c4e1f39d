//! Where events come from at the tip of the log.

use std::sync::Arc;

use futures_util::FutureExt;

use crate::bus::{DurableItem, DurableSubscription, LogBatch};
use crate::event::Position;
use crate::feed::{FeedFollower, FeedItem};

/// One that is read from.
pub(super) enum Follower {
    /// What the node sees of the log.
    Feed(FeedFollower),
    /// What the bus keeps for this projection.
    Durable(Box<dyn DurableSubscription>),
}

impl Follower {
    pub(super) fn is_durable(&self) -> bool {
        matches!(self, Self::Durable(_))
    }

    /// The next item. Cancel-safe.
    pub(super) async fn next(&mut self) -> FeedItem {
        match self {
            Self::Feed(follower) => follower.next().await,
            Self::Durable(follower) => match follower.next().await {
                // Whatever comes before it and was asked for has come: it would be a gap otherwise.
                Ok(DurableItem::Event(event)) => FeedItem::Batch(LogBatch {
                    after: Position::START,
                    upto: event.position,
                    events: Arc::new([event]),
                }),
                Ok(DurableItem::Gap(_)) => FeedItem::Lagged,
                Err(_) => FeedItem::Closed,
            },
        }
    }

    /// The next item, if there is one already.
    pub(super) fn try_next(&mut self) -> Option<FeedItem> {
        match self {
            Self::Feed(follower) => follower.try_next(),
            Self::Durable(_) => self.next().now_or_never(),
        }
    }

    /// Everything up to here is applied for good.
    pub(super) fn applied(&mut self, upto: Position) {
        if let Self::Durable(follower) = self {
            follower.applied(upto);
        }
    }
}
