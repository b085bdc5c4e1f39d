//! Proof that the server has received the sent messages: an echo, or the messages themselves.

use std::collections::HashSet;

use async_nats::{Client, HeaderMap, Subscriber};
use futures_util::{FutureExt, StreamExt};
use tokio::task::unconstrained;

use super::super::errors::{silent, unavailable};
use crate::bus::BusError;
use crate::bus::nats::wire::Outgoing;

/// Number of proved subjects that are kept. Above it, all are proved again.
const PROVED: usize = 10_000;

/// A round trip to the connection's own inbox.
///
/// Its reply proves that the server received everything sent before. Publish and flush prove less:
/// both only write to the socket.
pub(in crate::bus::nats) struct Echo {
    inbox: String,
    answers: Subscriber,
    asked: u64,
}

impl Echo {
    pub(in crate::bus::nats) async fn new(client: &Client) -> Result<Self, BusError> {
        let inbox = client.new_inbox();
        let answers = client.subscribe(inbox.clone()).await;
        let answers = answers.map_err(|error| unavailable("subscribing to an inbox".into(), error))?;
        Ok(Self { inbox, answers, asked: 0 })
    }

    /// Waits for the reply without a limit. Call it within [`Connection::ask`].
    pub(in crate::bus::nats) async fn round_trip(&mut self, client: &Client) -> Result<(), BusError> {
        self.asked += 1;
        let question = self.asked.to_string();
        client
            .publish(self.inbox.clone(), question.clone().into())
            .await
            .map_err(|error| unavailable("publishing to an inbox".into(), error))?;
        while let Some(answer) = self.answers.next().await {
            // Replies to earlier, cancelled round trips come first.
            if answer.payload == question {
                return Ok(());
            }
        }
        Err(silent("the connection to NATS was closed".into()))
    }
}

/// The subjects to which a session may publish, proved by receiving the first message to each.
///
/// The server answers a forbidden publish with an error that names a subject and no message. A
/// borrowed connection does not report it at all. Therefore the first message to a subject has to
/// return.
#[derive(Debug, Default)]
pub(in crate::bus::nats) struct PublishProof {
    session: u64,
    proved: HashSet<String>,
}

/// A message that has to return.
pub(in crate::bus::nats) struct Witness {
    subject: String,
    headers: HeaderMap,
    messages: Subscriber,
}

impl PublishProof {
    /// Clears the proofs of another session, which may have another server, login or permissions.
    pub(in crate::bus::nats) fn enter(&mut self, session: u64) {
        if self.session != session || self.proved.len() > PROVED {
            self.proved.clear();
            self.session = session;
        }
    }

    /// Subscribes to a message that is about to be sent, unless its subject is proved.
    pub(in crate::bus::nats) async fn listen(
        &self,
        client: &Client,
        message: &Outgoing,
    ) -> Result<Option<Witness>, BusError> {
        let Outgoing { subject, headers, .. } = message;
        if self.proved.contains(subject) {
            return Ok(None);
        }
        let failed = |error| unavailable(format!("subscribing to {subject}"), error);
        let mut messages = client.subscribe(subject.clone()).await.map_err(failed)?;
        // One message suffices. More would count as an overflow without a reader.
        let limited = messages.unsubscribe_after(1).await;
        limited.map_err(|error| unavailable(format!("subscribing to {subject}"), error))?;
        Ok(Some(Witness { subject: subject.clone(), headers: headers.clone(), messages }))
    }

    /// Returns the subject if its message did not return. Call it after an echo.
    pub(in crate::bus::nats) fn check(&mut self, mut witness: Witness) -> Option<String> {
        match unconstrained(witness.messages.next()).now_or_never().flatten() {
            Some(message) => {
                // A message of another publisher proves nothing: the next message has to return,
                // too.
                if message.headers.as_ref() == Some(&witness.headers) {
                    self.proved.insert(witness.subject);
                }
                None
            }
            None => Some(witness.subject),
        }
    }
}
