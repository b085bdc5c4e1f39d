use std::fmt;

use tokio::sync::broadcast;
use tokio::sync::broadcast::error::RecvError;
use uuid::Uuid;

use super::{
    BusError, BusItem, BusPublisher, BusScope, BusState, BusSubscription, EventBus, LogBatch, MirrorEnd,
    Resume,
};
use crate::event::Position;
use crate::store::BoxFuture;

/// How many batches a slow subscriber may be behind, unless [`LocalBus::with_capacity`] says otherwise.
const CAPACITY: usize = 128;

/// The bus inside one process: a bounded ring that subscribers read at their own pace. Clones are handles to the same bus.
///
/// It is the bus of one store: do not share it between runtimes of different stores. It keeps nothing: who subscribes sees what is published from then on, and who is more than the ring's capacity behind
/// gets a [`BusItem::Gap`] instead of what was overwritten. Publishing never waits for a subscriber.
#[derive(Clone)]
pub struct LocalBus {
    ring: broadcast::Sender<BusItem>,
}

impl Default for LocalBus {
    fn default() -> Self {
        Self::new()
    }
}

impl LocalBus {
    /// A bus whose ring holds 128 batches.
    #[must_use]
    pub fn new() -> Self {
        Self::with_capacity(CAPACITY)
    }

    /// A bus whose ring holds this many batches (and heartbeats), rounded up to a power of two; at least 1.
    #[must_use]
    pub fn with_capacity(batches: usize) -> Self {
        // tokio refuses more than this, by panicking.
        Self { ring: broadcast::Sender::new(batches.clamp(1, usize::MAX / 4)) }
    }

    fn send(&self, item: BusItem) {
        // The only failure is that nobody has subscribed, and then nobody misses anything.
        let _ = self.ring.send(item);
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

    fn scope(&self) -> BusScope {
        BusScope::Process
    }

    fn state(&self) -> BusState {
        BusState::Connected { to: "this process".into() }
    }

    fn publisher(&self, _store: Uuid) -> BoxFuture<'_, Result<Box<dyn BusPublisher>, BusError>> {
        Box::pin(async { Ok(Box::new(LocalPublisher { bus: self.clone(), sequence: 0 }) as _) })
    }

    fn subscribe(&self, _store: Uuid) -> BoxFuture<'_, Result<Box<dyn BusSubscription>, BusError>> {
        Box::pin(async { Ok(Box::new(LocalSubscription { ring: self.ring.subscribe() }) as _) })
    }
}

struct LocalPublisher {
    bus: LocalBus,
    /// How many batches went out; the ring has no numbers of its own.
    sequence: u64,
}

impl BusPublisher for LocalPublisher {
    fn resume(&mut self, _known: MirrorEnd) -> BoxFuture<'_, Result<Resume, BusError>> {
        Box::pin(async { Ok(Resume::AtFrontier) })
    }

    fn publish(&mut self, batch: LogBatch) -> BoxFuture<'_, Result<MirrorEnd, BusError>> {
        Box::pin(async move {
            self.sequence += 1;
            let end = MirrorEnd { position: batch.upto, sequence: self.sequence };
            self.bus.send(BusItem::Batch(batch));
            Ok(end)
        })
    }

    fn heartbeat(&mut self, head: Position) -> BoxFuture<'_, Result<(), BusError>> {
        Box::pin(async move {
            self.bus.send(BusItem::Head(head));
            Ok(())
        })
    }
}

struct LocalSubscription {
    ring: broadcast::Receiver<BusItem>,
}

impl BusSubscription for LocalSubscription {
    fn next(&mut self) -> BoxFuture<'_, Result<BusItem, BusError>> {
        Box::pin(async {
            match self.ring.recv().await {
                Ok(item) => Ok(item),
                Err(RecvError::Lagged(_)) => Ok(BusItem::Gap),
                Err(RecvError::Closed) => Err(BusError::Closed),
            }
        })
    }
}
