use std::fmt::Debug;

use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::roundtrip::{ReadBack, read_back};
use crate::aggregate::{Aggregate, Context, Decision};
use crate::codec::Codec;
use crate::event::{Event, Metadata, StreamId, Version};

/// Starts a test of an aggregate without a runtime: what has happened to it.
///
/// ```
/// use storied::testing::given;
/// # use serde::{Deserialize, Serialize};
/// # use storied::{Aggregate, Context, Decision, Event};
/// # #[derive(Default)] struct Door { open: bool }
/// # #[derive(Serialize, Deserialize)] enum DoorCommand { Open }
/// # #[derive(Debug, PartialEq, Serialize, Deserialize)] enum DoorEvent { Opened }
/// # #[derive(Debug, PartialEq, Serialize, Deserialize, thiserror::Error)]
/// # enum DoorError { #[error("it is open")] AlreadyOpen }
/// # impl Event for DoorEvent { const CATEGORY: &'static str = "door"; }
/// # impl Aggregate for Door {
/// #     type Event = DoorEvent; type Command = DoorCommand; type Reply = (); type Error = DoorError;
/// #     fn handle(&self, _: &DoorCommand, _: &Context<'_>) -> Result<Decision<DoorEvent>, DoorError> {
/// #         if self.open { Err(DoorError::AlreadyOpen) } else { Ok(Decision::event(DoorEvent::Opened)) }
/// #     }
/// #     fn apply(&mut self, _: &DoorEvent) { self.open = true; }
/// # }
/// given::<Door>([]).when(DoorCommand::Open).then([DoorEvent::Opened]);
/// given::<Door>([DoorEvent::Opened]).when(DoorCommand::Open).then_error(DoorError::AlreadyOpen);
/// ```
///
/// Every event, given or decided, goes through the codec and back, so that a test also shows that it can be stored.
///
/// # Panics
/// When an event cannot be stored: this is a test kit.
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
    /// The id of the aggregate; `test` by default.
    #[must_use]
    pub fn id(mut self, id: impl Into<String>) -> Self {
        self.id = id.into();
        self
    }

    /// What [`Context::now`] says; the start of 1970 by default.
    #[must_use]
    pub fn now(mut self, now: DateTime<Utc>) -> Self {
        self.now = now;
        self
    }

    /// What [`Context::metadata`] has for `key`.
    #[must_use]
    pub fn metadata(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.metadata.user.insert(key.into(), value.into());
        self
    }

    /// The folded state, for tests of `apply` alone.
    pub fn state(&self) -> &A {
        &self.state
    }

    /// Lets the aggregate decide on a command.
    ///
    /// # Panics
    /// When the aggregate does, or the id is none.
    #[must_use = "say what is expected with then(), then_nothing() or then_error()"]
    pub fn when(self, command: A::Command) -> When<A> {
        let stream = StreamId::new(A::Event::CATEGORY, &self.id).expect("a valid category and id");
        let context = Context::new(&stream, self.version, self.command_id, &self.metadata, self.now);
        let decision = self.state.handle(&command, &context);
        When { state: self.state, decision }
    }
}

/// A decision to be checked. See [`given`].
#[derive(Debug)]
pub struct When<A: Aggregate> {
    state: A,
    decision: Result<Decision<A::Event, A::Reply>, A::Error>,
}

impl<A: Aggregate> When<A> {
    /// Expects these events, and returns the aggregate after them for a next step.
    ///
    /// # Panics
    /// When the decision is another one.
    pub fn then(self, expected: impl IntoIterator<Item = A::Event>) -> Then<A>
    where
        A::Event: PartialEq + Debug,
    {
        let expected: Vec<_> = expected.into_iter().collect();
        let Self { mut state, decision } = self;
        let decision =
            decision.unwrap_or_else(|error| panic!("expected {expected:?}, but it was refused: {error}"));
        assert_eq!(decision.events, expected, "the aggregate decided otherwise than expected");
        for event in &decision.events {
            let stored = stored(event);
            assert_eq!(&stored, event, "the event comes out of the store differently from how it went in");
            state.apply(&stored);
        }
        Then { state, reply: decision.reply }
    }

    /// Expects that the command is fulfilled without events.
    ///
    /// # Panics
    /// When the decision is another one.
    pub fn then_nothing(self) -> Then<A>
    where
        A::Event: PartialEq + Debug,
    {
        self.then([])
    }

    /// Expects this refusal.
    ///
    /// # Panics
    /// When the decision is another one.
    pub fn then_error(self, expected: A::Error)
    where
        A::Event: Debug,
        A::Error: PartialEq,
    {
        match self.decision {
            Ok(decision) => {
                panic!("expected the refusal \"{expected}\", but it decided {:?}", decision.events)
            }
            Err(error) => assert_eq!(error, expected, "the aggregate refused for another reason"),
        }
    }
}

/// An aggregate after a decision that was as expected. See [`given`].
#[derive(Debug)]
pub struct Then<A: Aggregate> {
    /// The state after the decision's events.
    pub state: A,
    /// What the command was answered with.
    pub reply: A::Reply,
}

fn stored<E: Event>(event: &E) -> E {
    match read_back(event, Codec::Cbor) {
        ReadBack::Event(read) => read,
        ReadBack::Refused(reason) | ReadBack::Unreadable(reason) => {
            panic!("the event cannot be stored: {reason}")
        }
    }
}
