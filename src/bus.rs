//! The port to the event bus, which carries committed events to other processes in log order.
//!
//! The store is the source of truth. A bus may delay messages, lose them, or carry messages of
//! other programs. The [`feed`](crate::feed) takes a message only as a reason to read the store. No
//! message reaches a read model.

#[cfg(feature = "nats")]
mod nats;

use std::borrow::Cow;
use std::error::Error;
use std::sync::Arc;

use serde::Serialize;
use uuid::Uuid;

#[cfg(feature = "nats")]
pub(crate) use self::nats::shared_connection::{CommandConnection, SharedConnection};
#[cfg(feature = "nats")]
pub use self::nats::{
    AckError, ConsumerOptions, ConsumerReport, Delivery, Field, Gap, HandleError, HandleOptions, HandlerTask,
    JetStreamOptions, LogStreamItem, LogStreamReader, NatsBus, NatsEvent, NatsOptions, NatsReport,
    ProvisionPolicy, Received, RetryPolicy, StartFrom, StreamFound, StreamReport, Subjects, SubscribeOptions,
    Subscription, SubscriptionError, SubscriptionErrors, SubscriptionStats,
};
use crate::event::{Category, EventName, Position, RecordedEvent};
use crate::future::BoxFuture;
#[cfg(feature = "otel")]
use crate::telemetry::Telemetry;

/// A section of the log: every event in `(after, upto]`, in log order. Cheap to clone.
#[derive(Debug, Clone)]
pub struct LogBatch {
    /// Position before the section.
    pub after: Position,
    /// Last position of the section.
    pub upto: Position,
    /// All events of the section. Positions have gaps, so the count of events says nothing about
    /// them.
    pub events: Arc<[RecordedEvent]>,
}

/// An item of a subscription: a reason to read the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum BusItem {
    /// The log may have events up to this position.
    Upto(Position),
    /// Messages may have been lost since the last item, for example by a reconnect or an overflow.
    Gap,
}

/// The end of a log stream: the copy of the log that a durable bus keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LogStreamEnd {
    /// Position of its last event.
    pub position: Position,
    /// Sequence number that the bus gave that event.
    pub sequence: u64,
}

/// The point from which publishing continues.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resume {
    /// After this position, where the log stream of the bus ends.
    After(LogStreamEnd),
    /// At the high-water mark of the log.
    /// The bus keeps nothing, and followers read the past from the store.
    AtHighWaterMark,
}

/// A message of a log stream, as it describes itself. Only the log can confirm it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Claim {
    /// Sequence number that the bus gave the message.
    pub sequence: u64,
    /// The event that the message claims to be.
    pub event: ClaimedEvent,
}

/// The event that a message of a log stream claims to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClaimedEvent {
    /// An event of this log.
    Event {
        /// Position of the event before it.
        previous: Position,
        /// Position of the event.
        position: Position,
        /// Id of the event.
        id: Uuid,
    },
    /// Not an event of this log.
    Foreign,
    /// Unknown: the bus no longer keeps the message.
    Missing,
}

/// The state of a bus.
///
/// Serializes as `"idle"`, `{"connected": {"to": …, "last_error": …}}`,
/// `{"disconnected": {"reason": …}}` or `"closed"`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum BusState {
    /// Not connected yet. The bus connects on first use.
    Idle,
    /// Connected, and no failure is known.
    Connected {
        /// Server that the bus is connected to.
        to: String,
        /// Last error that the server reported asynchronously on this connection.
        /// For example a denied permission. `None` after a reconnect.
        last_error: Option<String>,
    },
    /// Disconnected. The bus reconnects by itself.
    Disconnected {
        /// Last failure.
        reason: String,
    },
    /// Closed by its owner.
    Closed,
}

/// A durable subscription to the log. The bus keeps its events until they are applied.
#[derive(Debug, Clone)]
pub struct Follow {
    /// Name of the follower. The bus stores its progress under this name.
    pub name: String,
    /// Id of the store with the log.
    pub store: Uuid,
    /// If given, only events with these names.
    pub names: Option<Vec<EventName>>,
    /// If given, only events of these categories.
    pub categories: Option<Vec<Category>>,
}

/// An item of a durable subscription.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum DurableItem {
    /// The log may have a matching event at this position.
    /// Any program may have published the message: only the store is authoritative.
    Wake(Position),
    /// Reason why events may be missing before the next item. The first item is a gap.
    Gap(String),
}

/// An event bus.
pub trait EventBus: Send + Sync + 'static {
    /// The name of the bus: `nats-core`, `nats-jetstream`, …
    fn name(&self) -> &'static str;

    /// Checks the options without any I/O.
    ///
    /// [`Builder::start`](crate::runtime::Builder::start) calls it first.
    ///
    /// # Errors
    /// `Incompatible` if the bus can never work with these options.
    fn check(&self) -> Result<(), BusError> {
        Ok(())
    }

    /// The destination of events, for metrics and traces: a stream or a subject prefix.
    /// Default: the [name](Self::name).
    fn destination(&self) -> Cow<'static, str> {
        Cow::Borrowed(self.name())
    }

    /// The current state.
    fn state(&self) -> BusState;

    /// Sets the destination of metrics, unless it is set already. Does nothing by default.
    #[cfg(feature = "otel")]
    fn observe(&self, _telemetry: &Telemetry) {}

    /// Opens the publishing side for the log of the store with this id.
    ///
    /// At most one publisher works at a time. The bus must refuse a second publisher, or the second
    /// publisher must be harmless (I7). The bus must refuse the log stream of another store.
    fn publisher(&self, store: Uuid) -> BoxFuture<'_, Result<Box<dyn BusPublisher>, BusError>>;

    /// Notifies the publisher of the log, on any node, that the log has new events.
    ///
    /// A hint is best effort: it may be lost, and an error changes nothing. Does nothing by
    /// default.
    fn hint(&self, _store: Uuid) -> BoxFuture<'_, Result<(), BusError>> {
        Box::pin(std::future::ready(Ok(())))
    }

    /// Subscribes to the live tail of the log of the store with this id, and of no other store.
    ///
    /// Every event published after this call returns causes a [`BusItem::Upto`] with its position
    /// or a later one, or a [`BusItem::Gap`]. The publisher is not authenticated: trust the store,
    /// not the message.
    fn subscribe(&self, store: Uuid) -> BoxFuture<'_, Result<Box<dyn BusSubscription>, BusError>>;

    /// Whether the bus keeps events for durable subscriptions (see [`follow`](Self::follow)).
    fn is_durable(&self) -> bool {
        false
    }

    /// Subscribes durably to the log. The bus filters the events.
    ///
    /// Connects in the background, with unlimited retries. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// `Incompatible` if the bus keeps no events, which is the default.
    fn follow(&self, follow: Follow) -> Result<Box<dyn DurableSubscription>, BusError> {
        let _ = follow;
        Err(BusError::Incompatible {
            reason: format!("{} keeps no events for durable subscriptions", self.name()),
        })
    }
}

/// The receiving side of a durable subscription.
pub trait DurableSubscription: Send {
    /// Returns the next item; `Closed` is the end. Cancel-safe: a dropped call loses nothing.
    fn next(&mut self) -> BoxFuture<'_, Result<DurableItem, BusError>>;

    /// Marks every event up to this position as applied: the bus need not keep it.
    /// The bus keeps later events while the subscription lives, and delivers them to the next
    /// subscription with the same name.
    fn applied(&mut self, upto: Position);

    /// Reports that the log ended at `head` when it was read.
    ///
    /// The read followed the items that [`next`](Self::next) has returned. A message among them
    /// with a later position belongs to no event, and is not kept.
    fn ended(&mut self, head: Position);
}

/// The publishing side of a bus.
pub trait BusPublisher: Send {
    /// Returns the point from which publishing continues.
    /// `known` is the last confirmed publish that the publisher saved in the store, for a log
    /// stream that was emptied since.
    fn resume(&mut self, known: LogStreamEnd) -> BoxFuture<'_, Result<Resume, BusError>>;

    /// Returns the next messages that the log has to confirm, after [`resume`](Self::resume).
    ///
    /// Returns no messages at the end, and none by default. If the log stream still has the
    /// sequence number of `known`, the messages begin with that one. Otherwise they are its last
    /// messages.
    fn claims(&mut self) -> BoxFuture<'_, Result<Vec<Claim>, BusError>> {
        Box::pin(std::future::ready(Ok(Vec::new())))
    }

    /// Sets the last position that the log confirmed, after [`claims`](Self::claims).
    /// `is_exact` is false if a missing message may have been a later event. Does nothing by
    /// default.
    fn confirm(&mut self, _position: Position, _is_exact: bool) {}

    /// The end of the log stream that the bus has confirmed.
    ///
    /// Also valid after an error of [`publish`](Self::publish). `None` by default: only the result
    /// of `publish` states the end.
    fn confirmed(&self) -> Option<LogStreamEnd> {
        None
    }

    /// Publishes the next section, and returns the new end of the log stream once the bus confirmed
    /// it all.
    fn publish(&mut self, batch: LogBatch) -> BoxFuture<'_, Result<LogStreamEnd, BusError>>;

    /// Waits for a call of [`EventBus::hint`] on any node. Cancel-safe. Never returns by default.
    fn hinted(&mut self) -> BoxFuture<'_, ()> {
        Box::pin(std::future::pending())
    }

    /// Publishes the end of the log to followers while there is nothing else to publish.
    fn heartbeat(&mut self, head: Position) -> BoxFuture<'_, Result<(), BusError>>;
}

/// The receiving side of a bus. Its buffer is bounded; a slow reader gets [`BusItem::Gap`].
pub trait BusSubscription: Send {
    /// Returns the next item. Cancel-safe: a dropped call loses nothing.
    fn next(&mut self) -> BoxFuture<'_, Result<BusItem, BusError>>;
}

/// A failure of the bus. Events are safe in the store in every case.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum BusError {
    /// Not connected, or no answer in time. A retry may help.
    #[error("the event bus is unavailable: {reason}")]
    Unavailable {
        /// The failed operation and its cause.
        reason: String,
        /// Error of the driver.
        #[source]
        source: Option<Arc<dyn Error + Send + Sync>>,
    },
    /// Another publisher is active: the log stream does not end where this publisher left it.
    #[error("the publisher is fenced: {reason}")]
    Fenced {
        /// Expected and actual state.
        reason: String,
    },
    /// The configuration of the bus does not match this program. An operator has to act.
    #[error("incompatible event bus: {reason}")]
    Incompatible {
        /// The difference, and what to do.
        reason: String,
    },
    /// The bus was closed by its owner.
    #[error("the event bus is closed")]
    Closed,
}

impl BusError {
    /// The kind of failure, in one word.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::Unavailable { .. } => "unavailable",
            Self::Fenced { .. } => "fenced",
            Self::Incompatible { .. } => "incompatible",
            Self::Closed => "closed",
        }
    }
}

/// Types that [`Builder::bus`](crate::runtime::Builder::bus) accepts: a bus, or a shared bus.
pub trait IntoEventBus {
    /// Converts into a shared bus.
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
