use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_nats::jetstream::AckKind;
use uuid::Uuid;

use super::super::jetstream::{AckError, Acker};
use super::super::limits::redelivery;
use crate::event::{DecodeError, Event, EventSet, Position, RecordedEvent};
use crate::telemetry::trace::{self, Destination};

/// An item of a subscription.
#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "almost all are events")]
#[non_exhaustive]
pub enum Received {
    /// An event.
    Event(Delivery),
    /// Events may be missing between the previous and the next item.
    Gap(Gap),
}

/// The reason why events may be missing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Gap {
    /// The connection was lost and reestablished. NATS Core keeps nothing meanwhile.
    #[error("events may be lost: the connection to NATS was lost and reestablished")]
    Reconnected,
    /// Events were lost because the reader was too slow.
    #[error("{lost} events were lost: the reader was too slow")]
    Overflow {
        /// Number of lost events; 0 if only the driver knows it.
        lost: u64,
    },
    /// An event that is too large for a message. It is in the store only.
    #[error("the event at position {position} is too large for a message; read it from the store")]
    Omitted {
        /// Position of the event in the log.
        position: Position,
    },
    /// The stream reached its limits, or the consumer or the stream was recreated.
    #[error("{reason}")]
    Consumer {
        /// Description of the loss.
        reason: String,
    },
}

/// An event received over the bus.
///
/// JetStream redelivers it until it is acknowledged, once, by [`ack`](Self::ack),
/// [`nak`](Self::nak), [`nak_with_delay`](Self::nak_with_delay) or [`term`](Self::term). After a
/// drop without an acknowledgement, JetStream redelivers it after the consumer's `ack_wait`.
pub struct Delivery {
    pub(super) event: RecordedEvent,
    pub(super) previous: Position,
    pub(super) store: Uuid,
    pub(super) subject: async_nats::Subject,
    pub(super) stream_sequence: Option<u64>,
    pub(super) attempt: u64,
    pub(super) acker: Option<Arc<Acker>>,
    /// Whether an acknowledgement waits for the confirmation of the server.
    pub(super) confirm: bool,
}

impl Delivery {
    /// The event as in the log.
    #[must_use]
    pub fn event(&self) -> &RecordedEvent {
        &self.event
    }

    /// Creates a span for the work on this event, in a new trace that links to the producer's.
    ///
    /// Enter it, or instrument a future with it; [`for_each`](super::Subscription::for_each) does
    /// so. Disabled without a subscriber.
    #[must_use]
    pub fn span(&self) -> tracing::Span {
        let name = match &self.acker {
            Some(acker) => acker.stream(),
            None => self.subject.as_str(),
        };
        let group = self.acker.as_ref().map(|acker| acker.consumer());
        trace::process(Destination { system: "nats", name }, group, &self.event)
    }

    /// Returns the event. Does not acknowledge the delivery.
    #[must_use]
    pub fn into_event(self) -> RecordedEvent {
        self.event
    }

    /// Decodes the event as an event type or a set of event types, after upcasting.
    ///
    /// # Errors
    /// As [`RecordedEvent::decode`].
    pub fn decode<S: EventSet>(&self) -> Result<S, DecodeError> {
        self.event.decode()
    }

    /// Decodes the event as `E`; `None` if it belongs to another category.
    ///
    /// # Errors
    /// As [`RecordedEvent::decode_if`].
    pub fn decode_if<E: Event>(&self) -> Result<Option<E>, DecodeError> {
        self.event.decode_if()
    }

    /// Position of the previous event in the log, whatever its name.
    ///
    /// A subscriber to all events detects missing events by it.
    #[must_use]
    pub fn previous(&self) -> Position {
        self.previous
    }

    /// Id of the store whose log has the event.
    #[must_use]
    pub fn store(&self) -> Uuid {
        self.store
    }

    /// Subject of the message.
    #[must_use]
    pub fn subject(&self) -> &str {
        self.subject.as_str()
    }

    /// Sequence number of the message in the JetStream stream.
    #[must_use]
    pub fn stream_sequence(&self) -> Option<u64> {
        self.stream_sequence
    }

    /// Number of deliveries to this consumer, including this one.
    ///
    /// The server may lose the count: after a crash of the server it may be 1 again.
    #[must_use]
    pub fn attempt(&self) -> u64 {
        self.attempt
    }

    /// Acknowledges the event as processed, so that it is not redelivered.
    /// No effect over NATS Core.
    ///
    /// # Errors
    /// If it was acknowledged before, or the server did not receive the acknowledgement. The server
    /// then redelivers the event.
    pub async fn ack(&self) -> Result<(), AckError> {
        match &self.acker {
            Some(acker) => acker.ack_with(AckKind::Ack, self.confirm).await,
            None => Ok(()),
        }
    }

    /// Requests an immediate redelivery.
    ///
    /// # Errors
    /// As [`ack`](Self::ack), and over NATS Core.
    pub async fn nak(&self) -> Result<(), AckError> {
        self.ack_with(AckKind::Nak(None)).await
    }

    /// Requests a redelivery after this wait. Maximum: 1 year.
    ///
    /// # Errors
    /// As [`nak`](Self::nak).
    pub async fn nak_with_delay(&self, wait: Duration) -> Result<(), AckError> {
        self.ack_with(AckKind::Nak(Some(redelivery(wait)))).await
    }

    /// Stops redeliveries of an event that was not processed.
    ///
    /// # Errors
    /// As [`nak`](Self::nak).
    pub async fn term(&self) -> Result<(), AckError> {
        self.ack_with(AckKind::Term).await
    }

    /// Reports progress, which restarts the consumer's `ack_wait`. No effect over NATS Core.
    ///
    /// # Errors
    /// If the event was acknowledged before, or the server did not receive the report.
    pub async fn in_progress(&self) -> Result<(), AckError> {
        match &self.acker {
            Some(acker) => acker.progress().await,
            None => Ok(()),
        }
    }

    async fn ack_with(&self, kind: AckKind) -> Result<(), AckError> {
        match &self.acker {
            Some(acker) => acker.ack_with(kind, self.confirm).await,
            None => Err(AckError::NotAgain),
        }
    }
}

impl fmt::Debug for Delivery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Delivery")
            .field("event", &self.event)
            .field("subject", &self.subject())
            .field("stream_sequence", &self.stream_sequence)
            .field("attempt", &self.attempt)
            .finish_non_exhaustive()
    }
}
