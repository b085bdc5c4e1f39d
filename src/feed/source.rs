//! The bus side of the feed.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::sleep;
use uuid::Uuid;

use crate::bus::{BusError, BusItem, BusSubscription, EventBus};
use crate::store::BoxFuture;

/// The sources that the followers of the feed have needed so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Demand {
    /// There was no follower.
    Nothing,
    /// The store. The publisher needs no messages of the bus: it sends them.
    Store,
    /// The store and the bus.
    Bus,
}

/// The bus side of the feed.
pub(super) enum Source {
    /// Subscribing, perhaps after a pause.
    Subscribing(BoxFuture<'static, Result<Box<dyn BusSubscription>, BusError>>),
    Listening(Box<dyn BusSubscription>),
}

/// Result of waiting for the bus.
pub(super) enum Sign {
    Subscribed(Box<dyn BusSubscription>),
    Item(BusItem),
}

impl Source {
    /// Subscribes after `pause`, once a follower needs the bus. Never, if there is no bus.
    pub(super) fn subscribe(
        bus: Option<Arc<dyn EventBus>>,
        store: Uuid,
        mut demand: watch::Receiver<Demand>,
        pause: Duration,
    ) -> Self {
        Source::Subscribing(Box::pin(async move {
            let wanted = demand.wait_for(|demand| *demand == Demand::Bus).await.is_ok();
            let Some(bus) = bus.filter(|_| wanted) else { return std::future::pending().await };
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
