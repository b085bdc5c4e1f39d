use std::collections::BTreeSet;

use crate::event::{
    Category, EncodeError, Event, EventName, EventTypes, InvalidName, RecordedEvent, StreamId,
};

/// The events that a reader receives.
///
/// Conditions of different kinds are combined with AND, the values of a condition with OR. A
/// condition with an empty list matches nothing; it never means "everything".
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Filter {
    names: Option<BTreeSet<EventName>>,
    categories: Option<BTreeSet<Category>>,
    streams: Option<BTreeSet<StreamId>>,
}

impl Filter {
    /// Matches every event.
    #[must_use]
    pub fn all() -> Self {
        Self::default()
    }

    /// Matches all events of the category of `E`.
    ///
    /// # Errors
    /// If `E` is not an event enum or its category is not a valid name.
    pub fn of<E: Event>() -> Result<Self, EncodeError> {
        Ok(Self::all().with_categories([EventTypes::of::<E>()?.category().clone()]))
    }

    /// Matches the events of these variants of `E` under every stored name, with aliases and upcast
    /// names.
    ///
    /// # Errors
    /// If `E` is not an event enum or has no such variant.
    pub fn variants<E: Event>(variants: &[&str]) -> Result<Self, EncodeError> {
        let types = EventTypes::of::<E>()?;
        let mut names = BTreeSet::new();
        for variant in variants {
            names.extend(types.stored_names(variant).cloned().ok_or_else(|| EncodeError::NoEnum {
                type_name: std::any::type_name::<E>(),
                reason: format!("no variant {variant:?}"),
            })?);
        }
        Ok(Self::all().with_names(names))
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
    /// # Errors
    /// If it is not a valid name.
    pub fn category(self, category: &str) -> Result<Self, InvalidName> {
        Ok(self.with_categories([Category::new(category)?]))
    }

    /// Restricts to these streams.
    #[must_use]
    pub fn with_streams(mut self, streams: impl IntoIterator<Item = StreamId>) -> Self {
        self.streams = Some(streams.into_iter().collect());
        self
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

    /// Returns whether `event` matches.
    ///
    /// Back ends that filter elsewhere must agree with this function.
    pub fn matches(&self, event: &RecordedEvent) -> bool {
        self.names.as_ref().is_none_or(|names| names.contains(&event.name))
            && self.categories.as_ref().is_none_or(|categories| categories.contains(event.stream.category()))
            && self.streams.as_ref().is_none_or(|streams| streams.contains(&event.stream))
    }
}
