//! Encoded events, before and after they are recorded.

use bytes::Bytes;
use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::name::EventName;
use super::position::{Position, Version};
use super::stream::StreamId;
use super::tags::Tags;
use crate::codec::Codec;

/// An encoded and named event that has no position and version yet.
#[derive(Debug, Clone)]
pub struct NewEvent {
    /// Identity of the event (UUIDv7).
    ///
    /// The store uses it to resolve an append of unknown outcome (I4).
    pub id: Uuid,
    /// `category.variant`.
    pub name: EventName,
    /// The encoded payload, see [`Codec`].
    pub payload: Bytes,
    /// Id of the command that caused the event.
    ///
    /// Stored beside the metadata, so that folding does not decode these.
    pub command_id: Uuid,
    /// [Correlation id](super::Metadata::correlation_id), as in the metadata, for the index of the
    /// store.
    pub correlation_id: Option<Uuid>,
    /// Encoded [`Metadata`](super::Metadata).
    pub metadata: Bytes,
    /// Tags of the event, for [queries](crate::store::Query).
    pub tags: Tags,
}

#[cfg(any(feature = "postgres", feature = "sqlite"))]
impl NewEvent {
    /// Returns the correlation id, unless it is the id of the command.
    pub(crate) fn own_correlation(&self) -> Option<Uuid> {
        self.correlation_id.filter(|id| *id != self.command_id)
    }
}

/// An event in the log.
///
/// Serializes as a map of `position`, `recorded_at` (RFC 3339), `stream`, `version`, `name`,
/// `event_id` (the field `id`), `command_id`, `codec`, `payload` and `metadata`, as
/// `storied log show --json` prints it.
///
/// - `payload` is the stored payload, before upcasting. As the types are unknown, a value without a
///   form in JSON becomes a map with a key that begins with `$`: `{"$bytes": "00ff"}` (also a UUID
///   in CBOR), `{"$integer": "-18446744073709551616"}`, `{"$float": "NaN"}`,
///   `{"$tag": 1, "$value": …}`, `{"$map": [[key, value], …]}` (keys that are no text, or duplicate
///   keys).
/// - `metadata` has the keys of [`Metadata`](super::Metadata), without `reply` and `content`, which
///   only storied reads.
/// - If one of them does not decode, it is `{"$undecodable": "reason", "$bytes": "ff00"}`.
///
/// To serialize an event with its types, [`decode`](Self::decode) it.
#[derive(Debug, Clone)]
pub struct RecordedEvent {
    /// Identity of the event (UUIDv7).
    pub id: Uuid,
    /// Stream of the event.
    pub stream: StreamId,
    /// Version of the event in its stream.
    pub version: Version,
    /// Position of the event in the log.
    pub position: Position,
    /// `category.variant` as written. Only [`decode`](Self::decode) translates an alias.
    pub name: EventName,
    /// Encoding of `payload`.
    pub codec: Codec,
    /// The encoded payload.
    pub payload: Bytes,
    /// Id of the command that caused the event (causation).
    pub command_id: Uuid,
    /// Encoded [`Metadata`](super::Metadata); decoded on demand, because most readers do not use it.
    pub metadata: Bytes,
    /// Time of the append by the clock of the store.
    ///
    /// Not necessarily in log order across streams; order by `position`.
    pub recorded_at: DateTime<Utc>,
}

impl RecordedEvent {
    /// Returns the approximate size in memory, in bytes.
    pub(crate) fn size(&self) -> usize {
        const ALL_BUT_CONTENT: usize = 256;
        self.payload.len() + self.metadata.len() + ALL_BUT_CONTENT
    }
}
