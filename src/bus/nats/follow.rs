//! Following durably: a consumer of the mirror for one follower, which has picked out what is asked for and keeps it until it is
//! applied.

use std::collections::VecDeque;
use std::time::Duration;

use async_nats::jetstream::AckKind;
use async_nats::jetstream::consumer::DeliverPolicy;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, sleep_until};

use super::jetstream::{Consumer, ConsumerItem, ConsumerPolicy, ConsumerSpec, Settle, Taken};
use super::subjects::patterns;
use super::wire::{Incoming, read_any};
use super::{NatsBus, naming};
use crate::backoff::Backoff;
use crate::bus::{BusError, DurableItem, DurableSubscription, Follow};
use crate::event::Position;
use crate::future::BoxFuture;
use crate::supervised::Task;
use crate::time::after;

/// How many events may be out without being applied.
const ROOM: usize = 512;

/// How long the server waits before it delivers again; it is told long before that somebody is at work.
const ACK_WAIT: Duration = Duration::from_secs(30);

/// A consumer, and the task that reads from it.
pub(super) struct NatsFollower {
    items: mpsc::Receiver<DurableItem>,
    applied: watch::Sender<Position>,
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
        // What lists nothing matches nothing; then nothing is kept, and what else there is comes from the store.
        let given = if given.is_empty() { vec!["storied.nothing".to_owned()] } else { given };
        let patterns =
            patterns(given).map_err(|error| BusError::Incompatible { reason: error.to_string() })?;
        let (filters, _) = bus.names().mapping.filters(&patterns);
        let spec = follower_spec(naming::custom(&name), filters);
        let (sender, items) = mpsc::channel(2 * ROOM);
        let (applied, upto) = watch::channel(Position::START);
        let reading = Reading {
            bus,
            spec,
            store,
            items: sender,
            applied: upto,
            consumer: None,
            unsettled: VecDeque::new(),
            number: None,
            full: false,
            missing: None,
        };
        Ok(Self { items, applied, _task: Task::spawn(reading.run()) })
    }
}

/// The consumer of a follower.
pub(super) fn follower_spec(name: String, filters: Vec<String>) -> ConsumerSpec {
    ConsumerSpec {
        name,
        durable: true,
        shared: false,
        filters,
        // What was there before comes from the store, which is read behind every gap, and the first item is one.
        start: DeliverPolicy::New,
        ack_wait: ACK_WAIT,
        max_deliver: None,
        backoff: Vec::new(),
        max_ack_pending: 2 * ROOM,
        push: None,
        inactive: Duration::ZERO,
        // A program that asks for other names by now goes on from where it was.
        policy: ConsumerPolicy::CreateOrUpdate,
    }
}

impl DurableSubscription for NatsFollower {
    fn next(&mut self) -> BoxFuture<'_, Result<DurableItem, BusError>> {
        Box::pin(async { self.items.recv().await.ok_or(BusError::Closed) })
    }

    fn applied(&mut self, upto: Position) {
        self.applied.send_if_modified(|applied| upto > std::mem::replace(applied, upto.max(*applied)));
    }
}

struct Reading {
    bus: NatsBus,
    spec: ConsumerSpec,
    store: uuid::Uuid,
    items: mpsc::Sender<DurableItem>,
    applied: watch::Receiver<Position>,
    /// Survives the end of a session: it knows how far it was when the server does not any more.
    consumer: Option<Consumer>,
    /// In the order in which they came.
    unsettled: VecDeque<(Position, Settle)>,
    /// Of the last delivery.
    number: Option<u64>,
    /// Nothing more was asked for: the follower has as much unsettled as it may.
    full: bool,
    /// Why something is missing that the follower has not been told of: it does not read.
    missing: Option<String>,
}

impl Reading {
    async fn run(mut self) {
        let mut backoff = Backoff::new(Duration::from_millis(20), Duration::from_secs(2));
        loop {
            let error = match self.attach().await {
                Ok(why) => {
                    backoff.succeeded();
                    // Known from before the gap is told of: what others are given from then on shows as a missing number.
                    self.number = self.consumer.as_ref().and_then(Consumer::delivered);
                    self.full = false;
                    self.unsettled.clear();
                    self.gap(why);
                    match self.pass().await {
                        Ok(()) => return,
                        Err(error) => error,
                    }
                }
                Err(error) => error,
            };
            tracing::warn!(consumer = self.spec.name, %error, "a durable follower has lost its consumer");
            if matches!(error, BusError::Closed) {
                return;
            }
            sleep(backoff.next()).await;
        }
    }

    /// Why something may be missing: at least because nobody has listened before.
    async fn attach(&mut self) -> Result<String, BusError> {
        let connection = self.bus.connection().await?;
        let (stream, options) = self.bus.stream_of()?;
        options.provide(&connection, self.bus.names()).await?;
        let consumer = match &mut self.consumer {
            Some(consumer) if consumer.is_over(&connection) => consumer,
            consumer => consumer.insert(Consumer::new(connection, stream, self.spec.clone())),
        };
        Ok(consumer.attach().await?.unwrap_or_else(|| "it begins to listen".into()))
    }

    /// Passes on what the consumer brings, until the follower is gone.
    async fn pass(&mut self) -> Result<(), BusError> {
        let mut tell_at = after(ACK_WAIT / 3);
        loop {
            let room = ROOM.saturating_sub(self.unsettled.len());
            if room == 0 {
                self.full = true;
            } else if std::mem::take(&mut self.full) {
                // Before anything that comes now: the stream's limits may have removed what was not asked for, and deliveries
                // are numbered as if it had never been.
                self.gap("it could take no more for a while".into());
            }
            let Some(consumer) = &mut self.consumer else { return Ok(()) };
            tokio::select! {
                changed = self.applied.changed() => {
                    if changed.is_err() {
                        return Ok(());
                    }
                    self.settle().await;
                }
                item = consumer.next(room) => match item? {
                    ConsumerItem::Message(taken) => self.take(taken).await,
                    ConsumerItem::Gap(why) => self.gap(why),
                },
                () = sleep_until(tell_at) => {
                    for (_, settle) in &self.unsettled {
                        // Where the server cannot be told, it delivers again.
                        let _ = settle.progress().await;
                    }
                    tell_at = Instant::now() + ACK_WAIT / 3;
                }
            }
        }
    }

    async fn take(&mut self, taken: Taken) {
        let Taken { message, settle, number, .. } = taken;
        if self.number.replace(number).is_some_and(|last| number != last.wrapping_add(1)) {
            self.gap("a delivery was lost, or somebody else has had it".into());
        }
        match read_any(&message) {
            Ok((store, Incoming::Event { event, .. })) if store == self.store => {
                self.unsettled.push_back((event.position, settle));
                self.give(DurableItem::Event(event));
                self.settle().await;
            }
            other => {
                // Its content is in the store, or not for us.
                self.gap(match other {
                    Ok((store, Incoming::Event { .. })) => {
                        format!("an event of the store {store} is in the mirror")
                    }
                    Ok((_, Incoming::Large(position))) => {
                        format!("the event at {position} was too large to travel")
                    }
                    Err(reject) => format!("a message cannot be read: {reject:?}"),
                });
                let _ = settle.settle(AckKind::Ack, false).await;
            }
        }
    }

    /// Settles what is applied. If the server does not hear it, it comes again, and is passed over.
    async fn settle(&mut self) {
        let upto = *self.applied.borrow_and_update();
        let (applied, unsettled): (Vec<_>, _) = std::mem::take(&mut self.unsettled)
            .into_iter()
            .partition::<Vec<_>, _>(|(position, _)| *position <= upto);
        self.unsettled = unsettled.into();
        for (_, settle) in applied {
            let _ = settle.settle(AckKind::Ack, false).await;
        }
    }

    fn gap(&mut self, why: String) {
        tracing::debug!(consumer = self.spec.name, why, "a durable follower reads the store");
        self.missing = Some(why);
        self.tell_of_gap();
    }

    fn tell_of_gap(&mut self) {
        if let Some(why) = self.missing.take()
            && self.items.try_send(DurableItem::Gap(why.clone())).is_err()
        {
            self.missing = Some(why);
        }
    }

    fn give(&mut self, item: DurableItem) {
        self.tell_of_gap();
        if self.missing.is_none() && self.items.try_send(item).is_err() {
            self.missing = Some("the follower did not read".into());
        }
    }
}
