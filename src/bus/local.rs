use std::fmt;
use std::ops::RangeInclusive;

use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{broadcast, watch};
use uuid::Uuid;

use super::{
    BusError, BusItem, BusPublisher, BusScope, BusState, BusSubscription, EventBus, LogBatch, LogStreamEnd,
    Resume,
};
use crate::event::Position;
use crate::future::BoxFuture;
use crate::invalid_option::within;

/// Default capacity of the ring, in batches. See [`LocalBus::with_capacity`].
const CAPACITY: usize = 128;

/// Range of the capacity. The ring is allocated at once.
const CAPACITIES: RangeInclusive<usize> = 1..=65_536;

/// The bus inside one process: a bounded ring that each subscriber reads at its own pace.
///
/// Clones are handles to the same bus. The bus keeps nothing: a subscriber receives what is
/// published after it subscribed. A subscriber that lags by more than the capacity gets a
/// [`BusItem::Gap`] in place of the overwritten batches. Publishing never waits for a subscriber.
///
/// Runtimes of different stores may share a bus. Each sees only the log of its own store.
#[derive(Clone)]
pub struct LocalBus {
    ring: broadcast::Sender<Sent>,
    /// Capacity as set, for the check.
    capacity: usize,
    /// Whether a subscriber has ever existed.
    /// Until then nothing is published: a node without projections does not read back its appends.
    subscribed: watch::Sender<bool>,
}

/// An item and the id of its store. Positions of different stores are not comparable.
type Sent = (Uuid, BusItem);

impl Default for LocalBus {
    fn default() -> Self {
        Self::new()
    }
}

impl LocalBus {
    /// Creates a bus whose ring holds 128 batches.
    #[must_use]
    pub fn new() -> Self {
        Self::with_capacity(CAPACITY)
    }

    /// Creates a bus whose ring holds this many batches and heartbeats.
    ///
    /// The capacity is rounded up to a power of two. Default: 128. Range: 1 to 65,536. The runtime
    /// checks it at its start, and the bus when it is used. A value outside its range is
    /// [`BusError::Incompatible`].
    #[must_use]
    pub fn with_capacity(batches: usize) -> Self {
        // A ring of a refused capacity carries nothing.
        let ring = broadcast::Sender::new(batches.clamp(*CAPACITIES.start(), *CAPACITIES.end()));
        Self { ring, capacity: batches, subscribed: watch::Sender::new(false) }
    }
}

impl fmt::Debug for LocalBus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LocalBus").field("subscribers", &self.ring.receiver_count()).finish_non_exhaustive()
    }
}

impl EventBus for LocalBus {
    fn name(&self) -> &'static str {
        "local"
    }

    fn check(&self) -> Result<(), BusError> {
        within("LocalBus::with_capacity", self.capacity, CAPACITIES)
            .map_err(|error| BusError::Incompatible { reason: error.to_string() })
    }

    fn scope(&self) -> BusScope {
        BusScope::Process
    }

    fn state(&self) -> BusState {
        BusState::Connected { to: "this process".into(), last_error: None }
    }

    fn publisher(&self, store: Uuid) -> BoxFuture<'_, Result<Box<dyn BusPublisher>, BusError>> {
        Box::pin(async move {
            self.check()?;
            Ok(Box::new(LocalPublisher { bus: self.clone(), store, sequence: 0 }) as _)
        })
    }

    fn subscribe(&self, store: Uuid) -> BoxFuture<'_, Result<Box<dyn BusSubscription>, BusError>> {
        Box::pin(async move {
            self.check()?;
            let ring = self.ring.subscribe();
            self.subscribed.send_replace(true);
            Ok(Box::new(LocalSubscription { ring, store }) as _)
        })
    }
}

struct LocalPublisher {
    bus: LocalBus,
    store: Uuid,
    /// Number of batches sent. The ring has no sequence numbers of its own.
    sequence: u64,
}

impl LocalPublisher {
    fn send(&self, item: BusItem) {
        // Sending fails only without subscribers, and then no event is missed.
        let _ = self.bus.ring.send((self.store, item));
    }
}

impl BusPublisher for LocalPublisher {
    fn wanted(&mut self) -> BoxFuture<'_, ()> {
        Box::pin(async {
            // Never fails: this bus holds the sender.
            let _ = self.bus.subscribed.subscribe().wait_for(|subscribed| *subscribed).await;
        })
    }

    fn resume(&mut self, _known: LogStreamEnd) -> BoxFuture<'_, Result<Resume, BusError>> {
        Box::pin(async { Ok(Resume::AtHighWaterMark) })
    }

    fn publish(&mut self, batch: LogBatch) -> BoxFuture<'_, Result<LogStreamEnd, BusError>> {
        Box::pin(async move {
            self.sequence += 1;
            let end = LogStreamEnd { position: batch.upto, sequence: self.sequence };
            self.send(BusItem::Batch(batch));
            Ok(end)
        })
    }

    fn heartbeat(&mut self, head: Position) -> BoxFuture<'_, Result<(), BusError>> {
        Box::pin(async move {
            self.send(BusItem::Head(head));
            Ok(())
        })
    }
}

struct LocalSubscription {
    ring: broadcast::Receiver<Sent>,
    store: Uuid,
}

impl BusSubscription for LocalSubscription {
    fn next(&mut self) -> BoxFuture<'_, Result<BusItem, BusError>> {
        Box::pin(async {
            loop {
                return match self.ring.recv().await {
                    Ok((store, item)) if store == self.store => Ok(item),
                    Ok(_) => continue,
                    Err(RecvError::Lagged(_)) => Ok(BusItem::Gap),
                    Err(RecvError::Closed) => Err(BusError::Closed),
                };
            }
        })
    }
}
