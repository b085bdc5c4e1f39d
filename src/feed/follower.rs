//! A reader of the feed.

use tokio::sync::broadcast;
use tokio::sync::broadcast::error::{RecvError, TryRecvError};

use super::item::FeedItem;

/// One reader of the feed.
#[derive(Debug)]
pub(crate) struct FeedFollower {
    pub(super) ring: Option<broadcast::Receiver<FeedItem>>,
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
