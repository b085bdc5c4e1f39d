//! The receipt of a command.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::event::{Position, StreamId, Version};
use crate::store::CommandEvents;

/// The receipt of a durable command.
///
/// Serializes as a map of its fields.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Receipt<R = ()> {
    /// Id of the command.
    pub command_id: Uuid,
    /// Stream of the aggregate, or of the decision's events.
    pub stream: StreamId,
    /// Version of the stream after the command.
    ///
    /// A [decision over several streams](crate::Decide) without events has [`Version::NONE`].
    pub version: Version,
    /// Position of the command's last event. A projection at this position has applied the command.
    ///
    /// If the command caused no events, this is the position of the last event that the aggregate
    /// or the decision had folded.
    pub position: Position,
    /// Number of events of the command: versions `version - events + 1` to `version` of the stream.
    pub events: u64,
    /// Reply of the aggregate or decision.
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

    /// Separates the reply from the rest.
    pub(crate) fn split(self) -> (Receipt, R) {
        let Self { command_id, stream, version, position, events, reply, duplicate } = self;
        (Receipt { command_id, stream, version, position, events, reply: (), duplicate }, reply)
    }
}

impl Receipt {
    pub(crate) fn with_reply<R>(self, reply: R) -> Receipt<R> {
        let Self { command_id, stream, version, position, events, reply: (), duplicate } = self;
        Receipt { command_id, stream, version, position, events, reply, duplicate }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_receipt_survives_json() {
        let receipt = Receipt {
            command_id: Uuid::nil(),
            stream: StreamId::new("order", 17).unwrap(),
            version: Version::new(2),
            position: Position::new(5),
            events: 1,
            reply: "paid".to_owned(),
            duplicate: false,
        };
        let json = json!({
            "command_id": "00000000-0000-0000-0000-000000000000",
            "stream": "order/17",
            "version": 2,
            "position": 5,
            "events": 1,
            "reply": "paid",
            "duplicate": false,
        });
        assert_eq!(serde_json::to_value(&receipt).unwrap(), json);
        assert_eq!(serde_json::from_value::<Receipt<String>>(json).unwrap(), receipt);
    }
}
