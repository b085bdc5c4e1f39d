use std::collections::HashSet;
use std::sync::Arc;

use async_nats::{Message, Subscriber};
use futures_util::{FutureExt, StreamExt};
use tokio::sync::watch;
use uuid::Uuid;

use super::connection::{Connection, Echo, Link};
use super::errors::silent;
use super::merged_subscription::{Merged, subscribe};
use super::subjects::Names;
use super::wire::{Incoming, Reject, Wire};
use crate::bus::{BusError, BusItem, BusSubscription, LogBatch};
use crate::event::RecordedEvent;
use crate::future::BoxFuture;

/// Approximate limits of one batch, in messages and bytes. The publisher uses the same limits.
const EVENTS: usize = 512;
const BYTES: usize = 1 << 20;

/// Maximum number of foreign stores named in the log.
const STRANGERS: usize = 16;

/// A plain subscription to all events and heartbeats of a namespace.
pub(super) struct NatsSubscription {
    /// Keeps the connection and its watcher alive while the subscription lives.
    _connection: Arc<Connection>,
    link: watch::Receiver<Link>,
    /// Link state as of the last item.
    seen: Link,
    events: Merged,
    heads: Subscriber,
    wire: Wire,
    /// Received event that is not adjacent to the last returned batch.
    held: Option<Incoming>,
    /// Number of malformed messages.
    malformed: u64,
    /// Ids of other stores that publish to the same subjects.
    strangers: HashSet<String>,
}

impl NatsSubscription {
    pub(super) async fn new(
        connection: Arc<Connection>,
        names: &Names,
        store: Uuid,
    ) -> Result<Self, BusError> {
        let wire = Wire::new(names, store);
        let link = connection.link();
        let client = &connection.client;
        let since = connection.errors();
        let subjects = [wire.events(), &[wire.head().to_owned()]].concat();
        let (seen, events, heads) = connection
            .ask_permitted("subscribing", &subjects, async {
                let seen = *link.borrow();
                let events = Merged::subscribe(client, wire.events(), None).await?;
                let heads = subscribe(client, wire.head(), None).await?;
                // The server processes requests in order. After the reply, it has the
                // subscriptions.
                Echo::new(client).await?.round_trip(client).await?;
                Ok((seen, events, heads))
            })
            .await?;
        connection.check_refusals("subscribing", &subjects, since).await?;
        let (held, malformed, strangers) = (None, 0, HashSet::new());
        Ok(Self { _connection: connection, link, seen, events, heads, wire, held, malformed, strangers })
    }

    async fn next_item(&mut self) -> Result<BusItem, BusError> {
        loop {
            if let Some(first) = self.held.take() {
                return Ok(self.gather(first));
            }
            // Events before heads: a head that was sent after an event is never taken before it.
            tokio::select! {
                biased;
                changed = self.link.changed() => {
                    let now = *self.link.borrow_and_update();
                    let seen = std::mem::replace(&mut self.seen, now);
                    if changed.is_err() || now.closed {
                        return Err(BusError::Closed);
                    }
                    if (now.sessions, now.overflows) != (seen.sessions, seen.overflows) {
                        return Ok(BusItem::Gap);
                    }
                }
                message = self.events.next() => {
                    let message = message.ok_or_else(|| self.ended())?;
                    self.held = self.read(message);
                }
                message = self.heads.next() => {
                    let message = message.ok_or_else(|| self.ended())?;
                    match self.wire.read_position(message.headers.as_ref()) {
                        Ok(head) => return Ok(BusItem::Head(head)),
                        Err(reject) => self.report(&message, reject),
                    }
                }
            }
        }
    }

    fn ended(&self) -> BusError {
        if self.link.borrow().closed {
            BusError::Closed
        } else {
            silent("the connection to NATS was closed".into())
        }
    }

    /// Gathers the received events that follow `first` without a gap.
    fn gather(&mut self, first: Incoming) -> BusItem {
        let (after, event) = match first {
            Incoming::Large(position) => return BusItem::Head(position),
            Incoming::Event { previous, event } => (previous, event),
        };
        let mut bytes = size(&event);
        let mut upto = event.position;
        let mut events = vec![event];
        while events.len() < EVENTS && bytes < BYTES {
            // Outside the coop budget of tokio, which would cut batches short.
            let waiting = tokio::task::unconstrained(self.events.next()).now_or_never();
            let Some(message) = waiting.flatten() else { break };
            match self.read(message) {
                Some(Incoming::Event { previous, event }) if previous == upto => {
                    bytes += size(&event);
                    upto = event.position;
                    events.push(event);
                }
                Some(other) => {
                    self.held = Some(other);
                    break;
                }
                None => {}
            }
        }
        BusItem::Batch(LogBatch { after, upto, events: events.into() })
    }

    fn read(&mut self, message: Message) -> Option<Incoming> {
        self.wire.read(&message).map_err(|reject| self.report(&message, reject)).ok()
    }

    /// Logs an ignored message.
    /// If it was a damaged event of this store, the next event reveals the gap.
    fn report(&mut self, message: &Message, reject: Reject) {
        let subject = message.subject.as_str();
        match reject {
            Reject::Malformed(what) => {
                self.malformed += 1;
                // A faulty program may send many such messages.
                if self.malformed.is_power_of_two() {
                    let so_far = self.malformed;
                    tracing::warn!(subject, what, so_far, "ignoring a message that is no event of storied");
                }
            }
            Reject::OtherStore(store) => {
                if self.strangers.len() < STRANGERS && self.strangers.insert(store.clone()) {
                    tracing::warn!(
                        subject,
                        other = store,
                        own = %self.wire.store_id(),
                        "ignoring the events of another store in the same namespace"
                    );
                }
            }
        }
    }
}

fn size(event: &RecordedEvent) -> usize {
    event.payload.len() + event.metadata.len()
}

impl BusSubscription for NatsSubscription {
    fn next(&mut self) -> BoxFuture<'_, Result<BusItem, BusError>> {
        Box::pin(self.next_item())
    }
}
