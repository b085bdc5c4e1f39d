//! Events of a connection: from async-nats, and to the user's handler.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use async_nats::{Event, ServerError};
use tokio::sync::Notify;

use super::server_errors::ServerErrors;

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
pub(in super::super) struct Handler(Option<Arc<dyn Fn(NatsEvent) + Send + Sync>>);

impl Handler {
    pub(in super::super) fn new(handler: impl Fn(NatsEvent) + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(handler)))
    }

    pub(super) fn tell(&self, event: NatsEvent) {
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

/// State collected from the events of async-nats.
pub(super) struct Signals {
    pub(super) server_errors: ServerErrors,
    pub(super) overflows: AtomicU64,
    pub(super) lame_ducks: AtomicU64,
    pub(super) closed: AtomicBool,
    /// Last failure.
    error: Mutex<Option<String>>,
    pub(super) news: Notify,
}

impl Signals {
    pub(super) fn new(inbox_prefix: &str) -> Self {
        Self {
            server_errors: ServerErrors::new(inbox_prefix),
            overflows: AtomicU64::default(),
            lame_ducks: AtomicU64::default(),
            closed: AtomicBool::default(),
            error: Mutex::default(),
            news: Notify::default(),
        }
    }

    pub(super) fn tell(&self, event: Event) {
        match event {
            Event::SlowConsumer(_) => _ = self.overflows.fetch_add(1, Ordering::Relaxed),
            Event::Closed => self.closed.store(true, Ordering::Relaxed),
            Event::LameDuckMode => {
                self.lame_ducks.fetch_add(1, Ordering::Relaxed);
                tracing::warn!("the NATS server is about to shut down (lame duck mode)");
            }
            Event::ServerError(error) => {
                let sentence = match &error {
                    ServerError::Other(sentence) => sentence.clone(),
                    other => other.to_string().trim_start_matches("nats: ").to_owned(),
                };
                self.server_errors.add(&sentence);
                self.failed(error.to_string());
            }
            Event::ClientError(error) => self.failed(error.to_string()),
            // Later errors belong to the new session.
            Event::Connected => self.server_errors.clear(),
            Event::Disconnected | Event::Draining => {}
        }
        self.news.notify_one();
    }

    fn failed(&self, error: String) {
        *self.error.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
    }

    pub(super) fn error(&self) -> Option<String> {
        self.error.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
