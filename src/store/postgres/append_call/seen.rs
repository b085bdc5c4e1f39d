//! What this process has seen of the streams of a call.

use uuid::Uuid;

use super::super::convert::to_sql;
use super::super::numbers::{SeenEvent, ServerNumbers};
use crate::event::NewEvent;
use crate::store::{ExpectedVersion, StreamAppend};

/// Returns the version that a part expects, if it is a single one.
pub(super) fn exact(part: &StreamAppend) -> Option<i64> {
    match part.expected {
        ExpectedVersion::Exact(version) => Some(to_sql(version.get())),
        ExpectedVersion::NoStream => Some(0),
        ExpectedVersion::Any | ExpectedVersion::StreamExists => None,
    }
}

/// Returns the event that a part follows, if this process has seen it.
pub(super) fn seen_before(known: &mut ServerNumbers, part: &StreamAppend) -> Option<SeenEvent> {
    known.last_event(&part.stream).filter(|last| exact(part) == Some(to_sql(last.version.get())))
}

/// Returns the correlation ids of events; `None` if each is the id of its command.
pub(super) fn correlations<'e>(
    events: impl Iterator<Item = &'e NewEvent> + Clone,
) -> Option<Vec<Option<Uuid>>> {
    let any = events.clone().any(|event| event.own_correlation().is_some());
    any.then(|| events.map(NewEvent::own_correlation).collect())
}

/// Returns each of the categories and names once.
pub(super) fn distinct(categories: &[i32], names: &[i32]) -> Vec<i32> {
    let mut used = [categories, names].concat();
    used.sort_unstable();
    used.dedup();
    used
}
