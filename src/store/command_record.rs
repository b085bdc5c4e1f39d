use bytes::Bytes;
use chrono::{DateTime, Utc};
use uuid::Uuid;

/// The recorded outcome of a command that has no events in a stream.
///
/// The record makes repeats of the command idempotent on every node: they get the recorded outcome.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommandRecord {
    /// Id of the command.
    pub id: Uuid,
    /// Name of the command.
    pub name: String,
    /// Fingerprint of the command's content; the same id with another fingerprint is an error.
    pub fingerprint: Uuid,
    /// Outcome, in the encoding of the recording node.
    pub outcome: Bytes,
    /// Time of recording, by the store's clock.
    pub recorded_at: DateTime<Utc>,
}
