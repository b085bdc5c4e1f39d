//! The transaction that holds back the high-water mark.

use serde::Serialize;

use crate::event::Position;

/// The transaction that holds back the high-water mark.
///
/// Readers do not see the events after the mark until that transaction ends. Serializes as a map of
/// its fields, with `open_for_seconds`.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct HighWaterStall {
    /// Process id of the server process with the lowest low-water lock; `None` for a prepared
    /// transaction.
    pub pid: Option<i32>,
    /// Application name that the client has set.
    pub application_name: String,
    /// State of the session: `active`, `idle in transaction`, ….
    pub state: String,
    /// Time for which the transaction has been open.
    #[serde(rename = "open_for_seconds", serialize_with = "crate::serde_forms::seconds")]
    pub open_for: std::time::Duration,
    /// First 300 characters of the current or last statement; empty if the login may not see it.
    pub query: String,
    /// Position up to which the log is readable meanwhile.
    pub low_water: Position,
}
