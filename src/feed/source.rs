//! The bus side of the feed.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::sleep;
use uuid::Uuid;

use crate::bus::{BusError, BusItem, BusSubscription, EventBus};
use crate::store::BoxFuture;

/// The bus side of the feed.
pub(super) enum Source {
    /// Subscribing, perhaps after a pause.
    ///
    /// The store is polled meanwhile: followers only receive events later.
    Subscribing(BoxFuture<'static, Result<Box<dyn BusSubscription>, BusError>>),
    Listening(Box<dyn BusSubscription>),
}

/// Result of waiting for the bus.
pub(super) enum Sign {
    Subscribed(Box<dyn BusSubscription>),
    Item(BusItem),
}

impl Source {
    pub(super) fn subscribe(bus: Arc<dyn EventBus>, store: Uuid, pause: Duration) -> Self {
        Source::Subscribing(Box::pin(async move {
            sleep(pause).await;
            bus.subscribe(store).await
        }))
    }

    /// Waits for the subscription or its next item. Cancel-safe.
    pub(super) async fn next(&mut self) -> Result<Sign, BusError> {
        match self {
            Source::Subscribing(subscription) => subscription.await.map(Sign::Subscribed),
            Source::Listening(subscription) => subscription.next().await.map(Sign::Item),
        }
    }
}
