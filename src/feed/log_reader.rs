//! The log reader of the feed, and of a publisher that is catching up.

use crate::bus::LogBatch;
use crate::event::{Position, RecordedEvent};
use crate::store::{EventStore, LogPage, ReadLog, StoreError};

/// Maximum number of events in a read.
const EVENTS: usize = 2_048;

/// Approximate size of a batch in bytes; one larger event also makes a batch.
///
/// Bounds the buffers of batches.
const BYTES: usize = 1 << 20;

/// A chunk of the log.
#[derive(Debug)]
pub(crate) struct LogChunk {
    /// In log order, each adjacent to the previous one.
    pub(crate) batches: Vec<LogBatch>,
    /// Position of its end.
    pub(crate) upto: Position,
    /// High-water mark at the time of the read.
    pub(crate) head: Position,
}

/// Reads the chunk after `after`, at most to `upto`. Cancel-safe.
///
/// Limit: 2,048 events, in batches of about 1 MiB.
pub(crate) async fn read(
    store: &dyn EventStore,
    after: Position,
    upto: Option<Position>,
) -> Result<LogChunk, StoreError> {
    let read = ReadLog { upto, ..ReadLog::after(after).limit(EVENTS) };
    let LogPage { events, scanned_to, head } = store.read_log(read).await?;
    Ok(LogChunk { batches: cut(after, events, BYTES), upto: scanned_to, head })
}

fn cut(mut after: Position, events: Vec<RecordedEvent>, limit: usize) -> Vec<LogBatch> {
    let mut batches = Vec::new();
    let mut batch: Vec<RecordedEvent> = Vec::new();
    let mut bytes = 0;
    let mut finish = |batch: &mut Vec<RecordedEvent>| {
        if let Some(last) = batch.last() {
            let upto = last.position;
            batches.push(LogBatch { after, upto, events: std::mem::take(batch).into() });
            after = upto;
        }
    };
    for event in events {
        let size = event.payload.len() + event.metadata.len();
        if bytes + size > limit {
            finish(&mut batch);
            bytes = 0;
        }
        bytes += size;
        batch.push(event);
    }
    finish(&mut batch);
    batches
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::tests::recorded;

    #[test]
    fn batches_are_adjacent_and_as_large_as_allowed() {
        let sizes = [(3, 40), (4, 60), (7, 1), (9, 500), (10, 500), (11, 1)];
        let batches =
            cut(Position::new(2), sizes.map(|(position, size)| recorded(position, size)).to_vec(), 100);
        let bounds: Vec<_> = batches.iter().map(|b| (b.after.get(), b.upto.get(), b.events.len())).collect();
        assert_eq!(bounds, [(2, 4, 2), (4, 7, 1), (7, 9, 1), (9, 10, 1), (10, 11, 1)]);
        assert!(cut(Position::START, Vec::new(), 100).is_empty());
    }
}
