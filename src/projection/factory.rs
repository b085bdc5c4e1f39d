//! Start of a projection: one task, or one for each partition and each version to build.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use ractor::SpawnErr;
use tokio::sync::watch;

use super::handle::ProjectionHandle;
use super::layout::{Layout, Role};
use super::partition::{PartitionGroup, PartitionSlot, sum};
use super::task_handles::{Grouped, Working};
use super::time_limit::TimeLimited;
use super::worker::{NodeServices, PageCache, ProjectionWork, TaskSpec, VersionedProjection};
use super::{BuildTarget, Projection, ProjectionOptions, ReadModel, StateClaim};
use crate::partition::{self, Partition};
use crate::store::Filter;
use crate::supervised::Supervised;

/// A projection to register: an instance, or [`PerTarget`] for several.
///
/// Implemented for every [`Projection`].
pub trait IntoProjection {
    /// The projection.
    type Projection: Projection;

    /// Returns the projection with all its instances.
    #[doc(hidden)]
    fn into_projection(self) -> ProjectionFactory<Self::Projection>;
}

impl<P: Projection> IntoProjection for P {
    type Projection = P;

    fn into_projection(self) -> ProjectionFactory<P> {
        ProjectionFactory(Made::Single(self))
    }
}

/// A projection with an instance for each [`BuildTarget`].
///
/// It can be [rebuilt](ProjectionHandle::rebuild) beside the live version, and
/// [partitioned](ProjectionOptions::partitions). The instances have tables of their own for each
/// version of the read model; all have the same name and filter.
///
/// Some read models cannot cut over in a transaction: [`InMemory`](super::InMemory) and
/// [`AtLeastOnce`](super::AtLeastOnce). On these, a rebuild is
/// [refused](super::ControlError::NotRebuildable).
///
/// ```
/// # use storied::projection::{ApplyError, BuildTarget, PerTarget, Projection, SqliteReadModel};
/// # use storied::{AnyEvent, ProjectionOptions, RecordedEvent, Runtime};
/// # struct Sales(BuildTarget);
/// # impl Projection for Sales {
/// #     const NAME: &'static str = "sales"; type Event = AnyEvent; type Transaction = sqlx::SqliteConnection;
/// #     async fn apply(&mut self, _: AnyEvent, _: &RecordedEvent, _: &mut sqlx::SqliteConnection) -> Result<(), ApplyError> { Ok(()) }
/// # }
/// # fn register(read_model: SqliteReadModel) -> storied::runtime::Builder {
/// let options = ProjectionOptions::new().partitions(8);
/// Runtime::builder().projection_with(PerTarget::new(Sales), read_model, options)
/// # }
/// ```
pub struct PerTarget<P>(Maker<P>);

type Maker<P> = Arc<dyn Fn(BuildTarget) -> P + Send + Sync>;

impl<P: Projection> PerTarget<P> {
    /// Creates each instance with `make`.
    pub fn new(make: impl Fn(BuildTarget) -> P + Send + Sync + 'static) -> Self {
        Self(Arc::new(make))
    }
}

impl<P> fmt::Debug for PerTarget<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PerTarget").finish_non_exhaustive()
    }
}

impl<P: Projection> IntoProjection for PerTarget<P> {
    type Projection = P;

    fn into_projection(self) -> ProjectionFactory<P> {
        ProjectionFactory(Made::PerTarget(self.0))
    }
}

/// The instances of a projection.
pub struct ProjectionFactory<P>(Made<P>);

enum Made<P> {
    /// An instance that writes to a single version.
    Single(P),
    /// Creates an instance for each version, and each partition if there are several.
    PerTarget(Maker<P>),
}

impl<P> fmt::Debug for ProjectionFactory<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ProjectionFactory").field("single", &self.is_single()).finish()
    }
}

impl<P> ProjectionFactory<P> {
    /// Returns whether there is only one instance.
    pub(crate) fn is_single(&self) -> bool {
        matches!(self.0, Made::Single(_))
    }
}

impl<P: Projection> ProjectionFactory<P> {
    /// Calls `inspect` with a sample of the projection.
    pub(crate) fn with_sample<T>(&self, options: &ProjectionOptions, inspect: impl FnOnce(&P) -> T) -> T {
        match &self.0 {
            Made::Single(projection) => inspect(projection),
            Made::PerTarget(make) => {
                // start() reports a number out of range.
                let count = options.partitions.unwrap_or(1).clamp(1, partition::MOST);
                let partition = Partition::all(count).next().unwrap_or(Partition::whole());
                inspect(&make(BuildTarget { partition, version: 0 }))
            }
        }
    }

    /// Returns the name and the filter of the projection.
    pub(crate) fn describe(&self, options: &ProjectionOptions) -> (String, Filter) {
        let describe =
            |projection: &P| (projection.name().to_owned(), projection.filter().restricted_to::<P::Event>());
        self.with_sample(options, describe)
    }
}

fn instance<P: Projection>(make: &Maker<P>, partition: Partition) -> VersionedProjection<P> {
    let make = make.clone();
    VersionedProjection::made(move |version| make(BuildTarget { partition, version }))
}

/// Starts a projection. Connects to store and read model in the background, without a time limit.
pub(crate) async fn spawn<P, R>(
    made: ProjectionFactory<P>,
    filter: Filter,
    read_model: R,
    options: ProjectionOptions,
    claim: Option<StateClaim>,
    services: NodeServices,
) -> Result<ProjectionHandle, SpawnErr>
where
    P: Projection,
    R: ReadModel<Transaction = P::Transaction>,
{
    let name = made.with_sample(&options, |projection| projection.name().to_owned());
    let read_model = Arc::new(TimeLimited::new(read_model, name.clone(), options.transaction_timeout));
    let start = async |instance, part: TaskSpec, claim| {
        let services = services.clone();
        let supervisor = services.supervisor.clone();
        let (work, status) = ProjectionWork::new(
            instance,
            filter.clone(),
            read_model.clone(),
            options.clone(),
            part,
            claim,
            services,
        );
        Ok::<_, SpawnErr>(Working { actor: Supervised::spawn(work, supervisor).await?, status })
    };
    let partitions = options.partitions.filter(|_| !made.is_single());
    let layout = Layout::new(&name, partitions.unwrap_or(0));
    let part = |role, partition| TaskSpec { layout: layout.clone(), role, partition, pages: None };
    // Other read models refuse a rebuild; in memory, an idle rebuild task would apply the log a
    // second time.
    let switches = read_model.shared() && read_model.rolls_back();
    let (mut parts, mut rebuilds, mut slots) = (Vec::new(), Vec::new(), Vec::new());
    match (made.0, partitions) {
        (Made::Single(projection), _) => {
            parts.push(start(VersionedProjection::fixed(projection), part(Role::Live, None), claim).await?);
        }
        (Made::PerTarget(make), None) => {
            let made = || instance(&make, Partition::whole());
            parts.push(start(made(), part(Role::Live, None), claim).await?);
            if switches {
                rebuilds.push(start(made(), part(Role::Rebuild, None), None).await?);
            }
        }
        (Made::PerTarget(make), Some(count)) => {
            let (live_pages, rebuild_pages) =
                (PageCache::new(count, &options), PageCache::new(count, &options));
            for partition in Partition::all(count) {
                let assigned = watch::Sender::new(false);
                let permitted = || Some((partition, assigned.subscribe()));
                let made = || instance(&make, partition);
                let shared = |role, pages: &PageCache| TaskSpec {
                    pages: Some(pages.clone()),
                    ..part(role, permitted())
                };
                let live = start(made(), shared(Role::Live, &live_pages), None).await?;
                if switches {
                    rebuilds.push(start(made(), shared(Role::Rebuild, &rebuild_pages), None).await?);
                }
                let lease = layout.lease(Some(partition), Role::Live);
                slots.push(PartitionSlot { partition, lease, assigned, status: live.status.clone() });
                parts.push(live);
            }
        }
    }
    let store = services.store.clone();
    let group = spawn_group(name.clone(), layout.clone(), slots, options.lease, services).await?;
    let (parts, rebuilds) = (parts.into(), rebuilds.into());
    Ok(ProjectionHandle { name: name.into(), layout, parts, rebuilds, group, progress: read_model, store })
}

/// Starts the group of the partitions; `None` if the projection is not partitioned.
async fn spawn_group(
    name: String,
    layout: Layout,
    slots: Vec<PartitionSlot>,
    lease: Duration,
    services: NodeServices,
) -> Result<Option<Grouped>, SpawnErr> {
    if slots.is_empty() {
        return Ok(None);
    }
    let NodeServices { supervisor, lease_watcher, node, metrics, .. } = services;
    let slots: Arc<[PartitionSlot]> = slots.into();
    let (sender, status) = watch::channel(sum(&slots, None));
    let group =
        Arc::new(PartitionGroup { name, layout, slots, lease_watcher, node, lease, metrics, status: sender });
    let actor = Supervised::spawn(group.clone(), supervisor).await?;
    Ok(Some(Grouped { group, actor, status }))
}
