use std::collections::HashSet;
use std::sync::Arc;

use async_nats::{Message, Subscriber};
use futures_util::stream::{SelectAll, select_all};
use futures_util::{FutureExt, StreamExt};
use tokio::sync::watch;
use tokio::task::unconstrained;
use uuid::Uuid;

use super::connection::{Connection, Echo, Link};
use super::errors::silent;
use super::merged_subscription::subscribe;
use super::subjects::Names;
use super::wire::{Reject, Wire};
use crate::bus::{BusError, BusItem, BusSubscription};
use crate::event::Position;
use crate::future::BoxFuture;

/// Maximum number of messages that share one wake-up.
const MESSAGES: usize = 512;

/// Maximum number of foreign stores named in the log.
const STRANGERS: usize = 16;

/// A plain subscription to all events and heartbeats of a namespace.
pub(super) struct NatsSubscription {
    /// Keeps the connection and its watcher alive while the subscription lives.
    _connection: Arc<Connection>,
    link: watch::Receiver<Link>,
    /// Link state as of the last item.
    seen: Link,
    messages: SelectAll<Subscriber>,
    wire: Wire,
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
        let (seen, messages) = connection
            .ask_permitted("subscribing", &subjects, async {
                let seen = *link.borrow();
                let mut subscribers = Vec::with_capacity(subjects.len());
                for subject in &subjects {
                    subscribers.push(subscribe(client, subject, None).await?);
                }
                // The server processes requests in order. After the reply, it has the
                // subscriptions.
                Echo::new(client).await?.round_trip(client).await?;
                Ok((seen, select_all(subscribers)))
            })
            .await?;
        connection.check_refusals("subscribing", &subjects, since).await?;
        let (malformed, strangers) = (0, HashSet::new());
        Ok(Self { _connection: connection, link, seen, messages, wire, malformed, strangers })
    }

    async fn next_item(&mut self) -> Result<BusItem, BusError> {
        loop {
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
                message = self.messages.next() => {
                    let message = message.ok_or_else(|| self.ended())?;
                    if let Some(upto) = self.furthest(&message) {
                        return Ok(BusItem::Upto(upto));
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

    /// Returns the highest position in `first` and the messages received after it.
    fn furthest(&mut self, first: &Message) -> Option<Position> {
        let mut upto = self.position(first);
        for _ in 1..MESSAGES {
            // Outside the coop budget of tokio, which would leave messages for another wake-up.
            let Some(message) = unconstrained(self.messages.next()).now_or_never().flatten() else { break };
            upto = upto.max(self.position(&message));
        }
        upto
    }

    fn position(&mut self, message: &Message) -> Option<Position> {
        let position = self.wire.read_position(message.headers.as_ref());
        position.map_err(|reject| self.report(message, reject)).ok()
    }

    /// Logs an ignored message.
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

impl BusSubscription for NatsSubscription {
    fn next(&mut self) -> BoxFuture<'_, Result<BusItem, BusError>> {
        Box::pin(self.next_item())
    }
}
