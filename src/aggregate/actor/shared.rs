//! The state that all actors of one kind of aggregate share.

use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use tokio::sync::Semaphore;

use super::super::Aggregate;
use super::super::options::AggregateOptions;
use crate::event::{EncodeError, EventTypes};
use crate::store::{EventStore, GroupCommitter};

/// Maximum number of concurrent snapshot writes for one kind of aggregate.
///
/// The actor skips further ones.
const SNAPSHOTS_UNDER_WAY: usize = 4;

/// The shared state of all actors of one kind of aggregate.
pub(crate) struct Shared<A: Aggregate> {
    pub(crate) store: Arc<dyn EventStore>,
    pub(crate) writer: GroupCommitter,
    pub(crate) options: AggregateOptions<A>,
    pub(crate) types: Arc<EventTypes>,
    /// Permits for snapshot writes.
    pub(crate) snapshots: Arc<Semaphore>,
    /// Number of aggregates in memory, for the status, which must not queue after commands.
    pub(crate) live: AtomicUsize,
}

impl<A: Aggregate> Shared<A> {
    /// Creates the state.
    ///
    /// # Errors
    /// If the events of the aggregate cannot be stored.
    pub(crate) fn new(
        store: Arc<dyn EventStore>,
        writer: GroupCommitter,
        options: AggregateOptions<A>,
    ) -> Result<Self, EncodeError> {
        let (types, snapshots) =
            (EventTypes::of::<A::Event>()?, Arc::new(Semaphore::new(SNAPSHOTS_UNDER_WAY)));
        Ok(Self { store, writer, options, types, snapshots, live: AtomicUsize::new(0) })
    }
}
