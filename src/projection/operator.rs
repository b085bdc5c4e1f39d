//! Inspection and control of projections without their code, for an operator's tool.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};
use tokio::time::{Instant, sleep};
use uuid::Uuid;

use super::checkpoint_store::{ATTEMPTS, DynCheckpointStore};
use super::control::ControlError;
use super::layout::{CheckpointKey, Layout, Role, Versions};
use super::request::{Answer, Request};
use super::{ReadModel, name_problem};
use crate::event::Position;
use crate::lease::{self, Renewals};
use crate::partition::Partition;
use crate::store::{EventStore, LeaseInfo, ParkedEvent, StoreError};

/// Maximum time that a node is held up by the notification of a request.
const ORDER: Duration = Duration::from_secs(10);

/// Maximum number of requests that are read for a projection.
const REQUESTS: usize = 1_000;

/// External view and control of the projections that share one checkpoint database.
///
/// The calling program needs neither the code of the projections nor the types of their events.
/// Actions that need this code are requests to the nodes that run it ([`ask`](Self::ask)); all
/// others take effect at once. A projection in memory stores no checkpoint: it can be paused and
/// resumed, and is otherwise invisible.
///
/// ```no_run
/// use std::sync::Arc;
/// use storied::projection::{Operator, PostgresReadModel, Request};
/// use storied::{EventStore, PostgresStore};
///
/// # async fn run(pool: sqlx::PgPool) -> Result<(), Box<dyn std::error::Error>> {
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
    progress: Arc<dyn DynCheckpointStore>,
}

/// A projection, as stored.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ProjectionRecord {
    /// Name of the projection.
    pub name: String,
    /// Position up to which all of its parts have applied everything.
    pub position: Position,
    /// Live version of the read model: 0 before the first rebuild.
    pub version: u64,
    /// The projection, or each of its partitions, in order.
    ///
    /// Empty if it has no checkpoint here and is only known to be paused.
    pub parts: Vec<PartRecord>,
    /// Whether the projection is paused.
    pub paused: bool,
    /// Number of parked events.
    pub parked: u64,
    /// The version that is being built beside the live one, if there is one.
    pub rebuild: Option<RebuildRecord>,
    /// Requests to its nodes that are waiting or refused.
    pub requests: Vec<(Request, Answer)>,
    /// Whether the progress belongs to another event store than the operator's.
    pub foreign: bool,
}

/// A projection, or a partition of one.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct PartRecord {
    /// The partition; `None` if the projection is not partitioned.
    pub partition: Option<Partition>,
    /// Position up to which everything is applied.
    pub position: Position,
    /// Time of the last write of the position. Not written while the log has no new events.
    pub updated_at: DateTime<Utc>,
    /// The node that owns it now.
    pub owner: Option<Uuid>,
}

/// A version that is being built.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct RebuildRecord {
    /// The version.
    pub version: u64,
    /// Position of each of its parts, in order.
    pub positions: Vec<Position>,
}

/// A [`Request`] that was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RequestTicket {
    projection: String,
    request: Request,
}

impl Operator {
    /// Creates an operator for the projections of `store` that keep their checkpoints in
    /// `read_model`.
    ///
    /// An [`AtLeastOnce`](super::AtLeastOnce) read model stands for the store's own database. Creates no
    /// tables.
    ///
    /// # Errors
    /// `Incompatible` if the database was never used, `Invalid` if the read model does not
    /// [list](ReadModel::records) its checkpoints; otherwise if it cannot be read.
    pub async fn new(store: Arc<dyn EventStore>, read_model: impl ReadModel) -> Result<Self, StoreError> {
        let progress: Arc<dyn DynCheckpointStore> = Arc::new(read_model);
        // First: preparing a read model would create missing tables.
        progress.records().await?;
        progress.prepare(&store).await?;
        Ok(Self { store, progress })
    }

    /// Returns all projections that have a checkpoint here or are paused, by name.
    ///
    /// # Errors
    /// If the store or the read model cannot be read.
    pub async fn projections(&self) -> Result<Vec<ProjectionRecord>, StoreError> {
        let records = self.progress.records().await?;
        let leases: BTreeMap<String, LeaseInfo> =
            self.store.leases().await?.into_iter().map(|info| (info.lease.name.clone(), info)).collect();
        let paused = self.store.paused().await?;
        let rows: Vec<_> =
            records.iter().filter_map(|record| Some((CheckpointKey::parse(&record.name)?, record))).collect();
        let mut names: BTreeSet<&str> = paused.iter().map(String::as_str).collect();
        names.extend(rows.iter().map(|(row, _)| row.name));
        let mut found = Vec::with_capacity(names.len());
        for name in names {
            let layout = Layout::single(name);
            let versions = records.iter().find(|record| record.name == layout.version());
            let versions = Versions::from(versions.map(|record| record.checkpoint).unwrap_or_default());
            let cut = records.iter().find(|record| record.name == layout.record());
            let cut = cut.map_or(0, |record| u16::try_from(record.checkpoint.mark).unwrap_or(u16::MAX));
            let of = |version: u64| {
                // Rows of another number of partitions may be left over.
                let ours = move |row: &CheckpointKey<'_>| match row.partition {
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
                let owner = leases.get(&layout.lease(partition, Role::Live)).filter(|info| info.live);
                parts.push(PartRecord {
                    partition,
                    position: record.checkpoint.position,
                    updated_at: record.updated_at,
                    owner: owner.map(|info| info.lease.owner),
                });
            }
            let mut requests = Vec::new();
            for kind in Request::KINDS {
                let row = layout.request(kind);
                if records.iter().any(|record| record.name == row && record.parked > 0) {
                    for kept in self.progress.parked(&row, REQUESTS).await? {
                        requests.extend(Request::of(kind, &kept).map(|request| (request, Answer::of(&kept))));
                    }
                }
            }
            let begun = parts.len() == usize::from(cut.max(1));
            found.push(ProjectionRecord {
                name: name.to_owned(),
                // A partition that has never applied anything has no row.
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

    /// Returns the projection of that name, if there is one.
    ///
    /// # Errors
    /// As [`projections`](Self::projections).
    pub async fn projection(&self, name: &str) -> Result<Option<ProjectionRecord>, StoreError> {
        Ok(self.projections().await?.into_iter().find(|projection| projection.name == name))
    }

    /// Pauses the projection on all nodes, also after a restart.
    ///
    /// Nodes notice within 1 s.
    ///
    /// # Errors
    /// `Invalid` if no projection can have this name. If the store cannot be written.
    pub async fn pause(&self, name: &str) -> Result<(), StoreError> {
        // Not in `resume`, which removes such a name.
        if let Some(problem) = name_problem(name) {
            return Err(StoreError::Invalid {
                reason: format!("pausing projection {name:?} failed: {problem}"),
            });
        }
        self.store.set_paused(name, true).await
    }

    /// Resumes the projection on all nodes. A failed projection retries.
    ///
    /// # Errors
    /// If the store cannot be written; [`Conflict`](ControlError::Conflict) if concurrent actions on
    /// the projection do not end.
    pub async fn resume(&self, name: &str) -> Result<(), ControlError> {
        self.store.set_paused(name, false).await?;
        self.call(name).await
    }

    /// Records a request to the nodes that run the projection, and returns.
    ///
    /// [`answer`](Self::answer) reports the result. If no node runs the projection, the next one
    /// that starts acts on the request. An equal request that still waits is replaced. A request to
    /// cancel a rebuild also withdraws a waiting request for a rebuild.
    ///
    /// # Errors
    /// If the store or the read model cannot be written; [`Conflict`](ControlError::Conflict) if
    /// concurrent actions on the projection do not end. The request may be recorded nevertheless.
    pub async fn ask(&self, name: &str, request: Request) -> Result<RequestTicket, ControlError> {
        if request == Request::CancelRebuild {
            // Nodes cancel before they rebuild, which is right only for the other order.
            let row = Layout::single(name).request(Request::Rebuild.kind());
            let stand = self.progress.parked(&row, 1).await?;
            if stand.iter().any(|kept| Answer::of(kept) == Answer::Waiting) {
                self.withdraw(name, Request::Rebuild).await?;
            }
        }
        let kept = request.to_keep()?;
        let row = Layout::single(name).request(request.kind());
        if !self.progress.post(&row, &kept).await? {
            let reason =
                format!("storing a request in {row} failed: concurrent writes in all {ATTEMPTS} attempts");
            return Err(ControlError::Conflict { name: name.to_owned(), reason });
        }
        self.call(name).await?;
        Ok(RequestTicket { projection: name.to_owned(), request })
    }

    /// Returns the result of a request.
    ///
    /// A refusal is kept until the request is [withdrawn](Self::withdraw) or made again.
    ///
    /// # Errors
    /// If the read model cannot be read.
    pub async fn answer(&self, asked: &RequestTicket) -> Result<Answer, StoreError> {
        let row = Layout::single(&asked.projection).request(asked.request.kind());
        let kept = self.progress.parked(&row, usize::MAX).await?;
        let kept = kept.iter().find(|kept| kept.position == asked.request.position());
        Ok(kept.map_or(Answer::Taken, Answer::of))
    }

    /// Withdraws a request, or deletes its refusal; returns whether there was one.
    ///
    /// A node that has begun with it finishes.
    ///
    /// # Errors
    /// If the read model cannot be written.
    pub async fn withdraw(&self, name: &str, request: Request) -> Result<bool, StoreError> {
        let row = Layout::single(name).request(request.kind());
        self.progress.remove_parked(&row, request.position()).await
    }

    /// Returns at most `limit` parked events of a projection, oldest first.
    ///
    /// # Errors
    /// If the read model cannot be read.
    pub async fn parked(&self, name: &str, limit: usize) -> Result<Vec<ParkedEvent>, StoreError> {
        let mut parked = Vec::new();
        for row in self.rows(name).await? {
            parked.extend(self.progress.parked(&row, limit).await?);
        }
        parked.sort_by_key(|event| event.position);
        parked.truncate(limit);
        Ok(parked)
    }

    /// Deletes a parked event permanently; returns whether it existed.
    ///
    /// # Errors
    /// If the read model cannot be written.
    pub async fn discard_parked(&self, name: &str, position: Position) -> Result<bool, StoreError> {
        for row in self.rows(name).await? {
            if self.progress.remove_parked(&row, position).await? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Returns the checkpoint names of the live version.
    async fn rows(&self, name: &str) -> Result<Vec<String>, StoreError> {
        let layout = Layout::single(name);
        let live = Versions::from(self.progress.checkpoint(&layout.version()).await?).live;
        let cut = self.progress.checkpoint(&layout.record()).await?.mark;
        Ok(match u16::try_from(cut).unwrap_or(u16::MAX) {
            0 => vec![layout.row(None, live)],
            cut => Partition::all(cut).map(|partition| layout.row(Some(partition), live)).collect(),
        })
    }

    /// Makes the nodes re-read all state of the projection.
    async fn call(&self, name: &str) -> Result<(), ControlError> {
        let order = Layout::single(name).order();
        // Long enough to detect that a lease of this kind is not renewed.
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
                return Ok(self.store.release_lease(&lease).await?);
            }
            if Instant::now() >= give_up {
                let reason = format!("its nodes were not notified: concurrent actions for {patience:?}");
                return Err(ControlError::Conflict { name: name.to_owned(), reason });
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
