use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use super::ReadModel;
use super::sealed::Sealed;
use crate::event::{Position, RecordedEvent};
use crate::store::{
    Checkpoint, CheckpointError, CheckpointKey, EventStore, ParkedEvent, ProgressWrite, Request, StoreError,
    StoredProgress, StoredProjection, StoredRequest,
};

/// A read model in another system: a search index, a mailbox, another service.
///
/// The checkpoint is kept in the event store. Every event is applied at least once: again if the
/// process dies between `apply` and the checkpoint, or if another node takes over. The position of
/// the event, together with the [`Delivery`]'s epoch, is the idempotency key.
#[derive(Default)]
pub struct AtLeastOnce {
    /// Set by the first call.
    store: OnceLock<Arc<dyn EventStore>>,
}

/// Context of `apply` for an [`AtLeastOnce`] read model.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Delivery {
    /// Fencing token: the epoch of the owner.
    ///
    /// A system that remembers the highest epoch can reject stale owners: their deliveries have a
    /// lower epoch.
    pub epoch: u64,
    /// Position up to which all events were durably applied at the start of this batch.
    ///
    /// Later events may be delivered again.
    pub confirmed: Position,
    /// Position up to which all events were delivered before the last reset.
    ///
    /// Up to here, deliveries are a [replay](Self::is_replay).
    pub replayed: Position,
}

impl Delivery {
    /// Returns whether the event was delivered before and is replayed only because of a reset.
    ///
    /// Its external effects, such as a mail, must not happen again.
    #[must_use]
    pub fn is_replay(&self, event: &RecordedEvent) -> bool {
        event.position <= self.replayed
    }
}

impl AtLeastOnce {
    /// Creates a read model for one or more projections.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    fn store(&self) -> Result<&Arc<dyn EventStore>, StoreError> {
        self.store
            .get()
            .ok_or_else(|| StoreError::Invalid { reason: "using a read model failed: not prepared".into() })
    }
}

impl fmt::Debug for AtLeastOnce {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AtLeastOnce").field("store", &self.store.get().map(|store| store.info())).finish()
    }
}

impl Sealed for AtLeastOnce {}

impl ReadModel for AtLeastOnce {
    type Transaction = Delivery;
    /// The handle of `apply`, and the writes for the commit.
    type Open = (Delivery, Vec<ProgressWrite>);

    fn shared(&self) -> bool {
        true
    }

    fn rolls_back(&self) -> bool {
        false
    }

    async fn prepare(&self, store: &Arc<dyn EventStore>) -> Result<(), StoreError> {
        let known = self.store.get_or_init(|| store.clone());
        if known.info().id != store.info().id {
            let reason =
                "preparing an AtLeastOnce failed: already in use for another event store; create one per store"
                    .into();
            return Err(StoreError::Invalid { reason });
        }
        Ok(())
    }

    async fn projection(&self, name: &str) -> Result<StoredProjection, StoreError> {
        self.store()?.projection(name).await
    }

    async fn checkpoint(&self, key: &CheckpointKey) -> Result<Checkpoint, StoreError> {
        self.store()?.checkpoint(key).await
    }

    async fn parked(
        &self,
        key: &CheckpointKey,
        from: Position,
        limit: usize,
    ) -> Result<Vec<ParkedEvent>, StoreError> {
        self.store()?.parked(key, from, limit).await
    }

    async fn requests(
        &self,
        projection: &str,
        from: Request,
        limit: usize,
    ) -> Result<Vec<StoredRequest>, StoreError> {
        self.store()?.requests(projection, from, limit).await
    }

    async fn begin(
        &self,
        _projection: &str,
        from: Checkpoint,
        _limit: Option<Duration>,
    ) -> Result<Self::Open, StoreError> {
        let delivery = Delivery { epoch: from.epoch, confirmed: from.position, replayed: from.delivered };
        Ok((delivery, Vec::new()))
    }

    fn transaction<'a>(&self, open: &'a mut Self::Open) -> &'a mut Delivery {
        &mut open.0
    }

    async fn adopt(&self, _open: &mut Self::Open, name: &str) -> Result<StoredProgress, StoreError> {
        let store = self.store()?;
        let projection = store.projection(name).await?;
        Ok(StoredProgress { projection, checkpoints: store.checkpoints(name).await? })
    }

    async fn write(&self, open: &mut Self::Open, write: ProgressWrite) -> Result<(), CheckpointError> {
        let store = self.store()?;
        match &write {
            ProgressWrite::Unpark { key, position } => {
                let parked = store.parked(key, *position, 1).await?;
                if parked.first().is_none_or(|event| event.position != *position) {
                    return Err(CheckpointError::not_parked(key, *position));
                }
            }
            ProgressWrite::RemoveRequest { projection, request, id } => {
                let stored = store.requests(projection, *request, 1).await?;
                let same = |stored: &StoredRequest| {
                    stored.request == *request && id.is_none_or(|id| id == stored.id)
                };
                if !stored.first().is_some_and(same) {
                    return Err(CheckpointError::not_requested(projection, *request));
                }
            }
            _ => {}
        }
        open.1.push(write);
        Ok(())
    }

    async fn commit(&self, open: Self::Open, writes: Vec<ProgressWrite>) -> Result<(), CheckpointError> {
        let (_, mut all) = open;
        all.extend(writes);
        self.store()?.write_progress(all).await
    }

    async fn rollback(&self, _open: Self::Open) -> Result<(), StoreError> {
        Ok(())
    }
}
