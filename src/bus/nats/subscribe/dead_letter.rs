//! Dead letters: events that a handler has given up, kept for operators.

use async_nats::header::{HeaderValue, NATS_MESSAGE_ID};
use async_nats::jetstream::context::ContextBuilder;
use async_nats::jetstream::message::PublishMessage;

use super::super::errors::unavailable;
use super::super::nats_bus::NatsBus;
use super::super::wire::{Outgoing, Wire};
use super::delivery::Delivery;
use crate::bus::BusError;

/// Maximum length of the reason header, in characters.
const LONGEST_REASON: usize = 1_000;

/// An event that was given up, and the reason.
pub(super) struct DeadLetter<'a> {
    pub(super) delivery: &'a Delivery,
    pub(super) reason: String,
}

/// Publishes a dead letter to its stream, and waits for the confirmation of the server.
pub(super) async fn publish(bus: &NatsBus, letter: DeadLetter<'_>) -> Result<(), BusError> {
    let connection = bus.connection().await?;
    let (names, client) = (bus.names(), &connection.client);
    let (_, options) = bus.stream_of()?;
    options.provide_dead(&connection, names).await?;
    let Delivery { event, previous, store, .. } = letter.delivery;
    let Outgoing { mut headers, body, .. } =
        Wire::new(names, *store).event(event, *previous, client.max_payload())?;
    let consumer = letter.delivery.acker.as_ref().map_or("", |acker| acker.consumer());
    // Within the deduplication window, each consumer has at most one dead letter per event.
    headers.insert(NATS_MESSAGE_ID, format!("{consumer}/{}", event.id));
    headers.insert("Storied-Dead-Event", event.id.hyphenated().to_string());
    headers.insert("Storied-Dead-Consumer", consumer);
    headers.insert("Storied-Dead-Attempts", HeaderValue::from(letter.delivery.attempt));
    headers.insert("Storied-Dead-Reason", printable(&letter.reason));
    let subject = format!("{}.dead.{}", names.namespace(), event.name);
    let jetstream = ContextBuilder::new().timeout(connection.answer_timeout()).build(client.clone());
    let what = || format!("publishing a dead letter to {subject}");
    let posting = async {
        let message = PublishMessage::build().headers(headers).payload(body);
        let sent = jetstream.send_publish(subject.clone(), message).await;
        let ack = sent.map_err(|error| unavailable(what(), error))?;
        ack.await.map(drop).map_err(|error| unavailable(what(), error))
    };
    connection.while_permitted("publishing a dead letter", std::slice::from_ref(&subject), posting).await
}

/// Replaces characters that a header cannot carry.
fn printable(reason: &str) -> String {
    let plain = |character: char| if matches!(character, ' '..='~') { character } else { '?' };
    reason.chars().take(LONGEST_REASON).map(plain).collect()
}
