//! The constant part of a task, and its start.

use std::sync::{Arc, Weak};

use ractor::ActorCell;
use tokio::sync::{Mutex, OnceCell, watch};
use uuid::Uuid;

use super::log_source::LogSource;
use super::{PageCache, ProjectionTask};
use crate::bus::EventBus;
use crate::event::{Position, RecordedEvent};
use crate::feed::Feed;
use crate::lease::{LeaseWatcher, Observation};
use crate::partition::Partition;
use crate::projection::control::Control;
use crate::projection::layout::Layout;
use crate::projection::{
    FollowMode, MemoryRun, Projection, ProjectionOptions, ProjectionState, ProjectionStatus, ReadModel,
    StateClaim,
};
use crate::store::{BoxFuture, EventStore, Filter, LeaseInfo, StoreError};
use crate::supervised::{Inbox, Work};
use crate::telemetry::Metrics;

/// Services that the projections of a node share.
#[derive(Clone)]
pub(crate) struct NodeServices {
    pub(crate) store: Arc<dyn EventStore>,
    pub(crate) feed: Feed,
    pub(crate) node: Uuid,
    pub(crate) bus: Arc<dyn EventBus>,
    pub(crate) lease_watcher: LeaseWatcher,
    pub(crate) metrics: Metrics,
    pub(crate) supervisor: Option<ActorCell>,
    /// Dropped together with the runtime.
    pub(crate) alive: Weak<()>,
    /// End of the log when the runtime started.
    pub(crate) log_end: Position,
}

/// The work of a projection's task, supervised by its actor.
pub(in crate::projection) struct ProjectionWork<P, R> {
    context: Arc<TaskConfig>,
    /// Outlives a task that panics; one task at a time locks it.
    subject: Arc<Mutex<Subject<P, R>>>,
}

/// The user's part.
struct Subject<P, R> {
    instance: VersionedProjection<P>,
    read_model: Arc<R>,
    /// Claim on the memory that it folds into.
    claim: Option<StateClaim>,
}

/// A projection that writes to one version of its read model.
pub(in crate::projection) struct VersionedProjection<P> {
    pub(super) projection: P,
    /// The version.
    pub(super) version: u64,
    /// Creates an instance for another version, if
    /// [rebuildable](crate::runtime::Builder::rebuildable).
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

/// Role of a task for its projection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::projection) enum Role {
    /// Keeps the live version up to date.
    Live,
    /// Builds the next version beside the live one, during a rebuild.
    Rebuild,
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
    pub(super) bus: Arc<dyn EventBus>,
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
    alive: Weak<()>,
}

/// The part of a projection that a task works on.
pub(in crate::projection) struct TaskSpec {
    pub(in crate::projection) layout: Layout,
    pub(in crate::projection) role: Role,
    /// The partition, and whether this node should own it; `None` if every node may own the whole.
    pub(in crate::projection) partition: Option<(Partition, watch::Receiver<bool>)>,
    /// The pages that the partitions of this node share.
    pub(in crate::projection) pages: Option<PageCache>,
}

impl<P: Projection, R: ReadModel<Transaction = P::Transaction>> ProjectionWork<P, R> {
    pub(in crate::projection) fn new(
        instance: VersionedProjection<P>,
        filter: Filter,
        read_model: Arc<R>,
        options: ProjectionOptions,
        part: TaskSpec,
        claim: Option<StateClaim>,
        services: NodeServices,
    ) -> (Self, watch::Receiver<ProjectionStatus>) {
        let (status, receiver) = watch::channel(ProjectionStatus::new());
        let NodeServices { store, feed, node, bus, lease_watcher, metrics, alive, log_end, .. } = services;
        // A task that does not follow the feed (yet) reads the end of the log from it.
        feed.begin();
        let (partition, permit) = part.partition.unzip();
        let mut options = options;
        if !store.info().adoption.is_adopted() {
            // A durable consumer belongs to the original: this node would take its messages away.
            options.follow = FollowMode::Feed;
        }
        let context = Arc::new(TaskConfig {
            name: instance.projection.name().to_owned(),
            lease: part.layout.lease(partition, part.role),
            role: part.role,
            layout: part.layout,
            partition,
            filter,
            observations: lease_watcher.watch(options.lease),
            options,
            log: LogSource::new(store.clone(), part.pages.zip(partition)),
            store,
            feed,
            node,
            bus,
            lease_watcher,
            metrics,
            permit,
            status,
            floor: OnceCell::new(),
            log_end,
            alive,
        });
        let subject = Arc::new(Mutex::new(Subject { instance, read_model, claim }));
        (Self { context, subject }, receiver)
    }
}

impl<P: Projection, R: ReadModel<Transaction = P::Transaction>> Work for ProjectionWork<P, R> {
    type Control = Control;

    fn name(&self) -> String {
        let name = match self.context.partition {
            None => format!("projection {}", self.context.name),
            Some(partition) => format!("partition {partition} of projection {}", self.context.name),
        };
        match self.context.role {
            Role::Live => name,
            Role::Rebuild => format!("{name}, rebuilt"),
        }
    }

    fn run(&self, inbox: Inbox<Control>) -> BoxFuture<'static, ()> {
        let (context, subject) = (self.context.clone(), self.subject.clone());
        Box::pin(async move {
            let mut subject = subject.lock_owned().await;
            let Subject { instance, read_model, .. } = &mut *subject;
            // Held until the task has ended: an `apply` that blocks its thread outlives its
            // runtime.
            let _running = (!read_model.shared()).then(|| {
                MemoryRun::begin(
                    context.store.info().id,
                    &context.name,
                    inbox.stop_watch(),
                    context.alive.clone(),
                )
            });
            ProjectionTask::new(&context, instance, &**read_model, inbox).run().await;
        })
    }

    fn panicked(&self, panic: &str) {
        self.context.fail(ProjectionState::Retrying, format!("the task of the projection panicked: {panic}"));
    }

    fn ended(&self) {
        self.context.set(ProjectionState::Stopped);
        // A task that was torn down may still run the user's code: then the claim ends with the
        // task.
        if let Ok(mut subject) = self.subject.try_lock() {
            subject.claim = None;
        }
    }
}

impl TaskConfig {
    /// Returns whether the event is for this projection and this partition.
    pub(super) fn wants(&self, event: &RecordedEvent) -> bool {
        self.filter.matches(event) && self.is_here(event)
    }

    pub(super) fn is_here(&self, event: &RecordedEvent) -> bool {
        self.partition.is_none_or(|partition| partition.contains(&event.stream))
    }

    /// Returns the version to work on now, if there is one.
    pub(super) async fn version(&self, read_model: &impl ReadModel) -> Result<Option<u64>, StoreError> {
        Ok(self.layout.versions(read_model).await?.of(self.role))
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

    pub(super) fn set(&self, state: ProjectionState) {
        self.status.send_if_modified(|status| {
            let news = status.state != state;
            status.state = state;
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
