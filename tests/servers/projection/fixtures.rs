//! Events, projections that record what they received, and a store and buses with faults.

use std::collections::{BTreeMap, VecDeque};
use std::marker::PhantomData;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use sqlx::sqlite::SqliteConnection;
use storied::bus::{
    BusError, BusItem, BusPublisher, BusState, BusSubscription, LogBatch, LogStreamEnd, Resume,
};
use storied::projection::{ApplyError, InMemory, ProjectionState, ReadModel, Snapshots, SqliteReadModel};
use storied::store::{
    Append, AppendError, Appended, BoxFuture, Checkpoint, CheckpointError, CheckpointKey, ControlChange,
    DueCommands, DueSchedules, ExpectedVersion, Lease, LeaseInfo, LogPage, NewScheduledCommand, ParkedEvent,
    ProgressWrite, ProjectionControl, PublisherCheckpoint, Query, QueryStore, Request, ScheduleStore,
    ScheduledCommand, ScheduledEnd, ScheduledQuery, Snapshot, StoreInfo, StoredProgress, StoredProjection,
    StoredRequest, StoredSchedule,
};
use storied::testing::{Node, Sealed};
use storied::{
    AnyEvent, Event, EventBus, EventStore, FeedOptions, Filter, MemoryStore, Metadata, NewEvent, Position,
    Projection, ProjectionHandle, ProjectionOptions, PublisherOptions, PublisherState, ReadLog,
    RecordedEvent, SqliteStore, StoreError, StreamId, Version,
};
use tempfile::TempDir;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{broadcast, watch};
use tokio::time::timeout;
use uuid::Uuid;

pub use crate::support::{Dice, PATIENCE, eventually};

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Thing {
    Even { n: u64 },
    Odd { n: u64 },
    Never,
}

impl Event for Thing {
    const CATEGORY: &'static str = "thing";
}

impl Thing {
    pub fn of(n: u64) -> Self {
        if n.is_multiple_of(2) { Thing::Even { n } } else { Thing::Odd { n } }
    }
}

/// Returns all kinds of stores.
pub async fn stores() -> Vec<(&'static str, Arc<dyn EventStore>, TempDir)> {
    let dir = TempDir::new().unwrap();
    let sqlite = SqliteStore::open(dir.path().join("events.db")).await.unwrap();
    vec![
        ("memory", Arc::new(MemoryStore::new()) as _, TempDir::new().unwrap()),
        ("sqlite", Arc::new(sqlite) as _, dir),
    ]
}

pub async fn append(
    store: &Arc<dyn EventStore>,
    stream: u64,
    numbers: impl IntoIterator<Item = u64>,
) -> Position {
    let codec = store.info().codec;
    let events =
        numbers.into_iter().map(|n| NewEvent::encode(&Thing::of(n), codec, &Metadata::default()).unwrap());
    append_raw(store, stream, events.collect()).await
}

pub async fn append_raw(store: &Arc<dyn EventStore>, stream: u64, events: Vec<NewEvent>) -> Position {
    let stream = StreamId::new("thing", stream).unwrap();
    let append = Append::one(stream, ExpectedVersion::Any, events);
    let appended = store.append(vec![append]).await.remove(0).unwrap();
    *appended.positions.last().unwrap()
}

/// An event with bytes that are not a `Thing`.
pub fn garbage(store: &Arc<dyn EventStore>) -> NewEvent {
    let event = NewEvent::encode(&Thing::Even { n: 0 }, store.info().codec, &Metadata::default()).unwrap();
    NewEvent { payload: Bytes::from_static(&[0xff, 0x00]), ..event }
}

/// Returns the log for a filter.
pub async fn log(store: &Arc<dyn EventStore>, filter: &Filter) -> Vec<Position> {
    let mut positions = Vec::new();
    let mut after = Position::START;
    loop {
        let page = store.read_log(ReadLog::after(after).filter(filter.clone())).await.unwrap();
        positions.extend(page.events.iter().map(|event| event.position));
        after = page.scanned_to;
        if !page.has_more() {
            return positions;
        }
    }
}

pub fn evens() -> Filter {
    Filter::variants::<Thing>(["even"])
}

/// A test's action on an event before it is recorded.
pub type Hook = Arc<dyn Fn(&RecordedEvent) -> BoxFuture<'static, Result<(), ApplyError>> + Send + Sync>;

pub fn hook(f: impl Fn(&RecordedEvent) -> Result<(), ApplyError> + Send + Sync + 'static) -> Hook {
    Arc::new(move |event| {
        let result = f(event);
        Box::pin(async { result })
    })
}

/// Fails for the event at this position while `broken` is set.
pub fn poison(position: u64, broken: &Arc<AtomicBool>) -> Hook {
    let broken = broken.clone();
    hook(move |event| {
        let fails = event.position.get() == position && broken.load(Ordering::SeqCst);
        if fails { Err("poison".into()) } else { Ok(()) }
    })
}

/// Blocks every event while it is closed.
#[derive(Clone)]
pub struct Gate(watch::Sender<bool>);

impl Gate {
    pub fn closed() -> Self {
        Self(watch::Sender::new(true))
    }

    pub fn open(&self) {
        self.0.send_replace(false);
    }

    /// Waits until an event is blocked.
    pub async fn reached(&self) {
        timeout(PATIENCE, async {
            while self.0.receiver_count() == 0 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        })
        .await
        .unwrap();
    }

    pub fn hook(&self) -> Hook {
        let gate = self.clone();
        Arc::new(move |_| gate.pass())
    }

    pub fn pass(&self) -> BoxFuture<'static, Result<(), ApplyError>> {
        let mut gate = self.0.subscribe();
        Box::pin(async move {
            gate.wait_for(|closed| !closed).await.unwrap();
            Ok(())
        })
    }
}

/// The events that a [`Recorder`] received.
#[derive(Clone, Default)]
pub struct Seen(Arc<Mutex<Vec<Position>>>);

impl Seen {
    pub fn positions(&self) -> Vec<Position> {
        self.0.lock().unwrap().clone()
    }
}

/// Records the received positions in memory, including duplicates.
pub struct Recorder<T> {
    name: String,
    filter: Filter,
    hook: Hook,
    pub seen: Seen,
    transaction: PhantomData<fn(T)>,
}

pub fn recorder<T>(name: &str) -> Recorder<T> {
    Recorder {
        name: name.into(),
        filter: Filter::all(),
        hook: hook(|_| Ok(())),
        seen: Seen::default(),
        transaction: PhantomData,
    }
}

impl<T> Recorder<T> {
    pub fn filter(self, filter: Filter) -> Self {
        Self { filter, ..self }
    }

    pub fn hook(self, hook: Hook) -> Self {
        Self { hook, ..self }
    }

    /// Records the events of several recorders in one list.
    pub fn into(self, seen: &Seen) -> Self {
        Self { seen: seen.clone(), ..self }
    }
}

impl<T: Send + 'static> Projection for Recorder<T> {
    const NAME: &'static str = "recorder";
    type Event = AnyEvent;
    type Transaction = T;

    fn name(&self) -> &str {
        &self.name
    }

    fn filter(&self) -> Filter {
        self.filter.clone()
    }

    async fn apply(&mut self, _: AnyEvent, event: &RecordedEvent, _: &mut T) -> Result<(), ApplyError> {
        (self.hook)(event).await?;
        self.seen.0.lock().unwrap().push(event.position);
        Ok(())
    }

    async fn reset(&mut self, _: &mut T) -> Result<(), ApplyError> {
        self.seen.0.lock().unwrap().clear();
        Ok(())
    }
}

/// Records the received positions in a table, in the transaction of its checkpoint.
pub struct Table {
    name: String,
    hook: Hook,
}

pub fn table(name: &str) -> Table {
    Table { name: name.into(), hook: hook(|_| Ok(())) }
}

impl Table {
    pub fn hook(self, hook: Hook) -> Self {
        Self { hook, ..self }
    }
}

impl Projection for Table {
    const NAME: &'static str = "table";
    type Event = AnyEvent;
    type Transaction = SqliteConnection;

    fn name(&self) -> &str {
        &self.name
    }

    async fn apply(
        &mut self,
        _: AnyEvent,
        event: &RecordedEvent,
        tx: &mut SqliteConnection,
    ) -> Result<(), ApplyError> {
        sqlx::query("INSERT INTO seen (name, position) VALUES (?, ?)")
            .bind(&self.name)
            .bind(event.position.get() as i64)
            .execute(tx)
            .await?;
        // After the write, so that a failure has something to roll back.
        (self.hook)(event).await
    }

    async fn reset(&mut self, tx: &mut SqliteConnection) -> Result<(), ApplyError> {
        sqlx::query("DELETE FROM seen WHERE name = ?").bind(&self.name).execute(tx).await?;
        Ok(())
    }
}

/// A read model with a configurable number of panics in `begin`.
pub struct Panicky {
    pub inner: InMemory,
    pub panics: Arc<AtomicU64>,
}

impl Sealed for Panicky {}

impl ReadModel for Panicky {
    type Transaction = ();
    type Open = <InMemory as ReadModel>::Open;

    fn shared(&self) -> bool {
        false
    }

    fn rolls_back(&self) -> bool {
        false
    }

    fn snapshots(&self) -> Option<&Snapshots> {
        self.inner.snapshots()
    }

    async fn prepare(&self, store: &Arc<dyn EventStore>) -> Result<(), StoreError> {
        self.inner.prepare(store).await
    }

    async fn projection(&self, name: &str) -> Result<StoredProjection, StoreError> {
        self.inner.projection(name).await
    }

    async fn checkpoint(&self, key: &CheckpointKey) -> Result<Checkpoint, StoreError> {
        self.inner.checkpoint(key).await
    }

    async fn parked(
        &self,
        key: &CheckpointKey,
        from: Position,
        limit: usize,
    ) -> Result<Vec<ParkedEvent>, StoreError> {
        self.inner.parked(key, from, limit).await
    }

    async fn requests(
        &self,
        projection: &str,
        from: Request,
        limit: usize,
    ) -> Result<Vec<StoredRequest>, StoreError> {
        self.inner.requests(projection, from, limit).await
    }

    async fn begin(
        &self,
        projection: &str,
        from: Checkpoint,
        limit: Option<Duration>,
    ) -> Result<Self::Open, StoreError> {
        let panics = self.panics.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
        assert!(panics.is_err(), "on purpose");
        self.inner.begin(projection, from, limit).await
    }

    fn transaction<'a>(&self, open: &'a mut Self::Open) -> &'a mut () {
        self.inner.transaction(open)
    }

    async fn adopt(&self, open: &mut Self::Open, projection: &str) -> Result<StoredProgress, StoreError> {
        self.inner.adopt(open, projection).await
    }

    async fn write(&self, open: &mut Self::Open, write: ProgressWrite) -> Result<(), CheckpointError> {
        self.inner.write(open, write).await
    }

    async fn commit(&self, open: Self::Open, writes: Vec<ProgressWrite>) -> Result<(), CheckpointError> {
        self.inner.commit(open, writes).await
    }

    async fn rollback(&self, open: Self::Open) -> Result<(), StoreError> {
        self.inner.rollback(open).await
    }
}

/// A database for [`Table`]s.
pub struct Database {
    pub dir: TempDir,
}

impl Database {
    pub async fn new() -> Self {
        let database = Self { dir: TempDir::new().unwrap() };
        let model = database.open().await;
        sqlx::query("CREATE TABLE seen (id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT, position INTEGER)")
            .execute(model.pool())
            .await
            .unwrap();
        database
    }

    pub fn path(&self) -> PathBuf {
        self.dir.path().join("read-model.db")
    }

    pub async fn open(&self) -> SqliteReadModel {
        SqliteReadModel::open(self.path()).await.unwrap()
    }

    /// Returns the positions in a table, in order of arrival.
    pub async fn seen(&self, name: &str) -> Vec<Position> {
        let model = self.open().await;
        let rows: Vec<i64> = sqlx::query_scalar("SELECT position FROM seen WHERE name = ? ORDER BY id")
            .bind(name)
            .fetch_all(model.pool())
            .await
            .unwrap();
        rows.into_iter().map(|position| Position::new(position as u64)).collect()
    }
}

/// Moves a checkpoint in a store.
pub async fn save(
    store: &Arc<dyn EventStore>,
    key: CheckpointKey,
    from: Checkpoint,
    to: Checkpoint,
) -> Result<(), CheckpointError> {
    store.write_progress(vec![ProgressWrite::Checkpoint { key, from, to }]).await
}

/// A node with short pauses, so that tests are quick.
pub async fn node(store: &Arc<dyn EventStore>, bus: impl EventBus) -> Node {
    Node::start(store.clone(), Some(Arc::new(bus)), quick(), publishing()).await
}

pub fn quick() -> FeedOptions {
    FeedOptions::new().idle_poll(Duration::from_millis(50))
}

pub fn publishing() -> PublisherOptions {
    PublisherOptions::new().heartbeat(Duration::from_millis(50)).lease_ttl(Duration::from_millis(300))
}

/// A node without a bus.
pub async fn local_node(store: &Arc<dyn EventStore>) -> Node {
    Node::start(store.clone(), None, quick(), publishing()).await
}

/// A publishing node, and a node that follows it over a bus with faults.
///
/// Nothing but the bus and `feed` wakes the second node.
pub async fn two_nodes(store: &Arc<dyn EventStore>, bus: Lossy, feed: FeedOptions) -> [Node; 2] {
    let bus: Arc<dyn EventBus> = Arc::new(bus);
    let options = publishing().lease_ttl(Duration::from_secs(600));
    let publishing = Node::start(store.clone(), Some(bus.clone()), quick(), options.clone()).await;
    eventually("it publishes", || publishing.publisher().state == PublisherState::Publishing).await;
    let apart = Arc::new(Link::new(store).apart());
    [publishing, Node::start(apart, Some(bus), feed, options).await]
}

/// Quick retries.
pub fn options() -> ProjectionOptions {
    ProjectionOptions::new().initial_backoff(Duration::from_millis(1)).max_backoff(Duration::from_millis(10))
}

/// A short lease, for tests that lose it. On a busy machine that can happen at any time.
pub fn short_lived() -> ProjectionOptions {
    options().lease(Duration::from_secs(1))
}

pub async fn reach(handle: &ProjectionHandle, state: ProjectionState) {
    let mut watch = handle.watch();
    let reached = timeout(PATIENCE, watch.wait_for(|status| status.state == state)).await;
    assert!(matches!(reached, Ok(Ok(_))), "{} never became {state:?}: {:?}", handle.name(), handle.status());
}

/// Waits for a change by another node, which reaches this one within a second.
pub async fn leave(handle: &ProjectionHandle, state: ProjectionState) {
    let mut watch = handle.watch();
    let left = timeout(PATIENCE, watch.wait_for(|status| status.state != state)).await;
    assert!(matches!(left, Ok(Ok(_))), "{} remained {state:?}: {:?}", handle.name(), handle.status());
}

pub async fn catch_up(handle: &ProjectionHandle, position: Position) {
    if let Err(error) = handle.caught_up_to_within(position, PATIENCE).await {
        panic!("{error}; {:?}", handle.status());
    }
}

/// Faults of the items for subscribers of a [`Lossy`] bus.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loss {
    /// Everything: dropped, doubled, delayed, out of order, and broken subscriptions.
    Chaos,
    /// Only heartbeats arrive.
    Batches,
    /// Nothing arrives, without an error.
    Silence,
    /// Subscribing fails.
    Refused,
    /// Everything arrives, but every third item is a panic of the bus.
    Panics,
}

/// A message of a [`Lossy`] bus.
#[derive(Debug, Clone, Copy)]
enum Sent {
    Events(Position),
    Heartbeat(Position),
}

/// A bus that keeps nothing and loses items.
pub struct Lossy {
    sent: broadcast::Sender<Sent>,
    loss: Loss,
    dice: Arc<Dice>,
}

impl Lossy {
    pub fn new(loss: Loss, seed: u64) -> Self {
        Self { sent: broadcast::Sender::new(128), loss, dice: Arc::new(Dice::new(seed)) }
    }
}

impl EventBus for Lossy {
    fn name(&self) -> &'static str {
        "lossy"
    }

    fn state(&self) -> BusState {
        BusState::Connected { to: "this process".into(), last_error: None }
    }

    fn publisher(&self, _: Uuid) -> BoxFuture<'_, Result<Box<dyn BusPublisher>, BusError>> {
        Box::pin(async { Ok(Box::new(LossyPublisher(self.sent.clone())) as _) })
    }

    fn subscribe(&self, _: Uuid) -> BoxFuture<'_, Result<Box<dyn BusSubscription>, BusError>> {
        Box::pin(async move {
            if self.loss == Loss::Refused {
                return Err(BusError::Unavailable { reason: "refused".into(), source: None });
            }
            let (sent, loss, dice) = (self.sent.subscribe(), self.loss, self.dice.clone());
            Ok(Box::new(LossySubscription { sent, loss, dice, ready: VecDeque::new(), held: Vec::new() })
                as _)
        })
    }
}

struct LossyPublisher(broadcast::Sender<Sent>);

impl BusPublisher for LossyPublisher {
    fn resume(&mut self, _: LogStreamEnd) -> BoxFuture<'_, Result<Resume, BusError>> {
        Box::pin(async { Ok(Resume::AtHighWaterMark) })
    }

    fn publish(&mut self, batch: LogBatch) -> BoxFuture<'_, Result<LogStreamEnd, BusError>> {
        // An error means that there is no subscriber.
        let _ = self.0.send(Sent::Events(batch.upto));
        Box::pin(async move { Ok(LogStreamEnd { position: batch.upto, sequence: 0 }) })
    }

    fn heartbeat(&mut self, head: Position) -> BoxFuture<'_, Result<(), BusError>> {
        let _ = self.0.send(Sent::Heartbeat(head));
        Box::pin(async { Ok(()) })
    }
}

struct LossySubscription {
    sent: broadcast::Receiver<Sent>,
    loss: Loss,
    dice: Arc<Dice>,
    ready: VecDeque<BusItem>,
    held: Vec<BusItem>,
}

impl BusSubscription for LossySubscription {
    fn next(&mut self) -> BoxFuture<'_, Result<BusItem, BusError>> {
        Box::pin(async {
            loop {
                if let Some(item) = self.ready.pop_front() {
                    return Ok(item);
                }
                let (item, is_heartbeat) = match self.sent.recv().await {
                    Ok(Sent::Events(upto)) => (BusItem::Upto(upto), false),
                    Ok(Sent::Heartbeat(upto)) => (BusItem::Upto(upto), true),
                    Err(RecvError::Lagged(_)) => (BusItem::Gap, false),
                    Err(RecvError::Closed) => return Err(BusError::Closed),
                };
                match self.loss {
                    Loss::Chaos => match self.dice.roll(12) {
                        0 | 1 => {}
                        2 => self.ready.extend([item, item]),
                        3 | 4 => self.held.push(item),
                        5 => self.ready.extend(self.held.drain(..).rev().chain([item])),
                        6 => {
                            self.ready.push_back(item);
                            self.ready.extend(self.held.drain(..));
                        }
                        7 => return Err(BusError::Unavailable { reason: "cut off".into(), source: None }),
                        8 => return Ok(BusItem::Gap),
                        _ => return Ok(item),
                    },
                    Loss::Batches if is_heartbeat => return Ok(item),
                    Loss::Panics if self.dice.roll(3) == 0 => panic!("on purpose"),
                    Loss::Panics => return Ok(item),
                    _ => {}
                }
            }
        })
    }
}

/// A bus that keeps everything and rejects a batch that does not follow its end.
///
/// JetStream with an expected last sequence does the same.
#[derive(Clone, Default)]
pub struct LogStream {
    kept: Arc<Mutex<Vec<Position>>>,
    /// Publishing fails.
    pub down: Arc<AtomicBool>,
    /// Publishing hangs.
    pub hangs: Arc<AtomicBool>,
    /// Publishing panics.
    pub panics: Arc<AtomicBool>,
    /// Number of panics.
    pub panicked: Arc<AtomicU64>,
}

impl LogStream {
    pub fn kept(&self) -> Vec<Position> {
        self.kept.lock().unwrap().clone()
    }

    fn end(&self) -> LogStreamEnd {
        let kept = self.kept.lock().unwrap();
        LogStreamEnd { position: kept.last().copied().unwrap_or_default(), sequence: kept.len() as u64 }
    }
}

impl EventBus for LogStream {
    fn name(&self) -> &'static str {
        "log_stream"
    }

    fn state(&self) -> BusState {
        BusState::Connected { to: "the log stream".into(), last_error: None }
    }

    fn publisher(&self, _: Uuid) -> BoxFuture<'_, Result<Box<dyn BusPublisher>, BusError>> {
        Box::pin(async {
            Ok(Box::new(LogStreamPublisher { log_stream: self.clone(), end: self.end() }) as _)
        })
    }

    fn subscribe(&self, _: Uuid) -> BoxFuture<'_, Result<Box<dyn BusSubscription>, BusError>> {
        Box::pin(std::future::pending())
    }
}

struct LogStreamPublisher {
    log_stream: LogStream,
    end: LogStreamEnd,
}

impl BusPublisher for LogStreamPublisher {
    fn resume(&mut self, _: LogStreamEnd) -> BoxFuture<'_, Result<Resume, BusError>> {
        self.end = self.log_stream.end();
        Box::pin(async { Ok(Resume::After(self.end)) })
    }

    fn publish(&mut self, batch: LogBatch) -> BoxFuture<'_, Result<LogStreamEnd, BusError>> {
        Box::pin(async move {
            while self.log_stream.hangs.load(Ordering::SeqCst) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            if self.log_stream.panics.load(Ordering::SeqCst) {
                self.log_stream.panicked.fetch_add(1, Ordering::SeqCst);
                panic!("on purpose");
            }
            for event in batch.events.iter() {
                tokio::task::yield_now().await;
                if self.log_stream.down.load(Ordering::SeqCst) {
                    return Err(BusError::Unavailable { reason: "down".into(), source: None });
                }
                let mut kept = self.log_stream.kept.lock().unwrap();
                if kept.len() as u64 != self.end.sequence {
                    let reason = format!("expected {}, found {}", self.end.sequence, kept.len());
                    return Err(BusError::Fenced { reason });
                }
                kept.push(event.position);
                self.end = LogStreamEnd { position: event.position, sequence: kept.len() as u64 };
            }
            Ok(self.end)
        })
    }

    fn heartbeat(&mut self, _: Position) -> BoxFuture<'_, Result<(), BusError>> {
        Box::pin(async { Ok(()) })
    }
}

/// One node's connection to a store that other nodes use as well.
#[derive(Clone)]
pub struct Link {
    inner: Arc<dyn EventStore>,
    /// Every call fails.
    pub down: Arc<AtomicBool>,
    /// Changes of the control state fail.
    pub uncontrolled: Arc<AtomicBool>,
    /// Renewals of leases do not return.
    pub mute: Arc<AtomicBool>,
    /// Lists of leases do not return either: this node receives no notifications of others.
    pub blind: Arc<AtomicBool>,
    /// Announces only the appends of this node.
    apart: Option<watch::Sender<Position>>,
    /// Factor between this node's positions and those of the store: the log has gaps.
    sparse: u64,
    /// Reads of the log from this position on do not return.
    wall: Arc<AtomicU64>,
    /// Number of positions at the end of the log that do not look stable yet.
    pub unstable: Arc<AtomicU64>,
    /// Number of pages with events that were read from the log. A read of one event asks for its age:
    /// it depends on the time.
    pub reads: Arc<AtomicU64>,
    /// Number of calls that renewed leases.
    pub renewals: Arc<AtomicU64>,
    pub shelf: Shelf,
}

/// Faults of snapshots on their way through a [`Link`].
#[derive(Clone, Default)]
pub struct Shelf {
    /// Saves are refused.
    pub full: Arc<AtomicBool>,
    /// Saves do not return while set, except saves of an empty snapshot.
    pub stuck: Arc<AtomicBool>,
    /// Number of attempted saves.
    pub asked: Arc<AtomicU64>,
    /// The saved snapshots.
    pub saved: Arc<Mutex<Vec<(StreamId, Snapshot)>>>,
}

impl Link {
    pub fn new(inner: &Arc<dyn EventStore>) -> Self {
        Self {
            inner: inner.clone(),
            down: Arc::default(),
            uncontrolled: Arc::default(),
            mute: Arc::default(),
            blind: Arc::default(),
            apart: None,
            sparse: 1,
            wall: Arc::new(AtomicU64::new(u64::MAX)),
            unstable: Arc::default(),
            reads: Arc::default(),
            renewals: Arc::default(),
            shelf: Shelf::default(),
        }
    }

    /// Another node's connection, with its own snapshot faults.
    pub fn beside(&self) -> Self {
        Self { shelf: Shelf::default(), ..self.clone() }
    }

    /// The store announces no appends of other nodes to this one.
    pub fn apart(self) -> Self {
        Self { apart: Some(watch::Sender::new(Position::START)), ..self }
    }

    pub fn sparse(self, times: u64) -> Self {
        Self { sparse: times, ..self }
    }

    pub fn wall(&self, position: u64) {
        self.wall.store(position, Ordering::SeqCst);
    }

    fn outside(&self, position: Position) -> Position {
        Position::new(position.get() * self.sparse)
    }

    fn inside(&self, position: Position) -> Position {
        Position::new(position.get() / self.sparse)
    }

    fn check(&self) -> Result<(), StoreError> {
        if self.down.load(Ordering::SeqCst) {
            return Err(cut_off());
        }
        Ok(())
    }
}

fn cut_off() -> StoreError {
    StoreError::Unavailable { reason: "cut off".into(), source: None }
}

macro_rules! through {
    ($self:ident, $call:expr) => {
        Box::pin(async move {
            $self.check()?;
            $call.await
        })
    };
}

impl EventStore for Link {
    fn info(&self) -> &StoreInfo {
        self.inner.info()
    }

    fn append(&self, batch: Vec<Append>) -> BoxFuture<'_, Vec<Result<Appended, AppendError>>> {
        Box::pin(async move {
            let answers = self.inner.append(batch).await;
            if let Some(apart) = &self.apart {
                let ends = answers.iter().flatten().filter_map(|appended| appended.positions.last());
                ends.max().map(|end| apart.send_replace(*end));
            }
            answers
        })
    }

    fn read_stream<'a>(
        &'a self,
        stream: &'a StreamId,
        after: Version,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<RecordedEvent>, StoreError>> {
        through!(self, self.inner.read_stream(stream, after, limit))
    }

    fn read_log(&self, read: ReadLog) -> BoxFuture<'_, Result<LogPage, StoreError>> {
        Box::pin(async move {
            self.check()?;
            while read.after.get() >= self.wall.load(Ordering::SeqCst) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            let (after, of_a_page) = (read.after, read.limit > 1);
            let inside =
                ReadLog { after: self.inside(after), upto: read.upto.map(|upto| self.inside(upto)), ..read };
            let mut page = self.inner.read_log(inside).await?;
            self.reads.fetch_add(u64::from(of_a_page && !page.events.is_empty()), Ordering::SeqCst);
            page.head = self.outside(page.head);
            page.scanned_to = self.outside(page.scanned_to).max(after);
            for event in &mut page.events {
                event.position = self.outside(event.position);
            }
            Ok(page)
        })
    }

    fn high_water_mark(&self) -> BoxFuture<'_, Result<Position, StoreError>> {
        through!(self, async {
            let stable = self
                .inner
                .high_water_mark()
                .await?
                .get()
                .saturating_sub(self.unstable.load(Ordering::SeqCst));
            Ok(self.outside(Position::new(stable)))
        })
    }

    fn appended(&self) -> watch::Receiver<Position> {
        self.apart.as_ref().map_or_else(|| self.inner.appended(), watch::Sender::subscribe)
    }

    fn projection<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<StoredProjection, StoreError>> {
        through!(self, self.inner.projection(name))
    }

    fn checkpoint<'a>(&'a self, key: &'a CheckpointKey) -> BoxFuture<'a, Result<Checkpoint, StoreError>> {
        through!(self, self.inner.checkpoint(key))
    }

    fn checkpoints<'a>(
        &'a self,
        projection: &'a str,
    ) -> BoxFuture<'a, Result<Vec<(CheckpointKey, Checkpoint)>, StoreError>> {
        through!(self, self.inner.checkpoints(projection))
    }

    fn write_progress(&self, writes: Vec<ProgressWrite>) -> BoxFuture<'_, Result<(), CheckpointError>> {
        through!(self, self.inner.write_progress(writes))
    }

    fn parked<'a>(
        &'a self,
        key: &'a CheckpointKey,
        from: Position,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<ParkedEvent>, StoreError>> {
        through!(self, self.inner.parked(key, from, limit))
    }

    fn requests<'a>(
        &'a self,
        projection: &'a str,
        from: Request,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<StoredRequest>, StoreError>> {
        through!(self, self.inner.requests(projection, from, limit))
    }

    fn controls(&self) -> BoxFuture<'_, Result<BTreeMap<String, ProjectionControl>, StoreError>> {
        through!(self, self.inner.controls())
    }

    fn control<'a>(
        &'a self,
        projection: &'a str,
        change: ControlChange,
    ) -> BoxFuture<'a, Result<ProjectionControl, StoreError>> {
        Box::pin(async move {
            self.check()?;
            if self.uncontrolled.load(Ordering::SeqCst) {
                return Err(cut_off());
            }
            self.inner.control(projection, change).await
        })
    }

    fn publisher_checkpoint(&self) -> BoxFuture<'_, Result<PublisherCheckpoint, StoreError>> {
        through!(self, self.inner.publisher_checkpoint())
    }

    fn save_publisher_checkpoint(
        &self,
        from: PublisherCheckpoint,
        to: PublisherCheckpoint,
    ) -> BoxFuture<'_, Result<bool, StoreError>> {
        through!(self, self.inner.save_publisher_checkpoint(from, to))
    }

    fn acquire_lease<'a>(
        &'a self,
        name: &'a str,
        owner: Uuid,
        ttl: Duration,
    ) -> BoxFuture<'a, Result<Option<Lease>, StoreError>> {
        through!(self, self.inner.acquire_lease(name, owner, ttl))
    }

    fn take_over_lease<'a>(
        &'a self,
        seen: &'a LeaseInfo,
        owner: Uuid,
        ttl: Duration,
    ) -> BoxFuture<'a, Result<Option<Lease>, StoreError>> {
        through!(self, self.inner.take_over_lease(seen, owner, ttl))
    }

    fn renew_leases<'a>(
        &'a self,
        leases: &'a [Lease],
        ttl: Duration,
    ) -> BoxFuture<'a, Result<Vec<bool>, StoreError>> {
        Box::pin(async move {
            self.check()?;
            if self.mute.load(Ordering::SeqCst) {
                std::future::pending::<()>().await;
            }
            self.renewals.fetch_add(1, Ordering::SeqCst);
            self.inner.renew_leases(leases, ttl).await
        })
    }

    fn release_lease<'a>(&'a self, lease: &'a Lease) -> BoxFuture<'a, Result<(), StoreError>> {
        through!(self, self.inner.release_lease(lease))
    }

    fn leases(&self) -> BoxFuture<'_, Result<Vec<LeaseInfo>, StoreError>> {
        Box::pin(async move {
            self.check()?;
            while self.blind.load(Ordering::SeqCst) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            self.inner.leases().await
        })
    }

    fn snapshot<'a>(&'a self, stream: &'a StreamId) -> BoxFuture<'a, Result<Option<Snapshot>, StoreError>> {
        through!(self, self.inner.snapshot(stream))
    }

    fn save_snapshot<'a>(
        &'a self,
        stream: &'a StreamId,
        snapshot: Snapshot,
    ) -> BoxFuture<'a, Result<(), StoreError>> {
        Box::pin(async move {
            self.check()?;
            let shelf = &self.shelf;
            shelf.asked.fetch_add(1, Ordering::SeqCst);
            while shelf.stuck.load(Ordering::SeqCst) && !snapshot.state.is_empty() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            if shelf.full.load(Ordering::SeqCst) {
                return Err(StoreError::Unavailable { reason: "full".into(), source: None });
            }
            self.inner.save_snapshot(stream, snapshot.clone()).await?;
            shelf.saved.lock().unwrap().push((stream.clone(), snapshot));
            Ok(())
        })
    }

    fn command_events<'a>(
        &'a self,
        stream: &'a StreamId,
        command: uuid::Uuid,
    ) -> BoxFuture<'a, Result<Option<storied::store::CommandEvents>, StoreError>> {
        through!(self, self.inner.command_events(stream, command))
    }

    fn command(
        &self,
        id: uuid::Uuid,
    ) -> BoxFuture<'_, Result<Option<storied::store::CommandRecord>, StoreError>> {
        through!(self, self.inner.command(id))
    }

    fn record_command(
        &self,
        record: storied::store::CommandRecord,
    ) -> BoxFuture<'_, Result<storied::store::CommandRecord, StoreError>> {
        through!(self, self.inner.record_command(record))
    }

    fn forget_commands(&self, age: Duration, limit: usize) -> BoxFuture<'_, Result<usize, StoreError>> {
        through!(self, self.inner.forget_commands(age, limit))
    }

    fn write_timers<'a>(
        &'a self,
        process: &'a str,
        put: Vec<storied::store::NewTimer>,
        remove: Vec<storied::store::TimerRef>,
    ) -> BoxFuture<'a, Result<(), StoreError>> {
        through!(self, self.inner.write_timers(process, put, remove))
    }

    fn due_timers<'a>(
        &'a self,
        process: &'a str,
        limit: usize,
    ) -> BoxFuture<'a, Result<storied::store::DueTimers, StoreError>> {
        through!(self, self.inner.due_timers(process, limit))
    }

    fn timers<'a>(
        &'a self,
        process: Option<&'a str>,
        after: Option<&'a storied::store::StoredTimer>,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<storied::store::StoredTimer>, StoreError>> {
        through!(self, self.inner.timers(process, after, limit))
    }
}

impl QueryStore for Link {
    fn mark_before_read(&self) -> BoxFuture<'_, Result<Position, StoreError>> {
        through!(self, self.inner.mark_before_read())
    }

    fn matching<'a>(
        &'a self,
        query: &'a Query,
        after: Position,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<RecordedEvent>, StoreError>> {
        through!(self, self.inner.matching(query, after, limit))
    }
}

impl ScheduleStore for Link {
    fn schedule_commands(
        &self,
        commands: Vec<NewScheduledCommand>,
    ) -> BoxFuture<'_, Result<Vec<ScheduledCommand>, StoreError>> {
        through!(self, self.inner.schedule_commands(commands))
    }

    fn start_due_commands(&self, limit: usize) -> BoxFuture<'_, Result<DueCommands, StoreError>> {
        through!(self, self.inner.start_due_commands(limit))
    }

    fn end_commands(
        &self,
        ends: Vec<ScheduledEnd>,
        lease: Option<Lease>,
    ) -> BoxFuture<'_, Result<(), StoreError>> {
        through!(self, self.inner.end_commands(ends, lease))
    }

    fn cancel_command(&self, id: Uuid) -> BoxFuture<'_, Result<Option<ScheduledCommand>, StoreError>> {
        through!(self, self.inner.cancel_command(id))
    }

    fn retry_command(&self, id: Uuid) -> BoxFuture<'_, Result<Option<ScheduledCommand>, StoreError>> {
        through!(self, self.inner.retry_command(id))
    }

    fn scheduled_command(&self, id: Uuid) -> BoxFuture<'_, Result<Option<ScheduledCommand>, StoreError>> {
        through!(self, self.inner.scheduled_command(id))
    }

    fn scheduled_commands<'a>(
        &'a self,
        query: &'a ScheduledQuery,
        after: Option<&'a ScheduledCommand>,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<ScheduledCommand>, StoreError>> {
        through!(self, self.inner.scheduled_commands(query, after, limit))
    }

    fn write_schedule(
        &self,
        schedule: StoredSchedule,
        commands: Vec<NewScheduledCommand>,
    ) -> BoxFuture<'_, Result<bool, StoreError>> {
        through!(self, self.inner.write_schedule(schedule, commands))
    }

    fn remove_schedule<'a>(
        &'a self,
        name: &'a str,
        revision: u64,
    ) -> BoxFuture<'a, Result<bool, StoreError>> {
        through!(self, self.inner.remove_schedule(name, revision))
    }

    fn schedule<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Option<StoredSchedule>, StoreError>> {
        through!(self, self.inner.schedule(name))
    }

    fn schedules<'a>(
        &'a self,
        after: Option<&'a str>,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<StoredSchedule>, StoreError>> {
        through!(self, self.inner.schedules(after, limit))
    }

    fn due_schedules(&self, limit: usize) -> BoxFuture<'_, Result<DueSchedules, StoreError>> {
        through!(self, self.inner.due_schedules(limit))
    }
}

/// Appends from several tasks at once until dropped, at most `n` events in total.
pub struct Writers {
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

impl Writers {
    pub fn start(store: &Arc<dyn EventStore>, tasks: u64, appends: u64, pause_millis: u64) -> Self {
        let tasks = (0..tasks).map(|task| {
            let store = store.clone();
            tokio::spawn(async move {
                let dice = Dice::new(task);
                for n in 0..appends {
                    append(&store, task, (0..=dice.roll(3)).map(|k| n + k)).await;
                    if pause_millis > 0 {
                        dice.pause(Duration::from_millis(pause_millis)).await;
                    }
                }
            })
        });
        Self { tasks: tasks.collect() }
    }

    pub async fn done(self) {
        for task in self.tasks {
            task.await.unwrap();
        }
    }
}
