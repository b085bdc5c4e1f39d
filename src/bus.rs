//! The port to the event bus: how what was committed reaches others, in log order.
//!
//! The store is the truth, a bus a hint. A bus may be late, lose something, or carry what another program published.
//! Everything travels as a [`LogBatch`], which says *between which positions it is complete*. Inside one process the
//! [`feed`](crate::feed) takes batches as they are, and reads holes from the store. From a bus that other processes publish to, it
//! takes only the positions, as a reason to read the store: no message reaches a read model.

mod local;
#[cfg(feature = "nats")]
mod nats;

use std::borrow::Cow;
use std::error::Error;
use std::sync::Arc;

use uuid::Uuid;

pub use self::local::LocalBus;
#[cfg(feature = "nats")]
pub(crate) use self::nats::line::{Line, OpenLine};
#[cfg(feature = "nats")]
pub use self::nats::{
    AckError, CloseError, ConsumerOptions, ConsumerPolicy, ConsumerReport, Delivery, Field, Gap, HandleError,
    HandleOptions, Handling, InvalidPattern, JetStreamOptions, MirrorFrom, MirrorItem, MirrorReader, NatsBus,
    NatsEvent, NatsOptions, NatsReport, Received, RetryPolicy, StartFrom, StreamFound, StreamPolicy,
    StreamReport, StreamStorage, Subjects, SubscribeOptions, Subscription, SubscriptionError,
    SubscriptionErrors, SubscriptionStats,
};
use crate::event::{Category, EventName, Position, RecordedEvent};
use crate::future::BoxFuture;
#[cfg(feature = "otel")]
use crate::telemetry::Telemetry;

/// A piece of the log: every event in `(after, upto]`, in log order. Cheap to clone.
#[derive(Debug, Clone)]
pub struct LogBatch {
    /// The position before the piece.
    pub after: Position,
    /// The last position of the piece.
    pub upto: Position,
    /// All events in between; positions may have holes, so their number says nothing.
    pub events: Arc<[RecordedEvent]>,
}

/// What a subscription yields.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum BusItem {
    /// The next piece, not necessarily adjacent to the one before.
    Batch(LogBatch),
    /// A heartbeat: the publisher has come to this position. Shows a lost tail when no event follows it.
    Head(Position),
    /// Something may have been lost since the last item (a reconnect, an overflow).
    Gap,
}

/// Whom a bus reaches, which decides who publishes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BusScope {
    /// This process only: every node publishes to its own.
    Process,
    /// All nodes: one of them publishes, under the lease `publisher`.
    Shared,
}

/// Where a bus that keeps what it was given ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MirrorEnd {
    /// The position of its last event.
    pub position: Position,
    /// The bus's own number of that event.
    pub sequence: u64,
}

/// Where publishing goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resume {
    /// Behind this position: the bus is a mirror of the log and ends here.
    After(MirrorEnd),
    /// At the frontier of the log: the bus keeps nothing, and followers read the past from the store.
    AtFrontier,
}

/// A message of a mirror, as it describes itself. Only the log can confirm it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Claim {
    /// The bus's own number of the message.
    pub sequence: u64,
    /// The event that it claims to be.
    pub event: ClaimedEvent,
}

/// The event that a message of a mirror claims to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClaimedEvent {
    /// An event of this log.
    Event {
        /// The position of the event before it.
        previous: Position,
        /// Its position.
        position: Position,
        /// Its id.
        id: Uuid,
    },
    /// None of this log.
    Foreign,
    /// Unknown: the bus no longer keeps the message.
    Missing,
}

/// How a bus is doing.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum BusState {
    /// It connects when it is first used.
    Idle,
    /// It works, as far as is known.
    Connected {
        /// With what.
        to: String,
        /// Last error that the server reported beside its answers on this connection, for example what this login may not
        /// do. `None` after a reconnect.
        last_error: Option<String>,
    },
    /// It does not work at the moment, and comes back by itself.
    Disconnected {
        /// What happened last.
        reason: String,
    },
    /// Its owner has shut it down.
    Closed,
}

/// What somebody follows durably: what the bus keeps for it until it is applied.
#[derive(Debug, Clone)]
pub struct Follow {
    /// Who follows; the bus remembers by this name how far that is.
    pub name: String,
    /// The log of the store with this id.
    pub store: Uuid,
    /// Only events with these names, if given.
    pub names: Option<Vec<EventName>>,
    /// Only events of these categories, if given.
    pub categories: Option<Vec<Category>>,
}

/// What a durable subscription yields.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum DurableItem {
    /// The log may have an event that was asked for at this position. Anything may have published that: only the store knows.
    Wake(Position),
    /// Something may be missing before the next item, and why. The first item is one.
    Gap(String),
}

/// An event bus.
pub trait EventBus: Send + Sync + 'static {
    /// `local`, `nats-core`, `nats-jetstream`, …
    fn name(&self) -> &'static str;

    /// Checks its options, without reaching anything: [`Builder::start`](crate::runtime::Builder::start) does it first.
    ///
    /// # Errors
    /// `Incompatible` when the bus could never work with them.
    fn check(&self) -> Result<(), BusError> {
        Ok(())
    }

    /// What events are published to, for those who watch: a stream, or what its subjects begin with. The
    /// [name](Self::name) by default.
    fn destination(&self) -> Cow<'static, str> {
        Cow::Borrowed(self.name())
    }

    /// Whom it reaches.
    fn scope(&self) -> BusScope;

    /// How it is doing.
    fn state(&self) -> BusState;

    /// Where its metrics go, unless it was told before. Does nothing by default.
    #[cfg(feature = "otel")]
    fn observe(&self, _telemetry: &Telemetry) {}

    /// Opens the writing side, for the log of the store with this id. One at a time publishes; a second one must be refused
    /// by the bus or be harmless (I7), and a mirror of another store's log must be refused.
    fn publisher(&self, store: Uuid) -> BoxFuture<'_, Result<Box<dyn BusPublisher>, BusError>>;

    /// Tells the publisher of the log, on whatever node it is, that there is something new. Nobody relies on it: it may be
    /// lost, and an error changes nothing. Does nothing by default.
    fn hint(&self, _store: Uuid) -> BoxFuture<'_, Result<(), BusError>> {
        Box::pin(std::future::ready(Ok(())))
    }

    /// Subscribes to the live continuation of the log of the store with this id, and of no other. What is published after
    /// this returns is delivered, or reported as [`BusItem::Gap`]. Nothing proves who published it: on a bus of
    /// [`BusScope::Shared`], believe the store, not the message.
    fn subscribe(&self, store: Uuid) -> BoxFuture<'_, Result<Box<dyn BusSubscription>, BusError>>;

    /// Whether it keeps events for those who [follow](Self::follow) it.
    fn is_durable(&self) -> bool {
        false
    }

    /// Follows the log as the bus keeps it, with what is asked for picked out by the bus. Reaches the bus in the background,
    /// for as long as it takes; must be called within a tokio runtime.
    ///
    /// # Errors
    /// `Incompatible` when this bus keeps nothing, which is what it does unless it says otherwise.
    fn follow(&self, follow: Follow) -> Result<Box<dyn DurableSubscription>, BusError> {
        let _ = follow;
        Err(BusError::Incompatible {
            reason: format!("{} keeps no events for those who follow it", self.name()),
        })
    }
}

/// The reading side of a bus that keeps what was not applied yet.
pub trait DurableSubscription: Send {
    /// The next item; `Closed` is the end. Cancel-safe: a dropped call loses nothing.
    fn next(&mut self) -> BoxFuture<'_, Result<DurableItem, BusError>>;

    /// Everything up to here is applied for good, and need not be kept any longer. What is not is kept for as long as this
    /// lives, and given to the next one who follows under that name.
    fn applied(&mut self, upto: Position);

    /// The log ended at `head` when it was read, after everything that [`next`](Self::next) has returned. A message of those that
    /// claims a later position is of no event, and is not kept.
    fn ended(&mut self, head: Position);
}

/// The writing side of a bus.
pub trait BusPublisher: Send {
    /// Waits until there may be somebody to publish for; nothing is read from the store before. At once by default. A bus
    /// that makes the publisher wait here must give late subscribers a [`BusItem::Gap`] or nothing: they read the past from
    /// the store. Cancel-safe.
    fn wanted(&mut self) -> BoxFuture<'_, ()> {
        Box::pin(std::future::ready(()))
    }

    /// Where to go on. `known` is what the publisher remembers in the store of its last confirmed publish, for a mirror
    /// that was emptied since.
    fn resume(&mut self, known: MirrorEnd) -> BoxFuture<'_, Result<Resume, BusError>>;

    /// After [`resume`](Self::resume): the next messages that the log has to confirm; none at the end, and none by default.
    ///
    /// If the mirror still has the number of `known`, they begin with that message. Otherwise they are its last messages.
    fn claims(&mut self) -> BoxFuture<'_, Result<Vec<Claim>, BusError>> {
        Box::pin(std::future::ready(Ok(Vec::new())))
    }

    /// After [`claims`](Self::claims): the last position that the log confirmed. `is_exact` unless a missing message may have
    /// been a later event. Does nothing by default.
    fn confirm(&mut self, _position: Position, _is_exact: bool) {}

    /// The end of the mirror that the bus has confirmed, also after an error of [`publish`](Self::publish). `None` by default:
    /// only an answer of `publish` says.
    fn confirmed(&self) -> Option<MirrorEnd> {
        None
    }

    /// Publishes the next piece; answers when the bus has confirmed all of it, with where the mirror ends now.
    fn publish(&mut self, batch: LogBatch) -> BoxFuture<'_, Result<MirrorEnd, BusError>>;

    /// Waits until [`EventBus::hint`] was called, on whatever node. Cancel-safe. By default that is never heard of.
    fn hinted(&mut self) -> BoxFuture<'_, ()> {
        Box::pin(std::future::pending())
    }

    /// Tells followers how far the log goes, when nothing was published for a while.
    fn heartbeat(&mut self, head: Position) -> BoxFuture<'_, Result<(), BusError>>;
}

/// The reading side of a bus. Its buffer is bounded; a reader that is too slow gets [`BusItem::Gap`].
pub trait BusSubscription: Send {
    /// The next item. Cancel-safe: a dropped call loses nothing.
    fn next(&mut self) -> BoxFuture<'_, Result<BusItem, BusError>>;
}

/// A failure of the bus. Events are safe in the store whatever happens here.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum BusError {
    /// Not connected, or no answer in time; going on later may help.
    #[error("the event bus is unavailable: {reason}")]
    Unavailable {
        /// What was tried and what happened.
        reason: String,
        /// The driver's error.
        #[source]
        source: Option<Arc<dyn Error + Send + Sync>>,
    },
    /// Another publisher is at work: the mirror does not end where this one left it.
    #[error("somebody else publishes to the bus: {reason}")]
    Fenced {
        /// What was expected and what was found.
        reason: String,
    },
    /// The bus is not configured as this program needs it; a person has to act.
    #[error("the event bus does not fit this program: {reason}")]
    Incompatible {
        /// What differs and what to do.
        reason: String,
    },
    /// The bus was shut down by its owner.
    #[error("the event bus is closed")]
    Closed,
}

impl BusError {
    /// What kind of failure it is, in one word.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::Unavailable { .. } => "unavailable",
            Self::Fenced { .. } => "fenced",
            Self::Incompatible { .. } => "incompatible",
            Self::Closed => "closed",
        }
    }
}

/// What [`Builder::bus`](crate::runtime::Builder::bus) takes: a bus, or one that is shared already.
pub trait IntoEventBus {
    /// The bus, shared.
    fn into_event_bus(self) -> Arc<dyn EventBus>;
}

impl<B: EventBus> IntoEventBus for B {
    fn into_event_bus(self) -> Arc<dyn EventBus> {
        Arc::new(self)
    }
}

impl<B: EventBus> IntoEventBus for Arc<B> {
    fn into_event_bus(self) -> Arc<dyn EventBus> {
        self
    }
}

impl IntoEventBus for Arc<dyn EventBus> {
    fn into_event_bus(self) -> Arc<dyn EventBus> {
        self
    }
}
