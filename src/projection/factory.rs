//! Start of a projection: one task, or one for each partition and each version to build.

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
use crate::partition::Partition;
use crate::store::Filter;
use crate::supervised::Supervised;

/// The factory of a projection.
pub(crate) enum ProjectionFactory<P> {
    /// An instance that writes to a single version.
    Single(P),
    /// Creates an instance for each version of the read model.
    Versioned(Maker<P>),
    /// Creates an instance for each version and each of so many partitions.
    Partitioned(u16, Maker<P>),
}

pub(crate) type Maker<P> = Arc<dyn Fn(BuildTarget) -> P + Send + Sync>;

impl<P: Projection> ProjectionFactory<P> {
    /// Calls `inspect` with a sample of the projection.
    pub(crate) fn with_sample<T>(&self, inspect: impl FnOnce(&P) -> T) -> T {
        match self {
            Self::Single(projection) => inspect(projection),
            Self::Versioned(make) => {
                inspect(&make(BuildTarget { partition: Partition::whole(), version: 0 }))
            }
            Self::Partitioned(count, make) => {
                let partition = Partition::all(*count).next().unwrap_or(Partition::whole());
                inspect(&make(BuildTarget { partition, version: 0 }))
            }
        }
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
    let name = made.with_sample(|projection| projection.name().to_owned());
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
    let layout = match &made {
        ProjectionFactory::Single(_) | ProjectionFactory::Versioned(_) => Layout::new(&name, 0),
        ProjectionFactory::Partitioned(count, _) => Layout::new(&name, *count),
    };
    let part = |role, partition| TaskSpec { layout: layout.clone(), role, partition, pages: None };
    // Other read models refuse a rebuild; in memory, an idle rebuild task would apply the log a
    // second time.
    let switches = read_model.shared() && read_model.rolls_back();
    let (mut parts, mut rebuilds, mut slots) = (Vec::new(), Vec::new(), Vec::new());
    match made {
        ProjectionFactory::Single(projection) => {
            parts.push(start(VersionedProjection::fixed(projection), part(Role::Live, None), claim).await?);
        }
        ProjectionFactory::Versioned(make) => {
            let made = || instance(&make, Partition::whole());
            parts.push(start(made(), part(Role::Live, None), claim).await?);
            if switches {
                rebuilds.push(start(made(), part(Role::Rebuild, None), None).await?);
            }
        }
        ProjectionFactory::Partitioned(count, make) => {
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
