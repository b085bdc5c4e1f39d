//! The publisher: publishes new events of the log to the bus, in log order.
//!
//! It follows the [feed](crate::feed), and reads the store while it is catching up. An append never
//! waits for it, and a restart after a crash publishes the remaining events.
//!
//! The holder of the lease `publisher` publishes. The checkpoint `publisher` says where to continue
//! if the bus has lost its state. Two publishers at once are harmless, because the bus refuses the
//! publisher that missed the other's last message (I7). A runtime without a bus has no publisher.

mod options;
mod status;
mod worker;

use std::sync::Arc;
use std::time::Duration;

use ractor::{ActorCell, SpawnErr};
use tokio::sync::watch;
use uuid::Uuid;

pub use self::options::PublisherOptions;
pub use self::status::{PublisherState, PublisherStatus};
use self::worker::PublisherWork;
use crate::bus::EventBus;
use crate::feed::Feed;
use crate::store::EventStore;
use crate::supervised::{StopError, Supervised};
use crate::telemetry::Metrics;

/// A handle to the publisher. Cheap to clone; dropping it has no effect.
#[derive(Debug, Clone)]
pub(crate) struct Publisher {
    actor: Supervised<()>,
    status: watch::Receiver<PublisherStatus>,
}

impl Publisher {
    /// Starts publishing the log of `store`, which `feed` follows, to `bus`, as the node `node`.
    /// Connects in the background, with unlimited retries.
    pub(crate) async fn spawn(
        store: Arc<dyn EventStore>,
        feed: Feed,
        bus: Arc<dyn EventBus>,
        options: PublisherOptions,
        node: Uuid,
        metrics: Metrics,
        supervisor: Option<ActorCell>,
    ) -> Result<Self, SpawnErr> {
        let (work, status) = PublisherWork::new(store, feed, bus, options, node, metrics);
        Ok(Self { actor: Supervised::spawn(work, supervisor).await?, status })
    }

    /// Watches the status. The channel closes when the publisher is torn down.
    pub(crate) fn status(&self) -> watch::Receiver<PublisherStatus> {
        self.status.clone()
    }

    /// Publishes every committed event and stops; stops without that once `patience` is over.
    pub(crate) async fn stop(&self, patience: Duration) -> Result<(), StopError> {
        self.actor.stop(patience).await
    }

    /// Stops as a crash of the process would.
    #[cfg(feature = "testing")]
    pub(crate) fn kill(&self) {
        self.actor.kill();
    }
}
