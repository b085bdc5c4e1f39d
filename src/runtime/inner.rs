//! The components of a running node.

use std::sync::Arc;

use uuid::Uuid;

use super::supervisor::Supervisor;
use crate::bus::EventBus;
use crate::command::Dispatcher;
use crate::feed::Feed;
use crate::projection::ProjectionHandle;
use crate::publisher::Publisher;
use crate::store::{EventStore, GroupCommitter};
use crate::supervised::Task;

/// The components of a running node.
pub(super) struct Inner {
    pub(super) node: Uuid,
    pub(super) store: Arc<dyn EventStore>,
    pub(super) bus: Arc<dyn EventBus>,
    pub(super) writer: GroupCommitter,
    pub(super) publisher: Publisher,
    pub(super) feed: Feed,
    /// Projections, in the order of their registration.
    pub(super) projections: Vec<ProjectionHandle>,
    pub(super) commands: Arc<Dispatcher>,
    /// Task that deletes expired records of commands; ends with the runtime.
    pub(super) _forgetting: Option<Task>,
    /// Root of the supervision tree; stopping it stops everything.
    pub(super) supervisor: Supervisor,
}
