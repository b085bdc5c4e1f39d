//! A consumer of the log stream: found or created, read by pull or push, and recreated if lost.
//!
//! A reader receives every message of the filters until it is acknowledged, in order except for
//! redeliveries. A gap reports messages that were lost with the stream or the consumer.

mod ack;
mod provision;
mod spec;

use std::sync::Arc;
use std::time::Duration;

use async_nats::jetstream::Context;
use async_nats::jetstream::consumer::Info;
use async_nats::jetstream::context::ContextBuilder;
use async_nats::{Message, StatusCode, Subscriber};
use futures_util::{FutureExt, StreamExt};
use serde::Serialize;
use tokio::sync::watch;
use tokio::task::unconstrained;
use tokio::time::{Instant, sleep_until};

pub use self::ack::AckError;
pub(in super::super) use self::ack::Acker;
use self::provision::Target;
pub(in super::super) use self::spec::{ConsumerSpec, Push, compared_consumer};
use super::super::connection::{Connection, Link};
use super::super::errors::{silent, unavailable};
use super::options::ProvisionPolicy;
use super::rights::consumer_rights;
use super::stream::{NOTHING, api, info as stream_info, refused};
use crate::bus::BusError;
use crate::future::BoxFuture;
use crate::telemetry::trace::Destination;
use crate::time::after;

/// Lifetime of a request for messages, and interval of the server's idle heartbeats.
const EXPIRES: Duration = Duration::from_secs(30);
const HEARTBEAT: Duration = Duration::from_secs(2);

/// Maximum silence of the server about a request, before the request counts as lost.
const SILENCE: Duration = Duration::from_secs(5);

/// Poll interval of the consumer and the stream, to detect their loss and lost messages.
const POLL_INTERVAL: Duration = Duration::from_secs(2);

/// A consumer on the server, and its local reader.
pub(in super::super) struct Consumer {
    target: Target,
    attached: Option<Attached>,
    /// Stream sequence number of the ack floor, as last read; `None` before the first read.
    /// A replacement of a lost consumer starts after it.
    floor: Option<u64>,
}

/// One session of reading from the consumer.
struct Attached {
    messages: Subscriber,
    /// Subject that receives the messages.
    inbox: String,
    link: watch::Receiver<Link>,
    session: u64,
    /// Number of requested messages that the server has not sent yet.
    asked: usize,
    /// Time of the last message from the server.
    last_message_at: Instant,
    poll_at: Instant,
    polling: Option<BoxFuture<'static, Result<PollResult, BusError>>>,
    /// Stream sequence number of the last message.
    last: u64,
    /// First message skipped since the last poll: filtered out, or deleted.
    passed: Option<u64>,
    /// Consumer sequence number of the last delivery before this session.
    delivered: u64,
    /// Number of the last server error before this session.
    since: u64,
    /// Subjects that reading from the consumer requires.
    rights: Arc<[String]>,
}

/// The result of a poll.
struct PollResult {
    floor: u64,
    /// Number of undelivered messages, and number of delivered and unacknowledged messages.
    pending: u64,
    unsettled: u64,
    /// First message that the stream still has.
    first: Option<u64>,
}

/// An item of a consumer.
#[allow(clippy::large_enum_variant, reason = "almost all are messages")]
pub(in super::super) enum ConsumerItem {
    Message(Taken),
    /// Reason why messages may be missing before the next one.
    Gap(String),
}

/// A message that must be acknowledged.
pub(in super::super) struct Taken {
    pub(in super::super) message: Message,
    pub(in super::super) acker: Acker,
    /// Stream sequence number of the message.
    pub(in super::super) sequence: u64,
    /// Number of deliveries including this one. The server may count less after a crash.
    pub(in super::super) attempt: u64,
    /// Consumer sequence number of the delivery, over all readers.
    /// A skipped number shows a delivery that was lost or went to another reader.
    pub(in super::super) number: u64,
}

impl Consumer {
    /// Describes a consumer. Does nothing before [`attach`](Self::attach).
    pub(in super::super) fn new(connection: Arc<Connection>, stream: String, spec: ConsumerSpec) -> Self {
        let jetstream =
            ContextBuilder::new().timeout(connection.answer_timeout()).build(connection.client.clone());
        let target = Target { connection, jetstream, stream, spec };
        Self { target, attached: None, floor: None }
    }

    /// Whether the consumer uses this connection. On another connection it must be recreated.
    pub(in super::super) fn is_over(&self, connection: &Arc<Connection>) -> bool {
        Arc::ptr_eq(&self.target.connection, connection)
    }

    /// Finds or creates the consumer, as its policy requires, and starts to read.
    ///
    /// Call it first, and again after every error. Returns why messages may be missing, if so.
    pub(in super::super) async fn attach(&mut self) -> Result<Option<String>, BusError> {
        self.attached = None;
        let connection = self.target.connection.clone();
        let Target { stream, spec, .. } = &self.target;
        let mut rights = consumer_rights(stream, &spec.name).to_vec();
        rights.extend(spec.push.as_ref().map(|push| push.subject.clone()));
        let since = connection.errors();
        let opened = connection.while_permitted("opening a consumer", &rights, self.open()).await?;
        if let Some(attached) = &mut self.attached {
            (attached.since, attached.rights) = (since, rights.into());
        }
        Ok(opened)
    }

    async fn open(&mut self) -> Result<Option<String>, BusError> {
        let Target { connection, spec, .. } = &self.target;
        let (client, link, session) = (&connection.client, connection.link(), connection.session());
        let (info, gap) = match self.target.find().await? {
            Some(info) => {
                let gap = self.target.lost(&info).await?;
                (self.target.compare(info, self.floor.is_none()).await?, gap)
            }
            None => self.target.make(self.floor).await?,
        };
        let inbox = match &spec.push {
            Some(push) => push.subject.clone(),
            None => client.new_inbox(),
        };
        // The server pushes nothing before a subscription exists.
        let subscribed = match spec.push.as_ref().and_then(|push| push.group.clone()) {
            Some(group) => client.queue_subscribe(inbox.clone(), group).await,
            None => client.subscribe(inbox.clone()).await,
        };
        let messages = subscribed.map_err(|error| unavailable(format!("subscribing to {inbox}"), error))?;
        self.floor = Some(info.ack_floor.stream_sequence);
        self.attached = Some(Attached {
            messages,
            inbox,
            link,
            session,
            asked: 0,
            last_message_at: Instant::now(),
            poll_at: after(POLL_INTERVAL),
            polling: None,
            last: info.delivered.stream_sequence,
            delivered: info.delivered.consumer_sequence,
            passed: None,
            since: connection.errors(),
            rights: Arc::default(),
        });
        Ok(gap)
    }

    /// Sequence numbers of the last delivery to any reader before the attach: consumer and stream.
    pub(in super::super) fn delivered(&self) -> Option<(u64, u64)> {
        self.attached.as_ref().map(|attached| (attached.delivered, attached.last))
    }

    /// The first message that the stream still has, and the number of deleted messages after it.
    pub(in super::super) async fn kept(&mut self) -> Result<(u64, u64), BusError> {
        let Target { connection, jetstream, stream, .. } = &self.target;
        let asked = stream_info(jetstream, &connection.client, stream);
        let found = connection.ask("reading the state of the stream", asked).await?;
        let state = found.ok_or_else(|| silent(format!("there is no JetStream stream {stream}")))?.state;
        Ok((state.first_sequence, state.deleted_count.unwrap_or_default()))
    }

    /// Returns the next item. `room` limits the number of messages, including requested ones.
    ///
    /// After an error, returns nothing until the next [`attach`](Self::attach). Cancel-safe.
    pub(in super::super) async fn next(&mut self, room: usize) -> Result<ConsumerItem, BusError> {
        let item = self.next_item(room).await;
        if item.is_err() {
            self.attached = None;
        }
        item
    }

    async fn next_item(&mut self, room: usize) -> Result<ConsumerItem, BusError> {
        let Self { target: Target { connection, jetstream, stream, spec }, attached, floor } = self;
        let attached = attached.as_mut().ok_or_else(|| silent("the consumer is not attached".into()))?;
        let pulls = spec.push.is_none();
        let rights = attached.rights.clone();
        loop {
            let more = room.saturating_sub(attached.asked);
            if pulls && more > 0 && more >= attached.asked {
                attached.ask(connection, stream, &spec.name, more).await?;
            }
            let (session, since, waits) = (attached.session, attached.since, attached.asked > 0);
            let (silent_at, poll_at) = (attached.last_message_at + SILENCE, attached.poll_at);
            let polls = attached.polling.is_some();
            tokio::select! {
                message = attached.messages.next() => {
                    let message = message.ok_or_else(|| silent("the connection to NATS was closed".into()))?;
                    attached.last_message_at = Instant::now();
                    if let Some(taken) = attached.take(message, connection)? {
                        return Ok(ConsumerItem::Message(taken));
                    }
                }
                error = left(&mut attached.link, session) => return Err(error),
                error = connection.refused("reading from a consumer", since, &rights) => return Err(error),
                () = sleep_until(silent_at), if waits => {
                    return Err(silent(format!("the server lost the message request of {}", spec.name)));
                }
                () = sleep_until(poll_at), if !polls => {
                    let (jetstream, connection) = (jetstream.clone(), connection.clone());
                    let first = attached.passed.is_some();
                    let poll = poll_state(jetstream, connection, stream.clone(), spec.name.clone(), first);
                    attached.polling = Some(Box::pin(poll));
                }
                polled = polling(&mut attached.polling) => {
                    let PollResult { floor: settled, first, pending, unsettled } = polled?;
                    // Operators choose the few names of durable consumers. Names of ephemeral
                    // consumers are unbounded.
                    let name = if spec.durable { &spec.name } else { "ephemeral" };
                    let from = Destination { system: "nats", name: stream };
                    connection.metrics().consumer(from, name, pending, unsettled);
                    *floor = Some(settled);
                    attached.poll_at = after(POLL_INTERVAL);
                    let passed = attached.passed.take();
                    if let (Some(first), Some(passed)) = (first, passed) && first > passed {
                        return Ok(ConsumerItem::Gap(format!(
                            "the stream {stream} starts at message {first}, and {} has not \
                             received message {passed}: the stream reached its limits first",
                            spec.name
                        )));
                    }
                }
            }
        }
    }

    /// Stops reading, and returns the received messages that were not taken.
    pub(in super::super) fn leave(&mut self) -> Vec<Acker> {
        let Some(mut attached) = self.attached.take() else { return Vec::new() };
        let mut left = Vec::new();
        while let Some(message) = unconstrained(attached.messages.next()).now_or_never().flatten() {
            if let Ok(Some(taken)) = attached.take(message, &self.target.connection) {
                left.push(taken.acker);
            }
        }
        left
    }

    /// Deletes the consumer from the server, if it is ephemeral and has a single reader.
    pub(in super::super) async fn discard(&mut self) -> Result<(), BusError> {
        self.attached = None;
        let Target { connection, jetstream, stream, spec } = &self.target;
        if spec.durable || spec.shared || spec.policy == ProvisionPolicy::RequireExisting {
            return Ok(());
        }
        let subject = format!("CONSUMER.DELETE.{stream}.{}", spec.name);
        let deleted = api::<serde::de::IgnoredAny>(jetstream, &connection.client, subject, &NOTHING);
        // An error of the server means that the consumer is gone already.
        connection.ask("deleting a consumer", deleted).await.map(drop)
    }
}

/// Waits for the end of a session. Cancel-safe.
async fn left(link: &mut watch::Receiver<Link>, session: u64) -> BusError {
    match link.wait_for(|link| !link.up || link.closed || link.sessions != session).await {
        Ok(link) if !link.closed => silent("the connection to NATS was lost".into()),
        _ => BusError::Closed,
    }
}

async fn polling(
    poll: &mut Option<BoxFuture<'static, Result<PollResult, BusError>>>,
) -> Result<PollResult, BusError> {
    let Some(future) = poll else { return std::future::pending().await };
    let polled = future.await;
    *poll = None;
    polled
}

async fn poll_state(
    jetstream: Context,
    connection: Arc<Connection>,
    stream: String,
    name: String,
    first: bool,
) -> Result<PollResult, BusError> {
    let client = &connection.client;
    let subject = format!("CONSUMER.INFO.{stream}.{name}");
    let info = api::<Info>(&jetstream, client, subject, &NOTHING).await?;
    let info = info.map_err(|error| refused(&format!("looking up the consumer {name}"), error));
    let info = match info {
        Ok(info) => info,
        // After any error, the consumer is looked up again, and recreated if it is gone.
        Err(error) => return Err(silent(format!("the consumer {name} is gone: {error}"))),
    };
    let first = match first {
        true => stream_info(&jetstream, client, &stream).await?.map(|info| info.state.first_sequence),
        false => None,
    };
    let (pending, unsettled) = (info.num_pending, info.num_ack_pending as u64);
    Ok(PollResult { floor: info.ack_floor.stream_sequence, pending, unsettled, first })
}

#[derive(Serialize)]
struct Request {
    batch: usize,
    expires: u64,
    idle_heartbeat: u64,
}

impl Attached {
    /// Requests more messages. Cancel-safe: counts only sent requests.
    async fn ask(
        &mut self,
        connection: &Connection,
        stream: &str,
        name: &str,
        more: usize,
    ) -> Result<(), BusError> {
        let nanos = |duration: Duration| u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        let request = Request { batch: more, expires: nanos(EXPIRES), idle_heartbeat: nanos(HEARTBEAT) };
        let request = serde_json::to_vec(&request)
            .map_err(|error| silent(format!("cannot encode a request for messages: {error}")))?;
        let subject = format!("$JS.API.CONSUMER.MSG.NEXT.{stream}.{name}");
        let sent = connection.client.publish_with_reply(subject, self.inbox.clone(), request.into()).await;
        sent.map_err(|error| unavailable("requesting messages".into(), error))?;
        self.asked += more;
        self.last_message_at = Instant::now();
        Ok(())
    }

    /// Interprets a message: a message of the stream, or a status of a request.
    fn take(&mut self, message: Message, connection: &Arc<Connection>) -> Result<Option<Taken>, BusError> {
        let description = message.description.as_deref().unwrap_or("");
        match message.status {
            None | Some(StatusCode::OK) => {}
            Some(StatusCode::IDLE_HEARTBEAT) => return Ok(None),
            Some(StatusCode::NOT_FOUND | StatusCode::TIMEOUT) => {
                self.unasked(&message);
                return Ok(None);
            }
            Some(status) if status.as_u16() == 409 && description.eq_ignore_ascii_case("batch completed") => {
                self.unasked(&message);
                return Ok(None);
            }
            Some(status) => {
                return Err(silent(format!("the server ended the consumer: {status} {description}")));
            }
        }
        self.asked = self.asked.saturating_sub(1);
        let Some((acker, metadata)) = Acker::of(&message, connection) else {
            tracing::warn!(subject = message.subject.as_str(), "ignoring a message that is not of JetStream");
            return Ok(None);
        };
        if metadata.sequence > self.last {
            if metadata.sequence > self.last + 1 {
                self.passed.get_or_insert(self.last + 1);
            }
            self.last = metadata.sequence;
        }
        Ok(Some(Taken {
            message,
            acker,
            sequence: metadata.sequence,
            attempt: metadata.attempt,
            number: metadata.number,
        }))
    }

    /// Ends a request. The status states how many messages remain unsent.
    fn unasked(&mut self, message: &Message) {
        let left = message.headers.as_ref().and_then(|headers| headers.get("Nats-Pending-Messages"));
        let left = left.and_then(|left| left.as_str().parse().ok()).unwrap_or(self.asked);
        self.asked = self.asked.saturating_sub(left);
    }
}
