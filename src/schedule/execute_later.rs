//! Commands that are executed later: once, or at regular times.

use std::time::Duration;

use chrono::{DateTime, Utc};

use super::change::{ScheduleChange, put};
use super::command::{RequestedTime, StoredCommand};
use super::command_handle::ScheduledCommandStatus;
use super::error::ScheduleError;
use super::recurrence::Recurrence;
use crate::command::{Execute, Routed};
use crate::store::{DueTime, StoreError};

#[allow(private_bounds, reason = "`Routed` is the part of the sealed `Target` for this crate")]
impl<T: Routed> Execute<T> {
    /// Stores the command, and executes it after this time, by the clock of the store.
    ///
    /// Maximum: 1,000 years. When this returns, the command is durable and needs no caller. A
    /// repeated call with the same [command id](Self::command_id) stores nothing, and returns the
    /// stored command. After the execution it stores the command again, which then has no second
    /// effect on an aggregate (I8), nor on a handler within
    /// [`command_retention`](crate::CommandBus::command_retention). See
    /// [`Runtime::scheduled_command`](crate::Runtime::scheduled_command) for its status and its
    /// cancellation.
    ///
    /// The timeouts of this command do not matter. Its span begins with the execution: only a
    /// [`traceparent`](Self::traceparent) connects it with the caller. The node that holds the
    /// lease of the scheduler sends the command, so it must handle the target, or reach nodes that
    /// do.
    ///
    /// # Errors
    /// If the id of the target is invalid, the command exceeds 1 MiB, the id belongs to another
    /// request, or the store failed. Without a bus to other nodes, also if this node does not
    /// handle the command. If the outcome is unknown, repeat the call with the same id.
    ///
    /// # Cancellation safety
    /// If the future is dropped, the command may be stored.
    pub async fn after(self, wait: Duration) -> Result<ScheduledCommandStatus, ScheduleError> {
        let micros = u64::try_from(wait.as_micros()).unwrap_or(u64::MAX);
        self.store(DueTime::After(wait), RequestedTime::After(micros)).await
    }

    /// Stores the command, and executes it at this time, by the clock of the store.
    ///
    /// A time in the past is due at once. Otherwise as [`after`](Self::after).
    ///
    /// # Errors
    /// As [`after`](Self::after).
    ///
    /// # Cancellation safety
    /// As [`after`](Self::after).
    pub async fn at(self, time: DateTime<Utc>) -> Result<ScheduledCommandStatus, ScheduleError> {
        self.store(DueTime::At(time), RequestedTime::At(time)).await
    }

    async fn store(
        self,
        due: DueTime,
        requested: RequestedTime,
    ) -> Result<ScheduledCommandStatus, ScheduleError> {
        let id = self.envelope().id;
        let (commands, command) = self.erase().map_err(|kind| ScheduleError::NotExecutable { id, kind })?;
        let new = StoredCommand::of(&command, Some(requested))?;
        let stored = commands.store.schedule_commands(vec![new.to_store(id, due, None)?]).await?;
        commands.scheduled.notify_one();
        let stored = stored.into_iter().next().ok_or_else(|| StoreError::Corrupt {
            reason: format!("storing command {id}: the store returned no row"),
        })?;
        // A newer version may have written it: its contents are unknown here.
        let is_same = StoredCommand::decode(&stored.body).is_ok_and(|other| new.is_same_request(&other));
        match is_same {
            true => Ok(stored.into()),
            false => Err(ScheduleError::CommandIdReused { id, due_at: stored.due_at }),
        }
    }

    /// Stores a recurring schedule that executes the command at each of its ticks.
    ///
    /// The name identifies the schedule. A schedule with the same name, timing, options and command
    /// stays as it is; another one is replaced, and keeps its counters and its pause. The first
    /// tick of a new timing comes after the call. With the same timing, ticks that are due run with
    /// the new command. The [command id](Self::command_id) does not matter: each tick has its own.
    /// See [`Runtime::schedule`](crate::Runtime::schedule) for its status, a pause, and its end.
    ///
    /// # Errors
    /// If the id of the target, the name or an option is invalid, the schedule exceeds 64 KiB with
    /// its command, the stored schedule does not decode, or the store failed. Without a bus to
    /// other nodes, also if this node does not handle the command. The call may be repeated.
    ///
    /// # Cancellation safety
    /// If the future is dropped, the schedule may be stored.
    pub async fn repeat(
        self,
        name: impl Into<String>,
        recurrence: Recurrence,
    ) -> Result<ScheduleChange, ScheduleError> {
        let id = self.envelope().id;
        let not_executable = |kind| ScheduleError::NotExecutable { id, kind };
        let (commands, command) = self.erase().map_err(not_executable)?;
        let stored = StoredCommand::of(&command, None)?;
        let change = put(&*commands.store, &name.into(), recurrence, stored).await?;
        commands.scheduled.notify_one();
        Ok(change)
    }
}
