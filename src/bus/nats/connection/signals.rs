//! What async-nats tells us of a connection, and what we tell the user.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use async_nats::{Event, ServerError};
use tokio::sync::Notify;

use super::server_errors::ServerErrors;

/// Something that happened to the connection of a [`NatsBus`](crate::bus::NatsBus).
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum NatsEvent {
    /// It is there: for the first time, or again.
    Connected {
        /// With what.
        to: String,
    },
    /// It is gone, and comes back by itself.
    Disconnected {
        /// What happened last.
        reason: String,
    },
    /// Subscriptions of this process did not take what came, and lost some of it. Said at most five times a second.
    SlowConsumer {
        /// How often so far.
        overflows: u64,
    },
    /// The server reported an error beside its answers: what this login may not do, or why it ends the connection. The same
    /// one is reported at most five times a second.
    ServerError {
        /// The server's sentence.
        error: String,
    },
    /// The server is about to shut down, and asks its clients to go elsewhere. May go unheard beside a flood of overflows.
    LameDuck,
    /// It was closed, and does not come back.
    Closed,
}

/// What is called with them.
#[derive(Clone, Default)]
pub(in super::super) struct Handler(Option<Arc<dyn Fn(NatsEvent) + Send + Sync>>);

impl Handler {
    pub(in super::super) fn new(handler: impl Fn(NatsEvent) + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(handler)))
    }

    pub(super) fn tell(&self, event: NatsEvent) {
        let Some(handler) = &self.0 else { return };
        // What the user's code does must not end the watch over the connection.
        if catch_unwind(AssertUnwindSafe(|| handler(event))).is_err() {
            tracing::error!("the handler of events of the connection to NATS panicked");
        }
    }
}

impl fmt::Debug for Handler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Handler").field(&self.0.is_some()).finish()
    }
}

/// What async-nats has told.
pub(super) struct Signals {
    pub(super) server_errors: ServerErrors,
    pub(super) overflows: AtomicU64,
    pub(super) lame_ducks: AtomicU64,
    pub(super) closed: AtomicBool,
    /// The last thing that went wrong.
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
            // What follows is of the new session.
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
