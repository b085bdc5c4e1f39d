//! The state that all actors of one kind of aggregate share.

use std::sync::Arc;

use tokio::sync::Semaphore;

use super::super::Aggregate;
use super::super::options::AggregateOptions;
use crate::event::EventTypes;
use crate::store::{EventStore, GroupCommitter};

/// The shared state of all actors of one kind of aggregate.
pub(in crate::aggregate) struct Shared<A: Aggregate> {
    pub(in crate::aggregate) store: Arc<dyn EventStore>,
    pub(in crate::aggregate) writer: GroupCommitter,
    pub(in crate::aggregate) options: AggregateOptions<A>,
    pub(in crate::aggregate) types: Arc<EventTypes>,
    /// Permits for snapshot writes.
    pub(in crate::aggregate) snapshots: Arc<Semaphore>,
}
