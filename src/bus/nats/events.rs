//! Events of a connection, and the user's handler for them.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

/// An event of the connection of a [`NatsBus`](crate::bus::NatsBus).
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum NatsEvent {
    /// The connection was established, for the first time or again.
    Connected {
        /// Server that the bus is connected to.
        to: String,
    },
    /// The connection was lost. The bus reconnects by itself.
    Disconnected {
        /// Last failure.
        reason: String,
    },
    /// Subscriptions of this process were too slow and lost messages.
    /// Reported at most five times per second.
    SlowConsumer {
        /// Number of overflows so far.
        overflows: u64,
    },
    /// The server reported an asynchronous error, such as a denied permission or a disconnect
    /// reason.
    /// The same error is reported at most five times per second.
    ServerError {
        /// Error text of the server.
        error: String,
    },
    /// The server is about to shut down, and asks its clients to connect to another server.
    /// May be lost in a flood of overflows.
    LameDuck,
    /// The connection was closed permanently.
    Closed,
}

/// The user's event handler.
#[derive(Clone, Default)]
pub(super) struct Handler(Option<Arc<dyn Fn(NatsEvent) + Send + Sync>>);

impl Handler {
    pub(super) fn new(handler: impl Fn(NatsEvent) + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(handler)))
    }

    pub(super) fn emit(&self, event: NatsEvent) {
        let Some(handler) = &self.0 else { return };
        // A panic of the user's code must not end the connection watcher.
        if catch_unwind(AssertUnwindSafe(|| handler(event))).is_err() {
            tracing::error!("the NATS event handler panicked");
        }
    }
}

impl fmt::Debug for Handler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Handler").field(&self.0.is_some()).finish()
    }
}
