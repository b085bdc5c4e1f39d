//! The components of a running node.

use std::sync::Arc;

use uuid::Uuid;

use crate::bus::EventBus;
use crate::command::Dispatcher;
use crate::feed::Feed;
use crate::process::RunningProcess;
use crate::projection::ProjectionHandle;
use crate::publisher::{Publisher, PublisherState, PublisherStatus};
use crate::schedule::{Scheduler, SchedulerState, SchedulerStatus};
use crate::store::{EventStore, GroupCommitter};
use crate::supervised::{Supervisor, Task};

/// The components of a running node.
pub(super) struct Inner {
    pub(super) node: Uuid,
    pub(super) store: Arc<dyn EventStore>,
    pub(super) bus: Option<Arc<dyn EventBus>>,
    pub(super) writer: GroupCommitter,
    /// Publisher; `None` without a bus.
    pub(super) publisher: Option<Publisher>,
    pub(super) feed: Feed,
    /// Projections, in the order of their registration.
    pub(super) projections: Vec<ProjectionHandle>,
    /// Processes, in the order of their registration.
    pub(super) processes: Vec<Arc<dyn RunningProcess>>,
    pub(super) commands: Arc<Dispatcher>,
    /// Scheduler; `None` if this node executes no commands.
    pub(super) scheduler: Option<Scheduler>,
    /// Task that deletes expired records of commands; ends with the runtime.
    pub(super) _forgetting: Option<Task>,
    /// Root of the supervision tree; stopping it stops everything.
    pub(super) supervisor: Supervisor,
}

impl Inner {
    pub(super) fn publisher_status(&self) -> PublisherStatus {
        match &self.publisher {
            Some(publisher) => publisher.status().borrow().clone(),
            None => PublisherStatus::new(None, PublisherState::Idle),
        }
    }

    pub(super) fn scheduler_status(&self) -> SchedulerStatus {
        let idle = || SchedulerStatus::new(SchedulerState::Idle);
        self.scheduler.as_ref().map_or_else(idle, Scheduler::status)
    }
}
