//! In-memory indexes: an index over events, in memory, on every node.

use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};

use super::{ApplyError, InMemory, Projection, ProjectionHandle, SharedState, Snapshots, WaitError};
use crate::event::{AnyEvent, EventSet, RecordedEvent};
use crate::store::{Filter, SnapshotRevision};
use crate::time::after;

type Fold = dyn Fn(&RecordedEvent) -> Result<(), ApplyError> + Send + Sync;

/// An in-memory index over events for fast queries on this node.
///
/// Examples: the customer with a given e-mail address, or the number of remaining items. Register
/// it with [`Builder::in_memory_index`](crate::runtime::Builder::in_memory_index), and keep a clone to read from.
/// Every runtime that starts with it empties the index and builds it from the log; one runtime at a
/// time can run it. Until [`ready`](InMemoryIndex::ready) returns, the index may have the entries of the
/// previous runtime, or only some of the log. It follows the log as every projection does, so it may lag: it cannot guarantee
/// that a value is unique.
///
/// ```
/// # use serde::{Deserialize, Serialize};
/// # use std::collections::HashMap;
/// # use std::time::Duration;
/// # use storied::{Event, MemoryStore, Runtime};
/// # use storied::projection::InMemoryIndex;
/// # #[derive(Serialize, Deserialize)]
/// # #[serde(rename_all = "snake_case")]
/// # enum Customer { Registered { email: String } }
/// # impl Event for Customer { const CATEGORY: &'static str = "customer"; }
/// # #[tokio::main] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let by_email = InMemoryIndex::new("by_email", |index: &mut HashMap<_, _>, event: Customer, recorded| {
///     let Customer::Registered { email } = event;
///     index.insert(email, recorded.stream.id().to_owned());
///     Ok(())
/// });
/// let runtime = Runtime::builder().store(MemoryStore::new()).in_memory_index(&by_email).start().await?;
/// by_email.ready(Duration::from_secs(10)).await?;
/// assert_eq!(by_email.read(|index| index.get("ada@example.org").cloned()), None);
/// # runtime.shutdown().await?;
/// # Ok(()) }
/// ```
pub struct InMemoryIndex<T> {
    inner: Arc<Inner<T>>,
    filter: Filter,
    /// Restricts a filter to the events that the fold decodes.
    restrict: fn(Filter) -> Filter,
    snapshots: Option<Snapshots>,
}

struct Inner<T> {
    name: String,
    fold: Box<Fold>,
    /// Never locked across an await. Readers do not wait for each other.
    index: Arc<RwLock<T>>,
    /// Set once the index runs.
    handle: watch::Sender<Option<ProjectionHandle>>,
}

impl<T> Clone for InMemoryIndex<T> {
    fn clone(&self) -> Self {
        Self {
            inner: self.inner.clone(),
            filter: self.filter.clone(),
            restrict: self.restrict,
            snapshots: self.snapshots.clone(),
        }
    }
}

impl<T: Default + Send + Sync + 'static> InMemoryIndex<T> {
    /// Creates an index.
    ///
    /// `fold` receives all events of `E` in log order, decoded and as recorded. `E` is an
    /// [`Event`](crate::Event), an [`EventSet`] over several, or [`AnyEvent`]. If `fold` fails or
    /// panics, it should do so before it changes anything, because it receives the event again.
    pub fn new<E: EventSet>(
        name: impl Into<String>,
        fold: impl Fn(&mut T, E, &RecordedEvent) -> Result<(), ApplyError> + Send + Sync + 'static,
    ) -> Self {
        let (index, handle) = (Arc::<RwLock<T>>::default(), watch::Sender::new(None));
        let folded = index.clone();
        let fold = move |recorded: &RecordedEvent| {
            // Before the lock, so that readers do not wait for it.
            let event = recorded.decode()?;
            fold(&mut folded.write().unwrap_or_else(PoisonError::into_inner), event, recorded)
        };
        let inner = Inner { name: name.into(), fold: Box::new(fold), index, handle };
        Self {
            inner: Arc::new(inner),
            filter: Filter::of::<E>(),
            restrict: Filter::restricted_to::<E>,
            snapshots: None,
        }
    }

    /// Narrows the events that the index receives.
    ///
    /// Default: all events of its event type. If the filter is invalid or names other events, the
    /// runtime does not start.
    #[must_use]
    pub fn filter(self, filter: Filter) -> Self {
        Self { filter: (self.restrict)(filter), ..self }
    }

    /// Keeps a snapshot of the index every `events` events, for a faster start.
    ///
    /// Works as [`InMemory::snapshot_every`], with the same meaning of `revision`: raise it with
    /// every change of `T` or of the fold. Default: off. Range of `events`: at least 1.
    #[must_use]
    pub fn snapshot_every(self, events: u64, revision: SnapshotRevision) -> Self
    where
        T: Serialize + DeserializeOwned,
    {
        let index = self.inner.index.clone();
        Self { snapshots: Some(Snapshots::new(events, revision, index)), ..self }
    }

    /// Reads from the index.
    ///
    /// `look` should be short: the fold waits meanwhile, other readers do not.
    pub fn read<A>(&self, look: impl FnOnce(&T) -> A) -> A {
        // After a panic, the index is as the fold left it.
        look(&self.inner.index.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Waits until everything that is in the log now is in the index.
    ///
    /// Timeout: `patience`. Cancel-safe.
    ///
    /// # Errors
    /// As [`ProjectionHandle::wait_until_caught_up`]; and [`NotStarted`](WaitError::NotStarted) if no
    /// runtime of this process has started the index by then.
    pub async fn ready(&self, patience: Duration) -> Result<(), WaitError> {
        let deadline = after(patience);
        let mut handle = self.inner.handle.subscribe();
        let running = timeout_at(deadline, handle.wait_for(Option::is_some)).await;
        // The sender is in `self`, so there is no other error.
        let Some(handle) = running.ok().and_then(Result::ok).and_then(|handle| handle.clone()) else {
            return Err(WaitError::NotStarted { name: self.inner.name.clone(), waited: patience });
        };
        handle.wait_until_caught_up(deadline.saturating_duration_since(Instant::now())).await
    }

    /// Records the handle of the running projection.
    pub(crate) fn runs(&self, handle: &ProjectionHandle) {
        self.inner.handle.send_replace(Some(handle.clone()));
    }

    /// Returns the index; one runtime at a time may fold into it.
    pub(crate) fn shared_state(&self) -> SharedState {
        SharedState::of(&self.inner)
    }

    pub(crate) fn read_model(&self) -> InMemory {
        InMemory::with(self.snapshots.clone())
    }

    pub(crate) fn projection(&self) -> impl Projection<Transaction = ()> + use<T> {
        Folding { inner: self.inner.clone(), filter: self.filter.clone() }
    }
}

impl<T> fmt::Debug for InMemoryIndex<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InMemoryIndex").field("name", &self.inner.name).finish_non_exhaustive()
    }
}

struct Folding<T> {
    inner: Arc<Inner<T>>,
    filter: Filter,
}

impl<T: Default + Send + Sync + 'static> Projection for Folding<T> {
    /// Each index has a name of its own.
    const NAME: &'static str = "in-memory index";
    /// The fold decodes the event.
    type Event = AnyEvent;
    type Transaction = ();

    fn name(&self) -> &str {
        &self.inner.name
    }

    fn filter(&self) -> Filter {
        self.filter.clone()
    }

    async fn apply(&mut self, _: AnyEvent, recorded: &RecordedEvent, (): &mut ()) -> Result<(), ApplyError> {
        (self.inner.fold)(recorded)
    }

    async fn reset(&mut self, (): &mut ()) -> Result<(), ApplyError> {
        *self.inner.index.write().unwrap_or_else(PoisonError::into_inner) = T::default();
        self.inner.index.clear_poison();
        Ok(())
    }
}
