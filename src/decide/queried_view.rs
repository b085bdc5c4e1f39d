//! A view with the queries of its parts.

use super::view::Views;
use crate::event::{DecodeError, EventName, RecordedEvent, Tags};
use crate::store::{Query, QueryError};

/// A view of a decision, with the queries of its parts.
pub(crate) struct QueriedView<V> {
    view: V,
    /// Queries of the parts, in their order. Constant, whatever the parts fold.
    queries: Vec<Query>,
}

impl<V: Views> QueriedView<V> {
    pub(crate) fn new(view: V) -> Self {
        let mut queries = Vec::new();
        view.queries(&mut queries);
        Self { view, queries }
    }

    /// Returns the query of all events that the parts fold.
    ///
    /// # Errors
    /// If the query of a part is invalid, or all queries together have too many items or tags.
    pub(crate) fn query(&self) -> Result<Query, QueryError> {
        self.queries.iter().try_for_each(Query::check)?;
        let query = Query::any(self.queries.iter().cloned());
        query.check()?;
        Ok(query)
    }

    /// Returns whether an event with this name and these tags concerns a part.
    pub(crate) fn matches(&self, name: &EventName, tags: &Tags) -> bool {
        self.queries.iter().any(|query| query.matches(name, tags))
    }

    /// Folds events that match the query.
    pub(crate) fn fold<'e>(
        &mut self,
        events: impl IntoIterator<Item = &'e RecordedEvent>,
    ) -> Result<(), DecodeError> {
        events.into_iter().try_for_each(|event| self.view.fold(event, &self.queries, &mut 0))
    }

    pub(crate) fn view(&self) -> &V {
        &self.view
    }
}
