//! The in-memory event store: for tests, and the simplest reference for all back ends.

mod queries;
mod schedule_store;

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use uuid::Uuid;

use super::append::{SizeLimits, append_valid};
use super::memory_clock::MemoryClock;
use super::memory_leases::MemoryLeases;
use super::memory_progress::MemoryProgress;
use super::memory_schedules::MemorySchedules;
use super::memory_tags::MemoryTags;
use super::memory_timers::MemoryTimers;
use super::page_size::PageSizer;
use super::version_check::StreamVersions;
use super::{
    Append, AppendError, Appended, BoxFuture, Checkpoint, CheckpointError, CheckpointKey, CommandEvents,
    CommandRecord, ControlChange, DueTimers, EventStore, Lease, LeaseInfo, LogPage, NewTimer, ParkedEvent,
    ProgressWrite, ProjectionControl, PublisherCheckpoint, ReadLog, Request, Snapshot, StoreError, StoreInfo,
    StoredProjection, StoredRequest, StoredTimer, TimerRef,
};
use crate::codec::Codec;
use crate::event::{Position, RecordedEvent, StreamId, Version};
use crate::time::later;

/// An event store in the memory of this process, with the same checks as the databases.
///
/// Clones are handles to the same store; its data is lost with the last clone.
#[derive(Debug, Clone)]
pub struct MemoryStore {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    info: StoreInfo,
    /// Never held across an await.
    data: Mutex<Data>,
    appended: watch::Sender<Position>,
}

#[derive(Debug, Default)]
struct Data {
    /// Shared with the timers and the schedules.
    clock: MemoryClock,
    /// The log; the position of an event is its index + 1.
    events: Vec<RecordedEvent>,
    /// Indexes into the log; the version of an event is its index + 1.
    streams: HashMap<StreamId, Vec<usize>>,
    tags: MemoryTags,
    progress: MemoryProgress,
    controls: BTreeMap<String, ProjectionControl>,
    publisher: PublisherCheckpoint,
    leases: MemoryLeases,
    snapshots: HashMap<StreamId, Snapshot>,
    commands: HashMap<Uuid, CommandRecord>,
    command_events: HashMap<(Uuid, StreamId), CommandEvents>,
    timers: MemoryTimers,
    schedules: MemorySchedules,
}

impl Default for MemoryStore {
    fn default() -> Self {
        Self::new()
    }
}

impl MemoryStore {
    /// Creates an empty store with payloads in CBOR.
    pub fn new() -> Self {
        Self::with_codec(Codec::default())
    }

    /// Creates an empty store with payloads in `codec`.
    pub fn with_codec(codec: Codec) -> Self {
        Self {
            shared: Arc::new(Shared {
                info: StoreInfo::new("memory", Uuid::new_v4(), codec),
                data: Mutex::new(Data::new()),
                appended: watch::Sender::new(Position::START),
            }),
        }
    }

    /// Moves the clock of the store ahead (feature `testing`).
    ///
    /// Timers of processes, scheduled commands and recurring schedules that are due then run within
    /// a second, in the order of their due times. Later events have the later time of recording.
    /// Leases, and [`Context::now`](crate::Context::now) of aggregates and processes, use the
    /// machine's clock: they do not move. Ticks that are older than
    /// [`Recurrence::catch_up`](crate::schedule::Recurrence::catch_up) count as missed.
    #[cfg(feature = "testing")]
    pub fn advance_clock(&self, by: Duration) {
        self.data().clock.advance(by);
    }

    fn data(&self) -> MutexGuard<'_, Data> {
        // A poisoned lock is safe to use: no code below can panic in the middle of a change.
        self.shared.data.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Data {
    fn new() -> Self {
        let clock = MemoryClock::default();
        let (timers, schedules) = (MemoryTimers::new(clock.clone()), MemorySchedules::new(clock.clone()));
        Self { clock, timers, schedules, ..Self::default() }
    }

    fn head(&self) -> Position {
        Position::new(self.events.len() as u64)
    }

    fn append(&mut self, append: Append, codec: Codec) -> Result<Appended, AppendError> {
        if let Some(boundary) = &append.unless {
            self.tags.check(boundary)?;
        }
        let versions = append
            .streams
            .iter()
            .map(|part| {
                let events = self.streams.get(&part.stream).map_or(0, Vec::len);
                (part.stream.clone(), Version::new(events as u64))
            })
            .collect();
        let appended = StreamVersions::new(versions, self.head()).assign(&append)?;
        let recorded_at = self.clock.now();
        for part in append.streams {
            let stream = self.streams.entry(part.stream.clone()).or_default();
            for event in part.events {
                stream.push(self.events.len());
                let version = Version::new(stream.len() as u64);
                let position = Position::new(self.events.len() as u64 + 1);
                self.command_events
                    .entry((event.command_id, part.stream.clone()))
                    .and_modify(|events| (events.last, events.position) = (version, position))
                    .or_insert(CommandEvents { first: version, last: version, position });
                self.tags.insert(position, &event);
                self.events.push(RecordedEvent {
                    id: event.id,
                    stream: part.stream.clone(),
                    version,
                    position,
                    name: event.name,
                    codec,
                    payload: event.payload,
                    command_id: event.command_id,
                    metadata: event.metadata,
                    recorded_at,
                });
            }
        }
        Ok(appended)
    }

    fn read_stream(&self, stream: &StreamId, after: Version, limit: usize) -> Vec<RecordedEvent> {
        let Some(indexes) = self.streams.get(stream) else { return Vec::new() };
        let after = index(after.get());
        indexes.iter().skip(after).take(limit).filter_map(|&index| self.events.get(index)).cloned().collect()
    }

    fn read_log(&self, read: &ReadLog) -> LogPage {
        let head = self.head();
        let end = read.upto.map_or(head, |upto| upto.min(head));
        let mut page = LogPage { events: Vec::new(), scanned_to: read.after, head };
        let range = index(read.after.get())..index(end.get());
        let page_sizer = PageSizer::default();
        let mut budget = page_sizer.page(read.limit.max(1));
        for event in self.events.get(range).unwrap_or_default() {
            if budget.is_full() {
                return page;
            }
            page.scanned_to = event.position;
            if read.filter.matches(event) {
                budget.take(event);
                page.events.push(event.clone());
            }
        }
        page
    }

    fn save_snapshot(&mut self, stream: &StreamId, snapshot: Snapshot) {
        let newer = self
            .snapshots
            .get(stream)
            .is_some_and(|old| old.revision == snapshot.revision && old.version > snapshot.version);
        if !newer {
            self.snapshots.insert(stream.clone(), snapshot);
        }
    }
}

/// Converts a position or version to an index; a number above `usize::MAX` is after every event.
fn index(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

impl EventStore for MemoryStore {
    fn info(&self) -> &StoreInfo {
        &self.shared.info
    }

    fn append(&self, batch: Vec<Append>) -> BoxFuture<'_, Vec<Result<Appended, AppendError>>> {
        Box::pin(append_valid(batch, SizeLimits::NONE, move |batch| async move {
            let mut data = self.data();
            let answers =
                batch.into_iter().map(|append| data.append(append, self.shared.info.codec)).collect();
            let head = data.head();
            drop(data);
            self.shared.appended.send_if_modified(|known| {
                let news = head > *known;
                *known = head.max(*known);
                news
            });
            answers
        }))
    }

    fn read_stream<'a>(
        &'a self,
        stream: &'a StreamId,
        after: Version,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<RecordedEvent>, StoreError>> {
        Box::pin(async move { Ok(self.data().read_stream(stream, after, limit)) })
    }

    fn read_log(&self, read: ReadLog) -> BoxFuture<'_, Result<LogPage, StoreError>> {
        Box::pin(async move {
            read.filter.check()?;
            Ok(self.data().read_log(&read))
        })
    }

    fn high_water_mark(&self) -> BoxFuture<'_, Result<Position, StoreError>> {
        Box::pin(async move { Ok(self.data().head()) })
    }

    fn appended(&self) -> watch::Receiver<Position> {
        self.shared.appended.subscribe()
    }

    fn projection<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<StoredProjection, StoreError>> {
        Box::pin(async move { Ok(self.data().progress.projection(name)) })
    }

    fn checkpoint<'a>(&'a self, key: &'a CheckpointKey) -> BoxFuture<'a, Result<Checkpoint, StoreError>> {
        Box::pin(async move { Ok(self.data().progress.checkpoint(key)) })
    }

    fn checkpoints<'a>(
        &'a self,
        projection: &'a str,
    ) -> BoxFuture<'a, Result<Vec<(CheckpointKey, Checkpoint)>, StoreError>> {
        Box::pin(async move { Ok(self.data().progress.checkpoints(projection)) })
    }

    fn write_progress(&self, writes: Vec<ProgressWrite>) -> BoxFuture<'_, Result<(), CheckpointError>> {
        Box::pin(async move { self.data().progress.write(writes) })
    }

    fn parked<'a>(
        &'a self,
        key: &'a CheckpointKey,
        from: Position,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<ParkedEvent>, StoreError>> {
        Box::pin(async move { Ok(self.data().progress.parked(key, from, limit)) })
    }

    fn requests<'a>(
        &'a self,
        projection: &'a str,
        from: Request,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<StoredRequest>, StoreError>> {
        Box::pin(async move { Ok(self.data().progress.requests(projection, from, limit)) })
    }

    fn controls(&self) -> BoxFuture<'_, Result<BTreeMap<String, ProjectionControl>, StoreError>> {
        Box::pin(async move { Ok(self.data().controls.clone()) })
    }

    fn control<'a>(
        &'a self,
        projection: &'a str,
        change: ControlChange,
    ) -> BoxFuture<'a, Result<ProjectionControl, StoreError>> {
        Box::pin(async move {
            let mut data = self.data();
            let control = data.controls.entry(projection.to_owned()).or_default();
            change.apply(control);
            Ok(*control)
        })
    }

    fn publisher_checkpoint(&self) -> BoxFuture<'_, Result<PublisherCheckpoint, StoreError>> {
        Box::pin(async move { Ok(self.data().publisher) })
    }

    fn save_publisher_checkpoint(
        &self,
        from: PublisherCheckpoint,
        to: PublisherCheckpoint,
    ) -> BoxFuture<'_, Result<bool, StoreError>> {
        Box::pin(async move {
            let mut data = self.data();
            let moved = data.publisher == from && to.epoch >= from.epoch;
            if moved {
                data.publisher = to;
            }
            Ok(moved)
        })
    }

    fn acquire_lease<'a>(
        &'a self,
        name: &'a str,
        owner: Uuid,
        ttl: Duration,
    ) -> BoxFuture<'a, Result<Option<Lease>, StoreError>> {
        Box::pin(async move { Ok(self.data().leases.acquire(name, owner, ttl)) })
    }

    fn take_over_lease<'a>(
        &'a self,
        seen: &'a LeaseInfo,
        owner: Uuid,
        ttl: Duration,
    ) -> BoxFuture<'a, Result<Option<Lease>, StoreError>> {
        Box::pin(async move { Ok(self.data().leases.take_over(seen, owner, ttl)) })
    }

    fn renew_leases<'a>(
        &'a self,
        leases: &'a [Lease],
        ttl: Duration,
    ) -> BoxFuture<'a, Result<Vec<bool>, StoreError>> {
        Box::pin(async move {
            let mut data = self.data();
            Ok(leases.iter().map(|lease| data.leases.renew(lease, ttl)).collect())
        })
    }

    fn release_lease<'a>(&'a self, lease: &'a Lease) -> BoxFuture<'a, Result<(), StoreError>> {
        Box::pin(async move {
            self.data().leases.release(lease);
            Ok(())
        })
    }

    fn leases(&self) -> BoxFuture<'_, Result<Vec<LeaseInfo>, StoreError>> {
        Box::pin(async move { Ok(self.data().leases.list()) })
    }

    fn snapshot<'a>(&'a self, stream: &'a StreamId) -> BoxFuture<'a, Result<Option<Snapshot>, StoreError>> {
        Box::pin(async move { Ok(self.data().snapshots.get(stream).cloned()) })
    }

    fn save_snapshot<'a>(
        &'a self,
        stream: &'a StreamId,
        snapshot: Snapshot,
    ) -> BoxFuture<'a, Result<(), StoreError>> {
        Box::pin(async move {
            self.data().save_snapshot(stream, snapshot);
            Ok(())
        })
    }

    fn command_events<'a>(
        &'a self,
        stream: &'a StreamId,
        command: Uuid,
    ) -> BoxFuture<'a, Result<Option<CommandEvents>, StoreError>> {
        Box::pin(async move { Ok(self.data().command_events.get(&(command, stream.clone())).copied()) })
    }

    fn command(&self, id: Uuid) -> BoxFuture<'_, Result<Option<CommandRecord>, StoreError>> {
        Box::pin(async move { Ok(self.data().commands.get(&id).cloned()) })
    }

    fn record_command(&self, mut record: CommandRecord) -> BoxFuture<'_, Result<CommandRecord, StoreError>> {
        Box::pin(async move {
            let mut data = self.data();
            record.recorded_at = data.clock.now();
            Ok(data.commands.entry(record.id).or_insert(record).clone())
        })
    }

    fn forget_commands(&self, age: Duration, limit: usize) -> BoxFuture<'_, Result<usize, StoreError>> {
        Box::pin(async move {
            let mut data = self.data();
            let now = data.clock.now();
            let old = data.commands.values().filter(|record| later(record.recorded_at, age) <= now);
            let old: Vec<_> = old.map(|record| record.id).take(limit).collect();
            old.iter().for_each(|id| _ = data.commands.remove(id));
            Ok(old.len())
        })
    }

    fn write_timers<'a>(
        &'a self,
        process: &'a str,
        put: Vec<NewTimer>,
        remove: Vec<TimerRef>,
    ) -> BoxFuture<'a, Result<(), StoreError>> {
        Box::pin(async move { self.data().timers.write(process, put, remove) })
    }

    fn due_timers<'a>(
        &'a self,
        process: &'a str,
        limit: usize,
    ) -> BoxFuture<'a, Result<DueTimers, StoreError>> {
        Box::pin(async move { self.data().timers.due(process, limit) })
    }

    fn timers<'a>(
        &'a self,
        process: Option<&'a str>,
        after: Option<&'a StoredTimer>,
        limit: usize,
    ) -> BoxFuture<'a, Result<Vec<StoredTimer>, StoreError>> {
        Box::pin(async move { self.data().timers.list(process, after, limit) })
    }
}
