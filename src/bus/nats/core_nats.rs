use std::sync::Arc;

use uuid::Uuid;

use super::connection::{Connection, Echo, unavailable};
use super::hints::Hints;
use super::subjects::Names;
use super::wire::{Outgoing, Wire};
use crate::bus::{BusError, BusPublisher, LogBatch, MirrorEnd, Resume};
use crate::event::Position;
use crate::future::BoxFuture;

/// Publishes to whoever listens. Each batch is confirmed by a round trip, so that a server that hangs is noticed; what a
/// server loses behind that, followers find out by themselves.
pub(super) struct CorePublisher {
    connection: Arc<Connection>,
    wire: Wire,
    echo: Echo,
    hints: Hints,
}

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
        Ok(Self { connection, wire, echo, hints })
    }

    async fn send(
        &mut self,
        what: &str,
        messages: impl Iterator<Item = Result<Outgoing, BusError>>,
    ) -> Result<(), BusError> {
        let client = &self.connection.client;
        let send = async {
            for message in messages {
                let Outgoing { subject, headers, body } = message?;
                let sent = client.publish_with_headers(subject, headers, body).await;
                sent.map_err(|error| unavailable("publishing".into(), error))?;
            }
            self.echo.round_trip(client).await
        };
        self.connection.ask(what, send).await
    }
}

impl BusPublisher for CorePublisher {
    fn resume(&mut self, _known: MirrorEnd) -> BoxFuture<'_, Result<Resume, BusError>> {
        Box::pin(async {
            // Not behind a server that hangs: what is skipped would count as published.
            let client = &self.connection.client;
            self.connection.ask("beginning to publish", self.echo.round_trip(client)).await?;
            Ok(Resume::AtFrontier)
        })
    }

    fn publish(&mut self, batch: LogBatch) -> BoxFuture<'_, Result<MirrorEnd, BusError>> {
        Box::pin(async move {
            let largest = self.connection.client.max_payload();
            let wire = self.wire.clone();
            let mut previous = batch.after;
            let messages = batch.events.iter().map(|event| {
                let previous = std::mem::replace(&mut previous, event.position);
                wire.event(event, previous, largest)
            });
            self.send("publishing events", messages).await?;
            // Nothing is kept, so nothing has a number.
            Ok(MirrorEnd { position: batch.upto, sequence: 0 })
        })
    }

    fn hinted(&mut self) -> BoxFuture<'_, ()> {
        Box::pin(self.hints.next())
    }

    fn heartbeat(&mut self, head: Position) -> BoxFuture<'_, Result<(), BusError>> {
        Box::pin(async move {
            let message = self.wire.heartbeat(head);
            self.send("announcing the end of the log", std::iter::once(Ok(message))).await
        })
    }
}
