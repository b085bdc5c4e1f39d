//! Raw subscriptions: events for users as they arrive over the bus.

mod common;
mod core;
mod durable;
mod groups;
mod handling;
mod modes;
mod recovery;
mod settings;
mod suite;

use std::time::Duration;

use storied::bus::{
    BusPublisher, Delivery, NatsBus, Received, SubscribeOptions, Subscription, SubscriptionError,
    SubscriptionErrors,
};
use storied::store::{Append, ExpectedVersion};
use storied::{Event, EventStore, Metadata, NewEvent, Position, RecordedEvent, StreamId};
use tokio::time::timeout;

use crate::bus::fixtures::*;

/// Appends and publishes.
pub struct Press {
    pub store: std::sync::Arc<dyn EventStore>,
    publisher: Box<dyn BusPublisher>,
    at: Position,
}

impl Press {
    pub async fn new(bus: &NatsBus) -> Self {
        let store = store();
        let publisher = publisher(bus, &store).await;
        Self { store, publisher, at: Position::START }
    }

    /// Publishes everything that is appended and unpublished.
    pub async fn print(&mut self) -> Vec<RecordedEvent> {
        let printed = events(&self.store, self.at).await;
        for batch in batches(&self.store, self.at, 300).await {
            self.at = batch.upto;
            timeout(PATIENCE, self.publisher.publish(batch)).await.unwrap().unwrap();
        }
        printed
    }

    /// Leaves everything up to this position unpublished.
    pub fn skip(&mut self, upto: Position) {
        self.at = upto;
    }

    /// Publishes `count` written notes.
    pub async fn written(&mut self, count: u64) -> Vec<RecordedEvent> {
        write(&self.store, 0, count).await;
        self.print().await
    }

    /// Publishes any events of one stream, in one append.
    pub async fn events<E: Event>(&mut self, stream: u64, events: &[E]) -> Vec<RecordedEvent> {
        let codec = self.store.info().codec;
        let encoded =
            events.iter().map(|event| NewEvent::encode(event, codec, &Metadata::default()).unwrap());
        let stream = StreamId::new(E::CATEGORY, stream).unwrap();
        let append = Append::one(stream, ExpectedVersion::Any, encoded.collect::<Vec<_>>());
        self.store.append(vec![append]).await.remove(0).unwrap();
        self.print().await
    }
}

pub async fn listen(bus: &NatsBus, names: &[&str], options: SubscribeOptions) -> Subscription {
    timeout(PATIENCE, bus.subscribe(names, options)).await.unwrap().unwrap()
}

pub async fn received(subscription: &mut Subscription) -> Received {
    timeout(PATIENCE, subscription.next()).await.expect("something in time").expect("no end")
}

pub async fn delivery(subscription: &mut Subscription) -> Delivery {
    match received(subscription).await {
        Received::Event(delivery) => delivery,
        other => panic!("{other:?}"),
    }
}

/// Takes the next events, and acknowledges each.
pub async fn take(subscription: &mut Subscription, count: usize) -> Vec<RecordedEvent> {
    let mut events = Vec::new();
    while events.len() < count {
        let delivery = delivery(subscription).await;
        delivery.ack().await.unwrap();
        events.push(delivery.into_event());
    }
    events
}

pub async fn nothing(subscription: &mut Subscription, millis: u64) {
    let more = timeout(Duration::from_millis(millis), subscription.next()).await;
    assert!(more.is_err(), "{more:?}");
}

pub async fn error(errors: &mut SubscriptionErrors) -> SubscriptionError {
    timeout(PATIENCE, errors.next()).await.expect("an error in time").expect("no end")
}
