//! The newest part of the log, if this process appended all of it without appends of others.
//!
//! It saves close followers from reading events that this process has just written.

use std::collections::VecDeque;

use super::super::ReadLog;
use crate::event::{Position, RecordedEvent};

/// Maximum number of cached events.
const EVENTS: usize = 64;
/// Maximum size of the cached payload and metadata, in bytes.
const BYTES: usize = 256 << 10;

/// All events of the log after one position and up to another.
#[derive(Debug, Default)]
pub(super) struct TailCache {
    /// Number of the server connection; a server that takes over may lack some of the events.
    server: u64,
    after: Position,
    upto: Position,
    events: VecDeque<RecordedEvent>,
    bytes: usize,
}

impl TailCache {
    /// Adds an event that follows the event at `previous` in the log of `server`.
    pub(super) fn push(&mut self, server: u64, previous: Position, event: RecordedEvent) {
        if server < self.server || (server == self.server && event.position <= self.upto) {
            return;
        }
        if server != self.server || previous != self.upto {
            // The events in between are unknown.
            *self = Self { server, after: previous, ..Self::default() };
        }
        self.upto = event.position;
        self.bytes += size(&event);
        self.events.push_back(event);
        while self.events.len() > EVENTS || self.bytes > BYTES {
            let Some(oldest) = self.events.pop_front() else { break };
            self.bytes -= size(&oldest);
            self.after = oldest.position;
        }
    }

    /// Returns the events for `read` and the position that they reach, at most `end`.
    ///
    /// Returns `None` if `read` starts outside the cached range.
    pub(super) fn read(
        &self,
        server: u64,
        read: &ReadLog,
        end: Position,
    ) -> Option<(Vec<RecordedEvent>, Position)> {
        if server != self.server || read.after < self.after || read.after >= self.upto {
            return None;
        }
        let mut events = Vec::new();
        // Always the position of an event: `end` may lie in a hole.
        let mut scanned_to = read.after;
        let there = |event: &&RecordedEvent| event.position > read.after && event.position <= end;
        for event in self.events.iter().filter(there) {
            scanned_to = event.position;
            if read.filter.matches(event) {
                events.push(event.clone());
                if events.len() >= read.limit.max(1) {
                    break;
                }
            }
        }
        Some((events, scanned_to))
    }
}

fn size(event: &RecordedEvent) -> usize {
    event.payload.len() + event.metadata.len()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::StreamId;
    use crate::event::tests::recorded;
    use crate::store::Filter;

    fn read(recent: &TailCache, read: ReadLog, end: u64) -> Option<(Vec<u64>, u64)> {
        let (events, scanned_to) = recent.read(1, &read, Position::new(end))?;
        Some((events.iter().map(|event| event.position.get()).collect(), scanned_to.get()))
    }

    fn after(position: u64) -> ReadLog {
        ReadLog::after(Position::new(position))
    }

    #[test]
    fn only_adjacent_reads_are_answered() {
        let mut recent = TailCache::default();
        assert_eq!(read(&recent, after(0), 9), None);
        for (previous, position) in [(3, 5), (5, 6), (6, 9)] {
            recent.push(1, Position::new(previous), recorded(position, 1));
        }
        assert_eq!(read(&recent, after(2), 9), None);
        assert_eq!(read(&recent, after(9), 9), None);
        assert_eq!(read(&recent, after(3), 9), Some((vec![5, 6, 9], 9)));
        assert_eq!(read(&recent, after(4), 12), Some((vec![5, 6, 9], 9)));
        assert_eq!(read(&recent, after(5), 8), Some((vec![6], 6)));
        assert_eq!(read(&recent, after(6), 8), Some((vec![], 6)));
        assert_eq!(read(&recent, after(3).limit(2), 9), Some((vec![5, 6], 6)));
        let odd = Filter::all().with_streams([StreamId::new("test", 1).unwrap()]);
        assert_eq!(read(&recent, after(3).filter(odd), 9), Some((vec![5, 9], 9)));
        // Another process appended at 10, and one answer arrived late.
        recent.push(1, Position::new(10), recorded(11, 1));
        recent.push(1, Position::new(6), recorded(7, 1));
        assert_eq!(read(&recent, after(9), 11), None);
        assert_eq!(read(&recent, after(10), 11), Some((vec![11], 11)));
    }

    #[test]
    fn another_server_starts_empty() {
        let mut recent = TailCache::default();
        recent.push(1, Position::new(3), recorded(5, 1));
        assert!(recent.read(2, &after(3), Position::new(9)).is_none());
        recent.push(2, Position::new(3), recorded(4, 1));
        // A late answer of the old server.
        recent.push(1, Position::new(5), recorded(6, 1));
        let read = |from| recent.read(2, &after(from), Position::new(9)).map(|(_, upto)| upto.get());
        assert_eq!((read(3), read(4), read(5)), (Some(4), None, None));
    }

    #[test]
    fn the_cache_has_a_size_limit() {
        let mut recent = TailCache::default();
        for position in 1..=200 {
            recent.push(1, Position::new(position - 1), recorded(position, 1));
        }
        assert_eq!((recent.events.len(), recent.bytes), (EVENTS, EVENTS));
        assert_eq!(read(&recent, after(135), 200), None);
        assert_eq!(read(&recent, after(136), 200).map(|(events, _)| events.len()), Some(EVENTS));
        recent.push(1, Position::new(200), recorded(201, BYTES + 1));
        assert_eq!((recent.events.len(), recent.bytes), (0, 0));
        assert_eq!(read(&recent, after(200), 201), None);
    }
}
