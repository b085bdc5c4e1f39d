use bytes::Bytes;
use chrono::{DateTime, Utc};
use uuid::Uuid;

/// What became of a command that no aggregate has in its stream: kept so that the same command, coming again on whatever
/// node, is answered instead of executed again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommandRecord {
    /// The command.
    pub id: Uuid,
    /// What the command is called.
    pub name: String,
    /// Tells the command's content from another: the same id with another one is a mistake.
    pub fingerprint: Uuid,
    /// The answer, encoded by whoever gave it.
    pub outcome: Bytes,
    /// When it was recorded, by the store's clock.
    pub recorded_at: DateTime<Utc>,
}
