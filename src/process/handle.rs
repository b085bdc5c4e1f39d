//! An instance as operators and callers see it: its status, and requests to it.

use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;

use serde::Serialize;
use uuid::Uuid;

use super::Process;
use super::error::RequestError;
use super::event::{Ending, ProcessEvent, Verb};
use super::history::load;
use super::record::{Phase, Record};
use crate::event::{Metadata, NewEvent, StreamId, Version};
use crate::store::{Append, AppendError, EventStore, ExpectedVersion, StoreError};

/// Number of attempts at a request while the instance changes.
const ATTEMPTS: u32 = 20;

/// An instance of a process, on any node. Cheap to clone.
///
/// [`Runtime::process`](crate::Runtime::process) creates it. It reads the store, and needs no node
/// that runs the process.
pub struct InstanceHandle<P> {
    store: Arc<dyn EventStore>,
    id: String,
    process: PhantomData<fn() -> P>,
}

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

impl<P> InstanceHandle<P> {
    pub(crate) fn new(store: Arc<dyn EventStore>, id: String) -> Self {
        Self { store, id, process: PhantomData }
    }

    /// Returns the id of the instance.
    pub fn id(&self) -> &str {
        &self.id
    }
}

impl<P: Process> InstanceHandle<P> {
    /// Reads the status from the stream of the instance; `None` if it does not exist.
    ///
    /// # Errors
    /// The error of the store; `Invalid` if the id is invalid, `Corrupt` if an event does not decode.
    pub async fn status(&self) -> Result<Option<InstanceStatus>, StoreError> {
        let stream = stream(P::NAME, &self.id)?;
        let record = load(&*self.store, &stream).await?;
        Ok(record.exists().then(|| status(P::NAME, &self.id, record)))
    }

    /// Requests a retry of a parked instance.
    ///
    /// The owner sends its open commands again, with their ids, and reacts to the held inputs in
    /// order. The request is durable when this returns.
    ///
    /// # Errors
    /// If the instance does not exist or is not parked, or the store failed.
    pub async fn retry(&self) -> Result<(), RequestError> {
        request(&*self.store, P::NAME, &self.id, Verb::Retry).await
    }

    /// Requests the end of an instance, without compensation.
    ///
    /// Its timers are cancelled, and its open commands are not sent any more. A command in flight may
    /// still take effect. The request is durable when this returns.
    ///
    /// # Errors
    /// If the instance does not exist or has ended, or the store failed.
    pub async fn cancel(&self) -> Result<(), RequestError> {
        request(&*self.store, P::NAME, &self.id, Verb::Cancel).await
    }

    /// Requests [compensation](super::Next::compensate), also of a parked instance.
    ///
    /// If the instance is parked because a command failed, this command counts as one without effect.
    /// The request is durable when this returns.
    ///
    /// # Errors
    /// If the instance does not exist or has ended, or the store failed.
    pub async fn compensate(&self) -> Result<(), RequestError> {
        request(&*self.store, P::NAME, &self.id, Verb::Compensate).await
    }
}

impl<P> Clone for InstanceHandle<P> {
    fn clone(&self) -> Self {
        Self { store: self.store.clone(), id: self.id.clone(), process: PhantomData }
    }
}

impl<P> fmt::Debug for InstanceHandle<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InstanceHandle").field("id", &self.id).finish_non_exhaustive()
    }
}

fn stream(process: &str, instance: &str) -> Result<StreamId, StoreError> {
    StreamId::new(process, instance).map_err(|error| StoreError::Invalid { reason: error.to_string() })
}

fn status(process: &str, id: &str, record: Record) -> InstanceStatus {
    let state = match record.phase {
        Phase::Ended(Ending::Completed) if record.parked.is_none() => InstanceState::Completed,
        Phase::Ended(Ending::Compensated) => InstanceState::Compensated,
        Phase::Ended(Ending::Cancelled) => InstanceState::Cancelled,
        _ if record.parked.is_some() => InstanceState::Parked,
        Phase::Compensating => InstanceState::Compensating,
        Phase::Running | Phase::Ended(_) => InstanceState::Running,
    };
    let effects = record.effects.into_iter().map(|effect| OpenEffect {
        key: effect.key,
        command_id: effect.id,
        target: effect.command.name,
        target_id: effect.command.target,
    });
    let timers = record.timers.into_iter().map(|(name, timer)| OpenTimer { name, version: timer.version });
    InstanceStatus {
        process: process.to_owned(),
        id: id.to_owned(),
        state,
        parked: record.parked.map(|(reason, _)| reason),
        version: record.version,
        effects: effects.collect(),
        timers: timers.collect(),
        held: record.held.len(),
    }
}

/// Appends an operator's request to the stream of an instance. Its owner then acts on it.
async fn request(
    store: &dyn EventStore,
    process: &str,
    instance: &str,
    verb: Verb,
) -> Result<(), RequestError> {
    let stream = stream(process, instance)?;
    let mut last = None;
    for _ in 0..ATTEMPTS {
        let record = load(store, &stream).await?;
        let (process, instance) = (process.to_owned(), instance.to_owned());
        if !record.exists() {
            return Err(RequestError::Unknown { process, instance });
        }
        if !record.applies(verb) {
            return Err(match verb {
                Verb::Retry => RequestError::NotParked { process, instance },
                Verb::Compensate if record.phase == Phase::Compensating => {
                    RequestError::Compensating { process, instance }
                }
                Verb::Cancel | Verb::Compensate => RequestError::Ended { process, instance },
            });
        }
        let event = requested(store, &stream, verb)?;
        let expected = ExpectedVersion::Exact(record.version);
        let append = Append::one(stream.clone(), expected, vec![event]);
        match store.append(vec![append]).await.pop() {
            Some(Ok(_)) => return Ok(()),
            Some(Err(AppendError::Store(error))) => return Err(error.into()),
            Some(Err(conflict)) => last = Some(conflict.to_string()),
            None => {}
        }
    }
    let reason = format!("requesting a change of {stream} failed: {}", last.unwrap_or_default());
    Err(StoreError::Unavailable { reason, source: None }.into())
}

fn requested(store: &dyn EventStore, stream: &StreamId, verb: Verb) -> Result<NewEvent, StoreError> {
    let invalid = |reason: String| StoreError::Invalid { reason };
    let event = ProcessEvent::Requested { verb };
    NewEvent::of_variant(stream.category(), &event, store.info().codec, &Metadata::default())
        .map_err(|error| invalid(error.to_string()))
}
