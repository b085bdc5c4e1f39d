//! The status of the publisher.

use serde::Serialize;

use crate::event::Position;

/// The state of the publisher.
///
/// Serializes in snake case: `"publishing"`, `{"retrying": {"error": …}}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum PublisherState {
    /// The runtime has no bus.
    Idle,
    /// Determining where to continue.
    Starting,
    /// Another node holds the lease and publishes.
    Standby,
    /// Publishing, or waiting for events.
    Publishing,
    /// The store [does not belong](crate::store::Adoption) to its database.
    /// Nothing is published to other nodes.
    Incompatible {
        /// The cause, and what to do.
        reason: String,
    },
    /// Retrying after a failure.
    Retrying {
        /// The failure.
        error: String,
    },
    /// Stopped.
    Stopped,
}

/// The status of the publisher. Serializes as a map of its fields.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct PublisherStatus {
    /// Name of the bus; `None` without a bus.
    pub bus: Option<&'static str>,
    /// State of the publisher.
    pub state: PublisherState,
    /// Position up to which every event is on the bus. `None` before this node has published.
    /// After an outage of a bus that keeps nothing, publishing continues at the end of the log.
    /// The position then includes events that followers read from the store.
    pub published: Option<Position>,
    /// End of the log that this node knows; `None` before its first read.
    pub head: Option<Position>,
    /// Last failure; `None` if there was none. A later success does not clear it.
    pub last_error: Option<String>,
}

impl PublisherStatus {
    pub(crate) fn new(bus: Option<&'static str>, state: PublisherState) -> Self {
        Self { bus, state, published: None, head: None, last_error: None }
    }
}
