//! Registered projections, until the runtime starts.

use std::sync::Arc;

use ractor::SpawnErr;

use super::error::StartError;
use crate::bus::EventBus;
use crate::event::Position;
use crate::invalid_option::{InvalidOption, at_least};
use crate::partition;
use crate::projection::{
    self, FollowMode, NodeServices, Projection, ProjectionFactory, ProjectionHandle, ProjectionOptions,
    ReadModel, SharedState, Start, StateClaim, record_start,
};
use crate::store::{BoxFuture, EventStore, Filter};

/// A registered projection.
pub(super) struct ProjectionRegistration {
    pub(super) name: String,
    filter: Filter,
    pending: Box<dyn PendingStart>,
}

/// A projection that passed the checks and can start.
pub(super) struct CheckedProjection {
    filter: Filter,
    pending: Box<dyn PendingStart>,
}

/// Runs after a projection has started.
type OnStart = Box<dyn FnOnce(&ProjectionHandle) + Send>;

/// A registered projection without its types.
trait PendingStart: Send {
    /// Checks the registration, and claims the memory that the projection folds into.
    fn check<'a>(
        &'a mut self,
        name: &'a str,
        store: &'a Arc<dyn EventStore>,
        bus: Option<&'a dyn EventBus>,
        log_end: Position,
    ) -> BoxFuture<'a, Result<(), StartError>>;

    fn start(
        self: Box<Self>,
        filter: Filter,
        services: NodeServices,
    ) -> BoxFuture<'static, Result<ProjectionHandle, SpawnErr>>;
}

struct Pending<P, R> {
    made: ProjectionFactory<P>,
    read_model: R,
    options: ProjectionOptions,
    /// In-memory state that may outlive the runtime.
    state: Option<SharedState>,
    claim: Option<StateClaim>,
    on_start: OnStart,
}

impl ProjectionRegistration {
    pub(super) fn new<P, R>(made: ProjectionFactory<P>, read_model: R, options: ProjectionOptions) -> Self
    where
        P: Projection,
        R: ReadModel<Transaction = P::Transaction>,
    {
        let state = read_model.snapshots().map(projection::Snapshots::shared_state);
        Self::over(state, made, read_model, options, Box::new(|_| {}))
    }

    /// Registers a projection over an in-memory state that may outlive the runtime.
    pub(super) fn over<P, R>(
        state: Option<SharedState>,
        made: ProjectionFactory<P>,
        read_model: R,
        options: ProjectionOptions,
        on_start: OnStart,
    ) -> Self
    where
        P: Projection,
        R: ReadModel<Transaction = P::Transaction>,
    {
        let (name, filter) = made.describe(&options);
        let pending = Pending { made, read_model, options, state, claim: None, on_start };
        Self { name, filter, pending: Box::new(pending) }
    }

    /// Checks the filter.
    pub(super) fn check_filter(&self) -> Result<(), StartError> {
        self.filter.check().map_err(|error| StartError::Filter { name: self.name.clone(), error })
    }

    /// Checks all registrations before anything runs.
    pub(super) async fn check(
        mut self,
        store: &Arc<dyn EventStore>,
        bus: Option<&dyn EventBus>,
        log_end: Position,
    ) -> Result<CheckedProjection, StartError> {
        let filter = self.filter;
        self.pending.check(&self.name, store, bus, log_end).await?;
        Ok(CheckedProjection { filter, pending: self.pending })
    }
}

impl CheckedProjection {
    pub(super) async fn start(self, services: NodeServices) -> Result<ProjectionHandle, SpawnErr> {
        self.pending.start(self.filter, services).await
    }
}

impl<P, R> PendingStart for Pending<P, R>
where
    P: Projection,
    R: ReadModel<Transaction = P::Transaction>,
{
    fn check<'a>(
        &'a mut self,
        name: &'a str,
        store: &'a Arc<dyn EventStore>,
        bus: Option<&'a dyn EventBus>,
        log_end: Position,
    ) -> BoxFuture<'a, Result<(), StartError>> {
        Box::pin(async move {
            let Self { made, read_model, options, .. } = self;
            options.validate()?;
            if options.follow == FollowMode::Durable && !bus.is_some_and(EventBus::is_durable) {
                return Err(StartError::NotDurable { name: name.to_owned(), bus: bus.map(EventBus::name) });
            }
            if let Some(partitions) = options.partitions {
                check_partitions(name, partitions, made.is_single(), read_model.shared())?;
            }
            if let Some(snapshots) = read_model.snapshots() {
                at_least("InMemory::snapshot_every", snapshots.every(), 1)?;
                if options.start == Some(Start::Now) {
                    let range =
                        "Beginning, At or Since for projections with snapshots: Now differs at each start";
                    return Err(InvalidOption::new("ProjectionOptions::start", Start::Now, range).into());
                }
            }
            let outside = read_model.shared() && !read_model.rolls_back();
            if outside && !record_start(read_model, store, name, options.start, log_end).await? {
                return Err(StartError::NoStartPosition { name: name.to_owned() });
            }
            if let Some(state) = self.state.take() {
                let claimed = state.claim().await;
                let claim = claimed.map_err(|_| StartError::StateInUse { name: name.to_owned() })?;
                self.claim = Some(claim);
            }
            Ok(())
        })
    }

    fn start(
        self: Box<Self>,
        filter: Filter,
        services: NodeServices,
    ) -> BoxFuture<'static, Result<ProjectionHandle, SpawnErr>> {
        let Self { made, read_model, options, claim, on_start, .. } = *self;
        Box::pin(async move {
            let handle = projection::spawn(made, filter, read_model, options, claim, services).await?;
            on_start(&handle);
            Ok(handle)
        })
    }
}

/// Starts all projections.
pub(super) async fn start_projections(
    checked: Vec<CheckedProjection>,
    services: &NodeServices,
) -> Result<Vec<ProjectionHandle>, SpawnErr> {
    let mut handles = Vec::with_capacity(checked.len());
    for projection in checked {
        handles.push(projection.start(services.clone()).await?);
    }
    Ok(handles)
}

fn check_partitions(name: &str, partitions: u16, single: bool, shared: bool) -> Result<(), StartError> {
    let reason = if !shared {
        "every node has its own read model and needs all of it"
    } else if partitions == 0 {
        "at least 1 is required"
    } else if partitions > partition::MOST {
        "at most 256 are allowed"
    } else if single {
        "it has a single instance; register PerTarget::new(…), which creates an instance for each partition"
    } else {
        return Ok(());
    };
    Err(StartError::Partitions { name: name.to_owned(), partitions, reason })
}
