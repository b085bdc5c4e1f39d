//! In-memory indexes: an index in memory on every node.

use std::collections::BTreeMap;
use std::time::Duration;

use storied::projection::{InMemoryIndex, WaitError};
use storied::{EventStore, FeedOptions, MemoryStore, Runtime, SqliteStore};

use crate::projection::fixtures::*;

/// Number of occurrences of each number, by stream.
type Counts = BTreeMap<(String, u64), u64>;

fn counts(name: &str) -> InMemoryIndex<Counts> {
    InMemoryIndex::new(name, |counts: &mut Counts, event, recorded| {
        let (Thing::Even { n } | Thing::Odd { n }) = event else { return Ok(()) };
        if n == 1_000_000 {
            // Before the first change.
            panic!("on purpose");
        }
        *counts.entry((recorded.stream.id().to_owned(), n)).or_default() += 1;
        Ok(())
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ready_index_contains_the_whole_log() {
    let dir = tempfile::TempDir::new().unwrap();
    let store = SqliteStore::open(dir.path().join("events.db")).await.unwrap();
    let log: std::sync::Arc<dyn EventStore> = std::sync::Arc::new(store.clone());
    append(&log, 1, 0..2_000).await;
    let indexes = [counts("counts"), counts("counts")];
    let early = indexes[0].ready(Duration::from_millis(20)).await.unwrap_err();
    assert!(matches!(early, WaitError::NotStarted { .. }), "{early}");
    let mut nodes = Vec::new();
    for index in &indexes {
        let feed = FeedOptions::new().idle_poll(Duration::from_millis(50));
        let store = SqliteStore::open(dir.path().join("events.db")).await.unwrap();
        nodes.push(Runtime::builder().store(store).feed(feed).in_memory_index(index).start().await.unwrap());
        index.ready(PATIENCE).await.unwrap();
        assert_eq!(index.read(Counts::len), 2_000);
    }
    // Many readers at a time while the index changes.
    let readers: Vec<_> = (0..4)
        .map(|_| {
            let index = indexes[0].clone();
            tokio::spawn(async move {
                while index.read(|counts| counts.get(&("2".into(), 99)).copied()).is_none() {
                    assert_eq!(index.read(|counts| counts.get(&("1".into(), 7)).copied()), Some(1));
                    tokio::task::yield_now().await;
                }
            })
        })
        .collect();
    for n in 0..100 {
        append(&log, 2, [n]).await;
    }
    for index in &indexes {
        index.ready(PATIENCE).await.unwrap();
        assert_eq!(index.read(Counts::len), 2_100);
        assert!(index.read(|counts| counts.values().all(|count| *count == 1)));
    }
    for reader in readers {
        reader.await.unwrap();
    }
    nodes[0].projection("counts").unwrap().reset().await.unwrap();
    indexes[0].ready(PATIENCE).await.unwrap();
    assert_eq!(indexes[0].read(Counts::len), 2_100);
    // It stops before the event that it cannot fold, and remains readable.
    append(&log, 3, [1_000_000]).await;
    let failed = indexes[0].ready(PATIENCE).await.unwrap_err();
    assert!(matches!(failed, WaitError::Failed { .. }), "{failed}");
    assert_eq!(indexes[0].read(Counts::len), 2_100);
    for node in nodes {
        node.shutdown().await.unwrap();
    }
}

/// A ready index has no entry of an earlier runtime, also if the log of the new one is empty.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_index_on_an_empty_log_is_ready_once_it_is_empty() {
    let index = counts("counts");
    for round in 0..20 {
        for events in [5, 0] {
            let store = MemoryStore::new();
            let log: std::sync::Arc<dyn EventStore> = std::sync::Arc::new(store.clone());
            if events > 0 {
                append(&log, 1, 0..events).await;
            }
            let node = Runtime::builder().store(store).in_memory_index(&index).start().await.unwrap();
            index.ready(PATIENCE).await.unwrap();
            assert_eq!(index.read(Counts::len) as u64, events, "round {round}");
            node.shutdown().await.unwrap();
        }
    }
}
