//! Projections: fold the log into a read model, remember how far.
//!
//! A [`Projection`] is the user's part: a name, a filter, and what to do with an event. Where its read model and its
//! checkpoint live together is a [`ReadModel`]:
//!
//! | read model | transaction | guarantee |
//! |---|---|---|
//! | `SqliteReadModel` | `SqliteConnection` | exactly once: what `apply` writes and the checkpoint commit together (I6) |
//! | [`InMemory`] | `()` | rebuilt at every start, on every node |
//! | [`External`] | [`Delivery`] | at least once; position and epoch are the idempotency key |

mod actor;
mod memory;
mod options;
mod external;
#[cfg(feature = "sqlite")]
mod sqlite;
mod status;

use std::future::Future;

use uuid::Uuid;

pub use self::external::{Delivery, External};
pub use self::memory::InMemory;
pub use self::options::{FailurePolicy, ProjectionOptions};
#[cfg(feature = "sqlite")]
pub use self::sqlite::SqliteReadModel;
pub use self::status::{ProjectionState, ProjectionStatus};
use crate::event::{Position, RecordedEvent};
use crate::store::{BoxFuture, Checkpoint, CheckpointError, EventStore, Filter, ParkedEvent, StoreError};

/// What a failing [`Projection::apply`] says; boxed, so that `?` works on every error.
pub type ApplyError = Box<dyn std::error::Error + Send + Sync>;

/// Folds events into a read model.
///
/// Events arrive one at a time, in log order. An error (or a panic) is retried, then handled as
/// [`ProjectionOptions`] say; whatever the failing call had written is rolled back first.
pub trait Projection: Send + 'static {
    /// What `apply` writes through: see the table of the [module](self).
    type Transaction: Send;

    /// The name of the checkpoint: unique in the store, and kept while the program evolves. A new name starts over.
    fn name(&self) -> &str;

    /// Which events. Asked once, at start.
    fn filter(&self) -> Filter;

    /// Folds one event in.
    fn apply(
        &mut self,
        event: &RecordedEvent,
        tx: &mut Self::Transaction,
    ) -> impl Future<Output = Result<(), ApplyError>> + Send;

    /// Empties the read model; the log is then applied from its start. The default refuses, so that a reset never doubles
    /// what is already there.
    fn reset(&mut self, tx: &mut Self::Transaction) -> impl Future<Output = Result<(), ApplyError>> + Send {
        let _ = tx;
        async { Err("this projection does not implement reset".into()) }
    }
}

/// Where a read model and its checkpoint live together.
pub trait ReadModel: Send + Sync + 'static {
    /// What a projection writes through.
    type Transaction: Send;
    /// An open transaction.
    type Open: Send;

    /// Whether every node has its own (in memory) or all nodes share one, which then has one owner at a time.
    fn shared(&self) -> bool;

    /// Called once, before anything else: creates what is missing, and refuses progress that belongs to another store.
    fn prepare<'a>(&'a self, store: &'a dyn EventStore, name: &'a str) -> BoxFuture<'a, Result<(), StoreError>>;

    /// How far the read model is.
    fn checkpoint<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Checkpoint, StoreError>>;

    /// Opens a transaction.
    fn begin<'a>(&'a self, name: &'a str, from: Checkpoint) -> BoxFuture<'a, Result<Self::Open, StoreError>>;

    /// What the user writes through.
    fn transaction<'a>(&self, open: &'a mut Self::Open) -> &'a mut Self::Transaction;

    /// Commits together: what was written, the checkpoint from exactly `from` to `to`, the parked event.
    fn commit<'a>(
        &'a self,
        open: Self::Open,
        name: &'a str,
        from: Checkpoint,
        to: Checkpoint,
        parked: Option<ParkedEvent>,
    ) -> BoxFuture<'a, Result<(), CheckpointError>>;

    /// Undoes what was written. Dropping an open transaction does the same, later.
    fn rollback(&self, open: Self::Open) -> BoxFuture<'_, Result<(), StoreError>>;

    /// The parked events of a projection, oldest first.
    fn parked<'a>(&'a self, name: &'a str, limit: usize) -> BoxFuture<'a, Result<Vec<ParkedEvent>, StoreError>>;

    /// Forgets a parked event; whether there was one.
    fn remove_parked<'a>(&'a self, name: &'a str, position: Position) -> BoxFuture<'a, Result<bool, StoreError>>;
}
