//! A scheduled command as callers see it.

use std::fmt;
use std::sync::Arc;

use chrono::{DateTime, Utc};
use serde::Serialize;
use uuid::Uuid;

use crate::store::{EventStore, ScheduledCommand, ScheduledState, StoreError};

/// A scheduled command, on any node. Cheap to clone.
///
/// [`Runtime::scheduled_command`](crate::Runtime::scheduled_command) creates it. It uses the store,
/// and needs no node that executes the command. A change is durable when its call returns.
#[derive(Clone)]
pub struct ScheduledCommandHandle {
    store: Arc<dyn EventStore>,
    id: Uuid,
}

/// Status of a scheduled command. Serializes as a map of its fields.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct ScheduledCommandStatus {
    /// Id of the command.
    pub id: Uuid,
    /// Target: `category/id`, or the name of a handler.
    pub target: String,
    /// Time at which it is due, by the store's clock.
    pub due_at: DateTime<Utc>,
    /// Recurring schedule of which it is a tick.
    pub schedule: Option<String>,
    /// State.
    pub state: ScheduledState,
    /// Reason why it is parked.
    pub reason: Option<String>,
}

/// The result of a cancellation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Cancellation {
    /// The command is deleted: it was waiting or parked.
    Cancelled,
    /// Too late: the command has started, and has no answer yet.
    Started,
    /// There is no such command: it was executed or cancelled, or never stored.
    Unknown,
}

impl From<ScheduledCommand> for ScheduledCommandStatus {
    fn from(command: ScheduledCommand) -> Self {
        let ScheduledCommand { id, target, due_at, schedule, state, reason, .. } = command;
        Self { id, target, due_at, schedule, state, reason }
    }
}

impl ScheduledCommandHandle {
    /// Returns the handle of a command in a store, for tools that have no runtime.
    pub fn new(store: Arc<dyn EventStore>, id: Uuid) -> Self {
        Self { store, id }
    }

    /// Returns the id of the command.
    pub fn id(&self) -> Uuid {
        self.id
    }

    /// Reads the status; `None` if the command was executed or cancelled, or was never stored.
    ///
    /// # Errors
    /// The error of the store.
    pub async fn status(&self) -> Result<Option<ScheduledCommandStatus>, StoreError> {
        Ok(self.store.scheduled_command(self.id).await?.map(Into::into))
    }

    /// Cancels the command, unless it has started.
    ///
    /// # Errors
    /// The error of the store.
    pub async fn cancel(&self) -> Result<Cancellation, StoreError> {
        let found = self.store.cancel_command(self.id).await?;
        Ok(match found.map(|command| command.state) {
            None => Cancellation::Unknown,
            Some(ScheduledState::Started) => Cancellation::Started,
            Some(ScheduledState::Waiting | ScheduledState::Parked) => Cancellation::Cancelled,
        })
    }

    /// Executes a parked command again, now. Returns whether it was parked.
    ///
    /// If a handler rejected the command, the retry gets the recorded rejection for
    /// [`command_retention`](crate::CommandBus::command_retention).
    ///
    /// # Errors
    /// The error of the store.
    pub async fn retry(&self) -> Result<bool, StoreError> {
        let found = self.store.retry_command(self.id).await?;
        Ok(found.is_some_and(|command| command.state == ScheduledState::Parked))
    }
}

impl fmt::Debug for ScheduledCommandHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ScheduledCommandHandle").field("id", &self.id).finish_non_exhaustive()
    }
}
