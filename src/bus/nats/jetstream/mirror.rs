use std::collections::VecDeque;
use std::sync::Arc;

use async_nats::header::NATS_EXPECTED_LAST_SEQUENCE;
use async_nats::jetstream::Context;
use async_nats::jetstream::context::{ContextBuilder, PublishAckFuture, PublishErrorKind};
use async_nats::jetstream::message::PublishMessage;
use async_nats::jetstream::stream::{LastRawMessageErrorKind, RawMessageErrorKind};
use uuid::Uuid;

use super::super::connection::{Connection, silent, unavailable};
use super::super::hints::Hints;
use super::super::subjects::Names;
use super::super::wire::{Outgoing, Reject, Wire};
use super::stream::{Content, ensure, incompatible, info, other_store, refused};
use super::{JetStreamOptions, MirrorFrom, stream_rights};
use crate::bus::{BusError, BusPublisher, LogBatch, MirrorEnd, Resume};
use crate::event::{Position, RecordedEvent};
use crate::future::BoxFuture;
use crate::telemetry::trace::Destination;

/// How many messages of others, behind the last one of ours, are looked past.
const STRANGERS: u64 = 256;

/// Publishes into the stream.
pub(in super::super) struct MirrorPublisher {
    connection: Arc<Connection>,
    jetstream: Context,
    wire: Wire,
    /// The stream's name.
    name: String,
    options: JetStreamOptions,
    hints: Option<Hints>,
    /// Of [`resume`](BusPublisher::resume), and everything behind it.
    turn: Option<Turn>,
}

/// What was found, and what became of it.
struct Turn {
    /// The session of the connection in which the mirror's end was looked up. Another one may have another server behind
    /// it, or the same one with less in it.
    session: u64,
    end: MirrorEnd,
    /// The last event that was there.
    last_event: Option<(Position, Uuid)>,
    /// The stream's own limit of a message, if it has one.
    largest: usize,
    /// The messages before the end are gone, and with them the knowledge whether the next events are among them: they go
    /// out one by one, until the server takes the first that it has not had.
    feeling: bool,
}

impl MirrorPublisher {
    pub(in super::super) fn new(
        connection: Arc<Connection>,
        names: &Names,
        store: Uuid,
        options: JetStreamOptions,
    ) -> Self {
        let jetstream = ContextBuilder::new()
            .timeout(connection.answer_timeout())
            .max_ack_inflight(options.window)
            .build(connection.client.clone());
        let (wire, name) = (Wire::new(names, store), options.name(names.namespace()));
        Self { connection, jetstream, wire, name, options, hints: None, turn: None }
    }

    /// Finds the mirror's end.
    async fn look(&self, known: MirrorEnd) -> Result<Turn, BusError> {
        let session = self.connection.session();
        let client = &self.connection.client;
        let content = Content { subjects: self.wire.events(), store: Some(self.wire.store_id()) };
        let found = ensure(&self.jetstream, client, content, &self.name, &self.options).await?;
        let largest = usize::try_from(found.config.max_message_size).unwrap_or(usize::MAX);
        let last = found.state.last_sequence;
        let beginning = match self.options.mirror_from {
            MirrorFrom::Beginning => Position::START,
            MirrorFrom::After(position) => position,
        };
        if last == 0 {
            tracing::info!(stream = self.name, after = %beginning, "the mirror of the log is new and is filled");
            let end = MirrorEnd { position: beginning, sequence: 0 };
            return Ok(Turn { session, end, last_event: None, largest, feeling: false });
        }
        let (kept, event) = self.last_kept().await?.unzip();
        let kept: Option<MirrorEnd> = kept;
        // Whoever published meanwhile makes the end later than the one that was asked for first.
        let sequence = kept.map_or(last, |kept| kept.sequence.max(last));
        // A number from another life of the stream may be too high; one that was never noted is 0.
        let known = Some(known).filter(|known| (1..=sequence).contains(&known.sequence));
        let end = kept.into_iter().chain(known).max_by_key(|end| end.sequence).unwrap_or_else(|| {
            tracing::warn!(stream = self.name, after = %beginning, "the mirror of the log was emptied and is filled again");
            MirrorEnd { position: beginning, sequence: 0 }
        });
        let feeling = end.sequence < sequence;
        let last_event = kept.zip(event).map(|(kept, event)| (kept.position, event));
        let end = MirrorEnd { position: end.position, sequence };
        Ok(Turn { session, end, last_event, largest, feeling })
    }

    /// The last message of ours that is still there.
    async fn last_kept(&self) -> Result<Option<(MirrorEnd, Uuid)>, BusError> {
        let what = || format!("reading the end of the stream {}", self.name);
        let stream = self.jetstream.get_stream_no_info(&self.name).await;
        let stream = stream.map_err(|error| unavailable(what(), error))?;
        // Nothing else is in the stream.
        let subject = match self.wire.events() {
            [subject] => subject,
            _ => ">",
        };
        let mut message = match stream.get_last_raw_message_by_subject(subject).await {
            Ok(message) => Some(message),
            Err(error) => match error.kind() {
                LastRawMessageErrorKind::NoMessageFound => return Ok(None),
                LastRawMessageErrorKind::JetStream(error) => return Err(refused(&what(), error)),
                _ => return Err(unavailable(what(), error)),
            },
        };
        let newest = message.as_ref().map_or(0, |message| message.sequence);
        let mut sequence = newest;
        loop {
            if let Some(message) = message {
                match self.wire.read_place(&message.headers) {
                    // Behind messages of others our last one is not the stream's last.
                    Ok((position, event)) => {
                        return Ok(Some((MirrorEnd { position, sequence: newest }, event)));
                    }
                    Err(Reject::OtherStore(store)) => {
                        return Err(other_store(&self.name, &store, &self.wire.store_id().to_string()));
                    }
                    Err(Reject::Malformed(what)) => {
                        let (subject, stream) = (message.subject.as_str(), self.name.as_str());
                        tracing::warn!(
                            stream,
                            sequence,
                            subject,
                            what,
                            "the mirror has a message of somebody else"
                        );
                    }
                }
            }
            sequence -= 1;
            if sequence == 0 {
                return Ok(None);
            }
            if newest - sequence > STRANGERS {
                return Err(incompatible(format!(
                    "the last {STRANGERS} messages of the stream {} are not storied's: somebody else publishes to {:?}; stop \
                     that, and delete the stream, which is then made anew",
                    self.name,
                    self.wire.events(),
                )));
            }
            message = match stream.get_raw_message(sequence).await {
                Ok(message) => Some(message),
                Err(error) => match error.kind() {
                    RawMessageErrorKind::NoMessageFound => None,
                    RawMessageErrorKind::JetStream(error) => return Err(refused(&what(), error)),
                    _ => return Err(unavailable(what(), error)),
                },
            };
        }
    }
}

/// One batch on its way.
struct Sending<'a> {
    jetstream: &'a Context,
    wire: &'a Wire,
    stream: &'a str,
    turn: &'a mut Turn,
    largest: usize,
    /// Sent and not confirmed, in order.
    window: VecDeque<(MirrorEnd, PublishAckFuture)>,
}

impl Sending<'_> {
    async fn publish(&mut self, batch: &LogBatch, window: usize) -> Result<(), BusError> {
        let mut previous = batch.after;
        // Where the mirror ends when everything sent is confirmed.
        let mut sequence = self.turn.end.sequence;
        for event in batch.events.iter() {
            if self.turn.feeling {
                self.feel(event, previous).await?;
                sequence = self.turn.end.sequence;
            } else {
                if self.window.len() >= window {
                    self.confirm_oldest().await?;
                }
                let end = MirrorEnd { position: event.position, sequence: sequence + 1 };
                let ack = self.send(event, previous, sequence).await?;
                self.window.push_back((end, ack));
                sequence += 1;
            }
            previous = event.position;
        }
        while !self.window.is_empty() {
            self.confirm_oldest().await?;
        }
        Ok(())
    }

    async fn send(
        &self,
        event: &RecordedEvent,
        previous: Position,
        sequence: u64,
    ) -> Result<PublishAckFuture, BusError> {
        let Outgoing { subject, mut headers, body } = self.wire.event(event, previous, self.largest)?;
        headers.insert(NATS_EXPECTED_LAST_SEQUENCE, sequence.to_string());
        let message = PublishMessage::build().headers(headers).payload(body);
        let sent = self.jetstream.send_publish(subject, message).await;
        sent.map_err(|error| match error.kind() {
            PublishErrorKind::MaxPayloadExceeded => incompatible(format!(
                "the NATS server takes messages of {} bytes at most, which is too little for the headers of one event",
                self.largest
            )),
            _ => unavailable(format!("publishing to the stream {}", self.stream), error),
        })
    }

    /// What became of the oldest message under way. Those behind it are not waited for when it was refused.
    async fn confirm_oldest(&mut self) -> Result<(), BusError> {
        let Some((end, ack)) = self.window.pop_front() else { return Ok(()) };
        let sequence = self.ack(ack).await?.0;
        if sequence != end.sequence {
            return Err(self.fenced(format!(
                "position {} is its message {sequence} already, and should have become {}",
                end.position, end.sequence
            )));
        }
        self.turn.end = end;
        Ok(())
    }

    /// Publishes one event that may have been in the stream before the stream lost it.
    async fn feel(&mut self, event: &RecordedEvent, previous: Position) -> Result<(), BusError> {
        let last = self.turn.end.sequence;
        let ack = self.send(event, previous, last).await?;
        let (sequence, duplicate) = self.ack(ack).await?;
        if sequence == last + 1 {
            self.turn.feeling = false;
        } else if !duplicate || sequence > last {
            return Err(self.fenced(format!("the server made it message {sequence}, not {}", last + 1)));
        }
        self.turn.end = MirrorEnd { position: event.position, sequence: sequence.max(last) };
        Ok(())
    }

    /// The number that the server gave a message, and whether it had it before.
    async fn ack(&self, ack: PublishAckFuture) -> Result<(u64, bool), BusError> {
        let stream = self.stream;
        match ack.await {
            Ok(ack) => Ok((ack.sequence, ack.duplicate)),
            Err(error) => Err(match error.kind() {
                PublishErrorKind::WrongLastSequence => self.fenced(error.to_string()),
                PublishErrorKind::StreamNotFound => {
                    silent(format!("the stream {stream} is gone, or JetStream is"))
                }
                PublishErrorKind::TimedOut => {
                    unavailable(format!("no confirmation from the stream {stream}"), error)
                }
                _ => unavailable(format!("the stream {stream} did not take an event"), error),
            }),
        }
    }

    fn fenced(&self, what: String) -> BusError {
        let (stream, sequence) = (self.stream, self.turn.end.sequence);
        BusError::Fenced { reason: format!("the stream {stream} does not end at message {sequence}: {what}") }
    }
}

impl BusPublisher for MirrorPublisher {
    fn resume(&mut self, known: MirrorEnd) -> BoxFuture<'_, Result<Resume, BusError>> {
        Box::pin(async move {
            self.turn = None;
            let (client, wire) = (&self.connection.client, &self.wire);
            self.hints = Some(self.connection.ask("listening for hints", Hints::new(client, wire)).await?);
            let (what, rights) = ("looking for the end of the mirror", stream_rights(&self.name));
            let turn = self.connection.while_permitted(what, &rights, self.look(known)).await?;
            let end = turn.end;
            self.turn = Some(turn);
            Ok(Resume::After(end))
        })
    }

    fn last_event(&self) -> Option<(Position, Uuid)> {
        self.turn.as_ref()?.last_event
    }

    fn publish(&mut self, batch: LogBatch) -> BoxFuture<'_, Result<MirrorEnd, BusError>> {
        Box::pin(async move {
            // Taken: whoever drops this future half-way has to resume again.
            let mut turn = self.turn.take().ok_or_else(|| silent("the mirror's end is not known".into()))?;
            self.connection.check_session(turn.session)?;
            let mut sending = Sending {
                jetstream: &self.jetstream,
                wire: &self.wire,
                stream: &self.name,
                largest: self.connection.client.max_payload().min(turn.largest),
                turn: &mut turn,
                window: VecDeque::new(),
            };
            let publishing = sending.publish(&batch, self.options.window);
            let subjects = self.wire.events();
            self.connection.while_permitted("publishing events", subjects, publishing).await?;
            let end = turn.end;
            self.turn = Some(turn);
            Ok(end)
        })
    }

    fn hinted(&mut self) -> BoxFuture<'_, ()> {
        match &mut self.hints {
            Some(hints) => Box::pin(hints.next()),
            None => Box::pin(std::future::pending()),
        }
    }

    fn heartbeat(&mut self, head: Position) -> BoxFuture<'_, Result<(), BusError>> {
        Box::pin(async move {
            let turn = self.turn.take().ok_or_else(|| silent("the mirror's end is not known".into()))?;
            self.connection.check_session(turn.session)?;
            let client = &self.connection.client;
            let look = async {
                let found = info(&self.jetstream, client, &self.name).await?;
                if let Some(found) = &found {
                    let stream = Destination { system: "nats", name: &self.name };
                    let metrics = self.connection.metrics();
                    metrics.mirror(stream, found.state.messages, found.state.bytes);
                }
                let last = found.map(|found| found.state.last_sequence);
                if last != Some(turn.end.sequence) {
                    let reason = format!(
                        "the stream {} ended at message {} and now at {last:?}",
                        self.name, turn.end.sequence
                    );
                    return Err(BusError::Fenced { reason });
                }
                let Outgoing { subject, headers, body } = self.wire.heartbeat(head);
                let sent = client.publish_with_headers(subject, headers, body).await;
                sent.map_err(|error| unavailable("announcing the end of the log".into(), error))
            };
            let subjects = [&stream_rights(&self.name)[..], &[self.wire.head().to_owned()]].concat();
            self.connection.ask_permitted("announcing the end of the log", &subjects, look).await?;
            self.turn = Some(turn);
            Ok(())
        })
    }
}
