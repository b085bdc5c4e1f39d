use async_nats::{Client, Subscriber};
use futures_util::{FutureExt, StreamExt};

use super::errors::unavailable;
use super::merged_subscription::subscribe;
use super::wire::{Outgoing, Wire};
use crate::bus::BusError;

/// Wake-up hints of nodes that have committed. Best effort: the publisher polls the store as well.
pub(super) struct Hints {
    messages: Subscriber,
    wire: Wire,
}

impl Hints {
    pub(super) async fn new(client: &Client, wire: &Wire) -> Result<Self, BusError> {
        Ok(Self { messages: subscribe(client, wire.hints(), None).await?, wire: wire.clone() })
    }

    /// Waits for a hint. Several received hints count as one. Cancel-safe.
    pub(super) async fn next(&mut self) {
        while let Some(message) = self.messages.next().await {
            if self.wire.is_ours(message.headers.as_ref()) {
                while self.messages.next().now_or_never().flatten().is_some() {}
                return;
            }
        }
        // The connection is closed. The publisher detects that with its next publish.
        std::future::pending().await
    }
}

/// Sends a hint.
pub(super) async fn hint(client: &Client, wire: &Wire) -> Result<(), BusError> {
    let Outgoing { subject, headers, body } = wire.hint();
    let sent = client.publish_with_headers(subject, headers, body).await;
    sent.map_err(|error| unavailable("sending a hint".into(), error))
}
