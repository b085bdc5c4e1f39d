use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use async_nats::jetstream::AckKind;
use async_nats::{Message, Request, Subject};

use crate::bus::BusError;
use crate::bus::nats::connection::Connection;
use crate::bus::nats::errors::unavailable;
use crate::telemetry::Timer;
use crate::telemetry::trace::Destination;

/// The reason why a delivery was not acknowledged.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum AckError {
    /// The delivery was acknowledged before, by any of the methods.
    #[error("the delivery was acknowledged before; acknowledge each delivery once")]
    Settled,
    /// NATS Core delivers once and never redelivers.
    #[error("NATS Core does not redeliver; use the JetStream driver for events that must not be lost")]
    NotAgain,
    /// The server did not receive or confirm the acknowledgement.
    /// It redelivers the event unless a retry succeeds.
    #[error("the server did not receive the acknowledgement of a delivery: {0}")]
    Bus(#[source] BusError),
}

/// The acknowledgement of a delivered message, sent once.
pub(in crate::bus::nats) struct Acker {
    connection: Arc<Connection>,
    reply: Subject,
    settled: AtomicBool,
}

/// The metadata of a delivery.
pub(super) struct DeliveryMetadata {
    pub(super) sequence: u64,
    pub(super) attempt: u64,
    /// Consumer sequence number of the delivery.
    pub(super) number: u64,
}

/// `stream.consumer.delivered.sequence.…` from the reply subject.
fn reply_tokens(reply: &Subject) -> Option<std::str::Split<'_, char>> {
    let mut tokens = reply.as_str().strip_prefix("$JS.ACK.")?.split('.');
    // Newer servers put the domain and the account first.
    if tokens.clone().count() >= 9 {
        tokens.nth(1);
    }
    Some(tokens)
}

fn word(kind: &AckKind) -> &'static str {
    match kind {
        AckKind::Ack => "ack",
        AckKind::Nak(_) => "nak",
        AckKind::Progress => "progress",
        AckKind::Next => "next",
        AckKind::Term => "term",
    }
}

impl Acker {
    /// Reads the reply subject; `None` if JetStream did not send the message.
    pub(super) fn of(message: &Message, connection: &Arc<Connection>) -> Option<(Self, DeliveryMetadata)> {
        let reply = message.reply.clone()?;
        let mut tokens = reply_tokens(&reply)?.skip(2).map(|token| token.parse::<u64>().ok());
        let (attempt, sequence, number) = (tokens.next()??, tokens.next()??, tokens.next()??);
        let acker = Self { connection: connection.clone(), reply, settled: AtomicBool::new(false) };
        Some((acker, DeliveryMetadata { sequence, attempt, number }))
    }

    /// The stream of the message.
    pub(in crate::bus::nats) fn stream(&self) -> &str {
        reply_tokens(&self.reply).and_then(|mut tokens| tokens.next()).unwrap_or_default()
    }

    /// The consumer that delivered the message.
    pub(in crate::bus::nats) fn consumer(&self) -> &str {
        reply_tokens(&self.reply).and_then(|mut tokens| tokens.nth(1)).unwrap_or_default()
    }

    pub(in crate::bus::nats) fn is_settled(&self) -> bool {
        self.settled.load(Ordering::Relaxed)
    }

    /// Sends an acknowledgement. With `confirmed`, waits until the server confirms it.
    ///
    /// Not cancel-safe: a dropped call may have sent it or not.
    pub(in crate::bus::nats) async fn ack_with(
        &self,
        kind: AckKind,
        confirmed: bool,
    ) -> Result<(), AckError> {
        if self.settled.swap(true, Ordering::Relaxed) {
            return Err(AckError::Settled);
        }
        let (timer, how) = (Timer::start(), word(&kind));
        let sent = self.send(kind, confirmed).await;
        let from = Destination { system: "nats", name: self.stream() };
        let error = sent.as_ref().err().map(BusError::kind);
        self.connection.metrics().settled(from, how, timer, error);
        if sent.is_err() {
            self.settled.store(false, Ordering::Relaxed);
        }
        sent.map_err(AckError::Bus)
    }

    /// Reports progress, which restarts the `ack_wait` of the server.
    pub(in crate::bus::nats) async fn progress(&self) -> Result<(), AckError> {
        if self.is_settled() {
            return Err(AckError::Settled);
        }
        self.send(AckKind::Progress, false).await.map_err(AckError::Bus)
    }

    async fn send(&self, kind: AckKind, confirmed: bool) -> Result<(), BusError> {
        self.connection.check()?;
        let client = &self.connection.client;
        if !confirmed {
            let sent = client.publish(self.reply.clone(), kind.into()).await;
            return sent.map_err(|error| unavailable("acknowledging a delivery".into(), error));
        }
        let request = Request::new().payload(kind.into()).timeout(Some(self.connection.answer_timeout()));
        let answer = async {
            let answer = client.send_request(self.reply.clone(), request).await;
            answer.map(drop).map_err(|error| unavailable("acknowledging a delivery".into(), error))
        };
        let subject = [self.reply.to_string()];
        self.connection.while_permitted("acknowledging a delivery", &subject, answer).await
    }
}

impl fmt::Debug for Acker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Acker").field("reply", &self.reply).field("settled", &self.is_settled()).finish()
    }
}
