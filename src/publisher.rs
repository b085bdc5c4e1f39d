//! The bus actor: moves what is new in the log to the bus, in log order.
//!
//! It follows the store, not the appends: an append never waits for it, and what a crash left unpublished is published
//! after the restart. On a [shared](crate::bus::BusScope::Shared) bus the lease `publisher` says which node publishes, and
//! the checkpoint `publisher` where to go on when the bus has forgotten; what keeps two publishers at once harmless is the
//! bus itself, which refuses the one that did not see the other's last message (I7). On a bus inside the process every node
//! publishes for itself.

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

/// How the publisher works.
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
    /// The defaults.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// How soon the store is asked again after there was something to publish: what other processes append is published no
    /// later than that. This process's own appends wake the publisher at once. Default: 5 ms. Range: at least 1 ms.
    #[must_use]
    pub fn busy_poll(mut self, every: Duration) -> Self {
        self.busy_poll = every;
        self
    }

    /// The pause between two looks at the store doubles up to this while nothing happens. Default: 250 ms. Range: at least
    /// 10 ms.
    #[must_use]
    pub fn idle_poll(mut self, every: Duration) -> Self {
        self.idle_poll = every;
        self
    }

    /// Interval between two messages that carry the end of the log while nothing is published. Default: 1 s. Range: at least
    /// 10 ms.
    #[must_use]
    pub fn heartbeat(mut self, every: Duration) -> Self {
        self.heartbeat = every;
        self
    }

    /// On a shared bus: how long after the death of the publishing node another one takes over. Default: 6 s. Range: 50 ms
    /// to 1 day.
    #[must_use]
    pub fn lease(mut self, ttl: Duration) -> Self {
        self.lease = ttl;
        self
    }

    /// Checks every value against its range.
    pub(crate) fn validate(&self) -> Result<(), InvalidOption> {
        at_least("PublisherOptions::busy_poll", self.busy_poll, Duration::from_millis(1))?;
        at_least("PublisherOptions::idle_poll", self.idle_poll, Duration::from_millis(10))?;
        at_least("PublisherOptions::heartbeat", self.heartbeat, Duration::from_millis(10))?;
        lease::check("PublisherOptions::lease", self.lease)
    }
}

/// What the publisher is doing.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum PublisherState {
    /// Finding out where to go on.
    Starting,
    /// Another node publishes to the shared bus.
    Standby,
    /// Nobody follows the bus yet, and it keeps nothing: there is nothing to publish for.
    Unheard,
    /// At work, or waiting for events.
    Publishing,
    /// The store [does not belong](crate::store::Adoption) to the database that it is in: nothing is published to others.
    Incompatible {
        /// Why, and what to do.
        reason: String,
    },
    /// Something failed and is tried again.
    Retrying {
        /// What failed.
        error: String,
    },
    /// Ended.
    Stopped,
}

/// How the publisher is doing.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct PublisherStatus {
    /// The bus.
    pub bus: &'static str,
    /// What it is doing.
    pub state: PublisherState,
    /// Everything up to here is on the bus, or was left to those who follow one that keeps nothing: behind an outage of such a bus
    /// publishing goes on at the end of the log. `None` before this node has published for the first time.
    pub published: Option<Position>,
    /// The high-water mark of the log when this node last read it to publish; `None` before that.
    pub head: Option<Position>,
    /// What last went wrong, and when there was nothing, `None`. Stays when it goes well again.
    pub last_error: Option<String>,
}

/// The handle of the publisher. Cheap to clone; dropping it changes nothing.
#[derive(Debug, Clone)]
pub(crate) struct Publisher {
    actor: Supervised<()>,
    status: watch::Receiver<PublisherStatus>,
}

impl Publisher {
    /// Starts publishing from `store` to `bus`, as the node `node`. Connects in the background, for as long as it takes.
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

    /// How it is doing, now and whenever that changes. Closed when it was torn down.
    pub(crate) fn status(&self) -> watch::Receiver<PublisherStatus> {
        self.status.clone()
    }

    /// Publishes what is committed by now and ends; or ends without, when `patience` is over.
    pub(crate) async fn stop(&self, patience: Duration) -> Result<(), StopError> {
        self.actor.stop(patience).await
    }

    /// Ends as a crash of the process would end it.
    #[cfg(feature = "testing")]
    pub(crate) fn kill(&self) {
        self.actor.kill();
    }
}
