use std::collections::VecDeque;
use std::error::Error;
use std::ops::Range;
use std::sync::Arc;

use async_nats::header::{NATS_EXPECTED_LAST_MESSAGE_ID, NATS_EXPECTED_LAST_SEQUENCE, NATS_MESSAGE_ID};
use async_nats::jetstream::Context;
use async_nats::jetstream::context::{ContextBuilder, PublishAckFuture, PublishErrorKind, RequestError};
use async_nats::jetstream::message::{PublishMessage, StreamMessage};
use async_nats::jetstream::stream::{LastRawMessageErrorKind, RawMessageError, Stream};
use futures_util::{StreamExt, TryStreamExt, stream};
use uuid::Uuid;

use super::super::connection::{Connection, silent, unavailable};
use super::super::subjects::Names;
use super::super::wakeup::Hints;
use super::super::wire::{Outgoing, Reject, Wire};
use super::stream::{Content, ensure, incompatible, info, is_marked, other_store, refused};
use super::{JetStreamOptions, LogStreamFrom, stream_rights};
use crate::bus::{BusError, BusPublisher, Claim, ClaimedEvent, LogBatch, LogStreamEnd, Resume};
use crate::event::{Position, RecordedEvent};
use crate::future::BoxFuture;
use crate::telemetry::trace::Destination;

/// Number of last messages that are read if no checkpoint states the end, and page size of claims.
const PAGE: u64 = 256;

/// Number of concurrent message reads.
const READS: usize = 64;

/// The publisher of the log stream.
pub(in super::super) struct LogPublisher {
    connection: Arc<Connection>,
    jetstream: Context,
    wire: Wire,
    /// Name of the stream.
    name: String,
    options: JetStreamOptions,
    hints: Option<Hints>,
    /// State since [`resume`](BusPublisher::resume).
    turn: Option<Turn>,
    /// End of the log stream that the server has confirmed.
    confirmed: Option<LogStreamEnd>,
}

/// State of one publisher term: the end found, and the progress since.
struct Turn {
    /// Connection session in which the end was read.
    /// Another session may reach another server, or a server that has lost messages.
    session: u64,
    end: LogStreamEnd,
    /// Messages that the log has to confirm.
    unread: Unread,
    /// Message size limit of the stream, if it has one.
    largest: usize,
    /// Whether the publisher is probing.
    /// The messages before the end are gone, so the next events may have been among them.
    /// They are published one by one until the server stores the first new event.
    probing: bool,
}

/// Messages after the one of the checkpoint, or the last messages.
struct Unread {
    /// Messages already read.
    read: Vec<Claim>,
    /// Sequence number of the first message that the stream keeps.
    first: u64,
    /// Sequence numbers of the messages to read.
    sequences: Range<u64>,
}

impl Unread {
    fn none() -> Self {
        Self { read: Vec::new(), first: 1, sequences: 0..0 }
    }
}

impl LogPublisher {
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
        Self { connection, jetstream, wire, name, options, hints: None, turn: None, confirmed: None }
    }

    /// Finds the end of the log stream.
    async fn look(&self, known: LogStreamEnd) -> Result<Turn, BusError> {
        let session = self.connection.session();
        let client = &self.connection.client;
        let content = Content { subjects: self.wire.events(), store: Some(self.wire.store_id()) };
        let found = ensure(&self.jetstream, client, content, &self.name, &self.options).await?;
        let largest = usize::try_from(found.config.max_message_size).unwrap_or(usize::MAX);
        let last = found.state.last_sequence;
        let beginning = match self.options.log_stream_from {
            LogStreamFrom::Beginning => Position::START,
            LogStreamFrom::After(position) => position,
        };
        if last == 0 {
            tracing::info!(stream = self.name, after = %beginning, "filling the new log stream");
            let end = LogStreamEnd { position: beginning, sequence: 0 };
            let unread = Unread::none();
            return Ok(Turn { session, end, unread, largest, probing: false });
        }
        let first = found.state.first_sequence;
        // The number may exceed the last one if the stream was recreated since. A number that was
        // never saved is 0.
        if (1..=last).contains(&known.sequence) {
            let end = LogStreamEnd { position: known.position, sequence: last };
            let unread = Unread { read: Vec::new(), first, sequences: known.sequence..last + 1 };
            return Ok(Turn { session, end, unread, largest, probing: known.sequence < last });
        }
        let newest = self.newest().await?;
        let from = newest.saturating_sub(PAGE - 1).max(first);
        let (mut read, mut other) = (Vec::new(), None);
        let ours_alone = is_marked(&found.config, self.wire.store_id());
        for (claim, store) in self.read(first, from..newest + 1).await? {
            read.push(claim);
            other = store.or(other);
        }
        let ours = read.iter().rev().find_map(|claim| match claim.event {
            ClaimedEvent::Event { position, .. } => Some(position),
            _ => None,
        });
        let foreign = read.iter().any(|claim| claim.event == ClaimedEvent::Foreign);
        let position = match (ours, other) {
            (Some(position), _) => position,
            (None, Some(store)) if !ours_alone => {
                return Err(other_store(&self.name, &store, &self.wire.store_id().to_string()));
            }
            (None, _) if from > first && foreign => {
                return Err(incompatible(format!(
                    "the last {PAGE} messages of the stream {} are no events of storied, and no \
                     checkpoint states the end of the log: another program publishes to {:?}; stop \
                     that program and delete the stream, which is then recreated",
                    self.name,
                    self.wire.events(),
                )));
            }
            (None, _) => {
                tracing::warn!(stream = self.name, after = %beginning, "refilling the emptied log stream");
                beginning
            }
        };
        let sequence = newest.max(last);
        let end = LogStreamEnd { position, sequence };
        let probing = ours.is_none() || newest < sequence;
        read.extend(
            (newest + 1..=sequence).take(1).map(|sequence| Claim { sequence, event: ClaimedEvent::Missing }),
        );
        let unread = Unread { read, ..Unread::none() };
        Ok(Turn { session, end, unread, largest, probing })
    }

    /// The sequence number of the last message that the stream keeps; 0 if it keeps none.
    async fn newest(&self) -> Result<u64, BusError> {
        let what = || format!("reading the end of the stream {}", self.name);
        // The stream has no other subjects.
        let subject = match self.wire.events() {
            [subject] => subject,
            _ => ">",
        };
        match self.stream().await?.get_last_raw_message_by_subject(subject).await {
            Ok(message) => Ok(message.sequence),
            Err(error) => match error.kind() {
                LastRawMessageErrorKind::NoMessageFound => Ok(0),
                LastRawMessageErrorKind::JetStream(error) => Err(refused(&what(), error)),
                _ => Err(unavailable(what(), error)),
            },
        }
    }

    async fn stream(&self) -> Result<Stream<()>, BusError> {
        stream_of(&self.jetstream, &self.name).await
    }

    /// Reads messages, with the other store that they name. Messages before `first` are gone.
    async fn read(
        &self,
        first: u64,
        sequences: Range<u64>,
    ) -> Result<Vec<(Claim, Option<String>)>, BusError> {
        let stream = self.stream().await?;
        let read = |sequence| {
            let (stream, wire, name) = (&stream, &self.wire, &self.name);
            async move {
                if sequence < first {
                    return Ok((Claim { sequence, event: ClaimedEvent::Missing }, None));
                }
                let (event, other) = read_claim(stream, wire, name, sequence).await?;
                Ok((Claim { sequence, event }, other))
            }
        };
        stream::iter(sequences).map(read).buffered(READS).try_collect().await
    }
}

async fn stream_of(jetstream: &Context, name: &str) -> Result<Stream<()>, BusError> {
    let stream = jetstream.get_stream_no_info(name).await;
    stream.map_err(|error| unavailable(format!("reading the stream {name}"), error))
}

/// Reads the event that a message claims to be, and the other store that it names.
async fn read_claim(
    stream: &Stream<()>,
    wire: &Wire,
    name: &str,
    sequence: u64,
) -> Result<(ClaimedEvent, Option<String>), BusError> {
    let message: Result<StreamMessage, RawMessageError> = stream.get_raw_message(sequence).await;
    let reject = match message {
        Ok(message) => match wire.read_claim(&message.headers) {
            Ok(event) => return Ok((event, None)),
            Err(reject) => reject,
        },
        Err(error) => {
            let what = || format!("reading message {sequence} of the stream {name}");
            match error.kind() {
                LastRawMessageErrorKind::NoMessageFound => return Ok((ClaimedEvent::Missing, None)),
                LastRawMessageErrorKind::JetStream(error) => return Err(refused(&what(), error)),
                _ if error.source().is_none_or(|source| source.is::<RequestError>()) => {
                    return Err(unavailable(what(), error));
                }
                // The answer has an unreadable message, which cannot be of storied.
                _ => Reject::Malformed(error.to_string()),
            }
        }
    };
    tracing::debug!(
        stream = name,
        sequence,
        ?reject,
        "found a message in the log stream that is no event of this log"
    );
    match reject {
        Reject::OtherStore(store) => Ok((ClaimedEvent::Foreign, Some(store))),
        Reject::Malformed(_) => Ok((ClaimedEvent::Foreign, None)),
    }
}

/// A batch that is being published.
struct Sending<'a> {
    jetstream: &'a Context,
    wire: &'a Wire,
    stream: &'a str,
    turn: &'a mut Turn,
    largest: usize,
    /// Sent and unconfirmed events, in order.
    window: VecDeque<InFlight>,
}

/// A sent and unconfirmed event.
struct InFlight {
    /// Index of the event in the batch.
    index: usize,
    /// Message id of the event.
    id: Uuid,
    /// End of the log stream once the event is confirmed.
    end: LogStreamEnd,
    ack: PublishAckFuture,
}

/// The message id of an event.
#[derive(Clone, Copy, PartialEq, Eq)]
enum MessageId {
    /// The id of the event.
    Own,
    /// The id of the event and its position, if the server has the id already.
    AtPosition,
}

impl Sending<'_> {
    async fn publish(&mut self, batch: &LogBatch, window: usize) -> Result<(), BusError> {
        let mut next = 0;
        // End of the log stream once everything sent is confirmed.
        let mut sequence = self.turn.end.sequence;
        loop {
            let event = batch.events.get(next);
            if let Some(event) = event.filter(|_| self.turn.probing) {
                self.probe(event, previous(batch, next)).await?;
                sequence = self.turn.end.sequence;
                next += 1;
            } else if let Some(event) = event.filter(|_| self.window.len() < window) {
                let ack = self.send(event, previous(batch, next), sequence, MessageId::Own).await?;
                sequence += 1;
                let end = LogStreamEnd { position: event.position, sequence };
                self.window.push_back(InFlight { index: next, id: event.id, end, ack });
                next += 1;
            } else if let Some(oldest) = self.window.pop_front() {
                if let Some(repeated) = self.confirm_oldest(oldest).await? {
                    self.drain().await?;
                    self.repeat(batch, repeated).await?;
                    sequence = self.turn.end.sequence;
                    next = repeated + 1;
                }
            } else {
                return Ok(());
            }
        }
    }

    async fn send(
        &self,
        event: &RecordedEvent,
        previous: Position,
        sequence: u64,
        id: MessageId,
    ) -> Result<PublishAckFuture, BusError> {
        let Outgoing { subject, mut headers, body } = self.wire.event(event, previous, self.largest)?;
        headers.insert(NATS_EXPECTED_LAST_SEQUENCE, sequence.to_string());
        if id == MessageId::AtPosition {
            headers.insert(NATS_MESSAGE_ID, Wire::message_id_at_position(event));
        }
        // I5: between this message and the one in flight before it, a message of another program
        // can take the latter's number. The server then refuses both. Without the id of the latter,
        // the server would store this message without it.
        if let Some(InFlight { id, .. }) = self.window.back() {
            headers.insert(NATS_EXPECTED_LAST_MESSAGE_ID, id.hyphenated().to_string());
        }
        let message = PublishMessage::build().headers(headers).payload(body);
        let sent = self.jetstream.send_publish(subject, message).await;
        sent.map_err(|error| match error.kind() {
            PublishErrorKind::MaxPayloadExceeded => incompatible(format!(
                "the message limit of the NATS server ({} bytes) is too small for the headers of \
                 one event",
                self.largest
            )),
            _ => unavailable(format!("publishing to the stream {}", self.stream), error),
        })
    }

    /// Waits for the server's answer to the oldest message in flight.
    /// Returns its index if the server took it for a duplicate of a message before the end.
    async fn confirm_oldest(&mut self, oldest: InFlight) -> Result<Option<usize>, BusError> {
        let InFlight { index, end, ack, .. } = oldest;
        let (sequence, duplicate) = self.ack(ack).await?;
        if sequence == end.sequence {
            self.turn.end = end;
            return Ok(None);
        }
        // I5: the log stream has all events up to its end, and this event is later. The log has the
        // id twice, or another program published the event before its turn.
        if duplicate && sequence <= self.turn.end.sequence {
            return Ok(Some(index));
        }
        Err(self.fenced(format!(
            "position {} is already message {sequence}, expected {}",
            end.position, end.sequence
        )))
    }

    /// Whether the stream keeps a message.
    async fn keeps(&self, sequence: u64) -> Result<bool, BusError> {
        let stream = stream_of(self.jetstream, self.stream).await?;
        let (event, _) = read_claim(&stream, self.wire, self.stream, sequence).await?;
        Ok(event != ClaimedEvent::Missing)
    }

    /// Waits for all answers in flight after a message was not stored.
    /// The server refuses these messages.
    async fn drain(&mut self) -> Result<(), BusError> {
        while let Some(InFlight { end, ack, .. }) = self.window.pop_front() {
            match self.ack(ack).await {
                Ok((_, true)) | Err(BusError::Fenced { .. }) => {}
                Ok((sequence, false)) => {
                    return Err(self.fenced(format!("position {} became message {sequence}", end.position)));
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Publishes an event under its id and position, because the server has the id already.
    async fn repeat(&mut self, batch: &LogBatch, index: usize) -> Result<(), BusError> {
        let Some(event) = batch.events.get(index) else { return Ok(()) };
        let end = LogStreamEnd { position: event.position, sequence: self.turn.end.sequence + 1 };
        let (position, id) = (event.position, event.id);
        tracing::info!(%position, %id, "publishing an event under another message id: its id is taken");
        let previous = previous(batch, index);
        let ack = self.send(event, previous, self.turn.end.sequence, MessageId::AtPosition).await?;
        let (sequence, _) = self.ack(ack).await?;
        if sequence != end.sequence {
            return Err(
                self.fenced(format!("the event became message {sequence}, expected {}", end.sequence))
            );
        }
        self.turn.end = end;
        Ok(())
    }

    /// Probes with one event that the stream may have had before it lost messages.
    async fn probe(&mut self, event: &RecordedEvent, previous: Position) -> Result<(), BusError> {
        let last = self.turn.end.sequence;
        let ack = self.send(event, previous, last, MessageId::Own).await?;
        let (mut sequence, mut duplicate) = self.ack(ack).await?;
        // The kept messages were compared with the log. Only a lost message may have been this
        // event.
        if duplicate && sequence <= last && self.keeps(sequence).await? {
            let ack = self.send(event, previous, last, MessageId::AtPosition).await?;
            (sequence, duplicate) = self.ack(ack).await?;
        }
        if sequence == last + 1 {
            self.turn.probing = false;
        } else if !duplicate || sequence > last {
            return Err(self.fenced(format!("the event became message {sequence}, expected {}", last + 1)));
        }
        self.turn.end = LogStreamEnd { position: event.position, sequence: sequence.max(last) };
        Ok(())
    }

    /// Returns the message's sequence number, and whether the message is a duplicate.
    async fn ack(&self, ack: PublishAckFuture) -> Result<(u64, bool), BusError> {
        let stream = self.stream;
        match ack.await {
            Ok(ack) => Ok((ack.sequence, ack.duplicate)),
            Err(error) => Err(match error.kind() {
                PublishErrorKind::WrongLastSequence | PublishErrorKind::WrongLastMessageId => {
                    self.fenced(error.to_string())
                }
                PublishErrorKind::StreamNotFound => {
                    silent(format!("the stream {stream} or JetStream is gone"))
                }
                PublishErrorKind::TimedOut => {
                    unavailable(format!("no confirmation from the stream {stream}"), error)
                }
                _ => unavailable(format!("the stream {stream} did not store an event"), error),
            }),
        }
    }

    fn fenced(&self, what: String) -> BusError {
        let (stream, sequence) = (self.stream, self.turn.end.sequence);
        BusError::Fenced { reason: format!("the stream {stream} does not end at message {sequence}: {what}") }
    }
}

/// The position before an event of the batch.
fn previous(batch: &LogBatch, index: usize) -> Position {
    let before = index.checked_sub(1).and_then(|before| batch.events.get(before));
    before.map_or(batch.after, |event| event.position)
}

impl BusPublisher for LogPublisher {
    fn resume(&mut self, known: LogStreamEnd) -> BoxFuture<'_, Result<Resume, BusError>> {
        Box::pin(async move {
            (self.turn, self.confirmed) = (None, None);
            let (client, wire) = (&self.connection.client, &self.wire);
            self.hints = Some(self.connection.ask("subscribing to hints", Hints::new(client, wire)).await?);
            let (what, rights) = ("finding the end of the log stream", stream_rights(&self.name));
            let turn = self.connection.while_permitted(what, &rights, self.look(known)).await?;
            let end = turn.end;
            self.turn = Some(turn);
            Ok(Resume::After(end))
        })
    }

    fn claims(&mut self) -> BoxFuture<'_, Result<Vec<Claim>, BusError>> {
        Box::pin(async move {
            let Some(turn) = &mut self.turn else {
                return Err(silent("the end of the log stream is unknown".into()));
            };
            self.connection.check_session(turn.session)?;
            let Unread { read, first, sequences } = &mut turn.unread;
            if !read.is_empty() || sequences.is_empty() {
                return Ok(std::mem::take(read));
            }
            let (first, from, end) = (*first, sequences.start, sequences.end);
            let upto = end.min(from.saturating_add(PAGE));
            let (what, rights) = ("reading the end of the log stream", stream_rights(&self.name));
            let claims = self.connection.while_permitted(what, &rights, self.read(first, from..upto)).await?;
            if let Some(turn) = &mut self.turn {
                turn.unread.sequences = upto..end;
            }
            Ok(claims.into_iter().map(|(claim, _)| claim).collect())
        })
    }

    fn confirm(&mut self, position: Position, is_exact: bool) {
        if let Some(turn) = &mut self.turn {
            turn.end.position = position;
            turn.probing = !is_exact;
            turn.unread = Unread::none();
            self.confirmed = Some(turn.end);
        }
    }

    fn confirmed(&self) -> Option<LogStreamEnd> {
        self.confirmed
    }

    fn publish(&mut self, batch: LogBatch) -> BoxFuture<'_, Result<LogStreamEnd, BusError>> {
        Box::pin(async move {
            // Taken: a caller that drops this future early has to resume again.
            let mut turn =
                self.turn.take().ok_or_else(|| silent("the end of the log stream is unknown".into()))?;
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
            let published = self.connection.while_permitted("publishing events", subjects, publishing).await;
            let end = turn.end;
            self.confirmed = Some(end);
            published?;
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
            let turn =
                self.turn.take().ok_or_else(|| silent("the end of the log stream is unknown".into()))?;
            self.connection.check_session(turn.session)?;
            let client = &self.connection.client;
            let look = async {
                let found = info(&self.jetstream, client, &self.name).await?;
                if let Some(found) = &found {
                    let stream = Destination { system: "nats", name: &self.name };
                    let metrics = self.connection.metrics();
                    metrics.log_stream(stream, found.state.messages, found.state.bytes);
                }
                let last = found.map(|found| found.state.last_sequence);
                if last != Some(turn.end.sequence) {
                    let reason = format!(
                        "the stream {} ended at message {}, and now ends at {last:?}",
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
