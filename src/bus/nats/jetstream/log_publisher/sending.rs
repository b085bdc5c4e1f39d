//! Publishes a batch: several events in flight, each after the message before it.

use std::collections::VecDeque;

use async_nats::header::{NATS_EXPECTED_LAST_MESSAGE_ID, NATS_EXPECTED_LAST_SEQUENCE, NATS_MESSAGE_ID};
use async_nats::jetstream::Context;
use async_nats::jetstream::context::{PublishAckFuture, PublishErrorKind};
use async_nats::jetstream::message::PublishMessage;
use uuid::Uuid;

use super::claim::{read_claim, stream_of};
use super::turn::Turn;
use crate::bus::nats::errors::{incompatible, silent, unavailable};
use crate::bus::nats::wire::{Outgoing, Wire};
use crate::bus::{BusError, ClaimedEvent, LogBatch, LogStreamEnd};
use crate::event::{Position, RecordedEvent};

/// A batch that is being published.
pub(super) struct Sending<'a> {
    pub(super) jetstream: &'a Context,
    pub(super) wire: &'a Wire,
    pub(super) stream: &'a str,
    pub(super) turn: &'a mut Turn,
    pub(super) largest: usize,
    /// Sent and unconfirmed events, in order.
    pub(super) window: VecDeque<InFlight>,
}

/// A sent and unconfirmed event.
pub(super) struct InFlight {
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
    pub(super) async fn publish(&mut self, batch: &LogBatch, window: usize) -> Result<(), BusError> {
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
