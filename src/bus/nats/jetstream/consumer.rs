//! One consumer of the stream: found or made, pulled from (or pushed to us), and made again when it is gone.
//!
//! Whoever reads from one gets every message that its filters let through until it is settled, in order as long as nothing
//! is delivered a second time. What could not be had, because the stream or the consumer was lost, is said.

mod settle;
mod spec;
mod target;

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

pub use self::settle::AckError;
pub(in super::super) use self::settle::Settle;
pub use self::spec::ConsumerPolicy;
pub(in super::super) use self::spec::{ConsumerSpec, Push, compared_consumer};
use self::target::Target;
use super::super::connection::{Connection, Link, silent, unavailable};
use super::consumer_rights;
use super::stream::{NOTHING, api, info as stream_info, refused};
use crate::bus::BusError;
use crate::future::BoxFuture;
use crate::telemetry::trace::Destination;
use crate::time::after;

/// How long the server keeps a request for messages, and how often it says meanwhile that it does.
const EXPIRES: Duration = Duration::from_secs(30);
const HEARTBEAT: Duration = Duration::from_secs(2);

/// How long the server may say nothing about a request before it counts as forgotten.
const SILENCE: Duration = Duration::from_secs(5);

/// How often the consumer and the stream are looked at: whether they are there, and have lost anything.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// A consumer, and our end of it.
pub(in super::super) struct Consumer {
    target: Target,
    attached: Option<Attached>,
    /// Everything up to this message was settled when the server was last asked: where another consumer begins when this
    /// one is gone. `None` before the first time.
    floor: Option<u64>,
}

/// One session of reading from it.
struct Attached {
    messages: Subscriber,
    /// Where they come to.
    inbox: String,
    link: watch::Receiver<Link>,
    session: u64,
    /// How many messages the server has been asked for and has not sent yet.
    asked: usize,
    /// When it was last heard of.
    heard: Instant,
    look_at: Instant,
    looking: Option<BoxFuture<'static, Result<Look, BusError>>>,
    /// The last message, by its number in the stream.
    last: u64,
    /// The first message that was passed over since the last look: not for us, or no longer there.
    passed: Option<u64>,
    /// The number of the consumer's last delivery when this began.
    delivered: u64,
    /// Number of the last server error before it began.
    since: u64,
    /// The subjects that reading from it takes.
    rights: Arc<[String]>,
}

/// What a look shows.
struct Look {
    floor: u64,
    /// How many messages it has still to deliver, and how many are delivered and not settled.
    pending: u64,
    unsettled: u64,
    /// The first message that the stream still has.
    first: Option<u64>,
}

/// What comes out of a consumer.
#[allow(clippy::large_enum_variant, reason = "almost all are messages")]
pub(in super::super) enum ConsumerItem {
    Message(Taken),
    /// Something may be missing before the next message, and why.
    Gap(String),
}

/// A message, to be settled.
pub(in super::super) struct Taken {
    pub(in super::super) message: Message,
    pub(in super::super) settle: Settle,
    /// Its number in the stream.
    pub(in super::super) sequence: u64,
    /// How often it has been delivered, this time included, as the server remembers: after a crash it may say less.
    pub(in super::super) attempt: u64,
    /// Its number among what the consumer has ever delivered, to whomever: one that is not the next shows that something was
    /// delivered elsewhere, or to nobody.
    pub(in super::super) number: u64,
}

impl Consumer {
    /// Describes one; nothing happens before [`attach`](Self::attach).
    pub(in super::super) fn new(connection: Arc<Connection>, stream: String, spec: ConsumerSpec) -> Self {
        let jetstream =
            ContextBuilder::new().timeout(connection.answer_timeout()).build(connection.client.clone());
        let target = Target { connection, jetstream, stream, spec };
        Self { target, attached: None, floor: None }
    }

    /// Whether it is of this connection: of another one, it has to be made anew.
    pub(in super::super) fn is_over(&self, connection: &Arc<Connection>) -> bool {
        Arc::ptr_eq(&self.target.connection, connection)
    }

    /// Finds the consumer or makes it, as its policy says, and begins to read: at first, and again after every error. Says
    /// what may be missing, if so.
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
        // The server pushes nothing before somebody listens.
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
            heard: Instant::now(),
            look_at: after(LOOK_EVERY),
            looking: None,
            last: info.delivered.stream_sequence,
            delivered: info.delivered.consumer_sequence,
            passed: None,
            since: connection.errors(),
            rights: Arc::default(),
        });
        Ok(gap)
    }

    /// The numbers of its last delivery, to whomever, when it was attached: among its deliveries, and in the stream.
    pub(in super::super) fn delivered(&self) -> Option<(u64, u64)> {
        self.attached.as_ref().map(|attached| (attached.delivered, attached.last))
    }

    /// The first message that the stream still has, and how many behind it were removed.
    pub(in super::super) async fn kept(&mut self) -> Result<(u64, u64), BusError> {
        let Target { connection, jetstream, stream, .. } = &self.target;
        let asked = stream_info(jetstream, &connection.client, stream);
        let found = connection.ask("asking what the stream has", asked).await?;
        let state = found.ok_or_else(|| silent(format!("there is no JetStream stream {stream}")))?.state;
        Ok((state.first_sequence, state.deleted_count.unwrap_or_default()))
    }

    /// The next item, when there is room for that many messages (those on the way included). After an error there is
    /// nothing more before it is [attached](Self::attach) again. Cancel-safe.
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
            let (silent_at, look_at) = (attached.heard + SILENCE, attached.look_at);
            let looks = attached.looking.is_some();
            tokio::select! {
                message = attached.messages.next() => {
                    let message = message.ok_or_else(|| silent("the connection to NATS was closed".into()))?;
                    attached.heard = Instant::now();
                    if let Some(taken) = attached.take(message, connection)? {
                        return Ok(ConsumerItem::Message(taken));
                    }
                }
                error = left(&mut attached.link, session) => return Err(error),
                error = connection.refused("reading from a consumer", since, &rights) => return Err(error),
                () = sleep_until(silent_at), if waits => {
                    return Err(silent(format!("the server has forgotten that {} waits for messages", spec.name)));
                }
                () = sleep_until(look_at), if !looks => {
                    let (jetstream, connection) = (jetstream.clone(), connection.clone());
                    let first = attached.passed.is_some();
                    let look = look(jetstream, connection, stream.clone(), spec.name.clone(), first);
                    attached.looking = Some(Box::pin(look));
                }
                looked = looking(&mut attached.looking) => {
                    let Look { floor: settled, first, pending, unsettled } = looked?;
                    // The names of those who stay are chosen by people; there is no end of the others.
                    let name = if spec.durable { &spec.name } else { "ephemeral" };
                    let from = Destination { system: "nats", name: stream };
                    connection.metrics().consumer(from, name, pending, unsettled);
                    *floor = Some(settled);
                    attached.look_at = after(LOOK_EVERY);
                    let passed = attached.passed.take();
                    if let (Some(first), Some(passed)) = (first, passed) && first > passed {
                        return Ok(ConsumerItem::Gap(format!(
                            "the stream {stream} begins with message {first} by now, and {} has not seen message {passed}: \
                             the stream's limits were reached before it was read",
                            spec.name
                        )));
                    }
                }
            }
        }
    }

    /// What has come and was not taken, when nothing more is to be read. Nothing comes after that.
    pub(in super::super) fn leave(&mut self) -> Vec<Settle> {
        let Some(mut attached) = self.attached.take() else { return Vec::new() };
        let mut left = Vec::new();
        while let Some(message) = unconstrained(attached.messages.next()).now_or_never().flatten() {
            if let Ok(Some(taken)) = attached.take(message, &self.target.connection) {
                left.push(taken.settle);
            }
        }
        left
    }

    /// Removes it from the server, if it is there for one reader only and goes with it.
    pub(in super::super) async fn discard(&mut self) -> Result<(), BusError> {
        self.attached = None;
        let Target { connection, jetstream, stream, spec } = &self.target;
        if spec.durable || spec.shared || spec.policy == ConsumerPolicy::RequireExisting {
            return Ok(());
        }
        let subject = format!("CONSUMER.DELETE.{stream}.{}", spec.name);
        let deleted = api::<serde::de::IgnoredAny>(jetstream, &connection.client, subject, &NOTHING);
        // What the server says against it is that it is gone already.
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

async fn looking(look: &mut Option<BoxFuture<'static, Result<Look, BusError>>>) -> Result<Look, BusError> {
    let Some(future) = look else { return std::future::pending().await };
    let looked = future.await;
    *look = None;
    looked
}

async fn look(
    jetstream: Context,
    connection: Arc<Connection>,
    stream: String,
    name: String,
    first: bool,
) -> Result<Look, BusError> {
    let client = &connection.client;
    let subject = format!("CONSUMER.INFO.{stream}.{name}");
    let info = api::<Info>(&jetstream, client, subject, &NOTHING).await?;
    let info = info.map_err(|error| refused(&format!("asking for the consumer {name}"), error));
    let info = match info {
        Ok(info) => info,
        // Whatever JetStream has against it: it is looked for again, and made again if it is gone.
        Err(error) => return Err(silent(format!("the consumer {name} is not there any more: {error}"))),
    };
    let first = match first {
        true => stream_info(&jetstream, client, &stream).await?.map(|info| info.state.first_sequence),
        false => None,
    };
    let (pending, unsettled) = (info.num_pending, info.num_ack_pending as u64);
    Ok(Look { floor: info.ack_floor.stream_sequence, pending, unsettled, first })
}

#[derive(Serialize)]
struct Request {
    batch: usize,
    expires: u64,
    idle_heartbeat: u64,
}

impl Attached {
    /// Asks for more messages. Cancel-safe: what was not sent is not counted.
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
            .map_err(|error| silent(format!("a request for messages cannot be written: {error}")))?;
        let subject = format!("$JS.API.CONSUMER.MSG.NEXT.{stream}.{name}");
        let sent = connection.client.publish_with_reply(subject, self.inbox.clone(), request.into()).await;
        sent.map_err(|error| unavailable("asking for messages".into(), error))?;
        self.asked += more;
        self.heard = Instant::now();
        Ok(())
    }

    /// What a message is: one of the stream's, or a word of the server's about our request.
    fn take(&mut self, message: Message, connection: &Arc<Connection>) -> Result<Option<Taken>, BusError> {
        let said = message.description.as_deref().unwrap_or("");
        match message.status {
            None | Some(StatusCode::OK) => {}
            Some(StatusCode::IDLE_HEARTBEAT) => return Ok(None),
            Some(StatusCode::NOT_FOUND | StatusCode::TIMEOUT) => {
                self.unasked(&message);
                return Ok(None);
            }
            Some(status) if status.as_u16() == 409 && said.eq_ignore_ascii_case("batch completed") => {
                self.unasked(&message);
                return Ok(None);
            }
            Some(status) => {
                return Err(silent(format!("the server ends a consumer: {status} {said}")));
            }
        }
        self.asked = self.asked.saturating_sub(1);
        let Some((settle, place)) = Settle::of(&message, connection) else {
            tracing::warn!(
                subject = message.subject.as_str(),
                "a message that is not of JetStream was passed over"
            );
            return Ok(None);
        };
        if place.sequence > self.last {
            if place.sequence > self.last + 1 {
                self.passed.get_or_insert(self.last + 1);
            }
            self.last = place.sequence;
        }
        Ok(Some(Taken {
            message,
            settle,
            sequence: place.sequence,
            attempt: place.attempt,
            number: place.number,
        }))
    }

    /// A request is over, and the server says how much of it.
    fn unasked(&mut self, message: &Message) {
        let left = message.headers.as_ref().and_then(|headers| headers.get("Nats-Pending-Messages"));
        let left = left.and_then(|left| left.as_str().parse().ok()).unwrap_or(self.asked);
        self.asked = self.asked.saturating_sub(left);
    }
}
