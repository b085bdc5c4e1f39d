use std::fmt::Debug;

use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::roundtrip::{ReadBack, read_back};
use crate::aggregate::{Aggregate, Context, Decision};
use crate::codec::Codec;
use crate::event::{Event, Metadata, StreamId, Version};

/// Starts a test of an aggregate without a runtime, from its past events.
///
/// ```
/// use storied::testing::given;
/// # use serde::{Deserialize, Serialize};
/// # use storied::{Aggregate, Context, Decided, Event};
/// # #[derive(Default)] struct Door { open: bool }
/// # #[derive(Serialize, Deserialize)] enum DoorCommand { Open }
/// # #[derive(Debug, PartialEq, Serialize, Deserialize)] enum DoorEvent { Opened }
/// # #[derive(Debug, PartialEq, Serialize, Deserialize, thiserror::Error)]
/// # enum DoorError { #[error("it is open")] AlreadyOpen }
/// # impl Event for DoorEvent { const CATEGORY: &'static str = "door"; }
/// # impl Aggregate for Door {
/// #     type Event = DoorEvent; type Command = DoorCommand; type Reply = (); type Error = DoorError;
/// #     fn handle(&self, _: &DoorCommand, _: &Context<'_>) -> Decided<Self> {
/// #         if self.open { Err(DoorError::AlreadyOpen) } else { Ok(DoorEvent::Opened.into()) }
/// #     }
/// #     fn apply(&mut self, _: &DoorEvent) { self.open = true; }
/// # }
/// given::<Door>([]).when(DoorCommand::Open).then([DoorEvent::Opened]);
/// given::<Door>([DoorEvent::Opened]).when(DoorCommand::Open).then_error(DoorError::AlreadyOpen);
/// ```
///
/// Every past and every new event is encoded and decoded, so the test also shows that it can be
/// stored.
///
/// # Panics
/// If an event cannot be stored.
pub fn given<A: Aggregate>(events: impl IntoIterator<Item = A::Event>) -> Given<A> {
    let mut given = Given {
        state: A::default(),
        version: Version::NONE,
        id: "test".into(),
        command_id: Uuid::from_u128(1),
        now: DateTime::UNIX_EPOCH,
        metadata: Metadata::default(),
    };
    for event in events {
        given.version = given.version.next();
        given.state.apply(&stored(&event));
    }
    given
}

/// An aggregate with its past. See [`given`].
#[derive(Debug)]
pub struct Given<A> {
    state: A,
    version: Version,
    id: String,
    command_id: Uuid,
    now: DateTime<Utc>,
    metadata: Metadata,
}

impl<A: Aggregate> Given<A> {
    /// Sets the id of the aggregate. Default: `test`.
    #[must_use]
    pub fn id(mut self, id: impl Into<String>) -> Self {
        self.id = id.into();
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

    /// Returns the folded state, for tests of `apply` alone.
    pub fn state(&self) -> &A {
        &self.state
    }

    /// Runs the decision of the aggregate on a command.
    ///
    /// # Panics
    /// If the aggregate panics, or the id is invalid.
    #[must_use = "state the expectation with then(), then_nothing() or then_error()"]
    pub fn when(self, command: impl Into<A::Command>) -> When<A> {
        let stream = StreamId::new(A::Event::CATEGORY, &self.id).expect("a valid category and id");
        let context = Context::new(&stream, self.version, self.command_id, &self.metadata, self.now);
        let decision = self.state.handle(&command.into(), &context);
        When { state: self.state, decision }
    }
}

/// A decision to check. See [`given`].
#[derive(Debug)]
pub struct When<A: Aggregate> {
    state: A,
    decision: Result<Decision<A::Event, A::Reply>, A::Error>,
}

impl<A: Aggregate> When<A> {
    /// Expects these events, and returns the aggregate after them for a next step.
    ///
    /// # Panics
    /// If the decision differs.
    pub fn then(self, expected: impl IntoIterator<Item = A::Event>) -> Then<A>
    where
        A::Event: PartialEq + Debug,
    {
        let expected: Vec<_> = expected.into_iter().collect();
        let Self { mut state, decision } = self;
        let decision = decision.unwrap_or_else(|error| {
            panic!("expected {expected:?}, but the aggregate rejected the command: {error}")
        });
        assert_eq!(decision.events, expected, "the decision differs from the expected one");
        for event in &decision.events {
            let stored = stored(event);
            assert_eq!(&stored, event, "the store returns another event than was written");
            state.apply(&stored);
        }
        Then { state, reply: decision.reply }
    }

    /// Expects a successful decision without events.
    ///
    /// # Panics
    /// If the decision differs.
    pub fn then_nothing(self) -> Then<A>
    where
        A::Event: PartialEq + Debug,
    {
        self.then([])
    }

    /// Expects this rejection.
    ///
    /// # Panics
    /// If the decision differs.
    pub fn then_error(self, expected: A::Error)
    where
        A::Event: Debug,
        A::Error: PartialEq,
    {
        match self.decision {
            Ok(decision) => {
                panic!(
                    "expected the rejection \"{expected}\", but the aggregate decided {:?}",
                    decision.events
                )
            }
            Err(error) => assert_eq!(error, expected, "the rejection differs from the expected one"),
        }
    }
}

/// An aggregate after the expected decision. See [`given`].
#[derive(Debug)]
pub struct Then<A: Aggregate> {
    /// The state after the events of the decision.
    pub state: A,
    /// The reply to the command.
    pub reply: A::Reply,
}

/// Returns the event as a store returns it.
pub(super) fn stored<E: Event>(event: &E) -> E {
    match read_back(event, Codec::Cbor) {
        ReadBack::Event(read) => read,
        ReadBack::Refused(reason) | ReadBack::Unreadable(reason) => {
            panic!("the event cannot be stored: {reason}")
        }
    }
}
