//! A read model with a time limit on every call.

use std::error::Error;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::timeout;

use super::sealed::Sealed;
use super::{ProgressRecords, ReadModel, Snapshots};
use crate::event::Position;
use crate::store::{
    Checkpoint, CheckpointError, CheckpointKey, EventStore, ParkedEvent, ProgressWrite, Request, StoreError,
    StoredProgress, StoredProjection, StoredRequest,
};

/// A read model with calls that fail after the limit.
///
/// Without it, a call never returns on a silently dead connection or a hung disk. The worker limits
/// the user's code between the calls.
pub(super) struct TimeLimited<R> {
    inner: R,
    projection: String,
    limit: Duration,
}

impl<R: ReadModel> TimeLimited<R> {
    pub(super) fn new(inner: R, projection: String, limit: Duration) -> Self {
        Self { inner, projection, limit }
    }

    async fn limited<T, E: Failure>(
        &self,
        call: impl Future<Output = Result<T, E>>,
        doing: &str,
    ) -> Result<T, E> {
        let called = timeout(self.limit, call).await;
        let called = called.unwrap_or_else(|_| Err(overrun(self.limit, doing, &self.projection).into()));
        // Only a database has transactions that can be rolled back: other read models keep their
        // checkpoints in the event store.
        if self.inner.rolls_back() { called.map_err(Failure::of_read_model) } else { called }
    }
}

/// The error of a call to a read model.
trait Failure: From<StoreError> {
    /// Marks the error as one of the read model.
    fn of_read_model(self) -> Self;
}

impl Failure for StoreError {
    fn of_read_model(self) -> Self {
        self.of_read_model()
    }
}

impl Failure for CheckpointError {
    fn of_read_model(self) -> Self {
        match self {
            Self::Store(error) => Self::Store(error.of_read_model()),
            other => other,
        }
    }
}

/// Returns the error of a call that took longer than the limit.
fn overrun(limit: Duration, doing: &str, name: &str) -> StoreError {
    let reason = format!(
        "{doing} of {name} failed: no answer within {limit:?} (ProjectionOptions::transaction_timeout)"
    );
    StoreError::Unavailable { reason, source: None }
}

impl<R> Sealed for TimeLimited<R> {}

impl<R: ReadModel> ReadModel for TimeLimited<R> {
    type Transaction = R::Transaction;
    type Open = R::Open;

    fn shared(&self) -> bool {
        self.inner.shared()
    }

    fn rolls_back(&self) -> bool {
        self.inner.rolls_back()
    }

    fn may_be_of_event(&self, error: &(dyn Error + 'static)) -> bool {
        self.inner.may_be_of_event(error)
    }

    fn snapshots(&self) -> Option<&Snapshots> {
        self.inner.snapshots()
    }

    async fn prepare(&self, store: &Arc<dyn EventStore>) -> Result<(), StoreError> {
        self.limited(self.inner.prepare(store), "preparing the read model").await
    }

    async fn projection(&self, name: &str) -> Result<StoredProjection, StoreError> {
        self.limited(self.inner.projection(name), "reading the versions").await
    }

    async fn projection_of_any_store(&self, name: &str) -> Result<StoredProjection, StoreError> {
        self.limited(self.inner.projection_of_any_store(name), "reading the versions").await
    }

    async fn checkpoint(&self, key: &CheckpointKey) -> Result<Checkpoint, StoreError> {
        self.limited(self.inner.checkpoint(key), "reading the checkpoint").await
    }

    async fn parked(
        &self,
        key: &CheckpointKey,
        from: Position,
        limit: usize,
    ) -> Result<Vec<ParkedEvent>, StoreError> {
        self.limited(self.inner.parked(key, from, limit), "reading parked events").await
    }

    async fn requests(
        &self,
        projection: &str,
        from: Request,
        limit: usize,
    ) -> Result<Vec<StoredRequest>, StoreError> {
        self.limited(self.inner.requests(projection, from, limit), "reading requests").await
    }

    async fn records(&self) -> Result<ProgressRecords, StoreError> {
        self.limited(self.inner.records(), "reading the checkpoints").await
    }

    async fn begin(
        &self,
        projection: &str,
        from: Checkpoint,
        limit: Option<Duration>,
    ) -> Result<R::Open, StoreError> {
        self.limited(self.inner.begin(projection, from, limit), "beginning a transaction").await
    }

    fn will_begin(&self, projection: &str, limit: Option<Duration>) {
        self.inner.will_begin(projection, limit);
    }

    fn transaction<'a>(&self, open: &'a mut R::Open) -> &'a mut R::Transaction {
        self.inner.transaction(open)
    }

    async fn adopt(&self, open: &mut R::Open, projection: &str) -> Result<StoredProgress, StoreError> {
        self.limited(self.inner.adopt(open, projection), "reading the progress").await
    }

    async fn write(&self, open: &mut R::Open, write: ProgressWrite) -> Result<(), CheckpointError> {
        self.limited(self.inner.write(open, write), "writing the progress").await
    }

    async fn commit(&self, open: R::Open, writes: Vec<ProgressWrite>) -> Result<(), CheckpointError> {
        self.limited(self.inner.commit(open, writes), "committing a transaction").await
    }

    async fn rollback(&self, open: R::Open) -> Result<(), StoreError> {
        self.limited(self.inner.rollback(open), "rolling a transaction back").await
    }
}
