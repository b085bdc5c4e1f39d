//! The publisher of the log stream.

mod claim;
mod sending;
mod turn;

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use async_nats::jetstream::Context;
use async_nats::jetstream::context::ContextBuilder;
use async_nats::jetstream::stream::{LastRawMessageErrorKind, Stream};
use futures_util::{StreamExt, TryStreamExt, stream};
use uuid::Uuid;

use self::claim::{read_claim, stream_of};
use self::sending::Sending;
use self::turn::{Turn, Unread};
use super::super::connection::Connection;
use super::super::errors::{incompatible, silent, unavailable};
use super::super::subjects::Names;
use super::super::wakeup::Hints;
use super::super::wire::{Outgoing, Wire};
use super::options::JetStreamOptions;
use super::rights::stream_rights;
use super::stream::{Content, ensure, info, is_marked, other_store, refused};
use crate::bus::{BusError, BusPublisher, Claim, ClaimedEvent, LogBatch, LogStreamEnd, Resume};
use crate::event::Position;
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
    async fn locate_end(&self, known: LogStreamEnd) -> Result<Turn, BusError> {
        let session = self.connection.session();
        let client = &self.connection.client;
        let content = Content { subjects: self.wire.events(), store: Some(self.wire.store_id()) };
        let found = ensure(&self.jetstream, client, content, &self.name, &self.options).await?;
        let largest = usize::try_from(found.config.max_message_size).unwrap_or(usize::MAX);
        let last = found.state.last_sequence;
        let beginning = self.options.log_stream_after;
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

impl BusPublisher for LogPublisher {
    fn resume(&mut self, known: LogStreamEnd) -> BoxFuture<'_, Result<Resume, BusError>> {
        Box::pin(async move {
            (self.turn, self.confirmed) = (None, None);
            let (client, wire) = (&self.connection.client, &self.wire);
            self.hints = Some(self.connection.ask("subscribing to hints", Hints::new(client, wire)).await?);
            let (what, rights) = ("finding the end of the log stream", stream_rights(&self.name));
            let turn = self.connection.while_permitted(what, &rights, self.locate_end(known)).await?;
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
            let announce = async {
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
            self.connection.ask_permitted("announcing the end of the log", &subjects, announce).await?;
            self.turn = Some(turn);
            Ok(())
        })
    }
}
