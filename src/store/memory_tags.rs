//! Tags of events in memory.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Bound::{Excluded, Unbounded};

use super::append::AppendError;
use super::boundary::Boundary;
use super::query::{Query, QueryItem};
use crate::event::{EventName, NewEvent, Position, Tag};

/// The tags of the events of a store in memory.
#[derive(Debug, Default)]
pub(super) struct MemoryTags {
    /// Events with a tag: their positions and names.
    events: HashMap<Tag, BTreeMap<Position, EventName>>,
}

impl MemoryTags {
    pub(super) fn insert(&mut self, position: Position, event: &NewEvent) {
        for tag in event.tags.iter() {
            self.events.entry(tag.clone()).or_default().insert(position, event.name.clone());
        }
    }

    /// Returns the positions of the first `limit` events after `after` that match a query.
    pub(super) fn matching(&self, query: &Query, after: Position, limit: usize) -> Vec<Position> {
        let items = query.items().iter();
        let found: BTreeSet<_> = items.flat_map(|item| self.of_item(item, after).take(limit)).collect();
        found.into_iter().take(limit).collect()
    }

    /// I13: checks that no event crosses a boundary.
    pub(super) fn check(&self, boundary: &Boundary) -> Result<(), AppendError> {
        let first_unknown = |item| {
            let mut positions = self.of_item(item, boundary.mark());
            positions.find(|position| !boundary.knows(*position))
        };
        match boundary.query().items().iter().filter_map(first_unknown).min() {
            Some(position) => Err(AppendError::crossed(boundary, position)),
            None => Ok(()),
        }
    }

    /// Returns the positions after `after` of events that match an item, in the order of the log.
    fn of_item<'a>(&'a self, item: &'a QueryItem, after: Position) -> impl Iterator<Item = Position> + 'a {
        // `None` if no event has one of the tags.
        let by_tag: Option<Vec<_>> = item.tags().iter().map(|tag| self.events.get(tag)).collect();
        let fewest = by_tag.as_ref().and_then(|tags| tags.iter().min_by_key(|events| events.len()).copied());
        let candidates =
            fewest.into_iter().flat_map(move |events| events.range((Excluded(after), Unbounded)));
        let matches = move |position: &Position, name: &EventName| {
            item.names().is_none_or(|names| names.contains(name))
                && by_tag.iter().flatten().all(|events| events.contains_key(position))
        };
        candidates.filter(move |(position, name)| matches(position, name)).map(|(position, _)| *position)
    }
}
