//! Commands that are stored until they are due.

use std::time::Duration;

use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::change::{ScheduleChange, put};
use super::command::{Requested, StoredCommand};
use super::error::ScheduleError;
use super::timing::Recurrence;
use crate::command::{Execute, Routed};
use crate::store::TimerDue;

/// A command that is stored until it is due.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Scheduled {
    /// Id of the command.
    pub id: Uuid,
    /// Time at which it is due, by the store's clock.
    pub due_at: DateTime<Utc>,
}

#[allow(private_bounds, reason = "`Routed` is the part of the sealed `Target` for this crate")]
impl<T: Routed> Execute<T> {
    /// Stores the command, and executes it this long after the clock of the store: at most 1,000
    /// years.
    ///
    /// When this returns, the command is durable and needs no caller. A repeated call with the same
    /// [command id](Self::command_id) stores nothing. After the execution it stores the command
    /// again, which then has no second effect on an aggregate (I8), nor on a handler within
    /// [`command_retention`](crate::CommandBus::command_retention). The timeouts of this command do
    /// not matter. Its span begins with the execution: only a
    /// [`traceparent`](Self::traceparent) connects it with the caller.
    /// See [`Runtime::scheduled`](crate::Runtime::scheduled) for its status and its cancellation.
    ///
    /// # Errors
    /// If the id of the target is invalid, no node handles the command, the id belongs to another
    /// request, or the store failed. If the outcome is unknown, repeat the call with the same id.
    ///
    /// # Cancellation safety
    /// If the future is dropped, the command may be stored.
    pub async fn after(self, wait: Duration) -> Result<Scheduled, ScheduleError> {
        let micros = u64::try_from(wait.as_micros()).unwrap_or(u64::MAX);
        self.schedule(TimerDue::After(wait), Requested::After(micros)).await
    }

    /// Stores the command, and executes it at this time, by the clock of the store.
    ///
    /// A time in the past is due at once. Otherwise as [`after`](Self::after).
    ///
    /// # Errors
    /// As [`after`](Self::after).
    pub async fn at(self, time: DateTime<Utc>) -> Result<Scheduled, ScheduleError> {
        self.schedule(TimerDue::At(time), Requested::At(time)).await
    }

    async fn schedule(self, due: TimerDue, requested: Requested) -> Result<Scheduled, ScheduleError> {
        let id = self.envelope().id;
        let not_executable = |kind| ScheduleError::NotExecutable { id, kind };
        let (commands, command) = self.erase().map_err(not_executable)?;
        let stored = StoredCommand::of(&command, Some(requested))?;
        let rows = commands.store.schedule_commands(vec![stored.to_store(id, due, None)?]).await?;
        commands.scheduled.notify_one();
        // The store returns a row for each command.
        let Some(row) = rows.into_iter().next() else { return Ok(Scheduled { id, due_at: Utc::now() }) };
        let same = StoredCommand::decode(&row.body).is_ok_and(|other| stored.is_same_request(&other));
        match same {
            true => Ok(Scheduled { id, due_at: row.due_at }),
            false => Err(ScheduleError::SameId { id, due_at: row.due_at }),
        }
    }

    /// Stores a recurring schedule that executes the command at each of its ticks.
    ///
    /// The name identifies the schedule. A schedule with the same name, timing, options and command
    /// stays as it is; another one is replaced, and keeps its counters and its pause. The first tick
    /// comes after the call. The [command id](Self::command_id) does not matter: each tick has its
    /// own. See [`Runtime::schedule`](crate::Runtime::schedule) for its status, a pause, and its end.
    ///
    /// # Errors
    /// If the id of the target or the name is invalid, no node handles the command, or the store
    /// failed. The call may be repeated.
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
