//! The one way in which the whole log is read on: by the publisher, and by the feed where the bus lost something.

use crate::bus::LogBatch;
use crate::event::{Position, RecordedEvent};
use crate::store::{EventStore, LogPage, ReadLog, StoreError};

/// How many events are read at a time.
const EVENTS: usize = 2_048;

/// How many bytes a batch has, roughly: this, or one event that is larger. Bounds what buffers of batches can hold.
const BYTES: usize = 1 << 20;

/// A stretch of the log.
#[derive(Debug)]
pub(crate) struct Stretch {
    /// In log order, each adjacent to the one before.
    pub(crate) batches: Vec<LogBatch>,
    /// Where it ends.
    pub(crate) upto: Position,
    /// The last stable event of the log when it was read.
    pub(crate) head: Position,
}

/// Reads the stretch behind `after`, at most to `upto`: up to 2,048 events in batches of about 1 MiB. Cancel-safe.
pub(crate) async fn read(
    store: &dyn EventStore,
    after: Position,
    upto: Option<Position>,
) -> Result<Stretch, StoreError> {
    let read = ReadLog { upto, ..ReadLog::after(after).limit(EVENTS) };
    let LogPage { events, scanned_to, head } = store.read_log(read).await?;
    Ok(Stretch { batches: cut(after, events, BYTES), upto: scanned_to, head })
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
