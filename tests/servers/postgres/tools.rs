//! Helpers of the tests in this directory.

use std::collections::HashMap;

use bytes::Bytes;
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection};
use storied::event::Tags;
use storied::store::{Append, AppendError, Appended};
use storied::{
    EventName, EventStore, ExpectedVersion, NewEvent, Position, ReadLog, RecordedEvent, StreamId, Version,
};
use uuid::Uuid;

pub use crate::support::{Dice, eventually_async as eventually};

pub fn stream(id: impl std::fmt::Display) -> StreamId {
    StreamId::new("order", id).unwrap()
}

pub fn event() -> NewEvent {
    let id = Uuid::now_v7();
    NewEvent {
        id,
        name: EventName::new("order.placed").unwrap(),
        payload: Bytes::copy_from_slice(id.as_bytes()),
        command_id: Uuid::now_v7(),
        correlation_id: None,
        metadata: Bytes::from_static(&[0xa0]),
        tags: Tags::new(),
    }
}

pub fn events(count: usize) -> Vec<NewEvent> {
    (0..count).map(|_| event()).collect()
}

pub fn exact(version: u64) -> ExpectedVersion {
    ExpectedVersion::Exact(Version::new(version))
}

pub async fn append(
    store: &dyn EventStore,
    stream: &StreamId,
    expected: ExpectedVersion,
    events: Vec<NewEvent>,
) -> Result<Appended, AppendError> {
    store.append(vec![Append::one(stream.clone(), expected, events)]).await.remove(0)
}

pub async fn whole_log(store: &dyn EventStore) -> Vec<RecordedEvent> {
    let mut log = Vec::new();
    let mut after = Position::START;
    loop {
        let page = store.read_log(ReadLog::after(after)).await.unwrap();
        after = page.scanned_to;
        let more = page.has_more();
        log.extend(page.events);
        if !more {
            return log;
        }
    }
}

/// Positions grow, versions of every stream are 1, 2, 3 …, ids occur once.
pub fn assert_sound(log: &[RecordedEvent]) {
    assert!(log.is_sorted_by(|a, b| a.position < b.position), "positions do not increase");
    let mut streams: HashMap<&StreamId, Version> = HashMap::new();
    for event in log {
        let version = streams.entry(&event.stream).or_default();
        assert_eq!(event.version, version.next(), "a hole or a double in {}", event.stream);
        *version = event.version;
    }
    let mut ids: Vec<_> = log.iter().map(|event| event.id).collect();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), log.len(), "an event is in the log twice");
}

pub async fn connect(url: &str) -> PgConnection {
    PgConnection::connect(url).await.unwrap()
}

pub async fn run(url: &str, sql: &str) {
    connect(url)
        .await
        .execute(AssertSqlSafe(sql.to_owned()))
        .await
        .unwrap_or_else(|error| panic!("{sql}: {error}"));
}

/// `url` with another user and database.
pub fn as_user(url: &str, user: &str) -> String {
    url.replace("storied@", &format!("{user}@"))
}
