//! The items that a follower receives.

use crate::bus::LogBatch;
use crate::event::Position;

/// Next item for a follower.
#[derive(Debug, Clone)]
pub(crate) enum FeedItem {
    /// The next part of the log.
    ///
    /// It begins at the end of the previous one, except after [`Lagged`](Self::Lagged). Without
    /// events, it only reports the position.
    Batch(LogBatch),
    /// The follower was too slow, and a batch was overwritten.
    Lagged,
    /// The feed met a permanent error: the follower has to query the store itself.
    Failed,
    /// The feed has ended.
    Closed,
}

/// Returns the part of `batch` after `position`; `None` if there is a gap between them.
pub(crate) fn adjacent(batch: LogBatch, position: Position) -> Option<LogBatch> {
    if batch.after > position {
        return None;
    }
    if batch.after == position {
        return Some(batch);
    }
    let events = batch.events.iter().filter(|event| event.position > position).cloned().collect();
    Some(LogBatch { after: position, upto: batch.upto.max(position), events })
}
