//! A subscription that receives events, and the stream of its errors.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::Stream;
use futures_util::future::{join_all, poll_fn};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{sleep_until, timeout};

use super::super::nats_bus::NatsBus;
use super::delivery::{Delivery, Received};
use super::error::SubscriptionError;
use super::queue::{Queue, SubscriptionStats};
use crate::supervised::StopError;
use crate::time::after;

/// A subscription to events by name over a [`NatsBus`]. A [`Stream`] of [`Received`].
///
/// Dropping it ends the subscription, and returns unread JetStream deliveries to the server.
pub struct Subscription {
    pub(super) bus: NatsBus,
    /// Time until JetStream redelivers an unacknowledged message.
    pub(super) ack_wait: Duration,
    pub(super) queue: Arc<Queue>,
    pub(super) stop: watch::Sender<bool>,
    pub(super) receivers: Vec<JoinHandle<()>>,
}

impl Subscription {
    /// Returns the next event or gap; `None` if the subscription has ended. Cancel-safe.
    pub async fn next(&mut self) -> Option<Received> {
        poll_fn(|cx| self.queue.poll_next(cx)).await
    }

    /// Returns up to `most` events that arrive within `wait`.
    ///
    /// Returns at least one event if one arrives in time. Gaps are reported by
    /// [`errors`](Self::errors) only. Not cancel-safe: a dropped future loses the gathered events,
    /// and JetStream redelivers them.
    pub async fn fetch(&mut self, most: usize, wait: Duration) -> Vec<Delivery> {
        let mut fetched = Vec::new();
        let end = after(wait);
        while fetched.len() < most {
            tokio::select! {
                biased;
                received = self.next() => match received {
                    Some(Received::Event(delivery)) => fetched.push(delivery),
                    Some(Received::Gap(_)) => {}
                    None => break,
                },
                () = sleep_until(end) => break,
            }
        }
        fetched
    }

    /// Returns the errors of the subscription.
    ///
    /// Each error is delivered once, to the first reader. The last 256 unread errors are kept.
    #[must_use]
    pub fn errors(&self) -> SubscriptionErrors {
        SubscriptionErrors { queue: self.queue.clone() }
    }

    /// Returns the counters of the subscription.
    #[must_use]
    pub fn stats(&self) -> SubscriptionStats {
        self.queue.stats()
    }

    /// Ends the subscription, and returns unread JetStream deliveries to the server.
    ///
    /// # Errors
    /// If it does not end within `patience`. It then ends in the background.
    pub async fn close(mut self, patience: Duration) -> Result<(), StopError> {
        self.stop.send_replace(true);
        let receivers = std::mem::take(&mut self.receivers);
        match timeout(patience, join_all(receivers)).await {
            Ok(_) => Ok(()),
            Err(_) => Err(unfinished("the server did not confirm the end", patience)),
        }
    }
}

/// Returns the error of a subscription that did not end in time.
pub(super) fn unfinished(what: &str, patience: Duration) -> StopError {
    StopError { name: "a subscription".into(), reason: format!("not ended within {patience:?}: {what}") }
}

impl Stream for Subscription {
    type Item = Received;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Received>> {
        self.queue.poll_next(cx)
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        // The receivers end by themselves, because they return deliveries.
        self.stop.send_replace(true);
    }
}

impl fmt::Debug for Subscription {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Subscription").field("stats", &self.stats()).finish_non_exhaustive()
    }
}

/// The errors of a [`Subscription`]: a [`Stream`] that ends with it.
pub struct SubscriptionErrors {
    pub(super) queue: Arc<Queue>,
}

impl SubscriptionErrors {
    /// Returns the next error; `None` if the subscription has ended. Cancel-safe.
    pub async fn next(&mut self) -> Option<SubscriptionError> {
        poll_fn(|cx| self.queue.poll_error(cx)).await
    }
}

impl Stream for SubscriptionErrors {
    type Item = SubscriptionError;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<SubscriptionError>> {
        self.queue.poll_error(cx)
    }
}

impl fmt::Debug for SubscriptionErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SubscriptionErrors").finish_non_exhaustive()
    }
}
