//! A page of the log, and the request for one.

use super::filter::Filter;
use crate::event::{Position, RecordedEvent};

/// A request for one page of the log.
#[derive(Debug, Clone)]
pub struct ReadLog {
    /// Position after which the page starts.
    pub after: Position,
    /// Last position of the scan, if limited; it bounds the cost even if nothing matches.
    pub upto: Option<Position>,
    /// Events to return.
    pub filter: Filter,
    /// Maximum number of events; at least 1.
    ///
    /// A page ends earlier when its events take about 4 MiB. It has at least one event.
    pub limit: usize,
}

impl ReadLog {
    /// Reads all events after `position`, 1,000 at a time.
    pub fn after(position: Position) -> Self {
        Self { after: position, upto: None, filter: Filter::all(), limit: 1_000 }
    }

    /// Sets [`upto`](Self::upto).
    #[must_use]
    pub fn upto(mut self, position: Position) -> Self {
        self.upto = Some(position);
        self
    }

    /// Sets [`filter`](Self::filter).
    #[must_use]
    pub fn filter(mut self, filter: Filter) -> Self {
        self.filter = filter;
        self
    }

    /// Sets [`limit`](Self::limit); 0 counts as 1.
    #[must_use]
    pub fn limit(mut self, limit: usize) -> Self {
        self.limit = limit.max(1);
        self
    }
}

/// A page of the log, in log order.
#[derive(Debug, Clone, Default)]
pub struct LogPage {
    /// Matching events.
    pub events: Vec<RecordedEvent>,
    /// Position that the scan has reached.
    ///
    /// Every matching event up to here is in this page or an earlier one (I1). It is the position
    /// of an existing event, which need not match, or `after` if there was none.
    pub scanned_to: Position,
    /// High-water mark of the log when the page was read (see
    /// [`EventStore::high_water_mark`](super::EventStore::high_water_mark)).
    ///
    /// With [`upto`](ReadLog::upto) it can be slightly older, but not lower than `upto` requires.
    pub head: Position,
}

impl LogPage {
    /// Returns whether the log continued after this page when the page was read.
    pub fn has_more(&self) -> bool {
        self.scanned_to < self.head
    }
}
