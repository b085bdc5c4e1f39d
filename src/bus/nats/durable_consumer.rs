//! Durable following: one consumer of the log stream per follower.
//!
//! The consumer filters the events and keeps them until they are applied.

use std::collections::VecDeque;
use std::time::Duration;

use async_nats::jetstream::AckKind;
use async_nats::jetstream::consumer::DeliverPolicy;
use futures_util::FutureExt;
use tokio::sync::{mpsc, watch};
use tokio::task::unconstrained;
use tokio::time::{Instant, sleep, sleep_until};

use super::consumer_name;
use super::jetstream::{Acker, Consumer, ConsumerItem, ConsumerSpec, ProvisionPolicy, Taken};
use super::nats_bus::NatsBus;
use super::subjects::patterns;
use super::wire::{Reject, Wire};
use crate::backoff::Backoff;
use crate::bus::{BusError, DurableItem, DurableSubscription, Follow};
use crate::event::Position;
use crate::future::BoxFuture;
use crate::rate_limit::LogLimit;
use crate::supervised::Task;
use crate::time::after;

/// Maximum number of delivered and unapplied events.
const ROOM: usize = 512;

/// Time until the server redelivers. The follower reports progress well before.
const ACK_WAIT: Duration = Duration::from_secs(30);

/// The progress of the follower.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Read {
    /// Position up to which every event is applied.
    applied: Position,
    /// Number of the last item returned before the log was read, and the end of the log at that
    /// read.
    seen: u64,
    head: Position,
}

impl Read {
    /// Whether a message need not be kept: its event is applied, or the log has no such event.
    fn is_done(&self, unsettled: &Unsettled) -> bool {
        unsettled.position <= self.applied || (unsettled.item <= self.seen && unsettled.position > self.head)
    }
}

/// An unacknowledged message.
struct Unsettled {
    item: u64,
    position: Position,
    acker: Acker,
}

/// A durable follower: its consumer and the task that reads from it.
pub(super) struct NatsFollower {
    items: mpsc::Receiver<(u64, DurableItem)>,
    /// Number of the last returned item.
    seen: u64,
    read: watch::Sender<Read>,
    _task: Task,
}

impl NatsFollower {
    pub(super) fn start(bus: NatsBus, follow: Follow) -> Result<Self, BusError> {
        let Follow { name, store, names, categories } = follow;
        let given = match (&names, &categories) {
            (Some(names), _) => names.iter().map(|name| name.as_str().to_owned()).collect(),
            (None, Some(categories)) => categories.iter().map(|category| format!("{category}.*")).collect(),
            (None, None) => vec![">".to_owned()],
        };
        // An empty list of names matches no event. The consumer then keeps nothing, and the
        // follower reads the store.
        let given = if given.is_empty() { vec!["storied.nothing".to_owned()] } else { given };
        let patterns = patterns(given)?;
        let (filters, _) = bus.names().mapping.filters(&patterns);
        let spec = follower_spec(consumer_name::custom(&name), filters);
        let (sender, items) = mpsc::channel(2 * ROOM);
        let (read, reader) = watch::channel(Read::default());
        let wire = Wire::new(bus.names(), store);
        let reading = Reading {
            bus,
            spec,
            wire,
            items: sender,
            read: reader,
            consumer: None,
            unsettled: VecDeque::new(),
            item: 0,
            ignored: LogLimit::each_minute(),
            number: 0,
            sequence: 0,
            removed: 0,
            missing: None,
        };
        Ok(Self { items, seen: 0, read, _task: Task::spawn(reading.run()) })
    }
}

/// The consumer of a follower.
pub(super) fn follower_spec(name: String, filters: Vec<String>) -> ConsumerSpec {
    ConsumerSpec {
        name,
        durable: true,
        shared: false,
        filters,
        // Earlier events come from the store. It is read after every gap, and the first item is a
        // gap.
        start: DeliverPolicy::New,
        ack_wait: ACK_WAIT,
        max_deliver: None,
        backoff: Vec::new(),
        max_ack_pending: 2 * ROOM,
        push: None,
        inactive: Duration::ZERO,
        // A program that now asks for other names continues from its progress.
        policy: ProvisionPolicy::CreateOrUpdate,
    }
}

impl DurableSubscription for NatsFollower {
    fn next(&mut self) -> BoxFuture<'_, Result<DurableItem, BusError>> {
        Box::pin(async {
            let (number, item) = self.items.recv().await.ok_or(BusError::Closed)?;
            self.seen = number;
            Ok(item)
        })
    }

    fn applied(&mut self, upto: Position) {
        self.read.send_if_modified(|read| {
            let news = upto > read.applied;
            read.applied = upto.max(read.applied);
            news
        });
    }

    fn ended(&mut self, head: Position) {
        let seen = self.seen;
        self.read.send_if_modified(|read| {
            let before = std::mem::replace(read, Read { seen, head, ..*read });
            *read != before
        });
    }
}

struct Reading {
    bus: NatsBus,
    spec: ConsumerSpec,
    wire: Wire,
    items: mpsc::Sender<(u64, DurableItem)>,
    read: watch::Receiver<Read>,
    /// Kept across sessions: it has the progress even if the server has lost it.
    consumer: Option<Consumer>,
    /// Unacknowledged messages, in order of arrival.
    unsettled: VecDeque<Unsettled>,
    /// Number of the last item.
    item: u64,
    /// Counter of messages that are no events of this store.
    ignored: LogLimit,
    /// Consumer sequence number of the last delivery.
    number: u64,
    /// Highest stream sequence number so far.
    sequence: u64,
    /// Number of messages deleted inside the stream, as last read.
    removed: u64,
    /// Reason of a gap that was not reported yet, because the follower does not read.
    missing: Option<String>,
}

impl Reading {
    async fn run(mut self) {
        let mut backoff = Backoff::new(Duration::from_millis(20), Duration::from_secs(2));
        loop {
            let error = match self.attach().await {
                Ok(why) => {
                    backoff.succeeded();
                    // Read before the gap is reported: a later delivery to another reader then
                    // shows as a missing number.
                    let delivered = self.consumer.as_ref().and_then(Consumer::delivered);
                    (self.number, self.sequence) = delivered.unwrap_or_default();
                    self.removed = 0;
                    self.unsettled.clear();
                    self.gap(why);
                    match self.pass().await {
                        Ok(()) => return,
                        Err(error) => error,
                    }
                }
                Err(error) => error,
            };
            tracing::warn!(consumer = self.spec.name, %error, "lost the consumer of a durable follower");
            if matches!(error, BusError::Closed) {
                return;
            }
            sleep(backoff.next()).await;
        }
    }

    /// Attaches, and returns why messages may be missing. A first attach always has a reason.
    async fn attach(&mut self) -> Result<String, BusError> {
        let connection = self.bus.connection().await?;
        let (stream, options) = self.bus.stream_of()?;
        options.provide(&connection, self.bus.names()).await?;
        let consumer = match &mut self.consumer {
            Some(consumer) if consumer.is_over(&connection) => consumer,
            consumer => consumer.insert(Consumer::new(connection, stream, self.spec.clone())),
        };
        Ok(consumer.attach().await?.unwrap_or_else(|| "the follower starts".into()))
    }

    /// Forwards the items of the consumer until the follower is dropped.
    async fn pass(&mut self) -> Result<(), BusError> {
        let mut progress_at = after(ACK_WAIT / 3);
        loop {
            let room = ROOM.saturating_sub(self.unsettled.len());
            let Some(consumer) = &mut self.consumer else { return Ok(()) };
            tokio::select! {
                changed = self.read.changed() => {
                    if changed.is_err() {
                        return Ok(());
                    }
                    self.ack_applied().await;
                }
                item = consumer.next(room) => match item? {
                    ConsumerItem::Message(taken) => self.bring(taken, room).await?,
                    ConsumerItem::Gap(why) => self.gap(why),
                },
                () = sleep_until(progress_at) => {
                    for Unsettled { acker, .. } in &self.unsettled {
                        // If the server receives no progress, it redelivers.
                        let _ = acker.progress().await;
                    }
                    progress_at = Instant::now() + ACK_WAIT / 3;
                }
            }
        }
    }

    /// Takes a message and those already received.
    ///
    /// One query decides for all of them whether the skipped messages were filtered out or lost.
    /// Messages that the stream loses before delivery leave no other trace.
    async fn bring(&mut self, taken: Taken, room: usize) -> Result<(), BusError> {
        let mut come = vec![taken];
        let Some(consumer) = &mut self.consumer else { return Ok(()) };
        let mut lost = None;
        while come.len() < room
            && let Some(item) = unconstrained(consumer.next(room - come.len())).now_or_never()
        {
            match item? {
                ConsumerItem::Message(taken) => come.push(taken),
                ConsumerItem::Gap(why) => lost = Some(why),
            }
        }
        let mut passed = None;
        for Taken { sequence, .. } in &come {
            if *sequence > self.sequence + 1 {
                passed.get_or_insert(self.sequence + 1);
            }
            self.sequence = self.sequence.max(*sequence);
        }
        if let Some(passed) = passed {
            let (first, removed) = consumer.kept().await?;
            if first > passed || removed != self.removed {
                lost = Some(format!("the stream has lost messages, and message {passed} was not received"));
            }
            self.removed = removed;
        }
        if let Some(why) = lost {
            self.gap(why);
        }
        for taken in come {
            self.take(taken).await;
        }
        Ok(())
    }

    async fn take(&mut self, taken: Taken) {
        let Taken { message, acker, number, .. } = taken;
        if std::mem::replace(&mut self.number, number).wrapping_add(1) != number {
            self.gap("a delivery was lost, or went to another reader".into());
        }
        match self.wire.read_position(message.headers.as_ref()) {
            Ok(position) => {
                self.item += 1;
                self.unsettled.push_back(Unsettled { item: self.item, position, acker });
                self.give(DurableItem::Wake(position));
                self.ack_applied().await;
            }
            Err(reject) => {
                self.report(message.subject.as_str(), &reject);
                let _ = acker.ack_with(AckKind::Ack, false).await;
            }
        }
    }

    fn report(&mut self, subject: &str, reject: &Reject) {
        if let Some(so_far) = self.ignored.count() {
            let consumer = &self.spec.name;
            tracing::warn!(
                consumer,
                subject,
                ?reject,
                so_far,
                "ignoring messages that are no events of this store"
            );
        }
    }

    /// Acknowledges the applied messages.
    /// After a lost ack, the redelivered message is acknowledged at once.
    async fn ack_applied(&mut self) {
        let read = *self.read.borrow_and_update();
        let (done, unsettled): (Vec<_>, _) =
            std::mem::take(&mut self.unsettled).into_iter().partition::<Vec<_>, _>(|one| read.is_done(one));
        self.unsettled = unsettled.into();
        for Unsettled { acker, .. } in done {
            let _ = acker.ack_with(AckKind::Ack, false).await;
        }
    }

    fn gap(&mut self, why: String) {
        tracing::debug!(
            consumer = self.spec.name,
            why,
            "reading the store after a gap in a durable follower"
        );
        self.missing = Some(why);
        self.forward_gap();
    }

    fn forward_gap(&mut self) {
        if let Some(why) = self.missing.take()
            && self.items.try_send((self.item, DurableItem::Gap(why.clone()))).is_err()
        {
            self.missing = Some(why);
        }
    }

    fn give(&mut self, item: DurableItem) {
        self.forward_gap();
        if self.missing.is_none() && self.items.try_send((self.item, item)).is_err() {
            self.missing = Some("the follower was too slow".into());
        }
    }
}
