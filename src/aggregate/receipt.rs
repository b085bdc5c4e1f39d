//! The receipt of a command.

use uuid::Uuid;

use crate::event::{Position, StreamId, Version};
use crate::store::CommandEvents;

/// The receipt of a durable command.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Receipt<R = ()> {
    /// Id of the command.
    pub command_id: Uuid,
    /// Stream of the aggregate.
    pub stream: StreamId,
    /// Version of the aggregate after the command.
    pub version: Version,
    /// Position of the command's last event. A projection at this position has applied the command.
    ///
    /// If the command caused no events, this is the position of the last event that the aggregate
    /// had folded.
    pub position: Position,
    /// Number of events of the command: versions `version - events + 1` to `version` of the stream.
    pub events: u64,
    /// Reply of the aggregate.
    pub reply: R,
    /// Whether the command was durable before this call. The receipt is then its first receipt.
    pub duplicate: bool,
}

impl<R> Receipt<R> {
    /// Creates the receipt of a command that was durable before.
    pub(crate) fn repeated(command_id: Uuid, stream: &StreamId, events: CommandEvents, reply: R) -> Self {
        Self {
            command_id,
            stream: stream.clone(),
            version: events.last,
            position: events.position,
            events: events.last.get() + 1 - events.first.get(),
            reply,
            duplicate: true,
        }
    }
}

impl Receipt {
    pub(crate) fn with_reply<R>(self, reply: R) -> Receipt<R> {
        let Self { command_id, stream, version, position, events, reply: (), duplicate } = self;
        Receipt { command_id, stream, version, position, events, reply, duplicate }
    }
}
