//! The constant part of a task.

use std::sync::{Arc, Weak};
use std::time::Duration;

use ractor::ActorCell;
use tokio::sync::{OnceCell, watch};
use uuid::Uuid;

use super::log_source::LogSource;
use crate::bus::EventBus;
use crate::event::{Position, RecordedEvent};
use crate::feed::Feed;
use crate::lease::{LeaseWatcher, Observation};
use crate::partition::Partition;
use crate::projection::layout::{Layout, Role};
use crate::projection::{ProjectionOptions, ProjectionState, ProjectionStatus};
use crate::store::{EventStore, Filter, LeaseInfo, ProjectionControl, StoreError};
use crate::telemetry::Metrics;

/// Additional time after which the database aborts a transaction.
///
/// Later than the local timeout, so that this process reports the cause.
pub(super) const GRACE: Duration = Duration::from_millis(500);

/// Services that the projections of a node share.
#[derive(Clone)]
pub(crate) struct NodeServices {
    pub(crate) store: Arc<dyn EventStore>,
    pub(crate) feed: Feed,
    pub(crate) node: Uuid,
    pub(crate) bus: Option<Arc<dyn EventBus>>,
    pub(crate) lease_watcher: LeaseWatcher,
    pub(crate) metrics: Metrics,
    pub(crate) supervisor: Option<ActorCell>,
    /// Dropped together with the runtime.
    pub(crate) alive: Weak<()>,
    /// End of the log when the runtime started.
    pub(crate) log_end: Position,
}

/// A projection that writes to one version of its read model.
pub(in crate::projection) struct VersionedProjection<P> {
    pub(super) projection: P,
    /// The version.
    pub(super) version: u64,
    /// Creates an instance for another version, if registered [by
    /// target](crate::projection::PerTarget).
    pub(super) make: Option<Box<dyn Fn(u64) -> P + Send + Sync>>,
}

impl<P> VersionedProjection<P> {
    pub(in crate::projection) fn fixed(projection: P) -> Self {
        Self { projection, version: 0, make: None }
    }

    pub(in crate::projection) fn made(make: impl Fn(u64) -> P + Send + Sync + 'static) -> Self {
        Self { projection: make(0), version: 0, make: Some(Box::new(make)) }
    }
}

/// The constant part of a task.
pub(super) struct TaskConfig {
    pub(super) name: String,
    pub(super) layout: Layout,
    /// The partition of the task; `None` if the projection is not partitioned.
    pub(super) partition: Option<Partition>,
    pub(super) role: Role,
    /// Name of the owner's lease.
    pub(super) lease: String,
    pub(super) filter: Filter,
    pub(super) options: ProjectionOptions,
    pub(super) store: Arc<dyn EventStore>,
    /// The log of that store.
    pub(super) log: LogSource,
    pub(super) feed: Feed,
    pub(super) node: Uuid,
    pub(super) bus: Option<Arc<dyn EventBus>>,
    pub(super) lease_watcher: LeaseWatcher,
    pub(super) metrics: Metrics,
    /// Lease views.
    pub(super) observations: watch::Receiver<Observation>,
    /// Whether this node should own the partition.
    pub(super) permit: Option<watch::Receiver<bool>>,
    pub(super) status: watch::Sender<ProjectionStatus>,
    /// Start position of a read model that this node keeps for itself.
    pub(super) floor: OnceCell<Position>,
    /// End of the log when the runtime started.
    pub(super) log_end: Position,
    /// Dropped together with the runtime.
    pub(super) alive: Weak<()>,
}

impl TaskConfig {
    /// Returns whether the event is for this projection and this partition.
    pub(super) fn wants(&self, event: &RecordedEvent) -> bool {
        self.filter.matches(event) && self.is_here(event)
    }

    pub(super) fn is_here(&self, event: &RecordedEvent) -> bool {
        self.partition.is_none_or(|partition| partition.contains(&event.stream))
    }

    /// Returns what operators control of the projection.
    pub(super) async fn control_state(&self) -> Result<ProjectionControl, StoreError> {
        Ok(self.store.controls().await?.remove(&self.name).unwrap_or_default())
    }

    /// Returns whether a node holds the order lease now, by the store's clock.
    pub(super) async fn ordered(&self) -> Result<bool, StoreError> {
        let order = self.layout.order();
        let leases = self.store.leases().await?;
        let view = self.lease_watcher.view();
        let abandoned = view.as_ref().and_then(|view| view.abandoned(&order));
        let live =
            |info: &LeaseInfo| info.live && abandoned.is_none_or(|seen| seen.expires_at != info.expires_at);
        Ok(leases.iter().any(|info| info.lease.name == order && live(info)))
    }

    /// Returns the time after which the database ends a transaction of events.
    pub(super) fn transaction_limit(&self) -> Duration {
        self.options.transaction_timeout.saturating_add(GRACE)
    }

    pub(super) fn set(&self, state: ProjectionState) {
        self.status.send_if_modified(|status| {
            let news = status.state != state;
            status.state = state;
            news
        });
    }

    pub(super) fn moved_to(&self, position: Position) {
        self.status.send_if_modified(|status| {
            let news = status.position != position;
            status.moved_to(position, None);
            news
        });
    }

    pub(super) fn knows_of(&self, head: Position) {
        self.status.send_if_modified(|status| {
            let news = Some(head) > status.head;
            status.knows_of(head);
            news
        });
    }

    pub(super) fn fail(&self, state: ProjectionState, error: String) {
        self.status.send_modify(|status| {
            status.state = state;
            status.last_error = Some(error);
        });
    }
}
