//! A reader of the feed.

use tokio::sync::broadcast::error::{RecvError, TryRecvError};
use tokio::sync::{broadcast, watch};

use super::item::FeedItem;

/// One reader of the feed.
#[derive(Debug)]
pub(crate) struct FeedFollower {
    pub(super) ring: Option<broadcast::Receiver<FeedItem>>,
    /// Changes when the feed begins to read the store for a message.
    pub(super) reads: watch::Receiver<()>,
}

impl FeedFollower {
    /// Returns the next item; after `Closed` always `Closed`. Cancel-safe.
    pub(crate) async fn next(&mut self) -> FeedItem {
        receive(&mut self.ring).await
    }

    /// As [`next`](Self::next); calls `on_read` when the feed begins to read the store for a
    /// message.
    pub(crate) async fn next_announced(&mut self, on_read: impl Fn()) -> FeedItem {
        let Self { ring, reads } = self;
        let item = receive(ring);
        tokio::pin!(item);
        let item = loop {
            tokio::select! {
                biased;
                item = &mut item => break item,
                Ok(()) = reads.changed() => on_read(),
            }
        };
        // A read that this item has answered must not be announced later.
        reads.mark_unchanged();
        item
    }

    /// Returns the next item if it is available now.
    pub(crate) fn try_next(&mut self) -> Option<FeedItem> {
        let Some(ring) = &mut self.ring else { return Some(FeedItem::Closed) };
        self.reads.mark_unchanged();
        match ring.try_recv() {
            Ok(item) => Some(item),
            Err(TryRecvError::Lagged(_)) => Some(FeedItem::Lagged),
            Err(TryRecvError::Closed) => Some(FeedItem::Closed),
            Err(TryRecvError::Empty) => None,
        }
    }
}

async fn receive(ring: &mut Option<broadcast::Receiver<FeedItem>>) -> FeedItem {
    let Some(ring) = ring else { return FeedItem::Closed };
    match ring.recv().await {
        Ok(item) => item,
        Err(RecvError::Lagged(_)) => FeedItem::Lagged,
        Err(RecvError::Closed) => FeedItem::Closed,
    }
}
