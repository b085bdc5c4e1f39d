//! Looking at projections and acting on them without their code: what an operator's tool needs.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};
use tokio::time::{Instant, sleep};
use uuid::Uuid;

use super::ReadModel;
use super::progress::Progress;
use super::request::{Answer, Request};
use super::shape::{Row, Shape, Versions};
use super::worker::Role;
use crate::event::Position;
use crate::lease::{self, Renewals};
use crate::partition::Partition;
use crate::store::{EventStore, LeaseInfo, ParkedEvent, StoreError};

/// How long a node is kept waiting while it is told that there is something for it.
const ORDER: Duration = Duration::from_secs(10);

/// How many requests of a projection are looked at.
const REQUESTS: usize = 1_000;

/// The projections that keep their checkpoints in one place, seen and told from outside: by a program that has neither their
/// code nor their events' types.
///
/// What needs their code is asked of the nodes that run them ([`ask`](Self::ask)); the rest is done at once. A projection in
/// memory keeps nothing anywhere: it can be paused and resumed, and is not seen otherwise.
///
/// ```no_run
/// use std::sync::Arc;
/// use storied::projection::{Operator, PostgresReadModel, Request};
/// use storied::{EventStore, PostgresStore};
///
/// # async fn run(pool: sqlx::PgPool) -> Result<(), storied::StoreError> {
/// let store: Arc<dyn EventStore> = Arc::new(PostgresStore::connect("").await?);
/// let operator = Operator::new(store, PostgresReadModel::new(pool)).await?;
/// for projection in operator.projections().await? {
///     println!("{} is at {}", projection.name, projection.position);
/// }
/// let asked = operator.ask("revenue", Request::Reset).await?;
/// println!("{:?}", operator.answer(&asked).await?);
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Operator {
    store: Arc<dyn EventStore>,
    progress: Arc<dyn Progress>,
}

/// A projection, as what it keeps tells.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ProjectionRecord {
    /// Its name.
    pub name: String,
    /// Everything up to here is applied, by all of its parts.
    pub position: Position,
    /// The version of the read model that is live: 0 before the first rebuild.
    pub version: u64,
    /// The projection, or each of its partitions, in order. Empty if it keeps nothing here and is only known to be paused.
    pub parts: Vec<PartRecord>,
    /// Whether it was told to stand still.
    pub paused: bool,
    /// How many events it has put aside.
    pub parked: u64,
    /// The version that is being built beside the live one, if there is one.
    pub rebuild: Option<RebuildRecord>,
    /// What was asked of its nodes, and was not done yet or refused.
    pub requests: Vec<(Request, Answer)>,
    /// Whether it is of another event store than the one it is looked at with.
    pub foreign: bool,
}

/// A projection, or a partition of one.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct PartRecord {
    /// Which one; `None` is all.
    pub partition: Option<Partition>,
    /// Everything up to here is applied.
    pub position: Position,
    /// When that was last written. It is not while there is nothing new in the log.
    pub updated_at: DateTime<Utc>,
    /// The node that owns it at this moment.
    pub owner: Option<Uuid>,
}

/// A version that is being built.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct RebuildRecord {
    /// Which one.
    pub version: u64,
    /// Where each of its parts is, in order.
    pub positions: Vec<Position>,
}

/// A [`Request`] that was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asked {
    projection: String,
    request: Request,
}

impl Operator {
    /// For the projections of `store` that keep their checkpoints in `read_model`, or in the store's own database, if it is one
    /// for that. Nothing is created there.
    ///
    /// # Errors
    /// `Incompatible` when nobody has kept anything there yet; `Invalid` for a read model that does not list what it
    /// [keeps](ReadModel::records); otherwise when it cannot be read.
    pub async fn new(store: Arc<dyn EventStore>, read_model: impl ReadModel) -> Result<Self, StoreError> {
        let progress: Arc<dyn Progress> = Arc::new(read_model);
        // First: preparing a read model would create what is missing.
        progress.records().await?;
        progress.prepare(&store).await?;
        Ok(Self { store, progress })
    }

    /// All projections that keep anything here or are paused, by name.
    ///
    /// # Errors
    /// When the store or the read model cannot be read.
    pub async fn projections(&self) -> Result<Vec<ProjectionRecord>, StoreError> {
        let records = self.progress.records().await?;
        let leases: BTreeMap<String, LeaseInfo> =
            self.store.leases().await?.into_iter().map(|info| (info.lease.name.clone(), info)).collect();
        let paused = self.store.paused().await?;
        let rows: Vec<_> =
            records.iter().filter_map(|record| Some((Row::parse(&record.name)?, record))).collect();
        let mut names: BTreeSet<&str> = paused.iter().map(String::as_str).collect();
        names.extend(rows.iter().map(|(row, _)| row.name));
        let mut found = Vec::with_capacity(names.len());
        for name in names {
            let shape = Shape::whole(name);
            let versions = records.iter().find(|record| record.name == shape.version());
            let versions = Versions::from(versions.map(|record| record.checkpoint).unwrap_or_default());
            let cut = records.iter().find(|record| record.name == shape.record());
            let cut = cut.map_or(0, |record| u16::try_from(record.checkpoint.mark).unwrap_or(u16::MAX));
            let of = |version: u64| {
                // Rows of another number of partitions may be left over.
                let ours = move |row: &Row<'_>| match row.partition {
                    Some(index) => index < cut,
                    None => cut == 0,
                };
                let of_version =
                    rows.iter().filter(move |(row, _)| row.name == name && row.version == version);
                let mut parts: Vec<_> = of_version.filter(|(row, _)| ours(row)).collect();
                parts.sort_by_key(|(row, _)| row.partition);
                parts
            };
            let live = of(versions.live);
            let mut parts = Vec::with_capacity(live.len());
            for (row, record) in &live {
                let partition = row.partition.and_then(|index| Partition::all(cut).nth(usize::from(index)));
                let owner = leases.get(&shape.lease(partition, Role::Live)).filter(|info| info.live);
                parts.push(PartRecord {
                    partition,
                    position: record.checkpoint.position,
                    updated_at: record.updated_at,
                    owner: owner.map(|info| info.lease.owner),
                });
            }
            let mut requests = Vec::new();
            for kind in Request::KINDS {
                let row = shape.request(kind);
                if records.iter().any(|record| record.name == row && record.parked > 0) {
                    for kept in self.progress.parked(&row, REQUESTS).await? {
                        requests.extend(Request::of(kind, &kept).map(|request| (request, Answer::of(&kept))));
                    }
                }
            }
            let begun = parts.len() == usize::from(cut.max(1));
            found.push(ProjectionRecord {
                name: name.to_owned(),
                // A partition that has never done anything has no row.
                position: parts.iter().map(|part| part.position).min().filter(|_| begun).unwrap_or_default(),
                version: versions.live,
                parts,
                paused: paused.contains(name),
                parked: live.iter().map(|(_, record)| record.parked).sum(),
                rebuild: versions.rebuilt.map(|version| RebuildRecord {
                    version,
                    positions: {
                        let mut positions: Vec<_> =
                            of(version).iter().map(|(_, record)| record.checkpoint.position).collect();
                        positions.resize(usize::from(cut.max(1)), Position::START);
                        positions
                    },
                }),
                requests,
                foreign: live.iter().any(|(_, record)| record.store != self.store.info().id),
            });
        }
        Ok(found)
    }

    /// The projection of that name, if there is one.
    ///
    /// # Errors
    /// As [`projections`](Self::projections).
    pub async fn projection(&self, name: &str) -> Result<Option<ProjectionRecord>, StoreError> {
        Ok(self.projections().await?.into_iter().find(|projection| projection.name == name))
    }

    /// Makes it stand still from now on, on all nodes (they notice within a second), also after a restart.
    ///
    /// # Errors
    /// When the store cannot be written.
    pub async fn pause(&self, name: &str) -> Result<(), StoreError> {
        self.store.set_paused(name, true).await
    }

    /// Makes it go on, on all nodes. One that failed tries again.
    ///
    /// # Errors
    /// When the store cannot be written, or others act on the projection all the time.
    pub async fn resume(&self, name: &str) -> Result<(), StoreError> {
        self.store.set_paused(name, false).await?;
        self.call(name).await
    }

    /// Asks the nodes that run the projection to do something, and returns: [`answer`](Self::answer) tells whether one has. If
    /// none runs, the next one that starts does it. The same request, made before and not done yet, is replaced; to cancel a
    /// rebuild withdraws the request for one, too.
    ///
    /// # Errors
    /// When store or read model cannot be written. The request may stand then.
    pub async fn ask(&self, name: &str, request: Request) -> Result<Asked, StoreError> {
        if request == Request::CancelRebuild {
            // Nodes cancel before they rebuild, which is right for the other order only.
            let row = Shape::whole(name).request(Request::Rebuild.kind());
            let stand = self.progress.parked(&row, 1).await?;
            if stand.iter().any(|kept| Answer::of(kept) == Answer::Waiting) {
                self.withdraw(name, Request::Rebuild).await?;
            }
        }
        let kept = request.to_keep()?;
        self.progress.post(&Shape::whole(name).request(request.kind()), &kept).await?;
        self.call(name).await?;
        Ok(Asked { projection: name.to_owned(), request })
    }

    /// What became of a request. A refusal is told until it is [withdrawn](Self::withdraw) or asked for again.
    ///
    /// # Errors
    /// When the read model cannot be read.
    pub async fn answer(&self, asked: &Asked) -> Result<Answer, StoreError> {
        let row = Shape::whole(&asked.projection).request(asked.request.kind());
        let kept = self.progress.parked(&row, usize::MAX).await?;
        let kept = kept.iter().find(|kept| kept.position == asked.request.position());
        Ok(kept.map_or(Answer::Taken, Answer::of))
    }

    /// Takes a request back, or forgets that it was refused; whether there was one. A node that has begun finishes.
    ///
    /// # Errors
    /// When the read model cannot be written.
    pub async fn withdraw(&self, name: &str, request: Request) -> Result<bool, StoreError> {
        let row = Shape::whole(name).request(request.kind());
        self.progress.remove_parked(&row, request.position()).await
    }

    /// The parked events of a projection, oldest first, at most `limit`.
    ///
    /// # Errors
    /// When the read model cannot be read.
    pub async fn parked(&self, name: &str, limit: usize) -> Result<Vec<ParkedEvent>, StoreError> {
        let mut parked = Vec::new();
        for row in self.rows(name).await? {
            parked.extend(self.progress.parked(&row, limit).await?);
        }
        parked.sort_by_key(|event| event.position);
        parked.truncate(limit);
        Ok(parked)
    }

    /// Forgets a parked event for good; whether there was one.
    ///
    /// # Errors
    /// When the read model cannot be written.
    pub async fn discard_parked(&self, name: &str, position: Position) -> Result<bool, StoreError> {
        for row in self.rows(name).await? {
            if self.progress.remove_parked(&row, position).await? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Where the live version keeps its checkpoints.
    async fn rows(&self, name: &str) -> Result<Vec<String>, StoreError> {
        let shape = Shape::whole(name);
        let live = Versions::from(self.progress.checkpoint(&shape.version()).await?).live;
        let cut = self.progress.checkpoint(&shape.record()).await?.mark;
        Ok(match u16::try_from(cut).unwrap_or(u16::MAX) {
            0 => vec![shape.row(None, live)],
            cut => Partition::all(cut).map(|partition| shape.row(Some(partition), live)).collect(),
        })
    }

    /// Makes the nodes look again at everything that concerns the projection.
    async fn call(&self, name: &str) -> Result<(), StoreError> {
        let order = Shape::whole(name).order();
        // Long enough to see that nothing renews a lease of this kind.
        let patience = ORDER * 3 / 2;
        let give_up = Instant::now() + patience;
        let mut renewals = Renewals::default();
        loop {
            let leases = self.store.leases().await?.into_iter();
            let abandoned =
                leases.filter(|info| info.lease.name == order).find(|info| renewals.is_abandoned(info));
            let owner = Uuid::new_v4();
            let taken = lease::acquire(&*self.store, &order, owner, ORDER, abandoned.as_ref()).await?;
            if let Some(lease) = taken {
                return self.store.release_lease(&lease).await;
            }
            if Instant::now() >= give_up {
                let reason =
                    format!("others have acted on projection {name} for {patience:?}; try again later");
                return Err(StoreError::Unavailable { reason, source: None });
            }
            sleep(Duration::from_millis(100)).await;
        }
    }
}

impl fmt::Debug for Operator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Operator").field("store", self.store.info()).finish_non_exhaustive()
    }
}
