//! The status of the feed.

use serde::Serialize;

use crate::event::Position;

/// Status of the feed. Serializes as a map of its fields.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct FeedStatus {
    /// Position up to which followers have received the log.
    ///
    /// `None` before the first follower and the first successful read of the store.
    pub position: Option<Position>,
    /// Number of reads because a notification of new events was lost or late.
    pub repairs: u64,
    /// Last error of the bus or the store; cleared by the next success.
    pub last_error: Option<String>,
}
