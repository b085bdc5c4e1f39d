//! Sets of event types: what a reader of the log receives, decoded.

use std::any::{Any, TypeId, type_name};
use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, LazyLock, PoisonError, RwLock};

use super::Event;
use super::error::{DecodeError, DecodeErrorKind, EncodeError};
use super::name::{Category, EventName};
use super::recorded::RecordedEvent;
use super::tags::Tags;
use super::types::EventTypes;

/// The events that a reader of the log receives, decoded.
///
/// Every [`Event`] is a set of its own. A reader of several event types has an enum, with one line
/// for each type. [`AnyEvent`] contains every event and decodes none.
///
/// ```
/// # use serde::{Deserialize, Serialize};
/// # use storied::Event;
/// use storied::event::{EventDecoder, EventSet};
///
/// # #[derive(Serialize, Deserialize)] enum OrderEvent { Placed }
/// # impl Event for OrderEvent { const CATEGORY: &'static str = "order"; }
/// # #[derive(Serialize, Deserialize)] enum PaymentEvent { Paid }
/// # impl Event for PaymentEvent { const CATEGORY: &'static str = "payment"; }
/// enum Input {
///     Order(OrderEvent),
///     Payment(PaymentEvent),
/// }
///
/// impl EventSet for Input {
///     fn decoder() -> EventDecoder<Self> {
///         EventDecoder::new().with(Input::Order).with(Input::Payment)
///     }
/// }
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a set of events",
    note = "implement `Event` for the events of one aggregate, or `EventSet` for an enum over several event types; `AnyEvent` contains every event and decodes none"
)]
pub trait EventSet: Sized + Send + 'static {
    /// Returns the decoder, which lists the event types of the set.
    ///
    /// Called at the first use of the set, perhaps by two threads; the result is cached.
    fn decoder() -> EventDecoder<Self>;
}

impl<E: Event> EventSet for E {
    fn decoder() -> EventDecoder<Self> {
        EventDecoder::new().with(|event: E| event)
    }
}

/// Every event, not decoded: for readers that use only the [recorded event](RecordedEvent).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AnyEvent;

impl EventSet for AnyEvent {
    fn decoder() -> EventDecoder<Self> {
        EventDecoder { any: Some(|| Self), ..EventDecoder::new() }
    }
}

/// The event types of an [`EventSet`], each with its conversion into the set.
pub struct EventDecoder<S> {
    members: Vec<Member<S>>,
    /// Set if every event belongs to the set; creates the value for it.
    any: Option<fn() -> S>,
    /// The first reason why the set is unusable.
    problem: Option<EncodeError>,
}

/// An event type of a set.
struct Member<S> {
    category: &'static str,
    types: Arc<EventTypes>,
    decode: Box<Decode<S>>,
}

/// Also sets the tags, if they are asked for.
type Decode<S> =
    dyn Fn(&EventTypes, &RecordedEvent, Option<&mut Tags>) -> Result<S, DecodeError> + Send + Sync;

/// Cache of the decoders, with one entry per set.
///
/// Never evicted, because types never change.
static DECODERS: LazyLock<RwLock<HashMap<TypeId, Arc<dyn Any + Send + Sync>>>> =
    LazyLock::new(RwLock::default);

impl<S> EventDecoder<S> {
    /// Returns a decoder without event types.
    #[must_use]
    pub fn new() -> Self {
        Self { members: Vec::new(), any: None, problem: None }
    }

    /// Adds an event type. `convert` wraps its events, usually as a variant of the set.
    ///
    /// If `E` is not an event enum, or its category belongs to an earlier type of the set, the set
    /// is invalid. A [`Filter`](crate::Filter) of the set reports it.
    #[must_use]
    pub fn with<E: Event>(mut self, convert: impl Fn(E) -> S + Send + Sync + 'static) -> Self {
        let types = match EventTypes::of::<E>() {
            Ok(_) if self.members.iter().any(|member| member.category == E::CATEGORY) => {
                let type_name = type_name::<S>();
                Err(EncodeError::SameCategory { type_name, category: E::CATEGORY })
            }
            types => types,
        };
        match types {
            Ok(types) => self.members.push(Member {
                category: E::CATEGORY,
                types,
                decode: Box::new(move |types, event, tags| {
                    let event: E = types.decode(event)?;
                    if let Some(tags) = tags {
                        *tags = event.tags();
                    }
                    Ok(convert(event))
                }),
            }),
            Err(problem) => _ = self.problem.get_or_insert(problem),
        }
        self
    }

    /// Decodes an event, after upcasting.
    pub(crate) fn decode(&self, event: &RecordedEvent) -> Result<S, DecodeError> {
        self.decode_with(event, None)
    }

    /// Decodes an event, and returns the tags that its type gives it now.
    ///
    /// Returns no tags if the set contains every event: then the type of the event is unknown.
    pub(crate) fn decode_with_tags(&self, event: &RecordedEvent) -> Result<(S, Option<Tags>), DecodeError> {
        let mut tags = Tags::new();
        let decoded = self.decode_with(event, Some(&mut tags))?;
        Ok((decoded, self.any.is_none().then_some(tags)))
    }

    fn decode_with(&self, event: &RecordedEvent, tags: Option<&mut Tags>) -> Result<S, DecodeError> {
        if let Some(any) = self.any {
            return Ok(any());
        }
        if let Some(problem) = &self.problem {
            return Err(DecodeError::payload(event, problem.to_string()));
        }
        let category = event.stream.category();
        let member = self.members.iter().find(|member| member.category == category);
        let member = member.ok_or_else(|| {
            let expected = self.members.iter().map(|member| member.category).collect();
            DecodeError::new(event, DecodeErrorKind::OtherCategory { expected })
        })?;
        (member.decode)(&member.types, event, tags)
    }

    /// Returns whether the event is of a type of the set.
    ///
    /// An unusable set contains every event, so that [`decode`](Self::decode) reports the reason.
    pub(crate) fn contains(&self, event: &RecordedEvent) -> bool {
        let category = event.stream.category();
        self.any.is_some()
            || self.problem.is_some()
            || self.members.iter().any(|member| member.category == category)
    }

    /// Returns the categories of the set; `None` if it contains every event.
    pub(crate) fn categories(&self) -> Result<Option<Vec<Category>>, EncodeError> {
        if let Some(problem) = &self.problem {
            return Err(problem.clone());
        }
        let categories = || self.members.iter().map(|member| member.types.category().clone()).collect();
        Ok(self.any.is_none().then(categories))
    }

    /// Returns all stored names of a variant, which is given with or without its category.
    pub(crate) fn stored_names(&self, variant: &str) -> Vec<EventName> {
        let in_category = |member: &Member<S>| {
            let variant = variant.strip_prefix(member.category)?.strip_prefix('.')?;
            member.types.stored_names(variant).cloned()
        };
        let names =
            |member: &Member<S>| member.types.stored_names(variant).cloned().or_else(|| in_category(member));
        self.members.iter().filter_map(names).flatten().collect()
    }

    /// Returns whether the name is one of the set's, or can be one of another program version.
    ///
    /// A name with more dots than its category is read as that of another category, unless a type of
    /// the set has it.
    pub(crate) fn may_contain(&self, name: &EventName) -> bool {
        self.members.iter().any(|member| {
            let rest = name.as_str().strip_prefix(member.category).and_then(|rest| rest.strip_prefix('.'));
            rest.is_some_and(|rest| {
                !rest.contains('.') || member.types.known_names().any(|known| known == rest)
            })
        })
    }

    /// Returns all names that the set reads, in alphabetical order.
    pub(crate) fn known_names(&self) -> Vec<String> {
        let mut names: Vec<_> =
            self.members.iter().flat_map(|member| member.types.known_names()).map(str::to_owned).collect();
        names.sort();
        names.dedup();
        names
    }
}

impl<S: EventSet> EventDecoder<S> {
    /// Returns the decoder of a set from the cache, or creates it.
    pub(crate) fn of_set() -> Arc<Self> {
        let id = TypeId::of::<S>();
        let cached = DECODERS.read().unwrap_or_else(PoisonError::into_inner).get(&id).cloned();
        if let Some(decoder) = cached.and_then(|decoder| decoder.downcast().ok()) {
            return decoder;
        }
        let decoder = Arc::new(S::decoder());
        DECODERS.write().unwrap_or_else(PoisonError::into_inner).insert(id, decoder.clone());
        decoder
    }
}

impl<S> Default for EventDecoder<S> {
    fn default() -> Self {
        Self::new()
    }
}

impl<S> fmt::Debug for EventDecoder<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let categories: Vec<_> = self.members.iter().map(|member| member.category).collect();
        f.debug_struct("EventDecoder")
            .field("categories", &categories)
            .field("any", &self.any.is_some())
            .field("problem", &self.problem)
            .finish()
    }
}
