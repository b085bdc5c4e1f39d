//! Tests of a process without a runtime.

#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::unreachable,
    reason = "a test kit reports failures by panicking"
)]

use std::fmt::Debug;
use std::time::Duration;

use bytes::Bytes;
use chrono::{DateTime, Utc};
use serde::Serialize;
use serde::de::DeserializeOwned;
use uuid::Uuid;

use super::command::{CommandKind, InstanceCommand, Settlement};
use super::event::{Due, Effect, EncodedCommand, Ending, ProcessEvent, Trail, Trigger};
use super::instance::Instance;
use super::instance_event::InstanceEvent;
use super::{Process, ProcessOptions};
use crate::aggregate::{Aggregate, Context};
use crate::codec::{Codec, decode_variant, encode_variant, from_cbor, to_cbor};
use crate::command::{Handler, Kind};
use crate::event::{Event, Metadata, NewEvent, Position, RecordedEvent, StreamId, Version};

/// Starts a test of a process without a runtime: an instance that has consumed nothing.
///
/// ```
/// # use serde::{Deserialize, Serialize};
/// # use std::time::Duration;
/// # use storied::{Aggregate, Context, Decided, Event, NeverRejects};
/// # use storied::process::{Input, Next, Process, ProcessContext, Routes};
/// use storied::testing::given_process;
/// # #[derive(Debug, Serialize, Deserialize)] #[serde(rename_all = "snake_case")]
/// # enum OrderEvent { Placed }
/// # impl Event for OrderEvent { const CATEGORY: &'static str = "order"; }
/// # #[derive(Default)] struct Parcel;
/// # #[derive(Debug, Serialize, Deserialize)] enum ParcelEvent { Sent }
/// # impl Event for ParcelEvent { const CATEGORY: &'static str = "parcel"; }
/// # #[derive(Debug, PartialEq, Serialize, Deserialize)] struct Send;
/// # impl Aggregate for Parcel {
/// #     type Event = ParcelEvent; type Command = Send; type Reply = (); type Error = NeverRejects;
/// #     fn handle(&self, _: &Send, _: &Context<'_>) -> Decided<Self> { Ok(ParcelEvent::Sent.into()) }
/// #     fn apply(&mut self, _: &ParcelEvent) {}
/// # }
/// # #[derive(Default)] struct Shipping;
/// # impl Process for Shipping {
/// #     const NAME: &'static str = "shipping";
/// #     type Event = OrderEvent;
/// #     fn routes() -> Routes<OrderEvent> {
/// #         Routes::new().starts(["placed"], |_: &OrderEvent, recorded| recorded.stream.id().to_owned())
/// #     }
/// #     fn react(&self, input: Input<'_, OrderEvent>, context: &ProcessContext<'_>) -> Next {
/// #         match input {
/// #             Input::Event(_) => Next::new()
/// #                 .execute::<Parcel>("send", context.id(), Send)
/// #                 .after("late", Duration::from_secs(60)),
/// #             Input::Done { .. } => Next::new().complete(),
/// #             _ => Next::none(),
/// #         }
/// #     }
/// # }
/// given_process::<Shipping>("17")
///     .when_event("17", OrderEvent::Placed)
///     .then_executes::<Parcel>("send", "17", Send)
///     .then_starts_timer("late", Duration::from_secs(60))
///     .then_nothing()
///     .when_done("send", ())
///     .then_completes();
/// ```
///
/// Everything is encoded and decoded as a store does it.
pub fn given_process<P: Process>(id: impl Into<String>) -> ProcessTrial<P> {
    ProcessTrial {
        instance: Instance::default(),
        id: id.into(),
        version: Version::NONE,
        position: Position::START,
        now: DateTime::UNIX_EPOCH,
        reaction: Vec::new(),
    }
}

/// An instance of a process with its last reaction. See [`given_process`].
///
/// Each `when` is an input. Each `then` expects a part of the reaction to the last input, in any
/// order; [`then_nothing`](Self::then_nothing) expects that no part is left.
///
/// # Panics
/// All methods panic if the process does, or if an expectation fails.
#[derive(Debug)]
pub struct ProcessTrial<P: Process> {
    instance: Instance<P>,
    id: String,
    version: Version,
    position: Position,
    now: DateTime<Utc>,
    /// Parts of the last reaction that no expectation has named.
    reaction: Vec<ProcessEvent>,
}

impl<P: Process> ProcessTrial<P> {
    /// Sets the time of [`ProcessContext::now`](super::ProcessContext::now). Default: the start of
    /// 1970.
    pub fn now(mut self, now: DateTime<Utc>) -> Self {
        self.now = now;
        self
    }

    /// Returns the state of the process.
    pub fn state(&self) -> &P {
        self.instance.process()
    }

    /// Delivers an event of the aggregate `id`.
    ///
    /// # Panics
    /// Also if the routes do not deliver the event to this instance, or it is ignored.
    pub fn when_event<E: Event>(mut self, id: &str, event: E) -> Self {
        let new =
            NewEvent::encode(&event, Codec::Cbor, &Metadata::default()).expect("the event can be stored");
        self.position = Position::new(self.position.get() + 1);
        let recorded = RecordedEvent {
            id: new.id,
            stream: StreamId::new(E::CATEGORY, id).expect("a valid category and id"),
            version: Version::new(self.position.get()),
            position: self.position,
            name: new.name,
            codec: Codec::Cbor,
            payload: new.payload,
            command_id: new.command_id,
            metadata: Bytes::from_static(&[0xa0]),
            recorded_at: self.now,
        };
        let routed = P::routes().route(&recorded).expect("the event decodes");
        let route = routed.into_iter().find(|(instance, _)| *instance == self.id);
        let Some((_, route)) = route else {
            panic!("the routes do not deliver {} to instance {:?}", recorded.name, self.id)
        };
        let trail = Trail::of(Metadata::default(), recorded.command_id);
        let trigger = Box::new(Trigger::of(&recorded));
        let before = self.version;
        self.consume(CommandKind::Deliver { id: recorded.id, trigger, route, trail, late: false });
        assert!(
            self.version > before,
            "the instance ignores {}: it exists, or has ended, or does not exist",
            recorded.name
        );
        self
    }

    /// Delivers the reply to an open command.
    pub fn when_done(mut self, effect: &str, reply: impl Serialize) -> Self {
        let reply = to_cbor(&reply).expect("the reply can be encoded");
        let effect = self.open(effect);
        self.consume(CommandKind::Settle { effect, answer: Settlement::Done { reply } });
        self
    }

    /// Delivers the rejection of an open command.
    pub fn when_rejected(mut self, effect: &str, error: impl std::error::Error + Serialize) -> Self {
        let details = to_cbor(&error).expect("the error can be encoded");
        let effect = self.open(effect);
        let answer = Settlement::Rejected { message: error.to_string(), details };
        self.consume(CommandKind::Settle { effect, answer });
        self
    }

    /// Fires a timer.
    pub fn when_due(mut self, timer: &str) -> Self {
        let open = self.instance.record.timers.get(timer);
        let version = open.unwrap_or_else(|| panic!("there is no timer {timer:?}")).version;
        self.consume(CommandKind::Fire { timer: timer.to_owned(), version });
        self
    }

    /// Expects a command to an aggregate.
    pub fn then_executes<A: Aggregate>(mut self, effect: &str, id: &str, command: A::Command) -> Self
    where
        A::Command: PartialEq + Debug,
    {
        let found = self.take_effect(effect);
        let target = (Kind::Aggregate, <A::Event as Event>::CATEGORY, Some(id));
        check(&found.command, target, &command);
        self
    }

    /// Expects a command to a handler.
    pub fn then_executes_handler<H: Handler>(mut self, effect: &str, command: H::Command) -> Self
    where
        H::Command: PartialEq + Debug,
    {
        let found = self.take_effect(effect);
        let key = H::key(&command);
        check(&found.command, (Kind::Handler, H::NAME, key.as_deref()), &command);
        self
    }

    /// Expects the start of a timer with this wait.
    pub fn then_starts_timer(mut self, timer: &str, wait: Duration) -> Self {
        let is =
            |event: &ProcessEvent| matches!(event, ProcessEvent::TimerStarted { name, .. } if name == timer);
        let ProcessEvent::TimerStarted { due, .. } = self.take(&format!("the start of timer {timer:?}"), is)
        else {
            unreachable!("found by its variant")
        };
        let expected = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
        assert_eq!(due, Due::After(expected), "timer {timer:?} has another wait, in milliseconds");
        self
    }

    /// Expects the end of a timer.
    pub fn then_cancels_timer(mut self, timer: &str) -> Self {
        let is =
            |event: &ProcessEvent| matches!(event, ProcessEvent::TimerCancelled { name } if name == timer);
        self.take(&format!("the end of timer {timer:?}"), is);
        self
    }

    /// Expects that the instance completes.
    pub fn then_completes(self) -> Self {
        self.then_ends(Ending::Completed)
    }

    /// Expects that the instance begins to compensate. Its undo commands are effects with the key
    /// `undo KEY`.
    pub fn then_compensates(mut self) -> Self {
        self.take("compensation", |event| matches!(event, ProcessEvent::Compensating {}));
        self
    }

    /// Expects that the instance has ended after its undo commands.
    pub fn then_is_compensated(self) -> Self {
        self.then_ends(Ending::Compensated)
    }

    /// Expects that the instance is parked, for a reason with this text.
    pub fn then_is_parked(mut self, text: &str) -> Self {
        let parked = self.take("parking", |event| matches!(event, ProcessEvent::Parked { .. }));
        let ProcessEvent::Parked { reason, .. } = parked else { unreachable!("found by its variant") };
        assert!(reason.contains(text), "parked for another reason: {reason}");
        self
    }

    /// Expects that no part of the reaction is left.
    pub fn then_nothing(self) -> Self {
        assert!(self.reaction.is_empty(), "unexpected in the reaction: {:#?}", self.reaction);
        self
    }

    fn then_ends(mut self, as_expected: Ending) -> Self {
        let is =
            |event: &ProcessEvent| matches!(event, ProcessEvent::Ended { ending } if *ending == as_expected);
        self.take(&format!("the end ({as_expected:?})"), is);
        self
    }

    fn open(&self, effect: &str) -> Uuid {
        let open = self.instance.record.effects.iter().find(|open| open.key == effect);
        open.unwrap_or_else(|| panic!("there is no open command {effect:?}")).id
    }

    fn take_effect(&mut self, key: &str) -> Effect {
        let is = |event: &ProcessEvent| matches!(event, ProcessEvent::Effect(effect) if effect.key == key);
        match self.take(&format!("the command {key:?}"), is) {
            ProcessEvent::Effect(effect) => effect,
            _ => unreachable!("found by its variant"),
        }
    }

    fn take(&mut self, what: &str, is: impl Fn(&ProcessEvent) -> bool) -> ProcessEvent {
        match self.reaction.iter().position(is) {
            Some(at) => self.reaction.remove(at),
            None => panic!("expected {what}, but the reaction is {:#?}", self.reaction),
        }
    }

    /// Executes a command on the instance, and all that follows without a further input.
    fn consume(&mut self, kind: CommandKind) {
        self.reaction.clear();
        let mut more = self.decide(kind);
        while more {
            more = self.decide(CommandKind::Advance);
        }
    }

    fn decide(&mut self, kind: CommandKind) -> bool {
        let limits = ProcessOptions::new().limits;
        let command = InstanceCommand { kind, resend: false, limits };
        let stream = StreamId::new(P::NAME, &self.id).expect("a valid name and id");
        let metadata = Metadata::default();
        let context = Context::new(&stream, self.version, Uuid::from_u128(1), &metadata, self.now);
        let decision = self.instance.handle(&command, &context).expect("an instance rejects nothing");
        for event in decision.events {
            let stored: ProcessEvent = read_back(&event.0);
            self.version = self.version.next();
            self.instance.apply(&InstanceEvent::from(stored.clone()));
            let is_part = !matches!(stored, ProcessEvent::Input(_) | ProcessEvent::Reacted {});
            self.reaction.extend(is_part.then_some(stored));
        }
        decision.reply.more
    }
}

fn read_back(event: &ProcessEvent) -> ProcessEvent {
    let encoded = encode_variant(event, Codec::Cbor).expect("the event can be encoded");
    let (variant, payload) = encoded.expect("an enum");
    decode_variant(variant.as_ref(), &payload, Codec::Cbor).expect("the event decodes")
}

fn check<C: DeserializeOwned + PartialEq + Debug>(
    found: &EncodedCommand,
    expected: (Kind, &str, Option<&str>),
    command: &C,
) {
    let target = (found.kind, found.name.as_str(), found.target.as_deref());
    assert_eq!(target, expected, "the command has another target");
    let decoded: C = from_cbor(&found.payload).expect("the command decodes");
    assert_eq!(decoded, *command, "the command has another content");
}
