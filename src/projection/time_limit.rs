//! A read model with a time limit on every call.

use std::error::Error;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::timeout;

use super::{ReadModel, Snapshots};
use crate::event::Position;
use crate::store::{
    BoxFuture, Checkpoint, CheckpointError, CheckpointRecord, EventStore, ParkedEvent, StoreError,
};

/// A read model with calls that fail after the limit.
///
/// Without it, a call never returns on a silently dead connection or a hung disk. The worker limits
/// the user's code between the calls.
pub(super) struct TimeLimited<R> {
    inner: R,
    limit: Duration,
}

impl<R: ReadModel> TimeLimited<R> {
    pub(super) fn new(inner: R, limit: Duration) -> Self {
        Self { inner, limit }
    }

    async fn limited<T, E: Failure>(
        &self,
        call: impl Future<Output = Result<T, E>>,
        doing: &str,
        name: &str,
    ) -> Result<T, E> {
        let called = timeout(self.limit, call).await;
        let called = called.unwrap_or_else(|_| Err(overrun(self.limit, doing, name).into()));
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
            stale @ Self::Stale { .. } => stale,
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

impl<R: ReadModel> ReadModel for TimeLimited<R> {
    type Transaction = R::Transaction;
    type Open = R::Open;

    fn shared(&self) -> bool {
        self.inner.shared()
    }

    fn rolls_back(&self) -> bool {
        self.inner.rolls_back()
    }

    fn is_outage(&self, error: &(dyn Error + 'static)) -> bool {
        self.inner.is_outage(error)
    }

    fn may_be_of_event(&self, error: &(dyn Error + 'static)) -> bool {
        self.inner.may_be_of_event(error)
    }

    fn snapshots(&self) -> Option<&Snapshots> {
        self.inner.snapshots()
    }

    fn prepare<'a>(
        &'a self,
        store: &'a Arc<dyn EventStore>,
        name: &'a str,
    ) -> BoxFuture<'a, Result<(), StoreError>> {
        Box::pin(self.limited(self.inner.prepare(store, name), "preparing the read model", name))
    }

    fn checkpoint<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Checkpoint, StoreError>> {
        Box::pin(self.limited(self.inner.checkpoint(name), "reading the checkpoint", name))
    }

    fn records(&self) -> BoxFuture<'_, Result<Vec<CheckpointRecord>, StoreError>> {
        Box::pin(self.limited(self.inner.records(), "reading the checkpoints", "all projections"))
    }

    fn begin<'a>(&'a self, name: &'a str, from: Checkpoint) -> BoxFuture<'a, Result<R::Open, StoreError>> {
        Box::pin(self.limited(self.inner.begin(name, from), "beginning a transaction", name))
    }

    fn begin_within<'a>(
        &'a self,
        name: &'a str,
        from: Checkpoint,
        limit: Duration,
    ) -> BoxFuture<'a, Result<R::Open, StoreError>> {
        Box::pin(self.limited(self.inner.begin_within(name, from, limit), "beginning a transaction", name))
    }

    fn transaction<'a>(&self, open: &'a mut R::Open) -> &'a mut R::Transaction {
        self.inner.transaction(open)
    }

    fn bound<'a>(&'a self, open: &'a mut R::Open, limit: Duration) -> BoxFuture<'a, Result<(), StoreError>> {
        Box::pin(self.limited(
            self.inner.bound(open, limit),
            "limiting the time of a transaction",
            "a projection",
        ))
    }

    fn adopt<'a>(
        &'a self,
        open: &'a mut R::Open,
        name: &'a str,
    ) -> BoxFuture<'a, Result<Checkpoint, StoreError>> {
        Box::pin(self.limited(self.inner.adopt(open, name), "reading the checkpoint", name))
    }

    fn save<'a>(
        &'a self,
        open: &'a mut R::Open,
        name: &'a str,
        from: Checkpoint,
        to: Checkpoint,
    ) -> BoxFuture<'a, Result<(), CheckpointError>> {
        Box::pin(self.limited(self.inner.save(open, name, from, to), "saving the checkpoint", name))
    }

    fn commit<'a>(
        &'a self,
        open: R::Open,
        name: &'a str,
        from: Checkpoint,
        to: Checkpoint,
        parked: Option<ParkedEvent>,
    ) -> BoxFuture<'a, Result<(), CheckpointError>> {
        let commit = self.inner.commit(open, name, from, to, parked);
        Box::pin(self.limited(commit, "committing a transaction", name))
    }

    fn rollback(&self, open: R::Open) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(self.limited(self.inner.rollback(open), "rolling a transaction back", "a projection"))
    }

    fn parked<'a>(
        &'a self,
        name: &'a str,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<ParkedEvent>, StoreError>> {
        Box::pin(self.limited(self.inner.parked(name, limit), "reading parked events", name))
    }

    fn unpark<'a>(
        &'a self,
        open: &'a mut R::Open,
        name: &'a str,
        position: Position,
    ) -> BoxFuture<'a, Result<bool, StoreError>> {
        Box::pin(self.limited(self.inner.unpark(open, name, position), "removing a parked event", name))
    }

    fn unpark_all<'a>(
        &'a self,
        open: &'a mut R::Open,
        name: &'a str,
    ) -> BoxFuture<'a, Result<(), StoreError>> {
        Box::pin(self.limited(self.inner.unpark_all(open, name), "removing parked events", name))
    }

    fn remove_parked<'a>(
        &'a self,
        name: &'a str,
        position: Position,
    ) -> BoxFuture<'a, Result<bool, StoreError>> {
        Box::pin(self.limited(self.inner.remove_parked(name, position), "removing a parked event", name))
    }
}
