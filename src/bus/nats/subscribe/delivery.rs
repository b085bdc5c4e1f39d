use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_nats::jetstream::AckKind;
use uuid::Uuid;

use super::super::jetstream::{AckError, Settle};
use super::super::limits::redelivery;
use crate::event::{DecodeError, Event, Position, RecordedEvent};
use crate::telemetry::trace::{self, Destination};

/// What a subscription yields.
#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "almost all are events")]
#[non_exhaustive]
pub enum Received {
    /// An event.
    Event(Delivery),
    /// Something may be missing between what came before and what comes next.
    Gap(Gap),
}

/// Why something may be missing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Gap {
    /// The connection was lost and is back; NATS Core keeps nothing meanwhile.
    #[error("the connection to NATS was lost and is back, and what was published meanwhile is not")]
    Reconnected,
    /// So many events had no room: their reader was too slow.
    #[error("{lost} events were lost, because their reader was too slow")]
    Overflow {
        /// How many; 0 when only the driver knows.
        lost: u64,
    },
    /// An event that does not fit into a message: it is in the store only.
    #[error("the event at position {position} is too large to travel, and is in the store only")]
    Omitted {
        /// Where it is in the log.
        position: Position,
    },
    /// The stream's limits were reached, or the consumer or the stream was deleted and made again.
    #[error("{reason}")]
    Consumer {
        /// What happened.
        reason: String,
    },
}

/// An event as it came over the bus.
///
/// From JetStream it comes again until it is settled by one of [`ack`](Self::ack), [`nak`](Self::nak),
/// [`nak_with_delay`](Self::nak_with_delay) or [`term`](Self::term), once. One that is dropped unsettled comes again after
/// the consumer's `ack_wait`.
pub struct Delivery {
    pub(super) event: RecordedEvent,
    pub(super) previous: Position,
    pub(super) store: Uuid,
    pub(super) subject: async_nats::Subject,
    pub(super) stream_sequence: Option<u64>,
    pub(super) attempt: u64,
    pub(super) settle: Option<Arc<Settle>>,
    /// Whether to wait until the server knows.
    pub(super) confirm: bool,
}

impl Delivery {
    /// The event as it is in the log.
    #[must_use]
    pub fn event(&self) -> &RecordedEvent {
        &self.event
    }

    /// A span for the work on this event, with a trace of its own that is linked to the producer's. Enter it, or instrument
    /// a future with it; [`for_each`](super::Subscription::for_each) does. Disabled where nobody listens.
    #[must_use]
    pub fn span(&self) -> tracing::Span {
        let name = match &self.settle {
            Some(settle) => settle.stream(),
            None => self.subject.as_str(),
        };
        let group = self.settle.as_ref().map(|settle| settle.consumer());
        trace::process(Destination { system: "nats", name }, group, &self.event)
    }

    /// The event alone; the delivery is not settled by that.
    #[must_use]
    pub fn into_event(self) -> RecordedEvent {
        self.event
    }

    /// The event as `E`, after upcasting.
    ///
    /// # Errors
    /// As [`RecordedEvent::decode`].
    pub fn decode<E: Event>(&self) -> Result<E, DecodeError> {
        self.event.decode()
    }

    /// The event as `E`, or `None` when it belongs to another category.
    ///
    /// # Errors
    /// As [`RecordedEvent::decode_if`].
    pub fn decode_if<E: Event>(&self) -> Result<Option<E>, DecodeError> {
        self.event.decode_if()
    }

    /// The position of the event before it in the log, whatever its name: who subscribes to everything sees by it whether
    /// something is missing.
    #[must_use]
    pub fn previous(&self) -> Position {
        self.previous
    }

    /// The store whose log it is from.
    #[must_use]
    pub fn store(&self) -> Uuid {
        self.store
    }

    /// The subject that it was published to.
    #[must_use]
    pub fn subject(&self) -> &str {
        self.subject.as_str()
    }

    /// Its number in the JetStream stream.
    #[must_use]
    pub fn stream_sequence(&self) -> Option<u64> {
        self.stream_sequence
    }

    /// How often it has been delivered to this consumer, this time included, as far as the server remembers: after a crash
    /// of the server it may be 1 again.
    #[must_use]
    pub fn attempt(&self) -> u64 {
        self.attempt
    }

    /// It is processed, and not delivered again. Over NATS Core there is nothing to do.
    ///
    /// # Errors
    /// When it was settled before, or the server could not be told: then it is delivered again.
    pub async fn ack(&self) -> Result<(), AckError> {
        match &self.settle {
            Some(settle) => settle.settle(AckKind::Ack, self.confirm).await,
            None => Ok(()),
        }
    }

    /// It is to be delivered again, at once.
    ///
    /// # Errors
    /// As [`ack`](Self::ack), and over NATS Core.
    pub async fn nak(&self) -> Result<(), AckError> {
        self.settle_as(AckKind::Nak(None)).await
    }

    /// It is to be delivered again, after this wait, at most a year.
    ///
    /// # Errors
    /// As [`nak`](Self::nak).
    pub async fn nak_with_delay(&self, wait: Duration) -> Result<(), AckError> {
        self.settle_as(AckKind::Nak(Some(redelivery(wait)))).await
    }

    /// It is not to be delivered again, although it was not processed.
    ///
    /// # Errors
    /// As [`nak`](Self::nak).
    pub async fn term(&self) -> Result<(), AckError> {
        self.settle_as(AckKind::Term).await
    }

    /// It is still being processed: the consumer's `ack_wait` begins anew. Nothing to do over NATS Core.
    ///
    /// # Errors
    /// When it was settled before, or the server could not be told.
    pub async fn in_progress(&self) -> Result<(), AckError> {
        match &self.settle {
            Some(settle) => settle.progress().await,
            None => Ok(()),
        }
    }

    async fn settle_as(&self, kind: AckKind) -> Result<(), AckError> {
        match &self.settle {
            Some(settle) => settle.settle(kind, self.confirm).await,
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
