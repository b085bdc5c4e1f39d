//! Starts and runs the task of a projection as supervised work.

use std::sync::Arc;

use tokio::sync::{Mutex, OnceCell, watch};

use super::context::{NodeServices, TaskConfig, VersionedProjection};
use super::log_source::LogSource;
use super::page_cache::PageCache;
use super::task::ProjectionTask;
use crate::partition::Partition;
use crate::projection::control::Control;
use crate::projection::layout::{Layout, Role};
use crate::projection::memory_run::MemoryRun;
use crate::projection::{
    FollowMode, Projection, ProjectionOptions, ProjectionState, ProjectionStatus, ReadModel, StateClaim,
};
use crate::store::{BoxFuture, Filter};
use crate::supervised::{Inbox, Work};

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
