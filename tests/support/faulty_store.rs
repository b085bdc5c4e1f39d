//! A store that blocks, fails, loses answers and counts. All other calls go to the inner store.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use storied::store::{
    Append, AppendError, Appended, BoxFuture, Checkpoint, CheckpointError, CheckpointKey, ControlChange,
    DueCommands, DueSchedules, ExpectedVersion, Lease, LeaseInfo, LogPage, NewScheduledCommand, ParkedEvent,
    ProgressWrite, ProjectionControl, PublisherCheckpoint, Query, QueryStore, ReadLog, Request,
    ScheduleStore, ScheduledCommand, ScheduledEnd, ScheduledQuery, Snapshot, StoreError, StoreInfo,
    StoredProjection, StoredRequest, StoredSchedule,
};
use storied::{EventStore, MemoryStore, NewEvent, Position, RecordedEvent, StreamId, Version};
use tokio::sync::watch;
use uuid::Uuid;

use super::dice::Dice;

type Rival = Arc<dyn Fn() -> NewEvent + Send + Sync>;

#[derive(Clone)]
enum Fault {
    None,
    /// Every append fails with this error, and nothing is written.
    Fail(StoreError),
    /// Every append is written, and its outcome is reported as unknown.
    Forget,
    /// A rival always writes to this stream first.
    Rival(StreamId, Rival),
    /// Every append is confirmed, and nothing is written.
    Discard,
    /// An append with an event of this payload is rejected alone.
    Poison(Vec<u8>),
    /// So many of 100 writes fail, and as many take effect without an answer.
    Sometimes(Arc<Dice>, u64),
}

/// The fate of a write under random faults.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Chance {
    Fine,
    Failed,
    Unanswered,
}

#[derive(Clone)]
pub struct FaultyStore {
    pub inner: MemoryStore,
    info: StoreInfo,
    /// Announces only the appends of this handle, as if the others were of another process.
    apart: Option<watch::Sender<Position>>,
    pub hold_snapshots: bool,
    pub snapshots_waiting: Arc<AtomicUsize>,
    fault: Arc<Mutex<Fault>>,
    delay: Arc<Mutex<Duration>>,
    holding: watch::Sender<bool>,
    holding_reads: watch::Sender<bool>,
    held: Arc<AtomicUsize>,
    events_read: Arc<AtomicUsize>,
    looked_up: Arc<AtomicUsize>,
    marks_read: Arc<AtomicUsize>,
}

impl FaultyStore {
    pub fn new(inner: MemoryStore) -> Self {
        Self {
            info: inner.info().clone(),
            inner,
            apart: None,
            hold_snapshots: false,
            snapshots_waiting: Arc::default(),
            fault: Arc::new(Mutex::new(Fault::None)),
            delay: Arc::default(),
            holding: watch::Sender::new(false),
            holding_reads: watch::Sender::new(false),
            held: Arc::default(),
            events_read: Arc::default(),
            looked_up: Arc::default(),
            marks_read: Arc::default(),
        }
    }

    /// A handle like that of another process: it announces no appends of other handles.
    pub fn apart(inner: MemoryStore) -> Self {
        Self { apart: Some(watch::Sender::new(Position::START)), ..Self::new(inner) }
    }

    /// Confirms appends without storing them.
    pub fn forgetful(inner: MemoryStore) -> Self {
        let store = Self::new(inner);
        store.set(Fault::Discard);
        store
    }

    pub fn with_append_concurrency(mut self, appends: usize) -> Self {
        self.info = self.info.with_append_concurrency(appends);
        self
    }

    fn set(&self, fault: Fault) {
        *self.fault.lock().unwrap() = fault;
    }

    pub fn fail_appends(&self, error: StoreError) {
        self.set(Fault::Fail(error));
    }

    pub fn poison(&self, payload: Vec<u8>) {
        self.set(Fault::Poison(payload));
    }

    /// Fails so many of 100 writes, and leaves as many without an answer.
    pub fn fail_sometimes(&self, percent: u64) {
        self.set(Fault::Sometimes(Arc::new(Dice::random()), percent));
    }

    fn chance(&self) -> Chance {
        match &*self.fault.lock().unwrap() {
            Fault::Sometimes(dice, percent) => match dice.roll(100) {
                roll if roll < *percent => Chance::Failed,
                roll if roll < 2 * *percent => Chance::Unanswered,
                _ => Chance::Fine,
            },
            _ => Chance::Fine,
        }
    }

    pub fn append_and_forget(&self) {
        self.set(Fault::Forget);
    }

    pub fn always_first(&self, stream: StreamId, event: impl Fn() -> NewEvent + Send + Sync + 'static) {
        self.set(Fault::Rival(stream, Arc::new(event)));
    }

    pub fn heal(&self) {
        self.set(Fault::None);
        self.release();
        self.holding_reads.send_replace(false);
    }

    pub fn delay(&self, delay: Duration) {
        *self.delay.lock().unwrap() = delay;
    }

    /// Blocks appends from now on.
    pub fn hold(&self) {
        self.held.store(0, Ordering::SeqCst);
        self.holding.send_replace(true);
    }

    pub fn hold_reads(&self) {
        self.holding_reads.send_replace(true);
    }

    pub fn release(&self) {
        self.holding.send_replace(false);
    }

    /// Waits until `appends` calls are blocked.
    pub async fn held(&self, appends: usize) {
        while self.held.load(Ordering::SeqCst) < appends {
            tokio::task::yield_now().await;
        }
    }

    /// Returns the number of calls since [`hold`](Self::hold).
    pub fn appends_held(&self) -> usize {
        self.held.load(Ordering::SeqCst)
    }

    pub fn count_reads(&self) {
        self.events_read.store(0, Ordering::SeqCst);
    }

    /// Returns the number of lookups of the events of a command.
    pub fn looked_up(&self) -> usize {
        self.looked_up.load(Ordering::SeqCst)
    }

    /// Returns the number of queries of the high-water mark.
    pub fn marks_read(&self) -> usize {
        self.marks_read.load(Ordering::SeqCst)
    }

    pub fn events_read(&self) -> usize {
        self.events_read.load(Ordering::SeqCst)
    }
}

fn unavailable() -> StoreError {
    StoreError::Unavailable { reason: "by chance".into(), source: None }
}

async fn until(gate: &watch::Sender<bool>) {
    let _ = gate.subscribe().wait_for(|holding| !holding).await;
}

/// Runs a write that fails, or takes effect without an answer, by chance.
macro_rules! by_chance {
    ($self:ident, $call:expr) => {
        Box::pin(async move {
            match $self.chance() {
                Chance::Fine => $call.await,
                Chance::Failed => Err(unavailable()),
                Chance::Unanswered => {
                    $call.await?;
                    Err(unavailable())
                }
            }
        })
    };
}

impl EventStore for FaultyStore {
    fn info(&self) -> &StoreInfo {
        &self.info
    }

    fn append(&self, batch: Vec<Append>) -> BoxFuture<'_, Vec<Result<Appended, AppendError>>> {
        Box::pin(async move {
            self.held.fetch_add(1, Ordering::SeqCst);
            until(&self.holding).await;
            let delay = *self.delay.lock().unwrap();
            if !delay.is_zero() {
                tokio::time::sleep(delay).await;
            }
            let fault = self.fault.lock().unwrap().clone();
            match fault {
                Fault::None => {
                    let answers = self.inner.append(batch).await;
                    if let Some(apart) = &self.apart {
                        let ends = answers.iter().flatten().filter_map(|appended| appended.positions.last());
                        ends.max().map(|end| apart.send_replace(*end));
                    }
                    answers
                }
                Fault::Fail(error) => batch.iter().map(|_| Err(error.clone().into())).collect(),
                Fault::Forget => {
                    let answers = self.inner.append(batch).await;
                    let unknown = StoreError::OutcomeUnknown { reason: "cut off".into(), source: None };
                    answers.iter().map(|_| Err(unknown.clone().into())).collect()
                }
                Fault::Rival(stream, event) => {
                    let rival = Append::one(stream, ExpectedVersion::Any, vec![event()]);
                    self.inner.append(vec![rival]).await.remove(0).unwrap();
                    self.inner.append(batch).await
                }
                Fault::Poison(payload) => {
                    let mut events =
                        batch.iter().flat_map(|append| &append.streams).flat_map(|part| &part.events);
                    if events.any(|event| event.payload == payload) {
                        let poison = StoreError::Invalid { reason: "poison".into() };
                        batch.iter().map(|_| Err(poison.clone().into())).collect()
                    } else {
                        self.inner.append(batch).await
                    }
                }
                Fault::Sometimes(..) => match self.chance() {
                    Chance::Fine => self.inner.append(batch).await,
                    Chance::Failed => batch.iter().map(|_| Err(unavailable().into())).collect(),
                    Chance::Unanswered => {
                        let answers = self.inner.append(batch).await;
                        let unknown = StoreError::OutcomeUnknown { reason: "cut off".into(), source: None };
                        answers.iter().map(|_| Err(unknown.clone().into())).collect()
                    }
                },
                Fault::Discard => panic!("nothing is appended to a forgetful store"),
            }
        })
    }

    fn read_stream<'a>(
        &'a self,
        stream: &'a StreamId,
        after: Version,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<RecordedEvent>, StoreError>> {
        Box::pin(async move {
            until(&self.holding_reads).await;
            let events = self.inner.read_stream(stream, after, limit).await?;
            self.events_read.fetch_add(events.len(), Ordering::SeqCst);
            Ok(events)
        })
    }

    fn read_log(&self, read: ReadLog) -> BoxFuture<'_, Result<LogPage, StoreError>> {
        Box::pin(async move {
            until(&self.holding_reads).await;
            self.inner.read_log(read).await
        })
    }

    fn high_water_mark(&self) -> BoxFuture<'_, Result<Position, StoreError>> {
        self.marks_read.fetch_add(1, Ordering::SeqCst);
        self.inner.high_water_mark()
    }

    fn appended(&self) -> watch::Receiver<Position> {
        self.apart.as_ref().map_or_else(|| self.inner.appended(), watch::Sender::subscribe)
    }

    fn projection<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<StoredProjection, StoreError>> {
        self.inner.projection(name)
    }

    fn checkpoint<'a>(&'a self, key: &'a CheckpointKey) -> BoxFuture<'a, Result<Checkpoint, StoreError>> {
        self.inner.checkpoint(key)
    }

    fn checkpoints<'a>(
        &'a self,
        projection: &'a str,
    ) -> BoxFuture<'a, Result<Vec<(CheckpointKey, Checkpoint)>, StoreError>> {
        self.inner.checkpoints(projection)
    }

    fn write_progress(&self, writes: Vec<ProgressWrite>) -> BoxFuture<'_, Result<(), CheckpointError>> {
        Box::pin(async move {
            match self.chance() {
                Chance::Fine => self.inner.write_progress(writes).await,
                Chance::Failed => Err(unavailable().into()),
                Chance::Unanswered => {
                    self.inner.write_progress(writes).await?;
                    Err(unavailable().into())
                }
            }
        })
    }

    fn parked<'a>(
        &'a self,
        key: &'a CheckpointKey,
        from: Position,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<ParkedEvent>, StoreError>> {
        self.inner.parked(key, from, limit)
    }

    fn requests<'a>(
        &'a self,
        projection: &'a str,
        from: Request,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<StoredRequest>, StoreError>> {
        self.inner.requests(projection, from, limit)
    }

    fn controls(&self) -> BoxFuture<'_, Result<BTreeMap<String, ProjectionControl>, StoreError>> {
        self.inner.controls()
    }

    fn control<'a>(
        &'a self,
        projection: &'a str,
        change: ControlChange,
    ) -> BoxFuture<'a, Result<ProjectionControl, StoreError>> {
        self.inner.control(projection, change)
    }

    fn publisher_checkpoint(&self) -> BoxFuture<'_, Result<PublisherCheckpoint, StoreError>> {
        self.inner.publisher_checkpoint()
    }

    fn save_publisher_checkpoint(
        &self,
        from: PublisherCheckpoint,
        to: PublisherCheckpoint,
    ) -> BoxFuture<'_, Result<bool, StoreError>> {
        self.inner.save_publisher_checkpoint(from, to)
    }

    fn acquire_lease<'a>(
        &'a self,
        name: &'a str,
        owner: Uuid,
        ttl: Duration,
    ) -> BoxFuture<'a, Result<Option<Lease>, StoreError>> {
        self.inner.acquire_lease(name, owner, ttl)
    }

    fn take_over_lease<'a>(
        &'a self,
        seen: &'a LeaseInfo,
        owner: Uuid,
        ttl: Duration,
    ) -> BoxFuture<'a, Result<Option<Lease>, StoreError>> {
        self.inner.take_over_lease(seen, owner, ttl)
    }

    fn renew_leases<'a>(
        &'a self,
        leases: &'a [Lease],
        ttl: Duration,
    ) -> BoxFuture<'a, Result<Vec<bool>, StoreError>> {
        self.inner.renew_leases(leases, ttl)
    }

    fn release_lease<'a>(&'a self, lease: &'a Lease) -> BoxFuture<'a, Result<(), StoreError>> {
        self.inner.release_lease(lease)
    }

    fn leases(&self) -> BoxFuture<'_, Result<Vec<LeaseInfo>, StoreError>> {
        self.inner.leases()
    }

    fn snapshot<'a>(&'a self, stream: &'a StreamId) -> BoxFuture<'a, Result<Option<Snapshot>, StoreError>> {
        self.inner.snapshot(stream)
    }

    fn save_snapshot<'a>(
        &'a self,
        stream: &'a StreamId,
        snapshot: Snapshot,
    ) -> BoxFuture<'a, Result<(), StoreError>> {
        if self.hold_snapshots {
            return Box::pin(async move {
                self.snapshots_waiting.fetch_add(1, Ordering::SeqCst);
                std::future::pending().await
            });
        }
        self.inner.save_snapshot(stream, snapshot)
    }

    fn command_events<'a>(
        &'a self,
        stream: &'a StreamId,
        command: uuid::Uuid,
    ) -> BoxFuture<'a, Result<Option<storied::store::CommandEvents>, StoreError>> {
        self.looked_up.fetch_add(1, Ordering::SeqCst);
        self.inner.command_events(stream, command)
    }

    fn command(
        &self,
        id: uuid::Uuid,
    ) -> BoxFuture<'_, Result<Option<storied::store::CommandRecord>, StoreError>> {
        self.inner.command(id)
    }

    fn record_command(
        &self,
        record: storied::store::CommandRecord,
    ) -> BoxFuture<'_, Result<storied::store::CommandRecord, StoreError>> {
        by_chance!(self, self.inner.record_command(record))
    }

    fn forget_commands(&self, age: Duration, limit: usize) -> BoxFuture<'_, Result<usize, StoreError>> {
        self.inner.forget_commands(age, limit)
    }

    fn write_timers<'a>(
        &'a self,
        process: &'a str,
        put: Vec<storied::store::NewTimer>,
        remove: Vec<storied::store::TimerRef>,
    ) -> BoxFuture<'a, Result<(), StoreError>> {
        by_chance!(self, self.inner.write_timers(process, put, remove))
    }

    fn due_timers<'a>(
        &'a self,
        process: &'a str,
        limit: usize,
    ) -> BoxFuture<'a, Result<storied::store::DueTimers, StoreError>> {
        self.inner.due_timers(process, limit)
    }

    fn timers<'a>(
        &'a self,
        process: Option<&'a str>,
        after: Option<&'a storied::store::StoredTimer>,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<storied::store::StoredTimer>, StoreError>> {
        self.inner.timers(process, after, limit)
    }
}

impl QueryStore for FaultyStore {
    fn mark_before_read(&self) -> BoxFuture<'_, Result<Position, StoreError>> {
        self.inner.mark_before_read()
    }

    fn matching<'a>(
        &'a self,
        query: &'a Query,
        after: Position,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<RecordedEvent>, StoreError>> {
        Box::pin(async move {
            until(&self.holding_reads).await;
            let events = self.inner.matching(query, after, limit).await?;
            self.events_read.fetch_add(events.len(), Ordering::SeqCst);
            Ok(events)
        })
    }
}

impl ScheduleStore for FaultyStore {
    fn schedule_commands(
        &self,
        commands: Vec<NewScheduledCommand>,
    ) -> BoxFuture<'_, Result<Vec<ScheduledCommand>, StoreError>> {
        by_chance!(self, self.inner.schedule_commands(commands))
    }

    fn start_due_commands(&self, limit: usize) -> BoxFuture<'_, Result<DueCommands, StoreError>> {
        by_chance!(self, self.inner.start_due_commands(limit))
    }

    fn end_commands(
        &self,
        ends: Vec<ScheduledEnd>,
        lease: Option<Lease>,
    ) -> BoxFuture<'_, Result<(), StoreError>> {
        by_chance!(self, self.inner.end_commands(ends, lease))
    }

    fn cancel_command(&self, id: Uuid) -> BoxFuture<'_, Result<Option<ScheduledCommand>, StoreError>> {
        by_chance!(self, self.inner.cancel_command(id))
    }

    fn retry_command(&self, id: Uuid) -> BoxFuture<'_, Result<Option<ScheduledCommand>, StoreError>> {
        by_chance!(self, self.inner.retry_command(id))
    }

    fn scheduled_command(&self, id: Uuid) -> BoxFuture<'_, Result<Option<ScheduledCommand>, StoreError>> {
        self.inner.scheduled_command(id)
    }

    fn scheduled_commands<'a>(
        &'a self,
        query: &'a ScheduledQuery,
        after: Option<&'a ScheduledCommand>,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<ScheduledCommand>, StoreError>> {
        self.inner.scheduled_commands(query, after, limit)
    }

    fn write_schedule(
        &self,
        schedule: StoredSchedule,
        commands: Vec<NewScheduledCommand>,
    ) -> BoxFuture<'_, Result<bool, StoreError>> {
        by_chance!(self, self.inner.write_schedule(schedule, commands))
    }

    fn remove_schedule<'a>(
        &'a self,
        name: &'a str,
        revision: u64,
    ) -> BoxFuture<'a, Result<bool, StoreError>> {
        by_chance!(self, self.inner.remove_schedule(name, revision))
    }

    fn schedule<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Option<StoredSchedule>, StoreError>> {
        self.inner.schedule(name)
    }

    fn schedules<'a>(
        &'a self,
        after: Option<&'a str>,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<StoredSchedule>, StoreError>> {
        self.inner.schedules(after, limit)
    }

    fn due_schedules(&self, limit: usize) -> BoxFuture<'_, Result<DueSchedules, StoreError>> {
        self.inner.due_schedules(limit)
    }
}
