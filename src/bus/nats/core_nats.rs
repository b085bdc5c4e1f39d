use std::sync::Arc;

use async_nats::client::PublishErrorKind;
use uuid::Uuid;

use super::connection::{Connection, Echo, PublishProof};
use super::errors::unavailable;
use super::subjects::Names;
use super::wakeup::Hints;
use super::wire::{Outgoing, Wire};
use crate::bus::{BusError, BusPublisher, LogBatch, LogStreamEnd, Resume};
use crate::event::Position;
use crate::future::BoxFuture;

/// The publisher over NATS Core.
///
/// A round trip confirms each batch, so that a server that hangs is detected. Followers detect
/// messages that a server loses after that.
pub(super) struct CorePublisher {
    connection: Arc<Connection>,
    wire: Wire,
    echo: Echo,
    proof: PublishProof,
    hints: Hints,
}

/// The reason why a message was not sent, and no later one.
enum Stopped {
    /// The server refused its subject.
    Refused(usize, String),
    /// Its headers alone exceed the limit of the server.
    TooLarge(usize),
}

/// The error of a send, and the index of the first message that cannot be sent, if there is one.
type Unsent = (Option<usize>, BusError);

impl CorePublisher {
    pub(super) async fn new(
        connection: Arc<Connection>,
        names: &Names,
        store: Uuid,
    ) -> Result<Self, BusError> {
        let wire = Wire::new(names, store);
        let client = &connection.client;
        let opening = async { Ok((Hints::new(client, &wire).await?, Echo::new(client).await?)) };
        let (hints, echo) = connection.ask("opening a publisher", opening).await?;
        Ok(Self { connection, wire, echo, proof: PublishProof::default(), hints })
    }

    async fn send(
        &mut self,
        what: &str,
        messages: impl Iterator<Item = Result<Outgoing, BusError>>,
    ) -> Result<(), Unsent> {
        let (connection, client) = (&self.connection, &self.connection.client);
        let since = connection.errors();
        self.proof.enter(connection.session());
        let send = async {
            for (index, message) in messages.enumerate() {
                let message = message?;
                let witness = self.proof.listen(client, &message).await?;
                let Outgoing { subject, headers, body } = message;
                let sent = client.publish_with_headers(subject, headers, body).await;
                match sent {
                    Ok(()) => {}
                    Err(error) if error.kind() == PublishErrorKind::MaxPayloadExceeded => {
                        return Ok(Some(Stopped::TooLarge(index)));
                    }
                    Err(error) => return Err(unavailable("publishing".into(), error)),
                }
                let Some(witness) = witness else { continue };
                self.echo.round_trip(client).await?;
                // Nothing is sent after a refused message.
                if let Some(subject) = self.proof.check(witness) {
                    return Ok(Some(Stopped::Refused(index, subject)));
                }
            }
            self.echo.round_trip(client).await?;
            Ok(None)
        };
        match connection.ask(what, send).await {
            Ok(None) => Ok(()),
            Ok(Some(Stopped::Refused(index, subject))) => {
                Err((Some(index), connection.not_carried(what, since, subject).await))
            }
            Ok(Some(Stopped::TooLarge(index))) => {
                let reason = format!(
                    "the message limit of the NATS server ({} bytes) is too small for the headers of one event",
                    client.max_payload()
                );
                Err((Some(index), BusError::Incompatible { reason }))
            }
            Err(error) => Err((None, error)),
        }
    }
}

impl BusPublisher for CorePublisher {
    fn resume(&mut self, known: LogStreamEnd) -> BoxFuture<'_, Result<Resume, BusError>> {
        Box::pin(async move {
            // Requires a server that answers: skipped events would count as published.
            let client = &self.connection.client;
            self.connection.ask("beginning to publish", self.echo.round_trip(client)).await?;
            // Refused events count as published only if another node has published beyond them
            // since.
            match self.connection.refused_after().filter(|position| known.position <= *position) {
                Some(position) => Ok(Resume::After(LogStreamEnd { position, sequence: 0 })),
                None => Ok(Resume::AtHighWaterMark),
            }
        })
    }

    fn publish(&mut self, batch: LogBatch) -> BoxFuture<'_, Result<LogStreamEnd, BusError>> {
        Box::pin(async move {
            let largest = self.connection.client.max_payload();
            let wire = self.wire.clone();
            let mut previous = batch.after;
            let messages = batch.events.iter().map(|event| {
                let previous = std::mem::replace(&mut previous, event.position);
                wire.event(event, previous, largest)
            });
            if let Err((refused, error)) = self.send("publishing events", messages).await {
                if let Some(index) = refused {
                    let before = index.checked_sub(1).and_then(|before| batch.events.get(before));
                    let position = before.map_or(batch.after, |event| event.position);
                    self.connection.set_refused_after(Some(position));
                }
                return Err(error);
            }
            self.connection.set_refused_after(None);
            // Core keeps no messages, so there are no sequence numbers.
            Ok(LogStreamEnd { position: batch.upto, sequence: 0 })
        })
    }

    fn hinted(&mut self) -> BoxFuture<'_, ()> {
        Box::pin(self.hints.next())
    }

    fn heartbeat(&mut self, head: Position) -> BoxFuture<'_, Result<(), BusError>> {
        Box::pin(async move {
            let message = self.wire.heartbeat(head);
            let sent = self.send("announcing the end of the log", std::iter::once(Ok(message))).await;
            sent.map_err(|(_, error)| error)
        })
    }
}
