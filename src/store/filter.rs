use std::collections::BTreeSet;

use crate::event::{
    Category, EncodeError, Event, EventName, EventTypes, InvalidName, RecordedEvent, StreamId,
};

/// Which events a reader wants. Kinds of conditions are and-ed, values within one are or-ed; a condition that lists
/// nothing matches nothing (an empty list is never read as "everything").
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Filter {
    names: Option<BTreeSet<EventName>>,
    categories: Option<BTreeSet<Category>>,
    streams: Option<BTreeSet<StreamId>>,
}

impl Filter {
    /// Every event.
    #[must_use]
    pub fn all() -> Self {
        Self::default()
    }

    /// All events of the category of `E`.
    ///
    /// # Errors
    /// When `E` is no event enum or its category is no valid name.
    pub fn of<E: Event>() -> Result<Self, EncodeError> {
        Ok(Self::all().categories([EventTypes::of::<E>()?.category().clone()]))
    }

    /// The events of these variants of `E`, under every name that they are or were stored with: aliases and upcast old
    /// names are included.
    ///
    /// # Errors
    /// When `E` is no event enum, or has no such variant.
    pub fn variants<E: Event>(variants: &[&str]) -> Result<Self, EncodeError> {
        let types = EventTypes::of::<E>()?;
        let mut names = BTreeSet::new();
        for variant in variants {
            names.extend(types.stored_names(variant).cloned().ok_or_else(|| EncodeError::NoEnum {
                type_name: std::any::type_name::<E>(),
                reason: format!("it has no variant {variant:?}"),
            })?);
        }
        Ok(Self::all().names(names))
    }

    /// Only events with one of these stored names. Names are taken literally; see [`variants`](Self::variants).
    #[must_use]
    pub fn names(mut self, names: impl IntoIterator<Item = EventName>) -> Self {
        self.names = Some(names.into_iter().collect());
        self
    }

    /// Only events of these categories.
    #[must_use]
    pub fn categories(mut self, categories: impl IntoIterator<Item = Category>) -> Self {
        self.categories = Some(categories.into_iter().collect());
        self
    }

    /// Only events of this category, given as text.
    ///
    /// # Errors
    /// When it is no valid name.
    pub fn category(self, category: &str) -> Result<Self, InvalidName> {
        Ok(self.categories([Category::new(category)?]))
    }

    /// Only events of these streams.
    #[must_use]
    pub fn streams(mut self, streams: impl IntoIterator<Item = StreamId>) -> Self {
        self.streams = Some(streams.into_iter().collect());
        self
    }

    /// The names asked for; `None` is all.
    pub fn wanted_names(&self) -> Option<&BTreeSet<EventName>> {
        self.names.as_ref()
    }

    /// The categories asked for; `None` is all.
    pub fn wanted_categories(&self) -> Option<&BTreeSet<Category>> {
        self.categories.as_ref()
    }

    /// The streams asked for; `None` is all.
    pub fn wanted_streams(&self) -> Option<&BTreeSet<StreamId>> {
        self.streams.as_ref()
    }

    /// Whether an event passes. Back ends that filter elsewhere must agree with this.
    pub fn matches(&self, event: &RecordedEvent) -> bool {
        self.names.as_ref().is_none_or(|names| names.contains(&event.name))
            && self.categories.as_ref().is_none_or(|categories| categories.contains(event.stream.category()))
            && self.streams.as_ref().is_none_or(|streams| streams.contains(&event.stream))
    }
}
