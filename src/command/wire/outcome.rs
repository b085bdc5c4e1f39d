//! The outcome of a command: its result or its error.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::failure::{Failure, bytes};
use crate::aggregate::{ExecuteError, NoReplyKind, Receipt};
use crate::codec::{byte_string, from_cbor};
use crate::event::{Position, StreamId, Version};

/// The outcome of a command, and its duration on the executing node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Answered {
    /// Duration in microseconds.
    pub(crate) runtime: u64,
    pub(crate) outcome: Outcome,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Outcome {
    Done(Done),
    Error(Failure),
}

/// The result of a command that took effect.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Done {
    #[serde(with = "byte_string")]
    pub(crate) reply: Vec<u8>,
    /// Whether the command had taken effect before.
    #[serde(default)]
    pub(crate) duplicate: bool,
    /// Version of the aggregate after the command; for aggregates only.
    #[serde(default)]
    pub(crate) version: u64,
    /// Position of the last event; for aggregates only.
    #[serde(default)]
    pub(crate) position: u64,
    /// Number of events; for aggregates only.
    #[serde(default)]
    pub(crate) events: u64,
    /// Set if the reply did not fit into a message and was omitted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) omitted: Option<Omitted>,
}

/// The sizes of an omitted reply, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Omitted {
    pub(crate) size: u64,
    /// Maximum size of a message.
    pub(crate) limit: u64,
}

impl Done {
    pub(crate) fn into_receipt<R: DeserializeOwned, E>(
        self,
        id: Uuid,
        stream: StreamId,
    ) -> Result<Receipt<R>, ExecuteError<E>> {
        let receipt = Receipt {
            command_id: id,
            stream,
            version: Version::new(self.version),
            position: Position::new(self.position),
            events: self.events,
            reply: (),
            duplicate: self.duplicate,
        };
        if let Some(omitted) = self.omitted {
            return Err(omitted.into_error(id, Some(receipt)));
        }
        match from_cbor(&self.reply) {
            Ok(reply) => Ok(receipt.with_reply(reply)),
            Err(reason) => Err(ExecuteError::unreadable_reply(id, Some(receipt), reason)),
        }
    }
}

impl Omitted {
    pub(crate) fn into_error<E>(self, command_id: Uuid, receipt: Option<Receipt>) -> ExecuteError<E> {
        let (size, limit) = (bytes(self.size), bytes(self.limit));
        let receipt = receipt.map(Box::new);
        ExecuteError::NoReply { command_id, receipt, kind: NoReplyKind::TooLarge { size, limit } }
    }
}

/// Decodes the reply of a handler.
pub(crate) fn read_reply<R: DeserializeOwned, E>(reply: &[u8], id: Uuid) -> Result<R, ExecuteError<E>> {
    from_cbor(reply).map_err(|reason| ExecuteError::unreadable_reply(id, None, reason))
}
