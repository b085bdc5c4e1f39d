//! Start of a projection: one task, or one for each partition and each version to build.

use std::sync::Arc;

use ractor::SpawnErr;
use tokio::sync::watch;

use super::group::{Group, Seat, sum};
use super::handle::{Grouped, ProjectionHandle, Working};
use super::shape::Shape;
use super::time_limit::TimeLimited;
use super::worker::{Instance, PageCache, Part, ProjectionWork, Role, Surroundings};
use super::{Projection, ProjectionOptions, ReadModel, StateClaim, Target};
use crate::partition::Partition;
use crate::store::Filter;
use crate::supervised::Supervised;

/// The factory of a projection.
pub(crate) enum Made<P> {
    /// An instance that writes to a single version.
    Once(P),
    /// Creates an instance for each version of the read model.
    Versioned(Maker<P>),
    /// Creates an instance for each version and each of so many partitions.
    Partitioned(u16, Maker<P>),
}

pub(crate) type Maker<P> = Arc<dyn Fn(Target) -> P + Send + Sync>;

impl<P: Projection> Made<P> {
    /// Calls `look` with a sample of the projection.
    pub(crate) fn with_one<T>(&self, look: impl FnOnce(&P) -> T) -> T {
        match self {
            Self::Once(projection) => look(projection),
            Self::Versioned(make) => look(&make(Target { partition: Partition::whole(), version: 0 })),
            Self::Partitioned(count, make) => {
                let partition = Partition::all(*count).next().unwrap_or(Partition::whole());
                look(&make(Target { partition, version: 0 }))
            }
        }
    }
}

fn instance<P: Projection>(make: &Maker<P>, partition: Partition) -> Instance<P> {
    let make = make.clone();
    Instance::made(move |version| make(Target { partition, version }))
}

/// Starts a projection. Connects to store and read model in the background, without a time limit.
pub(crate) async fn spawn<P, R>(
    made: Made<P>,
    filter: Filter,
    read_model: R,
    options: ProjectionOptions,
    claim: Option<StateClaim>,
    surroundings: Surroundings,
) -> Result<ProjectionHandle, SpawnErr>
where
    P: Projection,
    R: ReadModel<Transaction = P::Transaction>,
{
    let name = made.with_one(|projection| projection.name().to_owned());
    let read_model = Arc::new(TimeLimited::new(read_model, options.transaction_timeout));
    let start = async |instance, part: Part, claim| {
        let surroundings = surroundings.clone();
        let supervisor = surroundings.supervisor.clone();
        let (work, status) = ProjectionWork::new(
            instance,
            filter.clone(),
            read_model.clone(),
            options.clone(),
            part,
            claim,
            surroundings,
        );
        Ok::<_, SpawnErr>(Working { actor: Supervised::spawn(work, supervisor).await?, status })
    };
    let shape = match &made {
        Made::Once(_) | Made::Versioned(_) => Shape::whole(&name),
        Made::Partitioned(count, _) => Shape::cut(&name, *count),
    };
    let part = |role, partition| Part { shape: shape.clone(), role, partition, pages: None };
    // Other read models refuse a rebuild; in memory, an idle rebuild task would apply the log a
    // second time.
    let switches = read_model.shared() && read_model.rolls_back();
    let (mut parts, mut rebuilds, mut seats) = (Vec::new(), Vec::new(), Vec::new());
    match made {
        Made::Once(projection) => {
            parts.push(start(Instance::fixed(projection), part(Role::Live, None), claim).await?);
        }
        Made::Versioned(make) => {
            let made = || instance(&make, Partition::whole());
            parts.push(start(made(), part(Role::Live, None), claim).await?);
            if switches {
                rebuilds.push(start(made(), part(Role::Rebuild, None), None).await?);
            }
        }
        Made::Partitioned(count, make) => {
            let (live_pages, rebuild_pages) =
                (PageCache::new(count, &options), PageCache::new(count, &options));
            for partition in Partition::all(count) {
                let permit = watch::Sender::new(false);
                let permitted = || Some((partition, permit.subscribe()));
                let made = || instance(&make, partition);
                let shared =
                    |role, pages: &PageCache| Part { pages: Some(pages.clone()), ..part(role, permitted()) };
                let live = start(made(), shared(Role::Live, &live_pages), None).await?;
                if switches {
                    rebuilds.push(start(made(), shared(Role::Rebuild, &rebuild_pages), None).await?);
                }
                let lease = shape.lease(Some(partition), Role::Live);
                seats.push(Seat { partition, lease, permit, status: live.status.clone() });
                parts.push(live);
            }
        }
    }
    let Surroundings { store, supervisor, lease_watcher, node, metrics, .. } = surroundings;
    let group = if seats.is_empty() {
        None
    } else {
        let seats: Arc<[Seat]> = seats.into();
        let (sender, status) = watch::channel(sum(&seats, None));
        let (name, shape, lease) = (name.clone(), shape.clone(), options.lease);
        let status_of = sender;
        let group =
            Arc::new(Group { name, shape, seats, lease_watcher, node, lease, metrics, status: status_of });
        let actor = Supervised::spawn(group.clone(), supervisor).await?;
        Some(Grouped { group, actor, status })
    };
    let (parts, rebuilds) = (parts.into(), rebuilds.into());
    Ok(ProjectionHandle { name: name.into(), shape, parts, rebuilds, group, progress: read_model, store })
}
