//! The runtime's part of scheduled commands and recurring schedules.

use ractor::SpawnErr;
use uuid::Uuid;

use super::Runtime;
use super::commands::TargetServices;
use crate::projection::NodeServices;
use crate::schedule::{ScheduleHandle, ScheduledCommandHandle, Scheduler, SchedulerServices};

/// Starts the scheduler, if the node `executes` commands.
pub(super) async fn start_scheduler(
    executes: bool,
    node: &NodeServices,
    targets: &TargetServices,
) -> Result<Option<Scheduler>, SpawnErr> {
    if !executes {
        return Ok(None);
    }
    let services = SchedulerServices {
        store: node.store.clone(),
        commands: targets.commands.clone(),
        lease_watcher: node.lease_watcher.clone(),
        metrics: node.metrics.clone(),
        node: node.node,
    };
    Scheduler::spawn(services, targets.supervisor.clone()).await.map(Some)
}

impl Runtime {
    /// Returns the handle of a scheduled command: its status, its cancellation, its retry.
    ///
    /// [`Execute::after`](crate::command::Execute::after) and
    /// [`Execute::at`](crate::command::Execute::at) schedule a command.
    pub fn scheduled_command(&self, command_id: Uuid) -> ScheduledCommandHandle {
        ScheduledCommandHandle::new(self.inner.store.clone(), command_id)
    }

    /// Returns the handle of a recurring schedule: its status, its pause, its end.
    ///
    /// [`Execute::repeat`](crate::command::Execute::repeat) stores a schedule.
    pub fn schedule(&self, name: impl Into<String>) -> ScheduleHandle {
        ScheduleHandle::new(self.inner.store.clone(), name)
    }
}
