//! State collected from the events of async-nats.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use async_nats::{Event, ServerError};
use tokio::sync::Notify;

use super::server_errors::ServerErrors;

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

    pub(super) fn record(&self, event: Event) {
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
