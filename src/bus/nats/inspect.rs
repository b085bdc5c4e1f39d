//! Read-only inspection of the server.
//!
//! Compares the streams and consumers with what this bus expects, and reads the log stream message
//! by message.

use std::fmt;
use std::sync::Arc;

use async_nats::Message;
use async_nats::jetstream::Context;
use async_nats::jetstream::consumer::Info as ConsumerInfo;
use async_nats::jetstream::context::ContextBuilder;
use async_nats::jetstream::stream::{RawMessageErrorKind, Stream};
use futures_util::StreamExt;
use futures_util::stream::FuturesOrdered;
use serde::Deserialize;
use uuid::Uuid;

use super::connection::Connection;
use super::consumer_name;
use super::durable_consumer::follower_spec;
use super::errors::unavailable;
use super::jetstream::{Field, compared_consumer, compared_stream, stream_api, stream_info, stream_rights};
use super::nats_bus::NatsBus;
use super::wire::{Incoming, Reject, Wire};
use crate::bus::BusError;
use crate::event::{Position, RecordedEvent};
use crate::future::BoxFuture;

/// Number of concurrent message reads.
const WINDOW: usize = 64;

/// The result of [`NatsBus::inspect`].
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct NatsReport {
    /// Version of the server.
    pub version: String,
    /// The log stream and the stream of dead letters.
    pub streams: Vec<StreamReport>,
    /// Consumers of the log stream, by name.
    pub consumers: Vec<ConsumerReport>,
}

/// A stream that this bus uses.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct StreamReport {
    /// Name of the stream.
    pub name: String,
    /// Whether the stream must exist. The first handler with dead letters creates their stream.
    pub required: bool,
    /// State of the stream; `None` if it does not exist.
    pub found: Option<StreamFound>,
}

/// The state of an existing stream.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct StreamFound {
    /// The compared fields.
    pub fields: Vec<Field>,
    /// Number of messages.
    pub messages: u64,
    /// Size in bytes.
    pub bytes: u64,
    /// Sequence number of the first message.
    pub first_sequence: u64,
    /// Sequence number of the last message that the stream ever had.
    pub last_sequence: u64,
}

/// A consumer of the log stream.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ConsumerReport {
    /// Name of the consumer.
    pub name: String,
    /// Whether a projection follows it.
    /// Only the creating program knows the expected state of others.
    pub follower: bool,
    /// The compared fields; empty unless the consumer is a follower's.
    pub fields: Vec<Field>,
    /// Filter subjects.
    pub filters: Vec<String>,
    /// Number of undelivered messages.
    pub pending: u64,
    /// Number of delivered and unacknowledged messages.
    pub ack_pending: u64,
    /// Number of unacknowledged messages that were redelivered.
    pub redelivered: u64,
}

/// A message of the log stream.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum LogStreamItem {
    /// An event.
    Event {
        /// Stream sequence number.
        sequence: u64,
        /// Position of the previous event in the log.
        previous: Position,
        /// The event.
        event: Box<RecordedEvent>,
    },
    /// A message in place of an event that was too large.
    Omitted {
        /// Stream sequence number.
        sequence: u64,
        /// Position of the event in the log.
        position: Position,
    },
    /// A deleted message.
    Missing {
        /// Stream sequence number.
        sequence: u64,
    },
    /// A message that is not of this log.
    Foreign {
        /// Stream sequence number.
        sequence: u64,
        /// The reason why it is not of this log.
        what: String,
    },
}

/// A reader of the messages of the log stream. See [`NatsBus::read_log_stream`].
pub struct LogStreamReader {
    connection: Arc<Connection>,
    jetstream: Context,
    stream: Stream<()>,
    name: String,
    wire: Wire,
    /// Sequence number of the next message to request.
    next: u64,
    /// Last known sequence number of the stream.
    last: u64,
    asked: FuturesOrdered<BoxFuture<'static, Result<Option<LogStreamItem>, BusError>>>,
}

impl NatsBus {
    /// Compares the streams and consumers of the server with what this bus expects.
    ///
    /// Covers the log of the store with this id. Changes nothing.
    ///
    /// # Errors
    /// `Incompatible` for NATS Core, which has no streams; `Unavailable` if the server does not
    /// answer.
    pub async fn inspect(&self, store: Uuid) -> Result<NatsReport, BusError> {
        let connection = self.connection().await?;
        let (name, options) = self.stream_of()?;
        let client = &connection.client;
        let jetstream = ContextBuilder::new().timeout(connection.answer_timeout()).build(client.clone());
        let inspection = async {
            let wanted = [
                (true, options.wanted_log_stream(self.names(), store)),
                (false, options.wanted_dead(self.names())),
            ];
            let mut streams = Vec::new();
            for (required, wanted) in wanted {
                let found = stream_info(&jetstream, client, &wanted.name).await?;
                let found = found.map(|info| StreamFound {
                    fields: compared_stream(&info.config, &wanted, options),
                    messages: info.state.messages,
                    bytes: info.state.bytes,
                    first_sequence: info.state.first_sequence,
                    last_sequence: info.state.last_sequence,
                });
                streams.push(StreamReport { name: wanted.name, required, found });
            }
            let consumers = match streams.first() {
                Some(StreamReport { found: Some(_), .. }) => {
                    consumers(&jetstream, &connection, &name).await?
                }
                _ => Vec::new(),
            };
            let consumers = consumers.into_iter().map(report).collect();
            Ok(NatsReport { version: client.server_info().version, streams, consumers })
        };
        let subjects = ["$JS.API.>".to_owned()];
        connection.while_permitted("inspecting streams and consumers", &subjects, inspection).await
    }

    /// Reads the log stream of the store with this id from its start, without a consumer.
    ///
    /// # Errors
    /// `Incompatible` for NATS Core, which has no streams, and if the log stream does not exist.
    /// `Unavailable` if the server does not answer.
    pub async fn read_log_stream(&self, store: Uuid) -> Result<LogStreamReader, BusError> {
        let connection = self.connection().await?;
        let (name, _) = self.stream_of()?;
        let client = &connection.client;
        let jetstream = ContextBuilder::new().timeout(connection.answer_timeout()).build(client.clone());
        let what = || format!("looking up the stream {name}");
        let found = stream_info(&jetstream, client, &name);
        let found = connection.ask_permitted(&what(), &stream_rights(&name), found).await?;
        let missing = || BusError::Incompatible { reason: format!("there is no JetStream stream {name}") };
        let state = found.ok_or_else(missing)?.state;
        let stream = jetstream.get_stream_no_info(&name).await;
        let stream = stream.map_err(|error| unavailable(what(), error))?;
        let wire = Wire::new(self.names(), store);
        let (next, last) = (state.first_sequence.max(1), state.last_sequence);
        Ok(LogStreamReader {
            connection,
            jetstream,
            stream,
            name,
            wire,
            next,
            last,
            asked: FuturesOrdered::new(),
        })
    }
}

impl LogStreamReader {
    /// The last known sequence number of the stream.
    pub fn last_sequence(&self) -> u64 {
        self.last
    }

    /// Returns the next message; `None` at the end, where more messages may appear later.
    ///
    /// Skips messages that the limits of the stream have deleted meanwhile.
    ///
    /// # Errors
    /// `Unavailable` if the server does not answer.
    pub async fn next(&mut self) -> Result<Option<LogStreamItem>, BusError> {
        loop {
            if self.asked.is_empty() && self.next > self.last {
                self.last = self.read_bounds().await?.1.max(self.last);
            }
            while self.asked.len() < WINDOW && self.next <= self.last {
                self.asked.push_back(read(
                    self.stream.clone(),
                    self.wire.clone(),
                    self.name.clone(),
                    self.next,
                ));
                self.next += 1;
            }
            match self.asked.next().await {
                None => return Ok(None),
                Some(item) => match item? {
                    Some(LogStreamItem::Missing { sequence }) if self.read_bounds().await?.0 > sequence => {}
                    item => return Ok(item),
                },
            }
        }
    }

    /// Reads the first and last sequence number of the stream.
    async fn read_bounds(&self) -> Result<(u64, u64), BusError> {
        let info = stream_info(&self.jetstream, &self.connection.client, &self.name);
        let (what, rights) = ("finding the end of the log stream", stream_rights(&self.name));
        let found = self.connection.ask_permitted(what, &rights, info).await?;
        let missing =
            || BusError::Incompatible { reason: format!("the JetStream stream {} is gone", self.name) };
        let state = found.ok_or_else(missing)?.state;
        Ok((state.first_sequence, state.last_sequence))
    }
}

impl fmt::Debug for LogStreamReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LogStreamReader")
            .field("stream", &self.name)
            .field("next", &self.next)
            .finish_non_exhaustive()
    }
}

fn read(
    stream: Stream<()>,
    wire: Wire,
    name: String,
    sequence: u64,
) -> BoxFuture<'static, Result<Option<LogStreamItem>, BusError>> {
    Box::pin(async move {
        let message = match stream.get_raw_message(sequence).await {
            Ok(message) => message,
            Err(error) if error.kind() == RawMessageErrorKind::NoMessageFound => {
                return Ok(Some(LogStreamItem::Missing { sequence }));
            }
            Err(error) => {
                return Err(unavailable(format!("reading message {sequence} of the stream {name}"), error));
            }
        };
        let message = Message {
            subject: message.subject,
            reply: None,
            payload: message.payload,
            headers: Some(message.headers),
            status: None,
            description: None,
            length: 0,
        };
        Ok(Some(match wire.read(&message) {
            Ok(Incoming::Event { previous, event }) => {
                LogStreamItem::Event { sequence, previous, event: Box::new(event) }
            }
            Ok(Incoming::Large(position)) => LogStreamItem::Omitted { sequence, position },
            Err(Reject::OtherStore(store)) => {
                LogStreamItem::Foreign { sequence, what: format!("belongs to the store {store}") }
            }
            Err(Reject::Malformed(what)) => LogStreamItem::Foreign { sequence, what },
        }))
    })
}

/// Lists all consumers of a stream, by name.
async fn consumers(
    jetstream: &Context,
    connection: &Connection,
    stream: &str,
) -> Result<Vec<ConsumerInfo>, BusError> {
    #[derive(Deserialize)]
    struct Page {
        total: usize,
        consumers: Option<Vec<ConsumerInfo>>,
    }
    let mut found: Vec<ConsumerInfo> = Vec::new();
    loop {
        let offset = serde_json::json!({ "offset": found.len() });
        let what = format!("listing the consumers of {stream}");
        let page: Page =
            stream_api(jetstream, &connection.client, format!("CONSUMER.LIST.{stream}"), &offset, &what)
                .await?;
        let page_consumers = page.consumers.unwrap_or_default();
        let more = !page_consumers.is_empty();
        found.extend(page_consumers);
        if !more || found.len() >= page.total {
            found.sort_by(|one, other| one.name.cmp(&other.name));
            return Ok(found);
        }
    }
}

fn report(info: ConsumerInfo) -> ConsumerReport {
    let one = Some(info.config.filter_subject.clone()).filter(|subject| !subject.is_empty());
    let filters: Vec<_> = one.into_iter().chain(info.config.filter_subjects.clone()).collect();
    let follower = consumer_name::is_follower(&info.name);
    let fields = if follower {
        // The projection chooses the filters, so they are not compared.
        compared_consumer(&info.config, &follower_spec(info.name.clone(), filters.clone()))
    } else {
        Vec::new()
    };
    ConsumerReport {
        follower,
        fields,
        filters,
        pending: info.num_pending,
        ack_pending: u64::try_from(info.num_ack_pending).unwrap_or(u64::MAX),
        redelivered: u64::try_from(info.num_redelivered).unwrap_or(u64::MAX),
        name: info.name,
    }
}
