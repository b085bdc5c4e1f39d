//! Buses over servers, stores with events, and nodes that record their events.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use storied::bus::{
    BusItem, BusPublisher, BusSubscription, JetStreamOptions, LogBatch, LogStreamEnd, NatsBus, NatsOptions,
};
use storied::projection::{ApplyError, InMemory};
use storied::store::{Append, ExpectedVersion};
use storied::testing::Node;
use storied::{
    AnyEvent, Event, EventBus, EventStore, FeedOptions, MemoryStore, Metadata, NewEvent, Position,
    Projection, ProjectionOptions, PublisherOptions, ReadLog, RecordedEvent, StreamId,
};
use tokio::time::{Instant, timeout};

use crate::support::{self, NatsServer};
pub use crate::support::{PATIENCE, eventually};

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Note {
    Written { n: u64, text: String },
    Torn,
}

impl Event for Note {
    const CATEGORY: &'static str = "note";
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Core,
    JetStream,
}

pub const NATS: [Kind; 2] = [Kind::Core, Kind::JetStream];

/// Options with short pauses, so that tests are quick.
pub fn options(kind: Kind, server: &NatsServer) -> NatsOptions {
    let options = match kind {
        Kind::Core => NatsOptions::core(),
        Kind::JetStream => NatsOptions::jetstream(log_stream()),
    };
    quick(options.url(server.url()))
}

pub fn log_stream() -> JetStreamOptions {
    JetStreamOptions::new().max_bytes(100 << 20)
}

pub fn quick(options: NatsOptions) -> NatsOptions {
    options
        .reconnect_wait(Duration::from_millis(100))
        .ping_interval(Duration::from_millis(300))
        // Long enough for a busy machine.
        .answer_timeout(Duration::from_secs(3))
}

/// One bus of each kind, and its server.
pub async fn nats() -> Vec<(Kind, NatsBus, NatsServer)> {
    let mut buses = Vec::new();
    for kind in NATS {
        let server = NatsServer::start(support::NatsOptions::jetstream()).await;
        buses.push((kind, options(kind, &server).bus(), server));
    }
    buses
}

pub fn store() -> Arc<dyn EventStore> {
    Arc::new(MemoryStore::new())
}

pub fn note(store: &Arc<dyn EventStore>, n: u64, size: usize) -> NewEvent {
    let event = Note::Written { n, text: "x".repeat(size) };
    NewEvent::encode(&event, store.info().codec, &Metadata::default()).unwrap()
}

pub async fn append(store: &Arc<dyn EventStore>, stream: u64, events: Vec<NewEvent>) -> Position {
    let stream = StreamId::new("note", stream).unwrap();
    let append = Append::one(stream, ExpectedVersion::Any, events);
    let appended = store.append(vec![append]).await.remove(0).unwrap();
    *appended.positions.last().unwrap()
}

/// Appends `count` notes.
pub async fn write(store: &Arc<dyn EventStore>, stream: u64, count: u64) -> Position {
    append(store, stream, (0..count).map(|n| note(store, n, 40)).collect()).await
}

pub async fn events(store: &Arc<dyn EventStore>, mut after: Position) -> Vec<RecordedEvent> {
    let mut events = Vec::new();
    loop {
        let page = store.read_log(ReadLog::after(after)).await.unwrap();
        let more = page.has_more();
        after = page.scanned_to;
        events.extend(page.events);
        if !more {
            return events;
        }
    }
}

pub async fn log(store: &Arc<dyn EventStore>) -> Vec<Position> {
    events(store, Position::START).await.iter().map(|event| event.position).collect()
}

/// The log after `after`, in batches as the publisher makes them.
pub async fn batches(store: &Arc<dyn EventStore>, after: Position, size: usize) -> Vec<LogBatch> {
    let mut after = after;
    let events = events(store, after).await;
    let cut = events.chunks(size).map(|events| {
        let upto = events.last().unwrap().position;
        LogBatch { after: std::mem::replace(&mut after, upto), upto, events: events.into() }
    });
    cut.collect()
}

/// A publisher at the start of the log, on an unused bus.
pub async fn publisher(bus: &dyn EventBus, store: &Arc<dyn EventStore>) -> Box<dyn BusPublisher> {
    let mut publisher = bus.publisher(store.info().id).await.unwrap();
    publisher.resume(LogStreamEnd::default()).await.unwrap();
    publisher
}

pub async fn subscribe(bus: &dyn EventBus, store: &Arc<dyn EventStore>) -> Box<dyn BusSubscription> {
    timeout(PATIENCE, bus.subscribe(store.info().id)).await.unwrap().unwrap()
}

pub async fn next(subscription: &mut Box<dyn BusSubscription>) -> BusItem {
    timeout(PATIENCE, subscription.next()).await.unwrap().unwrap()
}

/// Waits until the subscription wakes its reader for `position`, without a gap.
pub async fn wakes(subscription: &mut Box<dyn BusSubscription>, position: Position) {
    loop {
        match next(subscription).await {
            BusItem::Upto(upto) if upto >= position => return,
            BusItem::Upto(_) => {}
            other => panic!("{other:?}"),
        }
    }
}

pub fn same(one: &[RecordedEvent], other: &[RecordedEvent]) {
    assert_eq!(format!("{one:?}"), format!("{other:?}"));
}

/// A node over a bus, with a projection that records positions.
pub struct Recording {
    pub node: Node,
    seen: Arc<Mutex<Vec<Position>>>,
}

struct Recorder(Arc<Mutex<Vec<Position>>>);

impl Projection for Recorder {
    const NAME: &'static str = "recorder";
    type Event = AnyEvent;
    type Transaction = ();

    async fn apply(&mut self, _: AnyEvent, event: &RecordedEvent, (): &mut ()) -> Result<(), ApplyError> {
        self.0.lock().unwrap().push(event.position);
        Ok(())
    }

    async fn reset(&mut self, (): &mut ()) -> Result<(), ApplyError> {
        self.0.lock().unwrap().clear();
        Ok(())
    }
}

pub fn publishing() -> PublisherOptions {
    PublisherOptions::new().heartbeat(Duration::from_millis(200)).lease_ttl(Duration::from_millis(1_500))
}

/// A feed that never polls: it finds only what the bus delivers or announces.
pub fn blind() -> FeedOptions {
    FeedOptions::new().idle_poll(Duration::from_secs(3_600))
}

impl Recording {
    pub async fn start(store: &Arc<dyn EventStore>, bus: impl EventBus, feed: FeedOptions) -> Self {
        let node = Node::start(store.clone(), Some(Arc::new(bus)), feed, publishing()).await;
        let seen = Arc::default();
        node.projection(Recorder(Arc::clone(&seen)), InMemory::new(), ProjectionOptions::new()).await;
        Self { node, seen }
    }

    pub fn seen(&self) -> Vec<Position> {
        self.seen.lock().unwrap().clone()
    }

    /// Waits until the projection has the whole log: each event once, in order.
    pub async fn reaches(&self, what: &str, store: &Arc<dyn EventStore>) {
        let log = log(store).await;
        eventually(what, || self.seen().len() >= log.len()).await;
        assert!(self.seen() == log, "{what}: {} seen, {} in the log", self.seen().len(), log.len());
    }
}

/// Appends until a stop. Every append must be quick, whatever the bus does.
pub struct Writer {
    stop: Arc<AtomicBool>,
    task: tokio::task::JoinHandle<(u64, Duration)>,
}

impl Writer {
    pub fn start(store: &Arc<dyn EventStore>, stream: u64, events: u64, pause: Duration) -> Self {
        let (store, stop) = (store.clone(), Arc::new(AtomicBool::new(false)));
        let stopped = stop.clone();
        let task = tokio::spawn(async move {
            let (mut appends, mut longest) = (0, Duration::ZERO);
            while !stopped.load(Ordering::SeqCst) {
                let start = Instant::now();
                write(&store, stream, events).await;
                longest = longest.max(start.elapsed());
                appends += 1;
                tokio::time::sleep(pause).await;
            }
            (appends, longest)
        });
        Self { stop, task }
    }

    /// Returns the number of appends, and the longest duration.
    pub async fn done(self) -> (u64, Duration) {
        self.stop.store(true, Ordering::SeqCst);
        self.task.await.unwrap()
    }
}

pub async fn pause(millis: u64) {
    tokio::time::sleep(Duration::from_millis(millis)).await;
}
