//! Events, appends and checks that the suite shares.

use std::collections::HashMap;
use std::fmt;
use std::time::Duration;

use bytes::Bytes;
use uuid::Uuid;

use crate::event::{EventName, NewEvent, Position, RecordedEvent, StreamId, Tags, Version};
use crate::store::{Append, AppendError, Appended, Conflict, EventStore, ExpectedVersion, ReadLog};

/// Returns the stream `order/id`.
pub(super) fn stream(id: impl fmt::Display) -> StreamId {
    StreamId::new("order", id).unwrap()
}

pub(super) fn name(name: &str) -> EventName {
    EventName::new(name).unwrap()
}

/// Returns a unique event.
pub(super) fn event(event_name: &str) -> NewEvent {
    let id = Uuid::now_v7();
    NewEvent {
        id,
        name: name(event_name),
        payload: Bytes::copy_from_slice(id.as_bytes()),
        command_id: Uuid::now_v7(),
        correlation_id: None,
        metadata: Bytes::from_static(&[0xa0]),
        tags: Tags::new(),
    }
}

pub(super) fn events(count: usize) -> Vec<NewEvent> {
    (0..count).map(|_| event("order.placed")).collect()
}

pub(super) fn ids(events: &[NewEvent]) -> Vec<Uuid> {
    events.iter().map(|event| event.id).collect()
}

pub(super) fn recorded_ids(events: &[RecordedEvent]) -> Vec<Uuid> {
    events.iter().map(|event| event.id).collect()
}

/// Appends a batch of one.
pub(super) async fn append_one(store: &dyn EventStore, append: Append) -> Result<Appended, AppendError> {
    let mut answers = store.append(vec![append]).await;
    assert_eq!(answers.len(), 1, "one answer for one append");
    answers.remove(0)
}

/// Appends `events` to `stream`.
pub(super) async fn append_to(
    store: &dyn EventStore,
    stream: &StreamId,
    expected: ExpectedVersion,
    events: Vec<NewEvent>,
) -> Result<Appended, AppendError> {
    append_one(store, Append::one(stream.clone(), expected, events)).await
}

/// Appends `count` events to `stream`, at any version; returns their positions.
pub(super) async fn fill(store: &dyn EventStore, stream: &StreamId, count: usize) -> Vec<Position> {
    append_to(store, stream, ExpectedVersion::Any, events(count)).await.unwrap().positions
}

pub(super) fn conflict(answer: Result<Appended, AppendError>) -> Conflict {
    match answer {
        Err(AppendError::Conflict(conflict)) => conflict,
        other => panic!("expected a conflict, got {other:?}"),
    }
}

/// Returns the number of events in `stream`.
pub(super) async fn version(store: &dyn EventStore, stream: &StreamId) -> Version {
    let events = store.read_stream(stream, Version::NONE, usize::MAX).await.unwrap();
    events.last().map_or(Version::NONE, |event| event.version)
}

/// Reads pages until the scan has reached the end that the first page saw, or `upto`.
///
/// Returns all matching events, and the end of the scan.
pub(super) async fn scan(store: &dyn EventStore, mut read: ReadLog) -> (Vec<RecordedEvent>, Position) {
    let mut found = Vec::new();
    loop {
        let page = store.read_log(read.clone()).await.unwrap();
        assert!(page.events.len() <= read.limit, "a page has at most the requested number of events");
        assert!(page.scanned_to >= read.after, "a scan never goes back");
        for event in &page.events {
            assert!(
                event.position > read.after && event.position <= page.scanned_to,
                "an event outside its page"
            );
            assert!(read.filter.matches(event), "an event that does not match the filter");
        }
        let moved = page.scanned_to > read.after;
        read.after = page.scanned_to;
        found.extend(page.events);
        if !moved || page.scanned_to >= page.head || read.upto.is_some_and(|upto| page.scanned_to >= upto) {
            return (found, read.after);
        }
    }
}

pub(super) async fn whole_log(store: &dyn EventStore) -> Vec<RecordedEvent> {
    scan(store, ReadLog::after(Position::START)).await.0
}

/// Checks the invariants of a log.
///
/// Positions increase, versions of a stream are 1, 2, 3 …, ids are unique.
pub(super) fn assert_sound(log: &[RecordedEvent]) {
    assert!(log.is_sorted_by(|a, b| a.position < b.position), "positions do not increase");
    let mut streams: HashMap<&StreamId, Version> = HashMap::new();
    for event in log {
        let version = streams.entry(&event.stream).or_default();
        assert_eq!(event.version, version.next(), "a gap or a duplicate in {}", event.stream);
        *version = event.version;
    }
    let mut ids = recorded_ids(log);
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), log.len(), "an event is in the log twice");
}

/// Pseudo-random numbers; the suite needs variety, not quality.
pub(super) struct Dice(u64);

impl Dice {
    pub(super) fn new() -> Self {
        Self(Uuid::new_v4().as_u64_pair().0 | 1)
    }

    /// Returns a number below `limit`.
    pub(super) fn below(&mut self, limit: u64) -> u64 {
        // xorshift64
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % limit
    }

    /// Waits up to `limit`, often not at all.
    pub(super) async fn pause(&mut self, limit: Duration) {
        match self.below(4) {
            0 => {}
            1 => tokio::task::yield_now().await,
            _ => tokio::time::sleep(limit.mul_f64(self.below(1_000) as f64 / 1_000.0)).await,
        }
    }
}
