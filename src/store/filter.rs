use std::any::type_name;
use std::collections::BTreeSet;

use super::StoreError;
use crate::event::{
    Category, EncodeError, EventDecoder, EventName, EventSet, InvalidName, RecordedEvent, StreamId,
};

/// The events that a reader receives.
///
/// Conditions of different kinds are combined with AND, the values of a condition with OR. A
/// condition with an empty list matches nothing; it never means "everything".
///
/// An invalid filter, for example one with an unknown variant, keeps its error and matches nothing.
/// Every reader [checks](Self::check) its filter: a runtime with such a projection does not start,
/// and a store refuses the read.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Filter {
    names: Option<BTreeSet<EventName>>,
    categories: Option<BTreeSet<Category>>,
    streams: Option<BTreeSet<StreamId>>,
    /// The first error, boxed because filters are cloned often and errors are rare.
    error: Option<Box<FilterError>>,
}

/// A reason why a [`Filter`] is invalid.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FilterError {
    /// An event type of the filter is invalid.
    #[error(transparent)]
    Events(#[from] EncodeError),
    /// The event types of the filter have no such variant.
    #[error("{type_name} has no variant {variant:?}; {}", of_known(known))]
    UnknownVariant {
        /// The Rust type of the events.
        type_name: &'static str,
        /// The requested variant.
        variant: String,
        /// The variants that exist, with aliases and upcast names.
        known: Vec<String>,
    },
    /// A category is not a valid name.
    #[error(transparent)]
    Name(#[from] InvalidName),
    /// The filter of a projection has an event that the projection does not decode.
    #[error(
        "{condition} does not belong to {type_name}; add its event type to the set, or remove it from the filter"
    )]
    OutsideSet {
        /// The Rust type of the projection's events.
        type_name: &'static str,
        /// The name, category or stream.
        condition: String,
    },
}

fn of_known(known: &[String]) -> String {
    match known {
        [] => "it has none".into(),
        known => format!("it has {}", known.join(", ")),
    }
}

impl From<FilterError> for StoreError {
    fn from(error: FilterError) -> Self {
        Self::Invalid { reason: format!("invalid filter: {error}") }
    }
}

impl Filter {
    /// Matches every event.
    #[must_use]
    pub fn all() -> Self {
        Self::default()
    }

    /// Matches all events of an event type or of a set of event types.
    ///
    /// [Invalid](Self::check) if `S` is not an event enum or its category is not a valid name.
    #[must_use]
    pub fn of<S: EventSet>() -> Self {
        match EventDecoder::<S>::of_set().categories() {
            Ok(None) => Self::all(),
            Ok(Some(categories)) => Self::all().with_categories(categories),
            Err(error) => Self::all().invalid(error),
        }
    }

    /// Matches the events of these variants under every stored name, with aliases and upcast names.
    ///
    /// A variant is `placed`, or with its category `order.placed`. If several types of a set have
    /// the variant, the first form means all of them.
    ///
    /// [Invalid](Self::check) if `S` is not an event enum or has no such variant.
    #[must_use]
    pub fn variants<S: EventSet>(variants: impl IntoIterator<Item = impl AsRef<str>>) -> Self {
        let decoder = EventDecoder::<S>::of_set();
        let mut filter = match decoder.categories() {
            Ok(_) => Self::all(),
            Err(error) => Self::all().invalid(error),
        };
        let mut names = BTreeSet::new();
        for variant in variants {
            let variant = variant.as_ref();
            let stored = decoder.stored_names(variant);
            if stored.is_empty() {
                filter = filter.invalid(FilterError::UnknownVariant {
                    type_name: type_name::<S>(),
                    variant: variant.chars().take(80).collect(),
                    known: decoder.known_names(),
                });
            }
            names.extend(stored);
        }
        filter.with_names(names)
    }

    /// Restricts to these stored names, taken literally; see [`variants`](Self::variants).
    #[must_use]
    pub fn with_names(mut self, names: impl IntoIterator<Item = EventName>) -> Self {
        self.names = Some(names.into_iter().collect());
        self
    }

    /// Restricts to these categories.
    #[must_use]
    pub fn with_categories(mut self, categories: impl IntoIterator<Item = Category>) -> Self {
        self.categories = Some(categories.into_iter().collect());
        self
    }

    /// Restricts to this category, given as text.
    ///
    /// [Invalid](Self::check) if it is not a valid name.
    #[must_use]
    pub fn category(self, category: &str) -> Self {
        match Category::new(category) {
            Ok(category) => self.with_categories([category]),
            Err(error) => self.invalid(error),
        }
    }

    /// Restricts to these streams.
    #[must_use]
    pub fn with_streams(mut self, streams: impl IntoIterator<Item = StreamId>) -> Self {
        self.streams = Some(streams.into_iter().collect());
        self
    }

    /// Keeps the first error.
    fn invalid(mut self, error: impl Into<FilterError>) -> Self {
        self.error.get_or_insert_with(|| Box::new(error.into()));
        self
    }

    /// Restricts to the events of `S`. Invalid if a condition names other events.
    pub(crate) fn restricted_to<S: EventSet>(self) -> Self {
        let decoder = EventDecoder::<S>::of_set();
        let set = match decoder.categories() {
            Ok(None) => return self,
            Ok(Some(categories)) => categories,
            Err(error) => return self.invalid(error),
        };
        let contains = |category: &str| set.iter().any(|member| member.as_str() == category);
        let names = self.names.iter().flatten().filter(|name| !decoder.may_contain(name));
        let names = names.map(ToString::to_string);
        let categories = self.categories.iter().flatten();
        let categories = categories.filter(|it| !contains(it.as_str())).map(|it| format!("category {it}"));
        let streams = self.streams.iter().flatten();
        let streams = streams.filter(|it| !contains(it.category())).map(|it| format!("stream {it}"));
        let outside = names.chain(categories).chain(streams).next();
        match outside {
            Some(condition) => {
                self.invalid(FilterError::OutsideSet { type_name: type_name::<S>(), condition })
            }
            // Every other condition implies the categories; one more would cost each read a check.
            None if self.names.is_none() && self.categories.is_none() && self.streams.is_none() => {
                self.with_categories(set)
            }
            None => self,
        }
    }

    /// Checks that the filter is valid.
    ///
    /// Every implementation of [`EventStore::read_log`](super::EventStore::read_log) checks the
    /// filter first.
    ///
    /// # Errors
    /// The first error of a constructor.
    pub fn check(&self) -> Result<(), FilterError> {
        self.error.as_deref().map_or(Ok(()), |error| Err(error.clone()))
    }

    /// Returns the requested names; `None` means all.
    pub fn names(&self) -> Option<&BTreeSet<EventName>> {
        self.names.as_ref()
    }

    /// Returns the requested categories; `None` means all.
    pub fn categories(&self) -> Option<&BTreeSet<Category>> {
        self.categories.as_ref()
    }

    /// Returns the requested streams; `None` means all.
    pub fn streams(&self) -> Option<&BTreeSet<StreamId>> {
        self.streams.as_ref()
    }

    /// Returns whether `event` matches; an invalid filter matches nothing.
    ///
    /// Back ends that filter elsewhere must agree with this function.
    pub fn matches(&self, event: &RecordedEvent) -> bool {
        self.error.is_none()
            && self.names.as_ref().is_none_or(|names| names.contains(&event.name))
            && self.categories.as_ref().is_none_or(|categories| categories.contains(event.stream.category()))
            && self.streams.as_ref().is_none_or(|streams| streams.contains(&event.stream))
    }
}
