use std::time::Duration;

use super::delivery::Gap;
use crate::bus::BusError;
use crate::event::{EventName, Position};

/// An error of a subscription. Unread errors block nothing.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum SubscriptionError {
    /// A message is no event of storied. JetStream does not redeliver it.
    #[error("the message on subject {subject:?} is no event of storied: {reason}")]
    Malformed {
        /// Subject of the message.
        subject: String,
        /// The defect.
        reason: String,
    },
    /// An event was not read in time. This subscriber has lost it, or JetStream redelivers it.
    #[error("the event {event} at position {position} was not read within {timeout:?}")]
    PullTimeout {
        /// Name of the event.
        event: EventName,
        /// Position of the event in the log.
        position: Position,
        /// The time limit.
        timeout: Duration,
    },
    /// Events may be missing. The same gap is also an item of the subscription.
    #[error("{0}")]
    Gap(Gap),
    /// Deliveries of a JetStream consumer were not read for a whole `ack_wait`.
    /// They were returned to the server for other readers. The next read requests more.
    #[error("the reader is stalled: {events} deliveries were returned to the server")]
    Stalled {
        /// Number of returned deliveries.
        events: usize,
    },
    /// The subscription is interrupted for this reason, and is being retried.
    #[error("the subscription is interrupted: {0}")]
    Interrupted(#[source] BusError),
    /// A handler failed.
    #[error(
        "the handler failed on the event {event} at position {position}, attempt {attempt}; \
         {outcome}: {reason}"
    )]
    Handler {
        /// Name of the event.
        event: EventName,
        /// Position of the event in the log.
        position: Position,
        /// Number of deliveries, including this one.
        attempt: u64,
        /// Error of the handler.
        reason: String,
        /// Outcome for the event.
        outcome: &'static str,
    },
    /// The server did not receive an acknowledgement, and will redeliver the event.
    #[error("could not acknowledge the event {event} at position {position}: {reason}")]
    Unsettled {
        /// Name of the event.
        event: EventName,
        /// Position of the event in the log.
        position: Position,
        /// The cause.
        reason: String,
    },
}
