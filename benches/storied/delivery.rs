//! From the store over NATS Core to a subscriber on another connection.

use std::time::{Duration, Instant};

use futures_util::StreamExt;
use sqlx::Executor;
use storied::bus::{BusItem, BusSubscription};
use storied::store::{Append, ExpectedVersion};
use storied::{EventBus, Metadata, NatsBus, NewEvent, Position, PublisherState, Runtime, StreamId};
use tokio::time::{MissedTickBehavior, interval};

use crate::args::{Plan, StoreKind};
use crate::domain::{AccountEvent, text};
use crate::measure::{Comparison, Run};
use crate::stores::{Store, postgres};
use crate::support::{NatsOptions, NatsServer};

const AGGREGATES: usize = 1_000;

/// How often an event is appended while latencies are taken.
const EVERY: Duration = Duration::from_millis(5);

/// Appends as fast as the store takes them, published and received by a subscriber, until it has the last. The limit is
/// async-nats with messages alike, without a store behind it.
pub async fn deliver(plan: &Plan) -> Comparison {
    let mut scene = Scene::open(plan.store).await;
    let filled = {
        let (store, plan) = (scene.store.clone(), plan.clone());
        async move { store.fill(&plan, AGGREGATES).await }
    };
    let start = Instant::now();
    let filling = tokio::spawn(filled);
    let (mut received, mut reached) = (0, Position::START);
    while reached.get() < plan.events as u64 {
        match scene.subscription.next().await.unwrap() {
            BusItem::Batch(batch) => (received, reached) = (received + batch.events.len(), batch.upto),
            BusItem::Head(head) => reached = reached.max(head),
            _ => {}
        }
    }
    let ours = Run::whole(received, start.elapsed());
    filling.await.unwrap();
    let mut message = scene.message().await;
    let server = scene.close().await;

    let [publisher, subscriber] = [connect(&server.url()).await, connect(&server.url()).await];
    let mut messages = subscriber.subscribe(message.subject.clone()).await.unwrap();
    subscriber.flush().await.unwrap();
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
    // What async-nats had to drop does not come.
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

/// From before an append to its arrival at a subscriber, 200 times a second. The limit commits one row by itself, then
/// publishes one message and receives it. Rates are the inverse of the mean latency.
pub async fn latency(plan: &Plan) -> Comparison {
    let mut scene = Scene::open(plan.store).await;
    let event = AccountEvent::Entered { text: text(plan.payload) };
    let codec = scene.store.port().info().codec;
    let mut ticks = interval(EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut latencies = Vec::with_capacity(plan.events);
    for n in 0..plan.events {
        ticks.tick().await;
        let new = NewEvent::encode(&event, codec, &Metadata::default()).unwrap();
        let id = new.id;
        let stream = StreamId::new("account", n % AGGREGATES).unwrap();
        let start = Instant::now();
        let appended = scene.store.port().append(vec![Append::one(stream, ExpectedVersion::Any, vec![new])]);
        for answer in appended.await {
            answer.unwrap();
        }
        loop {
            if let BusItem::Batch(batch) = scene.subscription.next().await.unwrap()
                && batch.events.iter().any(|event| event.id == id)
            {
                break;
            }
        }
        latencies.push(start.elapsed());
    }
    let ours = Run::new(plan.events, latencies.iter().sum(), latencies);
    let message = scene.message().await;
    let server = scene.close().await;

    let [publisher, subscriber] = [connect(&server.url()).await, connect(&server.url()).await];
    let mut messages = subscriber.subscribe(message.subject.clone()).await.unwrap();
    subscriber.flush().await.unwrap();
    let mut table = RawTable::open(plan.store).await;
    let mut latencies = Vec::with_capacity(plan.events);
    for _ in 0..plan.events {
        ticks.tick().await;
        let start = Instant::now();
        table.insert(&message.payload).await;
        let headers = message.headers.clone().unwrap_or_default();
        publisher
            .publish_with_headers(message.subject.clone(), headers, message.payload.clone())
            .await
            .unwrap();
        messages.next().await.unwrap();
        latencies.push(start.elapsed());
    }
    table.close().await;
    let limit = Run::new(plan.events, latencies.iter().sum(), latencies);
    Comparison { ours, limit, note: "mean latency; the ratio is the limit's to ours".into() }
}

/// A node that publishes, and a subscriber on another connection.
struct Scene {
    server: NatsServer,
    store: Store,
    node: Runtime,
    subscription: Box<dyn BusSubscription>,
    messages: async_nats::Subscriber,
}

impl Scene {
    async fn open(kind: StoreKind) -> Self {
        let server = NatsServer::start(NatsOptions::core()).await;
        let store = Store::fresh(kind).await;
        let raw = connect(&server.url()).await;
        let messages = raw.subscribe("storied.events.>").await.unwrap();
        raw.flush().await.unwrap();
        let bus = NatsBus::core(server.url());
        let subscription = EventBus::subscribe(&bus, store.port().info().id).await.unwrap();
        let node = store.builder().bus(NatsBus::core(server.url())).start().await.unwrap();
        while node.status().await.publisher.state != PublisherState::Publishing {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Self { server, store, node, subscription, messages }
    }

    /// The first message that was published, for the limit to copy. It is the only one that this subscriber takes.
    async fn message(&mut self) -> async_nats::Message {
        self.messages.next().await.unwrap()
    }

    /// Ends all but the server.
    async fn close(self) -> NatsServer {
        self.node.shutdown().await.unwrap();
        self.server
    }
}

async fn connect(url: &str) -> async_nats::Client {
    async_nats::connect(url).await.unwrap()
}

/// Where the limit commits its rows.
enum RawTable {
    /// Memory has nothing to commit to.
    None,
    Postgres(Box<sqlx::PgConnection>),
}

impl RawTable {
    async fn open(kind: StoreKind) -> Self {
        match kind {
            StoreKind::Postgres => {
                let mut connection = postgres().await;
                let table =
                    "DROP TABLE IF EXISTS raw_latency; CREATE TABLE raw_latency (body bytea NOT NULL)";
                connection.execute(table).await.unwrap();
                Self::Postgres(Box::new(connection))
            }
            StoreKind::Memory | StoreKind::Sqlite => Self::None,
        }
    }

    async fn insert(&mut self, body: &[u8]) {
        if let Self::Postgres(connection) = self {
            let insert = sqlx::query("INSERT INTO raw_latency VALUES ($1)").bind(body);
            insert.execute(&mut **connection).await.unwrap();
        }
    }

    async fn close(self) {
        if let Self::Postgres(mut connection) = self {
            connection.execute("DROP TABLE raw_latency").await.unwrap();
        }
    }
}
