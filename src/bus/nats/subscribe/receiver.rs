//! The receiver of one source of events: a Core subscription or a consumer.
//!
//! It attaches, forwards events, and reattaches after errors.

use std::sync::Arc;
use std::time::Duration;

use async_nats::Message;
use async_nats::jetstream::AckKind;
use futures_util::StreamExt;
use tokio::sync::{oneshot, watch};
use tokio::time::{Instant, sleep, sleep_until};

use super::super::connection::{Connection, Echo, Link};
use super::super::errors::silent;
use super::super::jetstream::{Acker, Consumer, ConsumerItem, ConsumerSpec, Taken};
use super::super::merged_subscription::Merged;
use super::super::nats_bus::NatsBus;
use super::super::subjects::Pattern;
use super::super::wire::{Incoming, Reject, read_any};
use super::delivery::{Delivery, Gap};
use super::error::SubscriptionError;
use super::queue::{Held, Queue};
use crate::backoff::Backoff;
use crate::bus::BusError;
use crate::telemetry::trace::Destination;
use crate::time::after;

/// A receiver that forwards the events of one source to the queue.
pub(super) struct EventReceiver {
    pub(super) bus: NatsBus,
    pub(super) source: Source,
    /// The subscribed names, if the server cannot filter exactly.
    pub(super) names: Option<Vec<Pattern>>,
    pub(super) queue: Arc<Queue>,
    pub(super) stop: watch::Receiver<bool>,
}

pub(super) enum Source {
    Core { subjects: Vec<String>, group: Option<String> },
    Consumer { spec: ConsumerSpec, confirm: bool },
}

/// Receives the result of the first attempt.
pub(super) type Ready = oneshot::Sender<Result<(), BusError>>;

impl EventReceiver {
    /// Receives until a stop, or until the connection is closed permanently.
    pub(super) async fn run(mut self, ready: Option<Ready>) {
        let mut stop = self.stop.clone();
        let mut end = ReceiverGuard { queue: self.queue.clone(), consumer: None };
        tokio::select! {
            biased;
            // An error means that the subscription was dropped.
            _ = stop.wait_for(|stop| *stop) => {}
            () = self.receive(ready, &mut end) => {}
        }
        end.tidy_up().await;
    }

    async fn receive(&mut self, mut ready: Option<Ready>, end: &mut ReceiverGuard) {
        let mut backoff = Backoff::new(Duration::from_millis(20), Duration::from_secs(2));
        let mut attached_before = false;
        loop {
            let error = match self.attach(end, attached_before).await {
                Ok(attached) => {
                    backoff.succeeded();
                    attached_before = true;
                    if let Some(ready) = ready.take() {
                        // A caller that no longer waits stops the receiver anyway.
                        let _ = ready.send(Ok(()));
                    }
                    match attached {
                        Attached::Core { messages, link, seen, since } => match self.bus.connection().await {
                            Ok(connection) => self.pass_core(&connection, messages, link, seen, since).await,
                            Err(error) => error,
                        },
                        Attached::Consumer => self.pass_consumer(end).await,
                    }
                }
                Err(error) => match ready.take() {
                    Some(ready) => {
                        let _ = ready.send(Err(error));
                        return;
                    }
                    None => error,
                },
            };
            let closed = matches!(error, BusError::Closed);
            self.queue.error(SubscriptionError::Interrupted(error));
            if closed {
                return;
            }
            sleep(backoff.next()).await;
        }
    }

    async fn attach(&self, end: &mut ReceiverGuard, attached_before: bool) -> Result<Attached, BusError> {
        let connection = self.bus.connection().await?;
        match &self.source {
            Source::Core { subjects, group } => {
                let client = &connection.client;
                let (link, since) = (connection.link(), connection.errors());
                let opening = async {
                    let seen = *link.borrow();
                    let messages = Merged::subscribe(client, subjects, group.as_deref()).await?;
                    // The server processes requests in order. After the reply, it has the
                    // subscriptions.
                    Echo::new(client).await?.round_trip(client).await?;
                    Ok((messages, seen))
                };
                let (messages, seen) = connection.ask_permitted("subscribing", subjects, opening).await?;
                connection.check_refusals("subscribing", subjects, since).await?;
                if attached_before {
                    self.queue.gap(Gap::Reconnected);
                }
                Ok(Attached::Core { messages, link, seen, since })
            }
            Source::Consumer { spec, .. } => {
                let (stream, options) = self.bus.stream_of()?;
                options.provide(&connection, self.bus.names()).await?;
                let consumer = match &mut end.consumer {
                    Some(consumer) if consumer.is_over(&connection) => consumer,
                    consumer => consumer.insert(Consumer::new(connection, stream, spec.clone())),
                };
                if let Some(reason) = consumer.attach().await? {
                    self.queue.gap(Gap::Consumer { reason });
                }
                Ok(Attached::Consumer)
            }
        }
    }

    /// Forwards the messages of a plain subscription until it ends.
    /// Never stops reading: a full buffer of the driver would be an overflow of the whole
    /// connection.
    async fn pass_core(
        &self,
        connection: &Connection,
        mut messages: Merged,
        mut link: watch::Receiver<Link>,
        mut seen: Link,
        since: u64,
    ) -> BusError {
        let Source::Core { subjects, .. } = &self.source else { return BusError::Closed };
        let refused = connection.refused("subscribing", since, subjects);
        tokio::pin!(refused);
        loop {
            let due = self.queue.due();
            tokio::select! {
                message = messages.next() => {
                    let Some(message) = message else {
                        return if link.borrow().closed { BusError::Closed } else { silent("the connection to NATS was closed".into()) };
                    };
                    match self.read(&message) {
                        Ok(Some(delivery)) => self.push(delivery),
                        Ok(None) => {}
                        Err(error) => self.queue.error(error),
                    }
                }
                changed = link.changed() => {
                    let now = *link.borrow_and_update();
                    let before = std::mem::replace(&mut seen, now);
                    if changed.is_err() || now.closed {
                        return BusError::Closed;
                    }
                    if now.sessions != before.sessions {
                        self.queue.gap(Gap::Reconnected);
                    } else if now.overflows != before.overflows {
                        self.queue.gap(Gap::Overflow { lost: 0 });
                    }
                }
                // The server refuses after a reconnect, or when a permission is revoked.
                error = &mut refused => return error,
                () = at(due) => drop(self.queue.expire()),
            }
        }
    }

    /// Forwards the messages of a consumer until it ends.
    async fn pass_consumer(&self, end: &mut ReceiverGuard) -> BusError {
        let Source::Consumer { spec, .. } = &self.source else { return BusError::Closed };
        let Some(consumer) = &mut end.consumer else { return BusError::Closed };
        // While messages are queued here, progress is reported to the server.
        let progress_interval = spec.shortest_wait() / 3;
        let mut progress_at = after(progress_interval);
        loop {
            // Register before the free capacity is read, so that a later release is not missed.
            let more_room = self.queue.room.notified();
            let room = self.queue.free();
            let due = self.queue.due();
            tokio::select! {
                item = consumer.next(room) => match item {
                    Ok(ConsumerItem::Message(taken)) => self.pass(taken).await,
                    Ok(ConsumerItem::Gap(reason)) => self.queue.gap(Gap::Consumer { reason }),
                    Err(error) => return error,
                },
                () = more_room => {}
                () = at(due) => for delivery in self.queue.expire() {
                    // If the server does not receive the nak, it redelivers by itself.
                    let _ = delivery.nak().await;
                },
                () = sleep_until(progress_at) => {
                    match self.queue.held(spec.shortest_wait()) {
                        Held::Waiting(held) => for acker in held {
                            let _ = acker.progress().await;
                        },
                        Held::Stalled(held) => give_back(held).await,
                    }
                    progress_at = after(progress_interval);
                }
            }
        }
    }

    async fn pass(&self, taken: Taken) {
        let confirm = matches!(self.source, Source::Consumer { confirm: true, .. });
        let Taken { message, acker, sequence, attempt, .. } = taken;
        let acker = Arc::new(acker);
        match self.read(&message) {
            Ok(Some(delivery)) => self.push(Delivery {
                stream_sequence: Some(sequence),
                attempt,
                acker: Some(acker),
                confirm,
                ..delivery
            }),
            // Filtered out, or reported as a gap. If the server does not receive the ack, it
            // redelivers.
            Ok(None) => _ = acker.ack_with(AckKind::Ack, false).await,
            Err(error) => {
                // A redelivery would fail to decode, too.
                self.queue.error(error);
                let _ = acker.ack_with(AckKind::Term, false).await;
            }
        }
    }

    fn push(&self, delivery: Delivery) {
        let from = Destination { system: "nats", name: self.bus.destination_name() };
        self.bus.metrics().consumed(from, delivery.attempt > 1);
        self.queue.push(delivery);
    }

    /// Decodes the event of a message, if it matches the subscribed names.
    fn read(&self, message: &Message) -> Result<Option<Delivery>, SubscriptionError> {
        let malformed = |reason| {
            let subject = message.subject.to_string();
            SubscriptionError::Malformed { subject, reason }
        };
        let (store, incoming) = read_any(message).map_err(|reject| match reject {
            Reject::Malformed(reason) => malformed(reason),
            Reject::OtherStore(store) => malformed(format!("belongs to the store {store}")),
        })?;
        let (previous, event) = match incoming {
            Incoming::Event { previous, event } => (previous, event),
            Incoming::Large(position) => {
                self.queue.gap(Gap::Omitted { position });
                return Ok(None);
            }
        };
        let asked_for = |names: &Vec<Pattern>| names.iter().any(|name| name.matches(event.name.as_str()));
        if !self.names.as_ref().is_none_or(asked_for) {
            return Ok(None);
        }
        Ok(Some(Delivery {
            event,
            previous,
            store,
            subject: message.subject.clone(),
            stream_sequence: None,
            attempt: 1,
            acker: None,
            confirm: false,
        }))
    }
}

enum Attached {
    Core {
        messages: Merged,
        link: watch::Receiver<Link>,
        seen: Link,
        /// Number of the last server error before the subscription.
        since: u64,
    },
    /// The consumer is in [`ReceiverGuard::consumer`].
    Consumer,
}

/// The guard that cleans up when a receiver ends in any way.
struct ReceiverGuard {
    queue: Arc<Queue>,
    consumer: Option<Consumer>,
}

impl ReceiverGuard {
    /// Returns unread deliveries to the server, so that other readers need not wait for them.
    async fn tidy_up(mut self) {
        if let Some(consumer) = &mut self.consumer {
            let left = consumer.leave().into_iter().map(Arc::new);
            give_back(left.chain(self.queue.clear()).collect()).await;
            if let Err(error) = consumer.discard().await {
                tracing::debug!(%error, "leaving a consumer to expire");
            }
        }
    }
}

impl Drop for ReceiverGuard {
    fn drop(&mut self) {
        self.queue.ended();
    }
}

/// Returns deliveries to the server for other readers.
pub(super) async fn give_back(held: Vec<Arc<Acker>>) {
    for acker in held {
        // If the server does not receive the nak, it redelivers by itself.
        let _ = acker.ack_with(AckKind::Nak(None), false).await;
    }
}

async fn at(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time).await,
        None => std::future::pending().await,
    }
}
