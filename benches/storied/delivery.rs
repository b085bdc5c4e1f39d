//! Delivery from the store over NATS to a subscriber on another connection, or into the log stream.

use std::time::{Duration, Instant};

use futures_util::StreamExt;
use storied::bus::{JetStreamOptions, Received, SubscribeOptions, Subscription};
use storied::{NatsBus, PublisherState, Runtime};

use crate::args::Plan;
use crate::limits;
use crate::measure::{Comparison, Run};
use crate::nats::{EVENTS, Nats, subscribe};
use crate::stores::Store;
use crate::workloads::AGGREGATES;

/// Publishes a full log into a new log stream until all is confirmed.
///
/// The limit is async-nats with equal messages.
pub async fn log_stream(plan: &Plan) -> Comparison {
    let nats = Nats::start(plan.bus).await;
    let bus = nats.events(plan.bus);
    let ours = fill_log_stream(plan, &full(plan).await, &bus).await;
    let limit = limits::jetstream_publishes(plan, &bus.client().await.unwrap(), true).await;
    nats.drop_log_stream().await;
    Comparison {
        ours,
        limit,
        note: "256 in flight, the expected sequence in each, the limit's as well".into(),
    }
}

/// As [`log_stream`], with each message confirmed before the next one.
///
/// The limit is the normal window of storied.
pub async fn awaited(plan: &Plan) -> Comparison {
    let nats = Nats::start(plan.bus).await;
    let store = full(plan).await;
    let ours = fill_log_stream(plan, &store, &nats.log_stream(JetStreamOptions::new().window(1))).await;
    nats.drop_log_stream().await;
    let limit = fill_log_stream(plan, &store, &nats.log_stream(JetStreamOptions::new())).await;
    nats.drop_log_stream().await;
    Comparison { ours, limit, note: "both are storied: 1 in flight, and 256".into() }
}

/// Publishes messages as in a log stream, with ids.
///
/// The limit is the same without ids. storied always sends ids, so both sides are async-nats.
pub async fn deduplicated(plan: &Plan) -> Comparison {
    let nats = Nats::start(plan.bus).await;
    let store = full(plan).await;
    // Both sides start with the same backlog.
    let publish = async |with_ids| {
        let bus = nats.events(plan.bus);
        fill_log_stream(plan, &store, &bus).await;
        let run = limits::jetstream_publishes(plan, &bus.client().await.unwrap(), with_ids).await;
        nats.drop_log_stream().await;
        run
    };
    Comparison {
        ours: publish(true).await,
        limit: publish(false).await,
        note: "both are async-nats, 256 in flight: with Nats-Msg-Id, and without".into(),
    }
}

async fn full(plan: &Plan) -> Store {
    let store = Store::fresh(plan.store).await;
    store.fill(plan, AGGREGATES).await;
    store.settle().await;
    store
}

async fn fill_log_stream(plan: &Plan, store: &Store, bus: &NatsBus) -> Run {
    let head = store.port().high_water_mark().await.unwrap();
    bus.connect().await.unwrap();
    let start = Instant::now();
    let runtime = store.builder().bus(bus.clone()).start().await.unwrap();
    while runtime.status().await.publisher.published != Some(head) {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let run = Run::whole(plan.events, start.elapsed());
    runtime.shutdown().await.unwrap();
    run
}

/// Appends at full speed, until a subscriber has received the last event.
///
/// The limit is async-nats with equal messages, without a store.
pub async fn deliver(plan: &Plan) -> Comparison {
    let mut scene = Scene::open(plan).await;
    let filled = {
        let (store, plan) = (scene.store.clone(), plan.clone());
        async move { store.fill(&plan, AGGREGATES).await }
    };
    let start = Instant::now();
    let filling = tokio::spawn(filled);
    let (mut received, mut end) = (0, start);
    // Events that async-nats dropped never arrive.
    while let Ok(Some(item)) = tokio::time::timeout(Duration::from_secs(5), scene.subscription.next()).await {
        if let Received::Event(_) = item {
            (received, end) = (received + 1, Instant::now());
        }
        if received == plan.events {
            break;
        }
    }
    let ours = Run::whole(received, end - start);
    filling.await.unwrap();
    let mut message = scene.message().await;
    let nats = scene.close().await;

    let [publisher, subscriber] = [nats.connect().await, nats.connect().await];
    let mut messages = subscribe(&subscriber, message.subject.clone()).await;
    message.headers.get_or_insert_default();
    let count = plan.events;
    let start = Instant::now();
    let publishing = tokio::spawn(async move {
        for _ in 0..count {
            let headers = message.headers.iter().flat_map(|headers| headers.iter());
            let mut copy = async_nats::HeaderMap::new();
            headers.for_each(|(name, values)| copy.insert(name.clone(), values[0].as_str()));
            let (subject, body) = (message.subject.clone(), message.payload.clone());
            publisher.publish_with_headers(subject, copy, body).await.unwrap();
        }
        publisher.flush().await.unwrap();
    });
    let mut arrived = 0;
    // Messages that async-nats dropped never arrive.
    while let Ok(Some(_)) = tokio::time::timeout(Duration::from_secs(1), messages.next()).await {
        arrived += 1;
        if arrived == count {
            break;
        }
    }
    let limit = Run::whole(arrived, start.elapsed());
    publishing.await.unwrap();
    Comparison {
        ours,
        limit,
        note: format!("{received} of {count} came over the bus, {arrived} of the limit's"),
    }
}

/// A publishing node, and a subscriber on another connection.
pub struct Scene {
    nats: Nats,
    pub store: Store,
    node: Runtime,
    pub subscription: Subscription,
    messages: async_nats::Subscriber,
}

impl Scene {
    pub async fn open(plan: &Plan) -> Self {
        let nats = Nats::start(plan.bus).await;
        let store = Store::fresh(plan.store).await;
        let raw = nats.connect().await;
        let mut messages = subscribe(&raw, EVENTS.into()).await;
        // Parsing the others only to drop them would distort the measurement.
        messages.unsubscribe_after(1).await.unwrap();
        let bus = nats.events(plan.bus);
        let subscription = bus.subscribe(&["*"], SubscribeOptions::new()).await.unwrap();
        let node = store.builder().bus(nats.events(plan.bus)).start().await.unwrap();
        while node.status().await.publisher.state != PublisherState::Publishing {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Self { nats, store, node, subscription, messages }
    }

    /// Returns the first published message, which the limit copies.
    ///
    /// This subscriber receives no other.
    pub async fn message(&mut self) -> async_nats::Message {
        self.messages.next().await.unwrap()
    }

    /// Ends everything except the server.
    pub async fn close(self) -> Nats {
        self.node.shutdown().await.unwrap();
        self.nats
    }
}
