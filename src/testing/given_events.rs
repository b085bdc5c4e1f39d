use std::fmt::Debug;

use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::given::stored;
use crate::aggregate::{Context, Decision};
use crate::codec::Codec;
use crate::decide::{Decide, QueriedView};
use crate::event::{Event, Metadata, NewEvent, RecordedEvent, StreamId, Tags, Version};

/// Starts a test of a decision over several streams without a runtime, from past events.
///
/// ```
/// use storied::testing::given_events;
/// # use serde::{Deserialize, Serialize};
/// # use storied::event::Tags;
/// # use storied::store::Query;
/// # use storied::{Context, Decide, DecisionOf, Event, View};
/// # #[derive(Debug, PartialEq, Serialize, Deserialize)]
/// # enum UserEvent { Registered { email: String } }
/// # #[derive(Debug, PartialEq, thiserror::Error)] #[error("the address is in use")] struct InUse;
/// # impl Event for UserEvent {
/// #     const CATEGORY: &'static str = "user";
/// #     fn tags(&self) -> Tags {
/// #         let UserEvent::Registered { email } = self;
/// #         Tags::new().tag("email", email)
/// #     }
/// # }
/// # #[derive(Serialize)] struct Register { email: String }
/// # struct Address { email: String, taken: bool }
/// # impl View for Address {
/// #     type Event = UserEvent;
/// #     fn query(&self) -> Query { Query::tagged("email", &self.email) }
/// #     fn apply(&mut self, _: &UserEvent) { self.taken = true; }
/// # }
/// # impl Decide for Register {
/// #     const NAME: &'static str = "register";
/// #     type View = Address; type Event = UserEvent; type Reply = (); type Error = InUse;
/// #     fn view(&self) -> Address { Address { email: self.email.clone(), taken: false } }
/// #     fn stream(&self) -> String { self.email.clone() }
/// #     fn decide(&self, address: &Address, _: &Context<'_>) -> DecisionOf<Self> {
/// #         if address.taken { return Err(InUse) }
/// #         Ok(UserEvent::Registered { email: self.email.clone() }.into())
/// #     }
/// # }
/// let registered = |email: &str| UserEvent::Registered { email: email.into() };
/// let register = |email: &str| Register { email: email.into() };
///
/// given_events([registered("bob@x.org")])
///     .when(register("ada@x.org"))
///     .then([registered("ada@x.org")])
///     .past
///     .when(register("ada@x.org"))
///     .then_error(InUse);
/// ```
///
/// The decision folds the events that match its queries by their tags. Every past event is encoded.
/// A view decodes the matching events of its type. [`then`](WhenDecided::then) encodes and decodes
/// each new event, and compares the result, so the test also shows that it can be stored.
///
/// # Panics
/// If an event cannot be stored.
pub fn given_events<E: Event>(events: impl IntoIterator<Item = E>) -> GivenEvents {
    let past = GivenEvents {
        events: Vec::new(),
        command_id: Uuid::from_u128(1),
        now: DateTime::UNIX_EPOCH,
        metadata: Metadata::default(),
    };
    past.and(events)
}

/// Past events of any streams. See [`given_events`].
#[derive(Debug, Clone)]
pub struct GivenEvents {
    events: Vec<(RecordedEvent, Tags)>,
    command_id: Uuid,
    now: DateTime<Utc>,
    metadata: Metadata,
}

impl GivenEvents {
    /// Adds later events, perhaps of another type.
    ///
    /// # Panics
    /// If an event cannot be stored.
    #[must_use]
    pub fn and<E: Event>(mut self, events: impl IntoIterator<Item = E>) -> Self {
        let stream = StreamId::new(E::CATEGORY, "test").expect("a valid category");
        for event in events {
            let new = NewEvent::encode(&event, Codec::Cbor, &Metadata::default());
            let new = new.unwrap_or_else(|error| panic!("the event cannot be stored: {error}"));
            self.events.push((new.to_recorded(stream.clone(), Codec::Cbor), new.tags));
        }
        self
    }

    /// Sets the time of [`Context::now`]. Default: the start of 1970.
    #[must_use]
    pub fn now(mut self, now: DateTime<Utc>) -> Self {
        self.now = now;
        self
    }

    /// Sets the value of `key` in [`Context::metadata`].
    #[must_use]
    pub fn metadata(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.metadata.user.insert(key.into(), value.into());
        self
    }

    /// Runs a decision on the events that match its queries.
    ///
    /// # Panics
    /// If the code of the decision panics, the id of its stream or a query is invalid, or an event
    /// cannot be read.
    #[must_use = "state the expectation with then(), then_nothing() or then_error()"]
    pub fn when<D: Decide>(self, decision: D) -> WhenDecided<D> {
        let stream = StreamId::new(D::Event::CATEGORY, decision.stream()).expect("a valid category and id");
        let mut view = QueriedView::new(decision.view());
        view.query().unwrap_or_else(|error| panic!("the queries of the decision are invalid: {error}"));
        let matching: Vec<_> =
            self.events.iter().filter(|(event, tags)| view.matches(&event.name, tags)).collect();
        let folded = view.fold(matching.into_iter().map(|(event, _)| event));
        folded.unwrap_or_else(|error| panic!("the decision cannot read an event: {error}"));
        let context = Context::new(&stream, Version::NONE, self.command_id, &self.metadata, self.now);
        let outcome = decision.decide(view.view(), &context);
        WhenDecided { past: self, outcome }
    }
}

/// A decision to check. See [`given_events`].
#[derive(Debug)]
pub struct WhenDecided<D: Decide> {
    past: GivenEvents,
    outcome: Result<Decision<D::Event, D::Reply>, D::Error>,
}

impl<D: Decide> WhenDecided<D> {
    /// Expects these events, and returns the reply with all events for a next step.
    ///
    /// # Panics
    /// If the decision differs.
    pub fn then(self, expected: impl IntoIterator<Item = D::Event>) -> ThenDecided<D::Reply>
    where
        D::Event: PartialEq + Debug,
    {
        let expected: Vec<_> = expected.into_iter().collect();
        let Self { past, outcome } = self;
        let decision = outcome.unwrap_or_else(|error| {
            panic!("expected {expected:?}, but the decision rejected the command: {error}")
        });
        assert_eq!(decision.events, expected, "the decision differs from the expected one");
        for event in &decision.events {
            assert_eq!(&stored(event), event, "the store returns another event than was written");
        }
        ThenDecided { past: past.and(decision.events), reply: decision.reply }
    }

    /// Expects a successful decision without events.
    ///
    /// # Panics
    /// If the decision differs.
    pub fn then_nothing(self) -> ThenDecided<D::Reply>
    where
        D::Event: PartialEq + Debug,
    {
        self.then([])
    }

    /// Expects this rejection.
    ///
    /// # Panics
    /// If the decision differs.
    pub fn then_error(self, expected: D::Error)
    where
        D::Event: Debug,
        D::Error: PartialEq,
    {
        match self.outcome {
            Ok(decision) => {
                panic!("expected the rejection \"{expected}\", but the decision has {:?}", decision.events)
            }
            Err(error) => assert_eq!(error, expected, "the rejection differs from the expected one"),
        }
    }
}

/// The expected decision and what led to it. See [`given_events`].
#[derive(Debug)]
pub struct ThenDecided<R> {
    /// The past events with those of the decision.
    pub past: GivenEvents,
    /// The reply to the command.
    pub reply: R,
}
