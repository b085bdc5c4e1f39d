//! Inspection and control of projections without their code, for an operator's tool.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::checkpoint_store::DynCheckpointStore;
use super::layout::{Layout, Role};
use super::request::Answer;
use super::{ProgressRecords, ReadModel, name_problem};
use crate::event::Position;
use crate::partition::Partition;
use crate::store::{
    CheckpointKey, CheckpointRecord, ControlChange, EventStore, LeaseInfo, ParkedEvent, ProgressWrite,
    Request, StoreError, StoredRequest,
};

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
        let ProgressRecords { projections, checkpoints } = self.progress.records().await?;
        let leases: BTreeMap<String, LeaseInfo> =
            self.store.leases().await?.into_iter().map(|info| (info.lease.name.clone(), info)).collect();
        let controls = self.store.controls().await?;
        let paused = |name: &str| controls.get(name).is_some_and(|control| control.paused);
        let mut names: BTreeSet<&str> =
            controls.keys().map(String::as_str).filter(|name| paused(name)).collect();
        names.extend(checkpoints.iter().map(|record| &*record.key.projection));
        let mut found = Vec::with_capacity(names.len());
        for name in names {
            let stored = projections.iter().find(|(of, _)| of == name);
            let stored = stored.map(|(_, stored)| *stored).unwrap_or_default();
            let layout = Layout::new(name, stored.partitions);
            let count = usize::from(stored.partitions.max(1));
            let of = |version: u64| {
                // Checkpoints of another number of partitions may be left over.
                let ours = move |record: &&CheckpointRecord| {
                    let key = &record.key;
                    key.projection == name && key.version == version && usize::from(key.partition) < count
                };
                checkpoints.iter().filter(ours)
            };
            let live: Vec<_> = of(stored.live_version).collect();
            let parts: Vec<_> = live
                .iter()
                .map(|record| {
                    let partition = Partition::all(stored.partitions).nth(usize::from(record.key.partition));
                    let owner = leases.get(&layout.lease(partition, Role::Live)).filter(|info| info.live);
                    PartRecord {
                        partition,
                        position: record.checkpoint.position,
                        updated_at: record.updated_at,
                        owner: owner.map(|info| info.lease.owner),
                    }
                })
                .collect();
            let requests = self.progress.requests(name, Request::FIRST, REQUESTS).await?;
            let begun = parts.len() == count;
            found.push(ProjectionRecord {
                name: name.to_owned(),
                // A partition that has never applied anything has no checkpoint.
                position: parts.iter().map(|part| part.position).min().filter(|_| begun).unwrap_or_default(),
                version: stored.live_version,
                parts,
                paused: paused(name),
                parked: live.iter().map(|record| record.parked).sum(),
                rebuild: stored.building_version.map(|version| {
                    let positions = of(version).map(|record| record.checkpoint.position);
                    let mut positions: Vec<_> = positions.collect();
                    positions.resize(count, Position::START);
                    RebuildRecord { version, positions }
                }),
                requests: requests.into_iter().map(|stored| (stored.request, stored.into())).collect(),
                foreign: live.iter().any(|record| record.store != self.store.info().id),
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
        // Not in `resume`: such a name may be left over.
        if let Some(problem) = name_problem(name) {
            return Err(StoreError::Invalid {
                reason: format!("pausing projection {name:?} failed: {problem}"),
            });
        }
        self.store.control(name, ControlChange::Pause).await.map(drop)
    }

    /// Resumes the projection on all nodes. A failed projection retries.
    ///
    /// # Errors
    /// If the store cannot be written.
    pub async fn resume(&self, name: &str) -> Result<(), StoreError> {
        self.store.control(name, ControlChange::Resume).await.map(drop)
    }

    /// Records a request to the nodes that run the projection, and returns.
    ///
    /// [`answer`](Self::answer) reports the result. If no node runs the projection, the next one
    /// that starts acts on the request. An equal request that still waits is replaced. A request to
    /// cancel a rebuild also withdraws a waiting request for a rebuild.
    ///
    /// # Errors
    /// If the store or the read model cannot be written. The request may be recorded nevertheless.
    pub async fn ask(&self, name: &str, request: Request) -> Result<RequestTicket, StoreError> {
        if request == Request::CancelRebuild
            && self
                .stored(name, Request::Rebuild)
                .await?
                .is_some_and(|stored| stored.refused_reason.is_none())
        {
            // Nodes cancel before they rebuild, which is right only for the other order.
            self.withdraw(name, Request::Rebuild).await?;
        }
        let (projection, stored) = (name.to_owned(), StoredRequest::new(request));
        self.progress.write(name, ProgressWrite::AddRequest { projection, request: stored }).await?;
        // The nodes read their state again, and the requests.
        self.store.control(name, ControlChange::Announce).await?;
        Ok(RequestTicket { projection: name.to_owned(), request })
    }

    /// Returns the result of a request.
    ///
    /// A refusal is kept until the request is [withdrawn](Self::withdraw) or made again.
    ///
    /// # Errors
    /// If the read model cannot be read.
    pub async fn answer(&self, asked: &RequestTicket) -> Result<Answer, StoreError> {
        Ok(self.stored(&asked.projection, asked.request).await?.map_or(Answer::Taken, Answer::from))
    }

    /// Returns a request as stored, if it exists.
    async fn stored(&self, name: &str, request: Request) -> Result<Option<StoredRequest>, StoreError> {
        let stored = self.progress.requests(name, request, 1).await?;
        Ok(stored.into_iter().find(|stored| stored.request == request))
    }

    /// Withdraws a request, or deletes its refusal; returns whether there was one.
    ///
    /// A node that has begun with it finishes.
    ///
    /// # Errors
    /// If the read model cannot be written.
    pub async fn withdraw(&self, name: &str, request: Request) -> Result<bool, StoreError> {
        let projection = name.to_owned();
        self.progress.write(name, ProgressWrite::RemoveRequest { projection, request, id: None }).await
    }

    /// Returns at most `limit` parked events of a projection, oldest first.
    ///
    /// # Errors
    /// If the read model cannot be read.
    pub async fn parked(&self, name: &str, limit: usize) -> Result<Vec<ParkedEvent>, StoreError> {
        let mut parked = Vec::new();
        for key in self.keys(name).await? {
            parked.extend(self.progress.parked(&key, limit).await?);
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
        for key in self.keys(name).await? {
            if self.progress.write(name, ProgressWrite::Unpark { key, position }).await? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Returns the keys of the checkpoints of the live version.
    async fn keys(&self, name: &str) -> Result<Vec<CheckpointKey>, StoreError> {
        let stored = self.progress.projection(name).await?;
        Ok(Layout::new(name, stored.partitions).keys(stored.live_version).collect())
    }
}

impl fmt::Debug for Operator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Operator").field("store", self.store.info()).finish_non_exhaustive()
    }
}
