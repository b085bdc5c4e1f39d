//! The status of an instance, read from its stream.

use std::fmt;

use serde::Serialize;
use uuid::Uuid;

use super::event::Ending;
use super::history::load;
use super::record::{Phase, Record};
use crate::event::{StreamId, Version, check_name, id_problem};
use crate::store::{EventStore, StoreError};

/// State of an instance. Serializes in snake case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum InstanceState {
    /// Reacts to inputs.
    Running,
    /// Records inputs, and reacts to them after a retry.
    Parked,
    /// Executes undo commands.
    Compensating,
    /// Has ended: it has [completed](super::Next::complete).
    Completed,
    /// Has ended: its effects are undone.
    Compensated,
    /// Has ended: an operator has cancelled it.
    Cancelled,
}

/// Status of an instance. Serializes as a map of its fields.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct InstanceStatus {
    /// Name of the process.
    pub process: String,
    /// Id of the instance.
    pub id: String,
    /// State.
    pub state: InstanceState,
    /// Reason why it is parked.
    pub parked: Option<String>,
    /// Version of its stream: number of its events.
    pub version: Version,
    /// Commands without an answer, in order.
    pub effects: Vec<OpenEffect>,
    /// Timers that are not due yet, by name.
    pub timers: Vec<OpenTimer>,
    /// Number of recorded inputs without a reaction.
    pub held: usize,
}

/// A command of an instance without an answer. Serializes as a map of its fields.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct OpenEffect {
    /// Key of the effect.
    pub key: String,
    /// Id of the command.
    pub command_id: Uuid,
    /// Category of the aggregate, or name of the handler.
    pub target: String,
    /// Id of the aggregate, or key from the handler.
    pub target_id: Option<String>,
}

/// A timer of an instance. Serializes as a map of its fields.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct OpenTimer {
    /// Name of the timer.
    pub name: String,
    /// Version of the event that started it.
    pub version: Version,
}

impl fmt::Display for InstanceState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Running => "running",
            Self::Parked => "parked",
            Self::Compensating => "compensating",
            Self::Completed => "completed",
            Self::Compensated => "compensated",
            Self::Cancelled => "cancelled",
        })
    }
}

/// Reads the status of an instance; `None` if it does not exist.
pub(super) async fn read_status(
    store: &dyn EventStore,
    process: &str,
    instance: &str,
) -> Result<Option<InstanceStatus>, StoreError> {
    let stream = stream_of(process, instance)?;
    let record = load(store, &stream).await?;
    Ok(record.exists().then(|| status_of(&stream, record)))
}

/// Returns the stream of an instance.
///
/// # Errors
/// `Invalid` if the name or the id is invalid.
pub(super) fn stream_of(process: &str, instance: &str) -> Result<StreamId, StoreError> {
    let invalid = |reason: String| StoreError::Invalid { reason };
    check_name("process name", process).map_err(|error| invalid(error.to_string()))?;
    if let Some(problem) = id_problem("instance id", instance) {
        return Err(invalid(problem));
    }
    StreamId::new(process, instance).map_err(|error| invalid(error.to_string()))
}

/// Returns the status of the instance with this stream.
pub(super) fn status_of(stream: &StreamId, record: Record) -> InstanceStatus {
    let state = match record.phase {
        _ if record.parked.is_some() => InstanceState::Parked,
        Phase::Running => InstanceState::Running,
        Phase::Compensating => InstanceState::Compensating,
        Phase::Ended(Ending::Completed) => InstanceState::Completed,
        Phase::Ended(Ending::Compensated) => InstanceState::Compensated,
        Phase::Ended(Ending::Cancelled) => InstanceState::Cancelled,
    };
    let effects = record.effects.into_iter().map(|effect| OpenEffect {
        key: effect.key,
        command_id: effect.id,
        target: effect.command.name,
        target_id: effect.command.target,
    });
    let timers = record.timers.into_iter().map(|(name, timer)| OpenTimer { name, version: timer.version });
    InstanceStatus {
        process: stream.category().to_owned(),
        id: stream.id().to_owned(),
        state,
        parked: record.parked.map(|(reason, _)| reason),
        version: record.version,
        effects: effects.collect(),
        timers: timers.collect(),
        held: record.held.len(),
    }
}
