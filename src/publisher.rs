//! The bus actor: publishes new events of the log to the bus, in log order.
//!
//! It reads the store, not the appends. An append never waits for it, and a restart after a crash
//! publishes the remaining events.
//!
//! On a [shared](crate::bus::BusScope::Shared) bus, the holder of the lease `publisher` publishes.
//! The checkpoint `publisher` says where to continue if the bus has lost its state. Two publishers
//! at once are harmless, because the bus refuses the publisher that missed the other's last message
//! (I7). On a bus inside the process, every node publishes for itself.

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
    /// Starts publishing from `store` to `bus`, as the node `node`.
    /// Connects in the background, with unlimited retries.
    pub(crate) async fn spawn(
        store: Arc<dyn EventStore>,
        bus: Arc<dyn EventBus>,
        options: PublisherOptions,
        node: Uuid,
        metrics: Metrics,
        supervisor: Option<ActorCell>,
    ) -> Result<Self, SpawnErr> {
        let (work, status) = PublisherWork::new(store, bus, options, node, metrics);
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
