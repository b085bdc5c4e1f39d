//! The bus actor: publishes new events of the log to the bus, in log order.
//!
//! It reads the store, not the appends. An append never waits for it, and a restart after a crash
//! publishes the remaining events.
//!
//! On a [shared](crate::bus::BusScope::Shared) bus, the holder of the lease `publisher` publishes.
//! The checkpoint `publisher` says where to continue if the bus has lost its state. Two publishers
//! at once are harmless, because the bus refuses the publisher that missed the other's last message
//! (I7). On a bus inside the process, every node publishes for itself.

mod worker;

use std::sync::Arc;
use std::time::Duration;

use ractor::{ActorCell, SpawnErr};
use tokio::sync::watch;
use uuid::Uuid;

use self::worker::PublisherWork;
use crate::bus::EventBus;
use crate::event::Position;
use crate::invalid_option::{InvalidOption, at_least};
use crate::lease;
use crate::store::EventStore;
use crate::supervised::{StopError, Supervised};
use crate::telemetry::Metrics;

/// Options of the publisher.
#[derive(Debug, Clone)]
pub struct PublisherOptions {
    busy_poll: Duration,
    idle_poll: Duration,
    heartbeat: Duration,
    lease: Duration,
}

impl Default for PublisherOptions {
    fn default() -> Self {
        Self {
            busy_poll: Duration::from_millis(5),
            idle_poll: Duration::from_millis(250),
            heartbeat: Duration::from_secs(1),
            lease: Duration::from_secs(6),
        }
    }
}

impl PublisherOptions {
    /// Creates the default options.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the initial poll interval after events were published.
    ///
    /// Appends of other processes are published within this time. Appends of this process wake the
    /// publisher at once. Default: 5 ms. Minimum: 1 ms.
    #[must_use]
    pub fn busy_poll(mut self, every: Duration) -> Self {
        self.busy_poll = every;
        self
    }

    /// Sets the maximum poll interval. The interval doubles up to it while the log is idle.
    ///
    /// Default: 250 ms. Minimum: 10 ms.
    #[must_use]
    pub fn idle_poll(mut self, every: Duration) -> Self {
        self.idle_poll = every;
        self
    }

    /// Sets the interval of heartbeats while nothing is published.
    ///
    /// A heartbeat carries the end of the log. Default: 1 s. Minimum: 10 ms.
    #[must_use]
    pub fn heartbeat(mut self, every: Duration) -> Self {
        self.heartbeat = every;
        self
    }

    /// Sets the TTL of the lease on a shared bus.
    ///
    /// If the publishing node dies, another node takes over after this time. Default: 6 s. Range:
    /// 50 ms to 1 day.
    #[must_use]
    pub fn lease_ttl(mut self, ttl: Duration) -> Self {
        self.lease = ttl;
        self
    }

    /// Checks every value against its range.
    pub(crate) fn validate(&self) -> Result<(), InvalidOption> {
        at_least("PublisherOptions::busy_poll", self.busy_poll, Duration::from_millis(1))?;
        at_least("PublisherOptions::idle_poll", self.idle_poll, Duration::from_millis(10))?;
        at_least("PublisherOptions::heartbeat", self.heartbeat, Duration::from_millis(10))?;
        lease::check("PublisherOptions::lease_ttl", self.lease)
    }
}

/// The state of the publisher.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum PublisherState {
    /// Determining where to continue.
    Starting,
    /// Another node holds the lease and publishes to the shared bus.
    Standby,
    /// Waiting for the first subscriber of a bus that keeps nothing.
    Unheard,
    /// Publishing, or waiting for events.
    Publishing,
    /// The store [does not belong](crate::store::Adoption) to its database.
    /// Nothing is published to other nodes.
    Incompatible {
        /// The cause, and what to do.
        reason: String,
    },
    /// Retrying after a failure.
    Retrying {
        /// The failure.
        error: String,
    },
    /// Stopped.
    Stopped,
}

/// The status of the publisher.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct PublisherStatus {
    /// Name of the bus.
    pub bus: &'static str,
    /// State of the publisher.
    pub state: PublisherState,
    /// Position up to which every event is on the bus. `None` before this node has published.
    /// After an outage of a bus that keeps nothing, publishing continues at the end of the log.
    /// The position then includes events that followers read from the store.
    pub published: Option<Position>,
    /// High-water mark of the log at the last read of this node; `None` before that.
    pub head: Option<Position>,
    /// Last failure; `None` if there was none. A later success does not clear it.
    pub last_error: Option<String>,
}

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
