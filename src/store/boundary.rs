use super::query::Query;
use crate::event::Position;

/// The condition of an append: a query, and the matching events that the decision has read.
///
/// [`QueryStore::read`](super::QueryStore::read) returns it. An append
/// [`unless`](super::Append::unless) a boundary was crossed is stored only if no other event matches
/// the query (I13).
///
/// It is opaque on purpose. A position does not suffice: an event with a lower position can be
/// committed after one with a higher position was read. So the boundary holds the high-water mark
/// before the read, and the positions of the events that were read above it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Boundary {
    query: Query,
    /// No matching event at or below this position is unknown to the decision.
    mark: Position,
    /// Positions above the mark of events that the decision has read, in order.
    seen: Vec<Position>,
    /// Whether the decision expects that no event matches at all.
    expects_none: bool,
}

impl Boundary {
    /// Maximum number of events above the high-water mark.
    ///
    /// If a read finds more, it waits until the mark is higher.
    pub const MAX_SEEN: usize = 1_000;

    pub(super) fn of_read(query: Query, mark: Position, seen: Vec<Position>) -> Self {
        Self { query, mark, seen, expects_none: false }
    }

    /// Returns the query, for back ends.
    pub fn query(&self) -> &Query {
        &self.query
    }

    /// Returns the high-water mark before the read, for back ends.
    pub fn mark(&self) -> Position {
        self.mark
    }

    /// Returns the positions above the mark that were read, in order, for back ends.
    pub fn seen(&self) -> &[Position] {
        &self.seen
    }

    /// Returns whether the boundary comes from [`Query::exists`], for back ends.
    pub fn expects_none(&self) -> bool {
        self.expects_none
    }

    /// Returns whether the decision knows a matching event at this position.
    pub fn knows(&self, position: Position) -> bool {
        position <= self.mark || self.seen.binary_search(&position).is_ok()
    }
}

// Not in query.rs, because this file imports that one.
impl Query {
    /// Turns the query into a condition of an append: no matching event exists.
    ///
    /// That makes a value unique without a read, for example a user name. An append that loses
    /// fails with [`AppendError::Exists`](super::AppendError::Exists). After an unknown outcome,
    /// `Exists` may name your own event: compare the event at `position`.
    #[must_use]
    pub fn exists(self) -> Boundary {
        Boundary { query: self, mark: Position::START, seen: Vec::new(), expects_none: true }
    }
}
