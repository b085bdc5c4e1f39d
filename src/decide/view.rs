//! Views: queries with the states that are folded from their events.

use crate::event::EventSet;
use crate::store::Query;

/// A state of a decision, folded from the events that match a query.
///
/// ```
/// # use serde::{Deserialize, Serialize};
/// # use storied::Event;
/// use storied::View;
/// use storied::store::Query;
///
/// # #[derive(Serialize, Deserialize)] #[serde(rename_all = "snake_case")]
/// # enum AccountEvent { Opened, Closed }
/// # impl Event for AccountEvent { const CATEGORY: &'static str = "account"; }
/// struct OpenAccounts { customer: String, count: u32 }
///
/// impl View for OpenAccounts {
///     type Event = AccountEvent;
///     fn query(&self) -> Query { Query::tagged("customer", &self.customer) }
///     fn apply(&mut self, event: &AccountEvent) {
///         match event {
///             AccountEvent::Opened => self.count += 1,
///             AccountEvent::Closed => self.count -= 1,
///         }
///     }
/// }
/// ```
pub trait View: Send + 'static {
    /// Events that the view folds: an event type, or an [`EventSet`] over several.
    ///
    /// Events of other types that match the query do not concern the view.
    type Event: EventSet;

    /// Returns the query of the events. It must not change with the events.
    fn query(&self) -> Query;

    /// Folds an event into the state. It cannot reject the event.
    ///
    /// storied also calls it with the new events that match the query, before the append.
    fn apply(&mut self, event: &Self::Event);
}

/// The basis of a decision: a [`View`], or a tuple of two to four of them.
///
/// A tuple can contain tuples. Each view of a tuple folds the events that match its own query. For
/// that, storied compares the query with the tags that [`Event::tags`](crate::Event::tags) returns
/// now. If the type has other tags than were stored, and no query of the decision matches them, the
/// decision fails ([`OtherTags`](crate::event::DecodeErrorKind::OtherTags)). A view over
/// [`AnyEvent`](crate::AnyEvent) folds every event that the decision reads.
pub trait Views: fold::Fold {}

impl<T: fold::Fold> Views for T {}

mod fold {
    use super::View;
    use crate::event::{DecodeError, DecodeErrorKind, EventDecoder, RecordedEvent};
    use crate::store::{Query, QueryItem};

    /// The fold of a view, or of all views of a tuple.
    pub trait Fold: Send + 'static {
        /// Adds the queries of the views, in their order.
        fn queries(&self, queries: &mut Vec<Query>);

        /// Folds an event into each view that it concerns.
        ///
        /// `queries` are those of all views of the decision. `index` is the query of the first
        /// view, and after the call that of the next one.
        fn fold(
            &mut self,
            event: &RecordedEvent,
            queries: &[Query],
            index: &mut usize,
        ) -> Result<(), DecodeError>;
    }

    impl<V: View> Fold for V {
        fn queries(&self, queries: &mut Vec<Query>) {
            queries.push(self.query());
        }

        fn fold(
            &mut self,
            event: &RecordedEvent,
            queries: &[Query],
            index: &mut usize,
        ) -> Result<(), DecodeError> {
            let own = queries.get(*index);
            *index += 1;
            let decoder = EventDecoder::<V::Event>::of_set();
            let has_name = |item: &QueryItem| item.names().is_none_or(|names| names.contains(&event.name));
            let may_match = |query: &Query| query.items().iter().any(has_name);
            if !own.is_some_and(may_match) || !decoder.contains(event) {
                return Ok(());
            }
            if queries.len() == 1 {
                // The store has compared the stored tags.
                self.apply(&decoder.decode(event)?);
                return Ok(());
            }
            let (decoded, tags) = decoder.decode_with_tags(event)?;
            let matches = |query: &Query| tags.as_ref().is_none_or(|tags| query.matches(&event.name, tags));
            if own.is_some_and(matches) {
                self.apply(&decoded);
                return Ok(());
            }
            // The event belongs to another view, by the tags of today.
            if queries.iter().any(matches) {
                return Ok(());
            }
            // I11: some query matches the stored tags, so some view misses the event.
            Err(DecodeError::new(event, DecodeErrorKind::OtherTags))
        }
    }

    macro_rules! tuple_of_views {
        ($($view:ident $part:tt),+) => {
            impl<$($view: Fold),+> Fold for ($($view,)+) {
                fn queries(&self, queries: &mut Vec<Query>) {
                    $(self.$part.queries(queries);)+
                }

                fn fold(
                    &mut self,
                    event: &RecordedEvent,
                    queries: &[Query],
                    index: &mut usize,
                ) -> Result<(), DecodeError> {
                    $(self.$part.fold(event, queries, index)?;)+
                    Ok(())
                }
            }
        };
    }

    tuple_of_views!(A 0, B 1);
    tuple_of_views!(A 0, B 1, C 2);
    tuple_of_views!(A 0, B 1, C 2, D 3);
}
