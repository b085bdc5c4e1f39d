use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use uuid::Uuid;

use crate::bus::EventBus;
use crate::feed::{Feed, FeedOptions, FeedStatus};
use crate::lease::LeaseWatcher;
use crate::projection::{
    IntoProjection, NodeServices, Projection, ProjectionHandle, ProjectionOptions, ReadModel, spawn,
};
use crate::publisher::{Publisher, PublisherOptions, PublisherState, PublisherStatus};
use crate::store::EventStore;
use crate::supervised::StopError;
use crate::telemetry::Metrics;

/// A node without commands: feed and projections over a store, and a publisher if there is a bus.
///
/// For tests of stores, buses and read models that write to the store directly and crash a node.
pub struct Node {
    id: Uuid,
    store: Arc<dyn EventStore>,
    bus: Option<Arc<dyn EventBus>>,
    feed: Feed,
    lease_watcher: LeaseWatcher,
    publisher: Option<Publisher>,
    projections: Mutex<Vec<ProjectionHandle>>,
    /// Dropped together with the node.
    alive: Arc<()>,
}

impl Node {
    /// Starts publisher and feed.
    ///
    /// # Panics
    /// If the actor of the publisher does not start.
    pub async fn start(
        store: Arc<dyn EventStore>,
        bus: Option<Arc<dyn EventBus>>,
        feed: FeedOptions,
        publisher: PublisherOptions,
    ) -> Self {
        let id = Uuid::now_v7();
        let feed = Feed::start(store.clone(), bus.clone(), feed);
        let publisher = match bus.clone() {
            None => None,
            Some(bus) => {
                let (store, feed, metrics) = (store.clone(), feed.clone(), Metrics::default());
                let spawned = Publisher::spawn(store, feed, bus, publisher, id, metrics, None).await;
                Some(spawned.expect("the publisher starts"))
            }
        };
        let lease_watcher = LeaseWatcher::start(store.clone());
        Self {
            id,
            store,
            bus,
            feed,
            lease_watcher,
            publisher,
            projections: Mutex::default(),
            alive: Arc::new(()),
        }
    }

    /// Starts a projection.
    ///
    /// # Panics
    /// If its filter is invalid, if it has partitions but is a single instance, or if its actors do not
    /// start.
    pub async fn projection<P, R>(
        &self,
        projection: P,
        read_model: R,
        options: ProjectionOptions,
    ) -> ProjectionHandle
    where
        P: IntoProjection,
        R: ReadModel<Transaction = <P::Projection as Projection>::Transaction>,
    {
        let made = projection.into_projection();
        let (_, filter) = made.describe(&options);
        filter.check().expect("the filter is valid");
        let refused = made.is_single() && options.partitions.is_some();
        assert!(!refused, "partitions need an instance for each of them: PerTarget::new(make)");
        let (store, feed, lease_watcher) =
            (self.store.clone(), self.feed.clone(), self.lease_watcher.clone());
        let bus = self.bus.clone();
        let metrics = Metrics::default();
        let log_end = self.store.high_water_mark().await.unwrap_or_default();
        let alive = Arc::downgrade(&self.alive);
        let services = NodeServices {
            store,
            feed,
            node: self.id,
            bus,
            lease_watcher,
            metrics,
            supervisor: None,
            alive,
            log_end,
        };
        let handle = spawn(made, filter, read_model, options, None, services).await;
        let handle = handle.expect("the projection starts");
        self.projections.lock().unwrap_or_else(PoisonError::into_inner).push(handle.clone());
        handle
    }

    /// Returns the id of the node, as in its leases.
    pub fn id(&self) -> Uuid {
        self.id
    }

    /// Returns the status of the feed.
    pub fn feed(&self) -> FeedStatus {
        self.feed.status()
    }

    /// Returns the status of the publisher.
    pub fn publisher(&self) -> PublisherStatus {
        match &self.publisher {
            Some(publisher) => publisher.status().borrow().clone(),
            None => PublisherStatus::new(None, PublisherState::Idle),
        }
    }

    /// Ends everything in order: publishes committed events, saves checkpoints, releases leases.
    ///
    /// # Errors
    /// The first component that did not end within `patience`.
    pub async fn stop(self, patience: Duration) -> Result<(), StopError> {
        let published = match &self.publisher {
            Some(publisher) => publisher.stop(patience).await,
            None => Ok(()),
        };
        let projections =
            std::mem::take(&mut *self.projections.lock().unwrap_or_else(PoisonError::into_inner));
        let ended =
            futures_util::future::join_all(projections.iter().map(|handle| handle.stop(patience))).await;
        self.feed.stop();
        published.and(ended.into_iter().collect())
    }

    /// Ends everything as a crash of the process would: saves no checkpoint and releases no lease.
    pub fn kill(self) {
        if let Some(publisher) = &self.publisher {
            publisher.kill();
        }
        for projection in &*self.projections.lock().unwrap_or_else(PoisonError::into_inner) {
            projection.kill();
        }
    }
}

impl fmt::Debug for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Node").field("id", &self.id).field("feed", &self.feed()).finish_non_exhaustive()
    }
}
