//! The events in the stream of an instance.

use std::collections::BTreeMap;

use bytes::Bytes;
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::codec::{Codec, byte_string};
use crate::command::Kind;
use crate::event::{EventName, Metadata, Position, RecordedEvent, StreamId, Version};

/// Variant of the event with which an operator changes an instance.
pub(super) const REQUESTED: &str = "requested";

/// Variant of the event of an input: every instance begins with one.
pub(super) const INPUT: &str = "input";

/// Variant of the event that parks an instance.
pub(super) const PARKED: &str = "parked";

/// Variant of the event that begins a compensation.
pub(super) const COMPENSATING: &str = "compensating";

/// Variant of the event that ends an instance.
pub(super) const ENDED: &str = "ended";

/// An event of an instance. It needs no type of the user, so that tools can read it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum ProcessEvent {
    /// The instance has consumed an input.
    Input(RecordedInput),
    /// The instance has reacted to the oldest held input.
    Reacted {},
    /// A command to send.
    Effect(Effect),
    /// A timer has started. It replaces one of the same name.
    TimerStarted { name: String, due: Due, trail: Trail },
    /// A timer no longer exists.
    TimerCancelled { name: String },
    /// An operator's request. [`REQUESTED`] is its name.
    Requested { verb: Verb },
    /// The instance does not react until it is resumed. `effect`: the command that failed, if any.
    Parked {
        reason: String,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        effect: Option<Uuid>,
    },
    /// The instance reacts again.
    Resumed {},
    /// The instance executes the declared undo of its effects.
    Compensating {},
    /// The instance has ended.
    Ended { ending: Ending },
}

/// An input as recorded.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct RecordedInput {
    /// Id of the event, of the command, or of the timer.
    pub(super) id: Uuid,
    pub(super) source: Source,
    /// Whether the reaction is still to come.
    #[serde(default, skip_serializing_if = "is_false")]
    pub(super) held: bool,
    pub(super) trail: Trail,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
fn is_false(flag: &bool) -> bool {
    !flag
}

/// The source of an input.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Source {
    Event(Box<Trigger>),
    Done {
        effect: String,
        #[serde(with = "byte_string")]
        reply: Vec<u8>,
    },
    Rejected {
        effect: String,
        message: String,
        #[serde(with = "byte_string")]
        details: Vec<u8>,
    },
    Due {
        timer: String,
    },
}

/// A recorded event of the log, as an input.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Trigger {
    pub(super) position: Position,
    stream: StreamId,
    version: Version,
    name: EventName,
    codec: String,
    #[serde(with = "byte_string")]
    payload: Vec<u8>,
    command: Uuid,
    recorded_at: DateTime<Utc>,
}

impl Trigger {
    pub(super) fn of(event: &RecordedEvent) -> Self {
        Self {
            position: event.position,
            stream: event.stream.clone(),
            version: event.version,
            name: event.name.clone(),
            codec: event.codec.name().to_owned(),
            payload: event.payload.to_vec(),
            command: event.command_id,
            recorded_at: event.recorded_at,
        }
    }

    /// Rebuilds the recorded event, without its metadata.
    pub(super) fn recorded(&self, id: Uuid) -> Result<RecordedEvent, String> {
        let codec = Codec::from_name(&self.codec);
        Ok(RecordedEvent {
            id,
            stream: self.stream.clone(),
            version: self.version,
            position: self.position,
            name: self.name.clone(),
            codec: codec.ok_or_else(|| format!("unknown codec {:?}", self.codec))?,
            payload: Bytes::from(self.payload.clone()),
            command_id: self.command,
            metadata: Bytes::from_static(&[0xa0]),
            recorded_at: self.recorded_at,
        })
    }
}

/// The part of the metadata that effects and their events carry on.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Trail {
    pub(super) correlation: Uuid,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) traceparent: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) tracestate: Option<String>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(super) user: BTreeMap<String, String>,
    /// Number of reactions of processes that led to the input.
    #[serde(default)]
    pub(super) depth: u16,
}

impl Trail {
    pub(super) fn of(metadata: Metadata, command_id: Uuid) -> Self {
        let Metadata { correlation_id, traceparent, tracestate, user, depth, .. } = metadata;
        Self { correlation: correlation_id.unwrap_or(command_id), traceparent, tracestate, user, depth }
    }

    /// Returns the metadata of an event of the instance that `cause` has led to.
    pub(super) fn own_metadata(&self, cause: Uuid) -> Metadata {
        let Self { correlation, traceparent, tracestate, user, depth } = self.clone();
        Metadata {
            correlation_id: Some(correlation),
            causation_id: Some(cause),
            traceparent,
            tracestate,
            user,
            depth,
            ..Metadata::default()
        }
    }

    /// Returns the metadata of a command that `cause` has led to.
    pub(super) fn command_metadata(&self, cause: Uuid) -> Metadata {
        let metadata = self.own_metadata(cause);
        Metadata { depth: metadata.depth.saturating_add(1), ..metadata }
    }
}

/// A command that an instance sends.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Effect {
    /// Id of the command.
    pub(super) id: Uuid,
    /// Id of the input that it reacts to.
    pub(super) cause: Uuid,
    pub(super) key: String,
    pub(super) command: EncodedCommand,
    /// Command that undoes this one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) undo: Option<EncodedCommand>,
    /// Whether this command undoes another one.
    #[serde(default, skip_serializing_if = "is_false")]
    pub(super) undoes: bool,
    pub(super) trail: Trail,
}

/// A command with its target.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct EncodedCommand {
    pub(super) kind: Kind,
    /// Category of the aggregate, or name of the handler.
    pub(super) name: String,
    /// Id of the aggregate, or key from the handler.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) target: Option<String>,
    #[serde(with = "byte_string")]
    pub(super) payload: Vec<u8>,
}

/// When a timer is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Due {
    /// Milliseconds after the store's clock at the start of the timer.
    After(u64),
    At(DateTime<Utc>),
}

/// A request of an operator.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Verb {
    Retry,
    Cancel,
    Compensate,
}

/// How an instance has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Ending {
    Completed,
    Compensated,
    Cancelled,
}
