use std::time::Duration;

use super::Gap;
use crate::bus::BusError;
use crate::event::{EventName, Position};

/// What went wrong in a subscription. Nothing waits for these to be read.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum SubscriptionError {
    /// A message is no event of storied's. JetStream does not deliver it again.
    #[error("a message with the subject {subject:?} is no event of storied: {reason}")]
    Malformed {
        /// Where it was published to.
        subject: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Nobody took an event in time; this subscriber has lost it, or it is delivered again by JetStream.
    #[error("nobody took the event {event} at position {position} within {timeout:?}")]
    PullTimeout {
        /// Its name.
        event: EventName,
        /// Where it is in the log.
        position: Position,
        /// How long it waited.
        timeout: Duration,
    },
    /// Something may be missing; the same as among the events, for those who do not look there.
    #[error("{0}")]
    Gap(Gap),
    /// For a whole `ack_wait` nobody took what a JetStream consumer had delivered: it was given back to the server, for
    /// other readers, and more is asked for when somebody reads.
    #[error("nobody reads: {events} deliveries were given back to the server")]
    Stalled {
        /// How many.
        events: usize,
    },
    /// There is no subscription at the moment, for this reason; it is being tried again.
    #[error("the subscription is interrupted: {0}")]
    Interrupted(#[source] BusError),
    /// A handler failed.
    #[error(
        "the handler failed on the event {event} at position {position}, attempt {attempt}; {outcome}: {reason}"
    )]
    Handler {
        /// Its name.
        event: EventName,
        /// Where it is in the log.
        position: Position,
        /// How often it has been delivered, this time included.
        attempt: u64,
        /// What it said.
        reason: String,
        /// What became of the event.
        outcome: &'static str,
    },
    /// The server could not be told what became of a delivery, which it will make again.
    #[error("the delivery of the event {event} at position {position} could not be settled: {reason}")]
    Unsettled {
        /// Its name.
        event: EventName,
        /// Where it is in the log.
        position: Position,
        /// Why.
        reason: String,
    },
}
