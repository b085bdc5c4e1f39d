use std::collections::BTreeSet;
use std::fmt;

use uuid::Uuid;

use super::StoreError;
use super::filter::{Filter, FilterError};
use crate::event::{EventName, EventSet, InvalidTag, Tag, Tags};

/// The events that a decision depends on, by their tags.
///
/// A query is a list of items; an event matches if it matches one of them. An event matches an item
/// if it has one of the item's names and all of its tags. This is the query of the specification of
/// dynamic consistency boundaries (<https://dcb.events/specification/>).
///
/// Each item has at least one tag: a condition on a name alone would make all writers of such events
/// wait for each other.
///
/// An invalid query keeps its error; reads and appends refuse it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Query {
    items: Vec<QueryItem>,
    /// The first error, boxed because queries are cloned often and errors are rare.
    error: Option<Box<QueryError>>,
}

/// An item of a [`Query`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QueryItem {
    names: Option<BTreeSet<EventName>>,
    tags: BTreeSet<Tag>,
}

/// A reason why a [`Query`] is invalid.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum QueryError {
    /// A variant or an event type is invalid.
    #[error(transparent)]
    Events(#[from] FilterError),
    /// A tag is invalid.
    #[error(transparent)]
    Tag(#[from] InvalidTag),
    /// The query has no item, or an item has no tag.
    #[error("the query has no item, or an item has no tag; add a tag that the events have")]
    NoTag,
    /// The query has too many items or tags.
    #[error("too many {what} in a query: {count} (limit {limit}); use fewer views, or combine tags")]
    TooMany {
        /// `items` or `tags`.
        what: &'static str,
        /// Number of them.
        count: usize,
        /// Limit.
        limit: usize,
    },
}

impl From<QueryError> for StoreError {
    fn from(error: QueryError) -> Self {
        Self::Invalid { reason: format!("invalid query: {error}") }
    }
}

impl Query {
    /// Maximum number of items.
    pub const MAX_ITEMS: usize = 16;

    /// Maximum number of tags of all items.
    pub const MAX_TAGS: usize = 64;

    /// Maximum number of events that a read returns.
    ///
    /// [`QueryStore::read`](super::QueryStore::read) refuses a query that more events match.
    pub const MAX_EVENTS: usize = 100_000;

    /// Matches all events with a tag.
    #[must_use]
    pub fn tagged(key: &str, value: impl fmt::Display) -> Self {
        Self::item(Ok(None)).tag(key, value)
    }

    /// Matches events of these variants. Add at least one [tag](Self::tag).
    ///
    /// A variant is named as in [`Filter::variants`].
    #[must_use]
    pub fn variants<S: EventSet>(variants: impl IntoIterator<Item = impl AsRef<str>>) -> Self {
        let filter = Filter::variants::<S>(variants);
        Self::item(filter.check().map(|()| filter.names().cloned()))
    }

    /// Matches what one of these queries matches.
    #[must_use]
    pub fn any(queries: impl IntoIterator<Item = Self>) -> Self {
        let mut all = Self { items: Vec::new(), error: None };
        for query in queries {
            all.items.extend(query.items);
            all.error = all.error.or(query.error);
        }
        all
    }

    /// Restricts each item to events that also have this tag.
    ///
    /// PostgreSQL and SQLite find the events by the first tag of an item, in the order of the
    /// texts, and compare the others. A conditional append on PostgreSQL also locks that tag
    /// exclusively. Combine values that are always queried together into one tag:
    /// `room_night:101/2026-12-24`.
    #[must_use]
    pub fn tag(mut self, key: &str, value: impl fmt::Display) -> Self {
        match Tag::new(key, value) {
            Ok(tag) => self.items.iter_mut().for_each(|item| _ = item.tags.insert(tag.clone())),
            Err(error) => _ = self.error.get_or_insert_with(|| Box::new(error.into())),
        }
        self
    }

    /// Matches also the event with the tag of a command, see [`Tags::of_command`].
    ///
    /// The limits do not count the item.
    #[must_use]
    pub(crate) fn or_of_command(mut self, id: Uuid) -> Self {
        self.items.push(QueryItem { names: None, tags: BTreeSet::from([Tag::of_command(id)]) });
        self
    }

    /// Matches the event with the tag of a command.
    pub(crate) fn of_command(id: Uuid) -> Self {
        Self { items: Vec::new(), error: None }.or_of_command(id)
    }

    /// Checks that the query is valid.
    ///
    /// # Errors
    /// The first error of a constructor; `NoTag` and `TooMany`.
    pub fn check(&self) -> Result<(), QueryError> {
        if let Some(error) = &self.error {
            return Err((**error).clone());
        }
        if self.items.is_empty() || self.items.iter().any(|item| item.tags.is_empty()) {
            return Err(QueryError::NoTag);
        }
        // An item that storied has added does not count.
        let items = self.items.iter().filter(|item| !item.tags.iter().any(Tag::is_reserved));
        let (items, tags) = items.fold((0, 0), |(items, tags), item| (items + 1, tags + item.tags.len()));
        for (what, count, limit) in [("items", items, Self::MAX_ITEMS), ("tags", tags, Self::MAX_TAGS)] {
            if count > limit {
                return Err(QueryError::TooMany { what, count, limit });
            }
        }
        Ok(())
    }

    /// Returns the items.
    pub fn items(&self) -> &[QueryItem] {
        &self.items
    }

    /// Returns whether an event with this name and these tags matches. An invalid query matches
    /// nothing.
    pub fn matches(&self, name: &EventName, tags: &Tags) -> bool {
        self.error.is_none() && self.items.iter().any(|item| item.matches(name, tags))
    }

    fn item(names: Result<Option<BTreeSet<EventName>>, FilterError>) -> Self {
        let (names, error) = match names {
            Ok(names) => (names, None),
            Err(error) => (None, Some(Box::new(error.into()))),
        };
        Self { items: vec![QueryItem { names, tags: BTreeSet::new() }], error }
    }
}

impl QueryItem {
    /// Returns the requested names; `None` means all.
    pub fn names(&self) -> Option<&BTreeSet<EventName>> {
        self.names.as_ref()
    }

    /// Returns the tags; an event has all of them.
    pub fn tags(&self) -> &BTreeSet<Tag> {
        &self.tags
    }

    /// Returns whether an event with this name and these tags matches.
    pub fn matches(&self, name: &EventName, tags: &Tags) -> bool {
        let has_name = self.names.as_ref().is_none_or(|names| names.contains(name));
        has_name && !self.tags.is_empty() && tags.contains_all(self.tags.iter())
    }
}
