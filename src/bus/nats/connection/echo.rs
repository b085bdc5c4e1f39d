//! What proves that the server has what was sent: an echo, and the messages themselves.

use std::collections::HashSet;

use async_nats::{Client, HeaderMap, Subscriber};
use futures_util::{FutureExt, StreamExt};
use tokio::task::unconstrained;

use super::{silent, unavailable};
use crate::bus::BusError;
use crate::bus::nats::wire::Outgoing;

/// How many proved subjects are remembered; beyond that they are proved again.
const PROVED: usize = 10_000;

/// A question to ourselves, through the server: when its answer is here, the server has everything that we sent before.
/// Neither publishing nor flushing says so much: both only hand over to the socket.
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

    /// Waits for the answer, without a limit: within [`Connection::ask`].
    pub(in crate::bus::nats) async fn round_trip(&mut self, client: &Client) -> Result<(), BusError> {
        self.asked += 1;
        let question = self.asked.to_string();
        client
            .publish(self.inbox.clone(), question.clone().into())
            .await
            .map_err(|error| unavailable("publishing to an inbox".into(), error))?;
        while let Some(answer) = self.answers.next().await {
            // Those to earlier questions without a waiting caller come first.
            if answer.payload == question {
                return Ok(());
            }
        }
        Err(silent("the connection to NATS was closed".into()))
    }
}

/// The subjects to which a session may publish, as seen by receiving the first message to each.
///
/// The server answers a forbidden publish with an error that names a subject and no message, and a borrowed connection does
/// not report it at all. So the first message to a subject has to come back.
#[derive(Debug, Default)]
pub(in crate::bus::nats) struct PublishProof {
    session: u64,
    proved: HashSet<String>,
}

/// A message that has to come back.
pub(in crate::bus::nats) struct Witness {
    subject: String,
    headers: HeaderMap,
    messages: Subscriber,
}

impl PublishProof {
    /// Forgets what another session proved: another server, another login or other rights.
    pub(in crate::bus::nats) fn enter(&mut self, session: u64) {
        if self.session != session || self.proved.len() > PROVED {
            self.proved.clear();
            self.session = session;
        }
    }

    /// Listens for a message that is about to be sent, unless its subject is proved.
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
        // One is enough, and more would count as an overflow without a reader.
        let limited = messages.unsubscribe_after(1).await;
        limited.map_err(|error| unavailable(format!("subscribing to {subject}"), error))?;
        Ok(Some(Witness { subject: subject.clone(), headers: headers.clone(), messages }))
    }

    /// After an echo: the message is back, or is not going to be; then this is its subject.
    pub(in crate::bus::nats) fn check(&mut self, mut witness: Witness) -> Option<String> {
        match unconstrained(witness.messages.next()).now_or_never().flatten() {
            Some(message) => {
                // That of another publisher proves nothing: the next one has to come back.
                if message.headers.as_ref() == Some(&witness.headers) {
                    self.proved.insert(witness.subject);
                }
                None
            }
            None => Some(witness.subject),
        }
    }
}
