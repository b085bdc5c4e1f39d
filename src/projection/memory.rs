use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{ReadModel, SnapshotState, Snapshots};
use crate::event::Position;
use crate::store::{
    BoxFuture, Checkpoint, CheckpointError, EventStore, ParkedEvent, SnapshotRevision, StoreError,
};

/// A read model in the projection's own memory.
///
/// Every node builds its own at every start, from the start of the log or from its last
/// [snapshot](Self::snapshot_every).
///
/// The projection must implement [`reset`](super::Projection::reset). It is called at every start
/// before the first event, so that state that outlives its runtime, for example in an [`Arc`], is
/// empty again. A projection without it stops. Two runtimes of one process need separate states;
/// storied detects a shared state only with snapshots.
///
/// Nothing can be rolled back, so an `apply` or `reset` that may fail should do so before it
/// changes anything. With snapshots it must: its changes are saved and remain after a restart.
#[derive(Debug, Default)]
pub struct InMemory {
    progress: Mutex<Progress>,
    snapshots: Option<Snapshots>,
}

#[derive(Debug, Default)]
struct Progress {
    checkpoint: Checkpoint,
    parked: BTreeMap<Position, ParkedEvent>,
}

impl InMemory {
    /// Creates a read model for one projection.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Keeps a snapshot of `state` in the event store, for a faster start.
    ///
    /// A snapshot is taken every `events` applied events and at an orderly stop. The next start
    /// continues from the snapshot. Only events that pass the filter count: with a rare filter, a
    /// start scans the log since the snapshot. Default: off. Range of `events`: at least 1.
    ///
    /// `state` is shared by the projection and its readers, and contains everything that `apply`
    /// changes. One runtime of a process at a time folds into it; a second one does not start. An
    /// `Arc<RwLock<T>>` of a serde type suffices. `revision` identifies the format: raise it with
    /// every change of the type, or of the effect of `apply`, also for events that it ignored
    /// before. If a snapshot has another revision or another filter, cannot be loaded, or is ahead
    /// of the log, it is unusable: a warning is logged, and the log is applied from its start.
    ///
    /// A snapshot depends only on the log up to its position. All nodes share one, under the name
    /// of the projection: the newest that any node has taken. It includes the events parked by
    /// then. A [reset](super::ProjectionHandle::reset) discards it; other nodes, which were not
    /// reset, continue to take theirs.
    ///
    /// While the state is encoded, no event is applied and the state cannot change; for a large
    /// state, choose `events` accordingly. While the snapshot is written, the projection continues.
    /// A failed snapshot is logged and counted (`storied.projection.snapshots`); the projection
    /// continues.
    ///
    /// ```
    /// # use std::collections::BTreeMap;
    /// # use std::sync::{Arc, RwLock};
    /// # use serde::{Deserialize, Serialize};
    /// # use storied::{EncodeError, Event, Filter, MemoryStore, Projection, RecordedEvent, Runtime, SnapshotRevision};
    /// # use storied::projection::{ApplyError, InMemory};
    /// # #[derive(Serialize, Deserialize)]
    /// # #[serde(rename_all = "snake_case")]
    /// # enum Sale { Made { country: String, pence: i64 } }
    /// # impl Event for Sale { const CATEGORY: &'static str = "sale"; }
    /// #[derive(Clone, Default)]
    /// struct Revenue(Arc<RwLock<BTreeMap<String, i64>>>);
    ///
    /// impl Projection for Revenue {
    ///     type Transaction = ();
    ///     fn name(&self) -> &str { "revenue" }
    ///     fn filter(&self) -> Result<Filter, EncodeError> { Filter::of::<Sale>() }
    ///     async fn apply(&mut self, event: &RecordedEvent, _: &mut ()) -> Result<(), ApplyError> {
    ///         let Sale::Made { country, pence } = event.decode()?;
    ///         *self.0.write().map_err(|_| "poisoned")?.entry(country).or_default() += pence;
    ///         Ok(())
    ///     }
    ///     async fn reset(&mut self, _: &mut ()) -> Result<(), ApplyError> {
    ///         self.0.write().map_err(|_| "poisoned")?.clear();
    ///         Ok(())
    ///     }
    /// }
    ///
    /// # #[tokio::main] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let revenue = Revenue::default();
    /// let in_memory = InMemory::new().snapshot_every(10_000, SnapshotRevision(1), revenue.0.clone());
    /// let runtime = Runtime::builder().store(MemoryStore::new()).projection(revenue, in_memory).start().await?;
    /// # runtime.shutdown().await?;
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn snapshot_every(
        self,
        events: u64,
        revision: SnapshotRevision,
        state: Arc<impl SnapshotState>,
    ) -> Self {
        Self { snapshots: Some(Snapshots::new(events, revision, state)), ..self }
    }

    /// Creates a read model with these snapshots, if any.
    pub(super) fn with(snapshots: Option<Snapshots>) -> Self {
        Self { snapshots, ..Self::default() }
    }

    fn progress(&self) -> MutexGuard<'_, Progress> {
        // No code below can panic half-way through a change.
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ReadModel for InMemory {
    type Transaction = ();
    /// The parked events to delete at the commit, and the handle of `apply`.
    type Open = (BTreeSet<Position>, ());

    fn shared(&self) -> bool {
        false
    }

    fn rolls_back(&self) -> bool {
        false
    }

    fn snapshots(&self) -> Option<&Snapshots> {
        self.snapshots.as_ref()
    }

    fn prepare<'a>(
        &'a self,
        _store: &'a Arc<dyn EventStore>,
        _name: &'a str,
    ) -> BoxFuture<'a, Result<(), StoreError>> {
        Box::pin(async { Ok(()) })
    }

    fn checkpoint<'a>(&'a self, _name: &'a str) -> BoxFuture<'a, Result<Checkpoint, StoreError>> {
        Box::pin(async { Ok(self.progress().checkpoint) })
    }

    fn begin<'a>(
        &'a self,
        _name: &'a str,
        _from: Checkpoint,
    ) -> BoxFuture<'a, Result<Self::Open, StoreError>> {
        Box::pin(async { Ok((BTreeSet::new(), ())) })
    }

    fn transaction<'a>(&self, open: &'a mut Self::Open) -> &'a mut () {
        &mut open.1
    }

    fn commit<'a>(
        &'a self,
        open: Self::Open,
        name: &'a str,
        from: Checkpoint,
        to: Checkpoint,
        parked: Option<ParkedEvent>,
    ) -> BoxFuture<'a, Result<(), CheckpointError>> {
        Box::pin(async move {
            let mut progress = self.progress();
            let found = progress.checkpoint;
            if found != from {
                return Err(CheckpointError::Stale { name: name.to_owned(), expected: from, found });
            }
            progress.checkpoint = to;
            progress.parked.retain(|position, _| !open.0.contains(position));
            progress.parked.extend(parked.map(|event| (event.position, event)));
            Ok(())
        })
    }

    fn rollback(&self, _open: Self::Open) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(async { Ok(()) })
    }

    fn parked<'a>(
        &'a self,
        _name: &'a str,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<ParkedEvent>, StoreError>> {
        Box::pin(async move { Ok(self.progress().parked.values().take(limit).cloned().collect()) })
    }

    fn unpark<'a>(
        &'a self,
        open: &'a mut Self::Open,
        _name: &'a str,
        position: Position,
    ) -> BoxFuture<'a, Result<bool, StoreError>> {
        Box::pin(async move {
            open.0.insert(position);
            Ok(self.progress().parked.contains_key(&position))
        })
    }

    fn unpark_all<'a>(
        &'a self,
        open: &'a mut Self::Open,
        _name: &'a str,
    ) -> BoxFuture<'a, Result<(), StoreError>> {
        Box::pin(async move {
            open.0.extend(self.progress().parked.keys());
            Ok(())
        })
    }

    fn remove_parked<'a>(
        &'a self,
        _name: &'a str,
        position: Position,
    ) -> BoxFuture<'a, Result<bool, StoreError>> {
        Box::pin(async move { Ok(self.progress().parked.remove(&position).is_some()) })
    }
}
